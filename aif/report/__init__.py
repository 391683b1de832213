"""The report: one self-contained HTML page made from `results.json` and nothing else."""

from aif.report.html import render

__all__ = ["render"]
