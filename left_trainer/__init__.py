"""LEFT: LLM efficient fine-tuning for people who already use Hugging Face."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from left_trainer.trainer import LeftTrainer
