"""The agent's key for the engine, and the folder from which the engine learns who may call it.

The agent writes the folder and the engine only reads it. The files are complete before the agent listens, and the kubelet
starts the engine after that. A pod keeps its certificate for as long as it lives. Gateways do not check who signed it:
they know its SHA-256 from the operator, who knows it from the agent.
"""

import hashlib
import json
import os
import ssl
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID
from graft.contracts.enginekeys import fingerprint, new_key
from graft.contracts.mounts import CALLERS_FILE, CERTIFICATE_FILE, MODULES_DIR, PRIVATE_KEY_FILE

from graft_server import callers

MODULE = "graft_callers.py"  # the operator's flag --middleware names it
READABLE = 0o640  # the engine has another user, and is in the group of the pod's volumes
VALID_DAYS = 3650  # longer than any pod; a new pod has a new certificate


class Access:
    """What the agent sends to the engine to be let in, and the callers that the engine accepts."""

    def __init__(self, folder: Path, *, tls: bool = False) -> None:
        self._folder = folder
        self._key = new_key()
        self._gateway: list[str] | None = []
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / CALLERS_FILE).exists():
            # An agent before this one wrote it. Until this agent has read the wanted ConfigMap, gateways keep their access.
            self._gateway = _gateway_keys(folder / CALLERS_FILE)
        (folder / MODULES_DIR).mkdir(exist_ok=True)
        _write(folder / MODULES_DIR / MODULE, Path(callers.__file__).read_bytes())
        self.certificate = _certificate(folder) if tls else None  # its SHA-256, in hexadecimal digits
        self._write_callers()

    @property
    def headers(self) -> dict[str, str]:
        """Return the headers of each request to the engine."""
        return {"Authorization": f"Bearer {self._key}"}

    @property
    def ssl(self) -> aiohttp.Fingerprint | bool:
        """Return how aiohttp checks the engine's certificate."""
        return aiohttp.Fingerprint(bytes.fromhex(self.certificate)) if self.certificate else True

    def admit(self, gateway: Sequence[str] | None) -> None:
        """Let the engine accept these keys of gateways. None: gateways need no key."""
        wanted = None if gateway is None else list(gateway)
        if wanted != self._gateway:
            self._gateway = wanted
            self._write_callers()

    def _write_callers(self) -> None:
        accepted = {callers.AGENT: [fingerprint(self._key)], callers.GATEWAY: self._gateway}
        _write(self._folder / CALLERS_FILE, json.dumps(accepted).encode())


def _gateway_keys(path: Path) -> list[str] | None:
    try:
        found: Any = json.loads(path.read_bytes())[callers.GATEWAY]
    except (OSError, ValueError, TypeError, KeyError):
        return []
    return None if found is None else [str(key) for key in found]


def _certificate(folder: Path) -> str:
    """Return the SHA-256 of the pod's certificate. Make the certificate if the pod has none."""
    key_path, path = folder / PRIVATE_KEY_FILE, folder / CERTIFICATE_FILE
    if not path.exists():  # it is written last
        key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "engine")])
        now = datetime.now(UTC)
        made = (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(days=1))  # the clocks of nodes differ
            .not_valid_after(now + timedelta(days=VALID_DAYS))
            .add_extension(x509.SubjectAlternativeName([x509.DNSName("engine")]), critical=False)
            .sign(key, hashes.SHA256())
        )
        _write(key_path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        _write(path, made.public_bytes(Encoding.PEM))
    return hashlib.sha256(ssl.PEM_cert_to_DER_cert(path.read_text())).hexdigest()


def _write(path: Path, data: bytes) -> None:
    """Replace a file in one step. The engine never reads a part of it."""
    partial = path.with_name(f".{path.name}.partial")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, READABLE)
    with os.fdopen(descriptor, "wb") as file:
        os.fchmod(descriptor, READABLE)  # whatever the umask is
        file.write(data)
    partial.rename(path)
