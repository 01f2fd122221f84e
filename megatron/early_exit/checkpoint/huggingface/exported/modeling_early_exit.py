"""A decoder of the Llama family with exits: a token may be chosen before the last layer.

The rule: the next token is the choice of the first exit whose confidence, its largest softmax
probability at the last position, reaches the threshold; else that of the last layer. Keys and
values of earlier positions are those of all layers: where a token left early, the deeper layers
catch up when a later token gets there.

Shapes: b batch, s positions, h hidden size, v vocabulary.
"""

import math
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .cache_early_exit import CACHE_NAME, EarlyExitCache, one_cache
from .configuration_early_exit import EarlyExitConfig
from .layers_early_exit import Exit, Layer, Place, RMSNorm, find_place


class Backbone(nn.Module):
    """Embedding, layers and final norm."""

    def __init__(self, config: EarlyExitConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class EarlyExitForCausalLM(PreTrainedModel, GenerationMixin):
    """The model; `generate` takes `early_exit_threshold` and `exit_layers`."""

    config: EarlyExitConfig
    config_class = EarlyExitConfig
    base_model_prefix = "model"
    _no_split_modules: ClassVar[list[str]] = ["Layer"]
    _supports_sdpa = True

    def __init__(self, config: EarlyExitConfig) -> None:
        super().__init__(config)
        self.model = Backbone(config)
        self.lm_head = None
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.exits = nn.ModuleDict(
            {
                str(layer): Exit(config, config.num_hidden_layers + index)
                for index, layer in enumerate(config.exit_layers)
            }
        )
        behind = -1 if config.use_exit_mlp else 0
        ends = [2 * layer + behind for layer in config.exit_layers]
        # Where the segments begin and end, in half layers.
        self._cuts = [0, *ends, 2 * config.num_hidden_layers]
        self.post_init()

    @torch.no_grad()
    def generate(
        self,
        *args: Any,
        early_exit_threshold: float | None = None,
        exit_layers: Iterable[int] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Continue prompts, see `GenerationMixin.generate`.

        Args:
            args, kwargs: of `GenerationMixin.generate`. With `return_dict_in_generate` the result's
                `past_key_values` tells in `exit_layers` where each token was chosen.
            early_exit_threshold: least confidence to leave at an exit, 0 to 1; None is that of the
                configuration, and runs all layers where that is None too. One sequence at a time.
            exit_layers: the exits that may be left at, by their layers; None is all.

        Raises:
            ValueError: a value is out of range, or early exit does not go with what else is asked.
        """
        threshold = early_exit_threshold
        if threshold is None:
            threshold = self.config.early_exit_threshold
        if threshold is None:
            if exit_layers is not None:
                raise ValueError("exit_layers has no effect without early_exit_threshold")
            return super().generate(*args, **kwargs)
        if not 0 <= threshold <= 1:
            raise ValueError(f"early_exit_threshold {threshold} is out of range, allowed: 0 to 1")
        enabled = None if exit_layers is None else tuple(exit_layers)
        unknown = set(enabled or ()) - set(self.config.exit_layers)
        if unknown:
            raise ValueError(
                f"exit_layers {min(unknown)} is no exit, allowed: {self.config.exit_layers}"
            )
        if one_cache(kwargs.pop("cache", None), kwargs.pop("past_key_values", None)) is not None:
            raise ValueError(f"early_exit_threshold with {CACHE_NAME}: allowed is one of the two")
        kwargs[CACHE_NAME] = EarlyExitCache(threshold, enabled)
        return super().generate(*args, **kwargs)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
        cache: DynamicCache | None = None,
        **others: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits of the last layer; with an `EarlyExitCache`, of the head that the rule chooses.

        Args:
            input_ids: [b, s].
            attention_mask: [b, all positions], 0 where there is padding; None is none.
            position_ids: [b, s]; by default they go on from those in the cache.
            past_key_values: keys and values of earlier positions, as transformers before 5.24 calls
                them.
            inputs_embeds: [b, s, h], instead of `input_ids`.
            labels: [b, s], tokens to compare each next one with, -100 where there is none.
            use_cache: give back keys and values.
            logits_to_keep: give logits for this many last positions; 0 is all.
            return_dict: False gives a tuple.
            cache: the same as `past_key_values`, as transformers calls them since 5.24.
            others: what other models know; none may ask for anything.

        Returns:
            Logits [b, s, v], or [1, 1, v] with an `EarlyExitCache`; the loss, if there are labels.

        Raises:
            ValueError: early exit of several sequences, or of padded ones, or other arguments.
        """
        # transformers 5.0 gives `cache_position`, and the cache says the same.
        others.pop("cache_position", None)
        for name, value in others.items():
            if value is not None and value is not False:
                raise ValueError(f"{name} {value!r} is not supported by this model")
        hidden = self.model.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        cache = one_cache(cache, past_key_values)
        if isinstance(cache, EarlyExitCache):
            if labels is not None:
                raise ValueError("early exit gives no loss: labels are for the whole model")
            if attention_mask is not None and not attention_mask.all():
                raise ValueError("early exit continues sequences without padding only")
            if len(hidden) > 1:
                raise ValueError(
                    f"early exit continues one sequence at a time, {len(hidden)} are given"
                )
            logits = self._choose(hidden, cache)
        else:
            if cache is None and use_cache:
                cache = DynamicCache()
            seen = 0 if cache is None else cache.get_seq_length()
            place = find_place(self.config, hidden, seen, position_ids, attention_mask)
            hidden = self._run(hidden, 0, len(self._cuts) - 1, place, cache)
            logits = self._final(hidden[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            loss = functional.cross_entropy(
                logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten()
            )
        result = CausalLMOutputWithPast(loss=loss, logits=logits, **{CACHE_NAME: cache})
        return result.to_tuple() if return_dict is False else result

    def _choose(self, hidden: Tensor, cache: EarlyExitCache) -> Tensor:
        """Logits [1, 1, v] of the head that chooses the token behind [1, s, h]."""
        total = cache.get_seq_length() + hidden.shape[1]
        shared = self.model.embed_tokens.weight
        layers = [*self.config.exit_layers, self.config.num_hidden_layers]
        for segment, layer in enumerate(layers):
            hidden = cache.take(segment, hidden)
            place = find_place(self.config, hidden, total - hidden.shape[1])
            hidden = self._run(hidden, segment, segment + 1, place, cache)
            is_last = segment == len(layers) - 1
            if is_last:
                logits = self._final(hidden[:, -1:])
            elif cache.enabled is None or layer in cache.enabled:
                logits = self.exits[str(layer)](hidden, place, cache, shared)
            else:
                continue
            confidence = math.exp(float(logits.float().log_softmax(-1).max()))
            if is_last or confidence >= cache.threshold:
                break
        if not is_last:
            cache.put(segment + 1, hidden)
        cache.exit_layers.append(layer)
        cache.confidences.append(confidence)
        return logits

    def _run(
        self, hidden: Tensor, start: int, end: int, place: Place, cache: DynamicCache | None
    ) -> Tensor:
        """Segments `start` to `end`, [b, s, h] -> [b, s, h]."""
        for half in range(self._cuts[start], self._cuts[end]):
            layer = self.model.layers[half // 2]
            hidden = layer.feed(hidden) if half % 2 else layer.attend(hidden, place, cache)
        return hidden

    def _final(self, hidden: Tensor) -> Tensor:
        head = self.model.embed_tokens if self.lm_head is None else self.lm_head
        return functional.linear(self.model.norm(hidden), head.weight)
