"""A training that is killed at any moment goes on as if it had not been."""

from __future__ import annotations

import signal
import subprocess
import time

import pytest

import killed_run
from killed_run import TOTAL_STEPS, make_trainer
from log_history import losses
from processes import ENVIRONMENT, kill


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    trainer = make_trainer(str(tmp_path_factory.mktemp("whole")))
    trainer.train()
    return losses(trainer)


@pytest.mark.parametrize(("step", "delay"), [(2, 0.0), (4, 0.01), (7, 0.03)])
def test_a_killed_run_is_resumed(step, delay, uninterrupted, python, tmp_path):
    """Killed as soon as a checkpoint's folder appears, or a little later: during or after writing its files."""
    command = [python, killed_run.__file__, str(tmp_path), str(step + 2)]
    with subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE) as process:
        while not (tmp_path / f"checkpoint-{step}").exists():
            assert process.poll() is None
            time.sleep(0.001)
        time.sleep(delay)
        kill(process)
    assert process.returncode == -signal.SIGKILL
    resumed = make_trainer(str(tmp_path))
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == TOTAL_STEPS
    assert losses(resumed) == pytest.approx(uninterrupted, rel=1e-6)
