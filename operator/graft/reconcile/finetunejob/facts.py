"""What the starts of other jobs, and of the operator, must know of a FineTuneJob without parsing it (PURE)."""

from collections.abc import Mapping
from typing import NamedTuple

from graft.kube import Manifest
from graft.manifests.metadata import FINALIZER
from graft.reconcile.adapter.versions import Known, parse
from graft.reconcile.shared.jobs import condition_of

# The version that a new job publishes, and the digest of its recipe, until its status says so. Users may edit annotations,
# so they count for no longer.
CLAIMED_VERSION = "graft.dev/version"
CLAIMED_RECIPE = "graft.dev/recipe"
QUOTA_EXCEEDED = "QuotaExceeded"  # reason of Accepted while a job waits for the quota of its Tenant


class JobFacts(NamedTuple):
    """The facts of one job. `reserves`: the version that it publishes, None if it publishes nothing more.

    `over`: it has ended. `waits`: for the quota of its Tenant. `kueue`: a queue of Kueue decides when it starts.
    """

    uid: str
    active: bool  # whether a reconcile may have something to do
    base_model: str
    reserves: Known | None
    name: str = ""
    since: str = ""  # creationTimestamp
    over: bool = False
    waits: bool = False
    kueue: bool = False

    @property
    def turn(self) -> tuple[str, str, str]:
        """Sorts the jobs that wait for a quota: the oldest first."""
        return self.since, self.name, self.uid


def output_adapter(raw: Manifest) -> str:
    """Return the adapter that a job publishes. "" if the stored job has none."""
    return str(((raw.get("spec") or {}).get("output") or {}).get("adapter") or "")


def facts_of(raw: Manifest) -> JobFacts:
    """Return the facts of a stored job. An older schema may have let any spec in."""
    spec, status = raw.get("spec") or {}, raw.get("status") or {}
    base_model = str(spec.get("baseModel") or "")
    resolved = status.get("resolved") or {}
    ended = condition_of(raw, "Succeeded").get("status")
    annotations = raw["metadata"].get("annotations") or {}
    reserves = None
    if resolved.get("version") and ended != "False":
        # A failed job publishes nothing more, and storage lists what it has published.
        reserves = Known(resolved["version"], resolved.get("recipe"), base_model)
    elif (claimed := claimed_version(annotations, recorded=bool(status))) is not None:
        reserves = Known(claimed, annotations.get(CLAIMED_RECIPE), base_model)
    over, metadata = ended in {"True", "False"}, raw["metadata"]
    return JobFacts(
        metadata["uid"],
        is_active(raw, ended),
        base_model,
        reserves,
        metadata["name"],
        str(metadata.get("creationTimestamp") or ""),
        over,
        not over and condition_of(raw, "Accepted").get("reason") == QUOTA_EXCEEDED,
        bool(spec.get("queue")),
    )


def claimed_version(annotations: Mapping[str, str], *, recorded: bool) -> str | None:
    """Return the version that the annotations of a job reserve. `recorded`: whether the job has a status, which counts then."""
    version = annotations.get(CLAIMED_VERSION, "")
    return version if not recorded and parse(version) is not None else None


def is_active(raw: Manifest, ended: str | None) -> bool:
    """Return whether a reconcile may have something to do: run the job, restart it, delete it or clean up after it."""
    spec, status, metadata = raw.get("spec") or {}, raw.get("status") or {}, raw["metadata"]
    return (
        ended not in {"True", "False"}
        or bool(metadata.get("deletionTimestamp"))
        or FINALIZER not in (metadata.get("finalizers") or [])
        or spec.get("ttlSecondsAfterFinished") is not None
        or (ended == "False" and (spec.get("restarts") or 0) > (status.get("restarts") or 0))
    )
