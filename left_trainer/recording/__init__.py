"""Watch the memory and the operations of a training step."""
