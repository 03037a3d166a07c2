"""The model card of a fine-tuned model, the same for both model families."""

from __future__ import annotations

import importlib.metadata
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]
from transformers import TrainerState

from left_trainer.adapters.base_model import is_changed
from left_trainer.adapters.run_settings import BASE_FOLDER
from left_trainer.evaluation.scores import is_score, without_prefix
from left_trainer.methods import PeftMethod
from left_trainer.models import ModelFamily, unwrapped
from left_trainer.secret_values import masked
from left_trainer.shown_text import code, code_block, markdown, one_line, table_lines
from left_trainer.storage.errors import write_errors
from left_trainer.storage.whole import whole_file
from left_trainer.training_args import LeftTrainingArguments

BASE_BESIDE = (
    f"The adapter fits the smaller model in `{BASE_FOLDER}` and no other one. The tokenizer beside the adapter is that "
    "of both."
)
PACKAGES = ("left_trainer", "torch", "transformers", "peft", "trl", "datasets", "accelerate", "evaluate")
PIPELINE_TAGS: dict[ModelFamily, str] = {
    "encoder_decoder": "text2text-generation",
    "decoder_only": "text-generation",
}
AUTO_CLASSES: dict[ModelFamily, str] = {
    "encoder_decoder": "AutoModelForSeq2SeqLM",
    "decoder_only": "AutoModelForCausalLM",
}


