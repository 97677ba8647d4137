"""The gateway's keys of engines, made from the root keys in the Secret graft-gateway-keys (PURE)."""

import logging
from collections.abc import Mapping, Sequence

from graft.contracts.enginekeys import RootKeysInvalid, deployment_key, root_keys

log = logging.getLogger(__name__)


class Keys:
    """The keys for all deployments. If the Secret is invalid or does not exist, the last valid keys stay in use."""

    def __init__(self) -> None:
        self.read = False  # whether the API server has answered, even if the Secret does not exist
        self._roots: list[bytes] = []  # the newest first
        self._made: dict[str, list[str]] = {}  # by UID of a deployment

    def update(self, secrets: Mapping[str, Mapping[str, str]]) -> None:
        """Take the root keys. A Follower calls this, with `data` of each Secret that it follows."""
        self.read = True
        for data in secrets.values():
            try:
                roots = list(reversed(root_keys(data).values()))
            except RootKeysInvalid as error:
                log.error("the gateway's keys are invalid, the last valid ones stay in use: %s", error)
                continue
            if roots != self._roots:
                self._roots, self._made = roots, {}
                log.info("read %d root keys", len(roots))

    def of(self, uid: str | None) -> Sequence[str]:
        """Return the keys for a deployment, the newest first. Without a UID, its engines need none."""
        if uid is None:
            return ()
        if uid not in self._made:
            self._made[uid] = [deployment_key(root, uid) for root in self._roots]
        return self._made[uid]

    def keep_only(self, uids: frozenset[str]) -> None:
        """Forget the keys of deployments that no longer exist."""
        self._made = {uid: keys for uid, keys in self._made.items() if uid in uids}
