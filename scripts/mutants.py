"""Which mistakes do the tests of a package notice? Mutate it, test every mutant, and list those that nobody noticed.

    python scripts/mutants.py theory --sample 200

Mutants are made and tested by mutmut (which `make mutants` installs), in a copy of sources and tests under
``build/mutants/<package>``. Every mutant is tested by those tests of the package that reach the function it is in, in a
process forked from one that has torch and the tests loaded. What is done stays done: the same call goes on where an
interrupted one stopped, and a mutant is tested again only where its function has changed, or, with ``--again``, where
nobody noticed it before. A smaller sample is part of a larger one.

    python scripts/mutants.py theory --sample 200 --added tests/theory/test_balanced.py

runs some new tests alone, on those mutants that nobody noticed. What other tests noticed stays noticed.

    python scripts/mutants.py training --sample 40 --seed 27 --tests tests/training/test_clock.py --wider tests/training

tests mutants of another sample by a few quick tests, and those that these do not notice by more tests. A sample that
no test was written for says what the tests are worth on mistakes that nobody has seen.

``scripts/equivalent_mutants.json`` names mutants that no test can notice, each with its changed line and the reason.
They are counted apart. An entry holds as long as the mutant of that name still makes that change.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import subprocess
import sys
import time
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

ROOT = Path(__file__).resolve().parent.parent
EQUIVALENT = ROOT / "scripts" / "equivalent_mutants.json"
SEED = 26
HANGS = 5  # a mutant that takes so many times as long as the original has been noticed
NOTICED = ("killed", "timeout", "segfault")
UNNOTICED = ("survived", "no tests")

CONFIGURATION = r"""
[tool.mutmut]
source_paths = ["src"]
only_mutate = {modules}
pytest_add_cli_args = ["-p", "no:cacheprovider", "-x", "-m", "not slow and not gpu and not exhaustive"]
pytest_add_cli_args_test_selection = {tests}
also_copy = ["README.md", "docs", "scripts", "examples", "benchmarks", "results"]
process_isolation = "forkserver"
forkserver_warmup = "collect"
use_git_change_detection = false
on_dependency_change = "ignore"
# Times are taken on the same machine, and a mutant runs the tests that reach it once at most.
timeout_constant = 20.0
timeout_multiplier = 4.0
# Messages are tested for what they say, not to the letter.
do_not_mutate_patterns = ['raise ', 'warnings\.warn', '\blog\.', '^\s*f?"[^"]*"[),]*$']
"""


def prepare(folder: Path, part: str, tests: list[str]) -> None:
    """Copy what has changed, and say what is to be mutated: a package, or one module of it."""
    for name in ("src", "tests", "README.md", "docs", "scripts", "examples", "benchmarks", "results"):
        source, target = ROOT / name, folder / name
        files = [source] if source.is_file() else [path for path in source.rglob("*") if path.is_file()]
        for path in files:
            copy = folder / path.relative_to(ROOT)
            if "__pycache__" in path.parts or (copy.exists() and copy.read_bytes() == path.read_bytes()):
                continue
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy)  # with the time of now, by which mutmut knows what is new
            (folder / "mutants" / path.relative_to(ROOT)).unlink(missing_ok=True)
        for copy in [target] if target.is_file() else target.rglob("*.py"):
            if not (ROOT / copy.relative_to(folder)).exists():
                copy.unlink()
                (folder / "mutants" / copy.relative_to(folder)).unlink(missing_ok=True)
    for half in (folder / "mutants" / "src" / "compressm" / part.partition("/")[0]).rglob("*.py"):
        if not half.with_name(f"{half.name}.meta").exists():  # an interrupted call left it half written
            half.unlink()
    module = ROOT / "src" / "compressm" / f"{part}.py"
    modules = [f"src/compressm/{part}.py"] if module.exists() else [f"src/compressm/{part}/*.py"]
    text = CONFIGURATION.format(modules=json.dumps(modules), tests=json.dumps(tests))
    (folder / "pyproject.toml").write_text((ROOT / "pyproject.toml").read_text() + text)


def all_mutants() -> list[str]:
    """Names of all mutants, in the order of the source; the present folder is the copy."""
    from mutmut.mutation.file_mutation import mutate_file_contents
    from mutmut.utils.file_utils import walk_mutatable_files
    from mutmut.utils.format_utils import get_mutant_name

    store, names = Path("names.json"), list[str]()
    known = json.loads(store.read_text()) if store.exists() else {}
    for path in sorted(walk_mutatable_files()):
        text = path.read_text()
        key = f"{path} {sha256(text.encode()).hexdigest()}"
        if key not in known:  # half a minute for a package
            made = mutate_file_contents(str(path), text).mutant_names
            known[key] = [get_mutant_name(path, name) for name in made]
        names += known[key]
    store.write_text(json.dumps(known))
    return names


def outcomes() -> dict[str, tuple[str, Path]]:
    """Of every mutant that has been tested: the outcome, and its file."""
    from mutmut.mutation.data import SourceFileMutationData
    from mutmut.stats import status_by_exit_code
    from mutmut.utils.file_utils import walk_mutatable_files

    found: dict[str, tuple[str, Path]] = {}
    for path in walk_mutatable_files():
        if not Path("mutants", f"{path}.meta").exists():
            continue
        data = SourceFileMutationData(path=path)
        try:
            data.load()
        except ValueError:  # it is being written
            continue
        for name, code in data.exit_code_by_key.items():
            status = status_by_exit_code[code]
            if status not in ("not checked", "check was interrupted by user"):
                found[name] = status, path
    return found


def test(names: list[str], workers: int, again: bool) -> None:
    """Test these mutants, with a bar that shows how far it is: all that were not yet, or ``again`` those unnoticed."""
    before = {name: status for name, (status, _) in outcomes().items()}
    missing = [name for name in names if name not in before or (again and before[name] in UNNOTICED)]
    columns = ("{task.description}", *Progress.get_default_columns()[1:3], MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn()) as bar, Path("mutmut.log").open("w") as out:
        task = bar.add_task("mutants", total=len(names), completed=len(names) - len(missing))
        if not missing:
            return
        command = [Path(sys.executable).with_name("mutmut"), "run", "--max-children", str(workers), *missing]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        environment.pop("PYTHONPATH", None)  # the mutated sources are to be imported, and no others
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment)
        try:
            while process.poll() is None:
                time.sleep(1)
                now = outcomes()
                bar.update(task, completed=sum(name in now for name in names))
        finally:
            process.terminate()
            process.wait()
        now = outcomes()
        bar.update(task, completed=sum(name in now for name in names))
    if any(name not in now for name in names):
        sys.exit(f"mutmut stopped early; see {Path('mutmut.log').resolve()}")


def test_with(names: list[str], tests: list[str]) -> None:
    """Run some tests on those mutants that nobody has noticed yet. They must pass without a mutant."""
    import pytest
    from mutmut.mutation.data import SourceFileMutationData
    from mutmut.utils.file_utils import walk_mutatable_files

    noticed = {name for name, (status, _) in outcomes().items() if status in NOTICED}
    done = noticed | set(json.loads(EQUIVALENT.read_text()))
    shutil.copytree("tests", Path("mutants", "tests"), dirs_exist_ok=True)
    for path in Path("src").rglob("*.py"):  # of other packages: their sources may have changed
        if not (copy := Path("mutants", path)).exists():
            shutil.copyfile(path, copy)
    options = ["-x", "-q", "-p", "no:cacheprovider", "-m", "not slow and not gpu and not exhaustive"]

    def passes(name: str, timeout: float | None = None) -> bool:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "src", "MUTANT_UNDER_TEST": name}
        command = [sys.executable, "-m", "pytest", *options, *tests]
        try:
            done = subprocess.run(
                command, cwd="mutants", env=environment, capture_output=True, check=False, timeout=timeout
            )
        except subprocess.TimeoutExpired:
            return False
        if done.returncode in (pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.NO_TESTS_COLLECTED):
            sys.exit(f"pytest could not run {' '.join(tests)}:\n{done.stdout.decode()[-2000:]}")
        return done.returncode == 0

    begin = time.monotonic()
    if not passes(""):
        sys.exit(f"these tests do not pass without a mutant: {' '.join(tests)}")
    patience = 60 + HANGS * (time.monotonic() - begin)
    for path in walk_mutatable_files():
        data = SourceFileMutationData(path=path)
        data.load()
        for name in [name for name in data.exit_code_by_key if name in names and name not in done]:
            failed = not passes(name, patience)
            print(f"{name}: {'noticed' if failed else 'not noticed'}", flush=True)
            if failed:
                data.exit_code_by_key[name] = 1
                data.save()


def summary(names: list[str], total: int, before: dict[str, Any] | None) -> dict[str, Any]:
    """What is stored of a package: counts, and the diffs of mutants that nobody noticed, the equivalent ones apart.

    Args:
        names: the sample.
        total: number of all mutants of the package.
        before: what was stored last, if the tests have changed since.
    """
    from mutmut.mutation.diff_apply import get_diff_for_mutant

    known = json.loads(EQUIVALENT.read_text())
    found = {name: outcome for name, outcome in outcomes().items() if name in set(names)}
    killed = sum(status in NOTICED for status, _ in found.values())
    survivors: dict[str, Any] = {}
    equivalent: dict[str, Any] = {}
    for name, (status, path) in sorted(found.items()):
        if status not in UNNOTICED:
            continue
        diff = get_diff_for_mutant(name, path=path)
        if name in known and known[name]["becomes"] in changed_lines(diff):
            equivalent[name] = {"diff": diff, "reason": known[name]["reason"]}
        else:
            survivors[name] = {"outcome": status, "diff": diff}
    first = before and before.get("before", {key: before[key] for key in ("mutants", "killed", "survived", "score")})
    return {
        **({"before": first} if first else {}),
        "all_mutants": total,
        "mutants": len(found),
        "killed": killed,
        "survived": len(survivors),
        "equivalent": len(equivalent),
        "undecided": len(found) - killed - len(survivors) - len(equivalent),
        "untested": len(names) - len(found),
        "score": round(killed / max(1, killed + len(survivors)), 4),
        "survivors": survivors,
        "equivalents": equivalent,
    }


def changed_lines(diff: str) -> list[str]:
    """The lines that a mutant has in place of others, without their indentation."""
    return [line[1:].strip() for line in diff.splitlines() if line.startswith("+") and not line.startswith("+++")]


def origin(tests: list[str], options: argparse.Namespace) -> dict[str, Any]:
    """How a result came about."""
    return {
        "commands": [" ".join(["python", *sys.argv])],
        "tests": tests,
        **({"wider": options.wider} if options.wider else {}),
        "seed": options.seed,
        "sample": options.sample,
        "versions": {"python": platform.python_version(), **{name: version(name) for name in ("torch", "mutmut")}},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("part", help="a package or module of compressm: theory, or theory/ranks")
    parser.add_argument("--sample", type=int, default=200, help="how many mutants, drawn with --seed; 0 for all")
    parser.add_argument("--seed", type=int, default=SEED, help="which sample; results are stored sample by sample")
    parser.add_argument("--tests", nargs="*", help="folders or files of tests; by default those of the package")
    parser.add_argument("--wider", nargs="+", help="further tests, for those mutants that --tests do not notice")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes at a time")
    parser.add_argument("--again", action="store_true", help="test those anew that nobody noticed: tests have changed")
    parser.add_argument("--added", nargs="*", help="files of new tests, to be run alone on those that nobody noticed")
    parser.add_argument("--json", type=Path, default=ROOT / "results" / "mutants.json", help="where results go")
    options = parser.parse_args()
    if not any((ROOT / "src" / "compressm" / name).exists() for name in (options.part, f"{options.part}.py")):
        parser.error(f"there is no package or module compressm/{options.part}")
    tests = options.tests or [f"tests/{options.part.partition('/')[0]}"]
    stored = options.json.resolve()
    folder = ROOT / "build" / "mutants" / options.part.replace("/", ".")
    folder.mkdir(parents=True, exist_ok=True)
    prepare(folder, options.part, tests)
    os.chdir(folder)  # mutmut works on the present folder
    names = all_mutants()
    total = len(names)
    random.Random(options.seed).shuffle(names)
    names = names[: options.sample or total]
    if options.added:
        test_with(names, options.added)
    else:
        test(names, options.workers, options.again)
        if options.wider:
            test_with(names, options.wider)
    results = json.loads(stored.read_text()) if stored.exists() else {}
    samples, sample = results.get(options.part, {}), f"seed {options.seed}"
    before = samples.get(sample)
    later = options.again or options.added
    found = summary(names, total, before if later or (before and "before" in before) else None)
    commands = [*(before or {}).get("commands", []), " ".join(["python", *sys.argv])] if later else None
    found = {**origin(tests, options), **({"commands": commands} if commands else {}), **found}
    results = {**results, options.part: {**samples, sample: found}}
    stored.write_text(json.dumps(results, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
    counts = f"{found['killed']} noticed, {found['survived']} not, {found['equivalent']} equivalent"
    print(f"{options.part}: of {found['mutants']} mutants {counts}; score {found['score']:.1%}")
    for name, survivor in found["survivors"].items():
        print(f"\n{name}: {survivor['outcome']}\n{survivor['diff']}")


if __name__ == "__main__":
    main()
