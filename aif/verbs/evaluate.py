"""`aif eval`: tasks of lm-evaluation-harness, answered by a model that is plain, adapted or steered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from aif.errors import BadInput
from aif.verbs.answers import Ablate, AdapterFile, Clamp, Model, Steer, Where, loaded

Tasks = Annotated[list[str], typer.Argument(help="names of tasks or groups", metavar="TASK...")]
Folder = Annotated[Optional[Path], typer.Option("--tasks", help="folder with tasks of one's own, as YAML")]  # noqa: UP045
Limit = Annotated[Optional[int], typer.Option(min=1, help="documents of a task at most")]  # noqa: UP045
Shots = Annotated[Optional[int], typer.Option(min=0, help="solved examples before each document")]  # noqa: UP045
Chat = Annotated[bool, typer.Option("--chat", help="ask through the chat template")]
Rows = Annotated[int, typer.Option(min=1, help="rows of a batch")]
Out = Annotated[Optional[Path], typer.Option("--out", help="new JSON file of results")]  # noqa: UP045


def evaluate(
    tasks: Tasks,
    model: Model = "smollm2-135m",
    adapter: AdapterFile = None,
    steer: Steer = None,
    clamp: Clamp = None,
    ablate: Ablate = None,
    scope: Where = "all",
    folder: Folder = None,
    limit: Limit = None,
    shots: Shots = None,
    chat: Chat = False,
    rows: Rows = 8,
    seed: int = 0,
    out: Out = None,
) -> None:
    """Measure a model on tasks of lm-evaluation-harness, plain, with an adapter, or steered."""
    if out is not None and out.exists():
        raise BadInput(f"--out {out}: exists already; name a new file")
    manager = _manager(tasks, folder)
    asked = _tasks(manager, tasks)
    lm, values = loaded(model, adapter, steer, clamp, ablate, scope)
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.utils import make_table

    from aif.harness import HarnessLM
    from aif.runtime import compilation_cache

    compilation_cache()
    found: Any = simple_evaluate(
        model=HarnessLM(lm, **values, rows=rows, seed=seed),
        tasks=asked,
        task_manager=manager,
        num_fewshot=shots,
        limit=limit,
        apply_chat_template=chat,
        log_samples=False,
        random_seed=seed,
    )
    how = {"model": model, "weights": lm.fingerprint, "adapter": adapter and str(adapter), "scope": scope}
    how |= {"steer": steer, "clamp": clamp, "ablate": ablate, "chat": chat, "limit": limit, "seed": seed}
    kept = {name: found[name] for name in ("results", "versions", "n-shot", "n-samples", "lm_eval_version")}
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps({"asked": how, **kept}, indent=1, default=float) + "\n")
    print(make_table(found).strip())


def _manager(names: list[str], folder: Path | None) -> Any:
    """The harness's index of tasks, in which all the names are found."""
    try:
        from lm_eval.tasks import TaskManager
    except ImportError:
        raise BadInput("aif eval: needs lm-evaluation-harness; install it with `pip install 'aif[eval]'`") from None
    if folder is not None and not folder.is_dir():
        raise BadInput(f"--tasks {folder}: is no folder; give one that holds tasks as YAML files")
    manager = TaskManager(include_path=folder)
    for name in names:
        if name not in manager.task_index:
            import difflib

            near = difflib.get_close_matches(name, manager.all_tasks, n=1, cutoff=0.0)
            raise BadInput(f"{name}: no such task; did you mean {near[0]}?")
    return manager


def _tasks(manager: Any, names: list[str]) -> list[Any]:
    """The tasks and groups with their documents, which may have to be downloaded."""
    try:
        found = manager.load(list(names))
    except Exception as error:  # the harness and the data set libraries have many kinds
        what = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise BadInput(f"{', '.join(names)}: cannot be loaded ({what}); check its data, or the network") from None
    inner = {name for group in found["groups"].values() for name in group.child_names}
    return [item for kind in ("groups", "tasks") for name, item in found[kind].items() if name not in inner]
