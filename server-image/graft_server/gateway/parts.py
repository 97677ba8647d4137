"""The routing table's parts, one in each ConfigMap. An update parses only the ConfigMaps that changed (PURE).

The table is rebuilt only for the namespaces of those ConfigMaps.
"""

from collections.abc import Mapping

from graft.contracts.gateway import ROUTES_KEY, Routes

from graft_server.gateway.table import Part, Table


class Parts:
    """The newest table, and the parts of which it consists."""

    def __init__(self) -> None:
        self.table = Table()
        self.parsed = 0  # ConfigMaps parsed so far
        self._texts: dict[str, str] = {}  # by ConfigMap: the last text, valid or not
        self._parts: dict[str, Part] = {}  # by ConfigMap: the last valid part
        self._invalid: dict[str, str] = {}  # by ConfigMap: why its text was refused

    def update(self, configmaps: Mapping[str, Mapping[str, str]]) -> bool:
        """Read the ConfigMaps. Return whether the table changed. If a ConfigMap is invalid, its last valid part stays."""
        touched: set[str] = set()
        for name in self._texts.keys() - configmaps.keys():
            del self._texts[name]
            self._invalid.pop(name, None)
            if (gone := self._parts.pop(name, None)) is not None:
                touched.add(gone.namespace)
        for name, data in configmaps.items():
            text = data.get(ROUTES_KEY) or ""
            if self._texts.get(name) == text:
                continue
            self._texts[name] = text
            self.parsed += 1
            before = self._parts.get(name)
            try:
                self._parts[name] = part = Part.of(Routes.read(text))
            except ValueError as error:
                self._invalid[name] = f"ConfigMap {name} is invalid: {error}"
                continue
            self._invalid.pop(name, None)
            touched |= {part.namespace} | ({before.namespace} if before else set())
        if touched:
            self.table = self.table.replaced(self._by_namespace(touched))
        return bool(touched)

    @property
    def problems(self) -> list[str]:
        """Return the refused parts and routes, as texts."""
        return [*self._invalid.values(), *self.table.problems]

    @property
    def sleepers(self) -> set[tuple[str, str]]:
        """Return namespace and name of each deployment that may sleep."""
        return {(part.namespace, part.deployment) for part in self._parts.values() if part.sleeps}

    @property
    def addresses(self) -> frozenset[str]:
        """Return the addresses of all backends."""
        return frozenset().union(*(part.addresses for part in self._parts.values()))

    @property
    def uids(self) -> frozenset[str]:
        """Return the UIDs of all deployments."""
        return frozenset(part.uid for part in self._parts.values() if part.uid is not None)

    def _by_namespace(self, namespaces: set[str]) -> dict[str, list[Part]]:
        found: dict[str, list[Part]] = {namespace: [] for namespace in namespaces}
        for part in self._parts.values():
            if part.namespace in found:
                found[part.namespace].append(part)
        return found
