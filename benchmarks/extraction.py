"""How fast a direction is extracted, beside repeng: the same pairs, the same weights, in turns.

    python benchmarks/extraction.py --repeng REPENG/bin/python --folder smollm2-135m [--repeats 3]

64 contrast pairs in two forms. *templates*, as repeng's documentation makes them: two personas before each of 64 cuts
of a few texts. *answers*: 32 prompts, each with two pairs of answers of different stance, 24 words each. Every run is a
process of its own, repeng's and ours in turns; the compilation cache is warm, as it is from the second run on. The
directions must agree: repeng's `pca_center` is the paired PCA here. Then the price of capturing every layer.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

PEER = Path(__file__).resolve().parent / "peers" / "repeng_extract.py"
PERSONAS = ("a careful listener who asks before advising", "an expert who gives orders")


def template_pairs() -> list[tuple[str, str]]:
    """Eight texts cut at eight lengths, after either persona."""
    from aif.corpus import bundled, read

    texts = [c.content for row in read(bundled("tiny")).rows for c in row.candidates if c.stance == "generic"]
    cuts = [" ".join(text.split()[:n]) for text in texts[:8] for n in range(3, 27, 3)]
    start = "<|im_start|>user\nAct as if you are {}.<|im_end|>\n<|im_start|>assistant\n"
    return [(start.format(PERSONAS[0]) + cut, start.format(PERSONAS[1]) + cut) for cut in cuts]


def answer_pairs() -> list[tuple[str, str]]:
    """Target against two other stances, for 32 prompts of the bundled corpus."""
    from aif.corpus import bundled, read

    rows = [r for r in read(bundled("discernment")).rows if len(r.candidates) == 4 and len(r.prompt) == 1][:32]
    found = []
    for row in rows:
        start = f"<|im_start|>user\n{row.prompt[0].content}<|im_end|>\n<|im_start|>assistant\n"
        first = {c.stance: start + " ".join(c.content.split()[:24]) for c in row.candidates}
        found += [(first["discernment"], first[other]) for other in ("control", "generic")]
    return found


def ours(folder: str, pairs: list, out: str) -> None:
    """One extraction in this process, timed as repeng's script times itself."""
    marks = [time.monotonic()]
    from aif.directions import paired_pca
    from aif.directions.texts import end_residuals
    from aif.models.hub import load
    from aif.policy import bind
    from aif.runtime import compilation_cache

    compilation_cache()
    marks.append(time.monotonic())
    lm = load(folder)
    marks.append(time.monotonic())
    texts = [lm.tokenizer.encode(text, add_special_tokens=False) for pair in pairs for text in pair]
    seen = end_residuals(bind(lm), texts)
    found = paired_pca(seen, np.arange(len(texts)) % 2 == 0, np.arange(len(texts)) // 2)
    vector = np.asarray(found.vector)
    marks.append(time.monotonic())
    np.savez(out, **{str(n): v for n, v in enumerate(vector)})
    print(json.dumps(dict(zip(("imports", "load", "extract"), np.diff(marks).tolist(), strict=True))))


def run(command: list, out: Path) -> dict[str, float]:
    """Seconds of a process, of its parts as it tells them, and of the processor."""
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([*map(str, command), "--out", str(out)], check=True, capture_output=True, text=True)
    whole, after = time.monotonic() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return {**json.loads(done.stdout.splitlines()[-1]), "whole": whole, "processor": processor}


def cosines(one: Path, two: Path) -> np.ndarray:
    """Cosine between the two files' directions at every layer but the last."""
    a, b = np.load(one), np.load(two)
    layers = sorted(set(a.files) & set(b.files), key=int)[:-1]  # repeng's last is read after the final norm
    return np.array([a[n] @ b[n] / np.linalg.norm(a[n]) / np.linalg.norm(b[n]) for n in layers])


def compare(name: str, pairs: list, repeng: str, folder: str, repeats: int) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        (place / "pairs.json").write_text(json.dumps(pairs))
        shared = ["--folder", folder, "--pairs", place / "pairs.json"]
        mine = [sys.executable, __file__, "--one", *shared]
        theirs = [repeng, PEER, "--model", folder, "--pairs", place / "pairs.json"]
        cold = run(mine, place / "a.npz")
        times = [(run(mine, place / "a.npz"), run(theirs, place / "b.npz")) for _ in range(repeats)]
        agree = cosines(place / "a.npz", place / "b.npz")
    print(f"\n{name}: 64 pairs, {repeats} runs each in turns; least cosine of a layer to repeng's {agree.min():.4f}\n")
    print("| seconds, median | aif | repeng | repeng / aif, median [least, most] of the turns |\n|---|---|---|---|")
    parts = {"end to end": ["whole"], "without imports": ["load", "extract"], "extraction alone": ["extract"]}
    parts |= {"processor time, end to end": ["processor"]}
    for label, keys in parts.items():
        a, b = (np.array([sum(pair[k][key] for key in keys) for pair in times]) for k in (0, 1))
        low, middle, high = np.percentile(b / a, [0, 50, 100])
        print(f"| {label} | {np.median(a):.1f} | {np.median(b):.1f} | {middle:.2f} [{low:.2f}, {high:.2f}] |")
    print(f"\nthe first run of ours, extraction with what had to be compiled: {cold['extract']:.1f} s", flush=True)


def capture(folder: str, repeats: int) -> None:
    """A forward pass with every layer's response means, against one without."""
    import jax

    import aif
    from aif.batches import build, once
    from aif.corpus import bundled, read
    from aif.directions.activations import _means
    from aif.policy import bind
    from aif.runtime import compilation_cache

    compilation_cache()
    lm = aif.load(folder)
    data = build(read(bundled("tiny")).rows, lm.tokenizer, which="all", length=512, target="discernment")
    policy, batch = bind(lm), jax.tree.map(jax.numpy.asarray, next(once(data, rows=2)))
    plain = jax.jit(lambda policy, batch: policy(batch).hidden)
    times: dict[str, list[float]] = {"plain": [], "captured": []}
    for turn in range(repeats + 1):
        for name, call in (
            ("plain", lambda: plain(policy, batch)),
            ("captured", lambda: _means(policy, batch, "mean")),
        ):
            began = time.process_time()  # of all threads: other work on the machine does not count
            jax.block_until_ready(call())
            if turn:  # the first one compiles
                times[name].append(time.process_time() - began)
    ratio = np.array(times["captured"]) / np.array(times["plain"])
    low, middle, high = np.percentile(ratio, [25, 50, 75])
    print(f"\ncapturing all layers / forward alone, processor time of {repeats} turns: median {middle:.3f}", end=" ")
    print(f"(quartiles {low:.3f}, {high:.3f})")
    print(f"fastest of each: {min(times['captured']) / min(times['plain']):.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", required=True, help="the model as a Hugging Face folder")
    parser.add_argument("--repeng", type=Path, help="interpreter with peers/requirements-repeng.txt")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--pairs", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        return ours(args.folder, json.loads(args.pairs.read_text()), args.out)
    for name, pairs in (("templates", template_pairs()), ("answers", answer_pairs())):
        compare(name, pairs, os.path.abspath(args.repeng), args.folder, args.repeats)
    capture(args.folder, 6)


if __name__ == "__main__":
    main()
