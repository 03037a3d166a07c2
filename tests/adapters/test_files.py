"""Adapters on disk: whole or absent, with what PEFT leaves out beside them."""

from __future__ import annotations

import signal
import subprocess

import pytest
import torch
from peft import PeftModel

from left_trainer import apply_method
from left_trainer.adapters.files import TRAINING_STATE_FILE
from left_trainer.methods.saving import save_adapter
from processes import ENVIRONMENT
from tiny import tiny_model

KILLED_WHILE_SAVING = """
import os, signal, sys
from tiny import tiny_model
import safetensors.torch, peft.peft_model
from left_trainer import apply_method
from left_trainer.adapters import files
from left_trainer.methods.saving import save_adapter
model = apply_method(tiny_model("t5"), "p_tuning", {"num_virtual_tokens": 3, "encoder_hidden_size": 8}, seed=1)
save_adapter(model, sys.argv[1])
for parameter in model.prompt_encoder.parameters():
    parameter.data.add_(1)
point = sys.argv[2]
def kill(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)
if point == "adapter":
    peft.peft_model.safe_save_file = kill
elif point == "sidecar":
    files.save_file = kill
else:
    os.fsync = kill
save_adapter(model, sys.argv[1])
"""


@pytest.mark.parametrize("point", ["adapter", "sidecar", "flush"])
def test_a_kill_while_saving_leaves_the_earlier_adapter(point, python, tmp_path):
    target = tmp_path / "adapter"
    command = [python, "-c", KILLED_WHILE_SAVING, str(target), point]
    result = subprocess.run(command, capture_output=True, env=ENVIRONMENT)
    assert result.returncode == -signal.SIGKILL, result.stderr.decode()
    expected = apply_method(tiny_model("t5"), "p_tuning", {"num_virtual_tokens": 3, "encoder_hidden_size": 8}, seed=1)
    loaded = PeftModel.from_pretrained(tiny_model("t5"), target)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        inputs = {"input_ids": ids, "decoder_input_ids": ids, "attention_mask": torch.ones_like(ids)}
        torch.testing.assert_close(loaded.eval()(**inputs).logits, expected.eval()(**inputs).logits)


def test_the_sidecar_holds_what_peft_leaves_out(tmp_path):
    for method, options, expected in (
        ("p_tuning", {"num_virtual_tokens": 3, "encoder_hidden_size": 8}, True),
        ("prefix_tuning", {"num_virtual_tokens": 3, "prefix_projection": True, "encoder_hidden_size": 8}, True),
        ("prefix_tuning", {"num_virtual_tokens": 3}, False),
        ("lora", {}, False),
    ):
        target = save_adapter(apply_method(tiny_model("t5"), method, options), tmp_path / method)
        assert (target / TRAINING_STATE_FILE).is_file() is expected, (method, options)
        assert not any(path.name.startswith(".") for path in tmp_path.iterdir())
