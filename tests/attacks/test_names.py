"""Names that are more than names: in paths, selectors, labels and specs, and the namespaces that no tenant may have."""

import asyncio
import importlib
import json
import pkgutil
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote

import graft
import pytest
from aiohttp import web
from graft import connection, crdgen
from graft.__main__ import JsonFormatter
from graft.api import FineTuneJob
from graft.api.adapterdeployment import EngineLimits
from graft.api.meta import Resources
from graft.artifacts.layout import in_tenants_part
from graft.cache.cache import Source, essential
from graft.kinds import KINDS, ImpossibleName, selector
from graft.kube import Kube, KubeError, owned_by
from graft.manifests.metadata import FINALIZER, OWNER_UID
from graft.reconcile.shared.access import ensure_credentials, revoke_orphans
from graft.reconcile.shared.admission import admit
from graft.reconcile.shared.context import WAITING, Context
from graft.reconcile.shared.ownership import owner_of
from graft.reconcile.shared.queue import Queue
from graft.reconcile.shared.stored import valid
from graft.settings import Images, Settings
from graft.wakes import belongs, sources
from kubernetes.aio import client
from pydantic import BaseModel, ValidationError

ESCAPES = [
    "../../../../api/v1/namespaces/x/secrets/y",
    "..",
    ".",
    "",
    "a/b",
    "/api/v1/secrets",
    "%2e%2e",
    "..%2f..%2fsecrets",
    "a%2Fstatus",
    "a\\..\\b",
    "a\nb",
    "a\x00b",
    "x" * 254,
]
ODD = ["x?watch=1", "x#y", "a b", "a;b", "a&b=c", "x?watch=1&timeoutSeconds=300", "ä", "a:b", "a+b"]


@asynccontextmanager
async def api_server(answer: Any) -> AsyncIterator[tuple[Kube, list[str]]]:
    """A server that gives `answer(request)` to everything; the client, and the raw paths that reached the server."""
    seen: list[str] = []

    async def handle(request: web.Request) -> web.StreamResponse:
        seen.append(request.raw_path)
        found = answer(request)
        return found if isinstance(found, web.StreamResponse) else web.json_response(found)

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handle)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = runner.addresses[0][1]
    kube = Kube(client.ApiClient(client.Configuration(host=f"http://127.0.0.1:{port}")))
    try:
        yield kube, seen
    finally:
        await kube.close()
        await runner.cleanup()


@pytest.mark.parametrize("name", ESCAPES)
async def test_a_name_with_a_path_in_it(name: str) -> None:
    """spec.baseModel is a path to a Secret of others -> no request is sent, the BaseModel does not exist."""
    async with api_server(lambda _: pytest.fail("a request was sent")) as (kube, seen):
        assert await kube.get("BaseModel", None, name) is None
        assert await kube.get("Secret", "shop", name) is None
        assert await kube.get("Secret", name, "graft-storage") is None
        with pytest.raises(ImpossibleName):
            await kube.delete("Job", "shop", name)
        with pytest.raises(ImpossibleName):
            await kube.list("Pod", name)
        with pytest.raises(ImpossibleName):
            await kube.merge_patch("ConfigMap", name, "x", {})
        with pytest.raises(ImpossibleName):
            await kube.events_of(name, "u")
    assert seen == []
    for place in ((name, "x", None), ("shop", name, None), ("shop", "x", name)):
        with pytest.raises(ImpossibleName):
            KINDS["Job"].path(*place)


@pytest.mark.parametrize("name", ODD)
async def test_a_name_with_a_query_in_it(name: str) -> None:
    """A name is x?watch=1, to hold a worker for minutes -> the server gets it as one quoted part of the path."""
    async with api_server(lambda _: web.json_response({}, status=404)) as (kube, seen):
        assert await kube.get("BaseModel", None, name) is None
    (path,) = seen
    last = path.removeprefix("/apis/graft.dev/v1alpha1/basemodels/")
    assert last != path and not set(last) & set("/?# ") and unquote(last) == name


def test_an_object_needs_its_namespace() -> None:
    """A namespaced object is named without its namespace, to address a collection of all -> refused."""
    with pytest.raises(ImpossibleName):
        KINDS["Secret"].path(None, "graft-storage")
    assert KINDS["Secret"].path() == "/api/v1/secrets"
    assert KINDS["Pod"].path("shop", "a.b", "log") == "/api/v1/namespaces/shop/pods/a.b/log"


