"""One loss for both families: its precedence, what is added to it, and what is refused."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from datasets import Dataset
from torch.nn.functional import cross_entropy

from left_trainer import LeftTrainer, get_method
from left_trainer.kernels.fast_paths import LINEAR_CROSS_ENTROPY
from left_trainer.methods.registry import METHODS
from left_trainer.models import FAMILIES, auto_class, unwrapped, without_adapter
from left_trainer.models.decoder_inputs import with_decoder_inputs
from left_trainer.token_mean import accumulated_token_loss
from log_history import gradient_norms, losses
from method_settings import CASES, BaseModels, model_argument, settings
from tiny import fsmt_model, tiny_model, tiny_rows

MODEL_TYPES = {"encoder_decoder": "t5", "decoder_only": "llama"}
PENALTY = 0.25
# What can give or change the loss, and whether one run may have both of a pair.
GIVES_LOSS = ("compute_loss_func", "method_loss", "label_smoothing")
ADDS = ("penalty",)
SWITCHES = ("linear_cross_entropy",)
PARTS = (*GIVES_LOSS, *ADDS, *SWITCHES)


def token_loss(outputs, labels, num_items_in_batch=None, smoothing=0.0, factor=1.0):
    """A loss that a user might write: the token mean, from logits."""
    shifts = labels.shape == outputs.logits.shape[:2] and getattr(token_loss, "shifts", False)
    logits, labels = (outputs.logits[:, :-1], labels[:, 1:]) if shifts else (outputs.logits, labels)
    total = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum", label_smoothing=smoothing)
    return factor * total / (labels.ne(-100).sum() if num_items_in_batch is None else num_items_in_batch)


def doubled_loss(model, inputs, num_items_in_batch, ranks):
    """A record's loss: twice the token mean."""
    outputs = model(**inputs)
    return 2 * accumulated_token_loss(outputs.loss, inputs["labels"], num_items_in_batch, ranks), outputs


def run(family, make_args, tokenizers, parts=(), factor=1.0, **arguments):
    """Two steps of a LoRA with `parts`; the trainer."""
    record = dataclasses.replace(get_method("lora"), name="lora_with_parts", aliases=())
    if "method_loss" in parts:
        record = dataclasses.replace(record, loss=doubled_loss)
    if "penalty" in parts:
        record = dataclasses.replace(record, penalty=lambda model: torch.tensor(PENALTY))
    token_loss.shifts = family == "decoder_only"
    options = {
        "peft_method": record.name,
        "max_steps": 2,
        "learning_rate": 2e-2,
        "label_smoothing_factor": 0.1 if "label_smoothing" in parts else 0.0,
        "use_linear_cross_entropy": "linear_cross_entropy" in parts,
        "train_sampling_strategy": "sequential",
        **arguments,
    }

    def users_loss(outputs, labels, num_items_in_batch=None):
        return token_loss(outputs, labels, num_items_in_batch, factor=factor)

    with METHODS.temporarily(record):
        trainer = LeftTrainer(
            tiny_model(MODEL_TYPES[family]),
            make_args(**options),
            train_dataset=Dataset.from_list(tiny_rows()),
            eval_dataset=Dataset.from_list(tiny_rows(5)),
            processing_class=tokenizers[family],
            compute_loss_func=users_loss if "compute_loss_func" in parts else None,
        )
        trainer.train()
    return trainer


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("pair", list(itertools.combinations(PARTS, 2)), ids="+".join)
def test_every_pair_gives_the_documented_loss_or_is_refused(pair, family, make_args, tokenizers):
    if set(pair) <= set(GIVES_LOSS):
        with pytest.raises(ValueError, match="each define the loss"):
            run(family, make_args, tokenizers, pair)
        return
    plain = run(family, make_args, tokenizers)
    expected = losses(plain)[0]
    if "compute_loss_func" in pair:
        expected *= 3  # the factor below
    if "method_loss" in pair:
        expected *= 2
    if "label_smoothing" in pair:
        expected = losses(run(family, make_args, tokenizers, ["label_smoothing"]))[0]
        assert expected != pytest.approx(losses(plain)[0], rel=1e-4)
    trainer = run(family, make_args, tokenizers, pair, factor=3.0)
    assert losses(trainer)[0] == pytest.approx(expected, rel=1e-5)
    logged = [entry["penalty"] for entry in trainer.state.log_history if "penalty" in entry]
    assert logged == ([PENALTY] * 2 if "penalty" in pair else [])
    path = trainer.fast_paths[LINEAR_CROSS_ENTROPY]
    if {"compute_loss_func", "method_loss"} & set(pair):
        assert path.ran == 0
        assert any("computes the loss" in reason for reason in path.fell_back)
    else:
        assert bool(path.ran) == ("linear_cross_entropy" in pair)


