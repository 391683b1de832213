"""`aif plan` and `aif doctor`: what a run would need elsewhere, and whether this machine is fit for one."""

from __future__ import annotations

import os
from typing import Annotated, Optional

import typer

from aif.errors import BadInput
from aif.verbs.parameters import ConfigFile, Overrides


def plan(
    file: ConfigFile,
    overrides: Overrides = None,
    mesh: Annotated[Optional[str], typer.Option(help="data=1,fsdp=8,tensor=1; the config's when left out")] = None,  # noqa: UP045
    arm: Annotated[Optional[str], typer.Option(help="whose step; the first arm's when left out")] = None,  # noqa: UP045
    peak: Annotated[float, typer.Option(help="operations a second of a device")] = 989e12,
    bandwidth: Annotated[float, typer.Option(help="bytes a second that a device sends")] = 450e9,
    memory: Annotated[float, typer.Option(help="bytes of a device")] = 80e9,
) -> None:
    """Compile an arm's train step for devices that are not here, without weights: memory, operations, collectives.

    The numbers left out are those of an H100: bfloat16 products without sparsity, NVLink one way, 80 GB.
    """
    from math import prod

    from aif.config import load

    os.environ["JAX_PLATFORMS"] = "cpu"  # before jax is imported
    given = [f"mesh.{part}" for part in (mesh or "").split(",") if part]
    checked = load(file, [*(overrides or []), *given])
    count = prod(checked.mesh.model_dump().values())
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
    from aif.plan import plan as compiled

    _shown(compiled(checked, arm), peak, bandwidth, memory)


def _shown(found, peak: float, bandwidth: float, memory: float) -> None:
    """A plan as a table."""
    from rich.console import Console
    from rich.table import Table

    table = Table("per device", "", title=f"{found.devices} devices, {found.tokens} tokens a step")
    parts = {
        "weights": found.weights,
        "trained values": found.trained,
        "optimizer": found.optimizer,
        "batch": found.batch,
        "temporaries": found.temporary,
        "  of which activations kept, about": found.activations,
        "memory": found.peak,
    }
    for name, size in parts.items():
        table.add_row(name, f"{size / 1e9:.3f} GB")
    table.add_row("operations of products", f"{found.flops / found.devices:.3e}")
    for kind, sent in found.collectives.items():
        table.add_row(kind, f"{sent.count} x, {sent.size / 1e9:.3f} GB, sends {sent.sent / 1e9:.3f} GB")
    compute, send = found.seconds(peak, bandwidth)
    table.add_row("products, at the peak", f"{compute:.3f} s")
    table.add_row("collectives, at the bandwidth", f"{send:.3f} s")
    table.add_row("step, at best", f"{max(compute, send):.3f} s overlapped, {compute + send:.3f} s in turn")
    table.add_row("fits", f"{'yes' if found.peak <= memory else 'NO'}, in {memory / 1e9:.0f} GB")
    Console(width=100, highlight=False).print(table)


def doctor() -> None:
    """Check whether this machine is fit for a run: one line a check, exit status 2 when one fails."""
    from aif.doctor import CHECKS

    failed = 0
    for name, check in CHECKS.items():
        try:
            print(f"ok    {name}: {check()}")
        except BadInput as error:
            failed += 1
            print(f"FAIL  {name}: {error}")
    if failed:
        raise BadInput(f"doctor: {failed} of {len(CHECKS)} checks failed; mend what their lines say")
