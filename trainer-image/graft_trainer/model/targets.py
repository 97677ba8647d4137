"""Choose the modules that get the low-rank update (PURE): match presets and names with the model's modules."""

import re
from dataclasses import dataclass

from graft.api.recipe import Lora, QLora
from graft.contracts.progress import Reason

from graft_trainer.run.failures import Failure

# Names of attention and MLP modules in transformers' models. The names of the projections themselves differ far more.
ATTENTION = re.compile(r"(^|\.)(\w*attn\w*|\w*attention\w*)$", re.IGNORECASE)
MLP = re.compile(
    r"(^|\.)(\w*mlp\w*|\w*ffn\w*|DenseReluDense|\w*feed_forward\w*|\w*ff|\w*expert\w*|\d+)$", re.IGNORECASE
)
# The routers of mixtures of experts: too small to benefit from an update, and vLLM loads no update for them.
ROUTERS = {"gate", "router", "score"}


@dataclass(frozen=True)
class Projection:
    """A linear module inside the blocks, or a table of token embeddings: its full name and its shape."""

    name: str
    inputs: int
    outputs: int

    @property
    def leaf(self) -> str:
        return self.name.rpartition(".")[2]

    @property
    def parent(self) -> str:
        return self.name.rpartition(".")[0]


def target_modules(lora: Lora, projections: list[Projection], embeddings: list[Projection]) -> list[str]:
    """Return the module names for peft, sorted. `embeddings` are the tables from which the blocks read the tokens.
    Raises Failure(ConfigurationInvalid) if a name does not exist or the rank is too high.

    A leaf name is enough if it stands for the same module everywhere. If attention and MLP share a leaf name (GPT-2's
    c_proj), the parent's name is put before it.
    """
    where = f"spec.method.{'qlora' if isinstance(lora, QLora) else 'lora'}"
    useful = [item for item in projections if item.leaf not in ROUTERS]
    if lora.target_module_names is not None:
        chosen = _named(lora.target_module_names, projections + embeddings, where)
        names = sorted(set(lora.target_module_names))
    else:
        preset, plus, _ = (lora.target_modules or "all-linear").partition("+embeddings")
        chosen = _preset(preset, useful, where) + (embeddings if plus else [])
        names = sorted(_names(chosen, projections + embeddings))
    limit = max(min(item.inputs, item.outputs) for item in chosen)
    if lora.rank > limit:
        raise Failure(
            Reason.CONFIGURATION_INVALID,
            f"{where}.rank is {lora.rank}, more than the full rank of every target module ({limit})",
            f"Set {where}.rank to at most {limit}; 8 to 64 is usual.",
        )
    return names


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


def _names(chosen: list[Projection], projections: list[Projection]) -> set[str]:
    picked = {item.name for item in chosen}
    ambiguous = {item.leaf for item in projections if item.name not in picked}
    return {f"{item.parent.rpartition('.')[2]}.{item.leaf}" if item.leaf in ambiguous else item.leaf for item in chosen}


def _leaves(projections: list[Projection]) -> str:
    leaves = sorted({item.leaf for item in projections})
    return f"it has {', '.join(leaves)}" if leaves else "its blocks have no linear module"
