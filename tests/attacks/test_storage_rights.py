"""Keys and users of a real S3 server: what another installation of Graft, or a namespace without the right, gets."""

import asyncio
import base64
import json
import secrets
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from graft.api import FineTuneJob
from graft.artifacts import inheritance
from graft.artifacts.identity import EVERYBODY, AllBut, VersityIdentity, bucket_statements, installation_id
from graft.artifacts.manifest import ADAPTER_FILES, Manifest
from graft.artifacts.publishing import stage
from graft.artifacts.storage import StorageConfig, StoreError
from graft.artifacts.store import S3Store
from graft.artifacts.versions import InvalidArtifact, describe_files, verify
from graft.contracts.mounts import STORAGE_SECRET
from graft.reconcile import basemodel
from graft.reconcile.shared import publishing
from graft.reconcile.shared.access import Trouble, ensure_credentials, record_part, revoke_orphans
from graft.reconcile.shared.context import Context
from graft.reconcile.shared.storerights import allow_models, readers
from testbed.objectstore import S3Server, s3_server
from worlds.buckets import issue
from worlds.reconciling import SETTINGS, MemoryKube, Object


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with s3_server() as server:
        yield server


def bucket(server: S3Server, name: str) -> S3Store:
    """A fresh bucket, opened with the root's key."""
    config = StorageConfig.from_dir(server.secret_dir(name))
    store = S3Store(replace(config, bucket=f"{name}-{secrets.token_hex(4)}"))
    store.create_bucket()
    return store


def opened(key: StorageConfig) -> S3Store:
    return S3Store(key, attempts=1)


def denied(call: Callable[..., Any], *arguments: Any) -> None:
    with pytest.raises(StoreError) as error:
        call(*arguments)
    assert error.value.trouble == "denied", error.value


def legacy(store: S3Store, identity: VersityIdentity, tenant: str) -> StorageConfig:
    """Issue a key as the version before installations had ids did: the user graft-<tenant>."""
    user, secret, name = f"graft-{tenant}", secrets.token_urlsafe(30), store.config.bucket
    if user not in identity.users():
        identity._admin(
            "/create-user", f"<Account><Access>{user}</Access><Secret>{secret}</Secret><Role>user</Role></Account>"
        )
    statements = bucket_statements(name, {tenant: user}, {"models/": EVERYBODY}, "Graft")
    statements = [item for item in statements if item["Effect"] == "Allow"]
    for item in statements:
        item["Sid"] = item["Sid"].replace("Models0", "Models")
    store.client.put_bucket_policy(Bucket=name, Policy=json.dumps({"Version": "2012-10-17", "Statement": statements}))
    return replace(store.config, access_key_id=user, secret_access_key=secret, prefix=f"{tenant}/")


def works(key: StorageConfig, tenant: str) -> bool:
    try:
        opened(key).put(f"{tenant}/data.jsonl", b"{}")
    except StoreError:
        return False
    return True


def test_two_installations_on_one_store_never_touch_each_others_users(server: S3Server) -> None:
    """An installation issues, renews and revokes keys of the namespaces shop and desk -> the other's keys go on working."""
    ours, theirs = bucket(server, "ours"), bucket(server, "theirs")
    one = VersityIdentity(ours, server.endpoint, "cluster-1/graft-system")
    two = VersityIdentity(theirs, server.endpoint, "cluster-2/graft-system")
    same_bucket = VersityIdentity(ours, server.endpoint, "cluster-3/graft-system")
    keys = {tenant: issue(two, tenant) for tenant in ("shop", "desk")}
    first = issue(same_bucket, "shop")
    assert one.tenants() == set()  # so nothing of the others is ever taken for an orphan
    issue(one, "shop")
    renewed = issue(one, "shop")
    issue(one, "other")
    one.revoke("desk")
    one.revoke("shop")
    assert one.tenants() == {"other"}
    assert two.tenants() == {"shop", "desk"} and same_bucket.tenants() == {"shop"}
    assert all(works(key, tenant) for tenant, key in keys.items()) and works(first, "shop")
    assert not works(renewed, "shop")
    denied(opened(keys["shop"]).get, "desk/data.jsonl")


