"""LeftTrainingArguments: all fields of the Hugging Face and TRL arguments, plus the method."""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from transformers import Seq2SeqTrainingArguments, TrainingArguments
from trl import SFTConfig

from left_trainer.methods import get_method
from left_trainer.methods.options import check_peft_kwargs
from left_trainer.models import ModelFamily
from left_trainer.registry import did_you_mean

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
REPLACED_FIELDS = {"sortish_sampler": "train_sampling_strategy='group_by_length'"}

SAMPLING_STRATEGIES = ("random", "sequential", "group_by_length", "batch_rebalance")


@dataclass
class LeftTrainingArguments(SFTConfig, Seq2SeqTrainingArguments):
    """Arguments of `LeftTrainer`: `trl.SFTConfig` and `transformers.Seq2SeqTrainingArguments` in one class.

    Where TRL changed a Hugging Face default, the Hugging Face default is used: `logging_steps` is 500, `bf16` and
    `gradient_checkpointing` are off. `bf16` on a machine without an accelerator selects the CPU automatically.

    Args:
        peft_method: Name of the fine-tuning method; `left-trainer methods` lists them.
        peft_kwargs: Options of the method: a dict, a JSON object, or `r=16,lora_alpha=32`.
        learning_rate: Peak learning rate. If unset, the method's default: one value for all methods, such as 5e-5,
            would leave soft prompts untrained.
        max_length: Maximum length in tokens: of prompt and completion together for decoder-only models, of source and
            target separately for encoder-decoder models.
        generation_max_length: Maximum number of generated tokens, for both families; `docs/evaluation.md` says which
            limit wins.
        train_sampling_strategy: How rows are grouped into batches. If unset, rows of text are batched by similar length
            and rows of token ids randomly; see `left_trainer.data.sampling`. Otherwise as in `TrainingArguments`.
        overwrite_output_dir: Allow training into an `output_dir` that contains the result of an earlier run.
        use_linear_cross_entropy: Compute the loss without storing the logits, where that is exact; see
            `left_trainer.kernels.linear_cross_entropy`. `training_report.json` shows where it was not used.
        linear_cross_entropy_workspace_bytes: Limit on the memory for logits of `use_linear_cross_entropy`.
        use_lora_linear: Compute a LoRA layer and its base in one step, where that is exact; see
            `left_trainer.kernels.lora_linear`.
        use_fused_gelu: Compute the tanh form of GELU, the activation of mT5 and GPT-2, in one operation.
        sort_eval_by_length: With `predict_with_generate`, generate for rows of similar length together; results keep
            the order of the rows.
        eval_loss_with_generation: With `predict_with_generate`, also compute the evaluation loss, which takes a
            forward pass.

    Raises:
        ValueError: The method is unknown, or an option does not exist for the method or has the wrong type.
    """

    _VALID_DICT_FIELDS = [*SFTConfig._VALID_DICT_FIELDS, "peft_kwargs"]

    peft_method: str = field(
        default="lora", metadata={"help": "Fine-tuning method; `left-trainer methods` lists all names."}
    )
    peft_kwargs: dict[str, Any] | str | None = field(
        default=None,
        metadata={"help": "Options of the method, as JSON '{\"r\": 16}' or as pairs 'r=16,lora_alpha=32'."},
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
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "Allow writing into an output_dir that contains the result of an earlier run."}
    )
    use_linear_cross_entropy: bool = field(
        default=True, metadata={"help": "Compute the loss without storing the logits, where that is exact."}
    )
    linear_cross_entropy_workspace_bytes: int = field(
        default=128 * 2**20, metadata={"help": "Limit on the memory for logits of use_linear_cross_entropy."}
    )
    use_lora_linear: bool = field(
        default=True, metadata={"help": "Compute a LoRA layer and its base in one step, where that is exact."}
    )
    use_fused_gelu: bool = field(
        default=True, metadata={"help": "Compute the tanh form of GELU in one operation (T5 v1.1, mT5, GPT-2)."}
    )
    sort_eval_by_length: bool = field(
        default=True, metadata={"help": "With predict_with_generate, generate for rows of similar length together."}
    )
    eval_loss_with_generation: bool = field(
        default=True, metadata={"help": "With predict_with_generate, also compute the evaluation loss."}
    )

    def __post_init__(self) -> None:
        if self.linear_cross_entropy_workspace_bytes < 1:
            raise ValueError(
                f"linear_cross_entropy_workspace_bytes={self.linear_cross_entropy_workspace_bytes} must be at least "
                "1. Pass a number of bytes, or use_linear_cross_entropy=False for full logits."
            )
        if self.train_sampling_strategy not in (None, *SAMPLING_STRATEGIES):
            raise ValueError(
                f"train_sampling_strategy={self.train_sampling_strategy!r} is not known."
                f"{did_you_mean(self.train_sampling_strategy, SAMPLING_STRATEGIES)} Expected one "
                f"of {', '.join(SAMPLING_STRATEGIES)}, or leave it unset to choose by the type of rows."
            )
        self.peft_kwargs = check_peft_kwargs(get_method(self.peft_method), self.peft_kwargs)
        if self.bf16 and not torch.accelerator.is_available():
            self.use_cpu = True  # Hugging Face refuses bf16 without an accelerator unless use_cpu is set
        super().__post_init__()
        if not torch.accelerator.is_available():
            self.dataloader_pin_memory = False  # no device to copy to; torch would warn for every loader

    @classmethod
    def from_arguments(cls, args: TrainingArguments) -> LeftTrainingArguments:
        """Convert `args` of any Hugging Face or TRL class. Every value is kept, including the learning rate."""
        if isinstance(args, cls):
            return args
        values = {item.name: getattr(args, item.name) for item in dataclasses.fields(args) if item.init}
        # The deprecated names mirror others; passing both would warn about a name that the user never wrote.
        values.pop("gradient_checkpointing", None)
        values.pop("gradient_checkpointing_kwargs", None)
        known = {item.name for item in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise TypeError(
                f"args is a {type(args).__name__} with fields that LeftTrainer does not have: {', '.join(unknown)}. "
                "Pass LeftTrainingArguments, Seq2SeqTrainingArguments, SFTConfig or TrainingArguments."
            )
        if not isinstance(args, SFTConfig):
            values.setdefault("max_length", None)  # only TRL truncates by default
        return cls(**values)

    def replaced(self, **values: Any) -> Self:
        """A copy with other values in some fields. The original arguments are not changed."""
        known = {item.name for item in dataclasses.fields(self)}
        assert set(values) <= known, set(values) - known
        new = copy.copy(self)
        new.__dict__.update(values)
        return new

    @property
    def peft_options(self) -> dict[str, Any]:
        """The options of `peft_kwargs` as a dict, also if they were set as a string after construction."""
        given = self.peft_kwargs or {}
        return check_peft_kwargs(get_method(self.peft_method), given) if isinstance(given, str) else dict(given)

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


def loading_options(args: TrainingArguments | None) -> dict[str, Any]:
    """The options for `from_pretrained` in `args`: `model_init_kwargs` and `trust_remote_code`."""
    given = getattr(args, "model_init_kwargs", None)
    return {
        "trust_remote_code": getattr(args, "trust_remote_code", False),
        **(given if isinstance(given, dict) else {}),
    }
