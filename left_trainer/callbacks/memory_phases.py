"""The picture of a training's memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from left_trainer.callbacks.memory_profiler import MemorySummary, StepMemory

MIB = 1024**2
COLORS = ("#7f8c99", "#2f5d8a", "#e8963a", "#3f9a8f", "#bcd3ea")


def draw_timeline(steps: Sequence[StepMemory], summary: MemorySummary, path: Path) -> None:
    """Draw per-step memory as a stack of its parts, with the peaks of both phases, to a PNG file.

    The axis begins above what was in use before training, weights aside: on a CPU the interpreter and its libraries
    take several times what a small model does.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    x = np.array([step.step for step in steps])
    ones = np.ones(len(steps))
    parts = {
        "weights, frozen": summary.frozen_weights_bytes * ones,
        "weights, trainable": summary.trainable_weights_bytes * ones,
        "gradients": np.array([step.gradients_bytes for step in steps]),
        "optimizer state": np.array([step.optimizer_state_bytes for step in steps]),
        "activations": np.array([step.activations_bytes for step in steps]),
    }
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    labels = [f"{name} ({values.max() / MIB:,.1f} MiB)" for name, values in parts.items()]
    axes.stackplot(x, [values / MIB for values in parts.values()], labels=labels, colors=COLORS, step="mid")
    for name, style in (("forward_backward", "-"), ("optimizer", ":")):
        peaks = [getattr(step, f"{name}_peak_bytes") - summary.baseline_bytes for step in steps]
        axes.plot(
            x,
            np.maximum(peaks, 0) / MIB,
            style,
            color="#222222",
            linewidth=1.2,
            label=f"peak, {name.replace('_', ' + ')}",
        )
    above = f"above the {summary.baseline_bytes / MIB:,.0f} MiB in use before training, weights aside"
    axes.set_title(f"Memory on {summary.device}, {above}", fontsize=10, loc="left")
    axes.set(xlabel="optimizer step", ylabel="MiB", xlim=(x.min(), max(x.max(), x.min() + 1)), ylim=(0, None))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.spines[["top", "right"]].set_visible(False)
    handles, names = axes.get_legend_handles_labels()
    figure.legend(handles[::-1], names[::-1], loc="outside right center", frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