def test_users_that_nobody_recorded_are_never_deleted(server: S3Server) -> None:
    """The store has a user graft-billing of somebody else -> no namespace of that name makes Graft delete it."""
    store = bucket(server, "ours")
    identity = VersityIdentity(store, server.endpoint, "cluster-1/graft-system")
    identity._admin(
        "/create-user", "<Account><Access>graft-billing</Access><Secret>another</Secret><Role>user</Role></Account>"
    )
    assert "billing" not in identity.tenants()
    identity.revoke("billing")
    issue(identity, "billing")
    identity.revoke("billing")
    assert "graft-billing" in identity.users()


def test_a_key_of_an_older_version_goes_on_working_and_is_taken_over(server: S3Server) -> None:
    """No attack: an upgrade. The old key works until it is renewed, and a deleted namespace's old key is revoked."""
    store = bucket(server, "ours")
    identity = VersityIdentity(store, server.endpoint, "cluster-1/graft-system", models=None)
    key = legacy(store, identity, "upgraded")
    store.put("models/tiny/config.json", b"{}")
    assert identity.tenants() == {"upgraded"} and identity.has_key("upgraded")
    drawn = identity.draw("newcomer")
    assert not identity.has_key("newcomer")
    identity.accept("newcomer", drawn.secret_access_key)
    assert identity.has_key("newcomer")
    identity.allow({"models/tiny/": EVERYBODY})
    assert works(key, "upgraded") and opened(key).get("models/tiny/config.json") == b"{}"
    assert "graft-upgraded" in identity.users()
    new = issue(identity, "upgraded")
    assert works(new, "upgraded") and not works(key, "upgraded")
    assert "graft-upgraded" not in identity.users()
    identity.revoke("upgraded")
    assert identity.tenants() == {"newcomer"}


def test_an_old_key_that_two_installations_name_is_deleted_by_neither(server: S3Server) -> None:
    """Two old installations share the user graft-both -> one's revocation does not delete the other's key."""
    ours, theirs = bucket(server, "ours"), bucket(server, "theirs")
    one, two = VersityIdentity(ours, server.endpoint, "1"), VersityIdentity(theirs, server.endpoint, "2")
    key = legacy(theirs, two, "both")
    legacy(ours, one, "both")
    one.revoke("both")
    assert one.tenants() == set() and two.tenants() == {"both"}
    assert works(key, "both")
    denied(opened(replace(key, bucket=ours.config.bucket)).put, "both/data.jsonl", b"{}")


def test_the_operators_own_user_is_never_deleted(server: S3Server) -> None:
    """A statement in the policy names the operator's own user as a namespace's -> it is not deleted."""
    store = bucket(server, "ours")
    identity = VersityIdentity(store, server.endpoint, "1")
    identity._store = S3Store(replace(store.config, access_key_id="root"))
    identity.revoke("root")
    issue(identity, "shop")
    assert identity.tenants() == {"shop"}


# Base models that are restricted to namespaces.


def model(name: str, source: str, allowed: list[str] | None = None) -> Object:
    spec: dict[str, Any] = {"source": source} | ({"allowedNamespaces": allowed} if allowed else {})
    metadata = {"name": name, "uid": name, "generation": 1}
    return {"apiVersion": "graft.dev/v1alpha1", "kind": "BaseModel", "metadata": metadata, "spec": spec}


