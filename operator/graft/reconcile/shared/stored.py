"""Parse lists of stored resources. It knows no kind, and it reports nothing (PURE)."""

from collections.abc import Iterable
from typing import TypeVar

from pydantic import ValidationError

from graft.api.meta import Resource
from graft.kube import Manifest

R = TypeVar("R", bound=Resource)


def valid(kind: type[R], items: Iterable[Manifest]) -> list[R]:
    """Return the resources that the schema accepts.

    Other resources are left out, so that an invalid one does not stop the reconciles of all. Its own reconcile reports
    SpecInvalid (admission.py).
    """
    found = []
    for item in items:
        try:
            found.append(kind.model_validate(item))
        except ValidationError:
            continue
    return found
