"""Statuses with fields that the cluster's older CRDs do not declare."""

import logging
from typing import Any

import pytest
from graft.connection import UNDECLARED, KubeError
from graft.undeclared import ATTEMPTS, Undeclared, named, without

KIND = "FineTuneJob"
STATUS = {
    "stage": "Running",
    "etaText": "2m",
    "resolved": {"version": "1.0.0", "seed": 1},
    "conditions": [{"type": "Ready", "since": "now"}, {"type": "Accepted"}],
}
DECLARED = {
    "stage": "Running",
    "resolved": {"version": "1.0.0"},
    "conditions": [{"type": "Ready"}, {"type": "Accepted"}],
}
ANSWER = f"""failed to create typed patch object (shop/j; graft.dev/v1alpha1, Kind=FineTuneJob): errors:
  .status.etaText: {UNDECLARED}
  .status.resolved.seed: {UNDECLARED}
  .status.conditions[type="Ready"].since: {UNDECLARED}"""


class Cluster:
    """An API server with a schema. It names `most` of the undeclared fields in one answer."""

    def __init__(self, most: int = 10) -> None:
        self.most = most
        self.old = True
        self.sent: list[dict[str, Any]] = []

    async def send(self, status: dict[str, Any]) -> None:
        self.sent.append(status)
        paths = [".etaText", ".resolved.seed", '.conditions[type="Ready"].since']
        fields = [("etaText",), ("resolved", "seed"), ("conditions", "since")]
        there = [path for path, field in zip(paths, fields, strict=True) if without(status, field) != status]
        if self.old and there:
            text = "\n".join(f".status{path}: {UNDECLARED}" for path in there[: self.most])
            raise KubeError(500, "", f"failed to create typed patch object: {text}")


def test_the_fields_of_the_answer_are_left_out() -> None:
    fields = named(ANSWER)
    assert fields == {("etaText",), ("resolved", "seed"), ("conditions", "since")}
    left: Any = STATUS
    for field in fields:
        left = without(left, field)
    assert left == DECLARED
    assert named(f"failed: .spec.compose: {UNDECLARED}") == named("etcdserver: request timed out") == set()


@pytest.mark.parametrize("most", [1, 10])
async def test_the_rest_is_written_and_each_field_is_reported_once(most: int, caplog: pytest.LogCaptureFixture) -> None:
    cluster, undeclared = Cluster(most), Undeclared()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            await undeclared.apply(KIND, STATUS, cluster.send)
            assert cluster.sent[-1] == DECLARED == undeclared.without(KIND, STATUS)
    assert undeclared.without("Adapter", STATUS) == STATUS
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 3 and all("Apply the CRDs" in text for text in told)
    # The second status was whole at first, and needed one more request.
    assert cluster.sent[-2:] == [STATUS, DECLARED]


async def test_after_the_crds_are_upgraded_the_status_is_whole() -> None:
    cluster, undeclared = Cluster(), Undeclared()
    await undeclared.apply(KIND, STATUS, cluster.send)
    cluster.old = False
    await undeclared.apply(KIND, DECLARED, cluster.send)  # says nothing about the fields
    assert undeclared.without(KIND, STATUS) == DECLARED
    await undeclared.apply(KIND, STATUS, cluster.send)
    assert cluster.sent[-1] == STATUS == undeclared.without(KIND, STATUS)


@pytest.mark.parametrize(
    "message", [f".spec: {UNDECLARED}", "etcdserver: request timed out", f".status.other: {UNDECLARED}"]
)
async def test_another_error_is_raised_at_once(message: str) -> None:
    sent = []

    async def refuse(status: dict[str, Any]) -> None:
        sent.append(status)
        raise KubeError(500, "", message)

    with pytest.raises(KubeError):
        await Undeclared().apply(KIND, STATUS, refuse)
    assert sent == [STATUS]


async def test_the_attempts_are_bounded() -> None:
    status = {f"field{number}": number for number in range(ATTEMPTS + 1)}
    sent = []

    async def refuse(part: dict[str, Any]) -> None:
        sent.append(part)
        raise KubeError(500, "", f".status.{next(iter(part))}: {UNDECLARED}")

    with pytest.raises(KubeError):
        await Undeclared().apply(KIND, status, refuse)
    assert len(sent) == ATTEMPTS
