"""Weights from a Hugging Face folder, checked name by name before a single number is read."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import jax
import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy, which safetensors needs)
import numpy as np
from safetensors import SafetensorError, safe_open

from aif.types import BadInput, Params

from .decoder import DecoderConfig, shapes
from .families import from_hf, hf_names

FLOATS = ("F32", "F16", "BF16")
_JSON_LIMIT = 64 << 20


class Stored(NamedTuple):
    """A tensor of a file that has not been read yet; `read` returns it in any float type."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]


def read_folder(path: str | Path) -> tuple[DecoderConfig, Params]:
    """Sizes and float32 parameters of a Hugging Face folder (one `model.safetensors`, or shards with their index).

    float16 and bfloat16 weights are widened to float32; every other type is refused.

    Raises:
      BadInput: anything missing, misnamed, misshapen, not finite or not a safetensors file; all problems in one line.
    """
    folder = Path(path)
    config = folder_config(folder)
    with ExitStack() as stack:
        tensors = folder_tensors(folder, stack)
        return config, assemble(config, hf_names(config), tensors, str(folder))


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a model folder."""
    try:
        if path.stat().st_size > _JSON_LIMIT:
            raise BadInput(
                f"{path}: {path.stat().st_size} bytes is too large for a JSON file of a model folder; check the folder"
            )
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise BadInput(
            f"{path}: cannot be read ({error.strerror}); check that this is a complete model folder"
        ) from None
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}: is not valid JSON ({str(error).splitlines()[0][:120]}); copy the file again") from None
    if not isinstance(value, dict):
        raise BadInput(f"{path}: holds a {type(value).__name__}, not an object; copy the file again")
    return value


def folder_config(folder: Path) -> DecoderConfig:
    """Sizes of the model in a Hugging Face folder."""
    if not folder.is_dir():
        raise BadInput(f"{folder}: no such folder; give a folder that holds config.json and model.safetensors")
    return from_hf(read_json(folder / "config.json"), str(folder / "config.json"))


def folder_tensors(folder: Path, stack: ExitStack) -> dict[str, Stored]:
    """Every tensor of the folder's safetensors files by name; the files stay open as long as `stack`."""
    shards, listed = _shards(folder)
    tensors: dict[str, Stored] = {}
    problems: list[str] = []
    for shard in shards:
        opened = _open(shard, stack)
        for name in opened.keys():  # noqa: SIM118  (not a dict)
            if name in tensors:
                problems.append(f"{name} is in two shards")
            part = opened.get_slice(name)
            tensors[name] = Stored(tuple(part.get_shape()), part.get_dtype(), _reader(opened, name))
    problems += [f"{name} is in the index but in no shard" for name in sorted(listed - tensors.keys())]
    if problems:
        raise refusal(str(folder), problems, "copy the folder again")
    return tensors


def _reader(opened: Any, name: str) -> Callable[[], np.ndarray]:
    return lambda: opened.get_tensor(name)


def _shards(folder: Path) -> tuple[list[Path], set[str]]:
    """Weight files of a folder, and the tensor names that its index lists (none without an index)."""
    index = folder / "model.safetensors.index.json"
    if (folder / "model.safetensors").exists():
        return [_inside(folder, "model.safetensors", folder)], set()
    if not index.exists():
        pickles = sorted(
            p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".pkl", ".ckpt", ".npz")
        )
        if pickles:
            raise BadInput(
                f"{folder}: only has {', '.join(pickles[:3])}, which can run code and is never opened; "
                "convert it to model.safetensors"
            )
        raise BadInput(f"{folder}: has no model.safetensors and no {index.name}; copy the weights into the folder")
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not where or not all(isinstance(name, str) for name in where.values()):
        raise BadInput(f"{index}: has no weight_map of tensor to file name; copy the file again")
    names = sorted(set(where.values()))
    files = [_inside(folder, name, index) for name in names]
    absent = [name for name, file in zip(names, files, strict=True) if not file.is_file()]
    if absent:
        raise refusal(str(index), [f"{name} is missing" for name in absent], "copy the missing shards into the folder")
    return files, set(where)


def _inside(folder: Path, name: str, where: Path) -> Path:
    """`folder/name`, refused when it leads out of the folder. A Hub cache keeps its files in `blobs` beside it."""
    path = folder / name
    root = folder.resolve()
    allowed = [root, root.parent.parent / "blobs"] if root.parent.name == "snapshots" else [root]
    real = path.resolve()
    out = name != path.name and (Path(name).is_absolute() or ".." in Path(name).parts)
    if out or not any(real.is_relative_to(place) for place in allowed) or not name.endswith(".safetensors"):
        raise BadInput(f"{where}: {name!r} is not a safetensors file inside the folder; use an unmodified model folder")
    return path


def _open(path: Path, stack: ExitStack) -> Any:
    """An open safetensors file; its header has been checked for truncation, holes and overlaps."""
    try:
        with path.open("rb") as file:
            start = file.read(512)
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror}); check the file's permissions") from None
    if start.startswith(b"version https://git-lfs"):
        raise BadInput(f"{path}: is a Git LFS pointer, not the weights; run `git lfs pull` in the folder")
    if start.lstrip()[:1] == b"<":
        raise BadInput(f"{path}: is a web page, not the weights; download the file itself")
    try:
        return stack.enter_context(safe_open(path, framework="numpy"))
    except (SafetensorError, OSError, ValueError) as error:
        what = " ".join(str(error).split())[:120]
        raise BadInput(f"{path}: is damaged or not a safetensors file ({what}); copy the file again") from None


