"""The registry of methods. The family modules fill it when they are imported."""

from __future__ import annotations

from left_trainer.methods.method import PeftMethod
from left_trainer.registry import Registry

METHODS: Registry[PeftMethod] = Registry("method", argument="peft_method")

register_method = METHODS.register
get_method = METHODS.get
list_methods = METHODS.list
