"""Relatives of LoRA: other factorizations of the update, shared or random factors."""

from __future__ import annotations

from typing import Any

from peft import (
    DeftConfig,
    DeloraConfig,
    FrodConfig,
    GloraConfig,
    GraloraConfig,
    HiraConfig,
    LilyConfig,
    LoHaConfig,
    LoKrConfig,
    MissConfig,
    PeanutConfig,
    PeftConfig,
    PveraConfig,
    RandLoraConfig,
    TinyLoraConfig,
    UniLoraConfig,
    VBLoRAConfig,
    VeraConfig,
)
from transformers import PreTrainedModel

from left_trainer.methods.learning_rates import metamathqa
from left_trainer.methods.limits import LINEAR_ONLY, MIXES_FEATURES, NO_QUANTIZED, SHARED_BY_LAYERS
from left_trainer.methods.method import PeftMethod
from left_trainer.methods.registry import register_method
from left_trainer.methods.targets import common_divisor, query_value, rank_within_shapes


def vector_length(model: PreTrainedModel, config: PeftConfig) -> dict[str, Any]:
    """Vectors of the bank are joined to columns, so their length divides every dimension."""
    return {"vector_length": common_divisor(model, config, largest=256)}


register_method(
    PeftMethod(
        name="loha",
        family="reparameterization",
        summary="elementwise product of two low-rank updates",
        paper="Hyeon-Woo et al., 2021, arXiv 2108.06098",
        config_class=LoHaConfig,
        narrow_learning_rate=9e-3,
        learning_rate=2e-3,
        learning_rate_source="as far from lokr's as on small models",
        equation=r"W' = W + s (B_1 A_1) \odot (B_2 A_2)",
        when_to_use="A rank of up to r squared for the parameters of rank 2r.",
        resolve_targets=query_value,
        unsupported=LINEAR_ONLY,
        mergeable=True,
    )
)

register_method(
    PeftMethod(
        name="lokr",
        family="reparameterization",
        summary="Kronecker product of two small matrices",
        paper="Yeh et al., 2023, arXiv 2309.14859",
        config_class=LoKrConfig,
        narrow_learning_rate=1.5e-2,
        learning_rate=3e-3,
        learning_rate_source=metamathqa(3e-3, 46.6),
        equation=r"W' = W + s \, C \otimes (B A)",
        when_to_use="Full-rank updates from very few parameters.",
        resolve_targets=query_value,
        unsupported={**LINEAR_ONLY, **MIXES_FEATURES},
        mergeable=True,
    )
)

register_method(
    PeftMethod(
        name="vera",
        family="reparameterization",
        summary="two trained vectors a layer around random matrices that all layers share",
        paper="Kopiczko et al., 2023, arXiv 2310.11454",
        config_class=VeraConfig,
        narrow_learning_rate=3e-2,
        learning_rate=3e-3,
        learning_rate_source="that of pvera; Kopiczko et al., 2023, table 8, up to 1e-2",
        equation=r"W' = W + \Lambda_b B \Lambda_d A, \quad A, B \text{ random and frozen}",
        when_to_use="About a tenth of LoRA's parameters at a similar quality.",
        resolve_targets=query_value,
        unsupported=SHARED_BY_LAYERS,
        mergeable=True,
    )
)

register_method(
    PeftMethod(
        name="pvera",
        family="reparameterization",
        summary="VeRA with a sampled inner state",
        paper="Fillioux et al., 2025, arXiv 2512.07703",
        config_class=PveraConfig,
        narrow_learning_rate=3e-2,
        learning_rate=3e-3,
        learning_rate_source=metamathqa(3e-3, 35.6),
        equation=r"W' x = W x + \Lambda_b B z, \quad z \sim \mathcal{N}(\mu(A x), \sigma(A x))",
        when_to_use="VeRA with a probabilistic inner state, which regularizes and allows confidence estimates.",
        resolve_targets=query_value,
        unsupported=SHARED_BY_LAYERS,
        mergeable=True,
    )
)

register_method(
    PeftMethod(
        name="randlora",
        family="reparameterization",
        summary="full-rank updates as a trained combination of random low-rank matrices",
        paper="Albert et al., 2025, arXiv 2502.00987",
        config_class=RandLoraConfig,
        narrow_learning_rate=1.5e-3,
        learning_rate=1e-4,
        learning_rate_source="half of lora's",
        equation=r"W' = W + \textstyle\sum_j \Lambda_j^b B_j \Lambda_j^a A_j, \quad A_j, B_j \text{ random and frozen}",
        when_to_use="Tasks for which a low rank is too little, with LoRA's number of parameters.",
        resolve_targets=query_value,
        unsupported=SHARED_BY_LAYERS,
        mergeable=True,
    )
)

