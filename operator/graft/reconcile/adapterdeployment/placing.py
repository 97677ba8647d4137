"""Decide where a deployment's replicas run: read the cluster's nodes and pass them to placement."""

from graft.api import AdapterDeployment
from graft.api.deploymentstatus import ServingSizing
from graft.placement import engine
from graft.placement.decide import DoesNotFit
from graft.reconcile.shared.access import Base, Trouble
from graft.reconcile.shared.context import Context
from graft.toolcalls import PARSERS


async def place_engine(ctx: Context, deployment: AdapterDeployment, base: Base) -> ServingSizing | Trouble:
    """Return the engine and the resources of a replica, or why it fits on no node, or why the engine cannot do what the
    spec wants.

    The present choice is kept while its inputs are unchanged, even if nodes are added or removed.
    """
    sizing = await _sizing(ctx, deployment, base)
    if isinstance(sizing, Trouble):
        return sizing
    missing = missing_image(sizing, ctx.settings.images.vllm)
    return missing or unknown_parser(deployment, sizing) or unknown_args(deployment, sizing) or sizing


def missing_image(sizing: ServingSizing, image: str) -> Trouble | None:
    """Return the trouble if the replicas need vLLM and this installation has no image of it."""
    if image or sizing.engine != "vllm":
        return None
    return Trouble(
        "EngineImageMissing",
        "the deployment needs the engine vllm, and this installation has no image of it. Ask your platform team to set "
        "images.vllm.repository in the values of Graft's chart. Or serve on CPUs: set spec.engine to transformers, and "
        "remove GPUs from spec.resources",
    )


def unknown_parser(deployment: AdapterDeployment, sizing: ServingSizing) -> Trouble | None:
    """Return the trouble if Graft's own engine lacks the parser. vLLM knows its own parsers, which differ by version."""
    name = deployment.spec.tool_call_parser
    if name is None or sizing.engine != "transformers" or name in PARSERS:
        return None
    return Trouble(
        "ToolCallParserUnknown",
        f"spec.toolCallParser {name} does not exist in the engine transformers. Use one of {', '.join(PARSERS)}, or "
        "spec.engine vllm, or remove the field",
    )


def unknown_args(deployment: AdapterDeployment, sizing: ServingSizing) -> Trouble | None:
    """Return the trouble if Graft's own engine would get flags of vLLM."""
    if not deployment.spec.engine_args or sizing.engine != "transformers":
        return None
    return Trouble(
        "EngineArgsUnknown",
        f"spec.engineArgs has {deployment.spec.engine_args[0]}, which the engine transformers does not have. Remove "
        "spec.engineArgs, or set spec.engine to vllm",
    )


async def _sizing(ctx: Context, deployment: AdapterDeployment, base: Base) -> ServingSizing | Trouble:
    facts, task, vllm = base.model.status.facts, base.model.spec.task, bool(ctx.settings.images.vllm)
    before, int4 = deployment.status.sizing, ctx.settings.vllm_int4
    basis = engine.basis_of(facts, deployment.spec, task=task, vllm=vllm)
    if before is not None and before.basis == basis and engine.can_load(before, int4=int4):
        return before
    nodes = await ctx.cache.list("Node")
    try:
        return engine.serving(facts, deployment.spec, task=task, nodes=nodes, vllm=vllm, int4=int4)
    except DoesNotFit as error:
        return Trouble("DoesNotFit", str(error))
