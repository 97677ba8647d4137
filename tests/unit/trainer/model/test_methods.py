"""Every method on causal and seq2seq models: it lowers the loss, and plain transformers and peft load its version."""

import hashlib
import json
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from graft.artifacts.manifest import Manifest, ManifestFile
from graft.artifacts.versions import describe_files
from graft.contracts.progress import Reason
from graft_server.engine.model import load_base_model as load_served
from graft_server.engine.settings import Settings
from graft_trainer.data.tokens import Collator
from graft_trainer.evaluation.evaluate import Evaluated
from graft_trainer.model.methods import make_tunable
from graft_trainer.model.model import load_base_model
from graft_trainer.recipe.resolve import Device, limits
from graft_trainer.run.failures import Failure
from graft_trainer.run.run import Run
from graft_trainer.train import Trained
from graft_trainer.versions.publish import describe, publish, save
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer
from worlds.trainer import (
    MARKED,
    MemoryStore,
    make_base,
    make_job,
    make_qwen,
    make_t5,
    question_lines,
    ready,
    train_prepared,
)

PREFIX = "team-a/adapters/colours/1.0.0/"
AUTO = {"causal": AutoModelForCausalLM, "seq2seq": AutoModelForSeq2SeqLM}
METHODS: dict[str, dict[str, Any]] = {
    "full": {"full": {}},
    "lora": {"lora": {"rank": 8}},
    "lora with embeddings": {"lora": {"rank": 8, "targetModules": "all-linear+embeddings"}},
    "qlora": {"qlora": {"rank": 8}},
    "promptTuning": {"promptTuning": {"virtualTokens": 8}},
    "promptTuning from a text": {"promptTuning": {"virtualTokens": 8, "initText": "Answer with a colour."}},
}
FAST = {"maxSteps": 15, "loggingSteps": 1, "perDeviceTrainBatchSize": 8, "gradientAccumulationSteps": 1}
RATES = {"full": 0.003, "lora": 0.01, "qlora": 0.01, "promptTuning": 0.3}
# Parameters counted by hand. Llama: 2 layers, hidden size 64, key and value size 32, MLP size 128, 262 tokens.
# T5: 2 encoder and 2 decoder layers, width 64, gated MLP of size 128.
LLAMA_BASE = 2 * 262 * 64 + 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128 + 2 * 64) + 64
LLAMA_LORA = 8 * 2 * (2 * (64 + 64) + 2 * (64 + 32) + 3 * (64 + 128))
T5_BLOCK, T5_CROSS = 4 * 64 * 64 + 64 + 3 * 64 * 128 + 64, 4 * 64 * 64 + 64
T5_BASE = 262 * 64 + 4 * T5_BLOCK + 2 * T5_CROSS + 2 * (32 * 4 + 64)
T5_LORA = 8 * (6 * 4 * (64 + 64) + 4 * 3 * (64 + 128))
TRAINED = {
    ("causal", "full"): LLAMA_BASE,
    ("causal", "lora"): LLAMA_LORA,
    ("causal", "lora with embeddings"): LLAMA_LORA + 8 * (262 + 64),
    ("causal", "qlora"): LLAMA_LORA,
    ("seq2seq", "full"): T5_BASE,
    ("seq2seq", "lora"): T5_LORA,
    ("seq2seq", "lora with embeddings"): T5_LORA + 2 * 8 * (262 + 64),
    ("seq2seq", "qlora"): T5_LORA,
}


def described(folder: Path) -> list[ManifestFile]:
    return describe_files({path.name: path for path in folder.iterdir()})


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {
        "causal": make_base(tmp_path_factory.mktemp("llama")),
        "seq2seq": make_t5(tmp_path_factory.mktemp("t5")),
        "qwen": make_qwen(tmp_path_factory.mktemp("qwen")),
    }


pytestmark = pytest.mark.usefixtures("quick")


def learn(
    root: Path, base: Path, task: str, method: dict[str, Any], **training: Any
) -> tuple[Run, MemoryStore, Trained]:
    rate = {"learningRate": RATES[next(iter(method))]}
    job = make_job(task=task, method=method, training=FAST | rate | training)
    run, store = ready(root, base, job)
    return run, store, train_prepared(run)


