"""One training step of the real trainer, on shapes: the model, the trainer and the batch, and what is run of them."""

from __future__ import annotations

import contextlib
import copy
import types
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import convert_outputs_to_fp32
from peft import PeftConfig, PeftModel
from torch import nn
from transformers import PreTrainedModel, TrainerControl, TrainerState
from transformers.initialization import no_init_weights
from transformers.trainer_pt_utils import LabelSmoother

from left_trainer.adapters.residual_base import RESIDUAL_BASE, remember_initial_adapter
from left_trainer.compression.teacher import Teacher
from left_trainer.kernels.dropout import dropout_of_run
from left_trainer.methods.apply import apply_built, apply_config, build_config
from left_trainer.methods.patterns import check_patterns
from left_trainer.models import ModelSource, unwrapped, without_adapter
from left_trainer.models.family import auto_class
from left_trainer.models.positions import Limits
from left_trainer.planning.disguise import Disguise
from left_trainer.planning.known_values import on_meta
from left_trainer.planning.quantized import quantize_on_meta
from left_trainer.recording.recorder import StepRecorder
from left_trainer.token_mean import IGNORE_INDEX
from left_trainer.trainer import LeftSeq2SeqTrainer, LeftSFTTrainer, LeftTrainer
from left_trainer.trainer.checks import Request
from left_trainer.trainer.preparation import Preparation

N_STEPS = 1000  # of the run that the step stands in the middle of


@dataclass(frozen=True)
class BatchShape:
    """The longest batch of a run.

    Args:
        rows: In a micro-batch.
        source: Tokens of the source; in a decoder-only model, of the prompt.
        target: Tokens of the target; in a decoder-only model, of the completion.
    """

    rows: int
    source: int
    target: int

    def features(self, is_encoder_decoder: bool, vocabulary: int) -> dict[str, torch.Tensor]:
        """A batch of that shape on the CPU. All rows but the first are a token shorter, so that there is padding."""
        total = self.source if is_encoder_decoder else self.source + self.target
        input_ids = torch.arange(3, 3 + total).remainder(max(vocabulary - 3, 1)).add(3).clamp(max=vocabulary - 1)
        input_ids = input_ids.expand(self.rows, total).clone()
        attention_mask = torch.ones_like(input_ids)
        labels = input_ids.clone() if not is_encoder_decoder else input_ids[:, :1].expand(-1, self.target).clone()
        if not is_encoder_decoder:
            labels[:, : self.source] = IGNORE_INDEX
        if self.rows > 1 and total > 1:
            attention_mask[1:, -1] = 0
            if labels.shape[1] > 1 + (0 if is_encoder_decoder else self.source):
                labels[1:, -1] = IGNORE_INDEX
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}


# The model


def model_on_meta(source: ModelSource, dtype: torch.dtype, quantization: Any = None) -> PreTrainedModel:
    """The base model as it would be loaded, without a weight."""
    with torch.device("meta"), no_init_weights():
        model = auto_class(source.family).from_config(
            copy.deepcopy(source.config), dtype=dtype, trust_remote_code=source.trust_remote_code
        )
    model.tie_weights()
    if has_own_output_head(source):
        model.lm_head.weight = nn.Parameter(torch.empty_like(model.lm_head.weight))
    if quantization is not None:
        quantize_on_meta(model, quantization)
    return model


def has_own_output_head(source: ModelSource) -> bool:
    """Whether the checkpoint has an output head apart from the embeddings though the config ties them.

    transformers (5.23) ties the two for every T5 and unties them when it finds both in the checkpoint, as for mT5 and
    T5 v1.1. A checkpoint on this disk, and a config without a name, are taken to be of a model made here, where they
    are tied.
    """
    config = source.config
    is_untied = config.model_type in ("mt5", "umt5") or getattr(config, "scale_decoder_outputs", True) is False
    return is_untied and not source.is_loaded and bool(config._name_or_path) and not Path(source.base_name).is_dir()


def with_method(
    model: PreTrainedModel,
    request: Request,
    options: dict[str, Any],
) -> PeftModel | PreTrainedModel:
    """`model` with the method of `request` applied as a run would; on meta, values are stand-ins."""
    if request.peft_config is not None:
        wrapped = apply_config(model, request.peft_config, name=request.method.name if request.method else None)
    else:
        assert request.method is not None
        config: PeftConfig | None = build_config(model, request.method, options, request.source.family)
        if config is not None:
            check_patterns(model, config)
        wrapped = apply_built(model, request.method, config, request.args.seed)
    if request.method is not None and request.method.training_state is RESIDUAL_BASE:
        remember_initial_adapter(wrapped)
    return wrapped


# The trainer