async def test_a_restricted_model_is_restricted_in_storage(server: S3Server) -> None:
    """A pod of another namespace reads or lists a restricted model with its own key -> the store refuses it."""
    store = bucket(server, "ours")
    name = store.config.bucket
    for folder in ("open", "secret", "secret-too", "forgotten"):
        store.put(f"models/{folder}/config.json", b"{}")
    identity = VersityIdentity(store, server.endpoint, "1", models=None)
    shop, desk = opened(issue(identity, "shop")), opened(issue(identity, "desk"))
    secret = model("secret", f"s3://{name}/models/secret", ["shop"])
    kube = MemoryKube(model("open", f"s3://{name}/models/open/"), secret)
    ctx = Context(kube, SETTINGS, store, identity)  # type: ignore[arg-type]
    await allow_models(ctx)
    assert shop.get("models/secret/config.json") == shop.get("models/open/config.json") == b"{}"
    assert [item.key for item in shop.objects("models/secret/")] == ["models/secret/config.json"]
    assert desk.get("models/open/config.json") == b"{}"
    for refused in ("models/secret/config.json", "models/secret-too/config.json", "models/forgotten/config.json"):
        denied(desk.get, refused)
    for prefix in ("models/secret/", "models/", "models", "models/s", ""):
        denied(lambda prefix=prefix: list(desk.objects(prefix)))
    denied(shop.put, "models/secret/config.json", b"mine")
    late = opened(issue(identity, "late"))
    denied(late.get, "models/secret/config.json")
    assert late.get("models/open/config.json") == b"{}"

    secret["spec"]["allowedNamespaces"] = ["desk"]  # the restriction changes while keys are in use
    await allow_models(ctx)
    denied(shop.get, "models/secret/config.json")
    assert desk.get("models/secret/config.json") == b"{}"
    del kube.objects["BaseModel", None, "secret"]  # a deleted model is not open to all
    await allow_models(ctx)
    for key in (shop, desk, late):
        denied(key.get, "models/secret/config.json")


def team(name: str, namespaces: list[str], models: list[str] | None) -> Object:
    spec: dict[str, Any] = {"namespaces": {"names": namespaces}} | ({"baseModels": models} if models else {})
    metadata = {"name": name, "uid": name, "creationTimestamp": "2026-01-01T00:00:00Z"}
    return {"apiVersion": "graft.dev/v1alpha1", "kind": "Tenant", "metadata": metadata, "spec": spec}


async def test_a_model_that_a_tenant_may_not_use_is_closed_in_storage(server: S3Server) -> None:
    """A pod reads a base model that its Tenant may not use, with the key of its namespace -> the store refuses it."""
    store = bucket(server, "ours")
    name = store.config.bucket
    for folder in ("open", "dear"):
        store.put(f"models/{folder}/config.json", b"{}")
    identity = VersityIdentity(store, server.endpoint, "1", models=None)
    shop, desk = opened(issue(identity, "shop")), opened(issue(identity, "desk"))
    limited = team("a", ["shop", "later"], ["open"])
    spaces = [space(item, item) for item in ("shop", "desk")]
    models = [model(folder, f"s3://{name}/models/{folder}/") for folder in ("open", "dear")]
    kube = MemoryKube(*models, limited, team("b", ["desk"], None), *spaces)
    settings = SETTINGS.model_copy(update={"tenants_enabled": True})
    ctx = Context(kube, settings, store, identity)  # type: ignore[arg-type]
    await allow_models(ctx)
    assert shop.get("models/open/config.json") == desk.get("models/dear/config.json") == b"{}"
    denied(shop.get, "models/dear/config.json")
    denied(lambda: list(shop.objects("models/dear/")))
    late = opened(issue(identity, "late"))  # a namespace without a Tenant
    assert late.get("models/dear/config.json") == b"{}"

    # A namespace that joins the Tenant gets its key after its rights.
    kube.objects["Namespace", None, "later"] = space("later", "later")
    assert await ensure_credentials(ctx, "later") is None
    joined = opened_in(ctx, kube, "later")
    assert joined.get("models/open/config.json") == b"{}"
    denied(joined.get, "models/dear/config.json")

    limited["spec"]["baseModels"] = ["open", "dear"]
    await allow_models(ctx)
    assert shop.get("models/dear/config.json") == b"{}"
    limited["spec"]["baseModels"] = ["elsewhere"]
    await allow_models(ctx)
    denied(shop.get, "models/open/config.json")


