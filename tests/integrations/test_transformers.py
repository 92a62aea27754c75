"""Against the real Trainer, on the CPU, with an LRU classifier that returns its loss."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

transformers = pytest.importorskip("transformers")

from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments  # noqa: E402

from compressm.cutting import state_dims  # noqa: E402
from compressm.cutting.metrics import MetricWarning  # noqa: E402
from compressm.errors import (  # noqa: E402
    CheckpointError,
    EvaluationError,
    InvalidRankRuleError,
    UnsupportedModelError,
)
from compressm.integrations.best_model import OlderModelWarning  # noqa: E402
from compressm.integrations.transformers import CompressionCallback  # noqa: E402
from compressm.layers import SequenceClassifier  # noqa: E402

STEPS = 24


class Classifier(nn.Module):
    """As the Trainer wants it: arguments by name, and the loss among the outputs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = SequenceClassifier(1, 2, d_model=4, d_state=16, dropout=0.1, norm="layer", r_min=0.9)

    def forward(self, u: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.net(u)
        return {"loss": F.cross_entropy(logits.float(), labels), "logits": logits}


def examples(count: int, seed: int = 0) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(count, 40, 1, generator=generator)
    return [{"u": x, "labels": (x.sum() > 0).long()} for x in u]


def make_trainer(folder: Path, callbacks: Any = (), **arguments: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "warmup_steps": 4,
        "lr_scheduler_type": "cosine",
        "save_steps": 4,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 1,
        "dataloader_pin_memory": False,
    }
    return Trainer(
        model=Classifier(),
        args=TrainingArguments(output_dir=str(folder), **{**defaults, **arguments}),
        train_dataset=examples(64),
        eval_dataset=examples(16, seed=1),
        callbacks=list(callbacks),
    )


def compressing(trainer: Trainer, **arguments: Any) -> CompressionCallback:
    callback = CompressionCallback(trainer, **{"states": 4, "window": 0.5, "cuts": 3, **arguments})  # at 4, 8, 12
    trainer.add_callback(callback)
    return callback


def dims(model: nn.Module) -> int:
    return next(iter(state_dims(model).values()))


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # Dynamo's own, of itself
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1},
        {"bf16": True},
        {"optim": "adamw_torch_fused"},
        {"optim": "sgd"},
        pytest.param({"torch_compile": True, "torch_compile_backend": "aot_eager"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_trains_through_cuts_and_logs_them(tmp_path: Path, arguments: dict[str, Any]) -> None:
    trainer = make_trainer(tmp_path, save_strategy="no", **arguments)
    callback = compressing(trainer)
    before = {name: value.shape for name, value in weights(trainer.model).items()}
    after_cuts: dict[str, Tensor] = {}

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 12:
                after_cuts.update(weights(trainer.model))

    trainer.add_callback(Watch())
    trainer.train()
    assert [event.step for event in callback.compressor.history if event.kind == "cut"] == [4, 8, 12]
    assert dims(trainer.model) <= 4
    assert before["net.blocks.0.ssm.nu_log"] == (16,)
    # The optimizer goes on moving every tensor.
    assert all(not torch.equal(value, after_cuts[name]) for name, value in weights(trainer.model).items())
    logged = [entry for entry in trainer.state.log_history if "compressm/cut_seconds" in entry]
    assert [entry["step"] for entry in logged] == [4, 8, 12]
    assert logged[-1]["compressm/states/net.blocks.0.ssm"] == dims(trainer.model)
    assert all(0 < entry["compressm/energy_kept/net.blocks.0.ssm"] < 1 for entry in logged)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["step"] for entry in trainer.state.log_history if "loss" in entry] == [*range(1, STEPS + 1)]
    assert torch.isfinite(torch.tensor(losses)).all()


@pytest.mark.parametrize(
    "stop", [4, *(pytest.param(n, marks=pytest.mark.exhaustive) for n in (8, 16))], ids="resumed at {}".format
)
def test_killed_and_resumed_it_ends_as_if_unbroken(tmp_path: Path, stop: int) -> None:
    unbroken = make_trainer(tmp_path / "unbroken")
    callback = compressing(unbroken)
    unbroken.train()
    shutil.copytree(tmp_path / "unbroken" / f"checkpoint-{stop}", tmp_path / "moved" / f"checkpoint-{stop}")
    resumed = make_trainer(tmp_path / "resumed")  # a new process would begin like this: first size, other folder
    again = compressing(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "moved" / f"checkpoint-{stop}"))
    assert dims(resumed.model) == dims(unbroken.model) <= 4
    for name, value in weights(unbroken.model).items():
        torch.testing.assert_close(weights(resumed.model)[name], value, rtol=0, atol=0)
    assert [event.step for event in again.compressor.history] == [event.step for event in callback.compressor.history]


