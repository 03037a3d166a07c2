"""The races as data: which model and method, against which rival, what is measured and what has to be reached."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Rival = Literal["plain", "frozen", "whole_batches", "full_logits", "trl_divergence", "not_compiled"]
Measure = Literal["training_step", "training_run", "evaluation", "generation"]
RIVALS: dict[Rival, str] = {
    "plain": "Seq2SeqTrainer or SFTTrainer with PEFT",
    "full_logits": "Seq2SeqTrainer with PEFT, and the divergence from the teacher on full logits",
    "trl_divergence": "SFTTrainer with PEFT, and the chunked divergence of TRL's DistillationTrainer",
    "whole_batches": "LeftTrainer with regroup_generation=False: rows of similar length, each batch by `generate`",
    "not_compiled": "LeftTrainer without torch_compile",
    "frozen": "LeftTrainer with the adapter switched off: forward and backward of the frozen model",
}
MEASURES: dict[Measure, str] = {
    "training_step": "the median training step of a turn",
    "training_run": "train(), from its call to its end",
    "evaluation": "a batch of evaluate()",
    "generation": "a batch of evaluate() that generates",
}


@dataclass(frozen=True)
class Target:
    """What a race has to reach. A bound of exactly 1 means "not worse beyond noise".

    Args:
        speed: At least this many times as fast as the rival.
        memory: At most this part of the rival's peak above the loaded weights.
    """

    speed: float
    memory: float | None = None


@dataclass(frozen=True)
class Published:
    """Figures that others published for the same model and batch, on a machine of theirs."""

    peak_mib: float
    steps_per_second: float


@dataclass(frozen=True)
class Shape:
    """A transformers model with random weights, from a fixed seed.

    Args:
        model_type: As in transformers.
        config: Entries of its config.
        has_own_head: The head's weight is not the embeddings'. mT5's checkpoints have one, and its config, which drops
            `tie_word_embeddings=False`, cannot say so (transformers 5.23).
    """

    model_type: str
    config: Mapping[str, Any]
    has_own_head: bool = False


@dataclass(frozen=True)
class Lesson:
    """What a student learns from.

    Args:
        teacher: Its shape.
        loss: Kind of the divergence.
        alpha: Part of the divergence in the loss; TRL's has no other.
        temperature: Of the divergence; TRL's is not multiplied by its square.
    """

    teacher: Shape
    loss: Literal["forward_kl", "reverse_kl", "jsd"]
    alpha: float
    temperature: float


@dataclass(frozen=True)
class Race:
    """One race. Both sides have the same weights, batches and seed.

    Args:
        name: As in `--races`.
        method: Name of a registered method; the rival gets the PEFT config that the method builds.
        shape: Of the model, which then reads random token ids; `None` for the embedded T5-like model, which reads text.
        peft_kwargs: Options of the method.
        dtype: Of weights and computation.
        batch_size: Rows of a step.
        source_length: Tokens of every source (of the prompt, for a decoder-only model).
        prefix_length: Of random ids, how many of the first are the same in every source.
        target_length: Tokens of every target (of the completion).
        data: Text that the embedded model reads, instead of random ids.
        steps: Optimizer steps, or batches of an evaluation, of one turn.
        rival: A key of `RIVALS`.
        measure: A key of `MEASURES`.
        num_beams: Of a race that generates.
        compiled: Whether the sides train with `torch_compile=True`.
        device: That the target is meant for.
        learning_rate: By default the method's own.
        loss_tolerance: Largest relative difference of the losses; by default the dtype's.
        target: What has to be reached; `None` where the figures are only reported.
        published: To be shown beside the figures.
        lesson: Of a race that distils; `None` where there is no teacher.
    """

    name: str
    method: str
    shape: Shape | None = None
    peft_kwargs: Mapping[str, Any] = field(default_factory=dict)
    dtype: Literal["float32", "bfloat16"] = "float32"
    batch_size: int = 8
    source_length: int = 128
    prefix_length: int = 0
    target_length: int = 32
    data: Literal["embedded", "tatoeba_en_fr"] | None = None
    steps: int = 4
    rival: Rival = "plain"
    measure: Measure = "training_step"
    num_beams: int = 1
    compiled: bool = False
    device: Literal["cpu", "cuda"] = "cpu"
    learning_rate: float | None = None
    loss_tolerance: float | None = None
    target: Target | None = None
    published: Published | None = None
    lesson: Lesson | None = None


@dataclass
class Turn:
    """Figures of one turn.

    Args:
        seconds: For one unit of what the race measures.
        losses: In nats per target token.
        gradient_norms: One for each step; empty where nothing is trained.
        scores: Metrics of generated text, in percent, and its mean length in tokens.
        first_seconds: Of its first step, which compiles what is to be compiled; of the first turn of a training.
        weights_bytes: In use after the model was loaded; the first turn only.
        peak_bytes: Most in use since then, the weights included; the first turn only.
    """

    seconds: float
    losses: list[float]
    gradient_norms: list[float] = field(default_factory=list)
    scores: dict[str, float] = field(default_factory=dict)
    first_seconds: float | None = None
    weights_bytes: int = 0
    peak_bytes: int = 0


MT5_SMALL = Shape(
    "mt5",
    {
        "feed_forward_proj": "gated-gelu",
        "vocab_size": 250112,
        "d_model": 512,
        "d_kv": 64,
        "d_ff": 1024,
        "num_layers": 8,
        "num_decoder_layers": 8,
        "num_heads": 6,
    },
    has_own_head=True,
)
MT0_LARGE = Shape(
    "mt5",
    {
        "feed_forward_proj": "gated-gelu",
        "vocab_size": 250112,
        "d_model": 1024,
        "d_kv": 64,
        "d_ff": 2816,
        "num_layers": 24,
        "num_decoder_layers": 24,
        "num_heads": 16,
    },
    has_own_head=True,
)
BART_BASE = Shape(
    "bart",
    {
        "vocab_size": 50265,
        "d_model": 768,
        "encoder_layers": 6,
        "decoder_layers": 6,
        "encoder_attention_heads": 12,
        "decoder_attention_heads": 12,
        "encoder_ffn_dim": 3072,
        "decoder_ffn_dim": 3072,
    },
)
LLAMA_SMALL = Shape(
    "llama",
    {
        "pad_token_id": 0,
        "vocab_size": 32000,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 8,
        "num_attention_heads": 12,
        "num_key_value_heads": 12,
    },
)
LLAMA_3_8B = Shape(
    "llama",
    {
        "pad_token_id": 0,
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 8192,
    },
)

ALL_LINEAR = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
# LeftTrainer starts prompts from tokens of the training data, PEFT from any of the vocabulary: so both from noise.
OPTIONS = {"prompt_tuning": {"prompt_tuning_init": "RANDOM"}}
NOT_WORSE = Target(speed=1.0, memory=1.0)
# Peak MiB, training it/s and evaluation it/s that were published for mt0-large at batch 8, on an unknown GPU.
PUBLISHED_MT0_LARGE = {
    "lora": (9392, 3.32, 8.96),
    "prompt_tuning": (9768, 3.81, 9.51),
    "p_tuning": (9800, 3.79, 9.48),
    "prefix_tuning": (6144, 5.67, 10.07),
    "ia3": (9658, 3.83, 9.88),
}


def without_dropout(shape: Shape) -> Shape:
    """For a GPU, where dropout draws other random numbers on the two sides and the losses of a step would differ."""
    return dataclasses.replace(shape, config={**shape.config, "dropout_rate": 0.0})


def mt0_large_races() -> list[Race]:
    """Training and evaluation of each method that the published table has."""
    return [
        Race(
            f"mt0_large_{method}_{measure}",
            method,
            without_dropout(MT0_LARGE),
            OPTIONS.get(method, {}),
            dtype="bfloat16",
            target_length=8,
            steps=12,
            measure=measure,
            device="cuda",
            published=Published(peak_mib, steps_per_second),
        )
        for method, (peak_mib, training, evaluation) in PUBLISHED_MT0_LARGE.items()
        for measure, steps_per_second in (("training_step", training), ("evaluation", evaluation))
    ]


def gpu_races() -> list[Race]:
    """LoRA at sizes that a GPU is for, against the plain stack, and compiled against not compiled."""
    races = [
        Race(
            "gpu_mt0_large_lora",
            "lora",
            without_dropout(MT0_LARGE),
            dtype="bfloat16",
            steps=12,
            device="cuda",
            target=Target(1.3, 0.6),
        ),
        Race(
            "gpu_llama_3_8b_lora",
            "lora",
            LLAMA_3_8B,
            ALL_LINEAR,
            dtype="bfloat16",
            batch_size=4,
            source_length=768,
            target_length=256,
            steps=12,
            device="cuda",
            target=Target(1.25, 0.75),
        ),
    ]
    compiled = {"rival": "not_compiled", "compiled": True, "target": Target(1.1, 1.0)}
    return races + [dataclasses.replace(race, name=f"{race.name}_compiled", **compiled) for race in races]


RACES = {
    race.name: race
    for race in (
        Race("mt5_small_lora", "lora", MT5_SMALL, target=Target(1.8, 0.5)),
        Race("bart_base_lora", "lora", BART_BASE, target=Target(1.3, 0.75)),
        Race(
            "mt5_small_distillation",
            "lora",
            MT5_SMALL,
            rival="full_logits",
            lesson=Lesson(MT5_SMALL, "forward_kl", alpha=0.5, temperature=2.0),
            target=Target(1.0, 0.5),
        ),
        Race(
            "llama_distillation",
            "lora",
            LLAMA_SMALL,
            ALL_LINEAR,
            batch_size=4,
            source_length=192,
            target_length=64,
            rival="trl_divergence",
            loss_tolerance=1e-4,  # a divergence of nearly equal distributions is a small difference
            lesson=Lesson(LLAMA_SMALL, "reverse_kl", alpha=1.0, temperature=1.0),
            target=NOT_WORSE,
        ),
        Race(
            "llama_lora",
            "lora",
            LLAMA_SMALL,
            ALL_LINEAR,
            batch_size=4,
            source_length=192,
            target_length=64,
            target=Target(2.0, 0.6),
        ),
        Race(
            "llama_lora_limit",
            "lora",
            LLAMA_SMALL,
            ALL_LINEAR,
            batch_size=4,
            source_length=192,
            target_length=64,
            rival="frozen",
            learning_rate=0.0,  # the frozen side learns nothing, and the losses have to stay comparable
            target=Target(1 / 1.05),
        ),
        *(
            Race(
                name,
                "lora",
                data="embedded",
                batch_size=16,
                steps=18,
                measure="generation",
                num_beams=num_beams,
                target=Target(2.0, 1.0),
            )
            for name, num_beams in (("generation", 1), ("generation_beams", 4))
        ),
        Race(
            "generation_prompt",
            "lora",
            LLAMA_SMALL,
            ALL_LINEAR,
            source_length=240,
            prefix_length=200,
            target_length=16,
            steps=3,
            rival="whole_batches",
            measure="generation",
            target=Target(1.5, 1.0),
        ),
        Race(
            "tatoeba_lora",
            "lora",
            data="tatoeba_en_fr",
            batch_size=16,
            steps=200,
            measure="training_run",
            # The sides see the same rows, but each groups them into batches its own way.
            loss_tolerance=2e-2,
            target=Target(1.5, 1.0),
        ),
        *(
            Race(f"mt5_small_{method}", method, MT5_SMALL, OPTIONS.get(method, {}), target=NOT_WORSE)
            for method in ("prefix_tuning", "prompt_tuning", "p_tuning", "ia3", "houlsby_adapter")
        ),
        *gpu_races(),
        *mt0_large_races(),
    )
}

TINY_CONFIGS = {
    "mt5": {
        "vocab_size": 300,
        "d_model": 16,
        "d_kv": 8,
        "d_ff": 32,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "num_heads": 2,
    },
    "bart": {
        "vocab_size": 300,
        "d_model": 16,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 2,
        "decoder_attention_heads": 2,
        "encoder_ffn_dim": 32,
        "decoder_ffn_dim": 32,
    },
    "llama": {
        "vocab_size": 300,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    },
}


def tiny(race: Race) -> Race:
    """`race` at a toy size: shows that it runs and that the sides agree, and nothing about speed."""
    shape = race.shape
    if shape:
        shape = tiny_shape(shape)
    lesson = race.lesson and dataclasses.replace(race.lesson, teacher=tiny_shape(race.lesson.teacher))
    return dataclasses.replace(
        race, shape=shape, lesson=lesson, batch_size=2, source_length=12, prefix_length=0, target_length=6, steps=4
    )


def tiny_shape(shape: Shape) -> Shape:
    """Of the same type."""
    return dataclasses.replace(shape, config={**shape.config, **TINY_CONFIGS[shape.model_type]})
