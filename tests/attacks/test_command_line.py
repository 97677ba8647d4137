"""What the command line gets from the store and the cluster: texts of tenants on a person's terminal, and names of files."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from graft.artifacts.layout import MANIFEST, SIGNATURE
from graft.artifacts.manifest import Manifest
from graft.artifacts.storage import StoreError
from graft.bounded import OutOfBounds
from graft.cli import verification
from graft.cli.__main__ import main
from graft.cli.failure import CliFailure
from graft.cli.output import UNSAFE
from graft.cli.pull import pull
from worlds.report import document

# Clears the screen, sets the title, writes the clipboard; a C1 control, a carriage return, and text that runs from right to left.
ESCAPES = "\x1b[2J\x1b]0;owned\x07\x1b]52;c;cm0gLXJm\x07\x9b31m\r\u202e"


@pytest.fixture
def report(tmp_path: Path) -> str:
    changes = {
        "adapter": f"a{ESCAPES}", "version": f"1.0.0{ESCAPES}",
        "baseModel": {"name": f"b{ESCAPES}", "uri": "s3://bucket/models/tiny"},
        "evaluation": {"suites": [], "gates": [], "rejected": [f"gate {ESCAPES}"], "missing": [f"suite {ESCAPES}"]},
    }  # fmt: skip
    path = tmp_path / "report.json"
    path.write_text(json.dumps(document(**changes)))
    return str(path)


@pytest.mark.parametrize("form", ["text", "json", "yaml"])
@pytest.mark.parametrize("command", ["report", "compare"])
def test_texts_of_tenants_are_no_commands_for_a_terminal(
    report: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], command: str, form: str
) -> None:
    """A name or message of a tenant has commands for the terminal -> they are shown as text."""
    runs = [report] if command == "report" else [report, report, "--page", str(tmp_path / "page.html")]
    assert main([command, *runs, "-o", form]) == 0
    shown = capfd.readouterr()
    assert not UNSAFE.search(shown.out + shown.err)
    if command == "report" and form != "text":
        read: Any = json.loads if form == "json" else yaml.safe_load
        assert read(shown.out)["adapter"] == f"a{ESCAPES}", "a program gets the text as it is"


def test_examples_of_data_are_no_commands_for_a_terminal(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A line of the data has commands for the terminal -> `graft examples` shows them as text."""
    path = tmp_path / "report.json"
    statistics = {"learned": [f"⟦line one\n\tline two{ESCAPES}⟧"]}
    path.write_text(json.dumps(document(dataset={"digests": {}, "train": 1, "heldOut": 0, "statistics": statistics})))
    assert main(["examples", str(path)]) == 0
    shown = capfd.readouterr().out
    assert not UNSAFE.search(shown) and "line one\n\tline two\\u001b[2J" in shown


def test_a_failure_is_no_command_for_a_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    """The answer of a store or an API server is quoted in a message -> control characters are shown as text."""
    assert main(["report", f"no-such-file{ESCAPES}.json"]) == 1
    assert not UNSAFE.search(capfd.readouterr().err)


@pytest.mark.parametrize(
    "name", ["../../.bashrc", "/etc/cron.d/x", "a/b.json", ".", "", "setup.py", "adapter_model.bin", "model.safetensors\x00", "..\\x"]
)  # fmt: skip
def test_a_manifest_with_another_path_is_refused(name: str) -> None:
    """A version names a file outside of its folder, or one that runs code -> no part of Graft reads the manifest."""
    with pytest.raises(OutOfBounds, match="must not contain these files"):
        Manifest.read(manifest(name).to_bytes())


def manifest(*names: str) -> Manifest:
    files = [
        {"name": name, "size": 1, "sha256": "0" * 64}
        for name in ("adapter_config.json", "adapter_model.safetensors", *names)
    ]
    fields: Any = {
        "adapter": "support", "version": "1.0.0", "method": "lora", "recipe": "r", "hyperparameters": {}, "createdAt": "t",
        "baseModel": {"name": "tiny", "uri": "s3://b/m"}, "job": {"name": "j", "namespace": "n", "uid": "u", "attempt": "0"},
    }  # fmt: skip
    known = Manifest.model_validate(fields | {"files": files[:2]})
    others = [known.files[0].model_copy(update=file) for file in files]
    return known.model_copy(update={"files": others})


@dataclasses.dataclass
class Store:
    """A store with a signed version, which answers with `content` to every file."""

    content: bytes
    listed: Manifest

    def chunks(self, key: str) -> Any:
        if not key.endswith((MANIFEST, SIGNATURE, *(file.name for file in self.listed.files))):
            raise StoreError("missing", key)
        yield self.content


@pytest.mark.parametrize("there", ["folder", "link", "file"])
def test_a_folder_that_others_have_made_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: str
) -> None:
    """Somebody makes the folder of the download before, or a link in its place -> nothing is written or deleted there."""
    other = tmp_path / "other"
    other.mkdir()
    (other / "kept").write_text("kept")
    partial = tmp_path / "support.partial"
    match there:
        case "folder":
            other.rename(partial)
        case "link":
            partial.symlink_to(other)
        case "file":
            partial.write_text("kept")
    signed(monkeypatch)
    with pytest.raises(CliFailure, match=r"support\.partial exists"):
        pull(Store(b"x", manifest()), "shop", "support", "1.0.0", {}, tmp_path / "support")  # type: ignore[arg-type]
    assert not (tmp_path / "support").exists()
    kept = {"folder": partial / "kept", "link": other / "kept", "file": partial}[there]
    assert kept.read_text() == "kept" and len(list(other.iterdir() if other.exists() else partial.iterdir())) == 1


def signed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the signature of each manifest be right: a version of an attacker in the attacker's own namespace."""
    found = verification.Verified("shop", "support", "1.0.0", "d", "k", 2, 2, manifest=b"{}", signature=b"{}")
    monkeypatch.setattr("graft.cli.pull.verified_manifest", lambda *_: (found, manifest()))


def test_a_file_that_grows_without_end_is_cut_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The store sends more than the manifest says -> the download stops at the size, and nothing stays."""
    read = 0

    class Endless(Store):
        def chunks(self, key: str) -> Any:
            nonlocal read
            while True:
                read += 1
                yield self.content

    signed(monkeypatch)
    with pytest.raises(CliFailure, match="is not the file in the manifest"):
        pull(Endless(b"x", manifest()), "shop", "support", "1.0.0", {}, tmp_path / "support")  # type: ignore[arg-type]
    assert read == 2 and list(tmp_path.iterdir()) == []
