"""After the operator is removed: take our finalizer off every resource, so that none is stuck when it is deleted later.

Runs as the chart's post-delete hook. The resources, what runs and what is stored stay; an operator that is installed again takes them up.
"""

import logging

from graft.kube import Kube
from graft.manifests.metadata import FINALIZER

log = logging.getLogger(__name__)
KINDS = ("AdapterDeployment", "FineTuneJob", "Adapter")


async def uninstall() -> None:
    """Strip the finalizer from all resources of all namespaces."""
    kube = await Kube.connect()
    try:
        for kind in KINDS:
            for raw in await kube.list(kind):
                metadata = raw["metadata"]
                if FINALIZER in metadata.get("finalizers", []):
                    rest = [item for item in metadata["finalizers"] if item != FINALIZER]
                    await kube.merge_patch(
                        kind, metadata.get("namespace"), metadata["name"], {"metadata": {"finalizers": rest}}
                    )
                    log.info("released %s %s/%s", kind, metadata.get("namespace"), metadata["name"])
    finally:
        await kube.close()
