"""A teacher writes targets once, keeps what it has written, and the student trains on them."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
from datasets import Dataset

from left_trainer.compression.kept_targets import KeptTargets
from left_trainer.compression.teacher_targets import TargetWriter, Writing, with_targets
from left_trainer.models import FAMILIES
from log_history import losses
from taught import TEACHERS_SEED, taught
from tiny import FAMILY_TYPES, tiny_model, tiny_rows, tiny_tokenizer

OTHER = {"encoder_decoder": "decoder_only", "decoder_only": "encoder_decoder"}


@pytest.fixture(scope="module")
def teachers(tmp_path_factory) -> dict[str, str]:
    """A teacher of each family, with another vocabulary than the student: no distribution could be compared."""
    folders = {}
    for family, model_type in FAMILY_TYPES.items():
        folders[family] = str(tmp_path_factory.mktemp(f"teacher-{family}"))
        tokenizer = tiny_tokenizer(family)
        tokenizer.add_tokens(["zzz"])
        tiny_model(model_type, seed=TEACHERS_SEED, vocab_size=310).save_pretrained(folders[family])
        tokenizer.save_pretrained(folders[family])
    return folders


def written(folder: Path) -> list[dict]:
    (file,) = folder.glob("teacher_targets-*")
    return [json.loads(line) for line in file.read_text().splitlines()]


def targets_of(trainer) -> list[str]:
    rows = [[token for token in row if token != -100] for row in trainer.train_dataset["labels"]]
    return [text.strip() for text in trainer.processing_class.batch_decode(rows, skip_special_tokens=True)]


@pytest.mark.parametrize("teachers_family", FAMILIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_student_trains_on_what_the_teacher_writes(family, teachers_family, teachers, tmp_path):
    """Whatever the family and the tokenizer of the teacher."""
    trainer = taught(tmp_path, family, teachers[teachers_family], sequence_level=True)
    trainer.train()
    header, *rows = written(tmp_path)
    assert header["key"]["max_new_tokens"] == 6
    assert [row["row"] for row in rows] == list(range(16))
    answers = [row["text"] for row in rows]
    own = [row["completion"].strip() for row in tiny_rows()]
    # A token of the teacher's may be half of a character, which no text brings back.
    whole = [number for number, text in enumerate(answers) if "\ufffd" not in text and text]
    assert whole
    assert [targets_of(trainer)[number] for number in whole] == [answers[number] for number in whole]
    assert targets_of(trainer) != own
    with pytest.raises(RuntimeError, match="were released"):
        trainer.teaching.teacher.model  # noqa: B018


@pytest.mark.parametrize(("family", "teacher"), [("encoder_decoder", "base"), ("decoder_only", "self")])
def test_the_student_may_be_its_own_teacher(family, teacher, tmp_path):
    trainer = taught(tmp_path, family, teacher, sequence_level=True)
    trainer.train()
    teaching = taught(tmp_path / "again", family, teacher, sequence_level=True).teaching
    alone = TargetWriter(teaching.teacher, Writing(max_new_tokens=6), trainer.args.device)
    answers = [alone.answer(alone.encode([row["prompt"]]))[0] for row in tiny_rows(4)]
    assert [row["text"] for row in written(tmp_path)[1:5]] == answers  # in a batch as alone


@pytest.mark.parametrize("family", FAMILIES)
def test_a_killed_run_goes_on_where_it_stopped(family, teachers, monkeypatch, tmp_path):
    """And a finished one reads what is there; the training is that of a run that nothing has stopped."""
    whole = taught(tmp_path / "whole", family, teachers[family], sequence_level=True)
    whole.train()
    answer, asked = TargetWriter.answer, []

    def killed(self, ids):
        asked.append(len(ids))
        if len(asked) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return answer(self, ids)

    monkeypatch.setattr(TargetWriter, "answer", killed)
    run = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        taught(run, family, teachers[family], sequence_level=True).train()
    (part,) = run.glob("teacher_targets-*.part0")
    assert len(part.read_text().splitlines()) == 1 + sum(asked[:2])
    part.write_bytes(part.read_bytes()[:-5])  # the last line is torn
    resumed = taught(run, family, teachers[family], sequence_level=True)
    resumed.train(resume_from_checkpoint=True)
    assert sum(asked[3:]) == 16 - sum(asked[:2]) + 1
    assert written(run) == written(tmp_path / "whole")
    assert losses(resumed) == losses(whole)
    asked.clear()
    again = taught(run, family, teachers[family], sequence_level=True)
    again.train()
    assert not asked
    assert losses(again) == losses(whole)
    assert not list(run.glob("*.part0"))


def test_a_checkpoint_of_the_run_is_resumed(teachers, tmp_path):
    """Also where it is asked for before the targets have taken the place of those of the data."""
    saving = {"save_strategy": "steps", "save_steps": 2}
    whole = taught(tmp_path, "encoder_decoder", teachers["encoder_decoder"], sequence_level=True, arguments=saving)
    whole.train()
    resumed = taught(tmp_path, "encoder_decoder", teachers["encoder_decoder"], sequence_level=True, arguments=saving)
    checkpoint = str(tmp_path / "checkpoint-2")
    assert resumed.checkpoint_of_run(checkpoint) == checkpoint
    resumed.train(resume_from_checkpoint=checkpoint)
    assert losses(resumed) == pytest.approx(losses(whole), rel=1e-6)
    (kept,) = tmp_path.glob("teacher_targets-*")
    kept.write_text(kept.read_text().replace('"text": "', '"text": "red '))
    others = taught(tmp_path, "encoder_decoder", teachers["encoder_decoder"], sequence_level=True, arguments=saving)
    with pytest.raises(ValueError, match="with the teacher's targets"):
        others.train(resume_from_checkpoint=checkpoint)


@pytest.mark.parametrize(
    "changed",
    [{"num_beams": 2}, {"rows": Dataset.from_list(tiny_rows(16, seed=1))}, {"teacher": "base"}],
    ids=["settings", "prompts", "teacher"],
)
def test_targets_of_another_key_are_written_anew_beside_them(changed, teachers, tmp_path):
    options = {"teacher": teachers["encoder_decoder"], "sequence_level": True, "arguments": {"max_steps": 1}}
    taught(tmp_path, "encoder_decoder", **options).train()
    (first,) = tmp_path.glob("teacher_targets-*")
    before = first.read_text()
    taught(tmp_path, "encoder_decoder", **{**options, "arguments": {"max_steps": 1}, **changed}).train()
    assert len(list(tmp_path.glob("teacher_targets-*"))) == 2
    assert first.read_text() == before


def test_an_answer_of_nothing_leaves_the_target_of_the_row(monkeypatch, teachers, tmp_path, caplog):
    monkeypatch.setattr(TargetWriter, "answer", lambda self, ids: [""] * (len(ids) - 1) + ["blue"])
    trainer = taught(tmp_path, "decoder_only", teachers["encoder_decoder"], sequence_level=True)
    trainer.train()
    own = [row["completion"].strip() for row in tiny_rows()]
    n_empty = sum(not row["text"] for row in written(tmp_path)[1:])
    assert 0 < n_empty < 16
    assert sum(a == b for a, b in zip(targets_of(trainer), own, strict=True)) >= n_empty
    assert f"answered nothing to {n_empty} of 16 rows" in caplog.text


def test_answers_stand_where_completions_stood():
    """Behind the space that parts a completion from its prompt, or in the turn of the assistant."""
    rows = Dataset.from_list([{"prompt": "a", "completion": " \nb c"}, {"prompt": "a", "completion": "d"}])
    assert with_targets(rows, ["x", "y z"])[0]["completion"][:] == [" \nx", "y z"]
    chat = [{"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}] * 2
    replaced, n_empty = with_targets(Dataset.from_list(chat), ["x", ""])
    assert [row["completion"] for row in replaced] == [[{"role": "assistant", "content": text}] for text in ("x", "b")]
    assert n_empty == 1


def test_a_damaged_file_costs_its_rows_alone(tmp_path):
    kept = KeptTargets(tmp_path, {"a": 1})
    with kept.appending(0) as append:
        append({0: "x\u2028y", 3: "z"})
    with kept.appending(1) as append:
        append({1: "w"})
    assert kept.read() == {0: "x\u2028y", 3: "z", 1: "w"}
    (first, *_) = sorted(tmp_path.glob("*.part0"))
    first.write_bytes(b'{"key": {"a"')  # killed within its first line
    assert kept.read() == {1: "w"}
    with kept.appending(0) as append:
        append({0: "v"})
    assert KeptTargets(tmp_path, {"a": 1}).read() == {0: "v", 1: "w"}
    kept.finish(kept.read())
    assert [path.name for path in tmp_path.iterdir()] == [kept.path.name]
    assert KeptTargets(tmp_path, {"a": 2}).read() == {}


TOKENS = [{"input_ids": [5, 6, 1], "labels": [5, 1]}] * 4
CHAT = [{"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]}] * 4


@pytest.mark.parametrize(
    ("family", "options", "message"),
    [
        ("encoder_decoder", {"rows": Dataset.from_list(TOKENS)}, "train_dataset has token ids"),
        ("decoder_only", {"rows": Dataset.from_list([{"text": "a b"}] * 4)}, "train_dataset has the columns 'text'"),
        ("decoder_only", {"rows": Dataset.from_list(tiny_rows()).to_iterable_dataset()}, "train_dataset is a stream"),
        ("decoder_only", {"rows": Dataset.from_list(CHAT)}, "has no chat template"),
        ("decoder_only", {"formatting_func": lambda row: row["prompt"]}, "formatting_func makes one text"),
    ],
)
def test_rows_that_no_target_can_be_written_for_are_refused(family, options, message, no_weights, tmp_path):
    with pytest.raises(ValueError, match=message):
        taught(tmp_path, family, **options, sequence_level=True)
