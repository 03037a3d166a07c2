"""What an evaluation returns: a prediction for each row, the loss of a token, scores against the user's text."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy
from transformers import GenerationConfig

from left_trainer import LeftTrainer
from left_trainer.models import model_family, without_adapter
from tiny import FAMILY_TYPES, MIXTURES, tiny_model, tiny_rows

FAMILIES = tuple(FAMILY_TYPES)
ROWS = Dataset.from_list(tiny_rows(10, seed=3))
LONG_ROWS = Dataset.from_list([{"prompt": "so " * length + "now:", "completion": " red"} for length in (3, 90, 4, 60)])


@pytest.fixture
def trainer_of(make_args, tokenizers):
    def make(model, data=None, compute_metrics=None, train=ROWS, **overrides):
        model = tiny_model(model) if isinstance(model, str) else model
        options = {
            "predict_with_generate": True,
            "generation_max_length": 5,
            "per_device_eval_batch_size": 4,
            "overwrite_output_dir": True,
            **overrides,
        }
        return LeftTrainer(
            model,
            make_args(**options),
            train_dataset=train,
            eval_dataset=data,
            processing_class=tokenizers[model_family(model)],
            compute_metrics=compute_metrics,
        )

    return make


def texts(predictions, pad=0):
    """Rows of ids without what fills them up."""
    return [np.trim_zeros(np.where(row < 0, pad, row), "b").tolist() for row in predictions]


def loss_of_rows(trainer, rows):
    """Nats per target token, row by row through the model."""
    total, count = 0.0, 0
    for row in trainer._features(rows, trainer.processing_class, trainer.args):
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor([row["labels"]])
        with torch.no_grad():
            if trainer.family == "encoder_decoder":
                logits = trainer.model(input_ids=ids, labels=labels).logits
            else:
                logits, labels = trainer.model(input_ids=ids).logits[:, :-1], labels[:, 1:]
        total += float(cross_entropy(logits[0], labels[0], reduction="sum"))
        count += int(labels.ne(-100).sum())
    return total / count


# The loss


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_that_of_a_token_whatever_the_batches(family, trainer_of):
    found = []
    for batch_size, generates in ((1, False), (7, False), (50, False), (4, True)):
        trainer = trainer_of(
            FAMILY_TYPES[family], ROWS, per_device_eval_batch_size=batch_size, predict_with_generate=generates
        )
        found += [trainer.evaluate()["eval_loss"], trainer.predict(ROWS).metrics["test_loss"]]
        found.append(trainer.evaluate_loss(ROWS))
    assert found == pytest.approx([loss_of_rows(trainer, ROWS)] * len(found), rel=1e-6)
    grouped = trainer_of(FAMILY_TYPES[family], {"a": ROWS}, train_sampling_strategy="group_by_length")
    assert grouped.evaluate()["eval_a_loss"] == pytest.approx(found[0], rel=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("part", ["label_smoothing", "compute_loss_func", "cpt"])
def test_another_loss_is_weighted_by_target_tokens_too(part, family, make_args, tokenizers):
    """Also CPT's: in evaluation it is that of the targets, as it is for every method."""
    if part == "cpt" and family == "encoder_decoder":
        pytest.skip("CPT is for decoder-only models")

    def own_loss(outputs, labels, num_items_in_batch=None):
        logits = outputs.logits if family == "encoder_decoder" else outputs.logits[:, :-1]
        labels = labels if family == "encoder_decoder" else labels[:, 1:]
        return cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum") / num_items_in_batch

    found = []
    for batch_size in (1, 3, 10):
        trainer = LeftTrainer(
            tiny_model(FAMILY_TYPES[family]),
            make_args(
                per_device_eval_batch_size=batch_size,
                label_smoothing_factor=0.1 if part == "label_smoothing" else 0.0,
                peft_method="cpt" if part == "cpt" else "lora",
            ),
            train_dataset=ROWS,
            eval_dataset=ROWS,
            processing_class=tokenizers[family],
            compute_loss_func=own_loss if part == "compute_loss_func" else None,
        )
        found.append(trainer.evaluate()["eval_loss"])
    assert found == pytest.approx(found[:1] * 3, rel=1e-6)
    if part == "compute_loss_func":
        assert found[0] == pytest.approx(loss_of_rows(trainer, ROWS), rel=1e-6)


