"""A run whose model shrinks: when it loses parts, what its checkpoints hold of that, and going on from them.

A removal happens at the end of an optimizer step, before what is logged, evaluated or saved for that step, so that a
checkpoint holds the size that its step ends with. It depends on the weights, the arguments and the training rows alone:
a run that was killed after it and before the next checkpoint makes it again.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from left_trainer.compression.choice import best_parts, composed, relative, size_between, sizes_down_to, smaller_of
from left_trainer.compression.importance import BLOCK_INFLUENCE, FIRST_ORDER, Scores, importances
from left_trainer.compression.removal import Kept, kept_whole, remove_parts
from left_trainer.compression.schedule import AT_START, Stage, stages
from left_trainer.compression.shrink_state import ShrinkState, SizeStep, same_parts
from left_trainer.compression.sizes import Size, parameters_at, size_for, size_of
from left_trainer.compression_options import VOCABULARY
from left_trainer.models import unwrapped, without_adapter
from left_trainer.trainer.checkpointing import CheckpointingTrainer
from left_trainer.training_args import LeftTrainingArguments

logger = logging.get_logger(__name__)


class ShrinkingTrainer(CheckpointingTrainer):
    """A trainer whose model may shrink while it is trained."""

    shrinking: Shrinking | None = None

    def begin_shrinking(self) -> None:
        """For a run from the beginning, before its optimizer is made."""
        if self.shrinking:
            self.shrinking.begin()

    def _first_batches(self, number: int) -> Iterator[dict[str, torch.Tensor]]:
        """The first `number` batches of this process in the present epoch."""
        loader = self.get_train_dataloader()
        try:
            yield from map(self._prepare_inputs, itertools.islice(loader, number))
        finally:
            # accelerate would take the loader that was left early for the one that is read.
            self.accelerator.gradient_state._remove_dataloader(loader)

    def _put_in_place(self, written: Any, target: Any) -> None:
        if self.shrinking:
            self.shrinking.state.write(written)
        super()._put_in_place(written, target)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.shrinking:
            self.shrinking.resume(resume_from_checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, model)


def shrinking_of(trainer: Any, args: LeftTrainingArguments, model: nn.Module) -> Shrinking | None:
    """What shrinks the model of `trainer`; `None` where it stays as large as it is."""
    return Shrinking(trainer, args, model) if set(args.target_size) - {VOCABULARY} else None


def shrinking_callbacks(shrinking: Shrinking | None) -> list[TrainerCallback]:
    """What has a run shrink its model."""
    return [ShrinkAfterSteps(shrinking)] if shrinking else []


class Shrinking:
    """The removals of a run.

    Args:
        trainer: Whose model shrinks.
        args: Of the run.
        model: As it is before the first removal.
    """

    def __init__(self, trainer: Any, args: LeftTrainingArguments, model: nn.Module) -> None:
        base = without_adapter(unwrapped(model))
        self.trainer, self.options, self.target = trainer, args.shrinking, args.target_size
        self.config = copy.deepcopy(base.config)
        self.parameters_before = parameters_at(base.config, size_of(base.config))
        self.state = ShrinkState(history=(SizeStep(0, self.parameters_before, 1.0, size_of(self.config)),))
        self._stages: tuple[Stage, ...] = ()

    @property
    def model(self) -> Any:
        """With an adapter and without the wrappers for several devices."""
        return unwrapped(self.trainer.model)

    @property
    def base(self) -> Any:
        return without_adapter(self.model)

    @property
    def parameters(self) -> int:
        """Of the model without an adapter, apart from embeddings and output head."""
        return parameters_at(self.base.config, size_of(self.base.config))

    # When

    def begin(self) -> None:
        """Start anew from the model as it is, and make the removal that is due before the first step."""
        self.state = dataclasses.replace(self.state, progress=0.0, history=self.state.history[:1], is_final=False)
        if self.options.schedule == AT_START:
            self._shrink(stages(self.options, 0)[0])

    def plan(self, max_steps: int) -> None:
        """Decide on the steps, once their number is known. Raises `ValueError` where they are beyond the end."""
        self._stages = stages(self.options, max_steps)

    def after_step(self, step: int) -> None:
        """Make the removal that is due after `step`, if there is one."""
        due = [stage for stage in self._stages if stage.step <= step and stage.progress > self.state.progress]
        if due and not self.state.is_final:
            self._shrink(dataclasses.replace(due[-1], step=step))

    def resume(self, checkpoint: str) -> None:
        """Give the model the size that it has in `checkpoint`.

        Raises:
            ValueError: The model has lost parts that the checkpoint has.
        """
        saved = ShrinkState.read(checkpoint)
        if saved is None:
            return
        if saved.kept is not None and not same_parts(saved.kept, self.state.kept):
            try:
                kept = relative(saved.kept, self.state.kept or kept_whole(self.model), self.config)
            except KeyError:
                raise ValueError(
                    f"{checkpoint!r} holds a larger model than the one that this trainer has shrunk since. Make a new "
                    "trainer to go on from it."
                ) from None
            self._remove(kept)
        self.state = saved

    # What

    def _shrink(self, stage: Stage) -> None:
        before = size_of(self.base.config)
        layers, parts, whole = self._scores()
        size = self._size_at(stage.progress, whole)
        self.state = dataclasses.replace(self.state, progress=stage.progress)
        if size == before:
            return
        kept = best_parts(self.base.config, size, layers, parts)
        kept_of_all = composed(self.state.kept, kept, self.config)
        self._remove(kept)
        now = self.parameters
        reached = SizeStep(stage.step, now, now / self.parameters_before, size)
        self.state = dataclasses.replace(self.state, kept=kept_of_all, history=(*self.state.history, reached))
        self._forget_best()
        self._tell(before, reached)

    def _scores(self) -> tuple[Scores, Scores, Scores]:
        """Importances that choose blocks, that choose neurons and heads, and that compare all of them."""
        asked = self.options.importance
        of_layers = asked or BLOCK_INFLUENCE
        of_parts = FIRST_ORDER if asked in (None, BLOCK_INFLUENCE) else asked
        trainer = self.trainer
        with _unnoticed(trainer), trainer.compute_loss_context_manager():
            found = importances(
                self.model,
                {of_layers, of_parts},
                trainer._first_batches(self.options.importance_batches),
                lambda model, batch: trainer.compute_loss(model, batch, num_items_in_batch=torch.tensor(1)),
                trainer.args.seed,
            )
        return found[of_layers], found[of_parts], found[of_parts]

    def _size_at(self, progress: float, scores: Scores) -> Size:
        """The size when `progress` of all removals is made."""
        now = size_of(self.base.config)
        share = self.target.get("params")
        if share is None:
            whole = size_of(self.config)
            return smaller_of(now, size_between(self.config, whole, size_for(self.config, self.target), progress))
        last = int(float(share) * self.parameters_before)
        wanted = self.parameters_before - (self.parameters_before - last) * progress
        size = now
        if self.parameters <= wanted:
            return now
        for size, parameters in sizes_down_to(self.base.config, scores, last):
            if parameters <= wanted:
                break
        return size

    def _remove(self, kept: Kept) -> None:
        optimizer = self.trainer.optimizer
        remove_parts(self.model, kept, getattr(optimizer, "optimizer", optimizer))

    def _forget_best(self) -> None:
        """The best model is the best one of the size that the run ends with."""
        state = self.trainer.state
        state.best_metric = state.best_global_step = state.best_model_checkpoint = None

    def _tell(self, before: Size, reached: SizeStep) -> None:
        trainer = self.trainer
        if trainer.is_world_process_zero():
            logger.warning(
                f"step {reached.step}: {described(before, reached.size)}; {reached.share:.0%} of the parameters"
            )
        with _same_control(trainer):
            trainer.log({"parameters": float(reached.parameters), "parameter_share": reached.share})


def described(before: Size, after: Size) -> str:
    """`4+4 layers, ffn 512 -> 3+4 layers, ffn 384`: what two sizes differ in."""
    texts = [_shown(size) for size in (before, after)]
    differing = [index for index, pair in enumerate(zip(*texts, strict=True)) if pair[0] != pair[1]]
    return " -> ".join(", ".join(text[index] for index in differing) for text in texts)


def _shown(size: Size) -> tuple[str, str, str]:
    return (
        f"{'+'.join(str(number) for number in size.layers.values())} layers",
        f"ffn {'+'.join(str(width) for width in dict.fromkeys(size.ffn.values()))}",
        f"{size.heads} heads",
    )


class ShrinkAfterSteps(TrainerCallback):
    """Where the training loop lets a run act: after a step is complete, and before it is evaluated and saved."""

    def __init__(self, shrinking: Shrinking) -> None:
        self.shrinking = shrinking

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Plan the steps."""
        self.shrinking.plan(state.max_steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Make the removal that is due."""
        self.shrinking.after_step(state.global_step)


@contextlib.contextmanager
def _same_control(trainer: Any) -> Iterator[None]:
    """Inside, logging and evaluating do not count as those that are due after the step."""
    before = dict(vars(trainer.control))
    try:
        yield
    finally:
        vars(trainer.control).update(before)


@contextlib.contextmanager
def _unnoticed(trainer: Any) -> Iterator[None]:
    """Inside, losses may be computed that are no part of the training: nothing is logged of them, no number is drawn."""
    metrics: Mapping[str, Any] | None = copy.deepcopy(vars(trainer).get("_metrics"))
    states = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        if metrics is not None:
            trainer._metrics = metrics
