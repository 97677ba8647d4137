"""AdapterDeployment -> what scales and guards its pods: PodDisruptionBudget, HorizontalPodAutoscaler, or KEDA's ScaledObject."""

from graft.api import AdapterDeployment
from graft.api.adapterdeployment import Autoscaling, ScalingTarget
from graft.manifests.metadata import Manifest, child
from graft.manifests.serving import has_parts, pod_selector, serving_name

# Of the gateway: requests that it holds, or that run or wait in the engines. Counted there because the engines' own metrics are
# behind the NetworkPolicy, and do not know of the requests that a sleeping deployment keeps waiting.
REQUESTS_METRIC = "graft_gateway_deployment_in_flight"
KEDA_POLLING_SECONDS = 15
# For adapters on a part of the replicas: the two that have one must not go together, and the next needs time to load it.
ONE_BY_ONE: Manifest = {"scaleDown": {"policies": [{"type": "Pods", "value": 1, "periodSeconds": 60}]}}


def can_have_several(deployment: AdapterDeployment) -> bool:
    spec = deployment.spec
    return (spec.autoscaling.max_replicas if spec.autoscaling is not None else spec.replicas) > 1


def fewest(autoscaling: Autoscaling) -> int:
    """Replicas while it is awake; between 0 and 1 the operator decides, an autoscaler leaves 0 alone."""
    return max(1, autoscaling.min_replicas)


def disruption_budget(deployment: AdapterDeployment) -> Manifest:
    """One pod at a time may be drained. For several replicas only: with one it would block the drain of its node."""
    return child("policy/v1", "PodDisruptionBudget", serving_name(deployment), deployment, "scaling") | {
        "spec": {"maxUnavailable": 1, "selector": {"matchLabels": pod_selector(deployment)}}
    }


def autoscaler(deployment: AdapterDeployment) -> Manifest | None:
    """The object that moves the Deployment's replicas; None where there is nothing to move."""
    autoscaling = deployment.spec.autoscaling
    if autoscaling is None or autoscaling.target is None or deployment.spec.replicas == 0:
        return None
    if fewest(autoscaling) >= autoscaling.max_replicas:
        return None
    if autoscaling.provider == "keda":
        return _scaled_object(deployment, autoscaling, autoscaling.target)
    return _horizontal(deployment, autoscaling, autoscaling.target)


def _scale_target(deployment: AdapterDeployment) -> Manifest:
    return {"apiVersion": "apps/v1", "kind": "Deployment", "name": serving_name(deployment)}


def _labels(deployment: AdapterDeployment) -> dict[str, str]:
    return {"deployment_namespace": deployment.metadata.namespace, "deployment": deployment.metadata.name}


def _horizontal(deployment: AdapterDeployment, autoscaling: Autoscaling, target: ScalingTarget) -> Manifest:
    metrics: list[Manifest] = []
    if target.cpu_percent is not None:
        # Of the engine alone: the agent beside it does next to nothing.
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


def _scaled_object(deployment: AdapterDeployment, autoscaling: Autoscaling, target: ScalingTarget) -> Manifest:
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
                    "serverAddress": autoscaling.prometheus_url or "",
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
    """For server-side apply with a field manager of its own: the number, and when it was decided."""
    name, namespace = serving_name(deployment), deployment.metadata.namespace
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name, "namespace": namespace, "annotations": {SCALED_AT: at}},
        "spec": {"replicas": replicas},
    }


def let_go_patch(deployment: AdapterDeployment) -> Manifest:
    """The same, of a deployment that is not scaled any more: the number is somebody else's, and the time goes."""
    name, namespace = serving_name(deployment), deployment.metadata.namespace
    return {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name, "namespace": namespace}}


SCALED_AT = "graft.dev/scaled-at"
