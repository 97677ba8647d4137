"""Every pod and NetworkPolicy that Graft makes: what the builders make (the golden files) and what the chart renders."""

import functools
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import yaml
from testbed.binaries import binary
from testbed.shell import REPOSITORY

Manifest = dict[str, Any]
GOLDEN = REPOSITORY / "tests" / "unit" / "operator" / "manifests" / "golden" / "output"
CHART = REPOSITORY / "charts" / "graft"
EXTERNAL_STORE = {
    "objectStore": {
        "credentials": "provided",
        "embedded": {"enabled": False},
        "external": {"endpoint": "https://s3.example.com", "existingSecret": "graft-s3"},
    }
}


def render(values: Manifest | None = None) -> list[Manifest]:
    """Render the chart, hooks included."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump(values or {}, file)
        file.flush()
        done = subprocess.run(
            [binary("helm"), "template", "graft", CHART, "--namespace", "graft-system", "--kube-version", "1.34.0", "--values", file.name],
            capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [item for item in yaml.safe_load_all(done.stdout) if item]


@functools.cache
def objects() -> dict[str, list[Manifest]]:
    """Return source -> objects: one source per golden file and per rendering of the chart."""
    built = {
        path.stem: [item for item in yaml.safe_load_all(path.read_text()) if item] for path in GOLDEN.glob("*.yaml")
    }
    huggingface = {
        "huggingface": {"existingSecret": "hub"},
        "objectStore": {"embedded": {"persistence": {"enabled": False}}},
    }
    return built | {"chart": render(huggingface), "chart-external-store": render(EXTERNAL_STORE)}


def pods() -> dict[str, Manifest]:
    """Return "source/kind/name" -> spec of the pod."""
    return {
        f"{source}/{item['kind']}/{item['metadata']['name']}": item["spec"]["template"]["spec"]
        for source, items in sorted(objects().items())
        for item in items
        if isinstance(item.get("spec", {}).get("template"), dict) and "spec" in item["spec"]["template"]
    }


def policies() -> dict[str, Manifest]:
    """Return "source/name" -> spec of the NetworkPolicy."""
    return {
        f"{source}/{item['metadata']['name']}": item["spec"]
        for source, items in sorted(objects().items())
        for item in items
        if item["kind"] == "NetworkPolicy"
    }


def containers(pod: Manifest) -> list[Manifest]:
    """Return the containers of a pod, init containers first."""
    return [*pod.get("initContainers", []), *pod["containers"]]


def volumes_of(pod: Manifest, container: Manifest) -> list[tuple[Manifest, Manifest]]:
    """Return (mount, volume) of a container. A claim template of a StatefulSet is a volume without a source."""
    found = {volume["name"]: volume for volume in pod.get("volumes", [])}
    return [(mount, found.get(mount["name"], {"name": mount["name"]})) for mount in container.get("volumeMounts", [])]


def writable(mount: Manifest, volume: Manifest) -> bool:
    """Return whether the container can write through a mount. Secrets, ConfigMaps and projections are never writable."""
    claim = volume.get("persistentVolumeClaim", {})
    fixed = any(kind in volume for kind in ("secret", "configMap", "projected", "downwardAPI"))
    return not (mount.get("readOnly") or claim.get("readOnly") or fixed)


def credentials(pod: Manifest, container: Manifest) -> frozenset[str]:
    """Return the names of the Secrets and tokens that a container can read."""
    held = set()
    for _, volume in volumes_of(pod, container):
        if "secret" in volume:
            held.add(f"secret {volume['secret']['secretName']}")
        for source in volume.get("projected", {}).get("sources", []):
            if "secret" in source:
                held.add(f"secret {source['secret']['name']}")
            if "serviceAccountToken" in source:
                held.add("token")
    if pod.get("automountServiceAccountToken", True):
        held.add("token")
    return frozenset(held)


def user(pod: Manifest, container: Manifest) -> int:
    """Return the user that a container runs as."""
    return int(container["securityContext"].get("runAsUser", pod["securityContext"]["runAsUser"]))


def environment(container: Manifest) -> dict[str, str]:
    """Return the variables with fixed values."""
    return {item["name"]: item["value"] for item in container.get("env", []) if "value" in item}


def dockerfiles() -> list[Path]:
    """Return the Dockerfiles of the product."""
    return sorted(REPOSITORY.glob("*/Dockerfile"))
