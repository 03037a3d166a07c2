"""Several adapters of one base model combined into one, by PEFT's own functions."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel
from transformers import set_seed

from left_trainer.adapters.run_settings import RunSettings
from left_trainer.adapters.text_files import write_whole
from left_trainer.data.arguments import DataArguments
from left_trainer.evaluation.generation import write_generation_config
from left_trainer.methods.fit import saved_weights
from left_trainer.methods.plain_lora import lora_kind, other_weights
from left_trainer.methods.saving import adapter_method, complete_adapter_directory, load_trained, saving_active_adapter
from left_trainer.models import ModelSource, load_model, load_tokenizer, without_upstream_warnings
from left_trainer.runs.evaluation import Evaluation, evaluate_saved
from left_trainer.runs.inference import prepare_for_use, source_for_use, stored_generation_config
from left_trainer.runs.json_records import to_json
from left_trainer.runs.merging import check_logits, probe
from left_trainer.runs.report import REPORT_FILE, Scores, TrainingReport
from left_trainer.storage.locks import beside_lock, folder_lock
from left_trainer.storage.whole import whole_directory

COMBINATION_FILE = "combination.json"
NAME = "combination"
# Whether PEFT leaves out a share of the numbers first, which `density` sets.
COMBINATIONS = {"linear": False, "cat": False, "ties": True, "dare_ties": True}
DENSITY = 0.5
NO_LORA = (
    "{path!r} is no plain LoRA{what}, and no other adapters can be combined. left-trainer export --to lora turns many "
    "methods into one."
)
SEED = 0  # dare_ties drops numbers at random


@dataclass(frozen=True)
class Combination:
    """What is asked for.

    Args:
        adapters: Folders of runs on one base model.
        combine: `linear`, `cat`, `ties` (Yadav et al., 2023, arXiv 2306.01708) or `dare_ties` (Yu et al., 2023, arXiv
            2311.03099).
        weights: One of each adapter; by default equal ones that add up to 1.
        density: Share of the numbers that `ties` and `dare_ties` keep.
        data: With `test_file`, to score each adapter and the combination.
        task: Whose metrics; by default that of the first run.
        trust_remote_code: Whether code that comes with the base model may run.
        dtype: Of the base model's weights.
    """

    adapters: tuple[str, ...]
    combine: str
    weights: tuple[float, ...] | None = None
    density: float | None = None
    data: DataArguments | None = None
    task: str | None = None
    trust_remote_code: bool = False
    dtype: str | None = None

    def __post_init__(self) -> None:
        if len(self.adapters) < 2:
            raise ValueError(f"--adapters {' '.join(self.adapters)} is one adapter. Pass at least two to combine.")
        if self.combine not in COMBINATIONS:
            raise ValueError(f"--combine {self.combine!r} is not known. Allowed: {', '.join(COMBINATIONS)}.")
        if self.weights is not None and len(self.weights) != len(self.adapters):
            raise ValueError(
                f"--weights has {len(self.weights)} numbers for {len(self.adapters)} adapters. Pass one for each."
            )
        if self.density is not None and not COMBINATIONS[self.combine]:
            raise ValueError(f"--density has no effect on --combine {self.combine}. Remove it.")
        if self.density is not None and not 0 < self.density <= 1:
            raise ValueError(f"--density {self.density} must be a share above 0 and at most 1.")

    @property
    def used_weights(self) -> tuple[float, ...]:
        return self.weights or (1 / len(self.adapters),) * len(self.adapters)


def combine_adapters(asked: Combination, output_dir: str | Path) -> Mapping[str, Scores]:
    """Combine adapters into one, saved whole or not at all with tokenizer and settings of the first.

    Returns:
        Scores by folder, of each adapter and of the combination; empty without test rows.

    Raises:
        ValueError: The adapters are not all LoRA on one base, or PEFT cannot combine them this way.
        WriteFailedError: The disk is full, read-only or gone.
    """
    sources = [source_for_use(path, asked.trust_remote_code, asked.dtype) for path in asked.adapters]
    _check_one_base(asked.adapters, sources)
    model = _loaded(asked.adapters, sources)
    names = list(model.peft_config)
    set_seed(SEED)
    options: dict[str, Any] = {"density": asked.density or DENSITY} if COMBINATIONS[asked.combine] else {}
    try:
        with without_upstream_warnings():
            model.add_weighted_adapter(names, list(asked.used_weights), NAME, combination_type=asked.combine, **options)
    except ValueError as error:
        raise ValueError(
            f"{' and '.join(asked.adapters)} cannot be combined with --combine {asked.combine}: {error} Adapters of "
            "different ranks can with --combine cat."
        ) from error
    model.set_adapter(NAME)
    prepare_for_use(model, sources[0])
    _save(model, sources[0], asked, Path(output_dir))
    return _scores(asked, str(output_dir)) if asked.data else {}


def _check_one_base(paths: Sequence[str], sources: Sequence[ModelSource]) -> None:
    for path, source in zip(paths, sources, strict=True):
        if source.adapter is None:
            raise ValueError(f"{path!r} holds no adapter (no adapter_config.json), so it cannot be combined.")
        method = adapter_method(source)
        if method is None or method.config_class is not LoraConfig:
            raise ValueError(NO_LORA.format(path=path, what=""))
        if source.has_base_beside:
            raise ValueError(
                f"{path!r} has a base model of its own, which was shrunk or has another vocabulary, and no other "
                "adapter fits it. Merge each into a model of its own."
            )
        if source.base_name != sources[0].base_name or source.base_options != sources[0].base_options:
            raise ValueError(
                f"{path!r} is an adapter of {source.base_name!r}, and {paths[0]!r} one of {sources[0].base_name!r}. "
                "Combine adapters of one base model."
            )


def _loaded(paths: Sequence[str], sources: Sequence[ModelSource]) -> PeftModel:
    """The base with all adapters. Raises `ValueError` where one is no plain LoRA."""
    model = load_trained(sources[0], is_trainable=False)
    for number, path in enumerate(paths):
        if number:
            with without_upstream_warnings():
                model.load_adapter(path, f"adapter_{number}")
            model.set_adapter(f"adapter_{number}")
        others = other_weights(saved_weights(path), model)
        if lora_kind(model) != "exact" or others:
            raise ValueError(NO_LORA.format(path=path, what=f" ({others[0]} is trained too)" if others else ""))
    return model


def _save(model: PeftModel, source: ModelSource, asked: Combination, output: Path) -> None:
    expected, path = probe(model, source.family), " + ".join(asked.adapters)
    dtype = model.get_base_model().dtype
    generation = stored_generation_config(str(source.model), model)
    with folder_lock(output, lock_file=beside_lock(output)), whole_directory(output) as folder:
        with saving_active_adapter(model, folder):
            model.save_pretrained(folder, safe_serialization=True)
        complete_adapter_directory(model, folder, output)
        load_tokenizer(source).save_pretrained(folder)
        write_generation_config(generation, folder)
        (source.settings or RunSettings()).write(folder)
        write_whole(folder / COMBINATION_FILE, json.dumps(to_json(_description(asked)), indent=2) + "\n")
        reloaded = PeftModel.from_pretrained(load_model(source), str(folder))
        check_logits(probe(reloaded, source.family), expected, dtype, path, "saving the combination changes")


def _description(asked: Combination) -> dict[str, Any]:
    weights = dict(zip(asked.adapters, asked.used_weights, strict=True))
    return {"combine": asked.combine, "weights": weights, "density": asked.density if asked.density else None}


def _scores(asked: Combination, output: str) -> dict[str, Scores]:
    """Each model on the same rows and prompts, those of the first run."""
    first = asked.adapters[0]
    report = TrainingReport.read(first) if (Path(first) / REPORT_FILE).is_file() else None
    task, data = asked.task or (report.task if report else None), asked.data or DataArguments()
    if data.prompt is None and report is not None and report.task == task:
        data = DataArguments(**{**data.given, "prompt": report.prompt})
    return {
        path: evaluate_saved(
            Evaluation(path=path, data=data, task=task, trust_remote_code=asked.trust_remote_code, dtype=asked.dtype)
        ).metrics
        for path in (*asked.adapters, output)
    }
