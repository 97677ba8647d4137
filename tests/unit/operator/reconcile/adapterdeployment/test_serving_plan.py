"""The order of a version change in serving: load, confirm, shift traffic, drain, unload."""

import dataclasses
from typing import Any

from graft.api import Adapter, AdapterDeployment
from graft.api.adapter import AdapterSignature
from graft.contracts.agent import Wanted
from graft.contracts.gateway import Routes
from graft.reconcile.adapterdeployment.serving import (
    ReplicaView,
    Resolution,
    expected,
    plan_routes,
    plan_wanted,
    resolve,
    wanted_adapter,
)
from worlds.deployments import adapter, deployment, replica, target


def routes(
    spec: AdapterDeployment, resolutions: list[Resolution], replicas: list[ReplicaView], before: Routes | None = None
) -> Routes:
    return plan_routes(spec, resolutions, "shop", replicas, before, None)


V1, V2 = adapter("1.0.0"), adapter("1.1.0")


def test_the_newest_ready_version_is_served() -> None:
    (found,) = resolve(deployment(), [V1, V2, adapter("2.0.0", ready=False)])
    assert found.adapter is V2


def test_a_missing_adapter_is_reported() -> None:
    (found,) = resolve(deployment(), [])
    assert (found.adapter, found.reason) == (None, "AdapterMissing")


def test_an_adapter_of_another_base_model_is_refused() -> None:
    (found,) = resolve(deployment(), [adapter("1.0.0", base="other")])
    assert found.reason == "AdapterIncompatible"


def test_a_rank_above_the_limit_is_refused_with_a_remedy() -> None:
    (found,) = resolve(deployment(limits={"maxLoraRank": 8}), [adapter("1.0.0", rank=16)])
    assert found.reason == "AdapterIncompatible"
    assert "limits.maxLoraRank" in found.message


def test_a_new_version_gets_traffic_only_when_every_ready_replica_has_it() -> None:
    spec = deployment()
    old = routes(spec, resolve(spec, [V1]), [replica("pod-1", V1), replica("pod-2", V1)])
    newer = resolve(spec, [V1, V2])
    half = routes(spec, newer, [replica("pod-1", V1, V2), replica("pod-2", V1)], old)
    assert target(half) == "support-1.0.0"
    full = routes(spec, newer, [replica("pod-1", V1, V2), replica("pod-2", V1, V2)], half)
    assert target(full) == "support-1.1.0"


def test_a_route_leads_with_the_tokens_that_end_the_answers_of_the_version() -> None:
    spec, ends = deployment(), adapter("1.0.0")
    ends.status.stop_token_ids = [2, 7]
    [entry] = routes(spec, resolve(spec, [ends]), [replica("pod-1", ends)]).routes
    assert entry.targets[0].stop_token_ids == [2, 7]


def test_the_old_version_stays_loaded_until_no_route_leads_to_it() -> None:
    spec = deployment()
    first = [wanted_adapter("shop", V1)]
    table = routes(spec, resolve(spec, [V1]), [replica("pod-1", V1)])
    wanted = plan_wanted(spec, first, None, table)
    newer = resolve(spec, [V1, V2])
    second = [wanted_adapter("shop", V2)]
    table = routes(spec, newer, [replica("pod-1", V1)], table)
    wanted = plan_wanted(spec, second, wanted, table)
    assert {item.adapter for item in wanted.adapters} == {"support-1.0.0", "support-1.1.0"}
    table = routes(spec, newer, [replica("pod-1", V1, V2)], table)
    wanted = plan_wanted(spec, second, wanted, table)
    assert {item.adapter for item in wanted.adapters} == {"support-1.1.0"}


def test_if_no_replica_has_the_old_version_the_route_leads_to_the_new_one() -> None:
    spec = deployment()
    old = routes(spec, resolve(spec, [V1]), [replica("pod-1", V1)])
    table = routes(spec, resolve(spec, [V1, V2]), [replica("pod-2", V2), replica("pod-3")], old)
    assert target(table) == "support-1.1.0"


def test_a_sleeping_deployment_routes_to_the_new_version_at_once() -> None:
    """Otherwise a version deleted while the deployment sleeps would stay, and be loaded for the next request."""
    spec = deployment()
    before = routes(spec, resolve(spec, [V1]), [])
    after = resolve(spec, [V1, V2])
    assert target(routes(spec, after, [], before)) == "support-1.0.0", "pods may be starting and have the old version"
    asleep = plan_routes(spec, after, "shop", [], before, "it is asleep", stopped=True)
    assert target(asleep) == "support-1.1.0"
    wanted = plan_wanted(spec, [wanted_adapter("shop", V2)], Wanted(base_model="tiny", max_lora_rank=8), asleep)
    assert [item.adapter for item in wanted.adapters] == ["support-1.1.0"]
    gone = plan_routes(spec, resolve(spec, []), "shop", [], asleep, "it is asleep", stopped=True)
    assert target(gone) == "support-1.1.0"


def test_an_adapter_that_is_being_deleted_keeps_answering() -> None:
    spec = deployment()
    old = routes(spec, resolve(spec, [V1]), [replica("pod-1", V1)])
    table = routes(spec, resolve(spec, []), [replica("pod-1", V1)], old)
    assert target(table) == "support-1.0.0"
    assert plan_wanted(
        spec, [], Wanted(base_model="tiny", max_lora_rank=64, adapters=[wanted_adapter("shop", V1)]), table
    ).adapters


