"""Against the real Lightning, on the CPU."""

from __future__ import annotations

import logging
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    lightning = pytest.importorskip("lightning.pytorch")
    from lightning.pytorch.callbacks import EarlyStopping, EMAWeightAveraging, ModelCheckpoint
    from lightning.pytorch.loggers import CSVLogger

from compressm.cutting import state_dims
from compressm.errors import EvaluationError, InvalidRankRuleError, UnsupportedModelError
from compressm.integrations.best_model import OlderModelWarning
from compressm.integrations.lightning import CompressionCallback
from compressm.layers import SequenceClassifier

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
pytestmark = [
    pytest.mark.filterwarnings("ignore::lightning.fabric.utilities.warnings.PossibleUserWarning"),
    pytest.mark.filterwarnings("ignore:.*(LeafSpec|isinstance\\(treespec|tree_util|tensorboardX).*"),
    pytest.mark.filterwarnings(
        "ignore:(Checkpoint directory|The dirpath has changed|Be aware that when using .ckpt_path):UserWarning"
    ),
]
STEPS = 24  # 4 epochs of 6


class Classifier(lightning.LightningModule):
    def __init__(self, optimizers: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = SequenceClassifier(1, 2, d_model=4, d_state=16, dropout=0.0, norm="layer", r_min=0.9)
        self.optimizers_wanted = optimizers
        self.metric = 0.0
        self.rates: list[float] = []

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        u, y = batch
        return F.cross_entropy(self.net(u).float(), y)

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        u, y = batch
        self.log("val_loss", F.cross_entropy(self.net(u), y))
        self.log("score", self.metric)

    test_step = validation_step

    def configure_optimizers(self) -> Any:
        if self.optimizers_wanted > 1:
            self.automatic_optimization = False
            return [torch.optim.SGD(self.parameters(), lr=0.1) for _ in range(self.optimizers_wanted)]
        optimizer = torch.optim.AdamW(self.parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=80)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def data(count: int = 24) -> DataLoader:
    """Batches of 4 that are all alike: resumed within an epoch, Lightning reads its first batches again."""
    u = torch.randn(4, 40, 1, generator=torch.Generator().manual_seed(3)).repeat(count // 4, 1, 1)
    return DataLoader(TensorDataset(u, (u.sum((1, 2)) > 0).long()), batch_size=4)


def make_trainer(folder: Path, *callbacks: Any, **arguments: Any) -> lightning.Trainer:
    return lightning.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        **{"max_steps": STEPS, "logger": False, **arguments},
    )


def compression(**arguments: Any) -> CompressionCallback:
    return CompressionCallback(**{"states": 4, "window": 0.5, "cuts": 3, **arguments})  # at 4, 8, 12


def test_a_metric_of_the_validation_is_taken_by_its_name(tmp_path: Path) -> None:
    model = Classifier()
    callback = compression(evaluate="val_loss", max_drop=10.0, cuts=1, check_after=4)
    uneven = torch.utils.data.DataLoader(data().dataset, batch_size=10)  # 10, 10 and 4 examples
    make_trainer(tmp_path, callback, logger=CSVLogger(tmp_path)).fit(model, data(), uneven)
    assert callback.compressor is not None
    assert callback.compressor.mode == "min"
    end = callback.compressor.history[-1]
    assert (end.kind, end.step) == ("ended", STEPS)
    u, y = data().dataset.tensors
    with torch.no_grad():
        truth = F.cross_entropy(model.eval().net(u), y)
    assert end.to_dict()["metric"] == pytest.approx(float(truth), rel=1e-5)
    assert "log" not in vars(model)
    with pytest.raises(EvaluationError, match="logs no 'accuracy', it logs score, val_loss"):
        make_trainer(tmp_path, compression(evaluate="accuracy", max_drop=0.1)).fit(Classifier(), data(), uneven)
    with pytest.raises(InvalidRankRuleError, match="the Trainer has no validation data in its first epoch"):
        make_trainer(tmp_path, compression(evaluate="score", max_drop=0.1)).fit(Classifier(), data())


def every_two_steps(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=2, save_top_k=-1)


def dims(model: nn.Module) -> int:
    return next(iter(state_dims(model).values()))


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


@pytest.mark.parametrize(
    "arguments",
    [{}, {"gradient_clip_val": 0.1}, {"precision": "bf16-mixed"}, {"accumulate_grad_batches": 2, "max_steps": 12}],
    ids=str,
)
def test_trains_through_cuts_and_logs_them(tmp_path: Path, arguments: dict[str, Any]) -> None:
    callback, model = compression(), Classifier()
    trainer = make_trainer(tmp_path, callback, logger=CSVLogger(tmp_path), enable_checkpointing=False, **arguments)
    trainer.fit(model, data())
    steps = arguments.get("max_steps", STEPS)
    expected = [round(steps * share) for share in (1 / 6, 2 / 6, 3 / 6)]
    assert [event.step for event in callback.compressor.history] == expected
    assert dims(model) <= 4
    lines = (tmp_path / "lightning_logs" / "version_0" / "metrics.csv").read_text().splitlines()
    rows = [dict(zip(lines[0].split(","), line.split(","), strict=True)) for line in lines[1:]]
    cuts = [row for row in rows if row["compressm/cut_seconds"]]
    assert [int(row["step"]) for row in cuts] == expected
    assert float(cuts[-1]["compressm/states/net.blocks.0.ssm"]) == dims(model)
    assert 0 < float(cuts[-1]["compressm/energy_kept/net.blocks.0.ssm"]) < 1


@pytest.mark.parametrize("average", [pytest.param(False, marks=pytest.mark.exhaustive), True], ids=["plain", "ema"])
@pytest.mark.parametrize("stop", [4, 6, 16])
def test_killed_and_resumed_it_ends_as_if_unbroken(tmp_path: Path, stop: int, average: bool) -> None:
    def run(folder: str, first: bool, **arguments: Any) -> tuple[Classifier, CompressionCallback]:
        model, callback, ema = Classifier(), compression(), [EMAWeightAveraging(decay=0.8)] if average else []
        callbacks = [callback, *ema] if first else [*ema, callback]  # their order does not matter
        make_trainer(tmp_path, *callbacks, every_two_steps(tmp_path / folder)).fit(model, data(), **arguments)
        return model, callback

    unbroken, callback = run("a", first=True)
    # Lightning stores no random state, which is why this model has no dropout.
    resumed, again = run("b", first=False, ckpt_path=tmp_path / "a" / f"step={stop}.ckpt")
    assert dims(unbroken) <= 4
    # An average that has just been set to the weights moves by a rounding error if it is updated with them.
    torch.testing.assert_close(resumed.state_dict(), unbroken.state_dict(), rtol=0, atol=1e-6 if average else 0)
    assert [event.step for event in again.compressor.history] == [event.step for event in callback.compressor.history]


def test_the_best_model_from_before_a_cut_is_reloaded(tmp_path: Path) -> None:
    model, best = Classifier(), ModelCheckpoint(tmp_path / "best", monitor="score", mode="max")
    sizes: list[int] = []

    class Score(lightning.Callback):
        def on_validation_start(self, trainer: Any, pl_module: Classifier) -> None:
            sizes.append(dims(pl_module))
            pl_module.metric = [0.2, 0.9, 0.5, 0.5][len(sizes) - 1] if len(sizes) < 5 else 0.1

    stopping = EarlyStopping("score", mode="max", patience=3)
    trainer = make_trainer(tmp_path, Score(), stopping, compression(), best, max_steps=60)
    trainer.fit(model, data(), data(8))
    assert trainer.global_step == 30  # 3 validations without improvement after the second
    assert dims(model) == 4 < sizes[1]
    with pytest.warns(OlderModelWarning, match=f"has {sizes[1]} states in it, and 4 after the last cut.*'last'"):
        trainer.test(model, data(8), ckpt_path="best", verbose=False)
    assert dims(model) == sizes[1]
    saved = torch.load(best.best_model_path, weights_only=False)["state_dict"]
    assert equal(model.state_dict(), saved)
    fresh = Classifier()  # in another process, with only this callback
    make_trainer(tmp_path, compression()).test(fresh, data(8), ckpt_path=best.best_model_path, verbose=False)
    assert equal(fresh.state_dict(), saved)


def test_averaging_goes_on_through_cuts(tmp_path: Path) -> None:
    ema = EMAWeightAveraging(decay=0.8)
    model, live = Classifier(), {}

    class Watch(lightning.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Classifier, *_: Any) -> None:
            live.update({name: value.clone() for name, value in pl_module.state_dict().items()})

    make_trainer(tmp_path, ema, compression(), Watch(), enable_checkpointing=False).fit(model, data())
    averaged = model.state_dict()  # at the end Lightning puts the average into the model
    assert dims(model) <= 4
    for name, value in averaged.items():
        assert not torch.equal(value, live[name])
        torch.testing.assert_close(value, live[name], rtol=0.5, atol=0.05)


def test_a_harmful_cut_is_undone(tmp_path: Path) -> None:
    callback = compression(
        states=8,
        max_drop=0.1,
        cuts=1,
        check_after=3,
        on_setback="stop",
        evaluate=lambda model: float(dims(model) == 16),
    )
    model = Classifier()
    trainer = make_trainer(tmp_path, callback, enable_checkpointing=False)
    trainer.fit(model, data())
    assert [(event.kind, event.step) for event in callback.compressor.history] == [
        ("cut", 12),
        ("rolled_back", 15),
        ("stopped", 15),
        ("fell_short", 15),
        ("ended", STEPS),
    ]
    assert trainer.global_step == STEPS
    assert dims(model) == 16
    assert trainer.optimizers[0].param_groups[0]["lr"] == trainer.lr_scheduler_configs[0].scheduler.get_last_lr()[0]


def test_a_cut_under_observation_is_resumed(tmp_path: Path) -> None:
    def callback() -> CompressionCallback:
        return compression(
            states=8, max_drop=0.1, cuts=1, check_after=5, on_setback="stop", evaluate=lambda m: float(dims(m) == 16)
        )

    make_trainer(tmp_path, callback(), every_two_steps(tmp_path / "a")).fit(Classifier(), data())
    model, again = Classifier(), callback()
    shutil.move(tmp_path / "a" / "step=14.ckpt", tmp_path / "elsewhere.ckpt")
    trainer = make_trainer(tmp_path, again, enable_checkpointing=False)
    trainer.fit(model, data(), ckpt_path=tmp_path / "elsewhere.ckpt")
    kinds = [event.kind for event in again.compressor.history]
    assert kinds == ["cut", "rolled_back", "stopped", "fell_short", "ended"]
    assert dims(model) == 16


def test_two_optimizers_of_the_same_layers_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="2 of Classifier's 2 optimizers train parameters of"):
        make_trainer(tmp_path, compression(total_steps=STEPS), enable_checkpointing=False).fit(
            Classifier(optimizers=2), data()
        )


