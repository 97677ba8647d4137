"""Conditions: they have documented reasons and transition times, and only transitions create events."""

import re

import pytest
from graft.api.finetunejob import FineTuneJobStatus, Sizing
from graft.api.meta import Condition
from graft.contracts.progress import EXIT_CODES, Reason
from graft.status import MESSAGE_LIMIT, REASONS, condition, duration, merge, transitions
from testbed.shell import REPOSITORY

OPERATOR = REPOSITORY / "operator" / "graft" / "reconcile"


def old(status: str = "True", reason: str = "Verified") -> Condition:
    return Condition.model_validate(
        {
            "type": "Ready",
            "status": status,
            "reason": reason,
            "message": "m",
            "lastTransitionTime": "2026-01-01T00:00:00Z",
        }
    )


def test_an_undocumented_reason_is_an_error() -> None:
    with pytest.raises(KeyError):
        condition("Adapter", "Ready", "False", "BadLuck", "m")


def test_every_failure_of_the_trainer_is_a_documented_reason_of_a_job() -> None:
    documented = REASONS["FineTuneJob"]["Succeeded"]
    assert {str(reason) for reason in Reason} - {Reason.ADAPTER_INVALID} <= set(documented)
    assert set(EXIT_CODES) == set(Reason)


def test_every_reason_in_the_reconcilers_is_documented() -> None:
    documented = {reason for kind in REASONS.values() for type_ in kind.values() for reason in type_}
    text = "".join(path.read_text() for path in OPERATOR.rglob("*.py"))
    used = set(re.findall(r'(?:Trouble|InvalidArtifact|Resolution)\(\s*"([A-Z][A-Za-z]+)"', text))
    assert used
    assert used <= documented, used - documented


def test_a_long_message_is_cut() -> None:
    assert len(condition("Adapter", "Ready", "False", "FileMissing", "x" * 5000).message) == MESSAGE_LIMIT


def test_the_transition_time_changes_only_with_the_status() -> None:
    new = condition("Adapter", "Ready", "True", "Verified", "again")
    (same,) = merge([old()], [new], 2, "2026-02-02T00:00:00Z")
    assert (same.last_transition_time, same.observed_generation) == ("2026-01-01T00:00:00Z", 2)
    (changed,) = merge([old("False", "FileMissing")], [new], 2, "2026-02-02T00:00:00Z")
    assert changed.last_transition_time == "2026-02-02T00:00:00Z"


def test_only_a_changed_status_or_reason_is_a_transition() -> None:
    assert transitions([old()], [old()]) == []
    assert transitions([], [old()]) == [old()]


def test_durations_are_easy_to_read() -> None:
    assert [duration(seconds) for seconds in (0, 45, 200, 7500)] == ["0s", "45s", "3m20s", "2h05m"]


def test_a_map_that_has_become_empty_is_not_written() -> None:
    """Server-side apply would merge it to null, which the schema refuses (tests/faults/test_crds.py)."""
    status = FineTuneJobStatus(sizing=Sizing(items={}, total_bytes=1))
    assert status.model_dump(mode="json", by_alias=True, exclude_none=True)["sizing"] == {
        key: value
        for key, value in status.sizing.model_dump(mode="json", by_alias=True, exclude_none=True).items()
        if key != "items"
    }
    full = FineTuneJobStatus(sizing=Sizing(items={"weights": 1}))
    assert full.model_dump(by_alias=True, exclude_none=True)["sizing"]["items"] == {"weights": 1}
