"""The same SFT, DPO and GRPO work in aif, TRL and Tunix: seconds a step and their ratios, in one run.

    python benchmarks/beside.py [--only sft,dpo,grpo] [--tools aif,trl,tunix] [--repeats 2] [--steps 3] [--json FILE]

SmolLM2-135M-Instruct, float32, a LoRA of rank 16 on every linear layer, AdamW. Every step takes the same rows of the
bundled corpus, whole: four answers for SFT, two pairs for DPO, and for GRPO one prompt with four samples of `--tokens`
tokens each, none of which may end early, whose reward is the number of distinct words. A step of GRPO is sampling, the
reference's log-probabilities and one update. The table has the tokens that a tool counted and its first loss, to show
whether the work was the same.

What is not the same: aif reads a prompt once for its pair or its samples, the others once for each answer; aif and TRL
ask DPO's reference beforehand, Tunix at every step, from a second copy of the weights; each draws its own A; Tunix
clips no gradients; TRL's SFT logs entropies and accuracies too.

Each measurement is a process of its own and they take turns; a tool's time is the median over its processes of their
medians after the steps that compile. TRL and Tunix live in environments of their own, made where they are not.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path

from step_time import HERE, MODEL, Stepper, alternate, model, peak_mb, spawn, timed

ROOT = HERE.parent
WORK = {"sft": ("target", 4, 896), "dpo": ("pair", 2, 768), "grpo": ("none", 1, 0)}  # answers, prompts, tokens to pack
TOOLS = {"trl": ("requirements.txt", "trl_train.py"), "tunix": ("requirements-tunix.txt", "tunix_train.py")}
SAMPLES = 4


def corpus_rows(count: int) -> list:
    """The first training prompts of the bundled corpus."""
    from aif.corpus import bundled, read

    rows = [r for r in read(bundled("discernment")).rows if r.split == "train" and r.kind != "scaffolding"]
    return rows[:count]


def write_rows(path: Path, count: int) -> None:
    """The prompts in the chat template with the target and another answer, as text that any tool reads."""
    from aif.batches import choose
    from aif.models.hub import load
    from aif.tokens import render

    tokenizer = load(MODEL).tokenizer
    with path.open("w") as file:
        for number, row in enumerate(corpus_rows(count)):
            best, other = (row.candidates[k].content for k in choose(row, "pair", "discernment", number))
            prompt, end = render(tokenizer, row.prompt, answer_next=True), tokenizer.eos_token
            file.write(json.dumps({"prompt": prompt, "chosen": best + end, "rejected": other + end}) + "\n")


def source(work: str, policy, tokenizer, new_tokens: int):
    """(an objective, a function of the policy and the step that makes its batch)."""
    import jax
    import numpy as np

    from aif.batches import build, once
    from aif.objectives.dpo import preference
    from aif.objectives.grpo import Options, grpo
    from aif.objectives.sft import sft
    from aif.rewards import Reward
    from aif.rollouts import prompts_of
    from aif.sources import Online, stacked
    from aif.train import prepared

    which, count, length = WORK[work]
    rows = corpus_rows(count)
    if work == "grpo":
        words = lambda answers: {"words": np.array([len({*a.content.split()}) for a in answers], "f4")}  # noqa: E731
        reward = Reward(jax.tree_util.Partial(lambda taps, batch: batch.extras["words"]), annotate=words)
        objective = grpo(reward, Options(samples=SAMPLES, new_tokens=new_tokens))
        prompts = replace(prompts_of(rows, tokenizer), stop=policy.config.vocab)  # no token ends a sample
        return objective, Online(prompts, objective, policy, rows=1, accumulate=1, seed=0, position=None)
    objective = {"sft": sft, "dpo": preference}[work]()
    data = build(rows, tokenizer, which=which, length=length, target="discernment")
    (batch,) = once(prepared(objective, policy, data, rows=1, key=jax.random.key(0)), rows=1)
    return objective, lambda policy, number: stacked([batch])


def ours(work: str, steps: int, new_tokens: int) -> dict:
    """Seconds of every step but the first, the losses, and the tokens of a step."""
    import jax

    from aif.sources import tokens_of

    policy, tokenizer = model()
    objective, batches = source(work, policy, tokenizer, new_tokens)
    step, losses, tokens = Stepper(policy, objective), [], []

    def once(number: int) -> None:
        stack = batches(policy.replace(adapter=step.state.trainable), number)
        tokens.append(tokens_of(stack))
        losses.append(step(jax.tree.map(lambda x: x[0], stack)))

    seconds = [timed(partial(once, number)) for number in range(steps + 1)]
    found = {"seconds": seconds[1:], "losses": losses, "tokens": tokens[0], "peak_mb": peak_mb()}
    return {**found, "versions": {"jax": jax.__version__}}


def environment(folder: Path, requirements: Path) -> Path:
    """The interpreter of a virtual environment with these requirements, which is made where it is not."""
    python = folder / "bin" / "python"
    if not (folder / ".done").exists():
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", "-r", str(requirements)], check=True)
        (folder / ".done").touch()
    return python.absolute()


def measure(work: str, commands: dict[str, list[str]], args: argparse.Namespace) -> list[dict]:
    """A record for each tool, by turns in processes of their own."""
    with tempfile.TemporaryDirectory() as temporary:
        data = Path(temporary, "rows.jsonl")
        write_rows(data, WORK[work][1])
        same = ["--steps", str(args.steps), "--tokens", str(args.tokens)]
        place = ["--objective", work, "--model", str(args.folder.absolute()), "--data", str(data), *same]
        mine = [sys.executable, __file__, "--one", work, *same]
        turns = {tool: partial(spawn, mine if tool == "aif" else [*head, *place]) for tool, head in commands.items()}
        found = dict(zip(turns, alternate(args.repeats, *turns.values()), strict=True))
    records = []
    for tool, results in found.items():
        step = statistics.median(statistics.median(r["seconds"]) for r in results)
        spread = [s for r in results for s in r["seconds"]]
        first, memory = results[0], statistics.median(r["peak_mb"] for r in results)
        about = {"tokens": first["tokens"], "losses": first["losses"], "versions": first["versions"]}
        records.append({"work": work, "tool": tool, "step": step, "seconds": spread, "peak_mb": memory, **about})
    for record in records:
        record["against_aif"] = record["step"] / records[0]["step"]
        record["memory_against_aif"] = record["peak_mb"] / records[0]["peak_mb"]
    return records


def row(record: dict) -> str:
    r = record
    times = f"{r['step']:.2f} ({min(r['seconds']):.2f} to {max(r['seconds']):.2f}) | {r['against_aif']:.2f}"
    memory = f"{r['peak_mb']:.0f} | {r['memory_against_aif']:.2f}"
    return f"| {r['work']} | {r['tool']} | {times} | {memory} | {r['tokens']} | {r['losses'][0]:.4f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl", type=Path, default=ROOT / ".venv-torch", help="folder of TRL's environment")
    parser.add_argument("--tunix", type=Path, default=ROOT / ".venv-tunix", help="folder of Tunix's environment")
    parser.add_argument("--folder", type=Path, default=ROOT / ".bench" / MODEL, help="where the others' weights go")
    parser.add_argument("--only", default=",".join(WORK))
    parser.add_argument("--tools", default=",".join(TOOLS), help="which to time beside aif")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a process")
    parser.add_argument("--tokens", type=int, default=64, help="of a sample")
    parser.add_argument("--json", type=Path, help="where the records are written")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(ours(args.one, args.steps, args.tokens)))
        return
    commands = {"aif": []}
    for tool in args.tools.split(","):
        requirements, script = (str(HERE / "peers" / name) for name in TOOLS[tool])
        commands[tool] = [str(environment(getattr(args, tool), Path(requirements))), script]
    if not args.folder.exists():
        from aif.models.hub import fetch

        python = environment(args.trl, HERE / "peers" / TOOLS["trl"][0])
        make = str(HERE / "peers" / "make_hf_folder.py")
        spawn([str(python), make, "--gguf", str(fetch(MODEL)), "--out", str(args.folder)])
    head = "| work | tool | s a step (range) | against aif | peak memory, MB | against aif | tokens | first loss |"
    print(f"{head}\n|---|---|---|---|---|---|---|---|", flush=True)
    records = []
    for work in args.only.split(","):
        records += measure(work, commands, args)
        print("\n".join(row(r) for r in records if r["work"] == work), flush=True)
        if args.json:
            args.json.write_text(json.dumps(records, indent=1))


if __name__ == "__main__":
    main()