register_method(
    PeftMethod(
        name="vblora",
        family="reparameterization",
        summary="low-rank factors put together from one shared bank of vectors",
        paper="Li et al., 2024, arXiv 2405.15179",
        config_class=VBLoRAConfig,
        narrow_learning_rate=1.5e-2,
        learning_rate=1e-3,
        learning_rate_source=metamathqa(1e-4, 33.4) + "; Li et al., 2024",
        equation=r"W' = W + B A, \quad \text{columns } \textstyle\sum_j \mathrm{softmax}(\mathrm{topk}(\sigma))_j b_j",
        when_to_use="Adapters of a few kilobytes: the bank is shared by all layers.",
        resolve_targets=query_value,
        derive=vector_length,
        unsupported={**NO_QUANTIZED, **SHARED_BY_LAYERS},
        mergeable=True,
    )
)

register_method(
    PeftMethod(
        name="unilora",
        family="reparameterization",
        summary="all low-rank factors from one trained vector, spread by a fixed random map",
        paper="Li et al., 2025, arXiv 2506.00799",
        config_class=UniLoraConfig,
        narrow_learning_rate=9e-2,
        learning_rate=5e-3,
        learning_rate_source="judgement: as much below the small models' as other shared parameters",
        equation=r"\mathrm{vec}(A_1, B_1, \dots, A_L, B_L) = P \theta_d, \quad P \text{ random and frozen}",
        when_to_use="A budget of parameters that does not depend on the model: a single vector.",
        resolve_targets=query_value,
        unsupported={
            **NO_QUANTIZED,
            "shrinking": "one vector serves all layers, and which of them reads what is drawn for all at once.",
        },
        mergeable=True,
    )
)

register_method(
    PeftMethod(
        name="tinylora",
        family="reparameterization",
        summary="a handful of trained numbers, projected into the singular vectors of the weights",
        paper="2026, arXiv 2602.04118",
        config_class=TinyLoraConfig,
        narrow_learning_rate=6e-3,
        learning_rate=5e-4,
        learning_rate_source=metamathqa(1e-3, 1.2),
        equation=r"W' = W + U_r \Sigma_r (\textstyle\sum_i v_i P_i) V_r^\top, \quad P_i \text{ random and frozen}",
        when_to_use="The fewest parameters of all, down to tens for a whole model.",
        resolve_targets=query_value,
        unsupported={**NO_QUANTIZED, "shrinking": "how many layers share a vector follows from how many there are."},
        mergeable=True,
    )
)

register_method(
    PeftMethod(
        name="hira",
        family="reparameterization",
        summary="the weights multiplied elementwise by a low-rank matrix",
        paper="Huang et al., 2025, HiRA, openreview TwJrTz9cRS",
        config_class=HiraConfig,
        narrow_learning_rate=9e-3,
        learning_rate=4.5e-3,
        learning_rate_source=metamathqa(4.5e-3, 51.3),
        equation=r"W' = W + W \odot (B A)",
        when_to_use="A high-rank update that follows the structure of the base weights.",
        resolve_targets=query_value,
        mergeable=True,
    )
)

register_method(
    PeftMethod(
        name="gralora",
        family="reparameterization",
        summary="an independent low-rank update for each block of the matrix",
        paper="Jung et al., 2025, arXiv 2505.20355",
        config_class=GraloraConfig,
        narrow_learning_rate=9e-4,
        learning_rate=2e-4,
        learning_rate_source="that of lora",
        equation=r"W' = W + s \, [B_{ij} A_{ij}]_{i, j = 1}^{k}",
        when_to_use="Ranks of 64 and more, where outliers in a few inputs disturb LoRA.",
        resolve_targets=query_value,
        unsupported={**NO_QUANTIZED, **MIXES_FEATURES},
        mergeable=True,
    )
)

register_method(
    PeftMethod(
        name="delora",
        family="reparameterization",
        summary="low-rank updates whose strength is normalized and learned apart from their direction",
        paper="Bini et al., 2025, arXiv 2503.18225",
        config_class=DeloraConfig,
        narrow_learning_rate=3e-3,
        learning_rate=5e-4,
        learning_rate_source="judgement: as much below the small models' as lora's",
        equation=r"W' = W + \tfrac{\lambda \lVert W \rVert}{r} B \Xi A, \quad \Xi_{jj}^{-1} = |b_j| |a_j|",
        when_to_use="Robust to high learning rates and long training.",
        resolve_targets=query_value,
        unsupported={**LINEAR_ONLY, **MIXES_FEATURES},
        mergeable=True,
    )
)

