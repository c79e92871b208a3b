"""The limits of chat templates, each held against a template that goes just over it.

Without the limit each of them renders in under a second and in less than 100 MB, in any program:
what would need more is checked with the limit set low.
`test_nothing_but_the_low_limit_is_in_the_way` holds that.
"""

import copy
import functools
import json
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import CHAT_TEMPLATE
from smoldpo.data import template_sandbox
from smoldpo.data.tokenize import PairTokenizer
from smoldpo.utils.errors import ModelError

LOW_SECONDS, LOW_BYTES = 0.01, 8 << 20

SIZES = {
    "text": ("{% set x = 'a' * 1048577 %}", "a product of this size"),
    "a number first": ("{% set x = 1048577 * 'a' %}", "a product of this size"),
    "a list": ("{% set x = [messages] * 1048577 %}", "a product of this size"),
    "in one rendering of two": (
        "{% if messages|length == 1 %}{% set x = messages[0].content * 131073 %}{% endif %}",
        "a product of this size",
    ),
    "whole numbers": ("{% set x = 3 ** 1000 * 3 ** 1585 %}", "a product of this size"),
    "a power": ("{% set x = 2 ** 2049 %}", "a power of this size"),
    "a negative power": ("{% set x = 2 ** -2049 %}", "a power of this size"),
}
JUST_WITHIN = [
    "{% set x = 'a' * 1048576 %}",
    "{% set x = [messages] * 1048576 %}",
    "{% set x = 3 ** 1000 * 3 ** 1584 %}",
    "{% set x = 2 ** 2048 %}",
]
TIME = "{% for a in range(30) %}{% for b in range(100000) %}{% endfor %}{% endfor %}"
MEMORY = {
    "by doubling": "{% set n = namespace(x='ab') %}{% for a in range(24) %}"
    "{% set n.x = n.x + n.x %}{% endfor %}",
    "by formatting": "{% set x = '%36000000d' % messages|length %}",
    "by joining": "{% set x = ([messages[0].role * 250] * 36000) | join %}",
}
"""Each ends with one text of 32 MiB or more."""
REFUSED = {
    "a private attribute": "{% set x = messages.__doc__.title() %}",
    "a private attribute by filter": "{% set x = (messages|attr('__doc__')).title() %}",
    "of a function": "{% set x = raise_exception.__name__.title() %}",
    "a change of the dialogue": "{% set x = messages.append(messages[0]) %}",
}
DEEP = "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{% endif %}{% endmacro %}{% set x = m(250) %}"

on_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="no limit of memory")


@pytest.fixture
def opened(tiny_tokenizer):
    """A tokenizer's reader, which renders its template twice when it is made."""
    return lambda before: PairTokenizer(with_template(tiny_tokenizer, before + CHAT_TEMPLATE), 512)


@pytest.fixture
def lowered(monkeypatch):
    def lower(**limits):
        lower_limits = functools.partial(template_sandbox.limits, **limits)
        monkeypatch.setattr(template_sandbox, "limits", lower_limits)

    return lower


@pytest.mark.parametrize(("template", "says"), SIZES.values(), ids=SIZES)
def test_a_product_just_over_the_limit(opened, template, says):
    with pytest.raises(ModelError, match=says):
        opened(template)


@pytest.mark.parametrize("template", JUST_WITHIN)
def test_a_product_just_within_the_limit(opened, template):
    assert opened(template).template.end_of_turn == "<|im_end|>"


def test_a_loop_just_over_the_time(opened, lowered):
    lowered(seconds=LOW_SECONDS)
    with pytest.raises(ModelError, match=r"takes longer than 0\.01 seconds"):
        opened(TIME)


IN_A_NEW_PROCESS = """
import functools, json, sys
from transformers import AutoTokenizer
from smoldpo.data import template_sandbox
from smoldpo.data.tokenize import PairTokenizer
from smoldpo.utils.errors import ModelError

limits = functools.partial(template_sandbox.limits, more_bytes=int(sys.argv[1]))
template_sandbox.limits = limits
tokenizer = AutoTokenizer.from_pretrained(sys.argv[2])
for template in json.loads(sys.argv[3]):
    tokenizer.chat_template = template
    try:
        print(PairTokenizer(tokenizer, 512).template.end_of_turn)
    except ModelError as error:
        print(error)
"""


