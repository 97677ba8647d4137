"""AdapterDeployments, their replicas and the versions that they serve, as the reconciler reads them."""

from typing import Any

from graft.api import Adapter, AdapterDeployment
from graft.contracts.agent import Residency, ResidentAdapter
from graft.contracts.gateway import Routes
from graft.reconcile.adapterdeployment.serving import (
    ReplicaView,
    wanted_adapter,
)


def adapter(version: str, *, ready: bool = True, base: str = "tiny", rank: int = 8, name: str = "support") -> Adapter:
    condition = {
        "type": "Ready", "status": "True" if ready else "False", "reason": "Verified" if ready else "DigestMismatch",
        "message": "m", "lastTransitionTime": "2026-01-01T00:00:00Z",
    }  # fmt: skip
    digest = "sha256:" + (version.replace(".", "") + name.encode().hex() + "0" * 64)[:64]
    return Adapter.model_validate(
        {
            "metadata": {"name": f"{name}-{version}", "namespace": "shop"},
            "spec": {
                "adapter": name,
                "version": version,
                "baseModel": base,
                "method": "lora",
                "artifact": {"uri": f"s3://graft/shop/adapters/{name}/{version}/", "digest": digest},
            },
            "status": {"rank": rank, "conditions": [condition]},
        }
    )


def deployment(**spec: Any) -> AdapterDeployment:
    return AdapterDeployment.model_validate(
        {
            "metadata": {"name": "desk", "namespace": "shop", "uid": "u"},
            "spec": {"baseModel": "tiny", "adapters": ["support@latest"], **spec},
        }
    )


def replica(pod: str, *adapters: Adapter, ready: bool = True, state: str = "Loaded") -> ReplicaView:
    resident = [
        ResidentAdapter(
            engine_name=wanted_adapter("shop", item).engine_name,
            adapter=item.metadata.name,
            digest=item.spec.artifact.digest,
            state=state,  # type: ignore[arg-type]
        )
        for item in adapters
    ]
    return ReplicaView(
        pod, f"10.0.0.{pod[-1]}:8000", ready, Residency(pod=pod, pod_uid="u", ready=ready, adapters=resident)
    )


def target(table: Routes) -> str | None:
    return table.routes[0].targets[0].adapter if table.routes[0].targets else None
