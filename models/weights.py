"""Weights from a Hugging Face folder, checked name by name before a single number is read."""

from __future__ import annotations

import hashlib
import json
import os
import zlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes  # noqa: F401  (registers bfloat16 with numpy, which safetensors needs)
import numpy as np
from safetensors import SafetensorError, safe_open

from aif.types import BadInput, Params

from .decoder import DecoderConfig, shapes
from .families import from_hf
from .names import Path as LeafPath
from .names import Place, hf_names

FLOATS = ("F32", "F16", "BF16")
_JSON_LIMIT = 64 << 20
BLOCK = 1 << 22  # numbers that are read from a tensor at a time
ALIGNED = 64  # bytes at whose multiples XLA's buffers start on CPU
PIECE = 64 << 20  # bytes of a leaf on their way to the device, or one slice of its first axis; the host holds two


class Stored(NamedTuple):
    """A tensor of a file that has not been read yet; `read` returns a part of it in any float type."""

    shape: tuple[int, ...]
    dtype: str
    read: Callable[[tuple[slice, ...]], np.ndarray]


Build = Callable[[tuple[slice, ...]], np.ndarray]  # part of a leaf -> its float32 values, read from the file
Keep = Callable[[LeafPath, tuple[int, ...], Build], Any]  # path, shape, build -> what stands in the parameters


def whole(path: LeafPath, shape: tuple[int, ...], build: Build) -> np.ndarray:
    """Keeps a leaf as one array in the host's memory."""
    return build(tuple(slice(None) for _ in shape))


