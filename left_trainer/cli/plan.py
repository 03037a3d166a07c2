"""`left-trainer plan`: the memory and the time of a run before it starts."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any

from left_trainer.cli.errors import user_errors

if TYPE_CHECKING:
    from left_trainer.planning.advice import Change
    from left_trainer.planning.devices import Device
    from left_trainer.planning.plan import TrainingPlan

DESCRIPTION = """Say what memory a run needs and how long a step takes, before it starts: without its weights and
without a GPU. All options of `left-trainer train` are accepted. The training step is run on shapes, from the
model's config alone.

With --memory_gib it says whether the run fits, the largest batch and the longest source that do, and what to change.
"""
EXAMPLES = """examples:
  left-trainer plan --model_name_or_path meta-llama/Llama-3.1-8B --peft_method qlora --memory_gib 24
  left-trainer plan --model_name_or_path google/mt5-large --source_tokens 512 --target_tokens 64 --methods all
  left-trainer plan --model_name_or_path ./folder-with-config-json --peft_method lora --bf16 --json
"""
GIB = 2**30
BAR_WIDTH, BAR_HEIGHT = 72, 8
PLOT_FILE = "memory_plan.png"


def main(argv: list[str]) -> int:
    """Plan, print, and search for what fits."""
    parser = _parser()
    options, rest = parser.parse_known_args(argv)

    from left_trainer.planning.devices import find_device
    from left_trainer.runs.fine_tuning import training_parser, with_task_settings
    from left_trainer.tasks import get_task

    with user_errors():
        if options.memory_gib is not None and options.memory_gib <= 0:
            raise ValueError(f"memory_gib={options.memory_gib:g} must be positive.")
        device = None if options.device in (None, "cuda", "cpu") else find_device(options.device)
        if device is not None and options.memory_gib is None:
            options.memory_gib = device.memory_bytes / GIB
        task = get_task(options.task)
        full = training_parser(output_dir="outputs/plan")
        model_args, _, args, *_ = full.parse_args_and_config([*rest])
        args = with_task_settings(task, args)
        planner = _Planner(model_args, args, options, task.max_new_tokens, device)
        if options.methods:
            return _rank(planner, options)
        plan = planner.plan()
        if options.json:
            print(json.dumps(as_record(plan), indent=2))
        else:
            print(_text(plan))
            print(_time_text(plan, device))
            if options.memory_gib is not None:
                print(_advice_text(planner, plan, int(options.memory_gib * GIB)))
        if options.plot:
            _plot(plan, options.plot)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="left-trainer plan",
        description=DESCRIPTION,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--task", default="summarization", help="task, for generation settings (default: %(default)s)")
    parser.add_argument("--memory_gib", type=float, metavar="X", help="memory of the device")
    parser.add_argument(
        "--device",
        metavar="NAME",
        help="a GPU such as rtx-4090, which also gives the time; cuda or cpu (default: cuda)",
    )
    parser.add_argument("--source_tokens", type=int, metavar="N", help="tokens of the longest source or prompt")
    parser.add_argument("--target_tokens", type=int, metavar="N", help="tokens of the longest target or completion")
    parser.add_argument("--methods", nargs="+", metavar="NAME", help="rank these methods, or all")
    parser.add_argument("--json", action="store_true", help="print the plan as JSON")
    parser.add_argument("--plot", nargs="?", const=PLOT_FILE, metavar="FILE", help=f"write a plot ({PLOT_FILE})")
    return parser


class _Planner:
    """Plans the run of the command line, with changes."""

    def __init__(
        self, model_args: Any, args: Any, options: argparse.Namespace, new_tokens: int, device: Device | None
    ) -> None:
        self.model_args, self.args, self.options, self.device = model_args, args, options, device
        is_pair = model_args.source(args).family == "encoder_decoder"
        self.target = options.target_tokens or new_tokens
        longest = args.max_length or 1024
        self.source = options.source_tokens or (longest if is_pair else max(longest - self.target, 1))

    def plan(
        self, source_tokens: int | None = None, dtype: str | None = None, peft_method: str | None = None, **values: Any
    ) -> TrainingPlan:
        """The plan of the run with other values."""
        from left_trainer.planning.plan import plan_training

        if peft_method is not None:
            values |= {"peft_method": peft_method, "peft_kwargs": None}
        args = self.args.replaced(**values)
        return plan_training(
            self.model_args.source(args),
            args,
            source_tokens=source_tokens or self.source,
            target_tokens=self.target,
            dtype=dtype or self.model_args.dtype,
            device=self.device.kernels if self.device else self.options.device,
        )


def as_record(plan: TrainingPlan) -> dict[str, Any]:
    """A plan as plain data."""
    return {
        "model": plan.model,
        "method": plan.method,
        "rows": plan.batch.rows,
        "source_tokens": plan.batch.source,
        "target_tokens": plan.batch.target,
        "trained_parameters": plan.trained_parameters,
        "all_parameters": plan.all_parameters,
        "peak_bytes": plan.peak_bytes,
        "peak_phase": plan.peak_phase,
        "peak_module": plan.step.module,
        "parts": plan.step.parts,
        "activations": plan.step.activations,
        "loading_bytes": plan.loading_bytes,
        "evaluation_bytes": plan.evaluation_bytes,
        "saving_bytes": plan.saving_bytes,
        "device_overhead_bytes": plan.device.overhead_bytes,
        "run_bytes": plan.run_bytes,
        "fallbacks": dict(plan.fallbacks),
        "timeline": plan.timeline,
    }


def _text(plan: TrainingPlan) -> str:
    share = plan.trained_parameters / plan.all_parameters
    lines = [
        f"{plan.method} on {plan.model}: {plan.batch.rows} rows of {plan.batch.source} + {plan.batch.target} tokens, "
        f"{plan.trained_parameters:,} of {plan.all_parameters:,} parameters trained ({share:.3%})",
        "",
        f"at the peak of a step, in the {plan.peak_phase} pass",
    ]
    lines += [
        f"  {part:18} {_gib(size)}" for part, size in sorted(plan.step.parts.items(), key=lambda pair: -pair[1]) if size
    ]
    for title, size in {
        "a step": plan.peak_bytes,
        "loading": plan.loading_bytes,
        "evaluation": plan.evaluation_bytes,
        "saving": plan.saving_bytes,
        "device overhead": plan.device.overhead_bytes,
        "needed": plan.run_bytes,
    }.items():
        lines.append(f"{title:20} {_gib(size)}")
    lines += ["", *_bar(plan)]
    lines += [f"{name} will not be used: {'; '.join(reasons)}" for name, reasons in plan.fallbacks.items()]
    return "\n".join(lines)


def _time_text(plan: TrainingPlan, device: Device | None) -> str:
    """How long a step takes, where the device's arithmetic and bandwidth are known."""
    if device is None or device.bandwidth is None:
        return "For the time of a step, name a GPU: --device rtx-4090."
    time = plan.time_on(device)
    tokens = plan.batch.rows * (plan.batch.source + plan.batch.target)
    return (
        f"A step of {tokens:,} tokens takes about {time.seconds:.3g} s on {device.name}: {tokens / time.seconds:,.0f} "
        f"tokens a second, bound by {time.bound}."
    )


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / GIB:8.2f} GiB"


