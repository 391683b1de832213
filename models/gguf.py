"""Weights from a GGUF file, the one-file format of llama.cpp.

The header is parsed here, with every count and length bounded by the bytes that remain, because the `gguf` package
trusts them: it only dequantises.
"""

from __future__ import annotations

import mmap
import struct
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np

from aif.types import BadInput, Params

from .decoder import DecoderConfig
from .families import from_hf
from .gguf_tokenizer import gguf_tokenizer
from .names import gguf_names
from .weights import Keep, Stored, assemble, whole

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _ARRAY = 8, 9
_MOST_ENTRIES = 1 << 22  # of all arrays together; the largest published vocabularies need a quarter

_SIZES = {  # GGUF key without its architecture -> config.json key
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "feed_forward_length": "intermediate_size",
    "context_length": "max_position_embeddings",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
}
_SWITCHES = {  # the same for keys that only some architectures have
    "rope.freq_base": "rope_theta",
    "rope.freq_base_swa": "rope_local_base_freq",
    "attention.sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma2": "gemma2", "gemma3": "gemma3_text"}


_PLAIN = {"F32": np.float32, "F16": np.float16, "F64": np.float64}


class Tensor(NamedTuple):
    """Where a tensor lies in the file; `shape` is in row-major order, so a matrix is `[out, in]`."""

    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    start: int
    size: int


class Header(NamedTuple):
    """What a GGUF file says before its data."""

    fields: dict[str, Any]
    tensors: dict[str, Tensor]


def read_gguf(path: str | Path, keep: Keep = whole) -> tuple[DecoderConfig, Params, Any]:
    """Sizes, float32 parameters and tokenizer of a GGUF file.

    Raises:
      BadInput: the file is damaged, or holds a model or tokenizer that is not supported.
    """
    header = read_header(path)
    config = gguf_config(header, path)
    with ThreadPoolExecutor(1) as beside, open(path, "rb") as file:
        # transformers is imported while the weights are read
        tokenizer = beside.submit(gguf_tokenizer, header.fields, config, path)
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            params = assemble(config, gguf_names(config), _stored(config, header, data, path), str(path), keep)
    return config, params, tokenizer.result()


class _Cursor:
    """Reads little-endian values from a buffer and refuses to pass its end."""

    def __init__(self, data: mmap.mmap, where: str):
        self.data, self.where, self.at, self.entries = data, where, 0, 0

    def bad(self, what: str) -> BadInput:
        return BadInput(f"{self.where}: {what}; the file is damaged: copy or download it again")

    def need(self, count: int, what: str) -> None:
        if count > len(self.data) - self.at:
            raise self.bad(f"{what} needs {count} bytes at {self.at}, and {len(self.data) - self.at} are left")

    def number(self, code: str) -> Any:
        size = struct.calcsize("<" + code)
        self.need(size, "a number")
        (value,) = struct.unpack_from("<" + code, self.data, self.at)
        self.at += size
        return float(str(np.float32(value))) if code == "f" else value  # 1e-05, not 9.999999747378752e-06

    def text(self) -> str:
        length = self.number("Q")
        self.need(length, "a text")
        raw = self.data[self.at : self.at + length]
        self.at += length
        try:
            return raw.decode()
        except UnicodeDecodeError:
            raise self.bad(f"the text at {self.at - length} is not UTF-8") from None

    def value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self.number(_SCALARS[kind])
        if kind == _TEXT:
            return self.text()
        if kind != _ARRAY:
            raise self.bad(f"value type {kind} at {self.at} is unknown")
        inner, count = self.number("I"), self.number("Q")
        self.entries += count
        if inner not in _SCALARS and inner != _TEXT:
            raise self.bad(f"array of type {inner} at {self.at} is not supported")
        size = 8 if inner == _TEXT else struct.calcsize("<" + _SCALARS[inner])
        self.need(count * size, f"an array of {count} values")
        if self.entries > _MOST_ENTRIES:
            raise self.bad(f"its arrays hold more than {_MOST_ENTRIES} values")
        if inner == _TEXT:
            return [self.text() for _ in range(count)]
        values = struct.unpack_from(f"<{count}{_SCALARS[inner]}", self.data, self.at)
        self.at += count * size
        return list(values)


