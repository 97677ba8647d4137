"""Operator and gateway: the routes of each deployment, and which sleeping deployments receive requests."""

from pydantic import Field

from graft.contracts.message import Message

ROUTES_KEY = "routes.json"
ROUTES_COMPONENT = "routes"
DEMAND_CONFIGMAP = "graft-demand"  # in the operator's namespace
DEMAND_COMPONENT = "demand"


class RouteTarget(Message):
    """What answers a route."""

    engine_model: str  # the model name that the engine knows: an adapter's engine name, or the served base model's name
    adapter: str | None = None  # name of the Adapter resource; None: the bare base model
    version: str | None = None
    digest: str | None = None
    weight: int = 100


class RouteEntry(Message):
    """One model name that clients use; `steps` are those of a sequence, which has no targets."""

    model: str  # <namespace>/<route>
    targets: list[RouteTarget]
    steps: list[RouteTarget] = Field(default_factory=list)  # each one's answer is the next one's question

    @property
    def leads_to(self) -> list[RouteTarget]:
        """Everything that a request may be answered by."""
        return [*self.targets, *self.steps]


class Backend(Message):
    """One ready replica."""

    pod: str
    address: str  # ip:port of the engine
    loaded: list[str]  # engine models that it can answer, the base model's name included


class Routes(Message):
    """One deployment's part of the gateway's table."""

    schema_version: int = 1
    namespace: str
    deployment: str
    base_model: str
    unavailable: str | None = None  # why nothing can answer now, for the gateway's error
    idle_seconds: int | None = (
        None  # it sleeps when it is idle for so long, and a request wakes it; None: it never sleeps
    )
    routes: list[RouteEntry] = Field(default_factory=list)
    backends: list[Backend] = Field(default_factory=list)


class Demand(Message):
    """That a deployment which may sleep is asked for, as one gateway sees it."""

    namespace: str
    deployment: str
    at: str  # of the newest request that arrived or ran, as status.now() writes it


def demand_key(namespace: str, deployment: str, gateway: str) -> str:
    """The key of one deployment and gateway in graft-demand."""
    return f"{namespace}.{deployment}.{gateway}"


def demand_interval(idle_seconds: int) -> int:
    """Seconds within which a gateway tells of a request, and which the operator therefore waits on top of idle_seconds."""
    return min(30, max(2, idle_seconds // 4))
