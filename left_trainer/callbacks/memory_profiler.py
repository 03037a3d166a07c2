"""Where the memory of a training goes, step by step."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from left_trainer.callbacks.logging import LoggingCallback
from left_trainer.callbacks.memory_counters import MemoryCounter, memory_counter
from left_trainer.callbacks.memory_phases import PhaseMemory, draw_phases
from left_trainer.callbacks.memory_timeline import StepTimeline, StepWatch, draw_timeline, format_timeline
from left_trainer.callbacks.tables import format_bytes, format_table

WATCHED_STEP = 2  # the optimizer has made its state


@dataclass(frozen=True)
class StepMemory:
    """Memory of one optimizer step, in bytes."""

    step: int
    forward_backward_peak_bytes: int
    forward_backward_current_bytes: int
    optimizer_peak_bytes: int
    optimizer_current_bytes: int
    gradients_bytes: int
    optimizer_state_bytes: int
    activations_bytes: int


@dataclass(frozen=True)
class MemorySummary:
    """Memory of one training, in bytes; `None` where a phase did not run."""

    device: str
    baseline_bytes: int
    frozen_weights_bytes: int
    trainable_weights_bytes: int
    gradients_bytes: int
    optimizer_state_bytes: int
    activations_bytes: int
    train_peak_bytes: int | None
    eval_peak_bytes: int | None
    phases: tuple[PhaseMemory, ...] = ()


def tensor_bytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def weight_bytes(model: nn.Module) -> tuple[int, int]:
    """Bytes of frozen and of trainable parameters and buffers; tied ones once, packed ones as stored."""
    frozen = trainable = 0
    for parameter in model.parameters():
        if parameter.requires_grad:
            trainable += tensor_bytes(parameter)
        else:
            frozen += tensor_bytes(parameter)
    return frozen + sum(tensor_bytes(buffer) for buffer in model.buffers()), trainable


def gradient_bytes(model: nn.Module) -> int:
    return sum(tensor_bytes(parameter.grad) for parameter in model.parameters() if parameter.grad is not None)


def optimizer_state_bytes(optimizer: Any) -> int:
    """Bytes of all tensors in an optimizer's state."""
    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
    states = getattr(inner, "state", {})
    return sum(
        tensor_bytes(value) for state in states.values() for value in state.values() if isinstance(value, torch.Tensor)
    )