class Manual(Classifier):
    """Manual optimisation with two optimizers: one for the state space layers, stepped at every second batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: list[Tensor], index: int) -> None:
        head, body = self.optimizers()
        self.manual_backward(super().training_step(batch, index))
        head.step()
        head.zero_grad()
        if index % 2:
            body.step()
            body.zero_grad()

    def configure_optimizers(self) -> Any:
        head = list(self.net.decoder.parameters())
        body = [p for p in self.net.parameters() if all(p is not one for one in head)]
        return torch.optim.SGD(head, lr=0.1), torch.optim.AdamW(body, lr=1e-2)


def test_with_several_optimizers_the_one_of_the_state_space_layers_counts(tmp_path: Path) -> None:
    callback, model = compression(total_steps=12), Manual()
    trainer = make_trainer(tmp_path, callback, max_steps=36, enable_checkpointing=False)  # 24 batches
    at: list[int] = []

    class Watch(lightning.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            if len(callback.compressor.history) > len(at):
                body = trainer.optimizers[1]
                at.append(max(int(state["step"]) for state in body.state.values()))

    trainer.callbacks.append(Watch())
    trainer.fit(model, data())
    assert [event.step for event in callback.compressor.history] == at == [2, 4, 6]
    assert dims(model) <= 4


class TwoLayers(Manual):
    """Each of two state space layers has an optimizer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.other = SequenceClassifier(1, 2, d_model=4, d_state=16, dropout=0.0, norm="layer", r_min=0.9)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.other.parameters(), lr=0.1), torch.optim.AdamW(self.net.parameters(), lr=1e-2)


