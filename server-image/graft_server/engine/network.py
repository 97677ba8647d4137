"""The forward passes: each prompt is read alone, then all running sequences get one token per step together.

A prompt is read in a separate pass, so its result depends on nothing else. Running sequences share each step, also with
different adapters. If a model's attention cannot be computed by rows, every sequence takes its steps alone: slower, but
correct. This is checked once, against the model's own logits.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutput

from graft_server.engine.adapters import AdapterWeights, PromptWeights
from graft_server.engine.attention import ROWS, RowCache, can_share, new_cache, stepping
from graft_server.engine.lora import LoraHooks, LoraWeights, Row
from graft_server.engine.model import BaseModel

log = logging.getLogger(__name__)

# A matrix product selects its kernel by the number of rows, so its rounding depends on that number. A step with a
# seeded row therefore always computes this many rows. Then the seeded row's result is the same to the last bit,
# whichever rows share the step.
BLOCK = 16
PROBE_LENGTHS = (5, 11)  # tokens of the two sequences that check a model, of different lengths
PROBE_STEPS = 2
PROBE_TOLERANCE = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 1e-1}  # relative to the largest logit


@dataclass(eq=False)
class Context:
    """The model's state of one sequence. `cache` is the model's own cache, until the sequence becomes a row."""

    cache: Any
    row: RowCache | None = None
    encoded: Any = None  # an encoder's output, if the sequence takes its steps alone
    length: int = 0  # tokens in the cache, including virtual tokens


@dataclass(frozen=True)
class Step:
    """One sequence's part of a step. `lora` is None for a base row and for a row whose adapter is a tuned prompt."""

    context: Context
    token: int
    lora: Row | None = None


