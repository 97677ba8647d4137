"""Adapters on some of the replicas: what the operator writes for the agents and for the gateway, and in which order."""

import random
from dataclasses import dataclass, field

import pytest
from graft.api import Adapter, AdapterDeployment
from graft.api.adapterdeployment import Autoscaling, ScalingTarget
from graft.contracts.agent import Residency, ResidentAdapter, Wanted
from graft.contracts.gateway import Routes
from graft.reconcile.adapterdeployment import assignment
from graft.reconcile.adapterdeployment.serving import ReplicaView, plan_routes, plan_wanted, resolve, wanted_adapter
from worlds.deployments import adapter, deployment, replica

MIB = 1 << 20


def sized(name: str, version: str = "1.0.0", size: int = 0) -> Adapter:
    found = adapter(version, name=name)
    return found.model_copy(update={"status": found.status.model_copy(update={"size_bytes": size})})


def limited(*names: str, replicas: int = 2, **limits: object) -> AdapterDeployment:
    return deployment(adapters=[f"{name}@latest" for name in names], replicas=replicas, limits=limits)


@dataclass
class Operator:
    """An operator that reconciles repeatedly: first the routes, then the wanted adapters."""

    spec: AdapterDeployment
    adapters: list[Adapter]
    wanted: Wanted | None = None
    routes: Routes | None = None

    def look(self, replicas: list[ReplicaView]) -> None:
        resolutions = resolve(self.spec, self.adapters)
        resolved = [wanted_adapter("shop", item.adapter) for item in resolutions if item.adapter is not None]
        routes = plan_routes(self.spec, resolutions, "shop", replicas, self.routes, None, self.wanted)
        wanted = plan_wanted(self.spec, resolved, self.wanted, routes)
        self.wanted = assignment.assign(wanted, self.spec, resolved, self.adapters, replicas, self.wanted)
        self.routes = assignment.leave_out_moved(routes, self.wanted)

    def homes(self) -> dict[str, list[str] | None]:
        assert self.wanted is not None
        return {item.adapter: item.pods for item in self.wanted.adapters}

    def short(self, *pods: str) -> assignment.Shortage | None:
        assert self.wanted is not None
        resolved = [wanted_adapter("shop", i.adapter) for i in resolve(self.spec, self.adapters) if i.adapter]
        planned = self.spec.spec.autoscaling.min_replicas if self.spec.spec.autoscaling else self.spec.spec.replicas
        return assignment.shortage(self.spec, self.wanted, resolved, self.adapters, pods, planned)


def test_without_limits_every_replica_gets_every_adapter() -> None:
    operator = Operator(limited("x", "y"), [sized("x"), sized("y")])
    operator.look([replica("pod-1"), replica("pod-2")])
    assert operator.wanted and operator.wanted.assigned is None
    assert operator.homes() == {"x-1.0.0": None, "y-1.0.0": None}


def test_each_known_pod_gets_some_adapters_and_an_unknown_pod_gets_none() -> None:
    names = ("u", "v", "w")
    operator = Operator(limited(*names, replicas=3, adaptersPerReplica=2), [sized(name) for name in names])
    operator.look([replica("pod-1"), replica("pod-2"), replica("pod-3", ready=False)])
    assert operator.wanted is not None and operator.wanted.assigned == ["pod-1", "pod-2", "pod-3"]
    for pod in operator.wanted.assigned:
        mine = operator.wanted.for_pod(pod)
        assert mine is not None and len(mine.adapters) == 2
        assert mine.assigned is None and all(item.pods is None for item in mine.adapters)
    assert operator.wanted.for_pod("pod-4") is None


def test_a_pod_without_adapters_is_assigned_and_serves_the_base_model() -> None:
    operator = Operator(limited("big", adapterBytesPerReplica="10Mi"), [sized("big", size=20 * MIB)])
    operator.look([replica("pod-1"), replica("pod-2")])
    assert operator.wanted is not None and operator.homes() == {"big-1.0.0": []}
    mine = operator.wanted.for_pod("pod-1")
    assert mine is not None and mine.adapters == []


