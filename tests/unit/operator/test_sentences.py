"""A value of the wrong form is answered with a sentence, and a message and its remedy are two sentences."""

import json
import re

import pytest
from graft.api import BaseModel, FineTuneJob
from graft.api.meta import SENTENCES
from graft.contracts.message import first_problem
from graft.crdgen import KINDS, custom_resource_definition
from graft.reconcile.shared.pods import sentences
from pydantic import ValidationError


def test_no_field_of_a_spec_answers_with_a_long_pattern() -> None:
    text = json.dumps([custom_resource_definition(kind)["spec"]["versions"][0]["schema"] for kind in KINDS])
    for pattern in SENTENCES:
        assert re.search(r"self\.matches\(r'" + re.escape(json.dumps(pattern)[1:-1]) + "'", text) or pattern not in text
    specs = [kind["openAPIV3Schema"]["properties"]["spec"] for kind in json.loads(text)]
    assert not {pattern for pattern in SENTENCES if f'"pattern": {json.dumps(pattern)}' in json.dumps(specs)}


@pytest.mark.parametrize(
    ("kind", "spec", "said"),
    [
        (
            BaseModel,
            {"source": "https://x/y"},
            "spec.source: must be hf://<org>/<name>[@<revision>], s3://<bucket>/<folder> or",
        ),
        (BaseModel, {"source": "hf://a/b", "version": "1.0"}, "spec.version: must be a version of three numbers"),
        (FineTuneJob, {"baseModel": "A B"}, "spec.baseModel: must be a name of lower-case letters, digits, - and ."),
    ],
)
def test_a_stored_spec_of_the_wrong_form_is_described_by_a_sentence(
    kind: type, spec: dict[str, str], said: str
) -> None:
    with pytest.raises(ValidationError) as caught:
        kind.model_validate({"metadata": {"name": "x"}, "spec": spec})  # type: ignore[attr-defined]
    assert said in first_problem(caught.value)


@pytest.mark.parametrize(
    ("message", "remedy", "text"),
    [
        ("line 3: not JSON", "Correct it.", "line 3: not JSON. Correct it."),
        ("It ended.", "Raise it.", "It ended. Raise it."),
        ("why?", "Read it.", "why? Read it."),
        ("alone", "", "alone"),
        ("", "Do this.", "Do this."),
    ],
)
def test_message_and_remedy_are_sentences(message: str, remedy: str, text: str) -> None:
    assert sentences(message, remedy) == text
