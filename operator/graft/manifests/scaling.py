"""Build what scales and protects the pods of an AdapterDeployment: PodDisruptionBudget, and HorizontalPodAutoscaler or
ScaledObject."""

from graft.api import AdapterDeployment
from graft.api.adapterdeployment import Autoscaling, ScalingTarget
from graft.manifests.metadata import Manifest, child
from graft.manifests.serving import has_parts, pod_selector, serving_name

# A metric of the gateway: the requests that the gateway holds, or that run or wait in the engines. The gateway counts
# them for two reasons. The NetworkPolicy blocks the engines' own metrics, and these omit requests that wait for a
# sleeping deployment.
REQUESTS_METRIC = "graft_gateway_deployment_in_flight"
KEDA_POLLING_SECONDS = 15
# For adapters that are on some replicas only: both replicas of an adapter must not be removed at once. The next replica
# needs time to load the adapter.
ONE_BY_ONE: Manifest = {"scaleDown": {"policies": [{"type": "Pods", "value": 1, "periodSeconds": 60}]}}


def can_have_several(deployment: AdapterDeployment) -> bool:
    spec = deployment.spec
    return (spec.autoscaling.max_replicas if spec.autoscaling is not None else spec.replicas) > 1


def fewest(autoscaling: Autoscaling) -> int:
    """Return the minimum of replicas while awake.

    Only the operator scales between 0 and 1; autoscalers do not change 0.
    """
    return max(1, autoscaling.min_replicas)


def disruption_budget(deployment: AdapterDeployment) -> Manifest:
    """Return the budget: one pod at a time may be drained.

    It is for several replicas only: with one, it would block a node's drain. Pods that are not ready may always be
    drained: they serve nobody, and crash-looping ones would block the drain for ever.
    """
    return child("policy/v1", "PodDisruptionBudget", serving_name(deployment), deployment, "scaling") | {
        "spec": {
            "maxUnavailable": 1,
            "unhealthyPodEvictionPolicy": "AlwaysAllow",
            "selector": {"matchLabels": pod_selector(deployment)},
        }
    }


def _moves(deployment: AdapterDeployment) -> bool:
    """Return whether an autoscaler changes the number of replicas."""
    autoscaling = deployment.spec.autoscaling
    if autoscaling is None or autoscaling.target is None or deployment.spec.replicas == 0:
        return False
    return fewest(autoscaling) < autoscaling.max_replicas


def needs_prometheus(deployment: AdapterDeployment) -> bool:
    """Return whether the autoscaler of the deployment queries Prometheus itself."""
    autoscaling = deployment.spec.autoscaling
    if autoscaling is None or autoscaling.target is None or not _moves(deployment):
        return False
    return autoscaling.provider == "keda" and autoscaling.target.requests_per_replica is not None


def autoscaler(deployment: AdapterDeployment, prometheus_url: str) -> Manifest | None:
    """Return the object that changes the Deployment's replicas, or None if their number is fixed.

    `prometheus_url` is the platform team's: KEDA sends requests to it from its own namespace.
    """
    autoscaling = deployment.spec.autoscaling
    if autoscaling is None or autoscaling.target is None or not _moves(deployment):
        return None
    if autoscaling.provider == "keda":
        return _scaled_object(deployment, autoscaling, autoscaling.target, prometheus_url)
    return _horizontal(deployment, autoscaling, autoscaling.target)


def _scale_target(deployment: AdapterDeployment) -> Manifest:
    return {"apiVersion": "apps/v1", "kind": "Deployment", "name": serving_name(deployment)}


def _labels(deployment: AdapterDeployment) -> dict[str, str]:
    return {"deployment_namespace": deployment.metadata.namespace, "deployment": deployment.metadata.name}


def _horizontal(deployment: AdapterDeployment, autoscaling: Autoscaling, target: ScalingTarget) -> Manifest:
    metrics: list[Manifest] = []
    if target.cpu_percent is not None:
        # The CPU of the engine only, because the agent beside it uses almost none.
        utilization = {"type": "Utilization", "averageUtilization": target.cpu_percent}
        metrics.append(
            {
                "type": "ContainerResource",
                "containerResource": {"name": "cpu", "container": "engine", "target": utilization},
            }
        )
    if target.requests_per_replica is not None:
        average = {"type": "AverageValue", "averageValue": str(target.requests_per_replica)}
        metric = {"name": REQUESTS_METRIC, "selector": {"matchLabels": _labels(deployment)}}
        metrics.append({"type": "External", "external": {"metric": metric, "target": average}})
    return child("autoscaling/v2", "HorizontalPodAutoscaler", serving_name(deployment), deployment, "scaling") | {
        "spec": {
            "scaleTargetRef": _scale_target(deployment),
            "minReplicas": fewest(autoscaling),
            "maxReplicas": autoscaling.max_replicas,
            "metrics": metrics,
            **({"behavior": ONE_BY_ONE} if has_parts(deployment) else {}),
        }
    }


def _scaled_object(
    deployment: AdapterDeployment, autoscaling: Autoscaling, target: ScalingTarget, prometheus_url: str
) -> Manifest:
    triggers: list[Manifest] = []
    if target.cpu_percent is not None:
        triggers.append(
            {
                "type": "cpu",
                "metricType": "Utilization",
                "metadata": {"value": str(target.cpu_percent), "containerName": "engine"},
            }
        )
    if target.requests_per_replica is not None:
        selector = ",".join(f'{key}="{value}"' for key, value in _labels(deployment).items())
        triggers.append(
            {
                "type": "prometheus",
                "metricType": "AverageValue",
                "metadata": {
                    "serverAddress": prometheus_url,
                    "query": f"sum({REQUESTS_METRIC}{{{selector}}})",
                    "threshold": str(target.requests_per_replica),
                },
            }
        )
    return child("keda.sh/v1alpha1", "ScaledObject", serving_name(deployment), deployment, "scaling") | {
        "spec": {
            "scaleTargetRef": _scale_target(deployment),
            "pollingInterval": KEDA_POLLING_SECONDS,
            "minReplicaCount": fewest(autoscaling),
            "maxReplicaCount": autoscaling.max_replicas,
            "triggers": triggers,
            **(
                {"advanced": {"horizontalPodAutoscalerConfig": {"behavior": ONE_BY_ONE}}}
                if has_parts(deployment)
                else {}
            ),
        }
    }


def replicas_patch(deployment: AdapterDeployment, replicas: int, at: str) -> Manifest:
    """Return the number of replicas and the time of the decision, for server-side apply with a separate field manager."""
    name, namespace = serving_name(deployment), deployment.metadata.namespace
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "namespace": namespace, "annotations": {SCALED_AT: at}},
        "spec": {"replicas": replicas},
    }


def let_go_patch(deployment: AdapterDeployment) -> Manifest:
    """Return the patch for a deployment that is no longer scaled.

    It gives up the number of replicas and deletes the time.
    """
    name, namespace = serving_name(deployment), deployment.metadata.namespace
    return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name, "namespace": namespace}}


SCALED_AT = "graft.dev/scaled-at"
