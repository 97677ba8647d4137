"""The storage key of a namespace: who owns its Secret, and when the operator issues a key."""

import asyncio
import base64
from typing import Any

import pytest
from graft.api import BaseModel
from graft.artifacts.storage import StorageConfig
from graft.contracts.mounts import STORAGE_SECRET
from graft.kube import KubeError
from graft.reconcile.shared.access import SECRET_KEYS, Trouble, base_model_of, ensure_credentials
from graft.reconcile.shared.context import Context
from graft.settings import Images, Settings
from worlds.reconciling import Killed

SETTINGS = Settings(
    namespace="graft-system", images=Images(trainer="r/t:1", engine="r/e:1", agent="r/a:1", vllm="r/v:1")
)


OLD, NEW = "o" * 40, "n" * 40


class Kube:
    """An API that returns the given Secrets one after the other, and then always the last one."""

    def __init__(self, *secrets: dict[str, Any] | None) -> None:
        self.secrets = list(secrets)
        self.applied: list[dict[str, Any]] = []
        self.taken = False

    async def get(self, kind: str, namespace: str, name: str) -> dict[str, Any] | None:
        assert (kind, name) == ("Secret", STORAGE_SECRET)
        return self.secrets.pop(0) if len(self.secrets) > 1 else self.secrets[0]

    async def merge_patch(self, kind: str, namespace: str, name: str, patch: dict[str, Any]) -> dict[str, Any]:
        assert (kind, name) == ("Secret", STORAGE_SECRET) and patch["metadata"]["resourceVersion"] == "7"
        self.applied.append({"metadata": {"namespace": namespace}, "data": patch["data"]})
        return {"metadata": {"resourceVersion": "8"}}

    async def create(self, manifest: dict[str, Any]) -> dict[str, Any]:
        if self.taken:
            raise KubeError(409, "AlreadyExists", "another operator has created it")
        self.applied.append(manifest)
        return {"metadata": {"resourceVersion": "7"}}


class Identity:
    """The identity service of the store: the secret key of each tenant's user."""

    def __init__(self, *tenants: str) -> None:
        self.known = dict.fromkeys(tenants, OLD)
        self.asked = 0

    def user(self, tenant: str) -> str:
        return f"graft-id-{tenant}"

    def has_key(self, tenant: str) -> bool:
        self.asked += 1
        return tenant in self.known

    def works(self, tenant: str, user: str, secret: str) -> bool:
        return user == self.user(tenant) and self.known.get(tenant) == secret

    def accept(self, tenant: str, secret: str) -> None:
        self.known.setdefault(tenant, secret)

    def revoke(self, tenant: str) -> None:
        self.known.pop(tenant, None)

    def draw(self, tenant: str) -> StorageConfig:
        return self.key(tenant, self.user(tenant), NEW)

    def key(self, tenant: str, user: str, secret: str) -> StorageConfig:
        return StorageConfig(
            endpoint="http://s3",
            region="r",
            bucket="graft",
            prefix=f"{tenant}/",
            access_key_id=user,
            secret_access_key=secret,
        )


def secret(
    *, ours: bool, without: str = "", user: str = "graft-id-shop", key: str = OLD, **entries: str
) -> dict[str, Any]:
    """Return a Secret that has these entries instead of the right ones. `session_token` stands for session-token."""
    labels = {"app.kubernetes.io/managed-by": "graft"} if ours else {}
    right = {"endpoint": "http://s3", "region": "r", "bucket": "graft", "prefix": "shop/"}
    right |= {"access-key-id": user, "secret-access-key": key}
    data = right | {name.replace("_", "-"): text for name, text in entries.items()}
    data.pop(without, None)
    return {
        "metadata": {"labels": labels, "resourceVersion": "7", "uid": "u"},
        "data": {name: base64.b64encode(text.encode()).decode() for name, text in data.items()},
    }


def context(kube: Kube, identity: Identity | None) -> Context:
    return Context(kube, SETTINGS, None, identity)  # type: ignore[arg-type]


async def test_a_key_is_issued_once() -> None:
    kube, identity = Kube(None, None, secret(ours=True, key=NEW)), Identity()
    ctx = context(kube, identity)
    for _ in range(3):
        assert await ensure_credentials(ctx, "shop") is None
    assert [item["metadata"]["namespace"] for item in kube.applied] == ["shop"] and identity.known == {"shop": NEW}
    assert identity.asked == 1 and ctx.issued == {"shop": "7"}


async def test_jobs_that_start_at_once_share_one_read_and_later_ones_see_a_deletion() -> None:
    class Slow(Kube):
        reads = 0

        async def get(self, kind: str, namespace: str, name: str) -> dict[str, Any] | None:
            self.reads += 1
            await asyncio.sleep(0)
            return await super().get(kind, namespace, name)

    kube = Slow(secret(ours=False))
    ctx = context(kube, None)
    assert await asyncio.gather(*(ensure_credentials(ctx, "shop") for _ in range(5))) == [None] * 5
    assert kube.reads == 1 and not ctx.reading
    kube.secrets = [None]
    trouble = await ensure_credentials(ctx, "shop")
    assert trouble is not None and trouble.reason == "CredentialsMissing" and kube.reads == 2


