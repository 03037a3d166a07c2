"""The Triton kernel of `cross_entropy_rows`."""

# mypy: ignore-errors
# Triton reads the source of its functions, and their annotations as values.

import triton
import triton.language as tl


@triton.jit
def _shaped(logits, bias, softcap, has_bias: tl.constexpr, has_softcap: tl.constexpr):
    """Logits as the model has them: with bias and softcap, in float32."""
    shaped = logits.to(tl.float32)
    if has_bias:
        shaped += bias.to(tl.float32)
    if has_softcap:
        shaped = softcap * (2 * tl.sigmoid(2 * shaped / softcap) - 1)
    return shaped


@triton.jit
def cross_entropy_rows_kernel(
    logits,
    targets,
    bias,
    losses,
    is_correct,
    words,
    softcap,
    smoothing,
    has_bias: tl.constexpr,
    has_softcap: tl.constexpr,
    has_smoothing: tl.constexpr,
    with_gradient: tl.constexpr,
    block: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * words
    target = tl.load(targets + row)
    target_bias = tl.load(bias + target) if has_bias else 0.0
    target_logit = _shaped(tl.load(logits + target), target_bias, softcap, has_bias, has_softcap)
    columns = tl.arange(0, block)

    # The softmax is normalised online, the target's own term apart.
    largest = target_logit
    others = 0.0
    total_logit = 0.0
    for start in range(0, words, block):
        at = start + columns
        inside = at < words
        offsets = tl.load(bias + at, mask=inside, other=0.0) if has_bias else 0.0
        z = _shaped(tl.load(logits + at, mask=inside, other=0.0), offsets, softcap, has_bias, has_softcap)
        if has_smoothing:
            total_logit += tl.sum(tl.where(inside, z, 0.0), 0)
        before = largest
        largest = tl.maximum(largest, tl.max(tl.where(inside, z, -float("inf")), 0))
        terms = tl.where(inside & (at != target), tl.exp(z - largest), 0.0)
        others = others * tl.exp(before - largest) + tl.sum(terms, 0)
    total = others + tl.exp(target_logit - largest)
    loss = tl.log(total) + largest - target_logit
    if has_smoothing:
        loss += smoothing * (target_logit - total_logit / words)
    tl.store(losses + row, loss)
    tl.store(is_correct + row, target_logit >= largest)

    if with_gradient:
        for start in range(0, words, block):
            at = start + columns
            inside = at < words
            offsets = tl.load(bias + at, mask=inside, other=0.0) if has_bias else 0.0
            z = _shaped(tl.load(logits + at, mask=inside, other=0.0), offsets, softcap, has_bias, has_softcap)
            gradient = tl.where(at == target, -(others / total), tl.exp(z - largest) / total)
            if has_smoothing:
                gradient += smoothing * (tl.where(at == target, 1.0, 0.0) - 1.0 / words)
            if has_softcap:
                gradient *= 1 - (z / softcap) * (z / softcap)
            tl.store(logits + at, gradient.to(logits.dtype.element_ty), mask=inside)
