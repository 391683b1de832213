"""The file that a comparison writes: its version, its schema and its page."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from aif import results as records
from aif.cli import app
from aif.errors import BadInput
from aif.results import Budget, Record, Results

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "results.md").read_text()
EMPTY = Results(name="x", created="", command="", environment={}, config={}, model={}, corpus={}, arms=[], baseline="",
                budget=Budget(match="steps", value=None, arms=[]))  # fmt: skip


@pytest.mark.parametrize("record", Record.__subclasses__(), ids=lambda r: r.__name__)
def test_the_page_names_every_field(record):
    named = set(re.findall(r"`(\w+)`", PAGE))
    assert record.__name__ in PAGE and set(record.model_fields) <= named
    assert f"This page is about version {records.VERSION}" in " ".join(PAGE.split())


def test_the_schema_is_that_of_the_file(tmp_path):
    EMPTY.save(tmp_path / "results.json")
    schema = json.loads(CliRunner().invoke(app, ["config", "schema", "--results"]).output)
    assert schema == Results.model_json_schema()
    written = json.loads((tmp_path / "results.json").read_text())
    assert set(written) == set(schema["properties"]) and set(schema["required"]) <= set(written)
    assert Results.load(tmp_path / "results.json") == EMPTY


@pytest.mark.parametrize(
    "text,said",
    [
        (
            '{"version": 1}',
            "results of version 1, and this engine reads version 2; run `aif compare` again with --resume",
        ),
        ('{"version": 3}', "results of version 3, and this engine reads version 2"),
        ("{}", "results of version None"),
        ("[]", "not a JSON object"),
        ("{", "not a JSON object"),
        ('{"version": 2, "name": 3}', "damaged results: "),
    ],
)
def test_another_file_is_refused_by_name(tmp_path, text, said):
    path = tmp_path / "results.json"
    path.write_text(text)
    with pytest.raises(BadInput) as error:
        Results.load(path)
    assert str(error.value).startswith(f"{path}: ") and said in str(error.value) and "\n" not in str(error.value)
