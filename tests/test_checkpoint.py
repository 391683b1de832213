"""Checkpoints and run folders: stopped, killed or damaged, a run ends as if nothing had happened, or says why not."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import aif
from aif.batches import build
from aif.checkpoint import Checkpoints, fingerprint, load_arrays, run_folder, save_arrays
from aif.errors import BadInput
from aif.log import Progress
from aif.models.families import SIZES
from aif.models.hub import byte_tokenizer
from aif.objectives import Objective
from aif.policy import Policy
from aif.runtime import Stopped
from aif.train import Optimizer, Settings, stage, start_state
from aif.types import Loss, Mean

# TensorStore's reads of a damaged file end after Orbax has closed the event loop that waited for them.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
ROOT = Path(__file__).resolve().parent.parent
EMPTY = Policy({}, config=SIZES["tiny-random"])
SETTINGS = Settings(6, Optimizer(3e-2, warmup=2), rows=1, accumulate=2, seed=4, checkpoint_every=1)


def bytes_loss(policy, batch, *, speed=3.0):
    """A cheap loss that depends on the order of the data: cos(speed u . (token, target)) of every token."""
    u = policy.adapter["vector"]["u"]
    angle = u[0, batch.targets % 64] + u[1, batch.response + batch.targets // 64]
    total = Mean(jnp.sum(batch.weights * jnp.cos(speed * angle)), jnp.sum(batch.weights))
    return Loss(total, {"tokens": total})


OBJECTIVE = Objective(bytes_loss)


def start():
    noise = np.random.default_rng(0).normal(size=(2, 64)).astype(np.float32)
    return {"vector": {"u": jnp.asarray(noise), "scale": jnp.ones(2)}}


@pytest.fixture(scope="module")
def data(rows):
    return build(rows, byte_tokenizer(), which="target", length=384, target="discernment", dimensions=["humility"])


class Listener(Progress):
    """Keeps what is said, and sends this process a signal when step `at` has been logged."""

    def __init__(self, at: int = 0, number: int = signal.SIGTERM):
        super().__init__(quiet=True)
        self.at, self.number, self.said = at, number, []

    def say(self, text):
        self.said.append(text)

    def step(self, done, note=""):
        if done == self.at:
            os.kill(os.getpid(), self.number)


def trained(data, folder=None, at=0, settings=SETTINGS, number=signal.SIGTERM, **options):
    progress = Listener(at, number)
    try:
        return stage(EMPTY, start(), OBJECTIVE, data, settings, folder=folder, progress=progress, **options), progress
    except Stopped as stop:
        return stop, progress


@pytest.fixture(scope="module")
def whole(data):
    """What an uninterrupted run gives."""
    return trained(data)[0]


@pytest.fixture(scope="module")
def half(data, tmp_path_factory):
    """A run that was stopped after step 4 of 6."""
    folder = tmp_path_factory.mktemp("half") / "run"
    assert trained(data, folder, at=4)[0].status == 143
    return folder


@pytest.fixture
def stopped(half, tmp_path):
    """A copy of it to do what one likes with."""
    return shutil.copytree(half, tmp_path / "run")


def timeless(lines):
    return [{k: v for k, v in line.items() if k != "seconds"} for line in lines]


def assert_same(mine, whole):
    """Values bit for bit, and the log but for its wall time."""
    for x, y in zip(jax.tree.leaves(mine.trainable), jax.tree.leaves(whole.trainable), strict=True):
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
    assert timeless(mine.lines) == timeless(whole.lines)


# Stopping and going on


@pytest.mark.parametrize("number,status", [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_stopped_at_every_step_and_resumed_is_uninterrupted(data, whole, tmp_path, number, status):
    settings = replace(SETTINGS, checkpoint_every=99)  # the only checkpoints are those of stopping
    for at in (1, 2, 5):
        end, progress = trained(data, tmp_path, at, settings, number)
        assert isinstance(end, Stopped) and end.status == status and "--resume" in str(end)
        assert at == 1 or any("continuing at step" in text for text in progress.said)
        assert not (tmp_path / "done.json").exists()
    assert_same(trained(data, tmp_path, settings=settings)[0], whole)
    values, about = load_arrays(tmp_path / "trained.safetensors")
    np.testing.assert_array_equal(values["vector"]["u"], whole.trainable["vector"]["u"])
    assert about["meant"]["steps"] == 6


def test_a_stop_in_the_last_step_ends_the_stage_and_then_the_run(data, whole, tmp_path):
    """Otherwise the next stage would begin."""
    assert trained(data, tmp_path, at=6)[0].status == 143
    assert_same(trained(data, tmp_path)[0], whole)


def test_without_a_folder_a_stop_saves_nothing_and_says_so(data):
    end, _ = trained(data, at=2)
    assert str(end) == "stopped" and end.status == 143


def test_signals_are_given_back(data):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    trained(data, at=1)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_torn_line_and_lines_after_the_checkpoint_are_cut(data, whole, stopped):
    shutil.rmtree(stopped / "checkpoints" / "4")
    with (stopped / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "loss": 0.')
    assert_same(trained(data, stopped)[0], whole)


def test_so_many_checkpoints_are_kept(half):
    assert sorted(p.name for p in (half / "checkpoints").iterdir() if p.is_dir()) == ["2", "3", "4"]


# Damage


def flip(file: Path):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x10
    file.write_bytes(content)


DAMAGE = {
    "values": lambda step: [flip(p) for p in (step / "state").rglob("d/*")],
    "truncated": lambda step: [p.write_bytes(p.read_bytes()[:100]) for p in (step / "state").rglob("d/*")],
    "no values": lambda step: shutil.rmtree(step / "state"),
    "record": lambda step: (step / "record" / "metadata").write_text("{"),
    "no record": lambda step: shutil.rmtree(step / "record"),
    "position": lambda step: edit(step, lambda record: record["position"][0].update(counter=1)),
    "fingerprint": lambda step: edit(step, lambda record: record.update(fingerprint=[0])),
}


def edit(step: Path, change):
    file = step / "record" / "metadata"
    record = json.loads(file.read_text())
    change(record)
    file.write_text(json.dumps(record))


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_checkpoint_is_passed_over_loudly(what, data, whole, stopped):
    DAMAGE[what](stopped / "checkpoints" / "4")
    end, progress = trained(data, stopped)
    assert_same(end, whole)
    assert [t for t in progress.said if "checkpoints/4: damaged checkpoint" in t and "the one before" in t]
    assert "train: continuing at step 3" in progress.said


def test_all_checkpoints_damaged_is_the_end(data, stopped):
    for step in (2, 3, 4):
        DAMAGE["values"](stopped / "checkpoints" / str(step))
    files = sorted(stopped.rglob("*"))
    with pytest.raises(BadInput, match="every checkpoint is damaged; start over with --overwrite") as error:
        trained(data, stopped)
    assert "\n" not in str(error.value)
    assert sorted(stopped.rglob("*")) == files


def test_any_flipped_bit_is_noticed_or_harmless(half, tmp_path):
    """40 random flips in the files of the newest checkpoint: its state and record bit for bit, or the one before's."""
    like = start_state(start(), jax.random.key(0))

    def restored(folder):
        checkpoints, said = Checkpoints(folder, every=1, keep=3), []
        state, record = checkpoints.restore(like, said.append)
        checkpoints.close()
        plain = jax.tree.map(np.asarray, state._replace(key=jax.random.key_data(state.key)))
        return [x.tobytes() for x in jax.tree.leaves(plain)], record, len(said)

    clean = tmp_path / "clean"
    shutil.copytree(half / "checkpoints", clean)
    newest = restored(clean)
    shutil.rmtree(clean / "4")
    before = restored(clean)
    assert newest[2] == before[2] == 0 and newest[:2] != before[:2]
    noticed, chance = 0, random.Random(5)
    for number in range(40):
        folder = shutil.copytree(half / "checkpoints", tmp_path / str(number))
        file = chance.choice(sorted(p for p in (folder / "4").rglob("*") if p.is_file() and p.stat().st_size))
        content = bytearray(file.read_bytes())
        place = chance.randrange(len(content))
        content[place] ^= 1 << chance.randrange(8)
        file.write_bytes(content)
        found = restored(folder)
        wanted = before if found[2] else newest
        assert found[:2] == wanted[:2], f"{file.relative_to(folder)}, byte {place}"
        noticed += found[2]
    assert noticed > 5


