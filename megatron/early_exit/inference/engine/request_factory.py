"""From a prompt and its parameters to a request that an engine can run, or a refusal."""

from collections import abc
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import count

from megatron.early_exit.checkpoint.stored_rule import StoredRule
from megatron.early_exit.checkpoint.tokenizer import Tokenizer
from megatron.early_exit.errors import FieldError
from megatron.early_exit.inference.engine.request import Request
from megatron.early_exit.inference.engine.scoring import ScoringRule, TextScores
from megatron.early_exit.inference.engine.stopping import Stopping, stop_token_ids
from megatron.early_exit.inference.engine.stored_defaults import with_stored_rule
from megatron.early_exit.inference.engine.text import TextStream
from megatron.early_exit.inference.modes.draft_gain import DraftCosts
from megatron.early_exit.inference.modes.exit_gain import ExitCosts
from megatron.early_exit.inference.modes.measures import DEFAULT_MEASURE, needs_streams
from megatron.early_exit.inference.modes.mode import ModeContext, TokenSampler
from megatron.early_exit.inference.modes.sampling import Sampler
from megatron.early_exit.inference.modes.table import MODES
from megatron.early_exit.inference.params import SamplingParams
from megatron.early_exit.inference.sequence import Sequence


@dataclass(kw_only=True, eq=False)
class RequestFactory:
    """Checks what depends on the model.

    Attributes:
        vocab_size: tokens that the model knows.
        num_layers: of its backbone.
        exit_layers: its exits, each named by the number of backbone layers before it.
        max_sequence_length: most tokens of a sequence.
        max_pending: see `EarlyExitMode`.
        tokenizer: None where prompts are token ids only.
        eod_id: the token that ends a document, if there is one.
        other_end_ids: further tokens that end a text.
        draw_seed: gives seeds to requests that sample and have none.
        draft_costs: what drafting takes with each exit.
        exit_costs: what tokens take that may leave at exits.
        mtp_costs: what it takes with the multi-token-prediction module; None without one.
        num_depths: of that module.
        exit_measure: what confidence is where a request does not say it.
        has_gates: the exits have gates.
        stored_rule: how tokens leave where a request does not say it.
        has_blocks: the exits have layers of their own.
    """

    vocab_size: int
    num_layers: int
    exit_layers: tuple[int, ...]
    max_sequence_length: int
    max_pending: int
    tokenizer: Tokenizer | None
    eod_id: int | None
    other_end_ids: tuple[int, ...]
    draw_seed: Callable[[], int]
    draft_costs: tuple[DraftCosts, ...]
    exit_costs: ExitCosts
    mtp_costs: DraftCosts | None = None
    num_depths: int = 0
    exit_measure: str = DEFAULT_MEASURE
    has_gates: bool = False
    stored_rule: StoredRule | None = None
    has_blocks: bool = False
    _keys: Iterator[int] = field(default_factory=lambda: count(1), init=False)

    def build(
        self, prompt: str | abc.Sequence[int], params: SamplingParams, key: int | None = None
    ) -> Request:
        """Make a request, or refuse it.

        Args:
            prompt: a text or token ids.
            params: how to continue.
            key: names it in the engine; None gives it the next one.

        Raises:
            FieldError: the prompt is empty, too long or has unknown tokens, or `params` asks for
                what the model does not have.
        """
        params = with_stored_rule(params, self.stored_rule)
        if params.seed is None and params.temperature > 0:
            params = replace(params, seed=self.draw_seed())
        tokens = self.encode(prompt, room=min(params.max_tokens, 1))
        room = min(params.max_tokens, self.max_sequence_length - len(tokens))
        biased = (token for token, _ in params.logit_bias)
        for name, ids in (("stop_token_ids", params.stop_token_ids), ("logit_bias", biased)):
            for token in ids:
                if not self._knows(token):
                    raise FieldError(name, "is unknown", self._known, value=token)
        stops = stop_token_ids(params, self.eod_id, self.other_end_ids)
        sampler = Sampler(params, tokens, stops, self.vocab_size)
        key = next(self._keys) if key is None else key
        sequence = Sequence(key, tokens, group=key)
        layers = (*self.exit_layers, self.num_layers)
        token_sampler = TokenSampler(params, sampler, sequence, layers)
        text = None if self.tokenizer is None else TextStream(self.tokenizer, tokens)
        echo = ""
        if params.echo and self.tokenizer is not None:
            echo = prompt if isinstance(prompt, str) else self.tokenizer.decode(tokens)
        context = ModeContext(
            token_sampler,
            self.exit_layers,
            self.max_pending,
            room,
            self.draft_costs,
            self.exit_costs,
            self.mtp_costs,
            self.num_depths,
            self.exit_measure,
            self.has_gates,
            self.has_blocks,
        )
        assert params.mode is not None
        mode = MODES[params.mode].of(context)
        sequence.exits = mode.exits
        sequence.num_depths = mode.num_depths
        sequence.asks_gates = mode.rule.asks_gates
        if needs_streams(mode.rule.measure):
            heads = (*mode.rule.exits, len(self.exit_layers))
            sequence.kept = frozenset(head - 1 for head in heads if head > 0)
        sequence.propagates = params.kv_policy == "propagate"
        scoring = None
        if params.prompt_logprobs is not None:
            rule = ScoringRule(mode.scoring_rule, params.prompt_logprobs, sequence.propagates)
            scoring = TextScores(tokens, rule, layers)
        return Request(sequence, params, mode, Stopping(params, stops, room, text), echo, scoring)

    def encode(self, prompt: str | abc.Sequence[int], room: int = 0) -> list[int]:
        """The token ids of a prompt, checked.

        Args:
            room: tokens that must have room behind it.

        Raises:
            FieldError: the prompt is empty, too long, or has unknown tokens.
        """
        if not isinstance(prompt, str):
            tokens = list(_checked_iterable(prompt))
        elif self.tokenizer is None:
            problem = "a text needs a tokenizer that inference supports, and this model has none"
            raise FieldError("prompts", problem, "lists of token ids")
        else:
            tokens = self.tokenizer.encode(prompt)
        if not tokens:
            raise FieldError("prompts", "a prompt is empty", "1 token or more")
        longest = self.max_sequence_length - room
        if len(tokens) > longest:
            problem = f"a prompt of {len(tokens)} tokens is too long"
            raise FieldError("prompts", problem, f"up to {longest}")
        for token in tokens:
            if not self._knows(token):
                raise FieldError("prompts", f"token {token!r} is unknown", self._known)
        return tokens

    def _knows(self, token: object) -> bool:
        """Whether what a caller takes for a token is one of the model's."""
        is_integer = isinstance(token, int) and not isinstance(token, bool)
        return is_integer and token in range(self.vocab_size)

    @property
    def _known(self) -> str:
        return f"0 to {self.vocab_size - 1}"


def _checked_iterable(prompt: object) -> Iterable[int]:
    if not isinstance(prompt, Iterable):
        raise FieldError("prompts", f"{prompt!r} is not a prompt", "a text or a list of token ids")
    return prompt
