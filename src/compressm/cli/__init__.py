"""The command line. After a user's mistake it prints one line on standard error, without traceback, and exits with 2.

There is one module per command. `app` puts the commands together, `options` and `common` hold what they share, and
`usage` words mistakes in options.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from compressm.cli.common import fail
from compressm.cli.usage import told
from compressm.errors import CompressmError, MissingExtraError


def leave(code: int) -> NoReturn:
    """Exit the process. After work in several processes, skip the interpreter's clean-up.

    gloo's threads outlive a process group that DistributedDataParallel has used (torch 2.13, with or without
    ``destroy_process_group``). During the clean-up they sometimes abort a process whose work is done.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is not None and distributed.is_available() and distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line; by default this process's own.

    Returns:
        the exit code: 0, or 2 after a user's mistake, or 130 after Ctrl-C.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _dispatch(given)
    except CompressmError as error:
        return fail(str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output has closed the pipe
        sys.stderr.close()
        return 1
    except MemoryError:
        return fail("out of memory; free some, or ask for less")
    except OSError as error:  # such as a full disk or a missing permission, which the system's message names
        return fail(f"{error.filename or 'input or output'}: {error.strerror or error}")


def _dispatch(given: list[str]) -> int:
    try:
        import typer
    except ModuleNotFoundError as error:
        raise MissingExtraError('the command line needs typer: pip install "compressm[train]"') from error
    from compressm.cli.app import make_app

    # Newer versions of typer contain their own copy of click. This finds the base of all usage errors in both cases.
    usage_error: type[Exception] = typer.BadParameter.__mro__[1]
    command_line = shlex.join(["compressm", *given])
    try:
        code: Any = make_app()(args=given or ["--help"], prog_name="compressm", standalone_mode=False, obj=command_line)
    except usage_error as error:
        return fail(told(error, given))
    except typer.Exit as error:
        return error.exit_code
    except typer.Abort:
        return 130
    return code if isinstance(code, int) else 0


__all__ = ["leave", "main"]
