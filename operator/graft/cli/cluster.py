"""Read-only access to the cluster with the user's kubeconfig."""

import json
from typing import Any

from kubernetes import client, config
from kubernetes.client.exceptions import ApiException
from urllib3.exceptions import HTTPError

from graft.cli.failure import CliFailure

TIMEOUT = (5, 20)  # seconds to connect and to answer


class Cluster:
    """One API server."""

    def __init__(self, context: str | None) -> None:
        try:
            contexts, current = config.list_kube_config_contexts()
            if context is not None:
                current = next((item for item in contexts if item["name"] == context), None)
            self._api = config.new_client_from_config(context=context)
        except config.ConfigException as error:
            raise CliFailure(
                f"cannot use the kubeconfig: {error}",
                "Set KUBECONFIG or --context, or name report.json files instead of jobs.",
            ) from error
        self.namespace: str = ((current or {}).get("context") or {}).get("namespace") or "default"

    def job(self, namespace: str, name: str) -> dict[str, Any]:
        """Return a FineTuneJob."""
        call = client.CustomObjectsApi(self._api).get_namespaced_custom_object
        place = ("graft.dev", "v1alpha1", namespace, "finetunejobs", name)
        return dict(self._read(f"the job {namespace}/{name}", call, *place))

    def secret(self, namespace: str, name: str) -> dict[str, str]:
        """Return the data of a Secret. The values are base64."""
        found = self._read(
            f"the Secret {namespace}/{name}", client.CoreV1Api(self._api).read_namespaced_secret, name, namespace
        )
        return dict(found.data or {})

    def _read(self, what: str, call: Any, *place: str) -> Any:
        try:
            return call(*place, _request_timeout=TIMEOUT)
        except ApiException as error:
            remedies = {
                401: "Log in to the cluster again.",
                403: "Ask your platform team for the right to get finetunejobs and the Secret graft-storage, or name report.json files.",
                404: "Check the name, and the namespace (-n). `kubectl get finetunejobs -A` lists the jobs.",
            }
            remedy = remedies.get(error.status, "Check that the API server is ready: kubectl get --raw /readyz")
            raise CliFailure(f"cannot read {what}: {_message(error)}", remedy) from error
        except (HTTPError, OSError) as error:
            raise CliFailure(
                f"the cluster does not answer: {error}", "Check the kubeconfig's server and your network."
            ) from error


def _message(error: ApiException) -> str:
    """Return the API server's own error message."""
    try:
        return str(json.loads(error.body)["message"])
    except (TypeError, ValueError, KeyError):
        return f"{error.status} {error.reason}"
