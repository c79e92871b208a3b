"""Adapters that leave without their model: what is added, proven on top of the model."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from smoldpo.export import llama_cpp, mlx, mlx_lm
from smoldpo.export.adapter_files import (
    read_gguf_adapter,
    read_mlx_adapter,
    write_gguf_adapter,
    write_mlx_adapter,
)
from smoldpo.export.gguf import file_bytes, require_exportable, write_gguf
from smoldpo.export.proof import Proof
from smoldpo.export.source import Origin
from smoldpo.export.targets import Target
from smoldpo.export.verify import Verification, Witness
from smoldpo.models.load import find_model, load_base, load_parts
from smoldpo.utils.errors import UsageError

KIND = "f32"
"""Adapters are small: they leave as they are."""
SUM = {KIND: 1e-4}
"""Allowed of the mean |Δ log p| a token, in nats: what is added is rounded in another order."""


class _Adapter:
    """What both kinds share. The model that is measured before is the merged one."""

    def __init__(self, origin: Origin):
        self.source, self.about = origin.source, origin.about

    def kind(self, quantize: str | None) -> str:
        if quantize not in (None, KIND):
            raise UsageError(f"--quantize {quantize}: adapters leave in {KIND}; leave it out")
        return KIND

    def take(self, path: Path, called: str) -> list[str]:
        return []


class GgufAdapter(_Adapter):
    """A GGUF file for llama.cpp's --lora."""

    name: ClassVar[str] = "gguf"

    def path(self, output: Path | None, folder: Path, called: str, kind: str) -> Path:
        return output or folder / f"{called}-adapter.gguf"

    def require(self, model: PreTrainedModel) -> None:
        require_exportable(model)

    def needed(self, model: PreTrainedModel, kind: str) -> int:
        """With the model in f32 beside it, on which llama.cpp proves it."""
        return file_bytes(model, KIND) if llama_cpp.is_installed() else 64 << 20

    def write(
        self, path: Path, model: Any, tokenizer: PreTrainedTokenizerBase, kind: str, origin: Origin
    ) -> list[str]:
        write_gguf_adapter(path, load_parts(self.source), model, origin.about.name)
        return []

    def prove(self, path: Path, proof: Proof, kind: str) -> tuple[Verification, Witness | None]:
        model = load_base(self.source)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            base = Path(folder) / "base.gguf"
            if llama_cpp.is_installed():
                write_gguf(base, model, proof.tokenizer, KIND, self.about)
            read_gguf_adapter(path, model)
            verified = proof.hold(model, proof.tokenizer, kind, SUM)
            del model
            if not base.exists():
                return verified, None
            threads = torch.get_num_threads()
            return verified, llama_cpp.ask(
                base, proof.tokenizer, proof.model, kind, threads, adapter=path
            )


class MlxAdapter(_Adapter):
    """A folder for mlx-lm's --adapter-path."""

    name: ClassVar[str] = "mlx"

    def path(self, output: Path | None, folder: Path, called: str, kind: str) -> Path:
        return output or folder / f"{called}-adapter-mlx"

    def require(self, model: PreTrainedModel) -> None:
        mlx.require_exportable(model)

    def needed(self, model: PreTrainedModel, kind: str) -> int:
        """With the model in f32 beside it, on which mlx-lm proves it."""
        return mlx.folder_bytes(model, KIND) if mlx_lm.is_installed() else 64 << 20

    def write(
        self, path: Path, model: Any, tokenizer: PreTrainedTokenizerBase, kind: str, origin: Origin
    ) -> list[str]:
        path.mkdir()
        write_mlx_adapter(path, load_parts(self.source), model)
        return []

    def prove(self, path: Path, proof: Proof, kind: str) -> tuple[Verification, Witness | None]:
        model = load_base(self.source)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            if mlx_lm.is_installed():
                mlx.write_mlx(Path(folder), model, proof.tokenizer, KIND)
            read_mlx_adapter(path, model)
            verified = proof.hold(model, proof.tokenizer, kind, SUM)
            del model
            if not mlx_lm.is_installed():
                return verified, None
            return verified, mlx.ask(Path(folder), proof, kind, adapter=path)


ADAPTERS: dict[str, type[GgufAdapter] | type[MlxAdapter]] = {
    kind.name: kind for kind in (GgufAdapter, MlxAdapter)
}


def adapter_target(to: str, origin: Origin) -> tuple[Target, Origin]:
    """The target for an adapter alone, and the adapter that the model is or has beside it.

    Raises:
        UsageError: no adapter; a program that takes none.
    """
    if to not in ADAPTERS:
        raise UsageError(
            f"--adapter: --to {to} takes no adapters; give one of {', '.join(ADAPTERS)}"
        )
    beside = origin.run / "adapter" if origin.run else None
    if origin.source.base is None and beside is not None and beside.is_dir():
        origin = replace(origin, source=find_model(str(beside)))
    if origin.source.base is None:
        raise UsageError(f"{origin.name}: holds a whole model, and no adapter; leave --adapter out")
    return ADAPTERS[to](origin), origin
