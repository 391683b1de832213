"""The T-maze: a case whose policy distribution is known, learned from scratch by a small decoder.

    python benchmarks/tmaze.py configs/tmaze.yaml --out runs/tmaze     (needs pymdp: pip install '.[test]')

An animal stands at the centre of a maze. One of two arms holds a reward; a cue elsewhere tells which. A prompt says
what was seen so far (nothing, a cue for left, a cue for right), an answer is a string of two moves. Under the full
expected free energy the cue is worth a visit for what it tells; without its epistemic part it is not.

Every decoder starts as a uniform habit. Its distribution over strings is compared with that of pymdp's own agent, on
pymdp's own model of the maze, after the same observations: total variation, the largest over the three prompts.
"""

from __future__ import annotations

import argparse
import itertools
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import yaml
from jax import Array
from jax.tree_util import Partial
from pydantic import BaseModel

from aif import free_energy as fe
from aif.batches import Dataset, from_trees, once
from aif.models.decoder import DecoderConfig
from aif.models.module import random_params
from aif.objectives import Objective
from aif.objectives.efe import Online, efe
from aif.objectives.grpo import Options as GrpoOptions
from aif.objectives.grpo import grpo
from aif.objectives.logprobs import response_logprobs
from aif.objectives.terms import TERMS, Evaluation
from aif.policy import Policy
from aif.rollouts import Prompts
from aif.slots import asked_last, response_tokens
from aif.tokens import tree
from aif.train import Optimizer, Settings, Trained, prepared, stage
from aif.types import Batch

PAD, START, CUE_LEFT, CUE_RIGHT, FIRST_MOVE = range(5)  # then a token per move: centre, left, right, cue
MOVES, VOCAB = ("centre", "left", "right", "cue"), 8
CONTEXTS = {"nothing seen": START, "cue: left": CUE_LEFT, "cue: right": CUE_RIGHT}
UNHEARD = -10.0  # utility of a string that is no sequence of moves


class Maze(BaseModel, extra="forbid"):
    cue_validity: float
    reward_probability: float


class Options(BaseModel, extra="forbid"):
    benchmark: str = "tmaze"
    maze: Maze
    preferences: tuple[float, float, float]
    precision: float
    horizon: int
    model: dict[str, int]
    offline: dict[str, float]
    online: dict[str, float]
    seed: int


@dataclass(frozen=True)
class World:
    """The generative model: A and B as in pymdp (location and reward condition; location and outcome), preferences."""

    options: Options

    @cached_property
    def A(self) -> list[np.ndarray]:
        """Location seen, with the cue in it `[5, 4, 2]`; nothing, reward or punishment `[3, 4, 2]`."""
        valid, paid = self.options.maze.cue_validity, self.options.maze.reward_probability
        place, outcome = np.zeros((5, 4, 2)), np.zeros((3, 4, 2))
        for side in (0, 1):
            for location in (0, 1, 2):
                place[location, location, side] = 1.0
            place[3 + side, 3, side], place[4 - side, 3, side] = valid, 1 - valid
            outcome[0, (0, 3), side] = 1.0
            right, wrong = 1 + side, 2 - side
            outcome[1:, right, side] = paid, 1 - paid
            outcome[1:, wrong, side] = 1 - paid, paid
        return [place, outcome]

    @cached_property
    def B(self) -> list[np.ndarray]:
        """Any location is one move away; the reward stays where it is."""
        moves = np.zeros((4, 4, 4))
        for action in range(4):
            moves[action, :, action] = 1.0
        return [moves, np.eye(2)[..., None]]

    @cached_property
    def C(self) -> list[np.ndarray]:
        return [np.zeros(5), np.array(self.options.preferences)]

    @cached_property
    def policies(self) -> np.ndarray:
        """All strings of moves `[P, horizon]`."""
        return np.array(list(itertools.product(range(4), repeat=self.options.horizon)))

    def beliefs(self, context: int) -> list[np.ndarray]:
        """Beliefs after what was seen: at the start, or at the cue with Bayes' rule applied."""
        if context == START:
            return [np.eye(4)[0], np.array([0.5, 0.5])]
        seen = self.A[0][3 + (context == CUE_RIGHT), 3]
        return [np.eye(4)[3], seen / seen.sum()]

    @cached_property
    def table(self) -> dict[str, Array]:
        """U, I_s and I_p of every string after every context, `[contexts, P]`, from `aif.free_energy`."""
        A, B, C = (jax.tree.map(jnp.asarray, x) for x in (self.A, self.B, self.C))
        deps = [[0, 1], [0, 1]]

        def score(qs: list[Array], policy: Array) -> dict[str, Array]:
            moves = [[move, 0] for move in policy]
            return fe.expected_free_energy(A, C, qs, deps, B=B, policy=moves)[1]

        rows = []
        for context in CONTEXTS.values():
            qs = [jnp.asarray(q) for q in self.beliefs(context)]
            fe.check_model(self.A, self.C, qs, deps, where="maze")
            rows.append(jax.vmap(lambda p, qs=qs: score(qs, p))(jnp.asarray(self.policies)))
        return {name: jnp.stack([row[name] for row in rows]).astype(jnp.float32) for name in TERMS}

    @property
    def evaluation(self) -> Evaluation:
        """How `efe` and `grpo` see an answer."""
        return Evaluation(Partial(_evaluate, table=self.table))

    def posterior(self, state_weight: float) -> np.ndarray:
        """Q* over strings after each context `[contexts, P]`, with a uniform habit."""
        G = -(self.table["pragmatic"] + state_weight * self.table["state_gain"])
        habit = jnp.full(G.shape[1], -jnp.log(G.shape[1]))
        return np.stack([fe.policy_posterior(g, habit, self.options.precision) for g in G])


