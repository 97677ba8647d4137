"""Packed examples give the same loss and gradients as single examples."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from graft.contracts.progress import Reason
from graft_trainer.data.packing import PackCollator, check_packing, pack
from graft_trainer.data.tokens import IGNORED, Collator, Tokenised
from graft_trainer.run.failures import Failure
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)
from worlds.trainer import make_base, make_job, make_qwen, make_t5, ready, train_prepared

pytestmark = pytest.mark.usefixtures("one_thread")


def example(length: int, seed: int, text: bool = False) -> Tokenised:
    ids = torch.randint(6, 260, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return Tokenised(ids, ids if text else [IGNORED] * (length // 3) + ids[length // 3 :])


EXAMPLES = [example(length, seed, text=seed % 2 == 0) for seed, length in enumerate((5, 17, 9, 30, 3, 11, 22, 8))]


def mistral() -> Any:
    """Return a Mistral whose window is shorter than a pack, so its mask is stricter than a causal mask."""
    return MistralForCausalLM(
        MistralConfig(
            vocab_size=262, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=1, sliding_window=8, initializer_range=0.3,
        )
    )  # fmt: skip


def gpt2() -> Any:
    sizes = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=262, initializer_range=0.3, **sizes, **off))


def opt() -> Any:
    """Return an OPT. If it gets no mask, transformers makes one."""
    return OPTForCausalLM(
        OPTConfig(
            vocab_size=262, hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=2, init_std=0.3,
            word_embed_proj_dim=32, max_position_embeddings=64, dropout=0.0,
        )
    )  # fmt: skip


def llama(tmp_path: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(make_base(tmp_path / "llama"))


def loss_and_gradients(model: Any, batches: list[dict[str, torch.Tensor]]) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the loss, summed over all trained tokens of all batches, and its gradients."""
    model.zero_grad()
    total = 0.0
    for batch in batches:
        logits = model(**{key: value for key, value in batch.items() if key != "labels"}, use_cache=False).logits
        loss = nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=IGNORED, reduction="sum"
        )
        loss.backward()
        total += float(loss)
    return total, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("architecture", ["llama", "mistral", "gpt2"])
def test_packed_loss_and_gradients_equal_those_of_single_examples(architecture: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = {"llama": lambda: llama(tmp_path), "mistral": mistral, "gpt2": gpt2}[architecture]().eval()
    packs = pack(EXAMPLES, 40)
    assert len(packs) < len(EXAMPLES) and max(len(chosen) for chosen in packs) > 1
    packed, gradients = loss_and_gradients(model, [PackCollator(0)(packs[:2]), PackCollator(0, multiple=8)(packs[2:])])
    alone, expected = loss_and_gradients(model, [Collator(0)([item]) for item in EXAMPLES])
    assert packed == pytest.approx(alone, rel=1e-5)
    for name, gradient in expected.items():
        scale = float(gradient.abs().max())
        assert torch.allclose(gradients[name], gradient, atol=1e-4 * scale + 1e-7), name


def mamba() -> Any:
    """Return a Mamba. Its state continues from one example of a pack to the next."""
    model = MambaForCausalLM(MambaConfig(vocab_size=262, hidden_size=32, num_hidden_layers=2, state_size=8))
    for parameter in model.parameters():
        parameter.data *= 3  # with small random weights the state would keep almost nothing
    return model


@pytest.mark.parametrize("make", [opt, mamba])
def test_an_architecture_that_ignores_positions_is_refused(make: Callable[[], Any]) -> None:
    torch.manual_seed(1)
    with pytest.raises(Failure, match="would attend to each other") as caught:
        check_packing(make(), EXAMPLES[3], "base")
    assert caught.value.reason == Reason.CONFIGURATION_INVALID


@pytest.mark.parametrize("make", [make_base, make_qwen])
def test_attention_that_uses_positions_is_accepted(make: Any, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(make(tmp_path / "base"), dtype=torch.bfloat16)
    check_packing(model, EXAMPLES[3], "base")


def test_packs_are_full_and_hold_every_example_once() -> None:
    examples = [example(3 + (7 * index) % 29, index) for index in range(300)]
    packs = pack(examples, 64)
    assert sorted(map(id, (item for chosen in packs for item in chosen))) == sorted(map(id, examples))
    sizes = [sum(item.tokens for item in chosen) for chosen in packs]
    assert max(sizes) <= 64 and sum(sizes) / (64 * len(packs)) > 0.97
    assert list(pack(examples, 64)) == list(packs)


def test_a_packed_run_takes_fewer_steps_over_the_same_tokens(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    training = {"numTrainEpochs": 2, "perDeviceTrainBatchSize": 2, "gradientAccumulationSteps": 1, "learningRate": 0.01}
    runs = []
    for packing in (False, True):
        job = make_job(
            method={"full": {}}, training=training | {"packing": packing, "maxLength": 128, "loggingSteps": 1}
        )
        run, _ = ready(tmp_path / str(packing), base, job)
        runs.append(train_prepared(run))
    alone, packed = runs
    assert packed.resolved.max_steps < alone.resolved.max_steps / 2
    assert packed.tokens == alone.tokens
    assert packed.curve[-1]["loss"] < 0.8 * packed.curve[0]["loss"]
    assert list(packed.train.examples) == list(alone.train.examples), "the evaluation must get single examples"


@pytest.mark.parametrize(
    ("task", "method", "message"),
    [("seq2seq", {"lora": {}}, "the base model is seq2seq"), ("causal", {"promptTuning": {}}, "once")],
)
def test_packing_is_refused_for_seq2seq_models_and_prompt_tuning(
    tmp_path: Path, task: str, method: dict[str, Any], message: str
) -> None:
    base = make_t5(tmp_path / "base") if task == "seq2seq" else make_base(tmp_path / "base")
    run, _ = ready(tmp_path, base, make_job(task=task, method=method, training={"packing": True}))
    with pytest.raises(Failure, match=message) as caught:
        train_prepared(run)
    assert caught.value.reason == Reason.CONFIGURATION_INVALID
