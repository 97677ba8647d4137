"""Parts of the gateway that need no network: the route table, the choice of a replica and the rewriting of answers."""

import json
import random

import pytest
from graft.contracts.gateway import ROUTES_KEY, Backend, RouteEntry, Routes, RouteTarget
from graft_server.gateway.errors import engine_error
from graft_server.gateway.parts import Parts
from graft_server.gateway.rewrite import StreamRewriter, Words, rewrite_answer
from graft_server.gateway.table import Balancer, Part, Table


def routes(namespace: str = "a", deployment: str = "d", **fields: object) -> Routes:
    target = RouteTarget(engine_model="a--x-1--" + "0" * 12, adapter="x-1", version="1")
    known = {
        "base_model": "base",
        "routes": [RouteEntry(model=f"{namespace}/x", targets=[target])],
        "backends": [Backend(pod="p1", address="1:8000", loaded=["base", target.engine_model])],
    }
    return Routes.model_validate({"namespace": namespace, "deployment": deployment, **known, **fields})


def table_of(*parts: Routes) -> Table:
    return Table.of(Part.of(part) for part in parts)


def test_a_table_combines_the_routes_of_two_namespaces() -> None:
    table = table_of(routes("b"), routes("a"))
    assert table.size == 2 and table.find("b/x") and not table.problems
    model = table.find("a/x")
    assert model is not None and model.why_not is None and model.pick(random.Random()) == model.targets[0]


def test_a_deployment_defines_models_only_in_its_own_namespace() -> None:
    theirs = routes("b").model_copy(update={"namespace": "a", "deployment": "evil"})
    table = table_of(theirs, routes("b"))
    assert (found := table.find("b/x")) and found.deployment == "d" and "not in its namespace" in table.problems[0]
    table = table_of(routes("a", "z"), routes("a", "d"))
    assert (found := table.find("a/x")) and found.deployment == "d" and "which d has" in table.problems[0]


def test_the_table_says_why_no_replica_answers() -> None:
    loading = table_of(routes(backends=[Backend(pod="p", address="1", loaded=["base"])])).namespaces["a"]["a/x"]
    assert "none of the 1 ready replicas" in str(loading.why_not) and loading.pick(random.Random()) is None
    empty = table_of(routes(backends=[])).namespaces["a"]["a/x"]
    assert "no ready replica" in str(empty.why_not)
    told = table_of(routes(backends=[], unavailable="0 of 2 replicas: image pull failed")).namespaces["a"]["a/x"]
    assert told.why_not == "0 of 2 replicas: image pull failed"


def test_targets_that_can_answer_are_picked_by_weight() -> None:
    targets = [RouteTarget(engine_model=name, weight=weight) for name, weight in (("a", 90), ("b", 10), ("c", 900))]
    part = routes(
        routes=[RouteEntry(model="a/x", targets=targets)],
        backends=[Backend(pod="p", address="1", loaded=["a", "b"])],
    )
    model = table_of(part).namespaces["a"]["a/x"]
    chance = random.Random(1)
    picked = [target.engine_model for target in (model.pick(chance) for _ in range(1000)) if target]
    assert picked.count("c") == 0 and 50 < picked.count("b") < 160


def test_an_invalid_part_keeps_its_last_valid_version() -> None:
    good, parts = routes(), Parts()
    assert parts.update({"one": {ROUTES_KEY: good.json_text()}, "two": {}})
    assert parts.table == table_of(good) and "two" in parts.problems[0]
    assert not parts.update({"one": {ROUTES_KEY: '{"namespace": 1}'}})
    assert parts.table == table_of(good) and "one" in parts.problems[0]
    assert parts.update({}) and parts.table == Table() and not parts.problems


def test_the_least_busy_reachable_replica_is_chosen() -> None:
    one, two = Backend(pod="1", address="1", loaded=[]), Backend(pod="2", address="2", loaded=[])
    balancer = Balancer(random.Random(1))
    balancer.begin("1")
    assert balancer.choose([one, two], [], 0) == two
    balancer.begin("2")
    balancer.begin("2")
    assert balancer.choose([one, two], [], 0) == one
    balancer.avoid("1", until=5)
    assert balancer.choose([one, two], [], 0) == two
    assert balancer.choose([one, two], ["2"], 0) == one  # an avoided replica is better than none
    assert balancer.choose([one, two], [], 6) == one
    assert balancer.choose([one, two], ["1", "2"], 0) is None
    for address in ("1", "2", "2"):
        balancer.end(address)
    assert {balancer.choose([one, two], [], 9).pod for _ in range(50)} == {"1", "2"}  # type: ignore[union-attr]


WORDS = Words("a/x", {"adapter": "x-1"})


def test_a_plain_answer_names_the_model_of_the_client() -> None:
    answer = json.loads(rewrite_answer(b'{"id": "1", "model": "a--x", "choices": [{"text": "\xc3\xa4"}]}', WORDS))
    assert answer == {"id": "1", "model": "a/x", "choices": [{"text": "ä"}], "graft": {"adapter": "x-1"}}
    for bad in (b"", b"[]", b"oops"):
        with pytest.raises(ValueError):
            rewrite_answer(bad, WORDS)


STREAM = (
    b': hello\n\ndata: {"model": "a--x", "choices": [{"text": "\xc3\xa4"}]}\r\n\r\n'
    b'data: {"model": "a--x", "n": 2}\n\ndata: {"error": {"message": "m"}}\n\ndata: not json\n\ndata: [DONE]\n\n'
)


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_a_stream_names_the_model_of_the_client_however_its_bytes_are_split(size: int) -> None:
    rewriter = StreamRewriter(WORDS)
    out = b"".join(rewriter.feed(STREAM[start : start + size]) for start in range(0, len(STREAM), size))
    assert out + rewriter.rest() == (
        b': hello\n\ndata: {"model":"a/x","choices":[{"text":"\xc3\xa4"}],"graft":{"adapter":"x-1"}}\r\n\r\n'
        b'data: {"model":"a/x","n":2}\n\ndata: {"error": {"message": "m"}}\n\ndata: not json\n\ndata: [DONE]\n\n'
    )
    assert rewriter.done


def test_complete_events_are_passed_on_at_once_and_a_line_that_is_too_long_is_not_held_back() -> None:
    rewriter = StreamRewriter(WORDS)
    assert rewriter.feed(b'data: {"n":1}\n\ndata: {"n"').endswith(b"}\n\n")
    assert rewriter.feed(b":2}\n\n").startswith(b'data: {"n":2')
    long = b"data: " + b"x" * (2 << 20)
    assert len(rewriter.feed(long)) == len(long)
    assert rewriter.feed(b'yy\n\ndata: {"n":3}\n\n') == b'yy\n\ndata: {"n":3,"model":"a/x"}\n\n'


@pytest.mark.parametrize(
    "body",
    [
        b'{"error": {"message": "The model `e--x` does not exist.", "type": "NotFoundError", "param": "model"}}',
        b'{"object": "error", "message": "The model `e--x` does not exist.", "type": "NotFoundError", "param": "model"}',
    ],
)
def test_an_error_of_the_engine_names_the_model_of_the_client(body: bytes) -> None:
    error = engine_error(404, body, "e--x", "a/x")
    assert str(error) == "The model `a/x` does not exist." and error.kind == "NotFoundError" and error.param == "model"
    assert "500" in str(engine_error(500, b"<html>", "e--x", "a/x"))
