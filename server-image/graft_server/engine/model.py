"""The base model and its tokenizer, read from one local directory."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from graft.artifacts.modulenames import Renaming
from graft.controltokens import MARK, ControlTokenError, control_tokens, encode_one, mark, read_texts, unmarked
from transformers import AutoConfig, AutoTokenizer, BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from graft_server.engine.calls import for_template
from graft_server.engine.classes import class_of, names_of
from graft_server.engine.settings import Settings

DEFAULT_CONTEXT = 2048  # tokens, if the config states no limit


class PromptError(ValueError):
    """The request has no valid prompt for this model. The message says why."""


@dataclass(frozen=True)
class ModuleShape:
    """The shape of a module that LoRA can adapt: its inputs, its outputs, and whether it is an embedding."""

    inputs: int
    outputs: int
    embedding: bool = False


@dataclass(frozen=True)
class SamplingDefaults:
    """The sampling values for a request that does not set them."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0


@dataclass(frozen=True)
class BaseModel:
    """A loaded base model. `modules` has every module an adapter may target, by its full name.

    `start_token` is the first token of an encoder-decoder's answer, and None for a causal model. `longest_token` is the
    length of the vocabulary's longest token, in characters.
    """

    network: Any
    tokenizer: Any
    max_model_len: int
    vocab_size: int
    hidden_size: int
    start_token: int | None
    longest_token: int
    eos_ids: frozenset[int]
    defaults: SamplingDefaults
    modules: Mapping[str, ModuleShape]
    names: Renaming = field(default_factory=Renaming)  # how adapters call the modules

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a completion prompt, with the tokenizer's special tokens.

        Raises PromptError if the prompt is too long.
        """
        self._check_length(text)
        if self.start_token is None:
            return read_texts(self.tokenizer, [text])[0]
        return list(self.tokenizer.encode(text))

    @cached_property
    def _controls(self) -> re.Pattern[str] | None:
        return control_tokens(self.tokenizer)

    def _check_length(self, text: str) -> None:
        """Raise PromptError if a text cannot fit in the context.

        A text that cannot fit in the context is not tokenized: megabytes would block the tokenizer for seconds.
        """
        if len(text) > (limit := self.max_model_len * self.longest_token):
            raise PromptError(
                f"This model's maximum context length is {self.max_model_len} tokens, which hold at most {limit} characters. "
                f"However, your prompt contains {len(text)} characters. Please reduce the length of the prompt."
            )

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of token ids, without special tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True))

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        template_arguments: Mapping[str, Any],
        tools: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[int]:
        """Return the token ids of a conversation in the model's chat template, up to the assistant's next turn.

        An encoder-decoder without a template gets plain text, as in training. Raises PromptError if the template is
        missing or refuses the messages, or if an argument is reserved. Control tokens in the texts stay words, as in
        training.
        """
        if not self.tokenizer.chat_template and tools:
            raise PromptError("tools: the model has no chat template that could show them to it")
        if not self.tokenizer.chat_template and self.start_token is not None:
            return self.encode(_plain(messages))
        if not self.tokenizer.chat_template:
            raise PromptError("messages: the model has no chat template; use /v1/completions or --chat-template")
        reserved = set(signature(self.tokenizer.apply_chat_template).parameters) & set(template_arguments)
        if reserved:
            raise PromptError(f"chat_template_kwargs: {', '.join(sorted(reserved))} cannot be set")
        plain: list[Any] = [
            for_template(messages, self.tokenizer.get_chat_template(tools=tools)),
            tools,
            dict(template_arguments),
        ]
        try:
            marked = mark(plain, self._controls)
            text = self._render(*marked)
            if MARK in text and unmarked(text) != self._render(*plain):
                raise PromptError(
                    "messages: remove the model's control tokens, which change what the chat template renders"
                )
            self._check_length(text)
            return encode_one(self.tokenizer, text)
        except ControlTokenError as error:
            raise PromptError(f"messages: {error}") from error

    def encode_templated(
        self, messages: Sequence[Mapping[str, Any]], template: str, tools: Sequence[Mapping[str, Any]] | None
    ) -> list[int]:
        """Return the token ids of the prompt that a trusted template makes of a chat. It is read as a completion's.

        Raises PromptError if the template refuses the messages.
        """
        return self.encode(self._render(list(messages), tools, {"chat_template": template}))

    def _render(self, messages: Any, tools: Any, arguments: dict[str, Any]) -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages, tools=tools, tokenize=False, add_generation_prompt=True, **arguments
                )
            )
        except Exception as error:  # a template is a program: a client's messages can cause any error in it
            raise PromptError(f"messages: the chat template refused them: {error}") from error


def _plain(messages: Sequence[Mapping[str, Any]]) -> str:
    """Return the question as the trainer formats it: the system's and the user's messages, with an empty line between.

    The trainer uses no earlier turns. So of a longer conversation, only the messages after the last answer and all
    system messages are used.
    """
    answered = max((at for at, message in enumerate(messages) if message["role"] in ("assistant", "tool")), default=-1)
    asked = [
        message for at, message in enumerate(messages) if at > answered or message["role"] in ("system", "developer")
    ]
    if not any(message["role"] not in ("system", "developer") for message in asked):
        raise PromptError("messages: the model has no chat template, so a user message must follow the last answer")
    return "\n\n".join(str(message["content"]) for message in asked)


def load_base_model(settings: Settings) -> BaseModel:
    """Load the model that the settings name. Only safetensors are read, and no code from the model's directory is run.

    Raises OSError or ValueError if the directory holds no such model, or if weights are missing.
    """
    dtype = torch.float32 if settings.dtype == "auto" else getattr(torch, settings.dtype)
    if not (Path(settings.model) / "config.json").is_file():
        raise FileNotFoundError("there is no config.json")
    local = {"trust_remote_code": False, "local_files_only": True}
    config = AutoConfig.from_pretrained(settings.model, **local)
    quantized = _quantization(settings, dtype)
    network, found = class_of(config).from_pretrained(
        settings.model,
        dtype=dtype,
        use_safetensors=True,
        output_loading_info=True,
        # None would override the quantization config of a base model that was saved in 4 bits.
        **({"quantization_config": quantized} if quantized else {}),
        **local,
    )
    if missing := sorted(map(str, found["missing_keys"])):  # transformers only warns and fills them with random values
        raise ValueError(
            f"{settings.model} lacks {len(missing)} weights that its config.json needs, the first is {missing[0]}"
        )
    network.eval().requires_grad_(False)
    tokenizer = AutoTokenizer.from_pretrained(settings.model, trust_remote_code=False, local_files_only=True)
    if settings.chat_template:
        tokenizer.chat_template = _chat_template(settings.chat_template)
    tokenizer.encode("warm up")  # resets the padding settings of tokenizer.json before two threads use the tokenizer

    names = names_of(network, config)
    config = network.config.get_text_config()
    stated = (getattr(config, name, None) for name in ("max_position_embeddings", "n_positions"))
    limit = int(next((length for length in stated if length), DEFAULT_CONTEXT))
    length = settings.max_model_len or limit
    if length > limit:
        raise ValueError(f"--max-model-len {length} is more than the {limit} tokens the model's config allows")
    generation = network.generation_config
    return BaseModel(
        network=network,
        tokenizer=tokenizer,
        max_model_len=length,
        vocab_size=network.get_input_embeddings().num_embeddings,
        hidden_size=network.get_input_embeddings().embedding_dim,
        longest_token=max(map(len, tokenizer.get_vocab())),
        start_token=_start_token(network) if network.config.is_encoder_decoder else None,
        eos_ids=frozenset(
            _ids(generation.eos_token_id) + _ids(getattr(config, "eos_token_id", None)) + _ids(tokenizer.eos_token_id)
        ),
        defaults=_sampling_defaults(generation) if settings.generation_config == "auto" else SamplingDefaults(),
        modules=adaptable_modules(network),
        names=names,
    )


def adaptable_modules(network: Any) -> dict[str, ModuleShape]:
    """Return the modules of a network that LoRA can adapt: linear layers (GPT-2's Conv1D too) and embeddings."""
    shapes = {}
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.Linear):
            shapes[name] = ModuleShape(module.in_features, module.out_features)
        elif isinstance(module, Conv1D):
            shapes[name] = ModuleShape(module.weight.shape[0], module.weight.shape[1])
        elif isinstance(module, torch.nn.Embedding):
            shapes[name] = ModuleShape(module.num_embeddings, module.embedding_dim, embedding=True)
    return shapes


def _quantization(settings: Settings, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """Return the config of 4-bit weights as in QLoRA (Dettmers et al., arXiv:2305.14314): nf4, scales quantized."""
    if settings.quantization is None:
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _start_token(network: Any) -> int:
    configs = (network.generation_config, network.config)
    found = (getattr(config, "decoder_start_token_id", None) for config in configs)
    token = next((token for token in found if token is not None), None)
    if token is None:
        raise ValueError("the model's config has no decoder_start_token_id, which an encoder-decoder needs")
    return int(token)


def _sampling_defaults(generation: Any) -> SamplingDefaults:
    names = ("temperature", "top_p", "top_k", "repetition_penalty")
    given = {name: getattr(generation, name, None) for name in names}
    return SamplingDefaults(**{name: value for name, value in given.items() if value is not None})


def _chat_template(text_or_path: str) -> str:
    if "{" in text_or_path:  # a template always contains a brace, a path almost never does
        return text_or_path
    return Path(text_or_path).read_text(encoding="utf-8")


def _ids(value: int | list[int] | None) -> list[int]:
    if value is None:
        return []
    return list(value) if isinstance(value, list) else [value]
