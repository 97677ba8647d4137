"""How much memory a training takes (PURE): bytes by what needs them, of one GPU, or of the process without one.

What is counted is the peak, at the end of a forward pass of a later micro-batch of a step: the weights, the gradients of
the micro-batches before, the optimizer's state, all activations and the logits are there at once.
"""

from dataclasses import dataclass
from typing import Literal

from graft.api.recipe import Method
from graft.placement.blocks import Geometry, adapter_parameters, linear_parameters, matrices

MIB, GIB = 2**20, 2**30
WIDTH = {"bf16": 2, "fp16": 2, "fp32": 4, "bfloat16": 2, "float16": 2, "float32": 4}  # bytes of a value

# AdamW keeps two moments in float32; with 8 bits one byte each and a float32 scale per block of 256 (Dettmers et al. 2022,
# 8-bit optimizers via block-wise quantization). Adafactor keeps a row and a column per matrix: next to nothing.
OPTIMIZER_BYTES = {"adamw": 8.0, "adamw8bit": 2 + 2 * 4 / 256, "adafactor": 0.05}

# A 4-bit weight has a float32 scale per 64; double quantization makes it 8 bits, with a float32 per 256 of those and one
# offset (Dettmers et al. 2023, QLoRA, section 3).
QUANT_BLOCK, SECOND_BLOCK = 64, 256

CUDA_CONTEXT = 700 * MIB  # the context, the kernels of torch and cuBLAS's workspaces
NCCL = GIB  # buffers of the channels between GPUs
FRAGMENTATION = 0.05  # of what is allocated: the caching allocator's blocks that are not full
CPU_RUNTIME = 1536 * MIB  # python with torch, transformers and the evaluation's libraries
CPU_FRAGMENTATION = 0.2  # malloc gives little back to the system


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


def training_memory(shape: Geometry, setup: Setup) -> dict[str, int]:
    """Bytes by name; names without a share are left out."""
    method, tokens = setup.method, setup.micro_batch * setup.length
    trained = trained_parameters(shape, setup)
    items: dict[str, float] = {}
    compute = compute_width(setup)
    if method.full is not None:
        # Float32 weights, and the 16-bit copy that autocast makes of them (Micikevicius et al. 2018); fsdp gathers 16 bits.
        items["weights"] = 4 * shape.parameters / setup.shards
        items["autocastCopies"] = compute * shape.parameters if compute < 4 and setup.sharding != "fsdp" else 0
    elif method.qlora is not None:
        linear = linear_parameters(shape)
        # peft holds what is not quantised in float32 (prepare_model_for_kbit_training).
        items["weights"] = linear / 2 + 4 * max(0, shape.parameters - linear)
        scales = linear / QUANT_BLOCK
        items["quantizationConstants"] = scales * (1 + 4 / SECOND_BLOCK) if method.qlora.double_quant else scales * 4
        items["dequantized"] = compute * max(item.inputs * item.outputs for item in matrices(shape))
    else:
        items["weights"] = WIDTH[setup.precision] * shape.parameters / setup.shards
    if method.full is None:
        items["adapter"] = 4 * trained / setup.shards
    items["gradients"] = 4 * trained / setup.shards
    items["optimizer"] = OPTIMIZER_BYTES[setup.optim] * trained / setup.shards
    if setup.sharding == "fsdp":
        # One block is whole while it is computed, the next is on its way; embeddings and head are whole all the time.
        items["gathered"] = compute * (2 * shape.largest_block + shape.embeddings)
    elif setup.world > 1:
        items["gradientBuckets"] = 4 * trained
    items["activations"] = tokens * activation_bytes(shape, setup)
    items["logits"] = tokens * logit_bytes(shape)
    used = sum(items.values())
    if setup.device == "cuda":
        items["framework"] = CUDA_CONTEXT + (NCCL if setup.world > 1 else 0) + FRAGMENTATION * used
    else:
        items["framework"] = CPU_RUNTIME + CPU_FRAGMENTATION * used
    return {name: round(value) for name, value in items.items() if round(value) > 0}


