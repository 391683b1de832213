"""Systems led through protocols: what is asked when, what is kept, how it is rated, and two of them side by side."""

from __future__ import annotations

import json
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

import aif.cli
from aif.config import check
from aif.corpus import Candidate, Dimension, Message, Scale, profile, read
from aif.corpus.protocol import Protocol, Scenario
from aif.corpus.ratings import distance
from aif.corpus.writing import own, write
from aif.errors import BadInput
from aif.experiment import Experiment
from aif.profiles import profiles_of
from aif.protocols import SILENCE, run
from aif.protocols.profiles import compared, profiles
from aif.protocols.rating import beliefs, rated
from aif.protocols.systems import local, remote
from aif.readers import Reader, Reading
from aif.report.html import profile_panel, render
from aif.report.plots import styles
from aif.report.protocol import render_protocol
from aif.results import Results
from aif.slots import response_means

SCALE = Scale("s", ("no", "some", "yes"), (Dimension("a", "alpha"), Dimension("b", "<b>eta")))
HENS = Scenario("hens", "farming", ("Hens!", "Still."), system="Be brief.")
TEA = Scenario("tea", "tea", ("Bitter.",), language="en")
PROTOCOL = Protocol("small", (HENS, TEA))


def echo(talks):
    return [f"{len(t)}: {t[-1].content}" for t in talks]


def test_every_turn_is_answered_with_the_whole_conversation_before_it():
    asked = []
    rows = run(PROTOCOL, lambda talks: asked.append([tuple(t) for t in talks]) or echo(talks), "echo")
    assert [len(talks) for talks in asked] == [2, 1]
    assert [r.id for r in rows] == ["hens/1", "hens/2", "tea/1"]
    assert rows[1].prompt == (
        Message("system", "Be brief."),
        Message("user", "Hens!"),
        Message("assistant", "2: Hens!"),
        Message("user", "Still."),
    )
    assert [(r.candidates[0].content, r.candidates[0].stance) for r in rows][1:] == [
        ("4: Still.", "echo"),
        ("1: Bitter.", "echo"),
    ]
    assert rows[2].extra == {"protocol": "small", "scenario": "tea", "turn": 1} and rows[2].language == "en"


def test_a_transcript_is_a_corpus(tmp_path):
    rows = run(PROTOCOL, lambda talks: [" " for _ in talks], "mute")
    write(tmp_path / "t.jsonl", [own(r) for r in rows])
    found = read(tmp_path / "t.jsonl").rows
    assert [(r.id, r.prompt, r.candidates, r.extra) for r in found] == [
        (r.id, r.prompt, r.candidates, r.extra) for r in rows
    ]
    assert {r.candidates[0].content for r in found} == {SILENCE}


def test_a_local_model_says_the_same_alone_and_in_company(lm):
    system = local(lm, tokens=5)
    talks = [[Message("user", "One?")], [Message("user", "And two, my dear?")]]
    assert system(talks) == [system([talk])[0] for talk in talks]
    warm = local(lm, tokens=12, temperature=1.0, seed=1)
    first = warm(talks)
    assert first != warm(talks) and first == local(lm, tokens=12, temperature=1.0, seed=1)(talks)


# an endpoint


class Handler(BaseHTTPRequestHandler):
    replies: list = []
    asked: list = []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.asked.append(body)
        status, reply = self.replies.pop(0) if self.replies else (200, said(f"{len(body['messages'])} messages"))
        self.send_response(status)
        self.end_headers()
        self.wfile.write(json.dumps(reply).encode())

    def log_message(self, *args):
        pass


def said(content):
    return {"choices": [{"message": {"content": content}}]}


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    Handler.replies, Handler.asked = [], []
    it = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=it.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{it.server_address[1]}/v1"
    it.shutdown()
    thread.join()
    it.server_close()


def test_an_endpoint_is_led_through_it_and_asked_again_when_it_is_busy(server):
    Handler.replies = [(503, {}), (200, {"choices": []})]
    waits: list[float] = []
    system = remote(server, "m", tokens=7, temperature=0.5, concurrency=1, sleep=waits.append)
    rows = run(PROTOCOL, system, "m")
    assert [r.candidates[0].content for r in rows] == ["2 messages", "4 messages", "1 messages"] and waits == [0.5, 1.0]
    assert Handler.asked[0]["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hens!"},
    ]
    assert (Handler.asked[0]["max_tokens"], Handler.asked[0]["temperature"], "logprobs" in Handler.asked[0]) == (
        7,
        0.5,
        False,
    )


