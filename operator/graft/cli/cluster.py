"""Access to the cluster with the user's kubeconfig: what the commands read, the one field that `restart` changes, and
connections to pods."""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import yaml
from kubernetes import client, config
from kubernetes.client.exceptions import ApiException
from kubernetes.stream import ws_client
from urllib3.exceptions import HTTPError
from websocket import WebSocket, WebSocketBadStatusException, WebSocketException

from graft.artifacts.signing import trusted_keys
from graft.cli.failure import CliFailure
from graft.contracts.agent import TRUSTED_KEYS

TIMEOUT = (5, 20)  # seconds to connect and to answer
JOB_GROUP = ("graft.dev", "v1alpha1")
PORTFORWARD = "get and create pods/portforward in {}"
PODS_OF = "graft.dev/owner-kind=FineTuneJob,graft.dev/owner={}"


class Cluster:
    """One API server."""

    def __init__(self, context: str | None) -> None:
        try:
            with login_errors() as errors:
                contexts, current = config.list_kube_config_contexts()
                if context is not None:
                    current = next((item for item in contexts if item["name"] == context), None)
                self._api = config.new_client_from_config(context=context)
            if errors:  # without a token, the API server would only answer 401
                raise CliFailure(
                    f"cannot log in to the cluster: {errors[0]}",
                    "The kubeconfig names a program or file for the login. Check it with: kubectl auth whoami",
                )
            self.namespace: str = ((current or {}).get("context") or {}).get("namespace") or "default"
        # The library checks no types: a damaged file ends in one of the last three.
        except (config.ConfigException, yaml.YAMLError, OSError, AttributeError, TypeError, ValueError) as error:
            raise CliFailure(
                f"cannot use the kubeconfig: {' '.join(str(error).split())}",
                "Set KUBECONFIG or --context. Commands that show reports also take report.json files, without a cluster.",
            ) from error
        self._core = client.CoreV1Api(self._api)

    def job(self, namespace: str, name: str) -> dict[str, Any]:
        """Return a FineTuneJob."""
        call = client.CustomObjectsApi(self._api).get_namespaced_custom_object
        place = (*JOB_GROUP, namespace, "finetunejobs", name)
        return dict(self._ask(f"read the job {namespace}/{name}", "get finetunejobs", call, *place))

    def restart(self, job: dict[str, Any], restarts: int) -> None:
        """Set spec.restarts of a FineTuneJob, unless it has changed since it was read."""
        meta = job["metadata"]
        body = {"metadata": {"resourceVersion": meta["resourceVersion"]}, "spec": {"restarts": restarts}}
        call = client.CustomObjectsApi(self._api).patch_namespaced_custom_object
        place = (*JOB_GROUP, meta["namespace"], "finetunejobs", meta["name"], body)
        self._ask(f"change the job {meta['namespace']}/{meta['name']}", "patch finetunejobs", call, *place)

    def secret(self, namespace: str, name: str) -> dict[str, str]:
        """Return the data of a Secret. The values are base64."""
        what = f"read the Secret {namespace}/{name}"
        found = self._ask(what, f"get the Secret {name}", self._core.read_namespaced_secret, name, namespace)
        return dict(found.data or {})

    def trusted_keys(self, namespace: str) -> dict[str, bytes]:
        """Return the public keys that the operator in `namespace` publishes, by key id."""
        what = f"read the public keys in the ConfigMap {namespace}/{TRUSTED_KEYS}"
        call = self._core.read_namespaced_config_map
        found = self._ask(what, f"get the ConfigMap {TRUSTED_KEYS}", call, TRUSTED_KEYS, namespace)
        return trusted_keys(found.data or {})

    def pods_of_job(self, namespace: str, name: str) -> list[Any]:
        """Return the pods of a FineTuneJob, the newest first."""
        call, labels = self._core.list_namespaced_pod, PODS_OF.format(name)
        what = f"list the pods of the job {namespace}/{name}"
        found = self._ask(what, "list pods", call, namespace, label_selector=labels).items
        return sorted(found, key=lambda pod: pod.metadata.creation_timestamp, reverse=True)

    def log(self, namespace: str, pod: str, container: str, *, follow: bool, previous: bool) -> Iterator[bytes]:
        """Yield the log of a container in pieces."""
        answer = self._ask(
            f"read the log of the pod {namespace}/{pod}",
            "get pods/log",
            self._core.read_namespaced_pod_log,
            pod,
            namespace,
            container=container,
            follow=follow,
            previous=previous,
            _preload_content=False,
            _request_timeout=(TIMEOUT[0], None) if follow else TIMEOUT,
        )
        yield from answer.stream(decode_content=True)

    def pod_behind(self, namespace: str, service: str, port: int) -> tuple[str, int]:
        """Return the name of a ready pod of a Service, and its port. Raises CliFailure if no pod is ready."""
        where = f"{namespace}/{service}"
        found = self._ask(
            f"read the Service {where}",
            f"get services, list pods, and get and create pods/portforward in {namespace}",
            self._core.read_namespaced_service,
            service,
            namespace,
        )
        labels = ",".join(f"{key}={value}" for key, value in (found.spec.selector or {}).items())
        pods = self._ask(
            f"list the pods of the Service {where}",
            f"list pods in {namespace}",
            self._core.list_namespaced_pod,
            namespace,
            label_selector=labels,
        ).items
        found_port = next((item for item in found.spec.ports or [] if item.port == port), None)
        ready = [
            pod
            for pod in pods
            if any(item.type == "Ready" and item.status == "True" for item in pod.status.conditions or [])
        ]
        if found_port is not None and labels and ready:
            return ready[0].metadata.name, _container_port(ready[0], found_port.target_port, port)
        raise CliFailure(
            f"no pod behind the Service {where} is ready on port {port}",
            f"Check its pods: kubectl get pods -n {namespace}",
        )

    def connect(self, namespace: str, pod: str, port: int) -> WebSocket:
        """Return a connection to a port of a pod, for graft.cli.forward.

        The library's own port-forward copies all data that has not been read yet with every piece, and does not slow down a
        fast sender. So only its address, headers and TLS are used.
        """
        settings = self._api.configuration
        keys = settings.auth_settings().values()
        headers = {key["key"].lower(): key["value"] for key in keys if key["in"] == "header" and key["value"]}
        path = f"/api/v1/namespaces/{namespace}/pods/{pod}/portforward"
        url = ws_client.get_websocket_url(settings.host + path, [("ports", port)])
        where = f"forward a port to the pod {namespace}/{pod}"
        try:
            made: WebSocket = ws_client.create_websocket(settings, url, headers)
            return made
        except WebSocketBadStatusException as error:
            raise _refused(where, PORTFORWARD.format(namespace), error.status_code, _text(error.resp_body)) from error
        except (WebSocketException, OSError) as error:
            raise CliFailure(
                f"cannot {where}: {cause(error)}", "Check the kubeconfig's server and your network."
            ) from error

    def _ask(self, what: str, right: str, call: Any, *place: Any, **options: Any) -> Any:
        """Send a request. `what` it does, and which `right` it needs, are for the message of a CliFailure."""
        try:
            return call(*place, **({"_request_timeout": TIMEOUT} | options))
        except ApiException as error:
            raise _refused(what, right, error.status, _text(error.body) or f"{error.status} {error.reason}") from error
        except (HTTPError, OSError) as error:
            server = self._api.configuration.host
            raise CliFailure(
                f"the cluster {server} does not answer: {cause(error)}",
                "Check the kubeconfig's server and your network.",
            ) from error


