"""What a saved model is saved with: how it was loaded, how prompts were cut, and how its text was generated."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

from peft import PeftModel

from left_trainer.adapters.base_model import is_changed
from left_trainer.adapters.run_settings import RunSettings, storable
from left_trainer.evaluation.generation import scored_generation_config, write_generation_config
from left_trainer.methods import PeftMethod
from left_trainer.methods.saving import (
    complete_adapter_directory,
    saving_active_adapter,
    trainable_bytes,
    whole_to_save,
)
from left_trainer.models import ModelSource, unwrapped, without_adapter
from left_trainer.storage.whole import HIDDEN, whole_files
from left_trainer.trainer.generation import EvaluationHost, GenerationInEvaluation
from left_trainer.training_args import LeftTrainingArguments

CARD_FILE = "README.md"


class SavingHost(EvaluationHost, Protocol):
    """What the settings of a run are taken from."""

    args: LeftTrainingArguments
    source: ModelSource
    method: PeftMethod | None
    _generation: GenerationInEvaluation | None


@contextlib.contextmanager
def saved_whole(trainer: SavingHost, directory: str) -> Iterator[str]:
    """A folder for the files of a model, which move into `directory` together with what says how to use it again.

    Where another process saves for this one, it is `directory` itself, into which nothing is written.
    """
    model, card = unwrapped(trainer.model), Path(directory) / CARD_FILE
    gathered = whole_to_save(model, trainer.args.should_save)
    if not trainer.args.should_save:
        with gathered, saving_active_adapter(model, directory):
            yield directory
        return
    size = trainable_bytes(model) if isinstance(model, PeftModel) else model.num_parameters() * model.dtype.itemsize
    with gathered, whole_files(directory, size) as folder:
        if card.is_file():  # PEFT adds to it
            shutil.copyfile(card, folder / CARD_FILE)
        with saving_active_adapter(model, folder):
            yield str(folder)
        complete_adapter_directory(model, folder, _place_of(directory))
        write_settings(trainer, folder)


def _place_of(directory: str) -> Path:
    """Where a folder will be: a checkpoint is written below a hidden one."""
    path = Path(directory)
    return path.parent.parent / path.name if HIDDEN.fullmatch(path.parent.name) else path


def write_settings(trainer: SavingHost, directory: str | Path) -> None:
    """Write `run_settings.json` and, where evaluations generate, `generation_config.json` beside a saved model.

    The latter holds what the last evaluation generated with, or what one would have.
    """
    settings_of(trainer).write(directory)
    if trainer.args.predict_with_generate:
        generation = trainer._generation or GenerationInEvaluation(trainer, {})
        base = without_adapter(unwrapped(trainer.model))
        write_generation_config(scored_generation_config(base.generation_config, generation.arguments), directory)


def settings_of(trainer: SavingHost) -> RunSettings:
    """How the run loaded its model and cuts its prompts."""
    args, model = trainer.args, unwrapped(trainer.model)
    base = without_adapter(model)
    return RunSettings(
        method=trainer.method.name if trainer.method else None,
        dtype=str(base.dtype).removeprefix("torch."),
        model_init_kwargs=_base_options(trainer.source, base) if isinstance(model, PeftModel) else {},
        max_length=args.max_length,
        truncation_mode=args.truncation_mode,
        per_device_eval_batch_size=args.per_device_eval_batch_size,
    )


def _base_options(source: ModelSource, base: Any) -> dict[str, Any]:
    if is_changed(base):  # and so saved, with its config
        return {}
    quantization = getattr(base.config, "quantization_config", None)
    if quantization is None:
        return dict(source.base_options)
    as_dict = quantization if isinstance(quantization, dict) else quantization.to_dict()
    return {**source.base_options, **storable({"quantization_config": as_dict})}
