"""Hold plans against real training steps on the device at hand: `python benchmarks/memory_on_gpu.py`.

Trains T5-large, Llama-3.2-1B and mt0-large, made from their configs with random weights, for a few steps with each
method, and prints the planned peak beside what torch's allocator counted and the planned time of a step beside the
measured one. Nothing is downloaded. `--tiny` takes small shapes, on any device: on a CPU the bytes of tensors are
recorded in place of the allocator's.

| column | meaning |
|---|---|
| planned | `TrainingPlan.peak_bytes` and cuBLAS's workspace |
| allocated | `torch.cuda.max_memory_allocated` of a step once the optimizer has its state |
| reserved | `torch.cuda.max_memory_reserved` of the same steps; the allocator's cache was emptied before the first |
| planned | `TrainingPlan.held_bytes`, which stands beside reserved |
| used | what the driver counts at the end, context included, as `nvidia-smi` does |
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import statistics
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import LlamaConfig, MT5Config, PreTrainedConfig, T5Config, TrainerCallback
from transformers.trainer_callback import PrinterCallback
from transformers.utils.logging import disable_progress_bar, set_verbosity_error

from left_trainer import MODEL_PATHS, LeftTrainer, LeftTrainingArguments, TrainingPlan, plan_training
from left_trainer.fast_path_args import STEP_SWITCHES
from left_trainer.methods import get_method
from left_trainer.models import ModelFamily, auto_class, load_tokenizer, model_family
from left_trainer.models.source import ModelSource
from left_trainer.planning.devices import Device, find_device
from left_trainer.planning.probe import probe
from left_trainer.planning.rehearsal import BatchShape
from left_trainer.recording.recorder import StepRecorder
from left_trainer.recording.storage_bytes import in_cuda_blocks
from left_trainer.recording.timeline import peak

GIB = 2**30
WARM_UP = 2  # steps: the optimizer makes its state, the libraries choose their kernels
TWENTY = {"num_virtual_tokens": 20}
METHODS: dict[str, dict[str, Any] | None] = {
    "prompt_tuning": TWENTY,
    "p_tuning": TWENTY,
    "prefix_tuning": TWENTY,
    "ia3": None,
    "lora": {"r": 8},
    "qlora": {"r": 8},
    "full": None,
}
FOUNDING = ("prompt_tuning", "p_tuning", "prefix_tuning", "ia3", "lora")


@dataclass(frozen=True)
class Shape:
    """A model and the batch that it is trained on."""

    config: PreTrainedConfig
    batch: BatchShape
    dtype: torch.dtype
    methods: tuple[str, ...] = tuple(METHODS)
    options: tuple[tuple[str, Any], ...] = ()
    own_output_head: bool = False

    @property
    def family(self) -> ModelFamily:
        return model_family(self.config)


T5_LARGE = {"d_model": 1024, "d_kv": 64, "d_ff": 4096, "num_layers": 24, "num_decoder_layers": 24, "num_heads": 16}
LLAMA_1B = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "intermediate_size": 8192,
    "tie_word_embeddings": True,
    "max_position_embeddings": 131072,
}
MT0 = {**T5_LARGE, "d_ff": 2816, "vocab_size": 250112, "feed_forward_proj": "gated-gelu"}
SMALL_T5 = {"d_model": 64, "d_kv": 32, "d_ff": 128, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 2}
SMALL_LLAMA = {
    **LLAMA_1B,
    "vocab_size": 2048,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 256,
    "max_position_embeddings": 1024,
}
FAST_PATHS_OFF = tuple((name, False) for name in STEP_SWITCHES)


def shapes(is_tiny: bool) -> dict[str, Shape]:
    """What is trained. `mt0-large` is the table that this project began with: float32, no fast paths."""
    t5, llama, mt0 = (SMALL_T5, SMALL_LLAMA, SMALL_T5) if is_tiny else (T5_LARGE, LLAMA_1B, MT0)
    special = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1}
    rows = 4 if is_tiny else 8
    return {
        "t5-large": Shape(
            T5Config(**t5, **special), BatchShape(rows, 256, 32), torch.float32, options=(("bf16", not is_tiny),)
        ),
        "llama-1b": Shape(LlamaConfig(**llama), BatchShape(4, 448, 64), torch.bfloat16),
        "mt0-large": Shape(
            MT5Config(**mt0, **special, attn_implementation="eager"),
            BatchShape(rows, 128, 8),
            torch.float32,
            FOUNDING,
            FAST_PATHS_OFF,
            own_output_head=True,
        ),
    }


@dataclass(frozen=True)
class Row:
    """A case with what was planned and what was measured; bytes and seconds."""

    shape: str
    method: str
    planned_bytes: int
    planned_held_bytes: int
    planned_phase: str
    planned_parts: dict[str, int]
    plan_seconds: float
    allocated_bytes: int
    reserved_bytes: int | None
    used_bytes: int | None
    recorded_bytes: int
    recorded_parts: dict[str, int]
    requested_bytes: int | None
    before_step_bytes: int | None
    step_seconds: float
    kernel_seconds: float | None
    planned_seconds: float | None
    bound: str | None
    seconds_by_probe: float | None

    @property
    def error(self) -> float:
        """Of the plan, against the allocator."""
        return self.planned_bytes / self.allocated_bytes - 1


class StepWatch(TrainerCallback):
    """Memory and time of each step after the first few; the last one is recorded storage by storage,
    and the one before it with the time of its kernels.

    Args:
        device: That the training runs on.
        n_steps: Of the training.
    """

    def __init__(self, device: torch.device, n_steps: int) -> None:
        self.is_cuda, self.n_steps = device.type == "cuda", n_steps
        self.recorder = StepRecorder(device.type, in_cuda_blocks if self.is_cuda else lambda size: size)
        self.seconds: list[float] = []
        self.counters: list[dict[str, int]] = []
        self.profiler: Any = None

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Give back what loading has left in the allocator's cache."""
        if self.is_cuda:
            torch.cuda.empty_cache()

    def on_step_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any
    ) -> None:
        """Start clock and counters, and the recorder in the last step."""
        if self.is_cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated()
        if state.global_step == self.n_steps - 1:
            self.recorder.label_model(model)
            inner = getattr(optimizer, "optimizer", optimizer)
            states = [each for each in inner.state.values() if isinstance(each, dict)]
            tensors = [value for each in states for value in each.values() if isinstance(value, torch.Tensor)]
            self.recorder.label(tensors, "optimizer state")
            self.recorder.phase = "forward"
            self.recorder.__enter__()
        if self.is_cuda and state.global_step == self.n_steps - 2:
            self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
            self.profiler.__enter__()
        self.began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Read them."""
        if self.is_cuda and state.global_step == self.n_steps - 1:
            torch.cuda.synchronize()
            self.profiler.__exit__(None, None, None)
            return
        if state.global_step == self.n_steps:
            self.recorder.__exit__(None, None, None)
            return
        if self.is_cuda:
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self.began)
        if self.is_cuda and len(self.seconds) > WARM_UP:
            free, total = torch.cuda.mem_get_info()
            stats = torch.cuda.memory_stats()
            self.counters.append(
                {
                    "allocated": torch.cuda.max_memory_allocated(),
                    "reserved": torch.cuda.max_memory_reserved(),
                    "requested": stats["requested_bytes.all.peak"],
                    "before": self.before,
                    "used": total - free,
                }
            )

    @property
    def kernel_seconds(self) -> float | None:
        """Of all kernels of a step; what is missing to the step's time, the device has waited for the host."""
        if self.profiler is None:
            return None
        return sum(each.self_device_time_total for each in self.profiler.key_averages()) / 1e6

    def most(self, name: str) -> int | None:
        """Of all steps that were watched."""
        return max((each[name] for each in self.counters), default=None)


