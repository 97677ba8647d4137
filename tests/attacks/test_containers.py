"""A container of a pod that is taken over does not take over its neighbour: nothing that one can write is executed or
trusted by another."""

import os
import re
import subprocess
import sys
from itertools import combinations
from pathlib import Path

import pytest
from testbed.shell import REPOSITORY
from worlds import pods as made

PODS = made.pods()
HOSTILE = "import sys; sys.stdout.write('TAKEN OVER'); sys.stdout.flush()\n"
SHARED_PARTS = ("hostNetwork", "hostPID", "hostIPC", "shareProcessNamespace")
MODULES = sorted(
    {
        container["command"][2]
        for pod in PODS.values()
        for container in made.containers(pod)
        if container.get("command", [])[:2] == ["python", "-m"]
    }
)


def trust(pod: made.Manifest, container: made.Manifest) -> tuple[frozenset[str], int, bool]:
    """What makes two containers differ in trust: their credentials, their user, and whether the engine's clients reach
    them."""
    serves = any(port["name"] == "engine" for port in container.get("ports", []))
    return made.credentials(pod, container), made.user(pod, container), serves


def test_every_kind_of_pod_is_walked() -> None:
    """An attacker looks for the pod that was forgotten -> operator, gateway, store, uninstall hook, serving, training,
    preflight, compose and import are all checked below."""
    names = " ".join(PODS)
    for part in ("operator", "gateway", "store", "uninstall", "preflight", "compose", "import", "adapterdeployment"):
        assert part in names, part
    assert MODULES == ["graft", "graft_server.agent", "graft_server.engine", "graft_server.gateway", "graft_trainer"]


@pytest.mark.parametrize("name", PODS)
def test_no_volume_is_written_by_two_trust_levels(name: str) -> None:
    """The engine leaves a module, a link or a socket in a volume of the agent -> no volume is writable for two
    containers of different trust, and none has /tmp in common."""
    pod = PODS[name]
    for one, other in combinations(made.containers(pod), 2):
        both = {
            volume["name"]: mount["mountPath"]
            for mount, volume in made.volumes_of(pod, one)
            if made.writable(mount, volume)
        }
        shared = {
            volume["name"]
            for mount, volume in made.volumes_of(pod, other)
            if made.writable(mount, volume) and volume["name"] in both
        }
        if trust(pod, one) != trust(pod, other):
            assert not shared, (one["name"], other["name"])
        assert "/tmp" not in {both[item] for item in shared}, (one["name"], other["name"])


@pytest.mark.parametrize("name", PODS)
def test_no_container_can_write_where_it_works_or_where_its_code_is(name: str) -> None:
    """A program drops json.py beside itself -> the root file system is read-only, the working folder is / and no mount
    covers the code."""
    pod = PODS[name]
    for container in made.containers(pod):
        assert container["securityContext"]["readOnlyRootFilesystem"] is True, container["name"]
        assert container["securityContext"]["allowPrivilegeEscalation"] is False, container["name"]
        assert container["workingDir"] == "/", container["name"]
        if container.get("command", [""])[0] in {"python", "vllm"}:
            assert {"PYTHONSAFEPATH": "1", "PYTHONNOUSERSITE": "1"}.items() <= made.environment(container).items()
        path = made.environment(container).get("PYTHONPATH", "/app")
        for mount, volume in made.volumes_of(pod, container):
            if made.writable(mount, volume):
                assert not path.startswith(mount["mountPath"]), mount
                assert not re.match(r"/($|app|opt|usr|lib|bin|sbin|etc|var/run|proc|sys)", mount["mountPath"]), mount


@pytest.mark.parametrize("name", PODS)
def test_pods_share_nothing_with_their_node(name: str) -> None:
    """A container looks at its neighbours' processes or at the node's files -> namespaces are apart, no hostPath."""
    pod = PODS[name]
    assert not [part for part in SHARED_PARTS if pod.get(part)]
    assert not [volume for volume in pod.get("volumes", []) if "hostPath" in volume]
    assert pod["securityContext"]["runAsNonRoot"] is True


@pytest.mark.parametrize("name", [name for name in PODS if not name.startswith("chart")])
def test_only_the_agent_has_a_token_of_the_api(name: str) -> None:
    """A training pod or an engine asks the API server -> it has no token."""
    pod = PODS[name]
    holders = [item["name"] for item in made.containers(pod) if "token" in made.credentials(pod, item)]
    assert holders == (["agent"] if "/Deployment/" in name else [])


def test_the_store_has_no_token_of_the_api() -> None:
    """The embedded store is taken over and asks the API server -> it has no token."""
    (store,) = (pod for name, pod in PODS.items() if name.endswith("/graft-store"))
    assert not [item for item in made.containers(store) if "token" in made.credentials(store, item)]


