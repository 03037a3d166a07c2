"""A training that is killed at any moment goes on as if it had not been."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import losses

SCRIPT = """
import sys
sys.path[:0] = sys.argv[1].split(":")
from test_kill import make_trainer
make_trainer(sys.argv[2], slow=True).train()
"""
TOTAL_STEPS = 12


def make_trainer(output_dir: str, slow: bool = False):
    from conftest import tiny_model, tiny_rows, tiny_tokenizer
    from datasets import Dataset
    from transformers import TrainerCallback

    from left_trainer import LeftTrainer, LeftTrainingArguments

    class Wait(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            time.sleep(0.05)

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
        callbacks=[Wait()] if slow else [],
    )


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    trainer = make_trainer(str(tmp_path_factory.mktemp("whole")))
    trainer.train()
    return losses(trainer)


@pytest.mark.parametrize(("step", "delay"), [(2, 0.0), (4, 0.01), (7, 0.03)])
def test_a_killed_run_is_resumed(step, delay, uninterrupted, tmp_path):
    """Killed as soon as a checkpoint's folder appears, or a little later: during or after writing its files."""
    command = [sys.executable, "-c", SCRIPT, f"{Path(__file__).parent}:{Path(__file__).parents[1]}", str(tmp_path)]
    with subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not (tmp_path / f"checkpoint-{step}").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    resumed = make_trainer(str(tmp_path))
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == TOTAL_STEPS
    assert losses(resumed) == pytest.approx(uninterrupted, rel=1e-6)
