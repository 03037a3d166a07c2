"""Tasks: the format of the data, and the metrics."""

from left_trainer.tasks import classification, dialogue, summarization, translation
from left_trainer.tasks.registry import get_task, list_tasks, register_task
from left_trainer.tasks.task import HubDataset, Task

__all__ = [
    "HubDataset",
    "Task",
    "classification",
    "dialogue",
    "get_task",
    "list_tasks",
    "register_task",
    "summarization",
    "translation",
]
