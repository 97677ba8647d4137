"""`python -m graft_server.engine`: load the model, serve it, and shut down gracefully on SIGTERM."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from typing import NoReturn

import torch
from aiohttp import web
from graft.cpus import cpu_limit

from graft_server.connections import Connections
from graft_server.engine.app import Server
from graft_server.engine.model import BaseModel, load_base_model
from graft_server.engine.settings import Settings, parse

log = logging.getLogger("graft_server.engine")


def main() -> None:
    """Run the engine until SIGTERM or SIGINT."""
    settings = parse()
    # PID 1 of a container ignores a signal without a handler, and loading a large model takes minutes.
    signal.signal(signal.SIGTERM, _leave)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS") or cpu_limit()))
    try:
        base = load_base_model(settings)
    except (OSError, ValueError, RuntimeError) as error:
        log.debug("loading failed", exc_info=True)
        sys.exit(f"the model at {settings.model} cannot be served: {error}")
    asyncio.run(serve(settings, base))


def _leave(number: int, frame: object) -> NoReturn:
    """Exit at once: no request runs yet."""
    sys.exit(0)


async def serve(settings: Settings, base: BaseModel) -> None:
    """Serve until a signal, then finish the running requests. After a second signal, do not wait for them."""
    stop = asyncio.Event()
    again = asyncio.Event()

    def on_signal() -> None:
        (again if stop.is_set() else stop).set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, on_signal)

    server = Server(settings, base)
    runner = web.AppRunner(server.application(), handler_cancellation=True, access_log=None, shutdown_timeout=5.0)
    await runner.setup()
    try:
        site = Connections(settings.connections).site(runner, settings.host, settings.port, settings.tls)
        await site.start()
        for address in runner.addresses:  # the port that was assigned if --port is 0
            log.info("serving %s on %s:%d", ", ".join(settings.served_model_names), address[0], address[1])
        await stop.wait()
        log.info("shutting down: waiting for the running requests")
        drain = asyncio.create_task(server.drain(settings.shutdown_timeout))
        impatient = asyncio.create_task(again.wait())
        await asyncio.wait({drain, impatient}, return_when=asyncio.FIRST_COMPLETED)
        for task in (drain, impatient):
            task.cancel()
    finally:
        await server.close()
        await runner.cleanup()


if __name__ == "__main__":
    main()
