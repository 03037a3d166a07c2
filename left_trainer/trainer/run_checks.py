"""What of the arguments cannot be run here: what is not installed, not there, or too much for the model's shape."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from accelerate.utils import DynamoBackend
from transformers import GenerationConfig, PreTrainedConfig, Trainer
from transformers.utils import GENERATION_CONFIG_NAME, is_liger_kernel_available

from left_trainer.argument_checks import check_trackers_installed
from left_trainer.evaluation.scores import BOOKKEEPING, NOT_QUALITY
from left_trainer.evaluation.text_metrics import known_scores
from left_trainer.methods.option_ranges import check_config
from left_trainer.models import ModelSource
from left_trainer.models.folder_files import check_has_weights, reading
from left_trainer.models.positions import position_limits
from left_trainer.ranges import COUNT, shown_value
from left_trainer.registry import did_you_mean
from left_trainer.training_args import LeftTrainingArguments

FP16_OVERFLOW_TYPES = ("t5", "mt5", "umt5", "longt5", "switch_transformers")


def check_run_arguments(args: LeftTrainingArguments, source: ModelSource, needs_weights: bool = True) -> None:
    """Run the checks that need the arguments and the config of the model alone.

    Args:
        args: Of the run.
        source: Its model.
        needs_weights: Whether a folder has to hold weights; for a plan, a config is enough.

    Raises:
        ValueError: A package is missing, a checkpoint or a file is not there, or a limit of the model is passed.
    """
    if needs_weights and not source.is_loaded:
        check_has_weights(source.base_name)
    check_trackers_installed(args.report_to)
    check_packages_of(args)
    check_optimizer_class(args)
    check_resume(args)
    if source.adapter is not None and isinstance(source.model, str):
        check_config(source.adapter, source.model)
    check_generation(args.generation_num_beams, args.generation_max_length, source.config)
    if isinstance(args.generation_config, (str, Path)):
        check_generation_config(str(args.generation_config))


def check_precision(args: LeftTrainingArguments, config: PreTrainedConfig) -> None:
    """Refuse fp16 for models whose activations overflow it."""
    if (args.fp16 or args.mixed_precision == "fp16") and config.model_type in FP16_OVERFLOW_TYPES:
        raise ValueError(
            f"fp16=True overflows in {config.model_type.upper()} models, which were trained in bfloat16: the loss "
            "becomes NaN or learning stops. Use bf16=True."
        )


def check_packages_of(args: LeftTrainingArguments) -> None:
    """Refuse what needs a package that is not installed, and a compiler that does not exist."""
    if args.use_liger_kernel and not is_liger_kernel_available():
        raise ValueError(
            "use_liger_kernel=True needs the package liger-kernel, which is not installed. Install it (pip install "
            "liger-kernel), or remove the argument: use_linear_cross_entropy=True, the default, saves the same memory."
        )
    backends = [backend.value.lower() for backend in DynamoBackend]
    given = args.torch_compile_backend
    if given is not None and given.lower() not in backends:
        raise ValueError(
            f"torch_compile_backend={given!r} is not known.{did_you_mean(given, backends)} Expected one of "
            f"{', '.join(backends)}."
        )


def check_optimizer_class(args: LeftTrainingArguments) -> None:
    """Refuse an optimizer whose package is not installed, and options that it does not read."""
    name = getattr(args.optim, "value", args.optim)
    try:
        Trainer.get_optimizer_cls_and_kwargs(args.replaced(learning_rate=args.learning_rate or 0.0))
    except ImportError as error:
        raise ValueError(f"optim={name!r} needs a package that is not installed: {error}") from error
    except (ValueError, TypeError, KeyError) as error:
        if "pass a model" in str(error):  # the rest is right, and the model comes later
            return
        options = f" with optim_args={args.optim_args!r}" if args.optim_args else ""
        raise ValueError(
            f"optim={name!r}{options} cannot be used: {error}. Write optim_args as name=value pairs, "
            "'momentum=0.9', or use another optimizer, such as optim='adamw_torch'."
        ) from error


def check_resume(args: LeftTrainingArguments) -> None:
    """Refuse a `resume_from_checkpoint` that names no folder; `true` stands for the last checkpoint."""
    given = args.resume_from_checkpoint
    if not isinstance(given, (str, Path)) or str(given).lower() == "true":
        return
    advice = "Pass the folder of a checkpoint, true for the last one in output_dir, or leave it out to start anew."
    if str(given).lower() in ("", "false", "none"):
        raise ValueError(f"resume_from_checkpoint={str(given)!r} names no checkpoint. {advice}")
    if not Path(given).is_dir():
        what = "is a file" if Path(given).exists() else "does not exist"
        raise FileNotFoundError(f"resume_from_checkpoint={str(given)!r} {what}. {advice}")


def check_generation(num_beams: int | None, max_new_tokens: int | None, config: PreTrainedConfig) -> None:
    """Refuse more beams than the vocabulary has tokens, and longer answers than the decoder has positions."""
    text = config.get_text_config(decoder=True)
    size = getattr(text, "vocab_size", None)
    if num_beams and size and num_beams >= size:
        raise ValueError(
            f"generation_num_beams={num_beams} (num_beams) must be below the {size} tokens of the model's vocabulary. "
            "Common values are 1 to 8."
        )
    limit = position_limits(config).target
    if max_new_tokens and limit and max_new_tokens >= limit:
        raise ValueError(
            f"generation_max_length={max_new_tokens} (max_new_tokens) must be below the {limit} positions of the "
            "model. Lower it."
        )


def check_generation_config(path: str) -> None:
    """Refuse a generation config that cannot be read, or whose numbers contradict each other."""
    if not Path(path).exists():
        raise FileNotFoundError(
            f"generation_config={path!r} does not exist. Pass a folder with {GENERATION_CONFIG_NAME}, or the file."
        )
    folder, name = (path, GENERATION_CONFIG_NAME) if Path(path).is_dir() else (str(Path(path).parent), Path(path).name)
    with reading("generation_config", path):
        config = GenerationConfig.from_pretrained(folder, name)
        config.validate(strict=True)
        for name in ("num_beams", "max_new_tokens", "max_length"):
            value = getattr(config, name)
            if value is not None and not (isinstance(value, int) and value in COUNT):
                raise ValueError(f"{name}={value!r} must be an integer, {COUNT}.")


def check_writable(directory: Path, argument: str = "output_dir") -> None:
    """Raise `PermissionError` where nothing can be written into a directory, which need not exist yet."""
    existing = directory
    while not existing.exists():
        existing = existing.parent
    try:
        with tempfile.TemporaryDirectory(dir=existing):
            pass
    except OSError as error:
        raise PermissionError(
            f"{argument}={str(directory)!r} cannot be written to ({str(existing)!r}: {error.strerror}). Choose "
            f"another {argument}."
        ) from error


def check_best_metric(
    args: LeftTrainingArguments, compute_metrics: Callable[..., Mapping[str, float]] | None, eval_dataset: Any
) -> None:
    """Refuse a `metric_for_best_model` that no evaluation of the run computes, where its scores are known."""
    asked = args.metric_for_best_model
    names = known_scores(compute_metrics, args.predict_with_generate)
    if asked is None or names is None or isinstance(eval_dataset, dict):
        return
    known = [*names, *NOT_QUALITY, *BOOKKEEPING, "aux_loss"]
    if asked.removeprefix("eval_") not in known:
        raise ValueError(
            f"metric_for_best_model={shown_value(asked)} is not computed by this run.{did_you_mean(asked, known)} Its "
            f"scores are {', '.join((*names, 'loss'))}."
        )