def read_header(path: str | Path) -> Header:
    """Metadata and tensor list of a GGUF file (version 2 or 3, little-endian), every offset checked.

    Raises:
      BadInput: bad magic or version, a count or length beyond the end of the file, overlapping or unknown tensors.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            start = file.read(8)
            if start[:4] != b"GGUF":
                lfs = start.startswith(b"version ")
                raise BadInput(
                    f"{path}: is {'a Git LFS pointer' if lfs else 'not a GGUF file (bad magic)'}; "
                    f"{'run `git lfs pull`' if lfs else 'give a .gguf file'}"
                )
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _parse(_Cursor(data, str(path)))
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror}); check the path") from None


def _parse(cursor: _Cursor) -> Header:
    cursor.at = 4
    version = cursor.number("I")
    if version not in (2, 3):
        raise BadInput(f"{cursor.where}: GGUF version {version} is not supported; convert it to version 3")
    count, keys = cursor.number("Q"), cursor.number("Q")
    cursor.need(24 * count + 13 * keys, f"a header of {count} tensors and {keys} keys")
    fields: dict[str, Any] = {}
    for _ in range(keys):
        key = cursor.text()
        if key in fields:
            raise cursor.bad(f"key {key[:80]!r} appears twice")
        fields[key] = cursor.value(cursor.number("I"))
    listed = [_tensor_entry(cursor) for _ in range(count)]
    alignment = fields.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 8 or alignment & (alignment - 1):
        raise cursor.bad(f"general.alignment {alignment!r} is not a power of two of at least 8")
    base = -(-cursor.at // alignment) * alignment
    tensors: dict[str, Tensor] = {}
    for name, tensor in listed:
        if name in tensors:
            raise cursor.bad(f"tensor {name[:80]!r} appears twice")
        if tensor.start % alignment or base + tensor.start + tensor.size > len(cursor.data):
            raise cursor.bad(f"tensor {name[:80]!r} does not lie inside the file")
        tensors[name] = tensor._replace(start=base + tensor.start)
    end = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].start):
        if tensor.start < end:
            raise cursor.bad(f"tensor {name[:80]!r} overlaps another")
        end = tensor.start + tensor.size
    return Header(fields, tensors)


def _tensor_entry(cursor: _Cursor) -> tuple[str, Tensor]:
    """One line of the tensor list; `start` is still relative to the data section."""
    name, rank = cursor.text(), cursor.number("I")
    if not 1 <= rank <= 4:
        raise cursor.bad(f"tensor {name[:80]!r} has {rank} dimensions")
    shape = tuple(cursor.number("Q") for _ in range(rank))[::-1]
    kind, start = cursor.number("I"), cursor.number("Q")
    try:
        kind = gguf.GGMLQuantizationType(kind)
    except ValueError:
        raise BadInput(f"{cursor.where}: tensor {name[:80]!r} has unknown type {kind}; convert it to Q8_0") from None
    block, size = gguf.GGML_QUANT_SIZES[kind]
    count = 1
    for side in shape:
        count *= side
    if count == 0 or shape[-1] % block or count // block * size > len(cursor.data):
        raise cursor.bad(f"tensor {name[:80]!r} has impossible shape {list(shape)} for type {kind.name}")
    return name, Tensor(shape, kind, start, count // block * size)


def gguf_config(header: Header, path: str | Path) -> DecoderConfig:
    """Sizes of the model, through the same checks as a `config.json`."""
    fields = header.fields
    family = str(fields.get("general.architecture"))[:80]
    if family not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise BadInput(f"{path}: architecture {family!r} is not supported; use a GGUF of one of {known}")
    own = {key[len(family) + 1 :]: value for key, value in fields.items() if key.startswith(family + ".")}
    missing = [f"{family}.{key}" for key in _SIZES if key not in own and key != "attention.head_count_kv"]
    if missing:
        raise BadInput(f"{path}: lacks {', '.join(missing)}; convert the model again")
    if own.get("expert_count"):
        raise BadInput(f"{path}: is a mixture of experts, which is not supported; load its Hugging Face folder")
    embed = header.tensors.get("token_embd.weight")
    config: dict[str, Any] = {hf: own[key] for key, hf in {**_SIZES, **_SWITCHES}.items() if key in own}
    config |= {
        "model_type": ARCHITECTURES[family],
        "vocab_size": embed.shape[0] if embed else own.get("vocab_size"),
        "head_dim": own.get("attention.key_length"),
        "tie_word_embeddings": "output.weight" not in header.tensors,
    }
    if family.startswith("gemma"):
        config["query_pre_attn_scalar"] = _query_scalar(family, config)
    kind = own.get("rope.scaling.type", "none")  # scaling by a table is stored as the tensor rope_freqs
    if kind != "none":
        config["rope_scaling"] = {"rope_type": kind, "factor": own.get("rope.scaling.factor")}
    parsed = from_hf(config, str(path))
    turned = own.get("rope.dimension_count", parsed.head_dim)
    if turned != parsed.head_dim or "rope_freqs.weight" in header.tensors:
        raise BadInput(
            f"{path}: its rotary embedding (partial or with rope_freqs) is not supported; "
            "load the Hugging Face folder of the model instead"
        )
    return parsed


def _query_scalar(family: str, config: dict[str, Any]) -> Any:
    """Gemma's attention scale is not in the file: 1 / sqrt(head_dim), but width / heads for the 27B models."""
    largest = config["num_hidden_layers"] == {"gemma2": 46, "gemma3": 62}[family]
    width, heads = config["hidden_size"], config["num_attention_heads"]
    return width // heads if largest and type(heads) is int and heads > 0 else config["head_dim"]


