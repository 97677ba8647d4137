"""Check the operator's signature of a version before it is loaded. The signature shows that the operator verified it.

The public keys come from a ConfigMap in the operator's namespace, which no tenant can write. docs/signatures.md
describes the threats that signatures protect from.
"""

import logging
from collections.abc import Mapping

from graft.artifacts.layout import in_tenants_part, split_s3_uri, tenant_of
from graft.artifacts.signing import KeyUnknown, SignatureInvalid, Statement, trusted_keys, verify
from graft.contracts.agent import WantedAdapter, engine_name

from graft_server.agent.decisions.reasons import AdapterError, AdapterReason
from graft_server.configmaps import Snapshot

log = logging.getLogger(__name__)


class Trust:
    """The trusted public keys, for the versions of one namespace."""

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace
        self._keys: Mapping[str, bytes] | None = None

    @property
    def read(self) -> bool:
        """Return whether take() was called. The wanted adapters often arrive before the keys."""
        return self._keys is not None

    def take(self, configmaps: Snapshot) -> bool:
        """Take the keys of the ConfigMap. Return whether they have changed. If it is missing, the known keys stay."""
        before = self._keys
        for data in configmaps.values():
            self._keys = trusted_keys(data)
            if foreign := sorted(set(data) - set(self._keys)):
                log.error("ignored entries that are not public keys", extra={"entries": foreign})
        if self._keys is None:
            self._keys = {}
        if self._keys != before:
            log.info("%d keys are trusted", len(self._keys), extra={"keys": sorted(self._keys)})
        return self._keys != before

    def check(self, adapter: WantedAdapter) -> None:
        """Raise AdapterError unless a trusted key signed exactly this version, for this namespace and engine name."""
        if adapter.signature is None:
            raise AdapterError(
                AdapterReason.SIGNATURE_MISSING,
                f"the operator has not signed {adapter.adapter} yet: see the condition Ready of the Adapter",
            )
        name, _, version = adapter.adapter.rpartition("-")
        statement = Statement(self._namespace, name, version, adapter.uri, adapter.digest)
        try:
            verify(adapter.signature, statement, self._keys or {})
        except KeyUnknown as error:
            raise AdapterError(AdapterReason.SIGNATURE_KEY_UNKNOWN, str(error)) from error
        except SignatureInvalid as error:
            raise AdapterError(AdapterReason.SIGNATURE_INVALID, str(error)) from error
        self._check_name(adapter)

    def check_place(self, adapter: WantedAdapter, bucket: str) -> None:
        """Raise AdapterError unless the version lies in the tenant's part of the bucket and has its own engine name.

        A version that passes may be downloaded before it is signed, but not loaded.
        """
        self._check_name(adapter)
        try:
            split_s3_uri(adapter.uri)
        except ValueError as error:
            raise AdapterError(AdapterReason.URI_INVALID, str(error)) from error
        if not in_tenants_part(adapter.uri, bucket, tenant_of(self._namespace)):
            raise AdapterError(
                AdapterReason.SIGNATURE_MISSING,
                f"{adapter.uri} is outside of this namespace's part of the bucket {bucket}",
            )

    def _check_name(self, adapter: WantedAdapter) -> None:
        ours = engine_name(tenant_of(self._namespace), adapter.adapter, adapter.digest)
        if adapter.engine_name != ours:
            raise AdapterError(
                AdapterReason.SIGNATURE_INVALID,
                f"the engine name is {adapter.engine_name}, but this version's engine name is {ours}",
            )
