"""Compare the estimate of graft.placement with the memory that training really takes, for every method.

Each case trains a few micro-batches of a small random model with the trainer's own model code and transformers'
Trainer. Then it compares the peak with the estimate. The peak is that of the live tensors, counted at every operation.
It corresponds to torch.cuda.max_memory_allocated() on a GPU, without the framework's share. The RSS of the process is
not used, because it includes the allocator, which is malloc on a CPU and torch's own on a GPU.

    python benchmarks/placement_memory.py [case...]      # one line per case, and build/bench/placement_memory.json

With --gpu the models have the shapes of Llama 2 7B and Llama 3.2 1B (with Llama 2's vocabulary). The peak is all GPU
memory of the process, including context and allocator, and it is compared with the whole estimate. This needs a GPU
with 40 GB.
"""

import argparse
import gc
import json
import tempfile
import weakref
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from graft.api.recipe import Method
from graft.placement.activations import Setup
from graft.placement.blocks import geometry
from graft.placement.estimate import training_memory
from graft.placement.facts import facts_of
from torch.utils._python_dispatch import TorchDispatchMode

RESULT = Path(__file__).parents[1] / "build" / "bench" / "placement_memory.json"
STEPS = 2  # the optimizer's state exists from the second step on
ACCUMULATION = 2  # the gradients of one micro-batch exist while the next one is computed


@dataclass(frozen=True)
class Case:
    """One training run whose peak is measured."""

    name: str
    method: dict[str, Any]
    model: Literal["llama", "gpt2", "t5", "gemma2"] = "llama"
    size: Literal["small", "large", "1b", "7b"] = "large"
    precision: Literal["bf16", "fp32"] = "bf16"
    micro_batch: int = 2
    length: int = 256
    checkpointing: bool = False
    gpu: bool = False
    liger: bool = False


METHODS: dict[str, dict[str, Any]] = {
    "full": {"full": {}},
    "lora": {"lora": {"rank": 16}},
    "qlora": {"qlora": {"rank": 16}},
    "promptTuning": {"promptTuning": {"virtualTokens": 8}},
}
CASES = [
    Case(f"{model}-{method}-{precision}-b{batch}{'-checkpointing' if checkpointing else ''}", spec, model, size,
         precision=precision, micro_batch=batch, checkpointing=checkpointing)
    for model, precision, size, batches in (
        ("llama", "fp32", "large", (1, 4)), ("llama", "bf16", "small", (1, 4)), ("gpt2", "fp32", "large", (2,)),
        ("t5", "fp32", "large", (2,)), ("t5", "bf16", "small", (2,)), ("gemma2", "fp32", "large", (2,)),
    )
    for method, spec in METHODS.items()
    for checkpointing in (False, True)
    for batch in batches
]  # fmt: skip
GPU_CASES = [
    Case(f"{size}-{method}-b{batch}{'-checkpointing' if checkpointing else ''}{'-liger' if liger else ''}", METHODS[method],
         size=size, micro_batch=batch, length=1024, checkpointing=checkpointing, gpu=True, liger=liger)
    for size, method, batch, checkpointing, liger in (
        ("7b", "lora", 1, False, False), ("7b", "lora", 4, False, False), ("7b", "lora", 4, False, True),
        ("7b", "lora", 4, True, False), ("7b", "qlora", 1, False, False), ("7b", "qlora", 4, True, False),
        ("7b", "promptTuning", 2, False, False), ("1b", "full", 2, False, False), ("1b", "full", 4, True, False),
    )
]  # fmt: skip

