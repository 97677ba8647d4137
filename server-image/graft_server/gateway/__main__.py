"""`python -m graft_server.gateway`: serve until SIGTERM, then finish the requests in flight."""

import asyncio
import logging
import signal
import sys

import aiohttp
from aiohttp import web
from graft.contracts.apikeys import API_KEY_COMPONENT
from graft.contracts.enginekeys import GATEWAY_KEYS
from graft.contracts.gateway import ROUTES_COMPONENT

from graft_server.configmaps import ConfigMaps, Follower, api_client
from graft_server.connections import Connections
from graft_server.gateway.apikeys import ApiKeys
from graft_server.gateway.app import Gateway
from graft_server.gateway.callers import Proxies
from graft_server.gateway.demand import Reporter
from graft_server.gateway.keys import Keys
from graft_server.gateway.ledger import Ledger
from graft_server.gateway.settings import Settings, parse
from graft_server.logs import log_json

log = logging.getLogger("graft_server.gateway")

SELECTOR = {"labelSelector": f"graft.dev/component={ROUTES_COMPONENT}"}
GRANTS = {"labelSelector": f"graft.dev/component={API_KEY_COMPONENT}"}


def main() -> None:
    """Run the gateway."""
    settings = parse()
    log_json(settings.log_level)
    sys.exit(asyncio.run(serve(settings)))


async def serve(settings: Settings) -> int:
    """Serve until SIGTERM or SIGINT. Return the exit code. A second signal ends the wait for requests in flight."""
    stop, again = asyncio.Event(), asyncio.Event()

    def on_signal() -> None:
        (again if stop.is_set() else stop).set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)

    client = await api_client()
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=30)
    async with aiohttp.ClientSession(connector=connector, auto_decompress=False) as session:
        keys = Keys()
        api_keys = ApiKeys() if settings.authentication == "keys" else None
        configmaps = ConfigMaps(client, settings.namespace)
        ledger = Ledger(configmaps, settings.name)
        gateway = Gateway(session, settings, lambda: follower.age, keys, api_keys, ledger)
        follower = Follower(configmaps, SELECTOR, gateway.update)
        secrets = ConfigMaps(client, settings.namespace, "secrets")
        key_follower = Follower(secrets, {"fieldSelector": f"metadata.name={GATEWAY_KEYS}"}, keys.update)
        reporter = Reporter(configmaps, gateway.waiting, settings.name)
        runner = web.AppRunner(
            gateway.application(),
            handler_cancellation=True,
            access_log=None,
            shutdown_timeout=settings.drain_seconds,
        )
        await runner.setup()
        connections = Connections(settings.connections, shared=Proxies(settings.trusted_proxies).trusts)
        await connections.site(runner, settings.listen_address or None, settings.port).start()
        shown = web.AppRunner(gateway.metrics_application(), access_log=None)
        await shown.setup()
        await web.TCPSite(shown, settings.listen_address or None, settings.metrics_port).start()
        log.info("the gateway listens on port %d", settings.port, extra={"namespace": settings.namespace})

        following = asyncio.create_task(follower.run(), name="follower")
        following_keys = asyncio.create_task(key_follower.run(), name="keys")
        watching = asyncio.create_task(warn_when_stale(follower, settings.stale_seconds), name="staleness")
        reporting = asyncio.create_task(reporter.run(), name="reporter")
        stopped = asyncio.create_task(stop.wait())
        endless = [following, following_keys, watching, reporting]
        if api_keys is not None:
            grants = Follower(configmaps, GRANTS, api_keys.update)
            endless.append(asyncio.create_task(grants.run(), name="API keys"))
            endless.append(asyncio.create_task(api_keys.watch(), name="expiry of API keys"))
            endless.append(asyncio.create_task(ledger.run(), name="limits of API keys"))
        else:
            log.warning("clients need no key (--authentication none): everybody may use every model")
        await asyncio.wait({*endless, stopped}, return_when=asyncio.FIRST_COMPLETED)
        code = 0
        for task in endless:
            if task.done():  # these tasks never end: this is a bug, and exit code 1 makes the kubelet restart it
                log.error(
                    "task %s ended unexpectedly; the gateway shuts down", task.get_name(), exc_info=task.exception()
                )
                code = 1

        log.info("shutting down: waiting for %d requests in flight", gateway.in_flight)
        gateway.drain()
        finish = asyncio.create_task(drain(gateway, runner, settings.shutdown_delay))
        impatient = asyncio.create_task(again.wait())
        await asyncio.wait({finish, impatient}, return_when=asyncio.FIRST_COMPLETED)
        for left in (*endless, stopped, finish, impatient):
            left.cancel()
        await shown.cleanup()
        await ledger.close()
        await client.close()
    return code


async def drain(gateway: Gateway, runner: web.AppRunner, delay: float) -> None:
    """Accept requests for `delay` more seconds, until Services have noticed that the pod is unready. Then stop
    accepting and wait for the requests in flight."""
    await asyncio.sleep(delay)
    await runner.cleanup()
    log.info("the gateway has stopped", extra={"left_behind": gateway.in_flight})


async def warn_when_stale(follower: Follower, seconds: float) -> None:
    """Log when the routing table becomes older than `seconds`, and when it is fresh again."""
    stale = False
    while True:
        await asyncio.sleep(5)
        age = follower.age
        if age is not None and (age > seconds) != stale:
            stale = not stale
            if stale:
                log.error(
                    "no answer from the API server for %.0f s; using the last routing table", age, extra={"age": age}
                )
            else:
                log.info("the routing table is fresh again")


if __name__ == "__main__":
    main()
