"""PEFT's prompts in the input, with a choice of where they stand in an encoder."""

from left_trainer.tuners.input_prompts.config import MultitaskPromptTuning, PromptTuning, PTuning
from left_trainer.tuners.registration import replace_config

for config_class in (PromptTuning, PTuning, MultitaskPromptTuning):
    replace_config(config_class)
