"""What the probe bank reads from the bundled corpus: accuracy with intervals, kappa, calibration, layer, time.

python benchmarks/probes.py [configs/online.yaml]
"""

from __future__ import annotations

import sys
import time

import numpy as np

from aif.api import load_config
from aif.directions.probes import fit_bank
from aif.experiment import Experiment


def main() -> None:
    experiment = Experiment(load_config(sys.argv[1] if len(sys.argv) > 1 else "configs/online.yaml"))
    began = time.monotonic()
    data = experiment.rated(experiment.base)
    seen = time.monotonic()
    names = [d.id for d in experiment.scale.dimensions]
    bank = fit_bank(data, names, len(experiment.scale.levels))
    done = time.monotonic()
    n, prompts = len(data.levels), len(np.unique(data.prompts))
    first = bank.report[0]
    print(
        f"{n} responses to {prompts} prompts; layer {bank.layer}, penalty {first['penalty']:g}; {bank.weights.shape[0]}"
    )
    print(f"members; activations {seen - began:.1f} s, fitting {done - seen:.1f} s\n")
    print("| dimension | accuracy | shuffled labels | majority | quadratic kappa | calibration error |")
    print("|---|---|---|---|---|---|")
    for line in bank.report:
        half = 1.96 * np.sqrt(line["accuracy"] * (1 - line["accuracy"]) / prompts)  # a prompt's answers count as one
        kappa = "-" if line["kappa"] is None else f"{line['kappa']:.2f}"
        print(
            f"| {line['dimension']} | {line['accuracy']:.2f} ± {half:.2f} | {line['shuffled']:.2f} "
            f"| {line['majority']:.2f} | {kappa} | {line['ece']:.2f} |"
        )


if __name__ == "__main__":
    main()
