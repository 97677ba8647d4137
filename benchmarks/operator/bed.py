"""The bed of the benchmarks: a real API server with etcd and controllers, a real S3 server, simulated nodes, and the
operator as a process with the chart's rights.

The requests of the operator are counted in the API server's audit log. The bare client uses the operator's account, so
its requests are audited, too.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from functools import cached_property
from pathlib import Path

from graft.artifacts.storage import StorageConfig
from graft.artifacts.store import S3Store
from testbed.controlplane import ControlPlane, control_plane
from testbed.objectstore import S3Server, s3_server
from testbed.shell import REPOSITORY, tail, wait_for
from testbed.simulated import add_nodes
from worlds.cluster.api import Api, Object
from worlds.cluster.operator_process import ACCOUNT, BUCKET, SYSTEM, OperatorProcess, install_rights, new_operator
from worlds.cluster.tenant import BASE, Tenant
from worlds.cluster.tenants import bind, make_base_model

USER = f"system:serviceaccount:{SYSTEM}:{ACCOUNT}"
TICK = os.sysconf("SC_CLK_TCK")
PATIENCE = 300.0  # seconds
QUEUE = "bench"  # no Kueue runs, so a queued Job stays suspended: it is complete once it exists


@dataclass(frozen=True)
class Request:
    """One request in the audit log."""

    verb: str
    resource: str  # with the subresource: finetunejobs/status
    at: float  # seconds since the epoch

    @property
    def writes(self) -> bool:
        return self.verb not in {"get", "list", "watch"}


@dataclass
class Audit:
    """The requests of the operator in the order of their ends, read from the API server's log since the last call."""

    path: Path
    read: int = 0  # bytes

    def skip(self) -> None:
        """Forget the requests until now."""
        self.read = self.path.stat().st_size

    def take(self) -> list[Request]:
        """Return the requests since the last call. Watches are left out."""
        with self.path.open("rb") as stream:
            stream.seek(self.read)
            data = stream.read()
        whole = data[: data.rfind(b"\n") + 1]
        self.read += len(whole)
        entries = [json.loads(line) for line in whole.splitlines()]
        return [_request(each) for each in entries if each["verb"] != "watch" and each["user"]["username"] == USER]


def _request(entry: Object) -> Request:
    about = entry.get("objectRef") or {}
    resource = "/".join(filter(None, (about.get("resource", entry["requestURI"]), about.get("subresource"))))
    return Request(entry["verb"], resource, datetime.fromisoformat(entry["requestReceivedTimestamp"]).timestamp())


def counts(requests: list[Request]) -> dict[str, int]:
    """Return how often each verb was used for each resource, the most frequent first."""
    return dict(Counter(f"{found.verb} {found.resource}" for found in requests).most_common())


