"""A plan as text, as plain data and as a plot."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from left_trainer.planning.advice import Change
    from left_trainer.planning.devices import Device
    from left_trainer.planning.plan import TrainingPlan

GIB, MIB = 2**30, 2**20
BAR_WIDTH, BAR_HEIGHT = 72, 8
PHASES = {"forward": "tab:blue", "backward": "tab:orange", "optimizer": "tab:green"}


@dataclass(frozen=True)
class RunTime:
    """The time of a whole run, evaluations not counted.

    Args:
        run_steps: Optimizer steps.
        train_rows: Of the data.
        mean_source_tokens: Of a row.
        mean_target_tokens: The same.
        run_seconds: Of all steps.
    """

    run_steps: int
    train_rows: int
    mean_source_tokens: int
    mean_target_tokens: int
    run_seconds: float


def as_record(plan: TrainingPlan, device: Device | None = None) -> dict[str, Any]:
    """A plan as plain data; with the time of a step where `device` tells it."""
    time = _time_on(plan, device)
    return {
        "model": plan.model,
        "method": plan.method,
        "rows": plan.batch.rows,
        "source_tokens": plan.batch.source,
        "target_tokens": plan.batch.target,
        "trained_parameters": plan.trained_parameters,
        "all_parameters": plan.all_parameters,
        "peak_bytes": plan.peak_bytes,
        "held_bytes": plan.held_bytes,
        "peak_phase": plan.peak_phase,
        "peak_module": plan.step.module,
        "parts": plan.step.parts,
        "activations": plan.step.activations,
        "loading_bytes": plan.loading_bytes,
        "evaluation_bytes": plan.evaluation_bytes,
        "saving_bytes": plan.saving_bytes,
        "device_overhead_bytes": plan.device.overhead_bytes,
        "run_bytes": plan.run_bytes,
        "step_seconds": time.seconds if time else None,
        "bound_by": time.bound if time else None,
        "fallbacks": dict(plan.fallbacks),
        "timeline": plan.timeline,
    }


def plan_text(plan: TrainingPlan) -> str:
    """What a run needs, what that consists of, and when in a step."""
    shape, share = plan.batch, plan.trained_parameters / plan.all_parameters
    lines = [
        f"{plan.method} on {plan.model}",
        f"{shape.rows} row{'s' if shape.rows > 1 else ''} of {shape.source} + {shape.target} tokens; "
        f"{plan.trained_parameters:,} of {plan.all_parameters:,} parameters trained ({share:.3%})",
        "",
        f"Memory at the peak of a step, in its {plan.peak_phase} phase:",
        *_sizes(plan.step.parts),
        "The most memory at other times:",
        *_sizes({"loading": plan.loading_bytes, "evaluation": plan.evaluation_bytes, "saving": plan.saving_bytes}),
        f"{'Needed':18} {_size(plan.run_bytes)}, with {plan.device.context_bytes / GIB:.2f} GiB of the device's own"
        + (f"; in steps the allocator holds {plan.held_bytes / GIB:.2f} GiB" if plan.device.has_segments else ""),
        "",
        *_bar(plan),
    ]
    lines += [f"{name} will not be used: {'; '.join(reasons)}" for name, reasons in plan.fallbacks.items()]
    return "\n".join(lines)


def _sizes(parts: Mapping[Any, int]) -> list[str]:
    """A line for each that shows, the largest first."""
    ordered = sorted(parts.items(), key=lambda pair: -pair[1])
    least = sum(parts.values()) / 100_000
    return [f"  {part:16} {_size(size)}" for part, size in ordered if size > least]


def _size(n_bytes: int) -> str:
    if n_bytes < GIB / 100:
        return f"{n_bytes / MIB:8.2f} MiB"
    return f"{n_bytes / GIB:8.2f} GiB"


def _bar(plan: TrainingPlan) -> list[str]:
    """Memory over the operations of a step, as a picture of characters."""
    samples = plan.timeline
    if not samples:
        return []
    columns = [samples[index * len(samples) // BAR_WIDTH] for index in range(BAR_WIDTH)]
    most = max(size for _, size in samples)
    rows = [
        "".join("█" if size * BAR_HEIGHT > most * level else " " for _, size in columns).rstrip()
        for level in reversed(range(BAR_HEIGHT))
    ]
    margin = " " * len(_size(most))
    phases = "".join(phase[0] if phase in PHASES else " " for phase, _ in columns)
    return [
        f"{_size(most)} |{rows[0]}",
        *(f"{margin} |{row}" for row in rows[1:]),
        f"{margin}  {phases}",
        f"{margin}  over the operations of a step: f forward, b backward, o optimizer",
    ]


def time_text(plan: TrainingPlan, device: Device | None, n_batches: int) -> str:
    """How long a step of `n_batches` micro-batches takes, where the device's arithmetic and bandwidth are known."""
    time = _time_on(plan, device)
    if time is None or device is None:
        return "For the time of a step, name a GPU, such as --device rtx-4090."
    tokens = plan.batch.rows * (plan.batch.source + plan.batch.target) * n_batches
    return (
        f"A step on {tokens:,} tokens takes about {time.seconds:.3g} s on {device.name}, bound by {time.bound}: "
        f"{tokens / time.seconds:,.0f} tokens a second."
    )


