"""The expected losses of gates, and models in which they have something to learn."""

from __future__ import annotations

from typing import Any

import torch

from tests.helpers.exit_models import Microbatch, PlainExits


def with_varied_agreement(model: Any) -> Any:
    """Change a model's weights: exits sometimes agree with the final head, and gates are not
    undecided."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".gate." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 3)
            elif name.endswith(("linear_proj.weight", "linear_fc2.weight")):
                # Else all heads would repeat the token that comes in.
                parameter *= 12
    return model


class PlainGates(PlainExits):
    """The gates' losses as one ordinary graph, with all logits in memory."""

    def agreement(self, batch: Microbatch) -> dict[int, torch.Tensor]:
        """For each exit [s * b], whether its most probable token is the final head's; leaves the
        hidden states of a forward pass behind."""
        self.run_backbone(batch)
        tap, self.model.exit_tap = self.model.exit_tap, None
        tunes, self.model.tunes_exits = self.model.tunes_exits, False
        held = {} if batch.held is None else {"held": batch.held}
        final = self.model(batch.tokens, batch.positions, None, **held)
        final = final.transpose(0, 1).argmax(-1)
        self.model.exit_tap, self.model.tunes_exits = tap, tunes
        agrees = {}
        for position in self.exits.positions:
            logits = self._logits(position)[..., : self.exits.exit_vocab_size]
            agrees[position] = (logits.argmax(-1) == final).flatten()
        return agrees

    def confidence(self, position: int) -> torch.Tensor:
        gate, hidden = self.model.exits.heads[position].gate, self.hidden[position].detach()
        size = (hidden.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return torch.sigmoid(((hidden / size) * gate.weight[0]).sum(-1) + gate.bias).flatten()

    def gate_losses(self, batch: Microbatch) -> dict[int, torch.Tensor]:
        """For each exit its gate's loss, a sum over tokens."""
        mask = batch.mask_at(self.model.config.num_layers).t().flatten()
        found = {}
        for position, agrees in self.agreement(batch).items():
            confidence = self.confidence(position)
            losses = -torch.where(agrees, confidence, 1 - confidence).log()
            found[position] = (losses * mask).sum()
        return found
