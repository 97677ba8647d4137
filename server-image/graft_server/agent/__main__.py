"""`python -m graft_server.agent` runs the sidecar. With the argument `fetch-base` it is the init container that
downloads the base model.
"""

import asyncio
import logging
import os
import signal
import sys

from aiohttp import web

from graft_server.agent.agent import Agent
from graft_server.agent.engine.access import Access
from graft_server.agent.engine.answers import open_session
from graft_server.agent.engine.client import EngineClient
from graft_server.agent.report.residency import Publisher
from graft_server.agent.server import application
from graft_server.agent.settings import Settings, parse
from graft_server.agent.storage.fetchbase import fetch_base
from graft_server.agent.storage.objects import Storage
from graft_server.agent.storage.trust import Trust
from graft_server.configmaps import ConfigMaps, Follower, api_client
from graft_server.logs import log_json

log = logging.getLogger("graft_server.agent")


def main() -> None:
    """Run the agent until SIGTERM, or download the base model."""
    arguments = sys.argv[1:]
    log_json()
    if arguments[:1] == ["fetch-base"]:
        # Linux does not end the first process of a container by a signal that the process does not handle. Without this
        # handler, a deleted pod would continue the download until its grace period is over.
        signal.signal(signal.SIGTERM, lambda number, _: os._exit(128 + number))
        sys.exit(fetch_base(arguments[1:]))
    settings = parse(arguments)
    logging.getLogger().setLevel(settings.log_level)
    # boto3 keeps ten connections open and logs a warning for each further connection that it closes after use.
    logging.getLogger("urllib3.connectionpool").setLevel(logging.ERROR)
    code = asyncio.run(serve(settings))
    sys.stdout.flush()
    os._exit(code)  # a normal exit would wait for download threads that wait for the network


async def serve(settings: Settings) -> int:
    """Serve until SIGTERM or SIGINT, and return the exit code.

    The agent exits at once: the engine drains its requests itself, and the agent has no state to save.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)

    access = None
    if settings.engine_dir is not None:
        access = Access(settings.engine_dir, tls=settings.engine_url.startswith("https:"))
    client = await api_client()
    configmaps = ConfigMaps(client, settings.namespace)
    publisher = Publisher(configmaps, settings.residency_configmap, settings.pod_name)
    storage = Storage(settings.storage_dir, stall_seconds=settings.stall_seconds)
    async with open_session() as session:
        agent = Agent(
            pod=settings.pod_name,
            pod_uid=settings.pod_uid,
            adapters_dir=settings.adapters_dir,
            base_model_name=settings.base_model_name,
            engine=EngineClient(session, settings.engine_url, access, load_seconds=settings.load_timeout_seconds),
            access=access,
            open_store=storage,
            storage_changed=storage.changed,
            publish=publisher.publish,
            cache_bytes=settings.cache_bytes,
            max_adapter_bytes=settings.max_adapter_bytes,
            trust=Trust(settings.namespace) if settings.trusted_keys else None,
        )
        selector = {"fieldSelector": f"metadata.name={settings.wanted_configmap}"}
        follower = Follower(configmaps, selector, agent.want)
        runner = web.AppRunner(application(agent, lambda: follower.age), access_log=None, shutdown_timeout=1.0)
        await runner.setup()
        await web.TCPSite(runner, settings.listen_address, settings.port).start()
        log.info("the agent listens on port %d", settings.port, extra={"pod": settings.pod_name})

        tasks = [
            asyncio.create_task(agent.run(), name="agent"),
            asyncio.create_task(follower.run(), name="follower"),
            asyncio.create_task(publisher.run(), name="publisher"),
        ]
        if settings.trusted_keys:
            namespace, name = settings.trusted_keys
            keys = Follower(
                ConfigMaps(client, namespace), {"fieldSelector": f"metadata.name={name}"}, agent.trusted_keys
            )
            tasks.append(asyncio.create_task(keys.run(), name="trusted keys"))
        stopped = asyncio.create_task(stop.wait())
        ended, _ = await asyncio.wait({*tasks, stopped}, return_when=asyncio.FIRST_COMPLETED)
        code = 0
        for task in ended - {stopped}:  # no task ends by itself; this is a bug, and a restart of the container fixes it
            log.error("the task %s ended unexpectedly", task.get_name(), exc_info=task.exception())
            code = 1
        agent.stop()
        for task in [*tasks, stopped]:
            task.cancel()
        await runner.cleanup()
        await client.close()
    return code


if __name__ == "__main__":
    main()
