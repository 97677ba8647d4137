"""The models as GET /v1/models shows them (PURE)."""

import json
from collections.abc import Mapping
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
    """The list of all models as JSON. Each namespace is written again only if its models changed."""

    def __init__(self, created: int) -> None:
        self.created = created
        self._table: Table | None = None
        self._body = b""
        self._of: dict[str, tuple[object, bytes]] = {}  # namespace -> its models, and their entries

    def of(self, table: Table) -> bytes:
        """Return the body of GET /v1/models, sorted by namespace and name."""
        if table is not self._table:
            self._of = {name: self._entries(name, models) for name, models in sorted(table.namespaces.items())}
            entries = b",".join(entries for _, entries in self._of.values())
            self._body = b'{"object":"list","data":[' + entries + b"]}"
            self._table = table
        return self._body

    def _entries(self, namespace: str, models: Mapping[str, Model]) -> tuple[object, bytes]:
        known = self._of.get(namespace)
        if known is not None and known[0] is models:
            return known
        cards = [card(model, self.created) for _, model in sorted(models.items())]
        return models, ",".join(json.dumps(one, ensure_ascii=False) for one in cards).encode()
