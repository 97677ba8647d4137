"""The binaries of the testbed: Kubernetes, helm, CoreDNS, versitygw, the policy engine and kwok.

Each is built from a Go module once and kept in the cache folder.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

from testbed.shell import CACHE, Failed, locked, output, run, say

GO = Path(__file__).parent / "go"
KUBERNETES = "v1.34.4"
# name -> (folder with the go.mod, package)
SOURCES = {
    "kube": ("kube", "./cmd/kube"),
    "pause": ("kube", "./cmd/pause"),
    "coredns": ("kube", "./cmd/coredns"),
    "helm": ("kube", "helm.sh/helm/v4/cmd/helm"),
    "versitygw": ("versitygw", "github.com/versity/versitygw/cmd/versitygw"),
    "kube-network-policies": (
        "policies",
        "sigs.k8s.io/kube-network-policies/cmd/kube-network-policies/standard",
    ),
    "kwok": ("kwok", "sigs.k8s.io/kwok/cmd/kwok"),
}
HELM = "v4.0.5"
_VERSION = "k8s.io/component-base/version"
_NUMBERS = ("chart/common.k8sVersion", "chart/v2/lint/rules.k8sVersion")
# name -> symbols that the linker sets. A program that is built as a dependency does not know its version.
STAMPS = {
    "helm": {
        "helm.sh/helm/v4/internal/version.version": HELM,
        "helm.sh/helm/v4/internal/version.kubeClientVersionMajor": "1",
        "helm.sh/helm/v4/internal/version.kubeClientVersionMinor": "34",
        # `helm template` and `helm lint` take this version for the cluster's.
        **{f"helm.sh/helm/v4/pkg/{name}Major": "1" for name in _NUMBERS},
        **{f"helm.sh/helm/v4/pkg/{name}Minor": "34" for name in _NUMBERS},
    },
}
KUBE_STAMPS = {f"{_VERSION}.gitVersion": KUBERNETES, f"{_VERSION}.gitMajor": "1", f"{_VERSION}.gitMinor": "34"}
LINKS = ("etcd", "kube-apiserver", "kube-controller-manager", "kube-scheduler", "kubelet", "kube-proxy", "kubectl")


def _go() -> str:
    found = shutil.which("go") or shutil.which("go", path="/usr/local/go/bin")
    if found is None:
        raise Failed("cannot build the testbed: `go` is not on PATH. Install Go 1.26 or newer")
    return found


def _key(module: str, stamps: dict[str, str]) -> str:
    hasher = hashlib.sha256(KUBERNETES.encode())
    hasher.update(json.dumps(stamps).encode() if stamps else b"")
    for path in sorted((GO / module).rglob("*")):
        if path.is_file():
            hasher.update(path.relative_to(GO).as_posix().encode() + path.read_bytes())
    return hasher.hexdigest()[:16]


def binary(name: str) -> Path:
    """Return the path of a binary. Build the binary first if it does not exist."""
    link = name if name in LINKS else None
    source = "kube" if link else name
    module, package = SOURCES[source]
    folder = CACHE / "bin" / f"{module}-{_key(module, STAMPS.get(source, {}))}"
    path = folder / source
    if not path.exists():
        with locked(f"build-{module}"):
            if not path.exists():
                _build(source, module, package, path)
    if link is None:
        return path
    alias = folder / link
    if not alias.is_symlink():
        temporary = folder / f"{link}.{os.getpid()}"
        temporary.symlink_to(source)
        temporary.rename(alias)
    return alias


def _build(name: str, module: str, package: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    log = CACHE / "logs" / f"build-{name}.log"
    log.unlink(missing_ok=True)
    say(f"    building {name} (log: {log}). The first build of kube takes about 10 minutes on two cores.")
    stamps = KUBE_STAMPS | STAMPS.get(name, {})
    flags = " ".join(["-s -w", *(f"-X {symbol}={value}" for symbol, value in stamps.items())])
    partial = path.with_name(f"{name}.partial")
    run(
        [_go(), "build", "-v", "-trimpath", "-buildvcs=false", "-ldflags", flags, "-o", partial, package],
        log, f"building {name}", env={"CGO_ENABLED": "0"}, cwd=GO / module,
    )  # fmt: skip
    partial.rename(path)


def build(names: list[str]) -> None:
    """Build several binaries one after the other, because each build uses all cores."""
    for name in names:
        binary(name)


def kubectl(kubeconfig: Path | str, *arguments: str, check: bool = True) -> str:
    """Run kubectl. Return its output."""
    return output([binary("kubectl"), "--kubeconfig", kubeconfig, *arguments], check=check)