def test_resumed_from_before_a_cut_in_the_same_process(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    compressing(trainer)
    trainer.train()
    end = weights(trainer.model)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))  # the model is smaller than this by now
    assert all(torch.equal(value, end[name]) for name, value in weights(trainer.model).items())


def test_the_best_model_from_before_a_cut_is_reloaded(tmp_path: Path) -> None:
    scores = iter([0.3, 0.9, 0.5, 0.5, 0.5, 0.5, 0.5])
    trainer = make_trainer(
        tmp_path,
        eval_strategy="steps",
        eval_steps=3,
        save_steps=3,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        greater_is_better=True,
    )
    trainer.compute_metrics = lambda prediction: {"score": next(scores)}
    compressing(trainer)
    stopping = EarlyStoppingCallback(early_stopping_patience=4)
    trainer.add_callback(stopping)
    with pytest.warns(OlderModelWarning, match=r"best model \(.*checkpoint-6, .* and 4 after the last cut; to keep"):
        trainer.train()
    assert trainer.state.global_step == 18  # 4 evaluations without improvement after the second
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-6")
    saved = safetensors_of(tmp_path / "checkpoint-6")
    assert 4 < dims(trainer.model) == saved["net.blocks.0.ssm.nu_log"].shape[0] < 16
    assert all(torch.equal(value, saved[name]) for name, value in weights(trainer.model).items())