def test_a_version_that_is_kept_only_for_its_route_gets_its_newest_signature() -> None:
    spec = deployment(adapters=["support@^2"])
    old, new = (AdapterSignature(key_id=name, value="v") for name in ("old", "new"))
    first = wanted_adapter("shop", V1).model_copy(update={"signature": old})
    table = routes(spec, resolve(deployment(), [V1]), [replica("pod-1", V1)])
    before = Wanted(base_model="tiny", max_lora_rank=64, adapters=[first])
    again = first.model_copy(update={"signature": new})
    assert plan_wanted(spec, [], before, table, [again]).adapters == [again]
    assert plan_wanted(spec, [], before, table, [again.model_copy(update={"signature": None})]).adapters == [first]


def coming(version: str, **changes: Any) -> Adapter:
    """Return a version that the operator has not verified yet."""
    found = adapter(version, **changes)
    found.status.conditions.clear()
    return found


def test_a_version_that_is_being_verified_is_expected() -> None:
    spec, new = deployment(), coming("1.2.0")

    def names(*adapters: Adapter) -> list[str]:
        found = expected(spec, resolve(spec, list(adapters)), list(adapters), "shop", "graft")
        return [item.adapter for item in found]

    assert names(V1, V2, new) == ["support-1.2.0"]
    assert names(new) == ["support-1.2.0"], "also if it is the first version"
    assert names(V1, coming("1.1.0"), new) == ["support-1.2.0"], "only the newest one"
    assert names(V2, coming("1.0.5")) == [], "a newer version is served already"
    assert names(V1, adapter("1.2.0", ready=False)) == [], "its verification failed"
    assert names(V1, coming("1.2.0", name="other")) == [], "the deployment does not refer to it"
    assert names(V1, coming("1.2.0", base="other")) == []
    unknown = adapter("1.2.0")
    unknown.status.conditions[0].status = "Unknown"
    assert names(V1, unknown) == ["support-1.2.0"], "the store did not answer the operator"
    unknown.status.conditions[0].reason = "Restoring"
    assert names(V1, unknown) == [], "its files are compressed"
    away = coming("1.2.0")
    assert away.spec.artifact is not None
    away.spec.artifact.uri = "s3://graft/other/adapters/support/1.2.0/"
    assert names(V1, away) == [], "it is below the prefix of another tenant"
    away.spec.artifact.uri = "s3://elsewhere/shop/adapters/support/1.2.0/"
    assert names(V1, away) == [], "it is in another bucket"
    away.spec.artifact.uri = "s3://graft/"  # old versions of Graft accepted such locations
    assert names(V1, away) == []


def test_only_ready_replicas_are_backends_and_they_list_their_loaded_adapters() -> None:
    spec = deployment(routes=[{"model": "support", "adapter": "support"}, {"model": "base"}])
    table = routes(
        spec, resolve(spec, [V1]), [replica("pod-1", V1), replica("pod-2", V1, ready=False), replica("pod-3")]
    )
    assert [(item.pod, len(item.loaded)) for item in table.backends] == [("pod-1", 2), ("pod-3", 1)]
    assert [entry.model for entry in table.routes] == ["shop/support", "shop/base"]
    assert table.routes[1].targets[0].engine_model == "tiny"


def test_without_routes_each_adapter_is_a_model() -> None:
    table = routes(deployment(), resolve(deployment(), [V1]), [])
    assert [entry.model for entry in table.routes] == ["shop/support"]


SEQUENCE = {
    "adapters": ["support@latest", "tone@latest"],
    "routes": [{"model": "both", "sequence": ["support", "tone"]}],
}


def test_a_sequence_routes_to_every_step_and_each_step_changes_its_version_alone() -> None:
    spec, tone = deployment(**SEQUENCE), adapter("1.0.0", name="tone")
    old = routes(spec, resolve(spec, [V1, tone]), [replica("pod-1", V1, tone)])
    assert (old.routes[0].targets, [step.adapter for step in old.routes[0].steps]) == (
        [],
        ["support-1.0.0", "tone-1.0.0"],
    )
    assert len(old.backends[0].loaded) == 3

    newer = resolve(spec, [V1, V2, tone])
    half = routes(spec, newer, [replica("pod-1", V1, tone)], old)
    assert [step.adapter for step in half.routes[0].steps] == ["support-1.0.0", "tone-1.0.0"]
    wanted = [wanted_adapter("shop", item) for item in (V2, tone)]
    first = Wanted(base_model="tiny", max_lora_rank=64, adapters=[wanted_adapter("shop", item) for item in (V1, tone)])
    kept = plan_wanted(spec, wanted, first, half)
    assert {item.adapter for item in kept.adapters} == {"support-1.0.0", "support-1.1.0", "tone-1.0.0"}
    full = routes(spec, newer, [replica("pod-1", V1, V2, tone)], half)
    assert [step.adapter for step in full.routes[0].steps] == ["support-1.1.0", "tone-1.0.0"]


def test_a_sequence_with_a_missing_step_has_no_targets() -> None:
    spec = deployment(**SEQUENCE)
    table = routes(spec, resolve(spec, [V1]), [replica("pod-1", V1)])
    assert (table.routes[0].targets, table.routes[0].steps) == ([], [])


def test_a_replica_with_tls_gets_requests_once_its_certificate_is_known() -> None:
    spec = deployment()
    quiet = dataclasses.replace(replica("pod-1", V1), tls=True)
    assert routes(spec, resolve(spec, [V1]), [quiet]).backends == []
    assert quiet.residency is not None
    known = dataclasses.replace(quiet, residency=quiet.residency.model_copy(update={"certificate": "a" * 64}))
    table = routes(spec, resolve(spec, [V1]), [known, replica("pod-2", V1)])
    assert [backend.certificate for backend in table.backends] == ["a" * 64, None]
    assert table.uid == spec.metadata.uid
