"""A model of EleutherAI's lm-evaluation-harness, over the engine in this process.

The harness's tasks are scored as they are answered: by the full model, or under a rule of early
exit, so that a log-likelihood is that of the head which the rule takes at each token. With
tensor or pipeline parallelism all processes start the harness, and rank 0 alone goes through its
tasks.
"""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, get_args

# The harness makes its own models known only where none is known yet.
import lm_eval.models  # noqa: F401
import torch
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import (
    get_rolling_token_windows,
    make_disjoint_window,
    simple_parse_args_string,
)
from tqdm import tqdm

from megatron.early_exit.config import ExitMeasure, KVPolicy
from megatron.early_exit.evaluation.rule import FULL, Rule
from megatron.early_exit.evaluation.scoring import best_token
from megatron.early_exit.hardware.dtypes import DTYPES
from megatron.early_exit.inference import EarlyExitEngine, GenerationResult, SamplingParams

NAME = "early_exit"
"""What the harness calls it (`--model`)."""

_RULE = {"early_exit_threshold": "threshold"} | {
    name: name for name in ("kv_policy", "exit_measure", "exit_layers")
}
"""Arguments that choose the rule, and its fields."""
_CHOICES = {"kv_policy": get_args(KVPolicy), "exit_measure": get_args(ExitMeasure)}
_ENGINE: dict[str, type] = {
    **dict.fromkeys(("dtype", "device", "weight_dtype"), str),
    **dict.fromkeys(("compile", "quantize_heads"), bool),
    **dict.fromkeys(("max_batch_size", "max_sequence_length", "kv_cache_memory"), int),
    **dict.fromkeys(("tensor_parallel", "pipeline_parallel"), int),
    "gpu_memory_utilization": float,
}
"""Arguments that the engine is loaded with, see `EarlyExitEngine.from_checkpoint`."""
_WORDS = {str: "a name", bool: "true or false", int: "a whole number", float: "a number"}
_UNSAID_DEVICE = "cuda:0"
"""What the harness passes where no device was asked for: the engine finds one by itself, and one
for each process."""
_IN_FLIGHT = 256
"""Requests that the engine has at a time: enough for its batches to be full."""
_MOST_TOKENS = 256
"""Of an answer, where a task does not say it."""

Encoded = tuple[tuple[str, str] | None, list[int], list[int]]
"""A context and its continuation, as texts (None is not to be cached) and as tokens."""


