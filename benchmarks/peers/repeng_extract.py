"""A control vector from contrast pairs by repeng, timed.

    python repeng_extract.py --model smollm2-135m --pairs pairs.json --out directions.npz

`pairs.json` lists [positive, negative] strings. Runs in an environment of its own (repeng 0.4, numpy < 2, torch,
transformers); prints one JSON line with seconds for imports, loading and extraction.
"""

import argparse
import json
import os
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("--model", "--pairs", "--out"):
        parser.add_argument(name, required=True)
    args = parser.parse_args()
    marks = [time.monotonic()]
    import numpy as np
    import torch
    import transformers
    from repeng import ControlModel, ControlVector, DatasetEntry

    torch.set_num_threads(os.cpu_count() or 1)
    marks.append(time.monotonic())
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    layers = range(1, model.config.num_hidden_layers)
    model = ControlModel(model, list(layers))
    marks.append(time.monotonic())
    with open(args.pairs) as file:
        entries = [DatasetEntry(positive, negative) for positive, negative in json.load(file)]
    vector = ControlVector.train(model, tokenizer, entries, method="pca_center")
    marks.append(time.monotonic())
    np.savez(args.out, **{str(n): v for n, v in vector.directions.items()})
    seconds = [b - a for a, b in zip(marks, marks[1:], strict=False)]
    print(json.dumps(dict(zip(("imports", "load", "extract"), seconds, strict=True))))


if __name__ == "__main__":
    main()
