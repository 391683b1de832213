"""The report: what it must show, and what no text in the results can make it do."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from aif.errors import BadInput
from aif.report import render
from aif.report.html import embedded
from aif.report.paths import path_panels
from aif.report.plots import bar_panels, curve_panels, styles
from aif.report.tables import cosine_map, forest
from aif.report.training import loss_panels, running_mean, term_panels
from aif.report.wording import compared, interval, number, sentence, summary
from aif.results import (
    Answer,
    Budget,
    Curve,
    Difference,
    DirectionRecord,
    Results,
    Sample,
    Scalar,
    Spent,
    TrainingLog,
    Unequal,
)

pytest.importorskip("plotly")

Text = Callable[[str], str]
ARMS = ("sft", "dpo", "efe")
GRID = [0.2 + 0.2 * k for k in range(10)]
QUANTITIES = (
    ("efficiency", "minimum loss", "nats/token", "lower", 2.4),
    ("efficiency", "norm at the minimum", "norm", "", 1.3),
    ("efficiency", "gain at the common norm", "nats/token", "higher", 0.3),
    ("stability", "mean gain lost", "%", "lower", 21.0),
    ("significance", "KL at the common norm", "nats/token", "higher", 0.00021),
    ("generality", "log-odds gained in training domains", "nats/token", "higher", 0.21),
    ("generality", "log-odds gained in held-out domains", "nats/token", "higher", 0.09),
    ("composure", "surprise kept", "bits", "lower", 7.125),
)
SHAPES: tuple[tuple[str, str, str, str, Callable[[float], float]], ...] = (
    ("efficiency", "loss", "nats/token", "effective norm", lambda x: 2.4 + 0.25 * (x - 1.3) ** 2),
    ("efficiency", "gain per squared norm", "nats/token", "effective norm", lambda x: 0.4 / (0.3 + x)),
    ("stability", "gain lost", "%", "noise e", lambda x: 24 * x**2),
    ("significance", "KL from the base model", "nats/token", "effective norm", lambda x: 0.0002 * x**2),
    ("composure", "surprise under load", "bits", "load", lambda x: 7 + math.sin(3 * x)),
)


def synthetic(t: Text = lambda s: s, steps: int = 40) -> Results:
    """Results with every kind of record; `t` is applied to every free text field."""
    arms, control = [t(a) for a in ARMS], t("random lora")
    subjects = [*((a, 1 + 0.05 * k, False) for k, a in enumerate(arms)), (control, 1.6, True)]
    scalars = [
        Scalar(metric=t(metric), quantity=t(quantity), unit=t(unit), better=better, arm=arm, control=noise,  # pyright: ignore
               value=v * f, low=v * f * 0.96, high=v * f * 1.05, n=48, rows=t("held-out prompts"),
               seeds=[0, 1], label="measured" if noise else "single seed")
        for metric, quantity, unit, better, v in QUANTITIES
        for arm, f, noise in subjects
    ]  # fmt: skip
    curves = [
        Curve(metric=t(metric), quantity=t(quantity), unit=t(unit), arm=arm, control=noise, x_label=t(x_label), x=GRID,
              value=[shape(x) * f for x in GRID], low=[shape(x) * f * 0.98 for x in GRID],
              high=[shape(x) * f * 1.02 for x in GRID], n=48, rows=t("held-out prompts"), seeds=[0, 1])
        for metric, quantity, unit, x_label, shape in SHAPES
        for arm, f, noise in subjects
    ]  # fmt: skip
    return Results(
        name=t("discernment, small"), created=t("2026-01-02T03:04:05+00:00"), command=t("aif compare"),
        environment={t("python"): t("3.12")}, config={t("adapter"): {t("kind"): t("lora")}},
        model={"source": t("tiny-model")}, corpus={"path": t("bundled:tiny"), "rows": 8}, arms=arms, baseline=arms[1],
        budget=Budget(match="kl", value=0.012, arms=[
            Spent(arm=a, seed=0, objective=t(a), steps=steps, tokens=81234, seconds=9.5, achieved=0.0129,
                  kl_from_start=0.0123, effective_norm=None) for a in arms]),
        unequal=[Unequal(what=t("answers read"), values={a: t(str(k)) for k, a in enumerate(arms)}, declared=True)],
        answers=[Answer(id=t("stable"), metric=t("stability"), quantity=t("mean gain lost"), unit="%", arm=arms[2],
                        baseline=arms[1], direction="lower", minimum_effect=2.0, value=v, low=v, high=v, p_adjusted=v,
                        verdict="inconclusive", reason=t("not measured")) for v in (None, 0.01)],
        scalars=scalars, curves=curves, differences=_differences(t, arms),
        cosines={"names": arms, "matrix": [[1, 0.02, -0.4], [0.02, 1, 0.9], [-0.4, 0.9, 1]], "noise_floor": 0.05,
                 "what": t("weight updates")},
        training=[_log(t, arm, objective, steps) for arm, objective in zip(arms, ARMS, strict=True)],
        directions=[DirectionRecord(name=t("contrast"), kind=t("contrast"), layer=5, norm=3.25, residual_norm=41.5,
                                    provenance={t("pooling"): t("response")})],
        samples=[Sample(prompt=t("Why is my tea bitter?"), arm=t("base"), direction=t("contrast"), layer=5, dose=dose,
                        text=t("It steeped too long. " * 6), tokens=30, repetition=0.3 * abs(dose), compression=0.61,
                        perplexity=math.inf if dose < 0 else 9.5) for dose in (-0.5, 0.0, 0.5)],
        notes=[t("Controls are Gaussian.")], seconds={t("efficiency"): 6.1, t("samples"): 2.5},
    )  # fmt: skip


def _differences(t: Text, arms: list[str]) -> list[Difference]:
    """One clear difference and one unclear one per arm and quantity."""
    baseline = arms[1]
    return [
        Difference(metric=t(m), quantity=t(q), unit=t(u), arm=a, baseline=baseline, value=-0.05 * v,
                   low=-0.09 * v, high=(-0.01 if clear else 0.03) * v, p=0.01, p_adjusted=0.02, seeds=[0, 1],
                   verdict=("arm better" if b == "lower" else "baseline better") if clear else "no difference shown",
                   label="single seed" if clear else "not supported")
        for a in (arms[0], arms[2])
        for k, (m, q, u, b, v) in enumerate(QUANTITIES)
        for clear in [k % 2 == 0]
        if b
    ]  # fmt: skip


def _log(t: Text, arm: str, objective: str, steps: int) -> TrainingLog:
    terms: dict[str, list[str]] = {"sft": ["cross_entropy"], "dpo": ["margin", "accuracy"]}
    terms["efe"] = ["G", "divergence", "pragmatic", "state_gain", "parameter_gain", "kl_habit", "entropy", "ambiguity"]
    lines = []
    for step in range(1, steps + 1):
        loss = 2 * math.exp(-step / 15) + 0.1 * math.sin(7 * step)
        same: dict[str, float] = {"cross_entropy": loss, "divergence": loss}
        own = {t(k): same.get(k, 0.7 * loss + len(k) + 0.05 * math.cos(5 * step)) for k in terms[objective]}
        lines.append({"step": float(step), "loss": loss, "seconds": 0.1, "skipped": 0.0, "tokens": 600.0, **own})
    return TrainingLog(arm=arm, seed=0, stage=t("stage"), objective=t(objective), lines=lines)


class Page(HTMLParser):
    """Tags, attributes, visible text and the content of script elements of a page."""

    def __init__(self, text: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.scripts: list[str] = []
        self.inside = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self.inside = tag
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = "" if tag == self.inside else self.inside

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.scripts[-1] += data
        else:
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def page_of(results: Results, folder: Path) -> Page:
    return Page(render(results, folder / "report.html").read_text(encoding="utf-8"))


def test_one_file_that_loads_nothing(tmp_path: Path) -> None:
    out = render(synthetic(), tmp_path / "sub" / "report.html")
    assert [p.name for p in (tmp_path / "sub").iterdir()] == ["report.html"]
    page = Page(out.read_text(encoding="utf-8"))
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form", "img")
        assert "src" not in attributes and "srcset" not in attributes
        assert attributes.get("href", "#").startswith("#")  # pyright: ignore
    styles_of = "".join(s for s in page.scripts if "font:" in s[:2000])
    assert "url(" not in styles_of and "@import" not in styles_of
    assert sum("plotly.js v" in s[:100] for s in page.scripts) == 1


def test_policy_forbids_every_load(tmp_path: Path) -> None:
    metas = page_of(synthetic(), tmp_path).named("meta")
    policy = next(m["content"] for m in metas if m.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:")
    assert "unsafe-eval" not in policy and "http" not in policy


ATTACKS = (
    "<script>alert(1)</script>", "</script><script>alert(1)</script>", "<img src=x onerror=alert(1)>",
    "\"><svg onload=alert(1)>", "' onmouseover='alert(1)", '" onfocus="alert(1)" autofocus="',
    "javascript:alert(1)", '<a href="javascript:alert(1)">x</a>', "<iframe src=javascript:alert(1)>",
    "</style><script>alert(1)</script>", "<!--<script>", "--><script>alert(1)</script>", "]]><script>alert(1)</script>",
    "{{ 7*7 }}{% raw %}", "</title><script>alert(1)</script>", "<base href=//evil.example>",
    "\u2028</script>\u2029", "<meta http-equiv=refresh content=0>", "</pre></blockquote><form action=//evil.example>",
    "&lt;script&gt;&#x3c;script&#x3e;\x00<b", "<details open ontoggle=alert(1)>", "\ud800<math><mtext>",
)  # fmt: skip


def skeleton(page: Page) -> list[tuple[str, list[str]]]:
    """Every tag with the names of its attributes."""
    return [(tag, sorted(attributes)) for tag, attributes in page.tags]


@pytest.mark.parametrize("attack", ATTACKS)
def test_no_text_becomes_markup(attack: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A page with an attack in every text field has the tags and attributes of a page with plain text there."""
    monkeypatch.setattr("aif.report.html.plotly_source", lambda: "/* plotly */")
    page = page_of(synthetic(lambda s: s + attack, steps=3), tmp_path)
    assert skeleton(page) == skeleton(page_of(synthetic(lambda s: s + " plain", steps=3), tmp_path))
    for _, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes)
        assert (attributes.get("href") or "#").startswith("#")
    figures = json.loads(next(s for s in page.scripts if s.startswith("[{")))
    names = [trace.get("name", "") for figure in figures for trace in figure["data"]]
    assert names and "<" not in "".join(names)
    assert page.text.count(" ".join(attack.encode(errors="replace").decode().split()).strip("\x00")) > 50


