"""The binaries of the testbed say the versions that they were built from."""

from testbed.binaries import GO, HELM, KUBERNETES, binary
from testbed.shell import output


def test_the_versions_are_those_of_the_modules() -> None:
    module = (GO / "kube" / "go.mod").read_text()
    assert f"helm.sh/helm/v4 {HELM} " in module
    assert f"k8s.io/kubernetes {KUBERNETES}\n" in module


def test_helm_knows_its_version_and_that_of_kubernetes() -> None:
    assert output([binary("helm"), "version", "--template", "{{.Version}}"]) == HELM
    minor = KUBERNETES.rpartition(".")[0]
    assert output([binary("helm"), "version", "--template", "{{.KubeClientVersion}}"]) == minor
