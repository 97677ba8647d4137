"""Every accepted spec has an effect, and the same one however the resource came to it.

The operator decides in memory. The real API server judges the children.
"""

import json
from collections import defaultdict
from typing import Any

import pytest
from worlds.cluster.api import Api, Refused
from worlds.fields.hints import NAMESPACE, SPECS, fields_of, with_value
from worlds.fields.memory import World, made, told
from worlds.fields.sample import sample
from worlds.fields.schema import KINDS, Spec, has, without
from worlds.fields.tries import Accepted, Tried, dry_run, manifest
from worlds.fields.values import is_object

# Fields that change nothing which a fresh resource leads to, and why.
SILENT = {
    "FineTuneJob ttlSecondsAfterFinished": "deletes the job after its end: tests/cluster/finetunejob/test_endings.py",
    "Adapter job.name": "says which job made the version; nothing is made from it",
    "Adapter job.uid": "as job.name",
    "Adapter deletionPolicy": "applies at the deletion: tests/cluster/operator/test_deletion.py",
    "Adapter retention.keep": "applies to unused versions: tests/unit/operator/reconcile/adapter/test_retention.py",
    "Adapter retention.unusedFor": "as retention.keep",
    "Adapter retention.compressAfter": "as retention.keep",
    "Tenant namespaces.inherit": "applies when a key is issued: tests/attacks/test_storage_rights.py",
    "Tenant namespaces.inherit[]": "as namespaces.inherit",
    "AdapterDeployment autoscaling.prometheusUrl": "deprecated and ignored",
    "ApiKey description": "for people only",
    "ApiKey overlapSeconds": "applies at a rotation: tests/unit/operator/reconcile/test_apikey.py",
}
# Not installed: the API server does not know the kind.
FOREIGN = "ScaledObject/"


def _text(outcome: Any) -> str:
    return json.dumps(outcome, sort_keys=True)


def _accepted(api: Api, kind: str, spec: Spec) -> bool:
    try:
        dry_run(api, manifest(kind, spec))
    except Refused:
        return False
    return True


async def _has_effect(api: Api, items: list[Accepted]) -> bool:
    """Return whether two values of a field, or a value and its absence, lead to different things."""
    kind, field = items[0].kind, items[0].field
    for base in [items[0].base, *(spec for spec in SPECS[kind] if spec != items[0].base)]:
        specs = [with_value(kind, base, field, item.value) for item in items]
        if not field.required and field.path[-1] not in {"[]", "{}"}:
            specs.append(without(specs[0], field.path))
        if has(base, field.path):
            specs.append(base)
        if base != items[0].base:
            specs = [spec for spec in specs if _accepted(api, kind, spec)]
        seen = set()
        for spec in specs:
            seen.add(_text(await made(kind, spec)))
            if len(seen) > 1:
                return True
    return False


@pytest.mark.parametrize("kind", KINDS)
async def test_every_field_has_an_effect(namespaced: Api, tried: dict[str, Tried], kind: str) -> None:
    """A field that changes nothing is forgotten somewhere, or stands in the table SILENT with its reason."""
    by_field: dict[str, list[Accepted]] = defaultdict(list)
    for item in tried[kind].accepted:
        if not is_object(item.field.schema):  # its own fields are tried
            by_field[f"{kind} {item.field}"].append(item)
    silent = [name for name, items in by_field.items() if not await _has_effect(namespaced, items)]
    assert silent == [name for name in by_field if name in SILENT]


def test_the_table_of_silent_fields_names_only_fields_that_exist() -> None:
    assert SILENT.keys() <= {f"{kind} {field}" for kind in KINDS for field in fields_of(kind)}


@pytest.mark.parametrize("kind", KINDS)
async def test_kubernetes_accepts_the_children_of_every_accepted_spec(
    namespaced: Api, tried: dict[str, Tried], kind: str
) -> None:
    """What the schema lets through and Kubernetes then refuses would be noticed only after the apply."""
    children: dict[str, Accepted] = {}
    for item in tried[kind].accepted:
        for name, child in (await made(kind, item.stored["spec"])).items():
            if name not in {"status", "job", "Adapter/published"} and not name.startswith(FOREIGN):
                meta = child["metadata"] | {"namespace": NAMESPACE}
                wanted = {key: part for key, part in child.items() if key != "status"} | {"metadata": meta}
                children.setdefault(_text(wanted), item)
    refused = []
    for text, item in children.items():
        try:
            dry_run(namespaced, json.loads(text))
        except Refused as error:
            refused.append(f"{item}: {error}")
    assert refused == []


def _accepts(outcome: Any) -> Any:
    """Return the reason for which a deployment is not accepted, or None if it is."""
    found = (
        item for item in outcome["status"]["conditions"] if (item["type"], item["status"]) == ("Accepted", "False")
    )
    return next((item["reason"] for item in found), None)


def _fixed(outcome: Any, spec: Spec) -> Any:
    """Return the children without what the spec leaves to an autoscaler: the present number of replicas."""
    found = {name: child for name, child in outcome.items() if name != "status"}
    if "autoscaling" in spec and "Deployment/one" in found:
        pods = found["Deployment/one"]
        found["Deployment/one"] = pods | {"spec": pods["spec"] | {"replicas": None}}
    return found


async def test_a_changed_deployment_has_the_children_of_a_fresh_one(tried: dict[str, Tried]) -> None:
    """Each value is set, and taken back, on one resource. One that cannot be placed keeps its children."""
    plain: dict[str, Any] = {}
    changes = [item for item in tried["AdapterDeployment"].accepted if item.field.path != ("baseModel",)]
    for item in sample(changes, 60, "follow"):
        world, key = World(), _text(item.base)
        await world.set(item.kind, item.base)
        plain[key] = plain.get(key) or await made(item.kind, item.base)
        for spec, wanted in (
            (item.stored["spec"], await made(item.kind, item.stored["spec"])),
            (item.base, plain[key]),
        ):
            live = await world.set(item.kind, spec)
            assert _accepts({"status": told(live)}) == _accepts(wanted), str(item)
            if _accepts(wanted) is None:
                assert _fixed(world.children(), spec) == _fixed(wanted, spec), str(item)
