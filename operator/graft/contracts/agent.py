"""Operator and agent: the adapters that a pod must load, the trusted keys, and the adapters that the pod has loaded."""

from typing import Literal

from pydantic import Field

from graft.api.adapter import AdapterSignature
from graft.contracts.message import Message

TRUSTED_KEYS = "graft-trusted-keys"  # public keys, in the operator's namespace
WANTED_KEY = "wanted.json"


class WantedAdapter(Message):
    """One adapter that replicas should have loaded."""

    engine_name: str  # <tenant>--<adapter>-<version>--<digest12>
    adapter: str  # name of the Adapter resource
    uri: str
    digest: str  # of manifest.json
    signature: AdapterSignature | None = None  # by the operator, of all of the above; graft.artifacts.signing
    pods: list[str] | None = None  # those that are to have it; None: every replica

    def is_for(self, pod: str) -> bool:
        """Whether the pod is to have it."""
        return self.pods is None or pod in self.pods

    def same_files(self, other: "WantedAdapter") -> bool:
        """Whether they differ in the signature at most: a version that is signed anew is the same version."""
        return self == other.model_copy(update={"signature": self.signature})


class Wanted(Message):
    """What the replicas of a deployment should have loaded.

    Where not everything fits on every replica each adapter names its pods, and `assigned` all pods that were thought of. A pod
    that is not among them waits to be: to be ready without its adapters would end the pods that have them.
    """

    schema_version: int = 1
    base_model: str
    max_lora_rank: int
    drain_seconds: int = 10
    adapters: list[WantedAdapter] = Field(default_factory=list)
    assigned: list[str] | None = None  # None: there is no assignment, every pod takes everything
    # Wanted as soon as they are verified: their files are brought where there is room, and nothing of them is loaded.
    expected: list[WantedAdapter] = Field(default_factory=list)

    def is_for(self, engine_name: str, pod: str) -> bool:
        """Whether the pod is to have the adapter; one that is not wanted yet is for every pod."""
        return all(item.is_for(pod) for item in self.adapters if item.engine_name == engine_name)

    def for_pod(self, pod: str) -> "Wanted | None":
        """A pod's part, the others' pods left out of it; None while the pod has no part yet."""
        if self.assigned is not None and pod not in self.assigned:
            return None
        mine = [item.model_copy(update={"pods": None}) for item in self.adapters if item.is_for(pod)]
        return self.model_copy(update={"adapters": mine, "assigned": None})


AdapterState = Literal["Pending", "Loading", "Loaded", "Draining", "Failed"]


class ResidentAdapter(Message):
    """One adapter in one pod."""

    engine_name: str
    adapter: str
    digest: str
    state: AdapterState
    reason: str | None = None
    message: str | None = None
    load_seconds: float | None = None
    size_bytes: int | None = None


class Residency(Message):
    """What one pod has loaded; written when it changes, never on a timer."""

    pod: str
    pod_uid: str
    ready: bool  # engine healthy and every required adapter back since the engine's last start
    engine_started: str | None = None  # changes when the engine restarts
    adapters: list[ResidentAdapter] = Field(default_factory=list)


def engine_name(tenant: str, adapter_resource: str, manifest_digest: str) -> str:
    """The name an engine knows an adapter by: a new version is a new name, so no cache is ever stale."""
    return f"{tenant}--{adapter_resource}--{manifest_digest.removeprefix('sha256:')[:12]}"