@pytest.mark.parametrize("name", [name for name in PODS if name.startswith("adapterdeployment")])
def test_the_engine_holds_no_credential_and_is_another_user_than_the_agent(name: str) -> None:
    """The engine reads the tenant's key, or a file of the agent's user -> it mounts no Secret of the store or the hub,
    and it is another user."""
    pod = PODS[name]
    by_name = {item["name"]: item for item in made.containers(pod)}
    engine, agent = by_name["engine"], by_name["agent"]
    assert not {"token", "secret graft-storage", "secret graft-huggingface"} & made.credentials(pod, engine)
    assert made.user(pod, engine) != made.user(pod, agent)
    written = {mount["mountPath"] for mount, volume in made.volumes_of(pod, engine) if made.writable(mount, volume)}
    assert written == {"/tmp", "/dev/shm"}
    # The group of the pod's volumes: so the engine can read what the agent wrote.
    assert pod["securityContext"]["fsGroup"] == pod["securityContext"]["runAsGroup"]


def test_a_user_that_the_image_does_not_list_has_a_name() -> None:
    """torch asks for the name of a user without an entry in /etc/passwd and ends (older images of vLLM) -> the
    environment names the user."""
    for name, pod in PODS.items():
        for container in made.containers(pod):
            if not name.startswith("chart"):
                assert made.environment(container)["USER"] == made.environment(container)["LOGNAME"] == "graft"


@pytest.fixture
def dropped(tmp_path: Path) -> Path:
    """A folder in which an attacker left modules with the names of ours and of what they import."""
    for package in ("graft", "graft_server", "graft_trainer"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text(HOSTILE)
    for module in ("json", "asyncio", "aiohttp", "boto3", "torch", "sitecustomize", "usercustomize"):
        (tmp_path / f"{module}.py").write_text(HOSTILE)
    return tmp_path


def started(module: str, folder: Path, variables: dict[str, str]) -> str:
    """Start a program of a pod in a folder, as its container would. Return what it printed."""
    code = os.pathsep.join(str(REPOSITORY / part) for part in ("operator", "trainer-image", "server-image"))
    done = subprocess.run(
        [sys.executable, "-m", module, "--help"], cwd=folder, capture_output=True, text=True, check=False, timeout=120,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": code, "TMPDIR": str(folder)} | variables,
    )  # fmt: skip
    return done.stdout + done.stderr


@pytest.mark.parametrize("module", MODULES)
def test_modules_that_were_dropped_into_the_working_folder_are_not_imported(module: str, dropped: Path) -> None:
    """The engine writes graft_server/__init__.py into the folder where the agent starts (as was shown on a cluster) ->
    Python does not look there, because of the container's environment."""
    users = [
        made.environment(container)
        for pod in PODS.values()
        for container in made.containers(pod)
        if container.get("command", [])[:3] == ["python", "-m", module]
    ]
    safe = {name: users[0][name] for name in ("PYTHONSAFEPATH", "PYTHONNOUSERSITE")}
    assert all(safe.items() <= variables.items() for variables in users)
    assert "TAKEN OVER" not in started(module, dropped, safe | {"HOME": str(dropped)})


def test_the_attack_works_without_the_protection(dropped: Path) -> None:
    """The same attack on a container as it was before -> it succeeds, so the test above can fail."""
    assert "TAKEN OVER" in started("graft_server.agent", dropped, {"HOME": str(dropped)})


@pytest.mark.parametrize("path", made.dockerfiles(), ids=lambda path: str(path.parent.name))
def test_the_images_are_as_safe_as_the_pods(path: Path) -> None:
    """Somebody runs an image without our manifests -> its own working folder and environment protect it, and it has a
    user that is not root."""
    text = path.read_text()
    assert set(re.findall(r"^WORKDIR (.*)$", text, re.M)) == {"/"}
    for line in re.findall(r"^ENV .*PYTHONPATH.*$", text, re.M):
        assert "PYTHONSAFEPATH=1" in line and "PYTHONNOUSERSITE=1" in line
    stages = re.split(r"^FROM ", text, flags=re.M)[1:]
    for stage in stages:
        users = re.findall(r"^USER (\d+)", stage, re.M)
        assert users and users[-1] != "0", stage.splitlines()[0]


def test_what_the_agent_writes_can_be_read_by_the_engines_user(tmp_path: Path) -> None:
    """The protection must not be paid with a model that cannot be read: files of the agent are readable for the group
    and not writable."""
    from graft_server.agent.storage.folders import Folders

    folders = Folders(tmp_path / "adapters")
    folders.open()
    name = "shop--support-1.0.0--aaaaaaaaaaaa"
    (folders.partial(name) / "adapter_config.json").write_text("{}")
    folders.finish(name, "sha256:" + "a" * 64)
    for path in (folders.place(name), *folders.place(name).iterdir()):
        mode = path.stat().st_mode
        assert mode & 0o040 and not mode & 0o022, (path, oct(mode))
