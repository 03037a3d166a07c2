"""What the first process says of work before a training."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from tqdm.auto import tqdm

from left_trainer.training_args import LeftTrainingArguments

logger = logging.getLogger(__name__)


def shown(args: LeftTrainingArguments, batches: Sequence[Any], what: str) -> Any:
    """`batches`, with a progress bar."""
    return tqdm(batches, desc=what, disable=args.disable_tqdm or args.process_index > 0)


def tell(args: LeftTrainingArguments, text: str) -> None:
    """Log a sentence."""
    if args.process_index == 0:
        logger.warning(text)
