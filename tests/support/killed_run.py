"""A training for tests/trainer/test_kill.py, which starts this file as a script and kills it."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from datasets import Dataset
from transformers import TrainerCallback

from left_trainer import LeftTrainer, LeftTrainingArguments
from tiny import tiny_model, tiny_rows, tiny_tokenizer

TOTAL_STEPS = 12


class WaitAfter(TrainerCallback):
    """Waits to be killed once a step is done, so that the training cannot end before."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        while state.global_step == self.step:
            time.sleep(1)


def make_trainer(output_dir: str, callbacks: Sequence[TrainerCallback] = ()) -> LeftTrainer:
    args = LeftTrainingArguments(
        output_dir=output_dir,
        peft_method="p_tuning",
        peft_kwargs={"num_virtual_tokens": 4, "encoder_hidden_size": 8},
        max_steps=TOTAL_STEPS,
        per_device_train_batch_size=4,
        logging_steps=1,
        save_strategy="steps",
        save_steps=1,
        report_to="none",
        disable_tqdm=True,
        seed=2,
    )
    return LeftTrainer(
        tiny_model("t5"),
        args,
        train_dataset=Dataset.from_list(tiny_rows()),
        processing_class=tiny_tokenizer("encoder_decoder"),
        callbacks=list(callbacks),
    )


if __name__ == "__main__":
    make_trainer(sys.argv[1], [WaitAfter(int(sys.argv[2]))]).train()