@contextmanager
def login_errors() -> Iterator[list[str]]:
    """Yield the errors that the library logs during the block. It logs a login that failed, and goes on without."""
    errors: list[str] = []

    class Collector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            errors.append(record.getMessage())

    handler, root = Collector(logging.ERROR), logging.getLogger()
    root.addHandler(handler)
    try:
        yield errors
    finally:
        root.removeHandler(handler)


def cause(error: BaseException) -> str:
    """Return what an error of the network comes from, without the retries and objects around it (PURE)."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, OSError) and inner.strerror:
            return inner.strerror
        reason = getattr(inner, "reason", None)
        inner = reason if isinstance(reason, BaseException) else inner.__cause__ or inner.__context__
    return str(error)


def _refused(what: str, right: str, status: int, message: str) -> CliFailure:
    """Return the failure for an answer with an error status (PURE)."""
    remedies = {
        400: "The container may not have started yet. `kubectl describe` shows why.",
        401: "Log in to the cluster again.",
        403: f"Ask your platform team for the right to {right}, or name report.json files where a command reads reports.",
        404: "Check the name, and the namespace (-n). `kubectl get finetunejobs,adapters -A` lists jobs and versions.",
        409: "It changed meanwhile. Run the command again.",
    }
    remedy = remedies.get(status, "Check that the API server is ready: kubectl get --raw /readyz")
    return CliFailure(f"cannot {what}: {message}", remedy)


def _container_port(pod: Any, target: int | str | None, port: int) -> int:
    """Return the port of the pod that a Service's targetPort names (PURE)."""
    if isinstance(target, int):
        return target
    named = {item.name: item.container_port for one in pod.spec.containers for item in one.ports or []}
    return int(named.get(target, port))


def _text(body: str | bytes | None) -> str:
    """Return the API server's own error message in a body, "" if it has none (PURE)."""
    try:
        return str(json.loads(body or "")["message"])
    except (TypeError, ValueError, KeyError):
        return ""
