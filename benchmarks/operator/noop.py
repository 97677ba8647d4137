"""A kopf operator with one handler that does nothing, for the kinds of Graft."""

import asyncio
import os
from pathlib import Path
from typing import Any

import kopf

OBJECTS = int(os.environ.get("NOOP_OBJECTS", "0"))
READY = os.environ.get("NOOP_READY", os.devnull)
seen = 0


@kopf.on.startup()
async def start(settings: kopf.OperatorSettings, **_: Any) -> None:
    """Write nothing to the cluster."""
    settings.posting.enabled = False


@kopf.on.event("graft.dev", "v1alpha1", kopf.EVERYTHING)
async def changed(**_: Any) -> None:
    """Count the events. Once every object was seen, create a file."""
    global seen
    seen += 1
    if seen == OBJECTS:
        await asyncio.to_thread(Path(READY).touch)


if __name__ == "__main__":
    kopf.run(clusterwide=True, standalone=True)
