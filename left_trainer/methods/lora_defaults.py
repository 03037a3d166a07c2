"""What LoRA and its presets have in common."""

from __future__ import annotations

DEFAULTS = {"r": 8, "lora_alpha": 16, "lora_dropout": 0.0}
# The initialisation sets the weights; PEFT's own way cannot resume or reload them.
PLAIN_START = {"init_lora_weights": True}
LOW_RANK = r"W' = W + \tfrac{\alpha}{r} B A, \quad B \in \mathbb{R}^{o \times r}, A \in \mathbb{R}^{r \times i}"
