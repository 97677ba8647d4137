"""What the trainer measured is what vLLM serves: stop tokens, prompts and module names, for multimodal base models too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from graft.artifacts.versions import describe_files
from handover.bases import END, make_chat_tokenizer, make_llava
from handover.real_vllm import Vllm
from handover.tuned import Version, deployed, tune, verified
from safetensors.torch import load_file, save_file
from worlds.trainer import QUESTIONS

TEMPLATE = "Question: {instruction}\nAnswer: "
FAMILIES: dict[str, Callable[[Path], Path]] = {"llava": make_llava}


@pytest.fixture(scope="module", params=FAMILIES)
def vllm(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vllm]:
    """Serve a multimodal model, with the flags and variables of the operator."""
    folder = tmp_path_factory.mktemp(request.param)
    made = Vllm(folder, FAMILIES[request.param](folder / "base"))
    try:
        made.start()
        yield made
    finally:
        made.kill()


@pytest.fixture(scope="module")
def versions(vllm: Vllm, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Version]:
    """Tune one version on chats, and one on prompts of a template."""
    root = tmp_path_factory.mktemp("runs")
    asked = {"format": "instruction", "templates": [TEMPLATE]}
    return {
        "chats": tune(vllm.base, root / "chats", "chats", {}),
        "asked": tune(vllm.base, root / "asked", "asked", asked),
    }


async def test_answers_end_and_prompts_are_made_as_in_evaluation(
    vllm: Vllm, versions: dict[str, Version], tmp_path: Path
) -> None:
    end = make_chat_tokenizer().convert_tokens_to_ids(END)
    assert versions["chats"].manifest.stop_token_ids == [2, end]
    assert versions["asked"].manifest.prompt_template == TEMPLATE
    async with deployed(vllm, tmp_path, list(versions.values())) as desk:
        for name, version in versions.items():
            assert desk.state(name) == ("Loaded", None)
            assert [one.answer for one in version.asked] == list(QUESTIONS.values())
            for question, asked in zip(QUESTIONS, version.asked, strict=True):
                chat = {"messages": [{"role": "user", "content": question}]}
                ways: tuple[tuple[str, dict[str, Any]], ...] = (
                    ("/v1/chat/completions", chat),
                    ("/v1/completions", {"prompt": asked.prompt}),
                )
                for path, body in ways:
                    status, answer = await desk.post(path, name, **body, return_token_ids=True)
                    assert status == 200, answer
                    (choice,) = answer["choices"]
                    text = choice["message"]["content"] if "message" in choice else choice["text"]
                    assert (text, choice["finish_reason"]) == (asked.answer, "stop"), (name, path)
                    sent = answer.get("prompt_token_ids") or choice.get("prompt_token_ids")
                    assert sent == asked.prompt, (name, path)

                    status, events = await desk.post(path, name, **body, stream=True)
                    assert status == 200, events
                    choices = [event["choices"][0] for event in events if event["choices"]]
                    pieces = [one["delta"].get("content") if "delta" in one else one["text"] for one in choices]
                    assert ("".join(filter(None, pieces)), choices[-1]["finish_reason"]) == (asked.answer, "stop")

                    # Without the tokens of the version, the answer goes on: the base model's end is another token.
                    status, answer = await desk.post(path, name, **body, ignore_eos=True, skip_special_tokens=False)
                    (choice,) = answer["choices"]
                    assert choice["finish_reason"] == "length"
                    if name == "chats":
                        text = choice["message"]["content"] if "message" in choice else choice["text"]
                        assert text.startswith(asked.answer + END)


async def test_an_adapter_of_a_multimodal_model_works_or_gets_no_request(
    vllm: Vllm, versions: dict[str, Version], tmp_path: Path
) -> None:
    """The language model tuned alone has other names of modules. vLLM loads such an adapter with a 200 and ignores it."""
    right, wrong = versions["chats"], without_wrapper(versions["chats"], tmp_path)
    async with deployed(vllm, tmp_path, [right, wrong]) as desk:
        assert desk.state("chats") == ("Loaded", None)
        assert desk.state("alone") == ("Failed", "LoadedWithoutEffect")
        body = {"prompt": right.asked[0].prompt}
        assert (await desk.post("/v1/completions", "chats", **body))[0] == 200
        status, answer = await desk.post("/v1/completions", "alone", **body)
        assert status == 503, answer


def without_wrapper(version: Version, folder: Path) -> Version:
    """Return the version as `alone`, with the names that its modules have in the language model alone."""
    files = {key.rpartition("/")[2]: data for key, data in version.objects.items()}
    path = folder / "adapter_model.safetensors"
    path.write_bytes(files["adapter_model.safetensors"])
    tensors = load_file(path)
    renamed = {name.replace(".language_model", ""): tensor for name, tensor in tensors.items()}
    assert renamed.keys().isdisjoint(tensors)
    save_file(renamed, path)
    config = folder / "adapter_config.json"
    config.write_bytes(files[config.name])
    described = describe_files({one.name: one for one in (path, config)})
    manifest = version.manifest.model_copy(update={"adapter": "alone", "files": described})
    prefix = f"{version.manifest.job.namespace}/adapters/alone/1.0.0/"
    made = {path.name: path.read_bytes(), config.name: config.read_bytes(), "manifest.json": manifest.to_bytes()}
    return verified({prefix + name: data for name, data in made.items()})
