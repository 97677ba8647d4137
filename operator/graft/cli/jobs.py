"""`graft logs` and `graft restart`: the pods of a FineTuneJob, and another attempt of one that has failed."""

import sys
from typing import TYPE_CHECKING, Any

from graft.cli.failure import CliFailure

if TYPE_CHECKING:
    from graft.cli.cluster import Cluster


def print_log(
    cluster: "Cluster", namespace: str, job: str, container: str | None, *, follow: bool, previous: bool
) -> None:
    """Print the log of a job's newest pod. Raises CliFailure if the job has no pod."""
    pods = cluster.pods_of_job(namespace, job)
    if not pods:
        found = cluster.job(namespace, job)  # raises if there is no such job
        stage = (found.get("status") or {}).get("stage") or "Waiting"
        raise CliFailure(
            f"the job {namespace}/{job} has no pod: it is {stage}",
            f"`kubectl describe finetunejob {job} -n {namespace}` shows why. The pods of a finished job are deleted with its Job.",
        )
    newest = pods[0]
    name = container or current_container(newest)
    print(f"log of {newest.metadata.name}, container {name}", file=sys.stderr)
    try:
        for piece in cluster.log(namespace, newest.metadata.name, name, follow=follow, previous=previous):
            sys.stdout.buffer.write(piece)
            sys.stdout.buffer.flush()
    except KeyboardInterrupt:  # how a user ends --follow
        return


def current_container(pod: Any) -> str:
    """Return the container whose log shows what the pod does or did last (PURE): the first that has not succeeded, in the
    order in which they run, or the last."""
    states = {
        item.name: item.state
        for item in [*(pod.status.init_container_statuses or []), *(pod.status.container_statuses or [])]
    }
    order = [item.name for item in [*(pod.spec.init_containers or []), *pod.spec.containers]]
    for name in order:
        ended = states[name].terminated if name in states else None
        if ended is None or ended.exit_code != 0:
            return str(name)
    return str(order[-1])


def restart(cluster: "Cluster", namespace: str, name: str) -> dict[str, Any]:
    """Raise spec.restarts of a job that has failed, so that the operator starts another attempt. Return what was set."""
    job = cluster.job(namespace, name)
    status, spec = job.get("status") or {}, job["spec"]
    stage = status.get("stage") or "Waiting"
    if stage != "Failed":
        raise CliFailure(
            f"the job {namespace}/{name} is {stage}: only a job that has Failed can be restarted",
            "To train again with another spec, create a FineTuneJob with another name.",
        )
    restarts = max(spec.get("restarts") or 0, status.get("restarts") or 0) + 1
    cluster.restart(job, restarts)
    return {"namespace": namespace, "job": name, "restarts": restarts}
