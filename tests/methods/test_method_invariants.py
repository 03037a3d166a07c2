"""What has to hold for every registered method on every model family that it claims."""

from __future__ import annotations

import gc
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import TrainerCallback

from left_trainer import LeftTrainer, LeftTrainingArguments, get_method, list_methods
from left_trainer.adapters.task_ids import task_inputs
from left_trainer.evaluation.text_metrics import decode
from left_trainer.models import FAMILIES, auto_class
from left_trainer.runs.inference import Generator
from left_trainer.runs.merging import merge_adapter
from log_history import gradient_norms, losses
from method_settings import CASES, SETTINGS, BaseModels, is_adapter, model_argument, settings
from processes import ENVIRONMENT
from tiny import tiny_rows, tiny_tokenizer

TOTAL_STEPS = 8
pytestmark = [
    pytest.mark.filterwarnings("ignore:Unmerge result can be inaccurate"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks"),  # FRoD, from torch
]
# Trained parameters that may stand still.
STANDING_STILL = {
    "shadow": r"layers\.1\.shadow_update",  # what the last block would pass on to a next one
    "adalora": r"\.lora_E\.",  # zero at the start and where a rank is taken away
}
# Methods that draw random numbers in every forward pass of training.
RANDOM_FORWARD = {"poly": "samples which modules a task uses", "pvera": "samples its inner state"}
# Lily's router weighs its experts by a mean over the micro-batch, padding included.
ROUTED = {"lily": 1e-2}
# Merged only into biases that exist, which T5 and Llama lack.
MERGED_INTO_BIASES = ("beft", "bitfit")
SCORES = ("rouge1", "rouge2", "rougeL", "bleu", "chrf", "exact_match")
RELOAD = """
import json, sys, torch
import left_trainer
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM
torch.set_num_threads(1)
logits = {}
for case in json.loads(sys.argv[1]):
    auto = AutoModelForSeq2SeqLM if case["family"] == "encoder_decoder" else AutoModelForCausalLM
    if case["adapter"]:
        options = {}
        if case["quantized"]:
            from left_trainer.methods.qlora import nf4
            options["quantization_config"] = nf4()
        base = auto.from_pretrained(case["base"], dtype=torch.float32, **options)
        base.config.use_cache = not case["loading"]
        model = PeftModel.from_pretrained(base, case["path"], **case["loading"])
        if case["quantized"]:
            from left_trainer.methods.qlora import keep_unpacked
            keep_unpacked(model)
    else:
        model = auto.from_pretrained(case["path"])
    inputs = {name: torch.tensor(value) for name, value in case["inputs"].items()}
    with torch.no_grad():
        logits[case["name"]] = model.eval()(**inputs).logits.contiguous()
save_file(logits, sys.argv[2])
"""


def make_trainer(method: str, family: str, output_dir: Path, saved: Path, **overrides: Any) -> LeftTrainer:
    options: dict[str, Any] = {
        "output_dir": str(output_dir),
        "peft_method": method,
        "max_steps": TOTAL_STEPS,
        "per_device_train_batch_size": 4,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 4,
        "report_to": "none",
        "disable_tqdm": True,
        "seed": 3,
        "lr_scheduler_type": "constant",
        **settings(method, family, saved),
        **overrides,
    }
    rows = Dataset.from_list(tiny_rows())
    return LeftTrainer(
        model_argument(method, saved, auto_class(family).from_pretrained),
        LeftTrainingArguments(**options),
        train_dataset=rows,
        eval_dataset=rows.select(range(8)),
        processing_class=tiny_tokenizer(family),
    )


def example(method: str, family: str) -> dict[str, list[list[int]]]:
    inputs = {"input_ids": [[5, 6, 7, 8, 9]], "attention_mask": [[1, 1, 1, 1, 1]]}
    if family == "decoder_only":
        return inputs
    # PEFT makes the decoder's input of multitask prompt tuning from labels only; elsewhere they are not needed.
    target = {"labels": [[11, 12, 1]]} if method == "multitask_prompt_tuning" else {"decoder_input_ids": [[0, 11, 12]]}
    return inputs | target


def logits_of(trainer: LeftTrainer) -> torch.Tensor:
    inputs = {name: torch.tensor(value) for name, value in example(trainer.args.peft_method, trainer.family).items()}
    with torch.no_grad():
        return trainer.model.eval()(**inputs, **task_inputs(trainer.model, 1)).logits


class SnapshotCallback(TrainerCallback):
    """Keeps the parameters as they are before the first step."""

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.parameters = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


class Runs:
    """Every case trained once, when it is first asked for: trainer, parameters before, logits after."""

    def __init__(self, folder: Path, bases: Any) -> None:
        self.folder, self.bases, self.runs = folder, bases, {}

    def __getitem__(self, case: tuple[str, str]) -> tuple[LeftTrainer, dict[str, torch.Tensor], torch.Tensor]:
        if case not in self.runs:
            method, family = case
            scored = {"predict_with_generate": True, "generation_max_length": 6, "generation_num_beams": 2}
            folder = self.folder / f"{method}-{family}"
            trainer = make_trainer(method, family, folder, self.bases[method, family], **scored)
            snapshot = SnapshotCallback()
            trainer.add_callback(snapshot)
            trainer.train()
            trainer.save_model()
            self.runs[case] = (trainer, snapshot.parameters, logits_of(trainer))
            gc.freeze()  # kept to the end, so not to be looked at by every collection
        return self.runs[case]


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return BaseModels(tmp_path_factory.mktemp("bases"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, bases):
    return Runs(tmp_path_factory.mktemp("runs"), bases)


def test_every_method_has_settings():
    assert {method.name for method in list_methods()} == set(SETTINGS)


@pytest.mark.parametrize(("method", "family"), CASES)
def test_exactly_the_methods_parameters_move(method, family, trained):
    trainer, before, _ = trained[method, family]
    for name, parameter in trainer.model.named_parameters():
        moved = not torch.equal(parameter, before[name])
        assert moved == parameter.requires_grad or re.search(STANDING_STILL.get(method, "^$"), name), name
        if parameter.requires_grad:
            assert parameter.dtype == torch.float32


@pytest.mark.parametrize(("method", "family"), CASES)
def test_loss_falls(method, family, trained, tmp_path, bases):
    trainer = make_trainer(method, family, tmp_path, bases[method, family], max_steps=30, save_strategy="no")
    first = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < first - 0.02


def test_adapters_reload_in_a_fresh_process(trained, tmp_path, bases):
    runs = {case: trained[case] for case in CASES}
    cases = [
        {
            "name": f"{method}-{family}",
            "family": family,
            "adapter": is_adapter(method),
            "quantized": get_method(method).quantization is not None,
            "loading": {"adapters": trainer.model.active_peft_config.adapters} if method == "xlora" else {},
            "base": str(bases[method, family]),
            "path": trainer.args.output_dir,
            "inputs": {
                **example(method, family),
                **{name: ids.tolist() for name, ids in task_inputs(trainer.model, 1).items()},
            },
        }
        for (method, family), (trainer, _, _) in runs.items()
    ]
    output = tmp_path / "logits.safetensors"
    command = [sys.executable, "-c", RELOAD, json.dumps(cases), str(output)]
    result = subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT)
    assert result.returncode == 0, result.stderr[-3000:]
    reloaded = load_file(output)
    differences = {
        case: (reloaded["-".join(case)] - expected).abs().max().item() for case, (_, _, expected) in runs.items()
    }
    assert {case: size for case, size in differences.items() if size > 2e-5} == {}


@pytest.mark.parametrize(("method", "family"), CASES)
def test_resumed_run_equals_uninterrupted_run(method, family, trained, tmp_path, bases):
    """A run that ends after step 5 leaves the checkpoint of step 4, as the one that goes on has written it."""
    expected, _, logits = trained[method, family]
    shutil.copytree(Path(expected.args.output_dir) / "checkpoint-4", tmp_path / "checkpoint-4")
    resumed = make_trainer(method, family, tmp_path, bases[method, family])
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == TOTAL_STEPS
    assert losses(resumed) == pytest.approx(losses(expected), rel=1e-6)
    # MKL rounds by where in memory a matrix lies, unless MKL_CBWR=AVX2,STRICT is set.
    torch.testing.assert_close(logits_of(resumed), logits, rtol=0, atol=5e-6)


@pytest.mark.parametrize(("method", "family"), CASES)
def test_best_model_is_the_one_that_was_measured(method, family, tmp_path, bases):
    trainer = make_trainer(
        method,
        family,
        tmp_path,
        bases[method, family],
        eval_strategy="steps",
        eval_steps=2,
        save_steps=2,
        load_best_model_at_end=True,
        # The reward for the highest loss makes an early step the best one, so that restoring is not a no-op.
        greater_is_better=True,
        metric_for_best_model="eval_loss",
        train_sampling_strategy="random",  # two methods' losses at these rates depend on which batch comes last
    )
    trainer.train()
    assert trainer.state.best_global_step < TOTAL_STEPS
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, abs=1e-6)


