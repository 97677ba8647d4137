"""The routing table (PURE): targets and backends by model name. A table never changes; a new one replaces it."""

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from graft.contracts.gateway import Backend, Routes, RouteTarget

MAX_ROUTES = 512  # of one deployment; its kind allows 128 adapters and 128 sequences
MAX_BACKENDS = 1000  # of one deployment


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
    uid: str | None = None  # of its deployment
    # The backends by the engine models that they have loaded. All models of a deployment share it.
    loaded: Mapping[str, tuple[Backend, ...]] = field(default_factory=dict, repr=False, compare=False)

    def replicas(self, target: RouteTarget) -> tuple[Backend, ...]:
        """Return the backends that have the target loaded."""
        return self.loaded.get(target.engine_model, ())

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
class Part:
    """The models of one deployment."""

    namespace: str
    deployment: str
    models: Mapping[str, Model]
    sleeps: bool
    addresses: frozenset[str]
    uid: str | None = None
    foreign: tuple[str, ...] = ()  # names that it claims outside its namespace; they are refused

    @classmethod
    def of(cls, routes: Routes) -> "Part":
        """Build the part. Raises ValueError if the deployment has too many routes or backends."""
        for what, count, most in (
            ("routes", len(routes.routes), MAX_ROUTES),
            ("backends", len(routes.backends), MAX_BACKENDS),
        ):
            if count > most:
                raise ValueError(
                    f"AdapterDeployment {routes.deployment} has {count} {what}; at most {most} are allowed"
                )
        loaded: dict[str, list[Backend]] = {}
        for backend in routes.backends:
            for name in dict.fromkeys(backend.loaded):
                loaded.setdefault(name, []).append(backend)
        shared = {name: tuple(backends) for name, backends in loaded.items()}
        backends = tuple(routes.backends)
        models: dict[str, Model] = {}
        foreign = []
        for route in routes.routes:
            if not route.model.startswith(f"{routes.namespace}/"):
                foreign.append(route.model)
                continue
            models.setdefault(
                route.model,
                Model(
                    name=route.model,
                    namespace=routes.namespace,
                    deployment=routes.deployment,
                    base_model=routes.base_model,
                    targets=tuple(route.targets),
                    backends=backends,
                    unavailable=routes.unavailable,
                    steps=tuple(route.steps),
                    idle_seconds=routes.idle_seconds,
                    uid=routes.uid,
                    loaded=shared,
                ),
            )
        addresses = frozenset(backend.address for backend in backends)
        sleeps = routes.idle_seconds is not None
        return cls(routes.namespace, routes.deployment, models, sleeps, addresses, routes.uid, tuple(foreign))


@dataclass(frozen=True)
class Table:
    """All models, by namespace. So a change of one tenant takes no time for the models of other tenants."""

    namespaces: Mapping[str, Mapping[str, Model]] = field(default_factory=dict)
    conflicts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)  # problems, by namespace

    @classmethod
    def of(cls, parts: Iterable[Part]) -> "Table":
        """Build the table from the parts of all deployments."""
        by_namespace: dict[str, list[Part]] = {}
        for part in parts:
            by_namespace.setdefault(part.namespace, []).append(part)
        return cls().replaced(by_namespace)

    def replaced(self, changed: Mapping[str, Sequence[Part]]) -> "Table":
        """Return a table in which these namespaces have these parts. A namespace without parts is removed.

        A deployment may only name models of its own namespace; other routes are refused. If two deployments claim the
        same name, the deployment that sorts first gets it, so every gateway decides alike.
        """
        namespaces, conflicts = dict(self.namespaces), dict(self.conflicts)
        for namespace, parts in changed.items():
            namespaces.pop(namespace, None)
            conflicts.pop(namespace, None)
            ordered = sorted(parts, key=lambda part: part.deployment)
            models: dict[str, Model] = {}
            for part in reversed(ordered):  # the first part is applied last, so its models win
                models.update(part.models)
            if models:
                namespaces[namespace] = models
            if problems := _problems(ordered, models):
                conflicts[namespace] = problems
        return Table(namespaces, conflicts)

    def find(self, name: str) -> Model | None:
        """Return the model with this name, or None. The time does not depend on the size of the table."""
        models = self.namespaces.get(name.partition("/")[0])
        return models.get(name) if models else None

    @property
    def size(self) -> int:
        """Return the number of models."""
        return sum(map(len, self.namespaces.values()))

    @property
    def problems(self) -> list[str]:
        """Return the refused routes, as texts."""
        return [problem for problems in self.conflicts.values() for problem in problems]


def _problems(parts: Sequence[Part], models: Mapping[str, Model]) -> tuple[str, ...]:
    """Return at most two problems of each part: routes of other namespaces, and routes that another part has already."""
    problems = []
    crowded = sum(len(part.models) for part in parts) > len(models)
    for part in parts:
        whose = f"{part.namespace}/{part.deployment}"
        if part.foreign:
            problems.append(f"{whose} claims {_such(part.foreign)}, which is not in its namespace")
        if crowded and (taken := [name for name, model in part.models.items() if models[name] is not model]):
            owner = models[taken[0]].deployment
            problems.append(f"{whose} claims {_such(taken)}, which {owner} has already")
    return tuple(problems)


def _such(names: Sequence[str]) -> str:
    return f"the model {names[0]}" + (f" (and {len(names) - 1} more)" if len(names) > 1 else "")


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
