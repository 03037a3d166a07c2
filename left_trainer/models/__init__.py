"""Which model: what a user passes as `model`, its family, and loading it."""

from left_trainer.models.family import FAMILIES, ModelFamily, auto_class, model_family
from left_trainer.models.input_embeddings import InputEmbeddings, has_absolute_positions, input_embeddings
from left_trainer.models.loading import build_skeleton, load_model, load_tokenizer
from left_trainer.models.source import ModelSource, is_adapter_directory
from left_trainer.models.upstream_logs import tidy_upstream_logs
from left_trainer.models.wrapping import unwrapped, without_adapter, without_upstream_warnings

tidy_upstream_logs()

__all__ = [
    "FAMILIES",
    "InputEmbeddings",
    "ModelFamily",
    "ModelSource",
    "auto_class",
    "build_skeleton",
    "has_absolute_positions",
    "input_embeddings",
    "is_adapter_directory",
    "load_model",
    "load_tokenizer",
    "model_family",
    "unwrapped",
    "without_adapter",
    "without_upstream_warnings",
]
