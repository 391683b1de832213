"""Parquet files as rows, and rows as parquet files; needs the `hf` extra."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from aif.errors import BadInput

ROWS = 256  # read at a time


def rows(path: Path, columns: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """Every row as a dict, with the named columns or all of them; lists and structs become lists and dicts.

    Raises:
      BadInput: pyarrow is missing, the file is not readable, or a column is not there.
    """
    parquet = _pyarrow(path)
    try:
        file = parquet.ParquetFile(path)
        for name in columns:
            if name not in file.schema_arrow.names:
                raise BadInput(f"{path}: {name}: no such column; name the column so")
        for batch in file.iter_batches(batch_size=ROWS, columns=list(columns) or None):
            yield from batch.to_pylist()
    except (OSError, ValueError) as error:  # pyarrow's ArrowInvalid is a ValueError
        raise BadInput(f"{path}: no readable parquet file ({' '.join(str(error).split())[:120]})") from error


def write(path: Path, found: Sequence[dict[str, Any]]) -> None:
    """Write rows as one table; a column whose values mix kinds is written as JSON text.

    Raises:
      BadInput: pyarrow is missing.
    """
    parquet = _pyarrow(path)
    import pyarrow

    names = list(dict.fromkeys(key for row in found for key in row))
    columns = {}
    for name in names:
        values = [row.get(name) for row in found]
        try:
            columns[name] = pyarrow.array(values)
        except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError):
            columns[name] = pyarrow.array([None if v is None else json.dumps(v, ensure_ascii=False) for v in values])
    parquet.write_table(pyarrow.table(columns), path)


def _pyarrow(path: Path) -> Any:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise BadInput(f"{path}: parquet needs pyarrow; pip install 'aif[hf]', or use JSONL") from error
    return parquet


__all__ = ["rows", "write"]
