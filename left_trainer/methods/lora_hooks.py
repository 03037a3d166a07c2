"""What presets of LoRA need beyond a config: optimizers, initialisations, AdaLoRA's schedule."""

from __future__ import annotations

import copy
import re
import types
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, initialize_lora_eva_weights
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from peft.tuners.lora.config import CordaConfig, LoraGAConfig
from peft.tuners.lora.corda import preprocess_corda
from peft.tuners.lora.loraga import preprocess_loraga
from peft.tuners.poly.router import PolyRouter
from peft.utils.loftq_utils import _SafetensorLoader
from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim import Optimizer
from transformers import (
    BitsAndBytesConfig,
    PreTrainedModel,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.utils import ADAPTER_SAFE_WEIGHTS_NAME

from left_trainer.adapters.residual_base import lora_layers, remember_initial_adapter
from left_trainer.methods.method import Batches
from left_trainer.methods.targets import smallest_feature
from left_trainer.token_mean import IGNORE_INDEX, accumulated_token_loss

# Keys and values of cross-attention are made of what the encoder put out.
CROSS_ATTENTION_SOURCE = re.compile(r"(EncDecAttention|encoder_attn|crossattention)\.(k|v|key|value)")


def nf4() -> BitsAndBytesConfig:
    """QLoRA's quantization: 4-bit NormalFloat with quantized constants."""
    compute = torch.bfloat16 if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else torch.float32
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )


def lora_plus_optimizer(
    model: PeftModel, optimizer_class: type[Optimizer], arguments: Mapping[str, Any], options: Mapping[str, Any]
) -> Optimizer:
    """The chosen optimizer with `loraplus_lr_ratio` times the learning rate for B."""
    arguments = dict(arguments)
    return create_loraplus_optimizer(
        model,
        optimizer_class,
        loraplus_lr_ratio=options["loraplus_lr_ratio"],
        loraplus_weight_decay=arguments.pop("weight_decay"),
        **arguments,
    )


def lora_fa_optimizer(
    model: PeftModel, optimizer_class: type[Optimizer], arguments: Mapping[str, Any], options: Mapping[str, Any]
) -> Optimizer:
    """AdamW on B with projected gradients; A is frozen.

    Raises:
        ValueError: Another optimizer than AdamW was chosen, which LoRA-FA would ignore.
    """
    if optimizer_class is not torch.optim.AdamW:
        raise ValueError(
            f"optim asks for {optimizer_class.__name__}, but peft_method='lora_fa' is a form of AdamW. Leave optim at "
            "its default, or choose peft_method='lora'."
        )
    config = model.active_peft_config
    return create_lorafa_optimizer(
        model, config.r, config.lora_alpha, arguments["lr"], weight_decay=arguments["weight_decay"]
    )


