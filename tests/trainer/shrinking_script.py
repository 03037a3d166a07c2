"""One run that shrinks, of one or more processes; started by test_shrinking.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from datasets import Dataset

from left_trainer import LeftTrainer, LeftTrainingArguments
from left_trainer.models import model_family
from log_history import losses
from tiny import tiny_model, tiny_rows, tiny_tokenizer

model_type, method, batch_size, output = sys.argv[1:]
model = tiny_model(model_type)
args = LeftTrainingArguments(
    output_dir=str(Path(output).parent / f"run-{model_type}-{batch_size}"),
    peft_method=method,
    shrink_to="params=0.5",
    shrink_kwargs={"schedule": [1, 3], "importance_batches": 2},
    teacher_model="none",
    per_device_train_batch_size=int(batch_size),
    max_steps=4,
    learning_rate=1e-3,
    logging_steps=1,
    save_strategy="no",
    train_sampling_strategy="sequential",
    report_to="none",
    disable_tqdm=True,
    use_cpu=True,
    seed=5,
)
rows = Dataset.from_list(tiny_rows())
trainer = LeftTrainer(model, args, train_dataset=rows, processing_class=tiny_tokenizer(model_family(model)))
trainer.train()
weights = torch.cat([weight.detach().flatten().double() for weight in trainer.model.parameters()])
result = {
    "losses": losses(trainer),
    "history": [(step.step, step.parameters) for step in trainer.shrinking.state.history],
    "weights": [weights.sum().item(), weights.abs().sum().item()],
}
suffix = "" if trainer.is_world_process_zero() else f".{args.process_index}"
Path(f"{output}{suffix}").write_text(json.dumps(result))
