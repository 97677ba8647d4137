"""Every value that the schema allows is accepted by the API server, and every other one is refused with a message."""

import itertools
import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
from graft import crdgen
from graft.api.finetunejob import MUTABLE
from graft.api.patterns import QUANTITY, SENTENCES
from testbed.controlplane import ControlPlane
from worlds.cluster.api import ALL_KINDS, APPLY, Api, Refused
from worlds.fields.hints import BREAKS, NAMESPACE, SPECS, VERSION, fields_of, values, with_value
from worlds.fields.patterns import missing
from worlds.fields.sample import ALL, sample
from worlds.fields.schema import CLUSTER_WIDE, KINDS, Field, Schema, Spec, rules, schema_of
from worlds.fields.tries import Tried, dropped, dry_run, manifest
from worlds.fields.values import pattern_of, wrong

JSON_PATCH = "application/json-patch+json"
IMMUTABLE = ("the spec is immutable", "a published version never changes", "baseModel is immutable")
# The fields of a spec that may be changed.
CHANGEABLE = {
    "BaseModel": [str(field) for field in fields_of("BaseModel")],
    "Tenant": [str(field) for field in fields_of("Tenant")],
    "FineTuneJob": list(MUTABLE),
    "Adapter": ["baseVersions", "deletionPolicy", "retention"],
    "AdapterDeployment": [str(field) for field in fields_of("AdapterDeployment") if str(field) != "baseModel"],
    "ApiKey": [str(field) for field in fields_of("ApiKey")],
}
BARE = re.compile(r"should match|regular expression|\^\(|\[a-z")
NAMES = {"BaseModel": 63, "Tenant": 63, "FineTuneJob": 50, "AdapterDeployment": 45, "ApiKey": 63}


def test_every_field_has_values() -> None:
    """A field without one would not be tested: add a line to tests/worlds/fields/hints.py."""
    for kind in KINDS:
        for field in fields_of(kind):
            assert values(field), f"{kind} {field}"
            assert wrong(field.schema), f"{kind} {field}"


@pytest.mark.parametrize("kind", KINDS)
def test_valid_values_are_accepted_and_wrong_ones_are_refused(tried: dict[str, Tried], kind: str) -> None:
    assert tried[kind].unexpected == []
    assert tried[kind].accepted and tried[kind].refused


@pytest.mark.parametrize("kind", KINDS)
def test_a_refusal_names_the_field_or_the_rule(tried: dict[str, Tried], kind: str) -> None:
    told = [*rules(schema_of(kind)), "unknown field"]
    for of, field, value, message in tried[kind].refused:
        name = next(part for part in reversed(field.path) if part not in {"[]", "{}"})
        assert name in message or any(rule in message for rule in told), f"{of} {field}={value!r:.60}: {message}"


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_of_the_wrong_form_is_answered_with_a_sentence(namespaced: Api, kind: str) -> None:
    """Of every field, not of a sample: a bare regular expression is no help for a user."""
    texts = [(field, form) for field in fields_of(kind) if (form := sentence(field.schema)) is not None]
    assert texts
    for field, (wrong_text, said) in texts:
        with pytest.raises(Refused) as error:
            dry_run(namespaced, manifest(kind, with_value(kind, SPECS[kind][0], field, wrong_text)))
        assert said in str(error.value), f"{field}={wrong_text!r}: {error.value}"
        assert not BARE.search(str(error.value)), f"{field}={wrong_text!r}: {error.value}"


def sentence(schema: Schema) -> tuple[str, str] | None:
    """Return a text of the wrong form and what the API server must say, or None if a field takes any text."""
    pattern = QUANTITY if schema.get("x-kubernetes-int-or-string") else pattern_of(schema)
    return None if pattern is None else (missing(pattern, schema["maxLength"])[-1], SENTENCES[pattern])


@pytest.mark.parametrize("kind", KINDS)
def test_older_api_servers_accept_the_rules(api: Api, kind: str) -> None:
    """Kubernetes before 1.34 ignores maxLength of an amount when it estimates the cost of rules (kubernetes#132837)."""
    older = json.loads(json.dumps(crdgen.custom_resource_definition(KINDS[kind])), object_hook=without_length_of_amount)
    path = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/"
    api.call("PATCH", f"{path}{older['metadata']['name']}?fieldManager=older&force=true&dryRun=All", older, APPLY)


def without_length_of_amount(schema: Schema) -> Schema:
    amount = schema.get("x-kubernetes-int-or-string")
    return {key: value for key, value in schema.items() if not (amount and key == "maxLength")}


@pytest.mark.parametrize(("kind", "field"), [("finetunejob", "method.lora.rank"), ("adapterdeployment", "replicas")])
def test_explain_shows_the_default_and_the_limits(plane: ControlPlane, kind: str, field: str) -> None:
    shown = " ".join(plane.kubectl("explain", f"{kind}.spec.{field}").split())
    assert {"method.lora.rank": "Default: 16. From 1 to 512.", "replicas": "Default: 1. From 0 to 1000."}[
        field
    ] in shown


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_accepted_is_stored_as_it_was_sent(tried: dict[str, Tried], kind: str) -> None:
    for item in tried[kind].accepted:
        sent = with_value(kind, item.base, item.field, item.value)
        assert list(dropped(sent, item.stored["spec"])) == [], str(item)