def test_an_endpoint_that_does_not_answer_is_named(server):
    Handler.replies = [(200, said(None))] * 3
    with pytest.raises(BadInput, match=r"/v1: a reply without words, 3 times; run again"):
        remote(server, "m", retries=2, sleep=lambda s: None)([[Message("user", "x")]])
    Handler.replies = [(404, {})]
    with pytest.raises(BadInput, match=r"check protocol.endpoint"):
        remote(server, "m")([[Message("user", "x")]])


# rating


def fixed(states, known=None) -> Reader:
    """A reader of words that believes what it is told."""
    states = np.asarray(states, np.float32)
    known = np.ones(states.shape[:2], np.float32) if known is None else np.asarray(known, np.float32)
    note = lambda answers: {"q": states[: len(answers)], "k": known[: len(answers)]}  # noqa: E731

    def look(taps, batch, A):
        return Reading(batch.extras["q"], batch.extras["k"], A, A)

    return Reader(Partial(look, A=jnp.zeros((2, 3, 3))), annotate=note)


Q = [[[1, 0, 0], [0.2, 0.3, 0.5]], [[0, 0, 1], [0.5, 0.5, 0]], [[0, 1, 0], [1, 0, 0]]]


def test_ratings_are_the_likeliest_levels_with_the_expected_ones_beside_them():
    """E = 0 * 0.2 + 1 * 0.3 + 2 * 0.5 = 1.3 where the likeliest level is 2."""
    rows = run(PROTOCOL, echo, "e")
    states, known = beliefs(fixed(Q, [[1, 1], [1, 0], [1, 1]]), rows)
    found = [r.candidates[0] for r in rated(rows, SCALE, states, known)]
    assert [c.ratings for c in found] == [{"a": 0, "b": 2}, {"a": 2}, {"a": 1, "b": 0}]
    assert found[0].extra["expected"] == pytest.approx({"a": 0.0, "b": 1.3}) and "b" not in found[1].extra["expected"]


def test_a_reader_that_looks_into_a_model_sees_every_answer_once(lm):
    """Its belief is the sign of one coordinate of the answer's mean residual, found here from a batch of its own."""
    seen = []

    def look(taps, batch):
        on = jnp.repeat((taps[1, ..., :1] > 0)[..., None], 2, axis=-2)  # [B, R, 2, 1]
        return Reading(
            jnp.concatenate([~on, on, jnp.zeros_like(on)], -1).astype(jnp.float32),
            jnp.ones(on.shape[:3]),
            *[jnp.zeros((2, 3, 3))] * 2,
        )

    rows = run(PROTOCOL, echo, "e")
    reader = Reader(Partial(look), watch=response_means)
    states, known = beliefs(reader, rows, lm)
    alone = [beliefs(reader, [row], lm)[0][0] for row in rows]
    np.testing.assert_array_equal(states, alone)
    assert known.all() and seen == []


def test_profiles_turn_by_turn_and_the_pages_numbers(tmp_path):
    """turn 1: rows hens/1, tea/1: a = (0 + 1)/2; b = (1.3 + 0)/2. turn 2: a = 2, b = 0.5."""
    rows = rated(run(PROTOCOL, echo, "e"), SCALE, *beliefs(fixed(Q), run(PROTOCOL, echo, "e")))
    found = profiles(rows, SCALE)
    assert list(found) == ["turn 1", "turn 2", "all"]
    assert found["turn 1"].mean == pytest.approx({"a": 0.5, "b": 0.65}) and found["turn 2"].mean["b"] == 0.5
    other = rated(run(PROTOCOL, echo, "<i>f"), SCALE, *beliefs(fixed(np.roll(Q, 1, axis=-1)), rows))
    side = compared(rows, other, SCALE)
    assert side["systems"] == ["e", "<i>f"] and len(side["answers"]) == 3 and side["dimensions"]["b"] == "<b>eta"
    means = [p["mean"] for p in side["turns"]["turn 1"]["profiles"]]
    want = np.sqrt(np.mean([((means[0][d] - means[1][d]) / 2) ** 2 for d in "ab"]))
    assert side["turns"]["turn 1"]["distance"] == pytest.approx(want, abs=1e-3)
    text = render_protocol(side, tmp_path / "p.html").read_text()
    figures = json.loads(re.search(r'id="figures">(.*?)</script>', text, re.DOTALL)[1])
    assert [f["data"][0]["r"] for f in figures][1] == [2.0, 0.5, 2.0] and len(figures) == 3
    assert "<i>f" not in text and "&lt;i&gt;f" in text and "<b>eta" not in text


