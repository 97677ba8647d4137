"""The version number that a job publishes, and the versions that a reference matches."""

import pytest
from graft.reconcile.adapter.versions import Known, matches, next_version

RECIPE, OTHER = "sha256:one", "sha256:two"


def test_the_first_version_is_1_0_0() -> None:
    assert next_version([], RECIPE, "tiny") == "1.0.0"


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ([Known("1.0.0", RECIPE, "tiny")], "1.0.1"),
        ([Known("1.0.0", OTHER, "tiny")], "1.1.0"),
        ([Known("1.0.0", RECIPE, "other")], "2.0.0"),
        ([Known("1.9.0", RECIPE, "tiny"), Known("1.10.0", RECIPE, "tiny")], "1.10.1"),
        ([Known("1.0.0", RECIPE, "tiny"), Known("1.0.1", None, None)], "1.1.0"),
        ([Known("1.0.1", None, None), Known("1.0.1", RECIPE, "tiny")], "1.0.2"),
        ([Known("latest", RECIPE, "tiny")], "1.0.0"),
    ],
)
def test_the_next_version_follows_from_recipe_and_base_model(known: list[Known], expected: str) -> None:
    assert next_version(known, RECIPE, "tiny") == expected


@pytest.mark.parametrize(
    ("ref", "version", "expected"),
    [
        ("latest", "3.2.1", True),
        ("1.2.3", "1.2.3", True),
        ("1.2.3", "1.2.4", False),
        ("1.2", "1.2.9", True),
        ("^1", "1.9.9", True),
        ("^1", "2.0.0", False),
        ("^1.4", "1.3.9", False),
        ("^1.4", "1.4.0", True),
        ("^1.4.2", "1.4.1", False),
        ("^0.2", "0.2.9", True),
        ("^0.2", "0.3.0", False),
        ("^0.0.3", "0.0.4", False),
        ("latest", "not-a-version", False),
    ],
)
def test_which_versions_a_reference_matches(ref: str, version: str, expected: bool) -> None:
    assert matches(ref, version) is expected