def _stored(config: DecoderConfig, header: Header, data: mmap.mmap, path: str | Path) -> dict[str, Stored]:
    """Tensors that dequantise when read. llama.cpp reorders the rows of llama's q and k for its rotary layout."""

    def reader(name: str, tensor: Tensor) -> Any:
        heads = {"attn_q": config.heads, "attn_k": config.kv_heads}.get(f".{name}".split(".")[-2])
        turned = heads if config.family == "llama" else None
        everything = slice(0, tensor.shape[0])

        def read(index: tuple[slice, ...]) -> np.ndarray:
            if not turned and len(tensor.shape) > 1:
                return _dequantised(data, tensor, index[0], f"{path}: {name}")[(slice(None), *index[1:])]
            value = _dequantised(data, tensor, everything, f"{path}: {name}")
            if turned:
                pairs = value.reshape(turned, config.head_dim // 2, 2, *tensor.shape[1:])
                value = pairs.swapaxes(1, 2).reshape(tensor.shape)
            return value[index]

        return read

    integers = ("I8", "I16", "I32", "I64")
    return {
        name: Stored(tensor.shape, tensor.kind.name if tensor.kind.name in integers else "F32", reader(name, tensor))
        for name, tensor in header.tensors.items()
    }


def _dequantised(data: mmap.mmap, tensor: Tensor, rows: slice, where: str) -> np.ndarray:
    """Some rows of a tensor (all of one with a single axis), as floats. The package wants plain floats typed, and the
    rest as rows of bytes."""
    shape = (rows.stop - rows.start, *tensor.shape[1:])
    count = shape[0] if tensor.shape[1:] else 1  # of rows
    wide, plain = tensor.size // (tensor.shape[0] if tensor.shape[1:] else 1), _PLAIN.get(tensor.kind.name)
    first = tensor.start + rows.start * wide
    raw = np.frombuffer(data[first : first + count * wide], np.uint8)
    raw = raw.view(plain) if plain else raw.reshape(count, -1)
    try:
        with np.errstate(all="ignore"):  # values that are not finite are reported with the tensor's name
            return gguf.quants.dequantize(raw, tensor.kind).reshape(shape)
    except NotImplementedError:
        raise BadInput(f"{where} has type {tensor.kind.name}, which is not supported; convert to Q8_0") from None
