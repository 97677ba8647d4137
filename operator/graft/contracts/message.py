"""The base of all messages, and the reference to a base model, which several of them carry."""

from pydantic import BaseModel, ConfigDict
from pydantic.alias_generators import to_camel


class Message(BaseModel):
    """Base of the messages: camelCase on the wire, unknown fields ignored."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="ignore")

    def json_text(self) -> str:
        """The message as JSON text, absent values left out."""
        return self.model_dump_json(by_alias=True, exclude_none=True)


class BaseModelRef(Message):
    """The base model, pinned."""

    name: str
    uri: str  # hf://org/name@<commit>, s3://… or pvc://…
    digest: str | None = None  # of the listing for s3://; an hf:// URI holds the commit itself
    version: str | None = None  # the BaseModel's spec.version

    @property
    def identity(self) -> str:
        """What tells these files from others; what an Adapter's status.baseModelDigest says of those it was tuned on."""
        return self.digest or self.uri
