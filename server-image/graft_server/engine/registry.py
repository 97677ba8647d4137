"""The adapters that clients may name. Only the event loop uses the registry; residency.py keeps the weights."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus

from graft_server.engine.adapters import (
    AdapterInvalidError,
    AdapterNotFoundError,
    AdapterWeights,
    PromptWeights,
    WholeModelError,
)
from graft_server.engine.generation import Engine, StoppedError
from graft_server.engine.protocol import ApiError, LoadLoraRequest, UnloadLoraRequest, unavailable
from graft_server.engine.residency import Adapter

log = logging.getLogger(__name__)

MAX_NAMES = 4096  # registered at once; each costs memory and an entry of /v1/models
MAX_NAME_CHARACTERS = 512


@dataclass(frozen=True)
class Registered:
    """A registered adapter, its registration time (Unix time, seconds), and its virtual tokens (0 for a LoRA)."""

    adapter: Adapter
    created: int
    virtual_tokens: int


class AdapterRegistry:
    """The registry that loads and unloads adapters by name. Its answers and errors are vLLM's."""

    def __init__(self, engine: Engine, read: Callable[[str], AdapterWeights], base_names: tuple[str, ...]) -> None:
        self.entries: dict[str, Registered] = {}
        self._engine = engine
        self._read = read
        self._base_names = base_names
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._users: defaultdict[str, int] = defaultdict(int)

    async def load(self, request: LoadLoraRequest) -> str:
        """Load an adapter and register it under a name. Raises ApiError as vLLM does."""
        name, path = request.lora_name, request.lora_path
        if not name or not path:
            raise _invalid_input("Both 'lora_name' and 'lora_path' must be provided.")
        if len(name) > MAX_NAME_CHARACTERS:
            raise _invalid_input(f"'lora_name' must have at most {MAX_NAME_CHARACTERS} characters.")
        if name not in self.entries and len(self.entries) >= MAX_NAMES:
            raise _invalid_input(f"{MAX_NAMES} adapters are loaded already. Unload others first.")
        if name in self._base_names:
            raise _invalid_input(f"The lora adapter name '{name}' is the base model's.")
        async with _Turn(self, name):
            old = self.entries.get(name)
            if old and not request.load_inplace:
                raise _invalid_input(
                    f"The lora adapter '{name}' has already been loaded. "
                    "If you want to load the adapter in place, set 'load_inplace' to True."
                )
            adapter = Adapter(name, path)
            try:
                weights = await asyncio.to_thread(self._read, path)
                self._engine.keep(adapter, weights)
            except AdapterNotFoundError as error:
                message = f"Loading lora {name} failed: No adapter found for {path}"
                raise ApiError(HTTPStatus.NOT_FOUND, "NotFoundError", message) from error
            except WholeModelError as error:
                raise _invalid_input(f"Loading lora {name} failed: {error}") from error
            except AdapterInvalidError as error:
                message = f"Loading lora {name} failed: {error}"
                raise ApiError(HTTPStatus.INTERNAL_SERVER_ERROR, "InternalServerError", message) from error
            except OSError as error:
                message = f"Loading lora {name} failed: {path} cannot be read: {error}"
                raise ApiError(HTTPStatus.INTERNAL_SERVER_ERROR, "InternalServerError", message) from error
            except StoppedError as error:
                raise unavailable("the server is shutting down") from error
            virtual = len(weights.embeddings) if isinstance(weights, PromptWeights) else 0
            self.entries[name] = Registered(adapter, int(time.time()), virtual)
            if old:
                self._retire(old.adapter)
        log.info("loaded adapter %s from %s", name, path)
        return f"Success: LoRA adapter '{name}' added successfully."

    async def unload(self, request: UnloadLoraRequest) -> str:
        """Remove a name. Requests that were accepted under it finish, then the adapter's memory is freed."""
        name = request.lora_name
        if not name:
            raise _invalid_input("'lora_name' needs to be provided to unload a LoRA adapter.")
        async with _Turn(self, name):
            entry = self.entries.pop(name, None)
            if entry is None:
                message = f"The lora adapter '{name}' cannot be found."
                raise ApiError(HTTPStatus.NOT_FOUND, "NotFoundError", message)
            self._retire(entry.adapter)
        log.info("unloaded adapter %s", name)
        return f"Success: LoRA adapter '{name}' removed successfully."

    def _retire(self, adapter: Adapter) -> None:
        def retire() -> None:
            adapter.retired = True

        self._engine.call(retire)


class _Turn:
    """The lock of one adapter's name. It exists only while a request holds or awaits it."""

    def __init__(self, registry: AdapterRegistry, name: str) -> None:
        self._registry = registry
        self._name = name

    async def __aenter__(self) -> None:
        self._registry._users[self._name] += 1
        await self._registry._locks[self._name].acquire()

    async def __aexit__(self, *exception: object) -> None:
        self._registry._locks[self._name].release()
        self._registry._users[self._name] -= 1
        if not self._registry._users[self._name]:
            del self._registry._users[self._name], self._registry._locks[self._name]


def _invalid_input(message: str) -> ApiError:
    return ApiError(HTTPStatus.BAD_REQUEST, "InvalidUserInput", message)
