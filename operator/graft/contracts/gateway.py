"""Between operator and gateway: the routes of each deployment, and the demand for deployments that may sleep."""

from pydantic import Field

from graft.contracts.message import Message

ROUTES_KEY = "routes.json"
ROUTES_COMPONENT = "routes"
DEMAND_CONFIGMAP = "graft-demand"  # in the operator's namespace
DEMAND_COMPONENT = "demand"


class RouteTarget(Message):
    """One model that answers the requests of a route."""

    engine_model: str  # model name in the engine: an adapter's engine name, or the name of the base model
    adapter: str | None = None  # name of the Adapter resource; None: the bare base model
    version: str | None = None
    digest: str | None = None
    weight: int = 100


class RouteEntry(Message):
    """One model name that clients use. A sequence has `steps` and no targets."""

    model: str  # <namespace>/<route>
    targets: list[RouteTarget]
    steps: list[RouteTarget] = Field(default_factory=list)  # the answer of each step is the question of the next step

    @property
    def leads_to(self) -> list[RouteTarget]:
        """Return all models that may answer a request: targets and steps."""
        return [*self.targets, *self.steps]


class Backend(Message):
    """One ready replica."""

    pod: str
    address: str  # ip:port of the engine
    loaded: list[str]  # engine models that it has loaded, including the base model's name


class Routes(Message):
    """The part of the gateway's routing table that belongs to one deployment."""

    schema_version: int = 1
    namespace: str
    deployment: str
    base_model: str
    unavailable: str | None = None  # why no replica can answer now; the gateway shows it in its error
    idle_seconds: int | None = None  # idle time after which it sleeps; a request wakes it. None: it never sleeps
    routes: list[RouteEntry] = Field(default_factory=list)
    backends: list[Backend] = Field(default_factory=list)


class Demand(Message):
    """The newest request that one gateway received for a deployment that may sleep."""

    namespace: str
    deployment: str
    at: str  # time of the newest request that arrived or was running, in the format of status.now()


def demand_key(namespace: str, deployment: str, gateway: str) -> str:
    """Return the key in graft-demand for one deployment and one gateway."""
    return f"{namespace}.{deployment}.{gateway}"


def demand_interval(idle_seconds: int) -> int:
    """Return the seconds within which a gateway reports a request. The operator adds them to idle_seconds."""
    return min(30, max(2, idle_seconds // 4))
