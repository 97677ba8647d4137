"""What the backward pass needs of the forward pass (PURE): bytes per token, by what the kernels of today keep.

Counted as in Korthikanti et al. 2022, section 4.1, for RMSNorm computed in float32, sdpa that keeps no attention scores, and
gated MLPs; where an architecture's code in transformers keeps more, that is said here, too.
"""

from dataclasses import dataclass
from typing import Literal

from graft.api.recipe import Method
from graft.placement.blocks import Geometry

WIDTH = {"bf16": 2, "fp16": 2, "fp32": 4, "bfloat16": 2, "float16": 2, "float32": 4}  # bytes of a value
GRADIENTS_OF_A_BLOCK = 0.5  # of what a block keeps for its backward pass is there once more as gradients

# GELU by its formula (gelu_new): a power, a tanh and their products are tensors of their own. T5's only with a gate.
GELU_BY_FORMULA = ("GPT2", "T5", "MT5", "PhiForCausalLM")
POSITION_BIAS = ("T5", "MT5")  # learned, so what is added to the scores has a gradient and is kept at every attention
ATTENTION_DROPOUT = (
    "GPT2",
    "T5",
    "MT5",
)  # of 0.1 by default; the kernel for CPUs then computes the scores step by step
SOFT_CAPS = ("Gemma2",)  # on the scores, which no fused kernel does


@dataclass(frozen=True)
class Setup:
    """What the memory of a run depends on beside the model."""

    method: Method
    precision: Literal["bf16", "fp16", "fp32"]
    length: int  # tokens of the longest sequence; of the source and of the target each for seq2seq
    micro_batch: int = 1
    checkpointing: bool = False
    optim: str = "adamw"
    device: Literal["cuda", "cpu"] = "cuda"
    world: int = 1  # processes
    sharding: Literal["ddp", "fsdp"] | None = None

    @property
    def shards(self) -> int:
        """Over how many processes weights, gradients and optimizer states are spread."""
        return self.world if self.sharding == "fsdp" else 1


def compute_width(setup: Setup) -> int:
    """Bytes of a value in the matrix products."""
    qlora = setup.method.qlora
    return WIDTH[qlora.compute_dtype] if qlora is not None and qlora.compute_dtype else WIDTH[setup.precision]


def logit_bytes(shape: Geometry, setup: Setup) -> float:
    """Bytes per token of the head's end: float32 log-probabilities, their gradient and that of the logits; in mixed
    precision the 16-bit logits, too."""
    return (3 * 4 + (2 if compute_width(setup) < 4 else 0)) * shape.vocab


def activation_bytes(shape: Geometry, setup: Setup) -> float:
    """Bytes per token that the backward pass needs of the forward pass.

    With checkpointing (Chen et al. 2016) the input of each block, and all of the block that is being computed again. The
    gradients inside of a block take half of what it keeps; by then the logits are gone, so only what is more than those
    counts.
    """
    blocks = shape.layers + shape.encoder_layers
    block, logits = block_activations(shape, setup), logit_bytes(shape, setup)
    # The encoder's and the decoder's bias of positions, which their blocks share.
    once = 2 * 4 * shape.heads * setup.length if shape.architecture.startswith(POSITION_BIAS) else 0
    if not setup.checkpointing:
        return once + blocks * block + max(0.0, GRADIENTS_OF_A_BLOCK * block - logits)
    inputs = blocks * residual_width(setup) * shape.hidden
    return once + inputs + max(0.0, (1 + GRADIENTS_OF_A_BLOCK) * block - logits)


def residual_width(setup: Setup) -> int:
    """Bytes of a value between the blocks: float32 where the embeddings are, although the products are in 16 bits."""
    if setup.method.full is not None or setup.method.qlora is not None:
        return 4
    return WIDTH[setup.precision]


def block_activations(shape: Geometry, setup: Setup) -> float:
    """Bytes per token of what one block keeps.

    A linear layer whose weights are trained, or that has an update, keeps its input; in mixed precision each keeps a
    16-bit copy of its own. Frozen ones keep nothing.
    """
    attentions = 1 + shape.layers / (shape.layers + shape.encoder_layers) if shape.encoder_layers else 1
    return attentions * _attention(shape, setup) + _mlp(shape, setup)


def _norm(shape: Geometry, setup: Setup) -> float:
    """The input in float32, and what the norm's own weights are multiplied with where they are trained."""
    return 4 * shape.hidden + (residual_width(setup) * shape.hidden if setup.method.full is not None else 0)


def _inputs(shape: Geometry, setup: Setup, layers: int) -> float:
    """The inputs of `layers` linear layers behind one norm; without casts they share one tensor."""
    compute = compute_width(setup)
    return layers * compute * shape.hidden if compute < 4 else compute * shape.hidden


def _dropout(setup: Setup, inputs: int) -> float:
    """Of low-rank updates: what is left of their inputs, and the mask."""
    lora = setup.method.low_rank
    return (compute_width(setup) + 1) * inputs if lora is not None and lora.dropout > 0 else 0


def _attention(shape: Geometry, setup: Setup) -> float:
    compute, lora = compute_width(setup), setup.method.low_rank
    wide = shape.heads * shape.head_dim
    # Queries, keys, values and output; keys and values are repeated for each query head where they are fewer.
    kept = _norm(shape, setup) + 4 * compute * wide + 4 * shape.heads + _scores(shape, setup)
    if setup.method.prompt_tuning is None:
        kept += _inputs(shape, setup, 3) + _dropout(setup, 3 * shape.hidden + wide)
        if compute < 4 and lora is not None:
            kept += compute * wide  # of the output projection, whose input sdpa keeps in another tensor
    return kept


def _scores(shape: Geometry, setup: Setup) -> float:
    """What is as wide as the sequence is long: the mask, a row per token, and the scores of the heads where they are kept."""
    compute, row = compute_width(setup), shape.heads * setup.length
    kept = setup.length * compute
    if shape.architecture.startswith(POSITION_BIAS):
        kept += compute * row
    if shape.architecture.startswith(SOFT_CAPS):
        return kept + (2 * compute + 4) * row
    if setup.device == "cpu" and shape.architecture.startswith(ATTENTION_DROPOUT):
        # The softmax, its mask of one byte and what is left, beside queries and keys that were scaled; all in float32.
        return kept + (2 * 4 + 1) * row + 2 * 4 * shape.heads * shape.head_dim
    return kept


def _mlp(shape: Geometry, setup: Setup) -> float:
    compute, lora = compute_width(setup), setup.method.low_rank
    inner, gates = shape.inner * shape.active_experts, 3 if shape.gated else 1
    # bitsandbytes gives its products the type of their input, which is float32 behind a norm in float32.
    kept = _norm(shape, setup) + (residual_width(setup) if setup.method.qlora is not None else compute) * gates * inner
    if shape.architecture.startswith(GELU_BY_FORMULA) and (shape.gated or not shape.encoder_layers):
        kept += 3 * 4 * inner
    if setup.method.full is not None or (lora is not None and lora.target_modules != "attention"):
        kept += _inputs(shape, setup, 2 if shape.gated else 1) + compute * inner
        kept += _dropout(setup, 2 * shape.hidden + inner)
    return kept
