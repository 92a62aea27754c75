"""Mistakes in options are told in our words, whatever the option parser says, for every option that takes a number."""

from __future__ import annotations

import inspect
from types import SimpleNamespace
from typing import get_args

import pytest

from compressm.cli import main
from compressm.cli.app import make_app
from compressm.cli.usage import told

NUMBERS = [
    (command.name, name, int in kinds)
    for command in make_app().registered_commands
    if command.callback is not None
    for name, one in inspect.signature(command.callback).parameters.items()
    if (
        kinds := {*get_args(get_args(one.annotation)[0]), get_args(one.annotation)[0]}
        if get_args(one.annotation)
        else set()
    )
    & {int, float}
]


@pytest.mark.parametrize(("command", "name", "whole"), NUMBERS)
def test_a_word_for_a_number(command: str, name: str, whole: bool, capsys: pytest.CaptureFixture[str]) -> None:
    option = f"--{name.replace('_', '-')}"
    assert main([command, "something", option, "few"]) == 2
    kind = "a whole number" if whole else "a number"
    assert capsys.readouterr().err.startswith(f"error: {option} few: {kind} was expected, such as ")


def test_without_arguments_it_prints_its_help_once(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    printed = capsys.readouterr()
    assert printed.out.count("Usage: compressm") == 1
    assert not printed.err
    assert "..." not in printed.out.partition("Commands:")[2], "every command's line fits into 80 columns"


def test_options_with_numbers_are_found() -> None:
    assert {("compress", "total_states", True), ("train", "max_drop", False), ("demo", "seeds", True)} <= {*NUMBERS}


@pytest.mark.parametrize(
    ("message", "line"),
    [
        (
            "Invalid value for '--seeds': 'few' is not a valid integer.",
            "--seeds few: a whole number was expected, such as 4",
        ),
        ("Invalid value for '--seeds': 'few' is not a valid float.", "--seeds few: a number was expected, such as 4"),
        ("Invalid value for '--seeds': few is not in the range x>=1.", "--seeds few: must be at least 1"),
        ("Invalid value for '--seeds': 'few' is not one of 'a', 'b'.", "--seeds few: choose a or b"),
        ("Invalid value for '--seeds': broken.", "Invalid value for '--seeds': broken; see compressm demo --help"),
    ],
)
def test_older_versions_of_typer_word_them_otherwise(message: str, line: str) -> None:
    error = SimpleNamespace(
        format_message=lambda: message,
        param=SimpleNamespace(opts=["--seeds"], default=4),
        ctx=SimpleNamespace(command_path="compressm demo"),
    )
    assert told(error, ["demo", "--seeds=few"]) == line