def test_an_optimizer_of_layers_that_are_left_out_does_not_count(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match="2 of TwoLayers's 2 optimizers train parameters of"):
        make_trainer(tmp_path, compression(total_steps=12), enable_checkpointing=False).fit(TwoLayers(), data())
    callback, model = compression(total_steps=12, exclude="other.*", per_layer=True), TwoLayers()
    make_trainer(tmp_path, callback, max_steps=36, enable_checkpointing=False).fit(model, data())
    assert callback.compressor.optimizer is model.trainer.optimizers[1]
    assert [event.step for event in callback.compressor.history] == [2, 4, 6]
    assert [states <= 4 for states in state_dims(model).values()] == [True, False]


def test_a_twin_is_refused() -> None:
    with pytest.raises(InvalidRankRuleError, match=r"control='twin' .* Lightning makes the steps"):
        CompressionCallback(tolerance=0.1, control="twin")


def test_manual_optimisation_needs_the_number_of_steps(tmp_path: Path) -> None:
    with pytest.raises(InvalidRankRuleError, match=r"Manual optimises manually.*give CompressionCallback total_steps="):
        make_trainer(tmp_path, compression(), enable_checkpointing=False).fit(Manual(), data())


class Endless(torch.utils.data.IterableDataset):
    """Examples without a length."""

    def __iter__(self) -> Any:
        u, y = next(iter(data()))
        while True:
            yield from zip(u, y, strict=True)


