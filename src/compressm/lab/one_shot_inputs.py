"""What a cut of a checkpoint on disk reads: the model with its tokenizer, and the data in batches."""

from __future__ import annotations

import inspect
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from compressm.errors import CheckpointError, ConfigError, MissingExtraError
from compressm.lab.data.arrays import Arrays, arranged, read_arrays
from compressm.lab.data.files import is_data
from compressm.lab.data.own import own_content
from compressm.lab.named import build_named, is_named
from compressm.layers import LanguageModel, SequenceClassifier, SequenceRegressor
from compressm.observing.expected import Expected
from compressm.saving.checkpoint import load
from compressm.saving.source_folder import some

BATCH = 4  # sequences
_TOKENIZERS = ("tokenizer*", "vocab.*", "merges.txt", "spiece.model", "sentencepiece*")  # a tokenizer's files


def read_checkpoint(folder: Path, build: str | None = None) -> tuple[nn.Module, Any, list[str] | None]:
    """Load a checkpoint.

    Args:
        folder: a Hugging Face folder, or one of ours; with ``build`` also a file ``.safetensors`` of the state dict.
        build: ``package.module:function`` that returns a model of the user's own class; see `compressm.lab.named`.

    Returns:
        the model in evaluation mode; its tokenizer, or None; and the names of the tensors that transformers found no
        place for, None for a checkpoint of ours.

    Raises:
        CheckpointError: no checkpoint, or one that cannot be loaded as a causal language model.
    """
    if build is not None:
        return _of_the_user(folder, build_named(build, "--model")).eval(), None, None
    own = (folder / "compressm.json").is_file()
    if folder.is_file():
        raise CheckpointError(f"{folder} is a file: say with --model package.module:function what builds its model")
    if not own and not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} is no checkpoint: expected a folder with config.json (Hugging Face) or compressm.json"
        )
    model, tokenizer, unexpected = (load(folder), None, None) if own else _hugging_face(folder)
    return model.eval(), tokenizer, unexpected


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


def _hugging_face(folder: Path) -> tuple[nn.Module, Any, list[str]]:
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            'a Hugging Face checkpoint needs transformers: pip install "compressm[transformers]"'
        ) from error
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{folder} cannot be loaded as a causal language model: {_first_line(error)}") from error
    model, info = loaded
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(
            f"{folder} lacks {some(missing)}, which transformers would draw at random: copy the folder again, or save "
            "the model that you trained"
        )
    unexpected = list(info["unexpected_keys"])
    if not any(path for pattern in _TOKENIZERS for path in folder.glob(pattern)):
        return model, None, unexpected
    try:
        return model, AutoTokenizer.from_pretrained(folder, local_files_only=True), unexpected
    except (OSError, ValueError) as error:
        raise CheckpointError(f"the tokenizer in {folder} cannot be loaded: {_first_line(error)}") from error


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
    named = is_named(str(path)) and not path.exists()
    if named or expected.kind == "anything":
        arrays = arranged(own_content(str(path)), expected, labelled, f"data {path}")
    elif isinstance(model, SequenceClassifier):
        arrays = read_arrays(path, expected, labelled)
    elif is_data(path):
        arrays = read_arrays(path, expected, labelled=False)
    else:
        arrays = Arrays(_windows(model, tokenizer, path, length)[0])
    if expected.kind == "tokens" and not isinstance(model, SequenceClassifier):
        arrays = _rows(arrays, length)
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
    return [(arrays.batch(expected, start, stop), targets[start:stop]) for start, stop in places]


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


def _windows(model: nn.Module, tokenizer: Any, path: Path, length: int) -> tuple[Tensor, Tensor]:
    try:
        texts = sorted(path.rglob("*.txt")) if path.is_dir() else [path]
        if not texts:
            raise ConfigError(f"data {path} holds neither text (.txt) nor arrays: check the path")
        content = b"\n".join(text.read_bytes() for text in texts)
    except OSError as error:
        raise ConfigError(f"data {path} cannot be read: {error.strerror}") from error
    vocabulary = cast("Any", model).config["vocabulary"] if isinstance(model, LanguageModel) else _vocabulary(model)
    if tokenizer is not None:
        tokens = torch.tensor(tokenizer(content.decode("utf-8", "replace"))["input_ids"], dtype=torch.long)
    elif vocabulary == 256:  # the only size at which every byte has an id and no id is anything else
        tokens = torch.from_numpy(np.frombuffer(content, np.uint8).astype(np.int64))
    else:
        raise ConfigError(
            f"the checkpoint has no tokenizer and a vocabulary of {vocabulary}, and only one of 256 is that of bytes: "
            "save the tokenizer in the checkpoint's folder, or call compressm.compress from Python, with ids as data"
        )
    if len(tokens) and (largest := int(tokens.max())) >= vocabulary:
        raise ConfigError(
            f"the tokenizer gives ids up to {largest}, and the model's vocabulary has {vocabulary}: save the model's "
            "own tokenizer in the checkpoint's folder"
        )
    count = len(tokens) // length
    windows = tokens[: count * length].view(count, length)
    return windows, windows


def _vocabulary(model: nn.Module) -> int:
    return int(cast("Any", model).get_input_embeddings().num_embeddings)


__all__ = ["BATCH", "read_batches", "read_checkpoint"]
