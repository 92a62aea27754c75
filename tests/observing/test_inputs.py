"""What may be given as ``data=``: every form works with the right result, or is refused in one line that says why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import compressm
from compressm.errors import CompressmError, ConfigError
from compressm.layers import Bidirectional, LanguageModel, Mamba, SequenceClassifier
from compressm.observing.inputs import calls
from compressm.observing.moments import Statistics
from compressm.observing.over_data import gather
from compressm.theory.recurrence import Moments
from helpers import spawned

N, L, C, K, V = 6, 11, 2, 3, 13


def numbers() -> SequenceClassifier:
    torch.manual_seed(0)
    return SequenceClassifier(C, K, 4, 4, 1, dropout=0.0, layer="mamba").eval()


def one_channel() -> SequenceClassifier:
    torch.manual_seed(0)
    return SequenceClassifier(1, K, 4, 4, 1, dropout=0.0, layer="mamba").eval()


def tokens() -> SequenceClassifier:
    torch.manual_seed(0)
    return SequenceClassifier(1, K, 4, 4, 1, dropout=0.0, layer="mamba", vocabulary=V).eval()


def language() -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(V, 4, 4, 1).eval()


class Foreign(nn.Module):
    """A model of another's around a layer that compressm knows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = Mamba(C, 4)

    def forward(self, u: Tensor, scale: float = 1.0) -> Tensor:
        return self.layer(u) * scale


def hugging_face() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MambaConfig(vocab_size=V, hidden_size=4, state_size=4, num_hidden_layers=1)
    return transformers.MambaForCausalLM(config).eval()


X = torch.randn(N, L, C, generator=torch.Generator().manual_seed(0))
WHOLE = torch.randint(-9, 9, (N, L, C), generator=torch.Generator().manual_seed(1))
T = torch.randint(1, V, (N, L), generator=torch.Generator().manual_seed(2))
Y = torch.arange(N) % K
ONE_HOT = torch.eye(K, dtype=torch.int64)[Y]

