"""Which adapters are kept during a training, and that a training goes on from them."""

from __future__ import annotations

from pathlib import Path

import pytest
from datasets import Dataset
from peft import PeftModel

from left_trainer import AdapterRestoreCallback, AdapterSaverCallback, LeftTrainer
from log_history import losses
from tiny import tiny_model


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
