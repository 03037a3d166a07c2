"""A teacher's best tokens on disk say what the teacher says."""

from __future__ import annotations

import os
import signal
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset

from left_trainer.compression import teacher_cache
from left_trainer.compression.teacher import Teacher
from left_trainer.compression.teacher_cache import Reading, best_tokens
from left_trainer.kernels.linear_divergence import Head
from left_trainer.models import FAMILIES
from left_trainer.storage.errors import WriteFailedError
from taught import logged, taught
from tiny import VOCABULARY_SIZE, tiny_rows

MEASURED = ("loss", "teacher_loss", "grad_norm")


@pytest.mark.parametrize(
    ("family", "arguments"),
    [
        ("encoder_decoder", {"train_sampling_strategy": "group_by_length"}),
        ("decoder_only", {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}),
        ("decoder_only", {"peft_method": "prompt_tuning", "peft_kwargs": {"num_virtual_tokens": 3}}),
        ("encoder_decoder", {"peft_method": "prefix_tuning", "peft_kwargs": {"num_virtual_tokens": 3}}),
        ("decoder_only", {"packing": True, "packing_strategy": "wrapped", "max_length": 16}),
    ],
)
def test_the_whole_vocabulary_is_the_teacher(family, arguments, tmp_path):
    """Rows in another order each epoch, grouped by length, and accumulated."""
    arguments = {"max_steps": 6, **arguments}
    live = taught(tmp_path / "live", family, arguments=arguments)
    cached = taught(tmp_path / "cached", family, cache_teacher=VOCABULARY_SIZE, arguments=arguments)
    for trainer in (live, cached):
        trainer.train()
    assert len(logged(live, *MEASURED)) == 6
    for expected, found in zip(logged(live, *MEASURED), logged(cached, *MEASURED), strict=True):
        assert found == pytest.approx(expected, rel=1e-5)
    with pytest.raises(RuntimeError, match="were released"):
        cached.teaching.teacher.model  # noqa: B018