def base_model(shape: Shape, device: torch.device) -> Any:
    """The model with random weights, made on the device."""
    with torch.device(device):
        model = auto_class(shape.family).from_config(shape.config, dtype=shape.dtype)
        if shape.own_output_head:
            model.lm_head.weight = nn.Parameter(torch.randn_like(model.lm_head.weight) * 0.02)
    return model


def data_of(shape: Shape, n_batches: int) -> Dataset:
    """Rows of exactly the planned lengths."""
    is_pair = shape.family == "encoder_decoder"
    features = shape.batch.features(is_pair, shape.config.vocab_size)
    rows = []
    for ids, mask, labels in zip(*(features[name] for name in ("input_ids", "attention_mask", "labels")), strict=True):
        kept = mask.bool()
        targets = labels[labels.ne(-100)] if is_pair else labels[kept]
        ones = [1] * int(kept.sum())
        rows.append({"input_ids": ids[kept].tolist(), "attention_mask": ones, "labels": targets.tolist()})
    return Dataset.from_list(rows * n_batches)


def arguments(shape: Shape, method: str, folder: str, n_steps: int, device: torch.device) -> LeftTrainingArguments:
    options: dict[str, Any] = dict(shape.options)
    if shape.dtype == torch.bfloat16:
        options["bf16"] = True
    if get_method(method).quantization is not None:
        options["model_init_kwargs"] = {"dtype": str(shape.dtype).removeprefix("torch.")}
    return LeftTrainingArguments(
        output_dir=folder,
        peft_method=method,
        peft_kwargs=METHODS[method],
        max_steps=n_steps,
        per_device_train_batch_size=shape.batch.rows,
        learning_rate=1e-5,
        max_grad_norm=1.0,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=device.type == "cpu",
        **options,
    )


