"""Runs of one or two processes, with what they end with; started by tests/parity/test_two_processes.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from left_trainer import LeftTrainer, LeftTrainingArguments
from left_trainer.models import model_family
from log_history import gradient_norms, losses
from tiny import tiny_model, tiny_rows, tiny_tokenizer

WIDER = {"t5": {"d_model": 24}, "llama": {"hidden_size": 24}}  # so that the projections of hidden states are trained


def run(folder: Path, model_type: str, batch_size: int, accumulation: int, kind: str = "sorted") -> dict[str, Any]:
    """Train, predict and evaluate.

    Args:
        folder: For what the run writes.
        model_type: Of the model.
        batch_size: Rows of a process in a batch.
        accumulation: Batches of a step.
        kind: `sorted` or `in_order`, for the rows of the evaluation; `streamed` or `taught`, for the training.
    """
    model = tiny_model(model_type)
    args = LeftTrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=batch_size,
        gradient_accumulation_steps=accumulation,
        max_steps=2,
        max_grad_norm=1e9,
        learning_rate=0.0,  # the second step sees other rows, but the same weights
        logging_steps=1,
        save_strategy="no",
        train_sampling_strategy="sequential",
        per_device_eval_batch_size=2,
        predict_with_generate=True,
        generation_max_length=4,
        sort_eval_by_length=kind == "sorted",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=5,
        distillation_kwargs={"hidden_weight": 0.3} if kind == "taught" else None,
    )
    rows = Dataset.from_list(tiny_rows())
    trainer = LeftTrainer(
        model,
        args,
        train_dataset=rows.to_iterable_dataset() if kind == "streamed" else rows,
        processing_class=tiny_tokenizer(model_family(model)),
        teacher_model=tiny_model(model_type, seed=4, **WIDER[model_type]) if kind == "taught" else None,
    )
    trainer.train()
    found = {"losses": losses(trainer), "gradient_norms": gradient_norms(trainer)}
    hidden = trainer.teaching and trainer.teaching.hidden
    found["projections"] = [value.tolist() for value in hidden.state_dict().values()] if hidden else []
    if kind in ("streamed", "taught"):
        return found
    prediction = trainer.predict(Dataset.from_list(tiny_rows(5)))
    found |= {"predictions": prediction.predictions.tolist(), "labels": prediction.label_ids.tolist()}
    found |= {"chrf": prediction.metrics["test_chrf"], "loss": prediction.metrics["test_loss"]}
    found["loss_alone"] = trainer.evaluate_loss(Dataset.from_list(tiny_rows(5)))
    return {**found, "by_length": trainer.fast_paths["sorted_generation"].ran}


if __name__ == "__main__":
    torch.set_num_threads(1)
    output, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    results = [run(output.parent / "run", *case) for case in cases]
    if torch.distributed.get_rank() == 0:
        output.write_text(json.dumps(results))
