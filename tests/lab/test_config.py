from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from compressm.errors import ConfigError
from compressm.lab.config import CompressionConfig, load_config, parse_config
from compressm.layers import LRU
from compressm.training.compressor import Compressor

CONFIGS = Path(__file__).parents[2] / "src/compressm/lab/configs"

GOOD = """
data: {name: digits}
model: {d_model: 4, d_state: 8}
compression: {tolerance: 0.1}
run: {steps: 100}
"""


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.yaml")))
def test_committed_configs_are_valid(name: str) -> None:
    assert load_config(name) == load_config(CONFIGS / f"{name}.yaml")


def test_papers_settings() -> None:
    smnist, scifar = load_config(CONFIGS / "smnist.yaml"), load_config(CONFIGS / "scifar.yaml")
    assert smnist.run.steps == 200_000
    assert smnist.optimizer.lr == 4e-4
    assert (smnist.model.d_model, smnist.model.d_state, smnist.model.r_min) == (8, 256, 0.9)
    assert (scifar.model.n_layers, scifar.model.d_model, scifar.model.d_state) == (6, 512, 384)
    assert (scifar.schedule.warmup, scifar.schedule.lr_min, scifar.optimizer.ssm_lr_factor) == (0.1, 1e-7, 0.25)


def test_overrides_win(tmp_path: Path) -> None:
    config = load_config(
        written(tmp_path, GOOD),
        [
            "optimizer.lr=1e-2",
            "model.d_state=[8, 4]",
            "model.n_layers=2",
            "compression.tolerance=null",
            "compression.states=3",
        ],
    )
    assert config.optimizer.lr == 0.01
    assert config.model.d_state == [8, 4]
    assert (config.compression.tolerance, config.compression.states) == (None, 3)


def test_every_size_rule_and_disabling(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD.replace("tolerance: 0.1", ""))
    for rule in (
        "tolerance=0",
        "states=3",
        "fraction=0.5",
        "max_error=1.0",
        "total_states=9",
        "max_drop=0.002",
        "enabled=false",
    ):
        load_config(path, [f"compression.{rule}"])
    load_config(path, ["compression.tolerance=0.1", "compression.max_drop=0.01"])


def test_dumped_config_parses_again() -> None:
    config = load_config(CONFIGS / "digits.yaml")
    assert parse_config(config.model_dump(mode="json")) == config


