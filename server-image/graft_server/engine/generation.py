"""The generation core: one thread owns the model and steps all running sequences.

Each turn of the loop admits sequences, reads prompts within a budget, and gives every running sequence one token.
Sequences of all adapters and of the base model share each step. This module knows nothing about HTTP.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from graft_server.engine.adapters import AdapterWeights
from graft_server.engine.network import Network, Step
from graft_server.engine.residency import Adapter, Residency
from graft_server.engine.sequence import Output, Sequence

log = logging.getLogger(__name__)

T = TypeVar("T")
PREFILL_CHUNK = 512  # prompt tokens read per turn, so that a long prompt does not stall the other answers
MAX_ADAPTER_WAIT = 2.0  # seconds in which other sequences may overtake one that waits for one of the max_loras places
LOADING_THREADS = 2
TOO_LATE = Output(finish_reason="timeout", error="the answer took longer than the server allows (--request-timeout)")
TOO_LONG_QUEUED = Output(
    finish_reason="abort", error="the server is overloaded: the request waited too long in the queue"
)
QUEUE_POLL = 0.05  # seconds between two checks of the deadlines while nothing runs


class OverloadedError(Exception):
    """The queue is full."""


class StoppedError(Exception):
    """The engine's thread has ended."""


@dataclass(frozen=True)
class Capacity:
    """The limits of one engine: running and waiting sequences, seconds of waiting, different adapters that run."""

    max_num_seqs: int
    max_waiting: int
    queue_timeout: float
    max_loras: int


@dataclass(frozen=True)
class Activity:
    """A snapshot for the metrics. Each adapter is named once."""

    running: int
    waiting: int
    running_adapters: list[str]
    waiting_adapters: list[str]
    resident_adapters: list[str]


