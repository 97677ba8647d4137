"""One decoding step for many sequences with caches of different lengths, without padding or sums over other rows.

The model runs on [rows, 1] tokens. Its attention is replaced, through transformers' AttentionInterface, by one product
per row over that row's own keys and values. So a row's attention is the same computation in any step. Rows join and
leave without a copy. Outside a step the model uses its normal attention.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import SimpleNamespace
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer, EncoderDecoderCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ROWS = "graft_rows"
ATTENTION_KINDS = {"full_attention", "sliding_attention"}
GROWTH = 256  # minimum number of columns by which a row's cache grows

_step: ContextVar[StepCache | None] = ContextVar("step", default=None)


def new_cache(config: Any) -> Any:
    """Return an empty cache of the kind that the model's layers need, for reading one prompt."""
    if config.is_encoder_decoder:
        return EncoderDecoderCache(DynamicCache(), DynamicCache())
    return DynamicCache(config=config)


def can_share(cache: Any, config: Any) -> bool:
    """Return whether a sequence's cache can become a row: full or sliding attention only, nothing recurrent."""
    kinds = set(getattr(config.get_text_config(), "layer_types", None) or ATTENTION_KINDS)
    halves = (cache.self_attention_cache, cache.cross_attention_cache) if config.is_encoder_decoder else (cache,)
    layers = [layer for half in halves for layer in half.layers]
    plain = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers)
    return kinds <= ATTENTION_KINDS and plain and all(layer.is_initialized for layer in layers)


class RowLayer:
    """Keys and values [1, heads, columns, dim] of one sequence in one layer. If `window` is set, only the last `window`
    columns count."""

    def __init__(self, keys: Any, values: Any, window: int | None = None) -> None:
        self._keys = keys
        self._values = values
        self._length = keys.shape[-2]
        self._window = window

    def append(self, keys: Any, values: Any) -> None:
        """Add one column."""
        if self._length == self._keys.shape[-2]:
            self._grow()
        self._keys[..., self._length : self._length + 1, :] = keys
        self._values[..., self._length : self._length + 1, :] = values
        self._length += 1

    def visible(self) -> tuple[Any, Any]:
        """Return the columns that the newest token attends to, including its own."""
        first = max(self._length - self._window, 0) if self._window else 0
        return self._keys[..., first : self._length, :], self._values[..., first : self._length, :]

    def _grow(self) -> None:
        keys, values = self.visible()
        self._length = keys.shape[-2]
        shape = [*keys.shape[:-2], self._length + max(GROWTH, self._length // 2)]
        self._keys, new_values = keys.new_zeros(*shape, keys.shape[-1]), values.new_zeros(*shape, values.shape[-1])
        self._keys[..., : self._length, :] = keys
        new_values[..., : self._length, :] = values
        self._values = new_values


class RowCache:
    """The cache of one sequence, by layer, with `length` tokens. `cross` is a decoder's cache of the prompt."""

    def __init__(self, cache: Any, length: int) -> None:
        """Take over the cache of a prompt that was read."""
        crossed = isinstance(cache, EncoderDecoderCache)
        self.length = length
        self.own = _layers(cache.self_attention_cache if crossed else cache)
        self.cross = _layers(cache.cross_attention_cache) if crossed else []


def _layers(cache: Any) -> list[RowLayer]:
    return [RowLayer(layer.keys, layer.values, getattr(layer, "sliding_window", None)) for layer in cache.layers]


class StepCache(Cache):  # type: ignore[misc]  # transformers is not followed
    """The cache object that the model uses during a step. It passes every new column to its row.

    For the model, all rows are as long as the longest row: `past` tokens. If positions are given (rotary, learned), the
    model does not use this length. If it derives a bias from distances (T5), shorter rows use the end of that bias.
    """

    def __init__(self, rows: Sequence[RowCache]) -> None:
        self.layers: list[Any] = []
        self.rows = rows
        self.past = max(row.length for row in rows)
        self.prompt_keys: Any = None  # stands for the prompt's keys of every layer

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.past

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *_: Any, **__: Any) -> tuple[Any, Any]:
        for index, row in enumerate(self.rows):
            row.own[layer_idx].append(key_states[index : index + 1], value_states[index : index + 1])
        columns = (-1, -1, self.past + 1, -1)  # a view: only its length is used
        return key_states.expand(columns), value_states.expand(columns)

    def for_model(self) -> Any:
        """Return the cache object that the model expects: a pair for an encoder-decoder."""
        layers = self.rows[0].cross
        if not layers:
            return self
        crossed = StepCache(self.rows)
        self.prompt_keys, values = layers[0].visible()
        crossed.layers = [SimpleNamespace(keys=self.prompt_keys, values=values)] * len(layers)
        return EncoderDecoderCache(self, crossed)


@contextmanager
def stepping(rows: Sequence[RowCache]) -> Iterator[StepCache]:
    """Compute attention by rows while the context is open. Afterwards every row is one token longer."""
    cache = StepCache(rows)
    token = _step.set(cache)
    try:
        yield cache
    finally:
        _step.reset(token)
    for row in rows:
        row.length += 1


def _attend(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any,
    scaling: float | None = None,
    position_bias: Any = None,
    **more: Any,
) -> tuple[Any, None]:
    step = _step.get()
    if step is None:
        given = {"scaling": scaling, "position_bias": position_bias, **more}
        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, **given)
        return output, None
    cross = key is step.prompt_keys
    heads = query.shape[1]
    output = query.new_zeros(query.shape[0], 1, heads, value.shape[-1])  # rows beyond the caches are padding
    for index, row in enumerate(step.rows):
        keys, values = (row.cross if cross else row.own)[module.layer_idx].visible()
        groups = heads // keys.shape[1]  # query heads that share a key head are treated as its tokens
        queries = query[index].view(1, keys.shape[1], groups, -1)
        bias = None
        if position_bias is not None and not cross:
            bias = position_bias[:, :, :, step.past + 1 - keys.shape[-2] : step.past + 1].reshape(
                1, keys.shape[1], groups, -1
            )
        attended = torch.nn.functional.scaled_dot_product_attention(
            queries, keys, values, attn_mask=bias, scale=scaling
        )
        output[index, 0] = attended.view(heads, -1)
    return output, None


AttentionInterface.register(ROWS, _attend)
AttentionMaskInterface.register(ROWS, sdpa_mask)
