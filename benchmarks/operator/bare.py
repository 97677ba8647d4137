"""A bare client: it watches FineTuneJobs, and makes the writes of a plan for each, 16 jobs at the same time.

It reads nothing and decides nothing, so it shows how fast the API server takes the writes from one Python process.
"""

import asyncio
import json
import sys
from pathlib import Path
from uuid import uuid4

from worlds.cluster.api import Object

from benchmarks.operator.wire import Wire

AT_ONCE = 16
STATUS = {"apiVersion": "graft.dev/v1alpha1", "kind": "FineTuneJob"}


async def handle(wire: Wire, plan: Object, steps: str, job: Object) -> None:
    """Make the writes for one job."""
    metadata = job["metadata"]
    namespace, name, uid = metadata["namespace"], metadata["name"], metadata["uid"]
    for step in json.loads(steps.replace(plan["name"], name).replace(plan["uid"], uid)):
        if "merge" in step:
            await wire.merge("FineTuneJob", namespace, name, step["merge"])
        elif "status" in step:
            whole = STATUS | {"metadata": {"name": name, "namespace": namespace}, "status": step["status"]}
            await wire.apply(whole, "status")
        elif step["object"]["kind"] in {"Job", "Event"}:
            if step["object"]["kind"] == "Event":
                step["object"]["metadata"]["name"] = f"{name}.{uuid4().hex[:16]}"
            await wire.create(step["object"])
        else:
            await wire.apply(step["object"])


async def run(plan: Object, ready: Path) -> None:
    """Handle FineTuneJobs until the process is terminated."""
    steps, jobs, opened = json.dumps(plan["steps"]), asyncio.Queue[Object](), asyncio.Event()

    async def work(wire: Wire) -> None:
        while True:
            await handle(wire, plan, steps, await jobs.get())

    async def follow(wire: Wire) -> None:
        async for event in wire.watch("FineTuneJob", opened):
            if event["type"] == "ADDED":
                jobs.put_nowait(event["object"])

    async with Wire(plan["server"], Path(plan["pki"]), plan["token"]) as wire, asyncio.TaskGroup() as group:
        group.create_task(follow(wire))
        await opened.wait()
        await asyncio.to_thread(ready.touch)
        for _ in range(AT_ONCE):
            group.create_task(work(wire))


if __name__ == "__main__":
    asyncio.run(run(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])))
