"""A process of the campaign whose disk goes away: trains, saves, and at the end of a step does what it is told.

python disk_victim.py '{"run": RUN, "method": "lora", "family": "decoder_only", "at_step": [3, ["rm", "-r", RUN]]}'
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from left_trainer import AdapterSaverCallback, LeftTrainer, LeftTrainingArguments, run_program
from tiny import FAMILY_TYPES, tiny_model, tiny_rows, tiny_tokenizer

KWARGS = {"p_tuning": {"num_virtual_tokens": 4, "encoder_hidden_size": 8}}


class AtStep(TrainerCallback):
    """Runs a command, or sends SIGTERM to this process for an empty one, at the end of a step."""

    def __init__(self, step: int, command: list[str]) -> None:
        self.step, self.command = step, command

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step == self.step:
            if self.command:
                subprocess.run(self.command, check=True)
            else:
                os.kill(os.getpid(), signal.SIGTERM)


def main(options: dict[str, Any]) -> None:
    args = LeftTrainingArguments(
        output_dir=options["run"],
        peft_method=options["method"],
        peft_kwargs=KWARGS.get(options["method"]),
        max_steps=6,
        per_device_train_batch_size=4,
        logging_steps=1,
        save_strategy="steps",
        save_steps=2,
        report_to="none",
        disable_tqdm=True,
        seed=3,
        use_cpu=True,
        overwrite_output_dir=True,
    )
    trainer = LeftTrainer(
        tiny_model(FAMILY_TYPES[options["family"]]),
        args.replaced(save_strategy="no") if options.get("final_only") else args,
        train_dataset=Dataset.from_list(tiny_rows()),
        processing_class=tiny_tokenizer(options["family"]),
        callbacks=[AdapterSaverCallback()] if options.get("adapters") else [],
    )
    trainer.remove_callback(PrinterCallback)
    if "at_step" in options:
        trainer.add_callback(AtStep(*options["at_step"]))
    trainer.train(resume_from_checkpoint=not options.get("final_only"))
    trainer.save_model()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    Path(options["result"]).write_text(json.dumps(losses))


if __name__ == "__main__":
    sys.exit(run_program(lambda: main(json.loads(sys.argv[1]))))
