"""Two operators: one works, the other takes over. An operator that was frozen meanwhile does no harm."""

import json
import shutil
import signal
from collections.abc import Iterator

import pytest
from testbed.controlplane import ControlPlane
from testbed.objectstore import S3Server
from testbed.shell import tail, wait_for
from worlds.cluster.operator_process import RIGHTS, SYSTEM, OperatorProcess, from_chart, new_operator
from worlds.cluster.tenant import Tenant

LEASE = "graft-operator"


class Pair:
    """Two operators that elect a leader."""

    def __init__(self, operators: list[OperatorProcess]) -> None:
        self.operators = operators

    def leader(self, timeout: float = 30) -> OperatorProcess:
        """Wait until one operator leads. Return it."""

        def leading() -> list[OperatorProcess]:
            return [one for one in self.operators if one.process is not None and one.leads()]

        wait_for(leading, timeout, "an operator leads", lambda: "\n".join(tail(one.log) for one in self.operators))
        (found,) = leading()
        return found

    def other(self, one: OperatorProcess) -> OperatorProcess:
        return next(item for item in self.operators if item is not one)


@pytest.fixture
def pair(running: OperatorProcess, tenant: Tenant, plane: ControlPlane, s3: S3Server) -> Iterator[Pair]:
    """Run two operators with the rights that the chart gives them, in place of the only one of other tests."""
    manifest = plane.state / "rights-of-two.json"
    rights = from_chart(RIGHTS, operator__replicas="2", tenants__enabled="true")
    manifest.write_text(json.dumps({"apiVersion": "v1", "kind": "List", "items": rights}))
    plane.kubectl("apply", "-f", str(manifest))
    running.stop()
    operators = []
    for name in ("one", "two"):
        folder = plane.state / f"operator-{name}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        operator = new_operator(folder, running.kubeconfig, s3)
        operator.environment["GRAFT_LEASE"] = LEASE
        operators.append(operator)
    try:
        for operator in operators:
            operator.launch()
        for operator in operators:
            wait_for(operator.healthy, 120, "the operator is healthy", lambda log=operator.log: tail(log))  # type: ignore[misc]
        yield Pair(operators)
    finally:
        for operator in operators:
            operator.kill9()
        tenant.api.delete("Lease", SYSTEM, LEASE)


def transitions(tenant: Tenant) -> int:
    found = tenant.api.get("Lease", SYSTEM, LEASE)
    assert found is not None
    return int(found["spec"]["leaseTransitions"])


def versions(tenant: Tenant) -> list[str]:
    found = [item.get("status", {}).get("resolved", {}) for item in tenant.api.list("FineTuneJob", tenant.name)]
    return sorted(item["version"] for item in found if item.get("version"))


def test_sigterm_hands_over_and_kill_9_does_too(tenant: Tenant, pair: Pair) -> None:
    first = pair.leader()
    second = pair.other(first)
    tenant.job("one")
    tenant.running_pod("one")
    generation = transitions(tenant)
    assert not second.leads()
    first.stop()
    assert pair.leader(10) is second
    assert transitions(tenant) == generation + 1
    tenant.job("two")
    tenant.running_pod("two")

    first.launch()
    wait_for(first.healthy, 120, "the operator is healthy", lambda: tail(first.log))
    second.kill9()
    assert pair.leader() is first
    assert transitions(tenant) == generation + 2
    tenant.job("three")
    tenant.running_pod("three")
    assert len(set(versions(tenant))) == 3


def test_a_leader_that_was_frozen_does_no_harm_when_it_goes_on(tenant: Tenant, pair: Pair) -> None:
    frozen = pair.leader()
    tenant.job("before")
    tenant.running_pod("before")
    assert frozen.process is not None
    frozen.process.send_signal(signal.SIGSTOP)
    for number in range(10):  # the frozen operator finds their events when it goes on
        tenant.job(f"during-{number}")
    try:
        wait_for(pair.other(frozen).leads, 30, "the other operator leads", lambda: tail(pair.other(frozen).log))
        for number in range(10):
            tenant.running_pod(f"during-{number}")
    finally:
        frozen.process.send_signal(signal.SIGCONT)
    wait_for(lambda: frozen.process is None or frozen.process.poll() is not None, 30, "the former leader has ended")
    tenant.job("after")
    tenant.running_pod("after")
    assert len(set(versions(tenant))) == 12
    assert len(tenant.api.list("Job", tenant.name)) == 12
    assert pair.other(frozen).leads()
