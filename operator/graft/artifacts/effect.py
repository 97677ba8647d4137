"""Choose the prompts by which the effect of an adapter is measured (PURE).

The prompts are token ids, not texts: they need no tokenizer, contain nothing of anybody's data, and are the same in a
trainer and in every engine. Where an adapter changes the answers, it changes them for any prompt.
"""

CANDIDATES = 8  # prompts that a trainer measures. It records the KEPT ones with the largest effect
KEPT = 4
LENGTH = 12  # tokens of a prompt, without the token that begins a text
TOP = 8  # the likeliest next tokens that are recorded, of the base model and of the adapter
# Most tokenizers have their special and reserved tokens below the first or above the last of these ids.
ORDINARY = (1000, 20_000)
GOLDEN = 0.618034  # of a span: a step that spreads over it


def prompts(vocabulary: int, first: int | None, avoid: frozenset[int] = frozenset()) -> list[list[int]]:
    """Return CANDIDATES prompts of ordinary tokens.

    `vocabulary`: number of tokens of the base model. `first`: id of the token that begins a text, if the model has one.
    `avoid`: ids of special tokens. An image's placeholder in a prompt would be an invalid request.
    """
    low = min(ORDINARY[0], vocabulary // 4)
    high = max(low + 1, min(ORDINARY[1], vocabulary // 2))
    ordinary = [token for token in range(low, high) if token not in avoid] or [low]
    step = max(1, int(len(ordinary) * GOLDEN))
    chosen = [ordinary[(7 + number * step) % len(ordinary)] for number in range(CANDIDATES * LENGTH)]
    start = [] if first is None or not 0 <= first < vocabulary else [first]
    return [start + chosen[at : at + LENGTH] for at in range(0, len(chosen), LENGTH)]