@on_linux
def test_more_memory_than_the_limit(tiny_folder):
    """In a new process: malloc may keep freed memory, of other threads too, and give that."""
    templates = [before + CHAT_TEMPLATE for before in ("", *MEMORY.values())]
    arguments = [str(LOW_BYTES), str(tiny_folder), json.dumps(templates)]
    done = subprocess.run(
        [sys.executable, "-c", IN_A_NEW_PROCESS, *arguments], capture_output=True, text=True
    )
    first, *others = done.stdout.splitlines()
    assert first == "<|im_end|>", done.stderr
    assert len(others) == len(MEMORY)
    assert all("takes more than 8 MiB of memory" in said for said in others), others


@pytest.mark.parametrize("template", REFUSED.values(), ids=REFUSED)
def test_what_no_template_may_touch(opened, template):
    with pytest.raises(ModelError, match="unsafe"):
        opened(template)


def test_deeper_than_python_goes(opened):
    with pytest.raises(ModelError, match="recursion"):
        opened(DEEP)


@pytest.mark.parametrize("template", [TIME, *MEMORY.values()], ids=["time", *MEMORY])
def test_nothing_but_the_low_limit_is_in_the_way(opened, template):
    assert opened(template).template.end_of_turn == "<|im_end|>"


@on_linux
def test_every_rendering_has_these_limits(tiny_tokenizer, monkeypatch):
    def witness(*_, **__):
        """Instead of a rendering: the limits within which it is done."""
        spare = resource.getrlimit(resource.RLIMIT_AS)[0] - address_space()
        return signal.getitimer(signal.ITIMER_REAL)[0], spare

    before = resource.getrlimit(resource.RLIMIT_AS)
    monkeypatch.setattr(template_sandbox, "_apply", lambda _: witness)
    seconds, spare = template_sandbox.render(tiny_tokenizer, [], False)
    assert (template_sandbox.SECONDS, template_sandbox.BYTES) == (4.0, 256 << 20)
    assert 0 < seconds <= 4.0 and 0 < spare < 320 << 20
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0
    assert resource.getrlimit(resource.RLIMIT_AS) == before


EVERYTHING = """\
{%- macro said(m) %}{% generation %}{{ m.content }}{% endgeneration %}{% endmacro -%}
{{ bos_token }}{% set found = namespace(n=0) %}
{% for m in messages %}
  {% if m.role == 'system' %}{% continue %}{% endif %}
  {% set found.n = found.n + 1 %}
  <|im_start|>{{ m.role }} {{ m | tojson(indent=1) }} {{ {'a': '<&>'} | tojson }} {{ said(m) }}
  {% if 'stop' in m.content %}{% break %}{% endif %}
{% endfor %}
{{ found.n * 2 }} {{ 'ab' * 3 }} {{ 2 ** 5 }} {{ dict(a=1) }} {{ strftime_now('%Y') }}
{{ tools is none }} {{ documents is none }} {{ add_generation_prompt }}
{{ messages[0].reasoning_content }} {{ messages[1].name is defined }}{{ range(3) | list }}<|im_end|>
"""


@pytest.mark.parametrize("prompt", [True, False])
def test_renders_as_transformers_does(tiny_tokenizer, prompt):
    """Filters, functions, tags, variables; white space; what becomes of reasoning and of None."""
    messages = [
        {"role": "user", "content": "<a> & ümlaut", "thinking": "hm"},
        {"role": "assistant", "content": "b", "name": None},
        {"role": "system", "content": "c"},
        {"role": "user", "content": "stop here"},
        {"role": "user", "content": "never"},
    ]
    tokenizer = with_template(tiny_tokenizer, EVERYTHING)
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False)
    assert template_sandbox.render(tokenizer, messages, prompt) == expected
    assert all(part in expected for part in ("ababab", "32", "[0, 1, 2]")), expected
    assert "never" not in expected


def test_a_named_template_is_the_default_one(tiny_tokenizer):
    templates = {"default": "{{ messages[0].content }}", "tool_use": "{{ tools }}"}
    tokenizer = with_template(tiny_tokenizer, templates)
    assert template_sandbox.render(tokenizer, [{"role": "user", "content": "a"}], True) == "a"


def address_space():
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def with_template(tokenizer, template):
    changed = copy.deepcopy(tokenizer)
    changed.chat_template = template
    return changed
