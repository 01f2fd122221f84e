"""A look-ahead head on a frozen model gets the gradients of plain autograd; the rest gets none."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from megatron.early_exit import platform

platform.prepare()

from megatron.core.transformer.multi_token_prediction import (  # noqa: E402
    MTPLossAutoScaler,
    MTPLossLoggingHelper,
)

from megatron.early_exit.config import EarlyExitConfig  # noqa: E402
from megatron.early_exit.model.held_rows import HeldRows  # noqa: E402
from megatron.early_exit.training.loss.exit_loss import (  # noqa: E402
    ExitObjective,
    LossNormalization,
)
from megatron.early_exit.training.loss.look_ahead_loss import LookAheadOptions  # noqa: E402
from megatron.early_exit.training.tuning.objective import (  # noqa: E402
    DistillingObjective,
    LocalObjective,
)
from megatron.early_exit.training.tuning.options import TuningOptions  # noqa: E402
from tests.helpers.exit_models import (  # noqa: E402
    BATCH,
    LAYERS,
    SEQUENCE,
    Microbatch,
    PlainExits,
    build_model,
    gradients,
)
from tests.helpers.plain_loss import relative_error  # noqa: E402

BOUND, WEIGHT, SCALE = 1e-5, 0.3, 0.5
HEADS: dict[str, dict[str, Any]] = {
    "one": {"mtp_num_layers": 1},
    "repeated": {"mtp_num_layers": 3, "mtp_use_repeated_layer": True, "tied": False},
    "layers": {"mtp_num_layers": 2, "normalization": "LayerNorm", "add_bias_linear": True},
}


pytestmark = pytest.mark.usefixtures("process_groups")


@pytest.fixture(autouse=True)
def megatrons_log() -> None:
    """It is one for the process, as long as the first head is deep."""
    MTPLossLoggingHelper.tracker.clear()


@dataclass
class Depth:
    """What a depth should learn, by a loop over its rows in which nothing is shifted."""

    logits: Tensor
    labels: Tensor
    final: Tensor
    mask: Tensor

    def loss(self, share: float, temperature: float, size: int | None = None) -> Tensor:
        """Sum over the rows that count, `share` of it by the final head's distributions. Only the
        first `size` tokens are told apart: what others have is spread evenly over them."""
        own = self.logits[:, :size]
        label = _spread(functional.one_hot(self.labels, self.logits.shape[1]).float(), size)
        by_label = functional.cross_entropy(own, label, reduction="none")
        own = functional.log_softmax(own / temperature, dim=-1)
        teacher = _spread(functional.softmax(self.final / temperature, dim=-1), size)
        divergence = (teacher * (teacher.log() - own)).sum(dim=-1) * temperature**2
        return (((1 - share) * by_label + share * divergence) * self.mask).sum()

    @property
    def accuracy(self) -> Tensor:
        agrees = self.logits.argmax(dim=-1) == self.final.argmax(dim=-1)
        return (agrees * self.mask).sum() / self.mask.sum()


def _spread(probabilities: Tensor, size: int | None) -> Tensor:
    kept = probabilities[:, :size]
    return kept + (1 - kept.sum(dim=-1, keepdim=True)) / kept.shape[1]


class PlainHead:
    """The look-ahead head of a model by its definition, one row and one sequence at a time where
    rows meet tokens."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.embedding = model.embedding.word_embeddings.weight
        tied = model.share_embeddings_and_output_weights
        self.output = self.embedding if tied else model.output_layer.weight

    def run_backbone(self, batch: Microbatch) -> Tensor:
        """The hidden states behind the final norm, [s, b, h]."""
        hidden = self.model.embedding(batch.tokens, batch.positions)
        rope = self.model.rotary_pos_emb(SEQUENCE)
        for layer in self.model.decoder.layers:
            before = hidden
            hidden = layer(hidden_states=hidden, attention_mask=None, rotary_pos_emb=rope)[0]
            if batch.held is not None:
                held = batch.held.of_layer(layer.layer_number).t().unsqueeze(2)
                hidden = torch.where(held, before, hidden)
        normed: Tensor = self.model.decoder.final_layernorm(hidden)
        return normed

    def depths(self, batch: Microbatch, hidden: Tensor | None = None) -> list[Depth]:
        """What the depths are to learn of a frozen model, or of one that has computed `hidden`."""
        if hidden is None:
            hidden = self.run_backbone(batch)
        final = (hidden @ self.output.t()).transpose(0, 1)
        config, found = self.model.config, []
        for k in range(1, config.mtp_num_layers + 1):
            hidden = self._layer(0 if config.mtp_use_repeated_layer else k - 1, hidden, batch, k)
            rows = [(b, i) for b in range(len(batch.tokens)) for i in range(SEQUENCE - k)]
            found.append(
                Depth(
                    torch.stack([hidden[i, b] @ self.output.t() for b, i in rows]),
                    torch.stack([batch.labels[b, i + k] for b, i in rows]),
                    torch.stack([final[b, i + k] for b, i in rows]).detach(),
                    torch.stack([batch.mask[b, i + k] for b, i in rows]),
                )
            )
        return found

    def _layer(self, number: int, hidden: Tensor, batch: Microbatch, k: int) -> Tensor:
        layer = self.model.mtp.layers[number]
        # What a row beyond the last token sees reaches no row that counts.
        tokens = torch.stack([batch.tokens[:, min(i + k, SEQUENCE - 1)] for i in range(SEQUENCE)])
        both = [layer.enorm(self.embedding[tokens]), layer.hnorm(hidden)]
        joined = torch.cat(both, dim=-1) @ layer.eh_proj.weight.t()
        rope = self.model.rotary_pos_emb(SEQUENCE)
        inner = layer.mtp_model_layer(
            hidden_states=joined, attention_mask=None, rotary_pos_emb=rope
        )
        return layer.final_layernorm(inner[0])


