"""Generating by length changes the time of an evaluation, and nothing that comes out of it."""

from __future__ import annotations

import contextlib
import json

import numpy as np
import pytest
from datasets import Dataset, IterableDataset
from torch.utils.data import RandomSampler
from transformers import LogitsProcessorList, NoRepeatNGramLogitsProcessor

from left_trainer import LeftSeq2SeqTrainer, LeftTrainer, get_method, get_task, list_methods
from left_trainer.data.loading import embedded_data
from left_trainer.embedded import MODEL_PATHS
from left_trainer.evaluation.batches import without_filling
from left_trainer.models import model_family
from left_trainer.runs.build_report import build_report, write_report
from method_settings import apply_or_skip
from tiny import ENCODER_DECODER_TYPES, FAMILY_TYPES, tiny_model, tiny_rows

FAMILIES = tuple(FAMILY_TYPES)
ROWS = Dataset.from_list(tiny_rows(18, seed=3))
# A model that was not trained hardly ever writes the one end-of-sequence token; with many of them rows end early.
ENDS = list(range(1, 300, 2))


def make_trainer(model, make_args, tokenizers, data=ROWS, trainer_class=LeftTrainer, compute_metrics=None, **overrides):
    options = {
        "predict_with_generate": True,
        "generation_max_length": 9,
        "per_device_eval_batch_size": 4,
        "overwrite_output_dir": True,
        **overrides,
    }
    return trainer_class(
        model,
        make_args(**options),
        train_dataset=ROWS,
        eval_dataset=data,
        processing_class=tokenizers[model_family(model)],
        compute_metrics=compute_metrics,
    )


def own_ends(predictions, ends=ENDS):
    return [without_filling(np.where(row < 0, 0, row), ends, 0).tolist() for row in predictions]