Make = Callable[[], Any]
# A model, what is given, and the batches that the model has to be called with.
WORKS: dict[str, tuple[Make, Callable[[], Any], list[Tensor]]] = {
    "one tensor is one batch": (numbers, lambda: X, [X]),
    "one array": (numbers, lambda: X.numpy(), [X]),
    "float64": (numbers, lambda: X.double().numpy(), [X]),
    "float16": (numbers, lambda: X.half(), [X.half().float()]),
    "integers": (numbers, lambda: WHOLE, [WHOLE.float()]),
    "int16, big endian": (numbers, lambda: WHOLE.numpy().astype(">i2"), [WHOLE.float()]),
    "uint8": (numbers, lambda: WHOLE.abs().numpy().astype(np.uint8), [WHOLE.abs().float()]),
    "uint16": (numbers, lambda: WHOLE.abs().numpy().astype(np.uint16), [WHOLE.abs().float()]),
    "booleans": (numbers, lambda: WHOLE > 0, [(WHOLE > 0).float()]),
    "channels first": (numbers, lambda: X.mT, [X]),
    "not contiguous": (numbers, lambda: X.numpy()[::-1], [X.flip(0)]),
    "a pair": (numbers, lambda: (X, Y), [X]),
    "a pair in a list": (numbers, lambda: [X, Y], [X]),
    "a pair with one-hot labels": (numbers, lambda: (X, ONE_HOT), [X]),
    "a pair with names": (numbers, lambda: (X, ["a"] * N), [X]),
    "a pair, big endian": (numbers, lambda: (X.numpy(), ONE_HOT.numpy().astype(">i4")), [X]),
    "a pair with rows of names": (numbers, lambda: (X.numpy(), np.full((N, K), "a")), [X]),
    "a list of batches": (numbers, lambda: [X[:4], X[4:]], [X[:4], X[4:]]),
    "a list of arrays": (numbers, lambda: [X[:4].numpy(), X[4:].numpy()], [X[:4], X[4:]]),
    "a list of pairs": (numbers, lambda: [(X[:4], Y[:4]), [X[4:], Y[4:]]], [X[:4], X[4:]]),
    "a generator": (numbers, lambda: (x for x in X.split(4)), [X[:4], X[4:]]),
    "a loader of pairs": (numbers, lambda: DataLoader(TensorDataset(X, Y), 4), [X[:4], X[4:]]),
    "a loader of inputs": (numbers, lambda: DataLoader(TensorDataset(X), 4), [X[:4], X[4:]]),
    "a loader of dicts": (numbers, lambda: DataLoader([{"x": x, "y": 0} for x in X], 4), [X[:4], X[4:]]),
    "a dict": (numbers, lambda: {"u": X}, [X]),
    "a dict with labels": (numbers, lambda: {"inputs": X.numpy(), "labels": Y.numpy()}, [X]),
    "(N, length)": (one_channel, lambda: X[..., 0], [X[..., :1]]),
    "(N, 1, length)": (one_channel, lambda: X[..., 0][:, None], [X[..., :1]]),
    "tokens": (tokens, lambda: T, [T]),
    "tokens, int8": (tokens, lambda: T.numpy().astype(np.int8), [T]),
    "tokens, uint8": (tokens, lambda: T.to(torch.uint8), [T]),
    "tokens, uint64": (tokens, lambda: T.numpy().astype(np.uint64), [T]),
    "tokens as whole floats": (tokens, lambda: T.double().numpy(), [T]),
    "tokens, booleans": (tokens, lambda: T > 5, [(T > 5).long()]),
    "tokens, (N, length, 1)": (tokens, lambda: T[..., None], [T]),
    "tokens, (N, 1, length)": (tokens, lambda: T[:, None], [T]),
    "tokens, a pair": (tokens, lambda: (T, Y), [T]),
    "tokens, one-hot labels": (tokens, lambda: (T, ONE_HOT), [T]),
    "tokens, one-hot labels in a list": (tokens, lambda: [T, ONE_HOT.numpy()], [T]),
    "tokens, a loader": (tokens, lambda: DataLoader(TensorDataset(T, Y), 4), [T[:4], T[4:]]),
    "a language model's": (language, lambda: T.numpy().astype(np.int32), [T]),
    "a language model's, pairs": (language, lambda: [(T, T)], [T]),
    "a language model's, a dict": (language, lambda: {"input_ids": T}, [T]),
    "a compiled model": (lambda: torch.compile(tokens(), backend="eager"), lambda: T.float(), [T]),
    "a foreign model's": (Foreign, lambda: X, [X]),
    "a foreign model's array": (Foreign, lambda: X.double().numpy(), [X]),
    "a foreign model's pair": (Foreign, lambda: [X, Y], [X]),
    "a foreign model's dict": (Foreign, lambda: [{"u": X.numpy(), "scale": 2.0}], [X]),
    "Hugging Face": (hugging_face, lambda: T, [T]),
    "Hugging Face, int32": (hugging_face, lambda: T.numpy().astype(np.int32), [T]),
    "Hugging Face, a dict": (hugging_face, lambda: [{"input_ids": T, "labels": T}], [T]),
}  # fmt: skip

