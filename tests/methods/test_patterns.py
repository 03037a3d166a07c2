"""What a config names has to be in the model: modules, parameters, layers, tokens."""

from __future__ import annotations

import dataclasses

import pytest
from peft import LoraConfig, TrainableTokensConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from left_trainer import apply_method, list_methods
from left_trainer.methods.apply import apply_config
from left_trainer.methods.options import known_options
from left_trainer.methods.patterns import BY_TARGET, LAYERS, MODULES, PARAMETERS, TOKENS, check_patterns
from tiny import tiny_model

CHECKED = {*MODULES, *PARAMETERS, *BY_TARGET, *TOKENS, *LAYERS}
# Fields whose names look alike and that PEFT checks itself, or that name nothing in the model.
OTHERS = {
    "adapter_layers", "alora_invocation_tokens", "asa_target_subspaces", "block_share", "block_size", "boft_block_num",
    "boft_block_size", "cpt_tokens_type_mask", "drop_layers", "encoder_num_layers", "encoder_reparameterization_type",
    "init_lora_weights", "input_module", "layer_replication", "layers", "layerwise_scalings", "module_dropout",
    "norm_module", "num_frozen_tokens",
    "num_layers", "num_transformer_submodules", "num_virtual_tokens", "oft_block_size", "proportional_parameters",
    "save_indices", "save_precomputed_indices", "shadow_num_hidden_layers", "stack", "target_r", "target_svd_config",
    "token_dim", "tokenizer_kwargs", "tokenizer_name_or_path",
}  # fmt: skip
LOOKS = ("module", "layer", "pattern", "param", "token", "indices", "target", "exclude", "block")
# A value for each option that names nothing in a Llama, and what is said about it.
WRONG = {
    **dict.fromkeys(MODULES, (["q_proj", "w_typo"], "w_typo")),
    "target_parameters": (["experts.typo"], "experts.typo"),
    **dict.fromkeys(BY_TARGET, ({"w_typo": 4}, "w_typo")),
    "trainable_token_indices": ([5, 300], "300, and the embeddings have the tokens 0 to 299"),
    "token_indices": ([5, 300], "300, and the embeddings have the tokens 0 to 299"),
    "cpt_token_ids": ([5, 300], "300, and the embeddings have the tokens 0 to 299"),
    "layers_to_transform": ([0, 7], "7, and no target is in a layer of that number. Layers with targets: 0, 1"),
    "layers_pattern": ("blocks", "blocks"),
}


def test_every_option_that_names_something_is_known():
    fields = {
        field.name
        for config in (*PEFT_TYPE_TO_CONFIG_MAPPING.values(),)
        for field in dataclasses.fields(config)
        if any(look in field.name for look in LOOKS)
    }
    assert fields - OTHERS - CHECKED == set()
    assert set(WRONG) == CHECKED


@pytest.mark.parametrize(
    ("method", "option"),
    [(method.name, option) for method in list_methods() for option in sorted(CHECKED & set(known_options(method)))],
)
def test_an_option_that_names_nothing_is_refused(method, option):
    """On the config, which is where options, an explicit config and defaults meet."""
    record = next(record for record in list_methods() if record.name == method)
    wrong, message = WRONG[option]
    config = record.config_class.__new__(record.config_class)
    values = {"target_modules": ["q_proj", "v_proj"]}
    for field in dataclasses.fields(record.config_class):
        setattr(config, field.name, values.get(field.name))
    check_patterns(tiny_model("llama"), config)
    setattr(config, option, wrong)
    with pytest.raises(ValueError, match=f"{option} has .*{message}"):
        check_patterns(tiny_model("llama"), config)


@pytest.mark.parametrize(
    ("options", "trained"),
    [
        ({"layers_to_transform": [1]}, {"1"}),
        ({"layers_to_transform": 0, "layers_pattern": "layers"}, {"0"}),
        ({"exclude_modules": r".*layers\.0\..*"}, {"1"}),
        ({"rank_pattern": {"q_proj": 2}, "alpha_pattern": {r"layers\.\d+\.self_attn\.v_proj": 3}}, {"0", "1"}),
        ({"trainable_token_indices": {"embed_tokens": [0, 299]}}, {"0", "1"}),
        ({"target_modules": ["q_proj"], "target_parameters": ["mlp.up_proj.weight"]}, {"0", "1"}),
    ],
)
def test_what_is_there_is_trained(options, trained):
    model = apply_config(tiny_model("llama"), LoraConfig(task_type="CAUSAL_LM", r=4, **options))
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad and ".layers." in name]
    assert {name.partition(".layers.")[2].partition(".")[0] for name in names} == trained


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoraConfig(exclude_modules=["up_proj"]), "excludes nothing"),
        (LoraConfig(trainable_token_indices={"embed_typo": [1]}), "embed_typo"),
        (LoraConfig(trainable_token_indices=[-1]), "-1"),
    ],
)
def test_a_config_of_a_user(config, message):
    with pytest.raises(ValueError, match=message):
        apply_config(tiny_model("llama"), config)


def test_embeddings_that_are_not_read_are_no_target():
    """BART keeps its shared embeddings where encoder and decoder have their own."""
    model = tiny_model("bart", tie_word_embeddings=False)
    for config in (LoraConfig(target_modules=["shared"]), LoraConfig(modules_to_save=["shared"])):
        with pytest.raises(ValueError, match=r"encoder\.embed_tokens and decoder\.embed_tokens"):
            apply_config(model, config)
    with pytest.raises(ValueError, match="encoder and decoder have their own"):
        apply_config(model, LoraConfig(trainable_token_indices=[1]))
    with pytest.raises(ValueError, match="are not read"):
        apply_config(model, TrainableTokensConfig(target_modules=["shared"], token_indices=[1]))
    trained = apply_method(model, "trainable_tokens", {"token_indices": [5]})
    assert trained.applied_method.matched_modules == ("model.encoder.embed_tokens", "model.decoder.embed_tokens")