def test_a_change_for_other_pods_does_not_change_the_assignment_of_a_pod() -> None:
    names = ("u", "v", "w")
    operator = Operator(limited(*names, adaptersPerReplica=2), [sized(name) for name in names])
    operator.look([replica("pod-1"), replica("pod-2"), replica("pod-3")])
    before = operator.wanted
    operator.look([replica("pod-1"), replica("pod-2"), replica("pod-4")])
    assert before is not None and operator.wanted is not None and before != operator.wanted
    assert before.for_pod("pod-1") == operator.wanted.for_pod("pod-1")


def test_a_new_version_gets_traffic_when_all_its_assigned_replicas_have_loaded_it() -> None:
    x, y, z = sized("x"), sized("y"), sized("z")
    operator = Operator(limited("x", "y", "z", replicas=3, adaptersPerReplica=3), [x, y, z])
    there = {"pod-1": [x, y, z], "pod-2": [x, y, z], "pod-3": [x, y, z]}
    operator.look([replica(pod, *has) for pod, has in there.items()])
    assert operator.wanted is not None and operator.wanted.assigned is None  # all adapters fit

    newer = sized("x", "2.0.0")
    operator.adapters.append(newer)
    operator.look([replica(pod, *has) for pod, has in there.items()])
    homes = operator.homes()["x-2.0.0"]
    assert homes is not None and len(homes) == 2  # not every replica has a slot for it beside the old version

    def targets() -> str | None:
        assert operator.routes is not None
        return operator.routes.routes[0].targets[0].adapter

    there[homes[0]].append(newer)
    operator.look([replica(pod, *has) for pod, has in there.items()])
    assert targets() == "x-1.0.0"
    there[homes[1]].append(newer)
    operator.look([replica(pod, *has) for pod, has in there.items()])
    assert targets() == "x-2.0.0"
    assert operator.wanted.assigned is None and "x-1.0.0" not in operator.homes()  # all adapters fit again


def test_when_all_adapters_fit_again_an_older_version_is_for_every_replica_too() -> None:
    x, y, newer = sized("x"), sized("y"), sized("x", "2.0.0")
    operator = Operator(limited("x", "y", adaptersPerReplica=2), [x, y])
    there = [replica("pod-1", x, y), replica("pod-2", x, y)]
    operator.look(there)
    operator.adapters.append(newer)
    operator.look(there)
    assert operator.homes()["x-1.0.0"] is not None
    operator.spec = limited("x", "y", adaptersPerReplica=3)
    operator.look(there)
    assert operator.homes() == {"x-1.0.0": None, "x-2.0.0": None, "y-1.0.0": None}


def test_an_adapter_leaves_the_route_table_before_it_leaves_its_replica() -> None:
    x, y = sized("x"), sized("y")
    operator = Operator(limited("x", "y", replicas=3, adaptersPerReplica=2), [x, y])
    there = {pod: [x, y] for pod in ("pod-1", "pod-2", "pod-3")}
    operator.look([replica(pod, *has) for pod, has in there.items()])
    operator.spec = limited("x", "y", "z", replicas=3, adaptersPerReplica=2)
    operator.adapters.append(sized("z"))
    operator.look([replica(pod, *has) for pod, has in there.items()])
    assert operator.wanted is not None and operator.routes is not None
    for backend in operator.routes.backends:
        mine = operator.wanted.for_pod(backend.pod)
        assert mine is not None
        assert {name for name in backend.loaded if "--" in name} <= {item.engine_name for item in mine.adapters}


def test_a_shortage_of_slots_names_the_remedies() -> None:
    names = ("u", "v", "w", "x")
    operator = Operator(limited(*names, adaptersPerReplica=3), [sized(name) for name in names])
    operator.look([replica("pod-1"), replica("pod-2")])
    short = operator.short("pod-1", "pod-2")
    assert short is not None and not short.passing
    assert short.message == (
        "w-1.0.0 is on 1 replica instead of 2, x-1.0.0 is on 1 replica instead of 2: "
        "raise spec.replicas to 3, or raise spec.limits.adaptersPerReplica to 4, or list fewer adapters in spec.adapters"
    )


