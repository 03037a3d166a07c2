"""What accelerate and transformers still do wrong with FSDP2, and left_trainer mends."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from torch import distributed, nn
from torch.distributed.tensor import DTensor
from transformers import Trainer

from package_walk import home
from tiny import tiny_model


@pytest.fixture
def group_of_one(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def sharded(model: nn.Module, **options: Any) -> nn.Module:
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="NO_WRAP", **options)
    state = SimpleNamespace(fsdp_plugin=plugin)
    accelerator = SimpleNamespace(state=state, mixed_precision="no", device=torch.device("cpu"), is_main_process=True)
    return fsdp2_prepare_model(accelerator, model)


def test_modules_that_share_a_weight_are_sharded_one_by_one(group_of_one):
    model = sharded(tiny_model("t5"))
    ids = torch.ones(1, 3, dtype=torch.long)
    with pytest.raises(ValueError, match="another FSDP group"):  # without it, shard_tied_weights can go
        model(input_ids=ids, labels=ids)


def test_weights_that_are_to_be_left_are_sharded_where_one_process_loads(group_of_one):
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    sharded(model, cpu_ram_efficient_loading=True, ignored_modules=[model[0]])
    assert isinstance(model[0].weight, DTensor), (
        "accelerate now leaves the weights that it is told to also where one process loads them: "
        f"{home('keep_adapter_whole')} need not copy them itself."
    )


def test_no_model_is_saved_where_checkpoints_are_sharded():
    saved: list[Any] = []
    plugin = SimpleNamespace(state_dict_type="SHARDED_STATE_DICT")
    trainer = SimpleNamespace(
        is_fsdp_enabled=True,
        accelerator=SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin), get_state_dict=lambda model: {}),
        model=None,
        args=SimpleNamespace(push_to_hub=False, output_dir="run"),
        _save=lambda *args, **kwargs: saved.append(args),
    )
    Trainer.save_model(trainer, "run")
    assert not saved, f"transformers now saves the model itself: {home('ShardingTrainer')}.save_model can go."


def test_a_model_is_sharded_together_with_an_optimizer():
    mended = f"A model can now be sharded before it is trained: {home('ShardingTrainer')}.prepare_to_evaluate can go."
    assert "a model and optimizer must be passed together" in inspect.getsource(Accelerator.prepare), mended
    assert "self.accelerator.prepare(model)" in inspect.getsource(Trainer.evaluation_loop), mended
