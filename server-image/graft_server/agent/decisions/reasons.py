"""Why an adapter is not loaded: the reasons in the residency, and how the agent retries each of them (PURE).

docs/agent.md explains every reason to the user. A test keeps the two lists equal.
"""

from enum import StrEnum


class AdapterReason(StrEnum):
    """The values of ResidentAdapter.reason and of the metrics' label `reason`."""

    # Faults of the adapter itself: retries do not help until somebody changes something.
    NAME_INVALID = "NameInvalid"
    URI_INVALID = "UriInvalid"
    FILE_MISSING = "FileMissing"
    MANIFEST_INVALID = "ManifestInvalid"
    DIGEST_MISMATCH = "DigestMismatch"
    TOO_LARGE = "TooLarge"
    NOT_SERVABLE = "NotServable"
    RANK_TOO_HIGH = "RankTooHigh"
    CONFIG_INVALID = "ConfigInvalid"
    WEIGHTS_INVALID = "WeightsInvalid"
    STORAGE_DENIED = "StorageDenied"
    SIGNATURE_INVALID = "SignatureInvalid"
    ENGINE_REJECTED = "EngineRejected"
    LOADED_WITHOUT_EFFECT = "LoadedWithoutEffect"
    LOADED_WITH_OTHER_EFFECT = "LoadedWithOtherEffect"
    # Fault of the disk: checked in every round, because space becomes free when another adapter is removed.
    DISK_FULL = "DiskFull"
    # Faults of the surroundings: every adapter of the pod may be affected, and the fault passes.
    SIGNATURE_MISSING = "SignatureMissing"
    SIGNATURE_KEY_UNKNOWN = "SignatureKeyUnknown"
    CREDENTIALS_INVALID = "CredentialsInvalid"
    STORAGE_UNAVAILABLE = "StorageUnavailable"
    STORAGE_THROTTLED = "StorageThrottled"
    DISK_UNAVAILABLE = "DiskUnavailable"
    ENGINE_UNAVAILABLE = "EngineUnavailable"
    ENGINE_TIMEOUT = "EngineTimeout"
    INTERNAL_ERROR = "InternalError"


# For these reasons waiting does not help: the state is Failed, and no pod stays unready because of them. The other
# reasons pass, and the pod waits. A pod that starts while the store's key is expired must not replace a pod that has
# its adapters.
FAILED = frozenset(
    {
        AdapterReason.NAME_INVALID,
        AdapterReason.URI_INVALID,
        AdapterReason.FILE_MISSING,
        AdapterReason.MANIFEST_INVALID,
        AdapterReason.DIGEST_MISMATCH,
        AdapterReason.TOO_LARGE,
        AdapterReason.NOT_SERVABLE,
        AdapterReason.RANK_TOO_HIGH,
        AdapterReason.CONFIG_INVALID,
        AdapterReason.WEIGHTS_INVALID,
        AdapterReason.STORAGE_DENIED,
        AdapterReason.SIGNATURE_INVALID,
        AdapterReason.ENGINE_REJECTED,
        AdapterReason.LOADED_WITHOUT_EFFECT,
        AdapterReason.LOADED_WITH_OTHER_EFFECT,
        AdapterReason.DISK_FULL,
    }
)
SELDOM = FAILED - {AdapterReason.DISK_FULL}  # retried with the long delays

# The reasons that a change of the storage Secret, of the public keys, or a restart of the engine may fix.
OF_STORAGE = frozenset(
    {
        AdapterReason.CREDENTIALS_INVALID,
        AdapterReason.STORAGE_DENIED,
        AdapterReason.STORAGE_UNAVAILABLE,
        AdapterReason.FILE_MISSING,  # the Secret may name another endpoint or bucket
    }
)
OF_KEYS = frozenset({AdapterReason.SIGNATURE_INVALID, AdapterReason.SIGNATURE_KEY_UNKNOWN})
OF_ENGINE = frozenset(
    {
        AdapterReason.ENGINE_REJECTED,
        AdapterReason.LOADED_WITHOUT_EFFECT,
        AdapterReason.LOADED_WITH_OTHER_EFFECT,
        AdapterReason.ENGINE_UNAVAILABLE,
        AdapterReason.ENGINE_TIMEOUT,
    }
)


class AdapterError(Exception):
    """The reason why an adapter cannot be served now. `retry_after`: seconds that the store asks the agent to wait."""

    def __init__(self, reason: AdapterReason, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.retry_after = retry_after
