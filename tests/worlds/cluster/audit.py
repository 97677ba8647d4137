"""The requests that the operator sent to the API server, as the API server's audit log has them."""

import json
from dataclasses import dataclass
from pathlib import Path

from worlds.cluster.operator_process import ACCOUNT, SYSTEM

USER = f"system:serviceaccount:{SYSTEM}:{ACCOUNT}"
MUTATING = {"create", "update", "patch", "delete", "deletecollection"}


@dataclass(frozen=True)
class Request:
    """One request that the API server answered."""

    verb: str
    resource: str  # with its subresource: finetunejobs/status
    name: str
    status: int

    @property
    def mutates(self) -> bool:
        return self.verb in MUTATING

    def __str__(self) -> str:
        return f"{self.verb} {self.resource} {self.name} -> {self.status}"


def of_operator(log: Path, namespace: str) -> list[Request]:
    """Return the operator's requests about the objects of a namespace, oldest first. Watches are left out."""
    found = []
    for line in log.read_text().splitlines():
        record = json.loads(line)
        about = record.get("objectRef") or {}
        if record["user"]["username"] != USER or about.get("namespace") != namespace or record["verb"] == "watch":
            continue
        resource = "/".join(part for part in (about["resource"], about.get("subresource")) if part)
        found.append(Request(record["verb"], resource, about.get("name", ""), record["responseStatus"]["code"]))
    return found
