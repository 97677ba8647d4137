"""A value of the wrong form is answered with a sentence, and a message and its remedy are two sentences."""

import json

import pytest
from graft.api import BaseModel, FineTuneJob
from graft.contracts.message import first_problem
from graft.crdgen import KINDS, custom_resource_definition, structural
from graft.reconcile.shared.pods import sentences
from pydantic import ValidationError


def test_no_field_of_a_spec_has_a_bare_pattern() -> None:
    for kind in KINDS:
        schema = custom_resource_definition(kind)["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
        assert '"pattern"' not in json.dumps(schema["properties"]["spec"])


def test_a_pattern_without_a_sentence_is_refused() -> None:
    with pytest.raises(KeyError):
        structural({"type": "string", "pattern": "^new$"}, {}, defaults=True)


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
