"""Smaller models: teachers, parts that are removed, vocabularies that are trimmed."""

from left_trainer.compression.vocabulary import TrimmedVocabulary, trim_vocabulary

__all__ = ["TrimmedVocabulary", "trim_vocabulary"]
