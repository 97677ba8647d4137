"""Helpers for the tests of checkpoints: a store in a folder that processes can share, and attempts of one tiny run."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from graft.artifacts.storage import StoreError
from graft.artifacts.store import ObjectInfo
from graft.contracts.progress import Progress
from graft_trainer.checkpoints.checkpoint import identity
from graft_trainer.data.tokens import Collator, Tokenisation, Tokenised
from graft_trainer.loop.loop import Learned, Work, run_loop
from graft_trainer.recipe.resolve import Device, Resolved
from graft_trainer.run.progress import ProgressReporter
from graft_trainer.run.run import Run
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from worlds.trainer import make_job, make_settings

torch.set_num_threads(1)  # a second thread would slow down such a small model
ROOT = "team-a/runs/uid-1/"
WORDS = 48
RESOLVED = Resolved(
    num_train_epochs=3.0, max_steps=18, learning_rate=0.05, per_device_train_batch_size=2, gradient_accumulation_steps=2,
    world_size=1, optim="adamw", lr_scheduler_type="cosine", warmup_steps=3, weight_decay=0.01, adam_beta1=0.9,
    adam_beta2=0.999, adam_epsilon=1e-8, max_grad_norm=1.0, max_length=32, packing=False, precision="fp32",
    gradient_checkpointing=False, use_liger_kernel=False, sharding=None, logging_steps=1, eval_steps=None, save_steps=4, save_total_limit=2, seed=7,
)  # fmt: skip


class FolderStore:
    """The methods of S3Store over a folder. Writes are atomic: other processes never see a partial file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, key: str, bucket: str | None = None, *, most: int = 1 << 23) -> bytes:
        try:
            return (self.folder / key).read_bytes()
        except FileNotFoundError as error:
            raise StoreError("missing", f"{key}: NoSuchKey") from error

    def put(self, key: str, data: bytes, *, if_absent: bool = False) -> None:
        path = self.folder / key
        path.parent.mkdir(parents=True, exist_ok=True)
        if if_absent and path.exists():
            raise StoreError("exists", f"{key} exists")
        descriptor, name = tempfile.mkstemp(dir=self.folder)
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
        Path(name).rename(path)

    def upload(self, key: str, path: Path) -> None:
        self.put(key, path.read_bytes())

    def head(self, key: str, bucket: str | None = None) -> ObjectInfo:
        data = self.get(key, bucket)
        return ObjectInfo(key, len(data), hashlib.sha256(data).hexdigest())

    def download(self, item: ObjectInfo, path: Path, bucket: str | None = None, **how: Any) -> None:
        path.write_bytes(self.get(item.key, bucket))

    def objects(self, prefix: str, bucket: str | None = None) -> Iterator[ObjectInfo]:
        for path in sorted((self.folder / prefix).rglob("*")):
            try:
                data = path.read_bytes() if path.is_file() else None
            except FileNotFoundError:
                continue
            if data is not None:
                key = path.relative_to(self.folder).as_posix()
                yield ObjectInfo(key, len(data), hashlib.sha256(data).hexdigest())

    def delete(self, key: str) -> None:
        (self.folder / key).unlink(missing_ok=True)


class Killed(BaseException):
    """Stands for the end of a process that was killed."""


class Data(Collator):
    """A collator that calls `events[n]` when the attempt reads its n-th micro-batch."""

    def __init__(self, events: dict[int, Callable[[], None]]) -> None:
        super().__init__(0)
        self.events = events
        self.calls = 0

    def __call__(self, examples: Sequence[Tokenised]) -> dict[str, torch.Tensor]:
        self.calls += 1
        if event := self.events.get(self.calls):
            event()
        return super().__call__(examples)


def killed() -> None:
    raise Killed


