"""Cross entropy of an output projection, in chunks of tokens, with its gradients.

The logits of a chunk are made, turned into their own gradient in place, used for the gradients of
the hidden states and of the weight, and dropped: the full [tokens, vocabulary] matrix never
exists. Loss and gradients come from one call because an exit's loss is computed in the backward
phase, when its coefficients are already known.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

from megatron.early_exit.training.loss.softmax import ChunkSoftmax, EagerSoftmax, FusedSoftmax
from megatron.early_exit.training.loss.vocabulary import LocalVocabulary

# A GPU needs thousands of tokens at a time to be busy, and reads and writes the whole gradient of
# the weight once for each chunk; a CPU is faster where a chunk stays in its cache, and has less
# memory beside it to hide behind.
_LOGITS_BYTES_PER_CHUNK = {"cuda": 512 * 2**20, "cpu": 16 * 2**20}
# Where the softmax is not fused, a GPU holds logits and gradient in bf16 beside an fp32 copy.
_BYTES_PER_LOGIT = {"cuda": 8, "cpu": 4}


@dataclass(frozen=True)
class HeadLoss:
    """Per-token results of one head, each [n] in fp32.

    Attributes:
        loss: cross entropy of the (tempered) logits, not weighted.
        correct: 1 where the label is the greedy choice: the largest logit, the lowest id of equals
            (which are frequent in half precision).
        weight: what the token's loss is multiplied by: 1, or the head's own confidence.
        agrees: 1 where the greedy choice is that of another head; None where none is given.
    """

    loss: Tensor
    correct: Tensor
    weight: Tensor
    agrees: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class HeadLossOptions:
    """How a head's loss is computed.

    Attributes:
        temperature: divisor of the logits.
        confidence_weighted: weight each token by its largest softmax probability.
        chunk_tokens: tokens per chunk; None bounds the memory of a chunk's logits to 512 MiB on
            a GPU and 16 MiB on a CPU.
        tp_group: the tensor-parallel group that the vocabulary is divided over.
        vocab_size: tokens that the head can answer with, the first ones; None is all. A label that
            is none of them counts as spread evenly over them, so that the head learns to be unsure.
    """

    temperature: float
    confidence_weighted: bool
    chunk_tokens: int | None
    tp_group: torch.distributed.ProcessGroup
    vocab_size: int | None = None

    def chunks(
        self,
        tokens: int,
        vocab_size: int,
        device: torch.device,
        *,
        group: int = 1,
        bytes_per_logit: int | None = None,
    ) -> Iterator[slice]:
        """Slices of at most the allowed number of tokens; of groups of tokens, where these are
        counted (a chunk then has one group at least)."""
        size = self.chunk_tokens
        if size is None:
            bytes_per_logit = bytes_per_logit or _BYTES_PER_LOGIT[device.type]
            size = _LOGITS_BYTES_PER_CHUNK[device.type] // (bytes_per_logit * vocab_size)
        size = max(1, size // group)
        count = -(-tokens // size)
        size = -(-tokens // max(count, 1))
        for start in range(0, tokens, max(size, 1)):
            yield slice(start, min(start + size, tokens))


@dataclass(frozen=True)
class Teacher:
    """Another head whose answers heads learn, beside the labels.

    Attributes:
        probabilities: [n, v], tempered, of this rank's part of the tokens that the heads can answer
            with; those of all others are spread evenly over them.
        weight: part of the loss, 0 to 1, that is temperature^2 * KL(teacher || head), both
            tempered; the rest is the cross entropy.
        temperature: divisor of the logits of both.
    """

    probabilities: Tensor
    weight: float
    temperature: float

    @classmethod
    def of(
        cls, logits: Tensor, weight: float, temperature: float, options: HeadLossOptions
    ) -> "Teacher":
        """From logits [s, b, v] over this rank's part of the whole vocabulary, in their dtype."""
        sequence, batch, rows = logits.shape
        vocabulary = LocalVocabulary(rows, options.tp_group, options.vocab_size)
        probabilities = logits.new_empty(sequence, batch, vocabulary.rows)
        # Logits come batch first: only a chunk of them is ever put into another order.
        for steps in options.chunks(sequence, rows, logits.device, group=batch):
            tempered = logits[steps].flatten(0, 1).to(torch.float32, copy=True)
            if temperature != 1:
                tempered /= temperature
            probabilities[steps].flatten(0, 1).copy_(vocabulary.answers_of(tempered))
        return cls(probabilities.flatten(0, 1), weight, temperature)

    def own_softmax(
        self, logits: Tensor, temperature: float, vocabulary: LocalVocabulary
    ) -> Tensor | None:
        """The head's softmax [c, v] at the teacher's temperature; None where that is its own, so
        that the loss by the labels has computed it already."""
        if self.temperature == temperature:
            return None
        return vocabulary.softmax(logits / self.temperature)

    def add_gradient(
        self, gradient: Tensor, own: Tensor | None, rows: slice, scale: Tensor
    ) -> None:
        """Add (softmax - teacher) * scale to the gradient of some rows' logits [c, v], or, without
        `own`, only the teacher's part: then the softmax is in there already.

        Args:
            own: see `own_softmax`.
            scale: [c, 1].
        """
        if own is not None:
            gradient.addcmul_(own, scale)
        gradient.addcmul_(self.probabilities[rows], -scale)


