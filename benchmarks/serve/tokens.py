"""python -m benchmarks.serve.tokens: an engine that streams tokens without a model, for benchmarks/serve/keys.py.

A model's work would hide what keys and TLS cost. The checks of callers and the connections are those of the CPU engine.
"""

import argparse
import asyncio
from collections.abc import Awaitable, Callable

from aiohttp import web
from graft_server.callers import Callers
from graft_server.connections import ConnectionLimits, Connections, answer_guarded
from graft_server.engine.settings import Settings

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
EVENT = (
    b'data: {"id":"c","object":"text_completion","created":1,"model":"tiny","choices":[{"index":0,"text":" we"}]}\n\n'
)


async def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.serve.tokens", description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    for flag in ("--callers", "--ssl-certfile", "--ssl-keyfile"):
        parser.add_argument(flag)
    flags = parser.parse_args()
    callers = Callers(flags.callers) if flags.callers else None

    async def complete(request: web.Request) -> web.StreamResponse:
        if callers is not None:
            key = request.headers.get("Authorization", "").encode()
            if status := callers.refusal(request.method, request.path, key):
                return web.Response(status=status)
        tokens = (await request.json())["max_tokens"]
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for _ in range(tokens):
            await response.write(EVENT)
            await asyncio.sleep(0)  # each token is an event of its own, as in an engine
        await response.write(b"data: [DONE]\n\n")
        await response.write_eof()
        return response

    @web.middleware
    async def guarded(request: web.Request, handler: Handler) -> web.StreamResponse:
        return await answer_guarded(request, lambda _: handler(request))

    app = web.Application(middlewares=[guarded])
    app.router.add_post("/v1/completions", complete)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    tls = Settings("", (), ssl_certfile=flags.ssl_certfile, ssl_keyfile=flags.ssl_keyfile).tls
    await Connections(ConnectionLimits()).site(runner, "127.0.0.1", flags.port, tls).start()
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
