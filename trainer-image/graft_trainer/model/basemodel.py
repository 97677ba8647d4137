"""Check the base model's folder before a GPU is used and without importing torch: can this model be tuned?"""

import ast
import importlib.util
import struct
from datetime import datetime
from functools import cache
from pathlib import Path
from typing import Any

from graft.api.recipe import Dataset, MethodName
from graft.artifacts.manifest import VOCABULARIES
from graft.artifacts.sources import CONFIG_LIMITS, INDEX, TOKENIZER_LIMITS, WeightsError, used_files
from graft.bounded import Limits, OutOfBounds, parse_json
from graft.contracts.progress import Reason

from graft_trainer.data.chat import pin_date
from graft_trainer.data.tokens import Task
from graft_trainer.run.failures import Failure

HEADER = Limits(size=100_000_000, depth=6, values=4_000_000)  # of a safetensors file; the format allows 100 MB
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".h5", ".msgpack")
LIMITS = {
    "tokenizer_config.json": TOKENIZER_LIMITS,
    "model.safetensors.index.json": Limits(size=64 * 1024 * 1024, depth=4, values=1_000_000),  # DeepSeek-V3's has 9 MB
}
CONFIGS = ("config.json", "tokenizer_config.json", "generation_config.json", "processor_config.json")
HEADS: dict[Task, tuple[str, ...]] = {  # endings of class names whose models predict the next token
    "causal": ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"),
    "seq2seq": ("ForConditionalGeneration",),
}
MAPPINGS: dict[Task, str] = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "seq2seq": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
}
WRAPPERS = "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES"
SUCH_AS = {
    "causal": "causal language model, such as Llama, Qwen, Mistral or Gemma",
    "seq2seq": "seq2seq model, such as T5 or BART",
}


def check_base_model(
    folder: Path, name: str, task: Task = "causal", *, weights: bool = True, method: MethodName | None = None
) -> dict[str, Any]:
    """Check the folder and return the model's config. Raises Failure(BaseModelInvalid) if the model cannot be tuned by the
    method or is not of the task. If `weights` is False, the folder need not have weights."""
    config = _json(folder / "config.json", name)
    for file in CONFIGS:
        if (folder / file).is_file() and "auto_map" in _json(folder / file, name):
            raise _invalid(
                f"{name}: {file} has auto_map, so the model needs its own code",
                "Use a model that transformers supports without such code. Graft never runs code from a model.",
            )
    if weights:
        _check_weights(folder, name)
    _check_task(config, name, task)
    _check_architecture(config, name, task)
    if method is not None:
        check_quantization(config, name, method)
    if not any((folder / file).is_file() for file in VOCABULARIES):
        raise _invalid(
            f"{name} has no tokenizer",
            "Put the model's tokenizer files (tokenizer.json) into the folder of its weights.",
        )
    return config


def stored_quantization(config: dict[str, Any]) -> dict[str, Any] | None:
    """Return how the weights in the model's files are quantised, as its config says. None if they are not."""
    text = config.get("text_config")
    both = (config, text if isinstance(text, dict) else {})
    found = (one.get(key) for one in both for key in ("quantization_config", "compression_config"))
    return next((one for one in found if isinstance(one, dict) and one), None)


def check_quantization(config: dict[str, Any], name: str, method: MethodName) -> None:
    """Raise Failure(BaseModelInvalid) if the model is quantised already, and the method cannot train beside such weights.

    transformers and peft train beside the integers of bitsandbytes. For the other kinds they need packages and kernels
    that the trainer does not have, or they are for inference only.
    """
    if (stored := stored_quantization(config)) is None:
        return
    eight = bool(stored.get("load_in_8bit") or stored.get("_load_in_8bit"))
    kind = str(stored.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in stored else "unknown"))[:40]
    if kind == "bitsandbytes" and method in {"lora", "promptTuning"}:
        return
    if kind == "bitsandbytes" and method == "qlora" and not eight:
        return
    what = f"{name} is quantised already ({kind}{' in 8 bits' if eight else ''})"
    if kind == "bitsandbytes":
        raise _invalid(
            f"{what}, so method {method} cannot train it",
            "Set spec.method to lora, which trains beside the quantised weights. Or set spec.source of the BaseModel to the "
            "model's weights in 16 bits.",
        )
    raise _invalid(
        f"{what}, so no method can train it",
        "Set spec.source of the BaseModel to the model from which it was quantised, with weights in 16 bits. If memory is "
        "short, use method qlora, which quantises these weights itself.",
    )


