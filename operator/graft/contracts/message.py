"""The base class of all messages, and the reference to a base model that several of them contain."""

from pydantic import BaseModel, ConfigDict
from pydantic.alias_generators import to_camel


class Message(BaseModel):
    """Base class of the messages. JSON keys are in camelCase, and unknown fields are ignored."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="ignore")

    def json_text(self) -> str:
        """Return the message as JSON text without the fields that are None."""
        return self.model_dump_json(by_alias=True, exclude_none=True)


class BaseModelRef(Message):
    """A base model, pinned to exact files."""

    name: str
    uri: str  # hf://org/name@<commit>, s3://… or pvc://…
    digest: str | None = None  # digest of the listing of s3:// files; an hf:// URI contains the commit instead
    version: str | None = None  # the BaseModel's spec.version

    @property
    def identity(self) -> str:
        """Return the identity of the files. status.baseModelDigest of an Adapter holds the one that it was tuned on."""
        return self.digest or self.uri
