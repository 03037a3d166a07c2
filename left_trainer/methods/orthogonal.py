"""Reparameterizations that rotate the weights or work in their own singular vectors."""

from __future__ import annotations

from typing import Any

from peft import AdamssConfig, BOFTConfig, HRAConfig, OFTConfig, OSFConfig, PeftConfig, PsoftConfig, RoadConfig
from transformers import PreTrainedModel

from left_trainer.methods.learning_rates import metamathqa
from left_trainer.methods.limits import LINEAR_ONLY, MIXES_FEATURES, NO_CONV1D, NO_QUANTIZED
from left_trainer.methods.method import PeftMethod
from left_trainer.methods.registry import register_method
from left_trainer.methods.targets import common_divisor, query_value, rank_within_shapes


def oft_blocks(model: PreTrainedModel, config: PeftConfig) -> dict[str, Any]:
    return {"oft_block_size": common_divisor(model, config, largest=32)}


def boft_blocks(model: PreTrainedModel, config: PeftConfig) -> dict[str, Any]:
    return {"boft_block_size": common_divisor(model, config, largest=4)}


def road_groups(model: PreTrainedModel, config: PeftConfig) -> dict[str, Any]:
    return {"group_size": common_divisor(model, config, largest=64)}


register_method(
    PeftMethod(
        name="oft",
        family="reparameterization",
        summary="block-diagonal rotation of the weights",
        paper="Qiu et al., 2023, arXiv 2306.07280",
        config_class=OFTConfig,
        narrow_learning_rate=1.5e-3,
        learning_rate=1e-4,
        learning_rate_source=metamathqa(1e-4, 49.1),
        equation=r"W' = W R, \quad R = \mathrm{diag}(R_1, \dots, R_b), \; R_j^\top R_j = I",
        when_to_use="Keeping what the base model knows: rotations preserve the angles between its neurons.",
        resolve_targets=query_value,
        derive=oft_blocks,
        unsupported={**NO_CONV1D, **MIXES_FEATURES},
        mergeable=True,
    )
)

register_method(
    PeftMethod(
        name="boft",
        family="reparameterization",
        summary="rotation of the weights by a product of sparse butterfly factors",
        paper="Liu et al., 2023, arXiv 2311.06243",
        config_class=BOFTConfig,
        narrow_learning_rate=6e-3,
        learning_rate=4e-4,
        learning_rate_source="as far from oft's as on small models",
        equation=r"W' = W \textstyle\prod_{j=1}^{m} B_j, \quad B_j \text{ orthogonal and sparse}",
        when_to_use="As OFT, with fewer parameters for rotations that mix all dimensions.",
        defaults={"boft_n_butterfly_factor": 1},
        resolve_targets=query_value,
        derive=boft_blocks,
        unsupported={**LINEAR_ONLY, **MIXES_FEATURES},
        mergeable=True,
    )
)

register_method(
    PeftMethod(
        name="hra",
        family="reparameterization",
        summary="rotation of the weights by a chain of Householder reflections",
        paper="Yuan et al., 2024, arXiv 2405.17484",
        config_class=HRAConfig,
        narrow_learning_rate=3e-3,
        learning_rate=2e-4,
        learning_rate_source="as far from oft's as on small models",
        equation=r"W' = W \textstyle\prod_{j=1}^{r} (I - 2 u_j u_j^\top)",
        when_to_use="Between LoRA and OFT: a rotation that is also a low-rank update.",
        resolve_targets=query_value,
        unsupported={**LINEAR_ONLY, **MIXES_FEATURES},
        mergeable=True,
    )
)

register_method(
    PeftMethod(
        name="road",
        family="reparameterization",
        summary="rotation and scaling of pairs of output features",
        paper="Petrushkov et al., 2024, arXiv 2409.00119",
        config_class=RoadConfig,
        narrow_learning_rate=1.5e-2,
        learning_rate=1e-3,
        learning_rate_source=metamathqa(1e-3, 38.5) + "; Petrushkov et al., 2024",
        equation=r"y' = R (W x), \quad R = \mathrm{diag}\left(\alpha_j \begin{pmatrix} \cos\theta_j & -\sin\theta_j \\ "
        r"\sin\theta_j & \cos\theta_j \end{pmatrix}\right)",
        when_to_use="Serving many adapters in one batch: each row needs only elementwise products.",
        resolve_targets=query_value,
        derive=road_groups,
        unsupported={**NO_CONV1D, **MIXES_FEATURES},
        mergeable=True,
    )
)

register_method(
    PeftMethod(
        name="psoft",
        family="reparameterization",
        summary="rotation inside the principal subspace of the weights",
        paper="Wu et al., 2026, openreview FSHrinMArK",
        config_class=PsoftConfig,
        narrow_learning_rate=1.5e-3,
        learning_rate=1e-4,
        learning_rate_source=metamathqa(1e-4, 44.9),
        equation=r"W' = W + B (R - I) A, \quad R^\top R = I, \; B A = U_r \Sigma_r V_r^\top",
        when_to_use="Orthogonal fine-tuning at the cost of an r by r matrix for each layer.",
        resolve_targets=query_value,
        derive=rank_within_shapes,
        unsupported={**LINEAR_ONLY, **MIXES_FEATURES},
        mergeable=True,
    )
)

register_method(
    PeftMethod(
        name="osf",
        family="reparameterization",
        summary="the weak singular directions of every weight, the strong ones frozen",
        paper="Nayak et al., 2025, arXiv 2504.07097",
        config_class=OSFConfig,
        narrow_learning_rate=3e-4,
        learning_rate=1e-5,
        learning_rate_source="that of full fine-tuning",
        equation=r"W' = U_h \Sigma_h V_h^\top + U_l \Sigma_l V_l^\top, \quad \text{trained: } U_l, \Sigma_l, V_l",
        when_to_use="Learning one task after another without losing the earlier ones; it trains nearly as many "
        "parameters as full fine-tuning.",
        resolve_targets=query_value,
        unsupported={**LINEAR_ONLY, **MIXES_FEATURES},
    )
)

register_method(
    PeftMethod(
        name="adamss",
        family="reparameterization",
        summary="low-rank updates inside clusters of the singular vectors of the weights",
        paper="Zheng et al., 2025, AdaMSS, NeurIPS",
        config_class=AdamssConfig,
        narrow_learning_rate=1.5e-2,
        learning_rate=5e-4,
        learning_rate_source="judgement: as much below the small models' as adalora's",
        equation=r"W' = W + \textstyle\sum_k U_k B_k A_k",
        when_to_use="Fewer parameters than LoRA of the same rank. `use_asa=true` drops subspaces during training.",
        resolve_targets=query_value,
        derive=rank_within_shapes,
        unsupported={**MIXES_FEATURES, **NO_CONV1D, **NO_QUANTIZED},
        requires={"sklearn": "scikit-learn"},
        mergeable=True,
    )
)
