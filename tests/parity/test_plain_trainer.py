"""The same seed gives the same losses as the plain trainer with the same PEFT config."""

from __future__ import annotations

import pytest
from datasets import Dataset
from peft import LoraConfig, PrefixTuningConfig, get_peft_model
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, set_seed
from trl import SFTConfig, SFTTrainer

from left_trainer import LeftTrainer
from left_trainer.methods.hooks import MethodHooks
from log_history import losses
from tiny import tiny_model

OPTIONS = {
    "max_steps": 6,
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "seed": 11,
    "use_cpu": True,
}
TASKS = {"t5": "SEQ_2_SEQ_LM", "llama": "CAUSAL_LM"}


def configs(model_type):
    return {
        "lora": LoraConfig(task_type=TASKS[model_type], r=4, lora_alpha=8, lora_dropout=0.1),
        "prefix_tuning": PrefixTuningConfig(
            task_type=TASKS[model_type],
            num_virtual_tokens=3,
            **({"token_dim": 24, "num_attention_heads": 2} if model_type == "t5" else {}),
        ),
    }


@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("method", ["lora", "prefix_tuning"])
def test_encoder_decoder(method, dropout, rows: Dataset, tokenizers, tmp_path):
    tokenizer = tokenizers["encoder_decoder"]
    args = Seq2SeqTrainingArguments(output_dir=str(tmp_path / "ours"), **OPTIONS)
    ours = LeftTrainer(
        tiny_model("t5", dropout=dropout),
        args,
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=configs("t5")[method],
    )
    ours.train()

    set_seed(OPTIONS["seed"])
    model = get_peft_model(tiny_model_then_seed("t5", dropout), configs("t5")[method])
    plain = Seq2SeqTrainer(
        model,
        Seq2SeqTrainingArguments(output_dir=str(tmp_path / "plain"), **OPTIONS),
        train_dataset=ours.train_dataset,
        data_collator=ours.data_collator,
        processing_class=tokenizer,
    )
    plain.train()
    assert losses(ours) == pytest.approx(losses(plain), abs=1e-6)
    assert losses(ours)[-1] != losses(ours)[0]


@pytest.mark.parametrize("method", ["lora", "prefix_tuning"])
def test_decoder_only(method, rows: Dataset, tokenizers, tmp_path, monkeypatch):
    tokenizer = tokenizers["decoder_only"]
    # Ours start from text; the plain trainer's at random.
    monkeypatch.setattr(MethodHooks, "initialize", lambda *_: None)

    def args(name):
        return SFTConfig(
            output_dir=str(tmp_path / name),
            activation_checkpointing=False,
            gradient_checkpointing=None,
            bf16=False,
            **OPTIONS,
        )

    ours = LeftTrainer(
        tiny_model("llama"),
        args("ours"),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=configs("llama")[method],
    )
    ours.train()
    plain = SFTTrainer(
        tiny_model("llama"),
        args("plain"),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=configs("llama")[method],
    )
    plain.train()
    assert losses(ours) == pytest.approx(losses(plain), abs=1e-6)


@pytest.mark.parametrize("strategy", ["bfd", "wrapped"])
@pytest.mark.filterwarnings("ignore")
def test_packing(strategy, rows: Dataset, make_args, tokenizers, tmp_path):
    """Several rows in one sequence, which TRL builds; our loss must still skip what is no completion."""
    options = {**OPTIONS, "packing": True, "packing_strategy": strategy, "max_length": 64}
    options |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    common = {"train_dataset": rows, "processing_class": tokenizers["decoder_only"]}
    ours = LeftTrainer(tiny_model("llama"), make_args(**options), peft_config=configs("llama")["lora"], **common)
    ours.train()
    args = SFTConfig(output_dir=str(tmp_path / "plain"), activation_checkpointing=False, bf16=False, **options)
    plain = SFTTrainer(tiny_model("llama"), args, peft_config=configs("llama")["lora"], **common)
    plain.train()
    assert losses(ours) == pytest.approx(losses(plain), rel=1e-5)
    assert losses(ours)[-1] != losses(ours)[0]
    assert len(ours.train_dataset) < len(rows)
    assert not ours.fast_paths["linear_cross_entropy"].fell_back


def tiny_model_then_seed(model_type, dropout):
    """A model whose construction leaves the random state as `set_seed` of the run set it."""
    model = tiny_model(model_type, dropout=dropout)
    set_seed(OPTIONS["seed"])
    return model
