"""Which namespaces a Tenant has, and what it says about those that it does not have."""

import copy
from typing import Any

import pytest
from graft.api import Tenant
from graft.kube import KubeError
from graft.manifests.metadata import OWNER_UID
from graft.manifests.tenant import POD_SECURITY
from graft.reconcile import tenant as tenants
from graft.reconcile.claims import Space, claim_of, holder, holders, space_of, why_never
from graft.reconcile.shared.access import Base, Trouble, gather_base_model
from graft.reconcile.tenant import observe, share_of
from worlds.fields.hints import NAMESPACE
from worlds.fields.memory import World

SYSTEM = "graft-system"
OLD, NEW = "2026-01-01T00:00:00Z", "2026-02-01T00:00:00Z"
SPACES = {name: {"labels": {"team": name[:1]}} for name in ("a1", "a2", "b1")}
Object = dict[str, Any]


def raw(name: str, since: str = OLD, members: Any = None, **namespaces: Any) -> Object:
    metadata = {"name": name, "uid": f"uid-{name}", "creationTimestamp": since, "generation": 1}
    spec = {"namespaces": namespaces} | ({"members": members} if members else {})
    return {"apiVersion": "graft.dev/v1alpha1", "kind": "Tenant", "metadata": metadata, "spec": spec}


def selecting(**labels: str) -> Object:
    return {"selector": {"matchLabels": labels}}


def spaces(namespaces: Any) -> list[Space]:
    return [space_of({"metadata": {"name": name, **metadata}}) for name, metadata in namespaces.items()]


def has(name: str, *found: Object, namespaces: Any = SPACES) -> tuple[list[str], Object]:
    share = share_of(name, map(claim_of, found), spaces(namespaces), SYSTEM)
    return list(share.has), share.claimed


def test_a_tenant_has_what_it_names_and_what_its_selector_matches() -> None:
    assert has("a", raw("a", names=["b1"], **selecting(team="a"))) == (["a1", "a2", "b1"], {})
    assert has("a", raw("a", names=["b1", "later"])) == (["b1"], {})


@pytest.mark.parametrize(
    ("expression", "found"),
    [
        ({"operator": "In", "values": ["a", "x"]}, ["a1", "a2"]),
        ({"operator": "NotIn", "values": ["a"]}, ["b1", "bare"]),
        ({"operator": "Exists"}, ["a1", "a2", "b1"]),
        ({"operator": "DoesNotExist"}, ["bare"]),
        ({"operator": "Later", "values": ["a"]}, []),  # of a newer version: it matches nothing
    ],
)
def test_expressions_match_as_kubernetes_selectors_do(expression: Object, found: list[str]) -> None:
    tenant = raw("a", selector={"matchExpressions": [{"key": "team"} | expression]})
    assert has("a", tenant, namespaces=SPACES | {"bare": {}})[0] == found


def test_an_empty_selector_of_an_older_schema_matches_nothing() -> None:
    assert has("a", raw("a", selector={"matchLabels": {}})) == ([], {})


@pytest.mark.parametrize("since", [NEW, OLD], ids=["younger", "of the same second"])
def test_the_oldest_tenant_has_a_namespace_however_it_asks_for_it(since: str) -> None:
    """A name is no stronger than a label. Of two Tenants of the same second, the name decides."""
    first, second = raw("a", **selecting(team="a")), raw("b", since, names=["a1", "b1"])
    assert has("a", second, first) == (["a1", "a2"], {})
    assert has("b", second, first) == (["b1"], {"a1": "a"})
    assert has("b", second) == (["a1", "b1"], {})


@pytest.mark.parametrize("name", ["kube-system", "kube-public", "kube-node-lease", SYSTEM, "models", "root"])
def test_a_namespace_of_the_cluster_or_of_graft_belongs_to_no_tenant(name: str) -> None:
    there = spaces(SPACES | {name: {"labels": {"team": "a"}}})
    share = share_of("a", [claim_of(raw("a", names=[name], **selecting(team="a")))], there, SYSTEM)
    assert list(share.has) == ["a1", "a2"] and list(share.reserved) == [name]
    assert why_never(name, SYSTEM) and holder([claim_of(raw("a", names=[name]))], name, {}, SYSTEM) is None


