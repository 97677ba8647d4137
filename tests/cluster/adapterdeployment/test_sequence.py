"""A route through a sequence of two adapters.

It serves when both adapters are loaded. Each adapter follows its own versions.
"""

import json
from typing import Any

import pytest
from testbed.controlplane import ControlPlane
from worlds.cluster.fleet import Fleet
from worlds.cluster.refused import refused
from worlds.cluster.tenant import BASE, Tenant

ROUTES = [{"model": "polite", "sequence": ["support", "tone"]}, {"model": "support", "adapter": "support"}]


def steps(fleet: Fleet) -> list[str | None]:
    """Return the Adapters of the sequence, as the gateway's routes list them."""
    entry = next(item for item in fleet.routes().routes if item.model.endswith("/polite"))
    assert entry.targets == []
    return [step.adapter for step in entry.steps]


def test_a_sequence_serves_when_every_step_is_loaded(tenant: Tenant) -> None:
    tenant.trained("first")
    tenant.trained("other", adapter="tone")
    fleet = Fleet(tenant, "chat")
    fleet.deploy(["support@latest", "tone@1.0.0"], replicas=1, routes=ROUTES)
    (pod,) = fleet.pods(1)
    fleet.until_wanted("support-1.0.0", "tone-1.0.0")
    fleet.agent_says(pod, {"support-1.0.0": "Loaded", "tone-1.0.0": "Loading"})
    fleet.until("Available", "RouteUnavailable", says="/polite", not_="/support")

    fleet.agent_says(pod)
    fleet.until("Available", "Serving")
    models = {item["model"].rpartition("/")[2]: item for item in fleet.status()["models"]}
    assert models["polite"]["sequence"] == ["support-1.0.0", "tone-1.0.0"] and models["polite"]["replicas"] == 1
    assert tenant.status("Adapter", "tone-1.0.0")["usedBy"] == ["chat"]

    tenant.trained("second")  # support 1.0.1
    fleet.until_wanted("support-1.0.0", "support-1.0.1", "tone-1.0.0")
    assert steps(fleet) == ["support-1.0.0", "tone-1.0.0"]
    fleet.agent_says(pod)
    tenant.wait(lambda: steps(fleet) == ["support-1.0.1", "tone-1.0.0"], "only the first step moves to the new version")
    fleet.until_wanted("support-1.0.1", "tone-1.0.0")


@pytest.mark.parametrize(
    ("route", "words"),
    [
        ({"sequence": ["support"]}, "should have at least 2 items"),
        ({"sequence": ["support", "tone"], "adapter": "support"}, "an adapter or a sequence, not both"),
        ({"sequence": ["support", "other"]}, "each adapter of a route's sequence must be one of adapters"),
    ],
)
def test_an_invalid_sequence_is_refused(tenant: Tenant, plane: ControlPlane, route: dict[str, Any], words: str) -> None:
    spec = {"baseModel": BASE, "adapters": ["support@latest", "tone@latest"], "routes": [{"model": "m", **route}]}
    assert words in refused(plane, tenant.resource("AdapterDeployment", "wrong", spec))
    assert json.dumps(tenant.api.list("AdapterDeployment", tenant.name)) == "[]"
