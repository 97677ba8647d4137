"""Between operator and agent: the adapters that a pod must load, and the adapters that it has loaded."""

from typing import Literal

from pydantic import Field

from graft.api.adapter import AdapterSignature
from graft.contracts.message import Message

TRUSTED_KEYS = "graft-trusted-keys"  # ConfigMap with the public keys, in the operator's namespace
WANTED_KEY = "wanted.json"


class WantedAdapter(Message):
    """One adapter that replicas must load."""

    engine_name: str  # <tenant>--<adapter>-<version>--<digest12>
    adapter: str  # name of the Adapter resource
    uri: str
    digest: str  # of manifest.json
    signature: AdapterSignature | None = None  # made by the operator, see graft.artifacts.signing
    pods: list[str] | None = None  # pods that must load it; None: every replica

    def is_for(self, pod: str) -> bool:
        """Return whether the pod must load this adapter."""
        return self.pods is None or pod in self.pods

    def same_files(self, other: "WantedAdapter") -> bool:
        """Return whether both differ at most in the signature. A version with a new signature is the same version."""
        return self == other.model_copy(update={"signature": self.signature})


class Wanted(Message):
    """The adapters that the replicas of a deployment must load.

    If not all adapters fit on every replica, each adapter lists its pods, and `assigned` lists all pods of the
    assignment. A pod that is not in `assigned` waits. If it became ready without adapters, the rollout would delete the
    pods that have them.
    """

    schema_version: int = 1
    base_model: str
    max_lora_rank: int
    drain_seconds: int = 10
    adapters: list[WantedAdapter] = Field(default_factory=list)
    assigned: list[str] | None = None  # None: there is no assignment, and every pod loads all adapters
    # Versions that become wanted when the operator has verified them. The agent downloads their files into unused disk
    # space and does not load them.
    expected: list[WantedAdapter] = Field(default_factory=list)

    def is_for(self, engine_name: str, pod: str) -> bool:
        """Return whether the adapter is for this pod. An adapter that is not wanted yet is for every pod."""
        return all(item.is_for(pod) for item in self.adapters if item.engine_name == engine_name)

    def for_pod(self, pod: str) -> "Wanted | None":
        """Return the part for one pod, without the names of pods. Return None if the pod has no assignment yet."""
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
    """The adapters of one pod. The agent writes it when it changes, never on a timer."""

    pod: str
    pod_uid: str
    ready: bool  # the engine is healthy, and every adapter that was wanted at its last start is Loaded or Failed
    engine_started: str | None = None  # changes when the engine restarts
    adapters: list[ResidentAdapter] = Field(default_factory=list)


def engine_name(tenant: str, adapter_resource: str, manifest_digest: str) -> str:
    """Return the adapter's name in the engine. Each version has its own name, so no cache of an engine is stale."""
    return f"{tenant}--{adapter_resource}--{manifest_digest.removeprefix('sha256:')[:12]}"
