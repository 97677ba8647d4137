"""One operator behind two proxies, its clean run, and runs with faults that are compared with it."""

import contextlib
import itertools
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

from graft.artifacts.store import S3Store
from testbed.controlplane import ControlPlane
from testbed.faults import FaultyProxy, Strike
from testbed.shell import Failed, tail, wait_for

from worlds.cluster.api import Api
from worlds.cluster.tenants import bind, make_namespace
from worlds.faults.apiproxy import ApiProxy, call_of
from worlds.faults.forked import ForkedOperator
from worlds.faults.life import Life
from worlds.faults.snapshot import differences, events, outdated, snapshot

MUTATING = {"POST", "PUT", "PATCH", "DELETE"}
NUMBERS = itertools.count(1)
QUIET = 7.0  # seconds without a write; more than the operator's interval for running jobs (SOON)
# The phases end in these conditions. They are True or False, so their Events are written before the status, at least once.
NEEDED = ("Published", "Verified", "Complete", "Serving", "DatasetInvalid")


@dataclass(frozen=True)
class Recovery:
    """How long a phase took in which one request was struck."""

    phase: str
    struck: str  # the request; empty if the phase had fewer requests
    seconds: float
    undisturbed: float  # seconds of the same phase without faults
    restart: float  # seconds of a restart of the operator

    @property
    def ratio(self) -> float:
        """Seconds divided by twice the undisturbed seconds and a restart. The goal is at most 1."""
        return self.seconds / (2 * self.undisturbed + self.restart)


RECOVERIES: list[Recovery] = []


@dataclass(frozen=True)
class Phase:
    """What one phase of a life left, and what it took."""

    state: dict[str, Any]
    events: set[str]
    writes: list[str]  # the mutating requests, in order
    seconds: float


