"""The registry of tasks. Each task module registers its task on import."""

from __future__ import annotations

from left_trainer.registry import Registry
from left_trainer.tasks.task import Task

TASKS: Registry[Task] = Registry("task", argument="task")

register_task = TASKS.register
get_task = TASKS.get
list_tasks = TASKS.list