@register_model(NAME)
class EarlyExitLM(TemplateLM):
    """Answers the harness with an engine.

    Args:
        engine: of a model with a tokenizer; it makes its own batches.
        rule: which head scores and chooses tokens.

    Raises:
        ValueError: the model has no tokenizer, or no exits for a rule with a threshold.
    """

    def __init__(self, engine: EarlyExitEngine, rule: Rule = FULL) -> None:
        super().__init__()
        if engine.tokenizer is None:
            raise ValueError("the model has no tokenizer, which tasks of texts need")
        if rule.threshold is not None and not engine.exit_layers:
            raise ValueError(
                f"early_exit_threshold {rule.threshold}: the model has no exits, allowed: none"
            )
        self.engine, self.rule = engine, rule
        # Refuses what the model does not have before any task is read.
        self._scoring = rule.params(max_tokens=0, prompt_logprobs=1)
        self._tokenizer = engine.tokenizer

    @classmethod
    def create_from_arg_string(
        cls, arg_string: str, additional_config: dict[str, Any] | None = None
    ) -> "EarlyExitLM":
        """See `create_from_arg_obj`; `exit_layers` are divided by `+`."""
        arguments = simple_parse_args_string(arg_string)
        return cls.create_from_arg_obj(arguments, additional_config)

    @classmethod
    def create_from_arg_obj(
        cls, arg_dict: dict[str, Any], additional_config: dict[str, Any] | None = None
    ) -> "EarlyExitLM":
        """Load a model, as the harness's `--model_args` say.

        On other ranks than rank 0 this computes for it until it has finished, and ends the process.

        Args:
            arg_dict: `load`, the checkpoint; for early exit `early_exit_threshold`, `kv_policy`,
                `exit_measure`, `exit_layers`; and arguments of `EarlyExitEngine.from_checkpoint`.
            additional_config: the harness's own `device`, `batch_size` and `max_batch_size`; the
                latter bounds the engine's batches, which it makes itself.

        Raises:
            ValueError: an argument is unknown, out of its range, or the checkpoint cannot be used.
        """
        harness = {name: one for name, one in (additional_config or {}).items() if one is not None}
        harness.pop("batch_size", None)
        if harness.get("device") == _UNSAID_DEVICE:
            del harness["device"]
        arguments = harness | arg_dict
        known = ("load", *_RULE, *_ENGINE)
        if unknown := [name for name in arguments if name not in known]:
            raise ValueError(f"--model_args {unknown[0]}: unknown, allowed: {', '.join(known)}")
        if "load" not in arguments:
            raise ValueError("--model_args load: missing, allowed: a checkpoint's directory")
        kinds = {**_ENGINE, "early_exit_threshold": float}
        for name in kinds.keys() & arguments.keys():
            _check_kind(name, arguments[name], kinds[name])
        rule = _rule(arguments)
        options = {name: arguments[name] for name in _ENGINE if name in arguments}
        if "dtype" in options:
            options["dtype"] = _chosen("dtype", options["dtype"], DTYPES)
        engine = EarlyExitEngine.from_checkpoint(
            arguments["load"], has_driver=True, use_stored_rule=False, **options
        )
        if engine.is_worker:
            engine.work()
            sys.exit(0)
        return cls(engine, rule)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.engine.model.device

    @property
    def max_length(self) -> int:
        """Most tokens of a text."""
        return self.engine.max_sequence_length

    @property
    def eot_token_id(self) -> int:
        """The token that ends a document, in front of texts that have no context.

        Raises:
            ValueError: there is none.
        """
        if self.engine.eod_id is None:
            raise ValueError("the tokenizer has no token that ends a document")
        return self.engine.eod_id

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer where the harness keeps prompts."""
        return type(self._tokenizer).__name__

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """The tokens of a text, without any that the text itself does not have."""
        return list(self._tokenizer.encode(string))

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Log-likelihoods of whole texts, in windows of the model's context that do not overlap."""
        windows: list[Encoded] = []
        counts = []
        for (text,) in (one.args for one in requests):
            tokens = self.tok_encode(text)
            own = [
                make_disjoint_window(pair)
                for pair in get_rolling_token_windows(
                    tokens, self.prefix_token_id, self.max_length - 1, 1
                )
            ]
            windows += [(None, list(context), list(rest)) for context, rest in own]
            counts.append(len(own))
        scores = iter(self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm))
        found = [sum(next(scores)[0] for _ in range(count)) for count in counts]
        for one, value in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", one.args, value)
        return found

    def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
        """Answers, up to the texts that end them.

        Raises:
            ValueError: a task sets what the engine does not know.
        """
        asked = []
        for context, settings in (one.args for one in requests):
            params = self._generation(settings)
            room = self.max_length - params.max_tokens
            if room < 1:
                raise ValueError(
                    f"max_gen_toks {params.max_tokens} leaves no room for a prompt, allowed: less "
                    f"than the context of {self.max_length} tokens"
                )
            asked.append((self.tok_encode(context)[-room:] or [self.prefix_token_id], params))
        found = [one.text or "" for one in self._answers(asked, "answers", disable_tqdm)]
        for one, text in zip(requests, found, strict=True):
            self.cache_hook.add_partial("generate_until", one.args, text)
        return found

    def _loglikelihood_tokens(
        self, requests: Sequence[Encoded], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """For each continuation its log-likelihood, and whether its tokens are those that are found
        best."""
        asked = [
            ((context + rest)[-self.max_length :], self._scoring) for _, context, rest in requests
        ]
        found = []
        answers = self._answers(asked, "log-likelihoods", disable_tqdm)
        for (texts, _, rest), answer in zip(requests, answers, strict=True):
            assert answer.prompt_tokens is not None
            # Of the first token of all nobody says how likely it is.
            scores = [one for one in answer.prompt_tokens[-len(rest) :] if one.logprob is not None]
            result = (
                sum(one.logprob or 0.0 for one in scores),
                all(one.token_id == best_token(one) for one in scores),
            )
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, result)
            found.append(result)
        return found

    def _answers(
        self, asked: Iterable[tuple[list[int], SamplingParams]], unit: str, is_silent: bool
    ) -> Iterator[GenerationResult]:
        """Results in the order of the requests, of which the engine has some at a time.

        Raises:
            FloatingPointError: logits are not finite.
        """
        waiting = list(asked)
        with tqdm(total=len(waiting), unit=f" {unit}", disable=is_silent or None) as bar:
            for first in range(0, len(waiting), _IN_FLIGHT):
                prompts, params = zip(*waiting[first : first + _IN_FLIGHT], strict=True)
                for result in self.engine.generate(list(prompts), list(params)):
                    if result.error is not None:
                        raise FloatingPointError(result.error)
                    bar.update()
                    yield result

    def _generation(self, settings: Mapping[str, Any]) -> SamplingParams:
        given = dict(settings)
        until = given.pop("until", ())
        fields = {
            "stop": (until,) if isinstance(until, str) else tuple(until),
            "max_tokens": given.pop("max_gen_toks", _MOST_TOKENS),
            "temperature": given.pop("temperature", 0.0),
        }
        if not given.pop("do_sample", fields["temperature"] > 0):
            fields["temperature"] = 0.0
        for name in ("top_p", "top_k"):
            if name in given:
                fields[name] = given.pop(name)
        if given:
            name, value = next(iter(given.items()))
            raise ValueError(
                f"generation_kwargs {name} {value!r} is not supported, allowed: until, "
                "max_gen_toks, do_sample, temperature, top_p, top_k"
            )
        return self.rule.params(**fields)


def _rule(arguments: Mapping[str, Any]) -> Rule:
    given = {field: arguments[name] for name, field in _RULE.items() if name in arguments}
    if not given:
        return FULL
    if "threshold" not in given:
        name = next(name for name in _RULE if name in arguments)
        raise ValueError(f"--model_args {name} has no effect without early_exit_threshold")
    for name, allowed in _CHOICES.items():
        if name in given:
            _chosen(name, given[name], dict.fromkeys(allowed))
    if "exit_layers" in given:
        given["exit_layers"] = _layers(given["exit_layers"])
    return Rule(**given)


def _layers(value: Any) -> tuple[int, ...]:
    parts = str(value).split("+") if not isinstance(value, list | tuple) else value
    try:
        return tuple(int(part) for part in parts)
    except ValueError:
        raise ValueError(
            f"--model_args exit_layers {value!r}, allowed: numbers of layers, such as 4+8"
        ) from None


def _check_kind(name: str, value: Any, kind: type) -> None:
    fits = isinstance(value, int | float if kind is float else kind)
    if not fits or (isinstance(value, bool) and kind is not bool):
        raise ValueError(f"--model_args {name} {value!r}, allowed: {_WORDS[kind]}")


def _chosen(name: str, value: Any, allowed: Mapping[str, Any]) -> Any:
    if value not in allowed:
        raise ValueError(f"--model_args {name} {value!r}, allowed: {', '.join(allowed)}")
    return allowed[value]
