"""Whether the operator has verified a version: its signature, checked before anything of it is loaded.

The public keys come from a ConfigMap of the operator's namespace, which no tenant can write; docs/signatures.md says what that
protects from.
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
    """The public keys that count, for the versions of one namespace."""

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace
        self._keys: Mapping[str, bytes] | None = None

    @property
    def read(self) -> bool:
        """Whether the keys were looked for: what is wanted often comes first."""
        return self._keys is not None

    def take(self, configmaps: Snapshot) -> bool:
        """Take what the ConfigMap says; whether that is new. One that is gone changes nothing."""
        before = self._keys
        for data in configmaps.values():
            self._keys = trusted_keys(data)
            if foreign := sorted(set(data) - set(self._keys)):
                log.error("entries that are no keys are ignored", extra={"entries": foreign})
        if self._keys is None:
            self._keys = {}
        if self._keys != before:
            log.info("%d keys are trusted", len(self._keys), extra={"keys": sorted(self._keys)})
        return self._keys != before

    def check(self, adapter: WantedAdapter) -> None:
        """AdapterError unless a trusted key signed exactly this version, for this namespace and under this name."""
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
        """AdapterError unless a version that nobody has signed yet lies in the tenant's own part of the bucket, under its own name:
        what may be brought, and no more than that."""
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
                AdapterReason.SIGNATURE_INVALID, f"what is meant is {ours}, and not {adapter.engine_name}"
            )
