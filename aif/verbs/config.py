"""`aif config ...`"""

from __future__ import annotations

import json
from typing import Annotated

import typer

from aif.verbs.parameters import ConfigFile, Overrides

NAME = "config"
app = typer.Typer(no_args_is_help=True, help="Configs: check one, or print the schema.")


@app.command("check")
def config_check(file: ConfigFile, overrides: Overrides = None) -> None:
    """Check a config and print it with every default filled in."""
    import yaml

    from aif.config import load

    print(yaml.safe_dump(load(file, overrides or []).model_dump(mode="json"), sort_keys=False), end="")


@app.command("schema")
def config_schema(
    results: Annotated[bool, typer.Option("--results", help="that of results.json instead")] = False,
) -> None:
    """The JSON schema of configs, or of the results that a comparison writes."""
    from aif.config import Config
    from aif.results import Results

    print(json.dumps((Results if results else Config).model_json_schema(), indent=1))
