"""LLaMA-Adapter: prompts in the upper attention layers behind a gate."""

from __future__ import annotations

from typing import Any

from peft import AdaptionPromptConfig, PeftConfig
from peft.tuners.adaption_prompt.config import TRANSFORMERS_MODEL_CONFIG as ADAPTION_PROMPT_TYPES
from transformers import PreTrainedModel

from left_trainer.methods.inner_forward import call_inner_model
from left_trainer.methods.learning_rates import metamathqa
from left_trainer.methods.method import PeftMethod


def every_layer(model: PreTrainedModel, config: PeftConfig) -> dict[str, Any]:
    """The paper leaves out the first two layers of a 32-layer model; a small one has none to spare.

    Raises `ValueError` for a model type that PEFT's adapted attention does not know.
    """
    if model.config.model_type not in ADAPTION_PROMPT_TYPES:
        raise ValueError(
            f"peft_method='adaption_prompt' works on {', '.join(ADAPTION_PROMPT_TYPES)} models, and this one is "
            f"{model.config.model_type}. Choose another method; p_tuning_v2 is the most similar."
        )
    layers = model.config.num_hidden_layers
    return {"adapter_layers": max(1, layers - layers // 16)}


ADAPTION_PROMPT = PeftMethod(
    name="adaption_prompt",
    family="soft_prompt",
    summary="prompts in the upper attention layers, behind a gate that starts closed",
    paper="Zhang et al., 2023, arXiv 2303.16199",
    config_class=AdaptionPromptConfig,
    narrow_learning_rate=3e-2,
    learning_rate=1e-3,
    learning_rate_source=metamathqa(5e-4, 21.1) + "; Zhang et al., 2023, 9e-3 for Llama-7B",
    equation=r"\mathrm{Attn}(q, K, V) + g \cdot \mathrm{Attn}(q, P_k, P_v), \quad g_0 = 0",
    when_to_use="Instruction tuning of Llama-like models with very few parameters and an undisturbed start.",
    defaults={"adapter_len": 10},
    derive=every_layer,
    prepare=call_inner_model,
    unsupported={
        "shrinking": "its prompts are counted from the last layer.",
        "encoder_decoder": "PEFT implements it for Llama, Mistral and GPT-2.",
    },
    aliases=("llama_adapter",),
)
