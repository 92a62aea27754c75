"""The comparison of the generated pages with what is stored notices every kind of difference."""

from __future__ import annotations

import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture
def pages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """scripts/pages.py with two quick pages, whose stored state is a copy."""
    spec = importlib.util.spec_from_file_location("pages", ROOT / "scripts" / "pages.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "pages", module)
    spec.loader.exec_module(module)
    quick = tuple(page for page in module.PAGES if page.name in ("cases.md", "families.md"))
    for page in quick:
        shutil.copy(ROOT / "docs" / page.name, tmp_path / page.name)
    monkeypatch.setattr(module, "PAGES", quick)
    monkeypatch.setattr(module, "DOCS", tmp_path)
    return module


def test_an_edited_number_is_shown_and_rebuilding_restores_it(
    pages: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert pages.main(["--check"]) == 0
    page = tmp_path / "families.md"
    text = page.read_text(encoding="utf-8")
    row = next(line for line in text.splitlines() if line.startswith("| LRU"))
    page.write_text(text.replace(row, row.replace("yes", "no")), encoding="utf-8")
    capsys.readouterr()
    assert pages.main(["--check"]) == 1
    shown = capsys.readouterr().out
    assert f"+{row}" in shown
    assert "docs/cases.md: as generated" in shown
    assert pages.main([]) == 0
    assert page.read_text(encoding="utf-8") == text


def test_missing_pages_and_left_over_pictures_are_named(pages: ModuleType, tmp_path: Path) -> None:
    page = pages.Page("results.md", "compressm reproduce --show", "--markdown", "images/results-*.svg")
    made, stored = tmp_path / "made", tmp_path / "images"
    (made / "images").mkdir(parents=True)
    stored.mkdir()
    (made / "results.md").touch()
    (made / "images" / "results-new.svg").touch()
    (stored / "results-old.svg").touch()
    (stored / "other.svg").touch()
    assert list(pages.differences(page, made)) == [
        "docs/images/results-new.svg: missing, and `compressm reproduce --show` writes it",
        "docs/images/results-old.svg: stored, but `compressm reproduce --show` does not write it",
        "docs/results.md: missing, and `compressm reproduce --show` writes it",
    ]
    pages.store(page, made)
    assert sorted(path.name for path in stored.iterdir()) == ["other.svg", "results-new.svg"]
    assert not list(pages.differences(page, made))


def test_a_page_that_does_not_name_its_command_is_refused(
    pages: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    silent = pages.Page("cases.md", "python -c \"import sys; open(sys.argv[2], 'w').write('# Cases')\"")
    monkeypatch.setattr(pages, "PAGES", (silent,))
    assert pages.main(["--check"]) == 1
    assert "docs/cases.md: its first lines must name the command" in capsys.readouterr().err


def test_a_command_that_fails_is_shown(
    pages: ModuleType, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pages, "PAGES", (pages.Page("cases.md", "python -c 'raise SystemExit(\"no data\")'"),))
    assert pages.main([]) == 1
    assert "failed with exit status 1:\nno data" in capsys.readouterr().err
