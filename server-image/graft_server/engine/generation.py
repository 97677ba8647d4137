"""The generation core: one thread owns the model and steps everything that runs.

Every turn of the loop admits what may run, feeds the oldest unread prompt one chunk, and gives every running
sequence one token. Sequences of all adapters and of the base model share the batch. It knows nothing about HTTP.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from graft_server.engine.batch import Batch, can_share, new_cache
from graft_server.engine.model import BaseModel
from graft_server.engine.residency import Adapter, Residency
from graft_server.engine.sampling import Sampling, next_token
from graft_server.engine.text import TextStream

log = logging.getLogger(__name__)

T = TypeVar("T")
PREFILL_CHUNK = 512  # tokens of a prompt read per turn: a long prompt does not stall the others' answers
MAX_ADAPTER_WAIT = 2.0  # seconds a sequence may be overtaken while it waits for one of the max_loras places


class OverloadedError(Exception):
    """The queue is full."""


class StoppedError(Exception):
    """The engine's thread has ended."""


@dataclass(frozen=True)
class Output:
    """What a sequence says after a turn: new text, and at the end why it ended (`error` says what went wrong)."""

    text: str = ""
    tokens: int = 0
    finish_reason: str | None = None
    error: str | None = None


@dataclass(eq=False)
class Sequence:
    """One answer in the making. `emit` is called on the engine's thread and must not block."""

    prompt: list[int]
    adapter: Adapter | None
    sampling: Sampling
    max_tokens: int
    eos_ids: frozenset[int]
    text: TextStream
    emit: Callable[[Output], None]
    arrived: float = field(default_factory=time.monotonic)
    started: float | None = None
    cancelled: bool = False
    _passed_over: float | None = None  # since when others overtake it
    _generator: Any = None
    _cache: Any = None
    _read: int = 0  # tokens of the prompt in the cache
    _generated: int = 0
    _last: int = 0


@dataclass(frozen=True)
class Activity:
    """A snapshot for metrics. Adapters are named once each."""

    running: int
    waiting: int
    running_adapters: list[str]
    waiting_adapters: list[str]
    resident_adapters: list[str]


