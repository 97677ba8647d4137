"""Remove Graft's finalizer from every resource after the operator was uninstalled, so that the resources can be deleted
later.

Runs as the chart's post-delete hook. The resources, the pods and the stored files stay. A new installation manages them
again.
"""

import logging

from graft.kube import Kube
from graft.manifests.metadata import FINALIZER

log = logging.getLogger(__name__)
KINDS = ("AdapterDeployment", "FineTuneJob", "Adapter", "ApiKey")


async def uninstall() -> None:
    """Remove the finalizer from all resources of all namespaces."""
    kube = await Kube.connect()
    try:
        for kind in KINDS:
            for raw in await kube.list(kind, metadata_only=True):
                metadata = raw["metadata"]
                if FINALIZER in metadata.get("finalizers", []):
                    rest = [item for item in metadata["finalizers"] if item != FINALIZER]
                    await kube.merge_patch(
                        kind, metadata.get("namespace"), metadata["name"], {"metadata": {"finalizers": rest}}
                    )
                    log.info("removed the finalizer from %s %s/%s", kind, metadata.get("namespace"), metadata["name"])
    finally:
        await kube.close()
