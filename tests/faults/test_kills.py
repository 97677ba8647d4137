"""The operator is killed before and after its mutating requests, and requests lose their answer (rows 1 and 2).

One life has several phases, and one request of each phase is struck. So a sweep needs as many lives as its longest phase
has requests.
"""

import random

import pytest
from testbed.faults import Strike
from testbed.shell import Failed
from worlds.faults.bed import RECOVERIES, Bed, Recovery

PARTS = 4  # of the sweep


def struck_life(bed: Bed, numbers: dict[str, int], how: Strike) -> None:
    """Play a life in which the request with this number is struck in each phase."""
    life = bed.new_life()
    for phase, clean in bed.clean.items():
        bed.healthy()
        bed.strike(numbers[phase], how)
        seconds = bed.run(life, [phase])[phase]
        RECOVERIES.append(Recovery(phase, bed.struck, seconds, clean.seconds, bed.restart_seconds))
    bed.healthy()
    bed.silent(life, 2.0)


@pytest.mark.seconds(30)
@pytest.mark.parametrize("how", list(Strike))
def test_a_life_with_one_strike_in_each_phase_ends_as_without(bed: Bed, seed: random.Random, how: Strike) -> None:
    struck_life(bed, {name: seed.randint(1, len(phase.writes)) for name, phase in bed.clean.items()}, how)
    assert bed.struck


@pytest.mark.seconds(120)
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("how", list(Strike))
def test_every_request_of_a_life_may_be_struck(bed: Bed, how: Strike, part: int) -> None:
    longest = max(len(phase.writes) for phase in bed.clean.values())
    wrong = []
    for number in range(1 + part, longest + 1, PARTS):
        numbers = {name: (number - 1) % len(phase.writes) + 1 for name, phase in bed.clean.items()}
        try:
            struck_life(bed, numbers, how)
        except (Failed, AssertionError) as error:
            wrong.append(f"request {number}: {error}")
    assert wrong == [], "\n\n".join(wrong)
