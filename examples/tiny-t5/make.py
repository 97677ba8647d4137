"""Make the tiny seq2seq base model of the examples: a T5 of about two million parameters, pretrained on a CPU.

It uses the text and the tokenizer of tiny-llama. The examples and tests of encoder-decoder models need it.

    python examples/tiny-t5/make.py --out examples/tiny-t5/model
"""

import argparse
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

# Threads that wait in a busy loop make training ten times slower if other processes use the same cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from tokenizers import processors
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

HERE = Path(__file__).parent
LLAMA = HERE.parent / "tiny-llama"
sys.path.insert(0, str(LLAMA))
from corpus import Corpus, Document  # noqa: E402

CONTEXT = 256  # tokens of each side in training; T5's positions are relative, so longer inputs work as well
IGNORED = -100

CARD = """\
---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text2text-generation
---

# tiny-t5

A T5 small enough to be committed: {parameters:,} parameters, {vocabulary} tokens, weights in bfloat16. It exists so that
Graft's examples and tests can tune a real encoder-decoder model on a laptop's CPU. It is good for nothing else: it knows a
few hundred English words.

- Made by `examples/tiny-t5/make.py` from nothing: {steps} steps with seed {seed}, a few minutes on two idle CPU cores; mean
  loss at the end {loss:.3f}.
- Training text: that of tiny-llama (`examples/tiny-llama/corpus.py`). The encoder reads the prompt, the decoder learns the
  answer; of prose the encoder reads the beginning and the decoder learns the rest. No text or weights of anybody else are in it.
- No chat template: the prompt is plain text, a system message before it and an empty line between.
- Tokenizer: tiny-llama's, byte-level BPE; it ends every text with `</s>`, as T5's does.

Licence: Apache-2.0.
"""


def load_tokenizer() -> PreTrainedTokenizerFast:
    """Return tiny-llama's tokenizer without its chat template. It adds </s> at the end of every text."""
    tokenizer = AutoTokenizer.from_pretrained(LLAMA / "model")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.eos_token_id)]
    )
    tokenizer.chat_template = None
    return tokenizer


def pair(document: Document, share: float) -> tuple[str, str] | None:
    """Return (text of the encoder, text of the decoder). For prose, the encoder gets the first `share` of the words and
    the decoder the rest. Return None for a conversation of several turns, and for prose that is too short to split."""
    if document[-1][0] == "text":
        words = " ".join(text for _, text in document).split(" ")
        cut = max(1, int(len(words) * share))
        return (" ".join(words[:cut]), " ".join(words[cut:])) if cut < len(words) else None
    roles = [role for role, _ in document]
    if roles.count("assistant") != 1 or roles[-1] != "assistant":
        return None
    return "\n\n".join(text for _, text in document[:-1]), document[-1][1]


def batches(corpus: Corpus, tokenizer: PreTrainedTokenizerFast, tokens: int) -> Iterator[dict[str, torch.Tensor]]:
    """Yield batches of about `tokens` tokens on both sides. Pairs of similar length share a batch to save padding."""
    stream, pad = corpus.documents(), tokenizer.pad_token_id
    while True:
        found = [made for d in islice(stream, 4096) if (made := pair(d, corpus.rng.uniform(0.2, 0.8))) is not None]
        sides = [tokenizer([made[side] for made in found])["input_ids"] for side in (0, 1)]
        pool = sorted(zip(*sides, strict=True), key=lambda ids: len(ids[0]) + len(ids[1]))
        made: list[dict[str, torch.Tensor]] = []
        while pool:
            width = len(pool[-1][0]) + len(pool[-1][1])
            rows = [pool.pop() for _ in range(min(len(pool), max(1, tokens // width)))]
            source, target = ([row[side][:CONTEXT] for row in rows] for side in (0, 1))
            made.append(
                {
                    "input_ids": fill(source, pad),
                    "attention_mask": fill([[1] * len(row) for row in source], 0),
                    "labels": fill(target, IGNORED),
                }
            )
        corpus.rng.shuffle(made)
        yield from made


def fill(rows: list[list[int]], value: int) -> torch.Tensor:
    """Return a tensor of shape (rows, longest), padded with `value` on the right."""
    width = max(map(len, rows))
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])


def new_model(tokenizer: PreTrainedTokenizerFast) -> T5ForConditionalGeneration:
    return T5ForConditionalGeneration(
        T5Config(
            vocab_size=len(tokenizer),
            d_model=192,
            d_kv=48,
            d_ff=512,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            tie_word_embeddings=True,
            decoder_start_token_id=tokenizer.pad_token_id,
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def pretrain(
    model: T5ForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, seed: int, steps: int, lr: float, tokens: int
) -> float:
    """Train for `steps` steps, with Muon for the matrices. Return the mean loss of the last hundred steps."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "block" in name and "bias" not in name]
    known = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in known]
    opts: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    losses: list[float] = []
    started = told = time.monotonic()
    for step, batch in enumerate(islice(batches(Corpus(seed), tokenizer, tokens), steps)):
        scale = min(1.0, (step + 1) / 50) * min(1.0, 0.02 + (1 - step / steps) / 0.6)
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = lr * scale
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt in opts:
            opt.step()
            opt.zero_grad(set_to_none=True)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise SystemExit(f"the loss is {losses[-1]} at step {step}")
        now = time.monotonic()
        if now - told >= 8 or step + 1 == steps:
            told = now
            recent = losses[-100:]
            print(f"{now - started:5.0f} s  step {step + 1}/{steps}  loss {sum(recent) / len(recent):.3f}", flush=True)
    return sum(losses[-100:]) / len(losses[-100:])


def save(model: T5ForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, card: str, out: Path) -> None:
    """Write the model as a Hugging Face folder, and check that it can be loaded."""
    shutil.rmtree(out, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    # transformers 4 does not know two names that transformers 5 writes. Replace them with names that both know.
    config = out / "tokenizer_config.json"
    fields = json.loads(config.read_text())
    fields["tokenizer_class"] = "PreTrainedTokenizerFast"
    fields["additional_special_tokens"] = fields.pop("extra_special_tokens")
    for name in ("is_local", "local_files_only", "chat_template"):  # local settings
        fields.pop(name, None)
    config.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
    (out / "model.safetensors").chmod(0o644)  # safetensors makes the file readable for its owner only
    (out / "README.md").write_text(card)
    AutoModelForSeq2SeqLM.from_pretrained(out)
    AutoTokenizer.from_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "model")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--tokens", type=int, default=2048, help="tokens per batch, both sides, padding included")
    parser.add_argument("--lr", type=float, default=6e-3)
    parser.add_argument("--seed", type=int, default=17)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    tokenizer = load_tokenizer()
    model = new_model(tokenizer)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters, {len(tokenizer)} tokens", flush=True)
    loss = pretrain(model, tokenizer, args.seed, args.steps, args.lr, args.tokens)
    card = CARD.format(parameters=parameters, vocabulary=len(tokenizer), steps=args.steps, seed=args.seed, loss=loss)
    save(model, tokenizer, card, args.out)
    size = sum(f.stat().st_size for f in args.out.iterdir())
    print(f"{args.out}: {size / 1e6:.2f} MB, final loss {loss:.3f}", flush=True)


if __name__ == "__main__":
    main()
