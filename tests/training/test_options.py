"""Options are defined once: signatures, docstring, configuration and page say what the table says."""

from __future__ import annotations

import importlib.util
import inspect
import math
import re
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch

from compressm import Compressor, RankRule, compress
from compressm.errors import ConfigError, InvalidRankRuleError
from compressm.lab.config import CompressionConfig, parse_config
from compressm.layers import LRU
from compressm.training.options import ABSENT, OPTIONS, REQUIRED, SIZE_RULES, check_options

# By hand: values that are fit and that are not. Every option about a number or a choice is here.
VALUES: dict[str, tuple[list[Any], list[Any]]] = {
    "total_steps": ([100, 1000.0], [0, -1, 10.5, math.inf, "100", None, True]),
    "tolerance": ([0, 0.0, 0.02, 0.999, np.float32(0.5)], [1, 1.0, -0.01, math.nan, "0.1", True]),
    "states": ([1, 5, np.int64(3)], [0, -1, 2.5, math.inf, "3", True]),
    "fraction": ([0.01, 1, 1.0], [0, 1.01, -0.5, math.nan, True]),
    "max_error": ([0, 1e9], [-1e-9, math.inf, math.nan, "1"]),
    "total_states": ([1, 99], [0, 2.5, True]),
    "max_loss": ([0, 0.01, 3.5], [-0.1, math.inf, math.nan, "0.1", True]),
    "max_drop": ([0, 0.002, 3], [-0.1, math.inf, math.nan, "0.1", True]),
    "multiple_of": ([1, 8], [0, 1.5, None]),
    "min_reduction": ([0, 0.05, 0.99], [1, -0.1, math.nan, None]),
    "max_reduction": ([0.01, 0.5, 1, 1.0], [0, 1.01, -0.5, math.nan, True]),
    "per_layer": ([True, False], ["no", None, 2]),
    "target": ([None], ["tensorrt", 1]),
    "layers": (["", ["blocks.0", "*"], ("a",), lambda name, layer: True], [3, True, ["a", 1]]),
    "exclude": (["blocks.?", ["blocks.0"]], [3, 0.5, [None]]),
    "cuts": ([1, 4, 4.0], [0, 1.5, "4", None]),
    "window": ([0.1, 1], [0, 1.1, -0.1, math.nan, None]),
    "start": ([0, 7], [-1, 0.5, None]),
    "mode": (["max", "min"], ["best", None]),
    "when": (["schedule", "settled"], ["later", None]),
    "method": (["real", "complex"], ["modal", None]),
    "selection": (["hankel", "gramians"], ["randm", None]),
    "gramians": (["white", "loss"], ["data", None]),
    "loss_terms": (["sequences", "tokens", "sum"], ["mean", None]),
    "loss_scale": ([0.25, 1, 65536.0], [0, -1.0, math.nan, math.inf, None]),
    "match_steps": ([0, 400], [-1, 1.5, None]),
    "carry": (["transform", "slice", "reset"], ["drop", None]),
    "check_after": ([1, 9, None], [0, 1.5]),
    "on_setback": (["halve", "stop"], ["cry", None]),
    "rewind": ([True, False], ["no", None]),
    "control": (["trend"], ["twins", None]),
    "evaluate": ([lambda _: 0.5, None], [0.5, "accuracy"]),  # its value instead of the function itself
    "train_step": ([lambda model, optimizer, batch: None, None], [1]),
}


def compressor(**arguments: Any) -> Compressor:
    torch.manual_seed(0)
    layer = LRU(2, 8)
    given = {"total_steps": 1000, "evaluate": lambda _: 0.0, **arguments}
    if "max_loss" in given or given.get("match_steps"):
        given.setdefault("gramians", "loss")
    if not any(name in given for name in SIZE_RULES):
        given["tolerance"] = 0.1
    if "min_reduction" in given or "max_reduction" in given:  # one above the other is refused
        given = {"min_reduction": 0.0, "max_reduction": 1.0, **given}
    return Compressor(layer, torch.optim.SGD(layer.parameters(), 0.1), **given)


def test_the_compressors_signature_is_the_table() -> None:
    signature = inspect.signature(Compressor.__init__).parameters
    hints = get_type_hints(Compressor.__init__)
    assert [name for name in signature if name not in ("self", "model", "optimizer")] == list(OPTIONS)
    for name, option in OPTIONS.items():
        default = REQUIRED if signature[name].default is inspect.Parameter.empty else signature[name].default
        assert default is option.default or default == option.default, name
        assert hints[name] == option.annotation, name


def test_the_signature_of_compress_is_the_tables_too() -> None:
    signature, hints = inspect.signature(compress).parameters, get_type_hints(compress)
    shared = {name: option for name, option in OPTIONS.items() if option.once is not ABSENT}
    assert set(signature) - set(OPTIONS) == {"model", "data", "loss", "optimizer"}
    assert set(signature) & set(OPTIONS) == set(shared)
    for name, option in shared.items():
        assert signature[name].default == option.once, name
        assert hints[name] == (option.type | None if option.once is None else option.annotation), name


