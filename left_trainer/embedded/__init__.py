"""The offline default: two tiny pretrained models, and data from a seeded grammar."""

from __future__ import annotations

from pathlib import Path

MODEL_PATHS = {
    "encoder_decoder": Path(__file__).parent / "t5",
    "decoder_only": Path(__file__).parent / "llama",
}
# What a user may write in --model_name_or_path.
MODEL_NAMES = {f"embedded/{path.name}": str(path) for path in MODEL_PATHS.values()}
DEFAULT_MODEL = "embedded/t5"
