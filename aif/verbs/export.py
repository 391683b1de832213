"""`aif export ...`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

NAME = "export"
app = typer.Typer(no_args_is_help=True, help="Export: a trained model or adapter for other engines.")

Trained = Annotated[Path, typer.Argument(help="trained.safetensors, or the folder of a run or stage")]
Out = Annotated[Path, typer.Option("--out", help="new folder")]
Model = Annotated[str, typer.Option(help="model that it was trained on")]


@app.command("merged")
def merged(
    out: Out,
    trained: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Argument(help="trained.safetensors, or the folder of a run or stage; the base model when left out"),
    ] = None,
    model: Model = "smollm2-135m",
    max_shard: Annotated[str, typer.Option(help="size of a weight file at most; more is written in shards")] = "5GB",
) -> None:
    """Write a Hugging Face folder with the adapter merged into the weights, and read it again."""
    from aif.api import load_adapter
    from aif.export import export_merged
    from aif.models.hub import load

    lm = load(model)
    adapter = load_adapter(trained, lm) if trained is not None else None
    about = {"trained values": str(trained)} if trained else None
    worst = export_merged(lm, adapter, out, about=about, max_shard=max_shard)
    print(f"model: {out} (logits read again differ by at most {worst:.1e})")


@app.command("peft")
def peft(trained: Trained, out: Out, model: Model = "smollm2-135m") -> None:
    """Write a PEFT adapter folder, and read it again."""
    from aif.api import load_adapter
    from aif.export import export_peft
    from aif.models.hub import load

    lm = load(model)
    worst = export_peft(lm, load_adapter(trained, lm), out, about={"trained values": str(trained)})
    print(f"adapter: {out} (logits read again differ by at most {worst:.1e})")
