"""One script, started again, ends from every state, and goes on in its own run alone."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from datasets import Dataset

from left_trainer import LeftTrainer, LeftTrainingArguments
from left_trainer.storage import owners
from left_trainer.storage.manifest import MANIFEST_FILE
from left_trainer.trainer.checkpoints import checkpoints_in, why_not_resumable
from log_history import losses
from tiny import tiny_model, tiny_rows, tiny_tokenizer

STEPS = 6  # of 8 to two epochs: the end is within an epoch
ADALORA = {"peft_method": "adalora", "peft_kwargs": {"init_r": 4, "target_r": 2}}
FILES = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json")
ROWS = Dataset.from_list(tiny_rows())


def make_trainer(folder, model=None, rows=ROWS, callbacks=None, **options) -> LeftTrainer:
    args = {
        "output_dir": str(folder),
        "peft_method": "lora",
        "learning_rate": 5e-3,
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 3,
        "use_cpu": True,
        **options,
    }
    return LeftTrainer(
        model or tiny_model("llama"),
        LeftTrainingArguments(**args),
        train_dataset=rows,
        eval_dataset=rows.select(range(4)) if "eval_strategy" in options else None,
        processing_class=tiny_tokenizer("decoder_only"),
        callbacks=callbacks,
    )


def trained(trainer: LeftTrainer) -> dict[str, torch.Tensor]:
    return {name: weight.detach() for name, weight in trainer.model.named_parameters() if weight.requires_grad}


def restart(folder, **options) -> LeftTrainer:
    """What a job manager runs again and again."""
    trainer = make_trainer(folder, **options)
    trainer.train(resume_from_checkpoint=True)
    trainer.save_model()
    return trainer


def assert_same_end(trainer: LeftTrainer, whole: LeftTrainer) -> None:
    assert trainer.state.global_step == STEPS
    assert losses(trainer) == pytest.approx(losses(whole), rel=1e-6)
    torch.testing.assert_close(trained(trainer), trained(whole))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing disturbs, with its final save."""
    return restart(tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture
def run(whole, tmp_path):
    """A copy of its folder."""
    shutil.copytree(whole.args.output_dir, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def said(caplog):
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


# Dead ends


def nothing(run: Path) -> None:
    shutil.rmtree(run)


def empty(run: Path) -> None:
    shutil.rmtree(run)
    run.mkdir()


def half_a_first_checkpoint(run: Path) -> None:
    """As a killed `Trainer` leaves it, and as we do."""
    for name in ("checkpoint-4", "checkpoint-6"):
        shutil.rmtree(run / name)
    host = owners.token().partition("-")[0]
    shutil.copytree(run / "checkpoint-2", run / f".checkpoint-2.{host}-999999999-1-0a1b2c3d.tmp")
    for name in ("trainer_state.json", "optimizer.pt", MANIFEST_FILE):
        (run / "checkpoint-2" / name).unlink()
    for file in run.glob("*.*"):
        if file.is_file():
            file.unlink()


def before_the_final_save(run: Path) -> None:
    for file in run.glob("*.*"):
        if file.is_file():
            file.unlink()


def in_the_final_save(run: Path) -> None:
    (run / "adapter_config.json").unlink()


def after_the_final_save(run: Path) -> None:
    pass


STATES = (nothing, empty, half_a_first_checkpoint, before_the_final_save, in_the_final_save, after_the_final_save)


@pytest.mark.parametrize("state", STATES, ids=lambda state: state.__name__)
def test_the_same_script_ends_from_every_state(state, run, whole):
    state(run)
    assert_same_end(restart(run), whole)
    assert (run / "adapter_model.safetensors").is_file()
    assert not list(run.glob(".*.tmp"))


def test_a_finished_run_trains_no_step(run, said):
    steps = []
    trainer = make_trainer(run)
    trainer.training_step = lambda *args, **kwargs: steps.append(args)
    trainer.train(resume_from_checkpoint=True)
    assert not steps
    assert f"Continuing from {run / 'checkpoint-6'}." in said.text


@pytest.mark.parametrize("step", [2, 4, 6])
def test_a_method_that_changes_its_config_in_training_goes_on(step, tmp_path):
    """AdaLoRA notes its steps and its ranks there."""
    whole = restart(tmp_path, **ADALORA)
    for checkpoint in checkpoints_in(tmp_path):
        if int(checkpoint.name.rpartition("-")[2]) > step:
            shutil.rmtree(checkpoint)
    assert_same_end(restart(tmp_path, **ADALORA), whole)


def test_a_fresh_run_starts_over_half_a_checkpoint_and_not_over_a_whole_one(run):
    before_the_final_save(run)
    with pytest.raises(FileExistsError, match="checkpoint-6 of an earlier run"):
        make_trainer(run).train()
    with pytest.raises(FileExistsError, match="checkpoint-6 of an earlier run"):
        make_trainer(run, resume_from_checkpoint="true").train()  # which Trainer.train does not read
    assert len(checkpoints_in(run)) == 3
    for checkpoint in checkpoints_in(run):
        (checkpoint / "trainer_state.json").unlink()
    make_trainer(run, max_steps=2).train()
    assert [path.name for path in checkpoints_in(run)] == ["checkpoint-2"]


# Damage


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(bytes(content))


def removed(path: Path) -> None:
    path.unlink()


DAMAGES = [(True, truncated), (True, removed), (True, flipped), (False, truncated), (False, removed)]


@pytest.mark.parametrize(("with_manifest", "damage"), DAMAGES)
@pytest.mark.parametrize("name", FILES)
def test_damage_is_seen(name, damage, with_manifest, run):
    """Without a manifest, as in checkpoints of other trainers, a bit that is flipped cannot be seen."""
    checkpoint = run / "checkpoint-6"
    if not with_manifest:
        (checkpoint / MANIFEST_FILE).unlink()
    assert why_not_resumable(checkpoint) is None
    damage(checkpoint / name)
    reason = why_not_resumable(checkpoint) or ""
    assert name in reason or reason.removeprefix("it has no ").split(",")[0] in ("weights", "state of the optimizer")


def test_resume_names_what_it_skips_and_goes_on_from_the_last_whole_one(run, whole, said):
    truncated(run / "checkpoint-6" / "optimizer.pt")
    flipped(run / "checkpoint-4" / "adapter_model.safetensors")
    assert_same_end(restart(run), whole)
    for name, file in (("checkpoint-6", "optimizer.pt"), ("checkpoint-4", "adapter_model.safetensors")):
        assert f"{run / name} is skipped: {file}" in said.text


def test_a_named_checkpoint_is_looked_at_first(run):
    truncated(run / "checkpoint-4" / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=r"checkpoint-4.*adapter_model\.safetensors has"):
        make_trainer(run).train(resume_from_checkpoint=str(run / "checkpoint-4"))
    trainer = make_trainer(run)
    trainer.train(resume_from_checkpoint=run / "checkpoint-2")
    assert trainer.state.global_step == STEPS


def test_weights_alone_are_nothing_to_go_on_from(tmp_path, said):
    make_trainer(tmp_path, save_only_model=True).train()
    trainer = make_trainer(tmp_path, save_only_model=True)
    trainer.train(resume_from_checkpoint=True)
    assert "checkpoint-6 is skipped: it has no state of the optimizer, as with save_only_model=True" in said.text
    assert "no whole checkpoint: the training starts from the beginning" in said.text
    assert trainer.state.global_step == STEPS


def test_a_sidecar_is_part_of_a_checkpoint(tmp_path, said):
    options = {"peft_method": "p_tuning", "peft_kwargs": {"num_virtual_tokens": 4, "encoder_hidden_size": 8}}
    whole = restart(tmp_path, **options)
    (tmp_path / "checkpoint-6" / MANIFEST_FILE).unlink()
    (tmp_path / "checkpoint-6" / "adapter_training_state.safetensors").unlink()
    assert_same_end(restart(tmp_path, **options), whole)
    assert "it has no adapter_training_state.safetensors" in said.text


@pytest.mark.parametrize("damage", [truncated, removed, flipped], ids=lambda damage: damage.__name__)
def test_the_best_checkpoint_is_looked_at_before_it_is_loaded(damage, tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    trainer = restart(tmp_path, **options)
    best = Path(trainer.state.best_model_checkpoint)
    assert best in checkpoints_in(tmp_path)
    state = json.loads((best / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(best)
    damage(best / "adapter_model.safetensors")
    with pytest.raises(ValueError, match=f"{best.name}.*adapter_model.safetensors"):
        trainer._load_best_model()


# Names


def test_only_folders_with_a_number_are_ours(run, whole, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (run / "checkpoint-best-keep").mkdir()
    (run / "checkpoint-9x").mkdir()
    (run / "checkpoint-notes.txt").write_text("mine")
    (run / "checkpoint-00").symlink_to(tmp_path / "elsewhere")
    (run / "checkpoint-8").symlink_to(tmp_path / "elsewhere")
    theirs = {"checkpoint-best-keep", "checkpoint-9x", "checkpoint-notes.txt", "checkpoint-00", "checkpoint-8"}
    options = {"save_total_limit": 1, "eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "loss"}
    assert_same_end(restart(run, **options), whole)
    trainer = make_trainer(run, overwrite_output_dir=True, load_best_model_at_end=True, **options)
    trainer.train()
    assert theirs <= {path.name for path in run.iterdir()}
    assert len(checkpoints_in(run)) == 1
    trainer.train()
    assert theirs <= {path.name for path in run.iterdir()}


# What a checkpoint belongs to

OTHER_RUNS = {
    "peft_method was 'lora' and is 'rslora'": {"peft_method": "rslora"},
    "r was 8 and is 2": {"peft_kwargs": {"r": 2}},
    "target_modules was": {"peft_kwargs": {"target_modules": ["k_proj"]}},
    "trained weights:": {"peft_kwargs": {"target_modules": ["k_proj"]}},
    "processes was 4 and is 8": {"gradient_accumulation_steps": 2},
    "seed was 3 and is 4": {"seed": 4},
    "data_seed was None and is 4": {"data_seed": 4},
    "learning_rate was 0.005 and is 0.001": {"learning_rate": 1e-3},
    "optim was 'adamw_torch' and is 'adafactor'": {"optim": "adafactor"},
    "rows was 16 and is 12": {"rows": ROWS.select(range(12))},
    "digest was": {"rows": ROWS.select(list(reversed(range(len(ROWS)))))},
    "model_type was 'llama' and is 'gpt2'": {"model": "gpt2"},
    "num_hidden_layers was": {"model": "llama", "model_options": {"num_hidden_layers": 1}},
}


@pytest.mark.parametrize("difference", OTHER_RUNS)
def test_a_checkpoint_of_another_run_is_refused(difference, run):
    options = dict(OTHER_RUNS[difference])
    if "model" in options:
        options["model"] = tiny_model(options["model"], **options.pop("model_options", {}))
    trainer = make_trainer(run, **options)
    before = {name: weight.clone() for name, weight in trained(trainer).items()}
    for value in (True, str(run / "checkpoint-2")):
        with pytest.raises(ValueError, match="belongs to another run") as error:
            trainer.train(resume_from_checkpoint=value)
        assert difference in str(error.value)
    torch.testing.assert_close(trained(trainer), before)
    assert len(checkpoints_in(run)) == 3


def test_other_weights_of_the_same_shape_are_another_run(run):
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(1.5)
    with pytest.raises(ValueError, match="base weights was"):
        make_trainer(run, model=model).train(resume_from_checkpoint=True)


MAY_CHANGE = {
    "max_steps": {"max_steps": 8},
    "logging": {"logging_steps": 3, "logging_first_step": True},
    "evaluation": {"eval_strategy": "steps", "eval_steps": 3},
    "saving": {"save_steps": 3, "save_total_limit": 1},
    "workers": {"dataloader_num_workers": 1},
    "accumulation of the same rows": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
    "fused optimizer": {"optim": "adamw_torch_fused"},
}


@pytest.mark.parametrize("what", MAY_CHANGE)
def test_what_may_change(what, run):
    shutil.rmtree(run / "checkpoint-6")
    options = MAY_CHANGE[what]
    trainer = make_trainer(run, **options)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == options.get("max_steps", STEPS)


def test_a_run_may_go_on_in_another_folder(run, whole, tmp_path):
    trainer = make_trainer(tmp_path / "other")
    trainer.train(resume_from_checkpoint=str(run / "checkpoint-4"))
    assert_same_end(trainer, whole)
