"""Updates that are sparse in a spectrum: of Fourier, wavelets, or circulant matrices."""

from __future__ import annotations

from typing import Any

from peft import C3AConfig, FourierFTConfig, PeftConfig, WaveFTConfig
from transformers import PreTrainedModel

from left_trainer.methods.learning_rates import metamathqa
from left_trainer.methods.limits import LINEAR_ONLY, MIXES_FEATURES, NO_QUANTIZED
from left_trainer.methods.method import PeftMethod
from left_trainer.methods.registry import register_method
from left_trainer.methods.targets import common_divisor, features, query_value, targeted


def frequencies(model: PreTrainedModel, config: PeftConfig) -> dict[str, Any]:
    """A spectrum has no more coefficients than the matrix has entries."""
    entries = (rows * columns for rows, columns in (features(module) for _, module in targeted(model, config)))
    return {"n_frequency": min(config.n_frequency, *entries)}


def circulant_blocks(model: PreTrainedModel, config: PeftConfig) -> dict[str, Any]:
    """Blocks of the circulant update tile every matrix."""
    return {"block_size": common_divisor(model, config, largest=256)}


register_method(
    PeftMethod(
        name="fourierft",
        family="reparameterization",
        summary="a few trained coefficients of the update's Fourier spectrum",
        paper="Gao et al., 2024, arXiv 2405.03003",
        config_class=FourierFTConfig,
        narrow_learning_rate=3e-3,
        learning_rate=1e-3,
        learning_rate_source=metamathqa(1e-4, 0.0) + "; too little to learn the form of an answer",
        equation=r"W' = W + \alpha \, \mathrm{Re}(\mathcal{F}^{-1}(F)), \quad \lVert F \rVert_0 = n",
        when_to_use="Small adapters whose update is not low-rank.",
        resolve_targets=query_value,
        defaults={"init_weights": True},  # PEFT's random start ruins the base model
        derive=frequencies,
        unsupported={**NO_QUANTIZED, **MIXES_FEATURES},
        mergeable=True,
    )
)

register_method(
    PeftMethod(
        name="waveft",
        family="reparameterization",
        summary="a few trained coefficients of the update's wavelet transform",
        paper="Bilican et al., 2025, arXiv 2505.12532",
        config_class=WaveFTConfig,
        narrow_learning_rate=1.5e-4,
        learning_rate=1e-4,
        learning_rate_source=metamathqa(1e-4, 40.3),
        equation=r"W' = W + \lambda \, \mathrm{DWT}^{-1}(C), \quad \lVert C \rVert_0 = n",
        when_to_use="As FourierFT, with coefficients that act locally in the matrix.",
        resolve_targets=query_value,
        derive=frequencies,
        unsupported={**LINEAR_ONLY, **MIXES_FEATURES},
        mergeable=True,
    )
)

register_method(
    PeftMethod(
        name="c3a",
        family="reparameterization",
        summary="block-circulant update, computed by fast Fourier transforms",
        paper="Chen et al., 2024, arXiv 2407.19342",
        config_class=C3AConfig,
        narrow_learning_rate=1.5e-1,
        learning_rate=3e-1,
        learning_rate_source=metamathqa(3e-1, 48.8),
        equation=r"W' x = W x + \mathcal{F}^{-1}(\mathcal{F}(w) \odot \mathcal{F}(x))",
        when_to_use="High rank from few parameters; the block size sets how many.",
        resolve_targets=query_value,
        derive=circulant_blocks,
        unsupported={**LINEAR_ONLY, **MIXES_FEATURES},
        mergeable=True,
    )
)
