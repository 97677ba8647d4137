"""Between operator and gateway: the routes of each deployment, and the demand for deployments that may sleep."""

from typing import Annotated, ClassVar

from pydantic import Field

from graft.bounded import Limits
from graft.contracts.enginekeys import Fingerprint
from graft.contracts.message import CONFIGMAP, Message, Name, Whole, Words
from graft.prompttemplates import LONGEST

ROUTES_KEY = "routes.json"
ROUTES_COMPONENT = "routes"
DEMAND_CONFIGMAP = "graft-demand"  # in the operator's namespace
DEMAND_COMPONENT = "demand"


class RouteTarget(Message):
    """One model that answers the requests of a route."""

    engine_model: Name  # model name in the engine: an adapter's engine name, or the name of the base model
    adapter: Name | None = None  # name of the Adapter resource; None: the bare base model
    version: Name | None = None
    digest: Name | None = None
    stop_token_ids: list[Whole] = Field(default_factory=list)  # the tokens that end the version's answers
    prompt_template: Annotated[str, Field(max_length=LONGEST)] | None = None  # with which the version was trained
    weight: Whole = 100


class RouteEntry(Message):
    """One model name that clients use. A sequence has `steps` and no targets."""

    model: Name  # <namespace>/<route>
    targets: list[RouteTarget]
    steps: list[RouteTarget] = Field(default_factory=list)  # the answer of each step is the question of the next step

    @property
    def leads_to(self) -> list[RouteTarget]:
        """Return all models that may answer a request: targets and steps."""
        return [*self.targets, *self.steps]


class Backend(Message):
    """One ready replica."""

    pod: Name
    address: Name  # ip:port of the engine
    loaded: list[Name]  # engine models that it has loaded, including the base model's name
    certificate: Fingerprint | None = None  # SHA-256 of its certificate (DER); None: plain HTTP


class Routes(Message):
    """The part of the gateway's routing table that belongs to one deployment."""

    limits: ClassVar[Limits] = Limits(CONFIGMAP, depth=6, values=100_000)

    schema_version: Whole = 1
    namespace: Name
    deployment: Name
    uid: Name | None = None  # of the AdapterDeployment; gateways make their key from it. None: no key is sent
    base_model: Name
    unavailable: Words | None = None  # why no replica can answer now; the gateway shows it in its error
    idle_seconds: Whole | None = None  # idle time after which it sleeps; a request wakes it. None: it never sleeps
    routes: list[RouteEntry] = Field(default_factory=list)
    backends: list[Backend] = Field(default_factory=list)


class Demand(Message):
    """The newest request that one gateway received for a deployment that may sleep."""

    limits: ClassVar[Limits] = Limits(4096, depth=2, values=32)

    namespace: Name
    deployment: Name
    at: Name  # time of the newest request that arrived or was running, in the format of status.now()


def demand_key(namespace: str, deployment: str, gateway: str) -> str:
    """Return the key in graft-demand for one deployment and one gateway."""
    return f"{namespace}.{deployment}.{gateway}"


def demand_interval(idle_seconds: int) -> int:
    """Return the seconds within which a gateway reports a request. The operator adds them to idle_seconds."""
    return min(30, max(2, idle_seconds // 4))