def test_the_fingerprint_sees_every_bit_and_place():
    x = {"a": np.arange(7, dtype=np.float32), "b": np.array(3, np.int32)}
    marks = {tuple(fingerprint(x))}
    for bit in range(32):
        y = x["a"].copy()
        y.view(np.uint32)[4] ^= np.uint32(1) << np.uint32(bit)
        marks.add(tuple(fingerprint({**x, "a": y})))
    marks.add(tuple(fingerprint({**x, "a": x["a"][[0, 2, 1, 3, 4, 5, 6]]})))
    marks.add(tuple(fingerprint({**x, "b": np.array(4, np.int32)})))
    assert len(marks) == 35
    assert fingerprint(x) == fingerprint(jax.tree.map(jnp.asarray, x))


def test_a_folder_that_cannot_be_written_is_said_in_one_line(data, tmp_path, monkeypatch):
    from orbax.checkpoint import CheckpointManager

    def full(self, *values, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(CheckpointManager, "save", full)
    with pytest.raises(BadInput, match="checkpoint not saved: .*No space left on device; free space") as error:
        trained(data, tmp_path)
    assert "\n" not in str(error.value)


# A checkpoint of something else


OTHER = {
    "steps": {"settings": replace(SETTINGS, steps=7)},
    "optimizer": {"settings": replace(SETTINGS, optimizer=Optimizer(1e-2))},
    "rows": {"settings": replace(SETTINGS, rows=2)},
    "accumulate": {"settings": replace(SETTINGS, accumulate=1)},
    "seed": {"settings": replace(SETTINGS, seed=5)},
    "weights": {"identity": {"weights": "of another model"}},
    "adapter": {"identity": {"adapter": {"rank": 8}}},
}


@pytest.mark.parametrize("finished", [False, True])
@pytest.mark.parametrize("key", [*OTHER, "data", "length", "objective"])
def test_a_checkpoint_of_something_else_is_refused_by_its_key(key, finished, data, rows, half, ended, monkeypatch):
    folder = ended if finished else half
    files = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    if key == "data":
        data = replace(data, tables={**data.tables, "ratings": data.tables["ratings"] + 1})
    if key == "length":
        data = replace(data, length=400)
    if key == "objective":
        monkeypatch.setitem(globals(), "OBJECTIVE", Objective(bytes_loss, name="another"))
    with pytest.raises(BadInput, match=rf"made with another {key} \(.*--overwrite") as error:
        trained(data, folder, **OTHER.get(key, {}))
    assert "\n" not in str(error.value)
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == files


@pytest.fixture(scope="module")
def ended(data, half, whole, tmp_path_factory):
    """A run that was stopped and finished."""
    folder = shutil.copytree(half, tmp_path_factory.mktemp("ended") / "run")
    assert_same(trained(data, folder)[0], whole)
    return folder


def test_another_shape_is_told_from_damage(data, stopped):
    """The record is read before the values."""
    wide = {"vector": {"u": jnp.zeros((2, 99)), "scale": jnp.ones(2)}}
    with pytest.raises(BadInput, match="another adapter"):
        stage(EMPTY, wide, OBJECTIVE, data, SETTINGS, folder=stopped, identity={"adapter": "wide"})


def test_how_often_one_saves_and_logs_may_change(data, whole, stopped):
    settings = replace(SETTINGS, checkpoint_every=2, keep=1, log_every=3)
    assert_same(trained(data, stopped, settings=settings)[0], whole)


# Files of arrays


def test_arrays_come_back(tmp_path):
    tree = {"q": {"a": np.ones((2, 3), np.float32)}, "step": np.int32(4)}
    save_arrays(tmp_path / "x.safetensors", tree, {"name": "n"})
    back, about = load_arrays(tmp_path / "x.safetensors")
    assert about == {"name": "n"} and list(p.name for p in tmp_path.iterdir()) == ["x.safetensors"]
    assert jax.tree.all(jax.tree.map(np.array_equal, back, tree))


@pytest.mark.parametrize("content", [None, b"", b"not safetensors", "cut", "folder"])
def test_a_file_of_arrays_that_cannot_be_read(content, tmp_path):
    file = tmp_path / "x.safetensors"
    save_arrays(file, {"a": np.ones(99, np.float32)}, {})
    whole = file.read_bytes()
    file.unlink()
    if content == "folder":
        file.mkdir()
    elif content is not None:
        file.write_bytes(whole[:-1] if content == "cut" else content)
    with pytest.raises(BadInput, match=f"^{file}: ") as error:
        load_arrays(file)
    assert "\n" not in str(error.value)


# The run folder


def held(folder: Path, resume=False, overwrite=False):
    with run_folder(folder, resume=resume, overwrite=overwrite):
        assert (folder / "lock").exists()


@pytest.fixture
def run(tmp_path):
    """A run folder that holds something."""
    held(tmp_path / "run")
    (tmp_path / "run" / "kept.txt").write_text("mine")
    return tmp_path / "run"


def test_a_folder_in_use_is_refused_and_left_alone(run):
    with pytest.raises(BadInput, match=f"^{run}: is not empty; pass --resume .* --overwrite .* --out$"):
        held(run)
    assert (run / "kept.txt").read_text() == "mine" and not (run / "lock").exists()
    held(run, resume=True)
    assert (run / "kept.txt").read_text() == "mine"
    held(run, overwrite=True)
    assert [p.name for p in run.iterdir()] == ["run.json"]


def test_a_try_that_left_nothing_stands_in_nobodys_way(tmp_path):
    held(tmp_path / "run")
    held(tmp_path / "run")


@pytest.mark.parametrize("option", ["resume", "overwrite"])
def test_a_folder_of_somebody_else_is_never_deleted(option, tmp_path):
    (tmp_path / "thesis.tex").write_text("years")
    with pytest.raises(BadInput, match="not a run of ours; choose another folder"):
        held(tmp_path, **{option: True})
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_places_that_can_be_no_folder(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(BadInput, match="is a file; name a folder"):
        held(file)
    with pytest.raises(BadInput, match="file/below: cannot be written"):
        held(file / "below")
    with pytest.raises(BadInput, match="cannot be written"):
        held(Path("/proc/nowhere/run"))


def owner(**changes):
    mine = Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19]
    return json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "started": mine, **changes})


