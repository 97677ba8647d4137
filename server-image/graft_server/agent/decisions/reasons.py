"""Why an adapter is not loaded: the reasons that the residency tells, and how each of them is treated (PURE).

docs/agent.md explains every one of them to the user; a test keeps the two lists equal.
"""

from enum import StrEnum


class AdapterReason(StrEnum):
    """In ResidentAdapter.reason and as the metrics' label `reason`."""

    # The adapter's own fault: nothing helps until someone changes something.
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
    # The disk's: looked at again all the time, because space comes back when another adapter goes.
    DISK_FULL = "DiskFull"
    # The surroundings': every adapter of the pod may have it, and it passes.
    SIGNATURE_MISSING = "SignatureMissing"
    SIGNATURE_KEY_UNKNOWN = "SignatureKeyUnknown"
    CREDENTIALS_INVALID = "CredentialsInvalid"
    STORAGE_UNAVAILABLE = "StorageUnavailable"
    STORAGE_THROTTLED = "StorageThrottled"
    DISK_UNAVAILABLE = "DiskUnavailable"
    ENGINE_UNAVAILABLE = "EngineUnavailable"
    ENGINE_TIMEOUT = "EngineTimeout"
    INTERNAL_ERROR = "InternalError"


# Waiting for these does not help: the state is Failed, and no pod stays unready for them. The others end by themselves, and a
# pod that starts while the store's key is expired must not take the place of one that has its adapters.
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
        AdapterReason.DISK_FULL,
    }
)
SELDOM = FAILED - {AdapterReason.DISK_FULL}  # tried again after minutes

# What may be cured by another key in the storage Secret, by other public keys, and by another process of the engine.
OF_STORAGE = frozenset(
    {
        AdapterReason.CREDENTIALS_INVALID,
        AdapterReason.STORAGE_DENIED,
        AdapterReason.STORAGE_UNAVAILABLE,
        AdapterReason.FILE_MISSING,  # another endpoint or bucket
    }
)
OF_KEYS = frozenset({AdapterReason.SIGNATURE_INVALID, AdapterReason.SIGNATURE_KEY_UNKNOWN})  # by other public keys
OF_ENGINE = frozenset({AdapterReason.ENGINE_REJECTED, AdapterReason.ENGINE_UNAVAILABLE, AdapterReason.ENGINE_TIMEOUT})


class AdapterError(Exception):
    """An adapter that cannot be had now. `retry_after`: seconds that the other side asks for."""

    def __init__(self, reason: AdapterReason, message: str, *, retry_after: float | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.retry_after = retry_after
