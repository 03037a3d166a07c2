"""Which record belongs to a model, and the files that join the two."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, PromptEncoderConfig, get_peft_model

from left_trainer import apply_method, get_method
from left_trainer.adapters.files import TRAINING_STATE_FILE
from left_trainer.methods.apply import find_method
from left_trainer.methods.saving import load_trained, restore_training_state, save_adapter
from left_trainer.storage.whole import whole_directory
from tiny import tiny_model

P_TUNING = {"num_virtual_tokens": 3, "encoder_hidden_size": 8}


def test_the_name_tells_presets_with_equal_configs_apart():
    model = apply_method(tiny_model("llama"), "pissa")
    assert find_method(model) is get_method("pissa")
    assert find_method(get_peft_model(tiny_model("llama"), model.active_peft_config)) is get_method("lora")


def test_a_model_that_was_not_wrapped_by_us():
    assert find_method(tiny_model("llama")) is None
    full = apply_method(tiny_model("llama"), "full")
    assert find_method(full) is get_method("full")
    wrapped = get_peft_model(full, LoraConfig(task_type="CAUSAL_LM"))
    assert find_method(wrapped) is get_method("lora")  # and not what the model inside was trained with
    prompts = get_peft_model(tiny_model("llama"), PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    assert find_method(prompts) is get_method("p_tuning")


def test_a_sidecar_of_another_method_is_refused(tmp_path):
    save_adapter(apply_method(tiny_model("t5"), "p_tuning", P_TUNING), tmp_path / "adapter")
    with pytest.raises(ValueError, match="peft_method='lora' has no use for"):
        restore_training_state(apply_method(tiny_model("t5"), "lora"), tmp_path / "adapter")


def test_a_missing_sidecar_is_refused(tmp_path):
    model = apply_method(tiny_model("t5"), "p_tuning", P_TUNING)
    (save_adapter(model, tmp_path / "adapter") / TRAINING_STATE_FILE).unlink()
    with pytest.raises(FileNotFoundError, match="p_tuning cannot be restored for training"):
        restore_training_state(model, tmp_path / "adapter")


@pytest.mark.parametrize("is_trainable", [True, False])
@pytest.mark.parametrize(("method", "options"), [("p_tuning", P_TUNING), ("prompt_tuning", {"num_virtual_tokens": 3})])
def test_a_soft_prompt_loads_for_training_and_for_use(method, options, is_trainable, saved_models, tmp_path):
    base = load_trained(str(saved_models["decoder_only"]))
    model = apply_method(base, method, options, seed=1)
    path = save_adapter(model, tmp_path / "adapter")
    loaded = load_trained(str(path), is_trainable=is_trainable)
    assert loaded.active_peft_config.inference_mode is not is_trainable
    torch.testing.assert_close(loaded.get_prompt(1), model.get_prompt(1))


def test_an_error_inside_leaves_the_earlier_directory(tmp_path):
    target = tmp_path / "adapter"
    for text in ("first", "second"):
        try:
            with whole_directory(target) as folder:
                (folder / "file").write_text(text)
                if text == "second":
                    raise RuntimeError
        except RuntimeError:
            pass
    assert (target / "file").read_text() == "first"
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
