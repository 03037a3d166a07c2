"""Steps on texts that the student has written: which they are, what they train on, and that they can be resumed."""

from __future__ import annotations

import pytest
import torch
from datasets import Dataset

from left_trainer.methods.apply import get_method
from left_trainer.models import FAMILIES
from left_trainer.trainer.on_policy import is_on_policy, up_to_end
from log_history import gradient_norms, losses
from taught import logged, taught
from tiny import tiny_model

MEASURED = ("loss", "teacher_loss", "on_policy", "grad_norm")


def test_the_share_of_steps_is_that_asked_for():
    for fraction in (0.0, 0.3, 1.0):
        steps = [is_on_policy(fraction, 7, step) for step in range(2000)]
        assert sum(steps) / 2000 == pytest.approx(fraction, abs=0.04)
    assert [is_on_policy(0.5, 1, step) for step in range(64)] != [is_on_policy(0.5, 2, step) for step in range(64)]


class Seen:
    """The batches that a trainer computes losses of."""

    def __init__(self, trainer):
        self.batches, compute_loss = [], type(trainer).compute_loss

        def see(model, inputs, *args, **kwargs):
            self.batches.append(({name: value.clone() for name, value in inputs.items()}, kwargs))
            return compute_loss(trainer, model, inputs, *args, **kwargs)

        trainer.compute_loss = see


def prompts_of(batch, family):
    mask = batch["attention_mask"].bool()
    if family == "decoder_only":
        mask &= batch["labels"].eq(-100)
    return [tuple(row[own].tolist()) for row, own in zip(batch["input_ids"], mask, strict=True)]


@pytest.mark.parametrize("method", ["lora", "prompt_tuning", "full"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_student_answers_the_prompts_of_the_batch(family, method, tmp_path):
    tokens = {"num_virtual_tokens": 3} if get_method(method).virtual_tokens else {}
    arguments = {"gradient_accumulation_steps": 2, "peft_method": method, "peft_kwargs": tokens}
    trainers = [
        taught(tmp_path / name, family, arguments=arguments, **options)
        for name, options in (("own", {"on_policy_fraction": 1.0}), ("data", {}))
    ]
    seen = [Seen(trainer) for trainer in trainers]
    for trainer in trainers:
        trainer.train()
    own, data = ([batch for batch, _ in each.batches] for each in seen)
    assert [prompts_of(batch, family) for batch in own] == [prompts_of(batch, family) for batch in data]
    assert not any(torch.equal(a["labels"], b["labels"]) for a, b in zip(own, data, strict=True))
    for start in range(0, len(own), 2):  # the mean is over the tokens of both micro-batches
        number = sum(int(batch["labels"].ne(-100).sum()) for batch in own[start : start + 2])
        assert {int(kwargs["num_items_in_batch"]) for _, kwargs in seen[0].batches[start : start + 2]} == {number}
    answers = [row[row.ne(-100)] for batch in own for row in batch["labels"]]
    assert all(1 <= len(answer) <= 6 for answer in answers)
    assert not any(answer[:-1].eq(1).any() for answer in answers)  # nothing behind the end
    assert all(share == 1 for _, _, share, _ in logged(trainers[0], *MEASURED))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_loss_is_the_divergence_alone(family, tmp_path):
    """Whatever alpha is: with a teacher that is the student there is nothing to learn."""
    trainer = taught(tmp_path, family, "self", on_policy_fraction=1.0, alpha=0.0, arguments={"learning_rate": 0.0})
    trainer.train()
    assert all(abs(loss) < 1e-6 for (loss,) in logged(trainer, "teacher_loss"))
    assert max(gradient_norms(trainer)) < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_other_steps_are_those_of_plain_training(family, tmp_path):
    """The random state of the training is left alone, so that dropout and the order of the rows are."""
    arguments = {
        "max_steps": 4,
        "learning_rate": 0.0,
        "peft_kwargs": {"lora_dropout": 0.3, "init_lora_weights": "gaussian"},
    }
    mixed = taught(tmp_path / "mixed", family, on_policy_fraction=0.5, arguments=arguments)
    plain = taught(tmp_path / "plain", family, arguments=arguments)
    for trainer in (mixed, plain):
        trainer.train()
    shares = [share for (share,) in logged(mixed, "on_policy")]
    assert set(shares) == {0.0, 1.0}
    for share, mine, other in zip(shares, losses(mixed), losses(plain), strict=True):
        assert (mine == pytest.approx(other, rel=1e-6)) == (share == 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_that_is_resumed_writes_the_same(family, tmp_path):
    arguments = {"save_strategy": "steps", "save_steps": 1, "max_steps": 5}
    whole = taught(tmp_path, family, on_policy_fraction=0.6, arguments=arguments)
    whole.train()
    assert 0 < sum(share for (share,) in logged(whole, "on_policy")) < 5
    resumed = taught(tmp_path, family, on_policy_fraction=0.6, arguments=arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for mine, other in zip(logged(resumed, *MEASURED), logged(whole, *MEASURED), strict=True):
        assert mine == pytest.approx(other, rel=1e-6)


@pytest.mark.parametrize("model_type", ["mbart", "bart"])
def test_the_decoder_reads_what_it_has_written(model_type, tmp_path):
    """Behind the token that it began with, also where targets of the data end with their language."""
    trainer = taught(tmp_path, "encoder_decoder", tiny_model("t5"), on_policy_fraction=1.0)
    trainer.model = trainer.model_wrapped = tiny_model(model_type)
    (batch,) = next([each] for each in trainer.get_train_dataloader())
    ((written,), _) = trainer.get_batch_samples(iter([batch]), 1, trainer.args.device)
    start = trainer.model.config.decoder_start_token_id
    assert written["decoder_input_ids"][:, 0].eq(start).all()
    own = written["labels"].ne(-100)
    assert torch.equal(written["decoder_input_ids"][:, 1:][own[:, 1:]], written["labels"][:, :-1][own[:, 1:]])


@pytest.mark.parametrize("family", FAMILIES)
def test_the_student_writes_by_its_own_distribution(family, tmp_path):
    """Not by what its generation config is made for."""
    texts = []
    for settings in (
        {},
        {"no_repeat_ngram_size": 1, "repetition_penalty": 9.0, "top_k": 1, "min_length": 5, "min_p": 0.9},
    ):
        trainer = taught(tmp_path, family, on_policy_fraction=1.0)
        for name, value in settings.items():
            setattr(trainer.model.get_base_model().generation_config, name, value)
        batches, _ = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 1, trainer.args.device)
        texts.append(batches[0]["labels"].tolist())
    assert texts[0] == texts[1]


def test_a_text_stops_at_its_first_end():
    tokens = torch.tensor([[5, 1, 0, 0], [5, 6, 7, 8], [1, 1, 0, 0], [5, 0, 2, 9]])
    expected = [[5, 1, -100, -100], [5, 6, 7, 8], [1, -100, -100, -100], [5, 0, 2, -100]]
    assert up_to_end(tokens, [1, 2]).tolist() == expected


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": Dataset.from_list([{"text": "a b"}] * 4)}, "does not say where they end: its rows are whole texts"),
        ({"arguments": {"completion_only_loss": False}}, "the loss covers the prompts"),
        ({"arguments": {"packing": True}}, "packing=True joins rows"),
    ],
)
def test_rows_without_a_prompt_are_refused(options, message, no_weights, tmp_path):
    with pytest.raises(ValueError, match=message):
        taught(tmp_path, "decoder_only", **options, on_policy_fraction=0.5)
