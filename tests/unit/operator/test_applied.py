"""Whether a live object must be applied again."""

from typing import Any

import pytest
from graft.applied import APPLIED, contents, covers, stamped

MANIFEST: dict[str, Any] = {
    "apiVersion": "apps/v1",
    "kind": "Deployment",
    "metadata": {"name": "chat", "annotations": {"mine": "1"}},
    "spec": {"template": {"spec": {"nodeSelector": {"pool": "gpu"}, "tolerations": [{"key": "spot"}]}}},
}


def test_a_live_object_covers_a_manifest_if_it_has_all_its_fields() -> None:
    live = {"metadata": {"labels": {"a": "1", "b": "2"}}, "spec": {"list": [{"x": 1, "default": True}]}}
    assert covers(live, {"metadata": {"labels": {"a": "1"}}, "spec": {"list": [{"x": 1}]}})
    assert not covers(live, {"spec": {"list": [{"x": 2}]}})
    assert not covers(live, {"spec": {"list": []}, "metadata": {"labels": {"c": "3"}}})


def test_a_rule_that_was_added_to_an_empty_list_is_a_difference() -> None:
    """Without this, a hole that somebody made in a NetworkPolicy would stay."""
    assert covers({"spec": {}}, {"spec": {"ingress": []}})
    assert not covers({"spec": {"ingress": [{"from": []}]}}, {"spec": {"ingress": []}})
    assert not covers({"podSelector": {"matchLabels": {"a": "b"}}}, {"podSelector": {}})
    assert not covers({"subjects": [{"name": "a"}, {"name": "b"}]}, {"subjects": [{"name": "a"}]})


@pytest.mark.parametrize("name", ["containers", "initContainers", "env", "volumes", "imagePullSecrets"])
def test_what_a_webhook_adds_to_a_merged_list_is_no_difference(name: str) -> None:
    ours = {"name": "engine", "image": "e:1"}
    assert covers({name: [{"name": "sidecar"}, ours | {"terminationMessagePath": "/dev/log"}]}, {name: [ours]})
    assert not covers({name: [{"name": "sidecar"}]}, {name: [ours]})
    assert not covers({name: [{"name": "sidecar"}, ours | {"image": "e:2"}]}, {name: [ours]})


@pytest.mark.parametrize("gone", ["nodeSelector", "tolerations"])
def test_a_manifest_that_lost_a_field_is_a_difference(gone: str) -> None:
    live, pod = stamped(MANIFEST), dict(MANIFEST["spec"]["template"]["spec"])
    assert covers(live, stamped(MANIFEST))
    pod.pop(gone)
    less = MANIFEST | {"spec": {"template": {"spec": pod}}}
    assert covers(live, less), "a comparison of fields alone cannot see it"
    assert not covers(live, stamped(less))


def test_an_object_of_an_earlier_version_has_no_digest_and_is_applied_once() -> None:
    assert not covers(MANIFEST, stamped(MANIFEST))
    assert stamped(MANIFEST)["metadata"]["annotations"].keys() == {"mine", APPLIED}
    assert APPLIED not in MANIFEST["metadata"]["annotations"], "the manifest itself stays unchanged"


def test_contents_ignore_what_every_write_changes() -> None:
    live = MANIFEST | {"metadata": MANIFEST["metadata"] | {"resourceVersion": "1"}, "status": {"replicas": 1}}
    assert contents(live) == contents(MANIFEST)
    assert contents(live) != contents(live | {"spec": {}})