def test_the_distance_of_profiles_by_hand():
    """Means (0, 2) and (2, 1) of a scale of 3 levels: sqrt((1 + 1/4) / 2)."""
    p, q = profile([{"a": 0, "b": 2}], SCALE), profile([{"a": 2, "b": 1}], SCALE)
    assert distance(p, q, 3) == pytest.approx(0.625**0.5) and distance(p, p, 3) == 0.0
    assert distance(p, profile([{"a": 2}], SCALE), 3) == 1.0 and np.isnan(distance(p, profile([{}], SCALE), 3))
    assert distance(profile([{"a": 0, "b": 0}]), profile([{"a": 2, "b": 2}]), 3) == 1.0


def test_what_cannot_be_compared(tmp_path):
    rows = run(PROTOCOL, echo, "e")
    with pytest.raises(BadInput, match="no answer is rated; rate it"):
        profiles(rows, SCALE)
    write(tmp_path / "c.jsonl", [{"prompt": "x", "completion": "y"}])
    with pytest.raises(BadInput, match="c.jsonl:1: turn: is missing or no number"):
        profiles(read(tmp_path / "c.jsonl").rows, SCALE)
    there = rated(rows, SCALE, *beliefs(fixed(Q), rows))
    elsewhere = rated(
        run(Protocol("o", (Scenario("x", "d", ("Hi",)),)), echo, "e"), SCALE, *beliefs(fixed(Q), rows[:1])
    )
    with pytest.raises(BadInput, match="no scenario and turn in common"):
        compared(there, elsewhere, SCALE)
    assert Candidate("x").stance == ""


# before and after training


def test_profiles_of_arms_reach_the_report(tmp_path):
    config = {
        "model": {"source": "tiny-random", "remat": "none"},
        "corpus": {"path": "bundled:tiny"},
        "batch": {"rows": 1, "length": 384},
        "samples": {"profiles": 2, "tokens": 4},
        "arms": {"sft": {"objective": {"name": "sft"}, "steps": 1}},
    }
    e = Experiment(check(config))
    base, same = profiles_of(e, {"base": e.base, "sft": e.base})
    assert base.mean == same.mean and len(base.mean) == 15 and base.answers == 2 and base.reader == "probes"
    assert all(0 <= m <= 3 for m in base.mean.values()) and base.levels == ["low", "medium", "cusp", "high"]
    parts = dict.fromkeys(("environment", "config", "model", "corpus"), {})
    parts["budget"] = {"match": "steps", "value": None, "arms": []}
    names = {"name": "p", "created": "", "command": "", "baseline": "sft", "arms": ["sft"]}
    results = Results.model_validate({**names, **parts, "profiles": [base, same]})
    panel = profile_panel(results, styles(results))
    assert panel is not None and {t["name"] for t in panel.data} == {"base", "sft"}
    assert "mean levels of 2 answers" in render(results, tmp_path / "r.html").read_text().lower()
    assert panel.data[0]["r"] == [*base.mean.values(), next(iter(base.mean.values()))]


# the verbs


def test_run_rate_and_compare(tmp_path, monkeypatch, capsys):
    def call(*words) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["aif", "protocol", *map(str, words)])
        capsys.readouterr()
        try:
            aif.cli.main()
            return 0, *capsys.readouterr()
        except SystemExit as end:
            return end.code, *capsys.readouterr()

    (tmp_path / "p.yaml").write_text("name: p\nscenarios: [{id: a, turns: [Hello, 'And?']}]\n")
    few = ("--reader-model", "tiny-random", "--corpus", "bundled:tiny", "--set", "members=2", "--set", "folds=2")
    for name in "xy":
        spoken = tmp_path / f"{name}.jsonl"
        status, out, err = call(
            "run", tmp_path / "p.yaml", "--model", "tiny-random", "--tokens", 4, "--out", spoken, "--name", name
        )
        assert status == 0 and out == f"transcript: {spoken}\n" and "turn 2, 1 conversations" in err
        status, out, _ = call("rate", spoken, "--out", tmp_path / f"{name}-rated.jsonl", *few)
        assert status == 0 and len(json.loads(out)["turn 2"]) == 15
    status, out, _ = call(
        "compare", tmp_path / "x-rated.jsonl", tmp_path / "y-rated.jsonl", "--out", tmp_path / "c.html"
    )
    assert status == 0 and json.loads(out)["turns"]["all"]["distance"] == 0.0 and (tmp_path / "c.html").exists()
    status, _, err = call("compare", tmp_path / "x.jsonl", tmp_path / "y.jsonl")
    assert status == 2 and err.startswith(f"error: {tmp_path}/x.jsonl: no answer is rated; ")
    status, _, err = call("run", "bundled:none", "--out", tmp_path / "z.jsonl")
    assert status == 2 and "bundled:none: no such protocol" in err
    status, _, err = call("rate", tmp_path / "x.jsonl", "--out", tmp_path / "z", *few, "--set", "members")
    assert status == 2 and "--set: 'members' names no value" in err