def _bar(plan: TrainingPlan) -> list[str]:
    """Memory over the operations of a step, as a picture of characters."""
    samples = plan.timeline
    if not samples:
        return []
    columns = [samples[index * len(samples) // BAR_WIDTH] for index in range(BAR_WIDTH)]
    most = max(size for _, size in samples)
    rows = [
        "".join("█" if size * BAR_HEIGHT > most * level else " " for _, size in columns)
        for level in reversed(range(BAR_HEIGHT))
    ]
    phases = "".join({"forward": "f", "backward": "b", "optimizer": "o"}.get(phase, " ") for phase, _ in columns)
    return [f"{_gib(most)} |{rows[0]}", *(f"{'':12} |{row}" for row in rows[1:]), f"{'':12}  {phases}"]


def _advice_text(planner: _Planner, plan: TrainingPlan, memory_bytes: int) -> str:
    from left_trainer.planning.advice import advice, largest_batch, longest_source

    fits = plan.fits(memory_bytes)
    gap = abs(memory_bytes - plan.run_bytes)
    lines = ["", f"It {'fits' if fits else 'does not fit'} into {memory_bytes / GIB:g} GiB: "]
    lines[-1] += f"{gap / GIB:.2f} GiB {'are left' if fits else 'are missing'}."
    rows, tokens = largest_batch(plan, planner.plan, memory_bytes), longest_source(plan, planner.plan, memory_bytes)
    lines.append(f"Largest batch that fits: {rows or 'none'} (of {plan.batch.source} + {plan.batch.target} tokens).")
    lines.append(f"Longest source that fits: {tokens or 'none'} tokens (with {plan.batch.rows} rows).")
    found: list[tuple[Change, TrainingPlan]] = advice(plan, planner.plan, planner.args, planner.model_args.dtype)
    if found:
        lines += ["", "What to change:"]
    for change, other in found:
        verdict = "fits" if other.fits(memory_bytes) else "not enough alone"
        saved = plan.run_bytes - other.run_bytes
        lines.append(f"  {change.flags}\n      saves {saved / GIB:.2f} GiB ({verdict}); {change.cost}")
    return "\n".join(lines)


def _rank(planner: _Planner, options: argparse.Namespace) -> int:
    """A row for each method, the least memory first."""
    from left_trainer.methods import list_methods

    asked = ",".join(options.methods).split(",")
    names = [method.name for method in list_methods()] if asked == ["all"] else asked
    plans, left_out = [], {}
    for name in names:
        try:
            plans.append(planner.plan(peft_method=name))
        except (ValueError, ImportError) as error:
            left_out[name] = str(error).split(". ")[0]
    plans.sort(key=lambda plan: plan.run_bytes)
    if options.json:
        print(json.dumps([as_record(plan) for plan in plans], indent=2))
        return 0
    device = planner.device if planner.device and planner.device.bandwidth else None
    print(f"{'method':26} {'needed':>12} {'trained parameters':>20}" + (f" {'ms a step':>10}" if device else ""))
    for plan in plans:
        time = f" {1000 * plan.time_on(device).seconds:10.0f}" if device else ""
        print(f"{plan.method:26} {_gib(plan.run_bytes)} {plan.trained_parameters:20,}{time}")
    for name, reason in left_out.items():
        print(f"{name:26} left out: {reason}.")
    return 0


def _plot(plan: TrainingPlan, path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4))
    for phase, colour in {"forward": "tab:blue", "backward": "tab:orange", "optimizer": "tab:green"}.items():
        sizes = [size / GIB if each == phase else 0 for each, size in plan.timeline]
        axes.bar(range(len(sizes)), sizes, width=1, color=colour, label=phase)
    axes.set(title=f"{plan.method} on {plan.model}", xlabel="operations of a step, %", ylabel="GiB")
    axes.set_xticks([len(plan.timeline) * share / 100 for share in (0, 50, 100)], ["0", "50", "100"])
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
