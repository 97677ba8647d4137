"""Two operators at once, and operators with a wrong clock (row 11)."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from testbed.controlplane import free_port
from worlds.faults.bed import Bed
from worlds.faults.forked import ForkedOperator

SKEW = 600.0  # seconds
SERVED = ("tune", "serve", "roll", "fail", "delete")


@pytest.fixture
def second(bed: Bed, tmp_path: Path) -> Iterator[ForkedOperator]:
    """Return another operator with the same account. It is not started yet."""
    ports = {"health_port": free_port(), "metrics_port": free_port()}
    operator = replace(bed.operator, folder=tmp_path, process=None, **ports)
    yield operator
    operator.kill9()


@pytest.mark.seconds(50)
def test_two_operators_at_once_do_everything_once(bed: Bed, second: ForkedOperator) -> None:
    second.start()
    life = bed.new_life()
    bed.run(life, SERVED)
    bed.silent(life)


@pytest.mark.seconds(55)
def test_a_second_operator_whose_clock_is_ahead_changes_nothing(bed: Bed, second: ForkedOperator) -> None:
    """Both write; the first is killed in the middle."""
    second.clock = SKEW
    second.start()
    life = bed.new_life()
    life.patience = 120
    life.at = lambda step: bed.kill() if step == "training" else None
    bed.run(life, SERVED)
    bed.silent(life)


@pytest.mark.seconds(50)
@pytest.mark.parametrize("skew", [-SKEW, SKEW], ids=["behind", "ahead"])
def test_an_operator_with_a_wrong_clock_does_the_same(bed: Bed, skew: float) -> None:
    """A job that another operator began a moment ago seems to have begun ten minutes ago, or in ten minutes."""
    life = bed.new_life()

    def shift(step: str) -> None:
        if step == "preflight":
            bed.operator.kill9()
            bed.operator.clock = skew
            bed.healthy()

    life.at = shift
    try:
        bed.run(life, SERVED)
        bed.silent(life)
    finally:
        bed.operator.kill9()
        bed.operator.clock = 0
