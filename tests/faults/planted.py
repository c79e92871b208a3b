"""Faults planted in a child: kills at exact places, starvation, and resumes that are wrong."""

from __future__ import annotations

import os
import random
import resource
import signal
import time
from pathlib import Path
from typing import Any


def same_kernels() -> None:
    """Which kernel is faster is measured at each start, and another one rounds otherwise."""
    from smoldpo.engine import build
    from smoldpo.engine.autotune import KernelChoice

    build.choose_kernels = lambda *_: KernelChoice()


def without_pictures() -> None:
    """Pages without plots: matplotlib takes more than half of a tiny run."""
    from smoldpo.reports import plots

    plots._drawn = lambda draw, size: "<svg ></svg>"


def kill_at_file_operation(number: int, record: str | None = None) -> None:
    """SIGKILL itself before file operation `number` (from 1) inside saves; `record` counts them
    instead.
    """
    import shutil

    from smoldpo.training import checkpoint, checkpointer
    from smoldpo.utils import files

    count, inside = 0, 0

    def counted(module: Any, name: str) -> None:
        original = getattr(module, name)

        def operation(*args: Any, **options: Any) -> Any:
            nonlocal count
            if inside:
                count += 1
                if record:
                    Path(record).write_text(str(count))
                elif count == number:
                    os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **options)

        setattr(module, name, operation)

    for module, name in [
        (os, "fsync"), (os, "unlink"), (os, "rename"), (os, "replace"), (os, "mkdir"),
        (os, "rmdir"), (shutil, "rmtree"), (checkpoint, "save_file"), (checkpoint, "write_json"),
        (checkpoint, "sha256_of"), (files, "write_text"),
    ]:  # fmt: skip
        counted(module, name)
    for name in ("rename", "replace"):
        counted(Path, name)

    def saving(original: Any) -> Any:
        def run(*args: Any, **options: Any) -> Any:
            nonlocal inside
            inside += 1
            try:
                return original(*args, **options)
            finally:
                inside -= 1

        return run

    checkpointer.save_checkpoint = saving(checkpointer.save_checkpoint)
    checkpointer.prune = saving(checkpointer.prune)


def slow_steps(seconds: float) -> None:
    """Each stream of a step takes so much longer, so that a signal comes in the middle of one."""
    from smoldpo.engine.logprobs import LogprobModel

    original = LogprobModel.logps

    def slow(self: Any, *args: Any) -> Any:
        time.sleep(seconds)
        return original(self, *args)

    LogprobModel.logps = slow


def kill_in_sweep(place: str, trial: int = 2) -> None:
    """SIGKILL itself while a sweep writes its pairs, at a trial's beginning, step or end, or at its
    end.
    """
    from smoldpo.engine.fast import FastEngine
    from smoldpo.sweep import run as sweep_run
    from smoldpo.sweep import splits, trials
    from smoldpo.training import run

    numbers: list[int] = []

    def strike(module: Any, name: str, when: int = 1, of_trial: bool = False) -> None:
        original, calls = getattr(module, name), 0

        def struck(*args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += not of_trial or numbers[-1:] == [trial]
            if calls == when:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*args, **options)

        setattr(module, name, struck)

    make = trials._make

    def noted(context: Any, folder: Path, *more: Any) -> Any:
        numbers.append(int(folder.name))
        return make(context, folder, *more)

    trials._make = noted
    strike(
        *{
            "pairs": (splits, "write_text", 2),
            "beginning": (trials, "write_beginning", 1, True),
            "step": (FastEngine, "accumulate_gradients", 4, True),
            "figures": (trials, "_value", 1, True),
            "end": (trials, "_write", 2 * trial),
            "after": (sweep_run._Sweep, "_say_result", trial),
            "winner": (run.Run, "_save_model", 1),  # trials save none
            "results": (
                sweep_run,
                "write_results",
                2,
            ),  # the first is before the winner is measured
        }[place]
    )


