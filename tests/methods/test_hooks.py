"""What a method needs beyond a config: optimizers, initialisations, schedules, quantization."""

from __future__ import annotations

import json

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from peft.tuners.adalora.layer import AdaLoraLayer
from transformers import AutoModelForCausalLM

from left_trainer import LeftTrainer, LeftTrainingArguments, apply_method, get_method
from left_trainer.adapters.residual_base import lora_layers
from method_settings import BaseModels
from tiny import tiny_model, tiny_rows, tiny_tokenizer

FAMILY = "decoder_only"


@pytest.fixture
def trainer(tmp_path):
    def make(method: str, peft_kwargs: dict | None = None, **options) -> LeftTrainer:
        base = BaseModels(tmp_path / "bases")
        (tmp_path / "bases").mkdir(exist_ok=True)
        args = LeftTrainingArguments(
            output_dir=str(tmp_path / "run"),
            peft_method=method,
            peft_kwargs=peft_kwargs,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            logging_steps=1,
            **{"max_steps": 10, "learning_rate": 1e-2, **options},
        )
        rows = Dataset.from_list(tiny_rows())
        path = str(base[method, FAMILY])
        return LeftTrainer(path, args, train_dataset=rows, eval_dataset=rows, processing_class=tiny_tokenizer(FAMILY))

    return make


def ranks(model: PeftModel) -> list[int]:
    layers = [module for module in model.modules() if isinstance(module, AdaLoraLayer)]
    return [int(layer.lora_E["default"].ne(0).sum()) for layer in layers]


def test_adalora_reassigns_ranks_by_the_runs_own_steps(trainer):
    run = trainer("adalora", {"init_r": 4, "target_r": 2})
    run.train()
    config = run.model.active_peft_config
    assert (config.total_step, config.tinit, config.tfinal) == (10, 1, 3)
    found = ranks(run.model)
    assert sum(found) <= 2 * len(found) < 4 * len(found)


def test_adalora_without_steps_for_its_schedule(trainer):
    with pytest.raises(ValueError, match="reassign ranks"):
        trainer("adalora", max_steps=1).train()


def test_lora_plus_has_a_higher_rate_for_b(trainer):
    run = trainer("lora_plus", {"loraplus_lr_ratio": 4.0}, learning_rate=1e-3, lr_scheduler_type="constant")
    run.train()
    names = {parameter: name for name, parameter in run.model.named_parameters()}
    for group in run.optimizer.param_groups:
        for parameter in group["params"]:
            assert group["lr"] == pytest.approx(4e-3 if "lora_B" in names[parameter] else 1e-3)


def test_lora_fa_freezes_a_and_refuses_other_optimizers(trainer):
    run = trainer("lora_fa")
    before = {name: layer.lora_A["default"].weight.clone() for name, layer in lora_layers(run.model).items()}
    run.train()
    for name, layer in lora_layers(run.model).items():
        assert torch.equal(layer.lora_A["default"].weight, before[name])
    with pytest.raises(ValueError, match="Leave optim at its default"):
        trainer("lora_fa", optim="sgd").train()


@pytest.mark.parametrize("method", ["pissa", "olora", "corda", "lora_ga"])
def test_a_residual_base_is_saved_as_plain_lora_on_the_original_base(method, trainer, tmp_path):
    run = trainer(method, {"r": 2})
    original = AutoModelForCausalLM.from_pretrained(run.model.get_base_model().config._name_or_path).eval()
    ids = torch.tensor([[5, 6, 7]])
    run.train()
    run.save_model()
    with torch.no_grad():
        expected = original(ids).logits
        with run.without_adapter():
            torch.testing.assert_close(run.model.eval()(ids).logits, expected, rtol=0, atol=1e-5)
        trained = run.model(ids).logits
        assert not torch.allclose(trained, expected, atol=1e-3)
        config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
        assert (config["r"], config["init_lora_weights"]) == (4, True)
        loaded = PeftModel.from_pretrained(original, tmp_path / "run").eval()
        torch.testing.assert_close(loaded(ids).logits, trained, rtol=0, atol=1e-5)


def test_loftq_starts_nearer_to_the_original_weights(trainer):
    run = trainer("loftq", {"r": 8, "lora_alpha": 16})
    name = run.model.get_base_model().config._name_or_path
    original = dict(AutoModelForCausalLM.from_pretrained(name).named_modules())
    ids = torch.eye(64)

    def error() -> float:
        return sum(
            (layer(ids) - original[full.removeprefix("base_model.model.")](ids)).norm().item()
            for full, layer in lora_layers(run.model).items()
        )

    with torch.no_grad():
        before = error()
        run.hooks.initialize(run.model, run._first_batches, 0)
        assert error() < 0.9 * before


def test_four_bit_layers_keep_their_gradients_after_an_evaluation(trainer):
    plain, evaluated = (trainer("qlora", max_steps=2, overwrite_output_dir=True) for _ in range(2))
    evaluated.evaluate()
    for run in (plain, evaluated):
        run.train()
    losses = [[entry["loss"] for entry in run.state.log_history if "loss" in entry] for run in (plain, evaluated)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


def test_what_makes_a_preset_cannot_be_changed():
    with pytest.raises(ValueError, match="use_dora=True defines"):
        apply_method(tiny_model("llama"), "dora", {"use_dora": False})


def test_required_options_and_packages(monkeypatch):
    with pytest.raises(ValueError, match="a dict from names to the folders"):
        apply_method(tiny_model("llama"), "xlora")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match="pip install scikit-learn"):
        apply_method(tiny_model("llama"), "adamss")


def test_several_tasks_need_to_know_which_row_is_which(tmp_path):
    args = LeftTrainingArguments(output_dir=str(tmp_path), peft_method="poly", peft_kwargs={"n_tasks": 2})
    rows = Dataset.from_list(tiny_rows())
    with pytest.raises(ValueError, match="Add a column 'task_ids'"):
        LeftTrainer(tiny_model("t5"), args, train_dataset=rows, processing_class=tiny_tokenizer("encoder_decoder"))
    args.max_steps, args.report_to = 2, []
    tasks = rows.add_column("task_ids", [index % 2 for index in range(len(rows))])
    LeftTrainer(tiny_model("t5"), args, train_dataset=tasks, processing_class=tiny_tokenizer("encoder_decoder")).train()


@pytest.mark.parametrize("method", ["poly", "multitask_prompt_tuning"])
def test_the_base_model_generates_without_task_ids(method, trainer):
    run = trainer(method, predict_with_generate=True, generation_max_length=3)
    with run.without_adapter():
        assert "eval_rougeL" in run.evaluate()


def test_a_quantized_base_is_needed_and_refused(tmp_path):
    args = LeftTrainingArguments(output_dir=str(tmp_path), peft_method="qlora")
    tokenizer, rows = tiny_tokenizer(FAMILY), Dataset.from_list(tiny_rows())
    with pytest.raises(ValueError, match="needs a quantized base"):
        LeftTrainer(tiny_model("llama"), args, train_dataset=rows, processing_class=tokenizer)
    model = tiny_model("llama")
    model.config.quantization_config = {"load_in_4bit": True}
    args = LeftTrainingArguments(output_dir=str(tmp_path), peft_method="boft")
    with pytest.raises(ValueError, match="a quantized base model does not work with peft_method='boft'"):
        LeftTrainer(model, args, train_dataset=rows, processing_class=tokenizer)
    assert not get_method("boft").supports("quantized_base")
