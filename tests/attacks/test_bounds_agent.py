"""What an engine, a store and a tenant answer to the agent: too much of it, encoded, too deep, or for ever."""

import asyncio
import gzip
import json
import tracemalloc
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from graft.contracts.agent import MOST_ADAPTERS, WANTED_KEY, Residency, Wanted
from graft_server.agent.decisions.memory import Failures
from graft_server.agent.decisions.reasons import AdapterError, AdapterReason
from graft_server.agent.engine import client as engine_module
from graft_server.agent.engine.answers import open_session
from graft_server.agent.engine.client import (
    METRICS_BYTES,
    EngineClient,
    EngineDown,
    EngineRefused,
    active_adapters,
    listed_models,
    process_start,
)
from graft_server.agent.report.residency import resident_adapters
from graft_server.agent.storage.adapterconfig import ConfigRejected, reduced_config
from graft_server.agent.storage.download import inspect
from graft_server.agent.storage.weights import check_weights
from graft_server.configmaps import ConfigMaps, KubeError
from kubernetes.aio.client import ApiClient, Configuration
from worlds.agent import serving
from worlds.serving import MemoryStore, eventually, listening

MIB = 1024 * 1024
LARGE = 60 * MIB


async def flood(request: web.Request, sent: list[int], *, status: int = 200, size: int = LARGE) -> web.StreamResponse:
    """Answer with `size` bytes of brackets, in chunks. `sent` gets the number of the bytes that were sent."""
    response = web.StreamResponse(status=status)
    await response.prepare(request)
    for _ in range(size // MIB):
        await response.write(b"[" * MIB)
        sent.append(MIB)
    return response


def answering(handler: Any) -> web.Application:
    """An engine that gives the same answer to everything."""
    app = web.Application(client_max_size=1 << 25)
    app.router.add_route("*", "/{path:.*}", handler)
    return app


@pytest.mark.parametrize("status", [200, 500])
async def test_an_answer_of_60_mb_is_not_read(status: int) -> None:
    """An engine answers each probe, load and unload with 60 MB -> the agent closes the connection after the bound."""
    sent: list[int] = []
    app = answering(lambda request: flood(request, sent, status=status))
    async with listening(app) as address, aiohttp.ClientSession() as session:
        client = EngineClient(session, f"http://{address}", load_seconds=20)
        tracemalloc.start()
        try:
            for read in (client.models, client.exposition):
                with pytest.raises(EngineDown):
                    await read()
            if status == 200:
                await client.load("a", "/adapters/a")  # the answer to a load that succeeded is not needed
            else:
                with pytest.raises(EngineRefused) as caught:
                    await client.load("a", "/adapters/a")
                assert len(str(caught.value)) <= 500
            assert tracemalloc.get_traced_memory()[1] < 40 * MIB
        finally:
            tracemalloc.stop()
        assert sum(sent) < LARGE


async def test_a_compressed_answer_is_refused() -> None:
    """An engine answers with 60 KB of gzip that hold 60 MB -> refused, not decompressed."""
    packed = gzip.compress(b"[" * LARGE)

    async def answer(request: web.Request) -> web.Response:
        assert request.headers["Accept-Encoding"] == "identity"
        return web.Response(body=packed, headers={"Content-Encoding": "gzip"})

    async with listening(answering(answer)) as address, aiohttp.ClientSession() as session:
        client = EngineClient(session, f"http://{address}")
        tracemalloc.start()
        try:
            for read in (client.models, client.exposition):
                with pytest.raises(EngineDown, match="compressed"):
                    await read()
            assert tracemalloc.get_traced_memory()[1] < 4 * MIB
        finally:
            tracemalloc.stop()


async def test_a_redirect_is_not_followed() -> None:
    """An engine redirects the agent to another server of the cluster -> the agent does not go there."""
    asked: list[str] = []

    async def other(request: web.Request) -> web.Response:
        asked.append(request.path)
        return web.json_response({"data": []})

    async with listening(answering(other)) as elsewhere:

        async def answer(request: web.Request) -> web.Response:
            raise web.HTTPTemporaryRedirect(f"http://{elsewhere}{request.path}")

        async with listening(answering(answer)) as address, aiohttp.ClientSession() as session:
            client = EngineClient(session, f"http://{address}")
            with pytest.raises(EngineDown):
                await client.models()
            with pytest.raises(EngineRefused):
                await client.load("a", "/adapters/a")
    assert asked == []


async def test_an_answer_that_never_ends_meets_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine sends a byte now and then, for ever -> the probe ends at its deadline."""
    monkeypatch.setattr(engine_module, "PROBE_TIMEOUT", aiohttp.ClientTimeout(total=0.5))

    async def answer(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        while True:
            await response.write(b" ")
            await asyncio.sleep(0.05)

    async with listening(answering(answer)) as address, aiohttp.ClientSession() as session:
        with pytest.raises(EngineDown):
            await EngineClient(session, f"http://{address}").models()


LISTINGS = {
    "deep": b"[" * 100_000,
    "a number of 5,000 digits": b'{"data": ' + b"9" * 5000 + b"}",
    "many models": json.dumps({"data": [{"id": str(number)} for number in range(5_000)]}).encode(),
    "a long name": json.dumps({"data": [{"id": "a" * 5_000}]}).encode(),
    "a name that is a list": b'{"data": [{"id": ["a"]}]}',
    "no list": b'{"data": {"id": "a"}}',
    "null": b"null",
    "half a character": b'{"data": [{"id": "\\ud800"}]}',
}


@pytest.mark.parametrize("body", LISTINGS.values(), ids=LISTINGS.keys())
async def test_a_listing_out_of_bounds_means_that_the_engine_is_down(body: bytes) -> None:
    """An engine lists models deep, many, or with absurd names -> EngineDown, and the next probe follows."""

    async def answer(request: web.Request) -> web.Response:
        return web.Response(body=body if request.path == "/v1/models" else b"")

    async with listening(answering(answer)) as address, aiohttp.ClientSession() as session:
        with pytest.raises(EngineDown):
            await EngineClient(session, f"http://{address}").models()


def test_the_listing_of_vllm_with_the_most_adapters_is_read() -> None:
    """128 adapters as vLLM 0.33 lists them -> read."""
    permission = dict.fromkeys((f"allow_{number}" for number in range(12)), True)
    card = {"object": "model", "created": 1, "owned_by": "vllm", "parent": "base", "max_model_len": 131072}
    cards = [
        card | {"id": f"a{number}", "root": f"/adapters/a{number}", "permission": [permission]}
        for number in range(1000)
    ]
    assert len(listed_models(json.dumps({"object": "list", "data": cards}).encode())) == 1000


def test_an_engine_that_lists_any_number_of_our_names_fills_no_residency() -> None:
    """An engine lists 2,000 adapters with our naming -> the residency holds as many as the operator reads."""
    listed = {f"team-a--x-{number}-1.0.0--{number:012x}": "/x" for number in range(2_000)}
    wanted = Wanted(base_model="base", max_lora_rank=8)
    found = resident_adapters(wanted, listed, "/adapters", {}, (), Failures(), {}, {})
    assert len(found) == MOST_ADAPTERS
    text = Residency(pod="p", pod_uid="u", ready=True, adapters=found).json_text()
    assert Residency.read(text).adapters == found


def test_metrics_of_many_combinations_are_read_quickly() -> None:
    """An engine exposes 8 MB of metrics -> only the newest line of each process is parsed."""
    line = 'vllm:lora_requests_info{{max_lora="4",running_lora_adapters="{}",waiting_lora_adapters=""}} {}.0'
    lines = [line.format(f"team-a--x-{number}-1.0.0--{number:012x}", number) for number in range(60_000)]
    text = "vllm:num_requests_running 1.0\n" + "\n".join(lines) + "\nprocess_start_time_seconds 12.5\n"
    assert len(text) < METRICS_BYTES
    tracemalloc.start()
    try:
        assert active_adapters(text) == {"team-a--x-59999-1.0.0--00000000ea5f"}
        assert process_start(text) == 12.5
        assert tracemalloc.get_traced_memory()[1] < 2 * MIB
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "text",
    [
        "\n".join(f'vllm:lora_requests_info{{engine="{number}"}} 1.0' for number in range(10_000)),
        "vllm:lora_requests_info{ 1.0",
        "vllm:lora_requests_info " + "9" * 1_000_000 + "x",
        'vllm:lora_requests_info{engine="' + '\\"' * 1_000_000,
        "process_start_time_seconds x",
    ],
    ids=lambda text: text[:40],
)
def test_metrics_that_are_none_are_not_readable(text: str) -> None:
    """An engine exposes lines that are no metrics -> ValueError, after which no adapter is unloaded, or nothing."""
    try:
        assert active_adapters(text) == frozenset()
        assert process_start(text) is None
    except ValueError:
        pass


async def test_cookies_of_an_engine_are_not_kept() -> None:
    """An engine sets a new cookie with each answer -> the agent's session keeps none."""
    came: list[str] = []

    async def answer(request: web.Request) -> web.Response:
        came.append(request.headers.get("Cookie", ""))
        response = web.json_response({"data": []})
        response.set_cookie(f"c{len(came)}", "x" * 3_000)
        return response

    async with listening(answering(answer)) as address, open_session() as session:
        for _ in range(3):
            await EngineClient(session, f"http://localhost:{address.rpartition(':')[2]}").models()
    assert came == [""] * 6


# Files of a version


@pytest.mark.parametrize(
    "data",
    [b"[" * 500_000, b'{"r": ' + b"9" * 5000 + b"}", json.dumps({"a": [0] * 400_000}).encode(), b"[]", b'{"r": NaN}'],
    ids=lambda data: f"{data[:8]!r} x{len(data)}",
)
def test_a_config_out_of_bounds_is_rejected(data: bytes) -> None:
    """A tenant publishes an adapter_config.json that is deep or huge -> ConfigInvalid."""
    with pytest.raises(ConfigRejected) as caught:
        reduced_config(data, 8, 8)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    "header",
    [
        b"[" * 5_000_000,
        b"{" * 5_000_000,
        json.dumps({str(number): 0 for number in range(600_000)}).encode(),
        b'{"a": {"dtype": "F32", "shape": [' + b"9" * 5000 + b'], "data_offsets": [0, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [1e400], "data_offsets": [0, 0]}}',
        json.dumps({"a" * 1_000_000: {"shape": ["x"], "data_offsets": [0, 0]}}).encode(),
        json.dumps({"a": {"shape": ["x" * 1_000_000], "data_offsets": [0, 0]}}).encode(),
    ],
    ids=lambda header: f"{header[:8]!r} x{len(header)}",
)
def test_a_header_of_weights_out_of_bounds_is_invalid(tmp_path: Path, header: bytes) -> None:
    """A tenant publishes safetensors with a deep or huge header -> WeightsInvalid, with a short message."""
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(AdapterError) as caught:
        check_weights(path, 8)
    assert caught.value.reason == AdapterReason.WEIGHTS_INVALID
    assert len(str(caught.value)) < 2_000


