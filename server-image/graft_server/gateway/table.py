"""The routing table (PURE): targets and backends by model name. A table never changes; a new one replaces it."""

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from graft.contracts.gateway import ROUTES_KEY, Backend, Routes, RouteTarget
from pydantic import ValidationError


@dataclass(frozen=True)
class Model:
    """One model name that clients use."""

    name: str
    namespace: str
    deployment: str
    base_model: str
    targets: tuple[RouteTarget, ...]
    backends: tuple[Backend, ...]
    unavailable: str | None
    steps: tuple[RouteTarget, ...] = ()  # for a sequence, which has no targets
    idle_seconds: int | None = None  # set if its deployment may sleep

    def replicas(self, target: RouteTarget) -> tuple[Backend, ...]:
        """Return the backends that have the target loaded."""
        return tuple(backend for backend in self.backends if target.engine_model in backend.loaded)

    def pick(self, chance: random.Random) -> RouteTarget | None:
        """Choose a target by weight, among those that a backend can answer. For a sequence, return its first step.

        Return None if no backend can answer.
        """
        if self.steps:
            return self.steps[0] if self.why_not is None else None
        able = [target for target in self.targets if target.weight > 0 and self.replicas(target)]
        if not able:
            return None
        return able[0] if len(able) == 1 else chance.choices(able, [target.weight for target in able])[0]

    @property
    def why_not(self) -> str | None:
        """Return why no backend can answer now, or None if a backend can. A sequence needs a backend for each step."""
        if self.steps and all(self.replicas(step) for step in self.steps):
            return None
        if any(target.weight > 0 and self.replicas(target) for target in self.targets):
            return None
        if self.unavailable:
            return self.unavailable
        if not self.backends:
            return f"AdapterDeployment {self.deployment} has no ready replica"
        if missing := [str(step.adapter) for step in self.steps if not self.replicas(step)]:
            return f"no ready replica of AdapterDeployment {self.deployment} has {', '.join(missing)} loaded yet"
        return (
            f"none of the {len(self.backends)} ready replicas of AdapterDeployment {self.deployment} has it loaded yet"
        )


@dataclass(frozen=True)
class Table:
    """All models, by the name that clients use."""

    models: Mapping[str, Model] = field(default_factory=dict)

    @classmethod
    def of(cls, parts: Iterable[Routes]) -> tuple["Table", list[str]]:
        """Build the table from the parts of all deployments. Return it and a list of problems.

        A deployment may only name models of its own namespace; other routes are refused. If two deployments claim the
        same name, the deployment that sorts first gets it, so every gateway decides alike.
        """
        models: dict[str, Model] = {}
        problems: list[str] = []
        for part in sorted(parts, key=lambda part: (part.namespace, part.deployment)):
            for route in part.routes:
                whose = f"{part.namespace}/{part.deployment}"
                if not route.model.startswith(f"{part.namespace}/"):
                    problems.append(f"{whose} claims the model {route.model}, which is not in its namespace")
                elif route.model in models:
                    problems.append(
                        f"{whose} claims the model {route.model}, which {models[route.model].deployment} has already"
                    )
                else:
                    models[route.model] = Model(
                        name=route.model,
                        namespace=part.namespace,
                        deployment=part.deployment,
                        base_model=part.base_model,
                        targets=tuple(route.targets),
                        backends=tuple(part.backends),
                        unavailable=part.unavailable,
                        steps=tuple(route.steps),
                        idle_seconds=part.idle_seconds,
                    )
        return cls(models), problems

    @property
    def sleepers(self) -> set[tuple[str, str]]:
        """Return namespace and name of each deployment that may sleep."""
        return {(model.namespace, model.deployment) for model in self.models.values() if model.idle_seconds is not None}

    @property
    def addresses(self) -> frozenset[str]:
        """Return the addresses of all backends."""
        return frozenset(backend.address for model in self.models.values() for backend in model.backends)


def read_parts(
    configmaps: Mapping[str, Mapping[str, str]], before: Mapping[str, Routes]
) -> tuple[dict[str, Routes], list[str]]:
    """Parse the part of the table in each ConfigMap. Return the parts by ConfigMap name, and a list of problems.

    If a ConfigMap is invalid, its last valid part stays.
    """
    parts: dict[str, Routes] = {}
    problems: list[str] = []
    for name, data in configmaps.items():
        try:
            parts[name] = Routes.model_validate_json(data.get(ROUTES_KEY) or "")
        except ValidationError as error:
            problems.append(f"ConfigMap {name} is invalid: {error.errors()[0]['msg']}")
            if name in before:
                parts[name] = before[name]
    return parts, problems


class Balancer:
    """The choice of a replica: the least busy one that is not avoided. It counts only this gateway's own requests."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self._in_flight: dict[str, int] = {}
        self._avoid_until: dict[str, float] = {}

    def choose(self, replicas: Sequence[Backend], tried: Iterable[str], now: float) -> Backend | None:
        """Choose a replica that was not tried yet. An avoided replica is chosen only if there is no other."""
        left = [replica for replica in replicas if replica.address not in set(tried)]
        fine = [replica for replica in left if self._avoid_until.get(replica.address, 0.0) <= now]
        candidates = fine or left
        if not candidates:
            return None
        least = min(self.in_flight(replica.address) for replica in candidates)
        return self._chance.choice([r for r in candidates if self.in_flight(r.address) == least])

    def in_flight(self, address: str) -> int:
        return self._in_flight.get(address, 0)

    def begin(self, address: str) -> None:
        self._in_flight[address] = self.in_flight(address) + 1

    def end(self, address: str) -> None:
        left = self.in_flight(address) - 1
        if left > 0:
            self._in_flight[address] = left
        else:
            self._in_flight.pop(address, None)

    def avoid(self, address: str, until: float) -> None:
        """Do not choose the replica before `until`, if there is another."""
        self._avoid_until[address] = until

    def well(self, address: str) -> None:
        """Stop avoiding a replica, because it answered."""
        self._avoid_until.pop(address, None)

    def keep_only(self, addresses: Iterable[str]) -> None:
        """Forget replicas that no longer exist."""
        known = set(addresses)
        self._avoid_until = {address: until for address, until in self._avoid_until.items() if address in known}
