"""The templates of a dataset's prompts (PURE): {instruction} and {input} in a text, and the same as a chat template.

A version that was trained with such a template is asked with it, too: the question of a chat takes the place of
{instruction}, and {input} stays empty.
"""

import json
import re

PLACEHOLDER = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}")
LONGEST = 4096  # characters of a template
ONE_QUESTION = (
    "this version was trained on prompts with one question: send one message, of the role user, and no tools. Or send "
    "a whole prompt to /v1/completions"
)


def fill(template: str, instruction: str, further: str) -> str:
    """Return the template with its placeholders filled. Other braces stay as they are."""
    values = {"instruction": instruction, "input": further}
    return PLACEHOLDER.sub(lambda match: values[match.group(1)], template)


def as_chat_template(template: str, *, bos: bool = False) -> str:
    """Return a Jinja template that makes the same prompt of a chat with one question. With `bos`, it writes the bos_token.

    The text of the template is in string constants, so nothing in it is a program.
    """
    pieces = re.split(r"\{(instruction|input)\}", template)
    made = ["bos_token"] if bos else []
    for index, piece in enumerate(pieces):
        if index % 2 == 0 and piece:
            made.append(json.dumps(piece, ensure_ascii=False))
        elif piece == "instruction":
            made.append("messages[0].content")
    wrong = "messages | length != 1 or messages[0].role != 'user' or tools"
    refuse = f"{{%- if {wrong} %}}{{{{- raise_exception({json.dumps(ONE_QUESTION)}) }}}}{{%- endif %}}"
    return f"{refuse}{{{{- {' ~ '.join(made)} }}}}"
