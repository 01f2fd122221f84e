"""The bodies of `/api`: the protocol of Megatron's and EE-LLM's servers."""

from typing import Annotated

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field

from megatron.early_exit.ranges import Range
from megatron.early_exit.server.bodies.answer_models import Head
from megatron.early_exit.server.bodies.fields import (
    Natural,
    RequestModel,
    Share,
    Stops,
    not_supported,
)
from megatron.early_exit.server.bodies.ranges import InRange

_NO_BEAMS = "there is no beam search here, as in Megatron 0.19"


def _refuse(_: object) -> None:
    raise ValueError(_NO_BEAMS)


NoBeams = Annotated[None, BeforeValidator(_refuse), Field(description=f"Refused: {_NO_BEAMS}.")]


class GenerateRequest(RequestModel):
    """Megatron's request, with EE-LLM's fields."""

    prompts: Annotated[list[str], Field(min_length=1, max_length=128)]
    tokens_to_generate: Annotated[int, InRange(Range(least=0, most=2**31))] = 64
    logprobs: bool = False
    temperature: Annotated[float, InRange(Range(least=0, most=100, excludes_least=True))] = 1.0
    top_k: Annotated[int, InRange(Range(least=0, most=1000))] = Field(
        0, description="1 takes the most probable token, 0 is no limit."
    )
    top_p: Share = Field(0.0, description="0: no limit. Not together with top_k.")
    top_p_decay: Share = Field(0.0, description="0: none.")
    top_p_bound: Share = 0.0
    add_BOS: bool = False
    stop_on_eol: bool = Field(False, description="End before a line break.")
    stop_on_double_eol: bool = Field(False, description="End before an empty line.")
    stop_sequences: Stops = None
    random_seed: Natural | None = None
    echo_prompts: bool = Field(True, description="Put prompts in front of texts, as Megatron does.")
    use_early_exit: bool | None = Field(
        None,
        description="Take tokens from exits that are sure enough; false runs all layers. Default: "
        "the server's. Threshold and exits are of no interest where no token is taken from exits: "
        "EE-LLM's clients always send them.",
    )
    early_exit_thres: Share | None = Field(None, description="How sure: a probability.")
    exit_layers: list[Natural] | None = Field(
        None, description="The exits that are asked; none or an empty list is all of them."
    )
    print_max_prob: bool = Field(
        False, description="Tell what each head on the way to a token found best (`max_probs`)."
    )
    no_log: bool = Field(False, description="Keep the prompts out of the log in any case.")
    prevent_newline_after_colon: Annotated[bool, AfterValidator(not_supported)] = False
    beam_width: NoBeams = None
    length_penalty: NoBeams = None
    stop_token: NoBeams = None


class GenerateResponse(BaseModel):
    """One entry for each prompt in every list."""

    text: list[str]
    segments: list[list[str]] = Field(description="The texts, token by token.")
    tokens: list[list[int]]
    logprobs: list[list[float]] | None = Field(
        description="Of the tokens; where prompts are echoed of theirs, too, but for the first."
    )
    exit_layers: list[list[int]] = Field(description="Of each generated token.")
    confidences: list[list[float]] = Field(description="Of each generated token.")
    max_probs: list[list[list[Head]]] | None
    request_time: float = Field(description="Seconds.")
    requst_time: float = Field(
        description="EE-LLM's spelling of request_time.", json_schema_extra={"deprecated": True}
    )
