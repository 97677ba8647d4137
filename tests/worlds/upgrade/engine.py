"""`python -m worlds.upgrade.engine`: a stand-in for an engine, which answers with the digest of the adapter's weights.

It takes the arguments of an engine, and answers only callers with a key, as engines do.
"""

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Handler
from graft.contracts.enginekeys import fingerprint
from graft_server import callers

from worlds.serving import FakeEngine


def digest(folder: Path) -> str:
    """Return the answer of an adapter: the SHA-256 of its weights."""
    return hashlib.sha256((folder / "adapter_model.safetensors").read_bytes()).hexdigest()


class Engine(FakeEngine):
    """Serves a base model and the adapters that are loaded."""

    def __init__(self, base: str, keys: Path) -> None:
        super().__init__(base)
        self._keys = keys
        self.answer = self._weigh

    async def _weigh(self, _: web.Request, body: dict[str, Any]) -> web.Response:
        if body["model"] not in self.adapters:
            return self.error(404, f"The model `{body['model']}` does not exist.", "NotFoundError", "model")
        text = digest(Path(self.adapters[body["model"]]))
        return web.json_response({"id": "c1", "model": body["model"], "choices": [{"index": 0, "text": text}]})

    def guarded(self) -> web.Application:
        """Return the application with the check of keys."""

        @web.middleware
        async def check(request: web.Request, handler: Handler) -> web.StreamResponse:
            key = request.headers.get("Authorization", "").removeprefix("Bearer ")
            # The agent writes the file before it listens, and here engine and agent start at the same time.
            accepted = json.loads(self._keys.read_text()) if self._keys.exists() else {}
            agent, gateway = accepted.get(callers.AGENT, []), accepted.get(callers.GATEWAY, [])
            open_ = request.path == "/health" or gateway is None
            if not open_ and fingerprint(key) not in {*agent, *gateway}:
                return self.error(401, "the key is not accepted", "Unauthorized")
            return await handler(request)

        app = self.app()
        app.middlewares.append(check)
        return app


def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser()
    for name in ("host", "callers", "served-model-name"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--port", type=int, required=True)
    asked, _ = parser.parse_known_args()
    engine = Engine(asked.served_model_name, Path(asked.callers))
    web.run_app(engine.guarded(), host=asked.host, port=asked.port, print=None)


if __name__ == "__main__":
    main()
