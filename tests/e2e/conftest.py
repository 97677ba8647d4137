"""One cluster with a real node for the whole suite.

The product is installed from its chart, with images that are built from this checkout.
"""

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
    """Install the chart, and upload the base model and the dataset."""
    found = quickstart.testbed_access(cluster.kubeconfig)
    quickstart.install(found, demo.testbed_values())
    quickstart.upload(found)
    return found


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Add the resources, events and logs of both namespaces to the report of a failed test."""
    report = yield
    found = getattr(item, "funcargs", {}).get("access")
    if report.failed and found is not None:
        for namespace in (quickstart.SHOP, quickstart.SYSTEM):
            report.sections.append((f"namespace {namespace}", quickstart.explain(found, namespace)))
    return report
