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
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.utils import logging

from left_trainer.adapters.base_model import mark_changed
from left_trainer.callbacks.logging import LoggingCallback
from left_trainer.compression.architecture import architecture_of
from left_trainer.compression.choice import best_parts, composed, relative, size_between, sizes_down_to, smaller_of
from left_trainer.compression.cuts import Kept
from left_trainer.compression.importance import BLOCK_INFLUENCE, FIRST_ORDER, Scores, importances
from left_trainer.compression.removal import kept_whole, remove_parts, why_not_shrinkable
from left_trainer.compression.schedule import AT_START, Stage, stages
from left_trainer.compression.shrink_state import ShrinkState, SizeStep, same_parts
from left_trainer.compression.size_text import described
from left_trainer.compression.sizes import Size, parameters_at, size_for, size_of
from left_trainer.evaluation.scores import without_prefix
from left_trainer.models import unwrapped, without_adapter
from left_trainer.trainer.checkpointing import CheckpointingTrainer
from left_trainer.trainer.data_parallel import shapes_may_change
from left_trainer.trainer.held_size import HeldSize, remove_unneeded
from left_trainer.trainer.kept_sizes import write_size
from left_trainer.trainer.shrink_checks import loses_parts
from left_trainer.training_args import LeftTrainingArguments

logger = logging.get_logger(__name__)
PREFIX = "size"  # of the scores of a size


