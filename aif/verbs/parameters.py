"""Arguments and options that several verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

ConfigFile = Annotated[Path, typer.Argument(help="YAML config", metavar="CONFIG")]
Overrides = Annotated[Optional[list[str]], typer.Argument(help="key.sub=value overrides; ~key deletes one")]  # noqa: UP045
Out = Annotated[Optional[Path], typer.Option("--out", help="run folder; runs/NAME when left out")]  # noqa: UP045
Resume = Annotated[bool, typer.Option("--resume", help="continue the run in the folder")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="delete the run in the folder and start over")]
CacheFolder = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option(
        "--cache", help="folder of finished work that runs share; aif-cache beside the run folder when left out"
    ),
]
