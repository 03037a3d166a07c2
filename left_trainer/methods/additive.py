"""Methods that add small modules or vectors."""

from __future__ import annotations

from peft import BeftConfig, IA3Config, ShadowConfig

from left_trainer.methods.learning_rates import metamathqa
from left_trainer.methods.limits import LINEAR_ONLY, UNTRIED_QUANTIZED
from left_trainer.methods.method import PeftMethod
from left_trainer.methods.registry import register_method
from left_trainer.methods.targets import key_value_feedforward, value
from left_trainer.tuners.bottleneck import HoulsbyAdapterConfig, ParallelAdapterConfig, PfeifferAdapterConfig

register_method(
    PeftMethod(
        name="ia3",
        family="additive",
        summary="learned rescaling of keys, values and feed-forward activations",
        paper="Liu et al., 2022, arXiv 2205.05638",
        config_class=IA3Config,
        narrow_learning_rate=1.5e-2,
        learning_rate=1e-3,
        learning_rate_source=metamathqa(1e-4, 31.1) + "; a third of what Liu et al., 2022, use with Adafactor on T0-3B",
        equation=r"\mathrm{softmax}(Q (l_k \odot K)^\top) (l_v \odot V), \quad (l_{ff} \odot \gamma(W_1 x)) W_2",
        when_to_use="Few-shot learning with about a tenth of LoRA's parameters, merged without a trace.",
        resolve_targets=key_value_feedforward,
        mergeable=True,
    )
)

register_method(
    PeftMethod(
        name="houlsby_adapter",
        family="additive",
        summary="bottlenecks after every attention and feed-forward sublayer",
        paper="Houlsby et al., 2019, arXiv 1902.00751",
        config_class=HoulsbyAdapterConfig,
        narrow_learning_rate=3e-3,
        learning_rate=3e-4,
        learning_rate_source="Hu et al., 2023, arXiv 2304.01933, Llama-7B",
        equation=r"h \leftarrow h + W_{up} f(W_{down} h)",
        when_to_use="The strongest of the sequential adapters, where some latency in serving does not matter.",
        unsupported=UNTRIED_QUANTIZED,
        aliases=("houlsby", "bottleneck_adapter"),
    )
)

register_method(
    PeftMethod(
        name="pfeiffer_adapter",
        family="additive",
        summary="one bottleneck after every feed-forward block, optionally an invertible one at the embeddings",
        paper="Pfeiffer et al., 2020, arXiv 2005.00052",
        config_class=PfeifferAdapterConfig,
        narrow_learning_rate=3e-3,
        learning_rate=3e-4,
        learning_rate_source="Hu et al., 2023, arXiv 2304.01933, Llama-7B",
        equation=r"h \leftarrow h + W_{up} f(W_{down} \mathrm{LN}(x + h)), \quad x \text{ the block's input}",
        when_to_use="Less than half of Houlsby's parameters; with `invertible=true`, adapters for a language.",
        unsupported=UNTRIED_QUANTIZED,
        aliases=("pfeiffer", "mad_x"),
    )
)

register_method(
    PeftMethod(
        name="parallel_adapter",
        family="additive",
        summary="one scaled bottleneck beside every feed-forward block",
        paper="He et al., 2022, arXiv 2110.04366",
        config_class=ParallelAdapterConfig,
        narrow_learning_rate=3e-3,
        learning_rate=3e-4,
        learning_rate_source="Hu et al., 2023, arXiv 2304.01933, Llama-7B",
        equation=r"h \leftarrow h + s W_{up} f(W_{down} x), \quad x \text{ the block's input}",
        when_to_use="Generation with a larger budget: `reduction_factor=2` and less.",
        unsupported=UNTRIED_QUANTIZED,
        aliases=("parallel",),
    )
)

register_method(
    PeftMethod(
        name="beft",
        family="additive",
        summary="one added bias vector at each value projection",
        paper="Huang et al., 2025, arXiv 2509.15974",
        config_class=BeftConfig,
        narrow_learning_rate=3e-2,
        learning_rate=3e-4,
        learning_rate_source=metamathqa(1e-4, 32.1),
        equation=r"v = W_v x + b",
        when_to_use="Little data and next to no parameters: one vector for each attention layer.",
        resolve_targets=value,
        unsupported=LINEAR_ONLY,
        mergeable=True,
    )
)

register_method(
    PeftMethod(
        name="shadow",
        family="additive",
        summary="a small parallel network whose state corrects the input of every block",
        paper="Li et al., 2026, ShadowPEFT",
        config_class=ShadowConfig,
        narrow_learning_rate=6e-3,
        learning_rate=5e-4,
        learning_rate_source="judgement: as much below the small models' as that of other adapters",
        equation=r"h^{(\ell)} \leftarrow h^{(\ell)} + \alpha \, U D (s^{(\ell)} - h^{(\ell)})",
        when_to_use="Decoder-only models when one trained network beside the model is preferred to many small layers.",
        unsupported={
            "shrinking": "its shadow network is built to the shape of the whole model.",
            "encoder_decoder": "its shadow network rides one decoder.",
        },
    )
)
