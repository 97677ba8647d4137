"""Running sequences that share one forward pass: a left-padded KV cache that rows join and leave.

All rows end at the same column, so one column of new keys and values is appended per step, and a sliding window
covers the same columns of every row. Padding is masked out, so a row's result does not depend on its neighbours
(beyond the rounding of a larger matrix product).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

Row = TypeVar("Row")

ATTENTION_KINDS = {"full_attention", "sliding_attention"}


def can_share(cache: Any, config: Any) -> bool:
    """Whether the cache of one sequence can become a row of a batch: plain or sliding attention, nothing recurrent."""
    kinds = set(getattr(config.get_text_config(), "layer_types", None) or ATTENTION_KINDS)
    plain = all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in cache.layers)
    return kinds <= ATTENTION_KINDS and plain and all(layer.is_initialized for layer in cache.layers)


class Batch(Generic[Row]):
    """Sequences and their cache. `rows[i]` is whatever the caller keeps for row i of every tensor."""

    def __init__(self, row: Row, cache: Any, length: int, shared: bool) -> None:
        """Starts a batch with one sequence of `length` cached tokens; `shared` says whether others may join."""
        self.rows: list[Row] = [row]
        self.shared = shared
        self.cache = cache
        self._mask = torch.ones(1, length, dtype=torch.long)  # [rows, columns of the cache]

    def join(self, row: Row, cache: Any, length: int) -> None:
        """Adds a sequence with its own cache of `length` tokens."""
        width = max(self._mask.shape[1], length)
        self._mask = torch.cat([_pad(self._mask, width, 1), _pad(torch.ones(1, length, dtype=torch.long), width, 1)])
        for mine, theirs in zip(self.cache.layers, cache.layers, strict=True):
            columns = max(mine.keys.shape[-2], theirs.keys.shape[-2])
            mine.keys = torch.cat([_pad(mine.keys, columns, -2), _pad(theirs.keys, columns, -2)])
            mine.values = torch.cat([_pad(mine.values, columns, -2), _pad(theirs.values, columns, -2)])
            if isinstance(mine, DynamicSlidingWindowLayer):
                mine.cumulative_length = width
        self.rows.append(row)

    def keep(self, indices: Sequence[int]) -> None:
        """Keeps only the given rows, and drops the columns that are padding in all of them."""
        self.rows = [self.rows[index] for index in indices]
        if not self.rows or not self.shared:
            return
        self._mask = self._mask[list(indices)]
        padding = int(self._mask.any(dim=0).long().argmax())
        self._mask = self._mask[:, padding:]
        for layer in self.cache.layers:
            columns = self._mask.shape[1]
            if isinstance(layer, DynamicSlidingWindowLayer):
                layer.cumulative_length = columns
                columns = min(columns, layer.sliding_window - 1)
            first = layer.keys.shape[-2] - columns
            layer.keys = layer.keys[list(indices), :, first:]
            layer.values = layer.values[list(indices), :, first:]

    def inputs(self, tokens: Sequence[int]) -> dict[str, Any]:
        """What the next forward pass takes when row i continues with `tokens[i]`."""
        positions = self._mask.sum(dim=1, keepdim=True)
        self._mask = torch.cat([self._mask, torch.ones(len(tokens), 1, dtype=torch.long)], dim=1)
        return {
            "input_ids": torch.tensor([[token] for token in tokens]),
            "attention_mask": self._mask,
            "position_ids": positions,
            "past_key_values": self.cache,
        }


def new_cache(config: Any) -> Any:
    """An empty cache of the kind the model's layers need."""
    return DynamicCache(config=config)


def _pad(tensor: Any, width: int, dim: int) -> Any:
    missing = width - tensor.shape[dim]
    if not missing:
        return tensor
    shape = list(tensor.shape)
    shape[dim] = missing
    return torch.cat([tensor.new_zeros(shape), tensor], dim=dim)
