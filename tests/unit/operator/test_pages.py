"""What people copy from the pages: the manifests are valid, and the policies allow what the operator's own keys may do."""

import json
import re
from pathlib import Path

import pytest
import yaml
from graft.api import GROUP, VERSION
from graft.artifacts.identity import EVERYBODY, bucket_statements
from graft.crdgen import KINDS
from testbed.shell import REPOSITORY

PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^( *)```(yaml|json)\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
MODELS = {module.CRD["kind"]: getattr(module, module.CRD["kind"]) for module in KINDS}


def blocks(page: Path, language: str) -> list[str]:
    return [text for _, found, text in BLOCK.findall(page.read_text()) if found == language]


def whole_manifests(page: Path) -> list[dict]:  # type: ignore[type-arg]
    """Return the resources of Graft in a page that can be applied; parts of a spec are left out."""
    documents = [document for text in blocks(page, "yaml") for document in yaml.safe_load_all(text)]
    return [one for one in documents if isinstance(one, dict) and one.get("apiVersion") == f"{GROUP}/{VERSION}"]


def test_the_pages_have_manifests() -> None:
    assert sum(len(whole_manifests(page)) for page in PAGES) >= 8


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_manifests_of_a_page_are_valid(page: Path) -> None:
    for manifest in whole_manifests(page):
        MODELS[manifest["kind"]].model_validate(manifest)


def test_the_policy_of_a_namespace_allows_what_an_issued_key_may_do() -> None:
    _, tenant = (json.loads(text)["Statement"] for text in blocks(REPOSITORY / "docs" / "iam.md", "json"))
    issued = bucket_statements("my-bucket", {"team-a": "user"}, {"models/qwen2.5-7b/": EVERYBODY}, "Graft")

    def rights(statements: list[dict]) -> set[tuple[str, str, str]]:  # type: ignore[type-arg]
        return {
            (one["Effect"], action, resource)
            for one in statements
            for action in ([one["Action"]] if isinstance(one["Action"], str) else one["Action"])
            for resource in ([one["Resource"]] if isinstance(one["Resource"], str) else one["Resource"])
        }

    def listed(statements: list[dict]) -> set[str]:  # type: ignore[type-arg]
        return {p for one in statements if "Condition" in one for p in one["Condition"]["StringLike"]["s3:prefix"]}

    assert rights(tenant) == rights(issued)
    assert listed(tenant) == listed(issued)