async def test_the_store_accepts_the_key_of_a_secret_that_it_does_not_know() -> None:
    """An operator was killed between the two, another one is between them now, or the store was restored."""
    kube, identity = Kube(secret(ours=True)), Identity()
    assert await ensure_credentials(context(kube, identity), "shop") is None
    assert kube.applied == [] and identity.known == {"shop": OLD}


@pytest.mark.parametrize(
    "forged", [{"user": "graft-id-victim"}, {"user": "root"}, {"key": "short"}, {"key": "\n" * 40}]
)
async def test_what_a_tenant_has_written_into_the_secret_is_not_accepted(forged: dict[str, str]) -> None:
    kube, identity = Kube(secret(ours=True, **forged)), Identity()
    assert await ensure_credentials(context(kube, identity), "shop") is None
    assert len(kube.applied) == 1 and identity.known == {"shop": NEW}


@pytest.mark.parametrize("there", [None, secret(ours=True, without="secret-access-key")])
async def test_a_key_whose_secret_was_lost_stops_working(there: dict[str, Any] | None) -> None:
    kube, identity = Kube(there), Identity("shop")
    assert await ensure_credentials(context(kube, identity), "shop") is None
    assert len(kube.applied) == 1 and identity.known == {"shop": NEW}


@pytest.mark.parametrize(
    "edited",
    [
        {"endpoint": "http://elsewhere"},
        {"prefix": "victim/"},
        {"session_token": "t"},
        {"role_arn": "arn:aws:iam::1:role/r"},
    ],
)
async def test_an_entry_that_was_changed_by_hand_is_put_right_and_the_key_stays(edited: dict[str, str]) -> None:
    kube, identity = Kube(secret(ours=True, **edited)), Identity("shop")
    ctx = context(kube, identity)
    assert await ensure_credentials(ctx, "shop") is None
    (written,) = kube.applied
    right = secret(ours=True)["data"]
    assert {name: text for name, text in written["data"].items() if text is not None} == right
    assert identity.known == {"shop": OLD} and ctx.issued == {"shop": "8"}


async def test_a_key_that_was_changed_by_hand_is_replaced_by_a_new_one() -> None:
    kube, identity = Kube(secret(ours=True, key="e" * 40)), Identity("shop")
    assert await ensure_credentials(context(kube, identity), "shop") is None
    assert len(kube.applied) == 1 and identity.known == {"shop": NEW}


async def test_a_secret_that_is_right_is_not_written_and_its_key_is_tried_once() -> None:
    kube, identity = Kube(secret(ours=True)), Identity("shop")
    ctx = context(kube, identity)
    for _ in range(3):
        assert await ensure_credentials(ctx, "shop") is None
    assert kube.applied == [] and identity.asked == 0 and ctx.issued == {"shop": "7"}


async def test_of_two_operators_that_draw_a_key_the_one_that_writes_the_secret_has_it_accepted() -> None:
    kube, identity = Kube(None), Identity()
    kube.taken = True
    with pytest.raises(KubeError):
        await ensure_credentials(context(kube, identity), "shop")
    assert kube.applied == [] and identity.known == {}


async def test_an_operator_that_is_killed_before_the_key_works_has_a_successor_that_accepts_it() -> None:
    kube, identity = Kube(None), Identity()

    def killed(tenant: str, secret: str) -> None:
        raise Killed

    identity.accept, accept = killed, identity.accept  # type: ignore[method-assign]
    with pytest.raises(Killed):
        await ensure_credentials(context(kube, identity), "shop")
    identity.accept = accept  # type: ignore[method-assign]
    kube.secrets = [secret(ours=True, key=NEW)]
    assert await ensure_credentials(context(kube, identity), "shop") is None
    assert len(kube.applied) == 1 and identity.known == {"shop": NEW}


async def test_a_secret_that_a_user_created_meanwhile_is_not_overwritten() -> None:
    kube, identity = Kube(None, secret(ours=False)), Identity()
    assert await ensure_credentials(context(kube, identity), "shop") is None
    assert kube.applied == [] and identity.known == {}


@pytest.mark.parametrize("identity", [None, Identity()])
async def test_missing_entries_in_the_secret_of_a_user_are_named(identity: Identity | None) -> None:
    trouble = await ensure_credentials(context(Kube(secret(ours=False, without="bucket")), identity), "shop")
    assert trouble is not None and trouble.reason == "CredentialsMissing"
    assert trouble.message.endswith("shop/. Missing entries: bucket")


async def test_without_an_identity_service_a_user_must_create_the_secret() -> None:
    trouble = await ensure_credentials(context(Kube(None), None), "shop")
    assert trouble is not None and trouble.message.endswith(", ".join(sorted(SECRET_KEYS)))


def test_a_condition_for_an_older_spec_does_not_describe_the_base_model() -> None:
    ready = {
        "type": "Ready", "status": "True", "reason": "Resolved", "message": "12 layers", "observedGeneration": 1,
        "lastTransitionTime": "2026-01-01T00:00:00Z",
    }  # fmt: skip
    model = BaseModel.model_validate(
        {
            "metadata": {"name": "tiny", "generation": 2},
            "spec": {"source": "s3://graft/models/tiny"},
            "status": {"conditions": [ready]},
        }
    )
    found = base_model_of("tiny", "shop", model, None)
    assert found == Trouble("BaseModelNotReady", "the operator has not checked the present spec of BaseModel tiny yet")
