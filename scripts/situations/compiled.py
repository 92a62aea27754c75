"""Models that are compiled by torch.compile."""

from __future__ import annotations

from typing import Any

import torch
import torch._dynamo as dynamo

from situations.trial import Net, Trial, batch, row

HOST = "torch.compile"


def compiled(trial: Trial, in_place: bool = False, **arguments: Any) -> None:
    """Train a compiled model, and compare its outputs with those of the same model as it is."""
    dynamo.reset()
    dynamo.utils.counters.clear()
    model = Net()
    network: Any = model
    if in_place:
        model.compile(backend="eager", **arguments)
    else:
        network = torch.compile(model, backend="eager", **arguments)
    trial.loop(model, network=network)
    trial.check(dynamo.utils.counters["stats"]["unique_graphs"] > 0, "nothing was compiled")
    trial.check(not dynamo.utils.counters["graph_break"], "graphs are broken")
    difference = (network(*batch(0))["logits"] - Net.forward(model, *batch(0))["logits"]).abs().max()
    trial.check(float(difference) < 1e-5, f"the compiled model differs by {float(difference)}")


@row(HOST, "the model, in a wrapper, as one graph")
def _(trial: Trial) -> None:
    compiled(trial, fullgraph=True)


@row(HOST, "the model, in place, as one graph")
def _(trial: Trial) -> None:
    compiled(trial, in_place=True, fullgraph=True)


@row(HOST, "the model, with dynamic shapes")
def _(trial: Trial) -> None:
    compiled(trial, dynamic=True)


@row(HOST, "the optimizer's step")
def _(trial: Trial) -> None:
    dynamo.reset()

    def optimizer(parameters: Any, lr: float) -> Any:
        made = torch.optim.AdamW(parameters, lr=lr)
        made.step = torch.compile(made.step, backend="eager")
        return made

    trial.loop(optimizer=optimizer)
