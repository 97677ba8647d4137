"""Which fields a run tries: all of them, or a sample that changes every day."""

import datetime
import os
import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")
VARIABLE = "GRAFT_FIELDS"  # `all`, or the seed of an earlier run
CHOICE = os.environ.get(VARIABLE) or str(datetime.date.today().toordinal())
ALL = CHOICE == "all"


def sample(items: Sequence[T], count: int, name: str = "") -> list[T]:
    """Return `count` of the items in their order, or all of them. `name` makes the samples of two lists different."""
    if ALL or count >= len(items):
        return list(items)
    chosen = random.Random(f"{CHOICE} {name}").sample(range(len(items)), count)
    return [items[number] for number in sorted(chosen)]
