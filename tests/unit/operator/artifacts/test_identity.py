"""The identity service of the store, when an answer is lost or another operator was first."""

from collections.abc import Iterator

import pytest
from graft.artifacts.identity import VersityIdentity
from graft.artifacts.storage import StorageConfig, StoreError
from graft.artifacts.store import S3Store
from testbed.faults import FaultyProxy, Strike, faulty_proxy
from testbed.objectstore import S3Server, s3_server

SECRET = "a secret of thirty characters"


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


@pytest.fixture
def proxy(server: S3Server) -> Iterator[FaultyProxy]:
    with faulty_proxy(server.endpoint) as proxy:
        yield proxy


@pytest.fixture
def identity(server: S3Server, proxy: FaultyProxy) -> VersityIdentity:
    store = S3Store(StorageConfig.from_dir(server.secret_dir("bucket")))
    store.create_bucket()
    return VersityIdentity(store, proxy.endpoint, "cluster/graft-system", models=None)


def test_a_lost_answer_of_the_identity_service_costs_no_retry_of_the_job(
    identity: VersityIdentity, proxy: FaultyProxy
) -> None:
    """The job waited 20 s. The user exists at the second attempt, and none does at the second deletion."""
    lost = []

    def lose_each_once(method: str, path: str, body: bytes) -> Strike | None:
        change = path.partition("?")[0]
        if change in lost:
            return None
        lost.append(change)
        return Strike.RESET

    proxy.strike = lose_each_once
    identity.accept("team-a", SECRET)
    assert identity.has_key("team-a") and identity.user("team-a") in identity.users()
    identity.revoke("team-a")
    assert not identity.has_key("team-a") and identity.user("team-a") not in identity.users()
    assert lost == ["/list-users", "/create-user", "/delete-user"]


def test_a_connection_that_breaks_off_again_is_reported(identity: VersityIdentity, proxy: FaultyProxy) -> None:
    proxy.strike = lambda method, path, body: Strike.RESET
    with pytest.raises(StoreError, match="cannot call the identity service"):
        identity.accept("team-b", SECRET)


def test_a_user_that_another_operator_has_created_meanwhile_is_taken(identity: VersityIdentity) -> None:
    """Both give it the secret that the namespace's Secret has."""
    identity.accept("team-c", SECRET)
    identity.users = set  # type: ignore[method-assign] - as listed a moment before
    identity.accept("team-c", SECRET)
