"""Choose the modules that get the low-rank update (PURE): match presets and names with the model's modules."""

import re
from collections.abc import Collection
from dataclasses import dataclass

from graft.api.recipe import Lora, QLora
from graft.artifacts.modulenames import shortest_names
from graft.contracts.progress import Reason

from graft_trainer.run.failures import Failure

# Names of attention and MLP modules in transformers' models. The names of the projections themselves differ far more.
ATTENTION = re.compile(r"(^|\.)(\w*attn\w*|\w*attention\w*)$", re.IGNORECASE)
MLP = re.compile(
    r"(^|\.)(\w*mlp\w*|\w*ffn\w*|DenseReluDense|\w*feed_forward\w*|\w*ff|\w*expert\w*|\d+)$", re.IGNORECASE
)
# The routers of mixtures of experts, or the modules around them: too small to benefit from an update, and vLLM loads no
# update for them. Some families read their weights without calling the module, so that an update has no effect. The same
# holds for Gemma 3n's altup, which mixes four copies of the tokens' values.
ROUTERS = {"gate", "router", "score", "altup"}


@dataclass(frozen=True)
class Projection:
    """A linear module inside the blocks, or a table of token embeddings: its full name and its shape.

    `bypassed`: its block passes the weights to a kernel instead of calling the module, so that an update has no effect
    there (the output of a state-space mixer).
    """

    name: str
    inputs: int
    outputs: int
    bypassed: bool = False

    @property
    def leaf(self) -> str:
        return self.name.rpartition(".")[2]

    @property
    def parent(self) -> str:
        return self.name.rpartition(".")[0]


@dataclass(frozen=True)
class Stacked:
    """The experts of a mixture, which transformers holds as stacked matrices instead of linear modules."""

    names: list[str]  # the last parts of the names of the parameters, or of the modules that have nothing else
    parameters: int


def target_modules(
    lora: Lora,
    projections: list[Projection],
    embeddings: list[Projection],
    everything: Collection[str] = (),
    stacked: Stacked | None = None,
) -> list[str]:
    """Return the module names for peft, sorted. `embeddings` are the tables from which the blocks read the tokens, and
    `everything` are the names of all modules, those of a vision tower included. Raises Failure(ConfigurationInvalid) if
    a name does not exist or the rank is too high.

    A leaf name is enough if it stands for the same module everywhere. If attention and MLP share a leaf name (GPT-2's
    c_proj), the parent's name is put before it. If a vision tower has the same names, the whole names are returned.
    """
    where = _where(lora)
    if lora.target_module_names is not None:
        _refuse_stacked(lora.target_module_names, stacked, where)
        chosen = _named(lora.target_module_names, projections + embeddings, where)
    else:
        preset, plus, _ = (lora.target_modules or "all-linear").partition("+embeddings")
        chosen = _preset(preset, [item for item in projections if _useful(item)], where) + (embeddings if plus else [])
    limit = max(min(item.inputs, item.outputs) for item in chosen)
    if lora.rank > limit:
        raise Failure(
            Reason.CONFIGURATION_INVALID,
            f"{where}.rank is {lora.rank}, more than the full rank of every target module ({limit})",
            f"Set {where}.rank to at most {limit}; 8 to 64 is usual.",
        )
    known = everything or [item.name for item in projections + embeddings]
    return shortest_names((item.name for item in chosen), known)


def unreached(lora: Lora, stacked: Stacked | None, parameters: int) -> str | None:
    """Return what a preset does not reach, in words, or None. `parameters` are those of the whole model."""
    if stacked is None or lora.target_module_names is not None or lora.target_modules == "attention":
        return None
    where, share = _where(lora), 100 * stacked.parameters / max(1, parameters)
    return (
        f"{where}.targetModules: no preset reaches the experts of this mixture ({', '.join(stacked.names)}: {share:.0f} % of "
        "the parameters). They are stacked matrices, for which Graft trains no low-rank update. Method full trains them."
    )


def _useful(item: Projection) -> bool:
    """Return whether a preset takes the module: an update must have an effect, and rank 1 is no update."""
    router = item.leaf in ROUTERS or item.parent.rpartition(".")[2] in ROUTERS
    return not router and not item.bypassed and min(item.inputs, item.outputs) > 1


def _where(lora: Lora) -> str:
    return f"spec.method.{'qlora' if isinstance(lora, QLora) else 'lora'}"


def _preset(preset: str, projections: list[Projection], where: str) -> list[Projection]:
    attention = [item for item in projections if ATTENTION.search(item.parent)]
    mlp = [item for item in projections if not ATTENTION.search(item.parent) and MLP.search(item.parent)]
    # Projections directly in a block (OPT's fc1) count as MLP: MLP matches the number of the block.
    rest = [item for item in projections if item not in attention and item not in mlp]
    chosen = {"attention": attention, "attention+mlp": attention + mlp, "all-linear": attention + mlp + rest}[preset]
    if not chosen:
        raise Failure(
            Reason.CONFIGURATION_INVALID,
            f"{where}.targetModules is {preset}, which matches no module of this model; {_leaves(projections)}",
            f"Name the modules in {where}.targetModuleNames instead.",
        )
    return chosen


def _named(names: list[str], projections: list[Projection], where: str) -> list[Projection]:
    def matches(item: Projection, name: str) -> bool:
        return item.name == name or item.name.endswith("." + name)

    missing = [name for name in names if not any(matches(item, name) for item in projections)]
    if missing:
        raise Failure(
            Reason.CONFIGURATION_INVALID,
            f"{where}.targetModuleNames: the model has no {', '.join(missing)}; {_leaves(projections)}",
            f"Use names from this list, or use a preset in {where}.targetModules instead.",
        )
    return [item for item in projections if any(matches(item, name) for name in names)]


def _refuse_stacked(names: list[str], stacked: Stacked | None, where: str) -> None:
    experts = set(stacked.names) if stacked is not None else set()
    if found := [name for name in names if name.rpartition(".")[2] in experts | {"experts"} and experts]:
        raise Failure(
            Reason.CONFIGURATION_INVALID,
            f"{where}.targetModuleNames: {', '.join(found)} would mean the experts of this mixture. They are stacked matrices, "
            "for which Graft trains no low-rank update",
            f"Leave them out of {where}.targetModuleNames, or use method full, which trains them.",
        )


def _leaves(projections: list[Projection]) -> str:
    leaves = sorted({item.leaf for item in projections})
    return f"it has {', '.join(leaves)}" if leaves else "its blocks have no linear module"