@pytest.mark.parametrize("option", ["resume", "overwrite"])
@pytest.mark.parametrize("who", [{}, {"host": "elsewhere", "pid": 1}])
def test_a_live_owner_is_respected(option, who, run):
    (run / "lock").write_text(owner(**who))
    with pytest.raises(BadInput, match=rf"^{run}: in use by process {who.get('pid', os.getpid())} on "):
        held(run, **{option: True})
    assert (run / "lock").exists() and (run / "kept.txt").exists()


@pytest.mark.parametrize("who", [{"pid": 2**22 + 1}, {"started": "1"}])
def test_a_dead_owner_is_succeeded(who, run):
    """No such process, or another one that was given its number since."""
    (run / "lock").write_text(owner(**who))
    held(run, resume=True)
    assert not (run / "lock").exists()


def test_two_at_once(tmp_path):
    with run_folder(tmp_path / "run", resume=False, overwrite=False):
        with pytest.raises(BadInput, match="in use by process"):
            held(tmp_path / "run", resume=True)
        assert (tmp_path / "run" / "lock").exists()
    assert not (tmp_path / "run" / "lock").exists()


# Processes


STEPS = 10
CHANGES = [f"start.steps={STEPS}", f"arms.sft.steps={STEPS // 2}", "checkpoint.every=1", "log.tensorboard=false"]


