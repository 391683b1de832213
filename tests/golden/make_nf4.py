"""Write nf4.npz: weights and what bitsandbytes makes of them in NF4, 64 numbers of an output's row sharing a scale.

.venv-torch/bin/pip install bitsandbytes && .venv-torch/bin/python tests/golden/make_nf4.py
"""

from __future__ import annotations

from pathlib import Path

import bitsandbytes
import bitsandbytes.functional as functional
import numpy as np
import torch


def main() -> None:
    weights = torch.from_numpy(np.random.default_rng(0).standard_t(4, (24, 128)).astype(np.float32))  # [out, in]
    codes, state = functional.quantize_4bit(weights, blocksize=64, quant_type="nf4", compress_statistics=False)
    again = functional.dequantize_4bit(codes, state)
    versions = {"bitsandbytes": bitsandbytes.__version__, "torch": torch.__version__}
    np.savez(Path(__file__).parent / "nf4.npz", weights=weights.numpy(), again=again.numpy(), **versions)


if __name__ == "__main__":
    main()
