"""The residency of this pod for the operator: built from the observed state (PURE), and written when it changes."""

import asyncio
import logging
import random
from collections.abc import Collection, Mapping

from graft.contracts.agent import MOST_ADAPTERS, AdapterState, Residency, ResidentAdapter, Wanted, WantedAdapter

from graft_server.agent.decisions.decide import OUR_NAME, OnDisk, loaded, unwanted_in_engine
from graft_server.agent.decisions.memory import Failure, Failures
from graft_server.configmaps import ConfigMaps, KubeError

log = logging.getLogger(__name__)

MISSING_SECONDS = 2.0  # longest delay between two reads of a ConfigMap that the operator has not created yet
# A ConfigMap holds 1 MiB for all pods, and a deployment has up to 128 adapters. So if many adapters fail, their
# messages are shortened. Both numbers are characters: for all messages of a pod, and the minimum for one message.
MESSAGES_CHARS, LEAST_CHARS = 16_000, 100
# The operator reconciles the deployment after each write. So a change to Pending or Loading waits this long for an
# outcome, and is written together with it. Otherwise the operator would be busy when the outcome comes.
SETTLE_SECONDS = 0.3
CHECK_SECONDS = 60.0  # how often the key is read back, because the ConfigMap may have been created anew


def resident_adapters(
    wanted: Wanted | None,
    engine: Mapping[str, str] | None,
    adapters_dir: str,
    on_disk: Mapping[str, OnDisk],
    busy: Collection[str],
    failures: Failures,
    load_seconds: Mapping[str, float],
    notes: Mapping[str, str | None],
) -> list[ResidentAdapter]:
    """Return the adapters in this pod: the wanted adapters in their order, then the draining ones.

    `engine`: the models that it lists and that are known to work. `notes`: messages about loaded adapters.
    """
    longest = max(LEAST_CHARS, MESSAGES_CHARS // max(1, len(failures.names)))

    def words(failure: Failure | None) -> str | None:
        if failure is None:
            return None
        return failure.message if len(failure.message) <= longest else failure.message[: longest - 1] + "…"

    def one(adapter: WantedAdapter) -> ResidentAdapter:
        name = adapter.engine_name
        failure = failures.get(name)
        state: AdapterState = "Pending"
        if loaded(adapter, engine, adapters_dir):
            state, failure = "Loaded", None
        elif failure and failure.final:
            state = "Failed"
        elif name in busy or name in on_disk:
            state = "Loading"
        return ResidentAdapter(
            engine_name=name,
            adapter=adapter.adapter,
            digest=adapter.digest,
            state=state,
            reason=failure.reason if failure else None,
            message=words(failure) if state != "Loaded" else notes.get(name),
            load_seconds=load_seconds.get(name) if state == "Loaded" else None,
            size_bytes=on_disk[name].size_bytes if name in on_disk else None,
        )

    def leaving(name: str) -> ResidentAdapter:
        match = OUR_NAME.fullmatch(name)
        parts = match.groupdict() if match else {"adapter": name, "digest": ""}
        failure = failures.get(name)
        return ResidentAdapter(
            engine_name=name,
            adapter=parts["adapter"],
            digest=on_disk[name].digest if name in on_disk else f"sha256:{parts['digest']}",
            state="Draining",
            reason=failure.reason if failure else None,
            message=words(failure),
            size_bytes=on_disk[name].size_bytes if name in on_disk else None,
        )

    if wanted is None:
        return []
    listed = [one(adapter) for adapter in wanted.adapters]
    # An engine may list any names. The operator reads a residency of at most MOST_ADAPTERS.
    draining = unwanted_in_engine(wanted, engine or {})[: max(0, MOST_ADAPTERS - len(listed))]
    return listed + [leaving(name) for name in draining]


class Publisher:
    """Keeps one key of the residency ConfigMap equal to the newest Residency."""

    def __init__(
        self, configmaps: ConfigMaps, configmap: str, pod: str, *, backoff: tuple[float, float] = (1.0, 30.0)
    ) -> None:
        self._configmaps = configmaps
        self._configmap = configmap
        self._pod = pod
        self._backoff = backoff
        self._wake = asyncio.Event()
        self._pressing = asyncio.Event()
        self._newest: str | None = None
        self._outcome: object = None
        self.writes = 0

    def publish(self, residency: Residency) -> None:
        """Take the newest residency. run() writes it if it differs from the ConfigMap."""
        text = residency.json_text()
        if text == self._newest:
            return
        self._newest = text
        if (outcome := _outcome(residency)) != self._outcome:
            self._outcome = outcome
            self._pressing.set()
        self._wake.set()

    async def run(self) -> None:
        """Write until cancelled. If the ConfigMap does not exist, wait until the operator has created it."""
        failed, longest = 0, 0.0
        while True:
            try:
                self._wake.clear()
                self._pressing.clear()
                await self._write()
                failed = 0
            except KubeError as error:
                failed += 1
                longest = MISSING_SECONDS if error.status == 404 else self._backoff[1]
                if error.status != 404 or failed % 10 == 1:
                    log.warning("cannot write the residency: %s", error, extra={"status": error.status})
            if failed:
                delay = min(longest, self._backoff[0] * 2 ** min(failed - 1, 10))
                await asyncio.sleep(delay * random.uniform(0.5, 1.0))  # noqa: S311
                continue
            try:
                async with asyncio.timeout(CHECK_SECONDS):
                    await self._wake.wait()
                async with asyncio.timeout(SETTLE_SECONDS):
                    await self._pressing.wait()
            except TimeoutError:
                continue

    async def _write(self) -> None:
        if (text := self._newest) is None:
            return
        there = await self._configmaps.get(self._configmap)
        if (there.get("data") or {}).get(self._pod) == text:
            return
        uid = there["metadata"]["uid"]
        await self._configmaps.apply_key(self._configmap, uid, self._pod, text, f"graft-agent-{self._pod}"[:128])
        self.writes += 1


def _outcome(residency: Residency) -> object:
    """Return the part that is written without delay: everything except adapters that are Pending or Loading."""
    settled = [
        (item.engine_name, item.state) for item in residency.adapters if item.state not in {"Pending", "Loading"}
    ]
    return residency.ready, residency.engine_started, settled