def make_examples(count: int = 22) -> list[Tokenised]:
    """Return examples of different lengths and with different label masks."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for index in range(count):
        ids = torch.randint(1, WORDS, (4 + index % 9,), generator=generator).tolist()
        found.append(Tokenised(ids, [-100] * (1 + index % 3) + ids[1 + index % 3 :]))
    return found


def make_model(*, full: bool = False) -> Any:
    torch.manual_seed(11)
    config = LlamaConfig(
        vocab_size=WORDS, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=32, initializer_range=0.3, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    if full:
        return model
    return get_peft_model(model, LoraConfig(r=2, lora_dropout=0.2, target_modules=["q_proj", "v_proj", "down_proj"]))


def make_t5(*, tied: bool = False, lora: bool = False) -> Any:
    """Return a tiny T5. With `tied`, the head is the embedding table, as in T5 1.0 but not in T5 1.1."""
    torch.manual_seed(11)
    config = T5Config(
        vocab_size=WORDS, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0.0, decoder_start_token_id=0,
        tie_word_embeddings=tied,
    )  # fmt: skip
    model = T5ForConditionalGeneration(config)
    return (
        get_peft_model(model, LoraConfig(r=2, task_type="SEQ_2_SEQ_LM", target_modules=["q", "v"])) if lora else model
    )


def make_pairs(count: int = 22) -> list[Tokenised]:
    """Return the same examples as inputs and targets of a seq2seq model."""
    return [Tokenised(item.input_ids, item.input_ids[2:], "seq2seq") for item in make_examples(count)]


def open_attempt(root: Path, store: Any, name: str, **settings: Any) -> Run:
    own = dataclasses.replace(make_settings(root / name), attempt=name, **settings)
    progress = ProgressReporter(store, f"{ROOT}{name}/", name, interval=0.02)
    return Run(make_job(), own, store, progress, store.upload)


def identity_of(run: Run, work: Work) -> str:
    return identity(run.job, work.resolved, {"train": "sha256:data"}, len(work.examples))


@dataclasses.dataclass
class Attempt:
    """The result of an attempt: its run, its training curves, its weights, and the exception that ended it."""

    run: Run
    learned: Learned | None
    weights: dict[str, torch.Tensor]
    ended: BaseException | None

    @property
    def progress(self) -> Progress:
        assert self.run.progress.close(5)
        return Progress.model_validate_json(self.run.store.get(f"{ROOT}{self.run.settings.attempt}/progress.json"))


def run_attempt(
    root: Path,
    store: Any,
    name: str,
    *,
    events: dict[int, str | Callable[[], None]] | None = None,
    held_out: int = 0,
    full: bool = False,
    t5: dict[str, bool] | None = None,
    run: Run | None = None,
    model: Any = None,
    examples: Sequence[Tokenised] | None = None,
    measuring: dict[int, str | Callable[[], None]] | None = None,
    **changes: Any,
) -> Attempt:
    """Train as one attempt. Return its result.

    `events` maps a micro-batch to an event. `measuring` maps a batch of held-out examples to an event. The event "kill"
    ends the attempt at once, and "term" interrupts it. Any other event is a function to call.
    `t5` holds the options of make_t5. With it, the attempt trains a T5 model.
    """
    run = run or open_attempt(root, store, name)

    def term() -> None:
        run.interruption.wanted = True

    named: dict[Any, Callable[[], None]] = {"kill": killed, "term": term}
    happening, between = ({at: named.get(what, what) for at, what in (of or {}).items()} for of in (events, measuring))
    learned, ended = None, None
    if t5 is not None:
        model, examples = make_t5(**t5), make_pairs()
    model = model if model is not None else make_model(full=full)
    measured = iter(range(1, 1000))

    def before(module: Any, _: Any) -> None:
        if not module.training and (event := between.get(next(measured))):
            event()

    model.register_forward_pre_hook(before)
    try:
        with run.cleanup:
            work = Work(
                model,
                examples or make_examples(),
                sum(item.tokens for item in examples or make_examples()),
                Data(happening),  # type: ignore[arg-type]
                Tokenisation((examples or make_examples())[:held_out], 0, 0) if held_out else None,
                dataclasses.replace(RESOLVED, **changes),
                Device("cpu"),
                "",
            )
            learned = run_loop(run, dataclasses.replace(work, identity=identity_of(run, work)))
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        ended = error
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    return Attempt(run, learned, weights, ended)
