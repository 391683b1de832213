"""`aif generate` and `aif chat`: answers of a model, plain or steered."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from aif.errors import BadInput

Model = Annotated[str, typer.Option(help="model to answer")]
AdapterFile = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--adapter", help="trained.safetensors, or the folder of a run, stage or PEFT adapter"),
]
Steer = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Option(help="FILE:DOSE[@LAYER], dose in residual norms; repeat it, or separate several by commas"),
]
Clamp = Annotated[Optional[list[str]], typer.Option(help="FILE:VALUE[@LAYER]: the coordinate set to a value")]  # noqa: UP045
Ablate = Annotated[Optional[list[str]], typer.Option(help="FILE[@LAYER]: projected out, at every layer or one")]  # noqa: UP045
Where = Annotated[str, typer.Option("--scope", help="steered tokens: all, prompt, response, last, or as in 0,5:8")]
Tokens = Annotated[int, typer.Option(min=1, help="tokens to generate at most")]
Temperature = Annotated[float, typer.Option(help="0 takes the likeliest token")]
TopK = Annotated[int, typer.Option(help="draw from the k likeliest tokens; 0 for all")]
TopP = Annotated[float, typer.Option(help="draw from the likeliest tokens that hold so much probability")]
MinP = Annotated[float, typer.Option(help="draw from tokens at least so likely, relative to the likeliest")]


def generate(
    prompt: Annotated[str, typer.Argument(help="what the user says")],
    model: Model = "smollm2-135m",
    adapter: AdapterFile = None,
    steer: Steer = None,
    clamp: Clamp = None,
    ablate: Ablate = None,
    scope: Where = "all",
    tokens: Tokens = 64,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    seed: int = 0,
) -> None:
    """Answer a prompt, plain, with a trained adapter, or steered along directions."""
    from aif.api import generate as answer

    how = _checked(tokens, temperature, top_k, top_p, min_p)
    lm, values = loaded(model, adapter, steer, clamp, ablate, scope)
    print(answer(lm, prompt, **values, **how, seed=seed)[0])


def chat(
    model: Model = "smollm2-135m",
    adapter: AdapterFile = None,
    steer: Steer = None,
    clamp: Clamp = None,
    ablate: Ablate = None,
    scope: Where = "all",
    tokens: Tokens = 128,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    min_p: MinP = 0.0,
    seed: int = 0,
) -> None:
    """Talk with a model; with edits, plain and steered answers stand side by side, each with its own conversation.

    Every line of the input is a turn; /reset starts over, /quit or the end of the input leaves.
    """
    from aif.api import generate as answer
    from aif.corpus import Message
    from aif.steering import beside_plain

    how = _checked(tokens, temperature, top_k, top_p, min_p)
    lm, values = loaded(model, adapter, steer, clamp, ablate, scope)
    names = ["plain"]
    if values["edits"] is not None:
        values["edits"] = beside_plain(values["edits"])
        given = (("", steer), ("clamp ", clamp), ("ablate ", ablate))
        names.append(", ".join(f"{what}{_short(spec)}" for what, specs in given for spec in specs or ()))
    talks: list[list[Message]] = [[] for _ in names]
    for number, line in enumerate(_turns()):
        if line == "/reset":
            talks = [[] for _ in names]
            continue
        asked = [[*talk, Message("user", line)] for talk in talks]
        answers = answer(lm, asked, **values, **how, seed=seed + number)
        talks = [[*talk, Message("assistant", text)] for talk, text in zip(asked, answers, strict=True)]
        _show(line, names, answers, lm.tokenizer)


def _checked(tokens: int, temperature: float, top_k: int, top_p: float, min_p: float) -> dict[str, Any]:
    """Sampling options, checked before a model is loaded."""
    from aif.drawing import drawing

    drawing(temperature, top_k, top_p, min_p)
    return {"new_tokens": tokens, "temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p}


def loaded(
    model: str,
    adapter: Path | None,
    steer: list[str] | None,
    clamp: list[str] | None,
    ablate: list[str] | None,
    scope: str,
) -> tuple[Any, dict[str, Any]]:
    """The model, and what it answers with: adapter, edits and their scope."""
    from aif.api import load_adapter
    from aif.directions.use import edits_from
    from aif.models.hub import load
    from aif.steering import parse_scope, reach

    where = parse_scope(scope)
    reach(where)
    lm = load(model)
    trained = load_adapter(adapter, lm) if adapter is not None else None
    edits = edits_from(lm, steer=steer, clamp=clamp, ablate=ablate)
    if edits is None and scope != "all":
        raise BadInput(f"--scope {scope}: nothing is steered; add --steer, --clamp or --ablate")
    return lm, {"adapter": trained, "edits": edits, "scope": where}


def _short(spec: str) -> str:
    """A specification without its folder and the ending of its file."""
    return Path(spec).name.replace(".safetensors", "")


def _turns() -> Iterator[str]:
    """Lines that the user says, until /quit or the end of the input; prompted for at a terminal."""
    import sys

    from rich.console import Console

    console = Console(stderr=True)
    while True:
        if sys.stdin.isatty():
            console.print("[bold]you>[/bold] ", end="")
        line = sys.stdin.readline()
        if not line or line.strip() == "/quit":
            return
        if line.strip():
            yield line.strip()


def _show(said: str, names: list[str], answers: list[str], tokenizer: Any) -> None:
    """The answers in panels side by side, each with its signs of degeneration."""
    import sys

    from rich.console import Console
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    from aif.sampling import degeneration

    row = Table.grid(expand=True, padding=(0, 1))
    panels = []
    for name, text in zip(names, answers, strict=True):
        ids = tokenizer.encode(text, add_special_tokens=False)
        signs = degeneration(text, ids)
        about = f"{len(ids)} tokens, repetition {signs['repetition']:.2f}, zlib {signs['compression']:.2f}"
        panels.append(
            Panel(Text(text), title=Text(name), subtitle=Text(about), border_style="blue" if panels else "dim")
        )
        row.add_column(ratio=1)
    row.add_row(*panels)
    console = Console()
    if not sys.stdin.isatty():
        console.print(Text(f"you> {said}", style="bold"))
    console.print(row)
