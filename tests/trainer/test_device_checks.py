"""On which devices a run may have its model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from left_trainer.trainer.device_checks import check_devices, check_one_replica

SPREAD = {"encoder": 0, "decoder": torch.device("cuda", 1)}


def check(device_map: Any, n_gpu: int = 1, processes: int = 1, device: str = "cuda:0", loaded: bool = False) -> None:
    args = SimpleNamespace(n_gpu=n_gpu, world_size=processes, device=torch.device(device))
    model = SimpleNamespace(hf_device_map=device_map) if loaded else "name"
    options = {} if loaded or device_map is None else {"device_map": device_map}
    check_devices(args, SimpleNamespace(model=model, is_loaded=loaded, options=options))


@pytest.fixture(autouse=True)
def two_gpus(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))


@pytest.mark.parametrize("loaded", [False, True])
def test_one_process_may_spread_its_model_over_its_gpus(loaded):
    check(SPREAD, n_gpu=2, loaded=loaded)
    check(None, loaded=loaded)
    with pytest.raises(ValueError, match=r"2 GPUs are visible to one process.*device_map"):
        check(None, n_gpu=2, loaded=loaded)
    with pytest.raises(ValueError, match="2 GPUs are visible to one process"):
        check({"": "cuda:1"}, n_gpu=2, loaded=loaded)
    with pytest.raises(ValueError, match="2 GPUs are visible to one process"):
        check({"encoder": 0, "decoder": "cpu"}, n_gpu=2, loaded=loaded)


def test_a_model_that_fits_one_of_several_gpus_is_seen_once_it_is_loaded():
    check("auto", n_gpu=2)
    args = SimpleNamespace(n_gpu=2)
    check_one_replica(args, SimpleNamespace(hf_device_map=SPREAD))
    with pytest.raises(ValueError, match="2 GPUs are visible to one process"):
        check_one_replica(args, SimpleNamespace(hf_device_map={"": 0}))


@pytest.mark.parametrize("device_map", [SPREAD, "auto", "balanced", {"encoder": 0, "decoder": "cpu"}])
def test_each_of_several_processes_has_its_model_on_one_device(device_map):
    with pytest.raises(ValueError, match=r"device_map=.* spreads the model over .* 2 processes of the run"):
        check(device_map, processes=2)
    if isinstance(device_map, dict):
        with pytest.raises(ValueError, match="spreads the model over"):
            check(device_map, processes=2, loaded=True)


@pytest.mark.parametrize("own", [1, "cuda:1", torch.device("cuda:1"), {"": 1}, {"": "cuda:1"}])
def test_several_processes_have_their_models_on_their_own_devices(own):
    check(own, processes=2, device="cuda:1")
    check(None, processes=2, device="cuda:1")
    with pytest.raises(ValueError, match="puts the models of all 2 processes on cuda:1"):
        check(own, processes=2, device="cuda:0")
    check("cpu", processes=2, device="cpu")