def opened_in(ctx: Context, kube: MemoryKube, namespace: str) -> S3Store:
    """Open the store with the key in the Secret of a namespace."""
    entries = {
        name: base64.b64decode(text).decode()
        for name, text in kube.objects["Secret", namespace, STORAGE_SECRET]["data"].items()
    }
    own = replace(ctx.store.config, prefix=entries["prefix"], access_key_id=entries["access-key-id"])
    return S3Store(replace(own, secret_access_key=entries["secret-access-key"]), attempts=1)


async def test_a_namespace_that_is_made_anew_gets_no_key_to_the_files_of_the_old_one(server: S3Server) -> None:
    """A team leaves, and another one makes a namespace with the same name -> no key, until the Tenant says so."""
    store = bucket(server, "ours")
    identity = VersityIdentity(store, server.endpoint, "1", models={})
    tenant = team("a", ["shop", "fresh"], None)
    kube = MemoryKube(tenant, *(space(name, f"first-{name}") for name in ("shop", "fresh", "alone")))
    ctx = Context(kube, SETTINGS.model_copy(update={"tenants_enabled": True}), store, identity)  # type: ignore[arg-type]

    async def anew(name: str, uid: str, *, noticed: bool = True) -> Trouble | None:
        """Make a namespace anew, with or without the operator's notice of the deletion. Ask for its key."""
        kube.objects.pop(("Secret", name, STORAGE_SECRET), None)
        kube.objects.pop(("Namespace", None, name))
        if noticed:
            await revoke_orphans(ctx)
        kube.objects["Namespace", None, name] = space(name, uid)
        return await ensure_credentials(ctx, name)

    assert await ensure_credentials(ctx, "shop") is None
    old = opened_in(ctx, kube, "shop")
    old.put("shop/datasets/secret.jsonl", b"{}")
    denied(old.put, "shop/adapters/.namespace.json", b'{"namespaceUid": "second"}')
    assert await ensure_credentials(ctx, "shop") is None

    for uid, noticed in (("second", True), ("third", False)):
        refused = await anew("shop", uid, noticed=noticed)
        assert await record_part(ctx, "a", "shop", uid, inherit=False) == refused  # the Tenant says so, too
        assert await record_part(ctx, "a", "shop", uid, inherit=True) is None
        assert refused is not None and refused.reason == "PrefixTaken"
        assert "spec.namespaces.inherit of Tenant a" in refused.message and "secret" not in refused.message
        assert ("Secret", "shop", STORAGE_SECRET) not in kube.objects
        denied(old.get, "shop/datasets/secret.jsonl")  # the old key does not work either

    tenant["spec"]["namespaces"]["inherit"] = ["shop"]
    assert await ensure_credentials(ctx, "shop") is None
    assert opened_in(ctx, kube, "shop").get("shop/datasets/secret.jsonl") == b"{}"
    del tenant["spec"]["namespaces"]["inherit"]
    assert await ensure_credentials(ctx, "shop") is None  # it is recorded by now
    refused = await anew("shop", "fourth")
    assert refused is not None and refused.reason == "PrefixTaken"

    # Without files there is nothing to inherit. A namespace without a Tenant works as before.
    assert await ensure_credentials(ctx, "alone") is None
    opened_in(ctx, kube, "alone").put("alone/datasets/a.jsonl", b"{}")
    assert await anew("alone", "second") is None
    assert await ensure_credentials(ctx, "fresh") is None
    assert [item.key for item in store.objects("fresh/")] == ["fresh/adapters/.namespace.json"]
    assert await anew("fresh", "second") is None


async def test_a_namespace_that_joins_a_tenant_keeps_its_files(server: S3Server) -> None:
    """No attack: it has a working key. Afterwards its Secret is deleted, to get a new key."""
    store = bucket(server, "ours")
    identity = VersityIdentity(store, server.endpoint, "1", models={})
    kube = MemoryKube(space("shop", "first"))
    ctx = Context(kube, SETTINGS.model_copy(update={"tenants_enabled": True}), store, identity)  # type: ignore[arg-type]
    assert await ensure_credentials(ctx, "shop") is None
    opened_in(ctx, kube, "shop").put("shop/datasets/a.jsonl", b"{}")
    kube.objects["Tenant", None, "a"] = team("a", ["shop"], None)
    assert await record_part(ctx, "a", "shop", "first", inherit=False) is None
    del kube.objects["Secret", "shop", STORAGE_SECRET]
    assert await ensure_credentials(ctx, "shop") is None
    assert opened_in(ctx, kube, "shop").get("shop/datasets/a.jsonl") == b"{}"


