"""A trained model in the formats of other runtimes, and adapters combined."""