def measure(
    name: str,
    shape: Shape,
    method: str,
    n_steps: int,
    device: torch.device,
    record: str | None,
    probed: Device,
    saved: Path,
) -> Row:
    """Plan and train one case."""
    is_quantized = get_method(method).quantization is not None
    with tempfile.TemporaryDirectory() as folder:
        args = arguments(shape, method, folder, n_steps, device)
        began = time.perf_counter()
        plan = planned(shape, args, device, record)
        plan_seconds = time.perf_counter() - began
        model: Any = saved_model(name, shape, device, saved) if is_quantized else base_model(shape, device)
        watch = StepWatch(device, n_steps)
        trainer = LeftTrainer(
            model,
            args,
            train_dataset=data_of(shape, n_steps),
            processing_class=load_tokenizer(ModelSource.of(MODEL_PATHS[shape.family])),
            callbacks=[watch],
        )
        trainer.remove_callback(PrinterCallback)
        del model
        gc.collect()
        trainer.train()
        recorded = peak(watch.recorder.recording)
        steps = watch.seconds[WARM_UP:]
        timed = plan.time_on(find_device(record)) if record else None
        row = Row(
            name,
            method,
            plan.peak_bytes + plan.device.workspace_bytes,
            plan.held_bytes,
            plan.peak_phase,
            dict(plan.step.parts),
            plan_seconds,
            watch.most("allocated") or recorded.n_bytes,
            watch.most("reserved"),
            watch.most("used"),
            recorded.n_bytes,
            dict(recorded.parts),
            watch.most("requested"),
            watch.most("before"),
            statistics.median(steps),
            watch.kernel_seconds,
            timed.seconds if timed else None,
            timed.bound if timed else None,
            plan.time_on(probed).seconds,
        )
        trainer.model = trainer.model_wrapped = trainer.optimizer = None
    return row


def planned(shape: Shape, args: LeftTrainingArguments, device: torch.device, record: str | None) -> TrainingPlan:
    config = shape.config
    if shape.own_output_head:
        config.name_or_path = "bigscience/mt0-large"  # whose checkpoint has a head of its own
    return plan_training(
        config,
        args,
        source_tokens=shape.batch.source,
        target_tokens=shape.batch.target,
        dtype=shape.dtype,
        device=record or device.type,
    )


def saved_model(name: str, shape: Shape, device: torch.device, folder: Path) -> str:
    """The folder of the model's weights in bfloat16: what is loaded in 4 bits is read from a disk."""
    path = folder / name
    if not path.exists():
        model = base_model(shape, device)
        model.to(torch.bfloat16).save_pretrained(path)
    return str(path)


@contextlib.contextmanager
def empty_device(device: torch.device) -> Iterator[None]:
    """Before and after, nothing is left of other cases."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    yield
    gc.collect()


def line(row: Row) -> str:
    reserved, used = (f"{size / GIB:9.3f}" if size else f"{'':9}" for size in (row.reserved_bytes, row.used_bytes))
    time_ = f"{1000 * row.planned_seconds:9.1f}" if row.planned_seconds else f"{'':9}"
    probed = f"{1000 * row.seconds_by_probe:9.1f}" if row.seconds_by_probe else ""
    return (
        f"{row.shape:10} {row.method:14} {row.planned_bytes / GIB:9.3f} {row.allocated_bytes / GIB:9.3f} "
        f"{row.error:+7.1%} {row.recorded_bytes / GIB:9.3f} {reserved} {row.planned_held_bytes / GIB:9.3f} {used} "
        f"{1000 * row.step_seconds:9.1f} "
        f"{time_} {probed}  {row.planned_phase}, {row.bound or ''}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--record", help="device record for the time of a step; h100 on CUDA", default=None)
    parser.add_argument("--tiny", action="store_true", help="small models")
    parser.add_argument("--only", default="", help="cases whose 'shape/method' has this in it")
    parser.add_argument("--steps", type=int, default=8, help="of each training (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=Path("memory_on_gpu.json"), help="(default: %(default)s)")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    set_verbosity_error()
    disable_progress_bar()
    device = torch.device(options.device)
    probed = probe(device.type)
    print(f"Probe: {probed}")
    record = options.record or ("h100" if device.type == "cuda" else None)
    head = [
        ("planned", 9),
        ("allocated", 9),
        ("error", 7),
        ("recorded", 9),
        ("reserved", 9),
        ("planned", 9),
        ("used", 9),
    ]
    head += [("ms a step", 9), ("planned", 9), ("by probe", 9)]
    print(f"{'shape':10} {'method':14} " + " ".join(f"{title:>{width}}" for title, width in head) + "   GiB, ms")
    rows: list[Row] = []
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as saved:
        for name, shape in shapes(options.tiny).items():
            for method in shape.methods:
                if options.only not in f"{name}/{method}":
                    continue
                with empty_device(device):
                    try:
                        rows.append(measure(name, shape, method, options.steps, device, record, probed, Path(saved)))
                        print(line(rows[-1]), flush=True)
                    except Exception:  # a case that fails must not cost the others: device time is short
                        failed[f"{name}/{method}"] = traceback.format_exc()
                        print(
                            f"{name:10} {method:14} failed: {failed[f'{name}/{method}'].splitlines()[-1]}", flush=True
                        )
                record_all(options.output, probed, rows, failed)
    errors = sorted(abs(row.error) for row in rows)
    if errors:
        print(f"{len(rows)} cases: median error {statistics.median(errors):.1%}, largest {errors[-1]:.1%}")


def record_all(path: Path, probed: Device, rows: list[Row], failed: dict[str, str]) -> None:
    """Write what is there so far."""
    content = {
        "device": repr(probed),
        "torch": torch.__version__,
        "rows": [asdict(row) for row in rows],
        "failed": failed,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
