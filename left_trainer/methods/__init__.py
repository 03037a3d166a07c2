"""Methods: what is trained, and how."""

from left_trainer.methods import additive, lora, orthogonal, reparameterization, selective, soft_prompts, spectral
from left_trainer.methods.apply import AppliedMethod, apply_method
from left_trainer.methods.method import PeftMethod
from left_trainer.methods.registry import get_method, list_methods, register_method

__all__ = [
    "AppliedMethod",
    "PeftMethod",
    "additive",
    "apply_method",
    "get_method",
    "list_methods",
    "lora",
    "orthogonal",
    "register_method",
    "reparameterization",
    "selective",
    "soft_prompts",
    "spectral",
]
