"""Protocols as data: what the YAML may hold, and the line that names each mistake."""

from __future__ import annotations

import pytest

from aif.corpus import Message
from aif.corpus.protocol import load_protocol
from aif.errors import BadInput

GOOD = "name: p\nscenarios:\n  - id: hens\n    domain: farming\n    turns: [The hens., 'no']\n"


def test_a_protocol(tmp_path):
    (tmp_path / "p.yaml").write_text(
        "about: two\n" + GOOD + "  - {id: b, turns: [Hello], system: Be brief., language: en}\n"
    )
    protocol = load_protocol(tmp_path / "p.yaml")
    first, second = protocol.scenarios
    assert (protocol.name, first.id, first.domain, first.turns) == ("p", "hens", "farming", ("The hens.", "no"))
    assert first.opening == () and second.opening == (Message("system", "Be brief."),) and second.language == "en"


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", ": protocol: must be a mapping"),
        ("name: p\n", ": protocol: scenarios is missing"),
        ("name: p\nscenarios: []\n", ": scenarios: must be a list of at least one"),
        ("name: ''\nscenarios: [{id: a, turns: [b]}]\n", ": name: must be text"),
        (GOOD.replace("turns", "turn"), ": scenarios[0]: unknown key 'turn', did you mean 'turns'?"),
        (GOOD.replace("[The hens., 'no']", "hello"), ": scenarios[0].turns: must be a list"),
        (GOOD.replace("[The hens., 'no']", "[]"), ": scenarios[0].turns: must be a list"),
        (GOOD.replace("'no'", "''"), ": scenarios[0].turns[1]: must be text"),
        (GOOD + "  - {id: hens, turns: [a]}\n", ": scenarios: 'hens' is listed twice"),
        (GOOD + "name: q\n", ":6: not YAML: a key is given twice"),
    ],
)
def test_what_is_no_protocol(tmp_path, text, expected):
    file = tmp_path / "p.yaml"
    file.write_text(text)
    with pytest.raises(BadInput) as caught:
        load_protocol(file)
    message = str(caught.value)
    assert message.startswith(f"{file}:") and expected in message and "; " in message and "\n" not in message
