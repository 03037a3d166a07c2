"""Which rows a trainer puts into a batch: about equally long ones where the rows are text."""

from __future__ import annotations

import pytest
from datasets import IterableDataset
from torch.utils.data import SequentialSampler

from left_trainer import LeftSeq2SeqTrainer, LeftTrainer, LeftTrainingArguments
from left_trainer.data.sampling import LengthGroupedSampler
from log_history import losses
from tiny import FAMILY_TYPES, tiny_model, tiny_rows


def trainer_of(family, rows, make_args, tokenizers, cls=LeftTrainer, **arguments):
    return cls(
        tiny_model(FAMILY_TYPES[family]),
        make_args(**arguments),
        train_dataset=rows,
        processing_class=tokenizers[family],
    )


def note(trainer):
    trainer.get_train_dataloader()
    return trainer.fast_paths["group_by_length"].report()


@pytest.mark.parametrize("family", sorted(FAMILY_TYPES))
def test_text_is_grouped_unless_the_user_says_otherwise(family, rows, make_args, tokenizers):
    trainer = trainer_of(family, rows, make_args, tokenizers)
    assert isinstance(trainer._get_train_sampler(), LengthGroupedSampler)
    assert note(trainer) == {"ran": 1, "fell_back": {}}
    random = trainer_of(family, rows, make_args, tokenizers, train_sampling_strategy="random")
    assert note(random) == {"ran": 0, "fell_back": {"train_sampling_strategy='random'": 1}}
    tokens = trainer.train_dataset
    given = trainer_of(family, tokens, make_args, tokenizers)
    assert note(given) == {"ran": 0, "fell_back": {"the rows were given as tokens": 1}}
    asked = trainer_of(family, tokens, make_args, tokenizers, train_sampling_strategy="group_by_length")
    assert note(asked) == {"ran": 1, "fell_back": {}}


@pytest.mark.parametrize("family", sorted(FAMILY_TYPES))
def test_rows_that_only_stream_by_are_trained_in_their_order(family, make_args, tokenizers):
    rows = IterableDataset.from_generator(tiny_rows)
    trainer = trainer_of(family, rows, make_args, tokenizers, max_steps=2)
    trainer.train()
    assert trainer.fast_paths["group_by_length"].report() == {
        "ran": 0,
        "fell_back": {"the rows are in a IterableDataset": 1},
    }


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"packing": True, "max_length": 64}, "packing=True"),
        ({"padding_free": True, "max_length": None}, "padding_free=True"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_batches_without_padding_need_no_grouping(arguments, reason, rows, make_args, tokenizers):
    trainer = trainer_of("decoder_only", rows, make_args, tokenizers, **arguments)
    assert note(trainer) == {"ran": 0, "fell_back": {reason: 1}}


def test_a_sampler_of_ones_own_is_used(rows, make_args, tokenizers):
    class Mine(LeftSeq2SeqTrainer):
        def _get_train_sampler(self, train_dataset=None):
            return SequentialSampler(self.train_dataset)

    trainer = trainer_of("encoder_decoder", rows, make_args, tokenizers, cls=Mine)
    batch = next(iter(trainer.get_train_dataloader()))
    assert batch["labels"][0].tolist()[:2] == trainer.train_dataset[0]["labels"][:2]
    assert list(note(trainer)["fell_back"]) == ["the trainer has a sampler of its own"]


def test_evaluation_keeps_the_order_of_the_rows(rows, make_args, tokenizers):
    """Trainer groups evaluation rows as well, which would put every prediction beside another row."""
    trainer = trainer_of("encoder_decoder", rows, make_args, tokenizers, train_sampling_strategy="group_by_length")
    labels = [row[row != -100].tolist() for row in trainer.predict(rows).label_ids]
    assert labels == list(trainer.train_dataset["labels"])


@pytest.mark.parametrize("arguments", [{"packing": True}, {"padding_free": True, "max_length": None}], ids=str)
@pytest.mark.filterwarnings("ignore")
def test_prompts_are_not_joined_where_text_is_generated(arguments, rows, make_args, tokenizers):
    """Else a batch of packed rows would be one prompt, with the answers of all rows but the last in it."""
    predictions = []
    for options in (arguments, {}):
        arguments = {"predict_with_generate": True, "generation_max_length": 5, "overwrite_output_dir": True, **options}
        trainer = trainer_of("decoder_only", rows, make_args, tokenizers, **arguments)
        predictions.append(trainer.predict(rows))
        assert trainer.evaluate(rows)["eval_loss"] == pytest.approx(predictions[-1].metrics["test_loss"], rel=1e-5)
    joined, apart = predictions
    texts = [tokenizers["decoder_only"].batch_decode(found.predictions) for found in predictions]
    assert texts[0] == texts[1]
    assert len(texts[0]) == len(rows)
    assert joined.metrics["test_loss"] == pytest.approx(apart.metrics["test_loss"], rel=1e-5)


@pytest.mark.parametrize("family", sorted(FAMILY_TYPES))
def test_accumulated_batches_of_other_lengths_weigh_tokens_alike(family, rows, make_args, tokenizers):
    """One step over all rows: how they are cut into batches must not show."""
    seen = []
    for batch_size, strategy in ((16, "sequential"), (4, None)):
        trainer = trainer_of(
            family,
            rows,
            make_args,
            tokenizers,
            max_steps=1,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=16 // batch_size,
            train_sampling_strategy=strategy,
            overwrite_output_dir=True,
        )
        trainer.train()
        seen += losses(trainer)
    assert seen[0] == pytest.approx(seen[1], rel=1e-5)


@pytest.mark.parametrize("family", sorted(FAMILY_TYPES))
@pytest.mark.parametrize("multiple", [None, 8])
def test_padding_ends_with_the_longest_row_of_the_batch(family, multiple, rows, make_args, tokenizers):
    trainer = trainer_of(family, rows, make_args, tokenizers, pad_to_multiple_of=multiple)
    for batch in trainer.get_train_dataloader():
        real = {"input_ids": batch["attention_mask"].bool()}
        if family == "encoder_decoder":
            real["labels"] = batch["labels"] != -100
        for name, mask in real.items():
            longest = int(mask.sum(1).max())
            assert batch[name].shape[1] == (longest if multiple is None else -(-longest // multiple) * multiple)


def test_packed_rows_cannot_be_generated_from(rows, make_args, saved_models, no_weights):
    arguments = make_args(packing=True, eval_packing=True, predict_with_generate=True)
    with pytest.raises(ValueError, match=r"eval_packing=True .* Set eval_packing=False"):
        LeftTrainer(str(saved_models["decoder_only"]), arguments, train_dataset=rows)


def test_a_column_of_lengths_is_refused(rows, make_args, saved_models, no_weights):
    arguments = make_args(train_sampling_strategy="group_by_length", length_column_name="n_tokens")
    with pytest.raises(ValueError, match="length_column_name='n_tokens' has no effect"):
        LeftTrainer(str(saved_models["encoder_decoder"]), arguments, train_dataset=rows)


def test_an_unknown_strategy_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"train_sampling_strategy='group_by_lenght'.*Did you mean 'group_by_length'"):
        LeftTrainingArguments(output_dir=str(tmp_path), train_sampling_strategy="group_by_lenght")
