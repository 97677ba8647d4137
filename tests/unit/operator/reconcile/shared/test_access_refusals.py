"""What users see when the API server refuses a child."""

import pytest
from graft.kube import KubeError
from graft.reconcile.shared.access import refusal_of
from worlds.reconciling import MemoryKube, MemoryStore, context

USER = 'User "system:serviceaccount:graft-system:graft-operator"'
# Messages of Kubernetes 1.34.
REFUSALS = {
    (403, f'jobs.batch is forbidden: {USER} cannot create resource "jobs" in API group "batch" in the namespace "shop"'): (
        "NamespaceNotBound"
    ),
    (403, f'roles.rbac.authorization.k8s.io "a" is forbidden: {USER} is attempting to grant RBAC permissions not currently'): (
        "NamespaceNotBound"
    ),
    (403, 'jobs.batch "j" is forbidden: exceeded quota: small, requested: count/jobs.batch=1'): "CreationFailed",
    (403, 'deployments.apps "chat" is forbidden: ValidatingAdmissionPolicy "p" denied request: no GPUs today'): "CreationFailed",
    (403, 'jobs.batch "j" is forbidden: unable to create new content in namespace shop because it is being terminated'): (
        "CreationFailed"
    ),
    (400, 'admission webhook "images.example.com" denied the request: unknown registry'): "CreationFailed",
    (422, 'Job.batch "j" is invalid: spec.template: Invalid value: field is immutable'): "CreationFailed",
    (409, 'jobs.batch "j" already exists'): "CreationFailed",
    (413, "Request entity too large: limit is 3145728"): "CreationFailed",
}  # fmt: skip


@pytest.mark.parametrize("status_and_message", REFUSALS, ids=lambda found: found[1][:40])
def test_a_refusal_becomes_a_reason_with_the_api_server_s_words(status_and_message: tuple[int, str]) -> None:
    status, message = status_and_message
    found = refusal_of(
        context(MemoryKube(), MemoryStore()), "shop", "the children of the job", KubeError(status, "", message)
    )
    assert found is not None and found.reason == REFUSALS[status_and_message]
    assert message in found.message
    assert ("kubectl create rolebinding" in found.message) is (found.reason == "NamespaceNotBound")


@pytest.mark.parametrize("status", [0, 401, 404, 410, 429, 500, 503, 504])
def test_what_passes_is_no_refusal(status: int) -> None:
    assert (
        refusal_of(context(MemoryKube(), MemoryStore()), "shop", "the Job", KubeError(status, "", "try later")) is None
    )
