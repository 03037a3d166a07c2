"""Smaller models: distillation and progressive shrinking."""
