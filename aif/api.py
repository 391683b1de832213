"""The library door: configs, training, generation and comparison as functions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aif.config import Config, check, load
from aif.errors import BadInput

if TYPE_CHECKING:
    from aif.corpus import Message
    from aif.models.hub import LM
    from aif.objectives import Objective
    from aif.results import Results
    from aif.steering import Scope
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
    accept_new_data: bool = False,
    quiet: bool = True,
) -> Solution:
    """Train one arm: the config's shared stage, then the arm's own, or `objective` in its place.

    Args:
      objective: a value to minimise instead of the arm's objective; it gets the same step, log and checkpoints.
      arm: which arm of the config; the first when left out.
      out: run folder; without one nothing is written.
      accept_new_data: resume although the corpus has changed, from its beginning.

    Returns:
      The solution: its adapter, and where it came from.

    Raises:
      BadInput: the config, corpus, model or folder is not right.
    """
    from contextlib import nullcontext

    from aif.checkpoint import run_folder
    from aif.log import Progress
    from aif.processes import first

    checked = load_config(config)
    arm = arm or next(iter(checked.arms))
    if arm not in checked.arms:
        raise BadInput(f"arm: no arm is called {arm!r}; arms are {', '.join(checked.arms)}")
    folder = run_folder(Path(out), resume=resume, overwrite=overwrite) if out is not None else nullcontext(None)
    with folder as where, Progress(quiet=quiet or not first(), every=checked.log.every) as progress:
        return _fit(checked, objective, arm, where, progress, accept_new_data)


def _fit(
    config: Config, objective: Objective | None, arm: str, folder: Path | None, progress: Any, new_data: bool
) -> Solution:
    from aif.experiment import Experiment
    from aif.processes import alone
    from aif.runtime import write_record
    from aif.types import Solution

    experiment = Experiment(config)
    seed = config.seed
    experiment.check(*([] if objective else [arm]))
    if folder is not None:
        alone(lambda: write_record(config.model_dump(mode="json"), folder, "aif run"))
    place = lambda name: None if folder is None else folder / "stages" / f"seed-{seed}" / name  # noqa: E731
    trainable = experiment.fresh(seed)
    lines = []
    for name, spec, mine in (("start", config.start, None), (arm, config.arms[arm], objective)):
        if spec is not None:
            options: dict[str, Any] = {
                "seed": seed,
                "name": name,
                "folder": place(name),
                "progress": progress,
                "objective": mine,
            }
            done = experiment.train(spec, trainable, new_data=new_data, **options)
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
    """The adapter of a stage's `trained.safetensors`, of a stage's or run's folder, or of a PEFT folder.

    Raises:
      BadInput: unreadable, not an adapter, trained on other weights than this model's, or a folder of several arms.
    """
    from aif.adapter import check as check_adapter
    from aif.checkpoint import load_arrays
    from aif.export import read_peft

    if (Path(path) / "adapter_config.json").is_file():
        return read_peft(Path(path), lm.config)
    file = _trained(Path(path))
    tree, about = load_arrays(file)
    made_on = about.get("meant", {}).get("weights")
    if made_on not in (None, lm.fingerprint):
        raise BadInput(f"{file}: trained on other weights ({made_on}) than this model's ({lm.fingerprint})")
    return check_adapter(tree, lm.config, str(file))


def _trained(path: Path) -> Path:
    """`trained.safetensors` itself, or the one of a stage's folder, or that of a run's only arm."""
    if not path.is_dir():
        return path
    if (path / "trained.safetensors").exists():
        return path / "trained.safetensors"
    found = sorted(path.glob("stages/seed-*/*/trained.safetensors"))
    arms = [file for file in found if file.parent.name != "start"] or found
    if len(arms) != 1:
        names = ", ".join(str(file.parent.relative_to(path)) for file in arms[:8])
        said = f"holds several trained stages ({names}); name one" if arms else "holds no trained.safetensors"
        raise BadInput(f"{path}: {said}, as in {path}/stages/seed-0/ARM")
    return arms[0]


def generate(
    lm: LM,
    prompts: str | Sequence[str | Sequence[Message]],
    *,
    adapter: Adapter | None = None,
    edits: Edits | None = None,
    scope: Scope = "all",
    new_tokens: int = 64,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
) -> list[str]:
    """Answers to user prompts or whole conversations through the chat template; greedy at temperature 0.

    Args:
      edits: one row for all prompts, or one each; they act on the tokens that `scope` names.
      top_k, top_p, min_p: which tokens are drawn from, see `aif.drawing`.

    Raises:
      BadInput: a value is out of its range, or a conversation is longer than the model reads.
    """
    import jax
    import numpy as np

    from aif.corpus import Message
    from aif.policy import bind
    from aif.runtime import compilation_cache
    from aif.sampling import generate as sample
    from aif.steering import reach
    from aif.tokens import encode_prompt

    compilation_cache()
    asked = [prompts] if isinstance(prompts, str) else list(prompts)
    turns = [[Message("user", p)] if isinstance(p, str) else p for p in asked]
    ids = [encode_prompt(lm.tokenizer, messages) for messages in turns]
    longest = max(map(len, ids), default=0) + new_tokens
    if longest > lm.config.max_position:
        raise BadInput(
            f"generate: {longest} tokens of prompt and answer are more than the model's {lm.config.max_position}; "
            "shorten the conversation or ask for fewer"
        )
    made = sample(
        bind(lm, adapter, edits, reach=reach(scope)),
        ids,
        new_tokens=new_tokens,
        stop=lm.tokenizer.eos_token_id,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        key=jax.random.key(seed),
    )
    texts = [np.asarray(t)[:n] for t, n in zip(made.tokens, made.lengths, strict=True)]
    return [lm.tokenizer.decode(t, skip_special_tokens=True) for t in texts]


def score(
    lm: LM,
    prompt: str | Sequence[Message],
    answers: Sequence[str],
    *,
    adapter: Adapter | None = None,
    edits: Edits | None = None,
    scope: Scope = "all",
) -> list[float]:
    """ln p(answer | prompt) of each answer, its end token included, in nats; the prompt is read once.

    Raises:
      BadInput: no answer, or more tokens than the model reads.
    """
    import jax
    import numpy as np

    from aif.batches import one_per_row
    from aif.corpus import Candidate, Conversation, Message
    from aif.objectives.logprobs import response_logprobs
    from aif.policy import bind
    from aif.sampling import bucket
    from aif.steering import reach
    from aif.tokens import encode

    if not answers:
        raise BadInput("score: there is no answer to score; give at least one")
    turns = (Message("user", prompt),) if isinstance(prompt, str) else tuple(prompt)
    candidates = tuple(Candidate(answer) for answer in answers)
    row = Conversation("score", turns, candidates, domain="", language="", split="", kind="chat", where="score")
    tree = encode(lm.tokenizer, row, range(len(answers)), lm.config.max_position)
    batch = one_per_row([tree], bucket(len(tree.tokens)), bucket(len(tree.targets)), len(answers))
    policy = bind(lm, adapter, edits, reach=reach(scope))
    return np.asarray(jax.jit(response_logprobs)(policy, batch))[0].tolist()


def compare(
    config: Config | dict[str, Any] | str | Path,
    *,
    out: str | Path,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = True,
    command: str = "aif compare",
    cache: str | Path | None = None,
    launcher: str = "local",
) -> Results:
    """Train every arm for every seed, measure, and write results.json and report.html into `out`.

    Args:
      cache: folder of finished work that comparisons share; `aif-cache` beside `out` when left out. With `overwrite`
        nothing is read from it and what is made replaces what it holds.
      launcher: "local" trains here; "slurm" and "ray" run a job per arm and seed (`aif.launch`).
    """
    from aif.cache import Cache
    from aif.checkpoint import run_folder
    from aif.launch import check_launcher, launch
    from aif.log import Progress
    from aif.processes import several

    checked = load_config(config)
    check_launcher(launcher, checked.launch)
    if several():
        raise BadInput("compare: runs in one process; use `aif run`, or --launcher for a job per arm")
    with (
        run_folder(Path(out), resume=resume, overwrite=overwrite) as folder,
        Progress(quiet=quiet, every=checked.log.every) as progress,
    ):
        from aif import comparison as engine

        kept = Cache(Path(cache) if cache else engine.beside(folder), read=not overwrite, say=progress.say)
        jobs = None if launcher == "local" else lambda run: launch(run, launcher)
        results = engine.compare(checked, folder, progress=progress, command=command, cache=kept, launch=jobs)
        engine.run_report(folder, results)
    return results