@dataclass
class Cost:
    """The CPU time and the memory of a process."""

    pid: int

    def cpu(self) -> float:
        """Return the seconds of CPU time that the process has used."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICK

    def memory(self) -> tuple[float, float]:
        """Return the resident memory now and at most, in MiB."""
        lines = Path(f"/proc/{self.pid}/status").read_text().splitlines()
        found = {name: value for name, _, value in (line.partition(":") for line in lines)}
        now, most = (int(found[name].split()[0]) / 1024 for name in ("VmRSS", "VmHWM"))
        return now, most


@dataclass
class Bed:
    """One cluster with one operator and one store."""

    plane: ControlPlane
    api: Api
    s3: S3Server
    operator: OperatorProcess
    audit: Audit
    tenants: dict[str, Tenant] = field(default_factory=dict)

    @cached_property
    def store(self) -> S3Store:
        """Open the bucket with the root key."""
        return S3Store(StorageConfig.from_dir(self.s3.secret_dir(BUCKET)))

    @cached_property
    def token(self) -> str:
        """Return a token of the operator's account."""
        return self.api.token(SYSTEM, ACCOUNT)

    @property
    def cost(self) -> Cost:
        assert self.operator.process is not None
        return Cost(self.operator.process.pid)

    def tenant(self, name: str) -> Tenant:
        """Return a namespace that is bound to the operator's role."""
        if name not in self.tenants:
            self.api.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
            self.tenants[name] = BenchTenant(self.api, name, self.store)
            bind(self.tenants[name])
        return self.tenants[name]

    def queued(self, namespace: str, name: str, adapter: str = "support") -> Object:
        """Return a FineTuneJob whose Job is created and stays suspended."""
        return self.tenant(namespace).job_manifest(name, adapter, queue=QUEUE)

    def delete_job(self, namespace: str, name: str) -> None:
        """Delete a FineTuneJob, and wait until it no longer exists."""
        self.api.delete("FineTuneJob", namespace, name)
        wait_for(lambda: self.api.get("FineTuneJob", namespace, name) is None, PATIENCE, f"{name} is deleted")

    def settled(self, seconds: float = 2, timeout: float = 300, *, reads: bool = False) -> float:
        """Wait until the operator writes nothing for `seconds`, and with `reads` sends at most one request.

        Return the time of the last request that counts before that pause (seconds since the epoch), or 0.
        """
        times, deadline, began = [0.0, 0.0], time.monotonic() + timeout, time.time()
        audit = Audit(self.audit.path, self.audit.read)
        while time.monotonic() < deadline:
            times = sorted(times + [found.at for found in audit.take() if reads or found.writes])[-2:]
            last = times[0] if reads else times[1]
            if time.time() - max(last, began) > seconds:
                return last
            time.sleep(0.1)
        raise RuntimeError(f"the operator still works after {timeout} s:\n{tail(self.operator.log)}")

    @contextmanager
    def hanging_store(self) -> Iterator[None]:
        """Stop the store's process during the block: connections stay open, and nothing answers."""
        with self.s3.silent():
            yield


class BenchTenant(Tenant):
    """A tenant whose store is opened once, and who is patient: the machine may have other work."""

    def wait(
        self, predicate: Callable[[], object], what: str, timeout: float = PATIENCE, explain: Callable[[], str] = str
    ) -> None:
        super().wait(predicate, what, max(timeout, PATIENCE), explain)

    def tenant_store(self) -> S3Store:
        found: S3Store | None = self.__dict__.get("_store")
        if found is None:
            found = self.__dict__["_store"] = super().tenant_store()
        return found


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Stop a process during the block: its connections stay open, and it does not answer."""
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@contextmanager
def bed(nodes: int = 2) -> Iterator[Bed]:
    """Start a cluster, a store and the operator. Stop and delete them afterwards."""
    with control_plane(audited=True) as plane, s3_server(keep_alive=True) as s3:
        add_nodes(plane, nodes)
        plane.kubectl("apply", "-f", str(REPOSITORY / "crds"))
        plane.kubectl("wait", "--for=condition=Established", "--timeout=60s", "-f", str(REPOSITORY / "crds"))
        api = Api(plane.server, plane.state / "pki")
        operator = new_operator(plane.state, install_rights(plane, api), s3)
        operator.environment = {}  # as in a pod
        # With the packages of its image. The tests have more, and some of them cost the operator's start a second.
        operator.python = os.environ.get("OPERATOR_PYTHON", sys.executable)
        operator.start()
        found = Bed(plane, api, s3, operator, Audit(plane.audit_log))
        try:
            wait_for(
                lambda: BUCKET in [item["Name"] for item in found.store.client.list_buckets()["Buckets"]],
                60, "the operator created the bucket", lambda: tail(operator.log),
            )  # fmt: skip
            make_base_model(api, found.store, BASE)
            found.tenant("first").job("first", queue=QUEUE)  # connections are open, keys are issued
            wait_for(
                lambda: api.get("Job", "first", "first"), PATIENCE, "the first Job exists", lambda: tail(operator.log)
            )
            found.delete_job("first", "first")
            yield found
        finally:
            operator.stop()


def module(name: str, *arguments: str, environment: dict[str, str] | None = None, log: Path) -> subprocess.Popen[bytes]:
    """Start a module of this package as a process."""
    with log.open("ab") as out:
        return subprocess.Popen(
            [sys.executable, "-m", f"benchmarks.operator.{name}", *arguments],
            env=os.environ | (environment or {}), stdout=out, stderr=out, stdin=subprocess.DEVNULL,
        )  # fmt: skip
