"""Ports that are forwarded to Services, and versions that are pulled through them from a real S3 server."""

import base64
import os
import socket
import socketserver
import ssl
import struct
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import urlsplit

import pytest
from graft.artifacts import archive, signing
from graft.artifacts.layout import MANIFEST, SIGNATURE, s3_uri
from graft.artifacts.manifest import Manifest, ManifestBaseModel, ManifestJob, digest
from graft.artifacts.signing import Statement
from graft.artifacts.store import S3Store
from graft.artifacts.versions import describe_files
from graft.cli.failure import CliFailure
from graft.cli.forward import ServiceAddress, reachable, service_of
from graft.cli.podstream import PodStream, pump
from graft.cli.pull import pull
from graft.cli.reports import opened_store
from testbed.pki import authority, certificate
from websocket import ABNF
from worlds.buckets import empty_bucket, publish

PREFIX = "shop/adapters/support/1.0.0/"
KEYS = signing.read_keys({"a.key": signing.generate()})


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://graft-store.graft-system.svc:7070", ServiceAddress("graft-system", "graft-store", 7070)),
        ("http://store.team.svc.cluster.local/x", ServiceAddress("team", "store", 80)),
        ("https://store.team.svc", ServiceAddress("team", "store", 443)),
        ("https://s3.eu-central-1.amazonaws.com", None),
        ("http://10.0.0.1:9000", None),
        ("", None),
    ],
)
def test_the_service_that_a_url_names(url: str, expected: ServiceAddress | None) -> None:
    assert service_of(url) == expected


SERVICE = "graft-store.graft-system.svc"


class Cluster:
    """A cluster whose only Service is the store. It counts the connections to its pod. `address`: that of the pod's port.
    `ca`: the store has TLS, and the Secret has this CA, or none if it is empty."""

    def __init__(self, store: S3Store, address: tuple[str, int] | None = None, ca: bytes | None = None) -> None:
        self.store, self.ca = store, ca
        parts = urlsplit(store.config.endpoint)
        self.address = address or (parts.hostname, parts.port)
        self.opened: list[tuple[str, str, int]] = []

    def secret(self, namespace: str, name: str) -> dict[str, str]:
        config = self.store.config
        data = {
            "endpoint": f"{'http' if self.ca is None else 'https'}://{SERVICE}:7070",
            "bucket": config.bucket,
            "region": config.region,
            "access-key-id": config.access_key_id,
            "secret-access-key": config.secret_access_key,
            "ca.crt": (self.ca or b"").decode(),
        }
        return {key: base64.b64encode(value.encode()).decode() for key, value in data.items()}

    def pod_behind(self, namespace: str, service: str, port: int) -> tuple[str, int]:
        assert (namespace, service, port) == ("graft-system", "graft-store", 7070)
        return "graft-store-0", 7071

    def connect(self, namespace: str, pod: str, port: int) -> "Far":
        self.opened.append((namespace, pod, port))
        return Far(socket.create_connection(self.address), port)


class Far:
    """A connection to a pod as the API server gives it: data in frames with a channel, after the number of the port."""

    piece = 30_000  # bytes in a frame: more than one TLS record

    def __init__(self, sock: socket.socket, port: int, refused: bytes = b"") -> None:
        self.sock = sock
        begin = struct.pack("<H", port)
        self._first = [b"\0" + begin, b"\1" + begin, *([b"\1" + refused] if refused else [])]

    def recv_data_frame(self, control: bool) -> tuple[int, SimpleNamespace]:
        data = self._first.pop(0) if self._first else b"\0" + self.sock.recv(self.piece)
        return ABNF.OPCODE_CLOSE if data == b"\0" else ABNF.OPCODE_BINARY, SimpleNamespace(data=data)

    def send(self, data: bytes, opcode: int) -> None:
        assert opcode == ABNF.OPCODE_BINARY and data[0] == 0
        self.sock.sendall(data[1:])

    def close(self) -> None:
        self.sock.close()


