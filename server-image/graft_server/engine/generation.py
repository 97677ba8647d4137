"""The generation core: one thread owns the model and steps everything that runs.

Every turn of the loop admits what may run, reads prompts within a budget, and gives every running sequence one token.
Sequences of all adapters and of the base model share each step. It knows nothing about HTTP.
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
PREFILL_CHUNK = 512  # tokens of prompts read per turn: a long prompt does not stall the others' answers
MAX_ADAPTER_WAIT = 2.0  # seconds a sequence may be overtaken while it waits for one of the max_loras places
LOADING_THREADS = 2
TOO_LATE = Output(finish_reason="timeout", error="the answer took longer than the server allows")
TOO_LONG_QUEUED = Output(finish_reason="abort", error="the server is overloaded: the request waited too long")
QUEUE_POLL = 0.05  # seconds between two looks at deadlines while nothing runs


class OverloadedError(Exception):
    """The queue is full."""


class StoppedError(Exception):
    """The engine's thread has ended."""


@dataclass(frozen=True)
class Capacity:
    """How much runs and waits at once: sequences, waiting ones, seconds of waiting, different adapters."""

    max_num_seqs: int
    max_waiting: int
    queue_timeout: float
    max_loras: int


@dataclass(frozen=True)
class Activity:
    """A snapshot for metrics. Adapters are named once each."""

    running: int
    waiting: int
    running_adapters: list[str]
    waiting_adapters: list[str]
    resident_adapters: list[str]


class Engine:
    """Runs sequences. `submit`, `cancel`, `keep`, `call` and `activity` may be called from any thread."""

    def __init__(
        self, network: Network, residency: Residency, load: Callable[[str], AdapterWeights], capacity: Capacity
    ) -> None:
        """`load` reads an adapter from its path; it is called beside the steps, on other threads."""
        self.network = network
        self.residency = residency
        self._load = load
        self._capacity = capacity
        self._wake = threading.Condition()
        self._calls: deque[Callable[[], None]] = deque()
        self._waiting: deque[Sequence] = deque()
        self._reading: list[Sequence] = []  # admitted, their prompts not wholly read
        self._rows: list[Sequence] = []  # they share the steps; one keeps its index while it can
        self._loading: dict[Adapter, Future[AdapterWeights]] = {}
        self._loaders = ThreadPoolExecutor(LOADING_THREADS, thread_name_prefix="adapters")
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
        self._loaders.shutdown(cancel_futures=True)

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive() and not self._stopping

    def submit(self, sequences: list[Sequence]) -> None:
        """Queues sequences, all or none. Raises OverloadedError where the queue has no room for them."""
        with self._wake:
            if self._stopping:
                raise StoppedError
            free = self._capacity.max_num_seqs - len(self._running())
            if len(self._waiting) + len(sequences) > self._capacity.max_waiting + max(free, 0):
                raise OverloadedError
            self._waiting.extend(sequences)
            self._wake.notify()

    def cancel(self, sequences: list[Sequence]) -> None:
        """Drops sequences wherever they are, at the next turn: one more token may still be emitted."""
        with self._wake:
            for sequence in sequences:
                sequence.cancelled = True
            self._wake.notify()

    def keep(self, adapter: Adapter, weights: AdapterWeights) -> None:
        """Takes an adapter that was read. It does not wait for the turn under way, which a long prompt may make last."""
        self.residency.put(adapter, weights)
        self.call(lambda: None)  # a turn, at whose end those beyond the limit are evicted

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
                self._drop_ended()
                self._admit()
                self._read_prompts()
                self._step()
                self._trim()
        except BaseException:
            log.exception("the engine's thread failed")
            raise
        finally:
            self._abort()

    def _next_turn(self) -> bool:
        """Waits for work and runs what `call` asked for. False when the engine stops."""
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
        """Drops what was cancelled and what ran out of time, wherever it is."""
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
        """Moves sequences from the queue into the run, first come first served, except that a sequence may pass
        others that wait for their adapter: for a place among the max_loras, for a while, or to be read from disk."""
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
                        failed.append((sequence, f"adapter {adapter.name!r} cannot be read again: {error}"))
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
        """Whether an adapter is in memory. Where it is not it is read from its path, and the others go on meanwhile.

        Raises what reading it raised.
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
        """Reads unread prompts, oldest first, until the budget is used. One that is read gets its first token."""
        budget = PREFILL_CHUNK
        for sequence in list(self._reading):
            if budget <= 0:
                return
            budget -= self._read(sequence)

    def _read(self, sequence: Sequence) -> int:
        """Reads one chunk of a prompt; returns its length. An encoder needs the whole prompt at once."""
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
        """Gives every row its next token."""
        rows = list(self._rows)
        if not rows:
            return
        try:
            repeatable = any(row.sampling.seed is not None for row in rows)
            logits = self.network.step([Step(_context(row), row.last, row.lora) for row in rows], repeatable)
        except Exception as error:  # the caches are in an unknown state: the rows are lost, the engine is not
            log.exception("a step failed")
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
        """Takes rows out; the last ones fill the holes, so that as few as possible change their index."""
        for index in range(len(self._rows) - 1, -1, -1):
            if self._rows[index] in gone:
                self._rows[index] = self._rows[-1]
                self._rows.pop()

    def _trim(self) -> None:
        with self._wake:
            running = {sequence.adapter for sequence in self._running() if sequence.adapter}
            waiting = {sequence.adapter for sequence in self._waiting if sequence.adapter}
        for adapter in [adapter for adapter, future in self._loading.items() if future.done()]:
            if adapter not in waiting:  # whoever asked for it has left: its weights would stay for nobody
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
            call()  # its caller waits for an answer


def _context(sequence: Sequence) -> Any:
    if sequence.context is None:
        raise RuntimeError("the sequence was not begun")
    return sequence.context


def _names(sequences: Any) -> list[str]:
    return sorted({sequence.adapter.name for sequence in sequences if sequence.adapter})
