"""The page of troubleshooting: no reason without a remedy, and no remedy for a reason that does not exist."""

from graft.remedies import NORMAL, REMEDIES, after, page
from graft.status import REASONS

REPORTED = {reason for kind in REASONS.values() for meanings in kind.values() for reason in meanings}


def test_every_reason_has_a_remedy_or_needs_none() -> None:
    assert REMEDIES.keys() | NORMAL == REPORTED
    assert not REMEDIES.keys() & NORMAL


def test_the_page_has_an_anchor_for_each_reason_that_needs_a_person() -> None:
    headings = {line.removeprefix("## ") for line in page().splitlines() if line.startswith("## ")}
    assert headings == REMEDIES.keys() | {"Reasons that need nothing"}


def test_the_page_says_what_follows_the_end_of_a_pod() -> None:
    assert after("DatasetInvalid") == "Exit code 10. The job fails at once."
    assert after("PeerLost") == "Exit code 21. Another attempt follows, and no retry is used."
    assert after("StorageUnavailable") == "Exit code 30. Another attempt follows, until the retries are used up."
    assert after("DoesNotFit") == ""