def trainer_on_shapes(
    request: Request, model: PeftModel | PreTrainedModel, teacher: Teacher | None = None
) -> LeftTrainer:
    """The trainer of a run with everything that its step takes, and nothing that a run alone needs.

    Hugging Face's constructor is not run: it would set up the process for training on a device.
    """
    is_pair = request.source.family == "encoder_decoder"
    trainer: Any = object.__new__(LeftSeq2SeqTrainer if is_pair else LeftSFTTrainer)
    # The operations of compiled blocks could not be watched.
    args = request.args.replaced(torch_compile=False, torch_compile_backend=None, torch_compile_mode=None)
    trainer.args, trainer.model = args, model
    trainer.take_over(request, Preparation(model, None, args, "given", Limits(), teacher=teacher))  # type: ignore[arg-type]
    trainer.accelerator = types.SimpleNamespace(
        num_processes=1,
        parallelism_config=None,
        gather=lambda tensor: tensor,
        autocast=contextlib.nullcontext,
    )
    trainer.label_smoother = LabelSmoother(args.label_smoothing_factor) if args.label_smoothing_factor else None
    trainer.only_loss_wanted = trainer.is_deepspeed_enabled = trainer.is_fsdp_enabled = False
    trainer.optimizer = trainer.optimizer_cls_and_kwargs = None
    trainer.current_gradient_accumulation_steps = args.gradient_accumulation_steps
    if not is_pair:
        _as_sft_trainer(trainer)
    trainer._set_up_loss(None)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=args.gradient_checkpointing_kwargs)
    return trainer  # type: ignore[no-any-return]


def _as_sft_trainer(trainer: Any) -> None:
    """What TRL's loss reads, and the output head that it puts into the model (trl 1.16)."""
    from trl.trainer.sft_trainer import add_fused_lm_head

    trainer._metrics = {"train": defaultdict(list), "eval": defaultdict(list)}
    trainer._total_train_tokens, trainer._tp_size, trainer.aux_loss_enabled = 0, 1, False
    add_fused_lm_head(without_adapter(trainer.model), outputs=("log_probs", "entropy", "is_top1"))


# The step


class Rehearsal:
    """Runs what a run would, with a recorder watching.

    Args:
        trainer: Of the run, on shapes or real.
        recorder: Entered while something runs.
        disguise: Of meta tensors; `None` for real ones.
        autocast: Dtype of mixed precision.
    """

    def __init__(
        self,
        trainer: LeftTrainer,
        recorder: StepRecorder,
        disguise: Disguise | None = None,
        autocast: torch.dtype | None = None,
    ) -> None:
        self.trainer, self.recorder, self.disguise, self.autocast = trainer, recorder, disguise, autocast
        self.model: Any = trainer.model
        if autocast is not None and disguise is not None:
            self._use_autocast(disguise, autocast)
            trainer.accelerator.autocast = lambda: disguise.autocast(autocast)

    def _use_autocast(self, disguise: Disguise, dtype: torch.dtype) -> None:
        """As accelerate does: the model's forward pass, whose outputs become float32."""
        plain = self.model.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            with disguise.autocast(dtype):
                return plain(*args, **kwargs)

        self.model.forward = convert_outputs_to_fp32(forward)

    def step(self, features: dict[str, torch.Tensor]) -> None:
        """Forward and backward pass of each micro-batch, clipping, and the optimizer."""
        device = self.disguise.device if self.disguise else self.model.device
        with dropout_of_run(self.trainer.args, self.trainer.fast_paths, device, is_meta=self.disguise is not None):
            self._step(features)

    def _step(self, features: dict[str, torch.Tensor]) -> None:
        trainer, model, recorder, args = self.trainer, self.model, self.recorder, self.trainer.args
        optimizer = trainer.create_optimizer()
        model.train()
        n_batches = args.gradient_accumulation_steps
        n_items = torch.tensor(int(features["labels"].ne(IGNORE_INDEX).sum()) * n_batches)
        for index in range(n_batches):
            recorder.begin("forward")
            batch = self._batch(features)
            recorder.label(batch.values(), "inputs")
            loss = trainer.compute_loss(model, batch, num_items_in_batch=n_items)
            del batch
            recorder.begin("backward")
            torch.autograd.backward(loss)  # unlike loss.backward(), it keeps the disguise on for code that it runs
            recorder.tracker.leave_backward()
            del loss
            recorder.label([parameter.grad for parameter in model.parameters()], "gradients")
            recorder.mark(f"micro-batch {index + 1}")
        recorder.begin("optimizer")
        if args.max_grad_norm:
            nn.utils.clip_grad_norm_([each for each in model.parameters() if each.grad is not None], args.max_grad_norm)
        optimizer.step()
        self._after_step(optimizer)
        model.zero_grad()
        recorder.label_kept("optimizer state")
        recorder.mark("step")

    def _after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """What the method's callback does after a step in the middle of the run, such as AdaLoRA's scores of ranks."""
        state = TrainerState(max_steps=N_STEPS, global_step=N_STEPS // 2)
        for callback in self.trainer.hooks.callbacks(self.model):
            callback.on_train_begin(self.trainer.args, state, TrainerControl(), model=self.model)
            callback.on_optimizer_step(
                self.trainer.args, state, TrainerControl(), model=self.model, optimizer=optimizer
            )

    def _batch(self, features: dict[str, torch.Tensor]) -> dict[str, Any]:
        batch: dict[str, Any] = dict(features)
        if self.disguise is not None:
            batch = {name: on_meta(tensor) for name, tensor in features.items()}
        return with_extra_inputs(self.model, batch)


def with_extra_inputs(model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
    """With what the method wants beside the tokens, as the trainer adds it."""
    from left_trainer.trainer.columns import with_task_ids

    return with_task_ids(unwrapped(model), batch)


def tensors_of_state(optimizer: Any) -> Iterator[torch.Tensor]:
    """Tensors in the state of an optimizer."""
    for each in optimizer.state.values():
        for value in each.values() if isinstance(each, dict) else ():
            if isinstance(value, torch.Tensor):
                yield value
