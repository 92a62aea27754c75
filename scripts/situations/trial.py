"""What a row is, how it is run, and when its outcome counts."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from traceback import extract_tb
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compressm import Compressor
from compressm.cutting import state_dims
from compressm.errors import CompressmError
from compressm.layers import LRU, Mamba

STEPS, CUTS = 12, (3, 6)
# Functions from which a refusal counts as one at construction.
_BEGINNINGS = ("__init__", "setup", "on_train_start", "on_train_begin", "refused_at_construction")
SCHEDULE: dict[str, Any] = {"states": 4, "window": 0.5, "cuts": 2}


class Net(nn.Module):
    """A linear and a selective layer between two linear maps; returns the loss, as the Trainer wants it."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.decoder = nn.Linear(1, 4), nn.Linear(4, 2)
        self.linear, self.selective = LRU(4, 16, r_min=0.9), Mamba(4, d_state=16)
        self.dropout = nn.Dropout(dropout)

    def forward(self, u: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = self.encoder(u)
        x = self.dropout(x + self.selective(x))
        logits = self.decoder((x + self.linear(x)).mean(1)).float()
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def batch(number: int, count: int = 4, length: int = 12) -> tuple[Tensor, Tensor]:
    """Inputs and labels, always the same for a number."""
    u = torch.randn(count, length, 1, generator=torch.Generator().manual_seed(number))
    return u, (u.sum((1, 2)) > 0).long()


class Trial:
    """One run of a row.

    Attributes:
        folder: an empty folder.
        checks: how many checks have held.
        cuts: cuts that checks have seen.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checks = self.cuts = 0

    def check(self, holds: Any, what: str) -> None:
        """Something must hold.

        Raises:
            AssertionError: it does not.
        """
        if not holds:
            raise AssertionError(what)
        self.checks += 1

    def cut(self, compressor: Compressor, steps: Iterable[int] = CUTS, states: int | None = 4) -> None:
        """Cuts were made after these steps of the optimizer, and the layers have so many states."""
        made = [event.step for event in compressor.history if event.kind == "cut"]
        self.check(made == list(steps), f"cuts after steps {made}, expected {list(steps)}")
        dims = state_dims(compressor.model)
        self.check(states is None or set(dims.values()) == {states}, f"states {dims}, expected {states}")
        self.cuts += len(made)

    def same(self, model: nn.Module, other: nn.Module) -> None:
        """Two models have bitwise the same weights."""
        ours, theirs = model.state_dict(), other.state_dict()
        differing = [name for name, value in ours.items() if not torch.equal(value, theirs[name])]
        self.check(not differing, f"weights differ: {', '.join(differing)}")

    def loop(
        self,
        model: nn.Module | None = None,
        *,
        network: nn.Module | None = None,
        optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.AdamW,
        backward: Callable[[Tensor], Any] = lambda loss: loss.backward(),
        after: Callable[[int], Any] = lambda step: None,
        steps: int = STEPS,
        expect: bool = True,
        **arguments: Any,
    ) -> Compressor:
        """A plain training loop through two cuts, after which every trained parameter has moved.

        Args:
            model: by default a `Net`.
            network: what is called; by default the model.
            optimizer: builds the optimizer from parameters.
            backward: differentiates the loss.
            after: called after every optimizer step with its number.
            steps: how many.
            expect: whether to check that the usual cuts were made.
            **arguments: of `Compressor`.
        """
        model = Net() if model is None else model
        network = model if network is None else network
        made = optimizer([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        compressor = Compressor(network, made, STEPS, **{**SCHEDULE, **arguments})
        for step in range(steps):
            made.zero_grad()
            backward(network(*batch(step))["loss"])
            made.step()
            after(step)
            compressor.step()
        before = {name: value.clone() for name, value in model.state_dict().items()}
        made.zero_grad()
        backward(network(*batch(steps))["loss"])
        made.step()
        names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        still = [name for name in names if torch.equal(before[name], model.state_dict()[name])]
        self.check(not still, f"after the cuts the optimizer does not move {', '.join(still)}")
        if expect:
            self.cut(compressor)
        return compressor


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        host: the training loop.
        situation: what is special about it.
        run: trains and checks.
        cuts: whether a cut must have been made if it works.
    """

    host: str
    situation: str
    run: Callable[[Trial], Any]
    cuts: bool = True


ROWS: list[Row] = []


def row(host: str, situation: str, *, cuts: bool = True) -> Callable[[Callable[[Trial], Any]], Callable[[Trial], Any]]:
    """Declare a row."""

    def declare(run: Callable[[Trial], Any]) -> Callable[[Trial], Any]:
        ROWS.append(Row(host, situation, run, cuts))
        return run

    return declare


@dataclass(frozen=True)
class Outcome:
    """What became of a row: ``works``, ``refused`` with the message, or ``failed`` with the error."""

    host: str
    situation: str
    outcome: str
    because: str = ""
    checks: int = 0
    seconds: float = field(default=0.0, compare=False)


def tried(one: Row, folder: Path) -> Outcome:
    """Run a row.

    It *works* if it ends, at least one check has held and, unless the row makes none, a cut was made. It is *refused*
    if one of compressm's own errors came from a constructor, or where a host begins. Anything else has failed.
    """
    trial, started = Trial(folder), time.perf_counter()
    outcome, because = "works", ""
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore")
            one.run(trial)
        if not trial.checks or (one.cuts and not trial.cuts):
            outcome, because = "failed", f"{trial.checks} checks and {trial.cuts} cuts: the row shows nothing"
    except CompressmError as error:
        frames = extract_tb(error.__traceback__)
        refused = any(one.name in _BEGINNINGS and _is_ours(Path(one.filename)) for one in frames)
        outcome, because = ("refused" if refused else "failed"), str(error) if refused else f"late: {error}"
    except Exception as error:
        outcome, because = "failed", f"{type(error).__name__}: {error}"
    because = because.replace(str(folder), "FOLDER")
    return Outcome(one.host, one.situation, outcome, because, trial.checks, round(time.perf_counter() - started, 1))


def _is_ours(file: Path) -> bool:
    return "compressm" in file.parts or file.name == "replicas.py"
