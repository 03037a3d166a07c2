"""Which numbers the options of methods may have: a range for each name, as data.

Options of one name mean one thing in all configs of PEFT and ours, but for those of `OF_CONFIG`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from peft import PeftConfig

from left_trainer.methods.method import PeftMethod
from left_trainer.ranges import (
    ANY,
    COUNT,
    NOT_NEGATIVE,
    POSITIVE,
    PROBABILITY,
    SEED,
    SHARE,
    Range,
    check_range,
    is_number,
)

# No weight of today's models is larger on a side; what fits the model at hand is checked when its shapes are known.
RANK = Range(at_least=1, at_most=2**16)
VIRTUAL_TOKENS = Range(at_least=1, at_most=2**16)
WIDTH = Range(at_least=1, at_most=2**20)
LAYERS = Range(at_least=1, at_most=1024)

OPTION_RANGES: dict[str, Range] = {
    "adapter_layers": LAYERS,
    "adapter_len": VIRTUAL_TOKENS,
    "alora_invocation_tokens": NOT_NEGATIVE,
    "alpha": POSITIVE,
    "alpha_pattern": POSITIVE,
    "asa_importance_beta": PROBABILITY,
    "asa_schedule_exponent": POSITIVE,
    "asa_target_subspaces": COUNT,
    "asa_uncertainty_beta": PROBABILITY,
    "auxiliary_loss_weight": NOT_NEGATIVE,
    "beta": NOT_NEGATIVE,
    "beta1": SHARE,
    "beta2": SHARE,
    "block_size": WIDTH,
    "block_size_pattern": WIDTH,
    "boft_block_num": NOT_NEGATIVE,  # 0 where the size is given
    "boft_block_size": NOT_NEGATIVE,
    "boft_dropout": SHARE,
    "boft_n_butterfly_factor": COUNT,
    "bottleneck_size": RANK,
    "buffer_size": COUNT,
    "calibration_batches": COUNT,
    "cayley_neumann_eps": Range(above=0, below=1),
    "cpt_mask": Range(at_least=0, at_most=1),
    "cpt_token_ids": NOT_NEGATIVE,
    "cpt_tokens_type_mask": NOT_NEGATIVE,
    "d_initial": POSITIVE,
    "decompose_factor": Range(at_least=1, also=(-1,), meaning="as even as can be"),
    "deft_dropout": SHARE,
    "delora_lambda": POSITIVE,
    "deltaT": COUNT,
    "depth": Range(at_least=0, at_most=1024),
    "dirichlet_prior": POSITIVE,
    "drop_layers": NOT_NEGATIVE,
    "dropout": SHARE,
    "effective_rank": POSITIVE,
    "encoder_dropout": SHARE,
    "encoder_hidden_size": WIDTH,
    "encoder_num_layers": LAYERS,
    "eps": POSITIVE,
    "final_warmup": COUNT,
    "frod_dropout": SHARE,
    "gamma": NOT_NEGATIVE,
    "generator_seed": SEED,
    "global_scaling_weight": ANY,
    "gralora_dropout": SHARE,
    "gralora_k": COUNT,
    "group_size": COUNT,
    "hidden_size": WIDTH,
    "hira_dropout": SHARE,
    "hybrid_r": Range(at_least=0, at_most=RANK.at_most),
    "init_logits_std": NOT_NEGATIVE,
    "init_r": RANK,
    "init_scale": POSITIVE,
    "init_std": NOT_NEGATIVE,
    "init_theta_d_bound": POSITIVE,
    "init_v_bound": NOT_NEGATIVE,
    "init_vector_bank_bound": POSITIVE,
    "init_warmup": NOT_NEGATIVE,
    "invertible_reduction_factor": COUNT,
    "kl_loss_weight": NOT_NEGATIVE,
    "label_mask_value": ANY,
    "lambda_pattern": POSITIVE,
    "layer_replication": NOT_NEGATIVE,
    "layers": ANY,  # counted from the end where negative
    "layers_to_transform": NOT_NEGATIVE,
    "loftq_bits": Range(at_least=2, at_most=8),
    "loftq_iter": COUNT,
    "lora_alpha": POSITIVE,
    "lora_dropout": SHARE,
    "loraplus_lr_ratio": POSITIVE,
    "mask_interval": COUNT,
    "mini_r": RANK,
    "miss_dropout": SHARE,
    "module_dropout": SHARE,
    "n_frequency": COUNT,
    "n_frequency_pattern": COUNT,
    "n_skills": COUNT,
    "n_splits": COUNT,
    "n_tasks": COUNT,
    "nblocks": COUNT,
    "num_attention_heads": COUNT,
    "num_B": Range(at_least=2),
    "num_cayley_neumann_terms": COUNT,
    "num_frozen_tokens": NOT_NEGATIVE,
    "num_groups": COUNT,
    "num_layers": LAYERS,
    "num_ranks": RANK,
    "num_samples": COUNT,
    "num_subspaces": COUNT,
    "num_tasks": COUNT,
    "num_transformer_submodules": Range(at_least=1, at_most=2),
    "num_vectors": COUNT,
    "num_virtual_tokens": VIRTUAL_TOKENS,
    "oft_block_size": NOT_NEGATIVE,  # 0 where r is given
    "opt_loss_decay_factor": NOT_NEGATIVE,
    "opt_projection_epsilon": NOT_NEGATIVE,
    "opt_projection_format_epsilon": NOT_NEGATIVE,
    "orth_reg_weight": NOT_NEGATIVE,
    "prefix_dropout": SHARE,
    "proj_seed": SEED,
    "projection_prng_key": SEED,
    "projection_seed": SEED,
    "prompt_tuning_init_task": NOT_NEGATIVE,
    "psoft_alpha": POSITIVE,
    "psoft_dropout": SHARE,
    "psoft_svd_lowrank_niter": NOT_NEGATIVE,
    "pvera_dropout": SHARE,
    "qalora_group_size": COUNT,
    "r": RANK,
    "randlora_alpha": POSITIVE,
    "randlora_dropout": SHARE,
    "random_loc_seed": SEED,
    "random_seed": SEED,
    "rank_dropout": SHARE,
    "rank_pattern": Range(above=0, at_most=RANK.at_most),
    "reduction_factor": COUNT,
    "regularization_alpha": NOT_NEGATIVE,
    "rho": Range(at_least=1),
    "rng_seed": SEED,
    "router_temperature": POSITIVE,
    "sample_scaler": NOT_NEGATIVE,
    "scale": POSITIVE,
    "scaling": POSITIVE,
    "scaling_pass_value": ANY,
    "shadow_alpha": NOT_NEGATIVE,
    "shadow_dropout": SHARE,
    "shadow_hidden_size": WIDTH,
    "shadow_intermediate_size": WIDTH,
    "shadow_num_attention_heads": COUNT,
    "shadow_num_hidden_layers": LAYERS,
    "softmax_temperature": POSITIVE,
    "sparse_rate": PROBABILITY,
    "sparsity": SHARE,
    "stable_gamma": COUNT,
    "stride_A": COUNT,
    "subspace_rank": RANK,
    "svd_threshold": PROBABILITY,
    "target_r": RANK,
    "target_svd_config": COUNT,
    "tau": PROBABILITY,
    "tfinal": NOT_NEGATIVE,
    "theta_d_length": COUNT,
    "tinit": NOT_NEGATIVE,
    "tinylora_dropout": SHARE,
    "token_dim": WIDTH,
    "token_indices": NOT_NEGATIVE,
    "top_k": COUNT,
    "top_k_lora": COUNT,
    "topk": COUNT,
    "total_step": COUNT,
    "trainable_token_indices": NOT_NEGATIVE,
    "u": COUNT,
    "unilora_dropout": SHARE,
    "update_hidden_size": WIDTH,
    "vblora_dropout": SHARE,
    "vector_length": COUNT,
    "vera_dropout": SHARE,
    "weight_tying": PROBABILITY,
    "xlora_depth": LAYERS,
    "xlora_dropout_p": SHARE,
    "xlora_size": WIDTH,
}
# By the class of the config, where a name means something else in it.
OF_CONFIG: dict[tuple[str, str], Range] = {
    ("OFTConfig", "r"): Range(at_least=0, at_most=RANK.at_most),  # 0 where oft_block_size is given
}


def range_of(config_class: type | None, name: str) -> Range | None:
    """The numbers that an option may have; `None` where it holds none."""
    return OF_CONFIG.get((config_class.__name__ if config_class else "", name), OPTION_RANGES.get(name))


@dataclasses.dataclass
class Nothing:
    """The options of a method without a config."""


# Options that may not be above another one of the same method.
AT_MOST = {
    "num_frozen_tokens": "num_virtual_tokens",
    "mini_r": "r",
    "target_r": "init_r",
    "topk": "num_vectors",
}


def check_numbers(method: PeftMethod, options: Mapping[str, Any]) -> None:
    """Raise `ValueError` where a number among `options` of `method`, or in a config that they hold, is out of range."""
    for name, value in options.items():
        _check(method, method.config_class, name, name, value)
    defaults = {field.name: field.default for field in dataclasses.fields(method.config_class or Nothing)}
    values = {**defaults, **method.defaults, **options, **method.preset}
    for name, other in AT_MOST.items():
        if (name in options or other in options) and is_number(values.get(name)) and is_number(values.get(other)):
            check_range(
                f"peft_kwargs of peft_method={method.name!r}: {name}",
                values[name],
                Range(at_most=values[other], advice=f"{values[other]} is the value of {other}."),
            )


def _check(method: PeftMethod, config_class: type | None, name: str, shown: str, value: Any) -> None:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            _check(method, type(value), field.name, f"{shown}.{field.name}", getattr(value, field.name, None))
        return
    allowed = range_of(config_class, name)
    if allowed is not None:
        check_range(f"peft_kwargs of peft_method={method.name!r}: {shown}", value, allowed)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            _check(method, None, str(key), f"{shown}.{key}", item)


def check_config(config: PeftConfig, where: str) -> None:
    """Raise `ValueError` where a number of a config that was read from `where` is none, or out of its range."""
    for field in dataclasses.fields(config):
        value, allowed = getattr(config, field.name), range_of(type(config), field.name)
        if allowed is None or value is None:
            continue
        if isinstance(value, str) and "str" not in str(field.type):
            raise ValueError(f"{where!r} has {field.name}={value!r}, which must be a number.")
        check_range(f"{where!r} has {field.name}", value, allowed)
