"""Tasks: what for."""

from left_trainer.tasks import summarization
from left_trainer.tasks.registry import get_task, list_tasks, register_task
from left_trainer.tasks.task import Task

__all__ = ["Task", "get_task", "list_tasks", "register_task", "summarization"]
