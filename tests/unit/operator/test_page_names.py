"""What the pages and the messages name exists: commands and their options, values of the chart, fields, targets, files."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from graft.api.finetunejob import MUTABLE
from graft.cli.parser import parser
from graft.crdgen import KINDS, custom_resource_definition
from testbed.shell import REPOSITORY

PAGES = [
    *sorted(REPOSITORY.glob("*.md")),
    *sorted((REPOSITORY / "docs").rglob("*.md")),
    *sorted((REPOSITORY / "examples").rglob("*.md")),
    *sorted((REPOSITORY / "charts").rglob("*.md")),
]
# Reasons for a decision are dated, and the change log is history.
CURRENT = [page for page in PAGES if page.parent.name != "design" and page.name != "CHANGELOG.md"]
SHELL = re.compile(r"^ *```sh\n(.*?)^ *```", re.DOTALL | re.MULTILINE)
INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
NAME = re.compile(r"[A-Za-z][A-Za-z0-9]*(?:\[\])?(?:\.[A-Za-z][A-Za-z0-9]*(?:\[\])?)+")


def pages(function: Any) -> Any:
    return pytest.mark.parametrize("page", CURRENT, ids=lambda page: str(page.relative_to(REPOSITORY)))(function)


def commands(page: Path) -> Iterator[list[str]]:
    """Yield the words of each command in the shell blocks of a page."""
    for block in SHELL.findall(page.read_text()):
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r"\s(?:\||&&|;)\s", line):
                try:
                    words = shlex.split(part, comments=True)
                except ValueError:  # a text of several lines
                    words = part.split()
                if words:
                    yield words


def codes(page: Path) -> list[str]:
    """Return what a page sets as code in its sentences and tables."""
    return INLINE.findall(re.sub(r"^ *```.*?^ *```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE))


@pages
def test_the_commands_of_graft_are_accepted(page: Path) -> None:
    for words in [*commands(page), *(code.split() for code in codes(page))]:
        words = words[1:] if words[:1] == ["kubectl"] else words
        if words[:1] == ["graft"] and len(words) > 1 and not any("…" in word or "<" in word for word in words):
            if words[1].startswith("-") and words[1] not in {"--help", "--version"}:
                pytest.fail(f"{page.name}: graft has no option {words[1]}")
            subcommand = words[1]
            known = {
                name: one for action in parser()._actions if action.choices for name, one in action.choices.items()
            }  # type: ignore[union-attr]
            if not subcommand.startswith("-"):
                assert subcommand in known, f"{page.name}: graft {subcommand}"
                flags = set(known[subcommand]._option_string_actions)
                assert {word.split("=")[0] for word in words if word.startswith("-")} <= flags, f"{page.name}: {words}"


VALUES = yaml.safe_load((REPOSITORY / "charts/graft/values.yaml").read_text())
# Maps that the user fills.
OPEN = {"labels", "annotations", "nodeSelector", "resources", "podTemplate", "env", "storage"}


def has_value(path: str) -> bool:
    here: Any = VALUES
    for part in path.split("."):
        if not isinstance(here, dict):
            return False
        if part not in here:
            return here == {}
        here = here[part]
        if part in OPEN:
            return True
    return True


def paths(schema: dict[str, Any], path: str) -> Iterator[str]:
    """Yield the paths of the fields below a schema, without []. The keys of a map are *."""
    yield path
    if "additionalProperties" in schema:
        yield f"{path}.*"
    for name, child in schema.get("properties", {}).items():
        yield from paths(child, f"{path}.{name}")
    for below in (schema.get("items"), schema.get("additionalProperties")):
        if isinstance(below, dict):
            yield from paths(below, path)


SCHEMAS = [custom_resource_definition(kind)["spec"]["versions"][0]["schema"]["openAPIV3Schema"] for kind in KINDS]
FIELDS = {path for schema in SCHEMAS for part in ("spec", "status") for path in paths(schema["properties"][part], part)}


TOP = {path.split(".")[1] for path in FIELDS if "." in path}
ELSEWHERE = {"spec.active"}  # of Kueue's Workload


def exists(path: str) -> bool:
    """Return whether a path is a field of a kind, with or without spec or status, or a value of the chart."""
    of_map = f"{path.rpartition('.')[0]}.*"
    fields = {f"{part}{one}" for part in ("", "spec.", "status.") for one in (path, of_map)}
    return bool(fields & FIELDS) or has_value(path) or path in ELSEWHERE


@pages
def test_the_values_of_the_chart_and_the_fields_exist(page: Path) -> None:
    named = [code for code in (re.split(r"[=: ]", code)[0] for code in codes(page)) if NAME.fullmatch(code)]
    known = [code for code in named if code.split(".")[0] in {"spec", "status", *VALUES, *TOP}]
    files = {"py", "yaml", "md", "json", "jsonl", "safetensors", "html"}
    missing = [code for code in known if code.split(".")[-1] not in files and not exists(code.replace("[]", ""))]
    assert missing == []


@pages
def test_the_values_that_a_command_sets_exist(page: Path) -> None:
    found = [
        re.split(r"[=\[{]", words[place + 1])[0]
        for words in commands(page)
        if words[0] == "helm"
        for place, word in enumerate(words[:-1])
        if word in {"--set", "--set-string", "--set-json"}
    ]
    assert [path for path in found if not has_value(path)] == []


@pages
def test_the_targets_of_make_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    for words in [*commands(page), *(code.split() for code in codes(page))]:
        if "make" in words:
            named = [word for word in words[words.index("make") + 1 :] if re.fullmatch(r"[a-z][a-z0-9-]*", word)]
            assert set(named) <= targets, f"{page.name}: {' '.join(words)}"


FOLDERS = (
    "operator/",
    "trainer-image/",
    "server-image/",
    "tests/",
    "docs/",
    "examples/",
    "charts/",
    "crds/",
    "requirements/",
)


@pages
def test_the_files_exist(page: Path) -> None:
    named = [code.split("#")[0].split("::")[0] for code in codes(page) if code.startswith(FOLDERS)]
    missing = [code for code in named if not re.search(r"[*<{ ]", code) and not (REPOSITORY / code).exists()]
    assert missing == []


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^a-z0-9 _-]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_pages_that_messages_name_exist() -> None:
    """In messages, descriptions, help texts, the chart and the manifests."""
    sources = [
        path
        for folder in ("operator", "trainer-image", "server-image", "charts", "examples")
        for pattern in ("*.py", "*.yaml", "*.txt", "*.tpl")
        for path in (REPOSITORY / folder).rglob(pattern)
    ]
    named = {
        (match[1], match[2], str(path.relative_to(REPOSITORY)))
        for path in sources
        for match in re.finditer(r"\b(docs/[A-Za-z0-9/_-]+\.md)(?:#([a-z0-9-]+))?", path.read_text())
    }
    assert len(named) > 20
    for page, anchor, source in sorted(named, key=str):
        assert (REPOSITORY / page).exists(), f"{source} names {page}"
        assert anchor is None or anchor in anchors(REPOSITORY / page), f"{source} names {page}#{anchor}"


def test_the_fields_of_a_job_that_may_be_changed_are_listed() -> None:
    text = (REPOSITORY / "docs/concepts.md").read_text()
    row = next(line for line in text.splitlines() if line.startswith("| `FineTuneJob` |"))
    assert set(INLINE.findall(row.split("|")[5])) == set(MUTABLE)
