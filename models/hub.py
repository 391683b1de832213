"""Models by name: from the catalogue, a random size, a local folder or GGUF file, or a Hugging Face Hub id."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Int

from aif.types import BadInput, Output, Params

from .catalogue import CATALOGUE, fetch
from .decoder import TARGETS, DecoderConfig, logits, shapes
from .decoder import forward as _forward
from .families import BYTE_VOCAB, SIZES, from_hf
from .gguf import gguf_config, read_gguf, read_header
from .gguf_tokenizer import fast_tokenizer, gguf_tokenizer
from .published import PUBLISHED
from .quantised import KINDS, quantised, stored
from .weights import Build, combined, folder_config, folder_tensors, marked, placed, read_folder, whole

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
        return logits(self.params, output.hidden, self.config.logit_cap)


def load(
    source: str,
    *,
    compute_dtype: Any = jnp.float32,
    chat_template: str | Path | None = None,
    put: Callable[[tuple[str, ...], Any], Any] | None = None,
) -> LM:
    """A model by its name, path or Hub id.

    Args:
      source: a catalogue name (`smollm2-135m`, fetched when absent), a random size (`tiny-random`, or with a seed
        `tiny-random:7`), a Hugging Face folder, a `.gguf` file, or a Hub id `owner/name`. With `@int8` or `@nf4` after
        it, the linear layers are kept in few bits (`quantised`), as the frozen base of adapters.
      compute_dtype: type of the matrix products; parameters stay float32.
      chat_template: file of a template that takes the place of the tokenizer's own, or of one that is missing.
      put: path and host array of a parameter -> the array on devices; the default device when left out.

    Raises:
      BadInput: no such model, or its files are damaged.
    """
    marks: dict[tuple[str, ...], str] = {}

    def keep(path: tuple[str, ...], shape: tuple[int, ...], build: Build) -> Any:
        """Onto the device at once: the host holds a piece of a leaf, or one leaf where several devices share it."""
        if put is None:
            leaf, marks[path] = placed(path, shape, build)
            return quantised(leaf, bits) if bits and frozen(path) else leaf
        leaf = whole(path, shape, build)
        marks[path] = marked(path, leaf)
        if not bits or not frozen(path):
            return put(path, leaf)
        with jax.default_device(jax.local_devices(backend="cpu")[0]):  # no one device has room for all of it
            few = quantised(jnp.asarray(leaf), bits)
        return stored(few, lambda name, x, put=put: put((*path, name), np.asarray(x)))

    plain, bits = _stored_as(source)
    name, _, seed = plain.partition(":")
    if name in SIZES:
        if seed and not re.fullmatch(r"\d{1,9}", seed):
            raise BadInput(f"{source}: {seed!r} is not a seed; write {name}:0 with a number of up to nine digits")
        from .module import random_params

        config, tokenizer = SIZES[name], byte_tokenizer()
        drawn = random_params(config, int(seed or 0))
        names = lambda path: tuple(entry.key for entry in path)  # noqa: E731
        params = jax.tree_util.tree_map_with_path(
            lambda path, x: keep(names(path), x.shape, np.asarray(x).__getitem__), drawn
        )
    else:
        path = _locate(plain)
        if path.is_dir():
            with ThreadPoolExecutor(1) as beside:  # transformers is imported meanwhile
                reading = beside.submit(folder_tokenizer, path, folder_config(path))
                config, params = read_folder(path, keep)
            tokenizer = reading.result()
        else:
            config, params, tokenizer = read_gguf(path, keep)
    if chat_template is not None:
        tokenizer.chat_template = _template(Path(chat_template))
    if bits:
        marks["bits",] = bits
    return LM(config, params, tokenizer, source, combined(marks), compute_dtype)


def frozen(path: tuple[str, ...]) -> bool:
    """Whether few bits are meant for the parameter with this path: the weights of linear layers."""
    return path[-1] == "w" and path[-2] in TARGETS


def _stored_as(source: str) -> tuple[str, str]:
    """A source without the name of the few bits that its weights are to be kept in, and that name, or nothing."""
    plain, at, bits = source.rpartition("@")
    return (plain, bits) if at and bits in KINDS else (source, "")


def _template(path: Path) -> str:
    """A chat template from its file; it is rendered in a child process with limits, wherever it came from."""
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: cannot be read ({error}); give a file with a jinja template") from None


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

    Its own end token is the one that counts, whatever `config.json` says; a pad token is never asked for.

    Raises:
      BadInput: no `tokenizer.json`, a damaged one, no end token, or more tokens than the model has embeddings.
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
    if tokenizer.eos_token_id is None:
        raise BadInput(f"{folder}: its tokenizer names no end token; give `eos_token` in tokenizer_config.json")
    return tokenizer


def weightless(source: str) -> tuple[DecoderConfig, Any, Params]:
    """The sizes of a model, its tokenizer, and its parameters as shapes with types, in few bits where it says so."""
    plain, bits = _stored_as(source)
    config, tokenizer = sizes(plain)
    floats = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), shapes(config), is_leaf=lambda x: isinstance(x, tuple)
    )

    def one(path: tuple, x: Any) -> Any:
        few = bits and frozen(tuple(entry.key for entry in path))
        return jax.eval_shape(partial(quantised, kind=bits), x) if few else x

    return config, tokenizer, jax.tree_util.tree_map_with_path(one, floats)


def sizes(source: str) -> tuple[DecoderConfig, Any]:
    """The sizes of a model and its tokenizer, without weights. For a published model that is not here, its sizes are
    known and a tokenizer of bytes stands in: it makes more tokens of a text, never fewer."""
    name = source.partition(":")[0]
    if name in SIZES:
        return SIZES[name], byte_tokenizer()
    if source in PUBLISHED and not Path(source).is_dir():
        return from_hf(PUBLISHED[source], source), byte_tokenizer()
    path = _locate(source, weights=False)
    if path.is_dir():
        config = folder_config(path)
        return config, folder_tokenizer(path, config)
    header = read_header(path)
    config = gguf_config(header, path)
    return config, gguf_tokenizer(header.fields, config, path)


def inspect(source: str) -> dict[str, Any]:
    """Facts about a model, read from headers alone: no weights are loaded, and from the Hub none are downloaded."""
    facts: dict[str, Any] = {"source": source}
    source = _stored_as(source)[0]
    name = source.partition(":")[0]
    tensors: dict[str, Any] = {}
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
            tokenizer = gguf_tokenizer(header.fields, config, path)
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
