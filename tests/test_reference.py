"""The pages of reference leave out no public name, no option and no configuration key."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest

import compressm

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def reference() -> Any:
    spec = importlib.util.spec_from_file_location("reference", ROOT / "scripts/reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_public_name_is_in_the_interface() -> None:
    page = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    assert [name for name in compressm.__all__ if not re.search(rf"\b{name}\b", page)] == []


def test_every_command_option_and_key_is_in_the_stored_page(reference: Any) -> None:
    page = (ROOT / "docs/reference.md").read_text(encoding="utf-8")
    assert page == reference.page()  # as `make pages` writes it
    parameters = [one for command in reference.commands().values() for one in command.params]
    options = {opt for one in parameters for opt in one.opts if "-" in opt}
    assert {"--max-drop", "--data", "--quiet"} <= options
    assert [opt for opt in options if f"`{opt}`" not in page] == []
    keys = [f"`{section}.{name}`" for section, name, _ in reference.every_key()]
    assert {"`run.metric`", "`data.task`", "`compression.max_drop`"} <= set(keys)
    assert [key for key in keys if key not in page] == []
