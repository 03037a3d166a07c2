"""The time of a step: what bounds an operation, and how host and device wait for each other."""

from __future__ import annotations

import pytest
import torch

from left_trainer.planning.devices import DEVICES, LAUNCH_SECONDS, Device, find_device
from left_trainer.planning.timing import (
    KERNEL_SECONDS,
    PRODUCTS,
    TRAFFIC,
    kernel_seconds,
    step_time,
)
from left_trainer.recording.recorder import Operation, TensorShape

DEVICE = Device("d", 2**34, 1e12, {torch.float32: 1e13, torch.bfloat16: 1e14})
BF16, FP32 = torch.bfloat16, torch.float32


def operation(n_bytes=0, flops=0, dtype=BF16, phase="forward", is_synchronous=False):
    shape = TensorShape((n_bytes,), dtype, n_bytes)
    return Operation("aten.op.default", phase, "", "", (shape,), (), flops, is_synchronous)


@pytest.mark.parametrize(
    ("given", "seconds", "bound"),
    [
        (operation(n_bytes=10**9), 1e9 / (TRAFFIC * 1e12), "bandwidth"),
        (operation(n_bytes=10**6, flops=10**12), 1e12 / (PRODUCTS * 1e14), "compute"),
        (operation(n_bytes=10**6, flops=10**12, dtype=FP32), 1e12 / (PRODUCTS * 1e13), "compute"),
        (operation(n_bytes=8), KERNEL_SECONDS, "launches"),
    ],
)
def test_an_operation_takes_the_longer_of_arithmetic_and_traffic(given, seconds, bound):
    assert kernel_seconds(given, DEVICE) == (pytest.approx(seconds), bound)


def test_the_host_runs_ahead_of_long_kernels():
    long = operation(n_bytes=10**9)
    time = step_time([long] * 100, DEVICE)
    assert time.seconds == pytest.approx(LAUNCH_SECONDS + 100 * kernel_seconds(long, DEVICE)[0])
    assert time.bound == "bandwidth"


def test_short_kernels_wait_for_the_host():
    time = step_time([operation(8)] * 100 + [operation(8, phase="backward")] * 50, DEVICE)
    launches = 150 * LAUNCH_SECONDS
    assert time.host_seconds == pytest.approx(launches)
    assert time.seconds == pytest.approx(launches + KERNEL_SECONDS)
    assert time.bound == "launches"


def test_the_host_waits_where_it_reads_a_result():
    long = operation(n_bytes=10**9)
    kernel = kernel_seconds(long, DEVICE)[0]
    ahead = step_time([long, operation(8)] * 10, DEVICE).seconds
    waiting = step_time([long, operation(8, is_synchronous=True)] * 10, DEVICE).seconds
    assert ahead == pytest.approx(LAUNCH_SECONDS + 10 * (kernel + KERNEL_SECONDS))
    assert waiting > ahead + 9 * 0.9 * LAUNCH_SECONDS


def test_phases_add_up_to_the_step():
    time = step_time([operation(10**8, phase=phase) for phase in ("forward", "backward", "optimizer")] * 3, DEVICE)
    assert sum(time.phases.values()) == pytest.approx(time.seconds)


@pytest.mark.parametrize("device", DEVICES.values(), ids=lambda device: device.name)
def test_every_device_has_what_a_plan_reads(device):
    assert device.source
    assert device.memory_bytes > 2**32
    if device.bandwidth is None:
        with pytest.raises(ValueError, match="only the memory is known"):
            step_time([operation(8)], device)
        return
    assert device.peak_flops(torch.float16) >= device.peak_flops(torch.float32) > 5 * device.bandwidth
    assert step_time([operation(8)], device).seconds > 0


@pytest.mark.parametrize("name", ["RTX 4090", "rtx_4090", "rtx-4090"])
def test_devices_are_found_as_people_write_them(name):
    assert find_device(name).name == "rtx-4090"


def test_an_unknown_device_is_refused_with_those_known():
    with pytest.raises(ValueError, match=r"device='rtx 409' is not known. Did you mean 'rtx-4090'\? .*--memory_gib"):
        find_device("rtx 409")
