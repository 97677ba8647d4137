"""The chat template of a base model: what it renders, and the token that ends an answer.

It knows no examples. conversation.py knows which of the rendered text is trained on.
"""

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from itertools import takewhile
from pathlib import Path
from typing import Any

from graft.artifacts.sources import CONFIG_LIMITS
from graft.bounded import OutOfBounds, parse_json
from graft.controltokens import control_tokens, mark, unmarked

from graft_trainer.data.lines import BadLine

END = "\ufdd1"  # see graft.controltokens: reserved code points mark places in a text
CLOCK = "strftime_now"  # the function of transformers and vLLM that reads the clock for a template
DIRECTIVES = (*"aAbBcdHIjmMpSUwWxXyYfzZ", "-d", "-m", "-H", "-I", "-M", "-j", "e", "D", "F", "T")  # of strftime
ORDER = "Use the roles in the order that the model's chat template expects: usually system first, then user and assistant in turn."


@dataclass(frozen=True)
class Chat:
    """A tokenizer with a chat template."""

    tokenizer: Any
    controls: re.Pattern[str] | None  # its control tokens
    stops: dict[str, int]  # the tokens that end a generation of the base model, by their text
    end: str | None  # the token with which the template ends an answer

    @property
    def ends(self) -> dict[str, int]:
        """The tokens that end an answer, by their text."""
        own = {self.end: int(self.tokenizer.convert_tokens_to_ids(self.end))} if self.end else {}
        return self.stops | own

    def marked(self, value: Any) -> Any:
        """Return messages or tools with a mark in every control token of their texts."""
        return mark(value, self.controls)

    def render(self, messages: Sequence[Any], tools: Any, *, prompt: bool) -> str:
        """Return the rendered conversation. With `prompt`, it ends where the assistant's next turn begins.

        Raises BadLine if the template refuses it.
        """
        return render(self.tokenizer, messages, tools, prompt=prompt)


def render(tokenizer: Any, messages: Sequence[Any], tools: Any, *, prompt: bool) -> str:
    """Return the rendered conversation. See Chat.render."""
    try:
        return str(
            tokenizer.apply_chat_template(list(messages), tools=tools, tokenize=False, add_generation_prompt=prompt)
        )
    except Exception as error:  # a template is a program: a line can cause any error in it
        raise BadLine(
            f"the base model's chat template refuses the conversation: {error}", "templateRefuses", ORDER
        ) from error


def chat_of(tokenizer: Any) -> Chat:
    """Return the chat of a tokenizer that has a chat template."""
    return _chat(tokenizer, str(tokenizer.chat_template))


@lru_cache(maxsize=8)
def _chat(tokenizer: Any, template: str) -> Chat:
    stops = {str(tokenizer.convert_ids_to_tokens(token)): token for token in stop_ids(tokenizer)}
    controls = control_tokens(tokenizer)
    return Chat(tokenizer, controls, stops, _end(tokenizer, controls, stops))


def stop_ids(tokenizer: Any) -> list[int]:
    """Return the ids that end a generation of the base model: those of its generation config, its config and its
    tokenizer. The files are in the folder from which the tokenizer was loaded."""
    found = {tokenizer.eos_token_id}
    for name in ("generation_config.json", "config.json"):
        path = Path(str(tokenizer.name_or_path)) / name
        if tokenizer.name_or_path and path.is_file():
            try:
                config = parse_json(path.read_bytes(), CONFIG_LIMITS, name)
            except OutOfBounds:
                continue  # check_base_model reports it
            value = config.get("eos_token_id") if isinstance(config, dict) else None
            found.update(value if isinstance(value, list) else [value])
    return sorted(token for token in found if isinstance(token, int) and 0 <= token < len(tokenizer))


def answer_stops(tokenizer: Any) -> list[int]:
    """Return all ids that end an answer of a model that is trained with this tokenizer."""
    return sorted({*stop_ids(tokenizer), *(chat_of(tokenizer).ends.values() if tokenizer.chat_template else ())})


def _end(tokenizer: Any, controls: re.Pattern[str] | None, stops: dict[str, int]) -> str | None:
    """Return the token with which the template ends an answer.

    It is one of those that the template writes after an answer both at the end of a conversation and before another
    turn, if there is one. A token that ends a generation of the base model precedes the others.
    """
    question, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": f"b{END}"}
    tails = []
    for messages in ([question, answer], [question, answer, question]):
        for first in ([], [{"role": "system", "content": "s"}]):  # some templates want a system message
            with suppress(BadLine):
                tails.append(render(tokenizer, [*first, *messages], None, prompt=False).rpartition(END)[2])
                break
    for text in (_common(tails), tails[0] if tails else ""):
        found = controls.findall(text) if controls else []
        if found:
            return str(next((token for token in found if token in stops), found[0]))
    return None


def _common(texts: Sequence[str]) -> str:
    """Return the longest beginning that all texts have."""
    same = takewhile(lambda group: len(set(group)) == 1, zip(*texts, strict=False))
    return "".join(group[0] for group in same)


def pin_date(tokenizer: Any, now: datetime) -> None:
    """Let the chat template write `now` for the time at which it renders."""
    template = tokenizer.chat_template
    if isinstance(template, dict):
        tokenizer.chat_template = {name: _pinned(one, now) for name, one in template.items()}
    elif template:
        tokenizer.chat_template = _pinned(template, now)


def writes_date(tokenizer: Any) -> bool:
    """Return whether the chat template writes the date of the day."""
    return CLOCK in str(tokenizer.chat_template)


def _pinned(template: str, now: datetime) -> str:
    """Return the template with a macro in place of the function that reads the clock.

    transformers passes no functions to a template. The line break after the macro is one that Jinja removes.
    """
    if CLOCK not in template:
        return template
    filters = "".join(f"|replace({f'%{sign}'!r},{now.strftime(f'%{sign}')!r})" for sign in DIRECTIVES)
    return f"{{%- macro {CLOCK}(format) -%}}{{{{ format{filters} }}}}{{%- endmacro %}}\n{template}"


def at_end(text: str, mark: str) -> str:
    """Return the text with a mark before the white space at its end, which a template may strip."""
    words = text.rstrip()
    return words + mark + text[len(words) :]


def shown(text: str) -> str:
    """Return a text without marks, for a message."""
    return json.dumps(unmarked(text), ensure_ascii=False)
