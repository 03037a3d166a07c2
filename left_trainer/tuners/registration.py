"""Make our tuners known to PEFT, so that adapters save and load through PEFT itself."""

from __future__ import annotations

import importlib
import pkgutil

from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import register_peft_method

from left_trainer import tuners


def peft_type(name: str) -> PeftType:
    """The member of `PeftType` called `name`, in upper case; added when there is none.

    PEFT refuses to register names outside of this enum (peft 0.21), and Python's enums cannot be extended, so the
    member is made the way `enum` makes its own. This can go once PEFT takes new names.
    """
    value = name.upper()
    if value not in PeftType.__members__:
        member = str.__new__(PeftType, value)
        member._name_, member._value_ = value, value
        PeftType._member_map_[value] = member
        PeftType._value2member_map_[value] = member
        PeftType._member_names_.append(value)
        type.__setattr__(PeftType, value, member)
    return PeftType(value)


def register_tuner(name: str, config_class: type[PeftConfig], model_class: type[BaseTuner]) -> None:
    """Register a tuner under `name`, in lower case; nothing happens the second time.

    Args:
        name: In lower case; in upper case it is the `peft_type` of saved adapters.
        config_class: Its `__post_init__` sets `self.peft_type = peft_type(name)`.
        model_class: Its `prefix` is the prefix of the adapter's parameter names.
    """
    if peft_type(name) not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(name=name, config_cls=config_class, model_cls=model_class, prefix=model_class.prefix)


def replace_config(config_class: type[PeftConfig]) -> None:
    """Let PEFT read saved adapters into `config_class` in place of its base class, `config_class.replaces`."""
    PEFT_TYPE_TO_CONFIG_MAPPING[config_class().peft_type] = config_class


def register_tuners() -> None:
    """Import every folder of this package; each registers its own tuner."""
    for module in pkgutil.iter_modules(tuners.__path__):
        if module.ispkg:
            importlib.import_module(f"{tuners.__name__}.{module.name}")