def test_the_best_model_is_chosen_by_the_loss_of_a_token(trainer_of):
    trainer = trainer_of(
        "t5",
        ROWS,
        eval_strategy="steps",
        eval_steps=2,
        save_strategy="steps",
        save_steps=2,
        load_best_model_at_end=True,
        per_device_eval_batch_size=7,
        learning_rate=1e-2,
    )
    trainer.train()
    assert trainer.state.best_metric == pytest.approx(loss_of_rows(trainer, ROWS), rel=1e-6)


# Rows


@pytest.mark.parametrize("model_type", ["t5", "llama", "gpt2", "opt"])
def test_every_row_has_a_prediction_however_long_it_is(model_type, trainer_of):
    own = {} if model_type == "t5" else {"shuffle_dataset": True}
    trainer = trainer_of(model_type, LONG_ROWS, max_length=40, **own)
    prediction = trainer.predict(LONG_ROWS)
    together = texts(prediction.predictions)
    assert together == [texts(trainer.predict(LONG_ROWS.select([row])).predictions)[0] for row in range(4)]
    assert len(together) == 4
    assert trainer.evaluate()["eval_loss"] == pytest.approx(prediction.metrics["test_loss"], rel=1e-6)
    trainer.args.predict_with_generate, trainer.compute_metrics = False, None
    logits = trainer.predict(LONG_ROWS).predictions
    assert len(logits[0] if isinstance(logits, tuple) else logits) == 4
    assert trainer.evaluate()["eval_loss"] == pytest.approx(prediction.metrics["test_loss"], rel=1e-6)


def test_rows_that_are_all_too_long_are_answered(trainer_of):
    trainer = trainer_of("llama", max_length=40)
    prediction = trainer.predict(LONG_ROWS.select([1, 3]))
    assert len(prediction.predictions) == 2
    assert "test_loss" not in prediction.metrics  # no target is left
    assert "test_chrf" in prediction.metrics


@pytest.mark.parametrize("method", ["lora", "prompt_tuning", "prefix_tuning"])
@pytest.mark.parametrize("model_type", ["gpt2", "opt"])
def test_prompts_leave_room_for_new_tokens(method, model_type, trainer_of):
    """Both models have 128 positions."""
    trainer = trainer_of(model_type, peft_method=method, generation_max_length=40, max_length=None)
    prediction = trainer.predict(LONG_ROWS, eos_token_id=[])
    assert prediction.predictions.shape == (4, 40)
    assert np.isfinite(prediction.metrics["test_loss"])


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_alone_are_answered(family, trainer_of):
    trainer = trainer_of(FAMILY_TYPES[family])
    with_targets = trainer.predict(ROWS)
    prediction = trainer.predict(ROWS.remove_columns("completion"))
    assert texts(prediction.predictions) == texts(with_targets.predictions)
    assert prediction.label_ids is None
    assert not {"test_loss", "test_chrf"} & set(prediction.metrics)
    tokens = [{"input_ids": trainer.processing_class(prompt)["input_ids"]} for prompt in ROWS["prompt"]]
    assert texts(trainer.predict(Dataset.from_list(tokens)).predictions) == texts(with_targets.predictions)


def test_chats_are_answered_with_a_target_and_without(trainer_of, tokenizers, monkeypatch):
    template = "{% for m in messages %}{{m.role}}: {{m.content}} {% endfor %}"
    template += "{% if add_generation_prompt %}assistant: {% endif %}"
    monkeypatch.setattr(tokenizers["decoder_only"], "chat_template", template)
    chats = [
        {
            "prompt": [{"role": "user", "content": row["prompt"]}],
            "completion": [{"role": "assistant", "content": "yes"}],
        }
        for row in tiny_rows(3)
    ]
    rows, seen = Dataset.from_list(chats), []
    trainer = trainer_of("llama", rows, train=rows, compute_metrics=lambda prediction: seen.append(prediction) or {})
    with_targets = trainer.predict(rows)
    assert seen[0].references == ["yes"] * 3
    assert trainer.predict(rows.remove_columns("completion")).predictions.tolist() == with_targets.predictions.tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_dataset_that_is_set_later_is_evaluated(family, trainer_of):
    trainer = trainer_of(FAMILY_TYPES[family], ROWS)
    expected = trainer.evaluate()
    trainer.eval_dataset = ROWS
    assert trainer.evaluate()["eval_loss"] == expected["eval_loss"]
    features = trainer._features(ROWS, trainer.processing_class, trainer.args)
    as_list = [{name: row[name] for name in ("input_ids", "labels")} for row in features]
    assert trainer.evaluate(as_list)["eval_loss"] == expected["eval_loss"]
    parts = {"a": ROWS, "b": ROWS.select(range(3))}
    metrics = trainer.evaluate(parts, max_new_tokens=2)
    assert metrics["eval_a_generated_length"] < expected["eval_generated_length"]
    assert metrics["eval_b_loss"] == trainer.evaluate(parts["b"])["eval_loss"]


