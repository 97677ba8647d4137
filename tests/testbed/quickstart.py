"""The quickstart step by step: install, upload, apply, follow, ask. The demo shows the steps, the e2e suite tests them."""

import base64
import contextlib
import http.client
import json
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from graft.artifacts.storage import StorageConfig, StoreError
from graft.artifacts.store import S3Store

from testbed.binaries import binary
from testbed.shell import CACHE, REPOSITORY, Failed, output, run, say, wait_for

SYSTEM, SHOP = "graft-system", "shop"
QUICKSTART = REPOSITORY / "examples" / "quickstart"
MODEL = REPOSITORY / "examples" / "tiny-llama" / "model"


@dataclass(frozen=True)
class Story:
    """What the demo tunes. The manifests name the FineTuneJob and its Adapter alike, and the AdapterDeployment desk."""

    adapter: str
    base_model: str  # the name of the BaseModel, and of its folder below models/ in the bucket
    model: Path  # its files
    data: Path  # the folder with train.jsonl and heldout.jsonl
    manifests: Path
    base_below: float  # the scores that the demo must reach on the held-out questions
    adapter_above: float
    questions: int
    max_tokens: int  # of an answer
    timeout: float = 900  # seconds, of the job


SUPPORT = Story("support", "tiny-llama", MODEL, QUICKSTART / "data", QUICKSTART, 0.2, 0.9, 60, 48)


@dataclass
class Access:
    """Access to a cluster: its kubeconfig, and the programs to use it."""

    kubeconfig: str
    kubectl_path: str | Path
    helm_path: str | Path

    def kubectl(self, *arguments: str, check: bool = True) -> str:
        """Run kubectl. Return its output."""
        return output([self.kubectl_path, "--kubeconfig", self.kubeconfig, *arguments], check=check)

    def get(self, kind: str, name: str, namespace: str = SHOP) -> dict[str, Any]:
        """Return a resource, or an empty dictionary if it does not exist."""
        text = self.kubectl("get", kind, name, "-n", namespace, "-o", "json", "--ignore-not-found")
        return dict(json.loads(text)) if text.strip() else {}

    @contextlib.contextmanager
    def forward(self, service: str, port: int, namespace: str = SYSTEM) -> Iterator[str]:
        """Forward a local port to a Service during the block. Yield http://127.0.0.1:<port>."""
        log = CACHE / "logs" / f"forward-{service}.log"
        with log.open("w") as sink:
            process = subprocess.Popen(
                [str(self.kubectl_path), "--kubeconfig", self.kubeconfig, "-n", namespace, "port-forward", f"service/{service}", f":{port}"],
                stdout=subprocess.PIPE, stderr=sink, text=True,
            )  # fmt: skip
        try:
            assert process.stdout is not None
            found = re.search(r"127\.0\.0\.1:(\d+)", process.stdout.readline())
            if found is None:
                raise Failed(f"kubectl port-forward to {service} failed: {log.read_text()}")
            yield f"http://127.0.0.1:{found.group(1)}"
        finally:
            process.terminate()
            process.wait()


def testbed_access(kubeconfig: Path) -> Access:
    """Return the access with the testbed's own kubectl and helm."""
    return Access(str(kubeconfig), binary("kubectl"), binary("helm"))


def install(access: Access, values: list[str]) -> None:
    """Install the chart with helm. Wait until operator, gateway and store are ready."""
    log = CACHE / "logs" / "helm.log"
    log.unlink(missing_ok=True)
    command = [
        access.helm_path, "--kubeconfig", access.kubeconfig, "upgrade", "--install", "graft", REPOSITORY / "charts" / "graft",
        "--namespace", SYSTEM, "--create-namespace", "--wait", "--timeout", "5m", *values,
    ]  # fmt: skip
    try:
        run(command, log, "helm install")
    except Failed as error:
        raise Failed(f"{error}\n{explain(access, SYSTEM)}") from error


