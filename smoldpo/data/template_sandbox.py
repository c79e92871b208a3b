"""Chat templates come with models, and are programs: they render within limits of time and memory.

transformers' sandbox keeps them from reaching Python. What it lets through is work without end:
loops in loops, products that are a gigabyte of text, powers with a billion digits. So products and
powers are checked before they are computed, and the whole rendering has a few seconds, and so much
memory more than the process had before. That is a sandbox of our own: transformers keeps its own
for everyone else.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import resource
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jinja2.meta
import jinja2.nodes
import jinja2.sandbox
from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from smoldpo.types import Message
from smoldpo.utils.functions import with_globals

SECONDS = 4.0
BYTES = 256 << 20
"""Address space that one rendering may add."""
LONGEST = 1 << 20
"""Elements of a product of a text or list with a number."""
BITS = 1 << 12
"""Bits of a product or power of numbers."""
_one_at_a_time = threading.RLock()  # the limits are the whole process's


class TemplateLimitError(Exception):
    """A template takes more time or memory than any dialogue needs."""


class GuardedEnvironment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """transformers' sandbox, without products and powers that fill the memory."""

    intercepted_binops = frozenset(["*", "**"])

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*" and _product_size(left, right) > (
            BITS if isinstance(left, int) and isinstance(right, int) else LONGEST
        ):
            raise jinja2.sandbox.SecurityError("a product of this size is no part of a dialogue")
        if operator == "**" and not (
            all(isinstance(n, (int, float)) for n in (left, right))
            and abs(right) * max(1, abs(int(left)).bit_length()) <= BITS
        ):
            raise jinja2.sandbox.SecurityError("a power of this size is no part of a dialogue")
        return super().call_binop(context, operator, left, right)


def _product_size(left: Any, right: Any) -> int:
    """Bits of a product of whole numbers, elements of one of a sequence and a number."""
    if isinstance(left, int) and isinstance(right, int):
        return left.bit_length() + right.bit_length()
    sizes = [len(side) if hasattr(side, "__len__") else side for side in (left, right)]
    return int(min(sizes[0] * sizes[1], 1 << 62)) if all(isinstance(n, int) for n in sizes) else 0


@functools.cache
def _environment() -> GuardedEnvironment:
    """What transformers gives chat templates (filters, functions, the generation tag), guarded."""
    theirs = chat_template_utils._compile_jinja_template("").environment
    ours = GuardedEnvironment(
        trim_blocks=theirs.trim_blocks,
        lstrip_blocks=theirs.lstrip_blocks,
        extensions=[type(extension) for extension in theirs.extensions.values()],
    )
    ours.filters |= theirs.filters
    ours.globals |= theirs.globals
    # A prompt must be the same each time that it is rendered; the day is `_compiled`'s.
    ours.filters["random"] = ours.globals["lipsum"] = _refuse_chance
    return ours


def _refuse_chance(*_: Any, **__: Any) -> str:
    raise jinja2.TemplateRuntimeError("it draws at random, so no prompt would be the same twice")


def variables(template: str) -> set[str]:
    """Names that a template reads and does not set first: its arguments, and the clock's.

    Raises:
        jinja2.TemplateError: it cannot be parsed.
    """
    with limits():
        parsed = _environment().parse(template)
        clock = {node.name for node in parsed.find_all(jinja2.nodes.Name)} & {"strftime_now"}
        return jinja2.meta.find_undeclared_variables(parsed) | clock


@functools.lru_cache
def _compiled(template: str, day: datetime.date) -> jinja2.Template:
    """A template for which it is always the midnight that begins `day`."""

    def strftime_now(format: str) -> str:
        return datetime.datetime.combine(day, datetime.time()).strftime(format)

    return _environment().from_string(template, globals={"strftime_now": strftime_now})


@functools.cache
def _apply(day: datetime.date) -> Any:
    """transformers' apply_chat_template, but for how a template is compiled."""
    return with_globals(
        PreTrainedTokenizerBase.apply_chat_template,
        render_jinja_template=with_globals(
            chat_template_utils.render_jinja_template,
            _compile_jinja_template=functools.partial(_compiled, day=day),
        ),
    )


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    add_generation_prompt: bool,
    day: datetime.date | None = None,
    **arguments: Any,
) -> str:
    """The dialogue as the tokenizer's chat template writes it, sandboxed and within limits.

    Args:
        day: what the template takes for today; None: today.
        arguments: what it reads besides: tools, documents, names of its own.

    Raises:
        TemplateLimitError: it takes more time or memory than `limits` allows.
        Exception: whatever the template, a program, raises.
    """
    with limits():
        return _apply(day or datetime.date.today())(
            tokenizer,
            messages,
            add_generation_prompt=add_generation_prompt,
            tokenize=False,
            **arguments,
        )


@contextlib.contextmanager
def limits(seconds: float = SECONDS, more_bytes: int = BYTES) -> Iterator[None]:
    """Limit time and memory within the block, where the system can do that; one thread at a time.

    Raises:
        TemplateLimitError: the limit of time is reached; that of memory raises MemoryError.
    """
    try:
        with _one_at_a_time, _alarm(seconds), _more_memory(more_bytes):
            yield
    except MemoryError:
        raise TemplateLimitError(f"it takes more than {more_bytes >> 20} MiB of memory") from None


@contextlib.contextmanager
def _alarm(seconds: float) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # no other thread gets signals
        yield
        return

    def too_long(*_: Any) -> None:
        raise TemplateLimitError(f"it takes longer than {seconds:g} seconds")

    before = signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextlib.contextmanager
def _more_memory(more_bytes: int) -> Iterator[None]:
    if not sys.platform.startswith("linux"):  # macOS does not keep to RLIMIT_AS
        yield
        return
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    limit = pages * resource.getpagesize() + more_bytes
    if soft != resource.RLIM_INFINITY:
        limit = min(limit, soft)
    resource.setrlimit(resource.RLIMIT_AS, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
