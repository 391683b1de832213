"""Training: one jitted step for every objective, and the loop around it.

The step takes the loss as a `jax.tree_util.Partial` whose hyperparameters are array leaves, and the learning rate,
decay and clipping as arrays, so changing any value compiles nothing again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh
from jax.tree_util import Partial

from aif.batches import Dataset, once
from aif.budget import Budget
from aif.checkpoint import Checkpoints, Waypoints, load_arrays, save_arrays
from aif.errors import BadInput
from aif.log import Metrics, Progress, read_metrics
from aif.meaning import DATA, agree, meaning
from aif.objectives import Objective
from aif.optimizer import Optimizer, transform
from aif.policy import Policy
from aif.processes import alone
from aif.rollouts import Prompts
from aif.runtime import Stopped, StopRequests
from aif.sharding import axes, host, place, shared, stay
from aif.sources import Offline, Online, prepare, tokens_of
from aif.types import Batch, Loss, Mean, State, as_partial

MAX_SKIPPED = 5  # consecutive non-finite steps after which a run stops


def start_state(trainable: Any, key: Array) -> State:
    """A fresh training state; the trainable values are copied, so the caller's arrays survive donation."""
    trainable = jax.tree.map(lambda x: jnp.array(x, copy=True), trainable)
    return State(jnp.int32(0), trainable, transform(Optimizer().values(0, 1)).init(trainable), key)


def attach(base: Policy, trainable: Any, full: bool) -> Policy:
    """The policy that carries the trainable values: as its adapter, or as all of its parameters."""
    return base.replace(params=trainable) if full else base.replace(adapter=trainable)


@partial(jax.jit, donate_argnums=0, static_argnames="full")
def train_step(
    state: State, base: Policy, batches: Batch, loss: Partial, values: dict[str, Array], *, full: bool
) -> tuple[State, dict[str, Mean]]:
    """One update from micro-batches `[A, B, ...]`: exactly the gradient of (sum of losses) / (sum of weights), or of
    the sum of several such means.

    A non-finite loss or gradient leaves trainable values and moments as they were and is counted in `skipped`.
    """

    def run(trainable: Any, batch: Batch) -> Loss:
        return loss(attach(base, trainable, full), batch)

    def total(trainable: Any, batch: Batch) -> tuple[Array, Loss]:
        result = run(trainable, batch)
        return sum(m.sum / w for m, w in zip(result.means, shares, strict=True)), result  # pyright: ignore

    def graded(batch: Batch) -> tuple[Any, Loss]:
        (_, result), gradient = jax.value_and_grad(total, has_aux=True)(state.trainable, batch)
        return stay(gradient, base.mesh), result

    def accumulate(carry: Any, batch: Batch) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, carry, graded(batch)), None

    first = jax.tree.map(lambda x: x[0], batches)
    shares = _shares(partial(run, state.trainable), batches)
    if batches.tokens.shape[0] == 1:
        gradient, result = graded(first)
    else:
        gradient, result = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(graded, first))
        zeros = (stay(gradient, base.mesh), result)
        (gradient, result), _ = jax.lax.scan(accumulate, zeros, batches)
    whole = Mean(sum(m.value for m in result.means), jnp.float32(1))  # pyright: ignore
    if len(result.means) == 1:
        whole = result.means[0]
        gradient = jax.tree.map(lambda g: g / jnp.where(whole.weight == 0, 1.0, whole.weight), gradient)
    norm = optax.global_norm(gradient)
    finite = jnp.isfinite(norm) & jnp.isfinite(whole.sum)
    updates, moments = transform(values).update(gradient, state.optimizer, state.trainable)
    moved = (optax.apply_updates(state.trainable, updates), moments)
    before = (state.trainable, state.optimizer)
    trainable, moments = jax.tree.map(lambda new, old: jnp.where(finite, new, old), moved, before)
    one = jnp.float32(1)
    log = {"loss": whole, **result.terms, "gradient_norm": Mean(norm, one)}
    log["skipped"] = Mean((~finite).astype(jnp.float32), one)
    return stay(State(state.step + 1, trainable, moments, state.key), base.mesh), log


def _shares(run: Callable[[Batch], Loss], batches: Batch) -> list[Array]:
    """What each mean's sum is divided by before micro-batches are added up: 1 where there is one mean, whose weight can
    wait for the end; else its weight over the whole step, which needs no forward pass once compiled."""
    first = jax.tree.map(lambda x: x[0], batches)
    if len(jax.eval_shape(run, first).means) == 1:
        return [jnp.float32(1)]
    weights = jax.lax.map(lambda batch: [m.weight for m in run(batch).means], batches)
    return [jnp.where(jnp.sum(w) == 0, 1.0, jnp.sum(w)) for w in weights]


