"""Smaller models: teachers, parts that are removed, vocabularies that are trimmed."""
