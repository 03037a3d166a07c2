"""The trainer: everything that subclasses or overrides one of Hugging Face's."""

from left_trainer.trainer.trainer import LeftSeq2SeqTrainer, LeftSFTTrainer, LeftTrainer

__all__ = ["LeftSFTTrainer", "LeftSeq2SeqTrainer", "LeftTrainer"]
