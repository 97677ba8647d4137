"""The base class of all messages, the bounds of their fields, and the reference to a base model that several contain.

A message is written by one part and read by another, and the reader does not trust the writer. So each message has limits
on its bytes, depth and values, which `read` checks before memory is spent, and each of its fields has bounds.
"""

from itertools import islice
from typing import Annotated, ClassVar, Self, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError
from pydantic.alias_generators import to_camel

from graft.api.patterns import SENTENCES
from graft.bounded import Limits, OutOfBounds, parse_json

MOST = 2**53  # a larger integer changes when a reader converts it to a float, as JavaScript and jq do
NAME = 253  # characters of a name, the most that Kubernetes allows
KEY = 128  # bytes of a key in a map
TEXT = 4096  # bytes of a text for people
CONFIGMAP = 1024 * 1024  # bytes of a ConfigMap, the most that Kubernetes allows
P = TypeVar("P", bound=BaseModel)
E = TypeVar("E")


def cut(text: str, most: int = TEXT) -> str:
    """Return a text of at most `most` bytes in UTF-8. A cut text ends in an ellipsis."""
    data = text.encode(errors="replace")
    if len(data) <= most:
        return text
    return data[: most - 3].decode(errors="ignore") + "…"


def _key(text: str) -> str:
    if not text.isprintable() or len(text.encode()) > KEY:
        raise ValueError(f"a key must have at most {KEY} bytes, all of them printable characters")
    return text


def first(most: int) -> AfterValidator:
    """Return a validator that keeps the first `most` items of a list."""

    def kept(items: list[E]) -> list[E]:
        return items[:most]

    return AfterValidator(kept)


def first_entries(most: int) -> AfterValidator:
    """Return a validator that keeps the first `most` entries of a map."""

    def kept(entries: dict[str, E]) -> dict[str, E]:
        return dict(islice(entries.items(), most))

    return AfterValidator(kept)


Name = Annotated[str, Field(max_length=NAME)]
Uri = Annotated[str, Field(max_length=2048)]
Words = Annotated[str, AfterValidator(cut)]  # for people. A text that is too long is cut
Key = Annotated[str, AfterValidator(_key)]
Whole = Annotated[int, Field(ge=-MOST, le=MOST)]
Size = Annotated[int, Field(ge=0, le=MOST)]  # bytes
Real = Annotated[float, Field(allow_inf_nan=False)]
Scalar = bool | Whole | Real | Annotated[str, Field(max_length=NAME)] | None


class Message(BaseModel):
    """Base class of the messages. JSON keys are in camelCase, and unknown fields are ignored."""

    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, extra="ignore", hide_input_in_errors=True
    )
    limits: ClassVar[Limits] = Limits(size=16 * 1024, depth=4, values=200)

    def json_text(self) -> str:
        """Return the message as JSON text without the fields that are None."""
        return self.model_dump_json(by_alias=True, exclude_none=True)

    @classmethod
    def read(cls, data: bytes | str) -> Self:
        """Return the message that another part has written. Raises OutOfBounds if it is not such a message."""
        return read_as(cls, data, cls.limits, cls.__name__)


def read_as(kind: type[P], data: bytes | str, limits: Limits, what: str) -> P:
    """Return the object of a kind in JSON text within the limits. `what` names the text in messages.

    Raises OutOfBounds. Its message names the first wrong field, never its value: the value may be another user's
    secret.
    """
    text = data.encode(errors="surrogatepass") if isinstance(data, str) else data
    value = parse_json(text, limits, what)
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        why = first_problem(error)
    except OverflowError:
        why = "a number is too large"
    raise OutOfBounds(f"{what} is invalid: {why}")


def first_problem(error: ValidationError) -> str:
    """Return the first wrong field and what is wrong with it, without its value."""
    found = error.errors(include_url=False, include_input=False)[0]
    where = ".".join(str(part) for part in found["loc"])
    said = SENTENCES.get(str(found.get("ctx", {}).get("pattern")), found["msg"])
    return cut(f"{where}: {said}" if where else said, 500)


class BaseModelRef(Message):
    """A base model, pinned to exact files."""

    name: Name
    uri: Uri  # hf://org/name@<commit>, s3://… or pvc://…
    digest: Name | None = None  # digest of the listing of s3:// files; an hf:// URI contains the commit instead
    version: Name | None = None  # the BaseModel's spec.version
    license: Annotated[str, Field(max_length=256)] | None = (
        None  # of the weights, as their source or the BaseModel names it
    )

    @property
    def identity(self) -> str:
        """Return the identity of the files. status.baseModelDigest of an Adapter holds the one that it was tuned on."""
        return self.digest or self.uri
