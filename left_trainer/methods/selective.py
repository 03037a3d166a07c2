"""Methods that train some of the model's own parameters: full fine-tuning trains all of them."""

from __future__ import annotations

from typing import Any

from peft import LNTuningConfig, PeftConfig, ShiraConfig, SupertuningConfig, TrainableTokensConfig
from transformers import PreTrainedModel

from left_trainer.methods.learning_rates import metamathqa
from left_trainer.methods.limits import BY_POSITION, LINEAR_ONLY
from left_trainer.methods.method import PeftMethod
from left_trainer.methods.registry import register_method
from left_trainer.methods.targets import features, norms, query_value, targeted
from left_trainer.models.tables import separate_token_tables
from left_trainer.tuners.selective import BitFitConfig, LayersConfig, ParameterTypesConfig


def sparse_rank(model: PreTrainedModel, config: PeftConfig) -> dict[str, Any]:
    """SHiRA selects as many weights as a LoRA of rank `r` has, which cannot exceed those that there are."""
    shapes = [features(module) for _, module in targeted(model, config)]
    return {"r": min(config.r, *(rows * columns // (rows + columns) for rows, columns in shapes))}


def own_token_tables(model: PreTrainedModel) -> dict[str, Any] | None:
    """The tables of encoder and decoder, where there are two; else PEFT takes the input embeddings."""
    tables = separate_token_tables(model)
    return {"target_modules": tables} if tables else None


register_method(
    PeftMethod(
        name="full",
        family="selective",
        summary="every parameter of the model",
        paper="Howard and Ruder, 2018, arXiv 1801.06146",
        config_class=None,
        narrow_learning_rate=1.5e-4,
        learning_rate=1e-5,
        learning_rate_source=metamathqa(1e-5, 47.2),
        equation=r"\theta' = \theta + \Delta\theta",
        when_to_use="Enough memory for gradients and optimizer state of the whole model, and much data.",
        unsupported={"quantized_base": "quantized weights cannot be trained."},
        aliases=("full_finetuning",),
    )
)

register_method(
    PeftMethod(
        name="bitfit",
        family="selective",
        summary="the biases of linear and normalization layers, added at zero where a layer has none",
        paper="Ben Zaken et al., 2021, arXiv 2106.10199",
        config_class=BitFitConfig,
        narrow_learning_rate=6e-3,
        learning_rate=5e-4,
        learning_rate_source="Ben Zaken et al., 2022, range 1e-4 to 1e-3",
        equation=r"y = W x + b', \quad b' = b + \Delta b",
        when_to_use="Little data and very small adapters, best on models that have biases. It merges into those.",
        aliases=("bias_tuning",),
        mergeable=True,
    )
)

register_method(
    PeftMethod(
        name="layers",
        family="selective",
        summary="chosen transformer blocks, the last quarter by default",
        paper="Lee et al., 2019, arXiv 1911.03090",
        config_class=LayersConfig,
        narrow_learning_rate=1.5e-4,
        learning_rate=1e-5,
        learning_rate_source="that of full fine-tuning",
        equation=r"\theta'_\ell = \theta_\ell + \Delta\theta_\ell, \quad \ell \in S",
        when_to_use="Nearly the quality of full fine-tuning for less memory: last blocks for a new task, first ones "
        "for a new kind of input.",
        unsupported={"quantized_base": "quantized weights cannot be trained."},
        aliases=("partial_fine_tuning",),
        mergeable=True,
    )
)

register_method(
    PeftMethod(
        name="parameter_types",
        family="selective",
        summary="parameters of chosen kinds: attention, feed-forward, norms, embeddings, query, key, value, output",
        paper="Touvron et al., 2022, arXiv 2203.09795",
        config_class=ParameterTypesConfig,
        narrow_learning_rate=1.5e-4,
        learning_rate=1e-5,
        learning_rate_source="that of full fine-tuning",
        equation=r"\theta'_t = \theta_t + \Delta\theta_t, \quad t \in T",
        when_to_use="Full fine-tuning is nearly affordable: attention alone saves two thirds of its optimizer state; "
        "embeddings suit a new language.",
        unsupported={"quantized_base": "quantized weights cannot be trained."},
        aliases=("attention_tuning",),
        mergeable=True,
    )
)

register_method(
    PeftMethod(
        name="ln_tuning",
        family="selective",
        summary="the normalization layers",
        paper="Zhao et al., 2023, arXiv 2312.11420",
        config_class=LNTuningConfig,
        narrow_learning_rate=1.5e-2,
        learning_rate=5e-4,
        learning_rate_source=metamathqa(1e-4, 0.0) + "; too little to learn the form of an answer",
        equation=r"y = \gamma' \odot \mathrm{norm}(x) + \beta'",
        when_to_use="A strong and very small baseline, in particular when only the domain or the modality changes.",
        resolve_targets=norms,
        mergeable=True,
    )
)

register_method(
    PeftMethod(
        name="shira",
        family="selective",
        summary="a few single weights of each matrix, scattered at random",
        paper="Bhardwaj et al., 2024, arXiv 2406.13175",
        config_class=ShiraConfig,
        narrow_learning_rate=1.5e-3,
        learning_rate=1e-4,
        learning_rate_source="judgement: between lora's and that of full fine-tuning",
        equation=r"W' = W + M \odot S, \quad \lVert M \rVert_0 = r (i + o)",
        when_to_use="Many adapters to switch between or to add up: changing a few percent of the weights is fast, and "
        "sparse adapters seldom collide.",
        resolve_targets=query_value,
        derive=sparse_rank,
        unsupported={**LINEAR_ONLY, **BY_POSITION},
        mergeable=True,
    )
)

register_method(
    PeftMethod(
        name="supertuning",
        family="selective",
        summary="the largest hundredth of the weights of each matrix",
        paper="2026, arXiv 2607.09287",
        config_class=SupertuningConfig,
        narrow_learning_rate=3e-2,
        learning_rate=1e-3,
        learning_rate_source="judgement: as much below the small models' as that of other vectors",
        equation=r"W' = W + M \odot S, \quad M = [\,|W| \text{ among its largest 1 \%}\,]",
        when_to_use="Like SHiRA, with the weights chosen by magnitude instead of at random.",
        resolve_targets=query_value,
        unsupported={**LINEAR_ONLY, **BY_POSITION},
        mergeable=True,
    )
)

register_method(
    PeftMethod(
        name="trainable_tokens",
        family="selective",
        summary="the embeddings of chosen tokens",
        paper="Mangrulkar et al., 2022, PEFT",
        config_class=TrainableTokensConfig,
        narrow_learning_rate=3e-2,
        learning_rate=2e-2,
        learning_rate_source=metamathqa(2e-1, 24.6) + "; below it, because general text loses 0.83 nats there",
        equation=r"E'_t = E_t + \Delta_t, \quad t \in T",
        when_to_use="New tokens in the vocabulary (a chat format, a language's characters) that need embeddings.",
        resolve_targets=own_token_tables,
        required={"token_indices": "ids of the tokens to train, as of tokenizer.convert_tokens_to_ids([...])."},
        mergeable=True,
    )
)
