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
# The best learning rate of Adam falls about as one over the width (Yang et al., 2022, arXiv 2203.03466), and these
# models are 128 wide; benchmarks/learning_rates.py measures what that gives.
LEARNING_RATE_FACTOR = 3.0
