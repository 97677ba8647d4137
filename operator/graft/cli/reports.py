"""Read reports from files, or from the object store for jobs in the cluster."""

import base64
import binascii
import contextlib
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graft.artifacts.layout import MANIFEST, adapter_prefix, tenant_of
from graft.artifacts.manifest import LIMITS, digest
from graft.artifacts.storage import StorageConfig, StoreError
from graft.artifacts.store import S3Store
from graft.bounded import OutOfBounds
from graft.cli.failure import CliFailure
from graft.cli.forward import reachable
from graft.contracts.mounts import STORAGE_SECRET
from graft.report.document import Report

if TYPE_CHECKING:
    from graft.cli.cluster import Cluster

REPORT = "report.json"
STAGE_REMEDIES = {
    "Failed": "A failed job has no report. `kubectl describe finetunejob {name} -n {namespace}` shows why it failed.",
    "Suspended": "Set spec.suspend to false, and compare after the job has Succeeded.",
}


def read_reports(runs: Sequence[str], namespace: str | None, context: str | None, endpoint: str | None) -> list[Report]:
    """Return the reports in the order of the command line.

    Raises CliFailure, which names the run that has no readable report.
    """
    jobs = [run for run in runs if not is_file(run)]
    fetched = dict(zip(jobs, _of_jobs(jobs, namespace, context, endpoint), strict=True)) if jobs else {}
    return [fetched[run] if run in fetched else read_file(Path(run)) for run in runs]


def is_file(run: str) -> bool:
    """Return whether an argument is a file or folder, not a job: it has a slash, ends with .json, or is an existing
    file."""
    return "/" in run or run.endswith(".json") or Path(run).is_file()


def read_file(path: Path) -> Report:
    """Read a report.json. If `path` is a folder, read the report.json in it."""
    path = path / REPORT if path.is_dir() else path
    try:
        return parse(path.read_bytes(), str(path))
    except OSError as error:
        raise CliFailure(
            f"cannot read {path}: {error.strerror or error}", "Give the path of a report.json, or the name of a job."
        ) from error


def parse(data: bytes, where: str) -> Report:
    """Parse a report of any known schema version. Raises CliFailure if it is invalid."""
    try:
        return Report.read(data)
    except OutOfBounds as error:
        raise CliFailure(
            f"{where} is not a valid report: {error}",
            "Every version that a FineTuneJob publishes has a report.json beside its weights.",
        ) from error


@dataclass(frozen=True)
class Version:
    """A published version in object storage."""

    adapter: str
    version: str


def published_version(job: Mapping[str, Any], name: str, namespace: str) -> Version:
    """Return the version that a FineTuneJob has published. Raises CliFailure if it has published none."""
    status = job.get("status") or {}
    reference = status.get("adapterRef")
    if reference:
        return Version(reference["adapter"], reference["version"])
    stage = status.get("stage") or "Waiting"
    percent = (status.get("progress") or {}).get("percent")
    far = f" ({percent} %)" if percent is not None and stage == "Training" else ""
    remedy = STAGE_REMEDIES.get(
        stage,
        "Wait for the job: kubectl wait finetunejob/{name} -n {namespace} --for=condition=Succeeded --timeout=-1s",
    )
    raise CliFailure(
        f"the job {namespace}/{name} has not published a version: it is {stage}{far}",
        remedy.format(name=name, namespace=namespace),
    )


def storage_config(secret: Mapping[str, str], folder: Path, endpoint: str | None) -> StorageConfig:
    """Return the store that a Secret's data (base64) describes.

    The entries are written to `folder` as files, as in a pod.
    """
    for key, value in secret.items():
        try:
            (folder / key).write_bytes(base64.b64decode(value, validate=True))
        except binascii.Error as error:
            raise CliFailure(
                f"the key {key} in the Secret {STORAGE_SECRET} is not valid base64",
                "If the operator issued this Secret, delete it: the operator issues a new one. Otherwise correct the value.",
            ) from error
    config = StorageConfig.from_dir(folder)
    return replace(config, endpoint=endpoint) if endpoint else config


def _of_jobs(names: Sequence[str], namespace: str | None, context: str | None, endpoint: str | None) -> list[Report]:
    # Imported here because files need no cluster, and the package of the cluster's client takes a second to load.
    from graft.cli.cluster import Cluster

    cluster = Cluster(context)
    namespace = namespace or cluster.namespace
    versions = [published_version(cluster.job(namespace, name), name, namespace) for name in names]
    with opened_store(cluster, namespace, endpoint) as store:
        return [_fetch(store, namespace, version) for version in versions]


@contextmanager
def opened_store(cluster: "Cluster", namespace: str, endpoint: str | None) -> Iterator[S3Store]:
    """Open the store with the namespace's key."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))  # 0700: it holds the key
        try:
            config = storage_config(cluster.secret(namespace, STORAGE_SECRET), folder, endpoint)
            config = replace(config, endpoint=stack.enter_context(reachable(cluster, config.endpoint, config.ca_file)))
            store = S3Store(config, attempts=2)
        except (StoreError, ValueError) as error:
            raise CliFailure(
                f"cannot open the object store: {error}", f"Check the Secret {STORAGE_SECRET} and --endpoint."
            ) from error
        yield store


def _fetch(store: S3Store, namespace: str, version: Version) -> Report:
    """Return the report of a version, with the digest of its manifest."""
    prefix = adapter_prefix(tenant_of(namespace), version.adapter, version.version)
    key = prefix + REPORT
    try:
        data = store.get(key, most=Report.limits.size)
        manifest = store.get(prefix + MANIFEST, most=LIMITS.size)
    except StoreError as error:
        remedies = {
            "bucket": "Check the entry bucket of the Secret graft-storage, and that --endpoint is the store that has it.",
            "missing": f"{version.adapter} {version.version} was deleted, or it was imported: imported versions have no report.",
            "denied": f"The key in the Secret {STORAGE_SECRET} may not read this object. Ask the platform team.",
            "large": "Graft's trainer writes smaller reports. Check who may write to the bucket.",
        }
        unreachable = (
            "Check that the object store is reachable. Give another URL of it with --endpoint, or copy the report.json files "
            "and name those."
        )
        raise CliFailure(f"cannot read {key}: {error}", remedies.get(error.trouble, unreachable)) from error
    return parse(data, key).model_copy(update={"digest": digest(manifest)})
