"""Hooks of mkdocs (`make docs`): a page for each example with its manifests, and links to folders and code.

In the repository, pages link to folders of examples and to code. The site has no pages for these. A link to an example leads
to its page, and a link to code becomes plain text. A link to a file that does not exist stays, so that mkdocs reports it.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"(?<!!)\[([^\]]*)\]\(([^)#:\s]+)(#[^)\s]*)?\)")


def example(folder: Path) -> str:
    """Return the page of a folder of examples, in Markdown."""
    lines = [f"# {folder.name}", "", f"```sh\nkubectl apply -f examples/{folder.name}\n```", ""]
    for manifest in sorted(folder.glob("*.yaml")):
        lines += [f"## {manifest.name}", "", f"```yaml\n{manifest.read_text().rstrip()}\n```", ""]
    return "\n".join(lines)


def on_files(files: Files, *, config: Any) -> Files:
    """Add the pages of the examples."""
    for folder in sorted((ROOT / "examples").iterdir()):
        if any(folder.glob("*.yaml")):
            files.append(File.generated(config, f"examples/{folder.name}/README.md", content=example(folder)))
    return files


def on_page_markdown(markdown: str, *, page: Any, config: Any, files: Files) -> str:
    """Lead links to folders to their pages, and replace links to code by their text."""

    def target(match: re.Match[str]) -> str:
        text, link, anchor = match[1], match[2], match[3] or ""
        path = posixpath.normpath(posixpath.join(posixpath.dirname(page.file.src_uri), link))
        if files.get_file_from_path(posixpath.join(path, "README.md")):
            return f"[{text}]({posixpath.join(link, 'README.md')}{anchor})"
        served = files.get_file_from_path(path)
        if (ROOT / path).exists() and (served is None or served.inclusion.is_excluded()):
            return text
        return match[0]

    return LINK.sub(target, markdown)
