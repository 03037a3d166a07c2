"""Judging what a model writes: generation, metrics, and text from token ids."""