def head_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    options: HeadLossOptions,
    coefficients: Tensor | None = None,
    teacher: Teacher | None = None,
    other_tokens: Tensor | None = None,
) -> tuple[HeadLoss, Tensor | None]:
    """Loss of the head `hidden @ weight.T` over a vocabulary divided by tensor parallelism.

    Args:
        hidden: [n, h], the same on every tensor-parallel rank.
        weight: [v, h], this rank's rows of the projection.
        labels: [n], ids in the whole vocabulary.
        options: temperature, token weights, chunking.
        coefficients: [n], d(objective) / d(weight_i * loss_i). Without them only the loss is
            computed. With them the gradient of `weight`, where it needs one, is accumulated (its
            backward hooks run once), and this rank's part of the gradient of `hidden` is returned
            (to be summed over the tensor-parallel group).
        teacher: changes the gradients; what is returned stays the cross entropy.
        other_tokens: [n], the greedy choices of another head, for `HeadLoss.agrees`.

    Returns:
        The per-token results, and the gradient [n, h] or None.
    """
    vocabulary = LocalVocabulary(len(weight), options.tp_group, options.vocab_size)
    hidden, frozen_weight = hidden.detach(), weight.detach()[: vocabulary.rows]
    fused = _is_fused(hidden, options, teacher)
    slices = list(
        options.chunks(
            len(hidden),
            vocabulary.rows,
            hidden.device,
            bytes_per_logit=hidden.element_size() if fused else None,
        )
    )
    hidden_gradient = None if coefficients is None else torch.empty_like(hidden)
    weight_gradient = None
    if coefficients is not None and weight.requires_grad:
        weight_gradient = _WeightGradient(weight, vocabulary.rows, len(slices))
    parts = []
    with torch.no_grad():
        for rows in slices:
            logits = torch.mm(hidden[rows], frozen_weight.t())
            own = None
            others = None if other_tokens is None else other_tokens[rows]
            chunk = labels[rows], options.temperature, vocabulary, others
            softmax: ChunkSoftmax
            if fused:
                softmax = FusedSoftmax(logits, *chunk)
            else:
                logits = vocabulary.mask(logits.float())
                if teacher is not None and coefficients is not None:
                    own = teacher.own_softmax(logits, options.temperature, vocabulary)
                softmax = EagerSoftmax(logits, *chunk)
            part = _loss_of(softmax, options)
            parts.append(part)
            if coefficients is None or hidden_gradient is None:
                continue
            # The gradient of either loss is a softmax minus what is to be learned.
            scale = coefficients[rows] * part.weight
            by_label = by_softmax = scale / options.temperature
            if teacher is not None:
                by_label = by_label * (1 - teacher.weight)
                by_teacher = scale * (teacher.weight * teacher.temperature)
                by_softmax = by_label + by_teacher if own is None else by_label
            gradient = softmax.gradient(by_softmax, by_label)
            if teacher is not None:
                teacher.add_gradient(gradient, own, rows, by_teacher.unsqueeze(1))
            gradient = gradient.to(hidden.dtype)
            torch.mm(gradient, frozen_weight, out=hidden_gradient[rows])
            if weight_gradient is not None:
                weight_gradient.add(gradient, hidden[rows])
    if weight_gradient is not None:
        weight_gradient.deliver()
    names = ["loss", "correct", "weight", *(["agrees"] if other_tokens is not None else [])]
    whole = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
    return HeadLoss(**whole), hidden_gradient


