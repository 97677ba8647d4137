"""Adapter: one immutable version of one adapter in object storage, identified by its digest."""

from typing import Any, Literal

from pydantic import Field

from graft.api.composition import Compose, Import
from graft.api.meta import Conditions, Resource, Schema, Status, rules
from graft.api.patterns import ARTIFACT_URI, DNS_LABEL, DNS_NAME, SEMVER, SHA256, SHA256_LENGTH, UID, VERSION_RANGE
from graft.api.recipe import MethodName
from graft.api.retention import Retention

DeletionPolicy = Literal["Retain", "Delete"]


class AdapterArtifact(Schema):
    """Where the files of a version are, and the digest that they must have."""

    uri: str = Field(
        pattern=ARTIFACT_URI,
        max_length=1024,
        description="Folder in object storage that holds manifest.json: s3://bucket/prefix/.",
    )
    digest: str = Field(
        pattern=SHA256,
        max_length=SHA256_LENGTH,
        description="sha256:… of manifest.json. The manifest holds the digests of the other files.",
    )


class JobReference(Schema):
    """The FineTuneJob that made the version."""

    name: str = Field(pattern=DNS_NAME, max_length=253, description="Name of the job, in the same namespace.")
    uid: str = Field(pattern=UID, max_length=63, description="UID of the job. A later job may have the same name.")


class AdapterSpec(Schema):
    """Which version of which adapter this is. Only baseVersions, deletionPolicy and retention may be changed."""

    adapter: str = Field(pattern=DNS_LABEL, max_length=40, description="Name of the adapter that this is a version of.")
    version: str = Field(pattern=SEMVER, max_length=32, description="Semantic version, for example 1.4.2.")
    base_model: str = Field(
        pattern=DNS_NAME, max_length=63, description="Name of the BaseModel that the version was tuned on."
    )
    method: MethodName = Field(description="Method that the version was tuned with.")
    artifact: AdapterArtifact | None = Field(
        default=None, description="Files that are already published: where they are, and their digest."
    )
    compose: Compose | None = Field(default=None, description="Make the version by combining other versions.")
    import_: Import | None = Field(
        default=None, alias="import", description="Make the version from files that were tuned elsewhere."
    )
    job: JobReference | None = Field(default=None, description="The FineTuneJob that made the version.")
    deletion_policy: DeletionPolicy = Field(
        default="Retain",
        description="What happens to the files in object storage when this resource is deleted. Retain keeps them, Delete "
        "deletes them.",
    )
    base_versions: str | None = Field(
        default=None,
        pattern=VERSION_RANGE,
        max_length=32,
        description="Range of versions of the BaseModel (its spec.version) that the adapter also fits: 1.4.2, 1.4, ^1 or ^1.4. "
        "When absent, the adapter fits only the files that it was tuned on.",
    )
    retention: Retention | None = Field(
        default=None,
        description="What happens to unused versions of the adapter. The policy of the newest Ready version applies to all "
        "versions. Nothing is deleted or compressed when absent.",
    )


class CompatibleBase(Status):
    """A BaseModel that the version fits now."""

    name: str = Field(pattern=DNS_NAME, max_length=253, description="Name of the BaseModel.")
    version: str | None = Field(default=None, description="spec.version of the BaseModel.")
    digest: str | None = Field(default=None, description="Digest or revision of the BaseModel now.")


class AdapterSignature(Status):
    """The operator's signature of a version that it has verified. docs/signatures.md describes the format."""

    key_id: str = Field(description="Key that signed: the first 16 hex digits of the SHA-256 of the public key.")
    value: str = Field(description="Ed25519 signature in base64.")


class ResolvedParent(Status):
    """A version that the composition combines. It is chosen once and does not change later."""

    name: str = Field(pattern=DNS_NAME, max_length=253, description="Name of the Adapter resource.")
    version: str = Field(pattern=SEMVER, max_length=32, description="Version of the adapter.")
    weight: float = Field(description="Factor that its update is multiplied by.")
    uri: str = Field(pattern=ARTIFACT_URI, max_length=1024, description="Where its files are.")
    digest: str = Field(pattern=SHA256, max_length=SHA256_LENGTH, description="sha256:… of its manifest.json.")


