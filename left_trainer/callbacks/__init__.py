"""Callbacks that observe: usable on any `Trainer`."""

from left_trainer.callbacks.adapter_saver import AdapterSaverCallback
from left_trainer.callbacks.memory_profiler import MemoryProfilerCallback
from left_trainer.callbacks.trainable_parameters import TrainableParametersCallback

__all__ = ["AdapterSaverCallback", "MemoryProfilerCallback", "TrainableParametersCallback"]