def tuned_and_plain(exits: EarlyExitConfig, **backbone: Any) -> tuple[Any, Any]:
    """A frozen model in training mode, and another with the same weights."""
    tuned = build_model(exits, tunes_exits=True, **backbone)
    plain = build_model(exits, tunes_exits=True, **backbone)
    plain.load_state_dict(tuned.state_dict())
    return tuned.train(), plain


def options(model: Any) -> LookAheadOptions:
    return LookAheadOptions(depths=model.config.mtp_num_layers, weight=WEIGHT, chunk_tokens=5)


def run(model: Any, batch: Microbatch) -> Tensor:
    with torch.no_grad():
        return model(batch.tokens, batch.positions, None, labels=batch.labels, loss_mask=batch.mask)


def assert_same(found: dict[str, Any], expected: dict[str, Any], *prefixes: str) -> None:
    own = [name for name in expected if name.startswith(prefixes)]
    assert own
    assert all(expected[name].any() for name in own)
    errors = {name: relative_error(found[name], expected[name]) for name in own}
    assert max(errors.values()) < BOUND, errors
    assert not any(found[name].any() for name in found if name not in own)


@pytest.mark.parametrize("distilled", [None, (0.6, 2.5), (1.0, 1.0)], ids=str)
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("kind", HEADS)
def test_gradients_are_those_of_plain_autograd(kind, per_token, distilled):
    tuned, plain = tuned_and_plain(EarlyExitConfig(), **HEADS[kind])
    ahead, normalization = (
        options(tuned),
        LossNormalization(per_token=per_token, context_parallel_size=1),
    )
    objective: LocalObjective
    share, temperature = distilled or (0.0, 1.0)
    if distilled is None:
        objective = LocalObjective(EarlyExitConfig(), normalization, 5, ahead=ahead)
    else:
        tuning = TuningOptions(
            tune_exit=True,
            exit_distillation_weight=share,
            exit_distillation_temperature=temperature,
        )
        objective = DistillingObjective(tuning, EarlyExitConfig(), normalization, 5, ahead=ahead)
    tuned.look_ahead_tap = objective
    objective.set_loss_scale(torch.tensor([SCALE]))
    head = PlainHead(plain)
    for batch in (Microbatch(0), Microbatch(1)):
        objective.finish_forward(run(tuned, batch))
        objective.backpropagate_passed_exits()
        depths = head.depths(batch)
        total = sum(depth.loss(share, temperature) / depth.mask.sum() for depth in depths)
        if per_token:
            total = total * batch.mask.sum()
        (SCALE * WEIGHT / ahead.depths * total).backward()
    assert_same(gradients(tuned), gradients(plain), "mtp.")


@pytest.mark.parametrize("distilled", [(0.0, 1.0), (0.6, 2.5)], ids=str)
def test_a_short_vocabulary_is_all_that_is_learned(distilled):
    tuned, plain = tuned_and_plain(EarlyExitConfig(), **HEADS["repeated"])
    size, (share, temperature) = 40, distilled
    ahead = replace(options(tuned), vocab_size=size)
    normalization = LossNormalization(per_token=False, context_parallel_size=1)
    tuning = TuningOptions(
        tune_exit=True, exit_distillation_weight=share, exit_distillation_temperature=temperature
    )
    objective = DistillingObjective(tuning, EarlyExitConfig(), normalization, 5, ahead=ahead)
    tuned.look_ahead_tap = objective
    batch = Microbatch(0)
    assert (batch.labels >= size).any()
    objective.finish_forward(run(tuned, batch))
    objective.backpropagate_passed_exits()
    depths = PlainHead(plain).depths(batch)
    losses = [depth.loss(share, temperature, size) / depth.mask.sum() for depth in depths]
    (WEIGHT * sum(losses) / ahead.depths).backward()
    assert_same(gradients(tuned), gradients(plain), "mtp.")