@pytest.mark.parametrize("family", FAMILIES)
def test_two_losses_are_refused_before_weights_load(family, make_args, tokenizers, saved_models, no_weights):
    with pytest.raises(ValueError, match=r"compute_loss_func and label_smoothing_factor=0\.1 each define the loss"):
        LeftTrainer(
            str(saved_models[family]),
            make_args(label_smoothing_factor=0.1),
            train_dataset=Dataset.from_list(tiny_rows()),
            compute_loss_func=token_loss,
        )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("part", [None, *GIVES_LOSS, *ADDS, *SWITCHES])
def test_accumulation_changes_neither_loss_nor_gradient(part, family, make_args, tokenizers):
    runs = [
        run(
            family,
            make_args,
            tokenizers,
            [part] if part else [],
            per_device_train_batch_size=8 // steps,
            gradient_accumulation_steps=steps,
        )
        for steps in (1, 4)
    ]
    assert losses(runs[1])[0] == pytest.approx(losses(runs[0])[0], rel=1e-5)
    assert gradient_norms(runs[1])[0] == pytest.approx(gradient_norms(runs[0])[0], rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_penalty_is_trained_on_and_logged_apart(family, make_args, tokenizers):
    """AdaLoRA, with its penalty once a part of the loss that the model computes, and with accumulated batches."""
    logs = {}
    for weight, steps in ((0.0, 1), (5.0, 1), (5.0, 2)):
        trainer = LeftTrainer(
            tiny_model(MODEL_TYPES[family]),
            make_args(
                peft_method="adalora",
                peft_kwargs={"orth_reg_weight": weight or 1e-9},
                max_steps=4,
                logging_steps=2,
                gradient_accumulation_steps=steps,
                per_device_train_batch_size=8 // steps,
                train_sampling_strategy="sequential",
                learning_rate=1e-9,
            ),
            train_dataset=Dataset.from_list(tiny_rows(32)),
            processing_class=tokenizers[family],
        )
        trainer.train()
        logs[weight, steps] = [entry for entry in trainer.state.log_history if "loss" in entry]
    without, with_penalty, accumulated = logs.values()
    assert [entry["loss"] for entry in with_penalty] == pytest.approx([entry["loss"] for entry in without], rel=1e-5)
    assert [entry["loss"] for entry in accumulated] == pytest.approx([entry["loss"] for entry in without], rel=1e-5)
    assert [entry["penalty"] for entry in accumulated] == pytest.approx([entry["penalty"] for entry in with_penalty])
    assert with_penalty[0]["penalty"] > 1
    assert with_penalty[0]["grad_norm"] > 2 * without[0]["grad_norm"]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("part", ["compute_loss_func", "method_loss"])
def test_a_loss_of_ones_own_is_that_of_evaluation_too(part, family, make_args, tokenizers):
    plain = run(family, make_args, tokenizers)
    trainer = run(family, make_args, tokenizers, [part], factor=2.0, max_steps=1)
    with torch.no_grad():
        for (name, weight), (_, trained) in zip(
            trainer.model.named_parameters(), plain.model.named_parameters(), strict=True
        ):
            assert weight.shape == trained.shape, name
            weight.copy_(trained)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(2 * plain.evaluate()["eval_loss"], rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_loss_of_ones_own_is_that_of_an_evaluation_with_generation(family, make_args, tokenizers):
    trainer = run(family, make_args, tokenizers, ["method_loss"], predict_with_generate=True, generation_max_length=3)
    alone = trainer.evaluate_loss(Dataset.from_list(tiny_rows(5)))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(alone, rel=1e-5)


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return BaseModels(tmp_path_factory.mktemp("bases"))


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # FRoD, from torch
@pytest.mark.parametrize(("method", "family"), CASES)
def test_the_users_loss_sees_logits_for_each_label(method, family, make_args, tokenizers, bases):
    """The same loss, written by the user: virtual tokens have no labels, a decoder needs inputs."""
    base = bases[method, family]
    token_loss.shifts = family == "decoder_only"
    results = []
    for users_loss in (None, token_loss):
        trainer = LeftTrainer(
            model_argument(method, base, auto_class(family).from_pretrained),
            make_args(peft_method=method, max_steps=2, **settings(method, family, base)),
            train_dataset=Dataset.from_list(tiny_rows(8)),
            processing_class=tokenizers[family],
            **({"compute_loss_func": users_loss} if users_loss and get_method(method).loss is None else {}),
        )
        trainer.train()
        results.append((losses(trainer)[0], gradient_norms(trainer)[0]))
    assert results[1] == pytest.approx(results[0], rel=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_label_smoothing_with_a_prompt_and_full_logits(family, make_args, tokenizers):
    results = []
    for fast in (True, False):
        trainer = LeftTrainer(
            tiny_model(MODEL_TYPES[family]),
            make_args(
                peft_method="prompt_tuning",
                peft_kwargs={"num_virtual_tokens": 4},
                max_steps=2,
                label_smoothing_factor=0.1,
                use_linear_cross_entropy=fast,
            ),
            train_dataset=Dataset.from_list(tiny_rows()),
            processing_class=tokenizers[family],
        )
        trainer.train()
        results.append(losses(trainer))
    assert results[1] == pytest.approx(results[0], rel=1e-5)


@pytest.mark.parametrize("model_type", ["t5", "mt5", "bart", "mbart", "marian", "pegasus", "blenderbot"])
def test_decoder_inputs_are_those_that_the_model_makes_itself(model_type):
    model = tiny_model(model_type)
    batch = {"input_ids": torch.tensor([[5, 6, 7], [8, 9, 0]]), "labels": torch.tensor([[11, 12, 1], [13, 1, -100]])}
    complete = with_decoder_inputs(model, batch)
    assert batch["labels"].tolist() == [[11, 12, 1], [13, 1, -100]]
    assert complete["decoder_input_ids"].min() >= 0
    with torch.no_grad():
        ours = model(**{name: value for name, value in complete.items() if name != "labels"}).logits
        torch.testing.assert_close(ours, model(**batch).logits)


def test_decoder_inputs_are_added_where_labels_alone_are_given(tokenizers):
    model, batch = tiny_model("llama"), {"labels": torch.tensor([[1]])}
    assert with_decoder_inputs(model, batch) == batch
    given = {**batch, "decoder_input_ids": torch.tensor([[2]])}
    assert with_decoder_inputs(tiny_model("t5"), given) == given
    assert with_decoder_inputs(tiny_model("t5"), {"input_ids": 1}) == {"input_ids": 1}
    assert without_adapter(unwrapped(model)) is model


@pytest.mark.parametrize("users_loss", [None, token_loss], ids=["token_mean", "compute_loss_func"])
def test_fsmt_learns_its_targets_however_the_batch_is_split(users_loss, make_args, tokenizers):
    token_loss.shifts = False
    rows = Dataset.from_list(tiny_rows(8))
    results = []
    for steps in (1, 4):
        trainer = LeftTrainer(
            fsmt_model(),
            make_args(
                max_steps=1,
                per_device_train_batch_size=8 // steps,
                gradient_accumulation_steps=steps,
                train_sampling_strategy="sequential",
            ),
            train_dataset=rows,
            processing_class=tokenizers["encoder_decoder"],
            compute_loss_func=users_loss,
        )
        trainer.train()
        results.append((losses(trainer)[0], gradient_norms(trainer)[0]))
    assert results[1] == pytest.approx(results[0], rel=1e-4)
    model, total, n_tokens = fsmt_model(), 0.0, 0
    for row in trainer.train_dataset:
        labels = torch.tensor(row["labels"])
        start = torch.cat([labels[-1:], labels[:-1]])  # FSMT's decoder starts with the end of the sequence
        with torch.no_grad():
            inputs = {"input_ids": torch.tensor([row["input_ids"]]), "decoder_input_ids": start[None]}
            logits = model.eval()(**inputs).logits[0]
        total, n_tokens = total + cross_entropy(logits, labels, reduction="sum").item(), n_tokens + len(labels)
    assert results[0][0] == pytest.approx(total / n_tokens, rel=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_loss_that_returns_no_pair_is_named(family, make_args, tokenizers):
    record = dataclasses.replace(get_method("lora"), name="no_pair", aliases=(), loss=lambda *_: torch.tensor(1.0))
    with METHODS.temporarily(record):
        trainer = LeftTrainer(
            tiny_model(MODEL_TYPES[family]),
            make_args(peft_method="no_pair"),
            train_dataset=Dataset.from_list(tiny_rows()),
            processing_class=tokenizers[family],
        )
        with pytest.raises(TypeError, match=r"'no_pair' returned a Tensor\. It must return a pair"):
            trainer.train()
