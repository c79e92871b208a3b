"""How native kernels are compiled, chosen and told of, and what happens where there are none."""

import shutil

import pytest
import torch

from smoldpo.engine import autotune
from smoldpo.engine.autotune import KernelChoice, choose_native
from smoldpo.engine.kernels.native import library
from smoldpo.engine.kernels.native.library import NativeError, build_id, load, supported
from smoldpo.engine.kernels.native_check import LayerWork
from smoldpo.utils.errors import UsageError

CHOOSE = autotune._reason_for_torch  # as it is, before conftest fixes it
ONE = 'extern "C" __attribute__((visibility("default"))) int one(long x) { return x != 1; }'
here = pytest.mark.skipif(not supported(), reason="no AVX-512 with bfloat16 here")


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A process and a cache folder that have seen no kernels."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(library, "_loaded", {})
    for cached in (library._compiler, CHOOSE):
        cached.cache_clear()
    monkeypatch.setattr(autotune, "_reason_for_torch", CHOOSE)
    yield tmp_path / "smoldpo" / "kernels"
    for cached in (library._compiler, CHOOSE):
        cached.cache_clear()


@pytest.fixture
def any_processor(monkeypatch):
    """As if the processor had AVX-512 with bfloat16; nothing is run on it."""
    monkeypatch.setattr(library, "supported", lambda: ["avx512_bf16"])
    monkeypatch.setattr(autotune, "supported", lambda: ["avx512_bf16"])


def test_without_a_compiler_torch_computes_and_the_run_says_why(
    fresh, any_processor, monkeypatch, capfd
):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert choose_native(torch.bfloat16, "cpu", "auto") == ""
    assert "no C++ compiler is found (install g++ or clang)" in capfd.readouterr().err
    with pytest.raises(UsageError, match=r"no C\+\+ compiler .* say --kernels torch, or auto"):
        choose_native(torch.bfloat16, "cpu", "native")
    assert library.in_words().startswith("none: no C++ compiler is found")


def test_what_does_not_compile_is_told_in_one_line_and_leaves_nothing(
    fresh, any_processor, monkeypatch, tmp_path
):
    broken = tmp_path / "source"
    broken.mkdir()
    (broken / "broken.cpp").write_text("int x = ;")
    monkeypatch.setattr(library, "SOURCE", broken)
    with pytest.raises(NativeError, match=r"cannot compile them: .*broken.cpp.*error"):
        load("avx512_bf16")
    assert list(fresh.iterdir()) == []
    assert "broken.cpp" in library.in_words(), "what smoldpo doctor tells"
    with pytest.raises(NativeError, match="cannot compile"):
        load("avx512_bf16")


def test_a_library_is_compiled_once_and_another_source_is_another(
    fresh, any_processor, monkeypatch, tmp_path, capfd
):
    source = tmp_path / "source"
    source.mkdir()
    (source / "one.cpp").write_text(ONE)
    monkeypatch.setattr(library, "SOURCE", source)
    assert library.in_words() == "for avx512_bf16, to be compiled at first use"
    load("avx512_bf16").call("one", 1)
    assert library.in_words() == "for avx512_bf16"
    assert "compiling for avx512_bf16" in capfd.readouterr().err
    first = build_id("avx512_bf16")
    library._loaded.clear()
    with pytest.raises(MemoryError, match="one"):
        load("avx512_bf16").call("one", 2)
    assert capfd.readouterr().err == ""
    (source / "one.cpp").write_text(ONE.replace("1", "2"))
    assert build_id("avx512_bf16") != first


@pytest.mark.parametrize("dtype, device", [(torch.float32, "cpu"), (torch.bfloat16, "cuda")])
def test_other_precisions_and_devices_are_torchs(dtype, device):
    assert choose_native(dtype, device, "auto") == ""
    with pytest.raises(UsageError, match="kernels native: they compute in bfloat16 on a CPU"):
        choose_native(dtype, device, "native")


def test_a_processor_without_the_instructions(monkeypatch):
    monkeypatch.setattr(library, "_processor_flags", lambda: frozenset({"avx2", "fma"}))
    assert supported() == []
    monkeypatch.setattr(library, "_loaded", {})
    assert library.in_words() == "none for this processor"
    with pytest.raises(NativeError, match="does not offer amx"):
        load("amx")


def test_tiles_need_the_systems_leave(monkeypatch):
    monkeypatch.setattr(library, "_processor_flags", lambda: frozenset(library.NEEDS["amx"]))
    monkeypatch.setattr(library, "_permitted", lambda name: name != "amx")
    assert supported() == ["avx512_bf16"]


@pytest.fixture
def compiled(monkeypatch):
    """The machine's own kernels, and choices that are kept nowhere."""
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(autotune, "stored_choice", lambda name: None)
    CHOOSE.cache_clear()
    yield
    CHOOSE.cache_clear()


@here
def test_wrong_results_are_not_taken(compiled, monkeypatch):
    monkeypatch.setattr(autotune, "fastest_turns", lambda tasks: [1.0, 2.0])
    assert CHOOSE(supported()[0]) == ""
    CHOOSE.cache_clear()
    results = LayerWork.results
    monkeypatch.setattr(
        LayerWork,
        "results",
        lambda self, native: [each * (1.1 if native else 1) for each in results(self, native)],
    )
    assert "results are wrong here (by 10%" in CHOOSE(supported()[0])


@here
@pytest.mark.parametrize("before, ratio, taken", [
    (None, 0.9, True), (None, 1.1, False), (True, 1.9, True), (True, 2.1, False),
    (False, 0.6, False), (False, 0.4, True),
])  # fmt: skip
def test_the_faster_is_taken_and_stays(compiled, monkeypatch, before, ratio, taken):
    kept = {}
    monkeypatch.setattr(autotune, "stored_choice", lambda name: before)
    monkeypatch.setattr(autotune, "store_choice", kept.__setitem__)
    monkeypatch.setattr(autotune, "fastest_turns", lambda tasks: [ratio, 1.0])
    assert (CHOOSE(supported()[0]) == "") is taken and list(kept.values()) == [taken]


def test_a_choice_in_words():
    assert str(KernelChoice(native="amx")) == "native (amx), else attention fused, head fused"
    assert KernelChoice.of({"fused_attention": True, "fused_head": False}).native == ""
