"""Deletions while objects are created, an operator that is absent, and refusals in the middle (rows 10, 12, 17 and 19)."""

import random
from collections.abc import Callable

import pytest
from graft.artifacts.identity import VersityIdentity
from graft.reconcile.shared.storerights import installation_name
from worlds.cluster.operator_process import SYSTEM
from worlds.cluster.tenant import Tenant
from worlds.cluster.tenants import bind
from worlds.faults.bed import Bed

OWNED = ("FineTuneJob", "Job", "ConfigMap", "NetworkPolicy", "Pod")


def left(bed: Bed, tenant: Tenant) -> list[str]:
    """Return what is left of a namespace's jobs."""
    found = [
        f"{kind} {item['metadata']['name']}"
        for kind in OWNED
        for item in tenant.api.list(kind, tenant.name)
        if item["metadata"]["name"] != "kube-root-ca.crt"
    ]
    return found + [item.key for item in bed.store.objects(f"{tenant.name}/")]


def deleted_at(bed: Bed, number: int, *, killed: bool) -> bool:
    """Delete a job at its mutating request with this number. Return whether the job had so many."""
    tenant = bed.new_life().tenant
    deleted = []

    def delete() -> None:
        tenant.api.delete("FineTuneJob", tenant.name, "short")
        deleted.append(number)
        if killed:
            bed.kill()

    bed.meet(number, delete)
    tenant.job("short", resources=None)
    tenant.wait(
        lambda: deleted or tenant.condition("FineTuneJob", "short", "Succeeded").get("reason") == "Preparing",
        "the job is deleted, or its preflight runs",
    )
    tenant.api.delete("FineTuneJob", tenant.name, "short")
    bed.healthy()
    tenant.gone("FineTuneJob", "short")
    tenant.wait(lambda: not left(bed, tenant), "nothing is left", 60, lambda: str(left(bed, tenant)))
    # The next job finds nothing that hinders it. The number that the first one did not reach must not strike it.
    bed.spare()
    tenant.job("short")
    tenant.running_pod("short")
    tenant.api.delete("FineTuneJob", tenant.name, "short")
    return bool(deleted)


@pytest.mark.seconds(25)
@pytest.mark.parametrize("killed", [False, True], ids=["operator lives", "operator is killed"])
def test_a_deletion_during_the_creation_leaves_nothing(bed: Bed, seed: random.Random, killed: bool) -> None:
    for number in seed.sample(range(1, 12), 2):
        deleted_at(bed, number, killed=killed)


@pytest.mark.seconds(90)
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("killed", [False, True], ids=["operator lives", "operator is killed"])
def test_a_deletion_at_each_request_of_the_creation_leaves_nothing(bed: Bed, killed: bool) -> None:
    number = 1
    while deleted_at(bed, number, killed=killed):
        number += 1
    assert number > 8


@pytest.mark.seconds(30)
def test_a_deletion_while_the_operator_is_absent_leaves_nothing(bed: Bed) -> None:
    tenant = bed.new_life().tenant
    tenant.job("short", resources=None)
    tenant.running_pod("short", preflight=True)
    bed.operator.kill9()
    tenant.api.delete("FineTuneJob", tenant.name, "short")
    bed.healthy()
    tenant.gone("FineTuneJob", "short")
    tenant.wait(lambda: not left(bed, tenant), "nothing is left", 60, lambda: str(left(bed, tenant)))


@pytest.mark.seconds(45)
@pytest.mark.parametrize("absent", [False, True], ids=["operator lives", "operator is absent"])
def test_a_deleted_namespace_leaves_no_credential_and_no_rights(bed: Bed, seed: random.Random, absent: bool) -> None:
    """The namespace is deleted while a job is created."""
    tenant = bed.new_life().tenant
    cluster = tenant.api.get("Namespace", None, "kube-system") or {}
    identity = VersityIdentity(
        bed.store, bed.operator.settings["storage"]["endpoint"], installation_name(cluster["metadata"]["uid"], SYSTEM)
    )

    def delete() -> None:
        tenant.api.delete("Namespace", None, tenant.name)
        if absent:
            bed.kill()

    bed.meet(seed.randint(3, 8), delete)  # the creation of a job has at least 8 requests
    tenant.job("short")
    tenant.wait(
        lambda: tenant.api.get("Namespace", None, tenant.name) is None, "the namespace is deleted", 90,
        lambda: str((tenant.api.get("Namespace", None, tenant.name) or {}).get("status")),
    )  # fmt: skip
    bed.healthy()
    tenant.wait(lambda: tenant.name not in identity.tenants(), "its key is revoked", 60)

    def policy() -> str:
        return str(bed.store.client.get_bucket_policy(Bucket="graft")["Policy"])

    tenant.wait(lambda: f"Own{tenant.name}" not in policy(), "its rights are removed", 60)