@dataclass
class Bed:
    """An operator, its API server and store, and the proxies before both."""

    plane: ControlPlane
    api: Api
    store: S3Store
    at_api: ApiProxy
    at_store: FaultyProxy
    operator: ForkedOperator
    clean: dict[str, Phase] = field(default_factory=dict)
    restart_seconds: float = 0.0
    writes: list[str] = field(default_factory=list)  # the mutating requests about the tenant, in order
    struck: str = ""  # the request that was struck
    _about: str = "nothing"
    _count: int = 0
    _strike_at: int = 0
    _strike: Strike | Callable[[], None] | None = None
    _restart: threading.Thread | None = None

    def __post_init__(self) -> None:
        self.at_api.strike = self._at_api
        self.at_store.strike = self._at_store
        self.at_api.kill = self.at_store.kill = self.kill

    # A run of one tenant.

    def new_life(self) -> Life:
        """Create a tenant. From now on the requests about this tenant are counted."""
        tenant = make_namespace(self.api, self.store, f"life-{next(NUMBERS):05d}")
        bind(tenant)
        self._about, self.writes = tenant.name, []
        return Life(tenant)

    def run(
        self, life: Life, phases: Collection[str] = (), before: Callable[[str], None] = lambda phase: None
    ) -> dict[str, float]:
        """Play phases, and compare each with the clean run. Return the seconds that each took.

        `before` is called before each phase. Raises Failed with the differences.
        """
        taken = {}
        for name, play in life.phases().items():
            if phases and name not in phases:
                continue
            before(name)
            began = time.monotonic()
            play()
            taken[name] = time.monotonic() - began
            self.same(life, name)
        return taken

    def clean_run(self) -> None:
        """Play a whole life without faults, and keep what each phase leaves."""
        life = self.new_life()
        for name, play in life.phases().items():
            first, began = len(self.writes), time.monotonic()
            play()
            seconds = time.monotonic() - began
            self.silent(life, 2.0)
            state = snapshot(self.api, self.store, life.tenant.name)
            self.clean[name] = Phase(state, events(self.api, life.tenant.name), self.writes[first:], seconds)

    def same(self, life: Life, phase: str, timeout: float = 60) -> None:
        """Wait until a phase has left the same as in the clean run, with the Events on which people act."""
        clean, name = self.clean[phase], life.tenant.name
        needed = {event for event in clean.events if event.endswith(NEEDED)}

        def wrong() -> list[str]:
            lines = differences(clean.state, snapshot(self.api, self.store, name))
            lines += [f"{item}: the status is of an older generation" for item in outdated(self.api, name)]
            return lines + [f"there is no Event {event}" for event in sorted(needed - events(self.api, name))]

        wait_for(
            lambda: not wrong(), timeout, f"{name} is after `{phase}` as without faults (struck: {self.struck})",
            lambda: "\n".join([*wrong(), self.log(name)]),
        )  # fmt: skip

    def silent(self, life: Life, seconds: float = QUIET, timeout: float = 60) -> None:
        """Wait until nothing was written about the tenant for some seconds."""
        last, since, until = len(self.writes), time.monotonic(), time.monotonic() + timeout
        while time.monotonic() - since < seconds:
            if len(self.writes) != last:
                last, since = len(self.writes), time.monotonic()
            if time.monotonic() > until:
                raise Failed(f"{life.tenant.name}: no silence of {seconds} s. The last writes: {self.writes[-10:]}")
            time.sleep(0.1)

    def log(self, namespace: str) -> str:
        """Return the operator's last lines about a namespace, and its last lines."""
        lines = self.operator.log.read_text(errors="replace").splitlines()
        about = [line[:600] for line in lines if namespace in line][-8:]
        return "\n".join(["the operator's log:", *about, tail(self.operator.log, 3)])

    # The API server's process.

    @contextlib.contextmanager
    def stopped_api(self, *, killed: bool = False) -> Iterator[None]:
        """Stop the API server during the block: it hangs, or, if it is killed, it refuses connections."""
        processes = self.plane.processes
        processes.signal("kube-apiserver", signal.SIGKILL if killed else signal.SIGSTOP)
        try:
            yield
        finally:
            if killed:
                processes.start_again("kube-apiserver")
            else:
                processes.signal("kube-apiserver", signal.SIGCONT)
            wait_for(self._answers, 60, "the API server answers")

    def _answers(self) -> bool:
        return self.plane.kubectl("get", "--raw", "/readyz", check=False).strip() == "ok"

    # The operator's process.

    def kill(self) -> None:
        """Kill the operator, and start it again in the background, as the kubelet does. Called from a proxy's thread."""
        assert self.operator.process is not None
        self.operator.process.kill()
        self._restart = threading.Thread(target=self._start_again)
        self._restart.start()

    def _start_again(self) -> None:
        self.operator.kill9()
        self.operator.launch()

    def healthy(self) -> None:
        """Wait until the operator works. Start it if a test has stopped it."""
        if self._restart is not None:
            self._restart.join()
            self._restart = None
        if self.operator.process is None or self.operator.process.poll() is not None:
            self.operator.kill9()
            self.operator.launch()
        wait_for(self.operator.healthy, 60, "the operator is healthy", lambda: tail(self.operator.log))

    def measure_restart(self) -> None:
        """Kill the operator, and measure how long it takes until it is healthy again."""
        began = time.monotonic()
        self.operator.kill9()
        self.healthy()
        self.restart_seconds = time.monotonic() - began

    def calm(self) -> None:
        """End all faults. The next test begins with a healthy operator."""
        self.spare()
        self.struck = ""
        self.at_api.lift()
        self.at_store.lift()
        self.at_api.open()
        self.healthy()

    # One mutating request of many.

    def strike(self, number: int, how: Strike) -> None:
        """Strike the mutating request with this number, counted from now on, the first is 1."""
        self.struck, self._count, self._strike_at, self._strike = "", 0, number, how

    def meet(self, number: int, act: Callable[[], None]) -> None:
        """Do something just before the mutating request with this number is forwarded."""
        self.struck, self._count, self._strike_at, self._strike = "", 0, number, act

    def spare(self) -> None:
        """Strike no request any more, if the number was not reached."""
        self._strike = None

    def _at_api(self, method: str, path: str, body: bytes) -> Strike | None:
        if method not in MUTATING or self._about.encode() not in path.encode() + body:
            return None
        content = "apply-patch" if "fieldManager" in path and method == "PATCH" and b'"apiVersion"' in body else ""
        return self._write(str(call_of(method, path, content)))

    def _at_store(self, method: str, path: str, body: bytes) -> Strike | None:
        if method not in MUTATING or self._about.encode() not in path.encode() + body:
            return None
        return self._write(f"store {method} {path}")

    def _write(self, text: str) -> Strike | None:
        self.writes.append(text)
        self._count += 1
        if self._strike is None or self._count != self._strike_at:
            return None
        how, self._strike = self._strike, None
        if isinstance(how, Strike):
            self.struck = f"{how.value} {text}"
            return how
        self.struck = text
        how()
        return None
