"""Choose the version that a job publishes, and match references (PURE).

Versions are semver: a new patch for the same recipe, a new minor for another recipe, a new major for another
base model.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass

from graft.api.finetunejob import FineTuneJobSpec

Version = tuple[int, int, int]
LONGEST = 32  # characters of a version, as in the schema


@dataclass(frozen=True)
class Known:
    """A version that is published, or reserved by a job. recipe and base_model are None if they are not known."""

    version: str
    recipe: str | None
    base_model: str | None


def parse(version: str) -> Version | None:
    """Return 1.2.3 as numbers, and None for anything else."""
    parts = version.split(".")
    if len(parts) != 3 or len(version) > LONGEST or not all(part.isascii() and part.isdigit() for part in parts):
        return None
    return int(parts[0]), int(parts[1]), int(parts[2])


def recipe(spec: FineTuneJobSpec) -> str:
    """Return the digest of the recipe of a run: its method, hyperparameters and prompt format, not its data."""
    dataset = spec.dataset
    parts = {
        "method": spec.method.wire(),
        "training": spec.training.wire(),
        "format": dataset.format,
        "templates": dataset.templates,
    }
    return "sha256:" + hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def next_version(known: Iterable[Known], recipe: str, base_model: str) -> str:
    """Return the version that follows the newest known version, or 1.0.0 for the first."""
    numbered = [(number, item) for item in known if (number := parse(item.version)) is not None]
    if not numbered:
        return "1.0.0"
    top = max(number for number, _ in numbered)
    major, minor, patch = top
    newest = [item for number, item in numbered if number == top]
    if any(item.base_model not in {None, base_model} for item in newest):
        return f"{major + 1}.0.0"
    if any(item.recipe == recipe for item in newest):
        return f"{major}.{minor}.{patch + 1}"
    return f"{major}.{minor + 1}.0"


def matches(ref: str, version: str) -> bool:
    """Return whether a version matches a reference's part after the @: latest, 1.2.3, 1.2, 1, ^1, ^1.2 or ^1.2.3."""
    number = parse(version)
    if number is None:
        return False
    if ref == "latest":
        return True
    parts = [int(part) for part in ref.removeprefix("^").split(".")]
    if not ref.startswith("^"):
        return list(number[: len(parts)]) == parts
    lower = (*parts, *([0] * (3 - len(parts))))
    # As in npm, a caret keeps the leftmost non-zero part. Below 1.0.0 this is the minor or the patch.
    if parts[0] > 0 or len(parts) == 1:
        upper = (parts[0] + 1, 0, 0)
    elif parts[1] > 0 or len(parts) == 2:
        upper = (0, parts[1] + 1, 0)
    else:
        upper = (0, 0, parts[2] + 1)
    return lower <= number < upper