def test_a_namespace_that_is_being_deleted_is_left_alone() -> None:
    leaving = {"a1": {"deletionTimestamp": NEW}, "a2": {}}
    assert has("a", raw("a", names=["a1", "a2"]), namespaces=leaving) == (["a2"], {})


def test_the_first_problem_gives_the_reason_and_the_message_has_all() -> None:
    first = claim_of(raw("a", names=["a1"]))
    second = raw("b", NEW, names=["a1", "b1", "later", "models"])
    share = share_of("b", [first, claim_of(second)], spaces(SPACES), SYSTEM)
    status, [ready, *_] = observe(Tenant.model_validate(second), share, {"b1": Trouble("NamespaceNotBound", "bind b1")})
    assert (ready.status, ready.reason, status.stage) == ("False", "NamespaceReserved", "Incomplete")
    for words in (
        "models cannot belong",
        "a1 belongs to Tenant a, which is older",
        "bind b1",
        "later (spec.namespaces",
    ):
        assert words in ready.message
    assert status.namespaces == ["b1"]
    share.claimed, share.reserved = {}, {}
    _, [ready, *_] = observe(Tenant.model_validate(second), share, {})
    assert (ready.status, ready.reason) == ("Unknown", "NamespaceMissing")


MEMBERS = [{"kind": "Group", "name": "team", "role": "edit"}, {"kind": "User", "name": "ada", "role": "admin"}]


async def test_members_are_bound_to_their_role_and_those_below_it() -> None:
    world = World()
    await world.set("Tenant", {"namespaces": {"names": [NAMESPACE]}, "members": MEMBERS})
    bindings = {
        item["roleRef"]["name"]: [subject["name"] for subject in item["subjects"]]
        for name, item in world.children().items()
        if name.startswith("RoleBinding/")
    }
    assert bindings == {"graft-view": ["team", "ada"], "graft-edit": ["team", "ada"], "graft-admin": ["ada"]}
    await world.set("Tenant", {"namespaces": {"names": [NAMESPACE]}, "members": MEMBERS[:1]})
    assert sorted(world.children()) == [
        "NetworkPolicy/graft-one-default-deny", "RoleBinding/graft-one-edit", "RoleBinding/graft-one-view",
    ]  # fmt: skip
    await world.set("Tenant", {"namespaces": {"names": ["other"]}, "members": MEMBERS})
    assert world.children() == {}


async def test_a_namespace_is_isolated_and_what_was_changed_is_repaired() -> None:
    world = World()
    space = world.kube.objects["Namespace", None, NAMESPACE]
    space["metadata"]["labels"] |= {"pod-security.kubernetes.io/enforce": "privileged"}

    def isolated() -> None:
        assert (
            space["metadata"]["labels"].items() >= POD_SECURITY.items() and space["metadata"]["labels"]["team"] == "a"
        )
        account = world.kube.objects["ServiceAccount", NAMESPACE, "default"]
        assert account["automountServiceAccountToken"] is False and OWNER_UID not in account["metadata"].get(
            "labels", {}
        )
        policy = world.children()["NetworkPolicy/graft-one-default-deny"]["spec"]
        assert policy == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"], "ingress": [], "egress": []}

    await world.set("Tenant", {"namespaces": {"names": [NAMESPACE]}})
    isolated()
    space["metadata"]["labels"] |= {"pod-security.kubernetes.io/enforce-version": "v1.22"}
    world.kube.objects["ServiceAccount", NAMESPACE, "default"]["automountServiceAccountToken"] = True
    del world.kube.objects["NetworkPolicy", NAMESPACE, "graft-one-default-deny"]
    await world.rest("Tenant", "one")
    isolated()


