"""The models as GET /v1/models shows them (PURE)."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from graft_server.gateway.table import Model, Table


def card(model: Model, created: int) -> dict[str, Any]:
    """Return the entry of one model. `created` is in Unix time, seconds."""
    reason = model.why_not
    target = model.targets[0] if model.targets else None
    asleep = model.idle_seconds is not None and not model.backends
    replicas = {backend.pod for one in (*model.targets, *model.steps) for backend in model.replicas(one)}
    steps = [{"adapter": one.adapter, "version": one.version} for one in model.steps]
    return {
        "id": model.name,
        "object": "model",
        "created": created,
        "owned_by": model.namespace,
        "graft": {
            "adapter": target.adapter if target else None,
            "version": target.version if target else None,
            **({"steps": steps} if steps else {}),
            "deployment": model.deployment,
            "namespace": model.namespace,
            "base_model": model.base_model,
            "state": "asleep" if asleep else "unavailable" if reason else "available",
            "reason": reason,
            "replicas": len(replicas),
        },
    }


class Listing:
    """The list of models as JSON. Each namespace is written again only if its models changed."""

    def __init__(self, created: int) -> None:
        self.created = created
        self._table: Table | None = None
        self._body = b""
        self._of: dict[str, tuple[object, bytes]] = {}  # namespace -> its models, and their entries

    def of(self, table: Table, opened: Mapping[str, frozenset[str] | None] | None = None) -> bytes:
        """Return the body of GET /v1/models, sorted by namespace and name.

        `opened`: only models of these namespaces, each with the names that are listed; None: all.
        """
        if table is not self._table:
            self._of = {name: self._entries(name, models) for name, models in sorted(table.namespaces.items())}
            self._body = _body(entries for _, entries in self._of.values())
            self._table = table
        if opened is None:
            return self._body
        there = [(name, names) for name, names in sorted(opened.items()) if name in self._of]
        found = (self._of[name][1] if names is None else self._some(table, name, names) for name, names in there)
        return _body(filter(None, found))

    def _some(self, table: Table, namespace: str, names: frozenset[str]) -> bytes:
        models = table.namespaces[namespace]
        return self._written(models[name] for name in sorted(names & models.keys()))

    def _entries(self, namespace: str, models: Mapping[str, Model]) -> tuple[object, bytes]:
        known = self._of.get(namespace)
        if known is not None and known[0] is models:
            return known
        return models, self._written(model for _, model in sorted(models.items()))

    def _written(self, models: Iterable[Model]) -> bytes:
        return ",".join(json.dumps(card(model, self.created), ensure_ascii=False) for model in models).encode()


def _body(entries: Iterable[bytes]) -> bytes:
    return b'{"object":"list","data":[' + b",".join(entries) + b"]}"
