"""Pictures of a run in the trackers of `report_to`, which Hugging Face's callbacks send figures and text alone."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from transformers import TrainerCallback, TrainingArguments
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback


def log_pictures(callbacks: Iterable[TrainerCallback], args: TrainingArguments, step: int) -> None:
    """Send every PNG file in `output_dir` to the trackers, under `pictures/` and the name of the file.

    Args:
        callbacks: Of the trainer, the trackers' among them.
        args: Of the run.
        step: At which the pictures stand.
    """
    pictures = {f"pictures/{path.stem}": path for path in sorted(Path(str(args.output_dir)).glob("*.png"))}
    if not pictures:
        return
    for callback in callbacks:
        for kind, log in LOGGERS.items():
            if isinstance(callback, kind):
                log(callback, args, pictures, step)


def _to_tensorboard(
    callback: TensorBoardCallback, args: TrainingArguments, pictures: Mapping[str, Path], step: int
) -> None:
    from matplotlib.image import imread
    from torch.utils.tensorboard import SummaryWriter

    # The callback closes its own writer at the end of the training. One more file in its folder is the same run.
    with SummaryWriter(log_dir=callback.logging_dir) as writer:
        for name, path in pictures.items():
            writer.add_image(name, imread(path), step, dataformats="HWC")


def _to_wandb(callback: WandbCallback, args: TrainingArguments, pictures: Mapping[str, Path], step: int) -> None:
    import wandb

    if wandb.run is not None:
        images = {name: wandb.Image(str(path)) for name, path in pictures.items()}
        wandb.log({**images, "train/global_step": step})


def _to_trackio(callback: TrackioCallback, args: TrainingArguments, pictures: Mapping[str, Path], step: int) -> None:
    import trackio

    # The callback ends its run with the training. A run of the same name goes on.
    trackio.init(project=args.project, name=args.run_name, space_id=args.trackio_space_id, resume="allow")
    images = {name: trackio.Image(str(path)) for name, path in pictures.items()}
    trackio.log({**images, "train/global_step": step})
    trackio.finish()


LOGGERS: dict[type[TrainerCallback], Callable[..., None]] = {
    TensorBoardCallback: _to_tensorboard,
    TrackioCallback: _to_trackio,
    WandbCallback: _to_wandb,
}
