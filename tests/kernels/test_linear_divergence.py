"""Values and gradients of `linear_divergence` against autograd's on full logits."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from left_trainer.kernels.linear_cross_entropy import linear_cross_entropy
from left_trainer.kernels.linear_divergence import (
    Divergence,
    Head,
    TopTokens,
    divergence_of_logits,
    linear_divergence,
)

ROWS, WIDTH, TEACHER_WIDTH, VOCABULARY = (3, 7), 16, 24, 301
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 1e-2}
# A row at a time, some rows, everything at once.
WORKSPACES = (1, 60_000, 2**24)
KINDS = ("forward_kl", "reverse_kl", "jsd")
ALPHAS, TEMPERATURES = (0.3, 1.0), (1.0, 2.0)
FORMS = {
    "plain": {},
    "biases": {"bias": True},
    "soft caps": {"softcaps": (3.0, 2.0)},
    "cap and bias of the teacher": {"teacher_bias": True, "softcaps": (None, 2.0)},
    "padded heads": {"padding": (11, 20), "bias": True},
    "everything": {"padding": (20, 0), "bias": True, "softcaps": (3.0, 2.0)},
}


def example(
    dtype=torch.float32, bias=False, teacher_bias=False, softcaps=(None, None), padding=(0, 0), frozen=True, scale=1.0
):
    """Student, teacher, labels and the number of words that both have."""
    generator = torch.Generator().manual_seed(3)

    def head(width, words, has_bias, softcap, trained):
        hidden = (scale * torch.randn(*ROWS, width, generator=generator)).to(dtype)
        weight = torch.randn(words, width, generator=generator).to(dtype).requires_grad_(trained and not frozen)
        offsets = torch.randn(words, generator=generator).to(dtype).requires_grad_(trained and not frozen)
        return Head(hidden.requires_grad_(trained), weight, offsets if has_bias else None, softcap)

    student = head(WIDTH, VOCABULARY + padding[0], bias, softcaps[0], trained=True)
    teacher = head(TEACHER_WIDTH, VOCABULARY + padding[1], bias or teacher_bias, softcaps[1], trained=False)
    labels = torch.randint(VOCABULARY, ROWS, generator=generator)
    labels[0, 3:] = labels[2, :2] = -100
    labels[1, :2] = torch.tensor([0, VOCABULARY - 1])
    return student, teacher, labels, VOCABULARY


def full_logits(head):
    """In float32 at least."""
    dtype = torch.promote_types(head.hidden.dtype, torch.float32)
    bias = None if head.bias is None else head.bias.to(dtype)
    logits = functional.linear(head.hidden.to(dtype), head.weight.to(dtype), bias)
    return head.softcap * torch.tanh(logits / head.softcap) if head.softcap else logits


def plain_losses(student, teacher, labels, n_words, divergence, alpha):
    """Loss and divergence as the literature writes them, summed over the target tokens."""
    valid = labels.ne(-100)
    logits = full_logits(student)[valid]
    q = torch.softmax(logits[:, :n_words] / divergence.temperature, -1)
    p = torch.softmax(full_logits(teacher)[valid].detach()[:, :n_words] / divergence.temperature, -1)
    mixture = divergence.beta * p + (1 - divergence.beta) * q
    value = {
        "forward_kl": lambda: kl(p, q),
        "reverse_kl": lambda: kl(q, p),
        "jsd": lambda: divergence.beta * kl(p, mixture) + (1 - divergence.beta) * kl(q, mixture),
    }[divergence.kind]()
    value = divergence.temperature**2 * value
    cross_entropy = functional.cross_entropy(logits, labels[valid], reduction="sum")
    return (1 - alpha) * cross_entropy + alpha * value, value, cross_entropy


def kl(p, q):
    return (p * (p.log() - q.log())).sum()


def trained(student):
    return [item for item in (student.hidden, student.weight, student.bias) if item is not None and item.requires_grad]


def relative_error(ours, plain):
    return ((ours.double() - plain.double()).norm() / plain.double().norm()).item()


def assert_equal(result, expected, student, labels, tolerance):
    """Same values, and same gradients in relation to their norm."""
    loss, divergence, cross_entropy = expected
    torch.testing.assert_close(result.loss_sum, loss, rtol=tolerance, atol=0)
    torch.testing.assert_close(result.divergence_sum, divergence.detach(), rtol=tolerance, atol=0)
    torch.testing.assert_close(result.tokens.loss_sum, cross_entropy.detach(), rtol=tolerance, atol=0)
    torch.testing.assert_close(result.tokens.losses.sum(), cross_entropy.detach(), rtol=tolerance, atol=0)
    assert not result.divergence_sum.requires_grad
    assert not result.tokens.loss_sum.requires_grad
    assert result.tokens.n_tokens == labels.ne(-100).sum()
    assert torch.equal(result.tokens.is_target, labels.ne(-100))
    inputs = trained(student)
    # The factor stands for a division by the tokens of an accumulated batch.
    ours = torch.autograd.grad(result.loss_sum * 0.3, inputs)
    for mine, plain in zip(ours, torch.autograd.grad(loss * 0.3, inputs, retain_graph=True), strict=True):
        assert mine.dtype == inputs[0].dtype
        assert relative_error(mine, plain) < tolerance


def check(kind, temperature, alpha, workspace_bytes=2**24, dtype=torch.float32, beta=0.5, **options):
    student, teacher, labels, n_words = example(dtype, **options)
    divergence = Divergence(kind, beta, temperature)
    expected = plain_losses(student, teacher, labels, n_words, divergence, alpha)
    given = {"divergence": divergence, "alpha": alpha, "n_words": n_words}
    result = linear_divergence(student, teacher, labels, workspace_bytes=workspace_bytes, **given)
    assert_equal(result, expected, student, labels, TOLERANCES[dtype])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_full_logits(kind, form):
    for temperature, alpha, frozen, size in itertools.product(TEMPERATURES, ALPHAS, (True, False), WORKSPACES):
        check(kind, temperature, alpha, size, frozen=frozen, **FORMS[form])


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_equals_full_logits_in_other_dtypes(kind, dtype):
    for alpha, frozen, form in itertools.product(ALPHAS, (True, False), FORMS.values()):
        check(kind, 2.0, alpha, 60_000, dtype, frozen=frozen, **form)


@pytest.mark.parametrize("beta", [0.1, 0.9])
def test_jsd_with_uneven_weights(beta):
    check("jsd", 2.0, 0.5, beta=beta, frozen=False)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_full_logits_by_autograd_are_the_same(kind, dtype):
    divergence = Divergence(kind, 0.3, 2.0)
    student, teacher, labels, n_words = example(dtype, bias=True, padding=(20, 0), frozen=False)
    expected = plain_losses(student, teacher, labels, n_words, divergence, 0.3)
    logits = full_logits(student), full_logits(teacher)
    result = divergence_of_logits(*logits, labels, divergence=divergence, alpha=0.3, n_words=n_words)
    assert_equal(result, expected, student, labels, TOLERANCES[dtype])
    other = linear_divergence(student, teacher, labels, divergence=divergence, alpha=0.3, n_words=n_words)
    assert result.tokens.n_correct == other.tokens.n_correct


@pytest.mark.parametrize("kind", KINDS)
def test_logits_far_apart(kind):
    """Probabilities that float32 cannot hold: values and gradients stay those of float64."""
    student, teacher, labels, _ = example(scale=20.0)
    exact = [replace(head, hidden=head.hidden.double(), weight=head.weight.double()) for head in (student, teacher)]
    # Their logarithms, which `plain_losses` cannot take.
    expected = divergence_of_logits(
        full_logits(exact[0]), full_logits(exact[1]), labels, divergence=Divergence(kind), alpha=0.5
    )
    result = linear_divergence(student, teacher, labels, divergence=Divergence(kind), alpha=0.5)
    torch.testing.assert_close(result.loss_sum.double(), expected.loss_sum, rtol=1e-5, atol=0)
    (ours,) = torch.autograd.grad(result.loss_sum, student.hidden)
    (plain,) = torch.autograd.grad(expected.loss_sum, student.hidden)
    assert relative_error(ours, plain) < 1e-5


def top_tokens_of(teacher, k, divergence):
    log_probs = torch.log_softmax(full_logits(teacher)[..., :VOCABULARY].detach() / divergence.temperature, -1)
    found = log_probs.topk(k)
    return TopTokens(found.indices, found.values.float())


def coarse_losses(student, tokens, labels, divergence, alpha):
    """The forward divergence of {best tokens, the rest}, in float64."""
    valid = labels.ne(-100)
    logits = full_logits(student)[valid]
    q = torch.softmax(logits[:, :VOCABULARY].double() / divergence.temperature, -1).gather(1, tokens.token_ids[valid])
    p = tokens.log_probs[valid].double().exp()
    value = (p * (p / q).log()).sum()
    rest = (1 - p.sum(1)).clamp(min=0)
    if p.shape[1] < VOCABULARY:
        value = value + (rest * (rest / (1 - q.sum(1))).log()).sum()
    value = divergence.temperature**2 * value
    cross_entropy = functional.cross_entropy(logits, labels[valid], reduction="sum")
    return (1 - alpha) * cross_entropy + alpha * value, value, cross_entropy


@pytest.mark.parametrize("k", [1, 5, VOCABULARY])
@pytest.mark.parametrize("form", FORMS)
def test_best_tokens_of_a_teacher(form, k):
    for temperature, alpha, frozen, size in itertools.product(TEMPERATURES, ALPHAS, (True, False), WORKSPACES):
        divergence = Divergence(temperature=temperature)
        # In float32 one token and its rest are nearly the same for both, and the difference is what is rounded.
        student, teacher, labels, n_words = example(torch.float64, frozen=frozen, **FORMS[form])
        tokens = top_tokens_of(teacher, k, divergence)
        expected = coarse_losses(student, tokens, labels, divergence, alpha)
        given = {"divergence": divergence, "alpha": alpha, "n_words": n_words}
        result = linear_divergence(student, tokens, labels, workspace_bytes=size, **given)
        assert_equal(result, expected, student, labels, 1e-9)
        on_logits = divergence_of_logits(full_logits(student), tokens, labels, **given)
        assert_equal(on_logits, expected, student, labels, 1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_best_tokens_in_other_dtypes(dtype):
    divergence = Divergence(temperature=2.0)
    for frozen in (True, False):
        student, teacher, labels, _ = example(dtype, bias=True, frozen=frozen)
        tokens = top_tokens_of(teacher, 5, divergence)
        expected = coarse_losses(student, tokens, labels, divergence, 0.5)
        expected = [value.to(torch.promote_types(dtype, torch.float32)) for value in expected]
        result = linear_divergence(student, tokens, labels, divergence=divergence, alpha=0.5)
        assert_equal(result, expected, student, labels, TOLERANCES[dtype])


def test_a_teacher_that_is_certain():
    """No probability is left for the other tokens, and the student gives them next to none, or nearly all."""
    weight = torch.eye(8)
    tokens = TopTokens(torch.tensor([[0, 1]] * 2), torch.tensor([[0.0, -torch.inf]] * 2).clamp(min=-200))
    for size in (200.0, -200.0):
        hidden = torch.zeros(2, 8)
        hidden[:, 0] = size
        hidden.requires_grad_()
        result = linear_divergence(
            Head(hidden, weight), tokens, torch.tensor([0, 1]), divergence=Divergence(), alpha=1.0
        )
        result.loss_sum.backward()
        expected = torch.softmax(hidden.detach(), -1) - torch.eye(8)[0]
        torch.testing.assert_close(hidden.grad, expected)
        torch.testing.assert_close(result.divergence_sum, -2 * torch.log_softmax(hidden.detach(), -1)[0, 0])


def test_a_student_that_leaves_nothing_for_the_rest():
    """Its probability of the other tokens is below what float32 holds, and its logarithm is not."""
    hidden = torch.tensor([[300.0, 0, 0, 0]], requires_grad=True)
    tokens = TopTokens(torch.tensor([[0]]), torch.tensor([[0.5]]).log())
    result = linear_divergence(
        Head(hidden, torch.eye(4)), tokens, torch.tensor([0]), divergence=Divergence(), alpha=1.0
    )
    result.loss_sum.backward()
    assert result.divergence_sum.item() == pytest.approx(math.log(0.5) + 0.5 * (300 - math.log(3)))
    torch.testing.assert_close(hidden.grad, torch.tensor([[0.5, -0.5 / 3, -0.5 / 3, -0.5 / 3]]))


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_the_slopes_of_the_values(kind):
    """Central differences in float64, along directions in which all inputs change."""
    for form in FORMS.values():
        student, teacher, labels, n_words = example(torch.float64, frozen=False, **form)
        given = {"divergence": Divergence(kind, 0.4, 1.5), "alpha": 0.6, "n_words": n_words}
        inputs = trained(student)
        gradients = torch.autograd.grad(linear_divergence(student, teacher, labels, **given).loss_sum, inputs)
        generator = torch.Generator().manual_seed(0)
        directions = [torch.randn(item.shape, generator=generator, dtype=item.dtype) for item in inputs]
        slope = sum((gradient * way).sum() for gradient, way in zip(gradients, directions, strict=True))
        ends = []
        for step in (1e-6, -1e-6):
            moved = [item + step * way for item, way in zip(inputs, directions, strict=True)]
            bias = moved[2] if student.bias is not None else None
            changed = replace(student, hidden=moved[0], weight=moved[1], bias=bias)
            ends.append(linear_divergence(changed, teacher, labels, **given).loss_sum)
        difference = (ends[0] - ends[1]) / 2e-6
        torch.testing.assert_close(slope, difference, rtol=1e-6, atol=0)


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_alpha_of_zero_is_the_cross_entropy(dtype, softcap, frozen):
    """To the last digit; what the teacher would say is reported."""
    student, teacher, labels, _ = example(dtype, bias=True, softcaps=(softcap, None), frozen=frozen)
    expected = linear_cross_entropy(student.hidden, student.weight, labels, student.bias, softcap=softcap)
    result = linear_divergence(student, teacher, labels, divergence=Divergence(), alpha=0.0)
    assert torch.equal(result.loss_sum, expected.loss_sum)
    assert torch.equal(result.tokens.losses, expected.losses)
    assert result.divergence_sum > 0
    inputs = trained(student)
    for ours, plain in zip(
        torch.autograd.grad(result.loss_sum, inputs), torch.autograd.grad(expected.loss_sum, inputs), strict=True
    ):
        assert torch.equal(ours, plain)


@pytest.mark.parametrize("kind", KINDS)
def test_equal_models_do_not_diverge(kind):
    student, _, labels, _ = example(bias=True)
    result = linear_divergence(student, student, labels, divergence=Divergence(kind, temperature=2.0), alpha=1.0)
    (gradient,) = torch.autograd.grad(result.loss_sum, student.hidden)
    # The mixture of two equal distributions is rounded.
    assert abs(result.divergence_sum) <= (1e-4 if kind == "jsd" else 0)
    assert gradient.norm() <= (1e-4 if kind == "jsd" else 0)


def test_the_limits_of_jsd():
    """Its value and gradient go to those of the two divergences, as they are weighted."""
    student, teacher, labels, _ = example(torch.float64, scale=0.1)

    def found(divergence):
        result = linear_divergence(student, teacher, labels, divergence=divergence, alpha=1.0)
        return result.loss_sum.detach(), torch.autograd.grad(result.loss_sum, student.hidden)[0]

    for kind, beta, weight in (("forward_kl", 1e-7, 1e-7), ("reverse_kl", 1 - 1e-7, 1e-7)):
        for limit, near in zip(found(Divergence(kind)), found(Divergence("jsd", beta)), strict=True):
            assert relative_error(near / weight, limit) < 1e-3


@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_autocast(frozen):
    """Products in bfloat16 from float32 weights, gradients in the dtype of what is trained."""
    student, teacher, labels, n_words = example(bias=True, frozen=frozen)
    divergence = Divergence(temperature=2.0)
    loss, *_ = plain_losses(student, teacher, labels, n_words, divergence, 0.5)
    with torch.autocast("cpu", torch.bfloat16):
        result = linear_divergence(student, teacher, labels, divergence=divergence, alpha=0.5, workspace_bytes=60_000)
    torch.testing.assert_close(result.loss_sum, loss, rtol=1e-2, atol=0)
    inputs = trained(student)
    for ours, plain in zip(
        torch.autograd.grad(result.loss_sum, inputs), torch.autograd.grad(loss, inputs), strict=True
    ):
        assert ours.dtype == torch.float32
        assert relative_error(ours, plain) < 1e-2


def test_models_in_different_dtypes():
    student, teacher, labels, n_words = example(bias=True)
    divergence = Divergence("reverse_kl")
    expected = plain_losses(student, teacher, labels, n_words, divergence, 0.5)
    for dtype, tolerance in ((torch.float64, 1e-5), (torch.bfloat16, 2e-2)):
        other = Head(teacher.hidden.to(dtype), teacher.weight.to(dtype), teacher.bias.to(dtype))
        result = linear_divergence(student, other, labels, divergence=divergence, alpha=0.5)
        assert_equal(result, expected, student, labels, tolerance)


@pytest.mark.parametrize("alpha", [0.0, 0.5])
@pytest.mark.parametrize("frozen", [True, False], ids=["frozen", "trained"])
def test_nothing_to_predict_is_a_differentiable_zero(frozen, alpha):
    student, teacher, labels, _ = example(frozen=frozen)
    for given in (teacher, top_tokens_of(teacher, 3, Divergence())):
        result = linear_divergence(student, given, labels.fill_(-100), divergence=Divergence(), alpha=alpha)
        assert result.loss_sum == result.divergence_sum == result.tokens.n_tokens == result.tokens.n_correct == 0
        (gradient,) = torch.autograd.grad(result.loss_sum, student.hidden)
        assert not gradient.any()
    on_logits = divergence_of_logits(
        full_logits(student), full_logits(teacher), labels, divergence=Divergence(), alpha=alpha
    )
    assert on_logits.loss_sum == on_logits.tokens.n_correct == 0


def test_rows_without_a_label_are_not_read():
    student, teacher, labels, _ = example()
    expected = linear_divergence(student, teacher, labels, divergence=Divergence(), alpha=0.5)
    student.hidden.data[labels.eq(-100)] = torch.nan
    teacher.hidden.data[labels.eq(-100)] = torch.nan
    result = linear_divergence(student, teacher, labels, divergence=Divergence(), alpha=0.5)
    assert torch.equal(result.loss_sum, expected.loss_sum)
    (gradient,) = torch.autograd.grad(result.loss_sum, student.hidden)
    assert gradient[labels.eq(-100)].eq(0).all()
    assert gradient.isfinite().all()


def test_without_gradient_the_values_are_the_same():
    student, teacher, labels, _ = example(frozen=False)
    expected = linear_divergence(student, teacher, labels, divergence=Divergence(), alpha=0.5)
    with torch.no_grad():
        result = linear_divergence(student, teacher, labels, divergence=Divergence(), alpha=0.5)
    assert not result.loss_sum.requires_grad
    assert torch.equal(result.loss_sum, expected.loss_sum)


def test_the_teacher_gets_no_gradient():
    student, teacher, labels, _ = example()
    teacher.weight.requires_grad_()
    linear_divergence(student, teacher, labels, divergence=Divergence(), alpha=0.5).loss_sum.backward()
    assert teacher.weight.grad is None
    assert student.hidden.grad.any()


def test_counts_the_targets_with_the_largest_logit():
    student, teacher, labels, _ = example(bias=True)
    best = full_logits(student).argmax(-1)
    labels[1, 2:5] = best[1, 2:5]
    for size in WORKSPACES:
        result = linear_divergence(student, teacher, labels, divergence=Divergence(), alpha=0.5, workspace_bytes=size)
        assert result.tokens.n_correct == (best == labels).sum() >= 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_memory_stays_within_the_workspace(kind, dtype):
    """The most that is allocated at once, from the profiler's own record."""
    rows, words, workspace_bytes = 512, 4096, 2**20
    student = Head(torch.randn(rows, 8, dtype=dtype, requires_grad=True), torch.randn(words, 8, dtype=dtype))
    teacher = Head(torch.randn(rows, 12, dtype=dtype), torch.randn(words, 12, dtype=dtype), softcap=5.0)
    labels = torch.randint(words, (rows,))
    options = {"divergence": Divergence(kind), "alpha": 0.5, "workspace_bytes": workspace_bytes}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        linear_divergence(student, teacher, labels, **options).loss_sum.backward()
    total = most = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            total += event.nbytes()
            most = max(most, total)
    # Beside the logits: rows of hidden states and of losses, and the probabilities of a block.
    assert workspace_bytes / 2 < most < 1.25 * workspace_bytes


