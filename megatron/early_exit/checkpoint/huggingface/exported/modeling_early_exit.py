"""A decoder of the Llama family with exits: a token may be chosen before the last layer.

The rule: the next token is the choice of the first exit whose confidence, its largest softmax
probability at the last position, reaches the threshold; else that of the last layer. Keys and
values of earlier positions are those of all layers: if a token left early, the deeper layers
    process it as soon as a later token gets there.

Shapes: b batch, s positions, h hidden size, v vocabulary.
"""

import functools
import inspect
import math
import numbers
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


# What an exit's confidence is: its largest probability.
MEASURE = "max_probability"
# What `generate` may be told with `early_exit_threshold`, where not everything goes with it.
ALLOWED_WITH_THRESHOLD: dict[str, tuple[Any, ...]] = {
    # Which layers have the keys and values of which token is in a cache of early exit's own.
    "use_cache": (None, True),
    "cache_implementation": (None,),
    "prefill_chunk_size": (None,),
    # It continues one sequence.
    "num_beams": (None, 1),
    "num_return_sequences": (None, 1),
    # It cannot take tokens back, since some layers do not have them yet.
    "assistant_model": (None,),
    "prompt_lookup_num_tokens": (None,),
    # It would run all layers for the text to be guided away from.
    "guidance_scale": (None, 1),
}
# And what always.
ALLOWED: dict[str, tuple[Any, ...]] = {
    # Drafts of the first layers: the exits are not asked for them.
    "assistant_early_exit": (None,),
    # Attention reads keys and values in the order of their positions, with no room behind them;
    # transformers itself asks for "dynamic_full" where another model drafts.
    "cache_implementation": (None, "dynamic", "dynamic_full"),
}


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
        given = inspect.signature(super().generate).bind_partial(*args, **kwargs).arguments
        self._check_options({**given, **given.pop("kwargs", {})}, ALLOWED, "this model")
        if threshold is None:
            if exit_layers is not None:
                raise ValueError("exit_layers has no effect without early_exit_threshold")
            return super().generate(*args, **kwargs)
        if isinstance(threshold, bool) or not isinstance(threshold, numbers.Real):
            raise ValueError(f"early_exit_threshold {threshold!r} is not a number, allowed: 0 to 1")
        if not 0 <= threshold <= 1:
            raise ValueError(f"early_exit_threshold {threshold} is out of range, allowed: 0 to 1")
        if self.config.exit_measure != MEASURE:
            raise ValueError(
                f"early_exit_threshold with exit_measure {self.config.exit_measure!r} of the "
                f"configuration is not supported, allowed: {MEASURE!r}"
            )
        enabled = self._known_exits(exit_layers)
        self._check_options({**given, **kwargs}, ALLOWED_WITH_THRESHOLD, "early_exit_threshold")
        if one_cache(kwargs.pop("cache", None), kwargs.pop("past_key_values", None)) is not None:
            raise ValueError(f"early_exit_threshold with {CACHE_NAME}: allowed is one of the two")
        kwargs[CACHE_NAME] = EarlyExitCache(threshold, enabled)
        return super().generate(*args, **kwargs)

    def _known_exits(self, exit_layers: Iterable[int] | None) -> tuple[int, ...] | None:
        """The exits that are asked for.

        Raises:
            ValueError: there is no such exit.
        """
        if exit_layers is None:
            return None
        known = self.config.exit_layers
        if isinstance(exit_layers, str) or not isinstance(exit_layers, Iterable):
            raise ValueError(f"exit_layers {exit_layers!r} is not a list, allowed: some of {known}")
        enabled = tuple(exit_layers)
        for layer in enabled:
            if layer not in known:
                raise ValueError(f"exit_layers {layer!r} is not an exit, allowed: {known}")
        return enabled

    def _check_options(
        self, given: dict[str, Any], allowed: dict[str, tuple[Any, ...]], by: str
    ) -> None:
        """Refuse what does not work, wherever `generate` would take it from.

        Args:
            given: what `generate` was called with, by name.
            allowed: the values of some names.
            by: what would not support others.

        Raises:
            ValueError: another value is asked for.
        """
        configs = (given.get("generation_config"), self.generation_config)
        for name, values in allowed.items():
            asked = [given.get(name), *(getattr(config, name, None) for config in configs)]
            value = next((value for value in asked if value is not None), None)
            if not any(value is one or (value == one and one is not None) for one in values):
                shown = type(value).__name__ if isinstance(value, nn.Module) else repr(value)
                among = ", ".join(map(repr, values))
                raise ValueError(f"{name} {shown} is not supported by {by}, allowed: {among}")

    @functools.wraps(GenerationMixin.prepare_inputs_for_generation)
    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The arguments of `generate` that are passed on to `forward`.

        transformers also passes some that only `generate` uses, such as the tokenizer that stop
        strings need, and these differ between releases. So arguments that `forward` does not name
        are dropped, except those that ask for a result.
        """
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        names = inspect.signature(type(self).forward).parameters
        return {
            name: value
            for name, value in inputs.items()
            if name in names or name.startswith("output_")
        }

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
        if cache is not None and not isinstance(cache, DynamicCache):
            raise ValueError(
                f"{CACHE_NAME} {type(cache).__name__} is not supported by this model, "
                "allowed: DynamicCache"
            )
        if attention_mask is not None and attention_mask.dim() != 2:
            raise ValueError(
                f"attention_mask of {attention_mask.dim()} dimensions is not supported by this "
                "model, allowed: 2"
            )
        if isinstance(cache, EarlyExitCache) and use_cache is False:
            raise ValueError("use_cache False is not supported by early exit, allowed: True")
        if isinstance(cache, EarlyExitCache):
            if labels is not None:
                raise ValueError("early exit computes no loss: labels need the whole model")
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
        named: dict[str, Any] = {CACHE_NAME: cache}
        result = CausalLMOutputWithPast(loss=loss, logits=logits, **named)
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