@pytest.fixture(scope="module")
def store() -> Iterator[S3Store]:
    with empty_bucket() as store:
        yield store


@pytest.fixture
def version(store: S3Store, tmp_path: Path) -> Manifest:
    """A published and signed version with weights of 9 MB."""
    for item in list(store.objects("shop/")):
        store.delete(item.key)
    files = {}
    for name, data in {
        "adapter_config.json": b"{}",
        "adapter_model.safetensors": os.urandom(9 << 20),
        "README.md": b"# x",
    }.items():
        files[name] = tmp_path / f"source-{name}"
        files[name].write_bytes(data)
    manifest = Manifest(
        adapter="support", version="1.0.0", method="lora", recipe="r", hyperparameters={},
        base_model=ManifestBaseModel(name="tiny", uri="s3://bucket/models/tiny"),
        job=ManifestJob(name="j", namespace="shop", uid="u", attempt="0"),
        files=describe_files(files), created_at="2026-01-01T00:00:00Z",
    )  # fmt: skip
    publish(store, PREFIX, files, manifest)
    sign(store)
    return manifest


def sign(store: S3Store) -> None:
    statement = Statement(
        "shop", "support", "1.0.0", s3_uri(store.config.bucket, PREFIX), digest(store.get(PREFIX + MANIFEST))
    )
    store.put(PREFIX + SIGNATURE, signing.document(statement, signing.sign(KEYS, statement)))


def pulled(cluster: Cluster, folder: Path, trusted: dict[str, bytes] | None = None) -> Any:
    with opened_store(cluster, "shop", None) as store:  # type: ignore[arg-type]
        return pull(store, "shop", "support", "1.0.0", dict(KEYS.public) if trusted is None else trusted, folder)


def test_a_version_is_pulled_through_a_forwarded_port(store: S3Store, version: Manifest, tmp_path: Path) -> None:
    cluster = Cluster(store)
    done = pulled(cluster, tmp_path / "support")
    assert set(cluster.opened) == {("graft-system", "graft-store-0", 7071)}
    assert {path.name for path in (tmp_path / "support").iterdir()} == {
        *(file.name for file in version.files),
        MANIFEST,
        SIGNATURE,
    }
    assert (tmp_path / "support/adapter_model.safetensors").stat().st_size == 9 << 20
    assert done.verified.key_id == KEYS.key_id and f"folder: {tmp_path / 'support'}" in done.text
    with pytest.raises(CliFailure, match="exists"):
        pulled(cluster, tmp_path / "support")


def test_compressed_weights_are_decompressed(store: S3Store, version: Manifest, tmp_path: Path) -> None:
    expected = store.get(PREFIX + "adapter_model.safetensors", most=10 << 20)
    archive.compress(store, PREFIX, version, lambda: False)
    archive.drop_originals(store, PREFIX, version)
    pulled(Cluster(store), tmp_path / "support")
    assert (tmp_path / "support/adapter_model.safetensors").read_bytes() == expected


@pytest.mark.parametrize("change", ["weights", "longer", "manifest", "signature", "key", "missing"])
def test_a_version_that_is_not_what_was_signed_leaves_no_folder(
    store: S3Store, version: Manifest, tmp_path: Path, change: str
) -> None:
    match change:
        case "weights":
            store.put(PREFIX + "README.md", b"# y")
        case "longer":
            store.put(PREFIX + "README.md", b"# xx")
        case "manifest":
            store.put(PREFIX + MANIFEST, store.get(PREFIX + MANIFEST) + b" ")
        case "signature":
            store.put(PREFIX + SIGNATURE, b"{}")
        case "missing":
            store.delete(PREFIX + "README.md")
    with pytest.raises(CliFailure) as caught:
        pulled(Cluster(store), tmp_path / "support", {} if change == "key" else None)
    assert "support 1.0.0 in shop" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith("support")] == []


def test_a_version_that_does_not_exist_is_named(store: S3Store, version: Manifest, tmp_path: Path) -> None:
    store.delete(PREFIX + SIGNATURE)
    with pytest.raises(CliFailure, match=r"the store has no signed version support 1\.0\.0 of shop") as caught:
        pulled(Cluster(store), tmp_path / "support")
    assert "kubectl get adapters" in caught.value.remedy