def safetensors_of(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_a_harmful_cut_is_undone_by_the_trainers_own_metric(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, metric_for_best_model="score", greater_is_better=True)
    trainer.compute_metrics = lambda prediction: {"score": 1.0 if dims(trainer.model) == 16 else 0.0}
    callback = compressing(trainer, states=8, max_drop=0.1, cuts=1, check_after=3, on_setback="stop")
    rates: list[float] = []

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            rates.append(trainer.lr_scheduler.get_last_lr()[0])
            assert trainer.optimizer.param_groups[0]["lr"] == rates[-1]

    trainer.add_callback(Watch())
    trainer.train()
    kinds = [(event.kind, event.step) for event in callback.compressor.history]
    assert kinds == [("cut", 12), ("rolled_back", 15), ("stopped", 15), ("fell_short", 15), ("ended", STEPS)]
    assert trainer.state.global_step == STEPS
    assert dims(trainer.model) == 16
    assert sorted(rates[4:], reverse=True) == rates[4:]  # the scheduler was not turned back


def test_another_metric_of_the_trainer_is_named(tmp_path: Path) -> None:
    def score(_: Any) -> dict[str, float]:
        harmed = float(dims(trainer.model) < 16)
        return {"score": 1.0 - harmed, "my_loss": harmed}

    for name, mode, metric in (("score", "max", 0.0), ("eval_my_loss", "min", 1.0)):
        trainer = make_trainer(tmp_path / name)
        trainer.compute_metrics = score
        callback = compressing(trainer, states=8, max_drop=0.1, cuts=1, check_after=3, on_setback="stop", evaluate=name)
        trainer.train()
        assert callback.compressor.mode == mode
        undone = next(event for event in callback.compressor.history if event.kind == "rolled_back")
        assert (undone.metric, undone.loss) == (metric, 1.0)


@pytest.mark.parametrize("moved", [False, True])
def test_a_cut_under_observation_is_resumed(tmp_path: Path, moved: bool) -> None:
    def harmed(trainer: Trainer) -> CompressionCallback:
        return compressing(
            trainer,
            states=8,
            max_drop=0.1,
            cuts=1,
            check_after=6,
            on_setback="stop",
            evaluate=lambda model: float(dims(model) == 16),
        )

    trainer = make_trainer(tmp_path / "a")
    harmed(trainer)
    trainer.train()  # cut at 12, undone at 18
    assert dims(trainer.model) == 16
    folder = tmp_path / "b" / "checkpoint-16" if moved else tmp_path / "a" / "checkpoint-16"
    if moved:
        shutil.copytree(tmp_path / "a" / "checkpoint-16", folder)
        shutil.rmtree(tmp_path / "a")
    again = make_trainer(tmp_path / "a")
    callback = harmed(again)
    again.train(resume_from_checkpoint=str(folder))
    kinds = [event.kind for event in callback.compressor.history]
    assert kinds == ["cut", "rolled_back", "stopped", "fell_short", "ended"]
    assert dims(again.model) == 16


def test_a_roll_back_restores_the_run_that_was_resumed_and_not_another_one(tmp_path: Path) -> None:
    def harmed(folder: str, rate: float) -> Trainer:
        trainer = make_trainer(tmp_path / folder, learning_rate=rate)
        compressing(
            trainer, states=8, max_drop=0.1, cuts=1, check_after=6, on_setback="stop",
            evaluate=lambda model: float(dims(model) == 16),
        )  # fmt: skip
        return trainer

    unbroken = harmed("one", 1e-2)
    unbroken.train()  # cut at 12, undone at 18
    harmed("other", 3e-2).train()  # has a checkpoint-16 too
    resumed = harmed("other", 1e-2)
    resumed.train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-16"))
    assert all(torch.equal(value, weights(unbroken.model)[name]) for name, value in weights(resumed.model).items())


def test_files_of_two_checkpoints_are_not_mixed(tmp_path: Path) -> None:
    for folder in ("one", "other"):
        trainer = make_trainer(tmp_path / folder, max_steps=12)
        compressing(trainer, states=8, max_drop=1.0, cuts=1, window=0.6, check_after=4, evaluate=lambda model: 0.0)
        trainer.train()
    shutil.rmtree(tmp_path / "one" / "checkpoint-8" / "compressm")
    shutil.copytree(tmp_path / "other" / "checkpoint-8" / "compressm", tmp_path / "one" / "checkpoint-8" / "compressm")
    with pytest.raises(CheckpointError, match=r"was not saved with the trainer_state\.json that training is resumed"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-8"))


def test_a_model_that_the_trainer_builds_anew_is_resumed(tmp_path: Path) -> None:
    def make() -> Trainer:
        built = make_trainer(tmp_path, max_steps=16)
        trainer = Trainer(model_init=Classifier, args=built.args, train_dataset=examples(64))
        compressing(trainer, fraction=0.25, states=None, window=0.75)
        return trainer

    unbroken, resumed = make(), make()
    unbroken.train()
    assert dims(unbroken.model) == 4
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert all(torch.equal(value, weights(unbroken.model)[name]) for name, value in weights(resumed.model).items())


@pytest.mark.slow
def test_a_smaller_batch_size_that_fits_begins_again_with_the_same_goal(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, auto_find_batch_size=True, save_strategy="no")
    callback = compressing(trainer, fraction=0.25, states=None)

    class OutOfMemory(TrainerCallback):
        raised = False

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 6 and not self.raised:
                self.raised = True
                assert dims(trainer.model) == 10
                raise RuntimeError("CUDA out of memory.")

    trainer.add_callback(OutOfMemory())
    trainer.train()
    assert [event.step for event in callback.compressor.history] == [4, 8, 12]
    assert dims(trainer.model) == 4


def test_its_record_is_plain_json(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    compressing(trainer)
    trainer.train()
    state = json.loads((tmp_path / "checkpoint-8" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["compressm"]["state_dims"]["net.blocks.0.ssm"] < 16


@pytest.mark.parametrize("lost", [False, True])
def test_selective_layers_are_saved_and_resumed_while_cuts_are_pending(tmp_path: Path, lost: bool) -> None:
    tokens = torch.randint(0, 32, (64, 12), generator=torch.Generator().manual_seed(0))

    def make() -> Trainer:
        torch.manual_seed(0)
        sizes = {"hidden_size": 8, "state_size": 16, "num_hidden_layers": 2, "vocab_size": 32}
        trainer = Trainer(
            transformers.MambaForCausalLM(transformers.MambaConfig(**sizes, use_mambapy=False)),
            TrainingArguments(
                output_dir=str(tmp_path), max_steps=16, per_device_train_batch_size=4, save_steps=2, use_cpu=True,
                report_to="none", disable_tqdm=True, prediction_loss_only=True, lr_scheduler_type="constant",
            ),
            train_dataset=[{"input_ids": row, "labels": row} for row in tokens],
        )  # fmt: skip
        compressing(trainer)
        return trainer

    whole = make()
    whole.train()
    assert set(state_dims(whole.model).values()) == {4}
    resumed = make()
    if lost:  # moments that are not there are gathered anew
        shutil.rmtree(tmp_path / "checkpoint-2" / "compressm")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert set(state_dims(resumed.model).values()) == {4}
    if not lost:
        before = weights(whole.model)
        assert all(torch.equal(value, before[name]) for name, value in weights(resumed.model).items())


def test_refusals_come_before_training(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    trainer.add_callback(CompressionCallback(trainer))
    with pytest.raises(InvalidRankRuleError, match="say how far to cut"):
        trainer.train()
    with pytest.raises(InvalidRankRuleError, match=r"control='twin' .* the Trainer makes the steps"):
        CompressionCallback(trainer, tolerance=0.1, control="twin")
    trainer.model = nn.Linear(1, 1)
    with pytest.raises(UnsupportedModelError):
        CompressionCallback(trainer, tolerance=0.1)


def test_a_metric_that_no_evaluation_has_is_refused(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, metric_for_best_model="accuracy")
    compressing(trainer, max_drop=0.1, check_after=2)
    with pytest.raises(InvalidRankRuleError, match=r"metric_for_best_model='accuracy': .* no compute_metrics"):
        trainer.train()
    trainer = make_trainer(tmp_path)
    trainer.eval_dataset = None
    compressing(trainer, max_drop=0.1, check_after=2)
    with pytest.raises(InvalidRankRuleError, match="give the Trainer an eval_dataset"):
        trainer.train()
    trainer = make_trainer(tmp_path, metric_for_best_model="accuracy")
    trainer.compute_metrics = lambda prediction: {"f1": 0.5}
    compressing(trainer, max_drop=0.1, check_after=2)
    with pytest.raises(
        EvaluationError, match=r"has no 'eval_accuracy' .* only eval_f1, eval_loss.*let compute_metrics"
    ):
        trainer.train()


def test_a_metric_of_the_trainer_that_is_not_finite_makes_no_cut(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, metric_for_best_model="score")
    values = iter([0.5] * 3 + [float("nan")] + [0.5] * 20)  # three times before the cut is due
    trainer.compute_metrics = lambda prediction: {"score": next(values)}
    callback = compressing(trainer, states=8, max_drop=0.1, cuts=1, check_after=2)
    with pytest.warns(MetricWarning, match="evaluate returned nan at step 12, before a cut"):
        trainer.train()
    assert [event.kind for event in callback.compressor.history] == ["postponed", "cut", "kept", "ended"]


def test_the_trainers_gradient_scaler_is_known(tmp_path: Path) -> None:
    """Multiplied by a power of two and divided by it again, the gradients and all that follows are the same."""

    def predicted(scaler: Any) -> list[float]:
        trainer = make_trainer(tmp_path, max_steps=12, max_grad_norm=0.0)  # norms would be those of scaled gradients
        trainer.accelerator.scaler = scaler
        callback = compressing(trainer, gramians="loss", total_states=8, cuts=1, states=None)
        trainer.train()
        assert callback.compressor is not None
        return [layer["predicted_loss"] for event in callback.compressor.history for layer in event.layers]

    plain = predicted(None)
    assert predicted(torch.amp.GradScaler("cpu", init_scale=2.0**10)) == pytest.approx(plain, rel=1e-3)
    assert plain[0] > 0


def test_the_loss_of_a_language_model_is_taken_for_a_mean_over_tokens(tmp_path: Path) -> None:
    def predicted(**given: Any) -> list[float]:
        torch.manual_seed(0)
        config = transformers.MambaConfig(
            vocab_size=9, hidden_size=8, state_size=8, num_hidden_layers=1, use_cache=False
        )
        rows = torch.randint(9, (16, 12), generator=torch.Generator().manual_seed(0))
        arguments = TrainingArguments(str(tmp_path), max_steps=4, report_to=[], use_cpu=True, save_strategy="no")
        data: Any = [{"input_ids": row, "labels": row} for row in rows]
        trainer = Trainer(transformers.MambaForCausalLM(config), arguments, train_dataset=data)
        callback = compressing(trainer, gramians="loss", states=4, cuts=1, window=0.5, **given)
        trainer.train()
        assert callback.compressor is not None
        return [layer["predicted_loss"] for event in callback.compressor.history for layer in event.layers]

    tokens = predicted(loss_terms="tokens")
    assert predicted() == tokens
    assert 0 < predicted(loss_terms="sequences")[0] < tokens[0] / 2
