"""Which of the two families a model belongs to."""

from __future__ import annotations

from typing import Literal, get_args

from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
)

ModelFamily = Literal["encoder_decoder", "decoder_only"]
# Causal by their class, while each token sees those after it unless the caller passes a mask of permutations.
BIDIRECTIONAL_TYPES = ("xlnet",)
FAMILIES: tuple[ModelFamily, ...] = get_args(ModelFamily)


def model_family(model: PreTrainedModel | PeftModel | PreTrainedConfig) -> ModelFamily:
    """`encoder_decoder` or `decoder_only`, from the model's class or, before it is loaded, from its config.

    Raises `ValueError` for any other kind of model. An encoder-only model is such a one: a causal head on a
    bidirectional encoder would train on an objective in which each token sees itself.
    """
    if isinstance(model, PeftModel):
        model = model.get_base_model()
    if isinstance(model, PreTrainedConfig):
        config, class_names = model, _loaded_class_names(model)
    else:
        config, class_names = model.config, {cls.__name__ for cls in type(model).__mro__}
    if class_names & set(MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES.values()):
        return "encoder_decoder"
    encoder_only = config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, "is_decoder", False)
    sees_all = encoder_only or config.model_type in BIDIRECTIONAL_TYPES
    if class_names & set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()) and not sees_all:
        return "decoder_only"
    name = getattr(config, "_name_or_path", "") or config.model_type
    kind = "neither an encoder-decoder nor a decoder-only language model"
    if sees_all:
        kind = "an encoder-only model" if encoder_only else "a model whose tokens see those that follow"
    raise ValueError(
        f"model={name!r} ({'/'.join(sorted(config.architectures or [config.model_type]))}) is {kind}. "
        "LeftTrainer fine-tunes models that generate text: pass one that loads with `AutoModelForSeq2SeqLM` (T5, BART, "
        "Marian, ...) or `AutoModelForCausalLM` (GPT-2, Llama, Qwen, ...)."
    )


def _loaded_class_names(config: PreTrainedConfig) -> set[str]:
    """Names of the classes that the auto classes would choose for `config`, encoder-decoder ones first."""
    remote = set(getattr(config, "auto_map", None) or {})
    for auto_class, names in (
        ("AutoModelForSeq2SeqLM", MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
        ("AutoModelForCausalLM", MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    ):
        chosen = names.get(config.model_type)
        if chosen is not None:
            return {chosen} if isinstance(chosen, str) else set(chosen)
        if auto_class in remote:
            # Any member of the mapping says the same: this model's own class is known only once its code has run.
            return {next(iter(names.values()))}
    return set()


def auto_class(family: ModelFamily) -> type[AutoModelForSeq2SeqLM] | type[AutoModelForCausalLM]:
    return AutoModelForSeq2SeqLM if family == "encoder_decoder" else AutoModelForCausalLM