def _is_fused(hidden: Tensor, options: HeadLossOptions, teacher: Teacher | None) -> bool:
    return hidden.is_cuda and teacher is None and options.vocab_size is None


def _loss_of(softmax: ChunkSoftmax, options: HeadLossOptions) -> HeadLoss:
    confidence = softmax.total.reciprocal()
    weight = confidence if options.confidence_weighted else torch.ones_like(confidence)
    agrees = None if softmax.agrees is None else softmax.agrees.float()
    return HeadLoss(softmax.total.log() - softmax.target, softmax.is_choice.float(), weight, agrees)


class _WeightGradient:
    """Accumulates a projection's gradient over chunks, straight into `main_grad` where Megatron's
    data parallelism gave the weight one (as its fused gradient accumulation does)."""

    def __init__(self, weight: Tensor, rows: int, chunks: int) -> None:
        self.weight = weight
        main_gradient = getattr(weight, "main_grad", None)
        self.in_place = main_gradient is not None
        dtype = weight.dtype if chunks == 1 else torch.float32
        self.total = (
            torch.zeros_like(weight, dtype=dtype, requires_grad=False)
            if main_gradient is None
            else main_gradient
        )
        self._used = self.total[:rows]

    def add(self, logits_gradient: Tensor, hidden: Tensor) -> None:
        """total += logits_gradient.T @ hidden."""
        if self.total.dtype == hidden.dtype:
            self._used.addmm_(logits_gradient.t(), hidden)
        elif hidden.is_cuda and self.total.dtype == torch.float32:
            # In the product itself, which reads and writes 8 bytes for each weight and chunk. A
            # product in bf16 that is added afterwards passes 12, and is rounded once more.
            torch.addmm(
                self._used,
                logits_gradient.t(),
                hidden,
                out_dtype=torch.float32,
                out=self._used,
            )
        else:
            self._used += torch.mm(logits_gradient.t(), hidden)

    def deliver(self) -> None:
        """Hand the gradient to autograd, which runs the hooks of data parallelism."""
        if self.in_place:
            with _gradient_is_in_main_grad(self.weight):
                self.weight.backward(torch.empty_like(self.weight))
        else:
            self.weight.backward(self.total.to(self.weight.dtype))


def deliver_nothing(weight: Parameter) -> None:
    """Hand autograd a gradient of zeros, so that the hooks of data parallelism run as they do with
    another one."""
    zeros = weight.new_zeros(()).expand_as(weight)
    in_place = getattr(weight, "main_grad", None) is not None
    with _gradient_is_in_main_grad(weight) if in_place else nullcontext():
        weight.backward(zeros)


@contextmanager
def _gradient_is_in_main_grad(weight: Tensor | Parameter) -> Iterator[None]:
    # The hooks add `weight.grad` to `weight.main_grad` unless these attributes say it is there
    # already. Other uses of a tied weight deliver theirs in the ordinary way, so the attributes
    # are put back.
    saved = {
        name: getattr(weight, name)
        for name in ("grad_added_to_main_grad", "zero_out_wgrad")
        if hasattr(weight, name)
    }
    weight.grad_added_to_main_grad = True  # type: ignore[union-attr]
    weight.zero_out_wgrad = False  # type: ignore[union-attr]
    try:
        yield
    finally:
        for name in ("grad_added_to_main_grad", "zero_out_wgrad"):
            if name in saved:
                setattr(weight, name, saved[name])
            else:
                delattr(weight, name)
