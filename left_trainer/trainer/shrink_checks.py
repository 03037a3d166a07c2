"""What of a run that shrinks its model can be refused before any weight is loaded."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from left_trainer.compression.architecture import architecture_of
from left_trainer.compression.schedule import AT_START, check_steps
from left_trainer.compression.sizes import check_target
from left_trainer.compression_options import BASE_TEACHER, VOCABULARY
from left_trainer.evaluation.scores import is_lower_better
from left_trainer.evaluation.text_metrics import known_scores
from left_trainer.registry import did_you_mean
from left_trainer.trainer.sharding_checks import uses_deepspeed, uses_fsdp
from left_trainer.training_args import LeftTrainingArguments

if TYPE_CHECKING:
    from left_trainer.trainer.checks import Request

# Parts of the names of optimizers whose state has no entry for each weight: packed in blocks, or projected.
UNCUTTABLE_STATES = ("8bit", "4bit", "galore", "apollo")
ADVICE_AT_START = "Use shrink_kwargs={'schedule': 'at_start'}"


def loses_parts(args: LeftTrainingArguments) -> bool:
    """Whether blocks, neurons or heads are removed in the run."""
    return bool(set(args.target_size) - {VOCABULARY})


def check_shrinking(request: Request) -> None:
    """Refuse a model or a method that parts cannot be taken from, and what does not work while they go.

    Raises:
        ValueError: With what is missing, and the fix.
    """
    args, source, method = request.args, request.source, request.method
    if not loses_parts(args):
        return
    architecture_of(source.config)
    check_target(source.config, args.target_size)
    if request.is_quantized or (method is not None and method.quantization is not None):
        raise ValueError(
            f"shrink_to={args.shrink_to!r} does not work with a quantized base model: packed weights cannot be cut. "
            "Load it unquantized, with a method such as peft_method='lora'."
        )
    if method is not None and not method.supports("shrinking"):
        raise ValueError(
            f"shrink_to={args.shrink_to!r} does not work with peft_method={method.name!r}: "
            f"{method.unsupported['shrinking']} Choose another method; `left-trainer methods` lists them."
        )
    if request.teacher == BASE_TEACHER:
        raise ValueError(
            f"teacher_model='base' is the base with the adapter off, from which shrink_to={args.shrink_to!r} removes "
            "parts. Use teacher_model='self', a frozen copy of the model as it starts."
        )
    layer_map = args.distillation.layer_map
    if request.is_taught and args.distillation.hidden_weight and not isinstance(layer_map, str):
        raise ValueError(
            f"distillation_kwargs has layer_map={layer_map!r}, which names layers, and shrink_to={args.shrink_to!r} "
            "takes some of them away. Use layer_map='uniform' or 'last'."
        )
    _check_wrappers(args)
    _check_optimizer(args)
    if isinstance(args.shrinking.schedule, list) and args.max_steps > 0:
        check_steps(args.shrinking.schedule, args.max_steps)


def _check_wrappers(args: LeftTrainingArguments) -> None:
    """Refuse what records the shapes of a model, where they change later, and weights that no process has."""
    if is_deepspeed_zero3_enabled():
        raise ValueError(
            f"shrink_to={args.shrink_to!r} needs whole weights, and ZeRO stage 3 spreads them over the processes when "
            "they are loaded. Use stage 1 or 2 with " + ADVICE_AT_START.removeprefix("Use ") + "."
        )
    if args.shrinking.schedule == AT_START:
        return
    wrappers = {
        "fsdp": (uses_fsdp(args), "FSDP has sharded the weights by then"),
        "deepspeed": (uses_deepspeed(args), "DeepSpeed has put the weights into buffers of its own by then"),
        "torch_compile=True": (bool(args.torch_compile), "the compiled model is made for its shapes"),
    }
    for name, (is_set, reason) in wrappers.items():
        if is_set:
            raise ValueError(
                f"shrink_kwargs has schedule={args.shrinking.schedule!r}, which removes parts during the training, and "
                f"{name}: {reason}. {ADVICE_AT_START}."
            )


def _check_optimizer(args: LeftTrainingArguments) -> None:
    """Refuse an optimizer whose state cannot lose single neurons; of whole layers it is dropped."""
    optimizer = str(getattr(args.optim, "value", args.optim))
    cuts_widths = any(not name.endswith("layers") and name != VOCABULARY for name in args.target_size)
    if cuts_widths and args.shrinking.schedule != AT_START and any(part in optimizer for part in UNCUTTABLE_STATES):
        raise ValueError(
            f"shrink_to={args.shrink_to!r} removes neurons or heads during the training, and the state of "
            f"optim={optimizer!r} has no entries for single weights that could go with them. Use optim='adamw_torch'. "
            f"{ADVICE_AT_START} to keep this one."
        )


def check_shrinking_data(request: Request) -> None:
    """Refuse `keep` where its metric is not computed, and steps beyond the end of the training.

    Raises:
        ValueError: With the fix.
    """
    args, options = request.args, request.args.shrinking
    if not loses_parts(args):
        return
    if isinstance(options.schedule, list):
        most = _most_steps(args, request.train_dataset)
        if most is not None:
            check_steps(options.schedule, most)
    if options.kept_metric is None:
        return
    if request.eval_dataset is None:
        raise ValueError(
            f"shrink_kwargs has keep={options.keep!r}, which is measured on eval_dataset, and there is none. Pass it."
        )
    if isinstance(request.eval_dataset, dict):
        raise ValueError(
            f"shrink_kwargs has keep={options.keep!r}, which is measured on eval_dataset, and that is a dict of "
            "several. Pass one."
        )
    _check_metric(options.kept_metric, options.keep, args, request.compute_metrics)


def _check_metric(metric: str, keep: str | None, args: LeftTrainingArguments, compute_metrics: Any) -> None:
    if metric == "loss" or is_lower_better(metric):
        raise ValueError(
            f"shrink_kwargs has keep={keep!r}, and less of {metric} is better. Name a metric of which more is better, "
            "such as 'rougeL>=0.95'."
        )
    known = known_scores(compute_metrics, args.predict_with_generate)
    if known is not None and metric not in known:
        shown = f"Its scores are {', '.join(known)}." if known else "It computes none: set predict_with_generate=True."
        raise ValueError(
            f"shrink_kwargs has keep={keep!r}, and {metric!r} is not computed by this run."
            f"{did_you_mean(metric, known)} {shown}"
        )


def _most_steps(args: LeftTrainingArguments, rows: Any) -> int | None:
    """The most optimizer steps that the training can have; `None` where that is not known."""
    if args.max_steps > 0:
        return args.max_steps
    if not hasattr(rows, "__len__"):
        return None
    batches = math.ceil(len(rows) / (args.per_device_train_batch_size * args.world_size))
    return math.ceil(math.ceil(batches / args.gradient_accumulation_steps) * args.num_train_epochs)
