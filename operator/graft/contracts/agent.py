"""Between operator and agent: the adapters that a pod must load, and the adapters that it has loaded."""

from typing import ClassVar, Literal

from pydantic import Field

from graft.api.adapter import AdapterSignature
from graft.bounded import Limits
from graft.contracts.enginekeys import MOST_KEYS, Fingerprint
from graft.contracts.message import CONFIGMAP, Message, Name, Real, Uri, Whole, Words

TRUSTED_KEYS = "graft-trusted-keys"  # ConfigMap with the public keys, in the operator's namespace
WANTED_KEY = "wanted.json"
MOST_ADAPTERS = 1000  # of a pod; a deployment has at most 128, and the versions that they replace


class WantedAdapter(Message):
    """One adapter that replicas must load."""

    engine_name: Name  # <tenant>--<adapter>-<version>--<digest12>
    adapter: Name  # name of the Adapter resource
    uri: Uri
    digest: Name  # of manifest.json
    signature: AdapterSignature | None = None  # made by the operator, see graft.artifacts.signing
    pods: list[Name] | None = None  # pods that must load it; None: every replica

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

    limits: ClassVar[Limits] = Limits(CONFIGMAP, depth=6, values=100_000)

    schema_version: Whole = 1
    base_model: Name
    max_lora_rank: Whole
    drain_seconds: Whole = 10
    adapters: list[WantedAdapter] = Field(default_factory=list, max_length=MOST_ADAPTERS)
    assigned: list[Name] | None = None  # None: there is no assignment, and every pod loads all adapters
    # Versions that become wanted when the operator has verified them. The agent downloads their files into unused disk
    # space and does not load them.
    expected: list[WantedAdapter] = Field(default_factory=list, max_length=MOST_ADAPTERS)
    # The keys with which gateways call the engines. None: gateways of an earlier release, which send no key, still run.
    # Then the engines answer requests for completions without a key.
    gateway_keys: list[Fingerprint] | None = Field(default=None, max_length=MOST_KEYS)

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

    engine_name: Name
    adapter: Name
    digest: Name
    state: AdapterState
    reason: Name | None = None
    message: Words | None = None
    load_seconds: Real | None = None
    size_bytes: Whole | None = None


class Residency(Message):
    """The adapters of one pod. The agent writes it when it changes, never on a timer."""

    limits: ClassVar[Limits] = Limits(CONFIGMAP // 2, depth=4, values=10_000)

    pod: Name
    pod_uid: Name
    ready: bool  # the engine is healthy, and every adapter that was wanted at its last start is Loaded or Failed
    engine_started: Name | None = None  # changes when the engine restarts
    certificate: Fingerprint | None = None  # SHA-256 of the engine's certificate (DER); None: it listens without TLS
    adapters: list[ResidentAdapter] = Field(default_factory=list, max_length=MOST_ADAPTERS)


def engine_name(tenant: str, adapter_resource: str, manifest_digest: str) -> str:
    """Return the adapter's name in the engine. Each version has its own name, so no cache of an engine is stale."""
    return f"{tenant}--{adapter_resource}--{manifest_digest.removeprefix('sha256:')[:12]}"
