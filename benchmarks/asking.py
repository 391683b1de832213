"""When is a clarifying question worth asking? A text dialogue in which only epistemic value says so.

    python benchmarks/asking.py --out runs/asking

Somebody speaks of a bat near a few things, and wants help with it. Caves and wings speak for the animal, gloves and
innings for the club, each hint with reliability 3/4, so the words of a prompt fix a belief over what is meant, from
nearly certain to even. Three answers make sense: ask which is meant, or help with the one or the other. Asking never
pleases by itself (its utility is a little below nothing), but its reply tells what is meant.

A small decoder that reads and writes bytes first imitates the three answers in equal shares, then samples answers of
its own under three objectives: the full expected free energy, its utility alone, and GRPO on the same utility. The rate
of asking on prompts that were never trained on is set against the prompt's ambiguity, beside the policy posterior.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.tree_util import Partial

import aif
from aif import free_energy as fe
from aif.batches import Dataset, build
from aif.corpus import Candidate, Conversation, Message
from aif.models.module import random_params
from aif.objectives import Objective
from aif.objectives.efe import Online, efe
from aif.objectives.grpo import Options as GrpoOptions
from aif.objectives.grpo import grpo
from aif.objectives.logprobs import scores
from aif.objectives.sft import sft
from aif.objectives.terms import TERMS, Evaluation
from aif.policy import Policy
from aif.readers import Answer
from aif.rollouts import prompts_of
from aif.sources import annotated
from aif.train import Optimizer, Settings, prepared, stage
from aif.types import Batch

ANIMAL, CLUB = ("cave", "wing", "dusk", "barn"), ("glove", "inning", "pitch", "team")
ANSWERS = ("Which one?", "The animal.", "The club.")  # ask, help with the one, help with the other
RELIABLE, TOLD, HEARD = 0.75, 0.95, 0.7  # of a hint, of the reply to a question, of the reaction to help
PREFERENCES = np.array([1.0, -1.0, -0.1])  # pleased, puzzled, neither
PRECISION, HINTS, BABBLE = 8.0, 4, -3.0
FIRST = 0.5  # precision of the first samples: a policy that is sharp before it can tell prompts apart stops trying


def belief(hints: Sequence[str]) -> np.ndarray:
    """P(animal), P(club) by Bayes' rule from an even prior."""
    balance = sum(1 if h in ANIMAL else -1 for h in hints)
    odds = (RELIABLE / (1 - RELIABLE)) ** balance
    return np.array([odds, 1.0]) / (1 + odds)


def model_of(choice: int) -> list[np.ndarray]:
    """A of both modalities after an answer: reaction (pleased, puzzled, neither) and reply (animal, club, nothing)."""
    if choice == 0:
        return [np.tile([[0.0], [0.0], [1.0]], (1, 2)), np.array([[TOLD, 1 - TOLD], [1 - TOLD, TOLD], [0.0, 0.0]])]
    right = np.array([HEARD, 1 - HEARD]) if choice == 1 else np.array([1 - HEARD, HEARD])
    return [np.stack([right, 1 - right, np.zeros(2)]), np.tile([[0.0], [0.0], [1.0]], (1, 2))]


A = [jnp.asarray(np.stack([model_of(c)[m] for c in range(3)]), jnp.float32) for m in range(2)]  # [answers, O, S]
C = [jnp.asarray(PREFERENCES, jnp.float32), jnp.zeros(3)]


def terms(choice: Array, qs: Array) -> dict[str, Array]:
    """U and I_s of an answer under a belief; babble is worth less than anything."""
    found = fe.expected_free_energy_terms([a[jnp.minimum(choice, 2)] for a in A], C, [qs], [[0], [0]])
    blank = {"pragmatic": BABBLE, "state_gain": 0.0, "parameter_gain": 0.0}
    return {name: jnp.where(choice < 3, found[name], blank[name]) for name in TERMS}


def evaluate(taps: Any, batch: Batch) -> dict[str, Array]:
    return jax.vmap(jax.vmap(terms))(jnp.asarray(batch.extras["choice"]), jnp.asarray(batch.extras["belief"]))


def annotate(answers: Sequence[Answer]) -> dict[str, np.ndarray]:
    """Which answer was given, and the belief that the prompt's words call for."""
    choice = [ANSWERS.index(a.content) if a.content in ANSWERS else 3 for a in answers]
    return {"choice": np.array(choice, np.int32), "belief": np.stack([belief(words(a)) for a in answers]).astype("f4")}


def words(answer: Answer) -> list[str]:
    return [w for w in answer.prompt[-1].content.replace(",", " ").split() if w in ANIMAL + CLUB]


def conversations() -> list[Conversation]:
    """Every sequence of hints, with the three answers."""
    rows = []
    for number, hints in enumerate(itertools.product(ANIMAL + CLUB, repeat=HINTS)):
        said = Message("user", f"bat: {', '.join(hints)}")
        candidates = tuple(Candidate(a, str(k)) for k, a in enumerate(ANSWERS))
        rows.append(Conversation(str(number), (said,), candidates, "", "en", "", "preference", f"prompt {number}"))
    return rows


def objectives() -> dict[str, Objective]:
    see = Evaluation(Partial(evaluate), annotate=annotate)
    sampled = {"samples": 8, "new_tokens": 13}
    reward = GrpoOptions(**sampled, beta=1 / PRECISION, normalise=True)
    online = Online(**sampled, kl="k3")
    return {
        "efe": efe(see, precision=FIRST, precision_end=PRECISION, online=online),
        "efe, utility only": efe(see, precision=FIRST, precision_end=PRECISION, state_weight=0.0, online=online),
        "grpo": grpo(see, options=reward),
        "efe, offline": efe(see, precision=PRECISION),
    }


