"""The store without a key: a token of the pod is exchanged for temporary keys of a role. The token service stands in for AWS's STS,
the store is a real S3 server, which knows the temporary key as a user."""

import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs

import pytest
from graft.artifacts.storage import StorageConfig, StoreError
from graft.artifacts.store import S3Store
from testbed.objectstore import S3Server, s3_server

ROLE = "arn:aws:iam::123456789012:role/team-a"
ANSWER = """<AssumeRoleWithWebIdentityResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/">
<AssumeRoleWithWebIdentityResult><AssumedRoleUser><Arn>arn:aws:sts::123456789012:assumed-role/team-a/x</Arn><AssumedRoleId>A:x</AssumedRoleId>
</AssumedRoleUser><Credentials><AccessKeyId>{key}</AccessKeyId><SecretAccessKey>{secret}</SecretAccessKey><SessionToken>{session}</SessionToken>
<Expiration>{until}</Expiration></Credentials></AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>"""
REFUSED = """<ErrorResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><Error><Type>Sender</Type><Code>InvalidIdentityToken</Code>
<Message>the token is not valid</Message></Error></ErrorResponse>"""


class Sts(ThreadingHTTPServer):
    """Answers AssumeRoleWithWebIdentity. `seconds`: how long a key is valid. `asked`: the parameters of each request."""

    def __init__(self, config: StorageConfig) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.config, self.seconds, self.asked = config, 3600.0, list[dict[str, str]]()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Sts

    def do_POST(self) -> None:
        form = parse_qs(self.rfile.read(int(self.headers["Content-Length"])).decode())
        asked = {name: values[0] for name, values in form.items()}
        assert "Authorization" not in self.headers, "the token is the only credential"
        self.server.asked.append(asked)
        if asked["WebIdentityToken"] == "forged":
            return self._answer(400, REFUSED)
        until = datetime.now(UTC) + timedelta(seconds=self.server.seconds)
        config = self.server.config
        text = ANSWER.format(
            key=config.access_key_id, secret=config.secret_access_key, session="", until=until.isoformat()
        )
        return self._answer(200, text)

    def _answer(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "text/xml")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.fixture
def sts(server: S3Server) -> Iterator[Sts]:
    with Sts(StorageConfig.from_dir(server.secret_dir("bucket"))) as found:
        thread = threading.Thread(target=found.serve_forever, daemon=True)
        thread.start()
        yield found
        found.shutdown()


def folder(tmp_path: Path, sts: Sts, token: str = "first") -> Path:
    """Return what a pod mounts: the entries of Secret graft-storage, and the token that the kubelet renews."""
    config = sts.config
    for name, text in {
        "endpoint": config.endpoint, "region": config.region, "bucket": config.bucket, "prefix": "team-a/",
        "role-arn": ROLE, "sts-endpoint": sts.url, "token": token,
    }.items():  # fmt: skip
        (tmp_path / name).write_text(text)
    return tmp_path


def test_a_pod_reads_and_writes_with_temporary_keys(sts: Sts, tmp_path: Path) -> None:
    store = S3Store(StorageConfig.from_dir(folder(tmp_path, sts)))
    store.create_bucket()
    store.put("team-a/x", b"hello")
    assert store.get("team-a/x") == b"hello"
    (asked,) = sts.asked  # one key for all requests
    assert (asked["Action"], asked["RoleArn"], asked["WebIdentityToken"]) == (
        "AssumeRoleWithWebIdentity",
        ROLE,
        "first",
    )


def test_keys_are_renewed_with_the_present_token(sts: Sts, tmp_path: Path) -> None:
    """The kubelet replaces the token, and keys expire: neither needs another pod."""
    sts.seconds = 60  # botocore renews keys that expire within 10 minutes
    store = S3Store(StorageConfig.from_dir(folder(tmp_path, sts)))
    store.create_bucket()
    (tmp_path / "token").write_text("second")
    store.put("team-a/x", b"hello")
    assert [item["WebIdentityToken"] for item in sts.asked][-1] == "second"


def test_a_refused_token_is_reported_with_its_cause(sts: Sts, tmp_path: Path) -> None:
    store = S3Store(StorageConfig.from_dir(folder(tmp_path, sts, token="forged")))
    with pytest.raises(StoreError, match=r"InvalidIdentityToken.*the token is not valid") as error:
        store.get("team-a/x")
    assert error.value.trouble == "denied"


def test_a_role_without_a_token_says_which_value_is_missing(sts: Sts, tmp_path: Path) -> None:
    (folder(tmp_path, sts) / "token").unlink()
    with pytest.raises(StoreError, match=r"objectStore\.credentials: webIdentity"):
        StorageConfig.from_dir(tmp_path)