def batch_of(trained: Trained) -> dict[str, torch.Tensor]:
    return Collator(0)(trained.train.examples[:3])


def logits(model: Any, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return the logits at the batch's positions. peft's causal models also return those of the virtual tokens."""
    with torch.no_grad():
        return model.eval()(**batch).logits[:, -batch["labels"].shape[1] :]


def load_published(folder: Path, base: Path, task: str) -> Any:
    """Load a version as a user does, without any code of Graft."""
    if (folder / "config.json").exists():
        return AUTO[task].from_pretrained(folder, use_safetensors=True)
    return PeftModel.from_pretrained(AUTO[task].from_pretrained(base), folder)


def resident_bytes() -> int:
    """Return the bytes of this process that are in memory now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("task", ["causal", "seq2seq"])
def test_each_method_lowers_the_loss_and_its_published_version_loads_again(
    bases: dict[str, Path], tmp_path: Path, task: str, method: str
) -> None:
    at_start = resident_bytes()
    run, _, trained = learn(tmp_path, bases[task], task, METHODS[method])
    first, last = trained.curve[0]["loss"], sum(record["loss"] for record in trained.curve[-5:]) / 5
    assert last < (0.95 if "prompt" in method else 0.6) * first
    state, batch = run.progress.state, batch_of(trained)
    base_parameters = LLAMA_BASE if task == "causal" else T5_BASE
    assert state.trainable_parameters == TRAINED.get((task, method), 8 * 64)
    added = 0 if method == "full" else state.trainable_parameters
    assert state.total_parameters == base_parameters + added
    assert state.world_size == 1
    assert (
        state.peak_memory_bytes is not None and state.peak_memory_bytes >= at_start
    )  # of the whole process, not its growth

    tuned = logits(trained.model, batch)
    with trained.base_model() as base:
        before = logits(base, batch)
    assert torch.equal(logits(trained.model, batch), tuned), "measuring the baseline must not change the tuned model"
    if "qlora" not in method:  # its base model is quantized to 4 bits
        assert torch.allclose(before, logits(AUTO[task].from_pretrained(bases[task]), batch), atol=1e-4)

    save(trained, run.job.base_model, tmp_path / "version")
    manifest = describe(run, trained, Evaluated({}), described(tmp_path / "version"))
    assert (manifest.task, manifest.method) == (task, method.split()[0])
    assert manifest.rank == (8 if "lora" in method else None)
    again = load_published(tmp_path / "version", bases[task], task)
    if "qlora" in method:  # the base model is not quantized here, so only the adapter is equal
        learned = {name: value for name, value in trained.model.named_parameters() if "lora_" in name}
        assert learned and all(
            torch.equal(value, dict(again.named_parameters())[name]) for name, value in learned.items()
        )
    else:
        assert torch.allclose(logits(again, batch), tuned, atol=1e-4)
    assert not torch.allclose(before, tuned, atol=0.1)


def test_a_full_model_is_published_in_the_dtype_of_its_base_model(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", dtype=torch.bfloat16)
    run, store, trained = learn(tmp_path, base, "causal", {"full": {}})
    assert trained.model.dtype == torch.float32  # a CPU trains in float32
    tuned = logits(trained.model, batch_of(trained))
    publish(run, trained, Evaluated({}, rejected=["exactMatch is 0.1, at least 0.9 is asked for"]))
    manifest = Manifest.model_validate_json(store.kept[PREFIX + "manifest.json"])
    assert manifest.rejected == ["exactMatch is 0.1, at least 0.9 is asked for"]
    names = {key.removeprefix(PREFIX) for key in store.kept if key.startswith(PREFIX)}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "report.html"} < names
    assert names == {file.name for file in manifest.files} | {"manifest.json"}
    folder = tmp_path / "again"
    folder.mkdir()
    for file in manifest.files:
        data = store.kept[PREFIX + file.name]
        assert hashlib.sha256(data).hexdigest() == file.sha256
        (folder / file.name).write_bytes(data)
    again = load_published(folder, base, "causal")
    assert again.dtype == torch.bfloat16
    assert torch.allclose(logits(again.float(), batch_of(trained)), tuned, atol=1e-4)
    assert AutoTokenizer.from_pretrained(folder).chat_template
    assert str(tmp_path) not in store.kept[PREFIX + "config.json"].decode()


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_version_says_which_tokens_end_its_answers(tmp_path: Path, method: str) -> None:
    # As in base models with a chat template: a turn ends with a token that is not the model's eos.
    ends_otherwise = MARKED.replace("m['content'] + eos_token", "m['content'] + '<|system|>'")
    base = make_base(tmp_path / "base", ends_otherwise)
    run, _, trained = learn(tmp_path, base, "causal", {method: {}})
    eos, end = trained.tokenizer.convert_tokens_to_ids(["</s>", "<|system|>"])
    folder = tmp_path / "version"
    save(trained, run.job.base_model, folder)
    manifest = describe(run, trained, Evaluated({}), described(folder))
    assert manifest.stop_token_ids == [eos, end]
    if method == "full":
        assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [eos, end]
        served = load_served(Settings(str(folder), ("m",)))
        assert {eos, end} <= served.eos_ids


@pytest.mark.parametrize("method", ["full", "lora"])
def test_the_template_of_the_prompts_goes_with_the_version(tmp_path: Path, method: str) -> None:
    base = make_base(tmp_path / "base")
    data = {"format": "instruction", "templates": ["Q: {instruction}\nA: ", "Ask {instruction}"]}
    dataset = {"train": {"uri": "s3://bucket/team-a/data/train.jsonl"}} | data
    job = make_job(method={method: {}}, training=FAST, dataset=dataset)
    run, store = ready(tmp_path, base, job, MemoryStore({"team-a/data/train.jsonl": question_lines(12)}))
    publish(run, train_prepared(run), Evaluated({}))
    manifest = Manifest.model_validate_json(store.kept[PREFIX + "manifest.json"])
    assert manifest.prompt_template == "Q: {instruction}\nA: "
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = store.kept[PREFIX + "chat_template.jinja"].decode()
    asked = [{"role": "user", "content": "And snow?"}]
    prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    assert prompt == "Q: And snow?\nA: "


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("bias", ["all", "loraOnly"])
def test_biases_are_trained_published_and_left_out_of_the_baseline(
    bases: dict[str, Path], tmp_path: Path, bias: str, precision: str
) -> None:
    base, method = bases["qwen"], {"lora": {"rank": 8, "bias": bias, "targetModuleNames": ["q_proj", "gate_proj"]}}
    run, _, trained = learn(tmp_path, base, "causal", method, precision=precision)
    biases = 2 * (64 + 32 + 32) if bias == "all" else 2 * 64
    assert run.progress.state.trainable_parameters == 8 * 2 * ((64 + 64) + (64 + 128)) + biases
    tuned, batch = logits(trained.model, batch_of(trained)), batch_of(trained)
    plain = AUTO["causal"].from_pretrained(base, dtype=trained.model.dtype)
    with trained.base_model() as baseline:
        assert torch.allclose(logits(baseline, batch), logits(plain, batch), atol=1e-4)
    save(trained, run.job.base_model, tmp_path / "version")
    again = load_published(tmp_path / "version", base, "causal")
    learned = again.base_model.model.model.layers[0].self_attn.q_proj.bias
    assert not torch.allclose(learned, plain.model.layers[0].self_attn.q_proj.bias.float(), atol=1e-3)
    assert torch.allclose(
        logits(again.to(trained.model.dtype), batch), tuned, atol=1e-4 if precision == "fp32" else 0.5
    )


def test_virtual_tokens_start_as_the_embeddings_of_the_init_text(bases: dict[str, Path], tmp_path: Path) -> None:
    method = {"promptTuning": {"virtualTokens": 5, "initText": "abc"}}
    _, _, trained = learn(tmp_path, bases["causal"], "causal", method, maxSteps=1, learningRate=1e-9)
    words = trained.model.get_input_embeddings().weight[trained.tokenizer("abcab")["input_ids"]]
    assert torch.allclose(trained.model.prompt_encoder.default.embedding.weight, words, atol=1e-5)


def test_a_published_prompt_contains_no_path_of_the_pod(bases: dict[str, Path], tmp_path: Path) -> None:
    method = METHODS["promptTuning from a text"]
    run, _, trained = learn(tmp_path, bases["seq2seq"], "seq2seq", method, maxSteps=1)
    save(trained, run.job.base_model, tmp_path / "version")
    config = json.loads((tmp_path / "version/adapter_config.json").read_text())
    assert str(tmp_path) not in json.dumps(config)
    assert (config["peft_type"], config["num_virtual_tokens"], config["prompt_tuning_init"]) == (
        "PROMPT_TUNING",
        8,
        "RANDOM",
    )
    assert config["num_transformer_submodules"] == 1


@pytest.mark.parametrize("method", ["full", "lora", "promptTuning"])
@pytest.mark.parametrize("task", ["causal", "seq2seq"])
def test_gradient_checkpointing_gives_the_same_losses(
    bases: dict[str, Path], tmp_path: Path, task: str, method: str
) -> None:
    curves = [
        learn(tmp_path / str(on), bases[task], task, METHODS[method], maxSteps=4, gradientCheckpointing=on)[2].curve
        for on in (False, True)
    ]
    assert [record["loss"] for record in curves[0]] == pytest.approx([record["loss"] for record in curves[1]], rel=1e-4)


def refused(root: Path, base: Path, task: str, **changes: Any) -> Failure:
    run, _ = ready(root, base, make_job(task=task, **changes))
    with pytest.raises(Failure) as caught:
        train_prepared(run)
    return caught.value


def test_format_text_is_refused_for_a_seq2seq_model(bases: dict[str, Path], tmp_path: Path) -> None:
    dataset = {"train": {"uri": "s3://bucket/team-a/data/train.jsonl"}, "format": "text"}
    store = MemoryStore({"team-a/data/train.jsonl": b'{"text": "The sky is blue."}\n' * 4})
    run, _ = ready(tmp_path, bases["seq2seq"], make_job(task="seq2seq", dataset=dataset), store)
    with pytest.raises(Failure, match="seq2seq: it trains on prompts with answers") as caught:
        train_prepared(run)
    assert caught.value.reason == Reason.CONFIGURATION_INVALID


def test_virtual_tokens_reduce_the_context_for_examples(bases: dict[str, Path], tmp_path: Path) -> None:
    method = {"promptTuning": {"virtualTokens": 28}}
    failure = refused(tmp_path, bases["causal"], "causal", method=method, training={"maxLength": 101})
    assert "128 tokens less 28 virtual tokens" in failure.message and "at most 100" in failure.remedy


def test_a_seq2seq_model_trains_on_instructions_with_and_without_templates(
    bases: dict[str, Path], tmp_path: Path
) -> None:
    losses = []
    for templates in (None, ["Q: {instruction}\nA:"]):
        dataset = {"train": {"uri": "s3://bucket/team-a/data/train.jsonl"}, "format": "instruction"}
        dataset |= {"templates": templates} if templates else {}
        store = MemoryStore({"team-a/data/train.jsonl": question_lines(24)})
        job = make_job(task="seq2seq", method={"full": {}}, training=FAST | {"learningRate": 0.003}, dataset=dataset)
        run, _ = ready(tmp_path / str(len(losses)), bases["seq2seq"], job, store)
        losses.append([record["loss"] for record in train_prepared(run).curve])
    assert all(curve[-1] < 0.7 * curve[0] for curve in losses) and losses[0] != losses[1]


@pytest.mark.parametrize(
    ("method", "frozen", "learned"),
    [
        ("full", None, torch.float32),
        ("lora", torch.bfloat16, torch.float32),
        ("promptTuning", torch.bfloat16, torch.float32),
    ],
)
def test_trained_parameters_are_in_float32_at_every_precision(
    bases: dict[str, Path], method: str, frozen: torch.dtype | None, learned: torch.dtype
) -> None:
    job = make_job(method={method: {}}, training={"precision": "bf16"})
    device = Device("cpu")
    base = load_base_model(bases["causal"], "tiny", "causal", job.method, limits(job, device, 128), device)
    model = make_tunable(job, base, bases["causal"], lambda: None).model
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {learned}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == ({frozen} if frozen else set())
