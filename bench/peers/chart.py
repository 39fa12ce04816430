"""Draws the report of the bench as a PNG. It needs matplotlib, and nothing else of the bench.

python chart.py peers.json peers.png
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

OURS, OTHERS, CEILING = "#1b6ca8", "#9aa5b1", "#c0562f"


def main(report: Path, chart: Path) -> None:
    """One panel for each workload, format and concurrency: the median rates of the servers."""
    content = json.loads(report.read_text())
    samples = [sample for sample in content["samples"] if not sample["error"]]
    ceilings = {
        workload: statistics.median(
            sample["per_s"]
            for sample in samples
            if sample["workload"] == workload and sample["peer"] == "ceiling"
        )
        for workload in content["workloads"]
    }
    panels = list(dict.fromkeys((sample["workload"], sample["format"]) for sample in samples))
    panels = [(workload, form) for workload, form in panels if form != "-"]  # not the ceiling
    loads = content["plan"]["concurrency"]
    figure, grid = plt.subplots(
        len(panels),
        len(loads),
        figsize=(4.2 * len(loads), 0.8 + 3.2 * len(panels)),
        squeeze=False,
        layout="constrained",
    )
    for axes_row, (workload, form) in zip(grid, panels, strict=True):
        for axes, connections in zip(axes_row, loads, strict=True):
            names, rates = [], []
            for name in content["titles"]:
                values = [
                    sample["per_s"]
                    for sample in samples
                    if (sample["peer"], sample["workload"], sample["format"])
                    == (name, workload, form)
                    and sample["connections"] == connections
                ]
                if values:
                    names.append(name)
                    rates.append(statistics.median(values))
            titles = [content["titles"][name] for name in names]
            colours = [OURS if name == "evalmode" else OTHERS for name in names]
            bars = axes.barh(titles, rates, color=colours)
            axes.bar_label(bars, fmt="{:,.0f}", padding=2, fontsize=8)
            axes.axvline(ceilings[workload], color=CEILING, linestyle="--", linewidth=1)
            axes.invert_yaxis()
            axes.margins(x=0.15)
            axes.tick_params(labelsize=8)
            axes.spines[["top", "right"]].set_visible(False)
            plural = "s" if connections > 1 else ""
            axes.set_title(f"{workload}, {form}, {connections} connection{plural}", fontsize=9)
    figure.supxlabel("requests/s; dashed: ONNX Runtime alone, without HTTP", fontsize=9)
    figure.savefig(chart, dpi=150)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
