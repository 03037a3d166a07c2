"""Gradients of LoRA under FSDP2, with the fused pass and with PEFT's; started by test_two_processes.py."""

from __future__ import annotations

import torch
from peft import LoraConfig, get_peft_model
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from left_trainer.kernels.lora_layers import use_lora_linear
from tiny import VOCABULARY_SIZE, tiny_model

distributed.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
gradients = []
for use in (False, True):
    model = get_peft_model(tiny_model("llama"), LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0))
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.3)
    path = use_lora_linear(model, use)
    for layer in model.get_base_model().model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    ids = torch.randint(3, VOCABULARY_SIZE, (2, 9), generator=torch.Generator().manual_seed(distributed.get_rank()))
    for _ in range(2):  # the second pass gathers what the first has freed
        model.zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
    found = {name: value.grad.full_tensor() for name, value in model.named_parameters() if value.grad is not None}
    gradients.append(found)
    assert (path.ran == 2 * 2 * 7) == use, path.report()
    assert bool(path.fell_back) != use, path.report()
assert gradients[0].keys() == gradients[1].keys()
assert len(gradients[0]) == 2 * 2 * 7
for name, gradient in gradients[0].items():
    torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)
distributed.destroy_process_group()
