"""The main score of an Adapter, for kubectl get."""

import pytest
from graft.reconcile.adapter.adapter import score


@pytest.mark.parametrize(
    ("metrics", "expected"),
    [
        ({"exactMatch": 0.91, "base/exactMatch": 0.12, "evalLoss": 0.2}, "exactMatch 0.12 -> 0.91"),
        ({"exactMatch": 0.0, "base/exactMatch": 0.4, "evalLoss": 0.2}, "exactMatch 0.40 -> 0.00"),
        ({"exactMatch": 0.91}, "exactMatch 0.91"),
        ({"exactMatch": 0.0, "toolCallAccuracy": 0.8, "evalLoss": 0.2}, "toolCallAccuracy 0.80"),
        # The task has many right answers, so an exact match says nothing.
        ({"exactMatch": 0.0, "base/exactMatch": 0.0, "evalLoss": 1.2, "base/evalLoss": 3.5}, "evalLoss 3.50 -> 1.20"),
        ({"exactMatch": 0.0, "base/exactMatch": 0.0}, "exactMatch 0.00 -> 0.00"),
        ({"evalLoss": 1.2}, "evalLoss 1.20"),
        ({"trainLoss": 1.2}, None),
    ],
)
def test_the_score_fits_the_task(metrics: dict[str, float], expected: str | None) -> None:
    assert score(metrics) == expected