def half_rank(model: PreTrainedModel, config: PeftConfig) -> dict[str, Any]:
    """LoRA-GA takes A and B from different singular vectors of one gradient, which has to have twice the rank."""
    return {"r": min(config.r, smallest_feature(model, config) // 2)}


def initialize_pissa(model: PeftModel, batches: Batches, options: Mapping[str, Any]) -> None:
    for layer in lora_layers(model).values():
        layer.pissa_init(model.active_adapter, "pissa")
    remember_initial_adapter(model)


def initialize_olora(model: PeftModel, batches: Batches, options: Mapping[str, Any]) -> None:
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.olora_init(model.active_adapter)
    remember_initial_adapter(model)


def initialize_corda(model: PeftModel, batches: Batches, options: Mapping[str, Any]) -> None:
    """Decompose the weights by the covariance of the inputs in `calibration_batches` batches."""
    config = _on_base_layers(model)
    config.corda_config = CordaConfig(corda_method=options["corda_method"])

    def run() -> None:
        for batch in batches(options["calibration_batches"]):
            for row in _single_rows(batch):
                model(**row)

    was_training = model.training
    with torch.no_grad():
        preprocess_corda(model, config, run_model=run)
        for layer in lora_layers(model).values():
            layer.corda_init(model.active_adapter, "corda")
    model.train(was_training)
    remember_initial_adapter(model)


def _single_rows(batch: Mapping[str, torch.Tensor]) -> Iterator[dict[str, torch.Tensor]]:
    """The rows of a batch one by one and without padding, as PEFT's covariance expects them."""
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
    for index, kept in enumerate(mask):
        row = {"input_ids": batch["input_ids"][index][kept][None]}
        labels = batch["labels"][index]
        # A decoder-only model has a label at each position of its input; a decoder of its own has other ones.
        row["labels"] = labels[kept if labels.shape == kept.shape else labels.ne(IGNORE_INDEX)][None]
        yield row


def initialize_lora_ga(model: PeftModel, batches: Batches, options: Mapping[str, Any]) -> None:
    """Factor the gradients of the targeted base weights, summed over `calibration_batches` batches."""
    config = _on_base_layers(model)
    config.lora_ga_config = LoraGAConfig()

    def run() -> None:
        for batch in batches(options["calibration_batches"]):
            model(**batch).loss.backward()

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Full backward hook is firing")  # about PEFT's counters of backward passes
        preprocess_loraga(model, config, train_step=run)
    for layer in lora_layers(model).values():
        layer.lora_ga_init(model.active_adapter, config.lora_ga_config)
    remember_initial_adapter(model)


def _on_base_layers(model: PeftModel) -> Any:
    """The adapter's config, aimed at the layers inside of its own."""
    config = copy.deepcopy(model.active_peft_config)
    config.target_modules = {f"{name}.base_layer" for name in lora_layers(model)}
    return config


@torch.no_grad()
def initialize_loftq(model: PeftModel, batches: Batches, options: Mapping[str, Any]) -> None:
    r"""Fit A and B to what quantization lost: $s B A \approx W - \mathrm{dequantize}(Q)$, from the weights on disk.

    PEFT's `replace_lora_weights_loftq` needs a GPU and leaves the scaling out, so that alpha = 2r adds the error twice
    over (peft 0.21).
    """
    from bitsandbytes.functional import dequantize_4bit

    name = model.get_base_model().config._name_or_path
    original = _SafetensorLoader(model, name if Path(name).is_dir() else None)
    adapter = model.active_adapter
    for layer_name, layer in lora_layers(model).items():
        quantized = layer.get_base_layer().weight
        if not hasattr(quantized, "quant_state"):
            continue  # T5 keeps some of its layers in float32
        weight = original.get_tensor(f"{layer_name.removeprefix('base_model.model.')}.weight").to(quantized.device)
        error = weight.float() - dequantize_4bit(quantized.data, quantized.quant_state).float()
        rank, scaling = layer.r[adapter], layer.scaling[adapter]
        left, values, right = torch.linalg.svd(error, full_matrices=False)
        root = (values[:rank] / scaling).sqrt()
        layer.lora_A[adapter].weight.copy_(root[:, None] * right[:rank])
        layer.lora_B[adapter].weight.copy_(left[:, :rank] * root)


def keep_unpacked(model: PeftModel) -> None:
    """Keep 4-bit layers on the CPU in the format that has gradients.

    The first evaluation would repack their weights for an inference kernel without a backward pass, and training would
    go on without the gradients that should flow through them (bitsandbytes 0.50).
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def initialize_eva(model: PeftModel, batches: Batches, options: Mapping[str, Any]) -> None:
    """Set A, and how the ranks are spread over the layers, from `calibration_batches` batches of inputs.

    Raises:
        ValueError: No batch has as many tokens as components are needed; PEFT would wait for one for ever.
    """
    rows = [dict(batch) for batch in batches(options["calibration_batches"])]
    has_encoder = model.get_base_model().config.is_encoder_decoder
    config = model.active_peft_config
    components = round(config.r * config.eva_config.rho)
    tokens = max(
        (min(int(_token_mask(row, target).sum()) for target in (False, has_encoder)) for row in rows), default=0
    )
    if tokens < components:
        raise ValueError(
            f"peft_method='eva' needs {components} tokens in a batch for {components} components, and the largest of "
            f"the first {len(rows)} batches has {tokens}. Raise per_device_train_batch_size, or lower r in peft_kwargs."
        )

    def layer_inputs(layer_input: Any, batch: Mapping[str, torch.Tensor], name: str) -> torch.Tensor:
        hidden = layer_input if isinstance(layer_input, torch.Tensor) else layer_input[0]
        reads_target = has_encoder and "decoder." in name and not CROSS_ATTENTION_SOURCE.search(name)
        return hidden[_token_mask(batch, reads_target)]

    # PEFT's own masks every layer by the source (peft 0.21), but a decoder of its own reads the target.
    initialize_lora_eva_weights(
        model, rows, prepare_model_inputs_fn=None, prepare_layer_inputs_fn=layer_inputs, show_progress_bar=False
    )


def _token_mask(batch: Mapping[str, torch.Tensor], of_target: bool) -> torch.Tensor:
    """Which positions of the source or of the target are no padding, `(batch, positions)`."""
    return batch["labels"].ne(IGNORE_INDEX) if of_target else batch["attention_mask"].bool()


def restore_eva(model: PeftModel, directory: str) -> None:
    """Give the layers the ranks that they have in the adapter saved in `directory`."""
    saved = load_file(Path(directory) / ADAPTER_SAFE_WEIGHTS_NAME)
    ranks = {
        name: saved.get(f"{name}.lora_A.weight", layer.lora_A[model.active_adapter].weight[:0])
        for name, layer in lora_layers(model).items()
    }
    initialize_lora_eva_weights(model, eva_state_dict=ranks)


def call_inner_model(model: PeftModel) -> None:
    """Make the tuner's forward that of the model inside, as it is at each call.

    AdaLoRA's own adds the regularizer to the loss of every forward pass: in evaluation too, and k times in k
    accumulation steps; `orthogonality_penalty` adds it once a step. Adaption prompts keep the forward that the model
    had when it was wrapped, so that a trainer which replaces it later, as TRL's does, is not heard (peft 0.21).
    """
    inner = model.base_model.model
    model.base_model.forward = lambda *args, **kwargs: inner(*args, **kwargs)


def numbered_experts(model: PreTrainedModel, config: PeftConfig) -> dict[str, Any]:
    """Number the experts, which PEFT loads under numbers and then looks for under the names given (peft 0.21)."""
    config.adapters = {str(number): path for number, path in enumerate(config.adapters.values())}
    return {"hidden_size": model.config.get_text_config().hidden_size}


def save_with_classifier(model: PeftModel) -> None:
    """Make `save_pretrained` write X-LoRA's classifier, which PEFT leaves out of the adapter file (peft 0.21)."""

    def save(model: PeftModel, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        type(model).save_pretrained(model, save_directory, *args, **kwargs)
        weights = {name: tensor for name, tensor in model.state_dict().items() if "internal_xlora_classifier" in name}
        save_file(weights, Path(save_directory) / ADAPTER_SAFE_WEIGHTS_NAME, metadata={"format": "pt"})

    model.save_pretrained = types.MethodType(save, model)


def loss_from_logits(
    model: PeftModel, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None, ranks: int
) -> tuple[torch.Tensor, Any]:
    """The token mean by the model's own forward: X-LoRA reads hidden states, which TRL's fused head does not return."""
    outputs = model(**inputs)
    return accumulated_token_loss(outputs.loss, inputs["labels"], num_items_in_batch, ranks), outputs


def repeat_task_ids(model: PeftModel) -> None:
    """Give each beam the task of its row: PEFT's Poly keeps one task for each row of the input (peft 0.21)."""

    def repeat(router: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        tasks, rows = kwargs["task_ids"], len(kwargs["input_ids"])
        return args, {**kwargs, "task_ids": tasks.repeat_interleave(rows // len(tasks))}

    for module in model.modules():
        if isinstance(module, PolyRouter):
            module.register_forward_pre_hook(repeat, with_kwargs=True)


class AdaLoraCallback(TrainerCallback):
    """Drives AdaLoRA's rank schedule from the run's own steps.

    Unless the user sets `tinit` and `tfinal`, ranks stay for the first tenth of the steps and for the last three.
    PEFT's own example calls `update_and_allocate` by hand; under a plain Trainer nobody does, and no rank ever changes.
    """

    def __init__(self, model: PeftModel) -> None:
        config = model.active_peft_config
        self.is_scheduled = bool(config.tinit or config.tfinal)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: PeftModel, **_: Any
    ) -> None:
        config = model.active_peft_config
        config.total_step = state.max_steps
        if not self.is_scheduled:
            config.tinit, config.tfinal = state.max_steps // 10, state.max_steps * 3 // 10
        if config.total_step - config.tfinal - config.tinit < 2:
            raise ValueError(
                f"tinit={config.tinit} and tfinal={config.tfinal} leave too few of {config.total_step} steps between "
                "them to reassign ranks. Pass smaller ones in peft_kwargs, or train longer."
            )

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, model: PeftModel, **_: Any
    ) -> None:
        model.base_model.update_and_allocate(state.global_step + 1)


def orthogonality_penalty(model: PeftModel) -> torch.Tensor:
    r"""AdaLoRA's regularizer: the weighted mean of $\lVert P^\top P - I \rVert$ and $\lVert Q Q^\top - I \rVert$."""
    distances = []
    for name, parameter in model.named_parameters():
        if ".lora_A." in name or ".lora_B." in name:
            gram = parameter @ parameter.T if ".lora_A." in name else parameter.T @ parameter
            distances.append(torch.linalg.matrix_norm(gram - torch.eye(len(gram), device=gram.device)))
    return model.active_peft_config.orth_reg_weight * torch.stack(distances).mean()
