"""Training loops of one's own."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from compressm import Compressor, compress
from compressm.cutting import resize_states, state_dims
from situations.trial import CUTS, SCHEDULE, STEPS, Net, Trial, batch, row

HOST = "Own loop"


@row(HOST, "AdamW")
def _(trial: Trial) -> None:
    trial.loop()


@row(HOST, "SGD with momentum")
def _(trial: Trial) -> None:
    trial.loop(optimizer=lambda parameters, lr: torch.optim.SGD(parameters, lr=100 * lr, momentum=0.9))


@row(HOST, "fused AdamW")
def _(trial: Trial) -> None:
    trial.loop(optimizer=lambda parameters, lr: torch.optim.AdamW(parameters, lr=lr, fused=True))


@row(HOST, "gradient clipping")
def _(trial: Trial) -> None:
    model = Net()

    def backward(loss: Tensor) -> None:
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)

    trial.loop(model, backward=backward)


@row(HOST, "parameter groups with their own settings")
def _(trial: Trial) -> None:
    def optimizer(parameters: list[nn.Parameter], lr: float) -> torch.optim.Optimizer:
        groups = [{"params": [one], "lr": lr * (1 + index % 3)} for index, one in enumerate(parameters)]
        return torch.optim.AdamW(groups, weight_decay=0.1)

    trial.loop(optimizer=optimizer)


@row(HOST, "a layer whose parameters are frozen")
def _(trial: Trial) -> None:
    model = Net()
    model.linear.requires_grad_(False)
    trial.loop(model)


@row(HOST, "weights in float64")
def _(trial: Trial) -> None:
    model = Net().double()
    network = Converted(model, torch.float64)
    trial.loop(model, network=network)


class Converted(nn.Module):
    """A model that reads its inputs in another precision."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, u: Tensor, labels: Tensor) -> Any:
        return self.model(u.to(self.dtype), labels)


@row(HOST, "bfloat16 autocast")
def _(trial: Trial) -> None:
    model = Net()
    trial.loop(model, network=Autocast(model, torch.bfloat16))


class Autocast(nn.Module):
    """A model under autocast."""

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model, dtype

    def forward(self, u: Tensor, labels: Tensor) -> Any:
        with torch.autocast("cpu", self.dtype):
            return self.model(u, labels)


def scaled(trial: Trial, fused: bool = False, bad: tuple[int, ...] = (), overflow: tuple[int, ...] = ()) -> None:
    """Train with a gradient scaler. Batches ``bad`` are not finite, and neither are the gradients at ``overflow``."""
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=fused)
    compressor = Compressor(model, optimizer, STEPS, **SCHEDULE)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=1000)
    for call in range(STEPS + len(bad) + len(overflow)):
        u, labels = batch(call)
        u = u * float("nan") if call in bad else u
        optimizer.zero_grad()
        scaler.scale(model(u, labels)["loss"] * (float("inf") if call in overflow else 1.0)).backward()
        scaler.step(optimizer)
        scaler.update()
        compressor.step()
    trial.cut(compressor)
    count = max(int(state["step"]) for state in optimizer.state.values())
    trial.check(compressor.state_dict()["steps"] == count == STEPS, f"{count} steps of the optimizer")


@row(HOST, "gradient scaler that skips steps")
def _(trial: Trial) -> None:
    scaled(trial, overflow=(0, 4))


@row(HOST, "gradient scaler and a fused optimizer that skips steps")
def _(trial: Trial) -> None:
    scaled(trial, fused=True, overflow=(0, 4))


@row(HOST, "a batch with NaN that the scaler skips")
def _(trial: Trial) -> None:
    scaled(trial, bad=(1, 4))


@row(HOST, "compressor.step() after every accumulated batch")
def _(trial: Trial) -> None:
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    compressor = Compressor(model, optimizer, STEPS, **SCHEDULE)
    for call in range(3 * STEPS):
        (model(*batch(call))["loss"] / 3).backward()
        if call % 3 == 2:
            optimizer.step()
            optimizer.zero_grad()
        compressor.step()
    trial.cut(compressor)


@row(HOST, "warm-up that begins at a learning rate of zero")
def _(trial: Trial) -> None:
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 4))
    compressor = Compressor(model, optimizer, STEPS, scheduler=scheduler, **SCHEDULE)
    for step in range(STEPS):
        optimizer.zero_grad()
        model(*batch(step))["loss"].backward()
        optimizer.step()
        scheduler.step()
        compressor.step()
    trial.cut(compressor)