# A model, what is given, and the line that it is answered with.
REFUSED: dict[str, tuple[Make, Callable[[], Any], str]] = {
    "an empty list": (numbers, list, "data hold no batch: pass one"),
    "an empty loader": (numbers, lambda: DataLoader([], 4), "data hold no batch"),
    "a used generator": (numbers, lambda: iter([]), "an iterator that has been used up gives none"),
    "an empty batch": (numbers, lambda: X[:0], r"batch 0 of data is empty, of shape \(0, 11, 2\)"),
    "no time": (numbers, lambda: [X, X[:, :0]], r"batch 1 of data is empty"),
    "a number": (numbers, lambda: 3, "data is an int: pass a batch, or an iterable of batches"),
    "a path": (numbers, lambda: "data.npz", "files are read by compressm analyze"),
    "names": (numbers, lambda: np.array([["a"]]), "is <U1 of shape .*pass numbers"),
    "objects": (numbers, lambda: np.array([[None, 1]]), "is object of shape .*pass numbers"),
    "no values": (numbers, lambda: X.to("meta"), r"is on the meta device and has no values: .*takes numbers"),
    "complex numbers": (
        numbers,
        lambda: X + 0j,
        r"is complex64 of shape .*takes numbers of shape \(batch, length, 2\)",
    ),
    "a list of lists": (numbers, lambda: [[1, 2], [3, 4]], "batch 0 of data is a list: .*pass a tensor"),
    "two alike in a tuple": (numbers, lambda: (X, X), r"tuple of 2 arrays of like shape.*pass \[\(inputs, labels\)\]"),
    "one sequence alone": (numbers, lambda: X[0], r"has shape \(11, 2\): .*for one sequence alone pass x\[None\]"),
    "a data set": (numbers, lambda: TensorDataset(X, Y), r"for a data set a DataLoader of it"),
    "batches in a tensor": (numbers, lambda: X[None], r"pass list\(x\), if its first axis counts batches"),
    "other channels": (numbers, lambda: torch.zeros(4, 5, 7), "neither axis after the first has 2 channels"),
    "two axes": (numbers, lambda: torch.zeros(4, 5), r"has shape \(4, 5\): .*add the axes that are missing"),
    "one step of one channel": (one_channel, lambda: X[0, :, :1], "for one sequence alone"),
    "NaN": (numbers, lambda: X.where(X < 1, torch.nan), r"holds nan at \[\d+, \d+, \d+\]: data must be finite"),
    "infinite in float32": (numbers, lambda: X.double() * 1e300, "holds -?inf at .*must be finite in float32"),
    "labels in the second batch": (numbers, lambda: [(X, Y), Y], r"batch 1 of data has shape \(6,\)"),
    "other channels in the second batch": (numbers, lambda: [X, X[..., :1]], r"batch 1 of data has shape \(6, 11, 1\)"),
    "an unknown name": (numbers, lambda: {"u": X, "weights": Y}, "has 'weights': name the inputs x"),
    "two inputs": (numbers, lambda: {"x": X, "u": X}, "both 'x' and 'u'"),
    "no input": (numbers, lambda: {"y": Y}, "has y: name the inputs u"),
    "three parts": (numbers, lambda: [(X, Y, Y)], "has 3 parts, .*name them, {'u': inputs, 'lengths': lengths}"),
    "lengths beyond": (numbers, lambda: {"u": X, "lengths": Y + 10}, "lengths must be from 1 to 11.*got 10 to 12"),
    "a mask with a hole": (numbers, lambda: {"u": X, "mask": torch.eye(N, L)}, "pad sequences at their end"),
    "a packed sequence": (
        numbers,
        lambda: nn.utils.rnn.pack_padded_sequence(X, torch.full((N,), L), batch_first=True),
        "is a PackedSequence: pass what pad_packed_sequence",
    ),
    "tokens beyond": (tokens, lambda: T + 5, "holds tokens from .* to 1[3-7]: .*whole numbers from 0 to 12"),
    "tokens below": (tokens, lambda: T - 5, "holds tokens from -"),
    "tokens with fractions": (tokens, lambda: T + 0.5, r"holds \d+.5: "),
    "tokens, NaN": (tokens, lambda: T.float() * torch.nan, "holds nan: "),
    "tokens alone": (tokens, lambda: T[0], r"for one sequence alone pass x\[None\]"),
    "tokens, one-hot": (tokens, lambda: torch.zeros(4, 5, V), r"has shape \(4, 5, 13\)"),
    "a language model's beyond": (language, lambda: T + 9, "LanguageModel takes tokens"),
    "a foreign model's alone": (Foreign, lambda: X[0, 0], "for one sequence alone"),
    "a foreign model's NaN": (Foreign, lambda: X * torch.nan, "data must be finite"),
    "a foreign model's unknown": (Foreign, lambda: {"v": X}, r"has v, which Foreign.forward does not take: .*scale, u"),
    "Hugging Face beyond": (hugging_face, lambda: T + 9, "MambaForCausalLM takes tokens"),
    "Hugging Face, text": (hugging_face, lambda: [{"input_ids": ["a", "b"]}], "is a list"),
    "Hugging Face, no input": (hugging_face, lambda: {"labels": T}, "has labels: expected input_ids"),
}


def given(call: Any) -> Tensor:
    return next(value for value in (*call.args, *call.kwargs.values()) if isinstance(value, Tensor))


