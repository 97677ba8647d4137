"""The template of a dataset's prompts as a chat template: the same prompt, and no program in its text."""

import pytest
from graft.prompttemplates import as_chat_template, fill
from jinja2.sandbox import ImmutableSandboxedEnvironment

TEMPLATES = [
    "{instruction}\n\n{input}\n\nAnswer: ",
    "{input} Task: {instruction}\n",
    "\"{instruction}\" { other } {{instruction}} \\n \\u0041 'ü' \U0001f600\t",
    "{% for i in range(9) %}{{ messages }}{# no #}{instruction}",
    "}} {{ 7 * 7 }} {instruction} {%- raw %}",
]


def rendered(template: str, messages: list[dict[str, str]], **variables: object) -> str:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)

    def refuse(message: str) -> None:
        raise ValueError(message)

    environment.globals["raise_exception"] = refuse
    return environment.from_string(template).render(messages=messages, tools=None, **variables)


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("question", ["Hi", '{input} {{ 1 }} "quoted"\n'])
def test_a_chat_makes_the_prompt_of_training(template: str, question: str) -> None:
    asked = [{"role": "user", "content": question}]
    assert rendered(as_chat_template(template), asked) == fill(template, question, "")
    assert rendered(as_chat_template(template, bos=True), asked, bos_token="<s>") == "<s>" + fill(
        template, question, ""
    )


@pytest.mark.parametrize("roles", [["system", "user"], ["user", "assistant", "user"], ["assistant"]])
def test_a_chat_without_one_question_is_refused(roles: list[str]) -> None:
    with pytest.raises(ValueError, match="one question"):
        rendered(as_chat_template(TEMPLATES[0]), [{"role": role, "content": "x"} for role in roles])
