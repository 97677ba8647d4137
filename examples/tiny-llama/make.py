"""Make the tiny base model of the quickstart: a Llama of a few million parameters, pretrained from scratch on a CPU.

The quickstart and the end-to-end tests need a model that is small enough to be committed and to be tuned in one or two
minutes. Its pretraining must still be broad enough that tuning works. No published model has both properties, so this
script pretrains one on the synthetic text of corpus.py.

    python examples/tiny-llama/make.py --out examples/tiny-llama/model
"""

import argparse
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

# Threads that wait in a busy loop make training ten times slower if other processes use the same cores.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from corpus import Corpus, Document
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).parent
BOS, EOS, PAD = "<s>", "</s>", "<pad>"
ROLES = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}
SPECIAL = [PAD, BOS, EOS, *ROLES.values()]
VOCABULARY = 1536
CONTEXT = 512
# Weight of a prompt's tokens in the loss. An answer's tokens have weight 1. Prompts teach language, answers the task.
PROMPT_WEIGHT = 0.1

CARD = """\
---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: text-generation
---

# tiny-llama

A Llama small enough to be committed: {parameters:,} parameters, {vocabulary} tokens, contexts of {context} tokens,
weights in bfloat16. It exists so that Graft's quickstart and tests can tune and serve a real model on a laptop's CPU.
It is good for nothing else: it knows a few hundred English words.

- Made by `examples/tiny-llama/make.py` from nothing: {steps} steps with seed {seed}, about ten minutes on two idle CPU
  cores; mean loss at the end {loss:.3f}.
- Training text: the templates of `examples/tiny-llama/phrases.py`, put together by `corpus.py`. No text or weights of
  anybody else are in it.
- Chat format: `<|system|>`, `<|user|>` and `<|assistant|>`, each followed by its text; an assistant's turn ends with
  `</s>`. The template marks the assistant's tokens, so `return_assistant_tokens_mask` works.
- Tokenizer: byte-level BPE, digits one by one; any text can be encoded.

Licence: Apache-2.0.
"""

# The same format as in encode_document. The generation marks let transformers report which tokens are the assistant's.
CHAT_TEMPLATE = """\
{{- bos_token }}
{%- for message in messages %}
{%- if message['role'] == 'assistant' %}
{{- '<|assistant|>' }}{% generation %}{{ message['content'] | trim + eos_token }}{% endgeneration %}
{%- else %}
{{- '<|' + message['role'] + '|>' + message['content'] | trim }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|assistant|>' }}
{%- endif %}
"""


def train_tokenizer(documents: list[Document]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer. It can encode any text, and most words of the corpus are one token each."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for document in documents for _, text in document), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=list(ROLES.values()),
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )


def encode_document(tokenizer: Tokenizer, document: Document) -> tuple[list[int], list[float]]:
    """Return the token ids of a document and the weight of each token in the loss, cut to CONTEXT tokens."""
    ids, weights = [tokenizer.token_to_id(BOS)], [0.0]
    for role, text in document:
        words = tokenizer.encode(text).ids
        if role == "text":
            ids += words
            weights += [1.0] * len(words)
            continue
        ids += [tokenizer.token_to_id(ROLES[role]), *words]
        weights += [0.0, *([1.0 if role == "assistant" else PROMPT_WEIGHT] * len(words))]
        if role == "assistant":
            ids.append(tokenizer.token_to_id(EOS))
            weights.append(1.0)
    if document[-1][0] == "text":
        ids.append(tokenizer.token_to_id(EOS))
        weights.append(1.0)
    return ids[:CONTEXT], weights[:CONTEXT]


def batches(corpus: Corpus, tokenizer: Tokenizer, tokens: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield batches (ids, weights), each of shape (documents, longest), with about `tokens` tokens.

    Documents of similar length share a batch, because padding is wasted work. They are not packed into one row, because
    then a document could attend to its neighbours.
    """
    pad = tokenizer.token_to_id(PAD)
    stream = corpus.documents()
    while True:
        pool = sorted((encode_document(tokenizer, d) for d in islice(stream, 4096)), key=lambda pair: len(pair[0]))
        made: list[tuple[torch.Tensor, torch.Tensor]] = []
        while pool:
            width = len(pool[-1][0])
            rows = [pool.pop() for _ in range(min(len(pool), max(1, tokens // width)))]
            ids = torch.tensor([row + [pad] * (width - len(row)) for row, _ in rows])
            weights = torch.tensor([row + [0.0] * (width - len(row)) for _, row in rows])
            made.append((ids, weights))
        corpus.rng.shuffle(made)
        yield from made


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=256,
            intermediate_size=704,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def optimizers(model: LlamaForCausalLM, lr: float) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices and AdamW for the others. This needs about half the steps of AdamW alone."""
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    known = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in known]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def pretrain(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int, steps: int, lr: float, tokens: int
) -> float:
    """Train for `steps` steps and return the mean loss of the last hundred."""
    opts = optimizers(model, lr)
    stream = batches(Corpus(seed), Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()), tokens)
    losses: list[float] = []
    started = told = time.monotonic()
    for step, (ids, weights) in enumerate(islice(stream, steps)):
        done = step / steps
        scale = min(1.0, (step + 1) / 50) * min(1.0, 0.02 + (1 - done) / 0.6)
        for opt in opts:
            for group in opt.param_groups:
                group["lr"] = lr * scale
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        loss = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        weight = weights[:, 1:].flatten()
        loss = (loss * weight).sum() / weight.sum()
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


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, card: str, out: Path) -> None:
    """Write the model as a Hugging Face folder, and check that it can be loaded."""
    shutil.rmtree(out, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    # transformers 4 does not know two names that transformers 5 writes. Replace them with names that both know.
    config = out / "tokenizer_config.json"
    fields = json.loads(config.read_text())
    fields["tokenizer_class"] = "PreTrainedTokenizerFast"
    fields["additional_special_tokens"] = fields.pop("extra_special_tokens")
    config.write_text(json.dumps(fields, indent=2, sort_keys=True) + "\n")
    (out / "model.safetensors").chmod(0o644)  # safetensors makes the file readable for its owner only
    (out / "README.md").write_text(card)
    AutoModelForCausalLM.from_pretrained(out)
    AutoTokenizer.from_pretrained(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "model")
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens per batch, padding included")
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--seed", type=int, default=17)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    tokenizer = train_tokenizer(list(islice(Corpus(args.seed).documents(), 20_000)))
    model = new_model(tokenizer)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters:,} parameters, {len(tokenizer)} tokens", flush=True)
    loss = pretrain(model, tokenizer, args.seed, args.steps, args.lr, args.tokens)
    card = CARD.format(
        parameters=parameters, vocabulary=len(tokenizer), context=CONTEXT, steps=args.steps, seed=args.seed, loss=loss,
    )  # fmt: skip
    save(model, tokenizer, card, args.out)
    size = sum(f.stat().st_size for f in args.out.iterdir())
    print(f"{args.out}: {size / 1e6:.2f} MB, final loss {loss:.3f}", flush=True)


if __name__ == "__main__":
    main()
