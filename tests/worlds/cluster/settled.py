"""Wait until nothing in a tenant's namespace changes any more."""

import time

from worlds.cluster.tenant import Tenant

OURS = ("FineTuneJob", "Adapter", "AdapterDeployment")
CHILDREN = ("Job", "Deployment", "ConfigMap", "NetworkPolicy", "Role", "RoleBinding", "ServiceAccount", "CoreEvent")


def versions(tenant: Tenant) -> dict[str, str]:
    """Return the resourceVersion of every object: kind and name -> resourceVersion."""
    return {
        f"{kind} {item['metadata']['name']}": item["metadata"]["resourceVersion"]
        for kind in (*OURS, *CHILDREN)
        for item in tenant.api.list(kind, tenant.name)
    }


def settled(tenant: Tenant, seconds: float = 3) -> dict[str, str]:
    """Wait until nothing changes for `seconds`. Return the resourceVersions."""
    last, since = versions(tenant), time.monotonic()

    def quiet() -> bool:
        nonlocal last, since
        now = versions(tenant)
        if now != last:
            last, since = now, time.monotonic()
        time.sleep(0.3)
        return time.monotonic() - since > seconds

    tenant.wait(quiet, f"nothing changes for {seconds} s", 60)
    return last
