"""`neftune_noise_alpha` puts noise on the input of every model type, with every kind of method."""

from __future__ import annotations

import pytest
import torch
from transformers import TrainerCallback

from left_trainer import LeftTrainer
from left_trainer.models import InputEmbeddings, model_family
from left_trainer.trainer.neftune import input_tables
from log_history import losses
from tiny import CONFIGS, EMBEDDING_CONFIGS, ENCODER_DECODER_TYPES, TINY, tiny_model

ALPHA = 5.0
TARGETS = {"mamba": ["in_proj"]}  # of LoRA, where there are no default ones
# Marian's head keeps its old size (transformers 5.23).
RESIZED = tuple(f"{model_type}, resized" for model_type in ENCODER_DECODER_TYPES if model_type != "marian")


def model_of(shape):
    model_type, _, is_resized = shape.partition(", ")
    model = tiny_model(model_type)
    if is_resized:  # encoder and decoder then call one module
        model.resize_token_embeddings(301)
    return model


class Watch(TrainerCallback):
    """Keeps what the last of the modules that embed the input returns, with the noise."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        word_embeddings = getattr(model, "word_embeddings", None)
        self.readers = [word_embeddings] if isinstance(word_embeddings, InputEmbeddings) else input_tables(model)
        self.calls = []
        self.hooks = [reader.register_forward_hook(self.keep) for reader in self.readers]

    def keep(self, reader, inputs, output):
        self.calls.append((reader, inputs[0], output.detach().clone()))

    def noise(self):
        """Of each call that read more than padding, as a part of the largest that the paper allows."""
        for hook in self.hooks:
            hook.remove()
        found = []
        for reader, ids, output in self.calls:
            scale = float(torch.tensor([float(factor) for factor in getattr(reader, "factors", ())]).prod())
            bound = ALPHA / (output.shape[-2] * output.shape[-1]) ** 0.5 * scale
            largest = float((output - reader(ids).detach()).abs().max()) / bound
            if largest > 0 and ids.ne(TINY["pad_token_id"]).any():
                found.append(largest)
        return found


@pytest.mark.parametrize("model_type", [*{**CONFIGS, **EMBEDDING_CONFIGS}, *RESIZED])
@pytest.mark.parametrize("method", ["lora", "prompt_tuning"])
def test_noise_is_added_once(model_type, method, rows, make_args, tokenizers):
    results, noise = {}, {}
    options = {"target_modules": TARGETS[model_type]} if method == "lora" and model_type in TARGETS else {}
    for alpha in (None, ALPHA):
        model, watch = model_of(model_type), Watch()
        args = make_args(
            peft_method=method, peft_kwargs=options, neftune_noise_alpha=alpha, max_steps=1, learning_rate=1e-9
        )
        tokenizer = tokenizers[model_family(model)]
        trainer = LeftTrainer(model, args, train_dataset=rows, processing_class=tokenizer, callbacks=[watch])
        trainer.train()
        results[alpha], noise[alpha] = losses(trainer)[0], watch.noise()
        assert not any(module._forward_hooks for module in (*input_tables(trainer.model), *watch.readers))
    assert noise == {None: [], ALPHA: [pytest.approx(0.98, abs=0.0201)]}
    assert results[ALPHA] != pytest.approx(results[None], abs=1e-7)


def test_a_model_that_calls_no_embedding_is_refused(rows, make_args, tokenizers):
    model = tiny_model("llama")
    forward, weight = model.model.forward, model.model.embed_tokens.weight

    def with_a_function(input_ids=None, inputs_embeds=None, **inputs):
        return forward(inputs_embeds=torch.nn.functional.embedding(input_ids, weight), **inputs)

    model.model.forward = with_a_function
    args = make_args(neftune_noise_alpha=5.0, max_steps=1, peft_method="full")
    trainer = LeftTrainer(model, args, train_dataset=rows, processing_class=tokenizers["decoder_only"])
    with pytest.raises(RuntimeError, match="neftune_noise_alpha=5 has no effect"):
        trainer.train()