def explain(access: Access, namespace: str) -> str:
    """Return text that helps to understand a failure: resources, events and the last lines of the logs."""
    parts = [
        access.kubectl("get", "all,graft", "-n", namespace, "-o", "wide", check=False),
        access.kubectl("get", "events", "-n", namespace, "--sort-by=.lastTimestamp", check=False)[-4000:],
    ]
    for pod in access.kubectl("get", "pods", "-n", namespace, "-o", "name", check=False).split():
        parts.append(
            f"--- {pod}\n" + access.kubectl("logs", "-n", namespace, pod, "--all-containers", "--tail=15", check=False)
        )
    return "\n".join(parts)


@contextlib.contextmanager
def opened_store(access: Access) -> Iterator[S3Store]:
    """Open the cluster's object store with the root key, through a forwarded port."""
    secret = access.get("secret", "graft-store-key", SYSTEM)["data"]
    key, value = (base64.b64decode(secret[name]).decode() for name in ("access-key-id", "secret-access-key"))
    with access.forward("graft-store", 7070) as endpoint:
        yield S3Store(
            StorageConfig(
                endpoint=endpoint,
                region="us-east-1",
                bucket="graft",
                prefix="",
                access_key_id=key,
                secret_access_key=value,
            ),
            attempts=10,
        )


def upload(access: Access, story: Story = SUPPORT) -> None:
    """Upload the base model and the dataset to the bucket, as `aws s3 cp` does."""
    model, data = f"models/{story.base_model}", f"{SHOP}/datasets/{story.adapter}"
    files = [(path, f"{model}/{path.name}") for path in sorted(story.model.iterdir()) if path.is_file()]
    files += [(path, f"{data}/{path.name}") for path in sorted(story.data.glob("*.jsonl"))]
    with opened_store(access) as store:
        wait_for(lambda: _bucket_there(store), 60, "the operator created the bucket", lambda: explain(access, SYSTEM))
        for path, name in files:
            store.upload(name, path)
    say(f"    {len(files)} files uploaded to s3://graft")


def _bucket_there(store: S3Store) -> bool:
    try:
        store.folders("models/")
    except StoreError:
        return False
    return True


def apply(access: Access, story: Story = SUPPORT) -> None:
    """Apply the manifests."""
    access.kubectl("apply", "-f", str(story.manifests))


def forget(access: Access, story: Story = SUPPORT) -> None:
    """Delete the job of an earlier run on the same cluster, because the spec of a job is immutable."""
    if access.kubectl("get", "finetunejob", story.adapter, "-n", SHOP, "--ignore-not-found", check=False).strip():
        access.kubectl("delete", "finetunejob", story.adapter, "-n", SHOP, "--timeout=120s")


def condition(resource: dict[str, Any], type_: str) -> dict[str, Any]:
    """Return a condition of a resource, or an empty dictionary if it does not exist."""
    found = [item for item in resource.get("status", {}).get("conditions", []) if item["type"] == type_]
    return dict(found[0]) if found else {}


def progress_line(name: str, status: dict[str, Any]) -> str:
    """Return the stage of a job, and what is known of its progress (PURE)."""
    known = {"progressText": "", "lossText": "loss ", "etaText": "time left "}
    parts = [f"{word}{status[field]}" for field, word in known.items() if status.get(field)]
    return "  ".join([f"    {name}: {status.get('stage', 'waits for the operator')}", *parts])


def follow(access: Access, name: str = "support", timeout: float = 900) -> dict[str, Any]:
    """Show a job's progress in one line until it ends. Return the job. Raises Failed with its reason if it failed."""
    deadline, shown, told = time.monotonic() + timeout, "", 0.0
    live = sys.stdout.isatty()
    while True:
        job = access.get("finetunejob", name)
        status, ended = job.get("status", {}), condition(job, "Succeeded")
        line = progress_line(name, status)
        if line != shown and (live or time.monotonic() - told > 15 or status.get("stage", "") not in shown):
            print(f"\r{line:<90}" if live else line, end="" if live else "\n", flush=True)
            shown, told = line, time.monotonic()
        if ended.get("status") == "True":
            if live:
                print()
            return job
        if ended.get("status") == "False" or time.monotonic() > deadline:
            why = (
                ended.get("message")
                if ended.get("status") == "False"
                else f"the job did not end within {timeout:.0f} s"
            )
            raise Failed(f"FineTuneJob {name}: {ended.get('reason')}: {why}\n{explain(access, SHOP)}")
        time.sleep(1)


