"""`shrink_to="vocabulary=data"`: a run with the tokens of its data alone, from rows to a moved folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import IterableDataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, GenerationConfig

from left_trainer import LeftTrainer, load_tokenizer, text_metrics
from left_trainer.models import load_model
from left_trainer.runs.inference import Generator
from left_trainer.runs.merging import merge_adapter
from method_settings import settings
from tiny import FAMILY_TYPES, tiny_model, tiny_rows, tiny_tokenizer

FAMILIES = tuple(FAMILY_TYPES)
AUTO = {"encoder_decoder": AutoModelForSeq2SeqLM, "decoder_only": AutoModelForCausalLM}
# Digits, which are in no row, and colours: fewer tokens than the tokenizer has.
ROWS = [{"prompt": "Repeat now:", "completion": f" {colour}"} for colour in ("red", "green", "blue", "red green")] * 4
ASKED = {"shrink_to": "vocabulary=data"}
# One of each kind: whole weights, low-rank updates, a residual base, virtual tokens, a prefix, biases, ids of tokens.
METHODS = (
    "full", "lora", "pissa", "prompt_tuning", "p_tuning_v2", "bitfit", "trainable_tokens", "houlsby_adapter", "cpt",
)  # fmt: skip


def trainer_for(family: str, make_args: Any, saved_models: Any, rows: Any = ROWS, **options: Any) -> LeftTrainer:
    args = make_args(**{**ASKED, "generation_max_length": 6, **options})
    return LeftTrainer(str(saved_models[family]), args, train_dataset=rows, eval_dataset=rows[:4])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_what_is_saved_answers_as_the_trained_model(method, family, make_args, saved_models, tmp_path):
    """Also from another place, and without the base that it was made of."""
    if method == "cpt" and family == "encoder_decoder":
        pytest.skip("cpt is for decoder-only models")
    options = {**settings(method, family, tmp_path), "peft_method": method, "predict_with_generate": True}
    base = tmp_path / "whole"
    shutil.copytree(saved_models[family], base)
    trainer = trainer_for(family, make_args, {family: base}, **options, save_strategy="steps", save_steps=4)
    size = len(trainer.processing_class)
    assert trainer.vocabulary.size_after == size < len(load_tokenizer(base))
    trainer.train()
    trainer.save_model()
    ids = trainer.predict(ROWS[:4]).predictions
    written = trainer.processing_class.batch_decode(ids.clip(0), skip_special_tokens=True)
    assert int(ids.max()) < size
    shutil.rmtree(base)
    for folder in ("", "checkpoint-4"):
        moved = tmp_path / f"moved{folder}"
        shutil.copytree(Path(trainer.args.output_dir) / folder, moved, ignore=shutil.ignore_patterns("checkpoint-*"))
        assert Generator(str(moved), max_new_tokens=6)([row["prompt"] for row in ROWS[:4]]) == [
            text.strip() for text in written
        ]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_base_beside_an_adapter_is_a_plain_model(family, make_args, saved_models, tmp_path):
    trainer = trainer_for(family, make_args, saved_models, peft_method="lora")
    base = trainer.model.get_base_model()
    whole = load_model(str(saved_models[family]))
    kept = torch.tensor(trainer.vocabulary.kept_ids)
    trainer.train()
    trainer.save_model()
    folder = Path(trainer.args.output_dir)
    plain, info = AUTO[family].from_pretrained(folder / "base", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(plain.get_input_embeddings().weight, whole.get_input_embeddings().weight[kept])
    assert plain.config.vocab_size == base.config.vocab_size == len(kept)
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(folder / "base")
    assert not [name for name in trainer.model.state_dict() if "embed" in name and "lora" in name]
    trainer.create_model_card()
    assert '"THIS_FOLDER/base"' in (folder / "README.md").read_text()
    merge_adapter(str(folder), tmp_path / "merged")
    assert AUTO[family].from_pretrained(tmp_path / "merged").config.vocab_size == len(kept)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_loss_is_that_over_the_kept_tokens(family, make_args, saved_models):
    """Labels and inputs name the same tokens as before."""
    trainer = trainer_for(family, make_args, saved_models)
    whole, kept = load_model(str(saved_models[family])).eval(), torch.tensor(trainer.vocabulary.kept_ids)
    batch = next(iter(trainer.get_train_dataloader()))
    model = trainer.model.get_base_model().eval()
    inputs = {name: kept[batch[name]] if name == "input_ids" else batch[name] for name in batch if name != "labels"}
    if family == "encoder_decoder":
        inputs["decoder_input_ids"] = kept[batch["labels"].clip(0)]
    with torch.no_grad():
        expected = whole(**inputs).logits[..., kept]
        own = {**inputs, "input_ids": batch["input_ids"]}
        if family == "encoder_decoder":
            own["decoder_input_ids"] = batch["labels"].clip(0)
        torch.testing.assert_close(model(**own).logits, expected, rtol=0, atol=1e-6)


def test_two_runs_in_one_process_do_not_mix(make_args, saved_models, tmp_path):
    tokenizer = load_tokenizer(saved_models["encoder_decoder"])
    runs = []
    for number, word in enumerate(("black", "green")):
        rows = [{"prompt": "now:", "completion": f" {word}"}] * 4
        args = make_args(**ASKED, output_dir=str(tmp_path / str(number)))
        runs.append(
            LeftTrainer(str(saved_models["encoder_decoder"]), args, train_dataset=rows, processing_class=tokenizer)
        )
    for trainer in runs:
        trainer.train()
    assert runs[0].vocabulary.kept_ids != runs[1].vocabulary.kept_ids
    assert all(len(run.processing_class) == run.model.get_input_embeddings().weight.shape[0] for run in runs)
    assert len(tokenizer) == len(tiny_tokenizer("encoder_decoder"))


def test_a_model_that_was_trimmed_is_not_trained_with_the_whole_tokenizer(make_args):
    model, tokenizer, full = tiny_model("t5"), tiny_tokenizer("encoder_decoder"), {"peft_method": "full"}
    LeftTrainer(model, make_args(**ASKED, **full), train_dataset=ROWS, processing_class=tokenizer)
    with pytest.raises(ValueError, match="tokens beyond it"):
        LeftTrainer(model, make_args(**full), train_dataset=ROWS, processing_class=tokenizer)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_goes_on_with_its_data_and_with_no_other(family, make_args, saved_models):
    options = {"save_strategy": "steps", "save_steps": 2, "peft_method": "lora"}
    first = trainer_for(family, make_args, saved_models, **options)
    whole = first.train()
    checkpoint = str(Path(first.args.output_dir) / "checkpoint-2")
    again = trainer_for(family, make_args, saved_models, **options)
    resumed = again.train(resume_from_checkpoint=checkpoint)
    assert resumed.global_step == whole.global_step
    for (name, a), b in zip(first.model.named_parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b), name
    other = trainer_for(family, make_args, saved_models, rows=[*ROWS[:-1], tiny_rows(1)[0]], **options)
    with pytest.raises(ValueError, match="vocabulary was"):
        other.train(resume_from_checkpoint=checkpoint)
    plain = trainer_for(family, make_args, saved_models, **options, shrink_to=None)
    with pytest.raises(ValueError, match="belongs to another run"):
        plain.train(resume_from_checkpoint=checkpoint)


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_of_the_trimmed_tokens(family, make_args, saved_models):
    """Where the metrics were made with the whole tokenizer."""
    tokenizer = load_tokenizer(saved_models[family])
    args = make_args(**ASKED, predict_with_generate=True, generation_max_length=4)
    trainer = LeftTrainer(
        str(saved_models[family]),
        args,
        train_dataset=ROWS,
        processing_class=tokenizer,
        compute_metrics=text_metrics(tokenizer, ["exact_match"]),
    )
    output = trainer.predict(ROWS[:4])
    texts = trainer.processing_class.batch_decode(output.predictions.clip(0), skip_special_tokens=True)
    right = [text.strip() == row["completion"].strip() for text, row in zip(texts, ROWS, strict=False)]
    assert output.metrics["test_exact_match"] == pytest.approx(25.0 * sum(right))
    later = [{"prompt": "Repeat 0 größer 東京:", "completion": " größer"}]  # characters that no row has
    assert trainer.predict(later).predictions.shape[0] == 1


def test_ids_in_generation_configs_and_options_are_renamed(make_args, saved_models):
    tokenizer = load_tokenizer(saved_models["encoder_decoder"])
    ids = tokenizer("black", add_special_tokens=False)["input_ids"]
    given = GenerationConfig(bad_words_ids=[ids], max_new_tokens=4)
    options = {"peft_method": "trainable_tokens", "peft_kwargs": {"token_indices": ids}, "generation_config": given}
    trainer = trainer_for("encoder_decoder", make_args, saved_models, predict_with_generate=True, **options)
    kept, now = trainer.vocabulary.kept_ids, trainer.model.generation_config
    assert [kept[number] for number in now.bad_words_ids[0]] == ids
    assert [kept[number] for number in trainer.model.active_peft_config.token_indices] == ids
    assert given.bad_words_ids == [ids]
    assert now.eos_token_id == trainer.processing_class.eos_token_id


@pytest.mark.parametrize(
    "rows",
    [
        [{"messages": [{"role": "user", "content": "red?"}, {"role": "assistant", "content": "blue"}]}],
        [{"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "blue"}]}],
        [{"conversations": [{"from": "human", "value": "red?"}, {"from": "gpt", "value": "blue"}]}],
        [{"text": "black and blue"}],
    ],
)
def test_every_form_of_text(rows, make_args, saved_models):
    tokenizer = load_tokenizer(saved_models["decoder_only"])
    tokenizer.chat_template = "{% for turn in messages %}{{ turn['role'] + ': ' + turn['content'] }}\n{% endfor %}"
    path, whole = str(saved_models["decoder_only"]), make_args()
    same = {"train_dataset": rows * 4, "processing_class": tokenizer}
    trimmed, before = LeftTrainer(path, make_args(**ASKED), **same), LeftTrainer(path, whole, **same)
    kept = trimmed.vocabulary.kept_ids
    old, new = (list(trainer.train_dataset["input_ids"]) for trainer in (before, trimmed))
    assert [[kept[number] for number in row] for row in new] == [list(row) for row in old]


@pytest.mark.parametrize("family", FAMILIES)
def test_fresh_models_are_trimmed_alike(family, make_args, saved_models):
    trainer = LeftTrainer(
        args=make_args(**ASKED),
        model_init=lambda: load_model(str(saved_models[family])),
        train_dataset=ROWS,
        processing_class=load_tokenizer(saved_models[family]),
    )
    size = len(trainer.processing_class)
    for _ in range(2):
        trainer.train()
        assert trainer.model.get_input_embeddings().weight.shape[0] == size


def test_a_plan_is_of_the_smaller_model(make_args, saved_models, capfd):
    whole = trainer_for("encoder_decoder", make_args, saved_models, report_plan=True, shrink_to=None).planned
    trainer = trainer_for("encoder_decoder", make_args, saved_models, report_plan=True)
    assert trainer.planned.peak_bytes < whole.peak_bytes
    assert f"Vocabulary: 300 -> {trainer.vocabulary.size_after} tokens" in capfd.readouterr().out


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("is_loaded", [True, False])
def test_a_teacher_has_the_same_tokens(family, is_loaded, make_args, saved_models):
    """The whole model, as its own teacher, agrees with the trimmed one before the first step."""
    teacher = load_model(str(saved_models[family])) if is_loaded else str(saved_models[family])
    args = make_args(**ASKED, max_steps=1, distillation_kwargs={"alpha": 1.0}, learning_rate=0.0)
    trainer = LeftTrainer(str(saved_models[family]), args, train_dataset=ROWS, teacher_model=teacher)
    trainer.train()
    losses = [entry["teacher_loss"] for entry in trainer.state.log_history if "teacher_loss" in entry]
    assert losses == [pytest.approx(0.0, abs=1e-5)]
    if is_loaded:
        assert len(teacher.get_input_embeddings().weight) == 300


# What cannot be asked for


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"input_ids": [3, 4], "labels": [5, 1]}], {}, "holds token ids.*Pass the rows as text"),
        (IterableDataset.from_generator(lambda: iter(ROWS)), {"max_steps": 1}, "is a stream"),
        (ROWS, {"peft_method": "qlora"}, "quantized"),
        (ROWS, {"fsdp": "full_shard"}, "FSDP"),
        (None, {}, "no train_dataset"),
    ],
)
def test_what_cannot_be_trimmed_is_refused_before_weights(rows, options, message, make_args, saved_models, no_weights):
    with pytest.raises(ValueError, match=message):
        LeftTrainer(str(saved_models["encoder_decoder"]), make_args(**ASKED, **options), train_dataset=rows)


def test_an_adapter_and_a_config_with_ids_are_refused(make_args):
    tokenizer = tiny_tokenizer("encoder_decoder")
    config = LoraConfig(target_modules=["q"], trainable_token_indices=[3], task_type="SEQ_2_SEQ_LM")
    with pytest.raises(ValueError, match="peft_config names ids"):
        LeftTrainer(
            tiny_model("t5"), make_args(**ASKED), train_dataset=ROWS, processing_class=tokenizer, peft_config=config
        )
    adapted = get_peft_model(tiny_model("t5"), LoraConfig(target_modules=["q"], task_type="SEQ_2_SEQ_LM"))
    with pytest.raises(ValueError, match="has an adapter"):
        LeftTrainer(adapted, make_args(**ASKED), train_dataset=ROWS, processing_class=tokenizer)
