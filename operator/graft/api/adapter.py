"""Adapter: one immutable version of one adapter, in object storage, with its digest."""

from typing import Any, Literal

from pydantic import Field

from graft.api.composition import Compose, Import
from graft.api.meta import DNS_LABEL, SEMVER, SHA256, VERSION_RANGE, Conditions, Resource, Schema, Status, rules
from graft.api.recipe import MethodName
from graft.api.retention import Retention

DeletionPolicy = Literal["Retain", "Delete"]


class AdapterArtifact(Schema):
    """Where the files are and what they must be."""

    uri: str = Field(
        pattern=r"^s3://[^/\s]+/[^\s]+/$", max_length=1024, description="s3://bucket/prefix/ that holds manifest.json."
    )
    digest: str = Field(pattern=SHA256, description="sha256:… of manifest.json, which holds the digests of the files.")


class JobReference(Schema):
    """The FineTuneJob that made the version."""

    name: str = Field(description="Its name, in this namespace.")
    uid: str = Field(description="Its UID; the name may have been used again since.")


class AdapterSpec(Schema):
    """Which version of which adapter this is; immutable but for baseVersions, deletionPolicy and retention."""

    adapter: str = Field(pattern=DNS_LABEL, max_length=40, description="The adapter that this is a version of.")
    version: str = Field(pattern=SEMVER, max_length=32, description="Semantic version, for example 1.4.2.")
    base_model: str = Field(max_length=63, description="The BaseModel that it was tuned on.")
    method: MethodName = Field(description="How it was tuned.")
    artifact: AdapterArtifact | None = Field(
        default=None, description="Files that are published already: where they are and what they must be."
    )
    compose: Compose | None = Field(default=None, description="Make the version from other versions.")
    import_: Import | None = Field(
        default=None, alias="import", description="Make the version from files that were tuned elsewhere."
    )
    job: JobReference | None = Field(default=None, description="The FineTuneJob that made it.")
    deletion_policy: DeletionPolicy = Field(
        default="Retain",
        description="What deleting this resource does to the files in object storage: Retain keeps them, Delete removes them.",
    )
    base_versions: str | None = Field(
        default=None,
        pattern=VERSION_RANGE,
        max_length=32,
        description="Versions of the BaseModel (its spec.version) that this adapter fits beside the very files that it was tuned on: "
        "1.4.2, 1.4, ^1 or ^1.4.",
    )
    retention: Retention | None = Field(
        default=None,
        description="What happens to unused versions of the adapter; that of the newest Ready version is in force for all.",
    )


class CompatibleBase(Status):
    """A BaseModel that the version fits now."""

    name: str = Field(description="Name of the BaseModel.")
    version: str | None = Field(default=None, description="Its spec.version.")
    digest: str | None = Field(default=None, description="Digest or revision that it has now.")


class AdapterSignature(Status):
    """The operator's signature of a version that it has verified; docs/signatures.md has the format."""

    key_id: str = Field(description="Which key signed: the first 16 hex digits of the SHA-256 of the public key.")
    value: str = Field(description="Ed25519 signature, base64.")


class ResolvedParent(Status):
    """A version that the composition takes; decided once."""

    name: str = Field(description="The Adapter.")
    version: str = Field(description="Its version.")
    weight: float = Field(description="What its update is multiplied with.")
    uri: str = Field(description="Where its files are.")
    digest: str = Field(description="sha256:… of its manifest.json.")


class AdapterStatus(Status):
    """What the operator verified."""

    observed_generation: int | None = Field(default=None, description="The spec's generation that was last handled.")
    stage: str | None = Field(
        default=None,
        description="A summary of the conditions: Ready, Rejected, Invalid, Verifying, Archived, Restoring, Deleting; of composed "
        "and imported versions before that Waiting, Composing, Importing, Failed.",
    )
    artifact: AdapterArtifact | None = Field(
        default=None, description="Where the files are and what they must be: the spec's, or what the Job published."
    )
    parents: list[ResolvedParent] | None = Field(
        default=None, description="What the references in spec.compose.parents stand for."
    )
    base_model_digest: str | None = Field(
        default=None, description="Digest or revision of the base that it was tuned on."
    )
    rank: int | None = Field(default=None, description="LoRA rank; absent for other methods.")
    target_modules: list[str] | None = Field(default=None, description="Modules that carry the low-rank update.")
    size_bytes: int | None = Field(default=None, description="Size of the files.")
    metrics: dict[str, float] | None = Field(
        default=None, description="Scores on the held-out set; base/… are the base model's own."
    )
    score: str | None = Field(default=None, description="The main score as base -> adapter, for kubectl get.")
    verified_at: str | None = Field(default=None, description="When every digest was last verified.")
    signature: AdapterSignature | None = Field(
        default=None, description="The operator's signature; absent while the version is not Ready."
    )
    used_by: list[str] | None = Field(default=None, description="AdapterDeployments that serve this version now.")
    compatibility: list[CompatibleBase] | None = Field(
        default=None,
        description="The BaseModels that the version fits now.",
        json_schema_extra={"x-kubernetes-list-type": "atomic"},
    )
    last_used_time: str | None = Field(
        default=None, description="When an AdapterDeployment last began or ceased to use it; absent when none ever did."
    )
    pruned_after: str | None = Field(
        default=None, description="When the version is deleted if it is still unused then; see the condition Retained."
    )
    stored_bytes: int | None = Field(default=None, description="Size of its files as they are compressed in storage.")
    conditions: Conditions


class Adapter(Resource):
    """One immutable version of one adapter."""

    spec: AdapterSpec
    status: AdapterStatus = Field(default_factory=lambda: AdapterStatus(conditions=[]))

    @property
    def artifact(self) -> AdapterArtifact | None:
        """Where the files are; None while the version is composed or imported."""
        return self.spec.artifact or self.status.artifact

    @property
    def published(self) -> AdapterArtifact:
        """Where the files of a version that is Ready are."""
        assert self.artifact is not None, f"{self.metadata.name} has no files yet"  # noqa: S101 - Ready comes after them
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
    ],
    "spec_rules": rules(
        (
            "(has(self.artifact) ? 1 : 0) + (has(self.compose) ? 1 : 0) + (has(self.__import__) ? 1 : 0) == 1",
            "give exactly one of artifact (published files), compose and import",
        ),
        (
            "!has(self.compose) || self.method == (self.compose.into == 'base' ? 'full' : 'lora')",
            "a composed version has method: lora, or method: full with compose.into: base",
        ),
        ("!has(self.job) || has(self.artifact)", "job goes with artifact: a composed or imported version has none"),
    ),
    "rules": rules(
        (
            "has(self.spec.artifact) || self.metadata.name.size() <= 52",
            "metadata.name of a composed or imported version must be at most 52 characters: its Job carries it in its name",
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
            "a published version never changes: only baseVersions, deletionPolicy and retention may be edited; make a new version instead",
        ),
    ),
}