def test_embedded_json_survives() -> None:
    value = {"a": "</script>&\u2028\u2029<!--", "b": [math.nan, math.inf, 1.5]}
    text = str(embedded(value))
    assert not set(text) & set("<>&\u2028\u2029")
    assert json.loads(text) == {"a": value["a"], "b": [None, None, 1.5]}


def test_every_scalar_is_shown(tmp_path: Path) -> None:
    results = synthetic()
    page = page_of(results, tmp_path)
    hovers = " ".join(v for _, a in page.tags if (v := a.get("title")))
    for s in results.scalars:
        assert all(" ".join(text.split()) in page.text for text in interval(s.value, s.low, s.high))
        assert f"{s.value!r} [{s.low!r}, {s.high!r}]" in hovers
    assert "n 48 · seeds 0, 1" in page.text
    for d in results.differences:
        assert " ".join(sentence(d).split()) in page.text


def test_every_record_is_shown(tmp_path: Path) -> None:
    text = page_of(synthetic(), tmp_path).text
    for words in ("surprise under load", "surprise kept", "Composure", "Terms of efe", "kl_habit", "bundled:tiny",
                  "Why is my tea bitter?", "Noise floor ±0.05:", "81 234", "Controls are Gaussian.", "41.5", "+0.5",
                  "repetition 15 %", "perplexity ∞"):  # fmt: skip
        assert words in text, words


