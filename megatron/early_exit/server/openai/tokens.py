"""Texts to tokens and back, under vLLM's names."""

from flask import Response
from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.models.tag import Tag
from pydantic import BaseModel, Field

from megatron.early_exit.checkpoint.tokenizer import Tokenizer
from megatron.early_exit.server.bodies.fields import Natural, RequestModel
from megatron.early_exit.server.http.errors import ERRORS, ApiError
from megatron.early_exit.server.service import Service, answer


class TokenizeRequest(RequestModel):
    """A text."""

    prompt: str
    model: str | None = None
    add_special_tokens: bool = Field(
        True, description="Frame the text as prompts are framed; false gives its own tokens alone."
    )


class TokenizeResponse(BaseModel):
    """The tokens of the text."""

    tokens: list[int]
    count: int
    max_model_len: int


class DetokenizeRequest(RequestModel):
    """Tokens."""

    tokens: list[Natural]
    model: str | None = None


class DetokenizeResponse(BaseModel):
    """Their text."""

    prompt: str


class TokenizerInfo(BaseModel):
    """What harnesses ask of a tokenizer."""

    eos_token: str | None
    bos_token: str | None
    pad_token: str | None
    eos_token_id: int | None
    chat_template: str | None
    vocab_size: int
    max_model_len: int


def tokens(service: Service) -> APIBlueprint:
    """The endpoints."""
    tags = [Tag(name="Tokens")]
    blueprint = APIBlueprint("tokens", __name__, abp_tags=tags, abp_responses=ERRORS)

    def tokenizer() -> Tokenizer:
        if service.tokenizer is None:
            raise ApiError(400, "the model knows no text: it has no tokenizer", code="no_tokenizer")
        return service.tokenizer

    @blueprint.post("/tokenize", responses={200: TokenizeResponse})
    def tokenize(body: TokenizeRequest) -> Response:
        """The tokens of a text."""
        service.model.settings(body.model)
        found = service.encode_text(body.prompt, "prompt", body.add_special_tokens)
        result = TokenizeResponse(
            tokens=found, count=len(found), max_model_len=service.max_model_len
        )
        return answer(result)

    @blueprint.post("/detokenize", responses={200: DetokenizeResponse})
    def detokenize(body: DetokenizeRequest) -> Response:
        """The text of tokens."""
        service.model.settings(body.model)
        unknown = next((one for one in body.tokens if one >= service.vocab_size), None)
        if unknown is not None:
            known = f"0 to {service.vocab_size - 1}"
            raise ApiError(400, f"tokens: token {unknown} is unknown, allowed: {known}", "tokens")
        return answer(DetokenizeResponse(prompt=tokenizer().decode(body.tokens)))

    @blueprint.get("/tokenizer_info", responses={200: TokenizerInfo})
    def tokenizer_info() -> Response:
        """The special tokens and the chat template."""
        one = tokenizer()
        result = TokenizerInfo(
            **one.special_tokens,
            eos_token_id=one.eod_id,
            chat_template=one.chat_template,
            vocab_size=service.vocab_size,
            max_model_len=service.max_model_len,
        )
        return answer(result)

    return blueprint
