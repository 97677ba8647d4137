"""Fixtures of the fault tests: a cluster of their own, with the proxies before its API server and its store.

`make test-faults` runs all of them. Otherwise a sample runs, another one each day.
"""

import contextlib
import datetime
import json
import os
import random
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest
from graft.artifacts.storage import StorageConfig
from graft.artifacts.store import S3Store
from testbed.faults import faulty_proxy, running
from testbed.objectstore import s3_server
from testbed.shell import tail, wait_for
from worlds.cluster.api import Api
from worlds.cluster.fork_server import ForkServer
from worlds.cluster.operator_process import BUCKET, SETTINGS, install_rights
from worlds.cluster.plane import simulated_plane
from worlds.cluster.tenant import BASE
from worlds.cluster.tenants import make_base_model
from worlds.faults.apiproxy import ApiProxy
from worlds.faults.bed import RECOVERIES, Bed
from worlds.faults.forked import ForkedOperator

HERE = Path(__file__).parent
ALL = os.environ.get("GRAFT_FAULTS") == "all"
SEED = os.environ.get("GRAFT_FAULTS_SEED") or datetime.datetime.now(datetime.UTC).date().isoformat()
SAMPLE_SECONDS = 75  # of the tests in a sample, as their marks `seconds` estimate them; the fixtures take 40 more


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "seconds: how long a fault test takes on two idle cores")


def pytest_report_header() -> str:
    chosen = "all" if ALL else f"a sample of the day; GRAFT_FAULTS_SEED={SEED} repeats it"
    return f"fault tests: {chosen}"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without GRAFT_FAULTS=all, keep the tests that the seed chooses. Tests that are named one by one all run."""
    ours = [item for item in items if item.path.is_relative_to(HERE)]
    for item in ours:
        item.add_marker(pytest.mark.cluster)
    named = any("::" in argument or argument.endswith(".py") for argument in config.args)
    if ALL or named or config.option.keyword:
        return
    left, chosen = SAMPLE_SECONDS, set()
    for item in random.Random(SEED).sample(ours, len(ours)):
        mark = item.get_closest_marker("seconds")
        assert mark is not None, f"{item.nodeid} needs a mark `seconds`"
        if mark.args[0] <= left:
            left -= mark.args[0]
            chosen.add(item)
    config.hook.pytest_deselected(items=[item for item in ours if item not in chosen])
    items[:] = [item for item in items if item not in ours or item in chosen]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print how long the phases took in which a request was struck, and the slowest."""
    hit = sorted((item for item in RECOVERIES if item.struck), key=lambda item: -item.ratio)
    if not hit:
        return
    terminalreporter.section("recovery after strikes")
    late = sum(item.ratio > 1 for item in hit)
    terminalreporter.write_line(f"{len(hit)} phases; {late} took more than twice the undisturbed time and a restart")
    middle = statistics.median(item.ratio for item in hit)
    terminalreporter.write_line(
        f"seconds / (2 x undisturbed + restart): median {middle:.2f}, largest {hit[0].ratio:.2f}"
    )
    for item in hit[:10]:
        times = f"{item.seconds:.1f} s, undisturbed {item.undisturbed:.1f} s, restart {item.restart:.1f} s"
        terminalreporter.write_line(f"{item.ratio:.2f}  {item.phase}: {times}  {item.struck}")


@pytest.fixture(scope="session")
def seed() -> random.Random:
    return random.Random(SEED)


@pytest.fixture(scope="session")
def session_bed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bed]:
    with simulated_plane() as plane, s3_server() as s3, contextlib.ExitStack() as ends:
        api = Api(plane.server, plane.state / "pki")
        kubeconfig = install_rights(plane, api)
        at_api = ApiProxy(plane.server, plane.state / "pki/ca.crt")
        with running(at_api), faulty_proxy(s3.endpoint) as at_store:
            folder = tmp_path_factory.mktemp("operator")
            secret = folder / "secret"
            secret.mkdir()
            for path in s3.secret_dir(BUCKET).iterdir():
                (secret / path.name).write_text(path.read_text())
            (secret / "endpoint").write_text(at_store.endpoint)
            config = json.loads(kubeconfig.read_text())
            config["clusters"][0]["cluster"] = {"server": at_api.endpoint}
            proxied = folder / "kubeconfig"
            proxied.write_text(json.dumps(config))
            server = ForkServer(proxied, ("operator",))
            settings = SETTINGS | {"storage": {**SETTINGS["storage"], "endpoint": s3.endpoint}}
            operator = ForkedOperator(folder, proxied, secret, settings=settings, server=server)
            ends.callback(server.end)
            ends.callback(operator.kill9)
            operator.start()
            store = S3Store(StorageConfig.from_dir(s3.secret_dir(BUCKET)))
            wait_for(
                lambda: BUCKET in [item["Name"] for item in store.client.list_buckets()["Buckets"]],
                30, "the operator created the bucket", lambda: tail(operator.log),
            )  # fmt: skip
            make_base_model(api, store, BASE)
            bed = Bed(plane, api, store, at_api, at_store, operator)
            bed.clean_run()
            yield bed


@pytest.fixture
def bed(session_bed: Bed) -> Iterator[Bed]:
    """Each test has an operator that has just started. What one test did to its watches is no matter of the next."""
    session_bed.calm()
    session_bed.measure_restart()
    yield session_bed
    session_bed.calm()
