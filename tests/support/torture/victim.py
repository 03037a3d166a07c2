"""A process of the campaign: a training, or a command line, that kills itself at one of its own file operations.

    python victim.py '{"folder": ..., "kill_at": 12, "signal": "SIGKILL", "method": "lora", "family": "decoder_only"}'
    python victim.py '{"folder": ..., "command": ["merge", "--adapter_dir", ...]}'

Operations are what Python reports to audit hooks for paths below `folder`: files opened to be written, renames, removed
files and folders. safetensors writes from Rust and reports nothing: its calls count before and after. Without `kill_at`
the process runs to its end and prints how many operations there were.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

OPERATIONS = {"os.rename": "rename", "os.remove": "remove", "os.mkdir": "mkdir", "os.rmdir": "rmdir"}
OPENED_TO_WRITE = os.O_WRONLY | os.O_RDWR
TOTAL_STEPS = 6


class Killer:
    """Counts operations below `folder` and sends `kill_signal` before number `kill_at`, or `delay` seconds after it."""

    def __init__(self, folder: str, kill_at: int | None, kill_signal: str, delay: float) -> None:
        self.folder, self.kill_at = os.path.realpath(folder), kill_at
        self.signal, self.delay = getattr(signal, kill_signal), delay
        self.count, self.pid = 0, os.getpid()

    def audit(self, event: str, args: tuple[Any, ...]) -> None:
        """An audit hook."""
        if os.getpid() != self.pid or self.is_done:
            return
        if event == "open":
            path, mode, flags = args
            writes = bool(flags & OPENED_TO_WRITE) if isinstance(flags, int) else "w" in str(mode)
            if writes and isinstance(path, (str, bytes, os.PathLike)):
                self.count_if_below(path)
        elif event in OPERATIONS:
            self.count_if_below(args[0])

    @property
    def is_done(self) -> bool:
        return self.kill_at is not None and self.count > self.kill_at

    def count_if_below(self, path: Any) -> None:
        """Count an operation on `path`, and kill where it is the one."""
        try:
            absolute = Path(os.fsdecode(path)).absolute()
        except TypeError:
            return
        if str(absolute).startswith(self.folder):
            self.count_one()

    def count_one(self) -> None:
        """Count an operation, and kill where it is the one."""
        self.count += 1
        if self.count - 1 == self.kill_at:
            if self.delay:
                threading.Timer(self.delay, os.kill, (self.pid, self.signal)).start()
            else:
                os.kill(self.pid, self.signal)

    def watch_safetensors(self) -> None:
        """Count before and after each file that safetensors writes."""
        from safetensors import torch as safetensors

        write = safetensors.serialize_file

        def counted(tensors: Any, filename: Any, *args: Any, **kwargs: Any) -> Any:
            self.count_if_below(filename)
            result = write(tensors, filename, *args, **kwargs)
            self.count_if_below(filename)
            return result

        safetensors.serialize_file = counted


def train(options: dict[str, Any]) -> None:
    """A script that a job manager starts again and again: it resumes what is there."""
    from datasets import Dataset
    from transformers import PrinterCallback

    from left_trainer import LeftTrainer, LeftTrainingArguments
    from tiny import FAMILY_TYPES, tiny_model, tiny_rows, tiny_tokenizer

    family = options["family"]
    arguments = {
        "output_dir": str(Path(options["folder"]) / "run"),
        "peft_method": options["method"],
        "peft_kwargs": KWARGS.get(options["method"]),
        "learning_rate": 5e-3,
        "max_steps": TOTAL_STEPS,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 3,
        "save_total_limit": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 3,
        "use_cpu": True,
    }
    args = LeftTrainingArguments(**{**arguments, **options.get("arguments", {})})
    rows = Dataset.from_list(tiny_rows())
    trainer = LeftTrainer(
        tiny_model(FAMILY_TYPES[family]),
        args,
        train_dataset=rows,
        eval_dataset=rows.select(range(4)),
        processing_class=tiny_tokenizer(family),
    )
    trainer.remove_callback(PrinterCallback)
    if "signal_at_step" in options:
        trainer.add_callback(signal_callback(options["signal_at_step"], options["signal"]))
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model()
    if trainer.is_world_process_zero():
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        weights = {name: weight.double().sum().item() for name, weight in trainer.model.state_dict().items()}
        Path(options["result"]).write_text(json.dumps({"losses": losses, "weights": weights}))


KWARGS = {
    "adalora": {"init_r": 4, "target_r": 2},
    "p_tuning": {"num_virtual_tokens": 4, "encoder_hidden_size": 8},
}


def signal_callback(step: int, name: str) -> Any:
    from transformers import TrainerCallback

    class Signal(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == step:
                os.kill(os.getpid(), getattr(signal, name))

    return Signal()


def main() -> None:
    options = json.loads(sys.argv[1])
    killer = Killer(
        options["folder"], options.get("kill_at"), options.get("signal", "SIGKILL"), options.get("delay", 0.0)
    )
    killer.watch_safetensors()
    sys.addaudithook(killer.audit)
    status = 0
    if "command" in options:
        from left_trainer.cli.main import main as command_line

        sys.argv = ["left-trainer", *options["command"]]
        status = command_line() or 0
    else:
        from left_trainer import run_program

        status = run_program(lambda: train(options))
    if "count" in options:
        Path(options["count"]).write_text(str(killer.count))
    sys.exit(status)


if __name__ == "__main__":
    main()
