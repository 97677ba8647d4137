"""What clients send and get: OpenAI's shapes with vLLM's errors."""

from __future__ import annotations

import time
from collections.abc import Mapping
from http import HTTPStatus
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

MAX_CHOICES = 16  # answers to one prompt
MAX_PROMPTS = 64  # prompts in one request

Text = Annotated[str, StringConstraints(min_length=1)]
M = TypeVar("M", bound=BaseModel)

# Fields of the API that would change the answer and that this engine does not have, with the values that ask for
# nothing. Ignoring any other value would be a silently wrong answer.
UNSUPPORTED: Mapping[str, tuple[Any, ...]] = {
    "add_generation_prompt": (None, True),
    "audio": (None,),
    "best_of": (None, 1),
    "continue_final_message": (None, False),
    "echo": (None, False),
    "frequency_penalty": (None, 0),
    "function_call": (None, "none"),
    "functions": (None, []),
    "guided_json": (None,),
    "guided_regex": (None,),
    "logit_bias": (None, {}),
    "logprobs": (None, False),
    "min_p": (None, 0),
    "min_tokens": (None, 0),
    "presence_penalty": (None, 0),
    "repetition_penalty": (None, 1),
    "response_format": (None, {"type": "text"}),
    "stop_token_ids": (None, []),
    "structured_outputs": (None,),
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "top_logprobs": (None, 0),
    "use_beam_search": (None, False),
}


class ApiError(Exception):
    """An answer other than 200, in vLLM's nested form."""

    def __init__(self, status: int, type: str, message: str, param: str | None = None, retry_after: int | None = None):
        super().__init__(message)
        self.status = status
        self.retry_after = retry_after
        self.body = {"error": {"message": message, "type": type, "param": param, "code": status}}


def bad_request(message: str, param: str | None = None) -> ApiError:
    """The request is well formed and still cannot be served as it stands."""
    return ApiError(HTTPStatus.BAD_REQUEST, "BadRequestError", message, param)


def unknown_model(name: str) -> ApiError:
    """No base model and no adapter has this name."""
    return ApiError(HTTPStatus.NOT_FOUND, "NotFoundError", f"The model `{name}` does not exist.", "model")


def unavailable(message: str) -> ApiError:
    """The server cannot take this request now, and another one or a later moment may."""
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
    """`include_usage` asks for a last chunk with the token counts."""

    include_usage: bool = False


class GenerationRequest(BaseModel):
    """What both kinds of request share. Unknown fields are ignored, as in vLLM; unsupported ones are refused."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)

    model: str | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1)
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1)
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES)
    stop: Text | list[Text] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for name, neutral in UNSUPPORTED.items():
                # `in` compares with ==, for which 0 is False and 1 is True: logprobs 0 asks for something.
                value = data.get(name)
                if not any(value == other and isinstance(value, bool) == isinstance(other, bool) for other in neutral):
                    raise ValueError(f"{name}: this engine does not support it")
        return data

    @property
    def stop_strings(self) -> list[str]:
        """The stop strings as a list."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the token counts."""
        return bool(self.stream_options and self.stream_options.include_usage)


class TextPart(BaseModel):
    """A piece of a message. Only text is understood."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One message of a conversation; further fields reach the chat template as they are."""

    model_config = ConfigDict(extra="allow")

    role: Text
    content: str | list[TextPart] | None = None

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates expect it: with its content as one string."""
        content = self.content
        if isinstance(content, list):
            content = "\n".join(part.text for part in content)
        return {**(self.model_extra or {}), "role": self.role, "content": content or ""}


class ChatRequest(GenerationRequest):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    chat_template_kwargs: dict[str, Any] | None = None


class CompletionRequest(GenerationRequest):
    """POST /v1/completions. A prompt is text or token ids; several prompts get `n` answers each."""

    prompt: Text | list[int] | list[Text] | list[list[int]] = Field(min_length=1)

    def prompts(self) -> list[str | list[int]]:
        """The prompts, one by one."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if isinstance(prompt[0], int):
            return [[token for token in prompt if isinstance(token, int)]]
        return [item for item in prompt if not isinstance(item, int)]


