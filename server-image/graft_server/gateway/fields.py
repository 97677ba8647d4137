"""The fields of a request that reach an engine, with their bounds (PURE).

An engine accepts fields that a client must not have: a template is a program, a priority overtakes other tenants, extra
arguments reach the engine's plug-ins. So only the fields below are passed on. They are those of OpenAI's two APIs and of
vLLM's sampling. A field that is null counts as absent.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any

from graft.contracts.gateway import RouteTarget
from graft.prompttemplates import as_chat_template

from graft_server.gateway import messages
from graft_server.gateway.errors import bad_request

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
Check = Callable[[Any], str | None]  # returns what the value must be, or None if it is valid

INT64 = 2**63
MAX_TOKENS = 10_000_000  # tokens; the engine refuses what its context cannot hold
MAX_TOKEN_ID = 2**31 - 1
MAX_CHOICES = 16  # answers to one prompt
MAX_PROMPTS = 64
MAX_LOGPROBS = 20  # alternatives beside a token
MAX_STOPS, MAX_STOP_CHARACTERS = 64, 1024  # the engine searches for each of them after every token
MAX_BIASES = 1024
MAX_TOKEN_IDS = 1024
MAX_TOOLS, MAX_TOOLS_CHARACTERS = 128, 256 * 1024
MAX_SCHEMA_CHARACTERS = 64 * 1024  # of a JSON schema, a grammar or the choices
MAX_REGEX_CHARACTERS = 4096
MAX_TEMPLATE_ARGUMENTS, MAX_ARGUMENT_CHARACTERS = 16, 1024
MAX_DOCUMENTS = 256

# Parameters of transformers' apply_chat_template, of vLLM's renderer, and of the templates' own variables.
RESERVED_ARGUMENTS = frozenset({
    "chat_template", "conversation", "messages", "tools", "documents", "tokenize", "tokenizer", "tokenizer_kwargs",
    "padding", "truncation", "max_length", "return_tensors", "return_dict", "return_assistant_tokens_mask",
    "add_generation_prompt", "continue_final_message", "self", "kwargs",
})  # fmt: skip

# Fields that SDKs send and that no engine reads. They are accepted and not passed on.
IGNORED = frozenset({
    "user", "metadata", "store", "service_tier", "prompt_cache_key", "prompt_cache_retention", "safety_identifier",
    "verbosity", "prediction",
})  # fmt: skip


def for_engine(payload: Mapping[str, Any], target: RouteTarget, path: str) -> dict[str, Any]:
    """Return the request for the engine: with its name of the model, the tokens that end the version's answers, and the
    template of the version's prompts. It asks for the counts of tokens.

    An engine knows only the tokens and the template of the base model.
    """
    made = {**payload, "model": target.engine_model}
    if payload.get("stream"):  # the gateway counts tokens, also those of a stream that its client ends early
        made["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    if target.stop_token_ids and not payload.get("ignore_eos"):
        made["stop_token_ids"] = sorted({*(payload.get("stop_token_ids") or ()), *target.stop_token_ids})
    if target.prompt_template is not None and path == CHAT:
        # As in training, the tokenizer adds its own tokens to the prompt.
        made |= {"chat_template": as_chat_template(target.prompt_template), "add_special_tokens": True}
    return made


def passed_on(payload: Mapping[str, Any], path: str) -> dict[str, Any]:
    """Return the fields of a request that the engine gets. Raises ApiError 400 that names the field."""
    known = FIELDS[path]
    passed: dict[str, Any] = {}
    for name, value in payload.items():
        if value is None or name in IGNORED:
            continue
        check = known.get(name)
        if check is None:
            raise bad_request(
                f"{name[:100]}: the gateway does not accept this field. Remove it from the request.", name[:100]
            )
        if (wanted := check(value)) is not None:
            raise bad_request(f"{name}: it must be {wanted}.", name)
        passed[name] = value
    if "messages" in passed:
        passed["messages"] = messages.passed_on(passed["messages"])
    if "stream_options" in passed:
        passed["stream_options"] = {
            name: passed["stream_options"][name]
            for name in ("include_usage", "continuous_usage_stats")
            if passed["stream_options"].get(name) is not None
        }
    return passed


def most_tokens(payload: Mapping[str, Any], default: int) -> int:
    """Return about how many tokens a request can cost: its prompt, and all answers that it asks for (PURE).

    The gateway has no tokenizer, so four characters count as a token. `default`: of an answer, if the request has no limit.
    """
    prompt = payload.get("messages") or payload.get("prompt") or ""
    if isinstance(prompt, list) and prompt and all(isinstance(item, int) for item in prompt):
        size, prompts = len(prompt), 1
    else:
        size = len(json.dumps(prompt, ensure_ascii=False)) // 4 + 1
        prompts = len(prompt) if isinstance(prompt, list) and "prompt" in payload else 1
    beside = [payload[name] for name in ("tools", "functions", "documents") if name in payload]  # in a chat's prompt
    size += len(json.dumps(beside, ensure_ascii=False)) // 4 if beside else 0
    limit = payload.get("max_completion_tokens") or payload.get("max_tokens") or default
    return size + int(limit) * int(payload.get("n") or 1) * max(1, prompts)


def is_integer(value: Any, low: int, high: int) -> bool:
    """Return whether it is an integer in the range. A bool is none."""
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _integer(low: int, high: int) -> Check:
    return lambda value: None if is_integer(value, low, high) else f"an integer from {low} to {high}"


def _number(low: float, high: float) -> Check:
    def check(value: Any) -> str | None:
        fits = isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high
        return None if fits else f"a number from {low:g} to {high:g}"

    return check


def _text(most: int) -> Check:
    def check(value: Any) -> str | None:
        return None if isinstance(value, str) and len(value) <= most else f"a string of at most {most} characters"

    return check


def _boolean(value: Any) -> str | None:
    return None if isinstance(value, bool) else "true or false"


def _only(*allowed: Any) -> Check:
    words = " or ".join(str(one).lower() if isinstance(one, bool) else repr(one) for one in allowed)
    return lambda value: None if any(type(value) is type(one) and value == one for one in allowed) else words


def _list_of(check: Check, most: int) -> Check:
    def checked(value: Any) -> str | None:
        if not isinstance(value, list) or len(value) > most:
            return f"a list of at most {most} entries"
        wrong = next((wanted for one in value if (wanted := check(one)) is not None), None)
        return None if wrong is None else f"a list whose entries are each {wrong}"

    return checked


def _either(*checks: Check) -> Check:
    def checked(value: Any) -> str | None:
        wanted = [check(value) for check in checks]
        return None if None in wanted else " or ".join(str(one) for one in wanted)

    return checked


def _object(most: int, keys: Mapping[str, Check] | None = None) -> Check:
    """Check an object by its size in characters, and by its keys if they are known."""

    def checked(value: Any) -> str | None:
        if not isinstance(value, dict):
            return "an object"
        if messages.size(value, most) > most:
            return f"an object of at most {most} characters as JSON"
        for name, one in value.items() if keys is not None else ():
            check = keys.get(name) if keys else None
            if check is None:
                return f"an object without the key {name[:100]!r}"
            if one is not None and (wanted := check(one)) is not None:
                return f"an object whose {name} is {wanted}"
        return None

    return checked


def _prompt(value: Any) -> str | None:
    """Check a prompt: a text, token ids, or a list of either."""
    if isinstance(value, str):
        return None
    if isinstance(value, list):
        one = all(is_integer(token, 0, MAX_TOKEN_ID) for token in value)
        if one or (
            len(value) <= MAX_PROMPTS
            and all(
                isinstance(prompt, str)
                or (isinstance(prompt, list) and all(is_integer(token, 0, MAX_TOKEN_ID) for token in prompt))
                for prompt in value
            )
        ):
            return None
    return f"a string, a list of token ids, or a list of at most {MAX_PROMPTS} of either"


def _biases(value: Any) -> str | None:
    if isinstance(value, dict) and len(value) <= MAX_BIASES:
        number = _number(-100, 100)
        if all(name.isascii() and name.isdigit() and len(name) < 11 and not number(v) for name, v in value.items()):
            return None
    return f"an object of at most {MAX_BIASES} token ids with numbers from -100 to 100"


def _template_arguments(value: Any) -> str | None:
    if not isinstance(value, dict) or len(value) > MAX_TEMPLATE_ARGUMENTS:
        return f"an object of at most {MAX_TEMPLATE_ARGUMENTS} entries"
    for name, one in value.items():
        if not name.isidentifier() or len(name) > 64 or name.startswith("_") or name in RESERVED_ARGUMENTS:
            return f"an object without the key {name[:100]!r}"
        if not (one is None or isinstance(one, (bool, int, float, str))):
            return f"an object of strings, numbers and booleans; {name} is neither"
        if len(str(one)) > MAX_ARGUMENT_CHARACTERS:
            return f"an object whose {name} has at most {MAX_ARGUMENT_CHARACTERS} characters"
    return None


def _tools(value: Any) -> str | None:
    function = _object(MAX_TOOLS_CHARACTERS)
    if (
        not isinstance(value, list)
        or len(value) > MAX_TOOLS
        or messages.size(value, MAX_TOOLS_CHARACTERS) > (MAX_TOOLS_CHARACTERS)
    ):
        return f"a list of at most {MAX_TOOLS} tools with {MAX_TOOLS_CHARACTERS} characters as JSON"
    if all(
        isinstance(tool, dict) and tool.get("type") == "function" and not function(tool.get("function"))
        for tool in value
    ):
        return None
    return 'a list of {"type": "function", "function": {…}}'


_schema = _object(MAX_SCHEMA_CHARACTERS)
_grammar = _text(MAX_SCHEMA_CHARACTERS)
_regex = _text(MAX_REGEX_CHARACTERS)
_choices = _list_of(_text(1024), 256)
_token_ids = _list_of(_integer(0, MAX_TOKEN_ID), MAX_TOKEN_IDS)
_function = _object(
    1024, {"type": _only("function"), "name": _text(256), "function": _object(1024, {"name": _text(256)})}
)

_BOTH: dict[str, Check] = {
    "model": _text(512),
    # length and number of answers
    "max_tokens": _integer(0, MAX_TOKENS),
    "min_tokens": _integer(0, MAX_TOKENS),
    "n": _integer(1, MAX_CHOICES),
    "stop": _either(_text(MAX_STOP_CHARACTERS), _list_of(_text(MAX_STOP_CHARACTERS), MAX_STOPS)),
    "stop_token_ids": _token_ids,
    "include_stop_str_in_output": _boolean,
    "ignore_eos": _boolean,
    "truncate_prompt_tokens": _integer(-1, MAX_TOKENS),
    "truncation_side": _only("left", "right"),
    "thinking_token_budget": _integer(-1, MAX_TOKENS),
    # choice of the tokens
    "temperature": _number(0, 100),
    "top_p": _number(0, 1),
    "top_k": _integer(-1, MAX_TOKEN_ID),
    "min_p": _number(0, 1),
    "seed": _integer(-INT64, INT64 - 1),
    "frequency_penalty": _number(-2, 2),
    "presence_penalty": _number(-2, 2),
    "repetition_penalty": _number(0.01, 100),
    "length_penalty": _number(-100, 100),
    "logit_bias": _biases,
    "allowed_token_ids": _token_ids,
    "bad_words": _list_of(_text(MAX_STOP_CHARACTERS), MAX_STOPS),
    "use_beam_search": _only(False),
    "skip_special_tokens": _boolean,
    "spaces_between_special_tokens": _boolean,
    "add_special_tokens": _boolean,
    # form of the answer
    "stream": _boolean,
    "stream_options": _object(
        1024, {"include_usage": _boolean, "continuous_usage_stats": _boolean, "include_obfuscation": _boolean}
    ),
    "prompt_logprobs": _integer(0, MAX_LOGPROBS),
    "logprob_token_ids": _list_of(_integer(0, MAX_TOKEN_ID), MAX_LOGPROBS),
    "return_tokens_as_token_ids": _boolean,
    "return_token_ids": _boolean,
    "response_format": _object(
        MAX_SCHEMA_CHARACTERS,
        {
            "type": _only("text", "json_object", "json_schema"),
            "json_schema": _object(
                MAX_SCHEMA_CHARACTERS,
                {"name": _text(256), "description": _text(4096), "schema": _schema, "strict": _boolean},
            ),
        },
    ),
    "structured_outputs": _object(
        MAX_SCHEMA_CHARACTERS,
        {
            "json": _either(_schema, _grammar),
            "regex": _regex,
            "choice": _choices,
            "grammar": _grammar,
            "json_object": _boolean,
            "whitespace_pattern": _regex,
            "disable_any_whitespace": _boolean,
            "disable_additional_properties": _boolean,
        },
    ),
    # vLLM's older names of structured_outputs
    "guided_json": _either(_schema, _grammar),
    "guided_regex": _regex,
    "guided_choice": _choices,
    "guided_grammar": _grammar,
    "guided_whitespace_pattern": _regex,
    # Another salt means another prefix cache. So the time to the first token does not show what others have asked.
    "cache_salt": _text(1024),
}  # fmt: skip

FIELDS: Mapping[str, Mapping[str, Check]] = {
    CHAT: {
        **_BOTH,
        "messages": messages.check,
        "max_completion_tokens": _integer(0, MAX_TOKENS),
        "logprobs": _boolean,
        "top_logprobs": _integer(0, MAX_LOGPROBS),
        "echo": _boolean,
        "modalities": _only(["text"]),
        "tools": _tools,
        "tool_choice": _either(_only("none", "auto", "required"), _function),
        "parallel_tool_calls": _boolean,
        "functions": _list_of(_object(MAX_TOOLS_CHARACTERS), MAX_TOOLS),
        "function_call": _either(_only("none", "auto"), _function),
        "reasoning_effort": _only("none", "minimal", "low", "medium", "high", "xhigh", "max"),
        "include_reasoning": _boolean,
        "add_generation_prompt": _boolean,
        "continue_final_message": _boolean,
        "documents": _list_of(_object(MAX_SCHEMA_CHARACTERS), MAX_DOCUMENTS),
        "chat_template_kwargs": _template_arguments,
    },
    COMPLETIONS: {
        **_BOTH,
        "prompt": _prompt,
        "suffix": _text(MAX_SCHEMA_CHARACTERS),
        "best_of": _integer(1, MAX_CHOICES),
        "logprobs": _integer(0, MAX_LOGPROBS),
        "echo": _boolean,
    },
}
