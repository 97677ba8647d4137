"""Answers of models with calls of tools, by the name of vLLM's parser, and what is read from them."""

from graft.toolcalls import Answer, Call

OSLO, ROME = Call("weather", {"town": "Oslo"}), Call("weather", {"town": "Rome", "days": 2})
ANSWERS = {
    "hermes": [
        ('<tool_call>\n{"name": "weather", "arguments": {"town": "Oslo"}}\n</tool_call>', Answer("", [OSLO])),
        (
            'I look.\n<tool_call>\n{"name": "weather", "arguments": {"town": "Oslo"}}\n</tool_call>\n<tool_call>\n'
            '{"arguments": {"days": 2, "town": "Rome"}, "name": "weather"}\n</tool_call>',
            Answer("I look.", [OSLO, ROME]),
        ),
        ('<tool_call>{"name": "weather", "arguments": {"town": "Oslo"}}', Answer("", [OSLO])),
    ],
    "llama3_json": [
        ('{"name": "weather", "parameters": {"town": "Oslo"}}', Answer("", [OSLO])),
        ('<|python_tag|>{"name": "weather", "arguments": {"town": "Oslo"}}', Answer("", [OSLO])),
        (
            '{"name": "weather", "parameters": {"town": "Oslo"}}; '
            '{"name": "weather", "parameters": {"town": "Rome", "days": 2}}',
            Answer("", [OSLO, ROME]),
        ),
    ],
    "mistral": [
        ('[TOOL_CALLS]weather{"town": "Oslo"}[TOOL_CALLS]weather{"town": "Rome", "days": 2}', Answer("", [OSLO, ROME])),
        ('I look.[TOOL_CALLS]weather[ARGS]{"town": "Oslo"}', Answer("I look.", [OSLO])),
    ],
}
# vLLM reads these with the tokenizers of the models that write them.
OLDER = {
    "mistral": [
        ('[TOOL_CALLS] [{"name": "weather", "arguments": {"town": "Oslo"}, "id": "abcdefghi"}]', Answer("", [OSLO])),
        ('[TOOL_CALLS]weather[CALL_ID]abcdefghi[ARGS]{"town": "Oslo"}', Answer("", [OSLO])),
    ]
}
