"""The tokenizer's files of a version, so that AutoTokenizer loads it from the version's folder alone."""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from graft.artifacts.manifest import PROCESSOR_FILES, TOKENIZER_FILES
from graft.artifacts.sources import TOKENIZER_LIMITS, SourceError
from graft.bounded import OutOfBounds, parse_json
from graft.controltokens import read_texts
from graft.prompttemplates import as_chat_template

from graft_trainer.model.basemodel import load_tokenizer
from graft_trainer.run.failures import Failure
from graft_trainer.versions.making import Made, Making

log = logging.getLogger(__name__)
LARGEST = 64 * 1024 * 1024  # bytes of a file beside an adapter; a tokenizer of 250,000 tokens has 20 MB
CONFIG = "tokenizer_config.json"
CLASSES = {"TokenizersBackend": "PreTrainedTokenizerFast"}  # the name that older versions of transformers know, too


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the files of the tokenizer, and of a multimodal model's processor, from one model's folder to another's."""
    for name in TOKENIZER_FILES | PROCESSOR_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def add_tokenizer_of_base(making: Making, made: Made) -> None:
    """Write the tokenizer of the base model beside an adapter that was combined or imported. If the base model cannot be
    read any more, the version has no tokenizer. Raises SourceError if a retry may succeed."""
    base, target = made.base_model, making.settings.work_dir / "tokenizer"
    try:
        source = making.fetch(base.uri, base.digest, target, "tokenizer", weights=False)
        add_tokenizer(source, making.settings.adapter_dir, load_tokenizer(source, base.name), made.prompt_template)
    except SourceError as error:
        if error.transient:
            raise
        log.warning("the version has no tokenizer: %s", error)
    except Failure as error:
        log.warning("the version has no tokenizer: %s", error.message)


def add_tokenizer(source: Path, folder: Path, tokenizer: Any, template: str | None) -> None:
    """Write the tokenizer of the base model in `source` beside an adapter, with the chat template of its prompts.

    `tokenizer`: the loaded one. `template`: of the dataset's prompts. No part of it names code to run. A tokenizer that is
    too large, or that cannot be read, is left out: servers have that of the base model.
    """
    found = sorted(name for name in TOKENIZER_FILES if (source / name).is_file())
    if large := [name for name in found if (source / name).stat().st_size > LARGEST]:
        log.warning("the version has no tokenizer: %s of the base model has more than %d bytes", large[0], LARGEST)
        return
    try:
        config = parse_json((source / CONFIG).read_bytes(), TOKENIZER_LIMITS, CONFIG) if CONFIG in found else {}
    except OutOfBounds as error:
        log.warning("the version has no tokenizer: %s", error)
        return
    for name in found:
        shutil.copyfile(source / name, folder / name)
    if not isinstance(config, dict):
        config = {}
    # Without config.json, which an adapter does not have, only this field says which class reads the files.
    kind = type(tokenizer).__name__
    named = {"tokenizer_class": CLASSES.get(kind, kind)} | {k: v for k, v in config.items() if k != "auto_map"}
    if named != config:
        (folder / CONFIG).write_text(json.dumps(named, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if template is not None:
        write_chat_template(folder, template, tokenizer)


def write_chat_template(folder: Path, template: str, tokenizer: Any) -> None:
    """Write the template of a dataset's prompts as the chat template. A server adds no token to a chat, so the template
    writes the bos_token if the tokenizer adds it before a text."""
    first = read_texts(tokenizer, ["x"])[0][0]
    bos = tokenizer.bos_token_id is not None and first == tokenizer.bos_token_id
    (folder / "chat_template.jinja").write_text(as_chat_template(template, bos=bos), encoding="utf-8")
