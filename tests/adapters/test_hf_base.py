"""What a layer of transformers finds in its cache, and what its config is told; without transformers."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from compressm.adapters.hf_base import Carried, HuggingFaceAdapter
from compressm.adapters.hf_mamba import HFMambaAdapter
from compressm.errors import UnsupportedModelError


class Mixer(nn.Module):
    def __init__(self, states: int = 4) -> None:
        super().__init__()
        self.layer_idx, self.A_log = 1, nn.Parameter(torch.zeros(3, states))


class Sharper(Mixer):
    """A subclass, which the adapter of the class is for too."""


class Cache:
    """A cache in the form of transformers', with a state per layer."""

    def __init__(self, conv: Tensor | None, recurrent: Tensor | None, recording: Any) -> None:
        self.states = {1: (conv, recurrent, recording)}

    def get_conv_state(self, index: int) -> Tensor | None:
        return self.states[index][0]

    def get_recurrent_state(self, index: int) -> Tensor | None:
        return self.states[index][1]

    def is_recording_past(self, index: int) -> Any:
        return self.states[index][2]


def adapter(kind: type[HuggingFaceAdapter] = HFMambaAdapter) -> Any:
    return kind(f"{Mixer.__module__}.{Mixer.__qualname__}")


@pytest.mark.parametrize("recording", [True, False])
def test_a_call_goes_on_from_what_the_cache_has_for_this_layer(recording: bool) -> None:
    conv, recurrent = torch.ones(2, 3, 4, requires_grad=True), torch.zeros(2, 3, 5, requires_grad=True)
    found = adapter().carried(Mixer(), {"cache_params": Cache(conv, recurrent, int(recording))})
    assert torch.equal(found.conv, conv)
    assert torch.equal(found.recurrent, recurrent)
    assert not found.conv.requires_grad
    assert not found.recurrent.requires_grad
    assert found.recording is recording
    assert adapter().carried(Mixer(), {"cache_params": Cache(conv, None, recording)}).recurrent is None
    assert adapter().carried(Mixer(), {"cache_params": Cache(None, None, recording)}) is None  # nothing was read yet
    assert adapter().carried(Mixer(), {}) is None
    with pytest.raises(UnsupportedModelError, match="state in cache_params"):
        adapter().carried(Mixer(), {"cache_params": SimpleNamespace(seqlen_offset=3)})
    with pytest.raises(UnsupportedModelError, match="state in initial_state"):
        adapter().carried(Mixer(), {"initial_state": conv})


def test_a_carried_state_answers_as_a_cache_and_keeps_nothing() -> None:
    conv, recurrent = torch.arange(24.0).view(2, 3, 4), torch.arange(30.0).view(2, 3, 5)
    carried = Carried(conv, recurrent, True)
    assert carried.get_conv_state(7) is conv
    assert carried.get_recurrent_state(7) is recurrent
    assert carried.is_recording_past(7) is True
    assert torch.equal(carried.update_conv_state(torch.ones(2, 3, 2), 7), torch.cat([conv, torch.ones(2, 3, 2)], -1))
    assert carried.conv is conv
    assert carried.update_recurrent_state(torch.ones(1), 7) is None  # type: ignore[func-returns-value]
    assert carried.recurrent is recurrent
    one = carried.first(1)
    assert torch.equal(one.conv, conv[:1])
    assert one.recurrent is not None
    assert torch.equal(one.recurrent, recurrent[:1])
    assert one.recording is True
    one.conv.zero_()
    one.recurrent.zero_()
    assert bool(conv[0].any())  # a copy
    assert bool(recurrent[0].any())
    assert Carried(conv, None, False).first(1).recurrent is None