def trained_parameters(shape: Geometry, setup: Setup) -> int:
    """Parameters that get a gradient."""
    method = setup.method
    if method.low_rank is not None:
        return adapter_parameters(shape, method.low_rank)
    if method.prompt_tuning is not None:
        return method.prompt_tuning.virtual_tokens * shape.hidden
    return shape.parameters


def compute_width(setup: Setup) -> int:
    """Bytes of a value in the matrix products."""
    qlora = setup.method.qlora
    return WIDTH[qlora.compute_dtype] if qlora is not None and qlora.compute_dtype else WIDTH[setup.precision]


def logit_bytes(shape: Geometry) -> float:
    """Bytes per token of the head's end: float32 log-probabilities, their gradient and that of the logits."""
    return 3 * 4 * shape.vocab


def activation_bytes(shape: Geometry, setup: Setup) -> float:
    """Bytes per token that the backward pass needs of the forward pass.

    With checkpointing (Chen et al. 2016) the input of each block, and all of the block that is being computed again.
    """
    blocks = shape.layers + shape.encoder_layers
    block = block_activations(shape, setup)
    if not setup.checkpointing:
        return blocks * block
    return blocks * residual_width(setup) * shape.hidden + block


def residual_width(setup: Setup) -> int:
    """Bytes of a value between the blocks: float32 where the embeddings are, although the products are in 16 bits."""
    if setup.method.full is not None or setup.method.qlora is not None:
        return 4
    return WIDTH[setup.precision]


def block_activations(shape: Geometry, setup: Setup) -> float:
    """Bytes per token of what one block keeps for its backward pass, counted as in Korthikanti et al. 2022, section 4.1,
    for blocks of today: RMSNorm computed in float32, sdpa that keeps no attention scores, a gated MLP.

    A linear layer whose weights are trained, or that has an update, keeps its input; in mixed precision each keeps a
    16-bit copy of its own. Frozen ones keep nothing.
    """
    compute, residual, method = compute_width(setup), residual_width(setup), setup.method
    hidden, inner = shape.hidden, shape.inner * shape.active_experts
    wide, narrow = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    lora = method.low_rank
    mlp_inputs = method.full is not None or (lora is not None and lora.target_modules != "attention")
    attention_inputs = method.prompt_tuning is None
    crossing = shape.layers / (shape.layers + shape.encoder_layers) if shape.encoder_layers else 0

    mixed = compute < 4  # each layer casts its input for itself
    norm = 4 * hidden + (residual * hidden if method.full is not None else 0)
    shared = 0 if mixed else 4 * hidden  # without casts the layers after a norm keep the same tensor
    attention = norm + compute * (wide + 2 * narrow) + compute * wide + 4 * shape.heads
    if shape.kv_heads < shape.heads:
        attention += compute * 2 * (wide - narrow)  # keys and values are repeated for each query head
    if attention_inputs:
        attention += 3 * compute * hidden if mixed else shared
        if mixed and lora is not None:
            attention += compute * wide  # of the output projection, whose input sdpa keeps in another tensor
    gates = 3 if shape.gated else 1
    mlp = norm + compute * gates * inner
    if mlp_inputs:
        mlp += (2 if shape.gated else 1) * compute * hidden if mixed else shared
        mlp += compute * inner
    if lora is not None and lora.dropout > 0:
        mlp += (compute + 1) * (3 * hidden + wide + (2 * hidden + inner if mlp_inputs else 0))
    mask = setup.length * compute  # what sdpa adds to the scores: a row per token
    return attention * (1 + crossing) + mlp + mask


def loaded_bytes(shape: Geometry, setup: Setup) -> int:
    """Bytes of the whole model as it is loaded, before it is quantised or spread."""
    return shape.parameters * (4 if setup.method.full is not None else WIDTH[setup.precision])
