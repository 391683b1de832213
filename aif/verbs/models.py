"""`aif models ...`"""

from __future__ import annotations

import json
from typing import Annotated

import typer

NAME = "models"
app = typer.Typer(no_args_is_help=True, help="Models: list, fetch, inspect.")


@app.command("list")
def models_list() -> None:
    """Models with a name: real ones that can be fetched, and random ones for tests."""
    from aif.models.families import SIZES
    from aif.models.hub import CATALOGUE

    for name, entry in CATALOGUE.items():
        print(f"{name:22s} {entry.description}")
    for name in SIZES:
        print(f"{name:22s} random weights, for tests")


@app.command("fetch")
def models_fetch(
    name: str, force: Annotated[bool, typer.Option("--force", help="fetch again what is there")] = False
) -> None:
    """Download a model into the cache folder and check it."""
    from aif.models.hub import fetch

    print(fetch(name, force=force))


@app.command("inspect")
def models_inspect(source: str) -> None:
    """Family, sizes, tokenizer and weights of a model."""
    from aif.models.hub import inspect

    print(json.dumps(inspect(source), indent=1, default=str))
