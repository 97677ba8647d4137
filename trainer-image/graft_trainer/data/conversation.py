"""Turn conversations into tokens, and mark the answers that the loss covers.

A model that is served gets a conversation up to the assistant's turn, and answers until a token ends the answer. This is
what it is trained on: for each turn of the assistant, the prompt is the text that the chat template makes for a server,
and the loss covers what follows it in the rendered conversation, up to the token that ends the answer. If the template
renders a turn differently when other turns follow it, each such turn becomes a sequence of its own.

Marks in the texts of a message show where the template puts them. No text is searched for.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from graft.controltokens import ControlTokenError, encode, encode_one, unmarked

from graft_trainer.data.chat import END, Chat, at_end, chat_of, shown
from graft_trainer.data.context import check_context
from graft_trainer.data.example import Example
from graft_trainer.data.lines import BadLine
from graft_trainer.data.messages import LEARN, Message, for_template

REASONING = ("reasoning_content", "reasoning", "thinking")  # names of the thought that precedes an answer
BEGIN, THOUGHT, CALL = "\ufdd2", "\ufdd3", "\ufdd4"  # marks, as END
PLAIN = str.maketrans("", "", BEGIN + END + THOUGHT + CALL)
Piece = tuple[list[int], list[bool]]  # (token ids, whether the loss covers each token)


@dataclass(frozen=True)
class Turn:
    """One answer. The texts have the marks of graft.controltokens."""

    prompt: str
    answer: str  # with the token that ends it, if the template writes one
    closed: bool  # whether the template writes a token that ends the answer. If not, the tokenizer's is added

    @property
    def text(self) -> str:
        return self.prompt + self.answer


def tokenise_conversations(examples: Sequence[Example], tokenizer: Any) -> list[list[Piece] | BadLine]:
    """Return the sequences of each example, not truncated, or why the example cannot be used."""
    chat = chat_of(tokenizer)
    found: list[list[list[Turn]] | BadLine] = [_caught(example, chat) for example in examples]
    texts = [turns[-1].text for sequences in found if isinstance(sequences, list) for turns in sequences]
    try:
        encoded = iter(encode(tokenizer, texts))
    except ControlTokenError as error:
        if len(examples) > 1:  # find the line
            return [one for example in examples for one in tokenise_conversations([example], tokenizer)]
        return [_control_tokens(error)]
    made: list[list[Piece] | BadLine] = []
    for sequences in found:
        if isinstance(sequences, BadLine):
            made.append(sequences)
            continue
        try:
            own = [(turns, next(encoded)) for turns in sequences]
            made.append([_piece(turns, ids, offsets, chat) for turns, (ids, offsets) in own])
        except BadLine as error:
            made.append(error)
    return made


def prompt_tokens(example: Example, tokenizer: Any) -> list[int]:
    """Return the ids of the conversation before its last answer, as a server sends them to the model.

    Raises BadLine if the template refuses the conversation.
    """
    chat = chat_of(tokenizer)
    try:
        messages, tools = _marked(example, chat)
        return encode_one(tokenizer, chat.render(messages[:-1], tools, prompt=True))
    except ControlTokenError as error:
        raise _control_tokens(error) from error


def answer_text(example: Example, tokenizer: Any) -> str:
    """Return the last answer as the chat template writes it, without the token that ends it. It is empty if the example
    cannot be used."""
    chat = chat_of(tokenizer)
    try:
        messages, tools = _marked(example, chat)
        turn = _turn(messages, tools, len(messages) - 1, chat)
    except (BadLine, ControlTokenError):
        return ""
    text = turn.answer
    end = next((end for end in chat.ends if turn.closed and text.endswith(end)), "")
    return unmarked(text.removesuffix(end)).strip()


def unlearned(messages: Sequence[Message]) -> tuple[Message, ...]:
    """Return the messages without answers to learn."""
    return tuple(message | {LEARN: False} if message["role"] == "assistant" else message for message in messages)


def _caught(example: Example, chat: Chat) -> list[list[Turn]] | BadLine:
    try:
        return _sequences(example, chat)
    except ControlTokenError as error:
        return _control_tokens(error)
    except BadLine as error:
        return error


def _sequences(example: Example, chat: Chat) -> list[list[Turn]]:
    """Return the learned answers, grouped by the sequence that has them all. The last of a group is the longest."""
    messages, tools = _marked(example, chat)
    turns = [
        _turn(messages, tools, index, chat)
        for index, message in enumerate(example.messages or ())
        if message["role"] == "assistant" and message.get(LEARN, True)
    ]
    if not turns:
        raise BadLine(
            "there is no answer to train on", "nothingToLearn", "Let each conversation have an answer to train on."
        )
    check_context(messages, tools, chat)
    groups: list[list[Turn]] = []
    left = turns
    while left:
        longest = left[-1]
        together = [turn for turn in left[:-1] if turn.closed and longest.text.startswith(turn.text)]
        groups.insert(0, [*together, longest])
        left = [turn for turn in left[:-1] if turn not in together]
    return groups


def _marked(example: Example, chat: Chat) -> tuple[list[Message], Any]:
    """Return the messages and the tools for the template, with marks in the control tokens of their texts."""
    plain = for_template(example.messages or ())
    tools = list(example.tools) if example.tools else None
    marked, marked_tools = chat.marked(plain), chat.marked(tools)
    if (marked, marked_tools) != (plain, tools) and unmarked(
        chat.render(marked, marked_tools, prompt=False)
    ) != chat.render(plain, tools, prompt=False):
        raise BadLine(
            "the chat template renders the conversation differently if the control tokens in its words are words",
            "controlTokens",
            "Remove the model's control tokens from the texts.",
        )
    return marked, marked_tools


def _turn(messages: Sequence[Message], tools: Any, index: int, chat: Chat) -> Turn:
    """Return the answer of the message at `index`. Raises BadLine if the template does not render all of it, or if
    nothing ends it."""
    before, message = messages[:index], messages[index]
    whole = chat.render([*before, message], tools, prompt=False)
    probe = chat.render([*before, _with_marks(message)], tools, prompt=False)
    prompt = None
    if any(one["role"] == "user" for one in before):
        prompt = chat.render(before, tools, prompt=True)
        if not whole.startswith(prompt) and not any(message.get(name) for name in REASONING):
            # The prompt opens a thought: the answer closes it.
            thought = message | {REASONING[0]: THOUGHT}
            closed = chat.render([*before, thought], tools, prompt=False)
            if closed.translate(PLAIN).startswith(prompt):
                whole = closed.translate(PLAIN)
                probe = chat.render([*before, _with_marks(message) | {REASONING[0]: THOUGHT}], tools, prompt=False)
    if prompt is not None and whole.startswith(prompt):
        answer, last = whole[len(prompt) :], 0
    else:
        start = _start(before, message, tools, whole, chat, index)
        prompt, answer = whole[:start] if prompt is None else prompt, whole[start:]
    if probe.translate(PLAIN) == whole:  # else the template's output depends on the marks
        _check_rendered(message, probe, index)
        at = max(map(probe.rfind, (END, CALL)))
        last = max(0, len(probe[: at + 1].translate(PLAIN)) - (len(whole) - len(answer)))
    else:
        last = 0
    if not _has_words(message, answer):
        # The prompt may have the beginning of them, such as <think>.
        opened = prompt.removeprefix(chat.render(before, tools, prompt=False)) if before else ""
        if not _has_words(message, opened + answer):
            raise _left_out(index, "a part of the content")
    return _ended(prompt, answer, last, chat, index)


def _start(before: Sequence[Message], message: Message, tools: Any, whole: str, chat: Chat, index: int) -> int:
    """Return where the answer begins in the rendered conversation if the prompt for it is not a part of that."""
    name = next((name for name in (*REASONING, "content") if message.get(name)), "content")
    text = message.get(name) or ""
    space = len(text) - len(text.lstrip())
    begun = chat.render([*before, message | {name: text[:space] + BEGIN + text[space:]}], tools, prompt=False)
    if BEGIN not in begun:
        raise _left_out(index, f"a part of the {name}")
    if begun.translate(PLAIN) != whole:
        raise BadLine(
            f"messages[{index}]: the chat template does not show where the answer begins: the prompt that it makes for this "
            "turn is not the beginning of the conversation",
            "notRendered",
            "Use a base model whose chat template renders the turns of the assistant as its prompts begin them.",
        )
    return begun.index(BEGIN)


def _with_marks(message: Message) -> Message:
    """Return the message with marks at the end of its texts: END in the content, THOUGHT in the reasoning, CALL in the
    names and arguments of calls."""
    marked = {**message}
    if isinstance(message.get("content"), str):
        marked["content"] = _marked_text(message["content"], END)
    for name in REASONING:
        if isinstance(message.get(name), str):
            marked[name] = _marked_text(message[name], THOUGHT)
    if message.get("tool_calls"):
        marked["tool_calls"] = [_call_with_marks(call) for call in message["tool_calls"]]
    return marked


def _call_with_marks(call: Any) -> Any:
    if not isinstance(call, dict):
        return call
    function = call.get("function", call)
    marked = {
        name: _leaves(value) if name == "arguments" else _marked_text(value, CALL) if name == "name" else value
        for name, value in (function if isinstance(function, dict) else {}).items()
    }
    return call | {"function": marked} if "function" in call else marked


def _leaves(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _leaves(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_leaves(one) for one in value]
    return _marked_text(value, CALL) if isinstance(value, str) else value


def _marked_text(text: Any, sign: str) -> Any:
    """Return the text with a mark at its end. An empty text stays empty, because templates treat it differently."""
    return at_end(text, sign) if isinstance(text, str) and text.strip() else text


def _check_rendered(message: Message, probe: str, index: int) -> None:
    """Raise BadLine if the template leaves out a part of the answer."""
    expected = _with_marks(message)
    reasoning = next((expected[name] for name in REASONING if isinstance(expected.get(name), str)), "")
    wanted = {
        "content": probe.count(END) < _count(expected.get("content"), END),
        "reasoning": probe.count(THOUGHT) < _count(reasoning, THOUGHT),
        "tool_calls": probe.count(CALL) < _count(expected.get("tool_calls"), CALL),
    }
    if missing := [name for name, absent in wanted.items() if absent]:
        raise _left_out(index, " and ".join(missing))


def _count(value: Any, sign: str) -> int:
    if isinstance(value, dict):
        return sum(_count(one, sign) for one in value.values())
    if isinstance(value, list):
        return sum(_count(one, sign) for one in value)
    return value.count(sign) if isinstance(value, str) else 0


def _has_words(message: Message, text: str) -> bool:
    """Return whether the text has all characters of the content in their order, without white space."""
    content, rest = message.get("content"), iter(text)
    return not isinstance(content, str) or all(one in rest for one in content if not one.isspace())


def _left_out(index: int, what: str) -> BadLine:
    return BadLine(
        f"messages[{index}]: the base model's chat template leaves out {what} of the answer, so it cannot be trained on",
        "notRendered",
        "Remove it from the line, or use a base model whose chat template renders it.",
    )


def _ended(prompt: str, answer: str, last: int, chat: Chat, index: int) -> Turn:
    """Return the turn without what follows the token that ends the answer. The words of the answer end at `last`."""
    places = [(place, token) for token in chat.ends if (place := answer.find(token, last)) >= 0]
    if places:
        place, token = min(places, key=lambda found: (found[0], -len(found[1])))
        return Turn(prompt, answer[: place + len(token)], closed=True)
    if chat.tokenizer.eos_token_id is None:
        raise BadLine(
            f"messages[{index}]: no token ends the answer: the chat template writes none, and the tokenizer has no eos_token. "
            "A model that is trained like this never stops",
            "noEnd",
            "Set eos_token in the base model's tokenizer_config.json, or use a chat model as the base model.",
        )
    return Turn(prompt, answer.rstrip(), closed=False)


def _piece(turns: Sequence[Turn], ids: list[int], offsets: Sequence[tuple[int, int]], chat: Chat) -> Piece:
    """Return the tokens of one sequence, of which the turns are learned."""
    learned = _learned(turns, offsets) if chat.tokenizer.is_fast else None
    if learned is None:
        ids, learned = _by_parts(turns, chat)
    if not turns[-1].closed:
        return [*ids, int(chat.tokenizer.eos_token_id)], [*learned, True]
    if not learned or not learned[-1] or ids[-1] not in chat.ends.values():
        raise BadLine(
            f"the end of the answer, {shown(turns[-1].answer[-40:])}, is not one token of the tokenizer, so nothing ends a generation",
            "noEnd",
            "Use the tokenizer that belongs to the model's chat template.",
        )
    return ids, learned


def _learned(turns: Sequence[Turn], offsets: Sequence[tuple[int, int]]) -> list[bool] | None:
    """Return whether each token is part of an answer, or None if a token is part of a prompt and an answer."""
    bounds = [len(unmarked(text)) for turn in turns for text in (turn.prompt, turn.text)]
    learned, at = [], 0
    for begin, end in offsets:
        while at < len(bounds) - 1 and begin >= bounds[at]:
            at += 1
        if begin < bounds[at] < end:
            return None
        learned.append(at % 2 == 1 and begin < end)
    return learned


def _by_parts(turns: Sequence[Turn], chat: Chat) -> Piece:
    """Tokenise prompts and answers separately. It is needed if a token would be part of both: a server's prompt ends
    where the answer begins."""
    ids: list[int] = []
    learned: list[bool] = []
    text, position = turns[-1].text, 0
    for turn in turns:
        for part, learn in ((text[position : len(turn.prompt)], False), (turn.answer, True)):
            tokens = encode_one(chat.tokenizer, part) if part else []
            ids += tokens
            learned += [learn] * len(tokens)
        position = len(turn.text)
    return ids, learned


def _control_tokens(error: ControlTokenError) -> BadLine:
    return BadLine(
        str(error), "controlTokens", "Remove the model's control tokens and the reserved characters from the texts."
    )