@pytest.mark.parametrize("record", [b"", b"[]", b"{}", b"[" * 5000, b'{"namespaceUid": 7}', b"x" * 5000])
def test_a_record_that_cannot_be_read_is_anothers(server: S3Server, record: bytes) -> None:
    """The record of a namespace is damaged -> its files are not given away."""
    store = bucket(server, "ours")
    store.put("shop/adapters/.namespace.json", record)
    store.put("shop/datasets/a.jsonl", b"{}")
    assert not inheritance.take(store, "shop", "first", inherit=False)
    assert inheritance.take(store, "shop", "first", inherit=True)
    assert inheritance.take(store, "shop", "first", inherit=False)


def space(name: str, uid: str) -> Object:
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "uid": uid}}


def test_the_readers_of_a_folder_are_joined_over_models_and_tenants() -> None:
    """No attack: some Tenants may use one of two BaseModels of a folder."""
    first, second = model("1", "s3://graft/models/a"), model("2", "s3://graft/models/a", ["x", "shop"])
    third = model("3", "s3://graft/models/a")

    def found(*models: Object, **forbidden: list[str]) -> Any:
        return readers(models, "graft", lambda name: forbidden.get(f"of_{name}", []))["models/a/"]

    assert found(first, of_1=["shop", "desk"]) == AllBut(frozenset({"shop", "desk"}))
    assert found(second, of_2=["shop"]) == ["x"]
    assert found(first, second, of_1=["shop", "desk"]) == AllBut(frozenset({"desk"}))
    assert found(second, first, of_1=["shop", "desk"], of_2=["shop"]) == AllBut(frozenset({"shop", "desk"}))
    assert found(first, third, of_1=["shop", "desk"], of_3=["desk", "x"]) == AllBut(frozenset({"desk"}))
    assert found(first, third, of_1=["shop"], of_3=["desk"]) == EVERYBODY


def test_a_base_model_opens_no_tenants_part() -> None:
    """A BaseModel names a tenant's files, a wildcard or a parent folder -> no key gets a right on them."""
    sources = [
        "s3://graft/shop/adapters/a/1.0.0/", "s3://graft/models/*", "s3://graft/models/../shop/", "s3://graft/models",
        "s3://graft/models//", "s3://graft/models/${aws:username}/", "s3://other/models/a", "hf://org/name", "pvc://claim/a",
        "s3://graft/mod?ls/x", "s3://graft/modelsx/a",
    ]  # fmt: skip
    found = readers([model(str(number), source) for number, source in enumerate(sources)], "graft")
    assert found == {}


def test_the_readers_of_a_folder_are_those_of_all_its_models() -> None:
    """No attack: several BaseModels of the same folder."""
    secret, shared = "s3://graft/models/a", "s3://graft/models/b/"
    models = [
        model("1", secret, ["shop"]),
        model("2", f"{secret}/", ["desk"]),
        model("3", shared, ["x"]),
        model("4", shared),
    ]
    assert readers(models, "graft") == {"models/a/": ["desk", "shop"], "models/b/": EVERYBODY}


async def test_a_base_model_in_a_namespaces_part_is_read_for_that_namespace_only() -> None:
    """A BaseModel for all names a namespace's files -> its digest, size and facts are not told, and the store is not asked."""
    stolen = "s3://graft/shop/adapters/a/1.0.0"
    for source, allowed in (
        (stolen, None),
        (stolen, ["desk"]),
        (stolen, ["shop", "desk"]),
        ("s3://graft/models/../shop", None),
    ):
        raw = model("stolen", source, allowed)
        kube = MemoryKube(raw, {"kind": "Namespace", "metadata": {"name": "shop"}})
        ctx = Context(kube, SETTINGS, Untouchable(), None)  # type: ignore[arg-type]
        await basemodel.reconcile(ctx, "", "stolen")
        (ready,) = (item for item in raw["status"]["conditions"] if item["type"] == "Ready")
        assert ready["reason"] == "SourceInvalid", ready
        assert set(raw["status"]) <= {"conditions", "stage", "observedGeneration"}