def test_compression_section_is_the_compressors_arguments() -> None:
    """Every argument of the Compressor can be set, with the same default."""
    import inspect

    arguments = inspect.signature(Compressor.__init__).parameters
    ours = {name: field.default for name, field in CompressionConfig.model_fields.items() if name != "enabled"}
    theirs = {
        name: argument.default
        for name, argument in arguments.items()
        if name not in ("self", "model", "optimizer", "total_steps", "evaluate", "mode", "scheduler", "scaler")
        and name not in ("followers", "rewind", "train_step")  # for loops of other kinds
    }
    assert ours == theirs


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optimizer.lrr=1"], "optimizer.lrr = 1: unknown key; did you mean lr?"),
        (["lr=1"], "lr = 1: unknown key; did you mean optimizer.lr?"),
        (["optimizer.steps=1"], "optimizer.steps = 1: unknown key; did you mean run.steps?"),
        (["modle.d_model=1"], "modle: unknown key; did you mean model?"),
        (["run.zzz=1"], "run.zzz = 1: unknown key; known here are steps, batch_size,"),
        (
            ["optimizer.name=adamm"],
            "optimizer.name = 'adamm': must be 'adam', 'adamw', 'sgd' or 'muon'; did you mean adam?",
        ),
        (["optimizer.lr=fast"], "optimizer.lr = 'fast': must be a valid number"),
        (["optimizer.lr=yes"], "optimizer.lr = True: must be a valid number"),
        (["optimizer.lr=.nan"], "optimizer.lr = nan: must be a finite number"),
        (["optimizer.lr=0"], "optimizer.lr = 0: must be greater than 0"),
        (["run.steps=1.5"], "run.steps = 1.5: must be a valid integer"),
        (["run.steps="], "run.steps = None: must be a valid integer"),
        (["model.d_state=many"], "model.d_state = 'many': must be a valid integer"),
        (["model.d_state=[4, x]"], "model.d_state"),
        (["model.d_state=0"], "model.d_state = 0: must be at least 1"),
        (["model.d_state=[4, 4]"], "model.d_state = [4, 4]: must be one number, or n_layers=1 of them"),
        (["model.r_min=0.9995"], "model.r_min = 0.9995: must be less than r_max=0.999"),
        (["model.expand=2"], "model.expand = 2: is no option of layer lru, which has r_min, r_max, max_phase"),
        (
            ["model.layer=mamba", "model.n_groups=2"],
            "model.n_groups = 2: is no option of layer mamba, which has",
        ),
        (
            ["model.layer=delta_net", "model.d_conv=1"],
            "model.d_conv = 1: must be at least 2 taps, or 0 for no convolution, in layer delta_net",
        ),
        (
            ["model.layer=mamba", "model.d_conv=0"],
            "model.d_conv = 0: must be at least 1 tap in layer mamba; leave it out for the default, 4",
        ),
        (["model.d_conv=-1"], "model.d_conv = -1: must be greater than or equal to 0"),
        (
            ["model.layer=mamba2", "model.d_model=9"],
            "model.head_dim: must divide expand * d_model = 18 into",
        ),
        (
            ["model.layer=mamba9"],
            "model.layer = 'mamba9': must be 'lru', 's5', 's4d', 'mamba', 'mamba2', 'mamba3'",
        ),
        (["model=5"], "model = 5: must be a section with the keys d_model, d_state"),
        (["compression.states=4"], "compression: needs exactly one of tolerance, states, fraction"),
        (["compression.tolerance=null"], "max_drop; got none; compression.enabled=false trains without"),
        (["compression.start=99"], "compression.cuts: puts the last cut at step 107, after run.steps=100: lower"),
        (["schedule.lr_min=1.0"], "schedule.lr_min = 1.0: must not exceed optimizer.lr=0.001"),
        (["lr"], "'lr': not an override; write section.key=value"),
        (["data.name.x=1"], "data.name.x=1': name holds 'digits' and has no keys; set name itself"),
        (["run.seed=[1"], "override 'run.seed=[1', line 1: not valid YAML"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(written(tmp_path, GOOD), overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD.replace("run:", "rum:"), "rum: unknown key; did you mean run? (and 1 more)"),
        (GOOD.replace("run: {steps: 100}", ""), "run: missing; add it to the file, or give run.steps=<value>"),
        (
            GOOD.replace("steps: 100", "seed: 1"),
            "run.steps: missing; add it to the file, or give run.steps=<value>",
        ),
        ("data: {name: digits\nmodel: 3", "line 2: not valid YAML"),
        ("run: {steps: 1, steps: 2}", "line 1: not valid YAML (steps is given twice)"),
        ("run: {1: 2}", "not valid YAML (1 is not a name)"),
        ("run: !!python/object/apply:os.getcwd []", "not valid YAML"),
        ("just text", "sections such as 'data:' and 'run:' were expected, not 'just text'"),
        ("", "were expected, not None"),
    ],
)
def test_unfit_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(written(tmp_path, text))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: no such file, nor .*; check the path"):
        load_config(tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not a text file"):
        load_config(tmp_path / "binary")


@pytest.mark.parametrize("value", [["a"], {"a": {}}, None, 3])
def test_parse_config_of_anything(value: Any) -> None:
    with pytest.raises(ConfigError):
        parse_config({"data": value})


def test_cuts_come_where_the_compressor_makes_them(tmp_path: Path) -> None:
    model = nn.Sequential(LRU(2, 8))
    optimizer = torch.optim.Adam(model.parameters())
    for steps in (100, 101, 1001):
        for cuts in (1, 3, 7):
            for window in (0.1, 0.5, 1):
                compressor = Compressor(model, optimizer, steps, tolerance=0.1, cuts=cuts, window=window)
                load_config(
                    written(tmp_path, GOOD),
                    [f"run.steps={steps}", f"compression.cuts={cuts}", f"compression.window={window}"],
                )
                assert compressor.cut_steps[-1] <= steps
