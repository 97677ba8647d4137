"""How many replicas a deployment with autoscaling has now (PURE).

From the fewest to the most an autoscaler decides; between none and the fewest it is the operator, because an HPA leaves a
Deployment with 0 replicas alone. Gateways tell of requests within `demand_interval`, so an idle deployment falls asleep after
idleSeconds and at most that much more.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from graft.api import AdapterDeployment
from graft.api.adapterdeployment import Autoscaling, ServingSizing
from graft.contracts.gateway import Demand, demand_interval
from graft.manifests.scaling import SCALED_AT, fewest
from graft.status import seconds_left


@dataclass(frozen=True)
class Decision:
    """What becomes of the Deployment's replicas."""

    replicas: int  # from now on
    change: bool  # whether that is news to the Deployment
    asleep: bool = False
    look_again: float | None = None  # seconds, when time alone changes the answer


def may_sleep(deployment: AdapterDeployment, sizing: ServingSizing | None) -> bool:
    """minReplicas 0 counts for what is small enough to be started while a request waits, or is said to be."""
    spec = deployment.spec
    if spec.autoscaling is None or spec.autoscaling.min_replicas > 0 or spec.replicas == 0:
        return False
    return sizing is None or sizing.strategy in {None, "serverless"}


def decide(
    autoscaling: Autoscaling, *, sleeps: bool, stopped: bool, live: int | None, idle: float | None, steady: float
) -> Decision:
    """
    sleeps: may_sleep. stopped: spec.replicas is 0. live: the Deployment's replicas, None before it is made. idle: seconds since
    the last request, None when none is known of. steady: seconds since the Deployment was made, or woken.
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
    """What gateways wrote into graft-demand, by key. What cannot be read counts for nothing."""
    found = {}
    for key, text in data.items():
        try:
            demand = Demand.model_validate_json(text)
            seconds_left(demand.at, 0)
        except (ValidationError, ValueError):
            continue
        found[key] = demand
    return found


def idle_seconds(demands_of: Iterable[Demand]) -> float | None:
    """Seconds since the newest request; a gateway's clock that is ahead does not count into the future."""
    ages = [max(0.0, -seconds_left(demand.at, 0)) for demand in demands_of]
    return min(ages, default=None)


def steady_seconds(manifest: Mapping[str, Any]) -> float:
    """Seconds since the Deployment was last scaled by us, or made."""
    metadata = manifest["metadata"]
    since = (metadata.get("annotations") or {}).get(SCALED_AT) or metadata["creationTimestamp"]
    return -seconds_left(since, 0)