@pytest.mark.parametrize("value", ["a,graft.dev/owner-uid=b", "a b", "a=b", "!a", "a in (b)", "-a", "x" * 64, "a\n"])
def test_a_label_value_with_a_condition_in_it(value: str) -> None:
    """An adapter's name adds a condition to the operator's label selector -> refused."""
    with pytest.raises(ImpossibleName):
        selector({"graft.dev/adapter": value})
    assert (
        selector({"graft.dev/adapter": "a", "graft.dev/owner-uid": None}) == "graft.dev/adapter=a,graft.dev/owner-uid"
    )


SECRET = {
    "apiVersion": "v1",
    "kind": "Secret",
    "metadata": {"name": "tiny", "namespace": "bank"},
    "data": {"password": "aHVudGVyMg=="},
}
MODEL = {"apiVersion": "graft.dev/v1alpha1", "kind": "BaseModel", "metadata": {"name": "tiny"}, "spec": {}}


@pytest.mark.parametrize(
    "answer",
    [
        SECRET,
        MODEL | {"kind": "Secret"},
        MODEL | {"apiVersion": "v1"},
        MODEL | {"metadata": {"name": "other"}},
        MODEL | {"metadata": {}},
        MODEL | {"metadata": "tiny"},
        {"kind": "SecretList", "apiVersion": "v1", "items": [SECRET]},
        {},
    ],
)
async def test_another_object_than_the_one_that_was_asked_for(answer: Any) -> None:
    """What comes back is somebody's Secret -> nobody uses it, and the error quotes nothing of it."""
    async with api_server(lambda _: answer) as (kube, _):
        with pytest.raises(KubeError) as error:
            await kube.get("BaseModel", None, "tiny")
    assert error.value.reason == "WrongAnswer" and "hunter" not in str(error.value) and "aHVu" not in str(error.value)


async def test_an_object_of_another_namespace() -> None:
    """get and list answer with an object of another namespace -> refused."""
    async with api_server(lambda _: SECRET) as (kube, _):
        assert await kube.get("Secret", "bank", "tiny") == SECRET
        with pytest.raises(KubeError, match="another Secret"):
            await kube.get("Secret", "shop", "tiny")
    pods = {
        "apiVersion": "v1",
        "kind": "PodList",
        "metadata": {},
        "items": [{"metadata": {"name": "a", "namespace": "b"}}],
    }
    async with api_server(lambda _: pods) as (kube, _):
        assert len(await kube.list("Pod", "b")) == 1
        with pytest.raises(KubeError, match="another Pod"):
            await kube.list("Pod", "shop")
        with pytest.raises(KubeError, match="answered with a PodList"):
            await kube.list("Job", "b")


def configmap(name: str, size: int = 0, owner: str | None = None) -> dict[str, Any]:
    references = [{"uid": owner, "kind": "FineTuneJob", "name": "tune", "controller": True}] if owner else []
    metadata = {"name": name, "namespace": "shop", "ownerReferences": references, "managedFields": ["x" * 10_000]}
    return {"metadata": metadata, "data": {"a": "x" * size}}


def paginated(objects: list[dict[str, Any]], seen: list[tuple[int, str]]) -> Any:
    """A server that has these ConfigMaps and honours limit and continue."""

    def answer(request: web.Request) -> dict[str, Any]:
        limit, begin = int(request.query["limit"]), int(request.query.get("continue", 0))
        seen.append((limit, request.headers["Accept"]))
        rest = str(begin + limit) if begin + limit < len(objects) else ""
        metadata = {"resourceVersion": "7", "continue": rest}
        items = objects[begin : begin + limit]
        return {"apiVersion": "v1", "kind": "ConfigMapList", "metadata": metadata, "items": items}

    return answer