def test_sections_without_data_are_left_out(tmp_path: Path) -> None:
    bare = Results(name="bare", created="", command="aif compare", environment={}, config={}, model={}, corpus={},
                   arms=[], baseline="", budget=Budget(match="steps", value=None, arms=[]))  # fmt: skip
    page = page_of(bare, tmp_path)
    assert [a.get("id") for a in page.named("section")] == ["record"]
    assert page.named("script") == [] and len(page.named("h2")) == 1
    ids = [a.get("id") for a in page_of(synthetic(), tmp_path).named("section")]
    assert ids == ["questions", "verdicts", "table", "training", *(f"metric-{k}" for k in range(1, 6)), "cosines",
                   "directions", "samples", "budget", "notes", "record"]  # fmt: skip


def test_figures_are_valid_plotly() -> None:
    go = pytest.importorskip("plotly.graph_objects")
    results = synthetic(steps=80)
    look = styles(results)
    panels: list[Any] = [*curve_panels(results.curves, look), *bar_panels(results.scalars, look)]
    panels += loss_panels(results.training, look) + [p for g in term_panels(results.training, look).values() for p in g]
    for panel in panels:
        go.Figure({"data": panel.data, "layout": panel.layout})
    control = next(t for t in panels[0].data if t.get("name") == "random lora")
    assert control["line"]["dash"] == "dash"