@pytest.mark.parametrize("family", FAMILIES)
def test_more_tokens_come_closer_to_the_teacher(family, tmp_path):
    live = taught(tmp_path / "live", family)
    live.train()
    distances = []
    for k in (4, 64, 280):
        cached = taught(tmp_path / str(k), family, cache_teacher=k)
        cached.train()
        pairs = zip(logged(live, "grad_norm"), logged(cached, "grad_norm"), strict=True)
        distances.append(sum(abs(a - b) for (a,), (b,) in pairs))
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 0.1 * distances[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_killed_run_goes_on_with_the_parts_that_are_there(family, monkeypatch, tmp_path):
    monkeypatch.setattr(teacher_cache, "PART_BYTES", 1)  # a part for each batch
    lesson, asked, is_killed = Teacher.lesson, [], [True]

    def killed(self, inputs, *args, **kwargs):
        asked.append(len(inputs["input_ids"]))
        if len(asked) == 3 and is_killed:
            os.kill(os.getpid(), signal.SIGTERM)
        return lesson(self, inputs, *args, **kwargs)

    monkeypatch.setattr(Teacher, "lesson", killed)
    with pytest.raises(SystemExit) as stop:
        taught(tmp_path, family, cache_teacher=4).train()
    assert stop.value.code == 128 + signal.SIGTERM
    is_killed.clear()
    n_rows = len({(row["prompt"], row["completion"]) for row in tiny_rows()})
    taught(tmp_path, family, cache_teacher=4).train()
    assert sum(asked[3:]) == n_rows - sum(asked[:2])
    asked.clear()
    more = Dataset.from_list([*tiny_rows(), {"prompt": "One more:", "completion": " red"}])
    taught(tmp_path, family, cache_teacher=4, rows=more).train()
    assert asked == [1]  # the row that is new
    asked.clear()
    taught(tmp_path, family, cache_teacher=4, temperature=1.0).train()  # another key
    assert sum(asked) == n_rows
    assert len(list(tmp_path.glob("teacher_cache-*"))) == 2


def test_the_base_keeps_its_weights(tmp_path):
    trainer = taught(tmp_path, "encoder_decoder", "base", cache_teacher=8)
    trainer.train()
    assert trainer.teaching.teacher.model is trainer.model
    assert trainer.teaching.cache is not None


def test_the_size_is_said_and_has_to_fit(monkeypatch, tmp_path, caplog):
    trainer = taught(tmp_path, "encoder_decoder", cache_teacher=8)
    n_targets = len([token for row in trainer.train_dataset["labels"] for token in row if token != -100])
    trainer.train()
    assert f"8 best tokens at {n_targets} targets take" in caplog.text
    written = sum(path.stat().st_size for path in tmp_path.glob("teacher_cache-*/part-*"))
    assert n_targets * 8 * 6 <= written <= n_targets * 8 * 6 + 2000
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=10))
    with pytest.raises(WriteFailedError, match="where 10 bytes are free"):
        taught(tmp_path / "full", "encoder_decoder", cache_teacher=8).train()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_is_known_however_it_is_filled_up(family):
    ids, labels = torch.tensor([[5, 6, 7, 1]]), torch.tensor([[-100, -100, 7, 1]])
    reading, rows = Reading(family, pad_token_id=0), []
    for before, after in ((0, 0), (0, 3), (2, 1)):
        pad = torch.nn.functional.pad
        batch = {"input_ids": pad(ids, (before, after)), "labels": pad(labels, (before, after), value=-100)}
        mask = pad(torch.ones_like(ids), (before, after))
        rows += reading.digests(batch) + reading.digests({**batch, "attention_mask": mask})
    assert len(set(rows)) == 1
    others = [(torch.tensor([[5, 6, 7, 2]]), labels), (ids, torch.tensor([[-100, -100, 8, 1]]))]
    for other_ids, other_labels in others:
        assert not {*reading.digests({"input_ids": other_ids, "labels": other_labels})} & {*rows}


def test_the_best_tokens_are_those_of_the_logits():
    torch.manual_seed(0)
    head = Head(torch.randn(2, 5, 8), torch.randn(40, 8), torch.randn(40), softcap=3.0)
    logits = 3 * torch.tanh((head.hidden @ head.weight.T + head.bias) / 3)
    where = torch.rand(2, 5) > 0.4
    for said in (head, logits):
        best = best_tokens(said, where, k=3, temperature=2.0, n_words=30)
        expected = torch.log_softmax(logits[where][:, :30] / 2, -1).topk(3)
        assert torch.equal(best.token_ids, expected.indices)
        assert torch.allclose(best.log_probs, expected.values, atol=1e-5)
    assert best_tokens(head, where & False, 3, 2.0, 30).token_ids.shape == (0, 3)


def test_a_collator_that_changes_rows_is_refused(tmp_path):
    def changed(features):
        rows = torch.tensor([feature["input_ids"][:4] for feature in features])
        return {"input_ids": torch.randint_like(rows, 5, 90), "labels": rows}

    trainer = taught(tmp_path, "encoder_decoder", cache_teacher=8, data_collator=changed)
    with pytest.raises(ValueError, match="Let the data collator only fill rows up"):
        trainer.train()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"arguments": {"padding_free": True}}, "padding_free=True makes one row"),
        ({"arguments": {"packing": True}}, "packing=True makes one row"),
        ({"rows": Dataset.from_list(tiny_rows()).to_iterable_dataset()}, "train_dataset is a stream"),
        ({"cache_teacher": 301}, "more than the 300 tokens"),
    ],
)
def test_what_cannot_be_kept_is_refused(options, message, no_weights, tmp_path):
    with pytest.raises(ValueError, match=message):
        taught(tmp_path, "decoder_only", **{"cache_teacher": 4, **options})
