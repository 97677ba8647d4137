"""The model card of a version (PURE): README.md with the metadata of the Hugging Face Hub.

Names, licences and prompts in it come from tenants and from the Hub. Metadata is written by a YAML library. In the text,
every such word is a code span or stands in a fenced block, so that it is neither Markdown nor HTML nor code.
"""

import json
import re
import shlex
from collections.abc import Iterable, Sequence

import yaml

from graft.artifacts.adapterconfig import base_reference
from graft.artifacts.manifest import Manifest
from graft.report import scores, wording
from graft.report.document import Report

MOST_ROWS = 64  # of a table; report.json has all scores
CELL = 300  # characters of a value in the text
LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]{0,63}")  # the form of the Hub's identifiers
HUB_DATASET = re.compile(r"hf://datasets/([\w.-]{1,96}/[\w.-]{1,96})(?:@[^/]*)?/", re.ASCII)
TASKS = {"causal": "text-generation", "seq2seq": "text2text-generation"}
AUTO_CLASSES = {"causal": "AutoModelForCausalLM", "seq2seq": "AutoModelForSeq2SeqLM"}


def render_card(
    manifest: Manifest,
    *,
    license_: str | None = None,
    auto_class: str | None = None,
    datasets: Iterable[str] = (),
    report: Report | None = None,
) -> str:
    """Return README.md of a version. `auto_class`: the class of transformers that holds the base model, if it is not that
    of the task. `datasets`: the URIs of the data. `report`: of a trained version."""
    parts = [
        f"---\n{_metadata(manifest, license_, datasets)}---\n",
        f"# {_code(f'{manifest.adapter} {manifest.version}')}\n",
        _introduction(manifest),
        "## About\n",
        _table(("", ""), _facts(manifest, license_)),
        *_data(manifest, datasets),
        *_scores(manifest, report),
        *_loading(manifest, auto_class or AUTO_CLASSES.get(manifest.task, AUTO_CLASSES["causal"])),
        *_prompt(manifest),
        "## Files\n",
        "`manifest.json` has the SHA-256 of every other file. `manifest.sig.json` has the operator's signature of the manifest. "
        "`graft verify` and `graft pull` check both.\n",
    ]
    return "\n".join(parts)


def _metadata(manifest: Manifest, license_: str | None, datasets: Iterable[str]) -> str:
    whole = manifest.method == "full"
    repository, revision = base_reference(manifest.base_model.name, manifest.base_model.uri)
    fields: dict[str, object] = {}
    if revision is not None:
        merged = whole and manifest.composition is not None
        fields["base_model"] = repository
        fields["base_model_relation"] = "merge" if merged else "finetune" if whole else "adapter"
    fields["library_name"] = "transformers" if whole else "peft"
    if license_ is not None:
        known = LICENSE.fullmatch(license_) is not None
        fields |= {"license": license_} if known else {"license": "other", "license_name": _plain(license_)}
    fields["pipeline_tag"] = TASKS.get(manifest.task, TASKS["causal"])
    fields["tags"] = ["graft", *(() if whole else ("prompt-tuning" if manifest.method == "promptTuning" else "lora",))]
    if named := sorted({found[1] for uri in datasets if (found := HUB_DATASET.match(uri))}):
        fields["datasets"] = named
    return yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)


def _introduction(manifest: Manifest) -> str:
    base = _code(manifest.base_model.name)
    kind = {"full": "A whole model, tuned from", "promptTuning": "A tuned prompt for"}.get(
        manifest.method, "A LoRA adapter for"
    )
    if manifest.imported_from is not None:
        how = f"Graft imported it from {_code(manifest.imported_from)}."
    elif manifest.composition is not None:
        parents = ", ".join(
            f"{_code(f'{one.adapter} {one.version}')} x {one.weight:g}" for one in manifest.parents[:MOST_ROWS]
        )
        how = f"Graft combined it from {parents} by {_code(manifest.composition.get('method'))}."
    else:
        how = f"Graft trained it with the method {_code(manifest.method)}."
    text = f"{kind} the base model {base}. {how}\n"
    if manifest.rejected:
        text += "\n**This version missed its gates and must not be served:**\n\n"
        text += "".join(f"- {_code(reason)}\n" for reason in manifest.rejected[:MOST_ROWS])
    return text


def _facts(manifest: Manifest, license_: str | None) -> list[tuple[str, str]]:
    base = manifest.base_model
    rows = [("base model", _code(base.uri)), ("base model's digest", _code(base.digest or ""))]
    rows += [
        (
            "licence of the base model",
            _code(license_) if license_ else "not known. Check it before you share this version",
        )
    ]
    rows += [("method", _code(manifest.method)), ("job", _code(f"{manifest.job.namespace}/{manifest.job.name}"))]
    rows += [("created", _code(manifest.created_at)), ("target modules", _code(", ".join(manifest.target_modules)))]
    rows += [(_code(name), _code(wording.setting(value))) for name, value in manifest.hyperparameters.items()]
    return [(name, value) for name, value in rows if value]


