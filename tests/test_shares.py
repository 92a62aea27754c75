from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import shares

SECONDS = st.dictionaries(st.text(min_size=1, max_size=5), st.integers(1, 400), min_size=1, max_size=40)


@given(seconds=SECONDS, parts=st.integers(1, 8))
def test_parts_differ_by_no_more_than_one_file(seconds: dict[str, int], parts: int) -> None:
    lengths = [0] * parts
    for file, length in seconds.items():
        lengths[shares.part_of(file, seconds, parts)] += length
    assert max(lengths) - min(lengths) <= max(seconds.values())


@given(seconds=SECONDS, parts=st.integers(1, 8), file=st.text())
def test_every_file_has_one_part_whether_its_duration_is_known_or_not(
    seconds: dict[str, int], parts: int, file: str
) -> None:
    assert shares.part_of(file, seconds, parts) in range(parts)
    assert shares.part_of(file, seconds, parts) == shares.part_of(file, dict(reversed(seconds.items())), parts)


def test_measured_files_take_the_place_of_stored_ones_and_lost_files_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tests").mkdir()
    for name in ("one", "two", "three"):
        (tmp_path / "tests" / f"{name}.py").write_text("")
    monkeypatch.setattr(shares, "STORED", tmp_path / "tests" / "durations.json")
    shares.STORED.write_text(json.dumps({"tests/one.py": 7, "tests/two.py": 8, "tests/lost.py": 9}))
    stopwatch = shares.Stopwatch()
    for name, when, seconds in (("one", "setup", 1.4), ("one", "call", 2.2), ("three", "call", 0.8)):
        nodeid = f"tests/{name}.py::test_it[a::b]"
        stopwatch.pytest_runtest_logreport(
            pytest.TestReport(nodeid, (nodeid, 0, nodeid), {}, "passed", None, when, duration=seconds)  # type: ignore[arg-type]
        )
    stopwatch.pytest_sessionfinish()
    assert shares.stored() == {"tests/one.py": 4, "tests/two.py": 8, "tests/three.py": 1}


def test_files_of_other_parts_are_left_out_before_they_are_imported(pytestconfig: pytest.Config) -> None:
    files = [Path(__file__), Path(shares.__file__).parent / "saving" / "test_export.py"]
    for file in files:
        left_out = [shares.Share(f"{part}/3").pytest_ignore_collect(file, pytestconfig) for part in range(3)]
        assert sorted(left_out, key=bool) == [None, True, True]
    assert shares.Share("0/3").pytest_ignore_collect(files[0].parent, pytestconfig) is None
    with pytest.raises(pytest.UsageError, match="expected K/N with 0 <= K < N"):
        shares.Share("3/3")


def test_stored_durations_are_of_files_that_exist() -> None:
    root = Path(__file__).parents[1]
    assert [file for file in shares.stored() if not (root / file).exists()] == []
