"""The memory of a training (PURE): bytes by purpose, of one GPU, or of the process on a CPU.

The estimate is the peak: the end of the forward pass of the second or a later micro-batch of a step. At that time the
weights, the gradients of the earlier micro-batches, the optimizer's state, all activations and the logits exist at
once.
"""

from graft.placement.activations import WIDTH, Setup, activation_bytes, compute_width, logit_bytes
from graft.placement.blocks import Geometry, adapter_parameters, linear_parameters, matrices

MIB, GIB = 2**20, 2**30

# Bytes per trained parameter. AdamW keeps two moments in float32. With 8 bits, each moment takes one byte, and a block
# of 256 has a float32 scale (Dettmers et al. 2022, 8-bit optimizers via block-wise quantization). Adafactor keeps one
# row and one column per matrix, which is nearly nothing.
OPTIMIZER_BYTES = {"adamw": 8.0, "adamw8bit": 2 + 2 * 4 / 256, "adafactor": 0.05}

# 4-bit weights have one float32 scale per 64 weights. Double quantization stores these scales in 8 bits, with one
# float32 per 256 scales and one offset (Dettmers et al. 2023, QLoRA, section 3).
QUANT_BLOCK, SECOND_BLOCK = 64, 256

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}

CUDA_CONTEXT = 700 * MIB  # the context, the kernels of torch and cuBLAS's workspaces
NCCL = GIB  # buffers of the channels between GPUs
FRAGMENTATION = 0.05  # share of the allocated memory: unused parts of the caching allocator's blocks
# Python with torch, transformers and the evaluation's libraries. Of the 1000 MiB resident in a run of examples/tiny-llama,
# 400 MiB are pages of libraries. A pod is only charged for those that no other pod of the node uses already.
CPU_RUNTIME = 800 * MIB
CPU_FRAGMENTATION = 0.2  # share of the allocated memory: malloc returns little to the system


def training_memory(shape: Geometry, setup: Setup) -> dict[str, int]:
    """Return the bytes by purpose. Purposes that take no memory are left out."""
    method, tokens = setup.method, setup.micro_batch * setup.length
    trained = trained_parameters(shape, setup)
    items: dict[str, float] = {}
    compute = compute_width(setup)
    if method.full is not None:
        # Float32 weights, and autocast's 16-bit copy of them (Micikevicius et al. 2018). fsdp needs no copy: it gathers
        # in 16 bits.
        items["weights"] = 4 * shape.parameters / setup.shards
        items["autocastCopies"] = compute * shape.parameters if compute < 4 and setup.sharding != "fsdp" else 0
    elif method.qlora is not None:
        linear = linear_parameters(shape)
        # peft holds all weights that are not quantised in float32 (prepare_model_for_kbit_training).
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
        # The current block is gathered, and the next is being gathered. Embeddings and head stay gathered all the time.
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
        # The trained weights and the optimizer's state, copied for a checkpoint. On a GPU, host memory holds them.
        items["checkpoint"] = (4 + OPTIMIZER_BYTES[setup.optim]) * trained
    return {name: round(value) for name, value in items.items() if round(value) > 0}


def trained_parameters(shape: Geometry, setup: Setup) -> int:
    """Return the number of parameters that get a gradient."""
    method = setup.method
    if method.low_rank is not None:
        return adapter_parameters(shape, method.low_rank)
    if method.prompt_tuning is not None:
        return method.prompt_tuning.virtual_tokens * shape.hidden
    return shape.parameters


def loaded_bytes(shape: Geometry, setup: Setup) -> int:
    """Return the bytes of host memory that the weights take in a pod while they are loaded.

    All processes map the same files, and each copies the weights to its GPU one by one. With fsdp, rank 0 first holds
    the whole model and then distributes it.
    """
    dtype = "float32" if setup.method.full is not None else DTYPES[setup.precision]
    return shape.parameters * WIDTH[dtype]
