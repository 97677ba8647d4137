"""An AdapterDeployment in a test: its pods, the agents that the test plays, and the gateway's routes."""

import json
from typing import Any

from graft.contracts.agent import Residency, ResidentAdapter, Wanted
from graft.contracts.gateway import Routes

from worlds.cluster.api import Api, Object
from worlds.cluster.operator_process import SYSTEM
from worlds.cluster.tenant import BASE, Tenant


class Fleet:
    """One deployment. The played agents write with their own service account, so that its Role must be sufficient."""

    def __init__(self, tenant: Tenant, name: str) -> None:
        self.tenant, self.name = tenant, name
        self._agents: Api | None = None

    def deploy(self, adapters: list[str], **spec: Any) -> Object:
        """Create the AdapterDeployment."""
        manifest = self.tenant.resource(
            "AdapterDeployment", self.name, {"baseModel": BASE, "adapters": adapters} | spec
        )
        return self.tenant.api.create(manifest)

    def change(self, **spec: Any) -> None:
        self.tenant.api.patch("AdapterDeployment", self.tenant.name, self.name, {"spec": spec})

    def status(self) -> Object:
        return self.tenant.status("AdapterDeployment", self.name)

    def until(self, type_: str, reason: str, timeout: float = 45, **message: str) -> Object:
        return self.tenant.until("AdapterDeployment", self.name, type_, reason, timeout, **message)

    def pods(self, count: int) -> list[Object]:
        """Wait until `count` pods run. Return them.

        If each replica has only some of the adapters, a rollout takes 15 s for each replica.
        """
        owner = self.tenant.get("AdapterDeployment", self.name)

        def alive() -> list[Object]:
            found = [pod for pod in self.tenant.pods(owner) if not pod["metadata"].get("deletionTimestamp")]
            return [pod for pod in found if pod.get("status", {}).get("phase") == "Running"]

        def explain() -> str:
            found = [(pod["metadata"]["name"], pod.get("status")) for pod in self.tenant.pods(owner)]
            return f"{self.status()}\npods: {found}"

        self.tenant.wait(lambda: len(alive()) == count, f"{count} pods of {self.name} run", 120, explain)
        return alive()

    def wanted(self) -> Wanted:
        """Return the wanted adapters as the agents read them."""
        return Wanted.model_validate_json(self.tenant.get("ConfigMap", f"{self.name}-wanted")["data"]["wanted.json"])

    def told(self) -> bool:
        """Return whether the ConfigMap that the agents read exists."""
        return self.tenant.api.get("ConfigMap", self.tenant.name, f"{self.name}-wanted") is not None

    def wanted_names(self) -> list[str]:
        """Return the names of the wanted Adapters."""
        return sorted(item.adapter for item in self.wanted().adapters) if self.told() else []

    def expected_names(self) -> list[str]:
        """Return the names of the Adapters that are wanted once they are verified."""
        return sorted(item.adapter for item in self.wanted().expected) if self.told() else []

    def until_wanted(self, *names: str) -> None:
        self.tenant.wait(
            lambda: self.wanted_names() == sorted(names),
            f"the wanted adapters are {names}",
            explain=lambda: f"they are {self.wanted_names()}",
        )

    def find_routes(self) -> Object | None:
        """Return the ConfigMap of the routes in the operator's namespace, or None."""
        labels = f"graft.dev/component=routes,graft.dev/namespace={self.tenant.name},graft.dev/owner={self.name}"
        found = self.tenant.api.list("ConfigMap", SYSTEM, labels)
        assert len(found) <= 1
        return found[0] if found else None

    def routes(self) -> Routes:
        """Wait until the routes exist. Return them as the gateway reads them."""
        self.tenant.wait(self.find_routes, f"{self.name} has routes")
        found = self.find_routes()
        assert found is not None
        return Routes.model_validate_json(found["data"]["routes.json"])

    def targets(self) -> dict[str, str | None]:
        """Return the Adapter that answers each route: route -> Adapter."""
        prefix = f"{self.tenant.name}/"
        entries = self.routes().routes
        return {item.model.removeprefix(prefix): item.targets[0].adapter if item.targets else None for item in entries}

    def until_targets(self, **targets: str) -> None:
        self.tenant.wait(
            lambda: self.targets() == targets,
            f"the targets of the routes are {targets}",
            explain=lambda: f"they are {self.targets()}",
        )

    def agent_says(self, pod: Object, states: dict[str, str] | None = None, failure: str = "") -> None:
        """Write the report of one agent. By default it has loaded every wanted adapter. `states`: adapter -> state."""
        wanted = self.wanted().adapters
        chosen = {item.adapter: "Loaded" for item in wanted} if states is None else states
        name = pod["metadata"]["name"]
        residency = Residency(
            pod=name,
            pod_uid=pod["metadata"]["uid"],
            ready=True,
            engine_started="2026-01-01T00:00:00Z",
            adapters=[
                ResidentAdapter(
                    engine_name=item.engine_name, adapter=item.adapter, digest=item.digest,
                    state=chosen[item.adapter],  # type: ignore[arg-type]
                    reason="EngineRefused" if chosen[item.adapter] == "Failed" else None,
                    message=failure if chosen[item.adapter] == "Failed" else None,
                )
                for item in wanted if item.adapter in chosen
            ],
        )  # fmt: skip
        api = self.tenant.api
        if self._agents is None:
            self._agents = api.as_token(api.token(self.tenant.name, f"{self.name}-agent"))
        manifest = {
            "apiVersion": "v1",
            "kind": "ConfigMap",
            "metadata": {"name": f"{self.name}-residency", "namespace": self.tenant.name},
            "data": {name: json.dumps(json.loads(residency.json_text()))},
        }
        self._agents.apply(manifest, f"graft-agent-{name}")

    def ready(self, pod: Object, ready: bool) -> None:
        """Set the Ready condition of a pod, as the kubelet does after its probes."""
        condition = {"type": "Ready", "status": "True" if ready else "False"}
        self.tenant.api.patch_status("Pod", self.tenant.name, pod["metadata"]["name"], {"conditions": [condition]})

    def serve(self, adapters: list[str], replicas: int = 1, **spec: Any) -> list[Object]:
        """Deploy, and play the agents until the rollout is complete. Return the pods."""
        self.deploy(adapters, replicas=replicas, **spec)
        pods = self.pods(replicas)
        self.tenant.wait(lambda: len(self.wanted_names()) == len(adapters), f"{len(adapters)} adapters are wanted")
        for pod in pods:
            self.agent_says(pod)
        self.until("Progressing", "Complete")
        return pods