def candidates(objective: Objective, habit: Policy, rows: list[Conversation], tokenizer: Any) -> Dataset:
    """The three answers to every prompt, evaluated once."""
    data = build(rows, tokenizer, which="all", length=256, target="0")
    return prepared(objective, habit, annotated(data, rows, objective), rows=16, key=jax.random.key(0))


def asking(policy: Policy, rows: list[Conversation], tokenizer: Any) -> dict[str, np.ndarray]:
    """Per prompt: its ambiguity, the share of `ask` among the three answers, and the mass on them."""
    data = build(rows, tokenizer, which="all", length=256, target="0")
    found = np.zeros((len(rows), 3))
    found[tuple(np.array(data.owners).T)] = np.exp(scores(policy, data, rows=16))
    return {"doubt": doubts(rows), "ask": found[:, 0] / found.sum(axis=1), "mass": found.sum(axis=1)}


def doubts(rows: list[Conversation]) -> np.ndarray:
    """Entropy of the belief that each prompt calls for, nats."""
    beliefs = np.stack([belief(words(Answer(r.prompt, ""))) for r in rows])
    return -(beliefs * np.log(beliefs)).sum(axis=1)


def posterior(rows: list[Conversation], state_weight: float) -> np.ndarray:
    """Share of `ask` in Q* with an even habit over the three answers."""
    out = []
    for row in rows:
        qs = jnp.asarray(belief(words(Answer(row.prompt, ""))), jnp.float32)
        each = [terms(jnp.int32(k), qs) for k in range(3)]
        G = jnp.stack([-(t["pragmatic"] + state_weight * t["state_gain"]) for t in each])
        out.append(float(fe.policy_posterior(G, jnp.zeros(3), PRECISION)[0]))
    return np.array(out)


def run(steps: int, imitation: int, only: Sequence[str] = (), seed: int = 0) -> dict[str, Any]:
    """Rates of asking by ambiguity for every objective, and the posteriors they should reach."""
    lm = aif.load("tiny-random")
    base = Policy(random_params(lm.config, seed), config=lm.config)
    rows = conversations()
    order = np.random.default_rng(seed).permutation(len(rows))
    train, test = [rows[k] for k in order[:1500]], [rows[k] for k in order[-300:]]
    optimizer = Optimizer(learning_rate=3e-3, warmup=20, schedule="cosine", final=0.05)
    settings = Settings(imitation, optimizer, rows=8, seed=seed, full=True)
    copied = prepared(
        sft(), base, build(train, lm.tokenizer, which="all", length=256, target="0"), rows=8, key=jax.random.key(0)
    )
    habit = base.replace(params=stage(base, base.params, sft(), copied, settings).trainable)
    found: dict[str, Any] = {"habit": asking(habit, test, lm.tokenizer)}
    settings = Settings(steps, Optimizer(1e-3, warmup=10, final=0.1), rows=16, seed=seed, full=True)
    for name, objective in objectives().items():
        if only and name not in only:
            continue
        data = (
            prompts_of(train, lm.tokenizer) if objective.rollouts else candidates(objective, habit, train, lm.tokenizer)
        )
        done = stage(habit, habit.params, objective, data, settings, reference=habit)
        found[name] = asking(habit.replace(params=done.trainable), test, lm.tokenizer)
    doubt = found["habit"]["doubt"]
    found["posterior"] = {"doubt": doubt, "ask": posterior(test, 1.0), "mass": np.ones(len(doubt))}
    found["posterior, utility only"] = {"doubt": doubt, "ask": posterior(test, 0.0), "mass": np.ones(len(doubt))}
    return found


def by_doubt(result: dict[str, np.ndarray], levels: Sequence[float]) -> list[float]:
    """Mean rate of asking at each level of doubt."""
    return [float(result["ask"][np.isclose(result["doubt"], d, atol=2e-3)].mean()) for d in levels]


def plot(found: dict[str, dict[str, np.ndarray]], levels: Sequence[float], path: Path) -> None:
    """Rate of asking against doubt, a line per objective; the posteriors are dashed."""
    import plotly.graph_objects as go

    lines = [
        go.Scatter(name=name, x=levels, y=by_doubt(r, levels), line_dash="dash" if "posterior" in name else "solid")
        for name, r in found.items()
    ]
    titles = {"xaxis_title": "doubt about what is meant, nats", "yaxis_title": "rate of asking"}
    go.Figure(lines, {"title": "A question is worth asking when its answer would tell", **titles}).write_html(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/asking"))
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--imitation", type=int, default=300)
    parser.add_argument("--only", nargs="*", default=[], help="names of objectives")
    args = parser.parse_args()
    found = run(args.steps, args.imitation, args.only)
    args.out.mkdir(parents=True, exist_ok=True)
    plain = {name: {k: v.tolist() for k, v in r.items()} for name, r in found.items()}
    (args.out / "asking.json").write_text(json.dumps(plain))
    levels = sorted({round(float(d), 3) for d in found["habit"]["doubt"]})
    print(f"| rate of asking at a doubt of (nats) | {' | '.join(f'{d:.3f}' for d in levels)} | mass on answers |")
    print("|---|" + "---|" * (len(levels) + 1))
    for name, r in found.items():
        print(f"| {name} | {' | '.join(f'{x:.2f}' for x in by_doubt(r, levels))} | {r['mass'].mean():.3f} |")
    plot(found, levels, args.out / "asking.html")


if __name__ == "__main__":
    main()