def averaged(trial: Trial, passed: bool, **arguments: Any) -> None:
    model = Net()
    average = AveragedModel(model, **arguments)
    compressor = trial.loop(
        model, after=lambda step: average.update_parameters(model), followers=[average] if passed else []
    )
    trial.check(list(state_dims(average).values()) == list(compressor.state_dims.values()), "the average was not cut")
    trial.check(bool(average(*batch(0))["loss"].isfinite()), "the average does not compute")


@row(HOST, "exponential average as a follower")
def _(trial: Trial) -> None:
    averaged(trial, True, multi_avg_fn=get_ema_multi_avg_fn(0.9))


@row(HOST, "average over all steps as a follower")
def _(trial: Trial) -> None:
    averaged(trial, True)


@row(HOST, "averaged model that is not passed as a follower")
def _(trial: Trial) -> None:
    averaged(trial, False)


@row(HOST, "gradient checkpointing")
def _(trial: Trial) -> None:
    class Checkpointed(Net):
        def forward(self, u: Tensor, labels: Tensor) -> Any:
            return checkpoint(super().forward, u, labels, use_reentrant=False)

    trial.loop(Checkpointed())


@row(HOST, "a layer that is used twice in a pass")
def _(trial: Trial) -> None:
    class Twice(Net):
        def forward(self, u: Tensor, labels: Tensor) -> Any:
            x = self.encoder(u)
            x = self.selective(x + self.selective(x))
            logits = self.decoder((x + self.linear(self.linear(x))).mean(1))
            return {"loss": nn.functional.cross_entropy(logits, labels)}

    trial.loop(Twice())


@row(HOST, "evaluation between the steps")
def _(trial: Trial) -> None:
    model = Net()

    def evaluate(step: int) -> None:
        model.eval()
        with torch.no_grad():
            model(*batch(1000 + step))
        model.train()

    undisturbed = trial.loop(Net())
    trial.same(trial.loop(model, after=evaluate).model, undisturbed.model)


@row(HOST, "two models with a compressor each")
def _(trial: Trial) -> None:
    alone = trial.loop(Net())
    model = Net()
    other = torch.optim.AdamW((twin := Net(dropout=0.1)).parameters(), lr=1e-3)
    second = Compressor(twin, other, STEPS, **{**SCHEDULE, "states": 8})

    def train_other(step: int) -> None:
        other.zero_grad()
        twin(*batch(step))["loss"].backward()
        other.step()
        second.step()

    trial.same(trial.loop(model, after=train_other).model, alone.model)
    trial.cut(second, states=8)


def resumed(trial: Trial, small: bool, stop: int, **rule: Any) -> None:
    """Kill a run, build everything anew, and compare with the unbroken run."""

    def start(dims: Any = None) -> tuple[Net, torch.optim.Optimizer, Compressor]:
        model = Net(dropout=0.1)
        if dims is not None:
            resize_states(model, dims)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        return model, optimizer, Compressor(model, optimizer, STEPS, **{"window": 0.5, "cuts": 2, **rule})

    def train(model: Net, optimizer: torch.optim.Optimizer, compressor: Compressor, first: int, last: int) -> None:
        step = first
        while step < last:
            optimizer.zero_grad()
            model(*batch(step))["loss"].backward()
            optimizer.step()
            event = compressor.step()
            step = event.restored_step if event is not None and event.kind == "rolled_back" else step + 1

    unbroken, killed = start(), start()
    torch.manual_seed(1)
    train(*unbroken, 0, STEPS)
    torch.manual_seed(1)
    train(*killed, 0, stop)
    saved = copy.deepcopy([part.state_dict() for part in killed])
    rng = torch.get_rng_state()
    model, optimizer, compressor = start(saved[2]["state_dims"] if small else None)
    compressor.load_state_dict(saved[2])
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    torch.set_rng_state(rng)
    train(model, optimizer, compressor, saved[2]["steps"], STEPS)
    trial.same(model, unbroken[0])
    trial.cut(compressor, [event.step for event in unbroken[2].history if event.kind == "cut"], None)


@row(HOST, "killed and resumed before a cut")
def _(trial: Trial) -> None:
    resumed(trial, False, 2, states=4)


@row(HOST, "killed and resumed after a cut, the model built at its first size")
def _(trial: Trial) -> None:
    resumed(trial, False, 5, fraction=0.25)


@row(HOST, "killed and resumed after a cut, the model built at the size of the checkpoint")
def _(trial: Trial) -> None:
    resumed(trial, True, 5, fraction=0.25)


