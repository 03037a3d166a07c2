"""What `use_linear_cross_entropy` does not cover runs on full logits, is the same, and is named."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForSeq2SeqLM,
    DataCollatorForSeq2Seq,
    T5Config,
    T5ForConditionalGeneration,
    set_seed,
)
from transformers.trainer_pt_utils import LabelSmoother

from left_trainer import LeftTrainer, get_task
from left_trainer.models import model_family
from left_trainer.runs.build_report import build_report
from left_trainer.runs.report import FastPathUse
from log_history import losses
from tiny import TINY_BART, TINY_T5, VOCABULARY_SIZE, tiny_model


def run(model, rows, make_args, tokenizers, fast, trainer_options=None, **arguments):
    args = make_args(
        use_linear_cross_entropy=fast, max_steps=3, learning_rate=1e-3, overwrite_output_dir=True, **arguments
    )
    trainer = LeftTrainer(
        model,
        args,
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tokenizers[model_family(model)],
        **(trainer_options or {}),
    )
    trainer.train()
    return trainer


def assert_falls_back(make_model, reason, rows, make_args, tokenizers, **arguments):
    """The same losses as with the switch off, to the last bit, and the reason in what the report shows."""
    ours, plain = (run(make_model(), rows, make_args, tokenizers, fast, **arguments) for fast in (True, False))
    assert losses(ours) == losses(plain)
    assert losses(ours)[0] != losses(ours)[-1]
    assert ours.fast_paths["linear_cross_entropy"].report() == {"ran": 0, "fell_back": {reason: 3}}


def other_model(model_type, **options):
    config = AutoConfig.for_model(model_type, vocab_size=VOCABULARY_SIZE, **options)
    set_seed(0)
    return AutoModelForSeq2SeqLM.from_config(config)


class UsersT5(T5ForConditionalGeneration):
    """Could do anything with its logits."""


def users_t5():
    set_seed(0)
    return UsersT5(T5Config(vocab_size=VOCABULARY_SIZE, dropout_rate=0.0, **TINY_T5))


def hooked_head():
    model = tiny_model("t5", tie_word_embeddings=False)
    model.lm_head.register_forward_hook(lambda module, args, logits: 2 * logits)
    return model


PROPHETNET = {
    "hidden_size": 16,
    "num_encoder_layers": 1,
    "num_decoder_layers": 1,
    "num_encoder_attention_heads": 2,
    "num_decoder_attention_heads": 2,
    "encoder_ffn_dim": 32,
    "decoder_ffn_dim": 32,
    "decoder_start_token_id": 0,
    "dropout": 0.0,
    "attention_dropout": 0.0,
    "activation_dropout": 0.0,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
ROUTED = {"num_experts": 2, "encoder_sparse_step": 1, "decoder_sparse_step": 1, "expert_capacity": 64}
LORA_ON_HEAD = {"peft_kwargs": {"target_modules": ["q", "lm_head"]}}
SAVED_HEAD = {"peft_kwargs": {"target_modules": ["q"], "modules_to_save": ["lm_head"]}}
CASES = {
    "n-gram loss": (
        lambda: other_model("prophetnet", **PROPHETNET),
        "the head of model type 'prophetnet' is not known",
        {"peft_kwargs": {"target_modules": ["query_proj"]}},
    ),
    "router loss": (
        lambda: other_model(
            "nllb-moe", **TINY_BART, **ROUTED, dropout=0.0, router_jitter_noise=0.0, output_router_logits=True
        ),
        "the model adds the loss of its routers",
        {},
    ),
    "user's class": (users_t5, "UsersT5 is not a class of transformers", {}),
    "hooks on the head": (hooked_head, "the output head has hooks", {}),
    "LoRA on the head": (lambda: tiny_model("mt5"), "the output head has an adapter", LORA_ON_HEAD),
    "saved head": (
        lambda: tiny_model("mt5"),
        "the output head is a ModulesToSaveWrapper, not torch's Linear",
        SAVED_HEAD,
    ),
    "tokens of a tied head": (
        lambda: tiny_model("t5"),
        "the output head has an adapter",
        {"peft_kwargs": {"target_modules": ["q"], "trainable_token_indices": [3, 4]}},
    ),
    "two-part loss of TRL": (lambda: tiny_model("llama"), "loss_type='dft'", {"loss_type": "dft"}),
    "loss of the method": (lambda: tiny_model("llama"), "peft_method='cpt' computes the loss", {"peft_method": "cpt"}),
}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("case", CASES)
def test_falls_back(case, rows, make_args, tokenizers):
    make_model, reason, arguments = CASES[case]
    assert_falls_back(make_model, reason, rows, make_args, tokenizers, **arguments)


def test_a_loss_of_the_user(rows, make_args, tokenizers):
    def compute_loss_func(outputs, labels, num_items_in_batch=None):
        return torch.nn.functional.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten().clamp(min=0))

    # Trainer then hides the labels from the model, so that the collator has to make the decoder's input.
    collator = DataCollatorForSeq2Seq(tokenizers["encoder_decoder"], model=tiny_model("t5"))
    options = {"compute_loss_func": compute_loss_func, "data_collator": collator}
    reason = "compute_loss_func computes the loss"
    assert_falls_back(lambda: tiny_model("t5"), reason, rows, make_args, tokenizers, trainer_options=options)


def test_a_label_smoother_of_the_user(rows, make_args, tokenizers):
    class OwnSmoother(LabelSmoother):
        def __call__(self, *args, **kwargs):
            return 2 * super().__call__(*args, **kwargs)

    found = []
    for fast in (True, False):
        args = make_args(use_linear_cross_entropy=fast, max_steps=3, overwrite_output_dir=True)
        trainer = LeftTrainer(
            tiny_model("bart"), args, train_dataset=rows, processing_class=tokenizers["encoder_decoder"]
        )
        trainer.label_smoother = OwnSmoother()
        trainer.train()
        found.append((losses(trainer), trainer.fast_paths["linear_cross_entropy"].fell_back))
    assert found[0][0] == found[1][0]
    assert found[0][1] == {"the label smoother is not Hugging Face's": 3}


@pytest.mark.filterwarnings("ignore:`return_outputs=True`")
@pytest.mark.parametrize("model_type", ["t5", "llama"])
def test_metrics_over_logits_get_logits(model_type, rows, make_args, tokenizers):
    def compute_metrics(prediction):
        logits = prediction.predictions[0] if model_type == "t5" else prediction.predictions
        return {"rows": float(len(logits)), "words": float(logits.shape[-1])}

    trainer = run(
        tiny_model(model_type), rows, make_args, tokenizers, True, trainer_options={"compute_metrics": compute_metrics}
    )
    metrics = trainer.evaluate()
    assert metrics["eval_rows"] == len(rows)
    assert metrics["eval_words"] == VOCABULARY_SIZE
    assert trainer.fast_paths["linear_cross_entropy"].report() == {
        "ran": 3,
        "fell_back": {"the logits are asked for": 2},
    }
    trainer.compute_metrics = None
    assert trainer.evaluate()["eval_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-5)
    assert trainer.fast_paths["linear_cross_entropy"].ran == 5


def test_evaluation_with_generation_takes_its_loss_without_logits(rows, make_args, tokenizers):
    found = []
    for fast in (True, False):
        trainer = run(tiny_model("t5"), rows, make_args, tokenizers, fast, predict_with_generate=True)
        found.append(trainer.evaluate())
        used = trainer.fast_paths["linear_cross_entropy"]
        fell_back = sum(used.fell_back.values())
        assert used.ran + fell_back >= 4  # batches
        assert (used.ran if fast else fell_back) == used.ran + fell_back
    assert found[0]["eval_loss"] == pytest.approx(found[1]["eval_loss"], rel=1e-5)
    assert found[0]["eval_chrf"] == found[1]["eval_chrf"]


def test_a_call_without_labels_or_outside_of_the_loss_is_left_alone(rows, make_args, tokenizers):
    trainer = run(tiny_model("t5"), rows, make_args, tokenizers, True)
    base = trainer.model.get_base_model()
    assert "forward" not in vars(base)
    assert "forward" not in vars(base.lm_head)
    ids = torch.tensor([[5, 6, 1]])
    assert trainer.model(input_ids=ids, decoder_input_ids=ids).logits.shape == (1, 3, VOCABULARY_SIZE)


def test_the_report_names_what_ran_and_what_did_not(rows, make_args, tokenizers):
    trainer = run(tiny_model("t5"), rows, make_args, tokenizers, True)
    batch = trainer._prepare_inputs(next(iter(trainer.get_train_dataloader())))
    trainer.compute_loss(trainer.model, batch, return_outputs=True)
    paths = build_report(trainer, get_task("summarization"), None, None).fast_paths
    assert paths["linear_cross_entropy"] == FastPathUse(ran=3, fell_back={"the logits are asked for": 1})
    # Calls of layers: query and value of six attentions, in four passes.
    assert paths["lora_linear"] == FastPathUse(ran=12 * 4, fell_back={})
