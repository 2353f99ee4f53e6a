"""Byte-level tokenizers built in memory, with the chat templates of the model families that call tools.

The templates are made for these tests: each holds what its family's own is recognised by, and writes calls and results."""

from collections.abc import Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

END = "<|im_end|>"

PLAIN = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}\n{% endfor %}"
HERMES = """{% if tools %}You may call {{ tools | tojson }} within <tool_call> tags.
{% endif %}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% for call in m.tool_calls or [] %}
<tool_call>
{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}
</tool_call>{% endfor %}
{% endfor %}"""
LLAMA3 = """{% if tools %}Respond with {"name": function name, "parameters": values}. {{ tools | tojson }}
{% endif %}{% for m in messages %}<|{{ m.role }}|>{% if m.tool_calls %}{% if m.tool_calls | length != 1 %}{{
raise_exception("one call at a time") }}{% endif %}{"name": "{{ m.tool_calls[0].function.name }}", "parameters": {{
m.tool_calls[0].function.arguments | tojson }}}{% else %}{{ m.content }}{% endif %}
{% endfor %}"""
MISTRAL = """{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}{% for m in messages %}{% if m.tool_calls
%}[TOOL_CALLS][{% for call in m.tool_calls %}{% if call.id | length != 9 %}{{ raise_exception("nine characters") }}{% endif
%}{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}, "id": "{{ call.id }}"}{% endfor %}]{%
elif m.role == "tool" %}[TOOL_RESULTS]{{ m.tool_call_id }} {{ m.content }}[/TOOL_RESULTS]{% else %}<|{{ m.role }}|>{{ m.content }}{%
endif %}{% endfor %}"""
MISTRAL_ARGS = """{% if tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}{% for m in messages %}{%
if m.role == "tool" %}[TOOL_RESULTS]{{ m.content }}[/TOOL_RESULTS]{% else %}<|{{ m.role }}|>{{ m.content }}{%
for call in m.tool_calls or [] %}{% if call.id | length != 9 %}{{ raise_exception("nine characters") }}{% endif
%}[TOOL_CALLS]{{ call.function.name }}[ARGS]{{ call.function.arguments | tojson }}{% endfor %}{% endif %}{% endfor %}"""
QWEN3_CODER = """{% if tools %}You may call {{ tools | tojson }}: <tool_call><function=NAME><parameter=KEY>
{% endif %}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% for call in m.tool_calls or [] %}
<tool_call>
<function={{ call.function.name }}>
{% for key, value in call.function.arguments.items() %}<parameter={{ key }}>
{{ value if value is string else value | tojson }}
</parameter>
{% endfor %}</function>
</tool_call>{% endfor %}
{% endfor %}"""
TEMPLATES = {
    "described": PLAIN,
    "hermes": HERMES,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
    "mistral-args": MISTRAL_ARGS,
    "qwen3-coder": QWEN3_CODER,
}


def word_tokenizer(
    template: str | None = None, words: Sequence[str] = (), special: Sequence[str] = (END,), alphabet: str | None = None
) -> PreTrainedTokenizerFast:
    """One token for each byte (or character of `alphabet`), then `words`, each joined from its characters, then `special`
    ones; the first of these ends a text."""
    vocabulary = {c: i for i, c in enumerate(sorted(alphabet or pre_tokenizers.ByteLevel.alphabet()))}
    merges = []
    for word in (word.replace(" ", "Ġ").replace("\n", "Ċ") for word in words):
        for size in range(2, len(word) + 1):
            if word[:size] not in vocabulary:
                vocabulary[word[:size]] = len(vocabulary)
                merges.append((word[: size - 1], word[size - 1]))
    made = Tokenizer(models.BPE(vocabulary, merges))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in special])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token=special[0], chat_template=template)
