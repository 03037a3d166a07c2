"""Methods that learn virtual tokens or key/value prefixes. Each that needs code has a module of its own."""

from __future__ import annotations

from left_trainer.adapters.prompt_encoder import PROMPT_ENCODER
from left_trainer.methods.adaption_prompt import ADAPTION_PROMPT
from left_trainer.methods.cpt import CPT
from left_trainer.methods.input_prompts import derive_input_prompt, initialize_from_vocabulary, prepare_input_prompt
from left_trainer.methods.learning_rates import metamathqa
from left_trainer.methods.limits import NO_PACKING
from left_trainer.methods.method import PeftMethod
from left_trainer.methods.prefix_tuning import CARTRIDGE, P_TUNING_V2, PREFIX_TUNING
from left_trainer.methods.registry import register_method
from left_trainer.methods.virtual_tokens import BEFORE_INPUT, NUM_VIRTUAL_TOKENS
from left_trainer.tuners.input_prompts.config import MultitaskPromptTuning, PromptTuning, PTuning

register_method(
    PeftMethod(
        name="prompt_tuning",
        family="soft_prompt",
        summary="virtual token embeddings before the input",
        paper="Lester et al., 2021, arXiv 2104.08691",
        config_class=PromptTuning,
        narrow_learning_rate=9e-2,
        learning_rate=1e-3,
        learning_rate_source=metamathqa(1e-3, 34.3) + "; from sampled vocabulary",
        equation=r"X' = [P; X], \quad P \in \mathbb{R}^{m \times d}",
        when_to_use="The smallest adapters: a few thousand numbers a task, one frozen model for all. It needs a "
        "high learning rate and pays off on large models.",
        defaults={
            "num_virtual_tokens": NUM_VIRTUAL_TOKENS,
            "prompt_tuning_init": "SAMPLE_VOCAB",
            "prompt_position": None,
        },
        derive=derive_input_prompt,
        prepare=prepare_input_prompt,
        initialize=initialize_from_vocabulary,
        virtual_tokens=BEFORE_INPUT,
        training_state=PROMPT_ENCODER,
        unsupported=NO_PACKING,
    )
)

register_method(
    PeftMethod(
        name="p_tuning",
        family="soft_prompt",
        summary="virtual token embeddings, reparameterized by a small MLP",
        paper="Liu et al., 2021, arXiv 2103.10385",
        config_class=PTuning,
        narrow_learning_rate=1e-2,
        learning_rate=3e-4,
        learning_rate_source=metamathqa(1e-4, 34.9),
        equation=r"X' = [\mathrm{MLP}(E); X], \quad E \in \mathbb{R}^{m \times d}",
        when_to_use="Like prompt tuning, with an encoder in training that makes it converge faster; only the computed "
        "prompts are needed afterwards.",
        defaults={"num_virtual_tokens": NUM_VIRTUAL_TOKENS, "encoder_hidden_size": 128, "prompt_position": None},
        derive=derive_input_prompt,
        prepare=prepare_input_prompt,
        virtual_tokens=BEFORE_INPUT,
        training_state=PROMPT_ENCODER,
        unsupported=NO_PACKING,
    )
)

register_method(PREFIX_TUNING)

register_method(P_TUNING_V2)

register_method(
    PeftMethod(
        name="multitask_prompt_tuning",
        family="soft_prompt",
        summary="one shared prompt, scaled by a low-rank matrix for each task",
        paper="Wang et al., 2023, arXiv 2303.02861",
        config_class=MultitaskPromptTuning,
        narrow_learning_rate=1.5e-1,
        learning_rate=2e-3,
        learning_rate_source="as far from prompt tuning's as on small models",
        equation=r"P_t = P \odot (u_t v_t^\top)",
        when_to_use="Several related tasks at once: give rows a `task_ids` column and set `num_tasks`. With one "
        "task it is prompt tuning with a low-rank factor.",
        defaults={
            "num_virtual_tokens": NUM_VIRTUAL_TOKENS,
            "num_tasks": 1,
            "num_transformer_submodules": 1,
            "prompt_tuning_init": "SAMPLE_VOCAB",
            "prompt_position": None,
        },
        derive=derive_input_prompt,
        prepare=prepare_input_prompt,
        initialize=initialize_from_vocabulary,
        virtual_tokens=BEFORE_INPUT,
        training_state=PROMPT_ENCODER,
        unsupported=NO_PACKING,
    )
)

register_method(CPT)
register_method(CARTRIDGE)
register_method(ADAPTION_PROMPT)