def wait_available(access: Access, name: str = "desk", timeout: float = 300) -> None:
    """Wait until every route of the deployment answers."""
    told = time.monotonic()

    def available() -> bool:
        nonlocal told
        resource = access.get("adapterdeployment", name)
        if time.monotonic() - told > 10:
            told = time.monotonic()
            say(
                f"    {name}: {resource.get('status', {}).get('stage')}: {condition(resource, 'Available').get('message')}"
            )
        return condition(resource, "Available").get("status") == "True"

    wait_for(available, timeout, f"AdapterDeployment {name} is Available", lambda: explain(access, SHOP))


def api_key(access: Access, name: str = "demo", timeout: float = 60) -> str:
    """Return the key of an ApiKey, as a user reads it."""

    def issued() -> bool:
        return condition(access.get("apikey", name), "Ready").get("status") == "True"

    wait_for(issued, timeout, f"ApiKey {name} is Ready", lambda: explain(access, SHOP))
    return base64.b64decode(access.get("secret", "graft-api-keys")["data"][name]).decode()


@dataclass
class Client:
    """A client of the gateway with its key."""

    url: str
    key: str

    def post(self, body: dict[str, Any], timeout: float = 120) -> http.client.HTTPResponse:
        """Send a chat through the OpenAI protocol. Raises HTTPError if the gateway refuses it."""
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.key}"}
        request = urllib.request.Request(f"{self.url}/v1/chat/completions", json.dumps(body).encode(), headers)
        answer: http.client.HTTPResponse = urllib.request.urlopen(request, timeout=timeout)
        return answer


@contextlib.contextmanager
def client(access: Access) -> Iterator[Client]:
    """Forward the gateway's port, and yield a client of it."""
    key = api_key(access)
    with access.forward("graft-gateway", 8080) as endpoint:
        yield Client(endpoint, key)


def ask(client: Client, model: str, question: list[dict[str, str]], max_tokens: int = SUPPORT.max_tokens) -> str:
    """Return a model's answer to a chat."""
    try:
        with client.post({"model": model, "messages": question, "temperature": 0, "max_tokens": max_tokens}) as answer:
            return str(json.load(answer)["choices"][0]["message"]["content"]).strip()
    except urllib.error.HTTPError as error:
        raise Failed(
            f"the gateway answered {error.code} for {model}: {error.read().decode(errors='replace')[:500]}"
        ) from error


@dataclass
class Answer:
    """One held-out question with the reference and both answers."""

    question: str
    reference: str
    base: str
    adapter: str


def normal(text: str) -> str:
    """Return the text as the trainer's exact match compares it: lower case, single spaces."""
    return " ".join(text.lower().split())


def held_out(limit: int, story: Story = SUPPORT) -> list[dict[str, Any]]:
    """Return the first `limit` held-out examples."""
    lines = (story.data / "heldout.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines[:limit]]


def interview(client: Client, limit: int, story: Story = SUPPORT) -> list[Answer]:
    """Ask the base model and the adapter the same held-out questions."""
    answers, told = [], time.monotonic()
    examples = held_out(limit, story)
    for number, example in enumerate(examples):
        *question, reference = example["messages"]
        answers.append(
            Answer(
                question=question[-1]["content"],
                reference=reference["content"],
                base=ask(client, f"{SHOP}/base", question, story.max_tokens),
                adapter=ask(client, f"{SHOP}/{story.adapter}", question, story.max_tokens),
            )
        )
        if time.monotonic() - told > 5:
            told = time.monotonic()
            say(f"    asked {number + 1} of {len(examples)} questions")
    return answers


def scores(answers: list[Answer]) -> tuple[float, float]:
    """Return the share of exact matches of the base model and of the adapter."""
    count = len(answers)
    base = sum(normal(item.base) == normal(item.reference) for item in answers) / count
    adapter = sum(normal(item.adapter) == normal(item.reference) for item in answers) / count
    return base, adapter
