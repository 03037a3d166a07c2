"""What a plan says, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, T5Config

from left_trainer import LeftTrainingArguments, plan_training
from left_trainer.planning.advice import largest
from left_trainer.recording.storage_bytes import in_cuda_blocks
from tiny import CONFIGS, VOCABULARY_SIZE

LLAMA = LlamaConfig(**CONFIGS["llama"], vocab_size=VOCABULARY_SIZE)


def arguments(tmp_path, **options) -> LeftTrainingArguments:
    return LeftTrainingArguments(output_dir=str(tmp_path), report_to="none", **options)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tokens": 0}, "target_tokens=0 must be at least 1"),
        ({"tokens": 1000}, "A row of 1000 tokens.* longer than the 128 positions"),
        ({"tokens": 8, "source_tokens": 8}, "tokens=8 is the length of plain text"),
        ({"tokens": 8, "device": "tpu"}, "device='tpu' is not known"),
        ({"tokens": 8, "dtype": "int8"}, "dtype='int8' is not known"),
    ],
)
def test_bad_input_is_refused(given, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        plan_training(LLAMA, arguments(tmp_path), **given)


def test_a_model_without_a_config_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"neither a directory with a config\.json"):
        plan_training(str(tmp_path / "nothing"), arguments(tmp_path), tokens=8)


def test_parts_sum_to_the_peak_and_phases_follow_each_other(tmp_path):
    plan = plan_training(LLAMA, arguments(tmp_path, peft_method="full"), source_tokens=16, target_tokens=8)
    assert sum(plan.step.parts.values()) == plan.peak_bytes == max(size for _, size in plan.timeline)
    assert sum(plan.step.activations.values()) == plan.step.parts["activations"]
    assert list(dict.fromkeys(phase for phase, _ in plan.timeline)) == ["forward", "backward", "optimizer"]
    assert plan.step.parts["optimizer state"] >= 2 * 4 * plan.trained_parameters
    assert plan.fits(plan.run_bytes)
    assert not plan.fits(plan.run_bytes - 1)


def test_an_optimizer_in_8_bits_needs_less(tmp_path):
    pytest.importorskip("bitsandbytes")
    config = LlamaConfig(**{**CONFIGS["llama"], "hidden_size": 128, "num_hidden_layers": 1}, vocab_size=VOCABULARY_SIZE)
    sizes = [
        plan_training(config, arguments(tmp_path, peft_method="full", optim=optim), tokens=8).step.parts
        for optim in ("adamw_torch_fused", "adamw_bnb_8bit")
    ]
    assert sizes[1]["optimizer state"] < 0.6 * sizes[0]["optimizer state"]


def test_operations_have_what_a_roofline_needs(tmp_path):
    plan = plan_training(LLAMA, arguments(tmp_path), tokens=16)
    products = [operation for operation in plan.operations if operation.flops]
    forward = sum(operation.flops for operation in products if operation.phase == "forward")
    tokens = plan.batch.rows * plan.batch.target
    assert forward > 2 * tokens * 3 * LLAMA.hidden_size * LLAMA.intermediate_size * LLAMA.num_hidden_layers
    assert all(operation.read_bytes or operation.written_bytes for operation in plan.operations)
    assert {operation.phase for operation in plan.operations} == {"forward", "backward", "optimizer"}
    assert any(operation.module_type == "LlamaMLP" for operation in plan.operations)


def test_generation_and_beams_need_room(tmp_path):
    config = T5Config(**CONFIGS["t5"], vocab_size=VOCABULARY_SIZE)
    sizes = [
        plan_training(
            config,
            arguments(tmp_path, predict_with_generate=True, generation_max_length=64, generation_num_beams=beams),
            source_tokens=16,
            target_tokens=8,
        ).evaluation_bytes
        for beams in (1, 4)
    ]
    assert sizes[1] > sizes[0]


def test_a_plan_changes_nothing_around_it(tmp_path):
    state, available = torch.random.get_rng_state(), torch.cuda.is_available()
    plan_training(LLAMA, arguments(tmp_path), tokens=16)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.cuda.is_available() == available
    assert torch.ones(2).device.type == "cpu"


def test_blocks_of_512_bytes():
    assert [in_cuda_blocks(size) for size in (0, 1, 512, 513)] == [0, 512, 512, 1024]


@pytest.mark.parametrize("need", [lambda number: number, lambda number: 7 + number**2 / 9], ids=["line", "curve"])
@pytest.mark.parametrize(("start", "answer"), [(4, 0), (4, 1), (4, 4), (4, 9), (1, 31), (64, 3), (1, 4096)])
def test_the_largest_that_fits_is_found_in_few_steps(need, start, answer):
    tried = []
    found = largest(lambda number: tried.append(number) or need(number), need(answer + 0.5), (start, need(start)), 4096)
    assert answer * 31 / 32 <= found <= answer
    assert len(tried) <= 12


def test_the_largest_stays_below_what_is_not_allowed():
    assert 968 <= largest(lambda number: number if number <= 1000 else float("inf"), 1e9, (8, 8), 2**20) <= 1000
