"""`torch_compile`: the blocks of the model are compiled, in the place of the whole that accelerate would compile.

Compiled as a whole, a model computes its loss from stored logits, and each of its layers is compiled on its own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from accelerate.utils import TorchDynamoPlugin
from torch import nn

from left_trainer.kernels.compiled_blocks import compile_options, use_compiled_blocks
from left_trainer.trainer.sharding import ShardingTrainer
from left_trainer.training_args import LeftTrainingArguments


class CompilingTrainer(ShardingTrainer):
    """A trainer that compiles the blocks of its model."""

    def create_accelerator_and_postprocess(self) -> None:
        """As in `Trainer`, with nothing left for accelerate to compile."""
        super().create_accelerator_and_postprocess()
        if compile_options(self.args) is not None:
            self.accelerator.state.dynamo_plugin = TorchDynamoPlugin(backend="no")

    def compile_blocks(self, model: nn.Module, args: LeftTrainingArguments) -> None:
        """Have the blocks of `model` compiled where that is asked for, and as they are where it is not."""
        use_compiled_blocks(model, compile_options(args), self.fast_paths)

    @contextlib.contextmanager
    def with_plain_blocks(self) -> Iterator[None]:
        """Inside, blocks run as they are, for what watches their parts: compiled ones call no hooks."""
        use_compiled_blocks(self.model, None, self.fast_paths)
        yield
        self.compile_blocks(self.model, self.args)
