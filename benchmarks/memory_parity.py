"""Hold plans against the bytes of tensors that torch's profiler records: `python benchmarks/memory_parity.py`.

Trains T5, BART, Llama and GPT-2 of some millions of parameters, made from configs, with LoRA and in full, under several
settings, and generates with them. The profiler sees every block that torch's allocator for this CPU hands out, those
inside kernels too.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset
from torch.profiler import ProfilerActivity, profile
from transformers import (
    BartConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    T5Config,
    TrainerCallback,
)
from transformers.trainer_callback import PrinterCallback
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from left_trainer import MODEL_PATHS, LeftTrainer, LeftTrainingArguments, load_tokenizer, plan_training
from left_trainer.models import auto_class, model_family
from left_trainer.planning.rehearsal import BatchShape

MIB = 2**20
VOCABULARY = 8192
SPECIAL = {"pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0}
MODELS: dict[str, PreTrainedConfig] = {
    "t5": T5Config(d_model=256, d_ff=1024, num_layers=4, num_heads=4, vocab_size=VOCABULARY, **SPECIAL),
    "bart": BartConfig(
        d_model=256,
        encoder_layers=4,
        decoder_layers=4,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=1024,
        decoder_ffn_dim=1024,
        vocab_size=VOCABULARY,
        forced_eos_token_id=None,
        **SPECIAL,
    ),
    "llama": LlamaConfig(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=512,
        pad_token_id=0,
        eos_token_id=1,
    ),
    "gpt2": GPT2Config(
        n_embd=256, n_layer=4, n_head=4, vocab_size=VOCABULARY, n_positions=512, bos_token_id=1, eos_token_id=1
    ),
}
SETTINGS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bf16": {"bf16": True},
    "checkpointing": {"gradient_checkpointing": True},
    "accumulation 4": {"gradient_accumulation_steps": 4},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "full": {"peft_method": "full"},
    "generation": {
        "predict_with_generate": True,
        "generation_max_length": 48,
        "generation_num_beams": 2,
        "eval_loss_with_generation": False,
    },
}
SHAPE = BatchShape(rows=4, source=160, target=32)
SMALL = BatchShape(rows=2, source=48, target=16)


@dataclass(frozen=True)
class Row:
    """Bytes of a case, planned and measured."""

    model: str
    setting: str
    planned: int
    measured: int

    @property
    def error(self) -> float:
        return self.planned / self.measured - 1


class StepProfile(TrainerCallback):
    """Profiles the second step, in which the optimizer has its state."""

    def __init__(self) -> None:
        self.peak_bytes = 0

    def on_step_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Start, beside what is there."""
        if state.global_step == 1:
            inner = getattr(optimizer, "optimizer", optimizer)
            states = [value for each in inner.state.values() for value in each.values()]
            self.resident = resident_bytes(model) + bytes_of(states)
            self.profiler = memory_profiler()
            self.profiler.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop."""
        if state.global_step == 2:
            self.profiler.__exit__(None, None, None)
            self.peak_bytes = self.resident + most_allocated(self.profiler)


def memory_profiler() -> Any:
    return profile(activities=[ProfilerActivity.CPU], profile_memory=True)


def most_allocated(profiler: Any) -> int:
    """The largest sum of what was allocated and not given back yet."""
    total = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            total += event.nbytes()
            most = max(most, total)
    return most


def bytes_of(tensors: Any) -> int:
    """Of distinct storages."""
    found = {tensor.untyped_storage().data_ptr(): tensor for tensor in tensors if isinstance(tensor, torch.Tensor)}
    return sum(tensor.untyped_storage().nbytes() for tensor in found.values())


def resident_bytes(model: torch.nn.Module) -> int:
    """Of weights and buffers."""
    return bytes_of([*model.parameters(), *model.buffers()])


def rows_of(config: PreTrainedConfig, shape: BatchShape, n_batches: int) -> Dataset:
    """Rows of exactly the planned lengths."""
    is_pair = config.is_encoder_decoder
    features = shape.features(is_pair, config.vocab_size)
    rows = []
    for ids, mask, labels in zip(*(features[name] for name in ("input_ids", "attention_mask", "labels")), strict=True):
        kept = mask.bool()
        targets = labels[labels.ne(-100)] if is_pair else labels[kept]
        ones = [1] * int(kept.sum())
        rows.append({"input_ids": ids[kept].tolist(), "attention_mask": ones, "labels": targets.tolist()})
    return Dataset.from_list(rows * n_batches)


def compare(model: str, setting: str, shape: BatchShape = SHAPE) -> Row:
    """Plan and train, or generate, one case."""
    config = copy.deepcopy(MODELS[model])  # a trainer notes its generation settings in it
    family = model_family(config)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        args = LeftTrainingArguments(
            output_dir=folder,
            max_steps=2,
            per_device_train_batch_size=shape.rows,
            per_device_eval_batch_size=shape.rows,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            **SETTINGS[setting],
        )
        plan = plan_training(config, args, source_tokens=shape.source, target_tokens=shape.target, device="cpu")
        watch = StepProfile()
        rows = rows_of(config, shape, 2 * args.gradient_accumulation_steps)
        trainer = LeftTrainer(
            auto_class(family).from_config(config),
            args,
            train_dataset=rows,
            eval_dataset=rows.select(range(shape.rows)),
            processing_class=load_tokenizer(str(MODEL_PATHS[family])),
            callbacks=[watch],
        )
        trainer.remove_callback(PrinterCallback)
        if setting != "generation":
            trainer.train()
            return Row(model, setting, plan.peak_bytes, watch.peak_bytes)
        resident = resident_bytes(trainer.model)
        generation = trainer.model.generation_config
        generation.min_new_tokens = args.generation_max_length  # as a plan has it: to the last token
        trainer.evaluate()  # the first one also makes what later ones find
        with memory_profiler() as profiler:
            trainer.evaluate()
        states = plan.step.parts.get("optimizer state", 0)  # an evaluation before training has none
        return Row(model, setting, plan.evaluation_bytes - states, resident + most_allocated(profiler))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cases whose 'model/setting' has this in it")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    set_verbosity_error()
    disable_progress_bar()
    rows = []
    print(f"{'model':8} {'setting':16} {'measured':>9} {'planned':>9} {'error':>7}   MiB")
    for model in MODELS:
        for setting in SETTINGS:
            if options.only in f"{model}/{setting}":
                rows.append(compare(model, setting))
                row = rows[-1]
                print(
                    f"{model:8} {setting:16} {row.measured / MIB:9.2f} {row.planned / MIB:9.2f} {row.error:+7.1%}",
                    flush=True,
                )
    errors = [abs(row.error) for row in rows]
    print(f"{len(rows)} cases: median error {statistics.median(errors):.1%}, largest {max(errors):.1%}")


if __name__ == "__main__":
    main()
