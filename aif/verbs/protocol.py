"""`aif protocol ...`"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

NAME = "protocol"
app = typer.Typer(no_args_is_help=True, help="Protocols: lead a system through conversations, rate it, compare two.")

ReaderName = Annotated[str, typer.Option("--reader", help="who rates: probes or judge")]
ReaderModel = Annotated[str, typer.Option("--reader-model", help="model that the reader looks into or asks")]
Settings = Annotated[Optional[list[str]], typer.Option("--set", help="KEY=VALUE of the reader's own options")]  # noqa: UP045
ScaleName = Annotated[str, typer.Option("--scale", help="rating scale: a name or a YAML file")]


@app.command("run")
def protocol_run(
    out: Annotated[Path, typer.Option(help="transcript to write, JSONL")],
    path: Annotated[str, typer.Argument(help="YAML protocol, or bundled:NAME")] = "bundled:everyday",
    model: Annotated[str, typer.Option(help="local model to lead through it")] = "smollm2-135m",
    adapter: Annotated[Optional[Path], typer.Option(help="trained.safetensors of a stage")] = None,  # noqa: UP045
    endpoint: Annotated[
        str, typer.Option(help="OpenAI-compatible address instead, such as http://localhost:8000/v1")
    ] = "",
    served: Annotated[str, typer.Option(help="name of the model there")] = "",
    key_variable: Annotated[str, typer.Option(help="environment variable that holds the key")] = "OPENAI_API_KEY",
    name: Annotated[str, typer.Option(help="what to call the system; its model when left out")] = "",
    tokens: Annotated[int, typer.Option(min=1, help="tokens of an answer at most")] = 160,
    temperature: Annotated[float, typer.Option(min=0.0)] = 0.0,
    seed: int = 0,
) -> None:
    """Lead a model or an endpoint through every scenario and keep what it said, a row per turn."""
    from aif.corpus import located
    from aif.corpus.protocol import load_protocol
    from aif.corpus.writing import own, write
    from aif.errors import BadInput
    from aif.protocols import run
    from aif.protocols.systems import local, remote

    protocol = load_protocol(located(path, "protocol"))
    if bool(endpoint) != bool(served):
        raise BadInput("protocol.endpoint: endpoint and served go together; give the address and the model's name")
    how: dict[str, Any] = {"tokens": tokens, "temperature": temperature}
    if endpoint:
        system = remote(endpoint.rstrip("/"), served, key_variable=key_variable, **how)
    else:
        from aif.api import load_adapter
        from aif.models.hub import load
        from aif.runtime import compilation_cache

        compilation_cache()
        lm = load(model)
        system = local(lm, load_adapter(adapter, lm) if adapter else None, seed=seed, **how)
    named = name or served or (f"{model}+{adapter.parent.name}" if adapter else model)
    rows = run(protocol, system, named, lambda text: print(text, file=sys.stderr))
    write(out, [own(row) for row in rows])
    print(f"transcript: {out}")


@app.command("rate")
def protocol_rate(
    path: Annotated[str, typer.Argument(help="transcript")],
    out: Annotated[Path, typer.Option(help="rated transcript to write, JSONL")],
    reader: ReaderName = "probes",
    model: ReaderModel = "smollm2-135m",
    corpus: Annotated[str, typer.Option(help="rated corpus that probes are fitted on")] = "bundled:discernment",
    limit: Annotated[
        int | None, typer.Option(min=2, help="its training prompts that are used; all when left out")
    ] = None,  # noqa: UP045
    settings: Settings = None,
    scale: ScaleName = "nexus",
) -> None:
    """Rate every answer of a transcript, and print its profile turn by turn."""
    from aif.corpus.writing import own, write
    from aif.protocols.profiles import profiles
    from aif.protocols.rating import beliefs, rated, reader_of
    from aif.runtime import compilation_cache

    compilation_cache()
    rows, loaded = opened(path, scale)
    options = options_of(settings)
    made, experiment = reader_of(reader, options, model=model, corpus=corpus, scale=scale, limit=limit)
    found = rated(rows, loaded, *beliefs(made, rows, experiment.lm if made.watch else None))
    write(out, [own(row) for row in found])
    means = {turn: p.mean for turn, p in profiles(found, loaded).items()}
    print(json.dumps(means, indent=1))
    print(f"rated transcript: {out}", file=sys.stderr)


@app.command("compare")
def protocol_compare(
    first: Annotated[str, typer.Argument(help="rated transcript")],
    second: Annotated[str, typer.Argument(help="rated transcript of another system")],
    out: Annotated[Optional[Path], typer.Option(help="HTML page to write, with radar plots and the answers")] = None,  # noqa: UP045
    scale: ScaleName = "nexus",
) -> None:
    """Two rated transcripts side by side: profiles and their distance, turn by turn."""
    from aif.protocols.profiles import compared

    (ours, loaded), (theirs, _) = opened(first, scale), opened(second, scale)
    found = compared(ours, theirs, loaded)
    if out is not None:
        from aif.report.protocol import render_protocol

        render_protocol(found, out)
        print(f"page: {out}", file=sys.stderr)
    print(json.dumps({"systems": found["systems"], "turns": found["turns"]}, indent=1))


def opened(path: str, scale: str) -> tuple[Any, Any]:
    """(rows, scale) of a transcript."""
    from aif.corpus import load_scale, located, read

    loaded = load_scale(scale)
    return read(located(path), scale=loaded).rows, loaded


def options_of(settings: list[str] | None) -> dict[str, Any]:
    """`KEY=VALUE` pairs, with values read as YAML."""
    import yaml

    from aif.errors import BadInput

    out = {}
    for pair in settings or []:
        key, mark, value = pair.partition("=")
        if not mark:
            raise BadInput(f"--set: {pair!r} names no value; write KEY=VALUE")
        try:
            out[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise BadInput(f"--set: {key}: {value!r:.60} is no YAML value; quote it") from error
    return out
