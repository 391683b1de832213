"""`aif corpus ...`"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

NAME = "corpus"
app = typer.Typer(no_args_is_help=True, help="Corpora: check, score, show, measure, split and convert a file.")

Source = Annotated[str, typer.Argument(help="JSONL or .parquet file, or bundled:NAME")]
ScaleName = Annotated[str, typer.Option("--scale", help="rating scale: a name or a YAML file")]
Skip = Annotated[bool, typer.Option("--skip-bad-rows", help="list bad rows instead of stopping at the first")]
Target = Annotated[str, typer.Option("--target", help="stance whose answers are the target")]
Destination = Annotated[Path, typer.Option("--out", help="file to write, JSONL or .parquet")]
Columns = Annotated[list[str] | None, typer.Option("--column", help="OURS=THEIRS, for files that call a key otherwise")]  # noqa: UP045
Model = Annotated[str, typer.Option("--model", help="catalogue name, folder, .gguf file or owner/name")]
DEFAULT = "bundled:discernment"


def opened(path: str, scale: str = "nexus", skip: bool = False, columns: list[str] | None = None) -> tuple[Any, Any]:
    """(corpus, scale); rows that are skipped are listed on the error stream."""
    from aif.corpus import load_scale, located, read
    from aif.errors import BadInput

    for pair in columns or []:
        if "=" not in pair:
            raise BadInput(f"--column: {pair!r} names one key; write OURS=THEIRS")
    named = dict(pair.split("=", 1) for pair in columns or [])
    loaded = load_scale(scale)
    found = read(located(path), scale=loaded, columns=named or None, on_bad_row="skip" if skip else "error")
    for line in found.skipped:
        print(f"skipped: {line}", file=sys.stderr)
    return found, loaded


def told(value: Any) -> None:
    """Print as JSON."""
    print(json.dumps(value, indent=1, ensure_ascii=False, default=str))


@app.command("check")
def corpus_check(
    path: Source = DEFAULT, scale: ScaleName = "nexus", skip: Skip = False, columns: Columns = None
) -> None:
    """Read a corpus, report bad rows by file and line, and print its statistics."""
    from aif.corpus.check import check

    rows, loaded = opened(path, scale, skip, columns)
    told(check(rows, loaded))


@app.command("score")
def corpus_score(
    path: Source = DEFAULT,
    config: Annotated[Optional[Path], typer.Option(help="YAML config whose corpus.tiers is the rule")] = None,  # noqa: UP045
    scale: ScaleName = "nexus",
    target: Target = "discernment",
) -> None:
    """Score every row and sort the rows into tiers."""
    from aif.config import TiersSection, load
    from aif.corpus.tiers import Tiers, summary

    section = (load(config).corpus.tiers if config else None) or TiersSection()
    rows, loaded = opened(path, scale)
    told(summary([r for r in rows.rows if r.kind != "scaffolding"], loaded, Tiers(**section.model_dump()), target))


@app.command("agree")
def corpus_agree(first: Source, second: Source, scale: ScaleName = "nexus") -> None:
    """Agreement of two files that rate the same answers: quadratic-weighted kappa per dimension."""
    from aif.corpus.agreement import agreement

    (ours, loaded), (theirs, _) = opened(first, scale), opened(second, scale)
    told(agreement(ours, theirs, loaded))


@app.command("show")
def corpus_show(
    path: Source = DEFAULT,
    row: Annotated[str, typer.Option("--id", help="row to show; the first when left out")] = "",
    mask: Annotated[
        bool, typer.Option("--mask", help="colour the tokens that are trained, as the model reads them")
    ] = False,
    model: Model = "smollm2-135m",
    target: Target = "discernment",
    scale: ScaleName = "nexus",
) -> None:
    """Show a row: its prompt and answers, or the tokens of its target answer with those that are trained in colour."""
    from aif.verbs.showing import masked, shown

    corpus, loaded = opened(path, scale)
    found = chosen(corpus, row)
    if mask:
        from aif.models.hub import load

        masked(found, load(model), target)
    else:
        shown(found, loaded)


def chosen(corpus: Any, name: str) -> Any:
    """The row with this id; the first for ""."""
    from aif.corpus.jsonl import nearest
    from aif.errors import BadInput

    named = {row.id: row for row in corpus.rows}
    if name and name not in named:
        raise BadInput(f"{corpus.path}: id: no row is called {name!r}{nearest(name, named)}; see `aif corpus score`")
    return named[name] if name else corpus.rows[0]


@app.command("coherence")
def corpus_coherence(
    path: Source = DEFAULT,
    model: Model = "smollm2-135m",
    target: Target = "discernment",
    contrast: Annotated[
        str, typer.Option(help="a stance, `others` for all of them, `base` for the model's own answer")
    ] = "others",
    limit: Annotated[Optional[int], typer.Option(min=2, help="rows, evenly spread; all when left out")] = None,  # noqa: UP045
    flips: Annotated[int, typer.Option(min=19, help="random flips of signs behind the null")] = 500,
    tokens: Annotated[int, typer.Option(min=1, help="length of the model's own answers")] = 96,
    seed: int = 0,
) -> None:
    """How far the differences that a corpus teaches point one way, per layer, and the rows that do not."""
    from aif.batches import evenly
    from aif.directions import coherence as engine
    from aif.errors import BadInput
    from aif.models.hub import load
    from aif.policy import bind
    from aif.runtime import compilation_cache

    corpus, _ = opened(path)
    rows = [row for row in corpus.rows if row.kind != "scaffolding"]
    rows = rows if limit is None or limit >= len(rows) else [rows[k] for k in evenly(len(rows), limit)]
    compared = rows if contrast == engine.BASE else engine.contrasted(rows, target, contrast)
    compilation_cache()
    lm = load(model)
    policy = bind(lm)
    if contrast == engine.BASE:
        compared = engine.answered(policy, lm.tokenizer, rows, target=target, tokens=tokens)
    if len(compared) < 2:
        raise BadInput(f"{corpus.path}: {len(compared)} rows can be compared; give two or more")
    v = engine.differences(policy, lm.tokenizer, compared, target=target)
    about = {"path": str(corpus.path), "model": model, "target": target, "contrast": contrast}
    told(about | engine.summary(engine.measure(v, compared, flips=flips, seed=seed), compared))


@app.command("split")
def corpus_split(
    path: Source,
    out: Destination,
    heldout: Annotated[float, typer.Option(help="share of the prompts of every domain")] = 0.15,
    domains: Annotated[str, typer.Option(help="domains held out whole, with commas between them")] = "",
    scale: ScaleName = "nexus",
    seed: int = 0,
) -> None:
    """Write the corpus with `split` set by prompt: train, heldout, heldout_domain."""
    from collections import Counter

    from aif.corpus.splits import split
    from aif.corpus.writing import own, write

    corpus, _ = opened(path, scale)
    rows = split(corpus.rows, share=heldout, domains=[d.strip() for d in domains.split(",") if d.strip()], seed=seed)
    write(out, [own(row) for row in rows])
    told({"out": str(out), "splits": dict(sorted(Counter(row.split for row in rows).items()))})


@app.command("convert")
def corpus_convert(
    path: Source,
    out: Destination,
    to: Annotated[
        str, typer.Option(help="candidates, messages, sharegpt, completion, columns, pair or text")
    ] = "candidates",
    target: Target = "discernment",
    scale: ScaleName = "nexus",
    columns: Columns = None,
) -> None:
    """Write a corpus in another format; any format that `check` reads may come in."""
    from aif.corpus.writing import convert, write

    corpus, _ = opened(path, scale, columns=columns)
    made = convert(corpus.rows, to, target)
    write(out, made)
    told({"out": str(out), "format": to, "rows": len(made)})