def _evaluate(taps: Any, batch: Batch, *, table: dict[str, Array]) -> dict[str, Array]:
    context = jnp.clip(asked_last(batch) - START, 0, len(CONTEXTS) - 1)
    horizon = int(np.log(table["pragmatic"].shape[1]) / np.log(4) + 0.5)
    moves = response_tokens(batch, horizon) - FIRST_MOVE
    number = jnp.zeros(moves.shape[:2], jnp.int32)
    for step in range(horizon):
        number = 4 * number + jnp.clip(moves[..., step], 0, 3)
    heard = ((moves >= 0) & (moves < 4)).all(axis=-1)
    blank = {"pragmatic": UNHEARD, "state_gain": 0.0, "parameter_gain": 0.0}
    return {name: jnp.where(heard, values[context, number], blank[name]) for name, values in table.items()}


def fresh(options: Options) -> Policy:
    """A decoder whose head is zero: a uniform habit over all strings."""
    m = options.model
    config = DecoderConfig(
        "llama", VOCAB, m["width"], m["layers"], m["heads"], m["heads"], m["width"] // m["heads"], m["ff"], tied=False
    )
    params = random_params(config, options.seed)
    return Policy({**params, "head": jnp.zeros_like(params["head"])}, config=config)


def every_string(world: World) -> Dataset:
    """One row per context with all strings as its candidates."""
    strings = [[FIRST_MOVE + int(m) for m in policy] for policy in world.policies]
    trees = [tree(list(ids), strings) for ids in prompts().ids]
    owners = [(c, k) for c in range(len(CONTEXTS)) for k in range(len(strings))]
    return from_trees(trees, {}, owners, length=max(len(t.tokens) for t in trees))


def prompts() -> Prompts:
    """The start, followed by what was seen."""
    return Prompts(tuple((START,) if c == START else (START, c) for c in CONTEXTS.values()), stop=PAD)


def train(world: World, objective: Objective) -> tuple[Policy, Trained]:
    """A fresh decoder, all of it trained: over all strings, or over samples of its own."""
    options, base = world.options, fresh(world.options)
    how = options.offline if objective.rollouts is None else options.online
    optimizer = Optimizer(learning_rate=how["learning_rate"], schedule="cosine", final=0.01)
    settings = Settings(int(how["steps"]), optimizer, rows=len(CONTEXTS), seed=options.seed, full=True)
    data: Dataset | Prompts = prompts()
    if objective.rollouts is None:
        data = prepared(objective, base, every_string(world), rows=len(CONTEXTS), key=jax.random.key(0))
    trained = stage(base, base.params, objective, data, settings, reference=base)
    return base.replace(params=trained.trainable), trained


def distribution(policy: Policy, world: World) -> np.ndarray:
    """Probability of every string after every context `[contexts, P]`; what is missing to one went to no string."""
    found = np.zeros((len(CONTEXTS), len(world.policies)))
    score = jax.jit(response_logprobs)
    data = every_string(world)
    for batch in once(data, rows=len(CONTEXTS)):
        there = batch.ids >= 0
        for number, logp in zip(batch.ids[there], np.asarray(score(policy, batch))[there], strict=True):
            found[data.owners[number]] = np.exp(logp)
    return found


def objectives(world: World) -> dict[str, Objective]:
    """What is compared: the full expected free energy, its utility alone, and reward maximisation."""
    o, see = world.options, world.evaluation
    sampled = Online(samples=int(o.online["samples"]), new_tokens=o.horizon, updates=int(o.online["updates"]), kl="k1")
    reward = GrpoOptions(**sampled.model_dump(exclude={"kl"}), kl="k3", beta=1 / o.precision, normalise=False)
    return {
        "efe": efe(see, precision=o.precision),
        "efe, utility only": efe(see, precision=o.precision, state_weight=0.0),
        "efe, online": efe(see, precision=o.precision, online=sampled),
        "efe, utility only, online": efe(see, precision=o.precision, state_weight=0.0, online=sampled),
        "grpo": grpo(see, options=reward),
    }