def test_the_compressors_docstring_says_what_the_table_says() -> None:
    text = inspect.getdoc(Compressor)
    assert text is not None
    arguments = text.split("\nArgs:\n")[1].split("\n\n")[0]
    documented = dict(re.findall(r"^    (\w+): (.*(?:\n        .*)*)", arguments, re.MULTILINE))
    assert list(documented) == ["model", "optimizer", *OPTIONS]
    for name, option in OPTIONS.items():
        assert " ".join(documented[name].split()) == option.help, name


def test_the_configuration_has_the_options_with_their_defaults_and_types() -> None:
    keys = {name: field for name, field in CompressionConfig.model_fields.items() if name != "enabled"}
    assert set(keys) == {name for name, option in OPTIONS.items() if option.file}
    for name, key in keys.items():
        assert key.default == OPTIONS[name].default, name
        assert key.annotation == OPTIONS[name].annotation, name
        assert key.description == OPTIONS[name].help, name


def test_every_checked_option_is_tried() -> None:
    assert set(VALUES) == {name for name in OPTIONS if name not in ("scheduler", "scaler", "followers")}


@pytest.mark.parametrize("name", VALUES)
def test_unfit_values_are_refused_by_name_and_fit_ones_are_not(name: str) -> None:
    fit, unfit = VALUES[name]
    for value in fit:
        OPTIONS[name].check(value)
    for value in unfit:
        if value is None and OPTIONS[name].default is None:
            continue
        with pytest.raises(InvalidRankRuleError, match=rf"^{name} must be .*; got {re.escape(repr(value))}$"):
            compressor(**{name: value})


@pytest.mark.parametrize("name", [name for name, option in OPTIONS.items() if option.file])
def test_configurations_and_rules_refuse_what_the_compressor_refuses(name: str) -> None:
    fit, unfit = VALUES[name]
    rule = {} if name in SIZE_RULES else {"tolerance": 0.1}
    whole = {"data": {"name": "digits"}, "model": {"d_model": 4, "d_state": 8}, "run": {"steps": 1000}}
    plain = (bool, int, float, str, type(None))  # what YAML holds
    for value in fit:
        if type(value) in plain and not (OPTIONS[name].type is int and isinstance(value, float)):
            assert getattr(parse_config({**whole, "compression": {**rule, name: value}}).compression, name) == value
    for value in unfit:
        with pytest.raises(ConfigError, match=f"compression.{name} = "):
            parse_config({**whole, "compression": {**rule, name: value}})
    if name in RankRule.__dataclass_fields__ and name != "per_layer":
        for value in fit:
            if type(value) in plain:
                RankRule(**{"min_reduction": 0.0, **rule, name: value})
        for value in unfit:
            with pytest.raises(InvalidRankRuleError, match=f"^{name} must be"):
                RankRule(**{**rule, name: value} if value is not None else {**rule, name: "none"})


def test_what_is_missing_is_asked_for() -> None:
    given = {name: option.default for name, option in OPTIONS.items()} | {"total_steps": 10}
    with pytest.raises(InvalidRankRuleError, match="say how far to cut"):
        check_options(given)
    with pytest.raises(InvalidRankRuleError, match="max_drop needs evaluate"):
        check_options(given | {"max_drop": 0.1})
    check_options(given | {"max_drop": 0.1, "evaluate": len})
    check_options(given | {"states": 3})
    with pytest.raises(InvalidRankRuleError, match=r"max_loss=0\.1 is .* white noise .*: pass gramians='loss'"):
        compressor(max_loss=0.1, gramians="white")
    assert compressor(max_loss=0.1, gramians="loss").cut_steps


def test_attributes_are_the_parts_own() -> None:
    one = compressor(max_drop=0.1, check_after=7, on_setback="stop", rewind=False, when="settled", method="complex")
    assert (one.max_drop, one.check_after, one.on_setback, one.rewind) == (0.1, 7, "stop", False)
    assert (one.when, one.method, one.selection, one.carry, one.total_steps) == (
        "settled", "complex", "hankel", "transform", 1000,
    )  # fmt: skip
    assert one.cut_steps == (25, 50, 75, 100)
    assert one.followers == ()
    one.max_drop = 0.5  # may be changed while training
    assert one._cushion.max_drop == 0.5


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("options", Path(__file__).parents[2] / "scripts" / "options.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_lists_every_option_with_its_defaults() -> None:
    page = script().page()
    rows = re.findall(r"^\| `(\w+)` \|(.*)\|$", page, re.MULTILINE)
    assert sorted(name for name, _ in rows) == sorted(OPTIONS)
    cells = {name: [cell.strip() for cell in re.split(r"(?<!\\)\|", row)] for name, row in rows}
    assert cells["min_reduction"][1:3] == ["`0.05`", "`0.0`"]
    assert cells["cuts"][1:3] == ["`4`", ""]
    assert cells["total_steps"][1] == "required"
