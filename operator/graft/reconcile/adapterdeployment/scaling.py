"""Decide how many replicas a deployment with autoscaling has now (PURE).

Between the fewest and the most replicas, an autoscaler decides. Between 0 and the fewest, the operator decides, because
an HPA does not change a Deployment with 0 replicas. Gateways report requests within `demand_interval`. So an idle
deployment falls asleep after idleSeconds, or at most `demand_interval` later.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from graft.api import AdapterDeployment
from graft.api.adapterdeployment import Autoscaling
from graft.api.deploymentstatus import ServingSizing
from graft.contracts.gateway import Demand, demand_interval
from graft.manifests.scaling import SCALED_AT, fewest
from graft.status import seconds_left


@dataclass(frozen=True)
class Decision:
    """The number of replicas that the Deployment must have."""

    replicas: int  # from now on
    change: bool  # whether the Deployment must be changed
    asleep: bool = False
    look_again: float | None = None  # seconds until the decision may change without an event


def may_sleep(deployment: AdapterDeployment, sizing: ServingSizing | None) -> bool:
    """Return whether minReplicas 0 applies: the strategy is serverless, or no strategy was chosen."""
    spec = deployment.spec
    if spec.autoscaling is None or spec.autoscaling.min_replicas > 0 or spec.replicas == 0:
        return False
    return sizing is None or sizing.strategy in {None, "serverless"}


def decide(
    autoscaling: Autoscaling, *, sleeps: bool, stopped: bool, live: int | None, idle: float | None, steady: float
) -> Decision:
    """Return the number of replicas for now.

    sleeps: may_sleep. stopped: spec.replicas is 0. live: the Deployment's replicas, None before it exists. idle:
    seconds since the last request, None if no request is known. steady: seconds since the Deployment was created or
    scaled by the operator.
    """
    least, most = fewest(autoscaling), autoscaling.max_replicas
    if stopped:
        return Decision(0, change=live != 0)
    if live is None:
        return Decision(least, change=True)
    if live == 0:
        if sleeps and (idle is None or idle >= autoscaling.idle_seconds):
            return Decision(0, change=False, asleep=True)
        return Decision(least, change=True)
    if sleeps:
        allowed = autoscaling.idle_seconds + demand_interval(autoscaling.idle_seconds)
        left = allowed - min(steady, steady if idle is None else idle)
        if left <= 0:
            return Decision(0, change=True, asleep=True)
        replicas = min(most, max(least, live))
        return Decision(replicas, change=replicas != live, look_again=max(1.0, left))
    replicas = min(most, max(least, live))
    return Decision(replicas, change=replicas != live)


def demands(data: Mapping[str, str]) -> dict[str, Demand]:
    """Return what gateways wrote into graft-demand, by key. Invalid entries are ignored."""
    found = {}
    for key, text in data.items():
        try:
            demand = Demand.read(text)
            seconds_left(demand.at, 0)
        except (ValueError, OverflowError):  # not a Demand, or not a time
            continue
        found[key] = demand
    return found


def idle_seconds(demands_of: Iterable[Demand]) -> float | None:
    """Return the seconds since the newest request, at least 0 even if a gateway's clock is ahead.

    None without requests.
    """
    ages = [max(0.0, -seconds_left(demand.at, 0)) for demand in demands_of]
    return min(ages, default=None)


def steady_seconds(manifest: Mapping[str, Any]) -> float:
    """Return the seconds since the operator last scaled the Deployment, or created it."""
    metadata = manifest["metadata"]
    noted = (metadata.get("annotations") or {}).get(SCALED_AT)
    try:
        return -seconds_left(noted or metadata["creationTimestamp"], 0)
    except ValueError:  # somebody has written the annotation by hand
        return -seconds_left(metadata["creationTimestamp"], 0)
