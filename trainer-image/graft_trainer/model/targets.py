"""Which modules carry the low-rank update (PURE): presets and names against what the model has."""

import re
from dataclasses import dataclass

from graft.api.recipe import Lora
from graft.contracts.progress import Reason

from graft_trainer.run.failures import Failure

# What the blocks of transformers' models are called; the names of the projections themselves differ far more.
ATTENTION = re.compile(r"(^|\.)(\w*attn\w*|\w*attention\w*)$", re.IGNORECASE)
MLP = re.compile(
    r"(^|\.)(\w*mlp\w*|\w*ffn\w*|DenseReluDense|\w*feed_forward\w*|\w*ff|\w*expert\w*|\d+)$", re.IGNORECASE
)
ROUTERS = {"gate", "router", "score"}  # of mixtures of experts: too small to gain, and vLLM loads no update for them


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
    """The names for peft, sorted. Failure(ConfigurationInvalid) when a name is not there or the rank makes no sense.
    `embeddings` are the tables that the blocks read the tokens from.

    A leaf name is enough where it is the same module everywhere; where attention and MLP share one (GPT-2's c_proj) the
    parent's name goes before it.
    """
    useful = [item for item in projections if item.leaf not in ROUTERS]
    if lora.target_module_names is not None:
        chosen = _named(lora.target_module_names, projections + embeddings)
        names = sorted(set(lora.target_module_names))
    else:
        preset, plus, _ = (lora.target_modules or "all-linear").partition("+embeddings")
        chosen = _preset(preset, useful) + (embeddings if plus else [])
        names = sorted(_names(chosen, projections + embeddings))
    limit = max(min(item.inputs, item.outputs) for item in chosen)
    if lora.rank > limit:
        raise Failure(
            Reason.CONFIGURATION_INVALID,
            f"method.rank is {lora.rank}, more than the full rank of every target module ({limit})",
            f"Set the rank to less than {limit}; 8 to 64 is usual.",
        )
    return names


def _preset(preset: str, projections: list[Projection]) -> list[Projection]:
    attention = [item for item in projections if ATTENTION.search(item.parent)]
    mlp = [item for item in projections if not ATTENTION.search(item.parent) and MLP.search(item.parent)]
    # Blocks without an attention or MLP module of their own (OPT's fc1) count as MLP.
    rest = [item for item in projections if item not in attention and item not in mlp]
    chosen = {"attention": attention, "attention+mlp": attention + mlp, "all-linear": attention + mlp + rest}[preset]
    if not chosen:
        raise Failure(
            Reason.CONFIGURATION_INVALID,
            f"the preset {preset} finds no module in this model; {_there(projections)}",
            "Name the modules in targetModuleNames instead.",
        )
    return chosen


def _named(names: list[str], projections: list[Projection]) -> list[Projection]:
    def matches(item: Projection, name: str) -> bool:
        return item.name == name or item.name.endswith("." + name)

    missing = [name for name in names if not any(matches(item, name) for item in projections)]
    if missing:
        raise Failure(
            Reason.CONFIGURATION_INVALID,
            f"targetModuleNames: the model has no {', '.join(missing)}; {_there(projections)}",
            "Use names from that list, or a preset in targetModules.",
        )
    return [item for item in projections if any(matches(item, name) for name in names)]


def _names(chosen: list[Projection], projections: list[Projection]) -> set[str]:
    picked = {item.name for item in chosen}
    ambiguous = {item.leaf for item in projections if item.name not in picked}
    return {f"{item.parent.rpartition('.')[2]}.{item.leaf}" if item.leaf in ambiguous else item.leaf for item in chosen}


def _there(projections: list[Projection]) -> str:
    leaves = sorted({item.leaf for item in projections})
    return f"there are {', '.join(leaves)}" if leaves else "there is no linear module in its blocks"
