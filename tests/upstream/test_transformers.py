"""What transformers still does wrong, and left_trainer mends."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from torch.utils.data import SequentialSampler
from transformers import (
    DataCollatorForSeq2Seq,
    LlamaConfig,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.activations import NewGELUActivation
from transformers.models.gemma.modeling_gemma import GemmaMLP
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.glm.modeling_glm import GlmMLP
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralMLP, MistralRMSNorm
from transformers.models.mt5.modeling_mt5 import MT5DenseGatedActDense, MT5LayerNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RMSNorm
from transformers.trainer_pt_utils import EvalLoopContainer
from transformers.trainer_utils import get_last_checkpoint

from left_trainer.kernels.gated_mlp import use_fused_gated_mlp
from left_trainer.kernels.rms_norm import use_fused_rms_norm
from package_walk import home
from tiny import tiny_model, tiny_tokenizer

ROWS = Dataset.from_dict({"input_ids": [[5, 6, 7, 1], [8, 9, 1]] * 2, "labels": [[5, 6, 1], [7, 1]] * 2})
QUIET: dict[str, Any] = {"report_to": "none", "disable_tqdm": True, "save_strategy": "no", "use_cpu": True}


def make_trainer(folder: Any, **options: Any) -> Seq2SeqTrainer:
    tokenizer = tiny_tokenizer("encoder_decoder")
    return Seq2SeqTrainer(
        tiny_model("t5"),
        Seq2SeqTrainingArguments(str(folder), **{**QUIET, **options}),
        train_dataset=ROWS,
        eval_dataset=ROWS,
        processing_class=tokenizer,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
    )


@pytest.mark.parametrize("model_type", ["t5", "bart"])
def test_the_loss_ignores_the_size_of_the_accumulated_batch(model_type):
    ids = torch.tensor([[5, 6, 7, 1]])
    model = tiny_model(model_type)
    with torch.no_grad():
        mean = model(input_ids=ids, labels=ids).loss
        share = mean
        with contextlib.suppress(TypeError):
            share = model(input_ids=ids, labels=ids, num_items_in_batch=torch.tensor(8)).loss
    assert torch.equal(share, mean), (
        f"The loss of {model_type} now honours num_items_in_batch: remove {home('accumulated_token_loss')} for it."
    )


def test_generated_rows_are_padded_to_the_limit(tmp_path):
    trainer = make_trainer(tmp_path, predict_with_generate=True, generation_max_length=12)
    trainer.model.generation_config.max_length = 12
    trainer.model.generate = lambda **inputs: torch.zeros(len(inputs["input_ids"]), 3, dtype=torch.long)
    assert trainer.predict(ROWS).predictions.shape[1] == 12, (
        f"Seq2SeqTrainer no longer pads what it generates: see what is left for {home('_evaluating_parent')}."
    )


def test_rows_that_fill_the_last_batch_are_counted(tmp_path, monkeypatch):
    without_filling = []
    gather = Accelerator.gather_for_metrics
    monkeypatch.setattr(
        Accelerator,
        "gather_for_metrics",
        lambda self, data, *rest: without_filling.append(1) or gather(self, data, *rest),
    )
    Trainer.evaluate(make_trainer(tmp_path, predict_with_generate=True, generation_max_length=4))
    assert without_filling
    without_filling.clear()
    make_trainer(tmp_path, predict_with_generate=True, generation_max_length=4).evaluate()
    assert not without_filling, (
        "Seq2SeqTrainer now drops the rows that fill the last batch of several processes: see what is left for "
        f"{home('_evaluating_parent')}."
    )


def test_results_are_joined_on_the_device_with_every_batch():
    container = EvalLoopContainer()
    for rows in range(1, 4):
        container.add(torch.zeros(rows, 2))
    assert isinstance(container.tensors, torch.Tensor), (
        f"Trainer no longer joins results batch by batch on the device: remove {home('results_on_host')}."
    )


def test_beam_search_fills_rows_with_the_end_where_the_padding_is_0():
    def ends_the_first_row(row: int, tokens: torch.Tensor) -> list[int]:
        return [1] if row == 0 else list(range(20, 40))

    inputs = {"input_ids": torch.tensor([[5, 6, 1], [9, 8, 1]]), "prefix_allowed_tokens_fn": ends_the_first_row}
    model = tiny_model("t5")
    assert model.generate(**inputs, max_new_tokens=6)[0, 2:].eq(0).all()
    filling = model.generate(**inputs, max_new_tokens=6, num_beams=2)[0, 2:]
    assert len(filling) == 5
    assert filling.eq(1).all(), (
        "Beam search now fills rows with the padding token where its id is 0: count lengths by it in "
        f"{home('generated_length')} and {home('without_filling')}."
    )


def test_the_cache_of_t5_is_as_deep_as_its_encoder():
    model = tiny_model("t5", num_layers=1, num_decoder_layers=2)
    with pytest.raises(IndexError):
        model.generate(torch.arange(5, 9)[None], max_new_tokens=2, do_sample=False)


def test_the_tanh_form_of_gelu_keeps_more_than_its_input():
    kept = []
    x = torch.randn(4, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        NewGELUActivation()(x)
    assert len(kept) > 1, f"transformers' NewGELUActivation is now one operation: remove {home('FusedNewGELU')}."
    torch.testing.assert_close(NewGELUActivation()(x), torch.nn.functional.gelu(x, approximate="tanh"))


def test_rms_norms_keep_more_than_their_input():
    kept = []
    x = torch.randn(4, 8, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        LlamaRMSNorm(8)(x)
    large = {tensor.data_ptr() for tensor in kept if tensor.shape == x.shape}
    assert len(large) > 1, f"transformers' LlamaRMSNorm keeps its input alone: remove {home('rms_norm')}."


def test_models_copy_the_rms_norms_of_four():
    for copied in (MistralRMSNorm, Qwen3RMSNorm, MT5LayerNorm, Gemma2RMSNorm, GptOssRMSNorm):
        model = torch.nn.Sequential(copied(8))
        use_fused_rms_norm(model, True)
        assert type(model[0]) is not copied, f"{copied.__name__} is another now: see {home('use_fused_rms_norm')}."


def test_models_copy_the_gated_mlps_of_three():
    config = LlamaConfig(hidden_size=8, intermediate_size=8, num_attention_heads=2)
    config.d_model, config.d_ff, config.dense_act_fn, config.dropout_rate = 8, 8, "silu", 0.0
    for copied in (MistralMLP, Qwen3MLP, GemmaMLP, GlmMLP, MT5DenseGatedActDense):
        model = torch.nn.Sequential(copied(config))
        use_fused_gated_mlp(model, True)
        assert type(model[0]) is not copied, f"{copied.__name__} is another now: see {home('use_fused_gated_mlp')}."


def test_evaluation_rows_are_permuted_with_those_of_training(tmp_path):
    trainer = make_trainer(tmp_path, train_sampling_strategy="group_by_length")
    assert not isinstance(trainer._get_eval_sampler(ROWS), SequentialSampler), (
        f"Trainer now keeps the order of evaluation rows: remove {home('sequential_sampler')}."
    )


def test_bf16_on_a_cpu_has_to_be_asked_for(tmp_path):
    if torch.accelerator.is_available():
        pytest.skip("there is an accelerator")
    is_refused = False
    try:
        TrainingArguments(str(tmp_path), bf16=True)
    except ValueError:
        is_refused = True
    assert is_refused, (
        f"transformers now takes bf16=True on a CPU: remove use_cpu from {home('LeftTrainingArguments')}."
    )


def test_the_name_of_a_deprecated_field_is_warned_of(tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        TrainingArguments(str(tmp_path), gradient_checkpointing=True)
    assert any("gradient_checkpointing" in str(warning.message) for warning in caught), (
        f"transformers no longer warns of gradient_checkpointing: keep the field in {home('from_arguments')}."
    )


def test_the_id_that_pads_labels_cannot_be_decoded():
    is_refused = False
    try:
        tiny_tokenizer("encoder_decoder").batch_decode([[5, -100]])
    except OverflowError:
        is_refused = True
    assert is_refused, f"Tokenizers now decode -100: remove the ids put in its place by {home('decode')}."


def test_a_checkpoint_that_was_cut_off_is_taken_for_the_last(tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    assert get_last_checkpoint(str(tmp_path)), (
        f"transformers now passes over checkpoints that were cut off: remove {home('why_not_resumable')}."
    )


def test_a_finished_run_that_is_resumed_trains_one_more_step(tmp_path):
    """Where its last step is not the last of an epoch."""
    options = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1, "per_device_train_batch_size": 2}
    make_trainer(tmp_path, **options).train()
    again = make_trainer(tmp_path, **options)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == 2, (
        f"Trainer now ends where a resumed run has no steps left: remove {home('_run_epoch')}."
    )


def test_folders_named_like_a_checkpoint_are_removed(tmp_path):
    (tmp_path / "checkpoint-1-mine").mkdir()
    options = {"max_steps": 1, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    best = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": "loss"}
    make_trainer(tmp_path, **options, **best).train()
    assert not (tmp_path / "checkpoint-1-mine").exists(), (
        f"Trainer now removes checkpoints alone: remove {home('_finalize_training')}."
    )


def test_a_checkpoint_without_optimizer_is_continued(tmp_path):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "save_only_model": True}
    make_trainer(tmp_path, **options).train()
    make_trainer(tmp_path, **options).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    # Reached without an error: refuse less in why_not_resumable once Trainer refuses by itself.
    assert (tmp_path / "checkpoint-2").is_dir(), f"Trainer now refuses: look at {home('why_not_resumable')}."


def test_several_gpus_in_one_process_are_wrapped_in_data_parallel(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.args._n_gpu = 2
    assert isinstance(trainer._wrap_model(trainer.model), torch.nn.DataParallel), (
        f"Trainer no longer uses nn.DataParallel: remove {home('check_devices')}."
    )


def test_trackers_are_called_before_the_callbacks_of_the_user(tmp_path, monkeypatch):
    class Tracker(TrainerCallback): ...

    class OfUser(TrainerCallback): ...

    monkeypatch.setattr("transformers.trainer.get_reporting_integration_callbacks", lambda report_to: [Tracker])
    trainer = Trainer(tiny_model("t5"), TrainingArguments(str(tmp_path), **QUIET), callbacks=[OfUser()])
    kinds = [type(callback) for callback in trainer.callback_handler.callbacks]
    assert kinds.index(Tracker) < kinds.index(OfUser), (
        f"Trainer now calls its trackers after the user's callbacks: see what is left for {home('LoggingCallback')}."
    )


def test_a_loss_that_is_not_a_number_is_logged_as_0(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1, logging_steps=1)
    trainer.compute_loss = lambda model, inputs, **_: model(**inputs).loss * float("nan")
    trainer.train()
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == [0.0], f"Trainer no longer hides a loss that is not a number: look at {home('DivergenceCheck')}."


def test_labels_are_padded_on_the_side_of_the_sources():
    tokenizer = tiny_tokenizer("encoder_decoder")
    tokenizer.padding_side = "left"
    labels = DataCollatorForSeq2Seq(tokenizer)([ROWS[0], ROWS[1]])["labels"]
    assert labels[1].tolist() == [-100, 7, 1], (
        f"Labels are now padded on the right in any case: simplify {home('corrected_collator')}."
    )


@pytest.mark.parametrize("model_type", ["t5", "bart"])
def test_noise_is_put_where_t5_and_bart_do_not_compute(model_type):
    model, called = tiny_model(model_type), []
    model.get_input_embeddings().register_forward_hook(lambda *_: called.append(True))
    ids = torch.tensor([[5, 6, 7, 1]])
    model(input_ids=ids, labels=ids)
    assert not called, (
        f"{model_type} now calls its input embeddings, so that Trainer's NEFTune works: see {home('NeftuneCallback')}."
    )