def run_text(run: RunTime) -> str:
    """How long the whole run takes."""
    hours = f"{run.run_seconds / 3600:.1f} hours" if run.run_seconds >= 3600 else f"{run.run_seconds / 60:.1f} minutes"
    return (
        f"The run has {run.run_steps:,} steps on {run.train_rows:,} rows of {run.mean_source_tokens} + "
        f"{run.mean_target_tokens} tokens on average: {hours}, without evaluations."
    )


def _time_on(plan: TrainingPlan, device: Device | None) -> Any:
    return plan.time_on(device) if device is not None and device.bandwidth is not None else None


def verdict_text(plan: TrainingPlan, memory_bytes: int) -> str:
    """Whether the run fits, and which of its phases do not."""
    fits, gap = plan.fits(memory_bytes), abs(memory_bytes - plan.run_bytes) / GIB
    verdict = f"fits into {memory_bytes / GIB:.4g} GiB; {gap:.2f} GiB are left"
    if not fits:
        verdict = f"does not fit into {memory_bytes / GIB:.4g} GiB; {gap:.2f} GiB are missing"
    lines = ["", f"The run {verdict}."]
    for name, size in {"Loading": plan.loading_bytes, "Evaluation": plan.evaluation_bytes}.items():
        if size + plan.device.overhead_bytes > memory_bytes:
            lines.append(f"{name} does not fit either, whatever the batch of training.")
    return "\n".join(lines)


def limits_text(plan: TrainingPlan, rows: int, tokens: int) -> str:
    """The largest that fits.

    Args:
        plan: Of a run that fits.
        rows: Of the largest batch that fits.
        tokens: Of the longest source that fits.
    """
    return (
        f"Largest batch that fits: {rows} (rows of {plan.batch.source} + {plan.batch.target} tokens).\n"
        f"Longest source that fits: {tokens} (tokens, with {plan.batch.rows} row{'s' * (plan.batch.rows != 1)})."
    )


def changes_text(
    plan: TrainingPlan, found: list[tuple[Change, TrainingPlan]], memory_bytes: int, device: Device | None
) -> str:
    """What each change saves and costs."""
    if not found:
        return "\nNo change of the arguments that is known here saves memory."
    lines = ["", "What to change:" if not plan.fits(memory_bytes) else "What would save memory:"]
    for change, other in found:
        verdict = "fits" if other.fits(memory_bytes) else "not enough alone"
        lines.append(f"  {change.flags}")
        lines.append(f"      saves {(plan.run_bytes - other.run_bytes) / GIB:.2f} GiB ({verdict}): {change.cost}")
        before, after = _time_on(plan, device), _time_on(other, device)
        if before and after and abs(after.seconds / before.seconds - 1) > 0.005:
            lines.append(f"      {after.seconds:.3g} s a step in place of {before.seconds:.3g} s")
    return "\n".join(lines)


def together_text(kept: Iterable[Change], plan: TrainingPlan, memory_bytes: int, device: Device | None) -> str:
    """All changes that it takes until the run fits, as one line to paste."""
    verdict = f"the run needs {plan.run_bytes / GIB:.2f} GiB"
    if not plan.fits(memory_bytes):
        verdict += ", still too much: take a smaller model, a larger device, or shorter rows"
    time = _time_on(plan, device)
    verdict += f"; {time.seconds:.3g} s a step" if time else ""
    return f"\nTogether, {verdict}:\n  {' '.join(change.flags for change in kept)}"


def ranking_text(
    plans: list[TrainingPlan], left_out: Mapping[str, str], memory_bytes: int | None, device: Device | None
) -> str:
    """A row for each method."""
    is_timed = device is not None and device.bandwidth is not None
    lines = [f"{'method':26} {'needed':>12} {'trained parameters':>20}"]
    lines[0] += (f" {'ms a step':>10}" if is_timed else "") + ("  fits" if memory_bytes else "")
    for plan in plans:
        time = f" {1000 * _time_on(plan, device).seconds:10,.0f}" if is_timed else ""
        verdict = f"  {'yes' if plan.fits(memory_bytes) else 'no'}" if memory_bytes else ""
        lines.append(f"{plan.method:26} {_size(plan.run_bytes)} {plan.trained_parameters:20,}{time}{verdict}")
    lines += [f"{name:26} left out: {reason}" for name, reason in left_out.items()]
    return "\n".join(lines)


def draw(plan: TrainingPlan, path: str, memory_bytes: int | None = None) -> None:
    """Write the memory over a step, with a line at `memory_bytes`, to `path`."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4))
    for phase, colour in PHASES.items():
        sizes = [size / GIB if each == phase else 0 for each, size in plan.timeline]
        axes.bar(range(len(sizes)), sizes, width=1, color=colour, label=phase)
    if memory_bytes is not None:
        room = (memory_bytes - plan.device.overhead_bytes) / GIB
        axes.axhline(room, color="black", linestyle="--", label="room on the device")
    axes.set(title=f"{plan.method} on {plan.model}", xlabel="operations of a step, %", ylabel="GiB")
    axes.set_xticks([len(plan.timeline) * share / 100 for share in (0, 50, 100)], ["0", "50", "100"])
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
