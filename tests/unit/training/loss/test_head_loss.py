"""The chunked cross entropy of a head, against plain autograd over the full logits."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import Parameter, functional

from megatron.early_exit import platform

platform.prepare()

from megatron.early_exit.training.loss import head_loss as module  # noqa: E402
from megatron.early_exit.training.loss.head_loss import (  # noqa: E402
    HeadLoss,
    HeadLossOptions,
    Teacher,
    head_loss,
)
from tests.helpers.plain_loss import relative_error, token_losses  # noqa: E402

TOKENS, HIDDEN, VOCAB = 23, 16, 50


pytestmark = pytest.mark.usefixtures("process_groups")


@pytest.fixture(params=["eager", "fused"])
def softmax(request, monkeypatch) -> str:
    """Run a test also with the functions that a GPU compiles, uncompiled."""
    if request.param == "fused":
        monkeypatch.setattr(
            module,
            "_is_fused",
            lambda hidden, options, teacher: teacher is None and options.vocab_size is None,
        )
    return request.param


def options(**changes: object) -> HeadLossOptions:
    values = {"temperature": 1.0, "confidence_weighted": False, "chunk_tokens": None}
    return HeadLossOptions(**(values | changes), tp_group=torch.distributed.group.WORLD)


class Case:
    """Random hidden states, weight, labels, and coefficients of which some are zero."""

    def __init__(self, seed: int = 0, dtype: torch.dtype = torch.float32, tokens: int = TOKENS):
        generator = torch.Generator().manual_seed(seed)
        self.hidden = torch.randn(tokens, HIDDEN, generator=generator).to(dtype)
        self.weight = Parameter((torch.randn(VOCAB, HIDDEN, generator=generator) / 4).to(dtype))
        self.labels = torch.randint(VOCAB, (tokens,), generator=generator)
        masked = torch.rand(tokens, generator=generator) < 0.3
        self.coefficients = torch.rand(tokens, generator=generator).masked_fill(masked, 0.0)

    def run(self, **changes: object) -> tuple[HeadLoss, Tensor | None]:
        return head_loss(
            self.hidden, self.weight, self.labels, options(**changes), self.coefficients
        )

    def expected_gradients(self, dtype: torch.dtype = torch.float32, **kind: object):
        """d(sum of coefficient * loss) / d(hidden, weight), in `dtype`."""
        hidden = self.hidden.detach().to(dtype).requires_grad_()
        weight = self.weight.detach().to(dtype).requires_grad_()
        losses = token_losses(hidden @ weight.t(), self.labels, **kind)
        (losses * self.coefficients).sum().backward()
        return hidden.grad, weight.grad


KINDS = [
    {},
    {"temperature": 2.5},
    {"confidence_weighted": True},
    {"temperature": 0.5, "confidence_weighted": True},
    {"vocab_size": 31},
    {"vocab_size": 2, "temperature": 0.5, "confidence_weighted": True},
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("chunk_tokens", [None, 1, 5, 8, TOKENS, 1000])
def test_gradients_are_those_of_autograd(softmax, kind, chunk_tokens):
    case = Case()
    _, hidden_gradient = case.run(chunk_tokens=chunk_tokens, **kind)
    expected_hidden, expected_weight = case.expected_gradients(**kind)
    assert relative_error(hidden_gradient, expected_hidden) < 1e-6
    assert relative_error(case.weight.grad, expected_weight) < 1e-6


@pytest.mark.parametrize("vocab_size", [None, 31])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("own_temperature", [1.0, 2.5])
def test_a_teacher_counts_beside_the_labels(own_temperature, temperature, vocab_size):
    case = Case(tokens=24)
    own_options = options(chunk_tokens=5, vocab_size=vocab_size, temperature=own_temperature)
    answers = torch.randn(24, VOCAB) * 2
    # As a model gives them, batch first.
    by_batch = answers.view(8, 3, VOCAB).transpose(0, 1).contiguous()
    teacher = Teacher.of(by_batch.transpose(0, 1), 0.7, temperature, own_options)
    _, found = head_loss(
        *(case.hidden, case.weight, case.labels),
        own_options,
        case.coefficients,
        teacher,
    )
    hidden = case.hidden.detach().requires_grad_()
    weight = case.weight.detach().requires_grad_()
    logits = hidden @ weight.t()
    own = functional.log_softmax(logits[:, :vocab_size] / temperature, dim=-1)
    theirs = torch.softmax(answers / temperature, dim=-1)
    rest = 1 - theirs[:, :vocab_size].sum(dim=-1, keepdim=True)
    theirs = theirs[:, :vocab_size] + rest / own.shape[1]
    divergence = (theirs * (theirs.log() - own)).sum(dim=-1) * temperature**2
    labels = token_losses(logits, case.labels, temperature=own_temperature, vocab_size=vocab_size)
    ((0.7 * divergence + 0.3 * labels) * case.coefficients).sum().backward()
    assert relative_error(found, hidden.grad) < 1e-6
    assert relative_error(case.weight.grad, weight.grad) < 1e-6


@given(
    tokens=st.integers(1, 40),
    chunk_tokens=st.integers(1, 50),
    temperature=st.floats(0.1, 10),
    confidence_weighted=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_chunks_change_nothing(tokens, chunk_tokens, temperature, confidence_weighted, seed):
    kind = {"temperature": temperature, "confidence_weighted": confidence_weighted}
    whole, parts = Case(seed, tokens=tokens), Case(seed, tokens=tokens)
    expected, expected_gradient = whole.run(chunk_tokens=tokens, **kind)
    found, gradient = parts.run(chunk_tokens=chunk_tokens, **kind)
    torch.testing.assert_close(found.loss, expected.loss)
    assert torch.equal(found.correct, expected.correct)
    torch.testing.assert_close(found.weight, expected.weight)
    torch.testing.assert_close(gradient, expected_gradient)
    torch.testing.assert_close(parts.weight.grad, whole.weight.grad)


@given(tokens=st.integers(0, 100_000), chunk=st.integers(1, 5000))
def test_chunks_cover_the_tokens_and_stay_within_the_bound(tokens, chunk):
    slices = list(options(chunk_tokens=chunk).chunks(tokens, VOCAB, torch.device("cpu")))
    assert [i for one in slices for i in (one.start, one.stop)] == sorted(
        i for one in slices for i in (one.start, one.stop)
    )
    assert sum(one.stop - one.start for one in slices) == tokens
    assert all(0 < one.stop - one.start <= chunk for one in slices)


@pytest.mark.parametrize(
    ("device", "itemsize", "bytes_per_logit", "bound"),
    [
        # Logits, their copy in fp32, and their gradient.
        ("cuda", None, 8, 512 * 2**20),
        # The gradient takes the place of the logits.
        ("cuda", 2, 2, 512 * 2**20),
        ("cuda", 4, 4, 512 * 2**20),
        ("cpu", None, 4, 16 * 2**20),
    ],
)
def test_default_chunk_is_bounded_by_memory(device, itemsize, bytes_per_logit, bound):
    vocab, device = 100_000, torch.device(device)
    slices = list(options().chunks(4096, vocab, device, bytes_per_logit=itemsize))
    longest = max(one.stop - one.start for one in slices)
    assert len(slices) > 1
    assert bound / 2 < longest * vocab * bytes_per_logit <= bound
    tiny = options().chunks(3, 10**9, device)
    assert [one.stop - one.start for one in tiny] == [1, 1, 1]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_per_token_results(softmax, kind):
    case = Case()
    result, _ = case.run(chunk_tokens=7, **kind)
    logits = (case.hidden @ case.weight.detach().t()) / kind.get("temperature", 1.0)
    logits = logits[:, : kind.get("vocab_size")]
    known = case.labels < logits.shape[1]
    torch.testing.assert_close(
        result.loss[known],
        functional.cross_entropy(logits[known], case.labels[known], reduction="none"),
    )
    assert torch.equal(result.correct, (logits.argmax(dim=-1) == case.labels).float())
    confidence = torch.softmax(logits, dim=-1).amax(dim=-1)
    weighted = kind.get("confidence_weighted", False)
    torch.testing.assert_close(result.weight, confidence if weighted else torch.ones(TOKENS))


def test_of_equal_logits_the_lowest_id_is_the_choice(softmax):
    case = Case()
    with torch.no_grad():
        case.weight[1:] = case.weight[0]
    result, _ = case.run(chunk_tokens=4)
    assert torch.equal(result.correct, (case.labels == 0).float())


def test_the_lowest_of_two_equal_logits_is_found_on_either_side(softmax):
    case = Case(tokens=3)
    with torch.no_grad():
        case.weight[7] = case.weight[30] = 3 * case.hidden.sum(dim=0)
        case.weight[3] = -case.weight[7]
    best = (case.hidden @ case.weight.t()).argmax(dim=-1)
    assert 7 in best
    assert 30 not in best
    case.labels = torch.where(best == 7, 30, best)
    result, _ = case.run()
    assert torch.equal(result.correct, (best != 7).float())
    case.labels = best
    result, _ = case.run()
    assert result.correct.all()


def test_huge_logits_overflow_nothing(softmax):
    case = Case()
    case.hidden *= 1e6
    result, gradient = case.run()
    assert result.loss.isfinite().all()
    assert gradient.isfinite().all()
    assert case.weight.grad.isfinite().all()


def test_without_coefficients_nothing_is_accumulated():
    case = Case()
    _, with_gradient = case.run()
    case.weight.grad = None
    result, gradient = head_loss(case.hidden, case.weight, case.labels, options(chunk_tokens=6))
    assert gradient is None
    assert case.weight.grad is None
    assert with_gradient is not None
    torch.testing.assert_close(
        result.loss, token_losses(case.hidden @ case.weight.detach().t(), case.labels)
    )


@pytest.mark.parametrize("main_grad", [False, True])
def test_frozen_weight_takes_no_gradient(main_grad):
    case = Case()
    case.weight.requires_grad_(False)
    if main_grad:
        case.weight.main_grad = torch.zeros(VOCAB, HIDDEN)
    _, gradient = case.run(chunk_tokens=6)
    assert relative_error(gradient, case.expected_gradients()[0]) < 1e-6
    assert case.weight.grad is None
    assert not main_grad or not case.weight.main_grad.any()


def test_zero_coefficients_give_zero_gradients():
    case = Case()
    case.coefficients.zero_()
    _, gradient = case.run(chunk_tokens=6)
    assert not gradient.any()
    assert not case.weight.grad.any()


# --- the ways in which a weight takes its gradient ---------------------------------------------


class DataParallelHook:
    """Does to a weight what Megatron's data parallelism does: a gradient buffer of its own dtype,
    filled by a hook on the weight's gradient accumulator."""

    def __init__(self, weight: Parameter, dtype: torch.dtype) -> None:
        self.calls = 0
        weight.main_grad = torch.zeros(weight.shape, dtype=dtype)
        weight.grad_added_to_main_grad = False
        self.accumulator = weight.expand_as(weight).grad_fn.next_functions[0][0]

        def hook(*_: object) -> None:
            self.calls += 1
            assert weight.grad is not None
            if not weight.grad_added_to_main_grad or getattr(weight, "zero_out_wgrad", False):
                weight.main_grad.add_(weight.grad)
            weight.grad = None

        self.accumulator.register_hook(hook)


