"""Fields of OpenAI's and vLLM's requests that are not supported here, and values that ask nothing.

A client may send any of them with a value that asks for nothing; every other value is refused with
a sentence that says what is missing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from megatron.early_exit.server.http.errors import ApiError


@dataclass(frozen=True, slots=True)
class Unsupported:
    """One field.

    Attributes:
        reason: completes the sentence "... is not supported here: ".
        off: the values that ask for nothing, besides null.
    """

    reason: str
    off: tuple[Any, ...] = ()

    def asks_nothing(self, value: object) -> bool:
        """Whether a value may be sent."""
        # In Python, true is 1 and false is 0.
        return value is None or any(type(value) is type(o) and value == o for o in self.off)

    def refusal(self, name: str, param: str) -> ApiError:
        """The answer to a value that asks for something."""
        message = f"{name} is not supported here: {self.reason}"
        return ApiError(400, message, param, "unsupported")


_TOOLS = "this server has no function calling"
_GRAMMARS = "this server does not bind texts to a grammar or a schema"
_AUDIO = "this server answers with text alone"
_BEAMS = "this server has no beam search"
_TEXTS = "texts are given as the tokenizer decodes them, without special tokens"
_PROMPTS = "longer prompts are refused, not cut"

_CONSTRAINTS = {
    name: Unsupported(_GRAMMARS)
    for name in (
        *("guided_json", "guided_regex", "guided_choice", "guided_grammar"),
        *("guided_decoding_backend", "guided_whitespace_pattern", "structured_outputs"),
    )
}
COMMON: Mapping[str, Unsupported] = {
    "store": Unsupported("this server keeps no answers", (False,)),
    "response_format": Unsupported(_GRAMMARS, ({}, {"type": "text"})),
    **_CONSTRAINTS,
    "use_beam_search": Unsupported(_BEAMS, (False,)),
    "length_penalty": Unsupported(_BEAMS, (1, 1.0)),
    "service_tier": Unsupported("this server has one tier", ("auto", "default")),
    "priority": Unsupported("requests take turns, whoever sends them", (0,)),
    "skip_special_tokens": Unsupported(_TEXTS, (True,)),
    "spaces_between_special_tokens": Unsupported(_TEXTS, (True,)),
    "include_stop_str_in_output": Unsupported("a text ends before its stop", (False,)),
    "truncate_prompt_tokens": Unsupported(_PROMPTS),
    "truncation_side": Unsupported(_PROMPTS),
    "allowed_token_ids": Unsupported("use logit_bias", ([],)),
    "bad_words": Unsupported("use logit_bias", ([],)),
    "logits_processors": Unsupported("clients cannot run code here", ([],)),
    "prompt_logprobs": Unsupported("use /v1/completions with echo and logprobs"),
    "return_tokens_as_token_ids": Unsupported("use return_token_ids", (False,)),
    "request_id": Unsupported("the server gives each answer its id"),
    "kv_transfer_params": Unsupported("caches do not leave this server", ({},)),
    "vllm_xargs": Unsupported("it is vLLM's own", ({},)),
}
COMPLETION: Mapping[str, Unsupported] = {
    **COMMON,
    "suffix": Unsupported("this server continues texts and fills no gaps", ("",)),
    "prompt_embeds": Unsupported("prompts are texts or token ids", ([],)),
}
CHAT: Mapping[str, Unsupported] = {
    **COMMON,
    "tools": Unsupported(_TOOLS, ([],)),
    "tool_choice": Unsupported(_TOOLS, ("none", "auto")),
    "parallel_tool_calls": Unsupported(_TOOLS, (False, True)),
    "functions": Unsupported(_TOOLS, ([],)),
    "function_call": Unsupported(_TOOLS, ("none", "auto")),
    "audio": Unsupported(_AUDIO),
    "modalities": Unsupported(_AUDIO, (["text"], [])),
    "prediction": Unsupported("use mode self_speculative: an exit predicts the text"),
    "web_search_options": Unsupported("this server searches nothing"),
    "moderation": Unsupported("this server does not moderate"),
    "reasoning_effort": Unsupported("this server does not set thoughts apart", ("none",)),
    "include_reasoning": Unsupported("this server does not set thoughts apart", (True, False)),
    "verbosity": Unsupported("say in a message how long the answer should be", ("medium",)),
    "best_of": Unsupported("use n", (1,)),
    "echo": Unsupported("use /v1/completions", (False,)),
    "add_generation_prompt": Unsupported("the last message is always answered", (True,)),
    "continue_final_message": Unsupported("the last message is always answered", (False,)),
    "add_special_tokens": Unsupported("the chat template places special tokens", (False,)),
    "chat_template": Unsupported("the tokenizer's own is used"),
    "chat_template_kwargs": Unsupported("the chat template gets messages alone", ({},)),
    "documents": Unsupported("write them into a message", ([],)),
    "mm_processor_kwargs": Unsupported("messages are texts", ({},)),
}
MESSAGE: Mapping[str, Unsupported] = {
    "tool_calls": Unsupported(_TOOLS, ([],)),
    "function_call": Unsupported(_TOOLS),
    "refusal": Unsupported("write it into content", ("",)),
    "audio": Unsupported(_AUDIO),
}
PARTS: Mapping[str, Unsupported] = {
    kind: Unsupported("messages are texts")
    for kind in ("image_url", "input_audio", "audio_url", "video_url", "file", "refusal")
}
"""Kinds of a message's parts."""


def drop_unsupported(
    body: dict[str, Any], table: Mapping[str, Unsupported], within: str | None
) -> dict[str, Any]:
    """An object without the fields that ask for nothing.

    Args:
        within: the field of the body that it is in; None where it is the body.

    Raises:
        ApiError: one of them asks for something.
    """
    for name, field in table.items():
        if name in body and not field.asks_nothing(body[name]):
            raise field.refusal(f"{within}: {name}" if within else name, within or name)
    return {name: value for name, value in body.items() if name not in table}


def schema_of(field: Unsupported) -> dict[str, Any]:
    """What the OpenAPI document says of a field."""
    return {"enum": [None, *field.off], "description": f"Not supported: {field.reason}."}
