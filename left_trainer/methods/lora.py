"""LoRA, and its presets by name in the order of tables. Each that needs code has a module of its own."""

from __future__ import annotations

from peft import LoraConfig

from left_trainer.methods.adalora import ADALORA
from left_trainer.methods.corda import CORDA
from left_trainer.methods.eva import EVA
from left_trainer.methods.learning_rates import metamathqa
from left_trainer.methods.limits import MIXES_FEATURES
from left_trainer.methods.loftq import LOFTQ
from left_trainer.methods.lora_defaults import DEFAULTS, LOW_RANK
from left_trainer.methods.lora_fa import LORA_FA
from left_trainer.methods.lora_ga import LORA_GA
from left_trainer.methods.lora_plus import LORA_PLUS
from left_trainer.methods.method import PeftMethod
from left_trainer.methods.olora import OLORA
from left_trainer.methods.pissa import PISSA
from left_trainer.methods.poly import POLY
from left_trainer.methods.qlora import QLORA
from left_trainer.methods.registry import register_method
from left_trainer.methods.targets import query_value
from left_trainer.methods.xlora import XLORA

register_method(
    PeftMethod(
        name="lora",
        family="reparameterization",
        summary="low-rank updates beside the query and value projections",
        paper="Hu et al., 2021, arXiv 2106.09685",
        config_class=LoraConfig,
        narrow_learning_rate=6e-4,
        learning_rate=2e-4,
        learning_rate_source=metamathqa(1e-4, 47.8) + "; Hu et al., 2021, GPT-2",
        equation=LOW_RANK,
        when_to_use="The first method to try. It merges into the base, so that serving costs nothing.",
        defaults=DEFAULTS,
        resolve_targets=query_value,
        mergeable=True,
    )
)

register_method(QLORA)
register_method(LOFTQ)

register_method(
    PeftMethod(
        name="dora",
        family="reparameterization",
        summary="LoRA for the direction of each weight column, and a trained magnitude",
        paper="Liu et al., 2024, arXiv 2402.09353",
        config_class=LoraConfig,
        narrow_learning_rate=6e-4,
        learning_rate=2e-4,
        learning_rate_source="Liu et al., 2024, Llama-7B",
        equation=r"W' = m \, \frac{W + s B A}{\lVert W + s B A \rVert_c}",
        when_to_use="Closer to full fine-tuning than LoRA at small ranks, for a slower step.",
        defaults=DEFAULTS,
        preset={"use_dora": True},
        resolve_targets=query_value,
        unsupported=MIXES_FEATURES,
        mergeable=True,
    )
)

register_method(
    PeftMethod(
        name="rslora",
        family="reparameterization",
        summary="LoRA scaled by alpha over the square root of the rank",
        paper="Kalajdzievski, 2023, arXiv 2312.03732",
        config_class=LoraConfig,
        narrow_learning_rate=6e-4,
        learning_rate=2e-4,
        learning_rate_source="that of lora",
        equation=r"W' = W + \tfrac{\alpha}{\sqrt{r}} B A",
        when_to_use="Ranks of 32 and more, which plain LoRA's scaling slows down.",
        defaults={**DEFAULTS, "r": 32},
        preset={"use_rslora": True},
        resolve_targets=query_value,
        mergeable=True,
    )
)

register_method(LORA_PLUS)
register_method(LORA_FA)
register_method(PISSA)
register_method(OLORA)
register_method(CORDA)
register_method(LORA_GA)
register_method(EVA)
register_method(ADALORA)
register_method(XLORA)
register_method(POLY)
