"""The peak of each phase of a training, split into what held the memory, and the picture of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from left_trainer.callbacks.tables import format_bytes
from left_trainer.storage.errors import write_errors
from left_trainer.storage.whole import whole_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Field of `PhaseMemory`: name for people, colour, colour of the text on it.
PARTS = {
    "frozen_weights_bytes": ("weights, frozen", "#7f8c99", "white"),
    "trainable_weights_bytes": ("weights, trainable", "#2f5d8a", "white"),
    "gradients_bytes": ("gradients", "#e8963a", "white"),
    "optimizer_state_bytes": ("optimizer state", "#3f9a8f", "white"),
    "other_bytes": ("activations, temporaries", "#bcd3ea", "#1c2b3a"),
}
# Of a device whose figure is that of the whole process: what was freed counts until the allocator returns it.
KEPT = {"cpu": ", allocator cache", "mps": ", allocator cache"}
BAR_HEIGHT = 0.62
LABELLED_SHARE = 0.11  # of the longest bar; a narrower part has no room for its figure
GIB = 1024**3
MIB = 1024**2


@dataclass(frozen=True)
class PhaseMemory:
    """What was in use when a phase needed the most, in bytes.

    Args:
        name: Of the phase.
        frozen_weights_bytes: Parameters without gradient, and buffers.
        trainable_weights_bytes: Parameters with gradient.
        gradients_bytes: Gradients.
        optimizer_state_bytes: Tensors of the optimizer's state.
        other_bytes: The rest: activations and temporaries.
    """

    name: str
    frozen_weights_bytes: int
    trainable_weights_bytes: int
    gradients_bytes: int
    optimizer_state_bytes: int
    other_bytes: int

    @property
    def total_bytes(self) -> int:
        """All parts together."""
        return sum(getattr(self, part) for part in PARTS)


def draw_phases(phases: Sequence[PhaseMemory], device: str, baseline_bytes: int, path: Path) -> None:
    """Draw a bar for the peak of each phase, split into its parts, to a PNG file.

    The bars begin above what was in use before training, weights aside: on a CPU the interpreter and its libraries take
    several times what a small model does.

    Args:
        phases: From top to bottom.
        device: That was measured.
        baseline_bytes: In use before training, without the weights.
        path: The file to write; its folder is made.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 1.8 + 0.6 * len(phases)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _draw_bars(axes, phases, KEPT.get(device.partition(":")[0], ""))
    above = f"above the {format_bytes(baseline_bytes)} in use before training, weights not counted"
    figure.suptitle(f"Peak memory of each phase on {device}, {above}", x=0.012, ha="left", fontsize=10)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower left", ncols=3, frameon=False, fontsize=9)
    with write_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as part:
        figure.savefig(part, dpi=120, format="png")


def _draw_bars(axes: Axes, phases: Sequence[PhaseMemory], kept: str) -> None:
    """Draw the bars; `kept` says what else the last part holds on this device."""
    longest = max(phase.total_bytes for phase in phases)
    unit, unit_bytes = ("GiB", GIB) if longest >= GIB else ("MiB", MIB)
    rows = range(len(phases))
    left = [0.0] * len(phases)
    for part, (title, color, text_color) in PARTS.items():
        sizes = [getattr(phase, part) for phase in phases]
        if not any(sizes):
            continue
        label = f"{title}{kept if part == 'other_bytes' else ''} ({format_bytes(max(sizes))})"
        axes.barh(
            rows,
            [size / unit_bytes for size in sizes],
            left=left,
            height=BAR_HEIGHT,
            color=color,
            label=label,
        )
        for row, size in zip(rows, sizes, strict=True):
            if size >= LABELLED_SHARE * longest:
                middle = left[row] + size / unit_bytes / 2
                axes.text(middle, row, format_bytes(size), color=text_color, ha="center", va="center", fontsize=9)
            left[row] += size / unit_bytes
    for row, phase in zip(rows, phases, strict=True):
        axes.text(left[row], row, f"  {format_bytes(phase.total_bytes)}", va="center", fontsize=10, fontweight="bold")
    axes.set_yticks(rows, [phase.name for phase in phases], fontsize=10)
    axes.set(xlabel=unit, xlim=(0, max(left) * 1.14 or 1))
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