@pytest.mark.parametrize("data", [b"[" * 500_000, b"[" * (2 * MIB)], ids=["deep", "large"])
def test_a_manifest_out_of_bounds_is_invalid_for_the_agent(data: bytes) -> None:
    """A tenant replaces manifest.json by brackets -> ManifestInvalid or DigestMismatch, which are final."""
    store = MemoryStore()
    wanted = store.publish("a")
    key = next(key for key in store.objects if key.endswith("manifest.json"))
    store.objects[key] = data
    with pytest.raises(AdapterError) as caught:
        inspect(lambda: store, wanted, 8, MIB)  # type: ignore[arg-type, return-value]
    assert caught.value.reason in (AdapterReason.MANIFEST_INVALID, AdapterReason.DIGEST_MISMATCH)


async def test_wanted_adapters_out_of_bounds_change_nothing(tmp_path: Path) -> None:
    """A tenant writes brackets into the ConfigMap of the wanted adapters -> ignored, the adapters stay loaded."""
    async with serving(tmp_path) as (pod, _, _):
        a = pod.store.publish("a")
        pod.want(a)
        await pod.state(a, "Loaded")
        for text in ("[" * 500_000, "9" * 5000, "\ud800", json.dumps({"adapters": [0] * 200_000}), "x" * (2 * MIB)):
            pod.agent.want({"x": {WANTED_KEY: text}})
        await eventually(lambda: pod.one(a) is not None and pod.one(a).state == "Loaded")  # type: ignore[union-attr]


