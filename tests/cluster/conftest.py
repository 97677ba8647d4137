"""Fixtures for the tests of the operator against a real API server with simulated nodes and a real S3 server."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from graft.artifacts.storage import StorageConfig
from graft.artifacts.store import S3Store
from testbed.controlplane import ControlPlane
from testbed.objectstore import S3Server, s3_server
from testbed.shell import tail, wait_for
from worlds.cluster.api import Api
from worlds.cluster.operator_process import BUCKET, OperatorProcess, install_rights, new_operator
from worlds.cluster.plane import simulated_plane
from worlds.cluster.tenant import BASE, Tenant
from worlds.cluster.tenants import bind, make_base_model, new_tenant

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.is_relative_to(HERE):
            item.add_marker(pytest.mark.cluster)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Any:
    """Add the resources, their events and the operator's log to the report of a failed test."""
    report = yield
    arguments = getattr(item, "funcargs", {})
    if report.when == "call" and report.failed and isinstance(arguments.get("tenant"), Tenant):
        tenant, running = arguments["tenant"], arguments.get("running")
        report.sections.append(("resources", _resources(tenant)))
        if isinstance(running, OperatorProcess):
            report.sections.append(("operator's log", _log(running, tenant)))
    return report


def _log(running: OperatorProcess, tenant: Tenant) -> str:
    """Return the operator's log lines about the namespace, and the last 10 lines of the log."""
    lines = running.log.read_text(errors="replace").splitlines()
    return "\n".join([line for line in lines[:-10] if tenant.name in line][-40:] + lines[-10:])


def _resources(tenant: Tenant) -> str:
    lines = []
    for kind in ("FineTuneJob", "Adapter", "AdapterDeployment", "Job", "Pod", "ConfigMap"):
        for item in tenant.api.list(kind, tenant.name):
            if item["metadata"]["name"] == "kube-root-ca.crt":
                continue
            shown = item.get("data") if kind == "ConfigMap" else item.get("status")
            lines.append(f"{kind} {item['metadata']['name']}: {json.dumps(shown)[:3000]}")
    for event in tenant.api.list("CoreEvent", tenant.name):
        lines.append(f"Event {event['involvedObject']['name']} {event['reason']}: {event['message'][:300]}")
    return "\n".join(lines)


@pytest.fixture(scope="session")
def plane() -> Iterator[ControlPlane]:
    with simulated_plane(audited=True) as plane:
        yield plane


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.fixture(scope="session")
def api(plane: ControlPlane) -> Api:
    return Api(plane.server, plane.state / "pki")


@pytest.fixture(scope="session")
def operator(plane: ControlPlane, api: Api, s3: S3Server) -> Iterator[OperatorProcess]:
    """Run one operator for the whole session, with the rights that the chart gives it."""
    process = new_operator(plane.state, install_rights(plane, api), s3)
    process.start()
    yield process
    process.stop()


@pytest.fixture
def running(operator: OperatorProcess, store: S3Store) -> OperatorProcess:
    """Return the running operator. Start it again if an earlier test stopped it."""
    if operator.process is None:
        operator.start()
    return operator


@pytest.fixture(scope="session")
def store(s3: S3Server, operator: OperatorProcess) -> S3Store:
    """Open the bucket with the root key. The operator creates the bucket."""
    store = S3Store(StorageConfig.from_dir(s3.secret_dir(BUCKET)))

    def there() -> bool:
        return BUCKET in [item["Name"] for item in store.client.list_buckets()["Buckets"]]

    wait_for(there, 30, "the operator created the bucket", lambda: tail(operator.log))
    return store


@pytest.fixture(scope="session")
def base_model(api: Api, store: S3Store) -> str:
    """Create a BaseModel that every namespace may use. Return its name."""
    return make_base_model(api, store, BASE)


@pytest.fixture
def tenant(
    api: Api, store: S3Store, running: OperatorProcess, base_model: str, request: pytest.FixtureRequest
) -> Iterator[Tenant]:
    """Yield a fresh namespace that is bound to the operator's role.

    After the test, check that the operator logged no error about this namespace.
    """
    tenant = new_tenant(api, store, request)
    bind(tenant)
    yield tenant
    lines = running.log.read_text(errors="replace").splitlines()
    tenant.give_back()
    assert not [line for line in lines if tenant.name in line and '"level": "error"' in line]


@pytest.fixture
def calm(tenant: Tenant, request: pytest.FixtureRequest) -> Iterator[Tenant]:
    """Yield a second namespace, which is bound like the first."""
    other = new_tenant(tenant.api, tenant.store, request)
    bind(other)
    yield other
    other.give_back()