def check_data_fits(folder: Path, name: str, dataset: Dataset, task: Task = "causal") -> None:
    """Check that the dataset's format suits the model. Raises Failure(ConfigurationInvalid) if the format needs a chat
    template that the model does not have, or if the format is text and the model is seq2seq."""
    if task == "seq2seq":
        if dataset.format == "text":
            raise Failure(
                Reason.CONFIGURATION_INVALID,
                f"spec.dataset.format is text, but {name} is a seq2seq model: it trains on prompts with answers",
                "Set spec.dataset.format to instruction or chat, or use a causal base model.",
            )
        return  # without a chat template, a seq2seq model gets the prompt as plain text
    if dataset.format == "text" or dataset.templates is not None or has_chat_template(folder, name):
        return
    raise Failure(
        Reason.CONFIGURATION_INVALID,
        f"{name} has no chat template, but spec.dataset.format {dataset.format} needs one",
        "Set spec.dataset.format to instruction and set spec.dataset.templates, or set spec.dataset.format to text, or use a chat "
        "model as the base model.",
    )


def has_chat_template(folder: Path, name: str) -> bool:
    """Return whether the model's tokenizer has a chat template."""
    path = folder / "tokenizer_config.json"
    return (folder / "chat_template.jinja").is_file() or bool(path.is_file() and _json(path, name).get("chat_template"))


def load_tokenizer(folder: Path, name: str, created_at: str | None = None) -> Any:
    """Load the base model's tokenizer. Raises Failure(BaseModelInvalid) if that fails.

    A chat template that writes the date of the day writes that of `created_at` (RFC 3339), so that every attempt of a
    job reads the same tokens.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        if created_at is not None:
            pin_date(tokenizer, datetime.fromisoformat(created_at))
        return tokenizer
    except Exception as error:
        raise _invalid(
            f"cannot load the tokenizer of {name}: {type(error).__name__}: {error}",
            "Point spec.source of the BaseModel at the complete folder of a language model that transformers supports.",
        ) from error


def load_config(folder: Path, name: str) -> Any:
    """Read config.json with transformers, which adds the defaults of the config's class. Raises
    Failure(BaseModelInvalid) if that fails."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise _invalid(
            f"{name}: cannot read config.json: {type(error).__name__}: {error}",
            "Upload the config.json that belongs to the weights.",
        ) from error


def context_of(config: Any) -> int | None:
    """Return the longest sequence, in tokens, that the model was made for according to transformers' config. None if
    the config gives no limit."""
    text = config.get_text_config()
    if hasattr(text, "relative_attention_num_buckets"):
        return None  # T5 and similar models: positions are distances, so there is no longest sequence
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
            "Convert the weights to safetensors (save_pretrained does this). Graft never loads pickled weights.",
        )
    try:
        used = used_files({path.name for path in folder.iterdir()}, name)
    except WeightsError as error:
        raise _invalid(str(error), "Upload the model's complete folder, as save_pretrained writes it.") from error
    weights = [path for path in weights if path.name in used]
    index = folder / INDEX
    if INDEX in used:
        wanted = set(_json(index, name).get("weight_map", {}).values())
        if missing := sorted(wanted - {path.name for path in weights}):
            raise _invalid(
                f"{name} lacks {len(missing)} of {len(wanted)} weight files: {', '.join(missing[:3])}",
                "Upload the model's missing files.",
            )
    for path in weights:
        if problem := _truncated(path):
            raise _invalid(f"{name}: {path.name} {problem}", "Upload the complete file again.")


