"""Chat templates of published models: those that TRL ships, and some written for these tests.

The latter have the documented formats of models whose templates no package ships. Long texts that
a model's maker puts into the system turn are short ones of our own here; what stands around the
turns, what is left out and what is refused is theirs. docs/conversations.md says of which version.
"""

from __future__ import annotations

import copy
import re
from importlib.resources import files

from transformers import PreTrainedTokenizerBase

_OPEN = "{% for m in messages %}{% set role, text = m.role, m.content %}"
_REFUSE_CALLS = "{% set no = 'Only user, system and assistant roles are supported!' %}"

# The day, the mode and the instructions stand in the system turn, which only tools close. "/think"
# and "/no_think" in the instructions choose the mode, and are taken out of them. Calls are dropped.
SMOLLM3 = """
{%- set mode = '/think' if enable_thinking is not defined or enable_thinking else '/no_think' -%}
{%- set given = messages[0].content if messages[0].role == 'system' else '' -%}
{%- if '/no_think' in given -%}{%- set mode = '/no_think' -%}
{%- elif '/think' in given -%}{%- set mode = '/think' -%}{%- endif -%}
{%- set rules = given | replace('/no_think', '') | replace('/think', '') -%}
{%- set rules = rules.rstrip() or ('Think at length.' if mode == '/think' else 'Be SmolLM.') -%}
{{- '<|im_start|>system\\n## Metadata\\n\\nKnowledge Cutoff Date: June 2025\\nToday Date: ' -}}
{{- strftime_now('%d %B %Y') ~ '\\nReasoning Mode: ' ~ mode -}}
{{- '\\n\\n## Custom Instructions\\n\\n' ~ rules ~ '\\n\\n' -}}
{%- if tools -%}
  {{- '### Tools\\n\\n<tools>\\n' -}}
  {%- for tool in tools -%}{{- (tool | string) ~ '\\n' -}}{%- endfor -%}
  {{- '</tools>\\n\\n<|im_end|>\\n' -}}
{%- endif -%}
{%- set start = '<|im_start|>assistant\\n' -%}
{%- set start = start if mode == '/think' else start ~ '<think>\\n\\n</think>\\n' -%}
{%- for m in messages -%}
  {%- if m.role == 'user' or m.role == 'tool' -%}
    {{- '<|im_start|>user\\n' ~ m.content ~ '<|im_end|>\\n' -}}
  {%- elif m.role == 'assistant' -%}
    {{- start ~ m.content.lstrip('\\n') ~ '<|im_end|>\\n' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- start -}}{%- endif -%}
"""

MISTRAL_SMALL = (
    "{{ bos_token }}" + _OPEN + _REFUSE_CALLS + "{% if role == 'system' %}"
    "{{ '[SYSTEM_PROMPT]' ~ text ~ '[/SYSTEM_PROMPT]' }}{% elif role == 'user' %}"
    "{{ '[INST]' ~ text ~ '[/INST]' }}{% elif role == 'assistant' %}{{ text ~ eos_token }}"
    "{% else %}{{ raise_exception(no) }}{% endif %}{% endfor %}"
)

# Instructions and tools stand with the last question; instructions only while it is unanswered.
# A call has an id of nine characters, and no text beside it.
MISTRAL_NEMO = """
{%- set rules = messages[0].content if messages[0].role == 'system' else none -%}
{%- set turns = messages[1:] if rules is not none else messages -%}
{%- set asked = (turns | selectattr('role', 'equalto', 'user') | list)[-1] -%}
{%- set state = namespace(next='user') -%}
{%- for m in turns if m.role != 'tool' and not m.tool_calls -%}
  {%- if m.role != state.next -%}{{- raise_exception('conversation roles must alternate') -}}
  {%- endif -%}
  {%- set state.next = 'assistant' if m.role == 'user' else 'user' -%}
{%- endfor -%}
{{- bos_token -}}
{%- for m in turns -%}
  {%- if m.role == 'user' -%}
    {%- if tools and m == asked -%}
      {{- '[AVAILABLE_TOOLS][' -}}
      {%- for tool in tools -%}
        {%- set f = tool.function -%}
        {{- '{"type": "function", "function": {"name": "' ~ f.name ~ '", "description": "' -}}
        {{- f.description ~ '", "parameters": ' ~ (f.parameters | tojson) ~ '}}' -}}
        {{- '' if loop.last else ', ' -}}
      {%- endfor -%}
      {{- '][/AVAILABLE_TOOLS]' -}}
    {%- endif -%}
    {{- '[INST]' ~ (rules ~ '\\n\\n' if loop.last and rules is not none else '') ~ m.content -}}
    {{- '[/INST]' -}}
  {%- elif m.tool_calls -%}
    {{- '[TOOL_CALLS][' -}}
    {%- for call in m.tool_calls -%}
      {%- if call.id | length != 9 -%}{{- raise_exception('ids have length 9!') -}}{%- endif -%}
      {{- '{"name": "' ~ call.function.name ~ '", "arguments": ' -}}
      {{- (call.function.arguments | tojson) ~ ', "id": "' ~ call.id ~ '"}' -}}
      {{- '' if loop.last else ', ' -}}
    {%- endfor -%}
    {{- ']' ~ eos_token -}}
  {%- elif m.role == 'assistant' -%}
    {{- m.content ~ eos_token -}}
  {%- else -%}
    {{- '[TOOL_RESULTS]{"content": ' ~ m.content ~ ', "call_id": "' ~ m.tool_call_id -}}
    {{- '"}[/TOOL_RESULTS]' -}}
  {%- endif -%}
{%- endfor -%}
"""

