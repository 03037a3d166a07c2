"""Every number of the arguments has a range, every default is in it, and what is outside is refused by name."""

from __future__ import annotations

import dataclasses
import math

import pytest

from left_trainer import DataArguments, LeftTrainingArguments, ModelArguments, list_methods
from left_trainer.argument_ranges import RANGES, hints_of
from left_trainer.methods.option_ranges import OF_CONFIG, OPTION_RANGES, check_numbers, range_of
from left_trainer.methods.options import check_peft_kwargs, known_options, nested_config, option_types
from left_trainer.ranges import Range, is_number, number_type

CLASSES = (LeftTrainingArguments, ModelArguments, DataArguments)


def test_every_number_has_a_range_and_every_range_a_number():
    numbers = {
        field.name
        for arguments in CLASSES
        for field in dataclasses.fields(arguments)
        if number_type(hints_of(arguments)[field.name])
    }
    assert numbers == set(RANGES)


def test_every_default_is_in_its_range():
    for arguments in CLASSES:
        for field in dataclasses.fields(arguments):
            if is_number(field.default):
                assert field.default in RANGES[field.name], field.name


def all_options(config_class, options):
    for name, hint in options.items():
        yield config_class, name, hint
        nested = nested_config(hint)
        if nested:
            yield from all_options(nested, option_types(nested))


def test_every_option_with_a_number_has_a_range():
    named = set()
    for method in list_methods():
        for config_class, name, hint in all_options(method.config_class, known_options(method)):
            named |= {name, (config_class.__name__ if config_class else "", name)}
            assert number_type(hint) is None or range_of(config_class, name), f"{method.name}: {name}"
    assert {*OPTION_RANGES, *OF_CONFIG} <= named


def test_the_defaults_of_every_method_are_in_their_ranges():
    for method in list_methods():
        fields = dataclasses.fields(method.config_class) if method.config_class else ()
        own = {field.name: field.default for field in fields if field.default is not dataclasses.MISSING}
        check_numbers(method, {**own, **method.hook_options, **method.defaults, **method.preset})


@pytest.mark.parametrize(
    "name", sorted(set(RANGES) & {field.name for field in dataclasses.fields(LeftTrainingArguments)})
)
def test_what_is_outside_is_refused_by_name(name):
    hint, allowed = hints_of(LeftTrainingArguments)[name], RANGES[name]
    for value in (-2, math.nan, math.inf, "many", True):
        is_type = is_number(value) and (number_type(hint) is float or isinstance(value, int))
        with pytest.raises(ValueError if is_type else TypeError, match=f"^{name}="):
            LeftTrainingArguments(**{name: value})
    assert -2 not in allowed


def test_a_rank_of_zero_and_of_ten_million_is_refused_for_every_method():
    for method in list_methods():
        for name in {"r", "num_virtual_tokens"} & (set(known_options(method)) - set(method.preset)):
            for value in (-1, 10_000_000):
                with pytest.raises(ValueError, match=f"{name}={value} must be"):
                    check_peft_kwargs(method, {name: value})


@pytest.mark.parametrize(
    ("allowed", "inside", "outside", "text"),
    [
        (Range(at_least=1), [1, 10**9], [0, math.nan, math.inf], "at least 1"),
        (Range(above=0, below=1), [0.5], [0, 1], "above 0 and below 1"),
        (Range(at_least=1, also=(-1,), meaning="all"), [-1, 1], [0, -2], "at least 1, or -1 (all)"),
        (Range(), [-3.5], [math.nan, -math.inf], "a finite number"),
    ],
)
def test_ranges(allowed, inside, outside, text):
    assert all(number in allowed for number in inside)
    assert not any(number in allowed for number in outside)
    assert str(allowed) == text
