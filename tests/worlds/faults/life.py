"""The life of one tenant, in phases. A test plays the trainer, the agents and the user.

Each phase ends in a state that does not depend on how the operator reached it.
"""

from collections.abc import Callable

from graft.contracts.progress import Reason

from worlds.cluster.fleet import Fleet
from worlds.cluster.tenant import Tenant
from worlds.faults.snapshot import CHILDREN

STEPS = ("created", "preflight", "training", "published", "deployed")  # see Life.at
PATIENCE = 90  # seconds; the operator may be restarted, or wait after errors, in each phase


class Life:
    """One tenant and its deployment."""

    def __init__(self, tenant: Tenant) -> None:
        self.tenant = tenant
        self.fleet = Fleet(tenant, "chat")
        self.patience: float = PATIENCE
        self.at: Callable[[str], None] = lambda step: None  # called at each of STEPS

    def phases(self) -> dict[str, Callable[[], None]]:
        return {"tune": self.tune, "serve": self.serve, "roll": self.roll, "fail": self.fail, "delete": self.delete}

    def tune(self) -> None:
        """Tune on GPUs: with a preflight Job, and with the tenant's first credentials."""
        tenant = self.tenant
        tenant.job("first", resources=None, output={"adapter": "support", "deletionPolicy": "Delete"})
        self.at("created")
        self._preflight("first")
        self.at("preflight")
        pod = self._pod("first")
        tenant.progress("first", pod, stage="Training", step=1, total_steps=2, percent=50)
        self.at("training")
        tenant.publish_as_trainer("first", pod)
        tenant.end_pod(pod)
        self.at("published")
        tenant.until("FineTuneJob", "first", "Succeeded", "Published", self.patience)
        tenant.until("Adapter", "support-1.0.0", "Ready", "Verified", self.patience)

    def serve(self) -> None:
        """Deploy the adapter, and complete the rollout."""
        self.fleet.deploy(["support@latest"])
        self.at("deployed")
        self._report(["support-1.0.0"])
        self._complete("support-1.0.0")

    def roll(self) -> None:
        """Tune the next version, and shift the traffic to it."""
        tenant = self.tenant
        tenant.job("second", output={"adapter": "support", "deletionPolicy": "Delete"})
        pod = self._pod("second")
        tenant.publish_as_trainer("second", pod)
        tenant.end_pod(pod)
        tenant.until("FineTuneJob", "second", "Succeeded", "Published", self.patience)
        self._report(["support-1.0.0", "support-1.0.1"])
        self._report(["support-1.0.1"])
        self._complete("support-1.0.1")
        tenant.until("Adapter", "support-1.0.0", "InUse", "NotServed", self.patience)

    def fail(self) -> None:
        """Start a job whose dataset is invalid."""
        tenant = self.tenant
        tenant.job("broken")
        tenant.fail_pod(self._pod("broken"), Reason.DATASET_INVALID, "line 3 is not JSON", "Mend line 3.")
        tenant.until("FineTuneJob", "broken", "Succeeded", "DatasetInvalid", self.patience)

    def delete(self) -> None:
        """Delete everything: the deployment first, then the versions and the jobs."""
        tenant = self.tenant
        kinds = {
            "AdapterDeployment": ["chat"],
            "Adapter": ["support-1.0.0", "support-1.0.1"],
            "FineTuneJob": ["first", "second", "broken"],
        }
        for kind, names in kinds.items():
            for name in names:
                tenant.api.delete(kind, tenant.name, name)
            for name in names:
                tenant.gone(kind, name, self.patience)
        tenant.wait(lambda: not tenant.api.list("Pod", tenant.name), "the pods are deleted", self.patience)
        # Kubernetes deletes the children some time after their owners.
        tenant.wait(lambda: not self._owned(), "the children are deleted", self.patience, lambda: str(self._owned()))

    def _owned(self) -> list[str]:
        api, namespace = self.tenant.api, self.tenant.name
        found = [(kind, item["metadata"]) for kind in CHILDREN for item in api.list(kind, namespace)]
        return [f"{kind} {metadata['name']}" for kind, metadata in found if metadata.get("ownerReferences")]

    def _pod(self, job: str, *, preflight: bool = False) -> str:
        tenant = self.tenant
        owner = tenant.get("FineTuneJob", job)
        name = f"{job}-preflight" if preflight else job
        tenant.wait(
            lambda: tenant.api.get("Job", tenant.name, name), f"the Job {name} exists", self.patience,
            lambda: str(tenant.get("FineTuneJob", job).get("status")),
        )  # fmt: skip
        tenant.wait(lambda: tenant.pods(owner), f"{job} has a pod", self.patience)
        return tenant.running_pod(job, preflight=preflight)

    def _preflight(self, job: str) -> None:
        pod = self._pod(job, preflight=True)
        self.tenant.progress(job, pod, stage="Preparing", dataset={"examples": 10, "maxTokens": 100})
        self.tenant.end_pod(pod, container="prepare")

    def _report(self, adapters: list[str]) -> None:
        """Wait until these adapters are wanted, and report that the replica has loaded them."""
        fleet, tenant = self.fleet, self.tenant
        tenant.wait(
            lambda: fleet.wanted_names() == adapters, f"{adapters} are wanted", self.patience,
            lambda: f"wanted are {fleet.wanted_names()}",
        )  # fmt: skip
        (pod,) = fleet.pods(1)
        fleet.agent_says(pod)

    def _complete(self, adapter: str) -> None:
        fleet = self.fleet
        fleet.until("Available", "Serving", self.patience)
        fleet.until("Progressing", "Complete", self.patience)
        self.tenant.wait(lambda: fleet.targets() == {"support": adapter}, f"{adapter} answers", self.patience)
        self.tenant.until("Adapter", adapter, "InUse", "Served", self.patience)
