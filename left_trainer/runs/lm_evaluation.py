"""Scores of a saved model on tasks of lm-evaluation-harness, which asks it in its own way."""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from left_trainer.adapters.run_settings import RunSettings
from left_trainer.data.prompts import model_positions
from left_trainer.evaluation.generation import generate_completions
from left_trainer.methods.saving import adapter_method, adapter_positions
from left_trainer.models import ModelFamily, without_upstream_warnings
from left_trainer.registry import did_you_mean
from left_trainer.runs.evaluation import EvaluationReport, SavedModel
from left_trainer.runs.fine_tuning import N_SAMPLES, TASK_DEFAULTS
from left_trainer.runs.inference import load_for_use, source_for_use
from left_trainer.runs.measurements import machine_name
from left_trainer.runs.report import Sample
from left_trainer.trainer.model_card import package_versions

PACKAGE, DISTRIBUTION = "lm_eval", "lm-eval"
BACKENDS: dict[ModelFamily, str] = {"encoder_decoder": "seq2seq", "decoder_only": "causal"}
NO_FILTER = "none"
OF_SAMPLING = ("temperature", "top_p", "top_k", "min_p")


@dataclass(frozen=True, kw_only=True)
class LmEvaluation(SavedModel):
    """What is asked for, beside the model.

    Args:
        tasks: Names that lm-evaluation-harness knows, or YAML files of tasks.
        num_fewshot: Examples in each prompt; by default those of the task.
        max_eval_samples: Score only so many rows of each task.
    """

    tasks: Sequence[str]
    num_fewshot: int | None = None
    max_eval_samples: int | None = None


def evaluate_with_lm_eval(asked: LmEvaluation) -> EvaluationReport:
    """Score a saved model, with its adapter, on tasks of lm-evaluation-harness.

    Prompts, answers and metrics are the tasks' own: neither the run's template nor its generation settings are used.
    Scores are called `TASK.METRIC`, with their standard errors.

    Raises:
        ImportError: The package is not installed.
        ValueError: A task is not known or cannot be loaded, or the model cannot be used.
    """
    manager = _task_manager(asked.tasks)
    source = source_for_use(asked.path, asked.trust_remote_code, asked.dtype, asked.hub)
    method, settings = adapter_method(source), source.settings or RunSettings()
    model, tokenizer = load_for_use(source)

    from lm_eval import simple_evaluate

    batch_size = asked.per_device_eval_batch_size or settings.per_device_eval_batch_size
    scored = scored_model_class()(
        pretrained=model,
        tokenizer=tokenizer,
        backend=BACKENDS[source.family],  # type: ignore[arg-type]
        batch_size=batch_size or TASK_DEFAULTS["per_device_eval_batch_size"],
        max_length=model_positions(source.config, adapter_positions(source).source),
        truncation=True,
    )
    with without_upstream_warnings():
        found: Any = simple_evaluate(
            scored,
            tasks=list(asked.tasks),
            task_manager=manager,
            num_fewshot=asked.num_fewshot,
            limit=asked.max_eval_samples,
            bootstrap_iters=1000,
        )
    return EvaluationReport(
        model=asked.path,
        base_model=source.base_name,
        method=method.name if method else settings.method,
        task=", ".join(asked.tasks),
        prompt="",
        test_file=f"{DISTRIBUTION} {importlib.metadata.version(DISTRIBUTION)}",
        test_rows=sum(count["effective"] for count in found["n-samples"].values()),
        metrics=dict(_scores(found["results"])),
        num_beams=1,
        max_new_tokens=None,
        samples=tuple(_samples(found["samples"])),
        versions=package_versions(),
        device=str(model.device),
        machine=machine_name(),
    )


def scored_model_class() -> Any:
    """The class through which lm-evaluation-harness asks a model. It is made here, as the package is optional."""
    from lm_eval.models.huggingface import HFLM

    class ScoredModel(HFLM):
        """Generates for a prompt in a batch what it generates for the prompt alone, whatever the adapter is."""

        def _model_generate(self, context: torch.Tensor, max_length: int, stop: list[str], **options: Any) -> Any:
            new = max_length - context.shape[1]
            if self.backend == "seq2seq":  # the limit would count the tokens of the encoder as the decoder's
                return super()._model_generate(context, new + 1, stop, **options)
            mask = options.pop("attention_mask").bool()
            prompts = [row[kept] for row, kept in zip(context, mask, strict=True)]
            if not options.get("do_sample"):
                options = {name: value for name, value in options.items() if name not in OF_SAMPLING}
                options["do_sample"] = False
            options["max_new_tokens"] = new
            # The caller cuts what was written at the stop sequences.
            written = generate_completions(self.model, prompts, self.tokenizer.pad_token_id, **options)
            return torch.cat([context, written.to(context)], dim=1)

    return ScoredModel


def _task_manager(tasks: Sequence[str]) -> Any:
    """What loads the tasks. Raises where the package, a file or a name is missing, before weights are loaded."""
    if importlib.util.find_spec(PACKAGE) is None:
        raise ImportError(
            f"lm_eval={' '.join(tasks)} needs lm-evaluation-harness, which is not installed. Install it: pip install "
            f"{DISTRIBUTION}"
        )
    from lm_eval.tasks import TaskManager

    files = [task for task in tasks if task.endswith((".yaml", ".yml"))]
    for file in files:
        if not Path(file).is_file():
            raise FileNotFoundError(f"lm_eval={file!r} does not exist. Pass the YAML file of a task.")
    names = [task for task in tasks if task not in files]
    manager = TaskManager(include_defaults=bool(names))  # which reads some thousand files
    for name in names:
        if not manager.match_tasks([name]):
            raise ValueError(
                f"lm_eval={name!r} is no task of lm-evaluation-harness.{did_you_mean(name, manager.all_tasks)} "
                "`lm-eval ls tasks` lists them; a task of your own is a YAML file."
            )
    return manager


def _scores(results: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, float]]:
    """Scores by name, `hellaswag.acc` for its `acc,none`."""
    for task, figures in results.items():
        for key, value in figures.items():
            metric, comma, kind = key.partition(",")
            if comma and isinstance(value, int | float):
                yield ".".join([task, metric, *([kind] if kind != NO_FILTER else [])]), float(value)


def _samples(samples: Mapping[str, Sequence[Mapping[str, Any]]]) -> Iterator[Sample]:
    """The first rows with the answers that the tasks have taken."""
    rows = [row for of_task in samples.values() for row in of_task]
    for row in rows[:N_SAMPLES]:
        first = next(iter(row["arguments"].values())) if isinstance(row["arguments"], Mapping) else row["arguments"][0]
        prompt = first["arg_0"] if isinstance(first, Mapping) else first[0]
        answer = row["filtered_resps"]
        yield Sample(str(prompt), str(row["target"]), prediction=str(answer[0] if len(answer) == 1 else answer))