@pytest.mark.parametrize("kind", KINDS)
def test_unknown_fields_are_refused_in_every_object(namespaced: Api, kind: str) -> None:
    objects = [field for field in fields_of(kind) if "properties" in field.schema]
    specs = [
        with_value(kind, SPECS[kind][0], field, {"unknownField": "a"})
        for field in sample(objects, 5, f"unknown {kind}")
    ]
    for spec in [SPECS[kind][0] | {"unknownField": "a"}, *specs]:
        with pytest.raises(Refused, match=r"unknown field .*unknownField"):
            dry_run(namespaced, manifest(kind, spec))


@pytest.mark.parametrize(("kind", "spec", "words"), BREAKS, ids=[words for *_, words in BREAKS])
def test_a_spec_that_breaks_a_rule_is_refused(namespaced: Api, kind: str, spec: Spec, words: str) -> None:
    with pytest.raises(Refused) as error:
        dry_run(namespaced, manifest(kind, spec))
    assert words in str(error.value)


@pytest.mark.parametrize(("kind", "longest"), NAMES.items())
def test_names_have_a_limit(namespaced: Api, kind: str, longest: int) -> None:
    dry_run(namespaced, manifest(kind, SPECS[kind][0], "n" * longest))
    with pytest.raises(Refused, match=f"metadata.name must be at most {longest} characters"):
        dry_run(namespaced, manifest(kind, SPECS[kind][0], "n" * (longest + 1)))


def test_the_name_of_a_tenant_has_no_dots(namespaced: Api) -> None:
    with pytest.raises(Refused, match=r"metadata\.name must have no dots"):
        dry_run(namespaced, manifest("Tenant", SPECS["Tenant"][0], "a.b"))


def test_names_of_adapters_follow_from_their_specs(namespaced: Api) -> None:
    wrong = manifest("Adapter", SPECS["Adapter"][0])
    wrong["metadata"]["name"] = "other-2.0.0"
    with pytest.raises(Refused, match=r"metadata\.name must be <adapter>-<version>"):
        dry_run(namespaced, wrong)
    long = VERSION | {"adapter": "a" * 40, "version": "1.0.12345678901", "import": {"uri": "hf://a/b"}}
    with pytest.raises(Refused, match="composed or imported version must be at most 52 characters"):
        dry_run(namespaced, manifest("Adapter", long))


if ALL:  # a sample breaks only some of the rules

    @pytest.mark.parametrize("kind", KINDS)
    def test_every_rule_is_broken_once(tried: dict[str, Tried], kind: str) -> None:
        """A rule that no test breaks may be wrong: add a spec to BREAKS."""
        said = "\n".join({message for *_, message in tried[kind].refused})
        known = [*(words for *_, words in BREAKS), "metadata.name", *IMMUTABLE]
        unbroken = [rule for rule in rules(schema_of(kind)) if rule not in said]
        assert [rule for rule in unbroken if not any(words in rule for words in known)] == []


@pytest.mark.parametrize("kind", KINDS)
def test_immutable_fields_never_change_and_the_others_may(namespaced: Api, tried: dict[str, Tried], kind: str) -> None:
    """By a dry run, for each value that a new resource may have: set it, and remove it again."""
    accepted = sample(tried[kind].accepted, 60, f"updates {kind}")
    refusals = 0
    for number, (_, group) in enumerate(itertools.groupby(accepted, lambda item: repr(item.base))):
        items = list(group)
        live = namespaced.create(manifest(kind, items[0].base, f"fixed-{kind.lower()}-{number}"))
        try:
            for item in items:
                refusals += sum(_updates(namespaced, live, item.field, item.stored["spec"]))
        finally:
            namespaced.delete(kind, live["metadata"].get("namespace"), live["metadata"]["name"])
            _release(namespaced, live)
    if kind in {"FineTuneJob", "Adapter"}:
        assert refusals


def _updates(api: Api, live: Any, field: Field, spec: Spec) -> Iterator[bool]:
    """Yield whether a change to the spec was refused, and whether the way back was. Check that it had to be."""
    kind, path = live["kind"], ALL_KINDS[live["kind"]].path(live["metadata"].get("namespace"), live["metadata"]["name"])
    if spec == live["spec"]:
        return
    may = field.path[0] in CHANGEABLE[kind]
    try:
        api.call("PATCH", f"{path}?dryRun=All", [{"op": "replace", "path": "/spec", "value": spec}], JSON_PATCH)
    except Refused as error:
        assert not may, f"{kind} {field}: {error}"
        assert any(words in str(error) for words in IMMUTABLE) or "metadata.name must be" in str(error), str(error)
        yield True
    else:
        assert may, f"{kind} {field} is immutable, and was changed"
        yield False


def _release(api: Api, live: Any) -> None:
    """Finish the deletion of a resource. A running operator may finish it first."""
    meta = live["metadata"]
    try:
        api.patch(live["kind"], meta.get("namespace"), meta["name"], {"metadata": {"finalizers": None}})
    except Refused as error:
        assert error.status == 404, error


def test_the_namespace_of_the_dry_runs_stays_empty(namespaced: Api, tried: dict[str, Tried]) -> None:
    assert [item for kind in KINDS.keys() - CLUSTER_WIDE for item in namespaced.list(kind, NAMESPACE)] == []
