"""The routing table: which model name is answered by what, and where (PURE). A snapshot never changes; a new one replaces it."""

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
    steps: tuple[RouteTarget, ...] = ()  # of a sequence, which has no targets
    idle_seconds: int | None = None  # its deployment may sleep

    def replicas(self, target: RouteTarget) -> tuple[Backend, ...]:
        """The backends that have the target loaded."""
        return tuple(backend for backend in self.backends if target.engine_model in backend.loaded)

    def pick(self, chance: random.Random) -> RouteTarget | None:
        """A target by weight, among those that a backend can answer; of a sequence its first step. None when none can."""
        if self.steps:
            return self.steps[0] if self.why_not is None else None
        able = [target for target in self.targets if target.weight > 0 and self.replicas(target)]
        if not able:
            return None
        return able[0] if len(able) == 1 else chance.choices(able, [target.weight for target in able])[0]

    @property
    def why_not(self) -> str | None:
        """Why no backend can answer now; None when one can. A sequence needs one for each of its steps."""
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
        """The table of all deployments' parts, and what was wrong with them.

        A deployment speaks for its own namespace only: a route of another one is refused. Of two deployments that claim
        one name, the one that sorts first gets it, so that every gateway decides alike.
        """
        models: dict[str, Model] = {}
        problems: list[str] = []
        for part in sorted(parts, key=lambda part: (part.namespace, part.deployment)):
            for route in part.routes:
                whose = f"{part.namespace}/{part.deployment}"
                if not route.model.startswith(f"{part.namespace}/"):
                    problems.append(f"{whose} claims {route.model}, which is not in its namespace")
                elif route.model in models:
                    problems.append(f"{whose} claims {route.model}, which {models[route.model].deployment} has")
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
        """Namespace and name of the deployments that may sleep."""
        return {(model.namespace, model.deployment) for model in self.models.values() if model.idle_seconds is not None}

    @property
    def addresses(self) -> frozenset[str]:
        """Of all backends."""
        return frozenset(backend.address for model in self.models.values() for backend in model.backends)


def read_parts(
    configmaps: Mapping[str, Mapping[str, str]], before: Mapping[str, Routes]
) -> tuple[dict[str, Routes], list[str]]:
    """Each ConfigMap's part, by the ConfigMap's name, and what was wrong. One that cannot be read keeps its last good part."""
    parts: dict[str, Routes] = {}
    problems: list[str] = []
    for name, data in configmaps.items():
        try:
            parts[name] = Routes.model_validate_json(data.get(ROUTES_KEY) or "")
        except ValidationError as error:
            problems.append(f"ConfigMap {name}: {error.errors()[0]['msg']}")
            if name in before:
                parts[name] = before[name]
    return parts, problems


class Balancer:
    """Which replica next: the least busy one that lately could be reached. Counts this gateway's own requests only."""

    def __init__(self, chance: random.Random) -> None:
        self._chance = chance
        self._in_flight: dict[str, int] = {}
        self._avoid_until: dict[str, float] = {}

    def choose(self, replicas: Sequence[Backend], tried: Iterable[str], now: float) -> Backend | None:
        """A replica not tried yet. One that is avoided is taken only when there is no other."""
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
        """Do not choose it until then, if there is another."""
        self._avoid_until[address] = until

    def well(self, address: str) -> None:
        """It answered."""
        self._avoid_until.pop(address, None)

    def keep_only(self, addresses: Iterable[str]) -> None:
        """Forget replicas that are gone."""
        known = set(addresses)
        self._avoid_until = {address: until for address, until in self._avoid_until.items() if address in known}
