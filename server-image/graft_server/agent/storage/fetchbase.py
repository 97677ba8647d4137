"""The init container that downloads the base model into the pod."""

import argparse
import logging
import os
import time
from pathlib import Path

from graft.artifacts.sources import DISK_FULL, SourceError, fetch, split_hf_uri
from graft.artifacts.storage import StorageConfig, StoreError
from graft.artifacts.store import PATIENCE, S3Store
from graft.contracts.mounts import HF_TOKEN_FILE, PVC_DIR, STORAGE_DIR
from graft.contracts.progress import EXIT_CODES, Reason, Termination

log = logging.getLogger(__name__)

REPORT_SECONDS = 5.0
MESSAGE_LIMIT = 2000  # of the termination message's 4096 bytes


def parser() -> argparse.ArgumentParser:
    """Return the parser of the flags of `fetch-base`."""
    made = argparse.ArgumentParser(prog="graft_server.agent fetch-base", description=__doc__)
    made.add_argument("--uri", required=True, help="hf://org/name@commit, s3://bucket/prefix or pvc://claim/path")
    made.add_argument("--digest", help="for s3:// the digest of the listing, for hf:// the commit")
    made.add_argument("--target", type=Path, required=True, help="folder for the files")
    made.add_argument("--storage-dir", type=Path, default=Path(STORAGE_DIR), help="the mounted storage Secret")
    made.add_argument("--pvc-dir", type=Path, default=Path(PVC_DIR), help="folder where claims are mounted")
    made.add_argument(
        "--hf-token-file",
        type=Path,
        default=Path(HF_TOKEN_FILE),
        help="file with the Hugging Face token, used if it exists",
    )
    made.add_argument("--hf-endpoint", help="endpoint to use instead of https://huggingface.co")
    made.add_argument("--termination-log", type=Path, default=Path("/dev/termination-log"))
    return made


def fetch_base(arguments: list[str]) -> int:
    """Download the base model. Return the exit code (EXIT_CODES). Write a failure to the termination message."""
    options = parser().parse_args(arguments)
    try:
        folder = _fetch(options)
    except SourceError as error:
        if error.transient:
            failure = Termination(
                reason=Reason.STORAGE_UNAVAILABLE,
                message=f"{options.uri} does not answer: {error}",
                remedy="Nothing to do if the source becomes available again: Kubernetes restarts the container.",
            )
        else:
            failure = Termination(
                reason=Reason.BASE_MODEL_UNAVAILABLE,
                message=str(error),
                remedy="Check spec.source of the BaseModel. If the model is gated, check the token in the Secret "
                "graft-huggingface.",
            )
    except StoreError as error:
        denied = error.trouble == "denied"
        failure = Termination(
            reason=Reason.STORAGE_DENIED if denied else Reason.STORAGE_UNAVAILABLE,
            message=str(error),
            remedy="Check the Secret graft-storage of the namespace."
            if denied
            else "Nothing to do if the store becomes available again: Kubernetes restarts the container.",
        )
    except Exception as error:
        if isinstance(error, OSError) and error.errno in DISK_FULL:
            failure = Termination(
                reason=Reason.CONFIGURATION_INVALID,
                message=f"the disk is full: {error}",
                remedy="Free disk space on the node. Or set spec.resources of the AdapterDeployment completely, with a "
                "request for ephemeral-storage above the size of the base model. Its pods then run on a node with "
                "enough space.",
            )
        else:
            log.exception("downloading %s failed", options.uri)
            failure = Termination(
                reason=Reason.INTERNAL_ERROR, message=repr(error), remedy="Read the log of this container."
            )
    else:
        log.info("the base model is at %s", folder, extra={"uri": options.uri, "path": str(folder)})
        return 0
    log.error("%s", failure.message, extra={"reason": failure.reason, "remedy": failure.remedy})
    failure.message = failure.message[:MESSAGE_LIMIT]
    try:
        options.termination_log.write_text(failure.json_text())
    except OSError as error:
        log.warning("cannot write the termination message: %s", error)
    return EXIT_CODES[failure.reason]


def _fetch(options: argparse.Namespace) -> Path:
    uri, digest, target = options.uri, options.digest, options.target
    store = None
    if uri.startswith("s3://"):
        folder = options.storage_dir
        store = S3Store(StorageConfig.from_dir(folder), patience=PATIENCE, folder=folder)
    if uri.startswith("hf://"):
        if digest:
            uri = f"hf://{split_hf_uri(uri)[0]}@{digest}"
        # The root file system is read-only. huggingface_hub reads this variable when it is imported.
        os.environ.setdefault("HF_HOME", str(target / ".cache" / "hf-home"))
    token = options.hf_token_file.read_text().strip() if options.hf_token_file.is_file() else None
    started = last = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= REPORT_SECONDS or done == total:
            last = now
            percent = 100 * done // max(1, total)
            log.info("%d %% of %d bytes", percent, total, extra={"done": done, "total": total})

    folder = fetch(
        uri,
        digest,
        target,
        store=store,
        pvc_root=options.pvc_dir,
        hf_endpoint=options.hf_endpoint,
        hf_token=token or None,
        report=report,
    )
    log.info("downloaded in %.1f s", time.monotonic() - started)
    return folder
