"""Arguments that turn fast paths on and off."""

from __future__ import annotations

from dataclasses import dataclass, field, fields


@dataclass
class FastPathArguments:
    """What makes a run faster or smaller. `training_report.json` shows what was used, and where not, why.

    Args:
        use_linear_cross_entropy: Compute the loss without storing the logits, where that is exact; see
            `left_trainer.kernels.linear_cross_entropy`.
        linear_cross_entropy_workspace_bytes: Limit on the memory for logits of `use_linear_cross_entropy`.
        use_lora_linear: Compute a LoRA layer and its base in one step, where that is exact; see
            `left_trainer.kernels.lora_linear`.
        use_fused_gelu: Compute the tanh form of GELU, the activation of mT5 and GPT-2, in one operation.
        use_fused_rms_norm: Keep the input alone of an RMSNorm, as T5, Llama and most newer models have it.
        use_fused_gated_mlp: Keep the two factors alone of the product in a gated MLP (SwiGLU, GEGLU), as Llama, T5 v1.1
            and most newer models have it.
        use_compact_dropout: On a CPU, keep a byte for each element that went through dropout.
        fast_dropout: On a CPU, draw the masks of dropout faster. They are others, as with another seed.
        sort_eval_by_length: With `predict_with_generate`, generate for rows of similar length together; results keep
            the order of the rows.
        regroup_generation: Then put rows whose texts go on into new batches, and read what prompts share only once.
    """

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
    use_fused_rms_norm: bool = field(
        default=True, metadata={"help": "Keep the input alone of an RMSNorm for the backward pass."}
    )
    use_fused_gated_mlp: bool = field(
        default=True, metadata={"help": "Keep the two factors alone of the product in a gated MLP (SwiGLU, GEGLU)."}
    )
    use_compact_dropout: bool = field(
        default=True, metadata={"help": "On a CPU, keep a byte for each element that went through dropout."}
    )
    fast_dropout: bool = field(
        default=False, metadata={"help": "On a CPU, draw masks of dropout faster: not those of transformers."}
    )
    sort_eval_by_length: bool = field(
        default=True, metadata={"help": "With predict_with_generate, generate for rows of similar length together."}
    )
    regroup_generation: bool = field(
        default=True, metadata={"help": "With sort_eval_by_length, put rows whose texts go on into new batches."}
    )


# The switches of a training step.
STEP_SWITCHES = tuple(item.name for item in fields(FastPathArguments) if item.name.startswith("use_"))
