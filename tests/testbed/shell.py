"""Run other programs. Print progress for the user, and keep a log to read if a program fails."""

import contextlib
import fcntl
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

TELL_EVERY = 10.0  # seconds between two progress lines of a long step
CACHE = Path(os.environ.get("GRAFT_CACHE", Path.home() / ".cache/graft"))
REPOSITORY = Path(__file__).resolve().parents[2]


class Failed(Exception):
    """A step that failed. The message names the log to read."""


def say(text: str) -> None:
    """Print one line for the user."""
    print(text, flush=True)


def tail(path: Path, lines: int = 25) -> str:
    """Return the last lines of a log."""
    if not path.exists():
        return "(no log)"
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])


@contextlib.contextmanager
def step(name: str) -> Iterator[None]:
    """Announce a step, and print afterwards how long it took."""
    started = time.monotonic()
    say(f"==> {name}")
    yield
    say(f"    {name}: {time.monotonic() - started:.0f} s")


def run(
    command: Sequence[str | Path], log: Path, what: str, env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> None:
    """Run a program with its output in a log, and print progress. Raises Failed with the end of the log if it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    started = told = time.monotonic()
    with log.open("ab") as output:
        process = subprocess.Popen(
            [str(part) for part in command], stdout=output, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            env={**os.environ, **(env or {})}, cwd=cwd,
        )  # fmt: skip
        try:
            while process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.5)
                if time.monotonic() - told > TELL_EVERY:
                    told = time.monotonic()
                    last = tail(log, 1).strip()[-90:]
                    say(f"    {what}: {told - started:.0f} s  {last}")
        except BaseException:
            process.kill()
            process.wait()
            raise
    if process.returncode != 0:
        raise Failed(
            f"{what} failed with exit code {process.returncode}. The log is {log}. Its last lines:\n{tail(log)}"
        )


@contextlib.contextmanager
def meanwhile(act: Callable[[int], None], every: float) -> Iterator[None]:
    """Call `act` with 0, 1, 2 … in a thread during the block, with `every` seconds between two calls.

    An exception of `act` ends the calls. It is raised at the end of the block.
    """
    over, errors = threading.Event(), list[BaseException]()

    def loop() -> None:
        number = 0
        try:
            while not over.wait(every):
                act(number)
                number += 1
        except BaseException as error:  # raised below in the thread of the block
            errors.append(error)

    thread = threading.Thread(target=loop, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
    if errors:
        raise errors[0]


@contextlib.contextmanager
def ticking(what: str) -> Iterator[None]:
    """Print a progress line every few seconds during the block."""
    started = time.monotonic()
    with meanwhile(lambda _: say(f"    {what}: {time.monotonic() - started:.0f} s"), TELL_EVERY):
        yield


def output(command: Sequence[str | Path], env: Mapping[str, str] | None = None, check: bool = True) -> str:
    """Run a short program. Return its output. Raises Failed with its error output if it fails."""
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, env={**os.environ, **(env or {})}, check=False
    )
    if check and done.returncode != 0:
        raise Failed(f"{' '.join(map(str, command))}: {(done.stderr or done.stdout).strip()[-2000:]}")
    return done.stdout


def wait_for(predicate: Callable[[], object], timeout: float, what: str, explain: Callable[[], str] = str) -> None:
    """Wait until the predicate is true. Raises Failed with `what` and the text of `explain` after the timeout."""
    deadline = time.monotonic() + timeout
    while not predicate():
        if time.monotonic() > deadline:
            raise Failed(f"timed out after {timeout:.0f} s. Expected: {what}\n{explain()}")
        time.sleep(0.1)


@contextlib.contextmanager
def locked(name: str) -> Iterator[None]:
    """Hold a lock during the block, because builds of several processes write to shared caches."""
    path = CACHE / "locks" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"    waiting for another process that holds the lock {path}")
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def main_guard(body: Callable[[], None]) -> int:
    """Run a command's body. Print one message instead of a traceback if a step fails. Return the exit code."""
    try:
        body()
    except Failed as error:
        print(f"\nFAILED: {error}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    return 0
