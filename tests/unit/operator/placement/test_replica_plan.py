"""Plans that distribute adapters over replicas if not every replica can hold all of them.

Each adapter gets two replicas if two exist. A plan moves only adapters that must move.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import pytest
from graft.placement.replicaroom import Remedies, enough, remedies
from graft.placement.replicas import Capacity, Item, Plan, ReplicaPod, plan

MIB = 1 << 20
Homes = Mapping[str, Sequence[str]]


def items(*names: str, size: int = 0) -> list[Item]:
    return [Item(name, size) for name in names]


def pods(*names: str, loaded: Homes | None = None) -> list[ReplicaPod]:
    """Return ready replicas. Each has loaded the adapters that `loaded` assigns to it."""
    there = loaded or {}
    return [ReplicaPod(name, True, frozenset(item for item, homes in there.items() if name in homes)) for name in names]


def homes(found: Plan) -> Homes:
    assert found.homes is not None
    return found.homes


def test_if_all_adapters_fit_every_replica_gets_all_of_them() -> None:
    assert plan(items("x", "y"), pods("a", "b", "c"), Capacity(adapters=2), {}) == Plan(None)
    assert plan(items("x", "y", size=5), pods("a"), Capacity(bytes=10), {}) == Plan(None)
    assert plan(items("x", "y", size=5), [], Capacity(), {}) == Plan(None)


def test_each_adapter_has_two_replicas_and_the_load_is_even() -> None:
    found = homes(plan(items("u", "v", "w", "x", "y", "z"), pods("a", "b", "c"), Capacity(adapters=4), {}))
    assert {len(where) for where in found.values()} == {2}
    assert [sum(pod in where for where in found.values()) for pod in "abc"] == [4, 4, 4]


def test_the_limit_in_bytes_works_like_the_limit_in_adapters() -> None:
    heavy = [Item("big", 80), Item("x", 30), Item("y", 30), Item("z", 30)]
    found = plan(heavy, pods("a", "b", "c", "d"), Capacity(bytes=100), {})
    assert not found.short
    for pod in "abcd":
        assert sum(item.bytes for item in heavy if pod in homes(found)[item.name]) <= 100


def test_first_copies_are_placed_before_second_copies() -> None:
    found = plan(items("x", "y", "z"), pods("a", "b"), Capacity(adapters=2), {})
    assert sorted(map(len, homes(found).values())) == [1, 1, 2]
    assert found.short == ("y", "z")


def test_the_first_adapters_of_the_list_get_the_free_slots() -> None:
    found = plan(items("x", "y", "z"), pods("a"), Capacity(adapters=2), {})
    assert homes(found) == {"x": ("a",), "y": ("a",), "z": ()}
    assert found.short == ("z",)


def test_an_adapter_above_the_maximum_rank_gets_no_replica() -> None:
    found = plan([Item("x", rank=8), Item("y", rank=64)], pods("a", "b"), Capacity(adapters=1, max_rank=16), {})
    assert (homes(found)["y"], found.short) == ((), ("y",))


def test_an_adapter_gets_no_replica_whose_base_model_it_does_not_fit() -> None:
    """During a rollout of the base model, the pods have different files."""
    there = [*pods("a", "b"), ReplicaPod("c", unfit=frozenset({"x"})), ReplicaPod("d", unfit=frozenset({"x"}))]
    found = homes(plan(items("x", "y", "z"), there, Capacity(adapters=2), {"x": ["b", "c"]}))
    assert found["x"] == ("a", "b")


def test_a_second_copy_may_move_one_other_adapter() -> None:
    before = {"x": ["a", "b"], "y": ["a", "b"], "z": ["c"]}
    found = plan(items("x", "y", "z"), pods("a", "b", "c", loaded=before), Capacity(adapters=2), before)
    assert not found.short
    assert sum(len(set(before[name]) - set(where)) for name, where in homes(found).items()) == 1


def test_free_slots_hold_extra_copies_until_a_new_adapter_needs_them() -> None:
    before = homes(plan(items("x", "y", "z"), pods("a", "b", "c"), Capacity(adapters=2), {}))
    assert {len(where) for where in before.values()} == {2}
    spread = homes(plan(items("x", "y", "z"), pods("a", "b", "c", "d", loaded=before), Capacity(adapters=2), before))
    assert all(set(spread[name]) >= set(where) for name, where in before.items())
    assert sum("d" in where for where in spread.values()) == 2
    full = plan(items("x", "y", "z", "new"), pods("a", "b", "c", "d", loaded=spread), Capacity(adapters=2), spread)
    assert not full.short and {len(where) for where in homes(full).values()} == {2}


def test_the_only_loaded_copy_of_an_adapter_is_not_removed() -> None:
    before = {"x": ["a", "b"], "y": ["a", "b"]}
    only_a = {"x": ["a"], "y": ["a"]}
    found = homes(plan(items("x", "y", "new"), pods("a", "b", loaded=only_a), Capacity(adapters=2), before))
    assert found == {"x": ("a", "b"), "y": ("a",), "new": ("b",)}


def test_a_new_version_takes_the_slot_of_the_second_copy_of_the_old_one() -> None:
    """The change loads, confirms, shifts traffic and unloads, although both replicas are full."""
    before = {"x": ["a", "b"], "y1": ["a", "b"]}
    change = [Item("x"), Item("y2"), Item("y1", leaving=True)]
    found = homes(plan(change, pods("a", "b", loaded=before), Capacity(adapters=2), before))
    assert found["x"] == ("a", "b") and {len(found["y1"]), len(found["y2"])} == {1}
    assert set(found["y1"]) | set(found["y2"]) == {"a", "b"}


def test_with_one_full_replica_a_version_cannot_change() -> None:
    before = {"x": ["a"], "y1": ["a"]}
    change = [Item("x"), Item("y2"), Item("y1", leaving=True)]
    found = plan(change, pods("a", loaded=before), Capacity(adapters=2), before)
    assert found.short == ("y2",) and homes(found)["y1"] == ("a",)
    assert remedies(change, 1, Capacity(adapters=2)) == Remedies(replicas=3, adapters=3)


def test_a_lowered_limit_moves_adapters_that_keep_answering() -> None:
    before = {name: ["a"] for name in "uvwx"}
    there = pods("a", "b", loaded=before)
    found = homes(plan(items(*"uvwx"), there, Capacity(adapters=3), before))
    moved = [name for name in "uvwx" if found[name] == ("a", "b")]
    assert "x" in moved  # the last adapter moves to b, and stays on a until b has loaded it
    later = {name: found[name] for name in "uvwx"}
    settled = homes(plan(items(*"uvwx"), pods("a", "b", loaded=later), Capacity(adapters=3), later))
    assert all(sum(pod in where for where in settled.values()) <= 3 for pod in "ab")
    assert all(settled.values())


def test_an_adapter_whose_replicas_are_all_unready_gets_a_ready_one() -> None:
    before = {"x": ["a", "b"], "y": ["c", "d"], "z": ["c", "d"]}
    there = [
        ReplicaPod("a", ready=False),
        ReplicaPod("b", ready=False),
        ReplicaPod("c", True, frozenset({"y", "z"})),
        ReplicaPod("d", True, frozenset({"y", "z"})),
        ReplicaPod("e", True),
    ]
    found = homes(plan(items("x", "y", "z"), there, Capacity(adapters=2), before, fill=False))
    assert found["x"] == ("a", "b", "e")


def test_an_adapter_stays_on_its_draining_replica_if_no_other_replica_answers() -> None:
    """x was moving from a to a replica that has died since. y was assigned to a, but a has not loaded it yet."""
    before = {"x": ["gone", "b"], "y": ["a"], "z": ["b"]}
    there = [
        ReplicaPod("a", True, frozenset(), draining=frozenset({"x"})),
        ReplicaPod("b", ready=False, loaded=frozenset({"z"})),
    ]
    found = homes(plan(items("x", "y", "z"), there, Capacity(adapters=2), before, fill=False))
    assert found["x"] == ("a", "b")
    tight = homes(plan(items("x", "y"), there[:1], Capacity(adapters=1), {"x": [], "y": ["a"]}))
    assert tight == {"x": ("a",), "y": ()}


@pytest.mark.parametrize(
    ("what", "replicas", "capacity", "expected"),
    [
        (items(*"uvwxyz"), 2, Capacity(adapters=4), Remedies(replicas=3, adapters=6)),
        (items(*"uvwxyz"), 1, Capacity(adapters=2), Remedies(replicas=6, adapters=6)),
        (items("x", size=3 * MIB), 2, Capacity(bytes=2 * MIB), Remedies(bytes=3 * MIB)),
        (items("x", "y", size=3 * MIB), 2, Capacity(bytes=3 * MIB), Remedies(replicas=4, bytes=6 * MIB)),
        (items("x", "y", size=3 * MIB), 2, Capacity(adapters=1, bytes=3 * MIB), Remedies(4, None, None, (2, 6 * MIB))),
    ],
)
def test_remedies_name_the_limits_that_would_suffice(
    what: list[Item], replicas: int, capacity: Capacity, expected: Remedies
) -> None:
    assert not enough(what, replicas, capacity)
    assert remedies(what, replicas, capacity) == expected


# Random scenarios with a seed: adapters and replicas come and go in any order, and agents are slow.


@dataclass
class Story:
    """The life of a deployment. `loaded` maps each replica to the adapters in its engine."""

    chance: random.Random
    capacity: Capacity
    items: list[Item] = field(default_factory=list)
    ready: dict[str, bool] = field(default_factory=dict)
    loaded: dict[str, set[str]] = field(default_factory=dict)
    homes: dict[str, tuple[str, ...]] = field(default_factory=dict)
    number: int = 0

    def name(self) -> str:
        self.number += 1
        return f"{self.number:03d}"

    def happen(self) -> None:
        event = self.chance.choice(
            ["adapter", "adapter", "gone", "pod", "dies", "flaps", "version", "agents", "agents"]
        )
        pick = self.chance.choice
        if event == "adapter":
            limit = self.capacity.bytes or 10
            self.items.insert(0, Item("i" + self.name(), self.chance.randint(1, limit)))
        elif event == "gone" and self.items:
            self.items.remove(pick(self.items))
        elif event == "pod" and len(self.ready) < 6:
            self.ready["p" + self.name()] = False
        elif event == "dies" and self.ready:
            pod = pick(list(self.ready))
            self.ready.pop(pod)
            self.loaded.pop(pod, None)
        elif event == "flaps" and self.ready:
            pod = pick(list(self.ready))
            self.ready[pod] = not self.ready[pod]
        elif event == "version" and self.items:
            old = self.items.pop(self.chance.randrange(len(self.items)))
            self.items = [Item("i" + self.name(), old.bytes), *self.items, Item(old.name, old.bytes, leaving=True)]
        elif event == "agents":
            self.agents(0.5)

    def agents(self, share: float) -> None:
        """Let the agents apply a random `share` of the changes that the plan asks for."""
        for pod in self.ready:
            has = self.loaded.setdefault(pod, set())
            for name, where in self.homes.items():
                if self.chance.random() < share:
                    (has.add if pod in where else has.discard)(name)
            has &= {item.name for item in self.items} | has

    def pods(self) -> list[ReplicaPod]:
        return [ReplicaPod(n, up, frozenset(self.loaded.get(n, ()))) for n, up in self.ready.items()]

    def step(self) -> Plan:
        found = plan(self.items, self.pods(), self.capacity, self.homes)
        names = [item.name for item in self.items]
        self.homes = dict(found.homes) if found.homes is not None else dict.fromkeys(names, tuple(self.ready))
        return found

    def answers(self, homes: Homes) -> set[str]:
        return {pod_item for pod in self.pods() for pod_item in pod.loaded if pod.answers(pod_item) and pod.name in homes.get(pod_item, ())}  # fmt: skip


CAPACITIES = [Capacity(adapters=1), Capacity(adapters=3), Capacity(bytes=20), Capacity(adapters=4, bytes=30)]


@pytest.mark.parametrize("seed", range(48))
def test_random_events_never_violate_the_rules_of_a_plan(seed: int) -> None:
    story = Story(random.Random(seed), CAPACITIES[seed % len(CAPACITIES)])
    for _ in range(40):
        story.happen()
        before, present = dict(story.homes), {item.name for item in story.items}
        answered = story.answers(before) & present
        story.step()
        size = {item.name: item.bytes for item in story.items}
        for pod in story.ready:
            here = [name for name, where in story.homes.items() if pod in where]
            assert story.capacity.adapters is None or len(here) <= story.capacity.adapters
            assert story.capacity.bytes is None or sum(size[name] for name in here) <= story.capacity.bytes
        assert {pod for where in story.homes.values() for pod in where} <= set(story.ready)
        assert answered <= story.answers(story.homes)  # a new plan takes no loaded adapter out of service
        again = dict(story.homes)
        story.step()
        assert story.homes == again  # planning again changes nothing


@pytest.mark.parametrize("seed", range(48))
def test_every_adapter_gets_two_copies_if_the_slots_suffice(seed: int) -> None:
    slots = seed % 4 + 1
    story = Story(random.Random(seed), Capacity(adapters=slots))
    for _ in range(30):
        story.happen()
        story.step()
    for item in [item for item in story.items if item.leaving]:
        story.items.remove(item)  # every change of a version is finished
    story.ready = dict.fromkeys(story.ready, True)
    for _ in range(20):
        story.agents(1.0)
        story.step()
    copies = [len(where) for where in (story.homes[item.name] for item in story.items)]
    room, count = slots * len(story.ready), len(story.ready)
    if min(2, count) * len(copies) <= room:
        assert not copies or min(copies) >= min(2, count)
    else:
        assert sum(copies) == room or not count
        assert len(copies) > room or min(copies) >= 1


def settled(seed: int, *, adapters: int = 0, replicas: int = 0) -> tuple[list[Item], list[str], Capacity, Homes]:
    """Return adapters with two copies each, the names of the replicas, their capacity and a stable plan.

    The capacity allows `adapters` more adapters and `replicas` fewer replicas.
    """
    chance = random.Random(seed)
    count, number = chance.randint(12, 24), chance.randint(4, 7)
    slots = -(-2 * (count + adapters) // (number - replicas))
    there, names = items(*(f"i{n:02d}" for n in range(count))), [f"p{n}" for n in range(number)]
    capacity = Capacity(adapters=slots)
    return there, names, capacity, homes(plan(there, pods(*names), capacity, {}, fill=False))


@pytest.mark.parametrize("seed", range(40))
def test_a_new_adapter_moves_no_other_if_slots_are_free(seed: int) -> None:
    there, names, capacity, before = settled(seed, adapters=3)
    found = homes(plan([*there, Item("new")], pods(*names, loaded=before), capacity, before, fill=False))
    assert len(found["new"]) == 2
    assert {name: where for name, where in found.items() if name != "new"} == before


@pytest.mark.parametrize("seed", range(40))
def test_a_lost_replica_moves_only_its_own_adapters(seed: int) -> None:
    there, names, capacity, before = settled(seed, adapters=3, replicas=1)
    lost, left = names[0], names[1:]
    orphans = {name for name, where in before.items() if lost in where}
    found = homes(plan(there, pods(*left, loaded=before), capacity, before, fill=False))
    for name, where in before.items():
        assert set(where) - {lost} <= set(found[name])
        assert len(set(found[name]) - set(where)) == (1 if name in orphans else 0)


@pytest.mark.parametrize("seed", range(40))
def test_a_new_replica_takes_nothing_away_from_the_others(seed: int) -> None:
    there, names, capacity, before = settled(seed)
    found = homes(plan(there, pods(*names, "pnew", loaded=before), capacity, before))
    assert all(set(where) <= set(found[name]) for name, where in before.items())
    assert sum("pnew" in where for where in found.values()) == min(len(there), capacity.adapters or 0)
