"""LoRA in forward hooks: each row's own low-rank product is added to the output of every adapted module.

The model's modules stay unchanged: a hook adds B(A(x)) (Hu et al., arXiv:2106.09685). So an adapter is only an entry in
a dictionary, a 4-bit base needs no special code, and a base row is computed by the unchanged model.

Each row of a step has a place in stacked matrices, [rows, in, rank] and [rows, rank, out]. Two batched products compute
all rows at once, for any number of adapters. A row's matrices are copied when it joins and stay until it leaves.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch

from graft_server.engine.settings import LORA_RANKS


@dataclass(frozen=True)
class Pair:
    """The matrices of one module, float32: `a` [rank, in] (embedding: [rank, tokens]) and `b` [out, rank], scaled."""

    a: Any
    b: Any


@dataclass(frozen=True)
class LoraWeights:
    """An adapter's matrices, by the full name of their module."""

    pairs: Mapping[str, Pair]


@dataclass(frozen=True)
class Row:
    """The adapter of one row of a step. `key` identifies the adapter as long as the process lives."""

    key: str
    weights: LoraWeights


class _Mode(Protocol):
    def add(self, name: str, embedding: bool, inputs: Any, output: Any) -> Any: ...


class LoraHooks:
    """The hooks on a network's modules. Outside the contexts `one` and `rows` the network is the plain base model."""

    def __init__(self, network: Any, names: Sequence[str]) -> None:
        self._mode: _Mode | None = None
        self._rows = _Rows()
        for name in names:
            network.get_submodule(name).register_forward_hook(partial(self._hook, name))

    @contextmanager
    def one(self, weights: LoraWeights | None) -> Iterator[None]:
        """Apply one adapter: all tokens of the forward pass belong to one sequence."""
        self._mode = _One(weights) if weights else None
        try:
            yield
        finally:
            self._mode = None

    @contextmanager
    def rows(self, rows: Sequence[Row | None], first: int, last: int) -> Iterator[None]:
        """Apply an adapter per row. The forward pass runs rows `first` to `last` (exclusive) of the step, a token each.

        Rows beyond the end of `rows` are padding. A caller keeps a sequence at its index as long as possible, because a
        row's matrices are copied when they change.
        """
        self._rows.assign(rows, last)
        self._mode = _Block(self._rows, first, last) if self._rows.matrices else None
        try:
            yield
        finally:
            self._mode = None

    def forget(self) -> None:
        """Free the memory of the stacked matrices."""
        self._rows = _Rows()

    def _hook(self, name: str, module: Any, arguments: tuple[Any, ...], output: Any) -> Any:
        if self._mode is None:
            return None
        delta = self._mode.add(name, isinstance(module, torch.nn.Embedding), arguments[0], output)
        if delta is None:
            return None
        if (scale := getattr(module, "scalar_embed_scale", None)) is not None:  # Gemma scales its embeddings
            delta = delta * scale
        return (output + delta.view_as(output)).to(output.dtype)


class _One:
    def __init__(self, weights: LoraWeights) -> None:
        self._pairs = weights.pairs

    def add(self, name: str, embedding: bool, inputs: Any, output: Any) -> Any:
        pair = self._pairs.get(name)
        if pair is None:
            return None
        inner = torch.nn.functional.embedding(inputs, pair.a.T) if embedding else inputs.to(pair.a.dtype) @ pair.a.T
        return inner @ pair.b.T


class _Block:
    def __init__(self, rows: _Rows, first: int, last: int) -> None:
        self._rows = rows
        self._range = first, last

    def add(self, name: str, embedding: bool, inputs: Any, output: Any) -> Any:
        first, last = self._range
        count = last - first
        delta = None
        for matrices in self._rows.matrices.get(name, {}).values():
            a, b = matrices.a[first:last], matrices.b[first:last]
            if embedding:
                inner = a[torch.arange(count), inputs.view(count)].unsqueeze(1)
            else:
                inner = torch.bmm(inputs.reshape(count, 1, -1).to(a.dtype), a)
            part = torch.bmm(inner, b)
            delta = part if delta is None else delta + part
        return delta


@dataclass
class _Matrices:
    """The stacked matrices of one module and one rank: `a` [rows, in, rank], `b` [rows, rank, out]."""

    a: Any
    b: Any
    filled: set[int]


class _Rows:
    """The stacked matrices of all rows. Ranks are rounded up to vLLM's ranks, so the shape of a row's product does not
    depend on other rows."""

    def __init__(self) -> None:
        self.matrices: dict[str, dict[int, _Matrices]] = {}  # by module, by rank
        self._held: list[Row | None] = []
        self._capacity = 0

    def assign(self, rows: Sequence[Row | None], capacity: int) -> None:
        """Give row i the matrices of `rows[i]`."""
        self._capacity = max(self._capacity, capacity, len(rows))
        wanted = [*rows, *([None] * (max(len(self._held), capacity) - len(rows)))]
        self._held += [None] * (len(wanted) - len(self._held))
        for index, row in enumerate(wanted):
            if (row and row.key) != ((held := self._held[index]) and held.key):
                self._empty(index)
                if row:
                    self._fill(index, row.weights)
                # Keep only the key, so that the weights can be freed.
                self._held[index] = row and Row(row.key, LoraWeights({}))
        for name, ranks in list(self.matrices.items()):
            for rank, matrices in list(ranks.items()):
                if not matrices.filled:
                    del ranks[rank]
                elif len(matrices.a) < self._capacity:
                    matrices.a, matrices.b = _grown(matrices.a, self._capacity), _grown(matrices.b, self._capacity)
            if not ranks:
                del self.matrices[name]

    def _empty(self, index: int) -> None:
        for ranks in self.matrices.values():
            for matrices in ranks.values():
                if index in matrices.filled:
                    matrices.filled.discard(index)
                    matrices.a[index] = 0
                    matrices.b[index] = 0

    def _fill(self, index: int, weights: LoraWeights) -> None:
        for name, pair in weights.pairs.items():
            own, inputs = pair.a.shape
            rank = next((rank for rank in LORA_RANKS if rank >= own), own)
            ranks = self.matrices.setdefault(name, {})
            if rank not in ranks:
                outputs = pair.b.shape[0]
                ranks[rank] = _Matrices(
                    torch.zeros(self._capacity, inputs, rank), torch.zeros(self._capacity, rank, outputs), set()
                )
            matrices = ranks[rank]
            if index >= len(matrices.a):
                matrices.a, matrices.b = _grown(matrices.a, self._capacity), _grown(matrices.b, self._capacity)
            matrices.a[index, :, :own] = pair.a.T
            matrices.b[index, :own] = pair.b.T
            matrices.filled.add(index)


def _grown(tensor: Any, rows: int) -> Any:
    return torch.cat([tensor, tensor.new_zeros(rows - tensor.shape[0], *tensor.shape[1:])])
