"""Memory that `aif plan` predicts against that of the same step when it runs here.

    python benchmarks/plan.py [configs/quickstart.yaml] [key=value...]

Two processes, one after the other: one compiles the first arm's step without weights; the other loads the model,
compiles the step and takes one. Measured are the arrays that live before it, and by how much the peak of resident
memory during it exceeds that before it: what the interpreter and the compiler hold is no device's memory.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

DEFAULT = Path(__file__).resolve().parent.parent / "configs" / "quickstart.yaml"


def memory(name: str) -> int:
    """A line of this process's status, bytes: VmRSS now, VmHWM the most since it was last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(name))


def planned(file: str, overrides: list[str]) -> dict:
    from aif.config import load
    from aif.plan import plan

    found = plan(load(file, overrides))
    return {"peak": found.peak, "weights": found.weights, "temporary": found.temporary}


def measured(file: str, overrides: list[str]) -> dict:
    import jax

    from aif.config import load
    from aif.experiment import Experiment
    from aif.plan import example
    from aif.train import start_state, train_step

    e = Experiment(load(file, overrides))
    spec = next(iter(e.config.arms.values()))
    trainable = e.fresh(0)
    batches, loss = example(e, spec, e.reference(trainable))
    state, values = start_state(trainable, jax.random.key(0)), e.settings(spec, 0).optimizer.values(0, spec.steps)
    full = e.config.adapter.kind == "full"
    given = (e.steered(spec), batches, loss, values)
    step = train_step.lower(state, *given, full=full).compile()
    del trainable
    live, before = sum(x.nbytes for x in jax.live_arrays()), memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    state, log = step(state, *given)
    loss_of = float(log["loss"].value)
    return {"peak": live + memory("VmHWM") - before, "loss": loss_of}


def main() -> None:
    arguments = sys.argv[1:]
    if arguments[:1] in (["planned"], ["measured"]):
        print(json.dumps(globals()[arguments[0]](arguments[1], arguments[2:])))
        return
    file = arguments.pop(0) if arguments and "=" not in arguments[0] else str(DEFAULT)
    found = {}
    for kind in ("planned", "measured"):
        done = subprocess.run(
            [sys.executable, __file__, kind, file, *arguments], stdout=subprocess.PIPE, text=True, check=True
        )
        found[kind] = json.loads(done.stdout.splitlines()[-1])
        print(kind, found[kind])
    ratio = found["planned"]["peak"] / found["measured"]["peak"]
    print(f"planned / measured: {ratio:.3f}, {'within' if abs(ratio - 1) <= 0.15 else 'NOT within'} 15 %")


if __name__ == "__main__":
    main()
