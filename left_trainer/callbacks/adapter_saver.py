"""Saving the adapter alone, whole or not at all."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

from accelerate.utils import extract_model_from_parallel
from peft import PeftModel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from left_trainer.methods.saving import save_adapter, whole_to_save
from left_trainer.storage.errors import write_errors
from left_trainer.storage.whole import hidden_name, sweep, whole_directory

STEP = re.compile(r"step-\d+")
BEST = "best"
BEST_FILE = "best.json"


class AdapterSaverCallback(TrainerCallback):
    """Save the adapter alone on every save, on every best evaluation and at the end of training, in safetensors.

    At the end it is saved with `save_strategy="no"` too.

    Each adapter appears under its final name only when it is whole, so a kill leaves the earlier ones. The last ones
    and the best one are kept, as many as `save_total_limit` says. Each loads with `PeftModel.from_pretrained`.

    It observes: checkpoints and the model stay as the trainer makes them. To resume P-tuning on a plain `Trainer`, add
    `AdapterRestoreCallback`.

    Logs no keys. Files, in `directory`:

    | path | content |
    |---|---|
    | `step-N/` | adapter after step N |
    | `best` | the `step-N/` with the best `metric_for_best_model` so far, where one is set; never dropped |

    Args:
        directory: Where to write; by default `adapters` in `args.output_dir`.

    Raises:
        TypeError: When training begins on a model without an adapter.
        FileExistsError: When a fresh training begins and `directory` holds the adapters of another.
    """

    def __init__(self, directory: str | Path | None = None) -> None:
        self.directory = Path(directory) if directory is not None else None
        self.best_metric: float | None = None
        self._is_training = False
        self._written: set[int] = set()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Check model and directory; after a resume, read which adapter was the best."""
        if not isinstance(unwrap(model), PeftModel):
            raise TypeError(
                f"AdapterSaverCallback saves adapters and {type(model).__name__} has none. Remove the callback for "
                "full fine-tuning; the trainer saves the model itself."
            )
        self.directory = self.directory or Path(args.output_dir) / "adapters"
        self.best_metric, self._is_training, self._written = None, True, set()
        if state.is_world_process_zero:
            sweep(self.directory)
        if state.global_step == 0:
            self._start_afresh(args, state)
            return
        record = self.directory / BEST / BEST_FILE
        if record.is_file():
            self.best_metric = json.loads(record.read_text(encoding="utf-8"))["best_metric"]

    def _start_afresh(self, args: TrainingArguments, state: TrainerState) -> None:
        """Refuse to mix this run's adapters with an earlier run's, or remove those when told to overwrite."""
        earlier = self._saved()
        if not earlier or not state.is_world_process_zero:
            return
        if not getattr(args, "overwrite_output_dir", False):
            raise FileExistsError(
                f"{str(self.directory)!r} holds {earlier[-1].name} of an earlier run. Remove it, or pass another one: "
                "AdapterSaverCallback(directory=...)."
            )
        for path in [*earlier, self._best_path()]:
            _remove(path)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Save the adapter, drop adapters beyond the limit."""
        self._save(unwrap(model), state)
        if state.is_world_process_zero:
            self._drop_beyond(args.save_total_limit)

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Save the adapter when this evaluation is the best so far."""
        name = args.metric_for_best_model
        if name is None or not self._is_training:
            return
        value = (metrics or {}).get(name if name.startswith("eval_") else f"eval_{name}")
        if value is None or not state.global_step:
            return
        best = self.best_metric
        if best is None or (value > best if args.greater_is_better else value < best):
            self.best_metric = value
            record = {"best_metric": value, "metric": name, "global_step": state.global_step}
            step = self._save(unwrap(model), state, {BEST_FILE: json.dumps(record)})
            if state.is_world_process_zero:
                _point(self._best_path(), step)
                self._drop_beyond(args.save_total_limit)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: Any = None, **kwargs: Any
    ) -> None:
        """Save the adapter as the training leaves it, unless it has gone back to an earlier, better one.

        Evaluations from here on save nothing.
        """
        self._is_training = False
        if not args.load_best_model_at_end:
            self.on_save(args, state, control, model)

    def _save(self, model: PeftModel, state: TrainerState, notes: dict[str, str] | None = None) -> Path:
        """All processes are here, as weights that are spread over them have to be gathered; the first one writes."""
        path = self._root() / f"step-{state.global_step}"
        if state.global_step not in self._written:
            with whole_to_save(model, state.is_world_process_zero):
                if state.is_world_process_zero:
                    save_adapter(model, path, notes)
            self._written.add(state.global_step)
        return path

    def _drop_beyond(self, limit: int | None) -> None:
        if limit:
            best = self._best_path().resolve()
            for path in self._saved()[:-limit]:
                if path.resolve() != best:
                    _remove(path)

    def _root(self) -> Path:
        if self.directory is None:
            raise RuntimeError(
                "AdapterSaverCallback is used outside of a training. Pass it to a trainer's `callbacks`."
            )
        return self.directory

    def _best_path(self) -> Path:
        return self._root() / BEST

    def _saved(self) -> list[Path]:
        found = [path for path in self._root().glob("step-*") if STEP.fullmatch(path.name) and not path.is_symlink()]
        return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def unwrap(model: Any) -> Any:
    """The model inside of DistributedDataParallel or torch.compile."""
    return extract_model_from_parallel(model, keep_torch_compile=False)


def _remove(path: Path) -> None:
    if path.is_symlink():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def _point(link: Path, target: Path) -> None:
    """Make `link` mean `target`, in one step where the system has symbolic links, by a copy where it has not."""
    with write_errors(link):
        beside = hidden_name(link)
        try:
            beside.symlink_to(target.name, target_is_directory=True)
        except OSError:
            if link.is_symlink():
                raise
            with whole_directory(link) as folder:
                shutil.copytree(target, folder, dirs_exist_ok=True)
        else:
            beside.replace(link)
