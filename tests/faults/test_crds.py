"""CRDs that are older than the operator (row 13).

No older release exists, so the older CRDs are those of this release without the newest fields. An API server drops the
fields that its schema does not know. So the operator never sees those that it writes.
"""

import copy
from collections.abc import Iterator

import pytest
import yaml
from testbed.shell import REPOSITORY
from worlds.cluster.api import APPLY, Object
from worlds.faults.bed import Bed

# kind -> fields of its status without which the operator works. What it cannot compute again is lost in a rollback.
NEWEST = {
    "finetunejobs": ("lossText", "etaText"),
    "adapters": ("stopTokenIds", "promptTemplate", "compatibility", "storedBytes"),
    "adapterdeployments": ("sizing", "replicaStatus", "adaptersText"),
    "basemodels": ("sizeBytes",),
    "tenants": ("namespaces",),
}  # fmt: skip


def released() -> list[Object]:
    return [yaml.safe_load(path.read_text()) for path in sorted((REPOSITORY / "crds").glob("*.yaml"))]


def older() -> list[Object]:
    """Return the CRDs without the newest fields."""
    found = copy.deepcopy(released())
    for crd in found:
        for version in crd["spec"]["versions"]:
            fields = version["schema"]["openAPIV3Schema"]["properties"]["status"]["properties"]
            for name in NEWEST[crd["spec"]["names"]["plural"]]:
                del fields[name]
    return found


def apply(bed: Bed, crds: list[Object]) -> None:
    """Apply CRDs, and wait until the API server drops or keeps the fields in question."""
    path = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/"
    for crd in crds:
        bed.api.call("PATCH", f"{path}{crd['metadata']['name']}?fieldManager=test&force=true", crd, APPLY)
    bed.plane.kubectl("wait", "--for=condition=Established", "--timeout=60s", "-f", str(REPOSITORY / "crds"))


@pytest.fixture
def bed_with_crds(bed: Bed) -> Iterator[Bed]:
    yield bed
    apply(bed, released())


@pytest.mark.seconds(30)
def test_an_operator_with_older_crds_works_and_writes_no_more(bed_with_crds: Bed) -> None:
    """The operator is upgraded first, then the CRDs, while a job runs."""
    bed = bed_with_crds
    apply(bed, older())
    bed.operator.kill9()
    bed.healthy()
    life = bed.new_life()
    life.phases()["tune"]()
    life.phases()["serve"]()
    bed.silent(life)  # no write is repeated because the API server drops a part of it
    life.tenant.job("during")
    pod = life.tenant.running_pod("during")
    apply(bed, released())
    bed.operator.kill9()
    bed.healthy()
    life.tenant.api.delete("FineTuneJob", life.tenant.name, "during")
    life.tenant.gone("FineTuneJob", "during")
    life.tenant.wait(lambda: life.tenant.api.get("Pod", life.tenant.name, pod) is None, "its pod is deleted")
    bed.same(life, "serve")
    bed.run(life, ["roll"])
    bed.silent(life)


@pytest.mark.seconds(30)
def test_crds_that_are_rolled_back_and_upgraded_again_under_a_running_job_lose_nothing(bed_with_crds: Bed) -> None:
    """The CRDs are changed first, and the operator keeps running. The next status that it writes has all fields again."""
    bed = bed_with_crds
    life = bed.new_life()

    # The upgrade comes before the last statuses: one that was written before it gets its fields at the next resync only.
    def roll_back_and_upgrade(step: str) -> None:
        if step == "preflight":
            apply(bed, older())
        if step == "training":
            apply(bed, released())

    life.at = roll_back_and_upgrade
    bed.run(life, ["tune", "serve", "roll"])
    bed.silent(life)