def test_a_shortage_of_bytes_names_the_needed_size() -> None:
    operator = Operator(
        limited("big", "x", adapterBytesPerReplica="1Gi"), [sized("big", size=1500 * MIB), sized("x", size=MIB)]
    )
    operator.look([replica("pod-1"), replica("pod-2")])
    short = operator.short("pod-1", "pod-2")
    assert short is not None
    assert short.message == (
        "big-1.0.0 has no room on 2 replicas: raise spec.limits.adapterBytesPerReplica to 1501Mi, "
        "or list fewer adapters in spec.adapters"
    )


def test_a_shortage_is_temporary_while_replicas_are_starting() -> None:
    names = ("u", "v", "w", "x")
    operator = Operator(limited(*names, replicas=3, adaptersPerReplica=3), [sized(name) for name in names])
    operator.look([replica("pod-1")])
    short = operator.short("pod-1")
    assert short is not None and short.passing and "x-1.0.0 has no room on 1 replica" in short.message


def test_with_autoscaling_the_remedy_names_the_autoscaling_fields() -> None:
    names = ("u", "v", "w", "x")
    target = {"requestsPerReplica": 4}
    found = [sized(name) for name in names]
    spec = limited(*names, replicas=1, adaptersPerReplica=3)

    def scaled(least: int, most: int) -> AdapterDeployment:
        autoscaling = Autoscaling(min_replicas=least, max_replicas=most, target=ScalingTarget.model_validate(target))
        return spec.model_copy(update={"spec": spec.spec.model_copy(update={"autoscaling": autoscaling})})

    operator = Operator(scaled(2, 4), found)
    operator.look([replica("pod-1"), replica("pod-2")])
    short = operator.short("pod-1", "pod-2")
    assert short is not None and not short.passing
    assert short.message.endswith(
        ": raise spec.autoscaling.minReplicas to 3, or raise spec.limits.adaptersPerReplica to 4, "
        "or list fewer adapters in spec.adapters"
    )
    operator.spec = scaled(2, 2)
    short = operator.short("pod-1", "pod-2")
    remedy = "raise spec.autoscaling.minReplicas to 3 and spec.autoscaling.maxReplicas to 3,"
    assert short is not None and remedy in short.message
    operator = Operator(scaled(3, 4), found)
    operator.look([replica("pod-1")])
    short = operator.short("pod-1")
    assert short is not None and short.passing