# The API server's answers


async def test_answers_of_an_api_server_are_bounded() -> None:
    """Something answers in the API server's place with 600 MB, or an error of 60 MB -> KubeError, retried later."""
    sent: list[int] = []

    async def answer(request: web.Request) -> web.StreamResponse:
        return await flood(request, sent, status=200 if "list" not in request.path else 500, size=600 * MIB)

    async with listening(answering(answer)) as address:
        client = ApiClient(Configuration(host=f"http://{address}"))
        try:
            for maps in (ConfigMaps(client, "team-a"), ConfigMaps(client, "list")):
                with pytest.raises(KubeError):
                    await maps.get("wanted")
        finally:
            await client.close()
    assert sum(sent) < 100 * MIB


async def test_many_config_maps_are_listed_in_pages() -> None:
    """Somebody creates thousands of ConfigMaps with the label -> they are listed in pages of 20."""
    asked: list[str] = []

    async def answer(request: web.Request) -> web.Response:
        asked.append(request.query.get("limit", ""))
        start = int(request.query.get("continue", "0"))
        names = range(start, min(start + 20, 50))
        meta = {"resourceVersion": "7"} | ({"continue": str(start + 20)} if start + 20 < 50 else {})
        return web.json_response(
            {"metadata": meta, "items": [{"metadata": {"name": str(n)}, "data": {}} for n in names]}
        )

    async with listening(answering(answer)) as address:
        client = ApiClient(Configuration(host=f"http://{address}"))
        try:
            found, version = await ConfigMaps(client, "graft-system").list({"labelSelector": "a=b"})
        finally:
            await client.close()
    assert (len(found), version, asked) == (50, "7", ["20"] * 3)