@pytest.mark.parametrize("chunk_tokens", [None, 5])
@pytest.mark.parametrize(
    ("dtype", "main_dtype", "bound"),
    [
        (torch.float32, torch.float32, 1e-6),
        (torch.bfloat16, torch.float32, 1e-2),
        (torch.bfloat16, torch.bfloat16, 1e-2),
    ],
    ids=str,
)
def test_main_grad_accumulates_over_calls(softmax, dtype, main_dtype, bound, chunk_tokens):
    case = Case(dtype=dtype)
    hook = DataParallelHook(case.weight, main_dtype)
    for _ in range(3):
        _, hidden_gradient = case.run(chunk_tokens=chunk_tokens)
    expected_hidden, expected_weight = case.expected_gradients()
    assert hook.calls == 3
    assert case.weight.grad is None
    assert case.weight.main_grad.dtype == main_dtype
    assert relative_error(case.weight.main_grad, 3 * expected_weight) < bound
    assert relative_error(hidden_gradient, expected_hidden) < bound


class OnGpu(Tensor):
    """A CPU tensor that says it is on a GPU."""

    is_cuda = True


def test_a_gpu_adds_to_an_fp32_gradient_within_the_product(monkeypatch):
    case = Case(dtype=torch.bfloat16)
    main_gradient = case.weight.main_grad = torch.ones(VOCAB, HIDDEN)
    calls = []

    def addmm(total, left, right, *, out_dtype, out):
        calls.append((total.data_ptr(), left.dtype, right.dtype, out_dtype, out.data_ptr()))

    monkeypatch.setattr(module.torch, "addmm", addmm)
    total = module._WeightGradient(case.weight, rows=VOCAB, chunks=2)
    total.add(torch.ones(TOKENS, VOCAB, dtype=torch.bfloat16), case.hidden.as_subclass(OnGpu))
    place, bf16 = main_gradient.data_ptr(), torch.bfloat16
    assert calls == [(place, bf16, bf16, torch.float32, place)]
    assert main_gradient.eq(1).all()


