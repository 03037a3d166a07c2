"""What a run sends to trackers, each for real and offline: figures, configuration, pictures, and no token."""

from __future__ import annotations

import importlib.util
import subprocess
from pathlib import Path

import pytest

from processes import ENVIRONMENT

TOKENS = ("hf_secretsecretsecret1", "hf_secretsecretsecret2")
RUN = [
    *("--max_steps", "4", "--logging_steps", "1", "--max_train_samples", "16", "--max_eval_samples", "4"),
    *("--per_device_train_batch_size", "4", "--predict_with_generate", "false", "--report_plan", "false"),
    *("--token", TOKENS[0], "--hub_token", TOKENS[1], "--model_init_kwargs", f'{{"token": "{TOKENS[0]}"}}'),
]


def train(python: str, folder: Path, tracker: str, **environment: str) -> bytes:
    """A training of the command line. Returns all that it wrote."""
    words = ["train", "--output_dir", str(folder / "my_run"), "--report_to", tracker, *RUN]
    result = subprocess.run(
        [python, "-m", "left_trainer.cli.main", *words],
        env={**ENVIRONMENT, **environment},
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    written = b"".join(file.read_bytes() for file in folder.rglob("*") if file.is_file())
    for token in TOKENS:
        assert token.encode() not in written
    return written


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard(python, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(python, tmp_path, "tensorboard")
    (folder,) = {file.parent for file in (tmp_path / "my_run").rglob("events.out.*")}
    events = EventAccumulator(str(folder)).Reload()
    tags = events.Tags()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]
    assert {"eval/loss", "train/learning_rate", "train/grad_norm"} <= set(tags["scalars"])
    assert sorted(tags["images"]) == ["pictures/loss", "pictures/memory"]
    text = b"".join(events.Tensors("args/text_summary")[0].tensor_proto.string_val)
    assert b'"peft_method": "lora"' in text


@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="wandb is not installed")
def test_wandb(python, tmp_path):
    environment = {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}
    written = train(python, tmp_path, "wandb", **environment)
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    pictures = {file.name.rpartition("_")[0].rpartition("_")[0] for file in run.rglob("*.png")}
    assert pictures == {"loss", "memory"}
    for part in (b"peft_method", b"train/loss", b"eval/loss", b"my_run"):
        assert part in written


@pytest.mark.skipif(importlib.util.find_spec("trackio") is None, reason="trackio is not installed")
def test_trackio(python, tmp_path):
    written = train(python, tmp_path, "trackio", TRACKIO_DIR=str(tmp_path / "trackio"))
    pictures = list((tmp_path / "trackio").rglob("*.png"))
    assert len(pictures) == 2
    for part in (b"peft_method", b"train/loss", b"my_run"):
        assert part in written
