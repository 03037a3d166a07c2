"""`keep_sizes`: a whole model of each size that a run has had, with its scores, and a picture of all."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from left_trainer.adapters.text_files import write_whole
from left_trainer.compression.shrink_state import SizeStep
from left_trainer.compression.size_plot import draw_sizes
from left_trainer.evaluation.scores import is_quality, is_score

SIZES_FOLDER, SIZE_FILE, PICTURE = "sizes", "size.json", "quality.png"


def write_size(trainer: Any, size: SizeStep, scores: Mapping[str, float], score: str | None) -> None:
    """Leave the model as it is in `sizes/<n>-params` of the output folder, and draw all that are there.

    Args:
        trainer: Whose model it is.
        size: Its size.
        scores: Of the validation split; empty where there is none.
        score: To be drawn; by default the first that says how good a model is, else the loss.
    """
    sizes = Path(trainer.args.output_dir) / SIZES_FOLDER
    folder = sizes / f"{size.parameters}-params"
    trainer.save_model(str(folder), _internal_call=True)
    if not trainer.is_world_process_zero():
        return
    known = {name: value for name, value in scores.items() if is_score(name)}
    write_whole(folder / SIZE_FILE, json.dumps({**dataclasses.asdict(size), "scores": known}, indent=2) + "\n")
    if score not in known:
        score = next((name for name in known if is_quality(name)), "loss")
    written = [json.loads(file.read_bytes()) for file in sorted(sizes.glob(f"*-params/{SIZE_FILE}"))]
    points = [(each["parameters"], each["scores"][score]) for each in written if score in each["scores"]]
    if points:
        draw_sizes(points, score, sizes / PICTURE)