def signal_in(place: str, number: int, then: int = 0) -> None:
    """Send itself a signal in the middle of: a step, an evaluation, the first pass, or a save."""
    from transformers import AutoModelForCausalLM

    from smoldpo.engine.fast import FastEngine
    from smoldpo.evaluation.side_by_side import Comparison
    from smoldpo.export import proof
    from smoldpo.training import checkpoint, loop

    def strike(module: Any, name: str, when: int = 1) -> None:
        original, calls = getattr(module, name), 0

        def struck(*args: Any, **options: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == when:
                os.kill(os.getpid(), number)
                if then:
                    os.kill(os.getpid(), then)
            return original(*args, **options)

        setattr(module, name, struck)

    strike(
        *{
            "step": (FastEngine, "accumulate_gradients", 5),
            "optimizer": (loop, "learning_rate", 5),
            "evaluation": (FastEngine, "policy_logps", 2),
            "last evaluation": (FastEngine, "policy_logps", 3),
            "answers": (Comparison, "run", 1),
            "loading": (AutoModelForCausalLM, "from_pretrained", 1),
            "pass": (FastEngine, "_prepare_stream", 3),
            "save": (checkpoint, "save_file", 4),
            "proof of an export": (proof, "measure", 2),
        }[place]
    )


def random_numbers_matter() -> None:
    """Training that draws from every generator, as dropout or sampling would."""
    import numpy
    import torch

    from smoldpo import losses

    original = losses.LOSSES["sigmoid"]

    def noisy(*args: Any, **options: Any) -> Any:
        loss = original(*args, **options)
        if not torch.is_grad_enabled() or not loss.requires_grad:
            return loss
        if noisy.steps == 0:  # the first loss must be ln 2
            noisy.steps = 1
        drawn = torch.rand(()).item() + random.random() + numpy.random.rand()
        return loss + 1e-3 * drawn * (loss - loss.detach())

    noisy.steps = 0
    losses.LOSSES["sigmoid"] = noisy


def wrong_resume(fault: str) -> None:
    """A resume that gets one thing wrong."""
    from smoldpo.engine.ref_sync import SyncedReference
    from smoldpo.training import optim, sampler, state
    from smoldpo.utils import rng

    if fault == "average":
        optim.AveragedWeights.restore = lambda *_: None
        return
    if fault == "reference":
        SyncedReference.restore = lambda *_: None
        return
    random_numbers_matter()
    if fault == "rng":
        rng.restore = lambda *_: None
    if fault == "moment":
        restore = state.restore_optimizer

        def without(optimizer: Any, named: Any, saved: dict) -> None:
            restore(optimizer, named, saved)
            for moments in optimizer.state.values():
                moments["exp_avg_sq"].zero_()

        state.restore_optimizer = without
    if fault == "one moment":
        restore = state.restore_optimizer

        def nearly(optimizer: Any, named: Any, saved: dict) -> None:
            restore(optimizer, named, saved)
            list(optimizer.state.values())[-1]["exp_avg"].zero_()

        state.restore_optimizer = nearly
    if fault == "pair":
        indices = sampler.Schedule.indices
        sampler.Schedule.indices = lambda self, step: indices(self, step)[1:]
    if fault == "step":
        restored = state.TrainingState.restore

        def late(self: Any, checkpoint: Any) -> None:
            restored(self, checkpoint)
            self.step += 1

        state.TrainingState.restore = late


def memory_is_short_before_training(spare: int) -> None:
    """From before the first step on, the address space may grow by `spare` bytes and no more
    (RLIMIT_AS).
    """
    from smoldpo.training.run import Run

    original = Run._fit_memory

    def short(self: Any) -> None:
        _limit_address_space(spare)
        original(self)

    Run._fit_memory = short


def _limit_address_space(spare: int) -> None:
    limit = _mapped_bytes() + spare
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.getrlimit(resource.RLIMIT_AS)[1]))


def _use_up_freed_memory() -> None:
    """Take from glibc's heap what is free in it, in pieces of 64 KiB and more.

    A piece of the heap that is free serves a request of any size, and is not counted by the limit.
    """
    import ctypes

    from smoldpo.utils import memory

    libc = ctypes.CDLL(None)
    libc.malloc.restype = ctypes.c_void_p
    libc.mallopt(memory.M_MMAP_THRESHOLD, 32 << 20)  # its largest value: the heap serves all below
    for size in (16 << 20, 4 << 20, 1 << 20, 256 << 10, 64 << 10):
        before = _mapped_bytes()
        while _mapped_bytes() == before:
            libc.malloc(size)
    libc.mallopt(memory.M_MMAP_THRESHOLD, 64 << 10)  # what is larger is mapped for itself
    libc.mallopt(memory.M_TRIM_THRESHOLD, 0)


def _mapped_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def memory_runs_out_in_steps(spare: int) -> None:
    """From the first step on, the address space may grow by `spare` bytes and no more (RLIMIT_AS).

    What was freed before would serve a step as well, more of it or less by the allocator's luck: so
    it is used up first. And the machine counts as empty, or a step would be cut before it.
    """
    from smoldpo.engine.fast import FastEngine
    from smoldpo.training import run
    from smoldpo.utils import memory

    original = FastEngine.accumulate_gradients
    run.free_memory = lambda _: 1 << 40

    def starved(self: Any, *args: Any) -> Any:
        if not starved.limited:
            memory.trim_memory()
            _use_up_freed_memory()
            _limit_address_space(spare)
            starved.limited = True
        return original(self, *args)

    starved.limited = False
    FastEngine.accumulate_gradients = starved


