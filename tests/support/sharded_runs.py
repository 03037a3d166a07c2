"""Runs under FSDP2 in two processes, or of one process, with what they end with; started by test_sharded.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from safetensors.torch import load_file
from transformers.trainer_utils import PredictionOutput

from fsdp_on_cpu import allow_fsdp_on_cpu
from left_trainer import AdapterSaverCallback, LeftTrainer, LeftTrainingArguments, get_method
from left_trainer.models import model_family
from log_history import gradient_norms, losses
from method_settings import CASES, settings
from tiny import FAMILY_TYPES, tiny_model, tiny_rows, tiny_tokenizer

STEP = 4  # rows of all processes
WRAPPED = {"auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}
TEACHER = {"teacher_model": "base", "distillation_kwargs": {"alpha": 0.5}}
AT_START = {"shrink_kwargs": {"schedule": "at_start"}}
SCORED = {"is_scored": True}  # before the training, without the adapter and with it
ONCE = {"fsdp": {"cpu_ram_efficient_loading": True}}
# What is tried whenever tests run: a kind of method, of model, or of sharding each.
RUNS: dict[str, dict[str, Any]] = {
    "full, t5": {},
    "full, tables that two modules share": {"model": "own_table_marian"},
    "full, sharded checkpoints": {"fsdp": {"state_dict_type": "SHARDED_STATE_DICT"}},
    "osf, llama": {"model": "llama", "peft_method": "osf"},
    "p_tuning, llama": {"model": "llama", "peft_method": "p_tuning"},
    "pissa, taught by its base": {"model": "llama", "peft_method": "pissa", **TEACHER},
    "full, as one unit": {"model": "llama", "is_short": True, "fsdp": {"auto_wrap_policy": "NO_WRAP"}},
    "lora, compiled": {"peft_method": "lora", "is_short": True, "torch_compile_backend": "eager"},
    "full, made smaller": {"model": "llama", "shrink_to": "layers=1", **AT_START},
    "full, scored before": {"model": "bart", **SCORED},
    "lora, scored before": {"peft_method": "lora", **SCORED},
    "lora, scored and loaded once": {"model": "llama", "peft_method": "lora", "is_short": True, **SCORED, **ONCE},
    "pissa, scored and loaded once": {"model": "llama", "peft_method": "pissa", "is_short": True, **SCORED, **ONCE},
    "full, scored and made smaller": {"shrink_to": "decoder_layers=1", "is_short": True, **AT_START, **SCORED},
}
MORE_RUNS: dict[str, dict[str, Any]] = {
    "full, bart": {"model": "bart"},
    "lora, loaded once": {"peft_method": "lora", **ONCE},
    "pissa, llama": {"model": "llama", "peft_method": "pissa"},
    "full, gpt2": {"model": "gpt2"},
    "full, untied head": {"model": "mt5"},
    "full, checkpointed": {"model": "llama", "fsdp": {"activation_checkpointing": True}},
    "full, compiled": {"model": "bart", "torch_compile_backend": "eager"},
    "full, accumulated": {"gradient_accumulation_steps": 2},
    "adalora, t5": {"peft_method": "adalora"},
    "trainable_tokens, t5": {"peft_method": "trainable_tokens"},
    "full, taught by itself": {"teacher_model": "self"},
    "pissa, scored and taught by its base": {"model": "llama", "peft_method": "pissa", **TEACHER, **SCORED},
    **{
        f"{method}, {model}, scored before": {"model": model, "peft_method": method, **SCORED}
        for method in ("full", "lora", "p_tuning")
        for model in ("t5", "bart", "llama", "gpt2")
    },
    "lora, made smaller": {"peft_method": "lora", "shrink_to": "encoder_layers=1,decoder_layers=1", **AT_START},
}
METHODS = {
    f"{method}, {family}": {"model": FAMILY_TYPES[family], "peft_method": method, "is_short": True}
    for method, family in CASES
    if get_method(method).supports("sharded")
}
METHODS |= {f"{name}, scored before": {**given, **SCORED} for name, given in METHODS.items()}


def run(folder: Path, processes: int, given: dict[str, Any]) -> dict[str, Any]:
    """Train with checkpoints, restore the best one, write texts, save, and go on from the first checkpoint."""
    options = {"model": "t5", "peft_method": "full", "is_short": False, "is_scored": False, **given}
    model_type, is_short, fsdp = options.pop("model"), options.pop("is_short"), options.pop("fsdp", {})
    is_scored = options.pop("is_scored")
    model = tiny_model(model_type)
    family, accumulation = model_family(model), options.get("gradient_accumulation_steps", 1)
    with PartialState().main_process_first():
        own = settings(options["peft_method"], family, folder.parent)
    if processes > 1:
        options |= {"fsdp": True, "fsdp_config": {**WRAPPED, **fsdp}}
    saving = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "predict_with_generate": True}
    args = LeftTrainingArguments(
        **{
            "output_dir": str(folder),
            "per_device_train_batch_size": STEP // processes // accumulation,
            "per_device_eval_batch_size": 2,
            "max_steps": 2,
            "logging_steps": 1,
            "save_strategy": "steps",
            "save_steps": 1,
            "metric_for_best_model": "loss",
            "generation_max_length": 4,
            "train_sampling_strategy": "sequential",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "seed": 5,
            **({"save_strategy": "no", "predict_with_generate": is_scored} if is_short else saving),
            **own,
            **options,
        }
    )
    has_adapter = get_method(args.peft_method).config_class is not None

    def made() -> LeftTrainer:
        return LeftTrainer(
            tiny_model(model_type),
            args,
            train_dataset=Dataset.from_list(tiny_rows()),
            eval_dataset=None if is_short else Dataset.from_list(tiny_rows(5, seed=3)),
            processing_class=tiny_tokenizer(family),
            callbacks=[AdapterSaverCallback()] if has_adapter and not is_short else (),
        )

    trainer = made()
    found = scores(trainer) if is_scored else {}
    trainer.train()
    found |= {"losses": losses(trainer), "gradient_norms": gradient_norms(trainer)}
    found["fell back"] = dict(trainer.fast_paths["linear_cross_entropy"].fell_back)
    trainer.save_model()
    if is_short:
        return found
    logged = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    predicted = trainer.predict(Dataset.from_list(tiny_rows(5)))
    found |= {"evaluations": logged, "best": trainer.state.best_global_step, "loss": predicted.metrics["test_loss"]}
    found["texts"] = own_tokens(predicted)
    resumed = made()
    if is_scored:
        scores(resumed)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-1"))
    return {**found, "resumed": losses(resumed), "resumed_norms": gradient_norms(resumed)}


def scores(trainer: LeftTrainer) -> dict[str, Any]:
    """What a trainer says of its model before the training: of its base, and with the adapter."""
    rows = Dataset.from_list(tiny_rows(5))
    with trainer.without_adapter():
        base = trainer.predict(rows)
    adapted = trainer.predict(rows)
    texts = {"texts of base": own_tokens(base), "texts before": own_tokens(adapted)}
    return {"loss of base": base.metrics["test_loss"], "loss before": adapted.metrics["test_loss"], **texts}


def own_tokens(predicted: PredictionOutput) -> list[list[int]]:
    """Texts that were generated, without what fills them up."""
    return [[token for token in row if token > 0] for row in predicted.predictions.tolist()]


def saved_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All weights in `folder` and in what the callback has saved last, by file and name."""
    return {
        f"{file.relative_to(folder)}: {name}": tensor
        for file in sorted([*folder.glob("*.safetensors"), *folder.glob("adapters/best/*.safetensors")])
        for name, tensor in load_file(file).items()
    }


def main(folder: str, names: str) -> None:
    """Make the runs that are named, and write what they end with."""
    allow_fsdp_on_cpu()
    torch.set_num_threads(1)
    PartialState(cpu=True)
    found, runs = {}, {**RUNS, **MORE_RUNS, **METHODS}
    for name in json.loads(names):
        found[name] = run(Path(folder) / name, PartialState().num_processes, runs[name])
        if PartialState().is_main_process:
            (Path(folder) / "results.json").write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
