"""One cluster with a real node for the whole suite; the product is installed from its chart, with the images built from this checkout."""

from collections.abc import Iterator

import pytest
from testbed import demo, packages, product, quickstart
from testbed.binaries import build
from testbed.cluster import Cluster
from testbed.quickstart import Access


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    packages.install(packages.NODE)
    product.beside(lambda: build(["kube", "pause", "coredns", "helm", "versitygw"]), product.build)
    made = Cluster("e2e")
    made.down()
    try:
        made.up()
        product.load(made.node)
        yield made
    finally:
        made.down()


@pytest.fixture(scope="session")
def access(cluster: Cluster) -> Access:
    """The chart installed, base model and dataset uploaded."""
    found = quickstart.testbed_access(cluster.kubeconfig)
    quickstart.install(found, demo.testbed_values())
    quickstart.upload(found)
    return found


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report = yield
    found = getattr(item, "funcargs", {}).get("access")
    if report.failed and found is not None:
        for namespace in (quickstart.SHOP, quickstart.SYSTEM):
            report.sections.append((f"namespace {namespace}", quickstart.explain(found, namespace)))
    return report
