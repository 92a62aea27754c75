"""What a model says that it expects, and named arrays by their roles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from compressm.errors import ConfigError
from compressm.layers import LanguageModel, Mamba, SequenceClassifier
from compressm.observing.expected import (
    Expected,
    by_role,
    described,
    ends_of,
    is_array,
    lengths_of,
    numeric,
    prepared,
    role_of,
)


class Foreign(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.count = nn.Parameter(torch.tensor([1]), requires_grad=False)  # not the dtype of the weights
        self.layer = Mamba(4, 4).double()

    def forward(self, u: Tensor, *rest: Tensor, scale: float = 1.0) -> Tensor:
        return self.layer(u) * scale


class Anyhow(Foreign):
    def forward(self, u: Tensor, **options: Any) -> Tensor:
        return self.layer(u)


def test_our_models_say_what_they_take() -> None:
    numbers = Expected.of(SequenceClassifier(2, 3, 4, 4, 1).double())
    assert numbers == Expected(
        "SequenceClassifier", "numbers", own=True, argument="u", channels=2, classes=3, dtype=torch.float64
    )
    assert numbers.form == "SequenceClassifier takes numbers of shape (batch, length, 2)"
    tokens = Expected.of(SequenceClassifier(1, 3, 4, 4, 1, vocabulary=9))
    assert tokens == Expected("SequenceClassifier", "tokens", own=True, argument="u", vocabulary=9, classes=3)
    language = Expected.of(nn.DataParallel(LanguageModel(9, 4, 4, 1)))
    assert language == Expected("LanguageModel", "tokens", own=True, argument="tokens", vocabulary=9)
    assert language.form == "LanguageModel takes tokens of shape (batch, length), whole numbers from 0 to 8"


def test_models_of_others_say_the_names_of_their_arguments() -> None:
    found = Expected.of(Foreign())
    assert found == Expected("Foreign", dtype=torch.float64, keywords=frozenset({"u", "scale"}))
    assert found.form == "Foreign takes batches of shape (batch, length, ...)"
    assert Expected.of(Anyhow()).keywords == frozenset()
    assert Expected.of(torch.compile(Foreign(), backend="eager")) == found  # type: ignore[arg-type]
    assert Expected.of(nn.Identity()).dtype == torch.float32


def test_a_model_with_token_embeddings_takes_their_indices() -> None:
    class Embedding(Foreign):
        def get_input_embeddings(self) -> Any:
            return nn.Embedding(7, 4)

    class Projection(Foreign):
        def get_input_embeddings(self) -> Any:
            return nn.Linear(7, 4)

    class Undecided(Foreign):
        def get_input_embeddings(self) -> Any:
            raise NotImplementedError

    found = Expected.of(Embedding())
    assert (found.kind, found.own, found.argument, found.vocabulary) == ("tokens", False, "input_ids", 7)
    assert found.keywords == {"u", "scale"}
    assert {Expected.of(kind()).kind for kind in (Projection, Undecided, Foreign)} == {"anything"}


def test_names_have_roles() -> None:
    roles = {
        "x": "u x tokens input inputs input_ids sequences features X Inputs",
        "y": "y label labels target targets LABELS",
        "lengths": "lengths length seq_lengths sequence_lengths",
        "mask": "mask attention_mask",
    }
    for role, names in roles.items():
        assert {role_of(name) for name in names.split()} == {role}
    assert role_of("weights") is None
    assert by_role({"Inputs": 1, "labels": 2, "mask": 3}, "the file") == {"x": 1, "y": 2, "mask": 3}
    with pytest.raises(ConfigError, match="the file has 'w': name the inputs x"):
        by_role({"x": 1, "w": 2}, "the file")
    with pytest.raises(ConfigError, match="the file has both 'label' and 'Y': leave one of them out"):
        by_role({"label": 1, "Y": 2}, "the file")


@pytest.mark.parametrize("kind", [torch.bool, torch.int32, torch.float32])
def test_a_mask_gives_the_ends_of_sequences(kind: torch.dtype) -> None:
    mask = torch.tensor([[1, 1, 0], [1, 1, 1], [0, 0, 0]]).to(kind)
    assert ends_of(mask, "it").tolist() == [2, 3, 0]
    assert lengths_of({"mask": mask.numpy()}, "it").tolist() == [2, 3, 0]  # type: ignore[union-attr]
    assert lengths_of({"mask": [[1, 0], [1, 1]]}, "it").tolist() == [1, 2]  # type: ignore[union-attr]
    with pytest.raises(ConfigError, match="before the end of a sequence"):
        ends_of(mask.flip(1), "it")
    with pytest.raises(ConfigError, match="before the end of a sequence"):
        ends_of(torch.tensor([[1, 1, 1, 1], [1, 1, 0, 1]]).to(kind), "it")  # a hole
    for bad in (mask[0], mask[None], 2 * mask.float(), -mask.float()):
        with pytest.raises(ConfigError, match=r"must hold 1 \(counts\) and 0 \(padding\)"):
            ends_of(bad, "it")


def test_lengths_are_whole_numbers_in_any_form() -> None:
    for given in ([3, 1], (3, 1), np.array([3, 1], ">u2"), np.array([3.0, 1.0]), torch.tensor([3.0, 1.0])):
        found = lengths_of({"lengths": given}, "it")
        assert found is not None
        assert found.dtype == torch.int64
        assert found.tolist() == [3, 1]
    assert lengths_of({}, "it") is lengths_of({"lengths": None}, "it") is None
    # What is no count is left as it is, and refused where it is held against the inputs.
    for odd in (torch.tensor([2.5, 1.0]), torch.tensor([True, False]), torch.tensor([1j])):
        assert lengths_of({"lengths": odd}, "it") is odd
    with pytest.raises(ConfigError, match="it has lengths and a mask"):
        lengths_of({"lengths": [1], "mask": [[1]]}, "it")
    for bad in (["a"], [[1], [1, 2]], [None], np.array([1j])):
        with pytest.raises(ConfigError, match=r"the lengths in it are .*: pass numbers"):
            lengths_of({"lengths": bad}, "it")


def test_values_are_described_in_words() -> None:
    assert described(torch.zeros(2, 3)) == "float32 of shape (2, 3)"
    assert described(np.zeros((2,), "<i8")) == "int64 of shape (2,)"
    assert described("a" * 99) == f"the str 'aa{'a' * 57}"  # sixty characters with the quote
    assert described(b"x") == "the bytes b'x'"
    assert described(Path("x")).endswith("Path PosixPath('x')")
    assert described(3) == "an int"
    assert described({}) == "a dict"
    assert described(None) == "a NoneType"
    assert is_array(np.zeros(1))
    assert is_array(torch.zeros(1))
    assert not is_array([1])


def test_arrays_of_numbers_keep_their_values() -> None:
    anything, numbers = Expected("Foreign", dtype=torch.float64), Expected("Ours", "numbers", dtype=torch.float64)
    cases = [
        (np.array([1.5, -2.0], ">f4"), anything, torch.float64),  # of an unknown model in the model's dtype
        (np.array([1.5, -2.0], ">f4"), numbers, torch.float32),
        (np.array([1.5, -2.0], np.longdouble), numbers, torch.float64),
        (np.array([1, 2], ">i2"), anything, torch.int16),
        (np.array([1, 200], np.uint8), anything, torch.uint8),
        (np.array([1, 65535], np.uint16), anything, torch.int64),
        (np.array([1, 2**63 - 1], np.uint64), anything, torch.int64),
        (np.array([True, False]), anything, torch.bool),
        (np.zeros((0,), np.uint32), anything, torch.int64),
    ]
    for array, expected, dtype in cases:
        found = numeric(expected, array, "it")
        assert found.dtype == dtype
        assert found.tolist() == array.tolist()
        assert found.shape == array.shape
    array = np.zeros(3)
    numeric(anything, array, "it").add_(1)
    assert not array.any()  # the caller's array is not touched
    with pytest.raises(ConfigError, match="it holds 9223372036854775808: pass numbers below 2"):
        numeric(anything, np.array([2**63], np.uint64), "it")
    leaf = torch.ones(2, requires_grad=True)
    assert not numeric(anything, leaf, "it").requires_grad
    assert numeric(anything, torch.ones(2), "it").dtype == torch.float32  # a tensor's dtype is meant
    for bad in (
        torch.ones(2, 2).to_sparse(),
        torch.nested.nested_tensor([torch.ones(1), torch.ones(2)], layout=torch.jagged),
    ):
        with pytest.raises(ConfigError, match="it is nested or sparse"):
            numeric(anything, bad, "it")


def test_every_refusal_ends_with_what_to_do() -> None:
    two, one = Expected("M", "numbers", channels=2), Expected("M", "numbers", channels=1)
    tokens, anything = Expected("M", "tokens", vocabulary=5), Expected("M")
    alone = "for one sequence alone pass x[None], for a data set a DataLoader of it"
    batches = "pass list(x), if its first axis counts batches"
    cases = [
        (two, torch.zeros(4, 2), alone),
        (one, torch.zeros(4, 1), alone),
        (two, torch.zeros(4), "add the axes that are missing"),
        (two, torch.zeros(4, 3), "add the axes that are missing"),
        (two, torch.zeros(1, 4, 3, 2), batches),
        (two, torch.zeros(1, 1, 4, 3, 2), "add the axes that are missing"),
        (two, torch.zeros(4, 3, 5), "neither axis after the first has 2 channels"),
        (tokens, torch.zeros(4), alone),
        (tokens, torch.zeros(4, 3, 2), batches),
        (tokens, torch.full((2, 3), 0.5), "pass the tokens themselves"),
        (tokens, torch.full((2, 3), 5), "use the vocabulary that the model was trained with"),
        (tokens, torch.full((2, 3), -1), "use the vocabulary that the model was trained with"),
        (anything, torch.zeros(4), alone),
        (anything, torch.zeros(0, 4), "pass at least one sequence"),
        (two, torch.tensor(3.0), "pass at least one sequence"),
        (anything, torch.full((2, 3), torch.inf), "mend or leave out that sequence"),
        (anything, "text", "pass numbers"),
    ]
    for expected, value, remedy in cases:
        with pytest.raises(ConfigError) as caught:
            prepared(expected, value, "it")
        assert str(caught.value).startswith("it ")
        assert str(caught.value).endswith(f"; {remedy}"), remedy


def test_inputs_get_the_form_that_the_model_takes() -> None:
    two, one = Expected("M", "numbers", channels=2, dtype=torch.float64), Expected("M", "numbers", channels=1)
    tokens, anything = Expected("M", "tokens", vocabulary=5), Expected("M")
    x = torch.randn(4, 3, 2)
    assert torch.equal(prepared(two, x, "it"), x.double())
    turned = prepared(two, x.mT, "it")
    assert torch.equal(turned, x.double())
    assert turned.is_contiguous()
    square = torch.randn(3, 2, 2)
    assert torch.equal(prepared(two, square, "it"), square.double())  # time before channels where both would fit
    assert torch.equal(prepared(one, x[..., 0], "it"), x[..., :1])
    ids = torch.tensor([[0, 4, 2], [1, 1, 3]])
    for form in (ids, ids.double(), ids[..., None], ids[:, None], ids.numpy().astype(np.uint8)):
        found = prepared(tokens, form, "it")
        assert found.dtype == torch.int64
        assert torch.equal(found, ids)
    assert torch.equal(prepared(anything, ids, "it"), ids)
    assert torch.equal(prepared(anything, x, "it"), x)
    # What stands after the end of a sequence is neither looked at nor kept.
    lengths = torch.tensor([1, 2, 3, 3])
    broken = x.clone()
    broken[0, 1:] = torch.nan
    broken[1, 2:] = torch.inf
    found = prepared(two, broken, "it", lengths)
    expected = torch.where(torch.arange(3)[None, :, None] < lengths[:, None, None], x, 0.0)
    assert torch.equal(found, expected.double())
    assert prepared(tokens, torch.tensor([[1, 99]]), "it", torch.tensor([1])).tolist() == [[1, 0]]
    for bad in (torch.tensor([1, 2, 3]), torch.tensor([0, 2, 3, 3]), torch.tensor([1, 2, 3, 4])):
        with pytest.raises(ConfigError, match=r"^it: "):
            prepared(two, x, "it", bad)