class Untouchable:
    """A store that nobody may ask."""

    config = StorageConfig("http://s3", "r", "graft", "", "root", "secret")

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"the store was asked: {name}")


def test_the_policy_grows_slowly_and_models_with_the_same_readers_share_statements() -> None:
    """A platform has 22 namespaces and 30 models -> its policy stays below the 20 KiB that S3 allows."""
    users = {f"team-{number:02d}": f"graft-{installation_id('graft', 'x')}-team-{number:02d}" for number in range(22)}
    models: dict[str, Any] = {f"models/m{number:02d}/": EVERYBODY for number in range(20)}
    models |= {f"models/r{number:02d}/": ["team-01", "team-02"] for number in range(10)}
    statements = bucket_statements("graft", users, models, "Graft" + installation_id("graft", "x"))
    assert len(statements) == 3 * 22 + 1 + 4
    assert len(json.dumps({"Version": "2012-10-17", "Statement": statements}, separators=(",", ":"))) < 20 * 1024


# Published versions: a training pod stages, the operator publishes.

PREFIX = "shop/adapters/support/1.0.0/"
RUN = "shop/runs/uid-1/"


def version(folder: Path, attempt: str = "pod-1", **fields: Any) -> tuple[dict[str, Path], Manifest]:
    files = {name: folder / name for name in ("adapter_config.json", "adapter_model.safetensors")}
    for name, path in files.items():
        path.write_text(f"{name} of {attempt}")
    job = {"name": "first", "namespace": "shop", "uid": "uid-1", "attempt": attempt}
    given: dict[str, Any] = {
        "adapter": "support", "version": "1.0.0", "method": "lora", "base_model": {"name": "tiny", "uri": "s3://b/m"},
        "job": job, "recipe": "r", "hyperparameters": {}, "files": describe_files(files), "created_at": "2026-01-01T00:00:00Z",
    }  # fmt: skip
    return files, Manifest.model_validate(given | fields)


def job_of(namespace: str = "shop", uid: str = "uid-1") -> FineTuneJob:
    spec = {
        "baseModel": "tiny", "dataset": {"train": {"uri": "s3://graft/shop/t.jsonl"}}, "method": {"lora": {}},
        "output": {"adapter": "support"},
    }  # fmt: skip
    metadata = {"name": "first", "namespace": namespace, "uid": uid}
    return FineTuneJob.model_validate({"metadata": metadata, "spec": spec})


async def until_published(ctx: Context, job: FineTuneJob) -> Any:
    """Reconcile until the operator has published what the job staged. Return what is published then."""
    woken = asyncio.Event()
    ctx.wake = lambda *_: woken.set()
    while (found := await publishing.published(ctx, job, "support", "1.0.0")) == "copying":
        await asyncio.wait_for(woken.wait(), 30)
        woken.clear()
    return found


