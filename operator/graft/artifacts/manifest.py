"""The contents of manifest.json.

It is written last: with it, a version is published. It holds the SHA-256 of every other file.
"""

import hashlib
import re
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic.alias_generators import to_camel

from graft.bounded import Limits
from graft.contracts.message import Key, Name, Real, Scalar, Size, Uri, Whole, Words, read_as
from graft.contracts.progress import METRICS, MODULES
from graft.prompttemplates import LONGEST

LIMITS = Limits(size=1024 * 1024, depth=6, values=20_000)

ADAPTER_FILES = frozenset({"adapter_config.json", "adapter_model.safetensors"})
# The files of a tokenizer that hold its tokens: a model with one of them has a tokenizer. The names are those of the
# tokenizer classes in transformers.
VOCABULARIES = frozenset(
    {
        "tokenizer.json",
        "tokenizer.model",
        "spiece.model",
        "sentencepiece.bpe.model",
        "sentencepiece.model",
        "spm.model",
        "source.spm",
        "tekken.json",
        "tiktoken.model",
        "qwen.tiktoken",
        "vocab.json",
        "vocab.txt",
    }
)
TOKENIZER_FILES = VOCABULARIES | {
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "target.spm",
    "chat_template.jinja",
    "chat_template.json",
}
# What a multimodal model needs beside its tokenizer: engines do not start without it.
PROCESSOR_FILES = frozenset({"processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"})
CARD = "README.md"  # the model card, in the form of the Hugging Face Hub
# For people. No program of Graft reads them to serve, combine or compare a version.
PEOPLE_FILES = frozenset({CARD, "report.json", "report.html"})
# The files that a version may contain. Weights are safetensors only. A manifest that lists any other file is invalid.
ALLOWED_FILES = (
    ADAPTER_FILES
    | TOKENIZER_FILES
    | PROCESSOR_FILES
    | PEOPLE_FILES
    | {"config.json", "generation_config.json", "model.safetensors", "model.safetensors.index.json"}
)
SHARD = re.compile(r"model-\d{5}-of-\d{5}\.safetensors")


Token = Annotated[int, Field(ge=0, lt=2**31)]  # id of a token in the base model's vocabulary
StopTokens = Annotated[list[Token], Field(max_length=64)]


class _Part(BaseModel):
    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, extra="ignore", hide_input_in_errors=True, frozen=True
    )


class ManifestFile(_Part):
    """One file of the version."""

    name: Name
    size: Size
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class ManifestBaseModel(_Part):
    """The base model that the adapter belongs to."""

    name: Name
    uri: Uri
    digest: Name | None = None


class ManifestJob(_Part):
    """The run that made the version."""

    name: Name
    namespace: Name
    uid: Name
    attempt: Name


class ManifestParent(_Part):
    """A parent of a composed version."""

    adapter: Name
    version: Name
    digest: Name
    weight: Real


class EffectPrompt(_Part):
    """One prompt, and the log-probabilities of some tokens as the next token. Without tokens, nothing was measured."""

    prompt: Annotated[list[Token], Field(min_length=1, max_length=64)]
    tokens: Annotated[list[Token], Field(max_length=64)] = []
    base: Annotated[list[Real], Field(max_length=64)] = []  # nats, without the adapter, for each of `tokens`
    adapter: Annotated[list[Real], Field(max_length=64)] = []  # nats, with the adapter

    @model_validator(mode="after")
    def _aligned(self) -> "EffectPrompt":
        if not len(self.tokens) == len(self.base) == len(self.adapter):
            raise ValueError("tokens, base and adapter of a prompt must have the same length")
        return self


class Effect(_Part):
    """What the adapter changes in the answers of its base model. A server compares it after each load."""

    prompts: Annotated[list[EffectPrompt], Field(min_length=1, max_length=8)]
    unmeasured: Words | None = None  # why the answers are not recorded. A server then checks that there is an effect


class Manifest(_Part):
    """The contents of manifest.json, schema version 1."""

    schema_version: int = 1
    adapter: Name
    version: Name
    method: Name
    base_model: ManifestBaseModel
    job: ManifestJob
    recipe: Name
    hyperparameters: Annotated[dict[Key, Scalar], Field(max_length=64)]
    datasets: Annotated[dict[Key, Name], Field(max_length=64)] = {}  # train, eval, suite/<name> -> sha256:… of the file
    metrics: Annotated[dict[Key, Real], Field(max_length=METRICS)] = {}
    task: Name = "causal"
    rank: Whole | None = None  # for lora and qlora
    target_modules: Annotated[list[Name], Field(max_length=MODULES)] = []
    stop_token_ids: StopTokens = []  # the tokens that end an answer, in evaluation and when the version is served
    prompt_template: Annotated[str, Field(max_length=LONGEST)] | None = None  # the first of dataset.templates
    rejected: Annotated[
        list[Words], Field(max_length=32)
    ] = []  # the missed gates, as texts; a version that missed one is never served
    files: Annotated[list[ManifestFile], Field(max_length=1000)]
    image: Uri = ""
    parents: Annotated[list[ManifestParent], Field(max_length=64)] = []
    composition: Annotated[dict[Key, Scalar], Field(max_length=64)] | None = (
        None  # how the parents were combined: the method and its parameters
    )
    imported_from: Uri | None = (
        None  # pinned: hf://org/name@<commit>, or s3://bucket/prefix/ as listed in source_digest
    )
    source_digest: Name | None = None
    effect: Effect | None = None  # None: a whole model, an adapter without effect, or a version of an earlier Graft
    created_at: Name

    @classmethod
    def read(cls, data: bytes | str) -> "Manifest":
        """Return the manifest in the bytes of manifest.json. Raises OutOfBounds if it is invalid or exceeds LIMITS."""
        return read_as(cls, data, LIMITS, "manifest.json")

    @field_validator("schema_version")
    @classmethod
    def _known_schema(cls, value: int) -> int:
        if value != 1:
            raise ValueError(f"this version of Graft does not know the manifest schema version {value}; upgrade Graft")
        return value

    @field_validator("files")
    @classmethod
    def _only_known_files(cls, files: list[ManifestFile]) -> list[ManifestFile]:
        names = [file.name for file in files]
        if unknown := sorted(name for name in set(names) - ALLOWED_FILES if not SHARD.fullmatch(name)):
            raise ValueError(f"a version must not contain these files: {', '.join(unknown)}")
        if len(set(names)) != len(names):
            raise ValueError("the manifest lists a file twice")
        return files

    @model_validator(mode="after")
    def _whole(self) -> "Manifest":
        names = {file.name for file in self.files}
        if self.method == "full":
            weights = any(name == "model.safetensors" or SHARD.fullmatch(name) for name in names)
            missing = {"config.json"} - names | (set() if weights else {"model.safetensors"})
        else:
            missing = set(ADAPTER_FILES - names)
        if missing:
            raise ValueError(f"these required files are missing: {', '.join(sorted(missing))}")
        return self

    def to_bytes(self) -> bytes:
        """Return the canonical bytes. They are stored, and their digest identifies the version."""
        return (self.model_dump_json(by_alias=True, indent=1) + "\n").encode()

    @property
    def size_bytes(self) -> int:
        return sum(file.size for file in self.files)

    @property
    def served_bytes(self) -> int:
        """The bytes that a server downloads: of an adapter its config and weights, of a whole model all files."""
        names = None if self.method == "full" else ADAPTER_FILES
        return sum(file.size for file in self.files if names is None or file.name in names)


def digest(data: bytes) -> str:
    """Return the SHA-256 of some bytes as sha256:…"""
    return "sha256:" + hashlib.sha256(data).hexdigest()