class Engine:
    """The runner of sequences. `submit`, `cancel`, `keep`, `call` and `activity` may be called from any thread."""

    def __init__(
        self, network: Network, residency: Residency, load: Callable[[str], AdapterWeights], capacity: Capacity
    ) -> None:
        """Create the engine. `load` reads an adapter from its path, on other threads, in parallel with the steps."""
        self.network = network
        self.residency = residency
        self._load = load
        self._capacity = capacity
        self._wake = threading.Condition()
        self._calls: deque[Callable[[], None]] = deque()
        self._waiting: deque[Sequence] = deque()
        self._reading: list[Sequence] = []  # admitted, but their prompts are not completely read
        self._rows: list[Sequence] = []  # sequences that share the steps; each keeps its index as long as possible
        self._loading: dict[Adapter, Future[AdapterWeights]] = {}
        self._loaders = ThreadPoolExecutor(LOADING_THREADS, thread_name_prefix="adapters")
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread after its current turn. Sequences that still run end with the reason `abort`."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join()
        self._loaders.shutdown(cancel_futures=True)

    @property
    def alive(self) -> bool:
        """Return whether the thread runs and is not stopping."""
        return self._thread.is_alive() and not self._stopping

    def submit(self, sequences: list[Sequence]) -> None:
        """Queue all sequences or none. Raises OverloadedError if the queue is full, and StoppedError after `stop`."""
        with self._wake:
            if self._stopping:
                raise StoppedError
            free = self._capacity.max_num_seqs - len(self._running())
            if len(self._waiting) + len(sequences) > self._capacity.max_waiting + max(free, 0):
                raise OverloadedError
            self._waiting.extend(sequences)
            self._wake.notify()

    def cancel(self, sequences: list[Sequence]) -> None:
        """Drop sequences at the next turn, queued or running. One more token may still be emitted."""
        with self._wake:
            for sequence in sequences:
                sequence.cancelled = True
            self._wake.notify()

    def keep(self, adapter: Adapter, weights: AdapterWeights) -> None:
        """Put an adapter that was read into memory. Do not wait for the current turn, which a long prompt may slow."""
        self.residency.put(adapter, weights)
        self.call(lambda: None)  # trigger a turn: at its end, adapters beyond the limit are evicted

    def call(self, function: Callable[[], T]) -> Future[T]:
        """Run a function on the engine's thread between two turns, when nothing else uses the model."""
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
        """Return what runs and waits now."""
        with self._wake:
            running = self._running()
            return Activity(
                running=len(running),
                waiting=len(self._waiting),
                running_adapters=_names(running),
                waiting_adapters=_names(self._waiting),
                resident_adapters=self.residency.names(),
            )

    # The methods below run on the engine's thread. Other threads call only _running and _notify.

    def _run(self) -> None:
        try:
            while self._next_turn():
                self._drop_ended()
                self._admit()
                self._read_prompts()
                self._step()
                self._trim()
        except BaseException:
            log.exception("the engine's thread failed; the engine stops")
            raise
        finally:
            self._abort()

    def _next_turn(self) -> bool:
        """Wait for work and run the functions given to `call`. Return False when the engine stops."""
        with self._wake:
            while not (self._stopping or self._calls or self._waiting or self._running() or self._any_read()):
                self._wake.wait()
            if not (self._stopping or self._calls or self._running()) and self._all_loading():
                self._wake.wait(QUEUE_POLL)
            if self._stopping:
                return False
            calls, self._calls = self._calls, deque()
        for call in calls:
            call()
        return True

    def _any_read(self) -> bool:
        return any(future.done() for future in self._loading.values())

    def _all_loading(self) -> bool:
        loading = [self._loading.get(sequence.adapter) for sequence in self._waiting if sequence.adapter]
        return len(loading) == len(self._waiting) and all(future and not future.done() for future in loading)

    def _running(self) -> list[Sequence]:
        return [*self._reading, *self._rows]

    def _drop_ended(self) -> None:
        """Drop cancelled and overdue sequences, queued or running."""
        now = time.monotonic()
        queued_since = now - self._capacity.queue_timeout
        with self._wake:
            stale = [seq for seq in self._waiting if seq.arrived < queued_since]
            late = [seq for seq in [*self._waiting, *self._running()] if seq.expires < now]
            gone = {seq for seq in [*self._waiting, *self._running()] if seq.cancelled} | {*stale, *late}
            if not gone:
                return
            self._waiting = deque(seq for seq in self._waiting if seq not in gone)
            self._reading = [seq for seq in self._reading if seq not in gone]
            self._leave(gone)
        for sequence in {*stale, *late}:
            if not sequence.cancelled:
                sequence.emit(TOO_LATE if sequence in late else TOO_LONG_QUEUED)

    def _admit(self) -> None:
        """Start queued sequences, first come first served.

        A sequence may overtake sequences that wait for their adapter. They wait for one of the max_loras places (others
        overtake them for at most MAX_ADAPTER_WAIT seconds), or until their adapter is read from disk.
        """
        now = time.monotonic()
        admitted: list[Sequence] = []
        failed: list[tuple[Sequence, str]] = []
        with self._wake:
            running = self._running()
            adapters = {sequence.adapter for sequence in running if sequence.adapter}
            for sequence in list(self._waiting):
                if len(running) + len(admitted) >= self._capacity.max_num_seqs:
                    break
                adapter = sequence.adapter
                if adapter and adapter not in adapters and len(adapters) >= self._capacity.max_loras:
                    sequence.passed_over = sequence.passed_over or now
                    if now - sequence.passed_over > MAX_ADAPTER_WAIT:
                        break
                    continue
                if adapter:
                    adapters.add(adapter)
                    try:
                        if not self._ready(adapter):
                            continue
                    except Exception as error:
                        failed.append((sequence, f"cannot reload adapter {adapter.name!r}: {error}"))
                        self._waiting.remove(sequence)
                        continue
                self._waiting.remove(sequence)
                admitted.append(sequence)
            for sequence, _ in failed:
                self._loading.pop(sequence.adapter, None)  # type: ignore[arg-type]
            self._reading.extend(admitted)
        for sequence, message in failed:
            log.warning("%s", message)
            sequence.emit(Output(finish_reason="error", error=message))
        for sequence in admitted:
            weights = self.residency.use(sequence.adapter) if sequence.adapter else None
            sequence.begin(self.network.begin(), weights)

    def _ready(self, adapter: Adapter) -> bool:
        """Return whether an adapter is in memory. If not, another thread reads it from its path while steps continue.

        Raises the error that the read raised.
        """
        if adapter in self.residency:
            return True
        if adapter not in self._loading:
            self._loading[adapter] = self._loaders.submit(self._load, adapter.path)
            self._loading[adapter].add_done_callback(lambda _: self._notify())
            return False
        if not self._loading[adapter].done():
            return False
        weights = self._loading[adapter].result()
        del self._loading[adapter]
        self.residency.put(adapter, weights)
        log.info("reloaded adapter %s from %s", adapter.name, adapter.path)
        return True

    def _notify(self) -> None:
        with self._wake:
            self._wake.notify()

    def _read_prompts(self) -> None:
        """Read unread prompts, oldest first, until the budget is used. A prompt that is read gets its first token."""
        budget = PREFILL_CHUNK
        for sequence in list(self._reading):
            if budget <= 0:
                return
            budget -= self._read(sequence)

    def _read(self, sequence: Sequence) -> int:
        """Read one chunk of a prompt. Return its length in tokens. An encoder needs the whole prompt at once."""
        whole = self.network.reads_whole
        chunk = sequence.prompt if whole else sequence.prompt[sequence.read : sequence.read + PREFILL_CHUNK]
        try:
            weights = self.residency.use(sequence.adapter) if sequence.adapter else None
            every = sequence.wants_prompt_logprobs
            logits = self.network.read(_context(sequence), chunk, weights, every)
            if every:
                sequence.note_prompt(logits, sequence.read)
            sequence.read += len(chunk)
            if sequence.read < len(sequence.prompt):
                return len(chunk)
            self.network.share(_context(sequence))
        except Exception as error:
            log.exception("reading a prompt failed")
            with self._wake:
                self._reading.remove(sequence)
            sequence.emit(Output(finish_reason="error", error=f"the forward pass failed: {error}"))
            return len(chunk)
        output = sequence.advance(logits[-1])
        with self._wake:
            self._reading.remove(sequence)
            if output.finish_reason is None:
                self._rows.append(sequence)
        sequence.emit(output)
        return len(chunk)

    def _step(self) -> None:
        """Give every row its next token."""
        rows = list(self._rows)
        if not rows:
            return
        try:
            repeatable = any(row.sampling.seed is not None for row in rows)
            logits = self.network.step([Step(_context(row), row.last, row.lora) for row in rows], repeatable)
        except Exception as error:  # the caches are in an unknown state: these rows fail, the engine continues
            log.exception("a decoding step failed")
            with self._wake:
                self._rows.clear()
            for row in rows:
                row.emit(Output(finish_reason="error", error=f"the forward pass failed: {error}"))
            return
        outputs = [(row, row.advance(row_logits)) for row, row_logits in zip(rows, logits, strict=True)]
        with self._wake:
            self._leave({row for row, output in outputs if output.finish_reason is not None})
        for row, output in outputs:
            row.emit(output)

    def _leave(self, gone: set[Sequence]) -> None:
        """Remove rows. The last rows fill the gaps, so that as few rows as possible change their index."""
        for index in range(len(self._rows) - 1, -1, -1):
            if self._rows[index] in gone:
                self._rows[index] = self._rows[-1]
                self._rows.pop()

    def _trim(self) -> None:
        with self._wake:
            running = {sequence.adapter for sequence in self._running() if sequence.adapter}
            waiting = {sequence.adapter for sequence in self._waiting if sequence.adapter}
        for adapter in [adapter for adapter, future in self._loading.items() if future.done()]:
            if adapter not in waiting:  # no sequence waits for it any more: drop its weights
                del self._loading[adapter]
        self.residency.trim(running, waiting)
        if not self.residency.names():
            self.network.hooks.forget()

    def _abort(self) -> None:
        with self._wake:
            self._stopping = True
            left = [*self._waiting, *self._running()]
            calls, self._calls = self._calls, deque()
            self._waiting.clear()
            self._reading.clear()
            self._rows.clear()
        for sequence in left:
            if not sequence.cancelled:
                sequence.emit(Output(finish_reason="abort", error="the server is shutting down"))
        for call in calls:
            call()  # its caller waits for the result


def _context(sequence: Sequence) -> Any:
    if sequence.context is None:
        raise RuntimeError("the sequence has not begun: call begin first")
    return sequence.context


def _names(sequences: Any) -> list[str]:
    return sorted({sequence.adapter.name for sequence in sequences if sequence.adapter})
