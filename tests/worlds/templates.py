"""Small chat templates, one for each manner in which today's families of models render a conversation, and answers of these
models with calls of tools."""

from typing import Any

from graft.toolcalls import Answer, Call

IM = "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endfor %}"
ASK = "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
CALLS = (
    "{%- for c in m.tool_calls or [] %}"
    "{{- '<tool_call>\\n{\"name\": \"' + c.function.name + '\", \"arguments\": ' + (c.function.arguments | tojson) + '}\\n</tool_call>' }}"
    "{%- endfor %}"
)
# As Qwen3: the thought is written only after the last question, and an absent one as an empty one.
THINKS = (
    "{%- set ns = namespace(asked=0) %}{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.asked = loop.index0 %}{%- endif %}{%- endfor %}"
    "{%- for m in messages %}{{- '<|im_start|>' + ('user' if m.role == 'tool' else m.role) + '\\n' }}"
    "{%- if m.role == 'assistant' %}"
    "{%- set thought = m.reasoning_content or '' %}{%- set content = m.content %}"
    "{%- if '</think>' in content %}{%- set thought = content.split('</think>')[0].split('<think>')[-1] %}{%- set content = content.split('</think>')[-1] %}{%- endif %}"
    "{%- if loop.index0 > ns.asked and (loop.last or thought) %}{{- '<think>\\n' + thought.strip() + '\\n</think>\\n\\n' + content.lstrip() }}"
    "{%- else %}{{- content.lstrip() }}{%- endif %}" + CALLS + "{%- else %}{{- m.content }}{%- endif %}"
    "{{- '<|im_end|>\\n' }}{%- endfor %}"
)
TEMPLATES = {
    "chatml": IM + ASK,
    "thought dropped from earlier turns": THINKS + ASK,
    "the prompt opens a thought": THINKS + "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}{%- endif %}",
    # As DeepSeek-R1: no turn is rendered with a thought.
    "the prompt opens a thought that no turn has": (
        "{{- bos_token }}{%- for m in messages %}{%- if m.role == 'assistant' %}{{- '<|assistant|>' + m.content.split('</think>')[-1] + eos_token }}"
        "{%- else %}{{- '<|' + m.role + '|>' + m.content }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|assistant|><think>\\n' }}{%- endif %}"
    ),
    # As Phi-3.
    "an end for each turn and one for the whole": (
        "{%- for m in messages %}{{- '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- else %}{{- eos_token }}{%- endif %}"
    ),
    "an end after the whole only": (
        "{%- for m in messages %}{{- '<|' + m.role + '|>\\n' + m.content + '\\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- else %}{{- eos_token }}{%- endif %}"
    ),
    # As Gemma: turns alternate, and there is no system message.
    "strict alternation without a system role": (
        "{{- bos_token }}{%- if messages[0].role == 'system' %}{{- raise_exception('System role not supported') }}{%- endif %}"
        "{%- for m in messages %}{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{- raise_exception('Roles must alternate') }}{%- endif %}"
        "{{- '<turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + m.content | trim + '</turn>\\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<turn>model\\n' }}{%- endif %}"
    ),
    "calls": (
        "{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' + m.content }}" + CALLS + "{{- '<|im_end|>\\n' }}{%- endfor %}" + ASK
    ),
    # As Llama 3.1: one call, in another form, and its content is not rendered. The date of the day.
    "calls by other fields and the date": (
        "{{- bos_token + '<|system|>Today: ' + strftime_now('%d %b %Y') + '<|eot|>' }}{%- for m in messages %}"
        "{%- if m.tool_calls %}{%- if m.tool_calls | length != 1 %}{{- raise_exception('one call at a time') }}{%- endif %}"
        "{{- '<|assistant|>' + ({'name': m.tool_calls[0].function.name, 'parameters': m.tool_calls[0].function.arguments} | tojson) + '<|eot|>' }}"
        "{%- else %}{{- '<|' + m.role + '|>' + m.content | trim + '<|eot|>' }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
    ),
    "no end": (
        "{%- for m in messages %}{%- if m.role == 'user' %}{{- '### Instruction:\\n' + m.content + '\\n\\n### Response:\\n' }}"
        "{%- else %}{{- m.content + '\\n\\n' }}{%- endif %}{%- endfor %}"
    ),
    # As Llama 2 and Mistral: a beginning of its own for each question.
    "a bos of its own": (
        "{%- for m in messages %}{%- if m.role == 'user' %}{{- bos_token + '[INST] ' + m.content | trim + ' [/INST]' }}"
        "{%- else %}{{- ' ' + m.content | trim + ' ' + eos_token }}{%- endif %}{%- endfor %}"
    ),
    "generation marks": (
        "{%- for m in messages %}{%- if m.role == 'assistant' %}{{- '<|im_start|>assistant\\n' }}"
        "{% generation %}{{- m.content + '<|im_end|>' }}{% endgeneration %}{{- '\\n' }}"
        "{%- else %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endif %}{%- endfor %}" + ASK
    ),
}  # fmt: skip
SPECIAL = (
    "<pad>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|end|>", "<|eot|>", "<turn>", "</turn>", "<|system|>", "<|user|>",
    "<|assistant|>", "<|tool|>",
)  # fmt: skip
ADDED = ("<think>", "</think>", "<tool_call>", "</tool_call>")  # tokens that are text for the tokenizer, as in Qwen3


def chat_tokenizer(template: str | None, *, eos: str | None = "</s>") -> Any:
    """Return a tokenizer with one token per byte, the control tokens of SPECIAL, and the tokens of ADDED."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE({token: index for index, token in enumerate([*SPECIAL, *alphabet])}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    inner.add_tokens([AddedToken(token, special=False, normalized=False) for token in ADDED])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token=eos, pad_token="<pad>", chat_template=template,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


# By the name of vLLM's parser: answers, and what is read from them.
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
