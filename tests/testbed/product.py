"""The product's images, built from its Dockerfiles, and the object store's."""

import os
import threading
from collections.abc import Callable

from testbed import images, packages
from testbed.binaries import binary
from testbed.node import Node

VERSITYGW = "localhost/graft/versitygw:1.8.0"
TAGS = {name: f"localhost/graft/{name}:dev" for name in ("operator", "trainer", "engine", "agent", "ml")}
# An image that the user gives instead, for a machine that can pull one.
BASE_IMAGE = os.environ.get("GRAFT_BASE_IMAGE", "")


def build() -> None:
    """All images; what did not change is not built again."""
    packages.install(packages.NODE)
    base = BASE_IMAGE or images.build_base()
    given = {"BASE_IMAGE": base}
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
        ("requirements/ml.txt", "requirements/uv.txt"),
        base=base,
        target="ml",
        arguments=given,
    )
    ml = given | {"ML_IMAGE": TAGS["ml"]}
    images.build(
        TAGS["trainer"], "trainer-image/Dockerfile",
        ("requirements/trainer.txt", "requirements/uv.txt", *code, "trainer-image/graft_trainer"),
        base=TAGS["ml"], target="trainer", arguments=given | {"COMPILER": ""},
    )  # fmt: skip
    images.build(
        TAGS["engine"],
        "server-image/Dockerfile",
        (*code, "server-image/graft_server"),
        base=TAGS["ml"],
        target="engine",
        arguments=ml,
    )


def load(node: Node) -> None:
    """Bring them to a node, with the object store's."""
    images.scratch(VERSITYGW, binary("versitygw"), ["/versitygw"])
    images.load(node, [VERSITYGW, *(TAGS[name] for name in ("operator", "agent", "trainer", "engine"))])


def beside(*bodies: Callable[[], None]) -> None:
    """Run several at once, and raise the first error: images download while Go compiles."""
    errors: list[BaseException] = []

    def guarded(body: Callable[[], None]) -> None:
        try:
            body()
        except BaseException as error:  # handed to the caller below
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(body,)) for body in bodies]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