class MemoryProfilerCallback(LoggingCallback):
    """Measure memory per step, by phase and by what occupies it. Works on any `Trainer`; changes nothing.

    CUDA and XPU are read from PyTorch's own counters. MPS and CPU (resident memory of the process) are sampled every
    5 ms, so peaks shorter than that can be missed.

    | key, in bytes | meaning |
    |---|---|
    | `memory/forward_backward_peak_bytes` | most in use from the step's first forward pass to its last backward pass |
    | `memory/forward_backward_current_bytes` | in use when the last backward pass has ended |
    | `memory/optimizer_peak_bytes` | most in use during the optimizer's update |
    | `memory/optimizer_current_bytes` | in use when it has ended |
    | `memory/frozen_weights_bytes` | parameters without gradient, and buffers |
    | `memory/trainable_weights_bytes` | parameters with gradient |
    | `memory/gradients_bytes` | gradients when the last backward pass has ended |
    | `memory/optimizer_state_bytes` | tensors of the optimizer's state |
    | `memory/activations_bytes` | the rest of the step's peak: activations and temporaries |
    | `memory/baseline_bytes` | in use when training began, without the weights: on a CPU, interpreter and libraries |
    | `memory/eval_peak_bytes` | most in use during evaluations so far; absent before the first |

    Of several steps between two log entries the highest figures are logged. At the end of training a table is printed
    and a picture is drawn: a bar for the peak of each phase, forward and backward pass, optimizer update and, where
    there was one, evaluation, split into what held the memory. `callback.summary` and `callback.steps` hold the
    figures.

    Args:
        plot: Path of the picture, a PNG file; by default `memory.png` in `args.output_dir`. `False` draws none.
        print_table: Print the table at the end of training.
        snapshot: On CUDA, write `memory_snapshot.pickle` of the first `snapshot_steps` steps, for PyTorch's memory
            viewer (https://pytorch.org/memory_viz).
        snapshot_steps: How many steps to record; recording slows them down.
        timeline: Watch the second step storage by storage, on any device, which makes that step several times slower:
            when in forward pass, backward pass and optimizer memory is highest, what holds it, and which layers have
            saved how much. It is printed, drawn to `memory_timeline.png`, and kept in `callback.timeline`.

    Raises:
        ValueError: When training begins with `snapshot=True` on another device than CUDA.
    """

    def __init__(
        self,
        plot: str | Path | bool = True,
        print_table: bool = True,
        snapshot: bool = False,
        snapshot_steps: int = 3,
        timeline: bool = False,
    ) -> None:
        super().__init__()
        self.watches_step = timeline
        self.timeline: StepTimeline | None = None
        self._watch: StepWatch | None = None
        self.plot, self.print_table = plot, print_table
        self.snapshot, self.snapshot_steps = snapshot, snapshot_steps
        self.steps: list[StepMemory] = []
        self.summary: MemorySummary | None = None
        self._counter: MemoryCounter | None = None
        self._device = torch.device("cpu")
        self._eval_peak: int | None = None
        self._eval_parts = ("evaluation", 0, 0)
        self._baseline = self._frozen = self._trainable = 0
        self._forward_backward = (0, 0, 0)

    def _start(self, args: TrainingArguments) -> MemoryCounter:
        if self._counter is None:
            self._device = args.device
            self._counter = memory_counter(args.device)
            self._counter.reset_peak()
        return self._counter

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Begin to measure, so that an evaluation before training is seen whole."""
        self._start(args)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Measure what is there before the first step."""
        if self.snapshot and args.device.type != "cuda":
            raise ValueError(
                f"MemoryProfilerCallback(snapshot=True) needs CUDA and the training runs on {args.device.type}. "
                "Remove snapshot=True; the table and the picture work on every device."
            )
        counter = self._start(args)
        self.steps = []
        self._frozen, self._trainable = weight_bytes(model)
        self._baseline = max(counter.current() - self._frozen - self._trainable, 0)
        if self.snapshot:
            torch.cuda.memory._record_memory_history(max_entries=1_000_000)

    def on_step_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """A step's forward and backward passes begin."""
        self._start(args).reset_peak()
        if self.watches_step and self.timeline is None and len(self.steps) == WATCHED_STEP - 1:
            self._watch = StepWatch(model, optimizer, args.device)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """The last backward pass has ended."""
        if self._watch is not None:
            self._watch.backward_ended()
        counter = self._start(args)
        self._forward_backward = (counter.peak(), counter.current(), gradient_bytes(model))
        counter.reset_peak()

    def on_optimizer_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """The update has ended."""
        if self._watch is not None:
            self.timeline, self._watch = self._watch.finish(state.global_step + 1), None
        counter = self._start(args)
        peak, current, gradients = self._forward_backward
        state_bytes = optimizer_state_bytes(optimizer)
        # The optimizer's state is made in the first update: it was not there during the first forward pass.
        resident = self._baseline + self._frozen + self._trainable + gradients + (state_bytes if self.steps else 0)
        step = StepMemory(
            step=state.global_step + 1,
            forward_backward_peak_bytes=peak,
            forward_backward_current_bytes=current,
            optimizer_peak_bytes=counter.peak(),
            optimizer_current_bytes=counter.current(),
            gradients_bytes=gradients,
            optimizer_state_bytes=state_bytes,
            activations_bytes=max(peak - resident, 0),
        )
        self.steps.append(step)
        for name, value in asdict(step).items():
            if name != "step":
                key = f"memory/{name}"
                self.metrics[key] = max(self.metrics.get(key, 0), value)
        self.metrics |= {
            "memory/frozen_weights_bytes": self._frozen,
            "memory/trainable_weights_bytes": self._trainable,
            "memory/baseline_bytes": self._baseline,
        }
        if self.snapshot and len(self.steps) == self.snapshot_steps:
            self._write_snapshot(args)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """What comes before the next step is evaluation or saving."""
        self._start(args).reset_peak()

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        optimizer: Any = None,
        **kwargs: Any,
    ) -> None:
        """One evaluation batch has ended."""
        counter = self._start(args)
        peak = counter.peak()
        if self._eval_peak is None or peak > self._eval_peak:
            name = "evaluation, generation" if getattr(args, "predict_with_generate", False) else "evaluation"
            self._eval_parts = (name, gradient_bytes(model), optimizer_state_bytes(optimizer))
            self._eval_peak = peak
        self.metrics["memory/eval_peak_bytes"] = self._eval_peak
        counter.reset_peak()

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """An evaluation has ended; without a training before it, only its own peak is known."""
        self.summary = self._summarize()

    def on_predict(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """A prediction has ended."""
        self.summary = self._summarize()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Sum up, print, draw."""
        self.summary = self._summarize()
        if self.snapshot and len(self.steps) < self.snapshot_steps:
            self._write_snapshot(args)
        if state.is_world_process_zero:
            if self.print_table:
                print(format_summary(self.summary))
                if self.timeline is not None:
                    print(format_timeline(self.timeline) + "\n")
            if self.timeline is not None:
                draw_timeline(self.timeline, Path(args.output_dir) / "memory_timeline.png")
            if self.plot is not False and self.steps:
                path = Path(args.output_dir) / "memory.png" if self.plot is True else Path(self.plot)
                draw_phases(self.summary.phases, self.summary.device, self.summary.baseline_bytes, path)

    def reset_eval_peak(self) -> None:
        """Forget what evaluations needed so far."""
        self._eval_peak = None
        if self._counter is not None:
            self._counter.reset_peak()

    def close(self) -> None:
        """Stop measuring; may be called twice. A later training or evaluation starts it again."""
        if self._counter is not None:
            self._counter.close()
            self._counter = None

    def _summarize(self) -> MemorySummary:
        peaks = [max(step.forward_backward_peak_bytes, step.optimizer_peak_bytes) for step in self.steps]
        return MemorySummary(
            device=str(self._device),
            baseline_bytes=self._baseline,
            frozen_weights_bytes=self._frozen,
            trainable_weights_bytes=self._trainable,
            gradients_bytes=max((step.gradients_bytes for step in self.steps), default=0),
            optimizer_state_bytes=max((step.optimizer_state_bytes for step in self.steps), default=0),
            activations_bytes=max((step.activations_bytes for step in self.steps), default=0),
            train_peak_bytes=max(peaks, default=None),
            eval_peak_bytes=self._eval_peak,
            phases=self._phases(),
        )

    def _phases(self) -> tuple[PhaseMemory, ...]:
        """The peak of each phase that ran; none without a training, which tells what is held all the time."""
        if not self.steps:
            return ()
        pass_ = max(self.steps, key=lambda step: step.forward_backward_peak_bytes)
        # The optimizer's state is made in the first update: it was not there during the first forward pass.
        state = 0 if pass_ is self.steps[0] else pass_.optimizer_state_bytes
        update = max(self.steps, key=lambda step: step.optimizer_peak_bytes)
        phases = [
            self._phase("forward, backward", pass_.forward_backward_peak_bytes, pass_.gradients_bytes, state),
            self._phase(
                "optimizer update", update.optimizer_peak_bytes, update.gradients_bytes, update.optimizer_state_bytes
            ),
        ]
        if self._eval_peak is not None:
            name, gradients, state = self._eval_parts
            phases.append(self._phase(name, self._eval_peak, gradients, state))
        return tuple(phases)

    def _phase(self, name: str, peak: int, gradients: int, optimizer_state: int) -> PhaseMemory:
        known = self._baseline + self._frozen + self._trainable + gradients + optimizer_state
        return PhaseMemory(name, self._frozen, self._trainable, gradients, optimizer_state, max(peak - known, 0))

    def _write_snapshot(self, args: TrainingArguments) -> None:
        torch.cuda.memory._dump_snapshot(str(Path(args.output_dir) / "memory_snapshot.pickle"))
        torch.cuda.memory._record_memory_history(enabled=None)


def format_summary(summary: MemorySummary) -> str:
    """The table that the callback prints."""
    rows = [
        ("weights, frozen", summary.frozen_weights_bytes),
        ("weights, trainable", summary.trainable_weights_bytes),
        ("gradients", summary.gradients_bytes),
        ("optimizer state", summary.optimizer_state_bytes),
        ("activations and temporaries", summary.activations_bytes),
        ("before training, without weights", summary.baseline_bytes),
        ("peak in training", summary.train_peak_bytes),
        ("peak in evaluation", summary.eval_peak_bytes),
    ]
    cells = [(name, "not measured" if value is None else format_bytes(value)) for name, value in rows]
    return "\n" + format_table(f"Memory on {summary.device}", ("part", "largest"), cells) + "\n"