async def test_a_namespace_where_the_operator_may_not_write_holds_up_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody forges a child there, or takes the operator's RoleBinding away."""
    world = World()
    spec = {"namespaces": {"names": [NAMESPACE]}, "members": MEMBERS}
    await world.set("Tenant", spec)
    child = next(item for key, item in world.kube.objects.items() if key[0] == "RoleBinding")
    forged = copy.deepcopy(child)
    forged["metadata"] |= {"namespace": "elsewhere", "name": "forged"}
    world.kube.objects["RoleBinding", "elsewhere", "forged"] = forged

    async def refuse(kind: str, namespace: str, name: str, *_: Any) -> None:
        raise KubeError(403, "Forbidden", f'User "graft" cannot delete resource "rolebindings" in "{namespace}"')

    monkeypatch.setattr(world.kube, "delete", refuse)
    live = await world.set("Tenant", spec | {"members": [*MEMBERS, {"kind": "User", "name": "bob", "role": "view"}]})
    [ready, *_] = live["status"]["conditions"]
    assert (ready["status"], ready["reason"]) == ("Unknown", "NamespaceNotBound")
    assert "-n elsewhere" in ready["message"] and live["status"]["namespaces"] == [NAMESPACE]
    view = world.kube.objects["RoleBinding", NAMESPACE, "graft-one-view"]
    assert [item["name"] for item in view["subjects"]] == ["team", "ada", "bob"]


async def test_without_rights_for_tenants_nothing_is_done_and_the_tenant_says_so() -> None:
    world = World()
    spec = {"namespaces": {"names": [NAMESPACE]}, "members": MEMBERS}
    await world.set("Tenant", spec)
    assert world.children()
    world.context.settings = world.context.settings.model_copy(update={"tenants_enabled": False})
    live = await world.rest("Tenant", "one")
    assert world.children() == {} and live["status"]["namespaces"] == []
    [ready, *_] = live["status"]["conditions"]
    assert ready["reason"] == "TenantsDisabled" and "tenants.enabled: true" in ready["message"]


def test_an_object_is_ours_by_its_controller_only() -> None:
    reference = {"kind": "Tenant", "name": "a", "uid": "u", "controller": True}
    for references, ours in (
        ([reference], True),
        ([reference | {"name": "b"}], False),
        ([reference | {"controller": False}], False),
        ([reference | {"kind": "ConfigMap"}], False),
        ([], False),
    ):
        assert tenants._is_ours({"metadata": {"ownerReferences": references}}, "a") is ours


def test_many_namespaces_are_looked_up_as_one_is() -> None:
    expression = {"matchExpressions": [{"key": "team", "operator": "DoesNotExist"}]}
    claims = [
        claim_of(raw("a", NEW, names=["b1", "models"], **selecting(team="a"))),
        claim_of(raw("b", names=["a2"])),
        claim_of(raw("c", NEW, selector=expression | {"matchLabels": {"tier": "1"}})),
        claim_of(raw("d", NEW, selector=expression)),
    ]
    labels = {name: item["labels"] for name, item in SPACES.items()} | {"models": {}, "bare": {}, "tier": {"tier": "1"}}
    there = spaces({name: {"labels": item} for name, item in labels.items()})
    found = {name: claim.tenant for name, claim in holders(claims, there, SYSTEM).items()}
    assert found == {"a1": "a", "a2": "b", "b1": "a", "bare": "d", "tier": "c"}
    one = {name: holder(claims, name, labels[name], SYSTEM) for name in labels}
    assert found == {name: claim.tenant for name, claim in one.items() if claim is not None}


@pytest.mark.parametrize(("enabled", "allowed"), [(True, ["small"]), (True, None), (False, ["small"])])
async def test_a_base_model_that_the_tenant_may_not_use_is_refused(enabled: bool, allowed: Any) -> None:
    world = World()
    world.context.settings = world.context.settings.model_copy(update={"tenants_enabled": enabled})
    limits = {"baseModels": allowed} if allowed else {}
    await world.set("Tenant", {"namespaces": {"names": [NAMESPACE]}} | limits)
    found = await gather_base_model(world.context, "tiny", NAMESPACE)
    assert isinstance(found, Base) is not (enabled and allowed is not None)
    if isinstance(found, Trouble):
        assert found.reason == "BaseModelForbidden" and "spec.baseModels of the Tenant" in found.message
        missing = await gather_base_model(world.context, "not-there", NAMESPACE)
        assert isinstance(missing, Trouble) and missing.reason == "BaseModelForbidden"
    assert isinstance(await gather_base_model(world.context, "tiny", "elsewhere"), Base)
