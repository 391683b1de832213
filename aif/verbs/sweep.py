"""`aif direction sweep`: layer and dose of a direction by effect against cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from aif.errors import BadInput
from aif.verbs.parameters import ConfigFile, Overrides


def sweep(
    direction: Annotated[Path, typer.Argument(help="direction file", metavar="DIRECTION")],
    file: ConfigFile,
    overrides: Overrides = None,
    layers: Annotated[str, typer.Option(help="as in 4,8,12 or 4:28:4; a sixth of them when left out")] = "",
    doses: Annotated[str, typer.Option(help="residual norms, as in -0.5,0.25,0.5")] = "-1,-0.5,-0.25,0.25,0.5,1",
    max_kl: Annotated[float, typer.Option(help="what the recommended dose may cost, nats/token")] = 0.1,
    prompts: Annotated[int, typer.Option(min=2, help="held-out prompts whose answers are compared")] = 12,
    texts: Annotated[int, typer.Option(min=2, help="passages of pre-training-like text")] = 8,
    length: Annotated[int, typer.Option(min=8, help="tokens of a passage")] = 128,
    source: Annotated[str, typer.Option(help="pydoc, or a .txt, .jsonl or .parquet file")] = "pydoc",
    samples: Annotated[int, typer.Option(min=0, help="prompts answered under every edit")] = 2,
    tokens: Annotated[int, typer.Option(min=1, help="tokens of such an answer")] = 32,
    out: Annotated[Path, typer.Option(help="file to write")] = Path("sweep.json"),
) -> None:
    """Effect of a direction on held-out answers against its cost on plain text, at every layer and dose."""
    from aif.config import load
    from aif.directions import load_direction
    from aif.directions.sweep import Ground, text_data
    from aif.directions.sweep import sweep as measure
    from aif.directions.use import residual_norms
    from aif.experiment import Experiment
    from aif.tokens import encode_prompt

    e = Experiment(load(file, overrides or []))
    lm = e.lm
    loaded = load_direction(direction, fingerprint=lm.fingerprint, shape=(lm.config.layers, lm.config.width))
    norms = residual_norms(loaded, direction)
    every = _layers(layers, lm.config.layers)
    heldout = e.config.corpus.heldout
    asked = [encode_prompt(lm.tokenizer, row.prompt, row.where) for row in e.rows(heldout)[:samples]]
    decode = lambda ids: lm.tokenizer.decode(ids, skip_special_tokens=True)  # noqa: E731
    passages = text_data(lm.tokenizer, source, texts, length)
    pairs = e.data("all", heldout).some(prompts)
    ground = Ground(e.base, pairs, passages, asked, lm.tokenizer.eos_token_id, decode, e.config.batch.rows)
    values = _numbers(doses, "--doses", float)
    options = {"layers": every, "doses": values, "max_kl": max_kl, "new_tokens": tokens, "seed": e.config.seed}
    found = measure(ground, loaded, norms, **options, say=lambda text: typer.echo(text, err=True))
    found.save(out)
    _print(found, direction)
    print(f"sweep: {out}")


def _layers(text: str, L: int) -> list[int]:
    """`4,8,12` or `4:28:4`; six layers spread over the model for an empty text."""
    if not text:
        return sorted({k * L // 6 for k in range(6)})
    if ":" not in text:
        return _numbers(text, "--layers", int)
    parts = _numbers(text.replace(":", ","), "--layers", int)
    if len(parts) > 3 or parts[-1] <= 0:
        raise BadInput(f"--layers {text}: write layers as in 4,8,12, or first:end:step as in 4:28:4")
    return list(range(*parts))


def _numbers(text: str, option: str, kind: Any) -> list[Any]:
    try:
        return [kind(x) for x in text.split(",")]
    except ValueError as error:
        raise BadInput(f"{option} {text}: is no list of numbers; separate them by commas") from error


def _print(found: Any, file: Path) -> None:
    print("layer   dose  effect (nats/token)        KL (nats/token)   repetition  zlib  perplexity  front")
    for p in found.points:
        signs = ("", "", "") if p.repetition is None else (p.repetition, p.compression, p.perplexity)
        shown = "{:>10.2f}  {:>4.2f}  {:>10.3g}".format(*signs) if p.repetition is not None else " " * 28
        interval = f"{p.effect:+.3f} [{p.effect_low:+.3f}, {p.effect_high:+.3f}]"
        cost = f"{p.kl:.3f} [{p.kl_low:.3f}, {p.kl_high:.3f}]"
        print(f"{p.layer:5d}  {p.dose:+5.2f}  {interval}  {cost}  {shown}  {'*' if p.on_front else ''}".rstrip())
    best = found.recommended
    said = "none" if best is None else f"--steer {file}:{best.dose:g}@{best.layer}"
    print(f"recommended: {said} ({found.reason})")