async def test_a_list_of_large_objects(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody fills a namespace with objects of a megabyte -> smaller pages, and only what is ours is held."""
    monkeypatch.setattr(connection, "LARGEST_ANSWER", 2**20)
    objects = [configmap(f"c{i}", 200_000, "ours" if i % 10 == 0 else "theirs") for i in range(40)]
    asked: list[tuple[int, str]] = []
    async with api_server(paginated(objects, asked)) as (kube, _):
        found = await kube.list("ConfigMap", "shop", owner="ours")
    assert [item["metadata"]["name"] for item in found] == ["c0", "c10", "c20", "c30"]
    assert all("managedFields" not in item["metadata"] for item in found)
    assert max(limit for limit, _ in asked[3:]) < 5


async def test_a_list_that_is_too_large_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """A namespace has more objects than the operator can hold -> refused with the namespace's name."""
    monkeypatch.setattr("graft.kube.LARGEST_LIST", 2**20)
    objects = [configmap(f"c{i}", 20_000) for i in range(300)]
    async with api_server(paginated(objects, [])) as (kube, _):
        with pytest.raises(KubeError, match="configmaps of namespace shop have more than 1 MiB"):
            await kube.list("ConfigMap", "shop")


async def test_one_answer_without_an_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """An object is larger than any answer may be -> the read stops at the bound."""
    monkeypatch.setattr(connection, "LARGEST_ANSWER", 2**20)
    async with api_server(paginated([configmap("c", 2**21)], [])) as (kube, seen):
        with pytest.raises(KubeError) as error:
            await kube.list("ConfigMap", "shop")
    assert error.value.reason == connection.TOO_LARGE and len(seen) < 8


async def test_a_watch_reads_metadata_page_by_page() -> None:
    """Labelled ConfigMaps of anybody fill the memory of the watch -> it asks for metadata, 200 objects at a time."""
    asked: list[tuple[int, str]] = []
    source = next(item for item in sources("graft-system") if item.key == "ConfigMap")
    async with api_server(paginated([configmap(f"c{i}") for i in range(450)], asked)) as (kube, seen):
        pages = [item async for item in kube.pages("ConfigMap", labels=source.labels, metadata_only=not source.listed)]
    found = [item for page in pages for item in page.items]
    assert len(found) == 450 and all("managedFields" not in item["metadata"] for item in found)
    assert [limit for limit, _ in asked] == [200, 200, 200]
    assert all("as=PartialObjectMetadataList" in accept for _, accept in asked)
    assert all("labelSelector=graft.dev/owner-uid" in path for path in seen)


def test_every_selection_by_a_label_lists_metadata_only() -> None:
    """Any user can label objects of any size -> no list holds their contents, and only runs' events have them."""
    labelled = [item for item in sources("graft-system") if item.labels]
    assert len(labelled) > 10 and not any(item.listed for item in labelled)
    assert {item.kind for item in labelled if item.watched} == {"Job", "Pod"}


def test_metadata_of_a_megabyte() -> None:
    """Somebody makes a labelled object with a megabyte of metadata -> less than a kilobyte of it is held, or nothing."""
    big = configmap("c", owner="ours")
    big["metadata"] |= {"uid": "u", "resourceVersion": "5", "annotations": {"a": "x" * 900_000}}
    big["metadata"]["labels"] = {"graft.dev/owner-uid": "ours", "x" * 60: "y"}
    big["metadata"]["ownerReferences"] += [{"uid": "<" * 900_000, "kind": "ConfigMap", "name": "x"}]
    assert len(json.dumps(essential(big))) < 1000
    source = Source("ConfigMap", labels={"graft.dev/owner-uid": None})
    assert not belongs(source, big, "graft-system")  # it does not say which resource owns it


async def test_an_event_that_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """One object's event is larger than the bound -> it is left out, and the watch of the others goes on."""
    monkeypatch.setattr(connection, "LARGEST_EVENT", 100_000)

    class Content:
        async def iter_any(self) -> AsyncIterator[bytes]:
            big = json.dumps({"type": "ADDED", "object": "x" * 300_000}).encode() + b"\n"
            data = b'{"n": 1}\n' + big + b'{"n": 2}\n{"n"' + b": 3}\n\n"
            for begin in range(0, len(data), 65_536):
                yield data[begin : begin + 65_536]

    assert [json.loads(line)["n"] async for line in connection.lines(Content(), connection.LARGEST_EVENT)] == [1, 2, 3]


def test_a_label_without_an_owner_reference() -> None:
    """An object has our owner label but another owner -> it is not ours."""
    assert owned_by(configmap("c", owner="ours"), "ours")
    assert not owned_by(configmap("c", owner="theirs"), "ours") and not owned_by(configmap("c"), "ours")
    assert not owned_by({"metadata": {"labels": {"graft.dev/owner-uid": "ours"}}}, "ours")
    assert not owned_by({"metadata": {"ownerReferences": [{"uid": "ours", "kind": "FineTuneJob"}]}}, "ours"), (
        "no controller"
    )


def text_fields(node: dict[str, Any], path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield every string of a generated schema with its path."""
    if node.get("type") == "string" and "enum" not in node:
        yield path, node
    for name, child in node.get("properties", {}).items():
        yield from text_fields(child, f"{path}.{name}")
    if "items" in node:
        yield from text_fields(node["items"], f"{path}[]")
    if "additionalProperties" in node:
        yield from text_fields(node["additionalProperties"], f"{path}{{}}")


def schema_of(module: Any) -> dict[str, Any]:
    crd = crdgen.custom_resource_definition(module)
    return dict(crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"])


# Texts that name nothing: they are shown to people, or are words of the training data.
FREE = {
    "ApiKey.spec.description",  # for people only
    "BaseModel.spec.facts.dtype",
    "BaseModel.spec.facts.license",
    "FineTuneJob.spec.dataset.templates[]",
    "FineTuneJob.spec.method.promptTuning.initText",
    "AdapterDeployment.spec.chatTemplate",  # its pattern keeps names of files out
    # Their keys have patterns and lists. tests/attacks/test_pod_templates.py has what a value may not do.
    *(
        f"{kind}.spec.podTemplate.{path}"
        for kind in ("FineTuneJob", "AdapterDeployment")
        for path in ("annotations{}", "env[].value")
    ),
}
# What the operator reads from a status and uses as a name.
NAMED = [
    "FineTuneJob.status.resolved.version",
    "FineTuneJob.status.adapterRef.name",
    "Adapter.status.artifact.uri",
    "Adapter.status.artifact.digest",
    "Adapter.status.parents[].name",
    "Adapter.status.parents[].version",
    "Adapter.status.parents[].uri",
    "Adapter.status.parents[].digest",
    "Adapter.status.compatibility[].name",
]


def has_pattern(node: dict[str, Any]) -> bool:
    """Return whether the schema of a text has a pattern, or a rule with one, which can say what the form is."""
    rules = [rule["rule"] for rule in node.get("x-kubernetes-validations", ())]
    return "pattern" in node or any(rule.startswith("self.matches(r'^") and rule.endswith("$')") for rule in rules)


def test_every_field_that_names_something_has_a_pattern() -> None:
    """A field that names an object, version, key, label, queue or claim holds anything -> the API server refuses it."""
    found = {
        f"{module.CRD['kind']}.{path}": node
        for module in crdgen.KINDS
        for part in ("spec", "status")
        for path, node in text_fields(schema_of(module)[part], part)
    }
    specs = {path for path in found if ".spec." in path}
    assert len(specs) > 50 and specs >= FREE
    assert [path for path in specs if "maxLength" not in found[path]] == []
    assert [path for path in specs - FREE if not has_pattern(found[path])] == []
    assert [path for path in NAMED if not {"pattern", "maxLength"} <= set(found[path])] == []


def test_every_map_of_a_spec_is_bounded() -> None:
    """A map of a spec has a million entries -> the API server refuses it."""

    def maps(node: dict[str, Any], path: str) -> Iterator[tuple[str, dict[str, Any]]]:
        if "additionalProperties" in node:
            yield path, node
        for name, child in node.get("properties", {}).items():
            yield from maps(child, f"{path}.{name}")
        if "items" in node:
            yield from maps(node["items"], f"{path}[]")

    found = [item for module in crdgen.KINDS for item in maps(schema_of(module)["spec"], module.CRD["kind"])]
    assert found and [path for path, node in found if "maxProperties" not in node] == []


def test_every_list_of_a_spec_is_bounded() -> None:
    """A list of a spec has a million entries -> the API server refuses it. A set of fixed words cannot grow."""

    def lists(node: dict[str, Any], path: str) -> Iterator[tuple[str, dict[str, Any]]]:
        for name, child in node.get("properties", {}).items():
            yield from lists(child, f"{path}.{name}")
        if "items" in node:
            yield path, node
            yield from lists(node["items"], f"{path}[]")

    def bounded(node: dict[str, Any]) -> bool:
        return "maxItems" in node or (node.get("x-kubernetes-list-type") == "set" and "enum" in node["items"])

    found = [item for module in crdgen.KINDS for item in lists(schema_of(module)["spec"], module.CRD["kind"])]
    assert found and [path for path, node in found if not bounded(node)] == []


JOB: dict[str, Any] = {
    "metadata": {"name": "tune", "namespace": "shop"},
    "spec": {
        "baseModel": "tiny",
        "dataset": {"train": {"uri": "pvc://data/train.jsonl"}},
        "method": {"lora": {}},
        "output": {"adapter": "support"},
    },
}
ATTACKS: list[dict[str, Any]] = [
    {"baseModel": "../../../../api/v1/namespaces/x/secrets/y"},
    {"baseModel": "x?watch=1"},
    {"baseModel": "a/b"},
    {"baseModel": "%2e%2e"},
    {"baseModel": ".."},
    {"baseModel": "Tiny"},
    {"baseModel": ""},
    {"baseModel": "tiny\n"},
    {"queue": "a/b"},
    {"output": {"adapter": "../other"}},
    {"output": {"adapter": "a", "version": "../1.0.0"}},
    {"priorityClassName": "a/b"},
    {"runtimeClassName": "a b"},
    {"nodeSelector": {"a": "b,c=d"}},
    {"nodeSelector": {"../a": "b"}},
    {"nodeSelector": {f"k{i}": "v" for i in range(100)}},
    {"tolerations": [{"key": "a b"}]},
    {"tolerations": [{"key": "a", "value": "b/c"}]},
    {"dataset": {"train": {"uri": "pvc://data/../../etc/passwd"}}},
    {"dataset": {"train": {"uri": "pvc://a..b/train.jsonl"}}},
    {"dataset": {"train": {"uri": "hf://datasets/../x/train.jsonl"}}},
    {"dataset": {"train": {"uri": "hf://datasets/a/b@../../c/train.jsonl"}}},
    {"dataset": {"train": {"uri": "hf://datasets/a/b/../../c.jsonl"}}},
    {"dataset": {"train": {"uri": "configMap://a..b/x"}}},
    {"dataset": {"train": {"uri": "pvc://data/train.jsonl"}, "columns": {"text": "a\nb"}}},
    {"evaluation": {"gates": [{"metric": "a\nb", "min": 0}]}},
]


@pytest.mark.parametrize("spec", ATTACKS)
def test_a_spec_with_a_name_that_is_no_name(spec: dict[str, Any]) -> None:
    """A job's spec has a path, a query or a line break where a name belongs -> refused, and the value is not quoted."""
    FineTuneJob.model_validate(JOB)
    with pytest.raises(ValidationError) as error:
        FineTuneJob.model_validate(JOB | {"spec": JOB["spec"] | spec})
    assert "input_value" not in str(error.value) and "passwd" not in str(error.value)


@pytest.mark.parametrize(
    "uri",
    [
        "pvc://data/train.jsonl",
        "pvc://data.v2/a/..b/.c/...d/train.jsonl",
        "hf://datasets/org/name/data/a.jsonl",
        "hf://datasets/Org-1/na_me.v2@refs/pr/1/data/a.jsonl",
        "hf://datasets/org/name@v1.0-beta/a.jsonl",
        "s3://graft/shop/a b.jsonl".replace(" ", "+"),
        "configMap://questions/eval.jsonl",
    ],
)
def test_places_that_are_fine_stay_fine(uri: str) -> None:
    """The patterns are not tighter than users' data needs."""
    FineTuneJob.model_validate(JOB | {"spec": JOB["spec"] | {"dataset": {"train": {"uri": uri}}}})


def models_of_the_product() -> list[type[BaseModel]]:
    """Every pydantic model of the light package and the operator."""
    modules = [
        importlib.import_module(item.name)
        for item in pkgutil.walk_packages(graft.__path__, "graft.")
        if not item.name.endswith("__main__") and item.name != "graft.handlers"
    ]
    return sorted(
        {
            item
            for module in modules
            for item in vars(module).values()
            if isinstance(item, type) and issubclass(item, BaseModel) and item.__module__.startswith("graft.")
        },
        key=lambda item: f"{item.__module__}.{item.__name__}",
    )


def test_no_model_quotes_what_it_refuses() -> None:
    """A Secret is validated as something else -> no error of any model has its values."""
    found = models_of_the_product()
    assert len(found) > 60
    assert [item for item in found if not item.model_config.get("hide_input_in_errors")] == []


async def test_a_failed_validation_in_the_log(caplog: pytest.LogCaptureFixture) -> None:
    """A reconcile fails on somebody's Secret -> neither the log's message nor its traceback has the value."""
    tried, seen = asyncio.Event(), SECRET | {"spec": {"baseModel": "hunter2/../x", "dataset": "hunter2", "hunter": 1}}

    async def reconcile(namespace: str, name: str) -> float | None:
        tried.set()
        FineTuneJob.model_validate(seen)
        return None

    queue = Queue({"FineTuneJob": reconcile})
    queue.wake("FineTuneJob", "shop", "tune")
    await asyncio.wait_for(tried.wait(), 10)
    await asyncio.sleep(0.1)
    await queue.stop()
    (record,) = [item for item in caplog.records if item.levelname == "ERROR"]
    text = JsonFormatter().format(record)
    assert "FineTuneJob" in text and "hunter2" not in text and "aHVu" not in text


class FakeKube:
    """One resource, and what is written."""

    def __init__(self, kind: str, namespace: str, spec: Any, *, deleted: bool = False, **status: Any) -> None:
        metadata = {"name": "it", "namespace": namespace, "uid": "u", "generation": 1, "finalizers": [FINALIZER]}
        metadata |= {"deletionTimestamp": "2026-01-01T00:00:00Z"} if deleted else {}
        body = {"apiVersion": "graft.dev/v1alpha1", "kind": kind, "metadata": metadata, "spec": spec}
        self.raw = body | {"status": status}
        self.status: dict[str, Any] = {}
        self.events: list[str] = []
        self.deleted: list[tuple[str, str]] = []
        self.finalizers: list[str] | None = None
        self.jobs = [{"metadata": {"name": "it", "uid": "j", "ownerReferences": [{"uid": "u", "controller": True}]}}]

    async def get(self, kind: str, namespace: str | None, name: str) -> Any:
        if kind == "ConfigMap":  # the routes
            return {"metadata": {"name": name, "namespace": namespace, "uid": "r", "labels": {OWNER_UID: "u"}}}
        return self.raw

    async def list(self, kind: str, *_: Any, **__: Any) -> list[Any]:
        return self.jobs if kind == "Job" else []

    async def apply_status(self, *arguments: Any, **_: Any) -> None:
        self.status = arguments[-1]

    async def event(self, raw: Any, name: str, reason: str, *_: Any, **__: Any) -> None:
        self.events.append(reason)

    async def delete(self, kind: str, namespace: str, name: str, *_: Any, **__: Any) -> None:
        self.deleted.append((kind, namespace))
        self.jobs = [item for item in self.jobs if kind != "Job"]

    async def merge_patch(self, kind: str, namespace: str | None, name: str, patch: Any) -> None:
        self.finalizers = patch["metadata"]["finalizers"]


def context_of(kube: FakeKube, user: str = "graft-root") -> Context:
    settings = Settings(namespace="graft-system", images=Images(trainer="t", engine="e", agent="a"))
    store = SimpleNamespace(config=SimpleNamespace(access_key_id=user, bucket="graft"))
    return Context(kube, settings, store, None)  # type: ignore[arg-type]


async def never(ctx: Context, namespace: str, name: str) -> float | None:
    raise AssertionError("the reconciler ran")


CONDITIONS = {"FineTuneJob": "Accepted", "Adapter": "Ready", "AdapterDeployment": "Accepted"}


@pytest.mark.parametrize("kind", CONDITIONS)
@pytest.mark.parametrize("namespace", ["models", "root", "storeadmin"])
async def test_a_namespace_that_would_own_what_is_not_its_own(kind: str, namespace: str) -> None:
    """A namespace is named models, root or like the operator's user -> none of its resources is reconciled."""
    kept = {"type": "InUse", "status": "True", "reason": "Served", "message": "m", "lastTransitionTime": "t"}
    kube = FakeKube(kind, namespace, {}, usedBy=["chat"], conditions=[kept])
    ctx = context_of(kube, "graft-storeadmin")
    assert await admit(ctx, kind, never, namespace, "it") == WAITING
    refusal, other = (item for item in kube.status["conditions"] if item["type"] not in {"Reconciling", "Stalled"})
    assert (refusal["type"], refusal["status"], refusal["reason"]) == (CONDITIONS[kind], "False", "NamespaceReserved")
    assert f"namespace {namespace} cannot use Graft" in refusal["message"] and "operations.md" in refusal["message"]
    assert other["type"] == "InUse" and kube.status["usedBy"] == ["chat"]


@pytest.mark.parametrize("namespace", ["models", "root"])
async def test_a_key_for_a_reserved_namespace(namespace: str) -> None:
    """A reserved namespace asks for a key of the store, or names files below models/ as its own -> refused."""
    trouble = await ensure_credentials(context_of(FakeKube("Adapter", namespace, {})), namespace)
    assert trouble is not None and trouble.reason == "NamespaceReserved"
    assert not in_tenants_part(f"s3://graft/{namespace}/x", "graft", namespace)


async def test_the_key_that_a_reserved_namespace_had() -> None:
    """An older version of Graft gave the namespace models a key -> it is revoked; others' and the operator's own stay."""
    revoked: list[str] = []
    kube = FakeKube("Adapter", "models", {})
    kube.jobs = [{"metadata": {"name": name}} for name in ("models", "shop", "root")]
    kube.list = lambda *_, **__: asyncio.sleep(0, kube.jobs)  # type: ignore[method-assign]
    ctx = context_of(kube)
    tenants = {"models", "shop", "root", "gone"}
    ctx.identity = SimpleNamespace(tenants=lambda: tenants, revoke=revoked.append)  # type: ignore[assignment]
    await revoke_orphans(ctx)
    assert revoked == ["gone", "models"]


@pytest.mark.parametrize("kind", CONDITIONS)
async def test_what_exists_in_a_reserved_namespace_can_be_deleted(kind: str) -> None:
    """An older version of Graft allowed the namespace -> Jobs and routes end, and no file of the base models is deleted."""
    kube = FakeKube(kind, "models", {}, deleted=True)
    ctx = context_of(kube)
    assert await admit(ctx, kind, never, "models", "it") is None
    assert kube.finalizers == []
    assert kube.deleted == ([("ConfigMap", "graft-system")] if kind == "AdapterDeployment" else [("Job", "models")])


async def test_a_job_that_has_ended_keeps_its_result() -> None:
    """A job of a reserved namespace has succeeded before -> its status stays."""
    ended = {"type": "Succeeded", "status": "True", "reason": "Published", "message": "m", "lastTransitionTime": "t"}
    kube = FakeKube("FineTuneJob", "models", {}, stage="Succeeded", conditions=[ended])
    assert await admit(context_of(kube), "FineTuneJob", never, "models", "it") is None
    assert kube.status == {}


async def test_a_stored_spec_that_the_schema_refuses() -> None:
    """A resource is older than the patterns -> its condition names the field, without its value; it can be deleted."""

    async def reconcile(ctx: Context, namespace: str, name: str) -> float | None:
        FineTuneJob.model_validate(await ctx.kube.get("FineTuneJob", namespace, name))
        raise AssertionError("the stored spec was accepted")

    spec = JOB["spec"] | {"baseModel": "../hunter2"}
    kube = FakeKube("FineTuneJob", "shop", spec)
    assert await admit(context_of(kube), "FineTuneJob", reconcile, "shop", "it") == WAITING
    (refusal,) = (item for item in kube.status["conditions"] if item["type"] == "Accepted")
    assert refusal["reason"] == "SpecInvalid" and "spec.baseModel" in refusal["message"]
    assert "hunter2" not in json.dumps(kube.status)
    kube = FakeKube("FineTuneJob", "shop", spec, deleted=True)
    assert await admit(context_of(kube), "FineTuneJob", reconcile, "shop", "it") is None and kube.finalizers == []


async def test_an_invalid_object_beside_ours() -> None:
    """Another object makes a reconcile fail -> the resource itself is not called invalid."""

    async def reconcile(ctx: Context, namespace: str, name: str) -> float | None:
        FineTuneJob.model_validate({"metadata": {"name": "other"}, "spec": {}})
        return None

    kube = FakeKube("FineTuneJob", "shop", JOB["spec"])
    with pytest.raises(ValidationError):
        await admit(context_of(kube), "FineTuneJob", reconcile, "shop", "it")
    assert kube.status == {}


KNOWN = {("FineTuneJob", "shop", "tune"): "u1", ("AdapterDeployment", "bank", "chat"): "u2"}


def child(
    namespace: str, owner: tuple[str, str, str], *references: tuple[str, str, str], **labels: str
) -> dict[str, Any]:
    """Return an object with our labels, and owner references (kind, name, uid)."""
    ours = {"graft.dev/owner-kind": owner[0], "graft.dev/owner": owner[1], "graft.dev/owner-uid": owner[2]}
    listed = [{"kind": kind, "name": name, "uid": uid, "controller": True} for kind, name, uid in references]
    return {"metadata": {"name": "c", "namespace": namespace, "labels": ours | labels, "ownerReferences": listed}}


TUNE, CHAT = ("FineTuneJob", "tune", "u1"), ("AdapterDeployment", "chat", "u2")
PLACE = {"graft.dev/namespace": "bank"}
ROUTES = PLACE | {"graft.dev/component": "routes"}


@pytest.mark.parametrize(
    ("kind", "found", "wakes"),
    [
        ("Job", child("shop", TUNE, TUNE), True),
        ("ConfigMap", child("shop", TUNE, TUNE), True),
        ("Pod", child("shop", TUNE, ("Job", "tune", "j")), True),
        ("Pod", child("shop", TUNE, ("Job", "tune-preflight", "j")), True),
        ("Pod", child("bank", CHAT, ("ReplicaSet", "chat-5d4f", "r")), True),
        ("ConfigMap", child("graft-system", CHAT, **ROUTES), True),
        ("ConfigMap", child("shop", TUNE), False),  # labels alone
        ("ConfigMap", child("shop", TUNE, ("FineTuneJob", "tune", "other")), False),  # another owner
        ("ConfigMap", child("shop", ("FineTuneJob", "tune", "old"), ("FineTuneJob", "tune", "old")), False),
        ("Pod", child("shop", TUNE), False),
        ("Pod", child("shop", TUNE, ("Job", "mine", "j")), False),
        ("Pod", child("shop", TUNE, ("StatefulSet", "tune", "s")), False),
        ("ConfigMap", child("shop", CHAT, CHAT), False),  # another namespace than its owner's
        ("ConfigMap", child("shop", CHAT, **ROUTES), False),  # the label names another tenant's namespace
        ("ConfigMap", child("shop", CHAT, CHAT, **PLACE), False),
        ("ConfigMap", child("graft-system", CHAT, **PLACE), False),  # no routes
        ("Pod", child("graft-system", CHAT, **ROUTES), False),
        ("ConfigMap", child("shop", ("FineTuneJob", "nobody", "u1"), ("FineTuneJob", "nobody", "u1")), False),
        ("ConfigMap", {"metadata": {"name": "c", "namespace": "shop"}}, False),
    ],
)
def test_whom_a_child_wakes(kind: str, found: dict[str, Any], wakes: bool) -> None:
    """Anybody labels an object with another tenant's resource -> it wakes nobody; only real children do."""
    assert (owner_of(kind, found, KNOWN, "graft-system") is not None) == wakes


def test_one_invalid_resource_among_many() -> None:
    """One stored resource is invalid -> the others of its namespace are still reconciled."""
    bad = JOB | {"spec": JOB["spec"] | {"baseModel": "../x"}}
    assert [item.metadata.name for item in valid(FineTuneJob, [JOB, bad, JOB])] == ["tune", "tune"]


def test_an_amount_that_no_number_holds() -> None:
    """An amount is 1e999, which Kubernetes accepts -> it counts as Kubernetes' largest amount, and no reconcile fails."""
    largest = 2**63 - 1024  # the largest number below 2**63 with 53 bits
    limits = EngineLimits.model_validate({"adapterBytesPerReplica": "1e999"})
    assert limits.adapter_bytes == largest
    assert Resources.model_validate({"limits": {"nvidia.com/gpu": "1e999"}}).gpus() == largest
