"""Default learning rates, which fall as models get wider."""

from __future__ import annotations

import math

NARROW = 128
"""Width of the embedded models, on which `benchmarks/learning_rates.py` tries every method."""
WIDE = 3072
"""Width of Llama-3.2-3B, on which PEFT's benchmark tries most of them."""

SWEEP = "benchmarks/learning_rates.py"


def learning_rate_at(width: int | None, narrow: float, wide: float) -> float:
    r"""The rate for a model of the given width, from the rates at two widths.

    Adam's best rate falls as a power of the width (Yang et al., 2022, arXiv 2203.03466). The power is the one that
    connects the two rates: $\eta(w) = \eta_n (\eta_w / \eta_n)^{\log(w / 128) / \log(3072 / 128)}$. Outside of the two
    widths the nearer rate is taken.

    Args:
        width: Size of the hidden states; `None`, where it is not known, takes the rate of a wide model.
        narrow: Rate of a model that is `NARROW` or less.
        wide: Rate of a model that is `WIDE` or more.

    Returns:
        The rate, rounded to two significant digits.
    """
    if width is None or width >= WIDE or narrow == wide:
        return wide
    if width <= NARROW:
        return narrow
    share = math.log(width / NARROW) / math.log(WIDE / NARROW)
    return float(f"{narrow * (wide / narrow) ** share:.2g}")


def metamathqa(rate: float, accuracy: float) -> str:
    """A run of PEFT's method comparison as a source: 5,000 steps of 4 rows on Llama-3.2-3B, accuracy on GSM8K.

    Args:
        rate: Learning rate of the run.
        accuracy: Of the run, in percent; LoRA's is 47.8.
    """
    return f"{format_rate(rate)} gives {accuracy:.1f} % in PEFT's benchmark of Llama-3.2-3B"


def format_rate(rate: float) -> str:
    """`0.0002` as `2e-4`."""
    mantissa, _, exponent = f"{rate:e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}"
