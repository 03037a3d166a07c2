"""Which adapters are kept during a training, and that a training goes on from them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import Trainer, TrainingArguments

from left_trainer import AdapterRestoreCallback, AdapterSaverCallback, LeftTrainer
from left_trainer.storage.manifest import MANIFEST_FILE
from log_history import losses
from tiny import tiny_model

LORA = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)


def run(make_args, tokenizers, rows, saver, **overrides):
    args = make_args(
        max_steps=10,
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        metric_for_best_model="eval_loss",
        greater_is_better=True,
        save_total_limit=2,
        learning_rate=1e-2,
        **overrides,
    )
    trainer = LeftTrainer(
        tiny_model("t5"),
        args,
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tokenizers["encoder_decoder"],
        callbacks=[saver],
    )
    trainer.train()
    return trainer


def test_the_last_and_the_best_are_kept(make_args, tokenizers, rows, tmp_path):
    trainer = run(make_args, tokenizers, rows, AdapterSaverCallback(tmp_path / "adapters"))
    assert trainer.state.best_global_step == 2  # the highest loss is the first
    names = {path.name for path in (tmp_path / "adapters").iterdir()}
    assert names == {"step-2", "step-8", "step-10", "best"}
    assert (tmp_path / "adapters" / "best").resolve().name == "step-2"
    files = {path.name for path in (tmp_path / "adapters" / "step-10").iterdir()}
    assert files == {"README.md", "adapter_config.json", "adapter_model.safetensors"}
    best = PeftModel.from_pretrained(tiny_model("t5"), tmp_path / "adapters" / "best")
    evaluated = LeftTrainer(
        tiny_model("t5"),
        make_args(output_dir=str(tmp_path / "other")),
        train_dataset=rows,
        processing_class=tokenizers["encoder_decoder"],
    )
    evaluated.model = best
    assert evaluated.evaluate(rows)["eval_loss"] == pytest.approx(trainer.state.best_metric, abs=1e-6)


@pytest.mark.parametrize("is_ours", [True, False])
def test_the_adapter_is_saved_at_the_end_without_a_save_strategy(is_ours, make_args, tokenizers, rows, tmp_path):
    saver, model = AdapterSaverCallback(tmp_path / "adapters"), get_peft_model(tiny_model("llama"), LORA)
    args = make_args(max_steps=3)
    if is_ours:
        options = {"args": args, "processing_class": tokenizers["decoder_only"], "train_dataset": rows}
        trainer = LeftTrainer(model, callbacks=[saver], **options)
    else:
        features = [{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}] * 8
        quiet = {"report_to": "none", "dataloader_pin_memory": False, "use_cpu": True}
        plain = TrainingArguments(str(tmp_path / "plain"), max_steps=3, save_strategy="no", **quiet)
        trainer = Trainer(model, plain, train_dataset=features, callbacks=[saver])
    trainer.train()
    assert [path.name for path in (tmp_path / "adapters").iterdir()] == ["step-3"]
    saved = PeftModel.from_pretrained(tiny_model("llama"), tmp_path / "adapters" / "step-3")
    for name, weight in get_peft_model_state_dict(saved).items():
        assert torch.equal(weight, get_peft_model_state_dict(model)[name].detach()), name


@pytest.mark.parametrize("others", [(), ("default", "third")])
def test_an_adapter_of_any_name_is_saved_resumed_and_restored(others, make_args, tokenizers, rows, tmp_path):
    """Where loaders look for it, whatever other adapters the model carries."""

    def trainer():
        model = tiny_model("llama")
        for number, name in enumerate((*others, "mine")):
            model = get_peft_model(model, LORA, name) if number == 0 else (model.add_adapter(name, LORA) or model)
        model.set_adapter("mine")
        best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
        steps = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
        args = make_args(learning_rate=1e-2, overwrite_output_dir=True, **best, **steps)
        options = {"args": args, "processing_class": tokenizers["decoder_only"], "callbacks": [AdapterSaverCallback()]}
        return LeftTrainer(model, train_dataset=rows, eval_dataset=rows, **options)

    whole = trainer()
    whole.train()
    assert whole.evaluate()["eval_loss"] == pytest.approx(whole.state.best_metric, abs=1e-6)
    whole.save_model()
    folder = Path(whole.args.output_dir)
    for path in (folder, folder / "adapters" / "best", folder / "checkpoint-2"):
        assert not [inner for inner in path.iterdir() if inner.name in (*others, "mine")]
        whole.model = PeftModel.from_pretrained(tiny_model("llama"), path)
        assert whole.evaluate()["eval_loss"] == pytest.approx(whole.state.best_metric, abs=1e-6)
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    assert losses(resumed) == pytest.approx(losses(whole), rel=1e-6)


def test_adapters_of_an_earlier_run_are_not_mixed_in(make_args, tokenizers, rows, tmp_path):
    run(make_args, tokenizers, rows, AdapterSaverCallback(tmp_path / "adapters"))
    with pytest.raises(FileExistsError, match=r"AdapterSaverCallback\(directory="):
        run(
            make_args,
            tokenizers,
            rows,
            AdapterSaverCallback(tmp_path / "adapters"),
            output_dir=str(tmp_path / "second"),
        )
    run(make_args, tokenizers, rows, AdapterSaverCallback(tmp_path / "adapters"), overwrite_output_dir=True)


def test_a_prefix_projection_resumes(make_args, tokenizers, tmp_path):
    rows = Dataset.from_list([{"prompt": f"Say {i}", "completion": f"{i}{i}"} for i in range(8)])
    options = {"num_virtual_tokens": 3, "prefix_projection": True, "encoder_hidden_size": 8}

    def trainer():
        args = make_args(peft_method="prefix_tuning", peft_kwargs=options, save_strategy="steps", save_steps=2)
        return LeftTrainer(tiny_model("t5"), args, train_dataset=rows, processing_class=tokenizers["encoder_decoder"])

    whole = trainer()
    whole.train()
    resumed = trainer()
    resumed.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / "checkpoint-2"))
    assert losses(resumed) == pytest.approx(losses(whole), rel=1e-6)


def test_the_callbacks_do_no_harm_under_left_trainer(make_args, tokenizers, rows, tmp_path):

    def trainer(folder, callbacks):
        args = make_args(
            output_dir=str(tmp_path / folder),
            peft_method="p_tuning",
            peft_kwargs={"num_virtual_tokens": 3, "encoder_hidden_size": 8},
            save_strategy="steps",
            save_steps=2,
            eval_strategy="steps",
            eval_steps=2,
            load_best_model_at_end=True,
            metric_for_best_model="eval_loss",
            greater_is_better=True,
            learning_rate=1e-2,
        )
        return LeftTrainer(
            tiny_model("t5"),
            args,
            train_dataset=rows,
            eval_dataset=rows,
            processing_class=tokenizers["encoder_decoder"],
            callbacks=callbacks,
        )

    def both(folder):
        return [AdapterSaverCallback(tmp_path / folder / "adapters"), AdapterRestoreCallback()]

    without, observed = trainer("without", []), trainer("with", both("with"))
    without.train()
    observed.train()
    assert losses(observed) == losses(without)
    assert observed.evaluate()["eval_loss"] == pytest.approx(without.state.best_metric, abs=1e-6)
    # From the checkpoint of another run, while output_dir holds one of the same step.
    resumed = trainer("with", both("elsewhere"))
    resumed.train(resume_from_checkpoint=str(tmp_path / "without" / "checkpoint-2"))
    assert losses(resumed) == pytest.approx(losses(without), rel=1e-6)


def test_a_checkpoint_of_another_adapter_is_refused(make_args, tokenizers, rows):
    def trainer(targets):
        args = make_args(save_strategy="steps", save_steps=2, peft_kwargs={"target_modules": targets})
        return LeftTrainer(tiny_model("llama"), args, train_dataset=rows, processing_class=tokenizers["decoder_only"])

    first = trainer(["q_proj"])
    first.train()
    with pytest.raises(ValueError, match=r"target_modules was \['q_proj'\] and is \['v_proj'\]"):
        trainer(["v_proj"]).train(resume_from_checkpoint=True)
    for manifest in Path(first.args.output_dir).glob(f"*/{MANIFEST_FILE}"):  # as of another trainer
        manifest.unlink()
    with pytest.raises(ValueError, match="does not fit"):
        trainer(["v_proj"]).train(resume_from_checkpoint=True)