def test_loss_and_accuracy_are_measured():
    """Accuracy is agreement with the final head's token at the row looked for."""
    tuned, plain = tuned_and_plain(EarlyExitConfig(), **HEADS["repeated"])
    for model in (tuned, plain):
        # Of three tokens one is always the most probable, so that heads agree by chance.
        model.output_layer.weight.data[:3] *= 50
    normalization = LossNormalization(per_token=False, context_parallel_size=1)
    objective = LocalObjective(EarlyExitConfig(), normalization, 5, ahead=options(tuned))
    tuned.look_ahead_tap = objective
    head, groups = PlainHead(plain), tuned.pg_collection
    batch = Microbatch(3)
    depths = head.depths(batch)
    for training in (True, False):
        run(tuned.train(training), batch)
        objective.backpropagate_passed_exits()
        means = objective.take_means(groups, torch.device("cpu"), training)
        assert list(means) == [
            f"mtp {k} {what}" for k in (1, 2, 3) for what in ("loss", "accuracy")
        ]
        for k, depth in enumerate(depths, start=1):
            loss = depth.loss(0.0, 1.0) / depth.mask.sum()
            assert means[f"mtp {k} loss"].item() == pytest.approx(loss.item(), rel=1e-5)
            assert means[f"mtp {k} accuracy"].item() == pytest.approx(depth.accuracy.item())
        assert any(gradient.any() for gradient in gradients(tuned).values()) == training
    assert all(0 < depth.accuracy < 1 for depth in depths)


def test_nothing_of_the_backbone_is_kept():
    """What the head gets has no graph, and the backbone's layers save nothing for a backward."""
    tuned, _ = tuned_and_plain(EarlyExitConfig(), **HEADS["one"])
    normalization = LossNormalization(per_token=False, context_parallel_size=1)
    objective = LocalObjective(EarlyExitConfig(), normalization, ahead=options(tuned))
    tuned.look_ahead_tap = objective
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
        run(tuned, Microbatch(0))
        assert not saved
        reached = objective._reached
        assert reached is not None
        assert reached.hidden.grad_fn is None
        objective.backpropagate_passed_exits()
    assert saved
    assert not reached.hidden.requires_grad
    trained = [name for name, one in tuned.named_parameters() if one.requires_grad]
    assert trained == ["tuning_anchor", *(n for n, _ in tuned.named_parameters() if "mtp." in n)]


@pytest.mark.parametrize("exit_vocab_size", [None, 40])
def test_exits_beside_it_learn_as_without_it(exit_vocab_size):
    config = EarlyExitConfig(
        exit_layer_nums=(2,),
        use_exit_norm=True,
        use_exit_gate=True,
        exit_vocab_size=exit_vocab_size,
    )
    tuned, plain = tuned_and_plain(config, **HEADS["one"])
    alone = build_model(config, tunes_exits=True).train()
    own = {name: one for name, one in tuned.state_dict().items() if not name.startswith("mtp.")}
    alone.load_state_dict(own)
    normalization = LossNormalization(per_token=False, context_parallel_size=1)
    tuning = TuningOptions(tune_exit=True, exit_distillation_weight=0.7)
    batch, found = Microbatch(0), []
    for model, ahead in ((tuned, options(tuned)), (alone, None)):
        objective = DistillingObjective(tuning, config, normalization, 5, ahead=ahead)
        model.exit_tap = model.look_ahead_tap = objective
        objective.finish_forward(run(model, batch))
        objective.backpropagate_passed_exits()
        found.append(gradients(model))
    with_head, without = found
    assert all(torch.equal(with_head[name], without[name]) for name in without)
    assert sum(without[name].any().item() for name in without) == 3
    (depth,) = PlainHead(plain).depths(batch)
    (WEIGHT * depth.loss(0.7, 1.0) / depth.mask.sum()).backward()
    of_head = {name: one for name, one in with_head.items() if not name.startswith("exits.")}
    assert_same(of_head, {n: g for n, g in gradients(plain).items() if n in of_head}, "mtp.")


def test_what_is_saved_are_the_heads():
    config = EarlyExitConfig(exit_layer_nums=(2,), use_exit_norm=True)
    tuned, _ = tuned_and_plain(config, **HEADS["repeated"])
    keys = {entry.key for entry in tuned.sharded_state_dict().values()}
    assert keys >= {"tuning_anchor", "exits.2.norm.weight", "mtp.layers.0.eh_proj.weight"}
    assert "mtp.layers.0.transformer_layer.mlp.linear_fc1.layer_norm_weight" in keys
    assert all(key.startswith(("exits.2.", "mtp.layers.0.", "tuning_anchor")) for key in keys)