@pytest.mark.parametrize("arguments", [{"max_epochs": -1}, {"max_epochs": 1, "train": "endless"}], ids=str)
def test_a_training_without_a_planned_end_needs_the_number_of_steps(tmp_path: Path, arguments: dict[str, Any]) -> None:
    train = DataLoader(Endless(), batch_size=4) if "train" in arguments else data()
    arguments = {name: value for name, value in arguments.items() if name != "train"}
    arguments = {"max_steps": -1, "max_time": {"minutes": 5}, "enable_checkpointing": False, **arguments}
    with pytest.raises(InvalidRankRuleError, match=r"estimate of its steps is (inf|-1).* give CompressionCallback tot"):
        make_trainer(tmp_path, compression(), **arguments).fit(Classifier(), train)

    class Stop(lightning.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            trainer.should_stop = trainer.global_step >= STEPS

    callback, model = compression(total_steps=STEPS), Classifier()
    make_trainer(tmp_path, callback, Stop(), **arguments).fit(model, train)
    assert [event.step for event in callback.compressor.history] == [4, 8, 12]
    assert dims(model) <= 4


@pytest.mark.parametrize("batches", [True, 2])
def test_a_trial_run_observes_and_does_not_cut(tmp_path: Path, batches: Any) -> None:
    callback, model = compression(max_drop=0.1, evaluate=lambda m: 0.0), Classifier()
    make_trainer(tmp_path, callback, fast_dev_run=batches, max_steps=-1).fit(model, data(), data(8))
    assert callback.compressor.state_dict()["steps"] == int(batches)
    assert callback.compressor.history == []
    assert dims(model) == 16
    with pytest.raises(InvalidRankRuleError, match="exactly one"):  # what a real run would refuse
        make_trainer(tmp_path, compression(tolerance=0.1), fast_dev_run=True).fit(Classifier(), data())


def test_a_second_fit_goes_on_with_the_schedule(tmp_path: Path) -> None:
    callback, model = compression(total_steps=STEPS, fraction=0.25, states=None), Classifier()
    trainer = make_trainer(tmp_path, callback, max_steps=6, enable_checkpointing=False)
    trainer.fit(model, data())
    assert [event.step for event in callback.compressor.history] == [4]
    trainer.fit_loop.epoch_loop.max_steps = STEPS
    trainer.fit_loop.max_epochs = 10
    trainer.fit(model, data())
    assert [event.step for event in callback.compressor.history] == [4, 8, 12]
    assert dims(model) == 4
