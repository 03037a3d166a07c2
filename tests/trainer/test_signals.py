"""Ctrl-C and SIGTERM: a checkpoint after the step, the exit code of the signal, one run to a folder."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys

import pytest
from datasets import Dataset
from transformers import TrainerCallback

from left_trainer import AdapterSaverCallback, LeftTrainer
from left_trainer.methods.saving import save_adapter
from left_trainer.storage.locks import FolderInUseError
from processes import ENVIRONMENT
from tiny import tiny_model, tiny_rows

HOLDS_THE_LOCK = """
import sys, time
from left_trainer.storage.locks import folder_lock
with folder_lock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


class SignalAt(TrainerCallback):
    """Sends signals to this process at the end of a step, or in the first batch of the evaluation after it."""

    def __init__(self, step, *signals, in_evaluation=False):
        self.step, self.signals, self.in_evaluation = step, signals, in_evaluation

    def send(self, state):
        if state.global_step == self.step:
            for number in self.signals:
                os.kill(os.getpid(), number)

    def on_step_end(self, args, state, control, **kwargs):
        if not self.in_evaluation:
            self.send(state)

    def on_prediction_step(self, args, state, control, **kwargs):
        if self.in_evaluation:
            self.send(state)


@pytest.fixture
def make_trainer(make_args, tokenizers):
    def make(*callbacks, **options):
        rows = Dataset.from_list(tiny_rows())
        return LeftTrainer(
            tiny_model("llama"),
            make_args(**options),
            train_dataset=rows,
            eval_dataset=rows.select(range(4)),
            processing_class=tokenizers["decoder_only"],
            callbacks=list(callbacks),
        )

    return make


@pytest.mark.parametrize(
    ("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)], ids=["SIGINT", "SIGTERM"]
)
@pytest.mark.parametrize("in_evaluation", [False, True])
def test_a_signal_saves_a_checkpoint_and_reaches_the_caller(number, error, in_evaluation, make_trainer, capfd):
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    evaluation = {"eval_strategy": "steps", "eval_steps": 2} if in_evaluation else {}
    trainer = make_trainer(SignalAt(2, number, in_evaluation=in_evaluation), **evaluation)
    with pytest.raises(error) as caught:
        trainer.train()
    assert getattr(caught.value, "code", 143) == 143
    said = capfd.readouterr().err.strip().splitlines()
    assert [line for line in said if "checkpoint-2" in line] == said[-1:]
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    resumed = make_trainer(**evaluation)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 4
    assert [entry["step"] for entry in resumed.state.log_history if "loss" in entry] == [1, 2, 3, 4]


def test_a_second_signal_stops_at_once(make_trainer, tmp_path):
    trainer = make_trainer(SignalAt(2, signal.SIGTERM, signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_without_save_on_signal_the_first_stops(make_trainer, tmp_path):
    trainer = make_trainer(SignalAt(2, signal.SIGINT), save_on_signal=False)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert not list((tmp_path / "run").glob("checkpoint-*"))


def test_a_folder_that_another_process_uses_is_refused_before_anything_is_loaded(make_trainer, tmp_path):
    trainer = make_trainer()
    command = [sys.executable, "-c", HOLDS_THE_LOCK, str(tmp_path / "run")]
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"held\n"
        with pytest.raises(FolderInUseError, match=f"process {process.pid}"):
            make_trainer()
        with pytest.raises(FolderInUseError, match=f"process {process.pid}"):
            trainer.train()
        process.kill()
    make_trainer().train()


def test_every_file_of_a_run_has_the_permissions_of_others(make_trainer, tmp_path):
    before = os.umask(0o022)
    try:
        trainer = make_trainer(AdapterSaverCallback(), save_strategy="steps", save_steps=2)
        trainer.train()
        trainer.save_model()
        save_adapter(trainer.model, tmp_path / "adapter")
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    wrong = {str(path) for path in files if stat.S_IMODE(path.stat().st_mode) != 0o644}
    assert files
    assert not wrong