def by_pymdp(world: World, state_weight: float) -> np.ndarray:
    """The policy distribution of pymdp's agent on pymdp's own maze, after each context `[contexts, P]`."""
    from pymdp.agent import Agent
    from pymdp.envs.tmaze import SimplifiedTMaze

    o = world.options
    env = SimplifiedTMaze(
        reward_probability=o.maze.reward_probability, cue_validity=o.maze.cue_validity, dependent_outcomes=True
    )
    agent = Agent(
        A=[jnp.asarray(a)[None] for a in env.A],
        B=[jnp.asarray(b)[None] for b in env.B],
        C=[jnp.asarray(c, jnp.float32)[None] for c in world.C],
        D=[jnp.asarray(d)[None] for d in env.D],
        A_dependencies=env.A_dependencies,
        B_dependencies=env.B_dependencies,
        policy_len=o.horizon,
        gamma=o.precision,
        use_states_info_gain=state_weight > 0,
    )
    order = {tuple(p): k for k, p in enumerate(np.asarray(agent.policies.policy_arr)[..., 0].tolist())}
    found = []
    for context in CONTEXTS.values():
        qs = [jnp.asarray(q, jnp.float32)[None, None] for q in world.beliefs(context)]
        q_pi = np.asarray(agent.infer_policies(qs)[0])[0]
        found.append([q_pi[order[tuple(p)]] for p in world.policies.tolist()])
    return np.array(found)


def variation(p: np.ndarray, q: np.ndarray) -> float:
    """Largest total variation over the contexts; p is normalised over the strings."""
    p = p / p.sum(axis=1, keepdims=True)
    return float(np.abs(p - q).sum(axis=1).max() / 2)


def summary(world: World, p: np.ndarray) -> dict[str, float]:
    """Chance of a visit to the cue, nothing seen; chance of the right arm first, the cue seen; mass on strings."""
    q = p / p.sum(axis=1, keepdims=True)
    visits = (world.policies == MOVES.index("cue")).any(axis=1)
    first = world.policies[:, 0]
    right = (q[1, first == 1].sum() + q[2, first == 2].sum()) / 2
    return {"visits the cue": float(q[0, visits].sum()), "right arm": float(right), "mass": float(p.sum(axis=1).min())}


def run(options: Options, names: list[str] | None = None) -> dict[str, dict[str, Any]]:
    """Train and compare; per objective the summary, the variation to pymdp's agent, and the distribution."""
    world, found = World(options), {}
    for name, objective in objectives(world).items():
        if names is not None and name not in names:
            continue
        policy, trained = train(world, objective)
        p = distribution(policy, world)
        target = by_pymdp(world, 0.0 if "utility" in name or name == "grpo" else 1.0)
        found[name] = {
            **summary(world, p),
            "variation": variation(p, target),
            "seconds": round(trained.seconds, 1),
            "probabilities": p.tolist(),
            "pymdp": target.tolist(),
        }
    return found


def plot(world: World, found: dict[str, dict[str, Any]], path: Path) -> None:
    """Bars of the trained distributions beside pymdp's, nothing seen."""
    import plotly.graph_objects as go

    strings = [" ".join(MOVES[m] for m in policy) for policy in world.policies]
    bars = [go.Bar(name=name, x=strings, y=result["probabilities"][0]) for name, result in found.items()]
    agents = {"pymdp": found["efe"]["pymdp"][0], "pymdp, utility only": found["efe, utility only"]["pymdp"][0]}
    bars += [go.Bar(name=name, x=strings, y=p, marker_pattern_shape="/") for name, p in agents.items()]
    layout = {
        "barmode": "group",
        "title": "T-maze: strings of two moves, nothing seen yet",
        "yaxis_title": "probability",
    }
    go.Figure(bars, layout).write_html(path, include_plotlyjs=True)


def read(path: Path) -> Options:
    return Options.model_validate(yaml.safe_load(path.read_text()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/tmaze"))
    args = parser.parse_args()
    options = read(args.config)
    found = run(options)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "tmaze.json").write_text(json.dumps(found, indent=1))
    plot(World(options), found, args.out / "tmaze.html")
    print("| objective | visits the cue | right arm after the cue | mass on strings | TV to pymdp | s |")
    print("|---|---|---|---|---|---|")
    for name, r in found.items():
        numbers = (r["visits the cue"], r["right arm"], r["mass"], r["variation"])
        print(f"| {name} | {' | '.join(f'{x:.3f}' for x in numbers)} | {r['seconds']} |")


if __name__ == "__main__":
    main()
