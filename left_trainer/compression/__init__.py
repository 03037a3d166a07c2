"""Smaller models: teachers and their losses, parts that are removed, vocabularies that are trimmed."""
