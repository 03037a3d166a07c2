"""Callbacks for any `Trainer`. They observe, but for `AdapterRestoreCallback`, which acts."""

from left_trainer.callbacks.adapter_restore import AdapterRestoreCallback
from left_trainer.callbacks.adapter_saver import AdapterSaverCallback
from left_trainer.callbacks.memory_profiler import MemoryProfilerCallback
from left_trainer.callbacks.trainable_parameters import TrainableParametersCallback

__all__ = ["AdapterRestoreCallback", "AdapterSaverCallback", "MemoryProfilerCallback", "TrainableParametersCallback"]