def _truncated(path: Path) -> str | None:
    """Return what is wrong with the length of a safetensors file, or None. The file consists of 8 bytes with the
    header's length, the header and the tensors."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else size
        if length > min(size, HEADER.size):
            return "is not a safetensors file"
        try:
            header = parse_json(stream.read(length), HEADER, "the header")
            end = max((entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"), default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            return "is not a safetensors file"
    return None if size == 8 + length + end else f"has {size} bytes, but its header says {8 + length + end}"


def _check_task(config: dict[str, Any], name: str, task: Task) -> None:
    both = config.get("is_encoder_decoder")
    if both is None:  # configs omit values that are the defaults of their class
        kind = config.get("model_type")
        both = kind in architectures(MAPPINGS["seq2seq"]) and kind not in architectures(MAPPINGS["causal"])
    actual: Task = "seq2seq" if both else "causal"
    if actual != task:
        raise _invalid(
            f"{name} is a {actual} model ({_described(config)}), but spec.task of its BaseModel is {task}",
            f"Set spec.task of the BaseModel {name} to {actual}, or point its spec.source at a {task} model.",
        )


def _check_architecture(config: dict[str, Any], name: str, task: Task) -> None:
    kind, named = config.get("model_type"), config.get("architectures") or []
    known = architectures(MAPPINGS[task])
    fits = not named or any(str(item).endswith(HEADS[task]) or item in known.values() for item in named)
    if kind and fits and (not known or kind in known):
        return
    if task == "causal" and isinstance(config.get("text_config"), dict) and kind in architectures(WRAPPERS):
        return  # a multimodal model: its language model is tuned
    raise _invalid(
        f"{name} is {_described(config)}, which is not a {task} language model that this version of transformers supports",
        f"Use a model that transformers supports: a {SUCH_AS[task]}.",
    )


def _described(config: dict[str, Any]) -> str:
    return ", ".join(map(str, config.get("architectures") or [])) or f"model_type {config.get('model_type')}"


@cache
def architectures(mapping: str) -> dict[str, str]:
    """Return model_type -> class of a mapping of the installed transformers; empty if it cannot be read.

    It is read from the source text: importing that module imports torch, which takes longer than all of prepare.
    """
    package = importlib.util.find_spec("transformers")
    if package is None or not package.submodule_search_locations:
        return {}
    path = Path(package.submodule_search_locations[0]) / "models/auto/modeling_auto.py"
    try:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.Assign) and any(
                isinstance(target, ast.Name) and target.id == mapping for target in node.targets
            ):
                assert isinstance(node.value, ast.Call)  # noqa: S101 - OrderedDict([...]), else the next line fails
                pairs = ast.literal_eval(node.value.args[0])
                return {kind: cls if isinstance(cls, str) else cls[0] for kind, cls in pairs}
    except (OSError, SyntaxError, ValueError, TypeError, AssertionError):
        return {}
    return {}


def _json(path: Path, name: str) -> dict[str, Any]:
    try:
        limits = LIMITS.get(path.name, CONFIG_LIMITS)
        if (size := path.stat().st_size) > limits.size:
            raise OutOfBounds(f"it has {size} bytes, more than {limits.size}")
        value = parse_json(path.read_bytes(), limits, "it", constants=True)
    except FileNotFoundError as error:
        raise _invalid(
            f"{name} has no {path.name}", "Point spec.source of the BaseModel at a folder in Hugging Face's layout."
        ) from error
    except OutOfBounds as error:
        raise _invalid(
            f"{name}: {path.name} is not JSON of a model: {error}", f"Upload a valid {path.name}."
        ) from error
    if not isinstance(value, dict):
        raise _invalid(f"{name}: {path.name} is not a JSON object", f"Upload a valid {path.name}.")
    return value


def _invalid(message: str, remedy: str) -> Failure:
    return Failure(Reason.BASE_MODEL_INVALID, message, remedy)
