"""The matrices of a model's transformer blocks, derived from its facts: which are quantised, and which get a low-rank
update."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from graft.api.basemodel import ModelFacts
from graft.api.recipe import Lora


class FactsMissing(Exception):
    """The facts do not suffice for an estimate. `names` are the missing facts, named as in spec.facts."""

    def __init__(self, names: list[str]) -> None:
        super().__init__(", ".join(names))
        self.names = names


@dataclass(frozen=True)
class Geometry:
    """The facts that every estimate needs, all present. Sizes are numbers of values."""

    parameters: int
    layers: int  # of the decoder
    encoder_layers: int
    hidden: int
    inner: int  # of one expert
    gated: bool
    heads: int
    kv_heads: int
    head_dim: int
    experts: int
    active_experts: int
    vocab: int
    tied: bool
    architecture: str
    dtype: str  # of the weights in the files

    @property
    def embeddings(self) -> int:
        """Values of the token embeddings and, if it is not tied to them, of the output head."""
        return self.vocab * self.hidden * (1 if self.tied else 2)

    @property
    def largest_block(self) -> int:
        """Values of one block, the unit that fully sharded training gathers."""
        return (self.parameters - self.embeddings) // (self.layers + self.encoder_layers)


@dataclass(frozen=True)
class Matrix:
    """`count` matrices with the same part and the same shape."""

    part: Literal["attention", "mlp", "experts", "router"]
    inputs: int
    outputs: int
    count: int


def geometry(facts: ModelFacts) -> Geometry:
    """Return the facts, with the derivable ones filled in. Raises FactsMissing if a required fact is missing.

    Other unknown facts get the values of most current decoders: as many key heads as query heads, a gated MLP of 8/3
    the width (Shazeer 2020), and an output head that is not tied to the embeddings.
    """
    needed = ("parameters", "layers", "hiddenSize", "vocabSize")
    known = facts.wire()
    if missing := [name for name in needed if name not in known]:
        raise FactsMissing(missing)
    parameters, layers, hidden, vocab = (int(known[name]) for name in needed)
    gated = True if facts.gated_mlp is None else facts.gated_mlp
    heads = facts.heads or max(1, hidden // 128)
    return Geometry(
        parameters=parameters,
        layers=layers,
        encoder_layers=facts.encoder_layers or 0,
        hidden=hidden,
        inner=facts.intermediate_size or (8 * hidden // 3 if gated else 4 * hidden),
        gated=gated,
        heads=heads,
        kv_heads=facts.kv_heads or heads,
        head_dim=facts.head_dim or max(1, hidden // heads),
        experts=facts.experts or 1,
        active_experts=facts.experts_per_token or 1,
        vocab=vocab,
        tied=bool(facts.tied_embeddings),
        architecture=facts.architecture or "",
        dtype=facts.dtype or "",
    )


def matrices(shape: Geometry) -> Iterator[Matrix]:
    """Yield the matrices of all blocks. If there is an encoder, the decoder has cross-attention too."""
    blocks = shape.layers + shape.encoder_layers
    attentions = blocks + (shape.layers if shape.encoder_layers else 0)
    wide, narrow = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    yield Matrix("attention", shape.hidden, wide, attentions)
    yield Matrix("attention", shape.hidden, narrow, 2 * attentions)
    yield Matrix("attention", wide, shape.hidden, attentions)
    part: Literal["mlp", "experts"] = "experts" if shape.experts > 1 else "mlp"
    yield Matrix(part, shape.hidden, shape.inner, (2 if shape.gated else 1) * blocks * shape.experts)
    yield Matrix(part, shape.inner, shape.hidden, blocks * shape.experts)
    if shape.experts > 1:
        yield Matrix("router", shape.hidden, shape.experts, blocks)


def linear_parameters(shape: Geometry) -> int:
    """Return the number of values in the blocks' linear layers. bitsandbytes holds these in 4 bits.

    Experts are not counted: transformers keeps the experts of a block in one tensor, which is not a linear layer.
    """
    return sum(item.inputs * item.outputs * item.count for item in matrices(shape) if item.part in {"attention", "mlp"})


def adapter_parameters(shape: Geometry, lora: Lora) -> int:
    """Return the number of values in A and B of all targets: rank x (inputs + outputs) each (Hu et al. 2021).

    If the spec names single modules, all linear layers are counted, because module names differ between architectures.
    """
    parts = {"attention"} if lora.target_modules == "attention" else {"attention", "mlp"}
    blocks = sum((item.inputs + item.outputs) * item.count for item in matrices(shape) if item.part in parts)
    embeddings = shape.vocab + shape.hidden if lora.target_modules == "all-linear+embeddings" else 0
    return lora.rank * (blocks + embeddings)
