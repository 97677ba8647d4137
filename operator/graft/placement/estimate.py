"""How much memory a training takes (PURE): bytes by what needs them, of one GPU, or of the process without one.

What is counted is the peak, at the end of a forward pass of a later micro-batch of a step: the weights, the gradients of
the micro-batches before, the optimizer's state, all activations and the logits are there at once.
"""

from graft.placement.activations import WIDTH, Setup, activation_bytes, compute_width, logit_bytes
from graft.placement.blocks import Geometry, adapter_parameters, linear_parameters, matrices

MIB, GIB = 2**20, 2**30

# AdamW keeps two moments in float32; with 8 bits one byte each and a float32 scale per block of 256 (Dettmers et al. 2022,
# 8-bit optimizers via block-wise quantization). Adafactor keeps a row and a column per matrix: next to nothing.
OPTIMIZER_BYTES = {"adamw": 8.0, "adamw8bit": 2 + 2 * 4 / 256, "adafactor": 0.05}

# A 4-bit weight has a float32 scale per 64; double quantization makes it 8 bits, with a float32 per 256 of those and one
# offset (Dettmers et al. 2023, QLoRA, section 3).
QUANT_BLOCK, SECOND_BLOCK = 64, 256

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}

CUDA_CONTEXT = 700 * MIB  # the context, the kernels of torch and cuBLAS's workspaces
NCCL = GIB  # buffers of the channels between GPUs
FRAGMENTATION = 0.05  # of what is allocated: the caching allocator's blocks that are not full
CPU_RUNTIME = 1536 * MIB  # python with torch, transformers and the evaluation's libraries
CPU_FRAGMENTATION = 0.2  # malloc gives little back to the system


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
    items["logits"] = tokens * logit_bytes(shape, setup)
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


def loaded_bytes(shape: Geometry, setup: Setup) -> int:
    """Bytes of host memory that the weights take in a pod while they are loaded.

    A process maps the files, which all share, and hands the weights to its GPU one by one; with fsdp the first process of the
    run holds the whole model first, and deals it out.
    """
    dtype = "float32" if setup.method.full is not None else DTYPES[setup.precision]
    return shape.parameters * WIDTH[dtype]
