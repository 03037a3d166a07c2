"""Comparison: methods x tasks, measured."""