def test_denormal_numbers_do_not_reach_the_matrix_products(monkeypatch):
    """They slow a CPU's product down tenfold; logits this far apart are what an untrained head gives."""
    seen = []
    product = torch.mm
    monkeypatch.setattr(torch, "mm", lambda a, b, out: seen.append(a.clone()) or product(a, b, out=out))
    student, teacher, labels, _ = example(scale=30.0)
    for kind in KINDS:
        linear_divergence(student, teacher, labels, divergence=Divergence(kind), alpha=0.5, workspace_bytes=60_000)
    smallest = torch.finfo(torch.float32).smallest_normal
    assert all(((factor == 0) | (factor.abs() >= smallest)).all() for factor in seen)
    assert any(factor.shape[1] == VOCABULARY for factor in seen)


def test_a_second_backward_pass_is_refused():
    student, teacher, labels, _ = example()
    loss = linear_divergence(student, teacher, labels, divergence=Divergence(), alpha=0.5).loss_sum
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "kl"}, "expected one of forward_kl, reverse_kl, jsd"),
        ({"kind": "jsd", "beta": 1.0}, "between 0 and 1"),
        ({"temperature": 0.0}, "above 0"),
        ({"temperature": float("nan")}, "above 0"),
    ],
)
def test_divergences_that_there_are_not(options, words):
    with pytest.raises(ValueError, match=words):
        Divergence(**options)


def test_what_does_not_fit_is_refused():
    student, teacher, labels, n_words = example(padding=(3, 5))
    tokens = top_tokens_of(teacher, 3, Divergence())
    logits = full_logits(student), full_logits(teacher)
    for compute, (ours, theirs) in ((linear_divergence, (student, teacher)), (divergence_of_logits, logits)):
        with pytest.raises(ValueError, match="304 words and the teacher's 306"):
            compute(ours, theirs, labels, divergence=Divergence(), alpha=0.5)
        with pytest.raises(ValueError, match="n_words=305: must be at least 1 and at most 304"):
            compute(ours, theirs, labels, divergence=Divergence(), alpha=0.5, n_words=305)
        with pytest.raises(ValueError, match="needs the teacher's whole distribution"):
            compute(ours, tokens, labels, divergence=Divergence("jsd"), alpha=0.5, n_words=n_words)
