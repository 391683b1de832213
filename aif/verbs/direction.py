"""`aif direction ...`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Optional

import typer

from aif.errors import BadInput
from aif.verbs.parameters import ConfigFile, Overrides
from aif.verbs.sweep import sweep

NAME = "direction"
app = typer.Typer(no_args_is_help=True, help="Directions: extract, fit probes, sweep, show, compare, export, import.")
app.command("sweep")(sweep)

Kind = Literal["contrast", "pca", "trained", "o", "down", "shift"]
Tokens = Annotated[Literal["mean", "last"], typer.Option(help="all tokens of a response, or its last one")]
Model = Annotated[str, typer.Option(help="the model it belongs to")]
DirectionFile = Annotated[Path, typer.Argument(help="direction file", metavar="FILE")]


@app.command("extract")
def extract(
    file: ConfigFile,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="file to write")] = Path("direction.safetensors"),
    kind: Annotated[Kind, typer.Option(help="how to make it; o and down: what a rank-1 adapter writes")] = "contrast",
    pooling: Annotated[Literal["response", "token"], typer.Option(help="each has one vote")] = "response",
    tokens: Tokens = "mean",
    layer: Annotated[Optional[int], typer.Option(help="layer it is for")] = None,  # noqa: UP045
    adapter: Annotated[Optional[Path], typer.Option(help="trained.safetensors of a stage")] = None,  # noqa: UP045
) -> None:
    """A direction from a config's training answers (target stance against the others), or from a trained adapter."""
    from aif import directions as d
    from aif.directions.record import check_layer

    e, data, tuned = _prepared(file, overrides, adapter)
    if kind not in ("contrast", "pca") and tuned is None:
        raise BadInput(f"--kind {kind}: is made from a trained adapter; name its file with --adapter")
    layers = e.lm.config.layers
    at = layers // 2 if layer is None else check_layer(layer, layers, "--layer")
    read = lambda policy: d.response_means(policy, data, rows=e.config.batch.rows, pool=tokens)  # noqa: E731
    seen = read(e.base.replace(adapter=tuned) if kind in ("contrast", "pca") else e.base)
    own = kind in ("trained", "o", "down") and layer is None  # such a direction knows its layer
    about = _about(e, data, seen, tokens, None if own else at) | ({"adapter": str(adapter)} if adapter else {})
    if kind == "contrast":
        made = d.mean_difference(seen, _stance(data), pooling=pooling, provenance=about)
    elif kind == "pca":
        made = d.paired_pca(seen, _stance(data), data.prompts, provenance=about)
    elif kind == "trained":
        made = d.trained_vector(tuned, provenance=about)
    elif kind == "shift":
        made = d.mean_shift(seen, read(e.base.replace(adapter=tuned)), provenance=about)
    else:
        made = d.written(tuned, kind, provenance=about)
    _save(made, out)


@app.command("pairs")
def pairs(
    file: Annotated[Path, typer.Argument(help='JSONL of {"positive": text, "negative": text}', metavar="PAIRS")],
    out: Annotated[Path, typer.Option(help="file to write")] = Path("direction.safetensors"),
    method: Annotated[Literal["pca", "mean"], typer.Option(help="paired PCA, or mean difference")] = "pca",
    layer: Annotated[Optional[int], typer.Option(help="layer it is for; the middle one when left out")] = None,  # noqa: UP045
    model: Model = "smollm2-135m",
) -> None:
    """A direction from contrast pairs of raw texts, read at their last tokens."""
    from aif.directions.pairs import from_pairs, read_pairs
    from aif.directions.record import check_layer
    from aif.models.hub import load
    from aif.runtime import compilation_cache

    found, digest = read_pairs(file)
    compilation_cache()
    lm = load(model)
    at = lm.config.layers // 2 if layer is None else check_layer(layer, lm.config.layers, "--layer")
    _save(from_pairs(lm, found, data=digest, layer=at, method=method), out)


