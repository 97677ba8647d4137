"""A platform behind a proxy, whose store and hub have certificates of a private authority: each part by itself.

The environment is what the chart gives the operator's container. The whole operator: tests/cluster/operator.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from testbed.objectstore import S3Server
from worlds.cluster.chart import Template, helm, template
from worlds.hub import Hub
from worlds.networks.private import (
    HUB,
    STORE,
    Proxy,
    certificates,
    secured_hub,
    secured_store,
    the_proxy,
    values,
    variables,
)

__all__ = ["helm", "template"]  # fixtures
USE_STORE = """
import sys
from graft.artifacts.identity import VersityIdentity
from graft.artifacts.storage import StorageConfig
from graft.artifacts.store import S3Store
store = S3Store(StorageConfig.from_dir(sys.argv[1]), attempts=1)
store.create_bucket()
store.put("shop/a", b"kept")
identity = VersityIdentity(store, store.config.endpoint)
key = identity.draw("shop")
identity.accept("shop", key.secret_access_key)
print(store.get("shop/a").decode(), *identity.tenants())
"""
USE_HUB = """
import sys
from graft.artifacts.sources import describe
print(describe("hf://org/model", None, sys.argv[1]).revision)
"""


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return certificates(tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="module")
def store(keys: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[S3Server]:
    with secured_store(keys, tmp_path_factory.mktemp("store")) as server:
        yield server


@pytest.fixture(scope="module")
def hub(keys: Path) -> Iterator[Hub]:
    with secured_hub(keys) as server:
        yield server


@pytest.fixture
def proxy(store: S3Server, hub: Hub) -> Iterator[Proxy]:
    with the_proxy(store, hub) as server:
        yield server


@pytest.fixture
def environment(template: Template, proxy: Proxy, keys: Path) -> dict[str, str]:
    """Return the variables of the operator's container, with the mounted bundle at its place on this machine."""
    (deployment,) = (
        item
        for item in template(values(proxy))
        if item["kind"] == "Deployment" and item["metadata"]["name"] == "graft-operator"
    )
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    return variables(container, keys)


def run(program: str, argument: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    kept = {name: os.environ[name] for name in ("PATH", "PYTHONPATH") if name in os.environ}
    return subprocess.run(
        [sys.executable, "-c", program, argument], env=kept | environment, capture_output=True, text=True, check=False
    )


def mounted(store: S3Server) -> Path:
    """Return the folder with the store's address and key, by the name that only the proxy knows."""
    folder = store.secret_dir("graft")
    (folder / "endpoint").write_text(f"https://{STORE}")
    return folder


def test_the_operator_reaches_the_store_and_its_identity_service(
    environment: dict[str, str], store: S3Server, proxy: Proxy
) -> None:
    done = run(USE_STORE, str(mounted(store)), environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["kept", "shop"]
    assert set(proxy.asked) == {f"{STORE}:443"}


def test_the_operator_reads_a_model_of_the_hub(environment: dict[str, str], proxy: Proxy) -> None:
    done = run(USE_HUB, f"https://{HUB}", environment)
    assert done.returncode == 0, done.stderr
    assert set(proxy.asked) == {f"{HUB}:443"}


@pytest.mark.parametrize("missing", ["trustedCA", "proxy"])
def test_without_either_nothing_is_reached(environment: dict[str, str], store: S3Server, missing: str) -> None:
    names = {"HTTPS_PROXY"} if missing == "proxy" else {"SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "AWS_CA_BUNDLE"}
    left = {name: value for name, value in environment.items() if name not in names}
    done = run(USE_STORE, str(mounted(store)), left)
    assert done.returncode != 0 and "StoreError" in done.stderr