@pytest.mark.parametrize(("method", "family"), CASES)
def test_generation_during_evaluation(method, family, tmp_path, bases):
    trainer = make_trainer(
        method, family, tmp_path, bases[method, family], predict_with_generate=True, generation_max_length=5
    )
    greedy, beam = trainer.evaluate(), trainer.evaluate(num_beams=2)
    for scores in (greedy, beam):
        assert {"eval_rouge1", "eval_rouge2", "eval_rougeL", "eval_bleu", "eval_chrf", "eval_exact_match"} <= set(
            scores
        )
        assert scores["eval_generated_length"] <= 6
    assert greedy["eval_loss"] == beam["eval_loss"]


@pytest.mark.parametrize(("method", "family"), CASES)
def test_a_generator_writes_what_was_scored(method, family, trained):
    """With the beams and the limit that the run has stored, in a batch of prompts of uneven lengths."""
    trainer, _, _ = trained[method, family]
    rows = tiny_rows(5)
    scored = decode(trainer.processing_class, trainer.predict(Dataset.from_list(rows)).predictions)
    generator = Generator(trainer.args.output_dir)
    assert (generator.generation_config.num_beams, generator.generation_config.max_new_tokens) == (2, 6)
    assert generator([row["prompt"] for row in rows]) == scored