# Turns of tools are dropped, and calls.
PHI4 = (
    _OPEN + "{% if role in ('system', 'user', 'assistant') %}"
    "{{ '<|im_start|>' ~ role ~ '<|im_sep|>' ~ text ~ '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)

# The marks around turns are ordinary text; only the end of an answer is a token.
OLMO2 = (
    "{{ bos_token }}" + _OPEN + "{% if role in ('system', 'user', 'assistant') %}"
    "{{ '<|' ~ role ~ '|>\n' ~ text }}{% if role != 'assistant' %}{{ '\n' }}"
    "{% else %}{{ eos_token ~ ('' if loop.last else '\n') }}{% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)

# Instructions of its own where there are none: the day, and what tools or thinking ask for.
GRANITE_3 = """
{%- if messages[0].role == 'system' -%}
  {%- set rules, turns = messages[0].content, messages[1:] -%}
{%- else -%}
  {%- set rules, turns = "Today's Date: " ~ strftime_now('%B %d, %Y') ~ '.', messages -%}
  {%- if tools -%}{%- set rules = rules ~ ' Use tools.' -%}
  {%- elif thinking -%}{%- set rules = rules ~ ' Think.' -%}
  {%- else -%}{%- set rules = rules ~ ' Help.' -%}{%- endif -%}
{%- endif -%}
{{- '<|start_of_role|>system<|end_of_role|>' ~ rules ~ '<|end_of_text|>\\n' -}}
{%- if tools -%}
  {{- '<|start_of_role|>available_tools<|end_of_role|>' ~ (tools | tojson(indent=4)) -}}
  {{- '<|end_of_text|>\\n' -}}
{%- endif -%}
{%- for m in turns -%}
  {{- '<|start_of_role|>' ~ m.role ~ '<|end_of_role|>' ~ m.content ~ '<|end_of_text|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_of_role|>assistant<|end_of_role|>' -}}{%- endif -%}
"""

# Tools follow the instructions; calls and results have tags, and results are a user's turn.
GRANITE_4 = """
{%- set rules = [messages[0].content] if messages[0].role == 'system' else [] -%}
{%- if tools -%}
  {%- set asked = namespace(text='Use tools.\\n<tools>') -%}
  {%- for tool in tools -%}
    {%- set asked.text = asked.text ~ '\\n' ~ (tool | tojson) -%}
  {%- endfor -%}
  {%- set rules = rules + [asked.text ~ '\\n</tools>'] -%}
{%- endif -%}
{{- '<|start_of_role|>system<|end_of_role|>' ~ (rules | join('\\n\\n') or 'Help.') -}}
{{- '<|end_of_text|>\\n' -}}
{%- for m in messages -%}
  {%- if m.role == 'user' -%}
    {{- '<|start_of_role|>user<|end_of_role|>' ~ m.content ~ '<|end_of_text|>\\n' -}}
  {%- elif m.role == 'assistant' -%}
    {{- '<|start_of_role|>assistant<|end_of_role|>' ~ m.content -}}
    {%- for call in m.tool_calls or [] -%}
      {{- '\\n' if m.content or not loop.first else '' -}}
      {{- '<tool_call>\\n{"name": "' ~ call.function.name ~ '", "arguments": ' -}}
      {{- (call.function.arguments | tojson) ~ '}\\n</tool_call>' -}}
    {%- endfor -%}
    {{- '<|end_of_text|>\\n' -}}
  {%- elif m.role == 'tool' -%}
    {{- '<|start_of_role|>user<|end_of_role|>' if loop.previtem.role != 'tool' else '' -}}
    {{- '\\n<tool_response>\\n' ~ m.content ~ '\\n</tool_response>' -}}
    {{- '<|end_of_text|>\\n' if loop.last or loop.nextitem.role != 'tool' else '' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_of_role|>assistant<|end_of_role|>' -}}{%- endif -%}
"""

WRITTEN_ANEW = {
    "smollm3": SMOLLM3,
    "mistral_small": MISTRAL_SMALL,
    "mistral_nemo": MISTRAL_NEMO,
    "phi4": PHI4,
    "olmo2": OLMO2,
    "granite3": GRANITE_3,
    "granite4": GRANITE_4,
}
BOS_AND_EOS = {
    "mistral_small": ("<s>", "</s>"),
    "mistral_nemo": ("<s>", "</s>"),
    "phi4": ("<|endoftext|>", "<|im_end|>"),
    "olmo2": ("<|endoftext|>", "<|endoftext|>"),
    "granite3": ("<|end_of_text|>", "<|end_of_text|>"),
    "granite4": ("<|end_of_text|>", "<|end_of_text|>"),
}
MARK = re.compile(
    r"<\|[^|<>'\"{}\s]+\|>|<(?:start|end)_of_turn>|<｜[^｜]+｜>"
    r"|\[/?(?:INST|SYSTEM_PROMPT|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS)\]"
)


def with_template(tokenizer: PreTrainedTokenizerBase, name: str) -> PreTrainedTokenizerBase:
    """A copy of the tokenizer with a model's template, its marks as special tokens."""
    made = copy.deepcopy(tokenizer)
    text = WRITTEN_ANEW.get(name)
    text = text or (files("trl") / "chat_templates" / f"{name}.jinja").read_text()
    if name in BOS_AND_EOS:
        bos, eos = BOS_AND_EOS[name]
        made.add_special_tokens({"bos_token": bos, "eos_token": eos})
    if name != "olmo2":  # its other marks are ordinary text
        made.add_tokens(sorted(set(MARK.findall(text))), special_tokens=True)
    made.add_tokens(["<think>", "</think>"])
    made.chat_template = text
    return made