async def test_a_pods_key_cannot_touch_a_published_version(server: S3Server, tmp_path: Path) -> None:
    """A pod overwrites, deletes or replaces files of a published version, in one request or in parts -> the store refuses.

    It can stage its own version, and it can upload datasets.
    """
    store = bucket(server, "ours")
    identity = VersityIdentity(store, server.endpoint, "1", models={})
    pod, rival = opened(issue(identity, "shop")), opened(issue(identity, "rival"))
    stage(pod, PREFIX, *version(tmp_path))
    ctx = Context(MemoryKube(), SETTINGS, store, None)  # type: ignore[arg-type]
    manifest, _ = await until_published(ctx, job_of())
    assert manifest.job.attempt == "pod-1"
    before = {item.key: store.get(item.key) for item in store.objects(PREFIX)}
    assert len(before) == 3 and not list(store.objects(f"{RUN}pod-1/version/"))

    keys = [*before, f"{PREFIX}manifest.sig.json", "shop/adapters/support/2.0.0/manifest.json", "shop/adapters/x"]
    pod.put(f"{RUN}mine", b"mine")
    for key in keys:
        denied(pod.put, key, b"mine")
        denied(lambda key=key: pod.put(key, b"mine", if_absent=True))
        denied(pod.copy, f"{RUN}mine", key, len(b"mine"))
        denied(pod.check_write, key)
        denied(lambda key=key: pod.upload_stream(key, [b"mine"]))
        denied(pod.delete, key)
        denied(rival.put, key, b"mine")
    batch = [{"Key": key} for key in before]
    answer = pod.client.delete_objects(Bucket=store.config.bucket, Delete={"Objects": batch})
    assert len(answer["Errors"]) == 3 and not answer.get("Deleted")
    assert {item.key: store.get(item.key) for item in store.objects(PREFIX)} == before
    pod.put("shop/data/train.jsonl", b"{}")
    assert pod.get(f"{PREFIX}manifest.json") == before[f"{PREFIX}manifest.json"]

    stage(pod, PREFIX, *version(tmp_path, "pod-2"))  # a late attempt
    assert {item.key: store.get(item.key) for item in store.objects(PREFIX)} == before


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"job": {"name": "first", "namespace": "shop", "uid": "uid-1", "attempt": "../../../rival/runs/u/p"}}, "ManifestMismatch"),
        ({"job": {"name": "first", "namespace": "shop", "uid": "uid-1", "attempt": "a/../../x"}}, "ManifestMismatch"),
        ({"job": {"name": "first", "namespace": "shop", "uid": "uid-2", "attempt": "pod-1"}}, "ManifestMismatch"),
        ({"adapter": "sales"}, "ManifestMismatch"),
        ({"version": "9.9.9"}, "ManifestMismatch"),
        ({"files": [{"name": "../../../rival/secret", "size": 1, "sha256": "0" * 64}]}, "ManifestInvalid"),
        ({"files": [{"name": name, "size": 1, "sha256": "0" * 64} for name in ADAPTER_FILES]}, "DigestMismatch"),
    ],
)  # fmt: skip
async def test_a_forged_claim_makes_the_operator_copy_nothing(
    server: S3Server, tmp_path: Path, fields: dict[str, Any], reason: str
) -> None:
    """A pod claims files of another run, tenant, adapter or size -> the operator, which may read all, copies none."""
    store = bucket(server, "ours")
    files, manifest = version(tmp_path)
    for name, path in files.items():
        store.upload(f"{RUN}pod-1/version/{name}", path)
    claim = json.loads(manifest.to_bytes()) | json.loads(json.dumps(fields))
    store.put(f"{RUN}version.json", json.dumps(claim).encode())
    ctx = Context(MemoryKube(), SETTINGS, store, None)  # type: ignore[arg-type]
    with pytest.raises(InvalidArtifact) as error:
        await until_published(ctx, job_of())
    assert error.value.reason == reason
    assert not list(store.objects("shop/adapters/"))


async def test_what_is_staged_is_checked_where_the_pod_cannot_change_it(server: S3Server, tmp_path: Path) -> None:
    """A pod replaces a staged file by another one of the same size -> the version is copied and then fails verification."""
    store = bucket(server, "ours")
    pod = opened(issue(VersityIdentity(store, server.endpoint, "1", models={}), "shop"))
    files, manifest = version(tmp_path)
    stage(pod, PREFIX, files, manifest)
    size = files["adapter_model.safetensors"].stat().st_size
    pod.put(f"{RUN}pod-1/version/adapter_model.safetensors", b"?" * size)
    _, digest = await until_published(Context(MemoryKube(), SETTINGS, store, None), job_of())  # type: ignore[arg-type]
    with pytest.raises(InvalidArtifact, match=r"adapter_model\.safetensors"):
        verify(store, PREFIX, digest)
