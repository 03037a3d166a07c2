"""FSDP2 without a GPU.

accelerate shards a model only where the processes have an accelerator each. What it does then is the same on the CPU,
where torch's `fully_shard` works over gloo.
"""

from __future__ import annotations

import functools
import os
from typing import Any

from accelerate.state import AcceleratorState, DistributedType, PartialState


def allow_fsdp_on_cpu() -> None:
    """From now on, FSDP that is asked for is used by processes on the CPU too."""
    initialize = AcceleratorState.__init__

    @functools.wraps(initialize)
    def with_fsdp(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        initialize(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        asked = fsdp_plugin is not None or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
        if asked and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = with_fsdp
