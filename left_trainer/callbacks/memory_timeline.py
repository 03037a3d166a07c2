"""Memory within one step: where in forward and backward pass it goes, by module."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from left_trainer.callbacks.tables import format_bytes, format_table
from left_trainer.recording.modules import ModuleTracker
from left_trainer.recording.recorder import Phase, StepRecorder
from left_trainer.recording.storage_bytes import as_requested, in_cuda_blocks
from left_trainer.recording.timeline import Moment, live_blocks, moment, part_of, peak_event, timeline

N_SAMPLES = 400
SHOWN_MODULES = 8
PHASES = {"forward": "#2f5d8a", "backward": "#e8963a", "optimizer": "#3f9a8f"}
GIB, MIB = 1024**3, 1024**2


@dataclass(frozen=True)
class StepTimeline:
    """The bytes of tensors over one step.

    Args:
        step: Its number.
        samples: Phase, and the most bytes in each of up to `N_SAMPLES` equal parts of the step's operations.
        peak: The moment of most memory.
        modules: What the forward pass of each layer has saved for the backward pass, at that moment, the most first.
            A layer goes by its name up to its number, `model.layers.3`.
    """

    step: int
    samples: tuple[tuple[Phase, int], ...]
    peak: Moment
    modules: dict[str, int]


class StepWatch(StepRecorder):
    """Records one step of a training from the outside: it finds out itself whether a backward pass runs.

    Args:
        model: That is trained.
        optimizer: Its state is labelled; `None` before it is made.
        device: That the training runs on; tensors elsewhere are not counted.
    """

    def __init__(self, model: nn.Module, optimizer: Any, device: torch.device) -> None:
        rounding = in_cuda_blocks if device.type == "cuda" else as_requested
        super().__init__(device.type, rounding, tracker=ModuleTracker(model))
        self.model, self.optimizer = model, optimizer
        self.label_model(model)
        self.label(_state(optimizer), "optimizer state")
        self.phase = "forward"
        self.tracker.__enter__()
        self.__enter__()

    def _record(self, func: Any, args: tuple[Any, ...], kwargs: Any) -> Any:
        phase: Phase = "backward" if torch._C._current_graph_task_id() != -1 else "forward"
        if self.phase not in (phase, "optimizer"):
            self.begin(phase)
            self.tracker.leave_backward()
        return super()._record(func, args, kwargs)

    def backward_ended(self) -> None:
        """What follows is the optimizer."""
        self.label((parameter.grad for parameter in self.model.parameters()), "gradients")
        self.tracker.leave_backward()
        self.begin("optimizer")
        events = self.recording.events  # gradients may have been clipped since
        last = max((index for index, event in enumerate(events) if event.phase == "backward"), default=len(events))
        events[last + 1 :] = [replace(event, phase="optimizer") for event in events[last + 1 :]]

    def finish(self, step: int) -> StepTimeline:
        """Stop, and sum up."""
        self.__exit__(None, None, None)
        self.tracker.__exit__(None, None, None)
        self.label(_state(self.optimizer), "optimizer state")
        at = peak_event(self.recording, is_steady=False)
        held: dict[str, int] = defaultdict(int)
        for block in live_blocks(self.recording, at, is_steady=False):
            if part_of(block) == "activations":
                held[layer_of(block.module)] += block.n_bytes
        modules = dict(sorted(held.items(), key=lambda pair: -pair[1]))
        samples = timeline(self.recording, N_SAMPLES, is_steady=False)
        return StepTimeline(step, samples, moment(self.recording, at, is_steady=False), modules)


def layer_of(module: str) -> str:
    """The name of a module up to its first number: `model.layers.3` of `model.layers.3.mlp.up_proj`."""
    parts = module.split(".")
    number = next((index for index, part in enumerate(parts) if part.isdigit()), len(parts))
    return ".".join(parts[: number + 1]) or "outside of modules"


def _state(optimizer: Any) -> Iterator[torch.Tensor]:
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    for values in getattr(inner, "state", {}).values():
        yield from (value for value in values.values() if isinstance(value, torch.Tensor))


def format_timeline(found: StepTimeline) -> str:
    """When in the step memory is highest, what holds it, and in which layers."""
    at = f" at {found.peak.module}" if found.peak.module else ""
    title = f"Memory within step {found.step}: {format_bytes(found.peak.n_bytes)} in the {found.peak.phase} phase{at}"
    parts = sorted(found.peak.parts.items(), key=lambda pair: -pair[1])
    rows = [(str(part), format_bytes(size)) for part, size in parts]
    text = format_table(title, ("part", "bytes"), rows)
    shown = list(found.modules.items())[:SHOWN_MODULES]
    layers = [(name, format_bytes(size)) for name, size in shown]
    return text + ("\n\n" + format_table("Saved for the backward pass", ("layer", "bytes"), layers) if layers else "")


def draw_timeline(found: StepTimeline, path: Path) -> None:
    """Draw the bytes over the operations of the step, coloured by phase, to a PNG file."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sizes = [size for _, size in found.samples]
    unit, unit_bytes = ("GiB", GIB) if max(sizes) >= GIB else ("MiB", MIB)
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    places = range(len(sizes))
    for phase, color in PHASES.items():
        heights = [size / unit_bytes if each == phase else 0 for each, size in found.samples]
        axes.bar(places, heights, width=1, color=color, label=phase)
    axes.set(xlabel="operations of the step", ylabel=unit, title=f"Memory of tensors within step {found.step}")
    axes.set_xticks([])
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, ncols=3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
