"""`aif corpus ...`"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

NAME = "corpus"
app = typer.Typer(no_args_is_help=True, help="Corpora: check a file and show its statistics.")


@app.command("check")
def corpus_check(
    path: Annotated[str, typer.Argument(help="JSONL file, or bundled:NAME")] = "bundled:discernment",
    scale: Annotated[str, typer.Option(help="rating scale: a name or a YAML file")] = "nexus",
    skip: Annotated[
        bool, typer.Option("--skip-bad-rows", help="list bad rows instead of stopping at the first")
    ] = False,
) -> None:
    """Read a corpus, report bad rows by file and line, and print its statistics."""
    from aif.corpus import bundled, load_scale, read
    from aif.corpus.check import check

    loaded = load_scale(scale)
    file = bundled(path.removeprefix("bundled:")) if path.startswith("bundled:") else Path(path)
    rows = read(file, scale=loaded, on_bad_row="skip" if skip else "error")
    for line in rows.skipped:
        print(f"skipped: {line}", file=sys.stderr)
    print(json.dumps(check(rows, loaded), indent=1, default=str))
