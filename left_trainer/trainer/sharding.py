"""FSDP2: which weights a process keeps whole, and what accelerate shards of the others.

What an adapter adds is small, and every process keeps it whole: it is trained, saved and loaded as with
`DistributedDataParallel`, by every method alike. The base model is sharded. A model that is trained without an adapter
is sharded as a whole.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel
from torch import distributed, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from transformers.trainer_utils import EvalLoopOutput

from left_trainer.models import unwrapped
from left_trainer.models.wrapping import reshard
from left_trainer.trainer.data_parallel import wrap_for_training
from left_trainer.trainer.machines import copy_from_first
from left_trainer.trainer.shrinking import ShrinkingTrainer


class ShardingTrainer(ShrinkingTrainer):
    """A trainer whose model FSDP2 may shard."""

    is_fsdp_enabled: bool
    model: Any
    optimizer: torch.optim.Optimizer | None
    _replicated: Sequence[nn.Parameter] = ()
    _resumed: str | None = None

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in `Trainer`."""
        wrap_for_training(self)
        self._resumed = str(resume_from_checkpoint) if resume_from_checkpoint else None
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def prepare_to_shard(self) -> None:
        """Decide what stays whole, just before the optimizer is made and accelerate shards the rest."""
        if not self.is_fsdp_enabled:
            return
        reshard(self.model)  # an optimizer would be made of what an evaluation has gathered
        if self._resumed and self._keeps_adapter_whole:
            with self._as_replicated():
                self._load_from_checkpoint(self._resumed)
        if not isinstance(self.model, FSDPModule):
            self._replicated = keep_adapter_whole(self.accelerator, self.model)
            shard_tied_weights(self.accelerator, self.model, self._replicated)

    def without_adapter(self) -> contextlib.AbstractContextManager[None]:
        """As in the parent; what an adapter adds is told from the base model before it is off."""
        self.prepare_to_evaluate()
        return super().without_adapter()

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        """As in `Trainer`, which evaluates no model that is yet to be sharded by FSDP2 (transformers 5.23)."""
        self.prepare_to_evaluate()
        return super().evaluation_loop(*args, **kwargs)

    def prepare_to_evaluate(self) -> None:
        """Shard a model that is evaluated before its training, or have it whole on every device.

        It is whole where its training will start from whole weights.
        """
        if not self.is_fsdp_enabled or isinstance(self.model, FSDPModule):
            return
        if self._starts_from_whole_weights:
            if self.accelerator.state.fsdp_plugin.cpu_ram_efficient_loading:
                copy_from_first([*self.model.parameters(), *self.model.buffers()], self.accelerator.device)
            self.accelerator.prepare_model(self.model.to(self.args.device), evaluation_mode=True)
            return
        self.prepare_to_shard()
        # accelerate (1.15) shards a model together with its optimizer alone.
        optimizer = self.optimizer or torch.optim.SGD(self.model.parameters())
        self.model, prepared = self.accelerator.prepare(self.model, optimizer)
        self.model_wrapped = self.model
        self.optimizer = self.optimizer and prepared
        register_fsdp_forward_method(self.model, "generate")

    @property
    def _starts_from_whole_weights(self) -> bool:
        """Whether the model shrinks first, a method sets weights by those of the base, or this is another model."""
        is_teacher = self.teaching is not None and self.model is self.teaching.teacher.model
        is_off = isinstance(self.model, PeftModel) and not adapter_weights(self.model)
        return is_teacher or is_off or self.shrinking is not None or self.hooks.changes_start

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """As in `Trainer`; gradients of weights that no engine averages are averaged once for a step."""
        loss: torch.Tensor = super().training_step(*args, **kwargs)
        if self._replicated and self.accelerator.sync_gradients:
            average_gradients(self._replicated)
        return loss

    @property
    def _keeps_adapter_whole(self) -> bool:
        return self.is_fsdp_enabled and isinstance(unwrapped(self.model), PeftModel)

    @contextlib.contextmanager
    def _as_replicated(self) -> Iterator[None]:
        """Inside, `Trainer` saves and loads what every process has whole as it does with `DistributedDataParallel`."""
        is_whole = self._keeps_adapter_whole
        try:
            self.is_fsdp_enabled = self.is_fsdp_enabled and not is_whole
            yield
        finally:
            self.is_fsdp_enabled = self.is_fsdp_enabled or is_whole

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        super()._save(output_dir, state_dict and without_repeats(self.model, state_dict))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As in `Trainer`, which saves no model where checkpoints are sharded (transformers 5.23)."""
        with self._as_replicated():
            plugin = self.accelerator.state.fsdp_plugin if self.is_fsdp_enabled else None
            if plugin is None or _internal_call or "FULL_STATE_DICT" in str(plugin.state_dict_type):
                super().save_model(output_dir, _internal_call)
                return
        self._save(output_dir, self.accelerator.get_state_dict(self.model))
        if self.args.push_to_hub:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        with self._as_replicated():
            super()._save_optimizer_and_scheduler(output_dir)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with self._as_replicated():
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not isinstance(self.model, FSDPModule) or not self._keeps_adapter_whole:  # else it was loaded before
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        with self._as_replicated():
            super()._load_best_model()


def keep_adapter_whole(accelerator: Accelerator, model: nn.Module) -> list[nn.Parameter]:
    """Have accelerate leave what is trained of an adapter on every process; nothing of a model without one.

    They start as on the first process, like the rest of a model that only this one has loaded.
    """
    plugin = accelerator.state.fsdp_plugin
    kept = adapter_weights(model)
    for weight in kept:
        weight.data = weight.data.to(accelerator.device)
    if plugin.cpu_ram_efficient_loading and (kept or tied_modules(model)):
        # accelerate would make other parameters of them, which it takes for none that it is to leave (accelerate 1.15).
        copy_from_first([*model.parameters(), *model.buffers()], accelerator.device)
        plugin.cpu_ram_efficient_loading = False
    copy_from_first(kept, accelerator.device)
    holder = nn.Module()
    holder.weights = nn.ParameterList(kept)
    plugin.ignored_modules = [*(plugin.ignored_modules or ()), holder]
    return kept


def adapter_weights(model: nn.Module) -> list[nn.Parameter]:
    """What is trained of an adapter, and what stands beside the base model; nothing of a model without an adapter."""
    named = model.named_parameters() if isinstance(model, PeftModel) else ()
    return [weight for name, weight in named if weight.requires_grad or not name.startswith("base_model.")]


def tied_modules(model: nn.Module) -> list[nn.Module]:
    """The modules of `model` that hold a weight which another one holds too."""
    holders: dict[nn.Parameter, list[nn.Module]] = defaultdict(list)
    for module in model.modules():
        for weight in module.parameters(recurse=False):
            holders[weight].append(module)
    return list(dict.fromkeys(module for shared in holders.values() if len(shared) > 1 for module in shared))


def without_repeats(model: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """`state` with each weight once, by the first of its names: gathered ones no longer share their memory."""
    first = {weight: name for name, weight in reversed(list(model.named_parameters(remove_duplicate=False)))}
    repeated = {name for name, weight in model.named_parameters(remove_duplicate=False) if first[weight] != name}
    return {name: value for name, value in state.items() if name not in repeated}


def shard_tied_weights(accelerator: Accelerator, model: nn.Module, ignored: Iterable[nn.Parameter]) -> None:
    """Shard all weights that several modules hold as one unit, before accelerate takes these modules one by one.

    accelerate (1.15) joins input and output embeddings, and knows of no other modules that share a weight: the encoder
    and the decoder of T5 and BART.
    """
    modules = tied_modules(model)
    if not modules:
        return
    plugin, mesh = accelerator.state.fsdp_plugin, getattr(accelerator, "torch_device_mesh", None)
    if accelerator.mixed_precision != "no":  # as accelerate does before it shards
        for weight in (weight for module in modules for weight in module.parameters() if weight.requires_grad):
            weight.data = weight.data.float()
    fully_shard(
        modules,
        mesh=mesh[tuple(accelerator.parallelism_config.fsdp_dim_names)] if mesh is not None else None,
        reshard_after_forward=False,
        mp_policy=plugin.mixed_precision_policy or MixedPrecisionPolicy(),
        offload_policy=plugin.cpu_offload,
        ignored_params=set(ignored),
    )
    # A module may read the weights of what it holds without calling it.
    for parent in [module for module in model.modules() if not set(modules).isdisjoint(module.children())]:
        parent.register_forward_pre_hook(lambda *_: modules[0].unshard())  # type: ignore[operator]


@torch.no_grad()
def average_gradients(weights: Sequence[nn.Parameter]) -> None:
    """Replace the gradients of `weights` by their mean over the processes, in one message for each dtype.

    One that no process has a gradient of is left without.
    """
    has = torch.tensor([weight.grad is not None for weight in weights], device=weights[0].device, dtype=torch.int32)
    distributed.all_reduce(has)
    by_dtype: dict[torch.dtype, list[nn.Parameter]] = defaultdict(list)
    for weight, number in zip(weights, has.tolist(), strict=True):
        if number:
            weight.grad = torch.zeros_like(weight) if weight.grad is None else weight.grad
            by_dtype[weight.dtype].append(weight)
    for members in by_dtype.values():
        flat = torch.cat([weight.grad.flatten() for weight in members])  # type: ignore[union-attr]
        distributed.all_reduce(flat)
        flat /= distributed.get_world_size()
        for weight, mean in zip(members, flat.split([weight.numel() for weight in members]), strict=True):
            weight.grad.copy_(mean.view_as(weight))  # type: ignore[union-attr]