def _data(manifest: Manifest, datasets: Iterable[str]) -> list[str]:
    if not manifest.datasets:
        return []
    hub = sorted({uri for uri in datasets if HUB_DATASET.match(uri)})
    rows = [(_code(role), _code(digest)) for role, digest in manifest.datasets.items()]
    text = "".join(f"\nFrom the Hub: {_code(uri)}\n" for uri in hub)
    return ["## Data\n", _table(("part", "SHA-256 of the file"), rows) + text]


def _scores(manifest: Manifest, report: Report | None) -> list[str]:
    if report is None or not manifest.metrics:
        return []
    found = [*scores.scores_of(report), *scores.scores_of(report, "forgetting")]
    subjects = scores.subjects_of(found)
    rows = []
    for score in found:
        values = []
        for subject in subjects:
            value, spread = score.words(subject), score.interval_words(subject)
            values.append(f"{value} ({spread})" if spread else value)
        rows.append((_code(score.name), *values, wording.count(score.n)))
    if not rows:
        return []
    return [
        "## Scores\n",
        "In brackets: the interval with a confidence of 95 %, by Wilson for shares of right answers, otherwise from the standard "
        "error of the mean. n is the number of tasks. Losses are in nats per token. `report.html` shows more.\n",
        _table(("metric", *subjects.values(), "n"), rows),
    ]


def _loading(manifest: Manifest, auto_class: str) -> list[str]:
    base, revision = base_reference(manifest.base_model.name, manifest.base_model.uri)
    whole, plain = manifest.method == "full", auto_class in AUTO_CLASSES.values()
    folder = f"{manifest.adapter}-{manifest.version}"
    parts = ["## Load it\n"]
    if revision is None and not whole:
        parts.append(
            f"Put the files of the base model, {_code(manifest.base_model.uri)}, into the folder {_code(base)}, and this version "
            f"into {_code(folder)}.\n"
        )
    if whole:
        lines = [
            f"from transformers import {auto_class}, AutoTokenizer", "",
            f"model = {auto_class}.from_pretrained({json.dumps(folder)})",
        ]  # fmt: skip
    elif plain:
        peft_class = auto_class.replace("AutoModel", "AutoPeftModel")
        lines = [
            f"from peft import {peft_class}", "from transformers import AutoTokenizer", "",
            f"model = {peft_class}.from_pretrained({json.dumps(folder)})",
        ]  # fmt: skip
    else:  # a multimodal model: peft has no auto class for it
        pinned = f", revision={json.dumps(revision)}" if revision else ""
        lines = [
            "from peft import PeftModel", f"from transformers import {auto_class}, AutoTokenizer", "",
            f"base = {auto_class}.from_pretrained({json.dumps(base)}{pinned})",
            f"model = PeftModel.from_pretrained(base, {json.dumps(folder)})",
        ]  # fmt: skip
    parts.append(
        _block("\n".join([*lines, f"tokenizer = AutoTokenizer.from_pretrained({json.dumps(folder)})"]), "python")
    )
    if manifest.method == "qlora":
        parts.append(
            "It was trained on the base model in 4 bits. For the same answers, pass "
            '`quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")` when you load it.\n'
        )
    if manifest.task == "causal" and manifest.method != "promptTuning":
        name = shlex.quote(manifest.adapter)
        command = ["vllm serve", shlex.quote(folder if whole else base)]
        if revision is not None and not whole:
            command += ["--revision", revision]
        if whole:
            command += ["--served-model-name", name]
        else:
            rank = next((rank for rank in (8, 16, 32, 64, 128, 256, 320) if rank >= (manifest.rank or 0)), 512)
            command += [
                "--enable-lora",
                "--max-lora-rank",
                str(rank),
                "--lora-modules",
                f"{name}={shlex.quote(folder)}",
            ]
        parts += ["## Serve it with vLLM\n", _block(" ".join(command), "sh")]
    return parts


def _prompt(manifest: Manifest) -> list[str]:
    if manifest.prompt_template is None:
        return []
    return [
        "## Prompt\n",
        "It was trained with prompts of this form. The chat template of the tokenizer here makes the same prompt of a chat with one "
        "question.\n",
        _block(manifest.prompt_template, "text"),
    ]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows[:MOST_ROWS]]
    text = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return text + (f"\nAnd {len(rows) - MOST_ROWS} more.\n" if len(rows) > MOST_ROWS else "")


def _plain(value: object) -> str:
    """Return a value as one printable line of at most CELL characters."""
    text = "".join(char if char.isprintable() else " " for char in str(value))
    return text if len(text) <= CELL else text[: CELL - 1] + "…"


def _code(value: object) -> str:
    """Return a value as a code span of Markdown that is valid in a table, "" for an empty value.

    A fence that is longer than each run of backticks in it cannot end early (CommonMark 6.1). In tables, GitHub's form of
    Markdown reads | first, so it is written with a backslash.
    """
    text = _plain(value).strip()
    if not text:
        return ""
    fence = _fence(text, 1)
    pad = " " if text[0] == "`" or text[-1] == "`" else ""
    return f"{fence}{pad}{text}{pad}{fence}".replace("|", "\\|")


def _block(text: str, language: str) -> str:
    fence = _fence(text, 3)
    return f"{fence}{language}\n{text}\n{fence}\n"


def _fence(text: str, least: int) -> str:
    return "`" * max(least, 1 + max(map(len, re.findall("`+", text)), default=0))