BROKEN: dict[str, Callable[[Tenant], object]] = {
    "wanted": lambda tenant: tenant.api.delete("ConfigMap", tenant.name, "chat-wanted"),
    "policy": lambda tenant: tenant.api.delete("NetworkPolicy", tenant.name, "chat-serving"),
    "role": lambda tenant: tenant.api.delete("Role", tenant.name, "chat-agent"),
    "labels": lambda tenant: tenant.api.patch(
        "NetworkPolicy", tenant.name, "chat-serving", {"metadata": {"labels": {"graft.dev/owner": "other"}}}
    ),
    "routes": lambda tenant: tenant.api.delete("ConfigMap", SYSTEM, routes(tenant)),
}


def routes(tenant: Tenant) -> str:
    found = tenant.api.list("ConfigMap", SYSTEM, f"graft.dev/component=routes,graft.dev/namespace={tenant.name}")
    return str(found[0]["metadata"]["name"])


@pytest.mark.seconds(35)
def test_children_that_broke_while_the_operator_was_absent_are_mended(bed: Bed) -> None:
    life = bed.new_life()
    bed.run(life, ["tune", "serve"])
    bed.operator.kill9()
    for name, damage in BROKEN.items():
        if name != "policy":  # its labels are changed instead
            damage(life.tenant)
    bed.healthy()
    bed.same(life, "serve")
    bed.silent(life)


@pytest.mark.seconds(40)
def test_a_spec_that_changes_and_changes_back_leaves_the_same(bed: Bed) -> None:
    """Each field, one by one, is changed in the tests that the schema generates. Here they change faster than reconciles."""
    life = bed.new_life()
    bed.run(life, ["tune", "serve"])
    fleet = life.fleet
    for _ in range(10):
        fleet.change(drainSeconds=1, adapters=["support@1.0.0"])
        fleet.change(drainSeconds=None, adapters=["support@latest"])
    bed.same(life, "serve")
    bed.silent(life)


@pytest.mark.seconds(90)
@pytest.mark.parametrize(("resource", "hard"), [("count/jobs.batch", "0"), ("configmaps", "1")])  # the cluster has one
def test_a_quota_that_refuses_a_child_is_reported_and_the_job_continues_later(
    bed: Bed, resource: str, hard: str
) -> None:
    life = bed.new_life()
    tenant = life.tenant
    metadata = {"name": "none", "namespace": tenant.name}
    quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": metadata, "spec": {"hard": {resource: hard}}}
    path = f"/api/v1/namespaces/{tenant.name}/resourcequotas"
    tenant.api.call("POST", path, quota)
    tenant.wait(lambda: tenant.api.call("GET", f"{path}/none").get("status", {}).get("used"), "the quota counts")

    def lift(step: str) -> None:
        if step == "created":
            tenant.until("FineTuneJob", "first", "Accepted", "CreationFailed", says="exceeded quota")
            tenant.api.call("DELETE", f"{path}/none")

    life.at = lift
    life.patience = 120
    bed.run(life, ["tune"])
    bed.silent(life)


@pytest.mark.seconds(45)
def test_rights_that_are_missing_in_the_middle_are_reported_and_the_job_continues_later(
    bed: Bed, seed: random.Random
) -> None:
    """The namespace loses its RoleBinding at one of the job's requests, and gets it back."""
    life = bed.new_life()
    tenant = life.tenant
    bed.meet(seed.randint(2, 10), lambda: tenant.api.delete("RoleBinding", tenant.name, "graft"))

    def restore(step: str) -> None:
        if step == "created":
            tenant.wait(lambda: tenant.api.get("RoleBinding", tenant.name, "graft") is None, "the binding is deleted")
            said = [
                lambda: tenant.condition("FineTuneJob", "first", "Accepted").get("reason") == "NamespaceNotBound",
                lambda: bool(tenant.api.list("Job", tenant.name)),  # everything was there already
            ]
            tenant.wait(lambda: any(check() for check in said), "the missing binding is reported")
            bind(tenant)

    life.at = restore
    life.patience = 120
    bed.run(life, ["tune"])
    bed.silent(life)
