"""Examples as people read them: the text of the tokens, with marks around what the loss covers."""

from typing import Any

from graft_trainer.data.tokens import IGNORED, Tokenised

OPEN, CLOSE = "⟦", "⟧"
LONGEST = 300  # characters of a stretch that are shown; of a longer one, the beginning and the end


def show(item: Tokenised, tokenizer: Any) -> str:
    """Return the text of the tokens, control tokens included. ⟦…⟧ is what the loss covers."""
    ids, labels = item.input_ids, item.labels
    if item.task == "seq2seq":
        return f"{_cut(_decoded(ids, tokenizer))} → {OPEN}{_cut(_decoded(labels, tokenizer))}{CLOSE}"
    parts: list[str] = []
    begin = 0
    for at in range(1, len(ids) + 1):
        if at < len(ids) and (labels[at] == IGNORED) == (labels[begin] == IGNORED):
            continue
        text = _cut(_decoded(ids[begin:at], tokenizer))
        parts.append(text if labels[begin] == IGNORED else f"{OPEN}{text}{CLOSE}")
        begin = at
    return "".join(parts)


def _decoded(ids: list[int], tokenizer: Any) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} … {text[-LONGEST // 2 :]}"
