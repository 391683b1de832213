"""The library door: configs, training, generation and comparison as functions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aif.config import Config, check, load
from aif.errors import BadInput

if TYPE_CHECKING:
    from aif.models.hub import LM
    from aif.objectives import Objective
    from aif.results import Results
    from aif.types import Adapter, Edits, Solution


def load_config(config: Config | dict[str, Any] | str | Path, overrides: Sequence[str] = ()) -> Config:
    """A checked config from a YAML file, nested dicts, or a config.

    Raises:
      BadInput: naming the file and line, or the key, and the fix.
    """
    if isinstance(config, Config):
        return config
    return check(config) if isinstance(config, dict) else load(config, list(overrides))


def fit(
    config: Config | dict[str, Any] | str | Path,
    *,
    objective: Objective | None = None,
    arm: str | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = True,
) -> Solution:
    """Train one arm: the config's shared stage, then the arm's own, or `objective` in its place.

    Args:
      objective: a value to minimise instead of the arm's objective; it gets the same step, log and checkpoints.
      arm: which arm of the config; the first when left out.
      out: run folder; without one nothing is written.

    Returns:
      The solution: its adapter, and where it came from.

    Raises:
      BadInput: the config, corpus, model or folder is not right.
    """
    from contextlib import nullcontext

    from aif.checkpoint import run_folder
    from aif.log import Progress

    checked = load_config(config)
    arm = arm or next(iter(checked.arms))
    if arm not in checked.arms:
        raise BadInput(f"arm: no arm is called {arm!r}; arms are {', '.join(checked.arms)}")
    folder = run_folder(Path(out), resume=resume, overwrite=overwrite) if out is not None else nullcontext(None)
    with folder as where, Progress(quiet=quiet, every=checked.log.every) as progress:
        return _fit(checked, objective, arm, where, progress)


def _fit(config: Config, objective: Objective | None, arm: str, folder: Path | None, progress: Any) -> Solution:
    from aif.experiment import Experiment, write_record
    from aif.types import Solution

    experiment = Experiment(config)
    seed = config.seed
    experiment.check(*([] if objective else [arm]))
    if folder is not None:
        write_record(experiment, folder, "aif run")
    place = lambda name: None if folder is None else folder / "stages" / f"seed-{seed}" / name  # noqa: E731
    trainable = experiment.fresh(seed)
    lines = []
    for name, spec, mine in (("start", config.start, None), (arm, config.arms[arm], objective)):
        if spec is not None:
            options = {"seed": seed, "name": name, "folder": place(name), "progress": progress, "objective": mine}
            done = experiment.train(spec, trainable, **options)
            trainable, lines = done.trainable, done.lines
    provenance = {
        "model": config.model.source,
        "weights": experiment.lm.fingerprint,
        "arm": arm,
        "seed": seed,
        "log": lines,
    }
    return Solution(arm, trainable, provenance)


def load_adapter(path: str | Path, lm: LM) -> Adapter:
    """The adapter that a stage left in `trained.safetensors`.

    Raises:
      BadInput: unreadable, not an adapter, or trained on other weights than this model's.
    """
    from aif.adapter import check as check_adapter
    from aif.checkpoint import load_arrays

    tree, about = load_arrays(Path(path))
    made_on = about.get("meant", {}).get("weights")
    if made_on not in (None, lm.fingerprint):
        raise BadInput(f"{path}: trained on other weights ({made_on}) than this model's ({lm.fingerprint})")
    return check_adapter(tree, lm.config, str(path))


def generate(
    lm: LM,
    prompts: str | Sequence[str],
    *,
    adapter: Adapter | None = None,
    edits: Edits | None = None,
    new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[str]:
    """Answers to user prompts through the chat template; greedy at temperature 0."""
    import jax
    import numpy as np

    from aif.corpus import Message
    from aif.policy import bind
    from aif.runtime import compilation_cache
    from aif.sampling import generate as sample
    from aif.tokens import encode_prompt

    compilation_cache()
    asked = [prompts] if isinstance(prompts, str) else list(prompts)
    ids = [encode_prompt(lm.tokenizer, [Message("user", p)]) for p in asked]
    made = sample(
        bind(lm, adapter, edits),
        ids,
        new_tokens=new_tokens,
        stop=lm.tokenizer.eos_token_id,
        temperature=temperature,
        key=jax.random.key(seed),
    )
    texts = [np.asarray(t)[:n] for t, n in zip(made.tokens, made.lengths, strict=True)]
    return [lm.tokenizer.decode(t, skip_special_tokens=True) for t in texts]


def compare(
    config: Config | dict[str, Any] | str | Path,
    *,
    out: str | Path,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = True,
    command: str = "aif compare",
) -> Results:
    """Train every arm for every seed, measure, and write results.json and report.html into `out`."""
    from aif.checkpoint import run_folder
    from aif.log import Progress

    checked = load_config(config)
    with (
        run_folder(Path(out), resume=resume, overwrite=overwrite) as folder,
        Progress(quiet=quiet, every=checked.log.every) as progress,
    ):
        from aif import comparison as engine

        results = engine.compare(checked, folder, progress=progress, command=command)
        engine.run_report(folder, results)
    return results
