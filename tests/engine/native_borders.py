"""A program: all native kernels between pages that nobody may touch, with every border poisoned.

Each buffer of a call lies in memory of its own, once flush with the page behind it and once with
the page before it; the kernels' own memory begins as NaN (SMOLDPO_CHECK), and what C++ leaves
undefined is a trap. Whatever reads or writes beyond ends this process; whatever reads what was not
written gives another result than without all this.
"""

import ctypes
import mmap
import sys

import torch

from smoldpo.engine.kernels.native import library
from smoldpo.engine.kernels.native.functions import AttentionFunction, LinearFunction
from smoldpo.engine.kernels.native.library import Library, load
from smoldpo.engine.kernels.native_check import LayerWork
from smoldpo.engine.layout import Layout, Segment

CHECKS = ("-O1", "-DSMOLDPO_CHECK", "-fsanitize=undefined", "-fsanitize-undefined-trap-on-error")
libc = ctypes.CDLL(None, use_errno=True)


def fenced(tensor, at_end):
    """A copy between two pages without access, and the memory that holds it."""
    size, page = tensor.numel() * tensor.element_size(), mmap.PAGESIZE
    inner = -(-max(size, 1) // page) * page
    memory = mmap.mmap(-1, inner + 2 * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for fence in (start, start + page + inner):
        assert libc.mprotect(ctypes.c_void_p(fence), ctypes.c_size_t(page), 0) == 0
    offset = page + (inner - size if at_end else 0)
    flat = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=offset)
    return flat.view(tensor.shape).copy_(tensor), memory


def fence_calls(at_end):
    plain = Library.call

    def call(self, name, *arguments):
        fences = [
            fenced(each, at_end)
            if isinstance(each, torch.Tensor) and each.numel()
            else (each, None)
            for each in arguments
        ]
        plain(self, name, *(copy for copy, _ in fences))
        for each, (copy, memory) in zip(arguments, fences, strict=True):
            if memory is not None:
                each.data.copy_(copy)  # unseen by autograd

    Library.call = call
    return plain


def streams(native):
    """Shared beginnings, single rows, rows that are read, and a pair of more than one part."""
    torch.manual_seed(0)
    found = []
    for pairs, shared, read in (
        ([(90, 52, 48, 37), (40, 3, 5, 37), (1, 1, 1, 0)], 37, False),
        ([(33, 31, 2, 0), (80, 1, 40, 0)], 0, True),
        ([(500, 90, 40, 0)], 0, False),
    ):
        segments, at = [], shared
        for pair in pairs:
            segments.append(Segment(at, *pair))
            at += segments[-1].length
        tokens = -(-at // 32) * 32
        layout = Layout.of(segments, torch.zeros(tokens, dtype=torch.long))
        states = [torch.randn(1, n, tokens, 32).bfloat16().requires_grad_() for n in (4, 2, 2)]
        result = AttentionFunction.apply(native, *states, 0.2, layout, read)
        found += [result.detach(), *torch.autograd.grad(result, states, torch.ones_like(result))]
    states, weight = (torch.randn(n, 96).bfloat16().requires_grad_() for n in (45, 32))
    result = LinearFunction.apply(native, states, weight, None)
    return [*found, result.detach(), *torch.autograd.grad(result.sum(), [states, weight])]


def results(native):
    return [*LayerWork().results(native), *streams(native)]


def main():
    torch.set_num_threads(1)
    instructions = sys.argv[1]
    expected = results(load(instructions))
    library.FLAGS = (*library.FLAGS, *CHECKS)
    library._loaded.clear()
    checked = load(instructions)
    for at_end in (True, False):
        plain = fence_calls(at_end)
        found = results(checked)
        Library.call = plain
        worst = max(
            float((a - b).float().norm() / b.float().norm().clamp(min=1e-6))
            for a, b in zip(found, expected, strict=True)
        )
        print(f"worst {worst}")
        assert worst < 1e-3, worst  # another optimisation may round otherwise, NaN is none
    print("nothing beyond the borders")


if __name__ == "__main__":
    main()
