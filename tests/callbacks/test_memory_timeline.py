"""Where memory goes within a step, on trainers that people already have."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset
from matplotlib.image import imread
from transformers import DataCollatorForSeq2Seq, Seq2SeqTrainer, Seq2SeqTrainingArguments
from trl import SFTConfig, SFTTrainer

from left_trainer import LeftTrainer, LeftTrainingArguments, MemoryProfilerCallback
from left_trainer.callbacks.memory_timeline import layer_of
from log_history import losses
from tiny import tiny_model

FEATURES = [{"input_ids": [5 + i, 6, 7], "labels": [8, 9 + i % 5, 1]} for i in range(16)]
OPTIONS = {"max_steps": 3, "logging_steps": 1, "report_to": "none", "disable_tqdm": True, "use_cpu": True, "seed": 3}
KINDS = ("Seq2SeqTrainer", "SFTTrainer", "LeftTrainer")


def trained(kind, folder, tokenizers, callback, **options):
    given = {**OPTIONS, "output_dir": str(folder), "save_strategy": "no", **options}
    family = "decoder_only" if kind == "SFTTrainer" else "encoder_decoder"
    common = {"processing_class": tokenizers[family], "callbacks": [callback] if callback else []}
    torch.manual_seed(0)
    if kind == "SFTTrainer":
        rows = Dataset.from_list([{"prompt": f"Say {i}:", "completion": f" {i}{i}"} for i in range(16)])
        args = SFTConfig(activation_checkpointing=False, gradient_checkpointing=None, bf16=False, **given)
        trainer = SFTTrainer(tiny_model("llama"), args, train_dataset=rows, **common)
    elif kind == "LeftTrainer":
        args = LeftTrainingArguments(peft_method="lora", **given)
        trainer = LeftTrainer(tiny_model("t5"), args, train_dataset=Dataset.from_list(FEATURES), **common)
    else:
        model, args = tiny_model("t5"), Seq2SeqTrainingArguments(**given)
        collator = DataCollatorForSeq2Seq(tokenizers[family], model)
        trainer = Seq2SeqTrainer(model, args, train_dataset=FEATURES, data_collator=collator, **common)
    trainer.train()
    return trainer


@pytest.mark.parametrize("n_batches", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_told_by_phase_part_and_layer(kind, n_batches, tokenizers, tmp_path, capsys):
    callback = MemoryProfilerCallback(timeline=True)
    trainer = trained(kind, tmp_path, tokenizers, callback, gradient_accumulation_steps=n_batches)
    found = callback.timeline
    passes = ["forward", "backward"] * n_batches
    phases = [phase for phase, _ in found.samples]
    assert [phase for index, phase in enumerate(phases) if phases[index - 1 : index] != [phase]] == [
        *passes,
        "optimizer",
    ]
    assert found.step == 2
    assert found.peak.n_bytes == sum(found.peak.parts.values()) == max(size for _, size in found.samples)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in trainer.model.parameters())
    assert found.peak.parts.get("frozen weights", 0) + found.peak.parts["trained weights"] >= weights
    assert found.peak.parts["optimizer state"] > 0
    layers = [layer for layer in found.modules if layer.split(".")[-1].isdigit()]
    assert len(layers) >= 2
    assert sum(found.modules.values()) == found.peak.parts["activations"]
    text = capsys.readouterr().out
    assert "Memory within step 2: " in text
    assert "Saved for the backward pass" in text
    assert imread(tmp_path / "memory_timeline.png").size


def test_watching_changes_no_number(tokenizers, tmp_path):
    plain = trained("Seq2SeqTrainer", tmp_path / "plain", tokenizers, None)
    watched = trained("Seq2SeqTrainer", tmp_path / "watched", tokenizers, MemoryProfilerCallback(timeline=True))
    assert losses(watched) == losses(plain)


def test_nothing_is_watched_unless_asked(tokenizers, tmp_path):
    callback = MemoryProfilerCallback()
    trained("Seq2SeqTrainer", tmp_path, tokenizers, callback)
    assert callback.timeline is None
    assert not (tmp_path / "memory_timeline.png").exists()


@pytest.mark.parametrize(
    ("module", "layer"),
    [("model.layers.3.mlp.up_proj", "model.layers.3"), ("lm_head", "lm_head"), ("", "outside of modules")],
)
def test_modules_are_told_by_layer(module, layer):
    assert layer_of(module) == layer