def memory_runs_out_once(step: int) -> None:
    """In a stream of the step after `step` finished ones, the first time that it is computed."""
    _in_stream(step, lambda logps: (_ for _ in ()).throw(MemoryError("planted")))


def not_a_number_in_step(step: int) -> None:
    """A stream of the step after `step` finished ones has a log-probability that is no number."""
    _in_stream(step, lambda logps: logps.map(lambda each: each * float("nan")))


def _in_stream(step: int, change: Any) -> None:
    from smoldpo.engine.fast import FastEngine
    from smoldpo.training import loop

    original, accumulate, steps = FastEngine._policy_of, loop.retry_with_smaller_budget, 0
    done = False

    def counted(*args: Any) -> Any:
        nonlocal steps
        steps += 1
        return accumulate(*args)

    def changed(self: Any, *args: Any) -> Any:
        nonlocal done
        logps = original(self, *args)
        if steps == step + 1 and not done:
            done = True
            return change(logps)
        return logps

    loop.retry_with_smaller_budget = counted
    FastEngine._policy_of = changed


def kill_in_noisy_step(step: int) -> None:
    """That of a training that draws random numbers."""
    random_numbers_matter()
    kill_in_step(step)


def kill_in_step(step: int) -> None:
    """SIGKILL itself in the step after `step` finished ones, when part of its gradients are added
    up.
    """
    from smoldpo.engine.fast import FastEngine
    from smoldpo.training import loop

    taken = 0
    train, accumulate = loop.retry_with_smaller_budget, FastEngine.accumulate_gradients

    def noted(work: Any, engine: Any, pairs: Any, what: str) -> Any:
        nonlocal taken
        taken = int(what.removeprefix("step ")) - 1
        return train(work, engine, pairs, what)

    def killed(self: Any, pairs: Any, loss: Any, advance: Any) -> Any:
        def die(units: int) -> None:
            advance(units)
            if taken == step:
                os.kill(os.getpid(), signal.SIGKILL)

        return accumulate(self, pairs, loss, die)

    loop.retry_with_smaller_budget = noted
    FastEngine.accumulate_gradients = killed


def kill_after_step(step: int) -> None:
    """SIGKILL itself when that step is finished and logged, whichever the engine."""
    from smoldpo.training import run

    after = run.Run._after_step

    def killed(self: Any, steps: int) -> Any:
        if steps == step:
            os.kill(os.getpid(), signal.SIGKILL)
        return after(self, steps)

    run.Run._after_step = killed


def signal_after_step(step: int, number: int) -> None:
    """Send itself a signal when that step is finished and logged, whichever the engine."""
    from smoldpo.training import run

    after = run.Run._after_step

    def told(self: Any, steps: int) -> Any:
        if steps == step:
            os.kill(os.getpid(), number)
        return after(self, steps)

    run.Run._after_step = told


def disk_fills_after_saves(saves: int) -> None:
    """After so many checkpoints no file may grow larger than half of a checkpoint's
    (RLIMIT_FSIZE).
    """
    from smoldpo.training import checkpointer

    original, done = checkpointer.save_checkpoint, 0

    def limited(folder: Any, checkpoint: Any) -> Any:
        nonlocal done
        if done == saves:
            hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, (checkpoint.bytes // 2, hard))
        done += 1
        return original(folder, checkpoint)

    checkpointer.save_checkpoint = limited


def small_disk(free: int) -> None:
    """A disk with so many bytes free."""
    import shutil

    usage = shutil.disk_usage
    shutil.disk_usage = lambda path: usage(path)._replace(free=free)


def template_limits(lowered: dict[str, float]) -> None:
    """Chat templates render within these limits (`seconds`, `more_bytes`); a dialogue needs far
    less.
    """
    from smoldpo.data import template_sandbox

    limits = template_sandbox.limits
    template_sandbox.limits = lambda: limits(**lowered)


def longest_line(limit: int) -> None:
    """Of data files no line may have more bytes."""
    from smoldpo.data import files

    files.MAX_LINE = limit


def resume_skips_a_pair() -> None:
    """Of each step the first pair is left out."""
    from smoldpo.training import sampler

    whole = sampler.Schedule.indices
    sampler.Schedule.indices = lambda self, step: whole(self, step)[1:]


def later(days: int) -> None:
    """A clock that is so many days ahead."""
    import datetime

    ahead = datetime.timedelta(days)

    class Later(datetime.date):
        @classmethod
        def today(cls) -> datetime.date:
            return datetime.datetime.now().date() + ahead

    datetime.date = Later
