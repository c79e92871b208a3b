"""The forms in which a model leaves: how each is named, written and read back."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Protocol

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from smoldpo.data.template_settings import tokenization
from smoldpo.export import llama_cpp, mlx, mlx_lm, ollama
from smoldpo.export.gguf import file_bytes, require_exportable, require_type, write_gguf
from smoldpo.export.llama_quantize import SMALLER, quantize
from smoldpo.export.proof import Proof
from smoldpo.export.source import Origin, licence_text
from smoldpo.export.verify import Verification, Witness
from smoldpo.models.gguf import read_gguf
from smoldpo.models.hf_logging import quiet
from smoldpo.utils import progress
from smoldpo.utils.files import write_text

PUBLISHER = "smoldpo"
"""The folder of LM Studio's that holds our models."""


class Target(Protocol):
    """A form in which models leave."""

    name: ClassVar[str]

    def kind(self, quantize: str | None) -> str:
        """The type of the weights that `--quantize` names, or the default.

        Raises:
            UsageError: one that cannot be written.
        """

    def path(self, output: Path | None, folder: Path, called: str, kind: str) -> Path:
        """The file or folder to write: `output`, or a name in `folder`."""

    def require(self, model: PreTrainedModel) -> None:
        """Refuse what the other program would compute otherwise.

        Raises:
            ModelError: why.
        """

    def needed(self, model: PreTrainedModel, kind: str) -> int:
        """About how many bytes of the disk it takes."""

    def write(
        self, path: Path, model: Any, tokenizer: PreTrainedTokenizerBase, kind: str, origin: Origin
    ) -> list[str]:
        """Write the whole file or folder; what is to be said of it besides.

        Raises:
            ModelError: a model that cannot be said in this form.
            OSError: the disk is full or not writable.
        """

    def prove(self, path: Path, proof: Proof, kind: str) -> tuple[Verification, Witness | None]:
        """Read back what was written; the witness is the other program, where it is installed.

        Raises:
            VerificationError: it is another model.
        """

    def take(self, path: Path, called: str) -> list[str]:
        """Let the other program take what is whole and proven, where it has to; what it did.

        Raises:
            SmoldpoError: it does not.
        """


class Gguf:
    """One GGUF file."""

    name: ClassVar[str] = "gguf"

    def kind(self, quantize: str | None) -> str:
        return require_type(quantize or "f16")

    def path(self, output: Path | None, folder: Path, called: str, kind: str) -> Path:
        return output or folder / f"{called}-{kind}.gguf"

    def require(self, model: PreTrainedModel) -> None:
        require_exportable(model)

    def needed(self, model: PreTrainedModel, kind: str) -> int:
        if kind in SMALLER:
            return 2 * file_bytes(model, "f16")
        return file_bytes(model, kind)

    def write(
        self, path: Path, model: Any, tokenizer: PreTrainedTokenizerBase, kind: str, origin: Origin
    ) -> list[str]:
        if kind not in SMALLER:
            write_gguf(path, model, tokenizer, kind, origin.about)
            return []
        wide = path.with_name(f"f16-{path.name}")
        write_gguf(wide, model, tokenizer, "f16", origin.about)
        quantize(wide, path, kind, torch.get_num_threads())
        wide.unlink()
        return []

    def prove(self, path: Path, proof: Proof, kind: str) -> tuple[Verification, Witness | None]:
        with progress.spinner("reading the file back"), quiet():
            read, tokenizer = read_gguf(path)
        verified = proof.hold(read, tokenizer, kind)
        del read
        if not llama_cpp.is_installed():
            return verified, None
        threads = torch.get_num_threads()
        return verified, llama_cpp.ask(path, proof.tokenizer, proof.model, kind, threads)

    def take(self, path: Path, called: str) -> list[str]:
        return []


class LmStudio(Gguf):
    """A GGUF file in the folders of its publisher and model, where LM Studio looks for it."""

    name: ClassVar[str] = "lmstudio"

    def path(self, output: Path | None, folder: Path, called: str, kind: str) -> Path:
        place = (output or folder / "lmstudio") / PUBLISHER / called
        return super().path(None, place, called, kind)


class Ollama(Gguf):
    """A folder with a GGUF file and the Modelfile by which Ollama takes it."""

    name: ClassVar[str] = "ollama"

    def path(self, output: Path | None, folder: Path, called: str, kind: str) -> Path:
        return output or folder / f"{called}-{kind}-ollama"

    def write(
        self, path: Path, model: Any, tokenizer: PreTrainedTokenizerBase, kind: str, origin: Origin
    ) -> list[str]:
        settings = tokenization(1, {}, origin.source.location).template
        template = ollama.ollama_template(tokenizer, settings)
        file = f"{origin.about.name}-{kind}.gguf"
        text = ollama.modelfile(file, model, tokenizer, template.text, licence_text(origin))
        path.mkdir()
        write_text(path / "Modelfile", text)
        super().write(path / file, model, tokenizer, kind, origin)
        return [str(template)]

    def prove(self, path: Path, proof: Proof, kind: str) -> tuple[Verification, Witness | None]:
        (file,) = path.glob("*.gguf")
        return super().prove(file, proof, kind)

    def take(self, path: Path, called: str) -> list[str]:
        name = ollama.create(path, called)
        return [f"Ollama has it as {name}"] if name else []


class Mlx:
    """A folder for mlx-lm."""

    name: ClassVar[str] = "mlx"

    def kind(self, quantize: str | None) -> str:
        return mlx.require_kind(quantize or "f16")

    def path(self, output: Path | None, folder: Path, called: str, kind: str) -> Path:
        return output or folder / f"{called}-{kind}-mlx"

    def require(self, model: PreTrainedModel) -> None:
        mlx.require_exportable(model)

    def needed(self, model: PreTrainedModel, kind: str) -> int:
        return mlx.folder_bytes(model, kind)

    def write(
        self, path: Path, model: Any, tokenizer: PreTrainedTokenizerBase, kind: str, origin: Origin
    ) -> list[str]:
        mlx.write_mlx(path, model, tokenizer, kind)
        return []

    def prove(self, path: Path, proof: Proof, kind: str) -> tuple[Verification, Witness | None]:
        with progress.spinner("reading the folder back"), quiet():
            read, tokenizer = mlx.read_back(path, kind)
        verified = proof.hold(read, tokenizer, kind)
        del read
        if not mlx_lm.is_installed():
            return verified, None
        return verified, mlx.ask(path, proof, kind)

    def take(self, path: Path, called: str) -> list[str]:
        return []


TARGETS: dict[str, Target] = {
    target.name: target for target in (Gguf(), LmStudio(), Ollama(), Mlx())
}
