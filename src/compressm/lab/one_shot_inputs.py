"""What a cut of a checkpoint on disk reads: the model with its tokenizer, and the data in batches."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from compressm.errors import CheckpointError, ConfigError, MissingExtraError
from compressm.integrations.hf_scan import can_be_fast, fast_scan
from compressm.lab.data.arrays import Arrays, arranged
from compressm.lab.data.files import is_data
from compressm.lab.data.own import own_content
from compressm.lab.data.text import first_bytes
from compressm.lab.named import build_named, is_named, tried
from compressm.layers import LanguageModel, SequenceClassifier, SequenceRegressor
from compressm.observing.expected import Expected, described
from compressm.runtime.progress import Bar
from compressm.runtime.sixteen_bits import quick_products
from compressm.saving import mamba_ssm_format
from compressm.saving.arguments import class_names_of, saved_arguments
from compressm.saving.checkpoint import load
from compressm.saving.mamba_ssm_format import is_mamba_ssm
from compressm.saving.mapped import Mapped, blocks, open_mapped
from compressm.saving.source_folder import some

BATCH = 4  # sequences
_EXAMPLES, _EXAMPLE_LENGTH = 8, 512  # sequences of text, and tokens in each
_BYTES_PER_TOKEN, _SPARE = 8, 16
_TOKENIZERS = ("tokenizer*", "vocab.*", "merges.txt", "spiece.model", "sentencepiece*")  # a tokenizer's files


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read.

    Attributes:
        model: in evaluation mode.
        tokenizer: None without one.
        format: ours, that of mamba_ssm, or that of transformers.
        unexpected: names of the tensors that transformers found no place for.
        mapped: if the model's parameters are pages of its files.
    """

    model: nn.Module
    tokenizer: Any
    format: Literal["compressm", "mamba_ssm", "transformers"]
    unexpected: tuple[str, ...] = ()
    mapped: Mapped | None = None

    @contextmanager
    def at_work(self, title: str = "", passes: int = 0) -> Generator[None]:
        """While the model reads data: our scans where it has them, the faster products, pages let go of, and a bar.

        Args:
            title: of the bar.
            passes: how many batches will be read; 0 for no bar.
        """
        with ExitStack() as stack:
            if can_be_fast(self.model):
                stack.enter_context(fast_scan(self.model))
            stack.enter_context(quick_products(self.model))
            units = passes * max(1, len(blocks(self.model)))  # one per block of layers and batch
            bar = stack.enter_context(Bar(title, units, quiet=not passes, transient=True))
            after = _after_blocks(self.model, bar.advance) if self.mapped is None else self.mapped.released(bar.advance)
            stack.enter_context(after)
            yield


@contextmanager
def _after_blocks(model: nn.Module, done: Callable[[], None]) -> Generator[None]:
    """While the block runs, call a function whenever a block of the model's layers is done."""
    handles = [one.register_forward_hook(lambda *_: done()) for one in blocks(model)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def read_checkpoint(folder: Path, build: str | None = None, in_memory: bool = False) -> Checkpoint:
    """Load a checkpoint, or open it as pages of its files where that is possible; see `compressm.saving.mapped`.

    Args:
        folder: a Hugging Face folder, or one of ours; with ``build`` also a file ``.safetensors`` of the state dict.
        build: ``package.module:function`` that returns a model of the user's own class; see `compressm.lab.named`.
        in_memory: load it, as training and cuts that are tried and undone need.

    Raises:
        CheckpointError: no checkpoint, or one that cannot be loaded as a causal language model.
    """
    if (folder / "model" / "compressm.json").is_file():
        raise CheckpointError(f"{folder} is the folder of a run: name the model in it, {folder / 'model'}")
    if build is not None:
        model = build_named(build, "--model", saved_arguments(folder))
        return Checkpoint(_of_the_user(folder, model).eval(), None, "compressm")
    if folder.is_file():
        raise CheckpointError(f"{folder} is a file: say with --model package.module:function what builds its model")
    own, theirs = (folder / "compressm.json").is_file(), is_mamba_ssm(folder)
    if not own and not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} is no checkpoint: expected a folder with config.json (Hugging Face) or compressm.json"
        )
    if own:
        return Checkpoint(load(folder).eval(), None, "compressm")
    if theirs:
        return Checkpoint(mamba_ssm_format.load(folder), _tokenizer(folder), "mamba_ssm")
    return _hugging_face(folder, in_memory)


