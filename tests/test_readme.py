"""What the README and the documentation show must be in the repository; mkdocs checks the site's own links."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "name", ["README.md", "SECURITY.md", "CHANGELOG.md", *sorted(p.name for p in (ROOT / "docs").glob("*.md"))]
)
def test_relative_links_lead_to_committed_files(name: str) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a checkout")
    page = ROOT / name if (ROOT / name).exists() else ROOT / "docs" / name
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    committed = set(
        subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\n")
    )
    for link in re.findall(r"\]\(([^)#\s]+)", text):
        if "://" in link or link.startswith("mailto:"):
            continue
        target = (page.parent / link).resolve().relative_to(ROOT).as_posix()
        assert target in committed or any(path.startswith(f"{target}/") for path in committed), f"{page.name}: {link}"
