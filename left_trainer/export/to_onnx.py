"""ONNX, through torch's exporter, under the names that optimum gives the parts of a model.

There is no cache of keys and values: each step reads the whole text again.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from left_trainer.evaluation.generation import write_generation_config
from left_trainer.export.formats import Answers, Trained
from left_trainer.models import auto_class

ENCODER, DECODER, WHOLE = "encoder_model.onnx", "decoder_model.onnx", "model.onnx"
LOGGERS = ("torch.onnx", "torch.onnx._internal.exporter", "onnxscript", "onnx_ir")


class _Encoder(torch.nn.Module):
    """`input_ids` and `attention_mask`, `(batch, source)`, to `(batch, source, width)`."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model.get_encoder()(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state


class _Decoder(torch.nn.Module):
    """`input_ids`, `(batch, target)`, to logits `(batch, target, vocabulary)`."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model: Any = model

    def forward(
        self, input_ids: torch.Tensor, encoder_hidden_states: torch.Tensor, encoder_attention_mask: torch.Tensor
    ) -> torch.Tensor:
        return self.model(
            decoder_input_ids=input_ids,
            encoder_outputs=(encoder_hidden_states,),
            attention_mask=encoder_attention_mask,
            use_cache=False,
        ).logits


class _Whole(torch.nn.Module):
    """`input_ids` and `attention_mask`, `(batch, sequence)`, to logits `(batch, sequence, vocabulary)`."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits


@torch.no_grad()
def write(trained: Trained, folder: Path) -> None:
    """Export encoder and decoder, or the whole of a decoder-only model, with its configs and tokenizer."""
    model = auto_class(trained.source.family).from_pretrained(
        trained.plain, dtype=torch.float32, trust_remote_code=trained.source.trust_remote_code
    )
    model.eval()
    ids = torch.tensor([[3, 4, 5, 6, 7], [3, 4, 5, 6, 7]]) % model.config.get_text_config().vocab_size
    mask = torch.ones_like(ids)
    try:
        if trained.source.family == "encoder_decoder":
            hidden = model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
            _export(_Encoder(model), {"input_ids": ids, "attention_mask": mask}, "last_hidden_state", folder / ENCODER)
            inputs = {"input_ids": ids[:, :3], "encoder_hidden_states": hidden, "encoder_attention_mask": mask}
            _export(_Decoder(model), inputs, "logits", folder / DECODER)
        else:
            _export(_Whole(model), {"input_ids": ids, "attention_mask": mask}, "logits", folder / WHOLE)
    except Exception as error:  # torch.export raises whatever a model's code does
        raise ValueError(
            f"torch cannot export the model in {str(trained.path)!r} to ONNX: {' '.join(str(error).split())[:300]}. "
            "Export it with --to merged, and that with optimum in an environment of its own: optimum-cli export onnx "
            "--model MERGED ONNX"
        ) from error
    model.config.save_pretrained(folder)
    write_generation_config(trained.reference.generator.generation_config, folder)
    trained.reference.tokenizer.save_pretrained(folder)


def answers(trained: Trained, folder: Path) -> Answers:
    """Those of ONNX Runtime on the CPU, each step over the whole text."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads, settings.log_severity_level = torch.get_num_threads(), 3

    def session(name: str) -> Any:
        return onnxruntime.InferenceSession(str(folder / name), settings, providers=["CPUExecutionProvider"])

    is_encoder_decoder = trained.source.family == "encoder_decoder"
    encoder = session(ENCODER) if is_encoder_decoder else None
    decoder = session(DECODER if is_encoder_decoder else WHOLE)
    search, written = trained.reference.search, []
    for prompt in trained.reference.inputs:
        ids = torch.tensor([prompt]).numpy()
        text = [] if is_encoder_decoder else list(prompt)
        text += search.start
        fixed: dict[str, Any] = {}
        if encoder is not None:
            mask = torch.ones(1, len(prompt), dtype=torch.long).numpy()
            hidden = encoder.run(None, {"input_ids": ids, "attention_mask": mask})[0]
            fixed = {"encoder_hidden_states": hidden, "encoder_attention_mask": mask}
        new: list[int] = []
        while len(new) < search.max_new_tokens and not (new and new[-1] in search.ends):
            whole = torch.tensor([text + new])
            inputs = fixed or {"attention_mask": torch.ones_like(whole).numpy()}
            logits = decoder.run(None, {"input_ids": whole.numpy(), **inputs})[0][0, -1]
            logits[list(search.never)] = -float("inf")
            new.append(int(logits.argmax()))
        written.append(search.answer(new))
    return written


def runtime() -> str:
    """Name and version."""
    return f"ONNX Runtime {version('onnxruntime')}"


def usage(trained: Trained, folder: Path) -> str:
    """Code that loads it."""
    parts = (ENCODER, DECODER) if trained.source.family == "encoder_decoder" else (WHOLE,)
    return "\n".join(f"onnxruntime.InferenceSession({str(folder / part)!r})" for part in parts)


def _export(module: torch.nn.Module, inputs: dict[str, torch.Tensor], output: str, path: Path) -> None:
    free = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    with _quiet():
        torch.onnx.export(
            module,
            tuple(inputs.values()),
            str(path),
            input_names=list(inputs),
            output_names=[output],
            dynamic_shapes=[free] * len(inputs),
            dynamo=True,
            verbose=False,
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says of packages that are not needed, and of its own names."""
    levels = {name: logging.getLogger(name).level for name in LOGGERS}
    with warnings.catch_warnings(), Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        warnings.simplefilter("ignore")
        for name in LOGGERS:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
