"""One cluster with a real node for the whole suite.

The product is installed from its chart, with images that are built from this checkout. A policy engine enforces
NetworkPolicies, and the namespaces of the product and of the tenant deny everything that no policy of Graft allows.
"""

import json
from collections.abc import Iterator

import pytest
from testbed import demo, packages, policies, product, quickstart, traces
from testbed.binaries import build
from testbed.cluster import Cluster
from testbed.quickstart import Access
from worlds.cluster import flows

# As on OpenShift: a user that no image knows, from the range of a namespace.
USER = 1000680000
SCRAPER = {"podSelector": {"matchLabels": {"app": "scraper"}}}


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    packages.install(packages.NODE)
    product.beside(lambda: build(["kube", "pause", "coredns", "helm", "versitygw", policies.ENGINE]), product.build)
    made = Cluster("e2e")
    made.down()
    try:
        before = traces.settings()
        made.up()
        assert traces.settings() == before  # of the machine, which a kubelet changes
        product.load(made.node)
        yield made
    finally:
        made.down()


@pytest.fixture(scope="session")
def access(cluster: Cluster) -> Access:
    """Install the chart under default deny, and upload the base model and the dataset."""
    found = quickstart.testbed_access(cluster.kubeconfig)
    system = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": quickstart.SYSTEM}}
    found.kubectl("apply", "-f", str(quickstart.QUICKSTART / "00-namespace.yaml"))
    flows.apply(found, system, flows.default_deny(quickstart.SYSTEM), flows.default_deny(quickstart.SHOP))
    values = {"metricsFrom": [SCRAPER], "closed": [cluster.network.pods, cluster.network.pods_ipv6]}
    more = ["--set-json", f"networkPolicy={json.dumps(values)}", "--set", f"podSecurity.runAsUser={USER}"]
    quickstart.install(found, [*demo.testbed_values(), *more])
    quickstart.upload(found)
    return found


@pytest.fixture(scope="session")
def user() -> int:
    """Return the user of all pods. Engines have the next one."""
    return USER


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """Add the resources, events and logs of both namespaces to the report of a failed test."""
    report = yield
    found = getattr(item, "funcargs", {}).get("access")
    if report.failed and found is not None:
        for namespace in (quickstart.SHOP, quickstart.SYSTEM):
            report.sections.append((f"namespace {namespace}", quickstart.explain(found, namespace)))
    return report