@pytest.mark.parametrize("num_beams", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_sorting_changes_no_row_and_no_order(family, num_beams, make_args):
    data = embedded_data(get_task("dialogue"))["validation"].select(range(18))
    rows = Dataset.from_list([{"prompt": row["dialogue"], "completion": row["response"]} for row in data])
    results, seen = [], []

    def compute_metrics(prediction):
        seen.append(prediction)
        return {"first": float(prediction.predictions[0].sum())}

    for sort in (False, True):
        args = make_args(
            predict_with_generate=True,
            generation_max_length=24,
            generation_num_beams=num_beams,
            per_device_eval_batch_size=4,
            sort_eval_by_length=sort,
        )
        path = str(MODEL_PATHS[family])
        trainer = LeftTrainer(path, args, train_dataset=ROWS, compute_metrics=compute_metrics)
        results.append(trainer.predict(rows))
    plain, by_length = results
    ends, pad = [trainer.processing_class.eos_token_id], trainer.processing_class.pad_token_id
    assert trainer.fast_paths["sorted_generation"].report() == {"ran": 1, "fell_back": {}}
    assert len(set(map(len, own_ends(plain.predictions, ends)))) > 2
    assert pad == 0
    assert own_ends(by_length.predictions, ends) == own_ends(plain.predictions, ends)
    assert by_length.label_ids.tolist() == plain.label_ids.tolist()
    assert by_length.metrics["test_loss"] == pytest.approx(plain.metrics["test_loss"], rel=1e-6)
    assert own_ends(seen[1].predictions, ends) == own_ends(seen[0].predictions, ends)
    assert seen[1].label_ids.tolist() == plain.label_ids.tolist()
    if num_beams == 1:  # beam search fills T5's rows with the end of sequence (transformers 5.23)
        assert by_length.predictions.tolist() == plain.predictions.tolist()


@pytest.mark.parametrize("model_type", ENCODER_DECODER_TYPES)
def test_the_shared_encoder_gives_the_loss_of_a_forward_pass(model_type, make_args, tokenizers):
    metrics = []
    for sort in (False, True):
        trainer = make_trainer(tiny_model(model_type), make_args, tokenizers, sort_eval_by_length=sort)
        metrics.append(trainer.evaluate())
    assert trainer.fast_paths["shared_encoder"].report() == {"ran": 1, "fell_back": {}}
    assert metrics[1]["eval_loss"] == pytest.approx(metrics[0]["eval_loss"], rel=1e-6)
    assert metrics[1]["eval_chrf"] == metrics[0]["eval_chrf"]


def test_the_shared_encoder_honours_label_smoothing(make_args, tokenizers):
    smoothed = []
    for sort in (False, True):
        trainer = make_trainer(
            tiny_model("bart"), make_args, tokenizers, sort_eval_by_length=sort, label_smoothing_factor=0.2
        )
        smoothed.append(trainer.evaluate()["eval_loss"])
    assert trainer.fast_paths["shared_encoder"].ran == 1
    assert smoothed[1] == pytest.approx(smoothed[0], rel=1e-6)
    plain = make_trainer(tiny_model("bart"), make_args, tokenizers).evaluate()["eval_loss"]
    assert abs(plain - smoothed[0]) > 1e-6


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("method", [method.name for method in list_methods() if method.name != "full"])
def test_every_method_evaluates_as_before(method, make_args, tokenizers, tmp_path):
    model = apply_or_skip(method, "t5", tmp_path, seed=0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_magnitude" not in name:
            parameter.data += 0.05  # adapters begin as nothing
    trainer = make_trainer(model, make_args, tokenizers, sort_eval_by_length=False)
    plain = trainer.predict(ROWS, eos_token_id=ENDS)
    trainer.args.sort_eval_by_length = True
    by_length = trainer.predict(ROWS, eos_token_id=ENDS)
    mixes_rows = get_method(method).mixes_rows
    assert trainer.fast_paths["sorted_generation"].ran == (not mixes_rows)
    assert (f"{method} mixes the rows of a batch" in trainer.fast_paths["sorted_generation"].fell_back) == mixes_rows
    assert own_ends(by_length.predictions) == own_ends(plain.predictions)
    assert by_length.metrics["test_loss"] == pytest.approx(plain.metrics["test_loss"], rel=1e-5)


def test_the_base_model_is_evaluated_without_its_adapter(make_args, tokenizers):
    base = make_trainer(tiny_model("t5"), make_args, tokenizers, peft_method="full").evaluate()
    trainer = make_trainer(tiny_model("t5"), make_args, tokenizers, peft_method="lora")
    for name, parameter in trainer.model.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.1
    adapted = trainer.evaluate()["eval_loss"]
    with trainer.without_adapter():
        without = trainer.evaluate()["eval_loss"]
    assert without == pytest.approx(base["eval_loss"], rel=1e-6)
    assert abs(adapted - without) > 1e-5
    assert trainer.fast_paths["shared_encoder"].ran == 2


CASES = {
    "sort_eval_by_length=False": ("t5", {"sort_eval_by_length": False}, {}),
    "do_sample=True": ("t5", {}, {"do_sample": True}),
    "num_return_sequences": ("t5", {}, {"num_return_sequences": 2, "num_beams": 2}),
    "a logits_processor is given": (
        "t5",
        {},
        {"logits_processor": LogitsProcessorList([NoRepeatNGramLogitsProcessor(2)])},
    ),
}


@pytest.mark.parametrize("reason", CASES)
def test_what_keeps_the_order_is_named(reason, make_args, tokenizers):
    model_type, overrides, arguments = CASES[reason]
    trainer = make_trainer(
        tiny_model(model_type), make_args, tokenizers, compute_metrics=lambda prediction: {}, **overrides
    )
    metrics = trainer.evaluate(**arguments)
    assert trainer.fast_paths["sorted_generation"].report() == {"ran": 0, "fell_back": {reason: 1}}
    assert metrics["eval_loss"] > 0


def test_a_stream_keeps_its_order(make_args, tokenizers):
    stream = IterableDataset.from_generator(lambda: iter(tiny_rows(6)))
    trainer = make_trainer(tiny_model("t5"), make_args, tokenizers)
    prediction = trainer.predict(stream)
    assert trainer.fast_paths["sorted_generation"].fell_back == {"the dataset is streamed": 1}
    listed = trainer.predict(Dataset.from_list(tiny_rows(6)))
    assert prediction.predictions.tolist() == listed.predictions.tolist()
    assert prediction.metrics["test_loss"] == pytest.approx(listed.metrics["test_loss"], rel=1e-6)


def test_a_users_own_order_is_kept(make_args, tokenizers):
    class Shuffled(LeftSeq2SeqTrainer):
        def _get_eval_sampler(self, eval_dataset):
            return RandomSampler(eval_dataset)

    trainer = make_trainer(tiny_model("t5"), make_args, tokenizers, trainer_class=Shuffled)
    prediction = trainer.predict(ROWS)
    assert trainer.fast_paths["sorted_generation"].fell_back == {
        "the dataloader does not read the rows in their order": 1
    }
    assert len(prediction.predictions) == len(ROWS)


def test_a_users_own_loss_is_computed(make_args, tokenizers):
    class Doubled(LeftSeq2SeqTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
            return (2 * loss, outputs) if return_outputs else 2 * loss

    doubled = make_trainer(tiny_model("t5"), make_args, tokenizers, trainer_class=Doubled)
    once = make_trainer(tiny_model("t5"), make_args, tokenizers)
    assert doubled.evaluate()["eval_loss"] == pytest.approx(2 * once.evaluate()["eval_loss"], rel=1e-6)
    assert doubled.fast_paths["shared_encoder"].fell_back == {"compute_loss is overridden": 1}


def test_rows_keep_their_order_where_training_groups_them(make_args, tokenizers):
    trainer = make_trainer(tiny_model("t5"), make_args, tokenizers)
    grouped = make_trainer(tiny_model("t5"), make_args, tokenizers, train_sampling_strategy="group_by_length")
    assert grouped.predict(ROWS).label_ids.tolist() == trainer.predict(ROWS).label_ids.tolist()
    grouped.args.predict_with_generate, grouped.compute_metrics = False, None
    assert grouped.predict(ROWS).label_ids.tolist() == trainer.predict(ROWS).label_ids.tolist()


def test_several_datasets_are_each_scored(make_args, tokenizers):
    parts = {"short": ROWS.select(range(5)), "long": ROWS.select(range(5, 18))}
    trainer = make_trainer(tiny_model("t5"), make_args, tokenizers, data=parts)
    metrics = trainer.evaluate()
    assert trainer.fast_paths["sorted_generation"].ran == 2
    for name, part in parts.items():
        alone = trainer.evaluate(part)
        assert metrics[f"eval_{name}_loss"] == pytest.approx(alone["eval_loss"], rel=1e-6)
        assert metrics[f"eval_{name}_chrf"] == alone["eval_chrf"]


def test_results_equal_those_of_trainers_own_loop(make_args, tokenizers, monkeypatch):
    seen = []

    def compute_metrics(prediction):
        seen.append(prediction)
        return {}

    def evaluate():
        trainer = make_trainer(
            tiny_model("t5"),
            make_args,
            tokenizers,
            compute_metrics=compute_metrics,
            include_for_metrics=["inputs", "loss"],
        )
        seen.append(trainer.predict(ROWS, eos_token_id=ENDS))
        assert (trainer.args.eval_do_concat_batches, trainer.args.eval_accumulation_steps) == (True, None)

    evaluate()
    plain = "left_trainer.trainer.evaluation.results_on_host"
    monkeypatch.setattr(plain, lambda trainer, references: contextlib.nullcontext(lambda output: output))
    evaluate()
    ours, our_output, theirs, their_output = seen
    for name in ("predictions", "label_ids", "inputs", "losses"):
        assert getattr(ours, name).dtype == getattr(theirs, name).dtype
        assert getattr(ours, name).tolist() == getattr(theirs, name).tolist(), name
    assert our_output.predictions.tolist() == their_output.predictions.tolist()
    assert our_output.label_ids.tolist() == their_output.label_ids.tolist()
    assert our_output.metrics["test_loss"] == their_output.metrics["test_loss"]


def test_batches_stay_apart_where_the_user_wants_them(make_args, tokenizers):
    trainer = make_trainer(
        tiny_model("t5"), make_args, tokenizers, eval_do_concat_batches=False, compute_metrics=lambda prediction: {}
    )
    assert [len(batch) for batch in trainer.predict(ROWS).predictions] == [4, 4, 4, 4, 2]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_can_be_left_out(family, make_args, tokenizers, tmp_path):
    trainer = make_trainer(tiny_model(FAMILY_TYPES[family]), make_args, tokenizers, eval_loss_with_generation=False)
    metrics = trainer.evaluate()
    assert "eval_loss" not in metrics
    assert "eval_chrf" in metrics
    assert trainer.fast_paths["linear_cross_entropy"].report() == {"ran": 0, "fell_back": {}}
    trainer.save_model()
    report = build_report(trainer, get_task("summarization"), metrics, metrics)
    assert "chrf" in report.metrics.after
    assert json.loads(write_report(trainer, report).read_text())["fast_paths"]["sorted_generation"]["ran"] == 1


def test_a_loss_that_is_needed_cannot_be_left_out(make_args, tokenizers, saved_models, no_weights):
    path = str(saved_models["encoder_decoder"])
    options = {"eval_loss_with_generation": False, "predict_with_generate": True}
    for metric, data in (("loss", ROWS), ("eval_loss", ROWS), ("eval_long_loss", {"long": ROWS})):
        with pytest.raises(ValueError, match=f"metric_for_best_model='{metric}'.*metric_for_best_model='rougeL'"):
            LeftTrainer(path, make_args(**options, metric_for_best_model=metric), eval_dataset=data)
    best = {"load_best_model_at_end": True, "save_strategy": "steps", "eval_strategy": "steps", "eval_steps": 500}
    with pytest.raises(ValueError, match="load_best_model_at_end=True uses unless told otherwise"):
        LeftTrainer(path, make_args(**options, **best), eval_dataset=ROWS)
    with pytest.raises(ValueError, match="or set predict_with_generate=True"):
        LeftTrainer(path, make_args(eval_loss_with_generation=False), eval_dataset=ROWS)


@pytest.mark.parametrize("model_type", ["t5", "marian", "llama"])
@pytest.mark.parametrize("limits", [{"max_new_tokens": 5}, {"max_length": 30}], ids=str)
def test_the_models_own_length_limit_holds(limits, model_type, make_args, tokenizers):
    results = {}
    for by_length in (True, False):
        model = tiny_model(model_type)
        model.generation_config.update(**limits)
        family = model_family(model)
        args = make_args(predict_with_generate=True, sort_eval_by_length=by_length, per_device_eval_batch_size=2)
        trainer = LeftTrainer(model, args, train_dataset=ROWS, processing_class=tokenizers[family])
        results[by_length] = trainer.predict(ROWS)
    padding = tokenizers[family].pad_token_id
    texts = [np.where(result.predictions < 0, padding, result.predictions).tolist() for result in results.values()]
    assert texts[0] == texts[1]
    assert results[True].predictions.shape[1] <= 31


@pytest.mark.parametrize("sort", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_generate_returns_and_fills_rows_with_is_the_users_choice(family, sort, make_args, tokenizers):
    trainer = make_trainer(tiny_model(FAMILY_TYPES[family]), make_args, tokenizers, sort_eval_by_length=sort)
    expected = own_ends(trainer.predict(ROWS, eos_token_id=ENDS).predictions)
    choices = {"pad_token_id": 8, "return_dict_in_generate": True}
    found = trainer.predict(ROWS, eos_token_id=ENDS, **choices).predictions
    assert [without_filling(np.where(row < 0, 8, row), ENDS, 8).tolist() for row in found] == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_texts_stop_at_strings(family, make_args, tokenizers):
    """`generate` does not hand the tokenizer that this needs to a loop in the place of its own."""
    trainer = make_trainer(tiny_model(FAMILY_TYPES[family]), make_args, tokenizers)
    arguments = {"stop_strings": ["a", "e"], "tokenizer": tokenizers[family]}
    stopped = trainer.predict(ROWS, **arguments).predictions
    assert trainer.fast_paths["regrouped_generation"].fell_back == {"a tokenizer is given": 1}
    trainer.args.sort_eval_by_length = False
    assert own_ends(stopped) == own_ends(trainer.predict(ROWS, **arguments).predictions)


@pytest.mark.parametrize("family", FAMILIES)
def test_regrouping_can_be_switched_off(family, make_args, tokenizers):
    trainer = make_trainer(tiny_model(FAMILY_TYPES[family]), make_args, tokenizers, regroup_generation=False)
    whole = trainer.predict(ROWS, eos_token_id=ENDS)
    trainer.args.regroup_generation = True
    regrouped = trainer.predict(ROWS, eos_token_id=ENDS)
    used = {"ran": 1, "fell_back": {"regroup_generation=False": 1}}
    assert trainer.fast_paths["regrouped_generation"].report() == used
    assert own_ends(regrouped.predictions) == own_ends(whole.predictions)