def parse_body(model: type[M], content_type: str, body: bytes) -> M:
    """Reads a request. Raises ApiError 400 with a message that names the field."""
    if content_type != "application/json":
        message = f"Unsupported Media Type: Only 'application/json' is allowed, not {content_type!r}"
        raise ApiError(HTTPStatus.BAD_REQUEST, "Bad Request", message)
    try:
        return model.model_validate_json(body)
    except ValidationError as error:
        details = error.errors(include_url=False, include_context=False, include_input=False)
        messages = []
        for detail in details:
            field = ".".join(str(part) for part in detail["loc"])
            text = detail["msg"].removeprefix("Value error, ")
            messages.append(f"{field}: {text}" if field else text)
        param = str(details[0]["loc"][0]) if details[0]["loc"] else None
        raise ApiError(HTTPStatus.BAD_REQUEST, "Bad Request", "; ".join(messages), param) from error


def model_card(
    name: str, root: str, created: int, parent: str | None = None, max_model_len: int | None = None
) -> dict[str, Any]:
    """An entry of /v1/models."""
    permission = {
        "id": f"modelperm-{name}",
        "object": "model_permission",
        "created": created,
        "allow_create_engine": False,
        "allow_sampling": True,
        "allow_logprobs": False,
        "allow_search_indices": False,
        "allow_view": True,
        "allow_fine_tuning": False,
        "organization": "*",
        "group": None,
        "is_blocking": False,
    }
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "graft",
        "root": root,
        "parent": parent,
        "max_model_len": max_model_len,
        "permission": [permission],
    }


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Token counts of a whole request."""
    return {
        "prompt_tokens": prompt_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "completion_tokens": completion_tokens,
    }


class Shapes:
    """The answers of one request: `chat` picks between the two APIs."""

    def __init__(self, chat: bool, request_id: str, model: str) -> None:
        self._chat = chat
        self._head = {"id": f"{'chatcmpl' if chat else 'cmpl'}-{request_id}", "created": int(time.time())}
        self._model = model

    def answer(self, choices: list[tuple[str, str]], counts: dict[str, int]) -> dict[str, Any]:
        """The whole answer, from each choice's text and finish reason."""
        kind = "chat.completion" if self._chat else "text_completion"
        return self._body(kind, [self._choice(i, text, reason) for i, (text, reason) in enumerate(choices)], counts)

    def opening(self, index: int) -> dict[str, Any] | None:
        """The first chunk of a choice in a stream of chat: the role."""
        return self._chunk(index, {"role": "assistant", "content": ""}, None) if self._chat else None

    def chunk(self, index: int, text: str, finish_reason: str | None) -> dict[str, Any]:
        """A piece of a choice."""
        if self._chat:
            return self._chunk(index, {"content": text} if text else {}, finish_reason)
        return self._body("text_completion", [self._choice(index, text, finish_reason)], None)

    def counts(self, counts: dict[str, int]) -> dict[str, Any]:
        """The last chunk, which has no choices."""
        return self._body("chat.completion.chunk" if self._chat else "text_completion", [], counts)

    def _chunk(self, index: int, delta: dict[str, str], finish_reason: str | None) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return self._body("chat.completion.chunk", [choice], None)

    def _choice(self, index: int, text: str, finish_reason: str | None) -> dict[str, Any]:
        content = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
        return {"index": index, **content, "logprobs": None, "finish_reason": finish_reason}

    def _body(self, kind: str, choices: list[dict[str, Any]], counts: dict[str, int] | None) -> dict[str, Any]:
        return {**self._head, "object": kind, "model": self._model, "choices": choices, "usage": counts}