@dataclass
class Cluster:
    """Replicas whose agents follow their assignments with a delay, and an operator that reconciles in between."""

    chance: random.Random
    operator: Operator
    ready: dict[str, bool] = field(default_factory=dict)
    engines: dict[str, set[str]] = field(default_factory=dict)  # pod -> names of the adapters in its engine
    draining: dict[str, set[str]] = field(default_factory=dict)
    number: int = 0

    def views(self) -> list[ReplicaView]:
        def one(pod: str) -> ReplicaView:
            states = {name: "Draining" if name in self.draining[pod] else "Loaded" for name in self.engines[pod]}
            resident = [
                ResidentAdapter(engine_name=name, adapter=name, digest="d", state=state)  # type: ignore[arg-type]
                for name, state in sorted(states.items())
            ]
            told = Residency(pod=pod, pod_uid="u", ready=True, adapters=resident)
            return ReplicaView(pod, f"{pod}:8000", self.ready[pod], told)

        return [one(pod) for pod in self.ready]

    def agent(self, pod: str) -> None:
        """Run one step of the agent of this pod."""
        assert self.operator.wanted is not None
        mine = self.operator.wanted.for_pod(pod)
        if mine is None:
            return
        names = {item.engine_name for item in mine.adapters}
        table = self.table().get(pod, set())
        for name in sorted((self.engines[pod] - names) & table):
            # The new replica of the adapter has died. All assigned adapters answer only on this pod.
            assert names <= self.engines[pod] and not any(self.elsewhere(other, pod) for other in {name, *names})
        self.draining[pod] = self.engines[pod] - names
        missing = sorted(names - self.engines[pod])
        if missing:
            self.engines[pod].add(self.chance.choice(missing))
        elif self.draining[pod]:
            self.engines[pod] -= self.draining[pod]
        else:
            self.ready[pod] = True

    def elsewhere(self, name: str, pod: str) -> bool:
        """Return whether another replica is assigned the adapter and answers for it."""
        wanted = self.operator.wanted
        assert wanted is not None
        return any(
            other != pod and self.ready[other] and name in self.engines[other] and wanted.is_for(name, other)
            for other in self.ready
        )

    def table(self) -> dict[str, set[str]]:
        assert self.operator.routes is not None
        return {item.pod: {name for name in item.loaded if "--" in name} for item in self.operator.routes.backends}

    def answered(self) -> set[str]:
        """Return the routes that an existing, ready replica answers."""
        assert self.operator.routes is not None
        table = self.table()
        return {
            entry.model
            for entry in self.operator.routes.routes
            for target in entry.targets
            for pod, names in table.items()
            if target.engine_model in names and self.ready.get(pod) and target.engine_model in self.engines[pod]
        }

    def happen(self) -> None:
        names = [ref.partition("@")[0] for ref in self.operator.spec.spec.adapters]
        event = self.chance.choice(["pod", "dies", "version", "attach", "detach", *["agent"] * 12])
        self.number += 1
        if event == "pod" and len(self.ready) < 5:
            pod = f"pod-{self.number:03d}"
            self.ready[pod], self.engines[pod], self.draining[pod] = False, set(), set()
        elif event == "dies" and len(self.ready) > 2:
            self.ready.pop(self.chance.choice(sorted(self.ready)))
        elif event == "version" and names:
            self.operator.adapters.append(sized(self.chance.choice(names), f"1.{self.number}.0", MIB))
        elif event == "attach" and len(names) < 9:
            name = f"a{self.number}"
            self.operator.adapters.append(sized(name, size=MIB))
            self.names([name, *names])
        elif event == "detach" and len(names) > 2:
            names.remove(self.chance.choice(names))
            self.names(names)
        elif event == "agent" and self.ready:
            self.agent(self.chance.choice(sorted(self.ready)))

    def names(self, names: list[str]) -> None:
        self.operator.spec = limited(*names, replicas=3, adaptersPerReplica=self.operator.spec.spec.limits.adapters_per_replica)  # fmt: skip


@pytest.mark.parametrize("seed", range(24))
def test_no_plan_takes_the_last_replica_from_a_working_route(seed: int) -> None:
    spec = limited("x", "y", replicas=3, adaptersPerReplica=seed % 4 + 2)
    cluster = Cluster(random.Random(seed), Operator(spec, [sized("x", size=MIB), sized("y", size=MIB)]))
    cluster.operator.look(cluster.views())
    for _ in range(150):
        cluster.happen()
        assert cluster.operator.routes is not None
        models = {f"shop/{ref.partition('@')[0]}" for ref in cluster.operator.spec.spec.adapters}
        before = cluster.answered() & models
        cluster.operator.look(cluster.views())
        assert before <= cluster.answered()
        for pod, names in cluster.table().items():
            assert names <= cluster.engines[pod]
    for _ in range(60):  # no new events: the agents finish the changes that have begun
        for pod in sorted(cluster.ready):
            cluster.agent(pod)
            cluster.operator.look(cluster.views())
    wanted, slots = cluster.operator.wanted, cluster.operator.spec.spec.limits.adapters_per_replica or 0
    assert wanted is not None
    for pod, ready in cluster.ready.items():
        mine = wanted.for_pod(pod)
        assert ready and mine is not None and len(mine.adapters) <= slots
        assert cluster.engines[pod] == {item.engine_name for item in mine.adapters}
    if len(wanted.adapters) <= slots * len(cluster.ready):
        assert cluster.answered() == {entry.model for entry in cluster.operator.routes.routes}  # type: ignore[union-attr]
