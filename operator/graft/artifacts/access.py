"""A client of S3 whose key may be replaced while a pod runs. It makes no call of its own."""

import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from botocore.config import Config

from graft.artifacts.storage import REPLACED, StorageConfig, StoreError, client_of, unavailable

log = logging.getLogger(__name__)


class Access:
    """The key that is used now, and the client that signs with it.

    With `folder`, the mounted Secret, the key is read again after a refusal. A store that has accepted the key before
    may be asked again, because the kubelet needs up to 90 s to write a new key. A key that is wrong from the beginning
    fails at once.
    """

    def __init__(
        self,
        config: StorageConfig,
        how: Config,
        before_send: Callable[..., None],
        folder: Path | None = None,
        *,
        accepted: bool = False,
    ) -> None:
        """Open the client. `before_send` is called with each request. `accepted`: whether the key has worked before."""
        self._how, self._before_send = how, before_send
        self.folder = folder
        self.accepted = accepted
        self._lock = threading.Lock()  # boto3 cannot create two clients at the same time
        self.config = config
        self.client = self._open(config)

    def passes(self, error: StoreError) -> bool:
        """Return whether a retry of a call may succeed. If the folder has another key now, it is used from now on."""
        if error.trouble != "denied" or self.folder is None:
            return unavailable(error)
        with self._lock:
            try:
                found = StorageConfig.from_dir(self.folder)
                if found != self.config:
                    self.client, self.config = self._open(found), found
                    return True
            except (StoreError, OSError, ValueError) as unusable:
                log.warning("the mounted storage Secret cannot be used: %s", unusable)
        return self.accepted and error.code in REPLACED

    def _open(self, config: StorageConfig) -> Any:
        client = client_of(config, self._how)
        client.meta.events.register("before-send.s3", self._before_send)
        return client
