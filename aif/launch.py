"""Jobs of a comparison elsewhere: what arms share is one job per seed, then every arm of every seed is a job.

Jobs are processes of Slurm (through submitit) or of Ray. Each trains its stage into the run folder, which all machines
must see, with the code that trains it here; the comparison then finds the stages finished and goes on. A job that dies
is tried again and continues at its last checkpoint; one that dies too often is named, and what the others finished is
kept.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from aif.config import Config, LaunchSection, check
from aif.errors import BadInput
from aif.runtime import Stopped, StopRequests

if TYPE_CHECKING:
    from aif.comparison import Comparison

POLL = 0.2  # seconds between looks at running jobs
LIBRARY = {"slurm": "submitit", "ray": "ray"}
MINUTES = 24 * 60  # a job's limit unless `launch.parameters` has another; submitit's own 5 would end most jobs


class Job(NamedTuple):
    """An arm of a seed; with an empty arm, what the arms of a seed share."""

    seed: int
    arm: str

    def __str__(self) -> str:
        return f"{self.arm or 'shared stage'}, seed {self.seed}"

    def done(self, folder: Path) -> bool:
        """Whether its stage is finished already."""
        return (folder / "stages" / f"seed-{self.seed}" / (self.arm or "start") / "done.json").exists()


def waves(config: Config) -> list[list[Job]]:
    """Jobs that may run side by side, wave after wave."""
    shared = [Job(seed, "") for seed in config.seeds] if config.start is not None else []
    return [shared, [Job(seed, arm) for seed in config.seeds for arm in config.arms]]


def work(config: dict[str, Any], folder: str, cache: str | None, read: bool, where: str, job: Job) -> str:
    """One job, in its own process; returns what is wrong with the input, or nothing."""
    os.chdir(where)
    sys.path.insert(0, where)
    from aif.cache import Cache
    from aif.comparison import Comparison, train_arms
    from aif.experiment import Experiment
    from aif.log import Progress

    with Progress() as progress:
        kept = Cache(None if cache is None else Path(cache), read=read, say=progress.say)
        run = Comparison(Experiment(check(config), kept), Path(folder), progress)
        try:
            train_arms(run, job.seed, [job.arm] if job.arm else [])
        except BadInput as error:
            return str(error)
    return ""


class Submitit:
    """Jobs through submitit: on Slurm, or as processes of this machine."""

    def __init__(self, folder: Path, launch: LaunchSection):
        import submitit

        self.executor = submitit.AutoExecutor(folder=folder, cluster=launch.cluster)
        self.executor.update_parameters(**{"timeout_min": MINUTES, **launch.parameters})

    def submit(self, *arguments: Any) -> Any:
        return self.executor.submit(work, *arguments)

    def done(self, handle: Any) -> bool:
        return handle.done()

    def result(self, handle: Any) -> str:
        return handle.result()

    def cancel(self, handle: Any) -> None:
        handle.cancel()


class Ray:
    """Jobs as tasks of a Ray cluster: the one that runs, or a local one."""

    def __init__(self, folder: Path, launch: LaunchSection):
        import ray

        self.ray = ray
        if not ray.is_initialized():
            ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False)
        self.task = ray.remote(work).options(**{"max_retries": 0, **launch.parameters})

    def submit(self, *arguments: Any) -> Any:
        return self.task.remote(*arguments)

    def done(self, handle: Any) -> bool:
        return bool(self.ray.wait([handle], timeout=0)[0])

    def result(self, handle: Any) -> str:
        return self.ray.get(handle)

    def cancel(self, handle: Any) -> None:
        self.ray.cancel(handle, force=True)


def check_launcher(kind: str, launch: LaunchSection) -> None:
    """The launcher can be used here.

    Raises:
      BadInput: it is none, its library is not installed, or there is no Slurm.
    """
    if kind not in ("local", *LIBRARY):
        raise BadInput(f"--launcher: {kind!r} is none; choose local, slurm or ray")
    if kind in LIBRARY and importlib.util.find_spec(LIBRARY[kind]) is None:
        raise BadInput(f"--launcher {kind}: {LIBRARY[kind]} is not installed; `pip install aif[{kind}]`")
    if kind == "slurm" and launch.cluster == "slurm" and shutil.which("sbatch") is None:
        raise BadInput(
            "--launcher slurm: there is no sbatch here; set launch.cluster=local to run its jobs on this machine"
        )


def launch(run: Comparison, kind: str) -> None:
    """Run every stage of a comparison that is not finished as a job.

    Raises:
      BadInput: a job refused its input, or died more often than `launch.retries`.
      Stopped: SIGTERM or SIGINT arrived; running jobs are cancelled, their checkpoints stay.
    """
    config, cache = run.config, run.experiment.cache
    pool = (Submitit if kind == "slurm" else Ray)(run.folder / "jobs", config.launch)
    common = [config.model_dump(mode="json"), str(run.folder.absolute())]
    common += [None if cache.folder is None else str(cache.folder.absolute()), cache.read, str(Path.cwd())]
    for jobs in waves(config):
        _wave(run, pool, common, [job for job in jobs if not job.done(run.folder)])


def _wave(run: Comparison, pool: Submitit | Ray, common: list[Any], jobs: list[Job]) -> None:
    """Run jobs side by side, each again as long as it dies and tries are left."""
    section, say = run.config.launch, run.progress.say
    waiting, tries, running, failed = list(jobs), dict.fromkeys(jobs, 0), {}, []
    try:
        with StopRequests() as stop:
            while waiting or running:
                while waiting and len(running) < section.at_once:
                    job = waiting.pop(0)
                    tries[job] += 1
                    running[job] = pool.submit(*common, job)
                    say(f"job {job}: submitted")
                time.sleep(POLL)
                if stop.status:
                    raise Stopped(stop.status, run.folder)
                for job in [j for j, handle in running.items() if pool.done(handle)]:
                    trouble, refused = _outcome(pool, running.pop(job))
                    again = trouble and not refused and tries[job] <= section.retries
                    say(f"job {job}: {trouble or 'done'}{'; tried again' if again else ''}")
                    waiting += [job] if again else []
                    failed += [f"{job}: {trouble}"] if trouble and not again else []
    finally:
        for handle in running.values():
            pool.cancel(handle)
    if failed:
        raise BadInput(f"jobs: {'; '.join(failed)}; logs are in {run.folder / 'jobs'}, continue with --resume")


def _outcome(pool: Submitit | Ray, handle: Any) -> tuple[str, bool]:
    """(what went wrong, or nothing; whether the job refused its input, which another try would not change)."""
    try:
        said = pool.result(handle)
    except Exception as error:  # whatever a library raises for a process that died
        return f"died ({cause(error)})", False
    return said, bool(said)


def cause(error: Exception) -> str:
    """What ended a job, in one line: the last exception that the trace of its process names, or else how the library
    begins to tell it."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    named = [line for line in lines if re.match(r"[\w.]+: \S", line)]
    return (named[-1] if named else lines[0])[:200]
