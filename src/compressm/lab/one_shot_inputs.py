"""What a cut of a checkpoint on disk reads: the model with its tokenizer, and the data in batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from compressm.errors import CheckpointError, ConfigError, MissingExtraError
from compressm.lab.data.arrays import Arrays, are_arrays, read_arrays
from compressm.layers import LanguageModel, SequenceClassifier
from compressm.observing.expected import Expected
from compressm.saving import mamba_ssm_format
from compressm.saving.checkpoint import load
from compressm.saving.mamba_ssm_format import is_mamba_ssm
from compressm.saving.source_folder import some

BATCH = 4  # sequences
_TOKENIZERS = ("tokenizer*", "vocab.*", "merges.txt", "spiece.model", "sentencepiece*")  # a tokenizer's files


def read_checkpoint(folder: Path) -> tuple[nn.Module, Any, list[str] | None]:
    """Load a checkpoint.

    Returns:
        the model in evaluation mode; its tokenizer, or None; and the names of the tensors that transformers found no
        place for, None for a checkpoint of ours.

    Raises:
        CheckpointError: no checkpoint, or one that cannot be loaded as a causal language model.
    """
    own, theirs = (folder / "compressm.json").is_file(), is_mamba_ssm(folder)
    if not own and not (folder / "config.json").is_file():
        raise CheckpointError(
            f"{folder} is no checkpoint: expected a folder with config.json (Hugging Face) or compressm.json"
        )
    if own:
        return load(folder).eval(), None, None
    if theirs:
        return mamba_ssm_format.load(folder), _tokenizer(folder), []
    return _hugging_face(folder)


def _tokenizer(folder: Path) -> Any:
    """The tokenizer in a checkpoint's folder; None without one."""
    from transformers import AutoTokenizer

    if not any(path for pattern in _TOKENIZERS for path in folder.glob(pattern)):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"the tokenizer in {folder} cannot be loaded: {_first_line(error)}") from error


def _hugging_face(folder: Path) -> tuple[nn.Module, Any, list[str]]:
    try:
        from transformers import AutoModelForCausalLM
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
    return model.eval(), _tokenizer(folder), list(info["unexpected_keys"])


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
    expected = Expected.of(model)
    if isinstance(model, SequenceClassifier):
        arrays = read_arrays(path, expected, labelled)
    elif are_arrays(path):
        arrays = _rows(read_arrays(path, expected, labelled=False), length)
    else:
        arrays = Arrays(_windows(model, tokenizer, path, length)[0])
    count = halves * (min(sequences, len(arrays)) // (halves * BATCH))
    if count == 0:
        why = ": half for the cut, half to measure the loss on" if halves == 2 else ""
        raise ConfigError(
            f"{path} holds {len(arrays)} sequences of {arrays.x.shape[1]}; {halves * BATCH} are needed{why}; give "
            "more data, or a smaller length"
        )
    targets = arrays.x if arrays.y is None else arrays.y
    places = [(i * BATCH, (i + 1) * BATCH) for i in range(count)]
    return [(arrays.batch(expected, start, stop), targets[start:stop]) for start, stop in places]


def _rows(arrays: Arrays, length: int) -> Arrays:
    """Sequences of tokens of at most this length: what goes beyond it is left out."""
    lengths = None if arrays.lengths is None else arrays.lengths.clamp_max(length)
    return Arrays(arrays.x[:, :length], None, lengths)


def _windows(model: nn.Module, tokenizer: Any, path: Path, length: int) -> tuple[Tensor, Tensor]:
    try:
        content = path.read_bytes()
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