@row(HOST, "killed and resumed while a cut is under observation")
def _(trial: Trial) -> None:
    def evaluate(model: nn.Module) -> float:
        return float(min(state_dims(model).values()) > 9)

    resumed(trial, False, CUTS[0] + 1, tolerance=0.1, max_drop=0.5, check_after=2, evaluate=evaluate)


@row(HOST, "weights of another size are loaded into the model")
def _(trial: Trial) -> None:
    model, small = Net(), Net()
    compress(small, states=8, data=[{"u": batch(0)[0], "labels": batch(0)[1]}])
    compressor = trial.loop(model)
    model.load_state_dict(small.state_dict())
    trial.check(set(compressor.state_dims.values()) == {8}, "the weights were not taken")


@row(HOST, "two optimizers, one of them for the state space layers")
def _(trial: Trial) -> None:
    model = Net()
    head = torch.optim.SGD(model.decoder.parameters(), lr=0.1)
    rest = [p for name, p in model.named_parameters() if not name.startswith("decoder")]
    body = torch.optim.AdamW(rest, lr=1e-2)
    compressor = Compressor(model, body, STEPS, **SCHEDULE)
    for step in range(STEPS):
        model.zero_grad()
        model(*batch(step))["loss"].backward()
        head.step()
        body.step()
        compressor.step()
    trial.cut(compressor)


@row(HOST, "the state space layers are in another optimizer")
def _(trial: Trial) -> None:
    model = Net()
    Compressor(model, torch.optim.SGD(model.decoder.parameters(), lr=0.1), STEPS, **SCHEDULE)
    trial.loop(model)


@row(HOST, "a model without a state")
def _(trial: Trial) -> None:
    trial.loop(nn.Linear(1, 1))


@row(HOST, "cuts that do not fit into the training")
def _(trial: Trial) -> None:
    trial.loop(start=STEPS - 2)


@row(HOST, "a metric that is NaN when a cut is due (the cut is postponed)")
def _(trial: Trial) -> None:
    made: list[int] = []  # numbers of the steps
    rule = {"cuts": 1, "window": 0.25, "max_drop": 0.1, "check_after": 2}
    rule["evaluate"] = lambda model: float("nan") if made[-1] == 2 else 0.5  # the cut is due after the third step
    compressor = trial.loop(expect=False, after=made.append, **rule)
    kinds = [event.kind for event in compressor.history]
    trial.check(kinds[:3] == ["postponed", "cut", "kept"], f"{kinds}")
    trial.cut(compressor, (4,))


@row(HOST, "sharpness-aware minimisation, which calls first_step and second_step")
def _(trial: Trial) -> None:
    model = Net()
    optimizer = SharpnessAware(model.parameters())
    compressor = Compressor(model, optimizer, STEPS, carry="reset", **SCHEDULE)
    for step in range(STEPS):
        for half in (optimizer.first_step, optimizer.second_step):
            optimizer.zero_grad()
            model(*batch(step))["loss"].backward()
            half()
        compressor.step()
    trial.cut(compressor)


class SharpnessAware(torch.optim.Optimizer):
    """Sharpness-aware minimisation, as its published code is used."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {})
        self.inner = torch.optim.SGD(self.param_groups, lr=1e-2)
        self.steps: list[tuple[nn.Parameter, Tensor]] = []

    @torch.no_grad()
    def first_step(self) -> None:
        self.steps = [(p, 1e-3 * p.grad) for group in self.param_groups for p in group["params"] if p.grad is not None]
        for parameter, step in self.steps:
            parameter += step

    @torch.no_grad()
    def second_step(self) -> None:
        for parameter, step in self.steps:
            parameter -= step
        self.inner.step()


@row(HOST, "Hugging Face Mamba read in parts with cache_params")
def _(trial: Trial) -> None:
    import transformers

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 8, "state_size": 16, "num_hidden_layers": 2, "vocab_size": 32}
    model = transformers.MambaForCausalLM(transformers.MambaConfig(**sizes, use_mambapy=False))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    compressor = Compressor(model, optimizer, STEPS, **SCHEDULE)
    for step in range(STEPS):
        tokens = torch.randint(3, 32, (2, 12), generator=torch.Generator().manual_seed(step))
        model.train()
        optimizer.zero_grad()
        first = model(tokens[:, :6], use_cache=True, labels=tokens[:, :6])
        cache = first.cache_params
        first.loss.backward()
        for layer in range(2):
            for state in (cache.get_conv_state(layer), cache.get_recurrent_state(layer)):
                state.detach_()
        model(tokens[:, 6:], use_cache=True, cache_params=cache, labels=tokens[:, 6:]).loss.backward()
        optimizer.step()
        compressor.step()
    trial.cut(compressor)