def test_other_uses_of_a_tied_weight_still_reach_main_grad():
    # Megatron sets zero_out_wgrad on an embedding that is tied to the output layer.
    case = Case()
    DataParallelHook(case.weight, torch.float32)
    case.weight.zero_out_wgrad = True
    embedded = torch.randn(TOKENS, HIDDEN)
    (functional.embedding(case.labels, case.weight) * embedded).sum().backward()
    case.run(chunk_tokens=5)
    (functional.embedding(case.labels, case.weight) * embedded).sum().backward()
    assert case.weight.zero_out_wgrad
    assert not case.weight.grad_added_to_main_grad
    expected = case.expected_gradients()[1].index_add(0, case.labels, embedded, alpha=2)
    assert relative_error(case.weight.main_grad, expected) < 1e-6


@pytest.mark.parametrize("chunk_tokens", [None, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_plain_grad_accumulates_over_calls(softmax, dtype, chunk_tokens):
    case = Case(dtype=dtype)
    for _ in range(2):
        case.run(chunk_tokens=chunk_tokens)
    expected = 2 * case.expected_gradients()[1]
    assert case.weight.grad.dtype == dtype
    assert relative_error(case.weight.grad, expected) < (1e-6 if dtype.itemsize == 4 else 1e-2)


def test_bf16_chunks_round_like_autograd(softmax):
    case = Case(dtype=torch.bfloat16, tokens=400)
    _, gradient = case.run(chunk_tokens=50)
    exact, automatic = case.expected_gradients(), case.expected_gradients(torch.bfloat16)
    for found, plain, expected in zip((gradient, case.weight.grad), automatic, exact, strict=True):
        error, plain_error = relative_error(found, expected), relative_error(plain, expected)
        assert error < 1.5 * plain_error


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [{}, {"temperature": 2.5, "confidence_weighted": True}], ids=str)
@pytest.mark.parametrize("main_grad", [False, True])
def test_a_gpu_computes_what_a_cpu_does(kind, main_grad):
    case = Case(dtype=torch.bfloat16, tokens=400)
    exact_hidden, exact_weight = case.expected_gradients(**kind)
    expected, _ = case.run(chunk_tokens=150, **kind)
    for name in ("hidden", "labels", "coefficients"):
        setattr(case, name, getattr(case, name).cuda())
    case.weight = Parameter(case.weight.detach().cuda())
    if main_grad:
        DataParallelHook(case.weight, torch.float32)
    found, gradient = case.run(chunk_tokens=150, **kind)
    torch.testing.assert_close(found.loss.cpu(), expected.loss, rtol=1e-2, atol=1e-2)
    weight_gradient = case.weight.main_grad if main_grad else case.weight.grad
    assert relative_error(gradient.cpu(), exact_hidden) < 1e-2
    assert relative_error(weight_gradient.cpu(), exact_weight) < 1e-2