@app.command("fit")
def fit(
    file: ConfigFile,
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option(help="file to write")] = Path("probe.safetensors"),
    method: Annotated[Literal["logistic", "ridge", "lda"], typer.Option(help="kind of probe")] = "logistic",
    strength: Annotated[Optional[float], typer.Option(help="penalty, or shrinkage of lda")] = None,  # noqa: UP045
    folds: Annotated[int, typer.Option(min=2, help="of the cross-validation, grouped by prompt")] = 5,
    tokens: Tokens = "mean",
    dimension: Annotated[Optional[str], typer.Option(help="rated dimension, not the stance")] = None,  # noqa: UP045
    causal: Annotated[Optional[list[int]], typer.Option(help="layer to try by steering; repeat it")] = None,  # noqa: UP045
) -> None:
    """A probe per layer of the stance or a rated dimension: what is readable and, with --causal, functional."""
    from aif import directions as d
    from aif.directions.causal import comparable, thirds
    from aif.directions.layers import reader_layer

    e, data, _ = _prepared(file, overrides, None)
    for layer in causal or ():
        reader_layer(layer, e.lm.config.layers)
    positive = _stance(data) if dimension is None else _rated_high(e, data, dimension)
    if causal:
        thirds(comparable(data, positive)[0].prompts, 0)  # refuses too few prompts before the model runs
    seen = d.response_means(e.base, data, rows=e.config.batch.rows, pool=tokens)
    about = _about(e, data, seen, tokens, None) | {"what": dimension or e.config.corpus.target}
    options = {"method": method, "strength": strength, "folds": folds, "provenance": about}
    made, found = d.probe(seen, positive, data.prompts, **options)
    print("layer  accuracy              auroc  shuffled  selectivity              split halves")
    for r in found:
        print(
            f"{r.layer:5d}  {r.accuracy:.3f} [{r.low:.3f}, {r.high:.3f}]  {r.auroc:.3f}  {r.control:8.3f}  "
            f"{r.selectivity:+.3f} [{r.selectivity_low:+.3f}, {r.selectivity_high:+.3f}]  {r.split_half:+.3f}"
        )
    if causal:
        _try(e, data, positive, seen, causal, tokens)
    _save(made, out)


def _try(e: Any, data: Any, positive: Any, seen: Any, layers: list[int], tokens: Any) -> None:
    """Print what the logistic probe of each layer moves."""
    from aif.directions.causal import comparable
    from aif.directions.layers import layer_map, logistic_vectors, part

    some, on = comparable(data, positive)
    options = {"layers": layers, "make": logistic_vectors, "rows": e.config.batch.rows, "pool": tokens}
    for v in layer_map(e.base, some, positive[on], activations=part(seen, on), **options):
        passed = ", ".join(name for name, ok in v.passed.items() if ok) or "nothing"
        print(f"layer {v.layer}: {v.verdict} over {v.prompts} prompts (passed: {passed}; reader at {v.reader_layer})")
        print(f"  reading, logits: rise {v.reading_rise}, random {v.reading_random:.3g}")
        print(f"  log-odds, nats/token: rise {v.log_odds_rise}, random {v.log_odds_random:.3g}")
        print(f"  ablation removes {v.removed} of the reader's gap, random {v.removed_random:.3g}")


@app.command("show")
def show(file: DirectionFile) -> None:
    """What a direction is, and its length per layer in residual norms."""
    import numpy as np

    from aif.directions import load_direction

    direction = load_direction(file)
    about = dict(direction.provenance)
    norms, listed = about.pop("norms", None), {k: v for k, v in about.items() if not isinstance(v, list | dict)}
    for name, value in {"kind": direction.kind, **listed}.items():
        print(f"{name:14s} {value}")
    length = np.linalg.norm(direction.vector, axis=1)
    print("layer  length" + ("  in residual norms" if norms else ""))
    for layer, size in enumerate(length):
        print(f"{layer:5d}  {size:.4g}" + (f"  {size / norms[layer]:.4g}" if norms else ""))


@app.command("compare")
def compare(
    files: Annotated[list[Path], typer.Argument(help="two or more direction files", metavar="FILE...")],
) -> None:
    """Cosines between directions at every layer, beside the noise floor 1/sqrt(D)."""
    import numpy as np

    from aif.directions import load_direction
    from aif.directions.record import units

    if len(files) < 2:
        raise BadInput("direction compare: one file has nothing to be compared with; name two or more")
    first, *others = [load_direction(f) for f in files]
    mark = first.provenance.get("weights")
    for file, other in zip(files[1:], others, strict=True):
        if other.vector.shape != first.vector.shape or other.provenance.get("weights", mark) != mark:
            raise BadInput(f"{file}: belongs to another model than {files[0]}; compare directions of one model")
    unit = np.stack([units(np.asarray(x.vector)) for x in (first, *others)])
    cosines = np.einsum("ald,bld->lab", unit, unit)
    pairs = [(a, b) for a in range(len(files)) for b in range(a)]
    for number, file in enumerate(files):
        print(f"{number}: {file} ({(first, *others)[number].kind})")
    print("layer  " + "  ".join(f"{b}-{a}".rjust(6) for a, b in pairs))
    for layer, matrix in enumerate(cosines):
        print(f"{layer:5d}  " + "  ".join(f"{matrix[a, b]:+.3f}" for a, b in pairs))
    print(f"unrelated directions: about +-{first.vector.shape[1] ** -0.5:.3f}")


