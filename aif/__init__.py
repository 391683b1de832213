"""aif: active-inference fine-tuning in JAX.

Names are imported on first use, so that `import aif` and `aif --help` cost nothing.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING

from aif.lazily import lazily

try:
    __version__ = version("aif")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0"

_WHERE = {
    "BadInput": "aif.errors",
    "Batch": "aif.types",
    "Direction": "aif.types",
    "Edits": "aif.types",
    "LM": "aif.models.hub",
    "Loss": "aif.types",
    "Mean": "aif.types",
    "Objective": "aif.objectives",
    "Policy": "aif.policy",
    "Results": "aif.results",
    "Solution": "aif.types",
    "bind": "aif.policy",
    "compare": "aif.api",
    "fit": "aif.api",
    "generate": "aif.api",
    "load": "aif.models.hub",
    "load_config": "aif.api",
    "reach": "aif.steering",
    "response_logprobs": "aif.objectives.logprobs",
    "score": "aif.api",
    "token_logprobs": "aif.objectives.logprobs",
}

if TYPE_CHECKING:
    from aif.api import compare, fit, generate, load_config, score
    from aif.errors import BadInput
    from aif.models.hub import LM, load
    from aif.objectives import Objective
    from aif.objectives.logprobs import response_logprobs, token_logprobs
    from aif.policy import Policy, bind
    from aif.results import Results
    from aif.steering import reach
    from aif.types import Batch, Direction, Edits, Loss, Mean, Solution


__getattr__ = lazily(__name__, _WHERE)


def __dir__() -> list[str]:
    return sorted([*globals(), *_WHERE])


__all__ = [
    "LM",
    "BadInput",
    "Batch",
    "Direction",
    "Edits",
    "Loss",
    "Mean",
    "Objective",
    "Policy",
    "Results",
    "Solution",
    "bind",
    "compare",
    "fit",
    "generate",
    "load",
    "load_config",
    "reach",
    "response_logprobs",
    "score",
    "token_logprobs",
]