def _of_the_user(path: Path, model: nn.Module) -> nn.Module:
    """A model with the weights of a checkpoint of ours, or of a safetensors file."""
    if (path / "compressm.json").is_file():
        return load(path, model)
    file = path / "model.safetensors" if path.is_dir() else path
    if not file.is_file():
        raise CheckpointError(
            f"{file}: no such file; save one with safetensors.torch.save_file(model.state_dict(), ...)"
        )
    try:
        tensors = load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(
            f"{file} cannot be read as safetensors ({_first_line(error)}): save one with "
            "safetensors.torch.save_file(model.state_dict(), ...)"
        ) from error
    try:
        model.load_state_dict(tensors)
    except RuntimeError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        raise CheckpointError(f"{file} does not fit the model: {' '.join(lines[1:3])}") from error
    return model


def _tokenizer(folder: Path) -> Any:
    """The tokenizer in a checkpoint's folder; None without one."""
    from transformers import AutoTokenizer

    if not any(path for pattern in _TOKENIZERS for path in folder.glob(pattern)):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"the tokenizer in {folder} cannot be loaded: {_first_line(error)}") from error


def _hugging_face(folder: Path, in_memory: bool) -> Checkpoint:
    try:
        from transformers import AutoModelForCausalLM
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            'a Hugging Face checkpoint needs transformers: pip install "compressm[transformers]"'
        ) from error
    try:
        mapped = None if in_memory else open_mapped(folder)
        if mapped is not None:
            return Checkpoint(mapped.model, _tokenizer(folder), "transformers", mapped.unexpected, mapped)
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{folder} cannot be loaded as a causal language model: {_first_line(error)}") from error
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(
            f"{folder} lacks {some(missing)}, which transformers would draw at random: copy the folder again, or save "
            "the model that you trained"
        )
    return Checkpoint(model.eval(), _tokenizer(folder), "transformers", tuple(info["unexpected_keys"]))


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def read_batches(
    model: nn.Module,
    tokenizer: Any,
    path: Path,
    sequences: int,
    length: int,
    halves: int = 1,
    labelled: bool = True,
) -> list[tuple[dict[str, Tensor], Tensor]]:
    """The data in batches of `BATCH` sequences, as many in each of the halves.

    Args:
        model: says what its inputs are.
        tokenizer: the model's; None where it has none.
        path: the file; see `compressm.lab.one_shot.compress_checkpoint`.
        sequences: how many at most, in all halves together.
        length: tokens per sequence.
        halves: 2 where one half is for the cut and the other to measure the loss on.
        labelled: whether a classifier's labels are needed.

    Returns:
        inputs by the names of the model's arguments, with the tokens or labels that they should lead to.

    Raises:
        ConfigError: data that cannot be used.
    """
    if sequences < halves * BATCH or length < 2:
        raise ConfigError(
            f"sequences must be at least {BATCH} and length at least 2; got {sequences // halves} and {length}"
        )
    expected = _expected(model)
    arrays = read_arrays(model, tokenizer, path, sequences, length, labelled)
    count = halves * (min(sequences, len(arrays)) // (halves * BATCH))
    if count == 0:
        why = ": half for the cut, half to measure the loss on" if halves == 2 else ""
        raise ConfigError(
            f"{path} holds {len(arrays)} sequences of {arrays.x.shape[1]}; {halves * BATCH} are needed{why}; give "
            "more data, or a smaller length"
        )
    targets = arrays.x if arrays.y is None else arrays.y
    if arrays.y is None and (expected.kind == "anything" or isinstance(model, SequenceRegressor)):
        targets = torch.empty(len(arrays), 0)  # nothing to measure a loss by
    places = [(i * BATCH, (i + 1) * BATCH) for i in range(count)]
    if expected.kind == "anything":
        targets = _fitting(model, arrays.batch(expected, 0, 2), targets, path)
    return [(arrays.batch(expected, start, stop), targets[start:stop]) for start, stop in places]


def read_arrays(model: nn.Module, tokenizer: Any, path: Path, sequences: int, length: int, labelled: bool) -> Arrays:
    """The data in one piece; for the arguments see `read_batches`.

    Raises:
        ConfigError: data that cannot be used.
    """
    expected = _expected(model)
    predicts_tokens = expected.kind == "tokens" and not isinstance(model, SequenceClassifier)
    if predicts_tokens and not _is_reference(path) and not is_data(path):
        return Arrays(_windows(model, tokenizer, path, sequences, length))
    wanted = labelled and not predicts_tokens
    arrays = arranged(own_content(str(path), "data"), expected, wanted, f"data {path}", class_names_of(model))
    if predicts_tokens:
        return _rows(arrays, length)
    if isinstance(model, SequenceRegressor) and arrays.y is not None:
        return replace(arrays, y=_numbers(model, arrays, f"y in data {path}"))
    return arrays


def read_examples(read: Checkpoint, path: Path) -> Tensor:
    """Some sequences of data, as the model takes them: shape ``(N, length, ...)``.

    Raises:
        ConfigError: data that cannot be used.
    """
    arrays = read_arrays(read.model, read.tokenizer, path, _EXAMPLES, _EXAMPLE_LENGTH, labelled=False)
    if not len(arrays):
        raise ConfigError(f"data {path}: too short for one sequence of {_EXAMPLE_LENGTH}; give more")
    return arrays.x


def _is_reference(path: Path) -> bool:
    return is_named(str(path)) and not path.exists()


def _numbers(model: SequenceRegressor, arrays: Arrays, where: str) -> Tensor:
    """The numbers that a regressor is to predict, whole or not."""
    assert arrays.y is not None
    predicted = (*arrays.x.shape[: 1 + model.per_step], model.d_output)
    if tuple(arrays.y.shape) not in (predicted, predicted[: -1 if model.d_output == 1 else None]):
        raise ConfigError(
            f"{where} has shape {tuple(arrays.y.shape)}: {predicted} was expected, since the model predicts "
            f"{model.d_output} at every {'step' if model.per_step else 'sequence'}; give the same as in training"
        )
    return arrays.y.float()


def _fitting(model: nn.Module, inputs: dict[str, Tensor], targets: Tensor, path: Path) -> Tensor:
    """The targets for a model of the user's, which says nothing of what it reads. It is called on two sequences."""
    what = " and ".join(f"{name}, {described(value)}" for name, value in inputs.items())
    refusal = f"data {path}: {type(model).__name__} cannot be called with {what}"
    logits = tried(model, lambda one: one(**inputs), refusal)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or targets.is_floating_point() or targets.ndim != 1:
        return targets
    if logits.shape[1] == 1:  # one number, not one class
        return targets.float()
    if int(targets.max()) >= logits.shape[1]:
        raise ConfigError(
            f"y in data {path} holds labels up to {int(targets.max())}: {type(model).__name__} knows {logits.shape[1]} "
            f"classes, 0 to {logits.shape[1] - 1}; number them in the order that the model was trained with"
        )
    return targets


def _expected(model: nn.Module) -> Expected:
    """The model's expectations, with the name of its input: batches here are keyword arguments."""
    expected = Expected.of(model)
    if expected.argument:
        return expected
    return replace(expected, argument=next(iter(inspect.signature(model.forward).parameters)))


def _rows(arrays: Arrays, length: int) -> Arrays:
    """Sequences of tokens of at most this length: what goes beyond it is left out."""
    lengths = None if arrays.lengths is None else arrays.lengths.clamp_max(length)
    return Arrays(arrays.x[:, :length], None, lengths)


def _windows(model: nn.Module, tokenizer: Any, path: Path, sequences: int, length: int) -> Tensor:
    """The first tokens of texts, in windows, shape ``(count, length)`` with at most ``sequences`` windows."""
    vocabulary = cast("Any", model).config["vocabulary"] if isinstance(model, LanguageModel) else _vocabulary(model)
    if tokenizer is None and vocabulary != 256:  # the only size at which every byte has an id and no id is else
        raise ConfigError(
            f"the checkpoint has no tokenizer and a vocabulary of {vocabulary}, and only one of 256 is that of bytes: "
            "save the tokenizer in the checkpoint's folder, or call compressm.compress from Python, with ids as data"
        )
    tokens = _first_tokens(tokenizer, path, sequences * length)
    if len(tokens) and (largest := int(tokens.max())) >= vocabulary:
        raise ConfigError(
            f"the tokenizer gives ids up to {largest}, and the model's vocabulary has {vocabulary}: save the model's "
            "own tokenizer in the checkpoint's folder"
        )
    count = len(tokens) // length
    return tokens[: count * length].view(count, length)


def _first_tokens(tokenizer: Any, path: Path, count: int) -> Tensor:
    """The first ``count`` tokens of texts, or all if there are fewer. No more of the files is read than they need."""
    wanted = count if tokenizer is None else _BYTES_PER_TOKEN * count
    while True:
        content, whole = first_bytes(path, wanted)
        if tokenizer is None:
            return torch.from_numpy(np.frombuffer(content, np.uint8).astype(np.int64))
        text = content.decode("utf-8", "replace" if whole else "ignore")
        tokens = torch.tensor(tokenizer(text)["input_ids"], dtype=torch.long)
        # Where the text was cut the last tokens may differ from those of the whole, so there must be some to spare.
        if whole or len(tokens) > count + _SPARE:
            return tokens[:count]
        wanted *= 4


def _vocabulary(model: nn.Module) -> int:
    return int(cast("Any", model).get_input_embeddings().num_embeddings)


__all__ = ["BATCH", "Checkpoint", "read_arrays", "read_batches", "read_checkpoint", "read_examples"]