@pytest.mark.parametrize(("method", "family"), CASES)
def test_a_merged_model_computes_the_same_or_is_refused(method, family, trained, tmp_path):
    trainer, _, expected = trained[method, family]
    path, merged = trainer.args.output_dir, tmp_path / "merged"
    if not get_method(method).mergeable or method in MERGED_INTO_BIASES:
        reason = "bias" if method in MERGED_INTO_BIASES else "no adapter" if method == "full" else "cannot be merged"
        with pytest.raises(ValueError, match=reason):
            merge_adapter(path, merged)
        assert not list(tmp_path.iterdir())
        return
    merge_adapter(path, merged)
    model = auto_class(family).from_pretrained(merged)
    inputs = {name: torch.tensor(value) for name, value in example(method, family).items()}
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(**inputs).logits, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("method", "family"), CASES)
def test_gradient_checkpointing_trains_the_same_or_is_refused(method, family, trained, tmp_path, bases):
    if not get_method(method).supports("gradient_checkpointing"):
        with pytest.raises(ValueError, match="gradient_checkpointing=True does not work with"):
            make_trainer(method, family, tmp_path, bases[method, family], gradient_checkpointing=True)
        return
    options = {"gradient_checkpointing": True, "save_strategy": "no"}
    trainer = make_trainer(method, family, tmp_path, bases[method, family], **options)
    trainer.add_callback(StopAt(2))
    trainer.train()
    expected, _, _ = trained[method, family]
    # Recomputed attention may differ in the last bit, which some methods blow up in later steps.
    assert losses(trainer)[:2] == pytest.approx(losses(expected)[:2], rel=1e-4)
    assert gradient_norms(trainer)[0] == pytest.approx(gradient_norms(expected)[0], rel=1e-4)


@pytest.mark.parametrize(("method", "family"), CASES)
def test_accumulation_gives_the_same_gradient_norm(method, family, tmp_path, bases):
    if method in RANDOM_FORWARD:
        pytest.skip(RANDOM_FORWARD[method])
    norms = [
        gradient_norms(one_step(method, family, tmp_path / str(steps), bases[method, family], 8 // steps, steps))[0]
        for steps in (1, 4, 8)
    ]
    assert norms[1:] == pytest.approx([norms[0]] * 2, rel=ROUTED.get(method, 1e-4))


def one_step(method: str, family: str, output_dir: Path, saved: Path, batch_size: int, steps: int) -> LeftTrainer:
    trainer = make_trainer(
        method,
        family,
        output_dir,
        saved,
        max_steps=2,
        save_strategy="no",
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=steps,
    )
    if "calibration_batches" in get_method(method).hook_options:
        trainer.hooks.is_new = False  # what it would start from depends on how the data are cut into batches
    trainer.add_callback(StopAt(1))  # of two, which a schedule of ranks needs
    trainer.train()
    return trainer


@pytest.mark.parametrize("feature", ["encoder_decoder", "decoder_only", "gradient_checkpointing", "packing"])
@pytest.mark.parametrize("method", [method.name for method in list_methods()])
def test_what_a_method_does_not_work_with_is_refused_before_weights_load(method, feature, tmp_path, bases, no_weights):
    record = get_method(method)
    if record.supports(feature):
        pytest.skip("supported")
    family = feature if feature in FAMILIES else record.model_families[-1]
    options = {feature: True} if feature not in FAMILIES else {}
    with pytest.raises(ValueError, match=re.escape(record.unsupported[feature])):
        LeftTrainer(
            str(bases[method, family]),
            LeftTrainingArguments(
                output_dir=str(tmp_path),
                peft_method=method,
                **options,
                **settings(method, family, bases[method, family]),
            ),
            train_dataset=Dataset.from_list(tiny_rows()),
        )


class StopAt(TrainerCallback):
    """Ends the training after a step of those that its schedules are made for."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step
