"""Measures a model, one unit of work after another: a prompt, or a batch of them, under a rule."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle, islice, takewhile
from typing import Any

from megatron.early_exit.errors import FieldError
from megatron.early_exit.evaluation.catch_up import catch_up_seconds, waiting_tokens
from megatron.early_exit.evaluation.items import Item
from megatron.early_exit.evaluation.outside_baseline import LeftOut, OutsideBaseline, OutsideError
from megatron.early_exit.evaluation.records import Record
from megatron.early_exit.evaluation.rule import FULL, Rule, exits_name
from megatron.early_exit.evaluation.scoring import Judge, best_token, score
from megatron.early_exit.evaluation.settings import Settings
from megatron.early_exit.evaluation.text_scores import SCORES
from megatron.early_exit.evaluation.units import OUTSIDE_KINDS, Unit, units_of
from megatron.early_exit.inference import EarlyExitEngine, GenerationResult

_WARM_UP_TOKENS = 8

Logprobs = list[float]
"""Log-probabilities of the tokens of a text behind the first."""


class Measurement:
    """Measures prompts with one engine.

    Args:
        engine: of the model, which does not keep what earlier prompts have left in its caches.
        items: the prompts.
        settings: what is measured.
        outside: the same model in another program, in turns with which the full model is measured
            as well; None measures no other, and of one that is left out the records say why.
        needs_outside: a failure of the other program ends the measurement, which otherwise goes on
            without it.

    Raises:
        ValueError: the model has no exits or no tokenizer, or a prompt does not fit into its
            context.
        FieldError: the model does not have the exits of the settings.
    """

    def __init__(
        self,
        engine: EarlyExitEngine,
        items: Sequence[Item],
        settings: Settings,
        outside: OutsideBaseline | LeftOut | None = None,
        needs_outside: bool = False,
    ) -> None:
        if not engine.exit_layers:
            raise ValueError("the model has no exits, allowed: one that has")
        if engine.tokenizer is None:
            raise ValueError("the model has no tokenizer that inference supports")
        self.engine, self.items, self.settings = engine, items, settings
        self.outside, self._needs_outside = outside, needs_outside
        self._is_outside_warm = False
        self._encode: Callable[[str], list[int]] = engine.tokenizer.encode
        self._decode: Callable[[list[int]], str] = engine.tokenizer.decode
        self._judge = Judge(engine)
        self._rules = settings.rules()
        self._continued = [i for i, item in enumerate(items) if not item.choices]
        for exits in settings.exit_layers:
            if not set(exits or ()) <= set(engine.exit_layers):
                problem = f"{exits_name(exits)} has one that the model does not have"
                raise FieldError("exit_layers", problem, exits_name(engine.exit_layers))
        for number, item in enumerate(items):
            self._check(number, item)

    def units(self) -> list[Unit]:
        """All work, in its order: the full model's answer to a prompt comes before the others."""
        return units_of(self.items, self.settings, self.outside is not None)

    def warm_up(self) -> None:
        """Answer a prompt by every rule without measuring: first answers pay for allocations."""
        for rule in (FULL, *self._rules):
            prompts = [self.items[i].prompt for i in self._batch(0)] if self._continued else []
            params = rule.params(max_tokens=_WARM_UP_TOKENS, ignore_eos=True)
            if prompts:
                self.engine.generate(prompts[:1], params)
            if self.settings.batch_size is not None:
                self.engine.generate(prompts, params)

    def measure(self, unit: Unit, full: Mapping[int, Record]) -> Record:
        """The record of a unit.

        Args:
            unit: what is measured.
            full: the full model's records of the prompts that are continued, by their indices.

        Raises:
            FloatingPointError: logits are not finite: damaged weights, or an overflow.
            OutsideError: the outside baseline has failed, and is needed.
        """
        if unit.kind in OUTSIDE_KINDS.values():
            found = self._outside_record_or_reason(unit, full)
        elif unit.kind == "batch":
            found = self._batch_record(unit)
        elif unit.kind == "choice":
            item, rule = self.items[unit.index], unit.rule
            found = self._choice_record(item, lambda tokens: _logprobs(self.engine, tokens, rule))
        elif unit.kind == "untimed":
            item = self.items[unit.index]
            found = self._judged(item, self._answers([item.prompt], unit.rule)[0])
        elif unit.rule == FULL:
            found = self._full_record(self.items[unit.index])
        else:
            found = self._rule_record(unit, full[unit.index])
        return {**unit.fields(), **found}

    # --- answers ---------------------------------------------------------------------------------

    def _full_record(self, item: Item) -> Record:
        answer = self._answers([item.prompt], FULL)[0]
        text = [*answer.prompt_token_ids, *answer.token_ids]
        start = len(answer.prompt_token_ids) - 1
        choices = [best_token(one) for one in score(self.engine, text)[start:]]
        exits: dict[str, dict[str, Any]] = {}
        for measure in self.settings.measures:
            for layer in self.engine.exit_layers:
                alone = Rule(0.0, "exact", measure, (layer,))
                scores = score(self.engine, text, alone)[start:]
                exits.setdefault(measure, {})[str(layer)] = {
                    "confidences": [one.confidence for one in scores],
                    "agrees": [
                        best_token(one) == choice
                        for one, choice in zip(scores, choices, strict=True)
                    ],
                }
        return {
            "prompt_tokens": answer.prompt_token_ids,
            "choices": choices,
            "exits": exits,
            "exits_held_out": {
                str(layer): self._held_out(item, Rule(0.0, exit_layers=(layer,)))
                for layer in self.engine.exit_layers
            },
            **self._about_answer(item, answer, FULL),
        }

    def _rule_record(self, unit: Unit, full: Record) -> Record:
        item, rule = self.items[unit.index], unit.rule
        seconds: dict[Rule, list[float]] = {FULL: [], rule: []}
        for turn in range(self.settings.repeats):
            for one in self._turn(unit, turn):
                found = self._answers([item.prompt], one)[0]
                times = found.statistics
                # An exit that gives the first token leaves the prompt's deeper layers to later
                # ones, so what is behind the first token alone cannot be compared.
                seconds[one].append(times.prefill_seconds + times.decode_seconds)
                if one == rule:
                    answer = found
        waiting = self._waiting(answer, rule)
        text = [*full["prompt_tokens"], *full["tokens"]]
        forced = score(self.engine, text, rule)[len(full["prompt_tokens"]) - 1 :]
        return {
            "seconds": seconds[rule],
            "full_seconds": seconds[FULL],
            "waiting": len(waiting),
            "catch_up_seconds": self._catch_up([waiting]),
            "same": [a == b for a, b in zip(answer.token_ids, full["tokens"], strict=False)],
            "forced_agrees": [
                best_token(one) == choice
                for one, choice in zip(forced, full["choices"], strict=True)
            ],
            **self._about_answer(item, answer, rule),
        }

    def _turn(self, unit: Unit, turn: int) -> Sequence[Rule]:
        """The order of a pair of answers: each comes first in every other turn, so that neither
        always has what the other one leaves in the processor's caches."""
        pair = (FULL, unit.rule)
        return pair if (unit.index + turn) % 2 == 0 else pair[::-1]

    def _waiting(self, answer: GenerationResult, rule: Rule) -> list[int]:
        return waiting_tokens(
            answer.prompt_token_ids, answer.token_ids, answer.exit_layers, rule, self.engine
        )

    def _catch_up(self, waiting: Sequence[Sequence[int]]) -> list[float]:
        return [catch_up_seconds(self.engine, waiting) for _ in range(self.settings.repeats)]

    def _about_answer(self, item: Item, answer: GenerationResult, rule: Rule) -> Record:
        return {**self._judged(item, answer), "held_out": self._held_out(item, rule)}

    def _judged(self, item: Item, answer: GenerationResult) -> Record:
        judged = self._judge.of(answer.prompt_token_ids, answer.token_ids)
        assert answer.token_texts is not None
        end = self._end(answer)
        text = item.cut("".join(answer.token_texts[:end]))
        scores = {}
        if item.reference is not None:
            scores = {name: of(text, item.reference) for name, of in SCORES.items()}
        return {
            "tokens": answer.token_ids,
            # The token that ends the text is the model's choice, too.
            "counted": len(answer.token_ids) if end is None else end + 1,
            "token_texts": answer.token_texts,
            "exit_layers": answer.exit_layers,
            "confidences": answer.confidences,
            "agrees": [agrees for agrees, _ in judged],
            "logprobs": [logprob for _, logprob in judged],
            "text": text,
            "scores": scores,
        }

    def _answers(
        self, prompts: Sequence[str] | Sequence[Sequence[int]], rule: Rule
    ) -> list[GenerationResult]:
        params = rule.params(max_tokens=self.settings.max_tokens, ignore_eos=True)
        answers = self.engine.generate(prompts, params)
        for one in answers:
            if one.error is not None:
                raise FloatingPointError(one.error)
        return answers

    def _end(self, answer: GenerationResult) -> int | None:
        """The place of the token by which the model ends the text; None where it goes on."""
        ends = {self.engine.eod_id, *self.engine.other_end_ids}
        return next((i for i, one in enumerate(answer.token_ids) if one in ends), None)

    def _held_out(self, item: Item, rule: Rule) -> Record | None:
        """How well the rule's heads predict the prompt and its reference."""
        if item.reference is None:
            return None
        tokens = self._reference_tokens(item)
        return _total(_logprobs(self.engine, tokens, rule))

    def _reference_tokens(self, item: Item) -> list[int]:
        text = item.prompt + (item.reference or "")
        return self._encode(text)[: self.engine.max_sequence_length]

    # --- choices ---------------------------------------------------------------------------------

    def _choice_record(self, item: Item, logprobs_of: Callable[[list[int]], Logprobs]) -> Record:
        prompt = self._encode(item.prompt)
        texts = [self._encode(item.prompt + choice) for choice in item.choices]
        # Tokens of the prompt's end may be others where a choice follows. What is scored begins at
        # the same place for all choices, else the prompt's end would count for some alone.
        start = max(min(_common(prompt, tokens) for tokens in texts), 1)
        totals = [_total(logprobs_of(tokens)[start - 1 :]) for tokens in texts]
        logprobs = [one["logprob"] for one in totals]
        accuracy = accuracy_norm = None
        # Where an exit cannot answer with a choice, it has not chosen among them.
        if None not in logprobs:
            by_length = [a / len(choice) for a, choice in zip(logprobs, item.choices, strict=True)]
            accuracy = logprobs.index(max(logprobs)) == item.gold
            accuracy_norm = by_length.index(max(by_length)) == item.gold
        return {"choices": totals, "accuracy": accuracy, "accuracy_norm": accuracy_norm}

    # --- batches ---------------------------------------------------------------------------------

    def _batch(self, index: int) -> list[int]:
        """The prompts of a batch; the last one is filled with the first prompts."""
        size = self.settings.batch_size or 1
        return list(islice(cycle(self._continued), index * size, (index + 1) * size))

    def _batch_record(self, unit: Unit) -> Record:
        members = self._batch(unit.index)
        prompts = [self.items[i].prompt for i in members]
        seconds: dict[Rule, list[float]] = {FULL: [], unit.rule: []}
        waiting: list[list[int]] = []
        for turn in range(self.settings.repeats):
            for rule in self._turn(unit, turn):
                start = time.perf_counter()
                answers = self._answers(prompts, rule)
                seconds[rule].append(time.perf_counter() - start)
                if rule == unit.rule:
                    waiting = [self._waiting(one, rule) for one in answers]
        return {
            "members": members,
            "tokens": len(members) * self.settings.max_tokens,
            "seconds": seconds[unit.rule],
            "full_seconds": seconds[FULL],
            "waiting": sum(map(len, waiting)),
            "catch_up_seconds": self._catch_up(waiting),
        }

    # --- the outside baseline --------------------------------------------------------------------

    def _outside_record_or_reason(self, unit: Unit, full: Mapping[int, Record]) -> Record:
        """A record of the baseline; from where it has failed on, why there is none."""
        outside = self.outside
        if isinstance(outside, OutsideBaseline):
            try:
                self._warm_up_outside(outside)
                return self._outside_record(unit, full, outside)
            except OutsideError as error:
                if self._needs_outside:
                    raise
                reason = str(error)
            # Behind the handler: the error would keep what the baseline has computed.
            outside.release()
            outside = self.outside = LeftOut(reason)
        assert outside is not None
        return {"left_out": outside.reason}

    def _warm_up_outside(self, outside: OutsideBaseline) -> None:
        if self._continued and not self._is_outside_warm:
            texts = [self._encode(self.items[i].prompt) for i in self._batch(0)]
            outside.generate(texts[:1], _WARM_UP_TOKENS)
            if self.settings.batch_size is not None:
                outside.generate(texts, _WARM_UP_TOKENS)
        self._is_outside_warm = True

    def _outside_record(
        self, unit: Unit, full: Mapping[int, Record], outside: OutsideBaseline
    ) -> Record:
        """A record of the baseline, beside the engine's full model in turns."""

        def logprobs_of(tokens: Sequence[int]) -> Logprobs:
            return [one.logprob for one in outside.score(tokens)]

        if unit.kind == OUTSIDE_KINDS["choice"]:
            return self._choice_record(self.items[unit.index], logprobs_of)
        is_batch = unit.kind == OUTSIDE_KINDS["batch"]
        members = self._batch(unit.index) if is_batch else [unit.index]
        texts = [self._encode(self.items[i].prompt) for i in members]
        seconds: list[float] = []
        full_seconds: list[float] = []
        for turn in range(self.settings.repeats):
            for is_outside in (False, True) if (unit.index + turn) % 2 == 0 else (True, False):
                start = time.perf_counter()
                # Both are given tokens, and are done when there is text.
                if is_outside:
                    answers = outside.generate(texts, self.settings.max_tokens)
                    for one in answers:
                        self._decode(one)
                else:
                    self._answers(texts, FULL)
                own = seconds if is_outside else full_seconds
                own.append(time.perf_counter() - start)
        found = {"seconds": seconds, "full_seconds": full_seconds}
        if is_batch:
            return {
                "members": members,
                "tokens": len(members) * self.settings.max_tokens,
                "catch_up_seconds": [],
                **found,
            }
        beside, item = full[unit.index], self.items[unit.index]
        text = [*beside["prompt_tokens"], *beside["tokens"]]
        scores = outside.score(text)[len(beside["prompt_tokens"]) - 1 :]
        return {
            **found,
            "tokens": answers[0],
            "same": [a == b for a, b in zip(answers[0], beside["tokens"], strict=True)],
            "choices": [one.best for one in scores],
            "logprobs": [one.logprob for one in scores],
            "held_out": None
            if item.reference is None
            else _total(logprobs_of(self._reference_tokens(item))),
        }

    def _check(self, number: int, item: Item) -> None:
        room = 0 if item.choices else self.settings.max_tokens
        texts = [item.prompt + choice for choice in item.choices] or [item.prompt]
        length = max(len(self._encode(text)) for text in texts)
        longest = self.engine.max_sequence_length - room
        if length > longest:
            raise ValueError(
                f"prompt {number} (task {item.task}) has {length} tokens, allowed: up to "
                f"{longest}, which leaves room for --max-tokens {room}; --prompt-characters "
                "shortens prompts that are made"
            )


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """The number of tokens with which both begin, but for the last one of the second."""
    pairs = zip(first, second[:-1], strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


def _logprobs(engine: EarlyExitEngine, tokens: Sequence[int], rule: Rule) -> Logprobs:
    return [one.logprob for one in score(engine, tokens, rule) if one.logprob is not None]


def _total(logprobs: Logprobs) -> Record:
    """The log-probability of scored tokens together; None where one has a probability of 0, as it
    has at an exit that answers with some tokens only."""
    total = sum(logprobs)
    return {"logprob": total if math.isfinite(total) else None, "tokens": len(logprobs)}