REFUSED = {
    "its rows are whole texts": (Dataset.from_list([{"text": "so it goes"}] * 2), {}),
    "its labels cover the whole text": (Dataset.from_list([{"input_ids": [5, 6, 7]}] * 2), {}),
    r"the loss covers the prompts \(completion_only_loss\)": (ROWS, {"completion_only_loss": False}),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_rows_without_a_prompt_are_refused_before_training(reason, make_args, saved_models, no_weights):
    rows, options = REFUSED[reason]
    with pytest.raises(ValueError, match=rf"eval_dataset does not say it: {reason}\. .*predict_with_generate=False"):
        LeftTrainer(
            str(saved_models["decoder_only"]),
            make_args(predict_with_generate=True, **options),
            train_dataset=ROWS,
            eval_dataset=rows,
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_a_column_that_nobody_named_changes_nothing(family, trainer_of):
    trainer = trainer_of(FAMILY_TYPES[family])
    plain = trainer.predict(ROWS)
    extra = (
        ROWS.add_column("id", list(range(10))).add_column("position_ids", [[1, 2]] * 10).add_column("tag", ["x"] * 10)
    )
    for rows in (extra, trainer._features(ROWS, trainer.processing_class, trainer.args).add_column("id", [1] * 10)):
        prediction = trainer.predict(rows)
        assert texts(prediction.predictions) == texts(plain.predictions)
        assert prediction.metrics["test_loss"] == plain.metrics["test_loss"]


def test_inputs_that_the_model_takes_reach_generation(trainer_of, tokenizers):
    """LED's global attention; what is no input of the model does not."""
    generated = []
    for marked in (0, 1):
        rows = []
        for row in tiny_rows(4, seed=3):
            ids = tokenizers["encoder_decoder"](row["prompt"])["input_ids"]
            fill = 60 - len(ids)
            features = {"input_ids": ids + [0] * fill, "attention_mask": [1] * len(ids) + [0] * fill}
            features |= {"global_attention_mask": [marked] + [0] * 59, "labels": [5, 6, 1], "other": [marked]}
            rows.append(features)
        data = Dataset.from_list(rows)
        trainer = trainer_of("led", train=data, peft_method="bitfit")
        generated.append(trainer.predict(data).predictions)
        sources = {name: torch.tensor(data[name]) for name in ("input_ids", "attention_mask", "global_attention_mask")}
        with torch.no_grad():
            expected = without_adapter(trainer.model).generate(**sources, max_new_tokens=5)
        assert texts(generated[-1]) == texts(expected.numpy())
    assert generated[0].tolist() != generated[1].tolist()


@pytest.mark.parametrize("method", ["lora", "prefix_tuning", "prompt_tuning"])
@pytest.mark.parametrize("model_type", MIXTURES)
def test_mixtures_of_experts_are_evaluated_without_the_loss_of_their_routers(method, model_type, trainer_of):
    options = {"target_modules": ["q_proj"]} if method == "lora" else {"num_virtual_tokens": 3}
    trainer = trainer_of(model_type, ROWS, peft_method=method, peft_kwargs=options, max_steps=1)
    trainer.train()
    prediction = trainer.predict(ROWS)
    alone = [texts(trainer.predict(ROWS.select([row])).predictions)[0] for row in range(3)]
    assert texts(prediction.predictions)[:3] == alone
    assert trainer.evaluate_loss(ROWS) == pytest.approx(prediction.metrics["test_loss"], rel=1e-6)
    if method == "lora":
        assert prediction.metrics["test_loss"] == pytest.approx(loss_of_rows(trainer, ROWS), rel=1e-5)
        assert trainer.model.config.output_router_logits  # for the training that goes on
    with pytest.raises(ValueError, match=r"router_aux_loss_coef=0\.1 does not work with peft_method='prefix_tuning'"):
        trainer_of(model_type, peft_method="prefix_tuning", router_aux_loss_coef=0.1)


# Settings of generation


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("model_type", ["t5", "bart", "llama"])
def test_the_generation_config_of_the_arguments_is_used(method, model_type, trainer_of, tmp_path):
    config = GenerationConfig(max_new_tokens=5, num_beams=2, eos_token_id=299)
    config.save_pretrained(tmp_path)
    given = str(tmp_path) if method == "full" else config
    trainer = trainer_of(model_type, generation_max_length=None, generation_config=given, peft_method=method)
    start = int(trainer.family == "encoder_decoder")
    assert trainer.predict(ROWS).predictions.shape == (10, 5 + start)
    assert trainer.predict(ROWS, max_new_tokens=3).predictions.shape == (10, 3 + start)
    assert trainer.predict(ROWS, generation_config=GenerationConfig(max_new_tokens=4)).predictions.shape[1] == 4 + start
    with trainer.with_arguments(generation_max_length=6):
        assert trainer.predict(ROWS).predictions.shape == (10, 6 + start)
    with trainer.without_adapter():
        assert trainer.predict(ROWS).predictions.shape == (10, 5 + start)
    assert (config.decoder_start_token_id, config.pad_token_id) == (None, None)  # the user's own stays as it is
    trainer._gen_kwargs = {"max_length": None, "num_beams": None}  # as Hugging Face's example for questions does
    output = trainer.evaluation_loop(
        trainer.get_test_dataloader(trainer._features(ROWS, trainer.processing_class, trainer.args)), ""
    )
    assert output.predictions.shape == (10, 5 + start)


OWN = {"num_beams": 2, "forced_eos_token_id": 1, "length_penalty": 0.6, "early_stopping": True, "min_length": 12}


@pytest.mark.parametrize("model_type", ["marian", "bart", "llama"])
def test_the_models_own_settings_are_those_of_its_generate(model_type, trainer_of, tokenizers):
    model = tiny_model(model_type)
    model.generation_config.update(max_length=36, **OWN)
    trainer = trainer_of(model, generation_max_length=None, peft_method="full")
    predictions = texts(trainer.predict(ROWS).predictions)
    for row, prompt in enumerate(ROWS["prompt"]):
        ids = tokenizers[trainer.family](prompt, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            tokens = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids)).numpy()
        assert (
            predictions[row] == texts(tokens if trainer.family == "encoder_decoder" else tokens[:, ids.shape[1] :])[0]
        )


@pytest.mark.parametrize("family", FAMILIES)
def test_all_sequences_of_a_row_are_returned_and_the_first_is_scored(family, trainer_of):
    trainer = trainer_of(FAMILY_TYPES[family])
    first = trainer.predict(ROWS, num_beams=3)
    three = trainer.predict(ROWS, num_beams=3, num_return_sequences=3)
    assert len(three.predictions) == 30
    assert texts(three.predictions[::3]) == texts(first.predictions)
    assert three.metrics["test_chrf"] == first.metrics["test_chrf"]
    assert three.metrics["test_loss"] == pytest.approx(first.metrics["test_loss"], rel=1e-6)


# References


@pytest.mark.parametrize("family", FAMILIES)
def test_metrics_compare_with_what_the_user_wrote(family, trainer_of):
    """The tokenizer knows neither letter, and `max_length` cuts the labels."""
    answer = " Öl, ſehr " + "alt " * 40
    rows = Dataset.from_list([{**row, "completion": answer} for row in tiny_rows(5)])
    seen = []

    def compute_metrics(prediction):
        predictions, labels = prediction  # an ordinary EvalPrediction
        seen.append((prediction.references, len(predictions), len(labels)))
        return {}

    trainer = trainer_of(FAMILY_TYPES[family], {"a": rows, "b": rows}, compute_metrics, train=rows, max_length=30)
    trainer.evaluate()
    trainer.evaluate(rows)
    trainer.evaluate({"c": rows})
    trainer.predict(rows)
    assert seen == [([answer] * 5, 5, 5)] * 5
    features = trainer._features(rows, trainer.processing_class, trainer.args).select_columns(["input_ids", "labels"])
    trainer.predict(features)
    assert seen[-1] == (None, 5, 5)
    trainer.preprocess_logits_for_metrics = lambda predictions, labels: predictions
    trainer.predict(rows)
    assert seen[-1] == ([answer] * 5, 5, 5)
