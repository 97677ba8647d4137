"""Status fields that the CRDs in the cluster do not declare, because they are older than the operator.

The API server refuses a whole server-side apply because of one such field, and names it. So the status is applied without
it: it is better that one column is empty than that no job goes on.
"""

import logging
import re
from collections.abc import Awaitable, Callable
from typing import Any

from graft.connection import UNDECLARED, KubeError

log = logging.getLogger(__name__)

ATTEMPTS = 5  # to apply one status; each but the last leaves out the fields that the answer before named
# For example `.status.resolved.seed` or `.status.conditions[type="Ready"].since`, as the API server writes paths.
NAMED = re.compile(rf"\.status((?:\.[A-Za-z][A-Za-z0-9]*|\[[^\]\n]*\])+): {UNDECLARED}")
INDEX = re.compile(r"\[[^\]]*\]")

Path = tuple[str, ...]  # names of fields below the status; lists are passed through


class Undeclared:
    """The undeclared status fields of each kind. They are known until a status with one of them is accepted."""

    def __init__(self) -> None:
        self._known: dict[str, set[Path]] = {}

    def without(self, kind: str, status: dict[str, Any]) -> dict[str, Any]:
        """Return a status without the fields that are known to be undeclared: what the API server keeps of it."""
        for path in sorted(self._known.get(kind, ())):
            status = without(status, path)
        return status

    async def apply(self, kind: str, status: dict[str, Any], send: Callable[[dict[str, Any]], Awaitable[None]]) -> None:
        """Send a status, and again without the fields that the API server names as undeclared.

        Each status is first sent whole, so that it is complete as soon as the CRDs are upgraded. Raises what `send`
        raises for another reason, and its last KubeError after ATTEMPTS.
        """
        sent = status
        for attempt in range(1, ATTEMPTS + 1):
            try:
                await send(sent)
            except KubeError as error:
                self._learn(kind, named(str(error)))
                less = self.without(kind, status)
                if attempt == ATTEMPTS or UNDECLARED not in str(error) or less == sent:
                    raise
                sent = less
            else:
                if attempt == 1 and self.without(kind, status) != status:
                    self._known.pop(kind, None)
                return

    def _learn(self, kind: str, paths: set[Path]) -> None:
        known = self._known.setdefault(kind, set())
        for path in sorted(paths - known):
            log.warning(
                "the CustomResourceDefinition of %s is older than this operator: it has no field status.%s, which stays "
                "empty. Apply the CRDs of the operator's chart",
                kind, ".".join(path),
            )  # fmt: skip
        known |= paths


def named(message: str) -> set[Path]:
    """Return the fields that the API server's message names as undeclared (PURE)."""
    return {tuple(INDEX.sub("", found).strip(".").split(".")) for found in NAMED.findall(message)}


def without(value: Any, path: Path) -> Any:
    """Return a value without the field at this path, in every element of lists on the way (PURE)."""
    if isinstance(value, list):
        return [without(item, path) for item in value]
    if not isinstance(value, dict) or path[0] not in value:
        return value
    name, rest = path[0], path[1:]
    if not rest:
        return {key: item for key, item in value.items() if key != name}
    return value | {name: without(value[name], rest)}