def package_versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that a run depends on; `None` for one that is not installed."""
    versions: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return versions


def build_model_card(
    *,
    model_name: str,
    base_model: str,
    family: ModelFamily,
    method: PeftMethod | None,
    args: LeftTrainingArguments,
    log_history: Sequence[Mapping[str, Any]],
    tags: str | list[str] | None = None,
    datasets: str | list[str] | None = None,
    data: str = "",
    language: str | list[str] | None = None,
    license: str | None = None,
    base_beside: bool = False,
    notes: str = "",
) -> ModelCard:
    """A card that says what the model is, how to load it, how it was trained and how it scored.

    Args:
        model_name: Title.
        base_model: Hub name or path; what is no hub name stays out of the metadata, where the hub expects one.
        family: Of the base model.
        method: What was trained; `None` for a PEFT config without a record.
        args: Of the training.
        log_history: Of the trainer; the last evaluation is shown.
        tags: Further tags.
        datasets: Names of data sets on the hub.
        data: The data, in words.
        language: For the metadata.
        license: For the metadata.
        base_beside: Whether the adapter fits a changed base model, which is saved beside it.
        notes: Further sections.
    """
    is_adapter = method is None or method.config_class is not None
    name = method.name if method else "PEFT"
    metadata = ModelCardData(
        base_model=base_model if _is_hub_name(base_model) else None,
        library_name="peft" if is_adapter else "transformers",
        pipeline_tag=PIPELINE_TAGS[family],
        tags=list(dict.fromkeys([*map(one_line, _as_list(tags)), "left_trainer", name])),
        datasets=[one_line(name) for name in _as_list(datasets)] or None,
        language=list(map(one_line, language)) if isinstance(language, list) else language and one_line(language),
        license=license and one_line(license),
    )
    described = f"{method.summary} ({method.paper})" if method else "an explicit PEFT config"
    sections = [
        f"---\n{metadata.to_yaml()}\n---",
        f"# {markdown(model_name)}",
        f"{code(base_model)}, fine-tuned with **{name}**: {described}.",
        "## Load it",
        code_block(_loading_code(base_model, family, method, base_beside), "python"),
        *([BASE_BESIDE] if base_beside and is_adapter else []),
        "## Training",
        _table(("argument", "value"), [(key, code(str(value))) for key, value in _hyperparameters(args).items()]),
    ]
    if data:
        sections.append(f"Data: {markdown(data)}.")
    evaluation = next((entry for entry in reversed(log_history) if "eval_loss" in entry), None)
    if evaluation:
        metrics = without_prefix(evaluation, "eval_")
        rows = [(markdown(name), f"{value:.4g}") for name, value in metrics.items() if is_score(name)]
        sections += [f"Last evaluation, at step {evaluation['step']}:", _table(("metric", "value"), rows)]
    versions = ", ".join(f"{package} {version}" for package, version in package_versions().items() if version)
    sections += [f"Versions: {versions}.", *([notes.strip()] if notes else [])]
    return ModelCard(masked("\n\n".join(sections) + "\n"))


@dataclass(frozen=True)
class CardNotes:
    """What every card of a run has beside what its trainer knows.

    Args:
        tags: For the metadata.
        text: Sections at the end.
    """

    tags: tuple[str, ...] = ()
    text: str = ""


class CardHost(Protocol):
    """What a model card takes from a trainer."""

    args: LeftTrainingArguments
    family: ModelFamily
    method: PeftMethod | None
    model: Any
    state: TrainerState
    card_notes: CardNotes

    @property
    def base_model_name(self) -> str: ...

    def is_world_process_zero(self) -> bool: ...


def create_model_card_as_transformers(
    self: CardHost,
    language: str | list[str] | None = None,
    license: str | None = None,
    tags: str | list[str] | None = None,
    model_name: str | None = None,
    finetuned_from: str | None = None,
    tasks: str | list[str] | None = None,
    dataset_tags: str | list[str] | None = None,
    dataset: str | list[str] | None = None,
    dataset_args: str | list[str] | None = None,
    *,
    dataset_name: str | list[str] | None = None,
) -> None:
    """Write `README.md`, the model card, into `output_dir`; `push_to_hub` calls this.

    Args:
        language: For the metadata.
        license: For the metadata.
        tags: Further tags.
        model_name: Title; by default the last part of `hub_model_id` or `output_dir`.
        finetuned_from: Name of the base model; by default the one it was loaded from.
        tasks: Tasks, which become tags.
        dataset_tags: Names of data sets on the hub, for the metadata.
        dataset: Names of data sets in the text; in the metadata too where `dataset_tags` names none.
        dataset_args: Configurations of these, for the text.
        dataset_name: As `dataset_tags`, by the name that TRL gives the argument.
    """
    if not self.is_world_process_zero():
        return
    folder = Path(self.args.output_dir)
    card = build_model_card(
        model_name=model_name or (self.args.hub_model_id or str(folder)).rstrip("/").rpartition("/")[2],
        base_model=finetuned_from or self.base_model_name,
        family=self.family,
        method=self.method,
        args=self.args,
        log_history=self.state.log_history,
        tags=[*_as_list(tags), *_as_list(tasks), *self.card_notes.tags],
        datasets=dataset_tags or dataset_name or dataset,
        data=" ".join([*_as_list(dataset), *_as_list(dataset_args)]),
        language=language,
        license=license,
        base_beside=is_changed(unwrapped(self.model)),
        notes=self.card_notes.text,
    )
    with write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with whole_file(folder / "README.md") as part:
        card.save(part)


def create_model_card_as_trl(
    self: CardHost,
    model_name: str | None = None,
    dataset_name: str | list[str] | None = None,
    tags: str | list[str] | None = None,
    **others: Any,
) -> None:
    """As `create_model_card_as_transformers`, with the arguments in the order of TRL."""
    create_model_card_as_transformers(self, model_name=model_name, dataset_name=dataset_name, tags=tags, **others)


def _as_list(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else list(value or ())


def _is_hub_name(name: str) -> bool:
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return not Path(name).exists()


def _loading_code(base_model: str, family: ModelFamily, method: PeftMethod | None, base_beside: bool) -> str:
    auto = AUTO_CLASSES[family]
    package = method.config_class.__module__.partition(".")[0] if method and method.config_class else "peft"
    # The package whose adapter type it is registers it with PEFT when it is imported.
    registers = "" if package == "peft" else f"import {package}\n"
    if method is not None and method.config_class is None:
        return f'from transformers import {auto}\n\nmodel = {auto}.from_pretrained("THIS_FOLDER")'
    base = f"THIS_FOLDER/{BASE_FOLDER}" if base_beside else base_model
    return (
        f"{registers}from peft import PeftModel\nfrom transformers import {auto}\n\n"
        f'model = PeftModel.from_pretrained({auto}.from_pretrained({json.dumps(base)}), "THIS_FOLDER")'
    )


def _hyperparameters(args: LeftTrainingArguments) -> dict[str, Any]:
    batch_size = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    duration = {"max_steps": args.max_steps} if args.max_steps > 0 else {"num_train_epochs": args.num_train_epochs}
    return {
        "peft_kwargs": args.peft_kwargs or {},
        "learning_rate": f"{args.learning_rate:g}",
        "rows in a step": batch_size,
        **duration,
        "lr_scheduler_type": args.lr_scheduler_type.value,
        "optim": args.optim.value,
        "mixed precision": args.mixed_precision,
        "seed": args.seed,
    }


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(table_lines(header, rows))
