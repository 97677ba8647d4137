"""The memory that the forward pass keeps for the backward pass (PURE), in bytes per token, with current kernels.

Counted as in Korthikanti et al. 2022, section 4.1, for RMSNorm computed in float32, sdpa that keeps no attention
scores, and gated MLPs. Architectures whose code in transformers keeps more are listed here.
"""

from dataclasses import dataclass
from typing import Literal

from graft.api.recipe import Method
from graft.placement.blocks import Geometry

WIDTH = {"bf16": 2, "fp16": 2, "fp32": 4, "bfloat16": 2, "float16": 2, "float32": 4}  # bytes of a value
GRADIENTS_OF_A_BLOCK = 0.5  # gradients inside a block, as a share of what the block keeps for its backward pass

# These compute GELU by its formula (gelu_new): a power, a tanh and their products are separate tensors. T5 only with a
# gate.
GELU_BY_FORMULA = ("GPT2", "T5", "MT5", "PhiForCausalLM")
POSITION_BIAS = ("T5", "MT5")  # learned: the term added to the scores has a gradient, so every attention keeps it
ATTENTION_DROPOUT = (
    "GPT2",
    "T5",
    "MT5",
)  # 0.1 by default; the CPU kernel then computes the scores step by step
SOFT_CAPS = ("Gemma2",)  # soft caps on the scores, which no fused kernel supports


@dataclass(frozen=True)
class Setup:
    """The settings that a run's memory depends on, besides the model."""

    method: Method
    precision: Literal["bf16", "fp16", "fp32"]
    length: int  # tokens of the longest sequence; for seq2seq, of the source and of the target each
    micro_batch: int = 1
    checkpointing: bool = False
    optim: str = "adamw"
    device: Literal["cuda", "cpu"] = "cuda"
    world: int = 1  # processes
    sharding: Literal["ddp", "fsdp"] | None = None

    @property
    def shards(self) -> int:
        """The number of processes over which weights, gradients and optimizer states are sharded."""
        return self.world if self.sharding == "fsdp" else 1


def compute_width(setup: Setup) -> int:
    """Return the bytes of a value in the matrix products."""
    qlora = setup.method.qlora
    return WIDTH[qlora.compute_dtype] if qlora is not None and qlora.compute_dtype else WIDTH[setup.precision]


def logit_bytes(shape: Geometry, setup: Setup) -> float:
    """Return the bytes per token after the output head.

    These are float32 log-probabilities, their gradient and the gradient of the logits. Mixed precision adds 16-bit
    logits.
    """
    return (3 * 4 + (2 if compute_width(setup) < 4 else 0)) * shape.vocab


def activation_bytes(shape: Geometry, setup: Setup) -> float:
    """Return the bytes per token that the forward pass keeps for the backward pass.

    With checkpointing (Chen et al. 2016), these are the input of each block and everything in the one block that is
    recomputed. The gradients inside a block take half of what the block keeps. At that time the logits are already
    freed, so only the part that exceeds the logits counts.
    """
    blocks = shape.layers + shape.encoder_layers
    block, logits = block_activations(shape, setup), logit_bytes(shape, setup)
    # The position biases of encoder and decoder. All blocks of each share one.
    once = 2 * 4 * shape.heads * setup.length if shape.architecture.startswith(POSITION_BIAS) else 0
    if not setup.checkpointing:
        return once + blocks * block + max(0.0, GRADIENTS_OF_A_BLOCK * block - logits)
    inputs = blocks * residual_width(setup) * shape.hidden
    return once + inputs + max(0.0, (1 + GRADIENTS_OF_A_BLOCK) * block - logits)


def residual_width(setup: Setup) -> int:
    """Return the bytes of a value between the blocks: float32 if the embeddings are, even with matrix products in 16
    bits."""
    if setup.method.full is not None or setup.method.qlora is not None:
        return 4
    return WIDTH[setup.precision]


def block_activations(shape: Geometry, setup: Setup) -> float:
    """Return the bytes per token that one block keeps.

    A linear layer keeps its input if its weights are trained or if it has a low-rank update. In mixed precision, each
    such layer keeps its own 16-bit copy. Frozen layers keep nothing.
    """
    attentions = 1 + shape.layers / (shape.layers + shape.encoder_layers) if shape.encoder_layers else 1
    return attentions * _attention(shape, setup) + _mlp(shape, setup)


def _norm(shape: Geometry, setup: Setup) -> float:
    """Return the bytes of the input in float32 and, if the norm's weights are trained, of the values that they
    multiply."""
    return 4 * shape.hidden + (residual_width(setup) * shape.hidden if setup.method.full is not None else 0)


def _inputs(shape: Geometry, setup: Setup, layers: int) -> float:
    """Return the bytes of the inputs of `layers` linear layers after one norm. Without casts, they share one tensor."""
    compute = compute_width(setup)
    return layers * compute * shape.hidden if compute < 4 else compute * shape.hidden


def _dropout(setup: Setup, inputs: int) -> float:
    """Return the bytes of the dropout in low-rank updates: the inputs after dropout, and the mask."""
    lora = setup.method.low_rank
    return (compute_width(setup) + 1) * inputs if lora is not None and lora.dropout > 0 else 0


def _attention(shape: Geometry, setup: Setup) -> float:
    compute, lora = compute_width(setup), setup.method.low_rank
    wide = shape.heads * shape.head_dim
    # Queries, keys, values and output. If there are fewer key and value heads, they are repeated for each query head.
    kept = _norm(shape, setup) + 4 * compute * wide + 4 * shape.heads + _scores(shape, setup)
    if setup.method.prompt_tuning is None:
        kept += _inputs(shape, setup, 3) + _dropout(setup, 3 * shape.hidden + wide)
        if compute < 4 and lora is not None:
            kept += compute * wide  # input of the output projection; sdpa keeps it in another tensor
    return kept


def _scores(shape: Geometry, setup: Setup) -> float:
    """Return the bytes per token that grow with the sequence length: the mask, and the heads' scores if they are kept."""
    compute, row = compute_width(setup), shape.heads * setup.length
    kept = setup.length * compute
    if shape.architecture.startswith(POSITION_BIAS):
        kept += compute * row
    if shape.architecture.startswith(SOFT_CAPS):
        return kept + (2 * compute + 4) * row
    if setup.device == "cpu" and shape.architecture.startswith(ATTENTION_DROPOUT):
        # In float32: the softmax, the result of dropout, the scaled queries and the scaled keys. The dropout mask has
        # one byte.
        return kept + (2 * 4 + 1) * row + 2 * 4 * shape.heads * shape.head_dim
    return kept


def _mlp(shape: Geometry, setup: Setup) -> float:
    compute, lora = compute_width(setup), setup.method.low_rank
    inner, gates = shape.inner * shape.active_experts, 3 if shape.gated else 1
    # bitsandbytes returns products in the type of the input. After a norm in float32, that is float32.
    kept = _norm(shape, setup) + (residual_width(setup) if setup.method.qlora is not None else compute) * gates * inner
    if shape.architecture.startswith(GELU_BY_FORMULA) and (shape.gated or not shape.encoder_layers):
        kept += 3 * 4 * inner
    if setup.method.full is not None or (lora is not None and lora.target_modules != "attention"):
        kept += _inputs(shape, setup, 2 if shape.gated else 1) + compute * inner
        kept += _dropout(setup, 2 * shape.hidden + inner)
    return kept
