"""4-bit layers on the meta device: the stored bytes, and a forward pass that unpacks them."""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel

NESTED_BLOCK = 256  # constants that share a constant of their own, in bitsandbytes' double quantization


def quantize_on_meta(model: PreTrainedModel, config: Any) -> None:
    """Put bitsandbytes' 4-bit layers into `model`, as loading with `config`, a `BitsAndBytesConfig`, does."""
    from transformers.integrations import replace_with_bnb_linear
    from transformers.quantizers.base import get_keys_to_not_convert

    kept = [*(config.llm_int8_skip_modules or get_keys_to_not_convert(model)), *(model._keep_in_fp32_modules or ())]
    with torch.device("meta"):
        replace_with_bnb_linear(model, modules_to_not_convert=kept, quantization_config=config)
    for module in model.modules():
        if type(module).__name__ == "Linear4bit":
            _pack(module, config)
    model.config.quantization_config = config
    model.is_loaded_in_4bit = model.is_quantized = True


def _pack(module: Any, config: Any) -> None:
    """Half a byte a weight, and the constants that bitsandbytes keeps beside them."""
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn.modules import Params4bit

    rows, columns, block = module.out_features, module.in_features, 64
    n_blocks = -(-rows * columns // block)
    with torch.device("meta"):
        nested = None
        if config.bnb_4bit_use_double_quant:
            nested = QuantState(
                absmax=torch.empty(-(-n_blocks // NESTED_BLOCK)),
                code=torch.empty(256),
                blocksize=NESTED_BLOCK,
                dtype=torch.float32,
            )
        state = QuantState(
            absmax=torch.empty(n_blocks, dtype=torch.uint8 if nested else torch.float32),
            shape=torch.Size((rows, columns)),
            code=torch.empty(16),
            blocksize=block,
            quant_type=config.bnb_4bit_quant_type,
            dtype=config.bnb_4bit_compute_dtype,
            offset=torch.empty(()) if nested else None,
            state2=nested,
        )
        packed = torch.empty((rows * columns + 1) // 2, 1, dtype=torch.uint8)
    module.weight = Params4bit(
        packed,
        requires_grad=False,
        quant_state=state,
        blocksize=block,
        compress_statistics=config.bnb_4bit_use_double_quant,
        quant_type=config.bnb_4bit_quant_type,
        bnb_quantized=True,
        module=module,
    )
    module.quant_state = state