register_method(
    PeftMethod(
        name="lily",
        family="reparameterization",
        summary="A shared by neighbouring layers, B mixed by a router from a shared set",
        paper="Zhong et al., 2024, arXiv 2407.09946",
        config_class=LilyConfig,
        narrow_learning_rate=3e-3,
        learning_rate=1e-4,
        learning_rate_source=metamathqa(1e-4, 52.6),
        equation=r"W' x = W x + s \textstyle\sum_k R(x)_k B_k A x",
        mixes_rows=True,  # its router's weights are a mean over the batch
        when_to_use="A higher rank from LoRA's number of parameters, by sharing across layers.",
        resolve_targets=query_value,
        unsupported={**LINEAR_ONLY, **MIXES_FEATURES},
    )
)

register_method(
    PeftMethod(
        name="miss",
        family="reparameterization",
        summary="one small matrix a layer, repeated along the input",
        paper="Kang and Yin, 2024, arXiv 2409.15371",
        config_class=MissConfig,
        narrow_learning_rate=1.5e-3,
        learning_rate=1e-4,
        learning_rate_source=metamathqa(1e-4, 48.7),
        equation=r"W' = W + \mathrm{expand}(D), \quad D \in \mathbb{R}^{r \times o}",
        when_to_use="As LoRA, with one matrix in place of two: less memory and faster steps.",
        resolve_targets=query_value,
        derive=rank_within_shapes,
        unsupported={**LINEAR_ONLY, **MIXES_FEATURES},
        aliases=("bone",),
        mergeable=True,
    )
)

register_method(
    PeftMethod(
        name="peanut",
        family="reparameterization",
        summary="a small neural network of the weights themselves as update",
        paper="Zhong et al., 2024, arXiv 2410.01870",
        config_class=PeanutConfig,
        narrow_learning_rate=3e-3,
        learning_rate=1e-4,
        learning_rate_source=metamathqa(1e-4, 39.7),
        equation=r"W' = W + s \, \sigma(W A) B",
        when_to_use="Nonlinear updates; `depth` adds layers to the network.",
        resolve_targets=query_value,
        unsupported={**LINEAR_ONLY, **MIXES_FEATURES},
        mergeable=True,
    )
)

register_method(
    PeftMethod(
        name="glora",
        family="reparameterization",
        summary="low-rank scaling and shift of weights and biases together",
        paper="Chavan et al., 2023, arXiv 2306.07967",
        config_class=GloraConfig,
        narrow_learning_rate=3e-3,
        learning_rate=5e-4,
        learning_rate_source=metamathqa(5e-4, 37.1),
        equation=r"W' = W + W A + B, \quad b' = b + b D + E + W C",
        when_to_use="One form that contains LoRA, bias tuning and feature scaling; its parts can be chosen one by one.",
        resolve_targets=query_value,
        unsupported=LINEAR_ONLY,
        mergeable=True,
    )
)

register_method(
    PeftMethod(
        name="deft",
        family="reparameterization",
        summary="a subspace of the weights projected out and filled anew",
        paper="Kumar et al., 2025, DEFT",
        config_class=DeftConfig,
        narrow_learning_rate=3e-3,
        learning_rate=1e-4,
        learning_rate_source=metamathqa(1e-4, 48.2),
        equation=r"W' = (I - P_{\mathrm{proj}}) W + Q_P R",
        when_to_use="Injecting knowledge while the rest of the weights stays as it is.",
        resolve_targets=query_value,
        unsupported={**NO_QUANTIZED, **MIXES_FEATURES},
        mergeable=True,
    )
)

register_method(
    PeftMethod(
        name="frod",
        family="reparameterization",
        summary="a sparse trained core in a basis that layers of one kind share",
        paper="FRoD, AAAI 2026, doi 10.1609/aaai.v40i31.39813",
        config_class=FrodConfig,
        narrow_learning_rate=1.5e-2,
        learning_rate=1e-4,
        learning_rate_source=metamathqa(1e-4, 50.9),
        equation=r"W' = Q (\mathrm{diag}(\sigma) + S) V^\top, \quad \lVert S \rVert_0 = \rho \, d^2",
        when_to_use="Full-rank updates that converge like full fine-tuning, from few trained numbers.",
        defaults={"progressbar": False},
        resolve_targets=query_value,
        unsupported={**NO_QUANTIZED, "shrinking": "its basis is computed from all layers together."},
        mergeable=True,
    )
)
