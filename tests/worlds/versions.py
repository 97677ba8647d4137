"""Old and new versions of an adapter, and deployments that refer to them."""

from typing import Any

from graft.api import Adapter
from graft.reconcile.adapter import retention

DAY = 86400
NOW = 1_800_000_000.0
POLICY = {"keep": 1, "unusedFor": "30d", "compressAfter": "7d"}
READY = {"Verified": "True", "Archived": "False", "Rejected": "False", "DigestMismatch": "False"}


def text(at: float) -> str:
    return retention._text(at)


def adapter(
    version: str,
    unused_days: float = 0,
    *,
    reason: str = "Verified",
    policy: Any = POLICY,
    base: str = "sha256:one",
    **more: Any,
) -> Adapter:
    """Return a version that was created a year ago and last used `unused_days` days ago."""
    condition = {
        "type": "Ready",
        "status": READY[reason],
        "reason": reason,
        "message": "m",
        "lastTransitionTime": text(0),
    }
    digest = "sha256:" + version.replace(".", "").rjust(64, "0")
    status = {"baseModelDigest": base, "conditions": [condition], "lastUsedTime": text(NOW - unused_days * DAY)}
    return Adapter.model_validate(
        {
            "metadata": {"name": f"support-{version}", "namespace": "shop", "creationTimestamp": text(NOW - 365 * DAY)},
            "spec": {
                "adapter": "support", "version": version, "baseModel": "tiny", "method": "lora",
                "artifact": {"uri": f"s3://graft/shop/adapters/support/{version}/", "digest": digest},
                "retention": policy, **{key: value for key, value in more.items() if key in {"baseVersions"}},
            },
            "status": status | {key: value for key, value in more.items() if key not in {"baseVersions"}},
        }
    )  # fmt: skip


def deployment(*refs: str, name: str = "desk", **status: Any) -> dict[str, Any]:
    return {"metadata": {"name": name}, "spec": {"baseModel": "tiny", "adapters": list(refs)}, "status": status}


OLD, NEW = adapter("1.0.0", 100), adapter("2.0.0", 1)