# --- trained with the model ---------------------------------------------------------------------

FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


@pytest.mark.parametrize("recompute", [{}, FULL], ids=["", "recompute"])
@pytest.mark.parametrize("detached", [False, True], ids=["", "detached"])
@pytest.mark.parametrize("kind", HEADS)
def test_exits_and_head_train_together(kind, detached, recompute):
    """The model's, the exits' and the head's gradients are those of the sum of all losses."""
    config = EarlyExitConfig(
        exit_layer_nums=(1, 3), exit_layer_weight=(0.3, 1.5), use_exit_norm=True
    )
    fields = {**HEADS[kind], "mtp_loss_scaling_factor": WEIGHT, "mtp_detach_heads": detached}
    model = build_model(config, **fields, **recompute)
    plain = build_model(config, **fields)
    plain.load_state_dict(model.state_dict())
    normalization = LossNormalization(per_token=False, context_parallel_size=1)
    model.exit_tap = ExitObjective(config, normalization, 5)
    MTPLossAutoScaler.set_loss_scale(torch.ones(()))
    batch = Microbatch(0)
    (batch.final_loss(model) / batch.tokens_that_count).backward()

    head, of_exits = PlainHead(plain), PlainExits(plain, config)
    hooks = [of_exits._collect(position) for position in config.positions]
    hidden = head.run_backbone(batch)
    for hook in hooks:
        hook.remove()
    logits = (hidden @ head.output.t()).transpose(0, 1).flatten(0, 1)
    losses = functional.cross_entropy(logits, batch.labels.flatten(), reduction="none")
    total = (losses * batch.mask.flatten()).sum()
    total = total + sum(of_exits.exit_loss(position, batch) for position in config.positions)
    (total / batch.tokens_that_count).backward(retain_graph=not detached)
    if detached:
        head.embedding, head.output = head.embedding.detach(), head.output.detach()
        hidden = hidden.detach()
    depths = head.depths(batch, hidden)
    ahead = sum(depth.loss(0.0, 1.0) / depth.mask.sum() for depth in depths)
    (WEIGHT / len(depths) * ahead).backward()
    assert_same(gradients(model), gradients(plain), "")


def test_it_stands_on_layers_that_sequences_skip():
    fields = {**HEADS["one"], "mtp_loss_scaling_factor": WEIGHT}
    model = build_model(EarlyExitConfig(), holds_rows=True, **fields)
    plain = build_model(EarlyExitConfig(), **fields)
    plain.load_state_dict(model.state_dict())
    skipped = torch.tensor([[False, True, False, True], [False, False, True, True]])
    held = HeldRows(torch.full((BATCH, SEQUENCE), LAYERS), skipped)
    batch = Microbatch(0, held)
    MTPLossAutoScaler.set_loss_scale(torch.ones(()))
    (batch.final_loss(model) / batch.tokens_that_count).backward()
    head = PlainHead(plain)
    hidden = head.run_backbone(batch)
    logits = (hidden @ head.output.t()).transpose(0, 1).flatten(0, 1)
    losses = functional.cross_entropy(logits, batch.labels.flatten(), reduction="none")
    (depth,) = head.depths(batch, hidden)
    ahead = WEIGHT * depth.loss(0.0, 1.0) / depth.mask.sum()
    ((losses * batch.mask.flatten()).sum() / batch.tokens_that_count + ahead).backward()
    expected = gradients(plain)
    # No sequence runs the last layer.
    trained = [name for name in expected if not name.startswith("decoder.layers.3.")]
    assert_same(gradients(model), expected, *trained)


def test_gates_beside_it_learn_of_the_final_head():
    """And not of what is projected before that."""
    config = EarlyExitConfig(exit_layer_nums=(2,), use_exit_norm=True, use_exit_gate=True)
    model = build_model(config, **HEADS["repeated"])
    normalization = LossNormalization(per_token=False, context_parallel_size=1)
    model.exit_tap = objective = ExitObjective(config, normalization, 5)
    kept, keep = [], objective.keep_final_tokens
    objective.keep_final_tokens = lambda exits, logits, tokens: (  # type: ignore[method-assign]
        keep(exits, logits, tokens),
        kept.append(tokens.clone()),
    )
    head = PlainHead(model)
    for seed, training in ((0, True), (1, False), (2, True)):
        batch = Microbatch(seed)
        batch.final_loss(model.train(training))
        logits = (head.run_backbone(batch) @ head.output.t()).transpose(0, 1)
        assert torch.equal(kept.pop(), logits.argmax(dim=-1))
        assert not kept
