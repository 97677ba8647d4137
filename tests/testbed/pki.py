"""The certificates of a cluster, made with openssl."""

from pathlib import Path

from testbed.shell import output

DAYS = "30"


def authority(folder: Path) -> None:
    """Write ca.crt and ca.key, and the key pair that signs service account tokens."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    _openssl("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", folder / "ca.key", "-out", folder / "ca.crt",
             "-subj", "/CN=graft-testbed", "-days", DAYS)  # fmt: skip
    _openssl("genrsa", "-out", folder / "sa.key", "2048")
    _openssl("rsa", "-in", folder / "sa.key", "-pubout", "-out", folder / "sa.pub")


def certificate(folder: Path, name: str, subject: str, addresses: tuple[str, ...] = ()) -> None:
    """Write <name>.crt and <name>.key for servers and clients, signed by the authority."""
    request, extensions = folder / f"{name}.csr", folder / f"{name}.ext"
    names = [f"{'IP' if item[0].isdigit() or ':' in item else 'DNS'}:{item}" for item in addresses]
    lines = ["extendedKeyUsage=serverAuth,clientAuth", *([f"subjectAltName={','.join(names)}"] if names else [])]
    extensions.write_text("\n".join(lines) + "\n")
    _openssl(
        "req", "-newkey", "rsa:2048", "-nodes", "-keyout", folder / f"{name}.key", "-out", request, "-subj", subject
    )
    _openssl("x509", "-req", "-in", request, "-CA", folder / "ca.crt", "-CAkey", folder / "ca.key", "-CAcreateserial",
             "-out", folder / f"{name}.crt", "-days", DAYS, "-extfile", extensions)  # fmt: skip


def kubeconfig(folder: Path, name: str, server: str, path: Path) -> None:
    """Write a kubeconfig with embedded certificates."""
    import base64

    def embed(file: str) -> str:
        return base64.b64encode((folder / file).read_bytes()).decode()

    path.write_text(
        f"""apiVersion: v1
kind: Config
clusters:
- name: graft
  cluster: {{server: "{server}", certificate-authority-data: {embed("ca.crt")}}}
users:
- name: {name}
  user: {{client-certificate-data: {embed(f"{name}.crt")}, client-key-data: {embed(f"{name}.key")}}}
contexts:
- name: graft
  context: {{cluster: graft, user: {name}}}
current-context: graft
"""
    )
    path.chmod(0o600)


def _openssl(*arguments: str | Path) -> None:
    output(["openssl", *arguments])
