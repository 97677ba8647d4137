"""Where the reports come from: files, or the object store by way of the jobs in the cluster."""

import base64
import binascii
import json
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from graft.artifacts.layout import adapter_prefix, tenant_of
from graft.artifacts.store import S3Store, StorageConfig, StoreError
from graft.cli.failure import CliFailure
from graft.contracts.mounts import STORAGE_SECRET
from graft.report.document import Report

if TYPE_CHECKING:
    from graft.cli.cluster import Cluster

REPORT = "report.json"
STAGE_REMEDIES = {
    "Failed": "Read why with `kubectl describe finetunejob {name} -n {namespace}`; a failed job has no report.",
    "Suspended": "Set spec.suspend to false and compare when the job has Succeeded.",
}


def read_reports(runs: Sequence[str], namespace: str | None, context: str | None, endpoint: str | None) -> list[Report]:
    """The reports, in the order of the command line. CliFailure says which one cannot be had."""
    jobs = [run for run in runs if not is_file(run)]
    fetched = dict(zip(jobs, _of_jobs(jobs, namespace, context, endpoint), strict=True)) if jobs else {}
    return [fetched[run] if run in fetched else read_file(Path(run)) for run in runs]


def is_file(run: str) -> bool:
    """Names of jobs have neither slashes nor, unless a file of that name is there, the ending .json."""
    return "/" in run or run.endswith(".json") or Path(run).is_file()


def read_file(path: Path) -> Report:
    """A report.json; of a folder the one in it."""
    path = path / REPORT if path.is_dir() else path
    try:
        return parse(path.read_bytes(), str(path))
    except OSError as error:
        raise CliFailure(
            f"{path} cannot be read: {error.strerror or error}", "Name a report.json, or a job."
        ) from error


def parse(data: bytes, where: str) -> Report:
    """A report of any schema version that is known here."""
    try:
        return Report.model_validate(json.loads(data))
    except ValueError as error:  # no JSON, no UTF-8, or pydantic's
        first = error.errors()[0] if isinstance(error, ValidationError) else None
        why = f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}" if first else str(error)
        raise CliFailure(
            f"{where} is no report: {why}",
            "A report.json lies beside the weights of every version that Graft publishes.",
        ) from error


@dataclass(frozen=True)
class Version:
    """A published version in object storage."""

    adapter: str
    version: str


def published_version(job: Mapping[str, Any], name: str, namespace: str) -> Version:
    """What a FineTuneJob has published. CliFailure when it has not."""
    status = job.get("status") or {}
    reference = status.get("adapterRef")
    if reference:
        return Version(reference["adapter"], reference["version"])
    stage = status.get("stage") or "Waiting"
    percent = (status.get("progress") or {}).get("percent")
    far = f" ({percent} %)" if percent is not None and stage == "Training" else ""
    remedy = STAGE_REMEDIES.get(
        stage, "Wait for it: kubectl wait finetunejob/{name} -n {namespace} --for=condition=Succeeded --timeout=-1s"
    )
    raise CliFailure(
        f"the job {namespace}/{name} has published nothing: it is {stage}{far}",
        remedy.format(name=name, namespace=namespace),
    )


def storage_config(secret: Mapping[str, str], folder: Path, endpoint: str | None) -> StorageConfig:
    """The store that a Secret's data (base64) says; its files are written to `folder`, as a pod would find them."""
    for key, value in secret.items():
        try:
            (folder / key).write_bytes(base64.b64decode(value, validate=True))
        except binascii.Error as error:
            raise CliFailure(
                f"the Secret {STORAGE_SECRET} has a key {key} that is no base64", "Let the operator issue it again."
            ) from error
    config = StorageConfig.from_dir(folder)
    return replace(config, endpoint=endpoint) if endpoint else config


def _of_jobs(names: Sequence[str], namespace: str | None, context: str | None, endpoint: str | None) -> list[Report]:
    # Imported here: files need no cluster, and the package of the cluster's client takes a second to load.
    from graft.cli.cluster import Cluster

    cluster = Cluster(context)
    namespace = namespace or cluster.namespace
    versions = [published_version(cluster.job(namespace, name), name, namespace) for name in names]
    with opened_store(cluster, namespace, endpoint) as store:
        return [_fetch(store, namespace, version) for version in versions]


@contextmanager
def opened_store(cluster: "Cluster", namespace: str, endpoint: str | None) -> Iterator[S3Store]:
    """The store, with the namespace's key."""
    with tempfile.TemporaryDirectory() as folder:  # 0700: it holds the key
        try:
            store = S3Store(
                storage_config(cluster.secret(namespace, STORAGE_SECRET), Path(folder), endpoint), attempts=2
            )
        except (StoreError, ValueError) as error:
            raise CliFailure(
                f"the object store cannot be opened: {error}", f"Check the Secret {STORAGE_SECRET} and --endpoint."
            ) from error
        yield store


def _fetch(store: S3Store, namespace: str, version: Version) -> Report:
    key = adapter_prefix(tenant_of(namespace), version.adapter, version.version) + REPORT
    try:
        data = store.get(key)
    except StoreError as error:
        remedies = {
            "missing": f"{version.adapter} {version.version} was deleted, or imported from elsewhere: it has no report.",
            "denied": f"The key in the Secret {STORAGE_SECRET} may not read it; ask the platform team.",
        }
        unreachable = (
            "The store's address is often the cluster's own: forward a port to it and give its URL with --endpoint, or "
            "copy the report.json files and name those."
        )
        raise CliFailure(f"{key} cannot be had: {error}", remedies.get(error.trouble, unreachable)) from error
    return parse(data, key)
