"""Files that configs can name: objectives, readers and metrics, each with its own schema.

A file of `aif/objectives`, `aif/readers` or `aif/basins` that defines `Options` (a pydantic model) is found by its
name; nothing else needs to be edited to add one.
"""

from __future__ import annotations

import difflib
import importlib
import math
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from aif.errors import BadInput


class Named(BaseModel):
    """`{name: ..., options...}`; the options are checked by the named file's own model."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False, frozen=True)
    name: str

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


def available(package: str) -> list[str]:
    """Names of the files under `aif/<package>/` that define `Options`."""
    folder = Path(__file__).parent / package
    return sorted(p.stem for p in folder.glob("*.py") if "class Options(" in p.read_text())


def plugin(package: str, name: str, options: dict[str, Any], where: str) -> tuple[Any, Any]:
    """The module `aif.<package>.<name>` and its checked `Options`; `module:name` is a user's own objective.

    Raises:
      BadInput: there is no such file, or an option is not right.
    """
    if ":" in name and package == "objectives":
        return None, options
    names = available(package)
    if name not in names:
        kind = "metric" if package == "basins" else package[:-1]
        raise BadInput(f"{where}: no {kind} is called {name!r}{nearest(name, names)}; there are {', '.join(names)}")
    module = importlib.import_module(f"aif.{package}.{name}")
    fields = {field.alias or name: field for name, field in module.Options.model_fields.items()}
    for key in options.keys() & fields.keys():
        nested = isinstance(options[key], dict)
        wanted = bool if nested else fields[key].annotation
        try:
            for value in options[key].values() if nested else [options[key]]:
                sound(value, wanted)
        except ValueError as error:
            raise BadInput(f"{where}: {key}: {error}") from error
    try:
        return module, module.Options.model_validate(options)
    except ValidationError as error:
        raise BadInput(f"{where}: {first_problem(error, module.Options)}") from error


def sound(value: Any, wanted: Any = None) -> Any:
    """The value, unless it is or lists true or false where the `wanted` type is another, NaN or infinity.

    YAML reads `yes` as true, and pydantic true as 1.

    Raises:
      ValueError: saying what stands there.
    """
    if isinstance(value, bool) and wanted is not bool:
        raise ValueError(f"{str(value).lower()} stands here (YAML reads yes, no, on and off so); quote text")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{value} stands here; give a finite number")
    for part in value if isinstance(value, list | tuple) else ():
        sound(part)
    return value


def first_problem(error: ValidationError, schema: type[BaseModel]) -> str:
    """The first problem of a validation, as `key: what is wrong; how to fix it`."""
    first = error.errors()[0]
    key = ".".join(str(p) for p in first["loc"]) or "config"
    more = f" (and {error.error_count() - 1} more)" if error.error_count() > 1 else ""
    if first["type"] == "extra_forbidden":
        names = _fields_at(schema, first["loc"][:-1])
        hint = nearest(str(first["loc"][-1]), names)
        return f"{key}: unknown key{hint}; keys here are {', '.join(names) or 'none'}{more}"
    message = first["msg"].removeprefix("Value error, ")
    shown = "" if first["type"] in ("missing", "value_error") else f", not {first['input']!r:.60}"
    return f"{key}: {message}{shown}{more}" if key != "config" else f"{message}{more}"


def _fields_at(schema: Any, loc: tuple) -> list[str]:
    for part in loc:
        if isinstance(part, str) and hasattr(schema, "model_fields") and part in schema.model_fields:
            schema = schema.model_fields[part].annotation
        args = [a for a in getattr(schema, "__args__", ()) if isinstance(a, type) and issubclass(a, BaseModel)]
        schema = args[-1] if args else schema
    return [field.alias or name for name, field in getattr(schema, "model_fields", {}).items()]


def nearest(name: str, names: list[str]) -> str:
    """`, did you mean ...?` where a name is close to one of `names`."""
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""
