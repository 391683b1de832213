"""The command line: thin verbs over the library. Nothing heavy is imported before a verb needs it.

Exit status: 0 done, 1 a fault of the engine, 2 a mistake in the input (one line says what and how to mend it),
130 and 143 stopped by SIGINT and SIGTERM with the state saved.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from aif.errors import BadInput
from aif.verbs import answers, config, corpus, devices, direction, evaluate, export, models, protocol
from aif.verbs.parameters import CacheFolder, ConfigFile, Out, Overrides, Overwrite, Resume

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Active-inference fine-tuning in JAX.",
)
for group in (models, corpus, protocol, config, direction, export):
    app.add_typer(group.app, name=group.NAME)
for verb in (devices.plan, devices.doctor, answers.generate, answers.chat):
    app.command()(verb)
app.command("eval")(evaluate.evaluate)


@app.command()
def run(
    file: ConfigFile,
    overrides: Overrides = None,
    arm: Annotated[Optional[str], typer.Option(help="arm to train; the first when left out")] = None,  # noqa: UP045
    out: Out = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    accept_new_data: Annotated[
        bool, typer.Option("--accept-new-data", help="resume although the corpus changed, from its beginning")
    ] = False,
    processes: Annotated[Optional[str], typer.Option(help="auto on a cluster, or RANK/COUNT@HOST:PORT")] = None,  # noqa: UP045
) -> None:
    """Train one arm of a config: the shared stage, then the arm's own."""
    from aif.api import fit
    from aif.config import load
    from aif.processes import first, join

    checked = load(file, overrides or [])
    folder = out or Path("runs") / checked.name
    if processes:
        join(processes)
    how: Any = {"resume": resume, "overwrite": overwrite, "accept_new_data": accept_new_data}
    fit(checked, arm=arm, out=folder, quiet=False, **how)
    if first():
        print(f"run: {folder}")


@app.command()
def compare(
    file: ConfigFile,
    overrides: Overrides = None,
    out: Out = None,
    resume: Resume = False,
    overwrite: Overwrite = False,
    cache: CacheFolder = None,
    launcher: Annotated[str, typer.Option(help="where arms train: local, slurm or ray")] = "local",
) -> None:
    """Train every arm, measure the basins, and write results.json and report.html."""
    from aif.api import compare as run_comparison
    from aif.config import load

    checked = load(file, overrides or [])
    folder = out or Path("runs") / checked.name
    how = {"resume": resume, "overwrite": overwrite, "cache": cache, "launcher": launcher}
    run_comparison(checked, out=folder, quiet=False, **how)
    print(f"results: {folder / 'results.json'}")
    print(f"report:  {folder / 'report.html'}")


@app.command()
def report(folder: Annotated[Path, typer.Argument(help="run folder of a comparison")]) -> None:
    """Render report.html again from results.json."""
    from aif.report import render
    from aif.results import Results

    print(f"report: {render(Results.load(folder / 'results.json'), folder / 'report.html')}")


def main() -> None:
    """Run a verb; a mistake in the input ends with one line and exit status 2, never a traceback."""
    sys.path.insert(0, str(Path.cwd()))  # where a config's `module:attribute` may lie
    try:
        app()
    except BadInput as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        if type(error).__name__ == "Stopped":
            print(str(error), file=sys.stderr)
            sys.exit(getattr(error, "status", 1))
        raise


if __name__ == "__main__":
    main()