@dataclass
class Front:
    """A server that ends TLS in front of the store."""

    address: tuple[str, int]
    ca: bytes


@pytest.fixture(scope="module", params=[SERVICE, "store.example.com"])
def front(store: S3Store, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Front]:
    """Run a server whose certificate has the name of the Service, or another one, by a private CA."""
    folder = tmp_path_factory.mktemp("pki")
    authority(folder)
    certificate(folder, "store", "/CN=store", (request.param,))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "store.crt", folder / "store.key")
    behind = urlsplit(store.config.endpoint)

    class Connection(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            with (
                suppress(OSError),
                context.wrap_socket(self.request, server_side=True) as near,
                socket.create_connection((behind.hostname, behind.port)) as far,  # type: ignore[arg-type]
            ):
                threading.Thread(target=copied, args=(far, near), daemon=True).start()
                copied(near, far)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Connection) as server:
        server.daemon_threads, server.block_on_close = True, False
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield Front(server.server_address, (folder / "ca.crt").read_bytes())  # type: ignore[arg-type]
        server.shutdown()


def copied(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(1 << 16):
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("front", [SERVICE], indirect=True)
def test_a_version_is_pulled_from_a_service_with_tls(
    store: S3Store, version: Manifest, tmp_path: Path, front: Front
) -> None:
    """The certificate is that of the Service, by the CA in the Secret."""
    pulled(Cluster(store, front.address, front.ca), tmp_path / "support")
    expected = store.get(PREFIX + "adapter_model.safetensors", most=10 << 20)
    assert (tmp_path / "support/adapter_model.safetensors").read_bytes() == expected


@pytest.mark.parametrize("ca", ["right", "absent", "no certificate"])
@pytest.mark.parametrize("front", [SERVICE, "store.example.com"], indirect=True)
def test_a_certificate_that_is_not_trusted_is_refused_with_a_remedy(
    store: S3Store, front: Front, ca: str, request: pytest.FixtureRequest
) -> None:
    """A CA is missing, or the certificate has another name."""
    name = request.node.callspec.params["front"]
    cluster = Cluster(store, front.address, {"right": front.ca, "absent": b"", "no certificate": b"# none"}[ca])
    if (name, ca) == (SERVICE, "right"):
        with opened_store(cluster, "shop", None) as found:  # type: ignore[arg-type]
            assert list(found.objects("nothing/")) == []
        return
    with pytest.raises(CliFailure) as caught, opened_store(cluster, "shop", None):  # type: ignore[arg-type]
        pass
    assert "entry ca.crt of the Secret graft-storage" in caught.value.remedy
    if (name, ca) == ("store.example.com", "right"):
        assert "Hostname mismatch" in str(caught.value)


def test_a_port_that_the_pod_refuses_is_reported() -> None:
    near, client = socket.socketpair()
    far, server = socket.socketpair()
    with near, client, far, server:
        server.sendall(b"x")  # readable, as a frame would be
        with pytest.raises(CliFailure, match="connection refused"):
            refused = Far(far, 7071, b"dial tcp4 127.0.0.1:7071: connection refused")
            pump(near, PodStream(refused))  # type: ignore[arg-type]


def test_a_url_that_is_reachable_is_used_as_it_is(store: S3Store) -> None:
    cluster = Cluster(store)
    for url in ("http://10.0.0.1:9000", "https://s3.example.com"):
        with reachable(cluster, url) as found:  # type: ignore[arg-type]
            assert found == url
    assert cluster.opened == []


def test_connections_end_with_the_command(store: S3Store) -> None:
    cluster = Cluster(store)
    with reachable(cluster, "http://graft-store.graft-system.svc:7070") as url:  # type: ignore[arg-type]
        address = urlsplit(url)
        assert address.port
        socket.create_connection(("127.0.0.1", address.port)).close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", address.port))
