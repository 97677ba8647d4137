"""The base model's folder, looked at before a GPU is taken and without importing torch: is it one that can be tuned?"""

import ast
import importlib.util
import json
import struct
from functools import cache
from pathlib import Path
from typing import Any

from graft.api.recipe import Dataset
from graft.contracts.progress import Reason

from graft_trainer.data.tokens import Task
from graft_trainer.run.failures import Failure

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack")
CONFIGS = ("config.json", "tokenizer_config.json", "generation_config.json", "processor_config.json")
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt")
HEADS: dict[Task, tuple[str, ...]] = {  # what can be asked for the next token
    "causal": ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"),
    "seq2seq": ("ForConditionalGeneration",),
}
MAPPINGS: dict[Task, str] = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
}
SUCH_AS = {
    "causal": "causal language model, such as Llama, Qwen, Mistral or Gemma",
    "seq2seq": "seq2seq model, such as T5 or BART",
}


def check_base_model(folder: Path, name: str, task: Task = "causal", *, weights: bool = True) -> dict[str, Any]:
    """The model's config. Failure(BaseModelInvalid) says why it cannot be tuned, or that it is not of the task. Without `weights`
    the folder need not have any."""
    config = _json(folder / "config.json", name)
    for file in CONFIGS:
        if (folder / file).is_file() and "auto_map" in _json(folder / file, name):
            raise _invalid(
                f"{name}: {file} has auto_map, so the model needs code of its own",
                "Use a model that transformers supports itself; code from models is never run.",
            )
    if weights:
        _check_weights(folder, name)
    _check_task(config, name, task)
    _check_architecture(config, name, task)
    if not any((folder / file).is_file() for file in TOKENIZERS):
        raise _invalid(
            f"{name} has no tokenizer", "Put the model's tokenizer files (tokenizer.json) beside its weights."
        )
    return config


def check_data_fits(folder: Path, name: str, dataset: Dataset, task: Task = "causal") -> None:
    """Failure(ConfigurationInvalid) when the dataset needs a chat template and the model has none, or has texts for a
    model that learns answers."""
    if task == "seq2seq":
        if dataset.format == "text":
            raise Failure(
                Reason.CONFIGURATION_INVALID,
                f"dataset.format is text, and {name} is a seq2seq model: it learns answers to prompts",
                "Use dataset.format instruction or chat, or a causal base model.",
            )
        return  # without a template it is given the prompt as it is
    if dataset.format == "text" or dataset.templates is not None or has_chat_template(folder, name):
        return
    raise Failure(
        Reason.CONFIGURATION_INVALID,
        f"{name} has no chat template, which dataset.format {dataset.format} needs",
        "Use dataset.format instruction with dataset.templates, dataset.format text, or a chat model as base model.",
    )


def has_chat_template(folder: Path, name: str) -> bool:
    """Whether the model's tokenizer can render a conversation."""
    path = folder / "tokenizer_config.json"
    return (folder / "chat_template.jinja").is_file() or bool(path.is_file() and _json(path, name).get("chat_template"))


def load_tokenizer(folder: Path, name: str) -> Any:
    """The base model's tokenizer."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise _invalid(
            f"the tokenizer of {name} cannot be loaded: {type(error).__name__}: {error}",
            "Point the BaseModel at a whole folder of a language model that transformers supports.",
        ) from error


def load_config(folder: Path, name: str) -> Any:
    """config.json as transformers reads it, with its class's defaults."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise _invalid(
            f"{name}: config.json cannot be read: {type(error).__name__}: {error}",
            "Upload the config.json that belongs to the weights.",
        ) from error


def context_of(config: Any) -> int | None:
    """Longest sequence that the model was made for, in tokens, by transformers' config."""
    text = config.get_text_config()
    if hasattr(text, "relative_attention_num_buckets"):
        return None  # T5 and its kin: positions are distances, so there is no longest sequence
    for field in ("max_position_embeddings", "n_positions", "n_ctx", "max_seq_len", "seq_length"):
        if isinstance(value := getattr(text, field, None), int) and value > 0:
            return value
    return None


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


def _check_task(config: dict[str, Any], name: str, task: Task) -> None:
    both = config.get("is_encoder_decoder")
    if both is None:  # configs leave out what is their class's default
        kind = config.get("model_type")
        both = kind in architectures("seq2seq") and kind not in architectures("causal")
    actual: Task = "seq2seq" if both else "causal"
    if actual != task:
        raise _invalid(
            f"{name} is a {actual} model ({_described(config)}), and its BaseModel says that it is {task}",
            f"Set spec.task of the BaseModel {name} to {actual}, or point it at a {task} model.",
        )


def _check_architecture(config: dict[str, Any], name: str, task: Task) -> None:
    kind, named = config.get("model_type"), config.get("architectures") or []
    known = architectures(task)
    fits = not named or any(str(item).endswith(HEADS[task]) or item in known.values() for item in named)
    if kind and fits and (not known or kind in known):
        return
    raise _invalid(
        f"{name} is {_described(config)}, which is no {task} language model that this version of transformers knows",
        f"Use a {SUCH_AS[task]}, that transformers supports.",
    )


def _described(config: dict[str, Any]) -> str:
    return ", ".join(map(str, config.get("architectures") or [])) or f"model_type {config.get('model_type')}"


@cache
def architectures(task: Task) -> dict[str, str]:
    """model_type -> class of the task's models that the installed transformers knows; empty when that cannot be told.

    Read from the source text: importing that module brings in torch, which takes longer than all of prepare.
    """
    package = importlib.util.find_spec("transformers")
    if package is None or not package.submodule_search_locations:
        return {}
    path = Path(package.submodule_search_locations[0]) / "models/auto/modeling_auto.py"
    try:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Assign) and any(
                isinstance(target, ast.Name) and target.id == MAPPINGS[task] for target in node.targets
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
