"""The doctor: what is well passes, and what is not is one line with its remedy and exit status 2."""

from __future__ import annotations

import json
import socket

import pytest

from aif import doctor
from aif.errors import BadInput
from aif.verbs.devices import doctor as verb


def test_a_healthy_machine(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(doctor, "ROOM", 0)
    monkeypatch.setenv("AIF_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    verb()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(doctor.CHECKS) and all(line.startswith("ok ") for line in lines)


def test_what_is_wrong_is_named(monkeypatch, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AIF_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(doctor, "ROOM", 1e30)
    monkeypatch.chdir(tmp_path)
    lock = tmp_path / "runs" / "x" / "lock"
    lock.parent.mkdir(parents=True)
    lock.write_text("not json")
    with pytest.raises(BadInput, match="checks failed"):
        verb()
    said = capsys.readouterr().out
    for part in ("FAIL  cache folder: ", "FAIL  disk space: ", "FAIL  locks: "):
        assert part in said
    lock.write_text(json.dumps({"pid": 2**22 + 1, "host": socket.gethostname(), "started": None}))
    assert doctor.locks() == "0 runs going on, 1 left behind"