@app.command("export")
def export(
    file: DirectionFile,
    out: Annotated[Path, typer.Option(help="GGUF file, or new folder for weights")],
    to: Annotated[Literal["gguf", "weights"], typer.Option(help="add it, or ablate it from the weights")] = "gguf",
    layer: Annotated[Optional[list[int]], typer.Option(help="layer; its own when left out; repeat it")] = None,  # noqa: UP045
    dose: Annotated[Optional[float], typer.Option(help="residual norms; its own length when left out")] = None,  # noqa: UP045
    model: Model = "smollm2-135m",
) -> None:
    """Write a llama.cpp control vector, or the model's weights with the direction ablated, for other engines."""
    import numpy as np

    from aif.directions import load_direction
    from aif.directions.exports import ablated, control_vector
    from aif.directions.record import check_layer
    from aif.models.folder import write_folder
    from aif.models.hub import load

    lm = load(model)
    L = lm.config.layers
    direction = load_direction(file, fingerprint=lm.fingerprint, shape=(L, lm.config.width))
    if to == "gguf":
        written = control_vector(direction, out, config=lm.config, layers=layer, dose=dose)
        print(f"control vector: {out} (block {', '.join(map(str, written))})")
        return
    at = layer[0] if layer else direction.provenance.get("layer")
    if dose is not None or at is None or len(layer or ()) > 1:
        raise BadInput("--to weights: takes the direction of one layer and no dose; give --layer once and no --dose")
    vector = np.asarray(direction.vector[check_layer(at, L, "--layer")])
    write_folder(out, *ablated(lm.config, lm.params, vector), lm.tokenizer)
    print(f"model without the direction of layer {at}: {out}")


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="GGUF control vector", metavar="GGUF")],
    out: Annotated[Path, typer.Option(help="file to write")] = Path("imported.safetensors"),
    model: Model = "smollm2-135m",
) -> None:
    """Read a llama.cpp control vector; doses get their unit from the residual norms of the bundled tiny corpus."""
    from dataclasses import replace

    from aif.batches import build
    from aif.corpus import bundled, read
    from aif.directions import response_means
    from aif.directions.exports import read_control_vector
    from aif.directions.record import origin
    from aif.models.hub import load
    from aif.policy import bind

    lm = load(model)
    found = read_control_vector(file, lm.config)
    made_on = found.provenance.get("weights", lm.fingerprint)
    if made_on != lm.fingerprint:
        raise BadInput(f"{file}: made on other weights ({made_on}) than {model}'s ({lm.fingerprint}); name that model")
    rows = read(bundled("tiny")).rows
    data = build(rows, lm.tokenizer, which="target", length=min(512, lm.config.max_position), target="discernment")
    about = {**found.provenance, **origin(lm), "norms": response_means(bind(lm), data, rows=2).norms.tolist()}
    _save(replace(found, provenance=about), out)


def _prepared(file: Path, overrides: list[str] | None, adapter: Path | None) -> tuple[Any, Any, Any]:
    """The config's parts, its training answers (`direction.rows` prompts of them), and the adapter."""
    from aif.api import load_adapter
    from aif.config import load
    from aif.experiment import Experiment

    e = Experiment(load(file, overrides or []))
    tuned = load_adapter(adapter, e.lm) if adapter is not None else None
    return e, e.data("all", *e.config.corpus.train).some(e.config.direction.rows), tuned


def _about(e: Any, data: Any, seen: Any, tokens: Any, layer: int | None) -> dict[str, Any]:
    from aif.directions.record import origin, purpose, read_from

    read = read_from(seen, data.fingerprint, tokens)
    return {**origin(e.lm), **read, **purpose(layer), "corpus": e.corpus.sha256}


def _stance(data: Any) -> Any:
    return data.tables["preference"] > 0


def _rated_high(e: Any, data: Any, dimension: str) -> Any:
    """Responses that are rated in the upper half of a dimension's levels.

    Raises:
      BadInput: there is no such dimension, or a response is unrated.
    """
    from aif.plugins import nearest

    names = [d.id for d in e.scale.dimensions]
    if dimension not in names:
        raise BadInput(f"--dimension {dimension}: no such dimension{nearest(dimension, names)}; see corpus.scale")
    rated = data.tables["ratings"][:, names.index(dimension)]
    if (rated < 0).any():
        raise BadInput(f"--dimension {dimension}: {int((rated < 0).sum())} answers are unrated; rate them")
    return rated >= len(e.scale.levels) / 2


def _save(direction: Any, out: Path) -> None:
    from aif.directions import save_direction

    save_direction(direction, out)
    about = direction.provenance
    print(f"direction: {out} ({direction.kind}, {about['method']}, layer {about['layer']})")