def command(folder: Path, *more: str) -> subprocess.Popen:
    words = [sys.executable, "-m", "aif.cli", "run", "configs/tiny.yaml", *CHANGES, "--out", str(folder), *more]
    return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def text_of(file: Path) -> str:
    try:
        return file.read_text()
    except FileNotFoundError:
        return ""


def wait_for_lines(file: Path, lines: int, process: subprocess.Popen):
    while text_of(file).count("\n") < lines:
        if process.poll() is not None:
            raise AssertionError(process.communicate()[1])
        time.sleep(0.005)


def test_killed_and_stopped_runs_end_as_the_uninterrupted_one(tmp_path):
    """SIGKILL at a random moment of the shared stage, SIGTERM in the arm's own; a second process is kept out."""
    chance = random.SystemRandom()
    lines, delay = chance.randrange(1, STEPS - 4), chance.uniform(0, 0.05)
    stages = tmp_path / "run" / "stages" / "seed-0"
    config = aif.load_config(ROOT / "configs" / "tiny.yaml", [*CHANGES, "checkpoint.every=99"])
    process = command(tmp_path / "run")
    wait_for_lines(stages / "start" / "metrics.jsonl", lines, process)
    time.sleep(delay)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    lock = tmp_path / "run" / "lock"
    assert lock.exists() and not (stages / "start" / "done.json").exists()

    process = command(tmp_path / "run", "--resume")
    while f'"pid": {process.pid},' not in text_of(lock):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)
    for option in ("resume", "overwrite"):
        with pytest.raises(BadInput, match=f"in use by process {process.pid} "):
            aif.fit(config, out=tmp_path / "run", **{option: True})
    wait_for_lines(stages / "sft" / "metrics.jsonl", 1, process)
    process.terminate()
    said = process.communicate()[1]
    assert process.returncode == 143, said
    assert "stopped; continue with --resume in" in said and "Traceback" not in said
    assert not lock.exists()

    resumed = aif.fit(config, out=tmp_path / "run", resume=True)
    whole = aif.fit(config, out=tmp_path / "whole")
    assert timeless(resumed.provenance["log"]) == timeless(whole.provenance["log"])
    for name in ("start", "sft"):
        mine, want = (tmp_path / place / "stages" / "seed-0" / name for place in ("run", "whole"))
        same = (mine / "trained.safetensors").read_bytes() == (want / "trained.safetensors").read_bytes()
        assert same, f"{name}: killed {delay} s after step {lines}"
        logs = [[json.loads(x) for x in (p / "metrics.jsonl").read_text().splitlines()] for p in (mine, want)]
        assert timeless(logs[0]) == timeless(logs[1]) and len(logs[0]) == (STEPS if name == "start" else STEPS // 2)