class ShrinkingTrainer(CheckpointingTrainer):
    """A trainer whose model may shrink while it is trained."""

    shrinking: Shrinking | None = None

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in `Trainer`; a model that will be sharded has its size before that."""
        if self.shrinking and resume_from_checkpoint and (self.is_fsdp_enabled or self.is_deepspeed_enabled):
            self.shrinking.resume(str(resume_from_checkpoint))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def begin_shrinking(self) -> None:
        """For a run from the beginning, before its optimizer is made."""
        if self.shrinking:
            self.shrinking.begin()

    def _first_batches(self, number: int) -> Iterator[dict[str, torch.Tensor]]:
        """The first `number` batches of this process in the present epoch."""
        loader: Any = self.get_train_dataloader()
        try:
            yield from map(self._prepare_inputs, itertools.islice(loader, number))
        finally:
            if hasattr(loader, "end"):  # accelerate would take the loader that was left early for the one that is read
                loader.end()

    def _put_in_place(self, written: Path, target: Path) -> None:
        if self.shrinking:
            self.shrinking.state.write(written)
        super()._put_in_place(written, target)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.shrinking:
            self.shrinking.resume(resume_from_checkpoint)
        super()._load_from_checkpoint(resume_from_checkpoint, model)


def shrinking_of(trainer: Any, args: LeftTrainingArguments, model: nn.Module) -> Shrinking | None:
    """What shrinks the model of `trainer`; `None` where it stays as large as it is."""
    return Shrinking(trainer, args, model) if loses_parts(args) else None


def shrinking_callbacks(shrinking: Shrinking | None) -> list[TrainerCallback]:
    """What has a run shrink its model."""
    return [ShrinkAfterSteps(shrinking)] if shrinking else []


class ShrinkAfterSteps(LoggingCallback):
    """Where the training loop lets a run act: after a step is complete, and before it is evaluated and saved."""

    def __init__(self, shrinking: Shrinking) -> None:
        super().__init__()
        self.shrinking = shrinking

    def take_metrics(self) -> dict[str, float]:
        """The size of the model, for every entry of the log."""
        size = self.shrinking.state.history[-1]
        return {"size/parameters": float(size.parameters), "size/share": size.share}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Plan the steps."""
        self.shrinking.plan(state.max_steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Make the removal that is due."""
        self.shrinking.after_step(state.global_step)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Leave the last size."""
        self.shrinking.end(state.global_step)


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
        self._whole = kept_whole(base)
        size = size_of(self.config)
        self.parameters_before = parameters_at(self.config, size)
        self.state = ShrinkState(history=(SizeStep(0, self.parameters_before, 1.0, size),))
        self._fixed = _fixed_dimensions(model, size)
        if reason := why_not_shrinkable(model, size_for(self.config, self.target)):
            raise ValueError(f"shrink_to={args.shrink_to!r}: {reason}")
        self._stages: tuple[Stage, ...] = ()
        self._last_check = 0
        self._held: HeldSize | None = None

    @property
    def model(self) -> Any:
        """With an adapter and without the wrappers for several devices."""
        return unwrapped(self.trainer.model)

    @property
    def base(self) -> Any:
        """Without an adapter."""
        return without_adapter(self.model)

    # When

    def begin(self) -> None:
        """Start anew from the model as it is, and make the removal that is due before the first step."""
        now = dataclasses.replace(self.state.history[-1], step=0)
        self.state = ShrinkState(kept=self.state.kept, history=(now,))
        is_first_now = self.options.schedule == AT_START
        scores = self._scores() if is_first_now or "params" in self.target else None
        self.state = dataclasses.replace(self.state, last=self._last_size(scores))
        if is_first_now:
            self._judge(0)
            self._shrink(stages(self.options, 0)[0], scores)

    def plan(self, max_steps: int) -> None:
        """Decide on the steps, once their number is known.

        Raises:
            ValueError: They are beyond the end of the training.
        """
        self._stages = stages(self.options, max_steps)
        steps = [0, *(stage.step for stage in self._stages)]
        self._last_check = min(max_steps, steps[-1] + steps[-1] - steps[-2])

    def after_step(self, step: int) -> None:
        """Judge the size that the model had and make the removal that is due after `step`, if there is one."""
        due = [stage for stage in self._stages if stage.step <= step and stage.progress > self.state.progress]
        if due and not self.state.is_final and self._size_at(due[-1].progress) != size_of(self.base.config):
            self._judge(step)
        if due and not self.state.is_final:
            self._shrink(dataclasses.replace(due[-1], step=step))
        if self.options.keep and step >= self._last_check and not self.state.is_final:
            self._judge(step)
            self.state = dataclasses.replace(self.state, is_final=True, held_step=None)

    def end(self, step: int) -> None:
        """After the last step."""
        if self.options.keep_sizes:
            self._judge(step)
        if self.options.keep and self.trainer.args.should_save:
            remove_unneeded(self.trainer.args.output_dir, self.state)

    def resume(self, checkpoint: str) -> None:
        """Give the model the size that it has in `checkpoint`.

        Raises:
            ValueError: The model has lost parts that the checkpoint has, or the copy of a size is missing.
        """
        saved = ShrinkState.read(checkpoint)
        if saved is None:
            return
        if saved.held_step is not None:
            self._held = HeldSize.read(self.trainer, checkpoint, saved.held_step)
            self._shrink_to(self._held.state.kept, checkpoint)
            self._held.remember(self.model)
        self._shrink_to(saved.kept, checkpoint)
        self.state = saved

    def _shrink_to(self, kept: Kept | None, checkpoint: str) -> None:
        if same_parts(kept, self.state.kept):
            return
        try:
            further = relative(kept or self._whole, self.state.kept or self._whole, self.config)
        except ValueError:
            raise ValueError(
                f"{checkpoint!r} holds a larger model than the one that this trainer has shrunk since. Make a new "
                "trainer to go on from it."
            ) from None
        self._remove(further)
        self.state = dataclasses.replace(self.state, kept=kept)

    # How far

    def _judge(self, step: int) -> None:
        """Score the size that the model has had, leave a copy of it, and return to the last one if it does not hold."""
        options, trainer = self.options, self.trainer
        if not options.keep and not options.keep_sizes:
            return
        scores: Mapping[str, float] = {}
        if trainer.eval_dataset is not None:
            with unnoticed(trainer):
                scores = without_prefix(trainer.evaluate(metric_key_prefix=PREFIX), f"{PREFIX}_")
        if options.keep_sizes:
            main = getattr(trainer.compute_metrics, "main", None)
            write_size(trainer, self.state.history[-1], scores, options.kept_metric or main)
        if options.kept_metric is None or options.kept_share is None or self.state.is_final:
            return
        score = scores.get(options.kept_metric)
        if score is None:
            raise ValueError(
                f"shrink_kwargs has keep={options.keep!r}, and {options.kept_metric!r} is not computed by this run. "
                f"Its scores are {', '.join(scores)}."
            )
        if self.state.start_score is None:
            self.state = dataclasses.replace(self.state, start_score=score)
        elif score < options.kept_share * self.state.start_score:
            self._return(step, score)
            return
        self._hold(step)

    def _hold(self, step: int) -> None:
        self.state = dataclasses.replace(self.state, held_step=step)
        self._held = HeldSize(self.trainer, self.state, step)
        self._held.remember(self.model)
        self._held.write()
        if self.trainer.args.should_save:
            remove_unneeded(self.trainer.args.output_dir, self.state)

    def _return(self, step: int, score: float) -> None:
        assert self._held is not None
        before, held = self.state.history[-1], self._held
        with self._changing():
            held.put_back()
        reached = dataclasses.replace(held.state.history[-1], step=step)
        history = self.state.history if reached.size == before.size else (*self.state.history, reached)
        self.state = dataclasses.replace(
            self.state, kept=held.state.kept, history=history, held_step=None, is_final=True
        )
        self._held = None
        first = self.state.start_score
        reason = (
            f"{self.options.kept_metric} fell from {first:.4g} to {score:.4g}, so back to the last size that held: "
        )
        self._tell(before.size, reached, reason)

    # What

    def _shrink(self, stage: Stage, scores: tuple[Scores, Scores] | None = None) -> None:
        before = size_of(self.base.config)
        size = self._size_at(stage.progress)
        self.state = dataclasses.replace(self.state, progress=stage.progress)
        if size == before:
            return
        layers, parts = scores or self._scores()
        kept = best_parts(self.base.config, size, layers, parts, _trained_alone(self.base))
        kept_of_all = composed(self.state.kept, kept, self.config)
        self._remove(kept)
        parameters = parameters_at(self.base.config, size)
        reached = SizeStep(stage.step, parameters, parameters / self.parameters_before, size)
        self.state = dataclasses.replace(self.state, kept=kept_of_all, history=(*self.state.history, reached))
        self._tell(before, reached)

    def _scores(self) -> tuple[Scores, Scores]:
        """Importances that choose blocks, and that choose neurons and heads and compare all of them."""
        asked, trainer = self.options.importance, self.trainer
        of_layers = asked or BLOCK_INFLUENCE
        of_parts = FIRST_ORDER if asked in (None, BLOCK_INFLUENCE) else asked
        with unnoticed(trainer), trainer.compute_loss_context_manager():
            found = importances(
                self.model,
                {of_layers, of_parts},
                trainer._first_batches(self.options.importance_batches),
                lambda model, batch: trainer.compute_loss(model, batch, num_items_in_batch=torch.tensor(1)),
                trainer.args.seed,
            )
        return found[of_layers], found[of_parts]

    def _last_size(self, scores: tuple[Scores, Scores] | None) -> Size:
        """The size at the end.

        Where `params` leaves it open, it is chosen once, by the importances at the start. Chosen anew with each removal
        it would follow the noise of the first steps, in which the importances of whole blocks move most.
        """
        share = self.target.get("params")
        if share is None or scores is None:
            return size_for(self.config, self.target)
        path = sizes_down_to(self.base.config, scores[1], int(float(share) * self.parameters_before), self._fixed)
        return path[-1][0] if path else size_of(self.base.config)

    def _size_at(self, progress: float) -> Size:
        """The size when `progress` of all removals is made."""
        assert self.state.last is not None
        between = size_between(self.config, size_of(self.config), self.state.last, progress)
        return smaller_of(size_of(self.base.config), between)

    def _remove(self, kept: Kept) -> None:
        optimizer = self.trainer.optimizer
        with self._changing():
            remove_parts(self.model, kept, getattr(optimizer, "optimizer", optimizer))
        mark_changed(self.model)

    @contextlib.contextmanager
    def _changing(self) -> Iterator[None]:
        """Inside, parts go or come back. The best model is the best one of the size that the run ends with."""
        trainer = self.trainer
        with shapes_may_change(trainer.model_wrapped, trainer.accelerator.ddp_handler):
            yield
        trainer.state.best_metric = trainer.state.best_global_step = trainer.state.best_model_checkpoint = None

    def _tell(self, before: Size, reached: SizeStep, reason: str = "") -> None:
        if self.trainer.is_world_process_zero():
            change = described(before, reached.size)
            logger.warning(f"step {reached.step}: {reason}{change}; {100 * reached.share:.0f} % of the parameters")


def _fixed_dimensions(model: nn.Module, size: Size) -> list[str]:
    """Widths that the adapter of `model` does not let go."""
    narrower = {
        "ffn": dataclasses.replace(size, ffn={name: width - 1 for name, width in size.ffn.items()}),
        "heads": dataclasses.replace(size, heads=None if size.heads is None else size.heads - 1),
    }
    return [name for name, smaller in narrower.items() if why_not_shrinkable(model, smaller)]


def _trained_alone(base: Any) -> list[str]:
    """Names of the blocks that have trained weights, where no other part of the model has any."""
    blocks = [block.name for block in architecture_of(base.config).blocks(base.config)]
    names = [name for name, weight in base.named_parameters() if weight.requires_grad]
    if not all(any(name.startswith(f"{block}.") for block in blocks) for name in names):
        return []
    trained = [block for block in blocks if any(name.startswith(f"{block}.") for name in names)]
    return trained if len(trained) < len(blocks) else []


@contextlib.contextmanager
def unnoticed(trainer: Any) -> Iterator[None]:
    """Inside, losses and scores may be computed that are no part of the training.

    No random number is drawn of its, no figure is added to its log, and what is due after the step stays due.
    """
    metrics, control = copy.deepcopy(vars(trainer).get("_metrics")), dict(vars(trainer.control))
    is_training = trainer.model.training
    states = random.getstate(), np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        vars(trainer.control).update(control)
        trainer.model.train(is_training)  # by which SFTTrainer knows what its figures are of
        if metrics is not None:
            trainer._metrics = metrics