def assemble(
    config: DecoderConfig, names: dict[tuple[str, ...], str], tensors: dict[str, Stored], where: str
) -> Params:
    """Float32 parameters in the layout of `decoder.shapes`, from tensors stored one a layer and `[out, in]`.

    Args:
      names: path of a leaf -> template of its stored name, as `hf_names` returns.
      tensors: what the file or folder holds.

    Raises:
      BadInput: every missing, left-over, misshapen or wrongly typed tensor at once; then every one with NaN or Inf.
    """
    wanted = _leaves(shapes(config))
    _check_tensors(config, names, wanted, tensors, where)
    _check_memory(wanted, where)
    params: Params = {}
    broken: list[str] = []
    for path, shape in wanted.items():
        leaf = np.empty(shape, np.float32)
        for slot, name in _slots(config, path, names[path], leaf):
            value = tensors[name].read()
            slot[...] = value.T if path[-1] == "w" else value
            if not np.isfinite(slot).all():
                broken.append(f"{name} has NaN or infinite values")
        node = params
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf
    if not broken and config.tied and (extra := tensors.get("lm_head.weight")) is not None:
        if not np.array_equal(extra.read().astype(np.float32), params["embed"]):
            broken.append("lm_head.weight differs from the embedding although tie_word_embeddings is true")
    if broken:
        raise refusal(where, broken, "copy the weights again, or take an earlier checkpoint")
    return params


def _leaves(tree: Params, at: tuple[str, ...] = ()) -> dict[tuple[str, ...], tuple[int, ...]]:
    """Path -> shape of every leaf of `decoder.shapes`."""
    if isinstance(tree, tuple):
        return {at: tree}
    return {path: shape for key, node in tree.items() for path, shape in _leaves(node, (*at, key)).items()}


def _slots(config: DecoderConfig, path: tuple[str, ...], template: str, leaf: np.ndarray) -> list:
    """(place in the leaf, stored name) of every tensor that makes up a leaf."""
    if path[0] != "layers":
        return [(leaf, template)]
    return [(leaf[i], template.format(i=i)) for i in range(config.layers)]


def _check_tensors(config: DecoderConfig, names: dict, wanted: dict, tensors: dict[str, Stored], where: str) -> None:
    """Compare what is stored with what the config asks for."""
    expected: dict[str, tuple[int, ...]] = {}
    for path, shape in wanted.items():
        shape = shape[1:] if path[0] == "layers" else shape
        stored = shape[::-1] if path[-1] == "w" else shape
        count = config.layers if path[0] == "layers" else 1
        expected |= {names[path].format(i=i): stored for i in range(count)}
    if config.tied:
        expected |= {"lm_head.weight": expected[names["embed",]]} if "lm_head.weight" in tensors else {}
    problems = [f"{name} is missing" for name in expected if name not in tensors]
    for name, tensor in tensors.items():
        if name not in expected:
            if not name.endswith("rotary_emb.inv_freq"):  # a constant that old checkpoints store
                problems.append(f"{name} is not part of a {config.family} model of this config")
        elif tensor.shape != expected[name]:
            problems.append(f"{name} has shape {list(tensor.shape)}, not {list(expected[name])}")
        elif tensor.dtype not in FLOATS:
            problems.append(f"{name} is stored as {tensor.dtype}, not as one of {', '.join(FLOATS)}")
    if problems:
        raise refusal(where, problems, "check that config and weights belong to the same model")


def _check_memory(wanted: dict, where: str) -> None:
    """Refuse a model whose float32 parameters exceed the machine's memory."""
    size = 4 * sum(int(np.prod(shape, dtype=np.int64)) for shape in wanted.values())
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else size
    if size > memory:
        raise BadInput(
            f"{where}: needs {size / 1e9:.1f} GB as float32, and this machine has {memory / 1e9:.1f} GB; "
            "use a larger machine or a smaller model"
        )


def refusal(where: str, problems: list[str], fix: str) -> BadInput:
    """One line that lists the first ten problems and counts the rest; names come from files, so they are cleaned."""
    shown = ["".join(c if c.isprintable() else "?" for c in problem)[:200] for problem in problems[:10]]
    more = f"; and {len(problems) - 10} more" if len(problems) > 10 else ""
    return BadInput(f"{where}: {'; '.join(shown)}{more}; {fix}")


def fingerprint(params: Params) -> str:
    """Sixteen hex digits that change with any name, shape, type or bit of the parameters.

    sha256 over each leaf's path, shape, type and CRC-32 of its bytes: it tells models apart, and is no signature.
    """
    digest = hashlib.sha256()
    for path, leaf in sorted(((jax.tree_util.keystr(p), x) for p, x in jax.tree_util.tree_leaves_with_path(params))):
        array = np.asarray(leaf)
        check = zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        digest.update(f"{path} {array.shape} {array.dtype} {check}\n".encode())
    return digest.hexdigest()[:16]
