"""The estimate of graft.placement against the memory that training really takes, for every method.

Each case trains a few micro-batches of a small random model with the trainer's own model code and transformers' Trainer,
and compares the peak with the estimate. The peak is that of the live tensors, counted at every operation: a process' RSS
would show the allocator, too, which on a CPU is malloc and on a GPU torch's own. It is what
torch.cuda.max_memory_allocated() says on a GPU, without the framework's share.

    python benchmarks/placement_memory.py [case...]      # one line per case, and build/bench/placement_memory.json

With --gpu the models have the shapes of Llama 2 7B and Llama 3.2 1B (with Llama 2's vocabulary), and the peak is all that the
process takes of the GPU's memory, context and allocator included, against the whole estimate. Needs 40 GB.
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
STEPS = 2  # the optimizer's state is there from the second on
ACCUMULATION = 2  # gradients of one micro-batch are there while the next is computed


@dataclass(frozen=True)
class Case:
    """One training whose peak is measured."""

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

# Small enough for a CPU, with the parts of the memory in proportions like those of large models.
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
    """The most bytes of tensor storage that were alive at once, of those seen in operations since it was entered."""

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
    """The model's folder, with random weights."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    auto = AutoModelForSeq2SeqLM if case.model == "t5" else AutoModelForCausalLM
    config = CONFIG_MAPPING[case.model](**MODELS[case.model, case.size])
    with torch.device("cuda" if case.gpu else "cpu"):
        model = auto.from_config(config, dtype=torch.bfloat16 if case.gpu else torch.float32)
    model.save_pretrained(folder)


def measured(case: Case, folder: Path) -> int:
    """Peak bytes of two steps of training: of the live tensors, or of the GPU's memory."""
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
        rows[-1]["attention_mask"][-1] = 0  # as in real batches, not all are of the same length
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
    """The estimate for the same; on a CPU without the share of the framework, which is no tensor."""
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
    return {name: size for name, size in items.items() if case.gpu or name != "framework"}


def compare(case: Case, folder: Path) -> dict[str, Any]:
    """Both, and the ratio of the estimate to the measured peak. Models are made in `folder` once."""
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
    parser.add_argument("cases", nargs="*", help="parts of names of cases; all of them when absent")
    parser.add_argument("--gpu", action="store_true", help="on a GPU, with models of 1 and 7 billion parameters")
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
    print(f"estimate/measured from {min(ratios):.2f} to {max(ratios):.2f}; {RESULT}")


if __name__ == "__main__":
    main()
