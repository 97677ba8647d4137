"""The base model's folder, looked at before a GPU is taken and without importing torch: is it one that can be tuned?"""

import ast
import importlib.util
import json
import struct
from functools import cache
from pathlib import Path
from typing import Any

from graft.api.recipe import Dataset
from graft.contracts import Reason

from graft_trainer.failures import Failure

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack")
CONFIGS = ("config.json", "tokenizer_config.json", "generation_config.json", "processor_config.json")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
HEADS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")  # what can be asked for the next token


def check_base_model(folder: Path, name: str) -> dict[str, Any]:
    """The model's config. Failure(BaseModelInvalid) says why it cannot be tuned."""
    config = _json(folder / "config.json", name)
    for file in CONFIGS:
        if (folder / file).is_file() and "auto_map" in _json(folder / file, name):
            raise _invalid(
                f"{name}: {file} has auto_map, so the model needs code of its own",
                "Use a model that transformers supports itself; code from models is never run.",
            )
    _check_weights(folder, name)
    _check_architecture(config, name)
    if not any((folder / file).is_file() for file in TOKENIZERS):
        raise _invalid(
            f"{name} has no tokenizer", "Put the model's tokenizer files (tokenizer.json) beside its weights."
        )
    return config


def check_chat_template(folder: Path, name: str, dataset: Dataset) -> None:
    """Failure when the dataset needs a chat template and the model has none."""
    if dataset.format == "text" or dataset.templates is not None:
        return
    path = folder / "tokenizer_config.json"
    if (folder / "chat_template.jinja").is_file() or (path.is_file() and _json(path, name).get("chat_template")):
        return
    raise Failure(
        Reason.CONFIGURATION_INVALID,
        f"{name} has no chat template, which dataset.format {dataset.format} needs",
        "Use dataset.format instruction with dataset.templates, dataset.format text, or a chat model as base model.",
    )


def _check_weights(folder: Path, name: str) -> None:
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
        found = f", only {', '.join(pickles[:3])}" if pickles else ""
        raise _invalid(
            f"{name} has no weights in safetensors{found}",
            "Convert the weights to safetensors (save_pretrained does); pickled weights are never loaded.",
        )
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        wanted = set(_json(index, name).get("weight_map", {}).values())
        if missing := sorted(wanted - {path.name for path in weights}):
            raise _invalid(
                f"{name} lacks {len(missing)} of {len(wanted)} weight files: {', '.join(missing[:3])}",
                "Upload the model's missing files.",
            )
    for path in weights:
        if problem := _truncated(path):
            raise _invalid(f"{name}: {path.name} {problem}", "Upload the file again, whole.")


def _truncated(path: Path) -> str | None:
    """What is wrong with a safetensors file's length: 8 bytes of header length, the header, the tensors."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > min(size, 100_000_000):
            return "is no safetensors file"
        try:
            header = json.loads(stream.read(length))
            end = max((entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            return "is no safetensors file"
    return None if size == 8 + length + end else f"has {size} bytes, its header says {8 + length + end}"


def _check_architecture(config: dict[str, Any], name: str) -> None:
    kind, architectures = config.get("model_type"), config.get("architectures") or []
    known = causal_architectures()
    fits = not architectures or any(str(item).endswith(HEADS) or item in known.values() for item in architectures)
    if kind and fits and (not known or kind in known):
        return
    shown = ", ".join(map(str, architectures)) or f"model_type {kind}"
    raise _invalid(
        f"{name} is {shown}, which is no causal language model that this version of transformers knows",
        "Use a causal language model that transformers supports, such as Llama, Qwen, Mistral or Gemma.",
    )


@cache
def causal_architectures() -> dict[str, str]:
    """model_type -> class of the causal models that the installed transformers knows; empty when that cannot be told.

    Read from the source text: importing that module brings in torch, which takes longer than all of prepare.
    """
    package = importlib.util.find_spec("transformers")
    if package is None or not package.submodule_search_locations:
        return {}
    path = Path(package.submodule_search_locations[0]) / "models/auto/modeling_auto.py"
    try:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Assign) and any(
                isinstance(target, ast.Name) and target.id == "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"
                for target in node.targets
            ):
                assert isinstance(node.value, ast.Call)  # noqa: S101 - OrderedDict([...]), else the next line fails
                pairs = ast.literal_eval(node.value.args[0])
                return {kind: cls if isinstance(cls, str) else cls[0] for kind, cls in pairs}
    except (OSError, SyntaxError, ValueError, TypeError, AssertionError):
        return {}
    return {}


def _json(path: Path, name: str) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise _invalid(
            f"{name} has no {path.name}", "Point the BaseModel at a folder in Hugging Face's layout."
        ) from error
    except ValueError as error:
        raise _invalid(f"{name}: {path.name} is no JSON: {error}", f"Upload a valid {path.name}.") from error
    if not isinstance(value, dict):
        raise _invalid(f"{name}: {path.name} is no JSON object", f"Upload a valid {path.name}.")
    return value


def _invalid(message: str, remedy: str) -> Failure:
    return Failure(Reason.BASE_MODEL_INVALID, message, remedy)