class Network:
    """The forward passes of one base model. Only one thread may use it at a time."""

    def __init__(self, base: BaseModel) -> None:
        self.hooks = LoraHooks(base.network, list(base.modules))
        self._base = base
        self._network = base.network
        self._takes = set(signature(base.network.forward).parameters)
        self.reads_whole = base.start_token is not None  # an encoder reads the whole prompt at once
        self.by_rows = False
        self.by_rows = self._can_step_by_rows()

    def begin(self) -> Context:
        """Return the context of a sequence whose prompt has not been read yet."""
        return Context(new_cache(self._network.config))

    def read(self, context: Context, tokens: Sequence[int], weights: AdapterWeights | None, every: bool = False) -> Any:
        """Read the next tokens of a prompt. Return the last token's logits [1, vocab], or with `every` those of all.

        An encoder reads the whole prompt at once. The logits are then those after the decoder's start token.
        """
        prompt = weights.embeddings if isinstance(weights, PromptWeights) and not context.length else None
        with torch.inference_mode(), self.hooks.one(weights if isinstance(weights, LoraWeights) else None):
            inputs: dict[str, Any] = {"input_ids": torch.tensor([tokens])}
            if prompt is not None:
                embedded = self._network.get_input_embeddings()(inputs["input_ids"])
                inputs = {"inputs_embeds": torch.cat([prompt.to(embedded.dtype).unsqueeze(0), embedded], dim=1)}
            if self._base.start_token is not None:
                inputs["decoder_input_ids"] = torch.tensor([[self._base.start_token]])
            output = self._forward(inputs, context.cache, keep=0 if every else 1)
        if self._base.start_token is not None:
            context.encoded = output.encoder_last_hidden_state
            context.length = 1
        else:
            context.length += len(tokens) + (0 if prompt is None else len(prompt))
        return output.logits[0, -len(tokens) :] if every else output.logits[0, -1:]

    def share(self, context: Context) -> None:
        """Turn a sequence whose prompt was read into a row that can share steps, if the model supports rows."""
        if self.by_rows:
            context.row = RowCache(context.cache, context.length)
            context.cache = context.encoded = None

    def step(self, steps: Sequence[Step], repeatable: bool) -> Any:
        """Run one step for every sequence. Return the logits [len(steps), vocab].

        If `repeatable`, no row's result depends on other rows, to the last bit. Callers keep a sequence at its index.
        """
        if not self.by_rows:
            return torch.cat([self._alone(step) for step in steps])
        size = BLOCK if repeatable else len(steps)
        loras = [step.lora for step in steps]
        blocks = []
        for first in range(0, len(steps), size):
            part = steps[first : first + size]
            with self.hooks.rows(loras, first, first + size):
                blocks.append(self._block(part, size))
        return torch.cat(blocks)

    def _block(self, steps: Sequence[Step], size: int) -> Any:
        rows = [step.context.row for step in steps if step.context.row]
        padding = size - len(steps)
        tokens = torch.tensor([[step.token] for step in steps] + [[0]] * padding)
        mask = torch.zeros(1, 1, 1, 1)  # with four dimensions the model builds no mask of its own; rows need none
        with torch.inference_mode(), stepping(rows) as cache:
            if self._base.start_token is None:
                positions = torch.tensor([[row.length] for row in rows] + [[0]] * padding)
                inputs = {"input_ids": tokens, "position_ids": positions, "attention_mask": mask}
            else:
                # A placeholder: each row has its own keys and values of the prompt.
                encoded = torch.zeros(size, 1, self._base.hidden_size, dtype=self._network.dtype)
                inputs = {
                    "decoder_input_ids": tokens,
                    "encoder_outputs": BaseModelOutput(encoded),
                    "attention_mask": mask,
                    "decoder_attention_mask": mask,
                }
            output = self._forward(inputs, cache.for_model())
        for step in steps:
            step.context.length += 1
        return output.logits[: len(steps), -1]

    def _alone(self, step: Step) -> Any:
        context, token = step.context, torch.tensor([[step.token]])
        inputs = {"input_ids": token}
        if context.encoded is not None:
            inputs = {"decoder_input_ids": token, "encoder_outputs": BaseModelOutput(context.encoded)}
        with torch.inference_mode(), self.hooks.one(step.lora.weights if step.lora else None):
            output = self._forward(inputs, context.cache)
        context.length += 1
        return output.logits[:, -1]

    def _forward(self, inputs: dict[str, Any], cache: Any, keep: int = 1) -> Any:
        given = {**inputs, "past_key_values": cache, "use_cache": True, "logits_to_keep": keep}
        return self._network(**{name: value for name, value in given.items() if name in self._takes})

    def _can_step_by_rows(self) -> bool:
        """Return whether steps by rows give the model's own logits, for two sequences of different lengths."""
        config = self._network.config
        if config._attn_implementation != "sdpa":
            log.warning(
                "this model's attention cannot be replaced, so each sequence takes its steps alone, which is slower"
            )
            return False
        own, rows = self._read_probes(), self._read_probes()
        if not all(can_share(context.cache, config) for context in rows):
            log.warning(
                "this model's cache cannot be split into rows, so each sequence takes its steps alone, which is slower"
            )
            return False
        self._network.set_attn_implementation(ROWS)
        self.by_rows = True
        try:
            for context in rows:
                self.share(context)
            for token in range(PROBE_STEPS):
                wanted = torch.cat([self._alone(Step(context, token)) for context in own]).float()
                found = self.step([Step(context, token) for context in rows], repeatable=False).float()
                limit = PROBE_TOLERANCE[self._network.dtype] * float(wanted.abs().max())
                if not float((wanted - found).abs().max()) <= limit:
                    raise ArithmeticError("steps by rows give other logits than the model's own steps")
        except Exception as error:  # on any error fall back to the model's own attention, which works
            log.warning(
                "this model cannot take steps by rows, so each sequence takes its steps alone, which is slower: %s",
                error,
            )
            self._network.set_attn_implementation("sdpa")
            return False
        return True

    def _read_probes(self) -> list[Context]:
        contexts = []
        for length in PROBE_LENGTHS:
            context = self.begin()
            self.read(context, [7 * index % self._base.vocab_size for index in range(length)], None)
            while context.length < length:  # a decoder has read only its start token so far
                self._alone(Step(context, context.length))
            contexts.append(context)
        return contexts
