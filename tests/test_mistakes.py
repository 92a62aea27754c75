"""Every mistake of docs/mistakes.md is answered with one line, and the page shows these lines."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "scripts"))

from mistakes import MISTAKES, Mistake, answer, workplace  # noqa: E402

PAGE = (ROOT / "docs" / "mistakes.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module", autouse=True)
def furnished() -> Iterator[None]:
    with workplace(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("mistake", MISTAKES, ids=[one.made for one in MISTAKES])
def test_a_mistake_is_answered_with_one_line_that_says_what_to_do(mistake: Mistake) -> None:
    assert mistake.says in answer(mistake)
    assert f"| {mistake.what} | `{mistake.made}` |" in PAGE
