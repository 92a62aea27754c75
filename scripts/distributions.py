"""Build the source distribution and the wheel, and hold both against the repository.

    python scripts/distributions.py                  the short form
    python scripts/distributions.py -m slow          also these tests in the unpacked source distribution
    python scripts/distributions.py --share 0/6 …    the first of six parts of all these tests

1. Every file of the repository is in the source distribution, and every file of src/ is in the wheel.
2. The wheel, built from the source distribution, is installed into an environment of its own; there the package is
   imported, and a built-in configuration trains for a few steps and is reported on.
3. In the unpacked source distribution, with its own sources first on the path, those tests run that look for other
   files of the repository; further arguments are those of a second call of pytest.
"""

from __future__ import annotations

import argparse
import os
import site
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import venv
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "compressm"
SHOWN = 20  # names of files
NO_TESTS = 5  # pytest's exit status; a share of few tests may hold none


class DistributionError(Exception):
    """A distribution that is not what it should be."""


def run(command: Sequence[str], folder: Path, environment: Mapping[str, str] | None = None) -> str:
    """Run a command silently; its output.

    Raises:
        DistributionError: it failed; with all that it said.
    """
    done = subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode != 0:
        raise DistributionError(f"{' '.join(command)}: exit status {done.returncode}\n{done.stdout}")
    return done.stdout


def build(folder: Path) -> tuple[Path, Path]:
    """The source distribution, and the wheel that is built from it."""
    run([sys.executable, "-m", "build", "--outdir", str(folder), str(ROOT)], ROOT)
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


def unpack(sdist: Path, folder: Path) -> Path:
    """Unpack a source distribution; the one folder in it."""
    with tarfile.open(sdist) as archive:
        if hasattr(tarfile, "data_filter"):
            archive.extractall(folder, filter="data")
        else:
            archive.extractall(folder)
    (unpacked,) = folder.iterdir()
    return unpacked


def repository() -> set[str]:
    """The files of the repository: what git holds, or would if everything were added."""
    told = run(["git", "ls-files", "--cached", "--others", "--exclude-standard"], ROOT)
    return {name for name in told.splitlines() if (ROOT / name).is_file()}


def compare(what: str, found: Iterable[str], expected: Iterable[str]) -> None:
    """Nothing is missing and nothing is there that should not be.

    Raises:
        DistributionError: with the names.
    """
    found, expected = set(found), set(expected)
    if found != expected:
        lines = [f"  missing: {name}" for name in sorted(expected - found)]
        lines += [f"  not of the repository: {name}" for name in sorted(found - expected)]
        more = [f"  and {len(lines) - SHOWN} more"] if len(lines) > SHOWN else []
        raise DistributionError("\n".join([f"the {what} is not what the repository is:", *lines[:SHOWN], *more]))
    print(f"{what}: {len(found)} files, those of the repository", flush=True)


def check_files(unpacked: Path, wheel: Path) -> None:
    """Step 1. Without git the source distribution is not compared with the repository, and the wheel is with it."""
    files = {path.relative_to(unpacked).as_posix() for path in unpacked.rglob("*") if path.is_file()} - {"PKG-INFO"}
    if (ROOT / ".git").exists():
        compare("source distribution", files, repository())
    else:
        print("source distribution: not compared, since this is not a checkout of git")
    with zipfile.ZipFile(wheel) as archive:
        installed = [name for name in archive.namelist() if not PurePosixPath(name).parts[0].endswith(".dist-info")]
    compare("wheel", installed, (name.removeprefix("src/") for name in files if name.startswith("src/")))


def check_wheel(wheel: Path, folder: Path) -> None:
    """Step 2. The packages that it depends on are those of this environment, and are not downloaded again."""
    python = environment(folder / "venv")
    run([sys.executable, "-m", "pip", "--python", str(python), "install", "--no-index", f"{wheel}[train]"], folder)
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    program = str(python.with_name(PACKAGE))
    place = run([str(python), "-c", f"import {PACKAGE}; print({PACKAGE}.__file__)"], folder, variables).strip()
    if not Path(place).is_relative_to(folder):
        raise DistributionError(f"{place} was imported instead of the wheel in {folder}")
    version = run([program, "--version"], folder, variables).strip()
    if wheel.name.split("-")[1] not in version.split():
        raise DistributionError(f"{wheel.name} says that it is {version}")
    short = ["run.steps=20", "run.output=run", "model.d_model=4", "model.d_state=8"]
    run([program, "train", "digits", *short], folder, variables)
    run([program, "report", "run", "--output", "report.html"], folder, variables)
    print(f"wheel: installed; {version} is imported, trains by a built-in configuration and reports on it", flush=True)


def environment(folder: Path) -> Path:
    """A virtual environment that finds the packages of this one behind its own, without what is installed editably."""
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    packages = run([str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], folder).strip()
    here = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), *site.getsitepackages()}
    Path(packages, "behind.pth").write_text("\n".join(sorted(here)) + "\n", encoding="utf-8")
    return python


def reads(test: PurePosixPath, text: str) -> bool:
    """Whether a test, by its path in the repository and its text, finds the repository's root from its own place."""
    levels = len(test.parts)
    return f"__file__).parents[{levels - 1}]" in text or "__file__)" + ".parent" * levels in text


def check_tests(unpacked: Path, arguments: Sequence[str], share: Sequence[str]) -> None:
    """Step 3: two calls of pytest, of whose tests ``share`` keeps a part."""
    paths = [str(unpacked / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    place = run([sys.executable, "-c", f"import {PACKAGE}; print({PACKAGE}.__file__)"], unpacked, variables).strip()
    if not Path(place).is_relative_to(unpacked):
        raise DistributionError(f"{place} was imported instead of the sources in {unpacked}")
    tests = [path.relative_to(unpacked) for path in sorted(unpacked.glob("tests/**/test_*.py"))]
    readers = [str(test) for test in tests if reads(PurePosixPath(test), (unpacked / test).read_text(encoding="utf-8"))]
    if not readers:
        raise DistributionError("no test looks for other files of the repository; `reads` no longer recognises them")
    for chosen in filter(None, [readers, list(arguments)]):
        print(f"unpacked source distribution: pytest {' '.join([*chosen, *share])}", flush=True)
        command = [sys.executable, "-m", "pytest", "-n", "2", "--dist", "worksteal", *chosen, *share]
        status = subprocess.run(command, cwd=unpacked, env=variables, check=False).returncode
        if status != 0 and not (share and status == NO_TESTS):
            raise DistributionError("tests fail in the unpacked source distribution")


def main() -> int:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--share", nargs=1, action="extend", default=[])
    options, arguments = parser.parse_known_args()
    share = [f"--share={part}" for part in options.share]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary).resolve()
        for name in ("built", "unpacked", "installed"):
            (folder / name).mkdir()
        try:
            sdist, wheel = build(folder / "built")
            unpacked = unpack(sdist, folder / "unpacked")
            check_files(unpacked, wheel)
            check_wheel(wheel, folder / "installed")
            check_tests(unpacked, arguments, share)
        except DistributionError as error:
            print(error, file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
