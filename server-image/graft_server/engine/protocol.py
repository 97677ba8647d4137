"""The requests of clients and the error answers: OpenAI's shapes with vLLM's errors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from http import HTTPStatus
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from graft.bounded import Limits, OutOfBounds, check_json
from graft.toolcalls import tool_for_template
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

MAX_CHOICES = 16  # answers to one prompt
MAX_PROMPTS = 64  # prompts in one request
MAX_LOGPROBS = 20  # alternatives reported beside a token
MAX_STOPS = 64  # stop strings: the engine's thread searches for each of them after every token
MAX_STOP_CHARACTERS = 1024
MAX_CHAT_MESSAGES = 4096  # the chat template is a program that runs over them
MAX_TEMPLATE_ARGUMENTS, MAX_ARGUMENT_CHARACTERS = 16, 1024
BODY_DEPTH = 32  # of nested objects and arrays
MAX_BIASES = 1024  # tokens in logit_bias
MAX_TOOLS, MAX_TOOL_NAME = 128, 256  # the number of tools; characters of a name
MAX_TEMPERATURE = 100  # beyond it, and outside PENALTIES, logits leave the range of floats
PENALTIES = (0.01, 100)

MAX_MESSAGES = 20  # faults of one request that the answer lists
ALTERNATIVE = re.compile(r"str|constrained-str|list\[.*\]|\[key\]")  # pydantic's names for the types of a union

Text = Annotated[str, StringConstraints(min_length=1)]
StopText = Annotated[str, StringConstraints(min_length=1, max_length=MAX_STOP_CHARACTERS)]
# A list with 200,000 wrong entries has one fault, not as many: each fault is an object.
Ids = Annotated[list[int], Field(fail_fast=True)]
M = TypeVar("M", bound=BaseModel)

# Fields of the API that change the answer and that this engine does not support, with the values that have no effect.
# Any other value is refused: to ignore it would silently give a wrong answer. OpenAI's API and vLLM's no longer have
# best_of.
UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "add_generation_prompt": (None, True),
    "allowed_token_ids": (None,),
    "audio": (None,),
    "bad_words": (None, []),
    "best_of": (None, 1),
    "chat_template": (None,),
    "continue_final_message": (None, False),
    "documents": (None, []),
    "function_call": (None, "none"),
    "functions": (None, []),
    "guided_choice": (None,),
    "guided_grammar": (None,),
    "guided_json": (None,),
    "guided_regex": (None,),
    "include_stop_str_in_output": (None, False),
    "logits_processors": (None, []),
    "modalities": (None, ["text"]),
    "prompt_embeds": (None,),
    "prompt_logprobs": (None,),
    "response_format": (None, {"type": "text"}),
    "return_token_ids": (None, False),
    "skip_special_tokens": (None, True),
    "structured_outputs": (None,),
    "suffix": (None, ""),
    "truncate_prompt_tokens": (None,),
    "use_beam_search": (None, False),
}


class ApiError(Exception):
    """An error answer (any status but 200), in vLLM's nested form."""

    def __init__(self, status: int, type: str, message: str, param: str | None = None, retry_after: int | None = None):
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after
        self.body = {"error": {"message": message, "type": type, "param": param, "code": status}}


def bad_request(message: str, param: str | None = None) -> ApiError:
    """Return the 400 for a well-formed request that cannot be served."""
    return ApiError(HTTPStatus.BAD_REQUEST, "BadRequestError", message, param)


def unknown_model(name: str) -> ApiError:
    """Return the 404: no base model and no adapter has this name."""
    return ApiError(HTTPStatus.NOT_FOUND, "NotFoundError", f"The model `{name}` does not exist.", "model")


def unavailable(message: str) -> ApiError:
    """Return the 503: the server cannot take this request now. Another server, or a later retry, may succeed."""
    return ApiError(HTTPStatus.SERVICE_UNAVAILABLE, "ServiceUnavailableError", message, retry_after=1)


class LoadLoraRequest(BaseModel):
    """POST /v1/load_lora_adapter."""

    lora_name: str
    lora_path: str
    load_inplace: bool = False


class UnloadLoraRequest(BaseModel):
    """POST /v1/unload_lora_adapter."""

    lora_name: str


class StreamOptions(BaseModel):
    """The options of a stream, as in vLLM. `include_usage` requests a last chunk with the token counts, and
    `continuous_usage_stats` the counts until now in each chunk before it."""

    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False


class GenerationRequest(BaseModel):
    """The fields of both kinds of request. Unknown fields are ignored, as in vLLM. Unsupported fields are refused."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)
    unsupported: ClassVar[Mapping[str, tuple[Any, ...]]] = UNSUPPORTED

    model: str | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=MAX_TEMPERATURE)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, ge=PENALTIES[0], le=PENALTIES[1])
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: dict[int, Annotated[float, Field(ge=-100, le=100)]] | None = None
    min_tokens: int | None = Field(default=None, ge=0)
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1)
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    stop_token_ids: Ids | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False
    return_tokens_as_token_ids: bool | None = None  # in log-probabilities, a token is token_id:<id> instead of its text

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, data: Any) -> Any:
        if isinstance(data, dict):
            bias = data.get("logit_bias")
            if isinstance(bias, dict) and len(bias) > MAX_BIASES:
                raise bad_request(f"logit_bias: at most {MAX_BIASES} tokens are allowed", "logit_bias")
            for name, neutral in cls.unsupported.items():
                # `in` compares with ==, for which 0 is False and 1 is True. So the types are compared too.
                value = data.get(name)
                if not any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in neutral):
                    raise bad_request(f"{name}: this engine does not support it", name)
        return data

    @property
    def stop_strings(self) -> list[str]:
        """Return the stop strings as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def include_usage(self) -> bool:
        """Return whether a stream ends with the token counts."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def continuous_usage(self) -> bool:
        """Return whether each chunk of a stream has the token counts until now."""
        return self.include_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)


class TextPart(BaseModel):
    """A part of a message. Only text is supported."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One message of a conversation. Further fields are passed to the chat template unchanged."""

    model_config = ConfigDict(extra="allow")

    role: Text
    content: str | Annotated[list[TextPart], Field(fail_fast=True)] | None = None

    def for_template(self) -> dict[str, Any]:
        """Return the message as chat templates expect it: with its content as one string."""
        content = self.content
        if isinstance(content, list):
            content = "\n".join(part.text for part in content)
        return {**(self.model_extra or {}), "role": self.role, "content": content or ""}


