"""Which files of a model are read: each weight once, in the names of transformers, and complete."""

import pytest
from graft.artifacts.sources import WeightsError, used_files

SHARDS = {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"}
SIDE = {"config.json", "tokenizer.json"}
INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    ("more", "used"),
    [
        ({"model.safetensors"}, {"model.safetensors"}),
        ({"model.safetensors", "consolidated.safetensors"}, {"model.safetensors"}),
        ({"model.safetensors", "original/model.safetensors", "onnx/model.safetensors"}, {"model.safetensors"}),
        ({INDEX, *SHARDS}, {INDEX, *SHARDS}),
        ({INDEX, *SHARDS, "consolidated.safetensors"}, {INDEX, *SHARDS}),
        ({INDEX, *SHARDS, "original/model-00001-of-00002.safetensors"}, {INDEX, *SHARDS}),
        ({INDEX, *SHARDS, "model.safetensors"}, {"model.safetensors"}),  # as transformers chooses
    ],
)
def test_each_weight_is_read_once(more: set[str], used: set[str]) -> None:
    assert used_files(SIDE | more, "m") == SIDE | used


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (set(), "m has no safetensors weights"),
        (SHARDS, "m has shards but no model.safetensors.index.json, which says"),
        (
            {INDEX, "model-00001-of-00002.safetensors"},
            "m lacks 1 of 2 shards, the first is model-00002-of-00002.safetensors",
        ),
        (
            {INDEX, "model-00003-of-99999.safetensors"},
            "m lacks 99998 of 99999 shards, the first is model-00001-of-99999",
        ),
        ({"consolidated.safetensors"}, "m has no model.safetensors and no shards .* only consolidated.safetensors"),
    ],
)
def test_incomplete_weights_are_refused_with_what_is_missing(more: set[str], message: str) -> None:
    with pytest.raises(WeightsError, match=message):
        used_files(SIDE | more, "m")
