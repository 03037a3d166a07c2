"""Every method that puts LoRA layers into a model trains as it does with PEFT's own forward pass."""

from __future__ import annotations

import pytest
from datasets import Dataset
from peft import AdaLoraConfig, LoraConfig, XLoraConfig

from left_trainer import LeftTrainer, get_method
from left_trainer.models import auto_class
from log_history import gradient_norms, losses
from method_settings import CASES, BaseModels, model_argument, settings
from tiny import tiny_rows, tiny_tokenizer

WITH_LORA_LAYERS = (LoraConfig, AdaLoraConfig, XLoraConfig)
LORA_CASES = [case for case in CASES if issubclass(get_method(case[0]).config_class or object, WITH_LORA_LAYERS)]
# Methods whose update is not LoRA's, and what the report says of their layers.
NEVER_FUSED = {
    "adalora": "SVDLinear is another kind of layer",
    "xlora": "the forward pass of the layer is replaced, as X-LoRA does",
}
HOOKS = "a part of the layer has hooks, as offloading and sharding put there"
# Their initialisation watches the layers during its first batches.
HOOKED_AT_THE_START = ("corda", "lora_ga")


@pytest.mark.filterwarnings("ignore:Unmerge result can be inaccurate")
@pytest.mark.parametrize(("method", "family"), LORA_CASES)
def test_training(method, family, tmp_path, make_args):
    path, runs = BaseModels(tmp_path)[method, family], []
    for use in (True, False):
        args = make_args(
            overwrite_output_dir=True,
            peft_method=method,
            max_steps=6,
            use_lora_linear=use,
            **settings(method, family, tmp_path),
        )
        trainer = LeftTrainer(
            model_argument(method, path, auto_class(family).from_pretrained),
            args,
            train_dataset=Dataset.from_list(tiny_rows()),
            processing_class=tiny_tokenizer(family),
        )
        trainer.train()
        runs.append(trainer)
    ours, plain = runs
    tolerance = 1e-2 if get_method(method).quantization else 1e-4
    assert losses(ours) == pytest.approx(losses(plain), rel=tolerance)
    assert gradient_norms(ours) == pytest.approx(gradient_norms(plain), rel=10 * tolerance)
    report = ours.fast_paths["lora_linear"].report()
    if method in NEVER_FUSED:
        assert report["ran"] == 0
        assert list(report["fell_back"]) == [NEVER_FUSED[method]]
    else:
        assert report["ran"] > 0
        assert list(report["fell_back"]) == [HOOKS] * (method in HOOKED_AT_THE_START)
