"""Checkpoints of transformers that are larger than memory: opened as pages of their files, written shard by shard."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressm.adapters import find_layers
from compressm.runtime.paging import Pager, places_in, write_shard
from compressm.saving.source_folder import Carried, complete_config, copy_files, weight_files


@dataclass(frozen=True)
class Mapped:
    """A model whose parameters are pages of its checkpoint's files.

    Attributes:
        model: in evaluation mode, with the dtypes of the files.
        unexpected: names of tensors in the files that the model has no place for.
        pager: of the files.
    """

    model: nn.Module
    unexpected: tuple[str, ...]
    pager: Pager

    @contextmanager
    def released(self, done: Callable[[], None] = lambda: None) -> Generator[None]:
        """While the block runs, let go of the pages after every block of layers.

        Args:
            done: called whenever a block of layers is done.
        """

        def after(*_: Any) -> None:
            self.pager.release()
            done()

        handles = [one.register_forward_hook(after) for one in blocks(self.model)]
        handles += [one.register_forward_hook(lambda *_: self.pager.release()) for one in _ends(self.model)]
        heads: list[Any] = [
            one for one in _ends(self.model) if isinstance(one, nn.Linear) and "forward" not in vars(one)
        ]
        for head in heads:
            head.forward = partial(_in_slices, head, self.pager)
        try:
            with self.pager.active():
                yield
        finally:
            for head in heads:
                del head.forward
            for handle in handles:
                handle.remove()


def blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of layers of a model: the entries of the outermost lists that hold its recurrent layers."""
    names = list(find_layers(model))
    lists = [name for name, module in model.named_modules() if isinstance(module, nn.ModuleList)]
    holding = [one for one in lists if any(name.startswith(f"{one}.") for name in names)]
    outermost = [one for one in holding if not any(one.startswith(f"{other}.") for other in holding)]
    return [block for one in outermost for block in cast("nn.ModuleList", model.get_submodule(one))]


_ROWS = 4096  # of a head, which are multiplied at a time


def _in_slices(head: Any, pager: Pager, hidden: Tensor) -> Tensor:
    """The head's output, some words at a time: CPUs without arithmetic in half precision widen and repack what they
    multiply, which would take several times the memory of the whole vocabulary's weights."""
    outputs: list[Tensor] = []
    for start in range(0, head.weight.shape[0], _ROWS):
        rows = slice(start, start + _ROWS)
        outputs.append(F.linear(hidden, head.weight[rows], None if head.bias is None else head.bias[rows]))
        pager.release()
    return torch.cat(outputs, -1)


def _ends(model: nn.Module) -> list[nn.Module]:
    """The modules before and after the blocks."""
    accessors = (getattr(model, name, None) for name in ("get_input_embeddings", "get_output_embeddings"))
    return [one for accessor in accessors if accessor is not None and (one := accessor()) is not None]


def open_mapped(folder: Path) -> Mapped | None:
    """Open a checkpoint of a causal language model as pages of its files.

    Returns:
        None if it must be loaded as a whole: weights that are pickled, parameters that the class of the model makes of
        several tensors or under other names, or several dtypes, between which transformers converts on loading.

    Raises:
        CheckpointError: damaged files.
    """
    files = weight_files(folder)
    if any(file.suffix != ".safetensors" for file in files):
        return None
    places = {name: (file, place) for file in files for name, place in places_in(file).items()}
    dtypes = {place.dtype for _, place in places.values()}
    if len(dtypes) != 1 or not dtypes <= {"F32", "F16", "BF16"}:
        return None
    pager = Pager()
    model = _empty_model(folder)
    values = dict(_named_tensors(model))
    if any(name in values and values[name].shape != place.shape for name, (_, place) in places.items()):
        return None
    for name, value in values.items():
        if name in places:
            _put(model, name, pager.tensor(*places[name]), isinstance(value, nn.Parameter))
    model.tie_weights()
    if any(value.is_meta for _, value in _named_tensors(model)):
        return None
    unexpected = tuple(sorted(set(places) - set(values)))
    return Mapped(model.eval().requires_grad_(False), unexpected, pager)


def _empty_model(folder: Path) -> Any:
    """The model of a config. Its parameters have no memory; its buffers, which files need not hold, have."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    register = nn.Module.register_parameter

    def register_empty(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(self, name, None if parameter is None else nn.Parameter(parameter.to("meta"), False))

    nn.Module.register_parameter = register_empty  # type: ignore[method-assign]
    try:
        with _undrawn():
            return AutoModelForCausalLM.from_config(config)
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


@contextmanager
def _undrawn() -> Generator[None]:
    """Build modules without drawing their first weights, where transformers allows this."""
    with suppress(ImportError):
        from transformers.initialization import no_init_weights

        with no_init_weights():
            yield
        return
    yield


def _named_tensors(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    """Parameters and persistent buffers, by the names of the state dict."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    kept = set(model.state_dict())
    yield from parameters.items()
    yield from ((name, value) for name, value in model.named_buffers() if name in kept)


def _put(model: nn.Module, name: str, value: Tensor, parameter: bool) -> None:
    owner, _, short = name.rpartition(".")
    module = model.get_submodule(owner)
    if parameter:
        module._parameters[short] = nn.Parameter(value, False)  # pyright: ignore[reportPrivateUsage]
    else:
        module._buffers[short] = value  # pyright: ignore[reportPrivateUsage]


def save_mapped(mapped: Mapped, source: Path, target: Path) -> Carried:
    """Write a mapped model, cut or not, in the shards of its source, with every other tensor and file of the source.

    Args:
        mapped: from `open_mapped` of the source.
        source: where it was opened.
        target: an existing folder.
    """
    model = cast("Any", mapped.model)
    now = dict(_named_tensors(mapped.model))
    files, weight_map, total = weight_files(source), dict[str, str](), [0, 0]
    for file in files:
        shard = {name: now.get(name) for name in places_in(file)}
        tensors = {
            name: mapped.pager.tensor(file, places_in(file)[name]) if value is None else value
            for name, value in shard.items()
        }
        write_shard(target / file.name, tensors)
        weight_map |= dict.fromkeys(tensors, file.name)
        total[0] += sum(value.numel() * value.element_size() for value in tensors.values())
        total[1] += sum(value.numel() for value in tensors.values())
    index = source / "model.safetensors.index.json"
    if index.is_file():
        metadata = {"total_size": total[0], "total_parameters": total[1]}
        content = {"metadata": metadata, "weight_map": weight_map}
        (target / index.name).write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    model.config.save_pretrained(target)
    complete_config(source / "config.json", target / "config.json", model.config)
    copied, left = copy_files(source, target, [source / "config.json", *files, index])
    return Carried(mapped.unexpected, copied, left)


__all__ = ["Mapped", "blocks", "open_mapped", "save_mapped"]
