"""`plan_training`: the memory of a run before it starts, from the config of its model alone."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from peft import PeftConfig, PeftModel
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from left_trainer.callbacks.trainable_parameters import count_parameters
from left_trainer.compression.teacher import Teacher
from left_trainer.models import ModelSource
from left_trainer.models.family import model_family
from left_trainer.models.positions import position_limits
from left_trainer.planning import known_values
from left_trainer.planning.devices import Device, find_device
from left_trainer.planning.disguise import disguised
from left_trainer.planning.generation import record_generation
from left_trainer.planning.lengths import row_lengths
from left_trainer.planning.rehearsal import BatchShape, Rehearsal, model_on_meta, trainer_on_shapes, with_method
from left_trainer.planning.timing import StepTime, step_time
from left_trainer.recording.allocator import held_bytes
from left_trainer.recording.modules import ModuleTracker
from left_trainer.recording.recorder import Operation, Phase, StepRecorder
from left_trainer.recording.storage_bytes import CPU, CUDA, DeviceMemory
from left_trainer.recording.timeline import Moment, peak, timeline
from left_trainer.trainer.checks import Request, check_losses, check_model_and_method
from left_trainer.trainer.preparation import choose_learning_rate, free_positions, method_of
from left_trainer.trainer.teacher_checks import teacher_source
from left_trainer.training_args import LeftTrainingArguments, loading_options

N_SAMPLES = 200  # of the timeline
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass(frozen=True)
class TrainingPlan:
    """What a run will need.

    Args:
        model: Name, path or class of the model.
        method: Name of the method.
        batch: The longest micro-batch.
        device: What memory costs beside tensors.
        step: The moment of most memory in a training step.
        held_bytes: The most that the allocator holds during steps, `torch.cuda.max_memory_reserved`; where it takes no
            segments, the most that tensors take.
        loading_bytes: The most that tensors take while the model is loaded and the method applied.
        evaluation_bytes: The same in an evaluation, with generation where the arguments ask for it.
        saving_bytes: The same while a checkpoint is written.
        timeline: Bytes over the step: the phase, and the most in each of `N_SAMPLES` equal parts of its operations.
        trained_parameters: Number of them.
        all_parameters: The same, frozen ones included.
        operations: Of the step, in order, for the time that they take.
        fallbacks: Fast paths that will not be taken, with the reasons.
    """

    model: str
    method: str
    batch: BatchShape
    device: DeviceMemory
    step: Moment
    held_bytes: int
    loading_bytes: int
    evaluation_bytes: int
    saving_bytes: int
    timeline: tuple[tuple[Phase, int], ...]
    trained_parameters: int
    all_parameters: int
    operations: tuple[Operation, ...]
    fallbacks: Mapping[str, tuple[str, ...]]

    @property
    def peak_bytes(self) -> int:
        """The most memory that tensors take in a training step, as the allocator rounds them."""
        return self.step.n_bytes

    @property
    def peak_phase(self) -> Phase:
        """When in the step that is."""
        return self.step.phase

    @property
    def run_bytes(self) -> int:
        """The most that the whole run needs of the device, its own overhead included."""
        others = max(self.loading_bytes, self.evaluation_bytes, self.saving_bytes) + self.device.workspace_bytes
        return max(self.held_bytes, others) + self.device.context_bytes

    def time_on(self, device: Device) -> StepTime:
        """How long a step takes on `device`; `ValueError` where only its memory is known."""
        return step_time(self.operations, device)

    def fits(self, memory_bytes: int) -> bool:
        """Whether the run fits into a device with `memory_bytes`."""
        return self.run_bytes <= memory_bytes


def plan_training(
    model: str | PreTrainedConfig | PreTrainedModel | PeftModel | ModelSource,
    args: LeftTrainingArguments,
    *,
    peft_config: PeftConfig | None = None,
    source_tokens: int | None = None,
    target_tokens: int | None = None,
    tokens: int | None = None,
    dtype: str | torch.dtype | None = None,
    device: str | Device | DeviceMemory | None = None,
    quantization_config: Any = None,
    train_dataset: Any = None,
    processing_class: PreTrainedTokenizerBase | None = None,
    teacher_model: str | PreTrainedModel | PeftModel | ModelSource | None = None,
) -> TrainingPlan:
    """Plan a run: its real training step is run on shapes, without weights and without a GPU.

    Args:
        model: Hub name, path, config or model. Only the config is read.
        args: Of the run.
        peft_config: As for `LeftTrainer`.
        source_tokens: Of the longest batch, by default of `train_dataset`; in a decoder-only model, those of the
            prompt.
        target_tokens: The same of the target or completion.
        tokens: Of the longest batch of plain text, in place of the two; decoder-only models. By default
            `args.max_length`.
        dtype: Of the weights; by default the one that the model is loaded in.
        device: `cuda`, `cpu` or a device of `left-trainer plan --device`, which decides on kernels and on what memory
            costs; `cuda` by default.
        quantization_config: As for `LeftTrainer`; methods such as `qlora` bring their own.
        train_dataset: As for `LeftTrainer`. Its rows of most characters are tokenized to find the longest.
        processing_class: The tokenizer; rows of token ids need none.
        teacher_model: As for `LeftTrainer`.

    Raises:
        ValueError: No such model, an unknown device, no tokens or more than the model has positions, or what
            `LeftTrainer` refuses for this model, method and arguments.
    """
    source = _source_of(model, args)
    memory = _memory_of(device)
    method = method_of(source, args, peft_config)
    args = args.replaced(learning_rate=choose_learning_rate(args, method, source)[0])
    teacher = teacher_source(teacher_model, args)
    request = Request(source, args, method, peft_config, quantization_config, teacher=teacher)
    check_model_and_method(request, needs_weights=False)
    check_losses(request)
    if train_dataset is not None and (source_tokens, target_tokens, tokens) == (None, None, None):
        source_tokens, target_tokens = _longest(request, train_dataset, processing_class)
    batch = _batch_of(request, source_tokens, target_tokens, tokens)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # what they say about values is about stand-ins
        disable_progress_bar()
        return _Planning(request, batch, memory, _dtype_of(dtype, source)).plan()


class _Planning:
    """The phases of a run, one after another, on shapes."""

    def __init__(self, request: Request, batch: BatchShape, memory: DeviceMemory, dtype: torch.dtype) -> None:
        self.request, self.batch, self.memory, self.dtype = request, batch, memory, dtype
        self.device = torch.device(memory.kind)
        self.tracker = ModuleTracker()

    def _recorder(self) -> StepRecorder:
        return StepRecorder("meta", self.memory.rounding, known_values.compute, self.tracker)

    def plan(self) -> TrainingPlan:
        request, args = self.request, self.request.args
        method, config = request.method, request.source.config
        features = self.batch.features(config.is_encoder_decoder, config.get_text_config().vocab_size)
        recorder = self._recorder()
        model, loading_bytes = self._load(recorder)
        teacher = self._teacher(recorder, model)
        self.tracker.add(model)
        counted = count_parameters(model)
        with disguised(self.device) as disguise, recorder, self.tracker:
            trainer = trainer_on_shapes(request, model, teacher)
            recorder.label_model(model)
            recorder.recording.operations.clear()
            Rehearsal(trainer, recorder, disguise, _autocast_of(args)).step(features)
            recorder.label_model(model)
        fallbacks = {name: tuple(path.fell_back) for name, path in trainer.fast_paths.items() if path.fell_back}
        step = peak(recorder.recording)
        resident = sum(step.parts.get(part, 0) for part in ("frozen weights", "trained weights", "optimizer state"))
        return TrainingPlan(
            model=request.source.title,
            method=method.name if method else type(request.peft_config).__name__,
            batch=self.batch,
            device=self.memory,
            step=step,
            held_bytes=self._held(recorder, step),
            loading_bytes=loading_bytes,
            evaluation_bytes=resident + self._evaluation(model),
            saving_bytes=resident,
            timeline=timeline(recorder.recording, N_SAMPLES),
            trained_parameters=counted.trainable,
            all_parameters=counted.total,
            operations=tuple(recorder.recording.operations),
            fallbacks=fallbacks,
        )

    def _held(self, recorder: StepRecorder, step: Moment) -> int:
        if not self.memory.has_segments:
            return step.n_bytes + self.memory.workspace_bytes
        return held_bytes(recorder.recording, self.memory.workspaces)

    def _load(self, recorder: StepRecorder) -> tuple[PreTrainedModel | PeftModel, int]:
        """The model with its method, and the memory that takes."""
        request, method = self.request, self.request.method
        quantization = request.quantization_config or request.source.options.get("quantization_config")
        if quantization is None and method is not None and method.quantization and not request.peft_config:
            with _device_at_hand(self.memory.kind):
                quantization = method.quantization()
        options = request.args.peft_options
        if method is not None and method.derive_from_data is not None:
            row = [0] * (self.batch.source + self.batch.target)  # what is derived of a row has its length
            options = {**method.derive_from_data(None, row), **options}  # type: ignore[arg-type]
        # What the start of an adapter is computed from may lie on the host: all of it is on meta.
        with disguised(torch.device("cpu")), recorder, torch.device("meta"):
            model = model_on_meta(request.source, self.dtype, quantization)
            largest = max(parameter.numel() for parameter in model.parameters()) * self.dtype.itemsize
            model = with_method(model, request, options)
        weights = recorder.live_bytes
        return model, weights + (largest if quantization is not None else 0)

    def _teacher(self, recorder: StepRecorder, model: Any) -> Teacher | None:
        """The teacher on the meta device; `None` where no step needs one."""
        request, options = self.request, self.request.args.distillation
        if request.teacher is None or not request.is_taught:
            return None
        with disguised(torch.device("cpu")), recorder, torch.device("meta"):
            if not isinstance(request.teacher, ModelSource):
                return Teacher.of(request.teacher, model, options, None)
            dtype = _dtype_of(options.teacher_dtype, request.teacher) if options.teacher_dtype else self.dtype
            weights = model_on_meta(request.teacher, dtype, options.teacher_quantization_config)
            return Teacher(request.teacher.title, weights)

    def _evaluation(self, model: Any) -> int:
        """Bytes of an evaluation beside what is there anyway."""
        args, recorder = self.request.args, self._recorder()
        if not args.predict_with_generate:
            return 0
        with disguised(self.device), recorder, self.tracker:
            recorder.label_model(model)
            before = recorder.live_bytes
            record_generation(model, recorder, self.batch, args)
        return peak(recorder.recording).n_bytes - before


@contextlib.contextmanager
def _device_at_hand(kind: str) -> Iterator[None]:
    """Inside, `torch.cuda` says what it would on the device: the dtype of 4-bit layers depends on it."""
    with (
        patch("torch.cuda.is_available", return_value=kind == "cuda"),
        patch("torch.cuda.is_bf16_supported", return_value=True),
    ):
        yield


def _source_of(model: Any, args: LeftTrainingArguments) -> ModelSource:
    if isinstance(model, PreTrainedConfig):
        name = model._name_or_path or type(model).__name__
        return ModelSource(name, name, model, model_family(model), None, loading_options(args))
    return ModelSource.of(model, loading_options(args))


def _memory_of(device: str | Device | DeviceMemory | None) -> DeviceMemory:
    if isinstance(device, DeviceMemory):
        return device
    if isinstance(device, Device):
        return device.memory
    known = {None: CUDA, "cuda": CUDA, "cpu": CPU}
    return known[device] if device in known else find_device(str(device)).memory


def _dtype_of(dtype: str | torch.dtype | None, source: ModelSource) -> torch.dtype:
    given = dtype or source.options.get("dtype") or "float32"
    if given == "auto":
        given = source.config.dtype or torch.float32
    if isinstance(given, torch.dtype):
        return given
    if given not in DTYPES:
        raise ValueError(f"dtype={given!r} is not known. Expected one of {', '.join(DTYPES)}.")
    return DTYPES[given]


def _autocast_of(args: LeftTrainingArguments) -> torch.dtype | None:
    return torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None


def _longest(
    request: Request, dataset: Any, tokenizer: PreTrainedTokenizerBase | None
) -> tuple[int | None, int | None]:
    """Source and target of the longest row of `dataset`, as a run cuts it; `None` where that cannot be told."""
    args, family = request.args, request.source.family
    found = row_lengths(dataset, family, tokenizer, args.dataset_text_field)
    if found is None or args.packing:
        return None, None
    cut = found.cut(family, *free_positions(request, args.peft_options).at_most(args.max_length))
    return cut.source, cut.target


def _batch_of(request: Request, source: int | None, target: int | None, tokens: int | None) -> BatchShape:
    """The longest batch, checked."""
    args, family = request.args, request.source.family
    if tokens is not None and (source is not None or target is not None or family == "encoder_decoder"):
        raise ValueError(
            f"tokens={tokens} is the length of plain text for decoder-only models. Pass source_tokens and "
            "target_tokens for pairs, or tokens alone."
        )
    if source is None and target is None and family == "decoder_only":
        source, target = 0, tokens if tokens is not None else args.max_length
    else:
        source = args.max_length if source is None else source
        target = args.max_length if target is None else target
    least = 0 if family == "decoder_only" else 1
    for name, count in {"source_tokens": source, "target_tokens": target}.items():
        if count is None:
            raise ValueError(f"{name} is not given, and neither is max_length. Pass the tokens of the longest row.")
        if count < (least if name == "source_tokens" else 1):
            raise ValueError(f"{name}={count} must be at least {least if name == 'source_tokens' else 1}.")
    assert source is not None
    assert target is not None
    _check_positions(request, source, target)
    return BatchShape(args.per_device_train_batch_size, source, target)


def _check_positions(request: Request, source: int, target: int) -> None:
    """Raise for more tokens than the model has positions, virtual ones included."""
    family, limits = request.source.family, position_limits(request.source.config, with_rotary=True)
    virtual = request.method.positions(request.args.peft_options, family) if request.method else (0, 0)
    lengths = {"a row": (source + target + virtual[0], limits.source)}
    if family == "encoder_decoder":
        lengths = {"a source": (source + virtual[0], limits.source), "a target": (target + virtual[1], limits.target)}
    for name, (length, limit) in lengths.items():
        if limit is not None and length > limit:
            raise ValueError(
                f"{name.capitalize()} of {length} tokens, virtual ones included, is longer than the {limit} positions "
                f"of {request.source.title}. Plan for shorter rows, and set max_length so that longer ones are cut."
            )
