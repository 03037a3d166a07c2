"""What PEFT's soft prompts still do wrong, and left_trainer mends."""

from __future__ import annotations

import contextlib

import pytest
import torch
from peft import (
    AdaptionPromptConfig,
    CPTConfig,
    MultitaskPromptTuningConfig,
    PeftModel,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from safetensors.torch import load_file

from package_walk import home
from tiny import tiny_model

SOURCE = torch.tensor([[5, 6, 7, 8]])


def prompt_tuned(model_type: str) -> PeftModel:
    """A model with prompts large enough to be noticed."""
    task = "SEQ_2_SEQ_LM" if model_type == "t5" else "CAUSAL_LM"
    model = get_peft_model(tiny_model(model_type), PromptTuningConfig(task_type=task, num_virtual_tokens=4)).eval()
    torch.nn.init.normal_(model.prompt_encoder["default"].embedding.weight, std=30)
    return model


def test_disable_adapter_leaves_generate_as_it_is():
    model = prompt_tuned("t5")
    with model.disable_adapter():
        disabled = model.generate(input_ids=SOURCE, max_new_tokens=6)
    base = model.get_base_model().generate(input_ids=SOURCE, max_new_tokens=6)
    assert not torch.equal(disabled, base), (
        f"peft's disable_adapter now holds for generate too: remove the other generate of {home('adapter_disabled')}."
    )


def test_virtual_tokens_stand_before_the_padding():
    model = prompt_tuned("gpt2")
    padding = torch.zeros(1, 3, dtype=torch.long)
    padded = {
        "input_ids": torch.cat([padding, SOURCE], dim=1),
        "attention_mask": torch.cat([padding, torch.ones_like(SOURCE)], dim=1),
    }

    def is_continued_alike(continued: torch.nn.Module) -> bool:
        alone = continued.generate(input_ids=SOURCE, attention_mask=torch.ones_like(SOURCE), max_new_tokens=8)
        return torch.equal(alone[0, -8:], continued.generate(**padded, max_new_tokens=8)[0, -8:])

    with pytest.warns(UserWarning, match="Position ids are not supported"):
        assert not is_continued_alike(model), (
            "peft now continues a padded prompt as the prompt alone: let it generate from embedding prompts in "
            f"{home('_generate_padded')}."
        )
    assert is_continued_alike(model.get_base_model())


def test_generate_leaves_out_the_prompts_of_the_decoder():
    config = MultitaskPromptTuningConfig(
        task_type="SEQ_2_SEQ_LM", num_virtual_tokens=4, num_tasks=1, num_transformer_submodules=2
    )
    model = get_peft_model(tiny_model("t5"), config).eval()
    of_decoder = model.prompt_encoder["default"].embedding.weight[4:]
    inputs = {"input_ids": SOURCE, "task_ids": torch.zeros(1, dtype=torch.long)}
    with torch.no_grad():
        before = model.generate(**inputs, max_new_tokens=6), model(**inputs, labels=SOURCE).loss
        of_decoder.normal_(std=30)
        after = model.generate(**inputs, max_new_tokens=6), model(**inputs, labels=SOURCE).loss
    assert before[1] != after[1]
    assert torch.equal(before[0], after[0]), (
        "peft's generate now reads the prompts of the decoder: allow num_transformer_submodules=2 in "
        f"{home('derive_input_prompt')}."
    )


def test_prompts_stand_beside_embeddings_of_another_table():
    model = tiny_model("own_table")
    inputs = {"input_ids": SOURCE, "labels": SOURCE}
    with torch.no_grad():
        expected = model(**inputs).loss
        prompted = get_peft_model(model, PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=0))
        assert (prompted(**inputs).loss - expected).abs() > 1e-4, (
            f"peft now embeds ids as the encoder does: let get_peft_model alone wrap models in {home('wrap')}."
        )


