"""LeftTrainingArguments: all fields of the Hugging Face and TRL arguments, plus the method."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import logging
from collections.abc import Mapping
from dataclasses import InitVar, dataclass, field
from typing import Any, Self

import torch
from torch import distributed
from transformers import Seq2SeqTrainingArguments, TrainingArguments
from trl import SFTConfig

from left_trainer.argument_checks import check_arguments
from left_trainer.compression_options import (
    DistillationOptions,
    ShrinkOptions,
    Target,
    check_compression,
    parse_shrink_to,
    read_options,
)
from left_trainer.fast_path_args import FastPathArguments
from left_trainer.methods import get_method
from left_trainer.methods.options import check_peft_kwargs, plain_options
from left_trainer.models import ModelFamily
from left_trainer.processes import check_is_one_run, check_processes_can_meet, launch_of
from left_trainer.secret_values import is_secret, remember, without_secrets

# Fields that only the trainer for decoder-only models reads. The other trainer would silently ignore them.
DECODER_ONLY_FIELDS = (
    "activation_offloading",
    "assistant_only_loss",
    "chat_template_path",
    "completion_only_loss",
    "dataset_kwargs",
    "dataset_text_field",
    "eos_token",
    "eval_packing",
    "loss_type",
    "packing",
    "packing_strategy",
    "padding_free",
    "router_aux_loss_coef",
    "shuffle_dataset",
)
# Fields of `SFTConfig` that Hugging Face's example scripts define in classes of their own, `ModelArguments` above all.
# One parser cannot have a flag twice, so that these are set in Python, or by the flags of such a class.
FLAGS_OF_OTHERS = ("trust_remote_code", "pad_token", "pad_to_multiple_of")
REPLACED_FIELDS = {"sortish_sampler": "train_sampling_strategy='group_by_length'"}

# What Hugging Face's trainers do with arguments that name no method.
METHOD_OF_HUGGING_FACE = "full"
logger = logging.getLogger(__name__)

KWARGS = ("peft_kwargs", "distillation_kwargs", "shrink_kwargs")
SAMPLING_STRATEGIES = ("random", "sequential", "group_by_length", "batch_rebalance")


@dataclass
class LeftTrainingArguments(FastPathArguments, SFTConfig, Seq2SeqTrainingArguments):
    """Arguments of `LeftTrainer`: `trl.SFTConfig` and `transformers.Seq2SeqTrainingArguments` in one class.

    Where TRL changed a Hugging Face default, the Hugging Face default is used: `logging_steps` is 500, `bf16` and
    `gradient_checkpointing` are off. On a machine without an accelerator, `bf16` and several processes select the CPU.

    Those that turn fast paths on and off are in `FastPathArguments`.

    Args:
        peft_method: Name of the fine-tuning method; `left-trainer methods` lists them.
        peft_kwargs: Options of the method: a dict, a JSON object, or `r=16,lora_alpha=32`.
        teacher_model: Learn from a teacher too: a hub name, a path, the folder of an adapter, `base` (the model with
            its adapter off), `self` (a frozen copy of the model as it starts) or `none`.
        distillation_kwargs: How, in the same forms; see `left_trainer.compression_options.DistillationOptions`.
        shrink_to: Remove parts of the model during training, down to a size: `params=0.6`,
            `encoder_layers=4,decoder_layers=2`, `layers=6`, `ffn=0.5`, `heads=0.5`, `vocabulary=data`.
        shrink_kwargs: How, in the same forms; see `left_trainer.compression_options.ShrinkOptions`.
        learning_rate: Peak learning rate. If unset, the method's default: one value for all methods, such as 5e-5,
            would leave soft prompts untrained.
        max_length: Maximum length in tokens: of prompt and completion together for decoder-only models, of source and
            target separately for encoder-decoder models.
        generation_max_length: Maximum number of generated tokens, for both families; `docs/evaluation.md` says which
            limit wins.
        train_sampling_strategy: How rows are grouped into batches. If unset, rows of text are batched by similar length
            and rows of token ids randomly; see `left_trainer.data.sampling`. Otherwise as in `TrainingArguments`.
        stop_on_divergence: Stop with `TrainingDivergedError` before a step whose loss or gradients are not finite.
        save_on_signal: After Ctrl-C or SIGTERM, save a checkpoint at the end of the step, with any `save_strategy`,
            and stop; a second signal stops at once. Without it the first does.
        overwrite_output_dir: Allow training into an `output_dir` that contains the result of an earlier run.
        eval_loss_with_generation: With `predict_with_generate`, also compute the evaluation loss, which takes a
            forward pass.
        report_plan: Say before weights are loaded what memory the run will need, and stop where the device has less.
            `left-trainer train` and the recipes do.
        ignore_plan: Go on where the device has less.

    `trust_remote_code`, `pad_token` and `pad_to_multiple_of` are arguments of the constructor and no flags of a parser:
    there they belong to the `ModelArguments` and `DataArguments` beside this class, ours or Hugging Face's.

    Raises:
        ValueError: A number is out of its range, a name is none of the choices, the method is unknown, or an option
            does not exist for the method or has the wrong type; a launcher has started several processes that are not
            one run.
        TypeError: A value has another type than its field.
    """

    _VALID_DICT_FIELDS = [*SFTConfig._VALID_DICT_FIELDS, *KWARGS]

    peft_method: str = field(
        default="lora", metadata={"help": "Fine-tuning method; `left-trainer methods` lists all names."}
    )
    peft_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Options of the method, as JSON '{\"r\": 16}' or as pairs 'r=16,lora_alpha=32'."},
    )
    teacher_model: str | None = field(
        default=None,
        metadata={
            "help": "Learn from a teacher too: a hub name, a path, `base` (the model with its adapter off), `self` (a "
            "frozen copy of the model as it starts) or `none`."
        },
    )
    distillation_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "How to learn from the teacher, such as 'alpha=0.5,temperature=2'."}
    )
    shrink_to: str | None = field(
        default=None,
        metadata={
            "help": "Remove parts of the model during training, down to a size: params=0.6, layers=6, "
            "encoder_layers=4,decoder_layers=2, ffn=0.5, heads=0.5, vocabulary=data."
        },
    )
    shrink_kwargs: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "How to shrink, such as 'schedule=cubic,end=0.7'."}
    )
    learning_rate: float | None = field(  # type: ignore[assignment]
        default=None, metadata={"help": "Peak learning rate. Default: the default of the method."}
    )
    logging_steps: float = field(
        default=500,
        metadata={"help": "Log every X update steps. If smaller than 1, a ratio of the total training steps."},
    )
    bf16: bool = field(  # type: ignore[assignment]
        default=False, metadata={"help": "Use bfloat16 mixed precision (GPU or CPU)."}
    )
    gradient_checkpointing: bool | None = field(  # type: ignore[assignment]
        default=None,
        metadata={"help": "Recompute activations in the backward pass, which is slower but needs less memory."},
    )
    train_sampling_strategy: str | None = field(  # type: ignore[assignment]
        default=None,
        metadata={
            "help": "How rows are grouped into batches. Default: group_by_length for text, random for token ids.",
            "choices": list(SAMPLING_STRATEGIES),
        },
    )
    stop_on_divergence: bool = field(
        default=True, metadata={"help": "Stop before a step whose loss or gradients are not finite."}
    )
    save_on_signal: bool = field(
        default=True, metadata={"help": "After Ctrl-C or SIGTERM, save a checkpoint at the end of the step, then stop."}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Allow writing into an output_dir that contains the result of an earlier run."}
    )
    eval_loss_with_generation: bool = field(
        default=True, metadata={"help": "With predict_with_generate, also compute the evaluation loss."}
    )
    report_plan: bool = field(
        default=False,
        metadata={"help": "Say before loading weights what memory the run needs; stop where the device has less."},
    )
    ignore_plan: bool = field(default=False, metadata={"help": "With report_plan, go on where the device has less."})

    # An `InitVar` is no field, so that a parser makes no flag of it.
    trust_remote_code: InitVar[bool] = False  # type: ignore[assignment]
    pad_token: InitVar[str | None] = None  # type: ignore[assignment]
    pad_to_multiple_of: InitVar[int | None] = None  # type: ignore[assignment]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Let a subclass write `__post_init__(self)`, to which dataclasses would pass each `InitVar`."""
        super().__init_subclass__(**kwargs)
        own = vars(cls).get("__post_init__")
        if own is not None:

            @functools.wraps(own)
            def without_values(self: Any, *values: Any) -> None:
                self._keep_flags_of_others(values)
                own(self)

            cls.__post_init__ = without_values  # type: ignore[method-assign]

    def _keep_flags_of_others(self, values: tuple[Any, ...]) -> None:
        names = [name for name in inspect.signature(type(self)).parameters if name in FLAGS_OF_OTHERS]
        self.__dict__.update(zip(names, values, strict=False))

    def __post_init__(self, *flags_of_others: Any) -> None:
        self._keep_flags_of_others(flags_of_others)
        check_arguments(self)
        self.peft_kwargs = check_peft_kwargs(get_method(self.peft_method), self.peft_kwargs)
        check_compression(self)
        launch = launch_of()
        if (self.bf16 or launch is not None) and not torch.accelerator.is_available():
            # Hugging Face refuses bf16 without an accelerator unless it is set, and several processes stay apart.
            self.use_cpu = True
        is_connected = distributed.is_available() and distributed.is_initialized()
        if not is_connected:
            check_processes_can_meet(launch, self.use_cpu)
        super().__post_init__()
        check_is_one_run(self.world_size, launch)
        remember(vars(self))
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory = False  # no device to copy to; torch would warn for every loader

    @classmethod
    def from_arguments(
        cls,
        args: TrainingArguments,
        peft_method: str | None = None,
        peft_kwargs: str | Mapping[str, Any] | None = None,
    ) -> LeftTrainingArguments:
        """`args` of any Hugging Face or TRL class, with every value kept.

        Args:
            args: Ours are returned as they are. Others name no method and mean full fine-tuning, as they do in the
                trainer that they were written for.
            peft_method: Beats the method of `args`. Where the learning rate of another class's `args` is the default
                of that class, which suits full fine-tuning, the method's own default is used and this is logged.
            peft_kwargs: Beats the options of `args`.

        Raises:
            TypeError: `args` has fields that this class has not.
            ValueError: As the constructor.
        """
        ours = args if isinstance(args, cls) else cls._of_another_class(args)
        if peft_method is None and peft_kwargs is None:
            return ours
        method = get_method(peft_method or ours.peft_method)
        options = check_peft_kwargs(method, ours.peft_kwargs if peft_kwargs is None else peft_kwargs)
        rate = ours.learning_rate
        if ours is not args and method.name != METHOD_OF_HUGGING_FACE and rate == _default(args, "learning_rate"):
            logger.warning(
                "learning_rate=%g is the default of %s, which suits full fine-tuning. peft_method=%r uses its own "
                "default instead, %g. To set another, pass LeftTrainingArguments(learning_rate=...).",
                rate,
                type(args).__name__,
                method.name,
                method.learning_rate,
            )
            rate = None
        return ours.replaced(peft_method=method.name, peft_kwargs=options, learning_rate=rate)

    @classmethod
    def _of_another_class(cls, args: TrainingArguments) -> LeftTrainingArguments:
        values = {item.name: getattr(args, item.name) for item in dataclasses.fields(args) if item.init}
        # The deprecated names mirror others; passing both would warn about a name that the user never wrote.
        values.pop("gradient_checkpointing", None)
        values.pop("gradient_checkpointing_kwargs", None)
        unknown = sorted(set(values) - set(inspect.signature(cls).parameters))
        if unknown:
            raise TypeError(
                f"args is a {type(args).__name__} with fields that LeftTrainer does not have: {', '.join(unknown)}. "
                "Pass LeftTrainingArguments, Seq2SeqTrainingArguments, SFTConfig or TrainingArguments."
            )
        if not isinstance(args, SFTConfig):
            values.setdefault("max_length", None)  # only TRL truncates by default
        return cls(**values, peft_method=METHOD_OF_HUGGING_FACE)

    def replaced(self, **values: Any) -> Self:
        """A copy with other values in some fields. The original arguments are not changed."""
        known = set(inspect.signature(type(self)).parameters)
        assert set(values) <= known, set(values) - known
        new = copy.copy(self)
        new.__dict__.update(values)
        return new

    def to_dict(self) -> dict[str, Any]:
        """All values in the types of JSON, for trackers and files."""
        others = {name: getattr(self, name) for name in FLAGS_OF_OTHERS}
        values = {**super().to_dict(), **others, **{name: plain_options(getattr(self, name)) for name in KWARGS}}
        return {name: without_secrets(value) for name, value in values.items()}

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled, such as into `training_args.bin`: all values but secrets. Copies keep these."""
        return {name: None if is_secret(name) else without_secrets(value) for name, value in vars(self).items()}

    def __copy__(self) -> Self:
        new = object.__new__(type(self))
        new.__dict__.update(vars(self))
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        new = object.__new__(type(self))
        new.__dict__.update(copy.deepcopy(vars(self), memo))
        return new

    def __repr__(self) -> str:
        values = sorted(self.__getstate__().items())
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in values)})"

    __str__ = __repr__

    @property
    def peft_options(self) -> dict[str, Any]:
        """The options of `peft_kwargs` as a dict, also if they were set as a string after construction."""
        given = self.peft_kwargs or {}
        return check_peft_kwargs(get_method(self.peft_method), given) if isinstance(given, str) else dict(given)

    @property
    def distillation(self) -> DistillationOptions:
        """`distillation_kwargs` as a record."""
        return read_options(DistillationOptions, "distillation_kwargs", self.distillation_kwargs)

    @property
    def shrinking(self) -> ShrinkOptions:
        """`shrink_kwargs` as a record."""
        return read_options(ShrinkOptions, "shrink_kwargs", self.shrink_kwargs)

    @property
    def target_size(self) -> Target:
        """`shrink_to` by dimension; empty where the model stays as large as it is."""
        return parse_shrink_to(self.shrink_to)

    def check_family(self, family: ModelFamily) -> None:
        """Raise `ValueError` for a field that the trainer of this model family would ignore."""
        defaults = {item.name: item.default for item in dataclasses.fields(self)}
        for name, replacement in REPLACED_FIELDS.items():
            if getattr(self, name) != defaults[name]:
                raise ValueError(f"{name}={getattr(self, name)!r} no longer has an effect. Use {replacement} instead.")
        named = self.length_column_name != defaults["length_column_name"]
        if named and self.train_sampling_strategy != "batch_rebalance":
            raise ValueError(
                f"length_column_name={self.length_column_name!r} has no effect: group_by_length counts the tokens "
                "itself. Remove it."
            )
        if self.eval_packing and self.predict_with_generate:
            raise ValueError(
                "eval_packing=True joins rows, but predict_with_generate=True needs one prompt per row. Set "
                "eval_packing=False; packing=True can stay."
            )
        if family == "encoder_decoder":
            for name in DECODER_ONLY_FIELDS:
                if getattr(self, name) != defaults[name]:
                    raise ValueError(
                        f"{name}={getattr(self, name)!r} has no effect on an encoder-decoder model. Remove it, or use "
                        "a decoder-only model."
                    )


def _default(args: TrainingArguments, name: str) -> Any:
    return next(item.default for item in dataclasses.fields(args) if item.name == name)


def loading_options(args: TrainingArguments | None) -> dict[str, Any]:
    """The options for `from_pretrained` in `args`: `model_init_kwargs` and `trust_remote_code`."""
    given = getattr(args, "model_init_kwargs", None)
    return {
        "trust_remote_code": getattr(args, "trust_remote_code", False),
        **(given if isinstance(given, dict) else {}),
    }
