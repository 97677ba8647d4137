"""Keys that wait to be reconciled, in the order in which they get a place. It holds no tasks and no timers (PURE)."""

from collections import OrderedDict
from collections.abc import Callable

Key = tuple[str, str, str]  # kind, namespace, name
Group = tuple[str, str]  # kind, namespace


class Lane:
    """Keys of equal priority. Groups take turns; within a group, the key that waits longest is first."""

    def __init__(self) -> None:
        self._groups: OrderedDict[Group, OrderedDict[Key, None]] = OrderedDict()

    def __contains__(self, key: Key) -> bool:
        return key in self._groups.get(key[:2], ())

    def __len__(self) -> int:
        return sum(map(len, self._groups.values()))

    def add(self, key: Key) -> None:
        """Let a key wait. A key that waits already keeps its position."""
        self._groups.setdefault(key[:2], OrderedDict())[key] = None

    def discard(self, key: Key) -> None:
        """Remove a key, if it waits."""
        group = self._groups.get(key[:2])
        if group is not None and key in group:
            del group[key]
            if not group:
                del self._groups[key[:2]]

    def take(self, load: Callable[[Group], int | None]) -> Key | None:
        """Remove and return the next key, or None if no key may run now.

        `load` returns how many places the namespace of a group holds, or None if the group must wait. The group with
        the smallest load is next. Among those, it is the group that was served longest ago.
        """
        best: Group | None = None
        least = 0
        for group in self._groups:
            found = load(group)
            if found is not None and (best is None or found < least):
                best, least = group, found
                if found == 0:  # at most as many namespaces as places hold one, so the search is short
                    break
        if best is None:
            return None
        key, _ = self._groups[best].popitem(last=False)
        if self._groups[best]:
            self._groups.move_to_end(best)
        else:
            del self._groups[best]
        return key
