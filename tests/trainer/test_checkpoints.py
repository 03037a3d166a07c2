"""Checkpoints: where a run starts, what is kept, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from left_trainer import LeftTrainer
from left_trainer.callbacks import AdapterSaverCallback
from left_trainer.storage.manifest import MANIFEST_FILE
from left_trainer.trainer.checkpoints import asks_to_resume, remove_old_checkpoints
from log_history import losses
from tiny import tiny_model

ADALORA = {"init_r": 4, "target_r": 2}


@pytest.fixture
def make(rows, make_args, tokenizers, tmp_path):
    def trainer(callbacks=(), data=rows, model=None, **options):
        args = make_args(**{"save_strategy": "steps", "save_steps": 2, "max_steps": 6, **options})
        return LeftTrainer(
            model or tiny_model("llama"),
            args,
            train_dataset=data,
            processing_class=tokenizers["decoder_only"],
            callbacks=list(callbacks),
        )

    return trainer


@pytest.fixture
def run(tmp_path):
    return tmp_path / "run"


@pytest.mark.parametrize(
    ("value", "asked"),
    [(True, True), ("true", True), ("True", True), ("false", False), ("", False), (None, False), ("a/b", "a/b")],
)
def test_what_a_flag_asks_for(value, asked):
    assert asks_to_resume(value) == asked


def test_a_finished_run_stays_as_it_is(make):
    """Six steps, of four in an epoch."""
    first = make()
    first.train()
    again = make()
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 6
    assert losses(again) == losses(first)


def test_adapters_of_a_run_without_a_checkpoint_do_not_stop_the_next(make, run):
    make([AdapterSaverCallback()]).train()
    for checkpoint in run.glob("checkpoint-*"):
        shutil.rmtree(checkpoint)
    again = make([AdapterSaverCallback()])
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 6


def test_the_checkpoint_just_written_stays(make, run):
    make().train()
    (run / "checkpoint-6" / "optimizer.pt").write_bytes(b"")
    shutil.rmtree(run / "checkpoint-4")
    make(max_steps=4, save_total_limit=1).train(resume_from_checkpoint=True)
    assert [path.name for path in run.glob("checkpoint-*")] == ["checkpoint-4"]


def test_old_checkpoints_go_by_number_and_the_best_stays(tmp_path):
    for number in (2, 10, 8, 9, 100):
        (tmp_path / f"checkpoint-{number}").mkdir()
    (tmp_path / "checkpoint-best-keep").mkdir()
    (tmp_path / "checkpoint-3").symlink_to(tmp_path / "checkpoint-best-keep")
    remove_old_checkpoints(tmp_path / "checkpoint-10", 3, str(tmp_path / "checkpoint-2"))
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"checkpoint-2", "checkpoint-9", "checkpoint-10", "checkpoint-best-keep", "checkpoint-3"}


def test_what_has_the_name_of_a_checkpoint_is_kept(make, run, tmp_path):
    run.mkdir()
    (run / "checkpoint-2").symlink_to(tmp_path)
    (run / "checkpoint-4").write_text("mine")
    make().train()
    assert not (run / "checkpoint-2").is_symlink()
    assert next(run.glob("checkpoint-2.kept-*")).is_symlink()
    assert next(run.glob("checkpoint-4.kept-*")).read_text() == "mine"


def test_a_model_alone_is_passed_over(make):
    make(save_only_model=True).train()
    again = make(max_steps=7)
    again.train(resume_from_checkpoint=True)
    assert len(losses(again)) == 7


def test_a_damaged_manifest_is_damage(make, run, caplog):
    make().train()
    manifest = run / "checkpoint-6" / MANIFEST_FILE
    manifest.write_text(manifest.read_text().replace('"lora"', '"lorb"'))
    again = make()
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 6
    assert "checkpoint-6 is skipped: checkpoint_manifest.json is damaged" in caplog.text


def test_a_config_that_training_changes_does_not_stop_a_resume(make, run):
    make(peft_method="adalora", peft_kwargs=ADALORA, max_steps=8).train()
    shutil.rmtree(run / "checkpoint-8")
    again = make(peft_method="adalora", peft_kwargs=ADALORA, max_steps=8)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 8


@pytest.mark.parametrize("method", ["lora", "full"])
def test_another_run_is_refused(method, make, rows, run):
    make(peft_method=method, max_steps=2).train()
    others = {
        "training data": {"data": rows.select(reversed(range(len(rows))))},
        "learning_rate": {"learning_rate": 1e-5},
        "model": {"model": tiny_model("qwen2")},
    }
    if method == "lora":
        base = tiny_model("llama")
        base.model.norm.weight.data.add_(1)
        others["base weights"] = {"model": base}
    for name, options in others.items():
        with pytest.raises(ValueError, match=name):
            make(**{"peft_method": method, **options}).train(resume_from_checkpoint=True)


def test_a_path_is_refused_and_not_passed_over(make, run):
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        make().train(resume_from_checkpoint=str(run / "checkpoint-2"))
    make(max_steps=2).train()
    Path(run / "checkpoint-2" / "optimizer.pt").unlink()
    with pytest.raises(ValueError, match=r"optimizer\.pt is missing"):
        make().train(resume_from_checkpoint=str(run / "checkpoint-2"))
