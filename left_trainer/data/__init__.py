"""Data: loading rows, and turning rows into features."""