class AdapterStatus(Status):
    """What the operator found out about the version."""

    observed_generation: int | None = Field(
        default=None, description="Generation of the spec that the operator last handled."
    )
    stage: str | None = Field(
        default=None,
        description="Summary of the conditions: Ready, Rejected, Invalid, Verifying, Archived, Restoring or Deleting. Composed "
        "and imported versions can also be Waiting, Composing, Importing or Failed.",
    )
    artifact: AdapterArtifact | None = Field(
        default=None,
        description="Where the files are, and their digest. Taken from the spec, or from what the Job published.",
    )
    parents: list[ResolvedParent] | None = Field(
        default=None, description="The versions that the references in spec.compose.parents were resolved to."
    )
    base_model_digest: str | None = Field(
        default=None, description="Digest or revision of the base model that the version was tuned on."
    )
    rank: int | None = Field(default=None, description="LoRA rank. Absent for other methods.")
    target_modules: list[str] | None = Field(default=None, description="Modules that have a low-rank update.")
    stop_token_ids: list[int] | None = Field(
        default=None,
        description="Ids of the tokens that end an answer, in evaluation and when the version is served. The gateway adds them "
        "to stop_token_ids of each request.",
        json_schema_extra={"x-kubernetes-list-type": "atomic"},
    )
    prompt_template: str | None = Field(
        default=None,
        description="The first of dataset.templates that the version was trained with. The gateway makes the prompts of chats "
        "with it.",
    )
    size_bytes: int | None = Field(
        default=None,
        description="Size in bytes of the files that a server downloads: of an adapter its config and weights, of a whole model all "
        "files.",
    )
    metrics: dict[str, float] | None = Field(
        default=None,
        description="Scores from the evaluation. Names that start with base/ are the scores of the base model.",
    )
    score: str | None = Field(
        default=None, description="Main score in the form: metric base model -> adapter. For kubectl get."
    )
    verified_at: str | None = Field(default=None, description="When the operator last verified every digest.")
    signature: AdapterSignature | None = Field(
        default=None, description="The operator's signature. Absent while the version is not Ready."
    )
    used_by: list[str] | None = Field(default=None, description="AdapterDeployments that serve this version now.")
    compatibility: list[CompatibleBase] | None = Field(
        default=None,
        description="BaseModels that the version fits now.",
        json_schema_extra={"x-kubernetes-list-type": "atomic"},
    )
    last_used_time: str | None = Field(
        default=None,
        description="When an AdapterDeployment last started or stopped using the version. Absent if none ever used it.",
    )
    pruned_after: str | None = Field(
        default=None,
        description="The version is deleted after this time if it is still unused then. See the condition Retained.",
    )
    stored_bytes: int | None = Field(
        default=None, description="Size of the files in storage while they are compressed, in bytes."
    )
    conditions: Conditions


class Adapter(Resource):
    """One immutable version of one adapter."""

    spec: AdapterSpec
    status: AdapterStatus = Field(default_factory=lambda: AdapterStatus(conditions=[]))

    @property
    def artifact(self) -> AdapterArtifact | None:
        """Return where the files are, or None while the version is composed or imported."""
        return self.spec.artifact or self.status.artifact

    @property
    def published(self) -> AdapterArtifact:
        """Return where the files are, for a version that has files. Every Ready version has files."""
        assert self.artifact is not None, f"{self.metadata.name} has no files yet"  # noqa: S101 - only versions with files become Ready
        return self.artifact


CRD: dict[str, Any] = {
    "kind": "Adapter",
    "plural": "adapters",
    "shortNames": ["ad"],
    "scope": "Namespaced",
    "columns": [
        ("Stage", "string", ".status.stage", 0),
        ("Adapter", "string", ".spec.adapter", 0),
        ("Version", "string", ".spec.version", 0),
        ("Method", "string", ".spec.method", 0),
        ("Model", "string", ".spec.baseModel", 0),
        ("Score", "string", ".status.score", 0),
        ("Age", "date", ".metadata.creationTimestamp", 0),
        ("Job", "string", ".spec.job.name", 1),
        ("Used-By", "string", ".status.usedBy", 1),
        ("Last-Used", "date", ".status.lastUsedTime", 1),
        ("Pruned-After", "string", ".status.prunedAfter", 1),
        ("Digest", "string", ".status.artifact.digest", 1),
        ("Message", "string", ".status.conditions[?(@.type=='Ready')].message", 1),
    ],
    "spec_rules": rules(
        (
            "(has(self.artifact) ? 1 : 0) + (has(self.compose) ? 1 : 0) + (has(self.__import__) ? 1 : 0) == 1",
            "give exactly one of artifact (published files), compose and import",
        ),
        (
            "!has(self.compose) || self.method == (self.compose.into == 'base' ? 'full' : 'lora')",
            "a composed version needs method: lora, or method: full if compose.into is base",
        ),
        (
            "!has(self.job) || has(self.artifact)",
            "job is allowed only with artifact: a composed or imported version has no FineTuneJob",
        ),
    ),
    "rules": rules(
        (
            "has(self.spec.artifact) || self.metadata.name.size() <= 52",
            "metadata.name of a composed or imported version must be at most 52 characters, because the name of its Job contains it",
        ),
        (
            "self.metadata.name == self.spec.adapter + '-' + self.spec.version",
            "metadata.name must be <adapter>-<version>, for example support-1.0.0",
        ),
        (
            "self.spec.adapter == oldSelf.spec.adapter && self.spec.version == oldSelf.spec.version && "
            "self.spec.baseModel == oldSelf.spec.baseModel && self.spec.method == oldSelf.spec.method && "
            "has(self.spec.artifact) == has(oldSelf.spec.artifact) && "
            "(!has(self.spec.artifact) || self.spec.artifact == oldSelf.spec.artifact) && "
            "has(self.spec.compose) == has(oldSelf.spec.compose) && "
            "(!has(self.spec.compose) || self.spec.compose == oldSelf.spec.compose) && "
            "has(self.spec.__import__) == has(oldSelf.spec.__import__) && "
            "(!has(self.spec.__import__) || self.spec.__import__ == oldSelf.spec.__import__) && has(self.spec.job) == has(oldSelf.spec.job) && "
            "(!has(self.spec.job) || self.spec.job == oldSelf.spec.job)",
            "a published version never changes: only baseVersions, deletionPolicy and retention may be edited; create a new version instead",
        ),
    ),
}
