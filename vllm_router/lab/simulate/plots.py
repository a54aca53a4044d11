"""Results as pictures, where matplotlib is installed (the extra `sim`)."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vllm_router.lab.simulate.report import Cell

MISSING = (
    f"--plot needs matplotlib, which is not installed: {sys.executable} -m pip install matplotlib"
)

_SHOWN = (
    ("first_p99", "p99 time to first token (s)", True),
    ("first_p50", "median time to first token (s)", True),
    ("token_p99", "p99 time per output token (s)", True),
    ("goodput", "goodput", False),
    ("hit_rate", "prefix hit rate", False),
    ("balance", "busiest server / mean", False),
)


def available() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def draw(cells: Sequence[Cell], folder: Path) -> list[Path]:
    """One picture per workload, as PNG and as SVG; returns the files written."""
    mpl: Any = importlib.import_module("matplotlib")

    # Text stays text, without timestamps: files are small and change only with the results.
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "vllm-router"})
    # Figures without pyplot, which would choose a backend for windows and keep every figure.
    figures: Any = importlib.import_module("matplotlib.figure")

    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for workload in dict.fromkeys(cell.workload for cell in cells):
        of_it = [cell for cell in cells if cell.workload == workload]
        figure = figures.Figure(figsize=(12, 6.5))
        axes = figure.subplots(2, 3)
        for axis, (field, title, logarithmic) in zip(axes.flat, _SHOWN, strict=True):
            _panel(axis, of_it, field, title, logarithmic=logarithmic)
        handles, labels = axes.flat[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="lower center", ncols=7, fontsize="small")
        figure.suptitle(workload)
        figure.tight_layout(rect=(0, 0.06, 1, 1))
        for kind, nothing in (("png", "Software"), ("svg", "Date")):
            path = folder / f"{workload}.{kind}"
            figure.savefig(path, metadata={nothing: None}, dpi=80)
            written.append(path)
    return written


def _panel(axis: Any, cells: Sequence[Cell], field: str, title: str, *, logarithmic: bool) -> None:
    """A line per policy over the load; a bar per policy where there is but one load."""
    policies = list(dict.fromkeys(cell.policy for cell in cells))
    figures: dict[tuple[str, float], list[float]] = {}
    for cell in cells:
        figures.setdefault((cell.policy, cell.load), []).append(getattr(cell.figures, field))
    means = {point: sum(found) / len(found) for point, found in figures.items()}
    loads = sorted({cell.load for cell in cells})
    axis.set_title(title, fontsize="medium")
    if len(loads) == 1:
        for place, policy in enumerate(policies):
            bar = axis.barh(place, means[policy, loads[0]], color=f"C{place % 10}", label=policy)
            axis.bar_label(bar, fmt="%.3g", padding=3, fontsize="small")
        axis.set_yticks([])
        axis.invert_yaxis()
        axis.margins(x=0.18)
        axis.grid(axis="x", alpha=0.3)
        return
    for policy in policies:
        known = [load for load in loads if (policy, load) in means]
        axis.plot(
            [100 * load for load in known], [means[policy, load] for load in known], marker="o",
            label=policy, linewidth=2.5 if policy == "adaptive" else 1.0, markersize=4,
        )  # fmt: skip
    axis.set_xlabel("load (% of capacity)")
    if logarithmic:
        axis.set_yscale("log")
    axis.grid(alpha=0.3)
