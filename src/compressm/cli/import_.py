"""``compressm import``."""

from pathlib import Path
from typing import Annotated

import typer

from compressm.cli.options import file_option


def import_(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file of the CompreSSM paper's code.")],
    output: Annotated[Path, file_option(help="The YAML file for compressm train.")],
) -> None:
    """Bring a configuration over from the paper's published code."""
    from compressm.lab.runs.migrate import import_config, write_config

    write_config(import_config(config), output)
    print(f"{output}: run it with compressm train {output}")