# Except for 1b and 7b, the models are small enough for a CPU. The proportions of their memory are like those of large
# models.
MODELS: dict[tuple[str, str], dict[str, Any]] = {
    ("llama", "large"): {"vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8,
                         "num_attention_heads": 8, "num_key_value_heads": 4},
    ("llama", "small"): {"vocab_size": 1024, "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4,
                         "num_attention_heads": 6, "num_key_value_heads": 2},
    ("llama", "1b"): {"vocab_size": 32000, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
                      "num_attention_heads": 32, "num_key_value_heads": 8},
    ("llama", "7b"): {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
                      "num_attention_heads": 32, "num_key_value_heads": 32},
    ("gemma2", "large"): {"vocab_size": 4096, "hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4,
                          "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32},
    ("gpt2", "large"): {"vocab_size": 4096, "n_embd": 384, "n_layer": 6, "n_head": 6, "n_positions": 512},
    ("t5", "large"): {"vocab_size": 4096, "d_model": 384, "d_ff": 1024, "d_kv": 64, "num_heads": 6, "num_layers": 4,
                      "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "decoder_start_token_id": 0},
    ("t5", "small"): {"vocab_size": 1024, "d_model": 192, "d_ff": 512, "d_kv": 32, "num_heads": 6, "num_layers": 2,
                      "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "decoder_start_token_id": 0},
}  # fmt: skip


class PeakOfLiveTensors(TorchDispatchMode):
    """Record the peak bytes of live tensor storage, of tensors that went through hold() or that an operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: dict[int, int] = {}

    def hold(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen or not size:
            return
        self._seen[key] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, key)

    def _release(self, key: int) -> None:
        self.live -= self._seen.pop(key, 0)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        torch.utils._pytree.tree_map_only(torch.Tensor, self.hold, result)
        return result


def make_model(case: Case, folder: Path) -> None:
    """Write a model with random weights to `folder`."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    auto = AutoModelForSeq2SeqLM if case.model == "t5" else AutoModelForCausalLM
    config = CONFIG_MAPPING[case.model](**MODELS[case.model, case.size])
    with torch.device("cuda" if case.gpu else "cpu"):
        model = auto.from_config(config, dtype=torch.bfloat16 if case.gpu else torch.float32)
    model.save_pretrained(folder)


def measured(case: Case, folder: Path) -> int:
    """Return the peak bytes of two training steps: of the live tensors, or of the GPU's memory."""
    from graft.contracts.job import JobFile
    from graft_trainer.model.methods import make_tunable
    from graft_trainer.model.model import load_base_model, this_device
    from graft_trainer.recipe.resolve import Device, limits
    from transformers import Trainer, TrainingArguments

    torch.manual_seed(1)
    task = "seq2seq" if case.model == "t5" else "causal"
    job = JobFile.model_validate(
        {
            "job": {"name": "size", "namespace": "bench", "uid": "0"},
            "tenant": "bench",
            "baseModel": {"name": case.model, "uri": "s3://models/size"},
            "dataset": {"train": {"uri": "s3://bench/train.jsonl"}},
            "method": case.method,
            "training": {
                "precision": case.precision,
                "maxLength": case.length,
                "perDeviceTrainBatchSize": case.micro_batch,
                "gradientAccumulationSteps": ACCUMULATION,
                "maxSteps": STEPS,
                "gradientCheckpointing": case.checkpointing,
                "useLigerKernel": case.liger,
            },
            "evaluation": {},
            "output": {"adapter": "size", "version": "1.0.0"},
            "recipe": "sha256:0",
            "task": task,
        }
    )
    device = this_device() if case.gpu else Device("cpu")
    outside = (
        torch.cuda.mem_get_info()[1] - torch.cuda.mem_get_info()[0] - torch.cuda.memory_reserved() if case.gpu else 0
    )
    base = load_base_model(folder, case.model, task, job.method, limits(job, device, None), device)
    model = make_tunable(job, base, folder, lambda: base.model).model
    rows = []
    for _ in range(case.micro_batch * ACCUMULATION * STEPS):
        ids = torch.randint(0, 1000, (case.length,))
        rows.append({"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)})
        rows[-1]["attention_mask"][-1] = 0  # as in real batches, not all examples have the same length
    arguments = TrainingArguments(
        output_dir=str(folder / "out"),
        max_steps=STEPS,
        per_device_train_batch_size=case.micro_batch,
        gradient_accumulation_steps=ACCUMULATION,
        bf16=case.precision == "bf16",
        activation_checkpointing=case.checkpointing,
        activation_checkpointing_kwargs={"use_reentrant": False} if case.checkpointing else None,
        optim="adamw_torch_fused" if case.gpu else "adamw_torch",
        use_liger_kernel=case.liger,
        use_cpu=not case.gpu,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    if case.gpu:
        trainer.train()
        return outside + torch.cuda.max_memory_reserved()
    peak = PeakOfLiveTensors()
    for tensor in [*model.parameters(), *model.buffers()]:
        peak.hold(tensor.data)
        for part in vars(getattr(tensor, "quant_state", None) or object).values():
            for held in (part, *vars(part).values()) if hasattr(part, "__dict__") else (part,):
                if isinstance(held, torch.Tensor):
                    peak.hold(held)
    with peak:
        trainer.train()
    return peak.peak


def estimated(case: Case, folder: Path) -> dict[str, int]:
    """Return the estimate for the same case. On a CPU it excludes the framework's share, which is not a tensor, and the
    copy for a checkpoint, which is not made here."""
    method = Method.model_validate(case.method)
    virtual = method.prompt_tuning.virtual_tokens if method.prompt_tuning is not None else 0
    shape = geometry(facts_of(json.loads((folder / "config.json").read_text())))
    items = training_memory(
        shape,
        Setup(
            method=method,
            precision=case.precision,
            length=case.length + virtual,
            micro_batch=case.micro_batch,
            checkpointing=case.checkpointing,
            device="cuda" if case.gpu else "cpu",
        ),
    )
    return {name: size for name, size in items.items() if case.gpu or name not in {"framework", "checkpoint"}}


def compare(case: Case, folder: Path) -> dict[str, Any]:
    """Return the estimate, the measured peak, and their ratio. Each model is written to `folder` once."""
    model = folder / f"{case.model}-{case.size}"
    if not model.exists():
        make_model(case, model)
    if case.gpu:
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    items, peak = estimated(case, model), measured(case, model)
    total = sum(items.values())
    return asdict(case) | {"items": items, "estimated": total, "measured": peak, "ratio": round(total / peak, 3)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", help="substrings of the cases' names (default: all cases)")
    parser.add_argument(
        "--gpu", action="store_true", help="measure on a GPU, with models of 1 and 7 billion parameters"
    )
    arguments = parser.parse_args()
    chosen, results = arguments.cases, []
    with tempfile.TemporaryDirectory() as folder:
        for case in GPU_CASES if arguments.gpu else CASES:
            if chosen and not any(part in case.name for part in chosen):
                continue
            result = compare(case, Path(folder))
            results.append(result)
            peak = result["measured"] / 2**20
            print(f"{case.name:40s} measured {peak:8.1f} MiB  estimate/measured {result['ratio']:.2f}", flush=True)
    ratios = [result["ratio"] for result in results]
    summary = {"cases": len(results), "lowest": min(ratios), "highest": max(ratios), "results": results}
    RESULT.parent.mkdir(parents=True, exist_ok=True)
    RESULT.write_text(json.dumps(summary, indent=2) + "\n")
    print(f"estimate/measured is from {min(ratios):.2f} to {max(ratios):.2f}. Results: {RESULT}")


if __name__ == "__main__":
    main()