class Function(BaseModel):
    """The definition of a tool. The chat template gets it in this order, further fields last, as from vLLM."""

    model_config = ConfigDict(extra="allow")

    name: Annotated[str, StringConstraints(min_length=1, max_length=MAX_TOOL_NAME)]
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(BaseModel):
    """One of the tools that the model may call."""

    type: Literal["function"] = "function"
    function: Function


def _plain_arguments(arguments: dict[str, Any]) -> dict[str, Any]:
    """Check the arguments for a chat template: few, and no lists or objects, over which a template may loop."""
    if len(arguments) > MAX_TEMPLATE_ARGUMENTS:
        raise ValueError(f"at most {MAX_TEMPLATE_ARGUMENTS} entries are allowed")
    for name, value in arguments.items():
        if not (value is None or isinstance(value, (bool, int, float, str))):
            raise ValueError(f"{name[:100]} must be a string, a number or a boolean")
        if max(len(name), len(str(value))) > MAX_ARGUMENT_CHARACTERS:
            raise ValueError(f"{name[:100]} must have at most {MAX_ARGUMENT_CHARACTERS} characters")
    return arguments


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    unsupported = {name: neutral for name, neutral in UNSUPPORTED.items() if name != "chat_template"} | {
        "echo": (None, False)
    }

    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS, fail_fast=True)] | None = None
    tool_choice: Literal["none", "auto", "required"] | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None

    messages: Annotated[list[Message], Field(fail_fast=True)] = Field(min_length=1, max_length=MAX_CHAT_MESSAGES)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    chat_template: str | None = None
    add_special_tokens: bool | None = None
    chat_template_kwargs: Annotated[dict[str, Any], AfterValidator(_plain_arguments)] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)

    @model_validator(mode="after")
    def _top_needs_logprobs(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise bad_request("top_logprobs: it needs logprobs to be true", "top_logprobs")
        return self

    @property
    def alternatives(self) -> int | None:
        """Return how many alternatives to report beside each token, or None for no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def reads_calls(self) -> bool:
        """Return whether calls of tools are looked for in the answer."""
        return bool(self.tools) and self.tool_choice != "none"

    @property
    def tools_for_template(self) -> list[dict[str, Any]] | None:
        """Return the tools that the chat template gets. As in vLLM, it gets them with tool_choice none, too."""
        return [tool_for_template(tool.function.model_dump()) for tool in self.tools or ()] or None


class CompletionRequest(GenerationRequest):
    """POST /v1/completions. A prompt is text or token ids; several prompts get `n` answers each."""

    unsupported = {
        **UNSUPPORTED,
        "add_special_tokens": (None, True),
        "tool_choice": (None, "none", "auto"),
        "tools": (None, []),
    }

    prompt: Text | Ids | Annotated[list[Text], Field(fail_fast=True)] | Annotated[list[Ids], Field(fail_fast=True)] = (
        Field(min_length=1)
    )
    echo: bool | None = None
    logprobs: Annotated[int, Field(strict=True, ge=0, le=MAX_LOGPROBS)] | None = None

    @property
    def alternatives(self) -> int | None:
        """Return how many alternatives to report beside each token, or None for no log-probabilities."""
        return self.logprobs

    def prompts(self) -> list[str | list[int]]:
        """Return the prompts as a list."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if isinstance(prompt[0], int):
            return [[token for token in prompt if isinstance(token, int)]]
        return [item for item in prompt if not isinstance(item, int)]


def parse_body(model: type[M], content_type: str, body: bytes, values: int) -> M:
    """Parse a request of at most `values` values. Raises ApiError 400 with a message that names the field."""
    if content_type != "application/json":
        message = f"Unsupported Media Type: Only 'application/json' is allowed, not {content_type!r}"
        raise ApiError(HTTPStatus.BAD_REQUEST, "Bad Request", message)
    try:
        check_json(body, Limits(len(body), BODY_DEPTH, values), "the body")
        return model.model_validate_json(body)
    except OutOfBounds as error:
        raise ApiError(HTTPStatus.BAD_REQUEST, "Bad Request", str(error)) from error
    except ValidationError as error:
        details = error.errors(include_url=False, include_context=False, include_input=False)
        messages: dict[str, None] = {}  # a dict, to keep the order without duplicates
        for detail in details[:MAX_MESSAGES]:
            field = ".".join(str(part) for part in detail["loc"] if not ALTERNATIVE.fullmatch(str(part)))[:200]
            messages[f"{field}: {detail['msg']}" if field else detail["msg"]] = None
        param = str(details[0]["loc"][0])[:200] if details[0]["loc"] else None
        raise ApiError(HTTPStatus.BAD_REQUEST, "Bad Request", "; ".join(messages), param) from error