@pytest.mark.parametrize("form", WORKS)
def test_forms_that_work(form: str) -> None:
    make, data, batches = WORKS[form]
    model = make()
    found = [given(call) for call in calls(model, data())]
    assert len(found) == len(batches)
    for mine, expected in zip(found, batches, strict=True):
        assert mine.dtype == expected.dtype
        assert torch.equal(mine, expected)
    spectrum = compressm.analyze(model, data=data())
    statistics = Statistics(model, None, memory=1.0)  # by hand: the moments of those batches and no others
    for batch in batches:
        statistics.observe_next(training_only=False)
        with torch.no_grad():
            model(batch)
    for name, values in statistics.moments().items():
        hsv = compressm.Spectrum.of({name: compressm.theory.recurrence.balance_selective(values)})[name].hsv
        torch.testing.assert_close(spectrum[name].hsv, hsv, rtol=1e-4, atol=1e-6)
    assert compressm.compress(model, states=2, data=data()).cut


@pytest.mark.parametrize("form", REFUSED)
def test_forms_that_are_refused(form: str) -> None:
    make, data, message = REFUSED[form]
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for call in (
        gather,
        lambda m, d: compressm.analyze(m, data=d),
        lambda m, d: compressm.compress(m, states=2, data=d),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            call(model, data())
        assert "\n" not in str(caught.value)
        assert isinstance(caught.value, CompressmError)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


LENGTHS = [9, 11, 1, 4, 11, 6]


@pytest.mark.parametrize("make", [numbers, tokens, language])
@pytest.mark.parametrize("told_by", ["lengths", "mask", "array"])
def test_moments_of_padded_batches_are_those_of_the_sequences(make: Make, told_by: str) -> None:
    model, lengths = make().double(), torch.tensor(LENGTHS)
    rows = X.double() if make is numbers else T
    alone = gather(model, [rows[i : i + 1, :length] for i, length in enumerate(LENGTHS)])
    mask = torch.arange(L) < lengths[:, None]
    noise = float("nan") if make is numbers else 7
    padded = rows.masked_fill(~mask if rows.ndim == 2 else ~mask[..., None], noise)
    told = {"lengths": {"lengths": lengths}, "mask": {"mask": mask}, "array": {"lengths": np.array(LENGTHS, ">i2")}}
    together = gather(model, {"x": padded, **told[told_by]}, sequences=N)
    same(together, alone)
    assert float(next(iter(together.values())).tokens) == sum(LENGTHS)


@pytest.mark.parametrize("layer", ["mamba2", "linear_attention", "gated_linear_attention", "delta_net", "rg_lru"])
def test_moments_of_padded_batches_in_every_family(layer: str) -> None:
    torch.manual_seed(0)
    options = {"head_dim": 4} if layer == "mamba2" else {} if layer == "rg_lru" else {"n_heads": 2}
    model = SequenceClassifier(C, K, 4, 4, 2, dropout=0.0, layer=layer, **options).eval()
    alone = gather(model, [X[i : i + 1, :length] for i, length in enumerate(LENGTHS)])
    same(gather(model, {"x": X, "lengths": torch.tensor(LENGTHS)}, sequences=N), alone)


def test_moments_of_a_bidirectional_layer_leave_padding_out() -> None:
    torch.manual_seed(0)
    model = Bidirectional(Mamba(C, 4), Mamba(C, 4)).eval()
    alone = gather(model, [X[i : i + 1, :length] for i, length in enumerate(LENGTHS)])
    same(gather(model, {"u": X, "lengths": torch.tensor(LENGTHS)}, sequences=N), alone)


def same(found: dict[str, Moments], expected: dict[str, Moments]) -> None:
    assert found.keys() == expected.keys()
    for name, moments in expected.items():
        for key, value in moments.tensors().items():
            torch.testing.assert_close(found[name].tensors()[key], value, rtol=1e-4, atol=1e-5)


def gather_unfit(rank: int, folder: str) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    try:
        gather(numbers(), [X] if rank == 0 else [X, X[..., :1]])
    except ConfigError as error:
        Path(folder, str(rank)).write_text(str(error), encoding="utf-8")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_all_processes_hear_of_one_whose_data_are_unfit(tmp_path: Path) -> None:
    spawned(2, gather_unfit, str(tmp_path))
    for rank in range(2):
        assert "batch 1 of data has shape (6, 11, 1)" in (tmp_path / str(rank)).read_text(encoding="utf-8")
