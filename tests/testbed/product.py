"""The images of the product, built from its Dockerfiles, and the image of the object store."""

import os
import threading
from collections.abc import Callable

from testbed import images, packages
from testbed.binaries import binary
from testbed.node import Node

VERSITYGW = "localhost/graft/versitygw:1.8.0"
TAGS = {name: f"localhost/graft/{name}:dev" for name in ("operator", "trainer", "engine", "agent", "ml")}
# On a machine that can pull images, the user may name a base image to use instead of ours.
BASE_IMAGE = os.environ.get("GRAFT_BASE_IMAGE", "")


def build() -> None:
    """Build the images whose inputs changed."""
    packages.install(packages.NODE)
    base = images.pinned(BASE_IMAGE or images.build_base())
    given = {"BASE_IMAGE": base}
    learning = given | {"GPU": "0"}  # the testbed's node has none
    code = ("operator/graft",)
    images.build(
        TAGS["operator"],
        "operator/Dockerfile",
        ("requirements/operator.txt", "requirements/uv.txt", *code),
        base=base,
        arguments=given,
    )
    images.build(
        TAGS["agent"], "server-image/Dockerfile", ("requirements/agent.txt", "requirements/uv.txt", *code, "server-image/graft_server"),
        base=base, target="agent", arguments=given | {"ML_IMAGE": base},
    )  # fmt: skip
    images.build(
        TAGS["ml"],
        "trainer-image/Dockerfile",
        ("requirements/ml.txt", "requirements/uv.txt", "trainer-image/gpu-only.txt"),
        base=base,
        target="ml",
        arguments=learning,
    )
    ml = images.pinned(TAGS["ml"])
    images.build(
        TAGS["trainer"], "trainer-image/Dockerfile",
        ("requirements/trainer.txt", "requirements/uv.txt", "trainer-image/gpu-only.txt", *code, "trainer-image/graft_trainer"),
        base=ml, target="trainer", arguments=learning | {"COMPILER": ""},
    )  # fmt: skip
    images.build(
        TAGS["engine"],
        "server-image/Dockerfile",
        (*code, "server-image/graft_server"),
        base=ml,
        target="engine",
        arguments=given | {"ML_IMAGE": ml},
    )


def load(node: Node) -> None:
    """Send the product's images and the object store's image to a node."""
    images.scratch(VERSITYGW, binary("versitygw"), ["/versitygw"])
    images.load(node, [VERSITYGW, *(TAGS[name] for name in ("operator", "agent", "trainer", "engine"))])


def beside(*bodies: Callable[[], None]) -> None:
    """Run several functions at once and raise the first error. Images download while Go compiles."""
    errors: list[BaseException] = []

    def guarded(body: Callable[[], None]) -> None:
        try:
            body()
        except BaseException as error:  # raised below in the caller's thread
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(body,)) for body in bodies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
