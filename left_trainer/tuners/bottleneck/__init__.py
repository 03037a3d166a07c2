"""Bottleneck adapters: Houlsby's, Pfeiffer's (MAD-X) and parallel ones. They differ in what the bottleneck reads."""

from left_trainer.tuners.bottleneck.config import HoulsbyAdapterConfig, ParallelAdapterConfig, PfeifferAdapterConfig
from left_trainer.tuners.bottleneck.lower_layers import drop_lower_adapters
from left_trainer.tuners.bottleneck.model import HoulsbyAdapterModel, ParallelAdapterModel, PfeifferAdapterModel
from left_trainer.tuners.registration import register_tuner

__all__ = [
    "HoulsbyAdapterConfig",
    "HoulsbyAdapterModel",
    "ParallelAdapterConfig",
    "ParallelAdapterModel",
    "PfeifferAdapterConfig",
    "PfeifferAdapterModel",
    "drop_lower_adapters",
]

register_tuner("houlsby_adapter", HoulsbyAdapterConfig, HoulsbyAdapterModel)
register_tuner("pfeiffer_adapter", PfeifferAdapterConfig, PfeifferAdapterModel)
register_tuner("parallel_adapter", ParallelAdapterConfig, ParallelAdapterModel)