def test_multitask_prompts_drop_the_inputs_of_the_decoder():
    config = MultitaskPromptTuningConfig(
        task_type="SEQ_2_SEQ_LM", num_virtual_tokens=4, num_tasks=1, num_transformer_submodules=1
    )
    model, seen = get_peft_model(tiny_model("t5"), config), []
    model.get_base_model().register_forward_pre_hook(
        lambda base, args, kwargs: seen.append(kwargs.get("decoder_input_ids")), with_kwargs=True
    )
    with contextlib.suppress(ValueError):  # of the model, which misses them
        model(input_ids=SOURCE, decoder_input_ids=SOURCE, task_ids=torch.zeros(1, dtype=torch.long))
    assert seen == [None], (
        f"peft now hands on what the decoder reads: remove the decoder's inputs from {home('KEPT_INPUTS')}."
    )


def test_prefixes_are_shaped_by_the_encoder():
    def take_a_step(**shape: int) -> None:
        config = PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=4, **shape)
        get_peft_model(tiny_model("t5"), config)(input_ids=SOURCE, labels=SOURCE)

    take_a_step(num_layers=2, num_attention_heads=2, token_dim=24)  # two heads of 12, in a model of 16
    works = False
    with contextlib.suppress(RuntimeError):
        take_a_step()
        works = True
    assert not works, (
        f"peft now reads the shape of a decoder's cache from its config: remove {home('decoder_key_value_shape')}."
    )


def test_a_soft_prompt_is_not_loaded_for_training(tmp_path):
    prompt_tuned("llama").save_pretrained(tmp_path)
    PeftModel.from_pretrained(tiny_model("llama"), tmp_path)
    refused = False
    try:
        PeftModel.from_pretrained(tiny_model("llama"), tmp_path, is_trainable=True)
    except ValueError:
        refused = True
    assert refused, (
        f"peft now loads soft prompts for training: let PeftModel.from_pretrained do it in {home('_with_adapter')}."
    )


def test_an_encoder_of_prompts_is_not_saved(tmp_path):
    config = PromptEncoderConfig(task_type="CAUSAL_LM", num_virtual_tokens=4, encoder_hidden_size=8)
    get_peft_model(tiny_model("llama"), config).save_pretrained(tmp_path)
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == {"prompt_embeddings"}, (
        f"peft now saves more of P-tuning than its prompts: see if {home('collect_prompt_encoder')} can leave it out."
    )


def test_the_loss_of_cpt_is_the_mean_of_a_micro_batch():
    config = CPTConfig(
        task_type="CAUSAL_LM", cpt_token_ids=[5, 6, 7], cpt_mask=[1, 1, 1], cpt_tokens_type_mask=[2, 2, 4]
    )
    model = get_peft_model(tiny_model("llama"), config).eval()
    inputs = {"input_ids": SOURCE, "labels": SOURCE, "attention_mask": torch.ones_like(SOURCE)}
    with torch.no_grad():
        mean = model(**inputs).loss
        try:
            share = model(**inputs, num_items_in_batch=8).loss
        except TypeError:
            share = mean
    assert torch.equal(share, mean), f"peft's CPT now honours num_items_in_batch: remove {home('context_loss')}."


def test_adaption_prompts_keep_the_forward_of_the_model_that_was_wrapped():
    model = tiny_model("llama")
    wrapped = get_peft_model(model, AdaptionPromptConfig(task_type="CAUSAL_LM", adapter_len=2, adapter_layers=1))
    calls, forward = [], model.forward
    model.forward = lambda **inputs: calls.append(inputs) or forward(**inputs)
    wrapped(input_ids=SOURCE)
    assert not calls, f"peft's adaption prompts now call the model as it is: remove prepare={home('call_inner_model')}."


def test_a_prefix_is_counted_among_the_tokens_of_routers():
    config = PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = get_peft_model(tiny_model("mixtral", output_router_logits=True), config)
    inputs = {"input_ids": SOURCE, "attention_mask": torch.ones_like(SOURCE), "labels": SOURCE}
    try:
        model(**inputs)
    except RuntimeError:
        return
    pytest.fail(
        "transformers now balances experts behind a prefix: let prefixes train with it, and remove "
        f"{home('counts_prefixes_as_routed')}."
    )
