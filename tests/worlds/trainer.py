"""Helpers for the trainer's tests: a tiny chat model with random weights, jobs for it, and a store in memory."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from graft.artifacts.publishing import CLAIM
from graft.artifacts.storage import StoreError, Trouble
from graft.artifacts.store import ObjectInfo
from graft.contracts.job import JobFile
from graft_trainer.run.progress import ProgressReporter
from graft_trainer.run.run import Prepared, Run
from graft_trainer.run.settings import Settings

from worlds.buckets import play_operator

if TYPE_CHECKING:
    from graft_trainer.train import Trained

MARKED = (
    "{{- bos_token }}{%- for m in messages %}{%- if m['role'] == 'assistant' %}{{- '<|assistant|>' }}"
    "{% generation %}{{ m['content'] + eos_token }}{% endgeneration %}"
    "{%- else %}{{- '<|' + m['role'] + '|>' + m['content'] }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
)
UNMARKED = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")
SPECIAL = ["<pad>", "<s>", "</s>", "<|system|>", "<|user|>", "<|assistant|>"]
QUESTIONS = {
    "What colour is the sky?": "It is blue.",
    "What colour is grass?": "It is green.",
    "And snow?": "White it is.",
}


def make_tokenizer(template: str | None = MARKED) -> Any:
    """Return a byte-level tokenizer without merges: one token per byte, and six special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *alphabet])}
    inner = Tokenizer(models.BPE(vocabulary, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=SPECIAL[3:],
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )


def make_base(folder: Path, template: str | None = MARKED, dtype: Any = None) -> Path:
    """Save a Llama with random weights and that tokenizer, in the layout of the Hub. `dtype` defaults to float32."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer(template)
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).to(dtype or torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_qwen(folder: Path) -> Path:
    """Save a Qwen2 with random weights. Its query, key and value projections have biases."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = make_tokenizer()
    torch.manual_seed(3)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_t5(folder: Path) -> Path:
    """Save a T5 with random weights and the byte tokenizer. Like published T5 models, it has no chat template."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    tokenizer = make_tokenizer(None)
    torch.manual_seed(3)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        decoder_start_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    T5ForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def chat_lines(count: int) -> bytes:
    """Return `count` lines in the chat format. The same few questions repeat."""
    pairs = list(QUESTIONS.items())
    lines = []
    for index in range(count):
        question, answer = pairs[index % len(pairs)]
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": messages}))
    return "\n".join(lines).encode() + b"\n"


def question_lines(count: int) -> bytes:
    """Return the same questions in the instruction format."""
    pairs = list(QUESTIONS.items())
    lines = [dict(zip(("instruction", "output"), pairs[index % len(pairs)], strict=True)) for index in range(count)]
    return "\n".join(map(json.dumps, lines)).encode() + b"\n"


def make_job(**changes: Any) -> JobFile:
    """Return a job as the operator writes it. `changes` replaces fields."""
    fields: dict[str, Any] = {
        "job": {"name": "colours", "namespace": "team-a", "uid": "uid-1"},
        "tenant": "team-a",
        "baseModel": {"name": "tiny", "uri": "s3://bucket/models/tiny"},
        "dataset": {
            "train": {"uri": "s3://bucket/team-a/data/train.jsonl"},
            "eval": {"uri": "s3://bucket/team-a/data/eval.jsonl"},
        },
        "method": {"lora": {"rank": 4}},
        "training": {"maxSteps": 4, "loggingSteps": 1, "perDeviceTrainBatchSize": 4, "gradientAccumulationSteps": 1},
        "evaluation": {"maxSamples": 6, "maxNewTokens": 16},
        "output": {"adapter": "colours", "version": "1.0.0"},
        "recipe": "sha256:recipe",
    }
    return JobFile.model_validate(fields | changes)


class MemoryStore:
    """The methods of S3Store over a dict. `refuse` maps a part of a key to the trouble that its writes raise.

    With `publishes`, the store plays the operator, too: what a job stages is published at once.
    """

    publishes = True

    def __init__(self, objects: dict[str, bytes] | None = None) -> None:
        self.kept = dict(objects or {})
        self.refuse: dict[str, Trouble] = {}
        self.written: list[str] = []
        self._lock = threading.Lock()

    def _check(self, key: str) -> None:
        for part, trouble in self.refuse.items():
            if part in key:
                raise StoreError(trouble, f"s3://bucket/{key}: {trouble}")

    def get(self, key: str, bucket: str | None = None, *, most: int = 1 << 23) -> bytes:
        if key not in self.kept:
            raise StoreError("missing", f"s3://bucket/{key}: NoSuchKey")
        if len(self.kept[key]) > most:
            raise StoreError("large", f"s3://bucket/{key} has {len(self.kept[key])} bytes")
        return self.kept[key]

    def put(self, key: str, data: bytes, *, if_absent: bool = False) -> None:
        self._check(key)
        with self._lock:
            if if_absent and key in self.kept:
                raise StoreError("exists", f"{key} exists")
            self.kept[key] = data
            self.written.append(key)
        if self.publishes and key.endswith(f"/{CLAIM}"):
            tenant, _, uid, _ = key.split("/")
            play_operator(self, tenant, uid)  # type: ignore[arg-type]

    def check_write(self, key: str) -> None:
        self._check(key)

    def upload(self, key: str, path: Path) -> None:
        self.put(key, path.read_bytes())

    def copy(self, source: str, key: str, size: int) -> None:
        self.put(key, self.get(source))

    def delete(self, key: str) -> None:
        self.kept.pop(key, None)

    def sha256(self, key: str, bucket: str | None = None) -> tuple[str, int]:
        data = self.get(key, bucket)
        return hashlib.sha256(data).hexdigest(), len(data)

    def download(self, item: ObjectInfo, path: Path, bucket: str | None = None, **how: Any) -> None:
        path.write_bytes(self.get(item.key, bucket))

    def head(self, key: str, bucket: str | None = None) -> ObjectInfo:
        return ObjectInfo(key, len(self.get(key)), f"etag-{len(self.get(key))}")

    def objects(self, prefix: str, bucket: str | None = None) -> Iterator[ObjectInfo]:
        for key, data in sorted(self.kept.items()):
            if key.startswith(prefix):
                yield ObjectInfo(key, len(data), f"etag-{len(data)}")

    def add_folder(self, prefix: str, folder: Path) -> None:
        for path in folder.iterdir():
            self.kept[prefix + path.name] = path.read_bytes()


def make_settings(root: Path) -> Settings:
    """Return settings whose paths are all below `root`."""
    (root / "work").mkdir(parents=True, exist_ok=True)
    return Settings(
        attempt="pod-1",
        job_file=root / "job.json",
        storage_dir=root / "storage",
        hf_token_file=root / "token",
        work_dir=root / "work",
        pvc_dir=root / "pvc",
        configmap_dir=root / "configmap",
        termination_file=root / "termination",
        progress_interval=0.05,
        storage_patience=0.0,
    )


def make_run(root: Path, store: MemoryStore, job: JobFile) -> Run:
    settings = make_settings(root)
    prefix = f"{job.tenant}/runs/{job.job.uid}/{settings.attempt}/"
    progress = ProgressReporter(store, prefix, settings.attempt, interval=settings.progress_interval)
    return Run(job, settings, store, progress, store.upload)  # type: ignore[arg-type]


def ready(root: Path, base: Path, job: JobFile, store: MemoryStore | None = None) -> tuple[Run, MemoryStore]:
    """Return a run as prepare leaves it, and its store. The base model stays in its folder.

    Without `store`, the dataset is in the chat format.
    """
    store = store or MemoryStore({"team-a/data/train.jsonl": chat_lines(24), "team-a/data/eval.jsonl": chat_lines(6)})
    run = make_run(root, store, job)
    run.settings.dataset_dir.mkdir(parents=True)
    for role, source in (("train", job.dataset.train), ("eval", job.dataset.eval)):
        if source is not None:
            data = store.kept[source.uri.removeprefix("s3://bucket/")]
            (run.settings.dataset_dir / f"{role}.jsonl").write_bytes(data)
    Prepared(str(base), {}).write(run.settings.prepared_file)
    return run, store


def train_prepared(run: Run) -> Trained:
    """Train from the files that prepare has left in the work folder."""
    from graft_trainer.train import train

    return train(run, Prepared.read(run.settings.prepared_file))


@contextmanager
def quick_training() -> Iterator[None]:
    """Use one thread, because a second one slows down such small models. Measure the latency only briefly."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("graft_trainer.train.cpu_limit", lambda: 1)
        patch.setattr("graft_trainer.analysis.analysis.LATENCY_SECONDS", 0.1)
        yield