class Engine:
    """Runs sequences. `submit`, `cancel`, `call` and `activity` may be called from any thread."""

    def __init__(self, base: BaseModel, residency: Residency, max_num_seqs: int, max_waiting: int, max_loras: int):
        self._base = base
        self.residency = residency
        self._max_running = max_num_seqs
        self._max_waiting = max_waiting
        self._max_loras = max_loras
        self._wake = threading.Condition()
        self._calls: deque[Callable[[], None]] = deque()
        self._waiting: deque[Sequence] = deque()
        self._reading: list[Sequence] = []  # admitted, their prompts not wholly in the cache
        self._batches: list[Batch[Sequence]] = []
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after its current turn; whatever still runs ends with the reason `abort`."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive() and not self._stopping

    def submit(self, sequences: list[Sequence]) -> None:
        """Queues sequences, all or none. Raises OverloadedError where the queue has no room for them."""
        with self._wake:
            if self._stopping:
                raise StoppedError
            free = self._max_running - len(self._running())
            if len(self._waiting) + len(sequences) > self._max_waiting + max(free, 0):
                raise OverloadedError
            self._waiting.extend(sequences)
            self._wake.notify()

    def cancel(self, sequences: list[Sequence]) -> None:
        """Drops sequences wherever they are, at the next turn: one more token may still be emitted."""
        with self._wake:
            for sequence in sequences:
                sequence.cancelled = True
            self._wake.notify()

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Runs a function on the engine's thread between two turns, where nothing else touches the model."""
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        with self._wake:
            if self._stopping:
                raise StoppedError
            self._calls.append(run)
            self._wake.notify()
        return future

    def activity(self) -> Activity:
        """What runs and waits now."""
        with self._wake:
            running = self._running()
            return Activity(
                running=len(running),
                waiting=len(self._waiting),
                running_adapters=_names(running),
                waiting_adapters=_names(self._waiting),
                resident_adapters=self.residency.names(),
            )

    # What follows runs on the engine's thread.

    def _run(self) -> None:
        try:
            while self._next_turn():
                self._drop_cancelled()
                self._admit()
                self._read_prompts()
                for batch in list(self._batches):
                    self._decode(batch)
                self._trim()
        except BaseException:
            log.exception("the engine's thread failed")
            raise
        finally:
            self._abort()

    def _next_turn(self) -> bool:
        """Waits for work and runs what `call` asked for. False when the engine stops."""
        with self._wake:
            while not (self._stopping or self._calls or self._waiting or self._running()):
                self._wake.wait()
            if self._stopping:
                return False
            calls, self._calls = self._calls, deque()
        for call in calls:
            call()
        return True

    def _running(self) -> list[Sequence]:
        return [*self._reading, *(row for batch in self._batches for row in batch.rows)]

    def _drop_cancelled(self) -> None:
        with self._wake:
            self._waiting = deque(sequence for sequence in self._waiting if not sequence.cancelled)
            self._reading = [sequence for sequence in self._reading if not sequence.cancelled]
            for batch in list(self._batches):
                self._keep(batch, [row for row in batch.rows if not row.cancelled])

    def _admit(self) -> None:
        """Moves sequences from the queue into the run, first come first served, except that a sequence may pass
        others that wait for a place among the max_loras adapters, for a while."""
        now = time.monotonic()
        admitted: list[Sequence] = []
        with self._wake:
            running = self._running()
            adapters = {sequence.adapter for sequence in running if sequence.adapter}
            for sequence in list(self._waiting):
                if len(running) + len(admitted) >= self._max_running:
                    break
                adapter = sequence.adapter
                if adapter and adapter not in adapters and len(adapters) >= self._max_loras:
                    sequence._passed_over = sequence._passed_over or now
                    if now - sequence._passed_over > MAX_ADAPTER_WAIT:
                        break
                    continue
                if adapter:
                    adapters.add(adapter)
                self._waiting.remove(sequence)
                admitted.append(sequence)
            self._reading.extend(admitted)
        for sequence in admitted:
            try:
                if sequence.adapter:
                    self.residency.ensure(sequence.adapter)
            except Exception as error:
                log.warning("adapter %s cannot be used: %s", sequence.adapter and sequence.adapter.name, error)
                self._reading.remove(sequence)
                sequence.emit(Output(finish_reason="error", error=str(error)))
                continue
            sequence.started = time.monotonic()
            sequence._generator = sequence.sampling.generator()
            sequence._cache = new_cache(self._base.network.config)

    def _read_prompts(self) -> None:
        """Feeds the oldest unread prompt one chunk; a prompt that is read gets its first token and joins a batch."""
        if not self._reading:
            return
        sequence = self._reading[0]
        chunk = sequence.prompt[sequence._read : sequence._read + PREFILL_CHUNK]
        try:
            inputs = {"input_ids": torch.tensor([chunk]), "past_key_values": sequence._cache}
            logits = self.residency.forward(inputs, [sequence.adapter])
        except Exception as error:
            log.exception("reading a prompt failed")
            self._reading.remove(sequence)
            sequence.emit(Output(finish_reason="error", error=f"the forward pass failed: {error}"))
            return
        sequence._read += len(chunk)
        if sequence._read < len(sequence.prompt):
            return
        output = self._advance(sequence, logits[0])
        with self._wake:
            self._reading.remove(sequence)
            cache, sequence._cache = sequence._cache, None
            if output.finish_reason is None:
                self._join(sequence, cache)
        sequence.emit(output)

    def _join(self, sequence: Sequence, cache: Any) -> None:
        shared = can_share(cache, self._base.network.config)
        if shared and (batch := next((batch for batch in self._batches if batch.shared), None)):
            batch.join(sequence, cache, sequence._read)
        else:
            self._batches.append(Batch(sequence, cache, sequence._read, shared))

    def _decode(self, batch: Batch[Sequence]) -> None:
        """Gives every sequence of a batch its next token."""
        try:
            inputs = batch.inputs([row._last for row in batch.rows])
            logits = self.residency.forward(inputs, [row.adapter for row in batch.rows])
        except Exception as error:  # the cache is in an unknown state: the whole batch is lost, the engine is not
            log.exception("a step failed")
            with self._wake:
                self._batches.remove(batch)
            for row in batch.rows:
                row.emit(Output(finish_reason="error", error=f"the forward pass failed: {error}"))
            return
        outputs = [(row, self._advance(row, row_logits)) for row, row_logits in zip(batch.rows, logits, strict=True)]
        with self._wake:
            self._keep(batch, [row for row, output in outputs if output.finish_reason is None])
        for row, output in outputs:
            row.emit(output)

    def _advance(self, sequence: Sequence, logits: Any) -> Output:
        """Picks the next token. Returns what it says, which the caller emits when its own books are in order."""
        try:
            token = next_token(logits, sequence.sampling, sequence._generator)
            sequence._last = token
            sequence._generated += 1
            reason = None
            if token in sequence.eos_ids:
                text, reason = sequence.text.finish(), "stop"
            else:
                text = sequence.text.push(token)
                if sequence.text.stopped:
                    reason = "stop"
                elif sequence._generated >= sequence.max_tokens:
                    text += sequence.text.finish()
                    reason = "stop" if sequence.text.stopped else "length"
        except Exception as error:
            log.exception("picking a token failed")
            return Output(finish_reason="error", error=str(error))
        return Output(text=text, tokens=sequence._generated, finish_reason=reason)

    def _keep(self, batch: Batch[Sequence], rows: list[Sequence]) -> None:
        if len(rows) == len(batch.rows):
            return
        if rows:
            batch.keep([batch.rows.index(row) for row in rows])
        else:
            self._batches.remove(batch)

    def _trim(self) -> None:
        with self._wake:
            running = {sequence.adapter for sequence in self._running() if sequence.adapter}
            waiting = {sequence.adapter for sequence in self._waiting if sequence.adapter}
        self.residency.trim(running, waiting)

    def _abort(self) -> None:
        with self._wake:
            self._stopping = True
            left = [*self._waiting, *self._running()]
            calls, self._calls = self._calls, deque()
            self._waiting.clear()
            self._reading.clear()
            self._batches.clear()
        for sequence in left:
            if not sequence.cancelled:
                sequence.emit(Output(finish_reason="abort", error="the server is shutting down"))
        for call in calls:
            call()  # its caller waits for an answer


def _names(sequences: Any) -> list[str]:
    return sorted({sequence.adapter.name for sequence in sequences if sequence.adapter})