@dataclass(frozen=True)
class Settings:
    """How a stage is trained. Everything but `checkpoint_every`, `keep` and `log_every` decides its result.

    `steps` are the most there are; a budget of tokens or of KL ends the stage when it is spent. `waypoints` of them,
    evenly spread, are kept with what was trained by then.
    """

    steps: int
    optimizer: Optimizer = Optimizer()
    budget: Budget | None = None
    rows: int = 2
    accumulate: int = 1
    seed: int = 0
    full: bool = False
    checkpoint_every: int = 50
    keep: int = 3
    log_every: int = 1
    tensorboard: bool = False
    waypoints: int = 0

    @property
    def semantic(self) -> dict[str, Any]:
        """The part that a resumed run must share."""
        harmless = ("checkpoint_every", "keep", "log_every", "tensorboard")
        harmless = harmless if self.waypoints else (*harmless, "waypoints")
        return {k: v for k, v in asdict(self).items() if k not in harmless}

    @property
    def marks(self) -> set[int]:
        """The steps after which a waypoint is kept."""
        return {-(-k * self.steps // self.waypoints) for k in range(1, self.waypoints + 1)}


@dataclass(frozen=True)
class Trained:
    """What a stage ended with: trainable values, its log lines, tokens seen and wall seconds of its steps; and what was
    trained after some of its steps, where the settings ask for waypoints."""

    trainable: Any
    lines: list[dict[str, float]]
    tokens: int
    seconds: float
    waypoints: dict[int, Any] = field(default_factory=dict)


def prepared(objective: Objective, reference: Policy, data: Dataset, *, rows: int, key: Array) -> Dataset:
    """`data` with the objective's facts per response, computed once over the whole data set."""
    if not objective.cached:
        return data
    tables: dict[str, list] = {}
    ids: list[np.ndarray] = []
    reference = reference.replace(remat="none")
    for number, batch in enumerate(once(data, rows=rows, even=shared(reference.mesh))):
        facts = prepare(as_partial(objective.prepare), reference, batch, jax.random.fold_in(key, number))
        if not facts:
            return data
        filled = batch.ids >= 0
        ids.append(np.asarray(batch.ids)[filled])
        for name, values in facts.items():
            tables.setdefault(name, []).append(host(values)[filled])
    order = np.argsort(np.concatenate(ids))
    return data.with_tables({name: np.concatenate(parts)[order] for name, parts in tables.items()})


def check_head(objective: Objective, full: bool) -> None:
    """Refuse to train all parameters where the objective needs the head as it is."""
    if full and objective.frozen_head:
        raise BadInput(
            f"{objective.name}: it reads the reference through a frozen head, which adapter.kind=full would train; use "
            "lora or vector (or kl: k3, where the objective has it)"
        )


def stage(
    base: Policy,
    trainable: Any,
    objective: Objective,
    data: Dataset | Prompts,
    settings: Settings,
    *,
    reference: Policy | None = None,
    folder: Path | None = None,
    progress: Progress | None = None,
    name: str = "train",
    identity: dict[str, Any] | None = None,
    distance: Callable[[Policy], float] | None = None,
    new_data: bool = False,
) -> Trained:
    """Train one stage; with a folder, log and checkpoint there and continue whatever it holds.

    Args:
      base: the policy whose weights stay as they are; `trainable` is attached to it.
      data: the encoded corpus, already `prepared` for the objective, or the prompts it samples answers to.
      reference: the habit of an objective whose facts are not prepared beforehand; the base policy when left out.
      identity: what else a checkpoint must agree with to be continued (weights, reference).
      distance: KL of a policy from the reference, for a budget of KL.
      new_data: continue a checkpoint that was made with other data, from the beginning of this data.

    Raises:
      BadInput: the folder's checkpoint belongs to other settings or data; training diverged.
      Stopped: SIGTERM or SIGINT arrived; the state is saved.
    """
    check_head(objective, settings.full)
    progress = progress or Progress(quiet=True)
    meant = meaning(objective, data, settings, identity)
    if folder is not None and (folder / "done.json").exists():
        return _finished(folder, meant, new_data, base.mesh)
    state = place(start_state(trainable, jax.random.key(settings.seed)), base.mesh)
    checkpoints, position = None, None
    if folder is not None:
        checkpoints = Checkpoints(folder / "checkpoints", every=settings.checkpoint_every, keep=settings.keep)
        found = checkpoints.restore(state, progress.say, lambda record: agree(record["meant"], meant, folder, new_data))
        if found is not None:
            state, record = found
            same = all(record["meant"].get(k) == meant.get(k) for k in DATA)  # otherwise they have been accepted
            position = record["position"] if same else None
            there = record.get("mesh")
            moved = "" if there == axes(base.mesh) else f" of a run on {there or 'one device'}: equal but for rounding"
            progress.say(f"{name}: continuing at step {int(state.step)}{'' if position else ', with new data'}{moved}")
    metrics = None
    if folder is not None:
        metrics = Metrics(folder, tensorboard=settings.tensorboard, resumed_at=int(state.step))
    try:
        run = _Loop(
            *(base, objective, data, reference, settings, checkpoints, metrics, progress, name, meant, distance),
            Waypoints(folder),
        )
        state = run(state, position)
    finally:
        if checkpoints is not None:
            checkpoints.close()
        if metrics is not None:
            metrics.close()
    trained = _trained(state.trainable, run.lines, run.waypoints.read())
    if folder is not None:
        about = {"name": name, "meant": meant, "about": objective.about}
        whole = jax.tree.map(host, state.trainable)
        alone(partial(_finish, folder, whole, about, trained.seconds))
    if run.stopped:
        raise Stopped(run.stopped, folder)
    return trained


def _finish(folder: Path, trainable: Any, about: dict[str, Any], seconds: float) -> None:
    save_arrays(folder / "trained.safetensors", trainable, about)
    (folder / "done.json").write_text(json.dumps({"seconds": seconds}))


@dataclass
class _Loop:
    """The loop of one stage: batches in, steps, log lines and checkpoints out."""

    base: Policy
    objective: Objective
    data: Dataset | Prompts
    reference: Policy | None
    settings: Settings
    checkpoints: Checkpoints | None
    metrics: Metrics | None
    progress: Progress
    name: str
    meant: dict[str, Any]
    distance: Callable[[Policy], float] | None = None
    waypoints: Waypoints = field(default_factory=lambda: Waypoints(None))

    def __call__(self, state: State, position: dict | None) -> State:
        s = self.settings
        source = self._source(position)
        self.lines: list[dict[str, float]] = [*self.metrics.kept] if self.metrics else []
        self.skipped = 0
        self.stopped = 0
        first = int(state.step)
        self.progress.start(self.name, s.steps, first)
        with StopRequests() as stop:
            for number in range(first, s.steps):
                if s.budget and s.budget.spent(self.lines):
                    break
                steps = s.budget.steps(self.lines, s.steps) if s.budget else s.steps
                values = s.optimizer.values(number, steps)
                if number == first:
                    self.progress.compiling()
                at = time.monotonic()
                stack = source(attach(self.base, state.trainable, s.full), number)
                loss = self._loss(number, steps)
                state, log = train_step(state, self.base, stack, loss, values, full=s.full)
                if number == first:
                    self.progress.compiled(time.monotonic() - at)
                seen = {"learning_rate": float(values["rate"]), "tokens": tokens_of(stack)}
                if s.budget and s.budget.due(number + 1, s.steps):
                    assert self.distance is not None
                    seen["kl_from_reference"] = self.distance(attach(self.base, state.trainable, s.full))
                self._log(number + 1, log, seen, at)
                if number + 1 in s.marks:
                    self.waypoints.keep(number + 1, state.trainable)
                last, status = number + 1 == s.steps, stop.asked(number)
                whole = last or (number + 1) % source.updates == 0  # a rollout is not cut in two
                if self.checkpoints and whole and (last or status or (number + 1) % s.checkpoint_every == 0):
                    about = {"position": source.position(), "meant": self.meant, "mesh": axes(self.base.mesh)}
                    self.checkpoints.save(state, about)
                if status and whole and not last:
                    if self.checkpoints:
                        self.checkpoints.manager.wait_until_finished()
                    raise Stopped(status, self.metrics.path.parent if self.metrics else None)
            self.stopped = stop.status  # in the last step: the stage ends as it would, then the run stops
        return state

    def _source(self, position: dict | None) -> Offline | Online:
        s = self.settings
        how = {"rows": s.rows, "accumulate": s.accumulate, "seed": s.seed, "position": position}
        kind: Any = Offline if isinstance(self.data, Dataset) else Online
        return kind(self.data, self.objective, self.reference or self.base, **how)

    def _loss(self, number: int, steps: int) -> Partial:
        schedule = self.objective.schedule
        return as_partial(self.objective.loss if schedule is None else schedule(min(1.0, number / max(1, steps - 1))))

    def _log(self, step: int, log: dict[str, Mean], seen: dict[str, float], at: float) -> None:
        line = {name: float(mean.value) for name, mean in log.items()}
        seconds = time.monotonic() - at
        self.skipped = self.skipped + 1 if line["skipped"] else 0
        if self.skipped >= MAX_SKIPPED:
            raise BadInput(
                f"{self.name}: step {step}: the loss was not finite {MAX_SKIPPED} times in a row; lower "
                "optimizer.learning_rate, or continue from the last checkpoint with --resume"
            )
        line = {"step": step, **line, **seen, "seconds": round(seconds, 3)}
        self.lines.append(line)
        if self.metrics:
            self.metrics.write(line)
        self.progress.step(step, f"loss {line['loss']:.4f}  {seen['tokens'] / seconds:.0f} tokens/s")


def _finished(folder: Path, meant: dict[str, Any], new_data: bool, mesh: Mesh | None) -> Trained:
    """The result of a stage that ended earlier."""
    trainable, metadata = load_arrays(folder / "trained.safetensors")
    agree(metadata["meant"], meant, folder, new_data)
    return _trained(place(trainable, mesh), read_metrics(folder / "metrics.jsonl"), Waypoints(folder).read())


def _trained(trainable: Any, lines: list[dict[str, float]], waypoints: dict[int, Any]) -> Trained:
    tokens, seconds = (sum(x[name] for x in lines) for name in ("tokens", "seconds"))
    return Trained(trainable, lines, int(tokens), float(seconds), waypoints)