def placed(path: LeafPath, shape: tuple[int, ...], build: Build) -> tuple[jax.Array, str]:
    """A leaf on the default device, which it reaches piece by piece unless it lies there already, and its mark (see
    `marked`)."""
    rows = max(1, PIECE // (4 * prod(shape[1:])))
    if rows >= shape[0] or in_place():
        leaf = whole(path, shape, build)
        return jax.device_put(leaf), marked(path, leaf)
    held, check = jnp.zeros(shape, jnp.float32), 0
    for start in range(0, shape[0], rows):
        piece = build((slice(start, start + rows), *(slice(None) for _ in shape[1:])))
        check = zlib.crc32(piece.reshape(-1).view(np.uint8).data, check)
        held = _put(held, piece, start).block_until_ready()
    return held, _mark(path, held, check)


def in_place() -> bool:
    """Whether the default device takes aligned numpy memory as its own."""
    return jax.default_backend() == "cpu"


def _aligned(shape: Sequence[int]) -> np.ndarray:
    """An empty float32 array that starts where a device of the host would have it start."""
    size = 4 * prod(shape)
    raw = np.empty(size + ALIGNED, np.uint8)
    start = -raw.ctypes.data % ALIGNED
    return raw[start : start + size].view(np.float32).reshape(shape)


@partial(jax.jit, donate_argnums=0)
def _put(held: jax.Array, piece: jax.Array, start: int) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(held, piece, start, axis=0)


def read_folder(path: str | Path, keep: Keep = whole) -> tuple[DecoderConfig, Params]:
    """Sizes and float32 parameters of a Hugging Face folder (one `model.safetensors`, or shards with their index).

    float16 and bfloat16 weights are widened to float32; every other type is refused.

    Raises:
      BadInput: anything missing, misnamed, misshapen, not finite or not a safetensors file; all problems in one line.
    """
    folder = Path(path)
    config = folder_config(folder)
    with ExitStack() as stack:
        tensors = folder_tensors(folder, stack)
        return config, assemble(config, hf_names(config), tensors, str(folder), keep)


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


def _reader(opened: Any, name: str) -> Callable[[tuple[slice, ...]], np.ndarray]:
    return lambda index: opened.get_slice(name)[index]


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
    config: DecoderConfig, names: dict[LeafPath, Place], tensors: dict[str, Stored], where: str, keep: Keep = whole
) -> Params:
    """Float32 parameters in the layout of `decoder.shapes`, from tensors stored one a layer and `[out, in]`.

    Leaves are built one after the other, so the host never holds more than one (with `placed`, a piece of one) beside
    what `keep` holds.

    Args:
      names: path of a leaf -> its place, as `hf_names` returns.
      tensors: what the file or folder holds.
      keep: what to make of a leaf: an array in memory, one on a device, or one of which every device reads its part.

    Raises:
      BadInput: every missing, left-over, misshapen or wrongly typed tensor at once; then every one with NaN or Inf.
    """
    wanted = _leaves(shapes(config))
    _check_tensors(config, names, wanted, tensors, where)
    _check_memory(wanted, where)
    params: Params = {}
    broken: list[str] = []
    for path, shape in wanted.items():
        node = params
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = keep(path, shape, partial(_build, path, shape, names[path], tensors, broken))
    if not broken and config.tied and (extra := tensors.get("lm_head.weight")) is not None:
        embed, step = tensors[names["embed",].name], max(1, BLOCK // config.width)
        blocks = [
            (slice(start, min(start + step, config.vocab)), slice(None)) for start in range(0, config.vocab, step)
        ]
        if not all(np.array_equal(extra.read(block), embed.read(block)) for block in blocks):
            broken.append("lm_head.weight differs from the embedding although tie_word_embeddings is true")
    if broken:
        raise refusal(where, broken, "copy the weights again, or take an earlier checkpoint")
    return params


def _leaves(tree: Params, at: LeafPath = ()) -> dict[LeafPath, tuple[int, ...]]:
    """Path -> shape of every leaf of `decoder.shapes`."""
    if isinstance(tree, tuple):
        return {at: tree}
    return {path: shape for key, node in tree.items() for path, shape in _leaves(node, (*at, key)).items()}


def tensors_of(path: LeafPath, shape: tuple[int, ...], place: Place) -> list[tuple[tuple[int, ...], str]]:
    """(position in the leaf, stored name) of every tensor that a leaf is stacked from."""
    deep = (path[0] == "layers") + ("{e}" in place.name)
    return [(at, place.name.format(**dict(zip("ie", at, strict=False)))) for at in np.ndindex(*shape[:deep])]


def _build(
    path: LeafPath, shape: tuple[int, ...], place: Place, tensors: dict, broken: list[str], index: tuple[slice, ...]
) -> np.ndarray:
    """The part `index` of a leaf; tensors that are not finite are put on the list of broken ones."""
    spans = [range(*cut.indices(side)) for cut, side in zip(index, shape, strict=True)]
    out = _aligned([len(span) for span in spans])
    for at, name in tensors_of(path, shape, place):
        deep = len(at)
        if not all(k in span for k, span in zip(at, spans, strict=False)):
            continue
        inner = [slice(span.start, span.stop) for span in spans[deep:]]
        if path[-1] == "w":
            inner = inner[::-1]
        if place.rows is not None:
            inner[0] = slice(inner[0].start + place.rows[0], inner[0].stop + place.rows[0])
        slot = out[tuple(k - span.start for k, span in zip(at, spans, strict=False))]
        slot = slot.T if path[-1] == "w" else slot  # as it is stored: a view, so that writing fills the leaf
        first, step = inner[0].start, max(1, BLOCK * len(slot) // max(1, slot.size))
        for start in range(first, inner[0].stop, step):
            rows = slice(start, min(start + step, inner[0].stop))
            block = tensors[name].read((rows, *inner[1:])).astype(np.float32, copy=False)
            slot[start - first : rows.stop - first] = block + np.float32(place.shift) if place.shift else block
            if not np.isfinite(block).all():
                problem = f"{name} has NaN or infinite values"
                broken += [problem] if problem not in broken else []
    return out


def _check_tensors(
    config: DecoderConfig, names: dict[LeafPath, Place], wanted: dict, tensors: dict[str, Stored], where: str
) -> None:
    """Compare what is stored with what the config asks for."""
    expected: dict[str, tuple[int, ...]] = {}
    for path, shape in wanted.items():
        place = names[path]
        for at, name in tensors_of(path, shape, place):
            own = shape[len(at) :][::-1] if path[-1] == "w" else shape[len(at) :]
            rows = own[0] if place.rows is None else max(place.rows[1], expected.get(name, (0,))[0])
            expected[name] = (rows, *own[1:])
    if config.tied:
        expected |= {"lm_head.weight": expected[names["embed",].name]} if "lm_head.weight" in tensors else {}
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


def marked(path: LeafPath, leaf: Any) -> str:
    """A line with a leaf's path, shape, type and the CRC-32 of its bytes."""
    array = np.asarray(leaf)
    return _mark(path, array, zlib.crc32(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data))


def _mark(path: LeafPath, leaf: Any, check: int) -> str:
    return f"{''.join(f'[{key!r}]' for key in path)} {leaf.shape} {leaf.dtype} {check}\n"


def combined(marks: dict[LeafPath, str]) -> str:
    """The fingerprint of parameters whose leaves have been marked one by one; empty without any."""
    return hashlib.sha256("".join(sorted(marks.values())).encode()).hexdigest()[:16] if marks else ""


def fingerprint(params: Params) -> str:
    """Sixteen hex digits that change with any name, shape, type or bit of the parameters.

    sha256 over a line a leaf, sorted: it tells models apart, and is no signature.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    paths = [tuple(entry.key for entry in path) for path, _ in leaves]
    return combined({path: marked(path, leaf) for path, (_, leaf) in zip(paths, leaves, strict=True)})
