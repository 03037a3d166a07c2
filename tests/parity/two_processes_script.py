"""One run, of one or more processes; started by test_two_processes.py."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from datasets import Dataset

from left_trainer import LeftTrainer, LeftTrainingArguments
from left_trainer.models import model_family
from log_history import gradient_norms, losses
from tiny import tiny_model, tiny_rows, tiny_tokenizer

model_type, batch_size, accumulation, sort, output = sys.argv[1:]
model = tiny_model(model_type)
args = LeftTrainingArguments(
    output_dir=str(Path(output).parent / "run"),
    per_device_train_batch_size=int(batch_size),
    gradient_accumulation_steps=int(accumulation),
    max_steps=2,
    max_grad_norm=1e9,
    learning_rate=0.0,  # the second step sees other rows, but the same weights
    logging_steps=1,
    save_strategy="no",
    train_sampling_strategy="sequential",
    per_device_eval_batch_size=2,
    predict_with_generate=True,
    generation_max_length=4,
    sort_eval_by_length=sort == "sorted",
    report_to="none",
    disable_tqdm=True,
    use_cpu=True,
    seed=5,
    distillation_kwargs={"hidden_weight": 0.3} if sort == "taught" else None,
)
wider = {"t5": {"d_model": 24}, "llama": {"hidden_size": 24}}  # so that the projections of hidden states are trained
rows = Dataset.from_list(tiny_rows())
trainer = LeftTrainer(
    model,
    args,
    train_dataset=rows.to_iterable_dataset() if sort == "streamed" else rows,
    processing_class=tiny_tokenizer(model_family(model)),
    teacher_model=tiny_model(model_type, seed=4, **wider[model_type]) if sort == "taught" else None,
)
trainer.train()
prediction = trainer.predict(Dataset.from_list(tiny_rows(5)))
loss = trainer.evaluate_loss(Dataset.from_list(tiny_rows(5)))
if trainer.is_world_process_zero():
    result = {"losses": losses(trainer), "gradient_norms": gradient_norms(trainer)}
    result |= {"predictions": prediction.predictions.tolist(), "labels": prediction.label_ids.tolist()}
    result |= {"chrf": prediction.metrics["test_chrf"], "loss": prediction.metrics["test_loss"], "loss_alone": loss}
    hidden = trainer.teaching and trainer.teaching.hidden
    result["projections"] = [value.tolist() for value in hidden.state_dict().values()] if hidden else []
    result["by_length"] = trainer.fast_paths["sorted_generation"].ran
    Path(output).write_text(json.dumps(result))