def test_paths_are_drawn_in_their_plane() -> None:
    go = pytest.importorskip("plotly.graph_objects")
    results = synthetic()
    about = {"metric": "geometry", "unit": "norm", "x_label": "steps", "x": [0.0, 4.0], "n": 7, "seeds": [0]}
    flat = lambda y: {"value": y, "low": y, "high": y}  # noqa: E731
    curves = [
        Curve(arm=arm, quantity=f"path, component {k}", **about, **flat([0.0, k * end]))
        for arm, end in (("efe", 1.0), ("dpo", -2.0))
        for k in (1, 2)
    ]
    (panel,) = path_panels(curves, [], styles(results))
    assert [(t["x"], t["y"]) for t in panel.data] == [([0.0, 1.0], [0.0, 2.0]), ([0.0, -2.0], [0.0, -4.0])]
    go.Figure({"data": panel.data, "layout": panel.layout})
    assert path_panels(results.curves, [], styles(results)) == []


def test_norm_grids_of_different_kinds_do_not_share_a_panel() -> None:
    results = synthetic()
    one = next(c for c in results.curves if c.quantity == "loss")
    other = one.model_copy(update={"arm": "contrast direction", "x": [x / 20 for x in GRID]})
    panels = curve_panels([one, other], styles(results.model_copy(update={"curves": [one, other]})))
    assert [p.names for p in panels] == [["sft"], ["contrast direction"]]


def test_terms_equal_to_the_loss_are_not_repeated() -> None:
    results = synthetic()
    terms = term_panels(results.training, styles(results))
    assert [p.title for p in terms["efe"]] == ["pragmatic", "state_gain", "parameter_gain", "kl_habit", "entropy", "G",
                                               "ambiguity"]  # fmt: skip
    assert "sft" not in terms and len(terms["dpo"]) == 2
    assert running_mean([1.0, 3.0, math.nan, 5.0], 1) == [2.0, 2.0, 4.0, 5.0]


def test_forest_points_to_the_better_side() -> None:
    """Lower loss favours the arm, so an interval below zero is drawn right of the line."""
    results = synthetic()
    rows = {r["quantity"]: r for r in forest(results)[0]["rows"]}
    assert rows["minimum loss"]["verdict"] == "arm better" and rows["minimum loss"]["left"] > 0
    assert rows["KL at the common norm"]["verdict"] == "baseline better" and rows["KL at the common norm"]["right"] < 0
    assert all(-1 <= r["left"] <= r["mid"] <= r["right"] <= 1 for r in rows.values())


def test_words_do_not_exceed_the_interval() -> None:
    unclear = next(d for d in synthetic().differences if d.verdict == "no difference shown")
    assert sentence(unclear).startswith("No difference shown between sft and dpo")
    assert summary("sft", "dpo", [unclear]) == "sft against dpo: no difference shown on any of 1 quantities."
    assert interval(5.41849, 5.40884, 5.42741) == ("5.418", "[5.409, 5.427]")
    assert interval(-0.0002328, -0.0003, -0.000172) == ("−2.3 × 10⁻⁴", "[−3.0, −1.7] × 10⁻⁴")
    assert interval(0.647009, 0.647009, 0.647009) == ("0.6470", "[0.6470, 0.6470]")
    assert [number(x) for x in (None, math.inf, 0, 41.5, 1234567)] == ["–", "∞", "0", "41.5", "1\u202f234\u202f567"]


def test_what_was_compared() -> None:
    trained = "sft, dpo and efe were trained from tiny-model on the corpus bundled:tiny (8 rows)"
    assert compared(synthetic()) == f"{trained}; sft and efe are compared with the baseline dpo. Training seeds: 0, 1."
    renamed = [log.model_copy(update={"objective": "mine"}) for log in synthetic().training]
    assert "efe (objective mine)" in compared(synthetic().model_copy(update={"training": renamed}))


def test_cosines_within_the_noise_floor_are_marked() -> None:
    results = synthetic()
    noise = [[cell["noise"] for cell in row] for row in cosine_map(results)["rows"]]
    assert noise == [[False, True, False], [True, False, False], [False, False, False]]
    assert cosine_map(results.model_copy(update={"cosines": {"names": ["a"], "matrix": []}})) == {}


def test_plotly_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "plotly.offline", None)
    with pytest.raises(BadInput, match=r"aif\[report\]"):
        render(synthetic(steps=2), tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


def test_report_needs_no_jax() -> None:
    code = "import sys, aif.report; sys.exit('jax' in sys.modules or 'plotly' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
