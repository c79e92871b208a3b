"""`smoldpo export --to hub`: a run's model as a repository on the hub, checked once it is there.

What goes: the model's files, a card (README.md), the report, and the files' SHA-256. The card's
metadata name the base model, the data sets and the accuracies with their intervals. Texts of the
data stay here: the report is written without samples, pairs and mended rows.

All of it is one commit: before it is there, nothing is. Large files go first; those that the hub
has already, as after an upload that broke off, are not sent again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import CommitOperationAdd, EvalResult, HfApi, ModelCard
from huggingface_hub.errors import HFValidationError

from smoldpo.config.load import build_config, load_yaml
from smoldpo.evaluation.metrics import METRICS
from smoldpo.evaluation.schema import Evaluation, Notable
from smoldpo.export.source import Origin, find_origin
from smoldpo.models.adapter_folders import BASE, CONFIG
from smoldpo.reports.html import html_report
from smoldpo.reports.run_files import RunFiles, read_run
from smoldpo.utils import progress
from smoldpo.utils.errors import SmoldpoError, UsageError, whole_reason
from smoldpo.utils.files import sha256_of

REPO = re.compile(r"[\w.-]+/[\w.-]+")
KEPT_HERE = {"README.md", BASE}
"""Of a model's folder: the card is written anew; the base's place on this machine is nobody's."""
CHECKSUMS = "SHA256SUMS"


@dataclass(frozen=True)
class Upload:
    """What goes to the hub, or went: bytes by the name of each file."""

    repo: str
    private: bool
    files: dict[str, int]
    url: str | None = None
    """Of the commit; None where it was a dry run."""

    def as_json(self) -> dict[str, Any]:
        """By name."""
        return {"to": "hub", "repo": self.repo, "private": self.private, "files": self.files,
                "bytes": sum(self.files.values()), "url": self.url}  # fmt: skip

    def __str__(self) -> str:
        who = "private" if self.private else "public"
        rows = [f"{size / 1e6:10,.2f} MB  {name}" for name, size in self.files.items()]
        total = f"{sum(self.files.values()) / 1e6:10,.2f} MB  to {self.repo} ({who})"
        return "\n".join([*rows, total])


def upload_run(
    name: str, repo: str, *, public: bool = False, texts: bool = False, dry_run: bool = False
) -> Upload:
    """Upload a run's model, card and report, and hold what the hub has against the files here.

    Args:
        repo: its name on the hub, OWNER/NAME; it is made where there is none.
        public: a repository that is made is private otherwise; one that is there stays as it is.
        texts: the whole report, evaluation.json and samples.jsonl, which hold texts of the data.
        dry_run: nothing is sent, nor is the hub asked anything.

    Raises:
        UsageError: a name that no repository can have; no run.
        SmoldpoError: the hub is not reached, refuses, or has something else in the end.
    """
    if not REPO.fullmatch(repo):
        raise UsageError(f"--repo {repo}: give OWNER/NAME, such as me/my-tuned-model")
    origin = find_origin(name)
    if origin.run is None:
        raise UsageError(f"{name}: is no run; `hf upload {repo} {name}` uploads other folders")
    run = read_run(origin.run)
    contents = _contents(origin, run, texts)
    sums = "".join(f"{_sha256(what)}  {path}\n" for path, what in contents.items())
    contents[CHECKSUMS] = sums.encode()
    sizes = {path: _size(what) for path, what in contents.items()}
    found = Upload(repo, not public, sizes)
    if dry_run:
        return found
    with _explained(repo):
        # The endpoint is read now, and not when the library was imported.
        hub = HfApi(endpoint=os.environ.get("HF_ENDPOINT") or None)
        with progress.spinner(f"uploading to {repo}"):
            hub.create_repo(repo, private=not public, exist_ok=True)
            operations = [CommitOperationAdd(path, what) for path, what in contents.items()]
            commit = hub.create_commit(
                repo, operations, commit_message=f"{origin.about.name}, tuned by smoldpo"
            )
            _require_arrived(hub, repo, commit.oid, contents)
    return replace(found, url=str(commit.commit_url))


Content = Path | bytes


def _contents(origin: Origin, run: RunFiles, texts: bool) -> dict[str, Content]:
    """What goes, by its name there."""
    folder = Path(origin.source.location)
    if (
        (folder / CONFIG).is_file()
        and origin.source.base
        and Path(origin.source.base.name).exists()
    ):
        raise SmoldpoError(
            f"{origin.name}: is an adapter of {origin.source.base.name}, a folder on this machine, "
            "where nobody else finds it; train with merge, and upload the merged model"
        )
    found: dict[str, Content] = {
        path.name: path
        for path in sorted(folder.iterdir())
        if path.is_file() and path.name not in KEPT_HERE and not path.name.startswith(".")
    }
    found["README.md"] = hub_card(run).encode()
    shown = run if texts else without_texts(run)
    home = str(Path.home())
    found["report.html"] = html_report([shown]).replace(home, "~").encode()
    if texts:
        for name in ("evaluation.json", "samples.jsonl"):
            if (run.folder / name).is_file():
                found[name] = run.folder / name
    return found


def without_texts(run: RunFiles) -> RunFiles:
    """The run's files without texts of the data: samples, notable pairs, rows that were mended."""
    evaluation = run.evaluation
    if evaluation is not None:
        template = {k: v for k, v in evaluation.chat_template.items() if k in ("date", "kwargs")}
        update = {"notable": Notable(), "chat_template": template}
        evaluation = evaluation.model_copy(update=update)
    data = run.data.model_copy(deep=True)
    for _, source in data.read():
        source.touched = []
    if data.split:
        data.split.touched = []
    why = "Samples are texts, which stayed where the run is."
    return replace(
        run, samples=[], evaluation=evaluation, data=data,
        absent=run.absent | {"samples.jsonl": why},
    )  # fmt: skip


def hub_card(run: RunFiles) -> str:
    """The run's card, with data sets and accuracies in its metadata, and paths without folders."""
    config = build_config(load_yaml(run.folder / "config.yaml"))
    text = (run.folder / "README.md").read_text(encoding="utf-8")
    for place in {config.model, *config.data, *([config.eval_data] if config.eval_data else [])}:
        if place and (Path(place).expanduser().exists() or Path(place).is_absolute()):
            text = text.replace(place, Path(place).name)
    card = ModelCard(text)
    data: Any = card.data
    sets = [name for name in config.data if REPO.fullmatch(name) and not Path(name).exists()]
    if sets:
        data.datasets = sets
    if run.evaluation is not None:
        data.model_name = run.name
        data.eval_results = list(_results(run.evaluation, sets))
    return str(card)


def _results(evaluation: Evaluation, sets: list[str]) -> Iterator[EvalResult]:
    """Accuracies after training, each with its interval."""
    for name, title in METRICS.items():
        accuracy = evaluation.accuracy.get(name)
        if accuracy is None:
            continue
        after = accuracy.after
        bounds = {"low": after.low, "high": after.high, "level": evaluation.level}
        yield EvalResult(
            task_type="text-generation",
            dataset_type=sets[0] if len(sets) == 1 else "preference-pairs",
            dataset_name=f"{evaluation.n} held-out preference pairs",
            metric_type="accuracy",
            metric_name=f"preference accuracy by {title}",
            metric_value=round(after.value, 4),
            metric_args={**bounds, "before": accuracy.before.value, "pairs": evaluation.n},
        )


def _require_arrived(hub: HfApi, repo: str, revision: str, contents: dict[str, Content]) -> None:
    """Hold sizes and hashes of what the hub has against what was sent.

    Raises:
        SmoldpoError: something else is there.
    """
    names = list(contents)
    there = {info.path: info for info in hub.get_paths_info(repo, names, revision=revision)}
    for name, what in contents.items():
        info: Any = there.get(name)
        lfs = getattr(info, "lfs", None)
        same = info is not None and info.size == _size(what)
        if same and lfs is not None:
            same = lfs.sha256 == _sha256(what)
        elif same:
            same = info.blob_id == _git_blob(what)
        if not same:
            raise SmoldpoError(f"{repo}: {name} did not arrive as it is here; upload it again")


def _size(what: Content) -> int:
    return what.stat().st_size if isinstance(what, Path) else len(what)


def _sha256(what: Content) -> str:
    return sha256_of(what) if isinstance(what, Path) else hashlib.sha256(what).hexdigest()


def _git_blob(what: Content) -> str:
    """git's name of a file's content: SHA-1 of a header and the bytes."""
    content = what.read_bytes() if isinstance(what, Path) else what
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextlib.contextmanager
def _explained(repo: str) -> Iterator[None]:
    """Errors of the hub and its client as ours, with what to do; none of them names a token."""
    again = "call it again: what is there already is not sent twice"
    try:
        yield
    except SmoldpoError:
        raise
    except HFValidationError as error:
        raise UsageError(f"--repo {repo}: {whole_reason(error)}") from None
    except Exception as error:  # the hub, HTTP and the disk, each with errors of its own
        cause = error.__cause__ or error
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if status in (401, 403):
            raise SmoldpoError(
                f"{repo}: the hub refuses ({status}); log in with a token that may write there: "
                "hf auth login, or HF_TOKEN"
            ) from None
        if status is not None:
            said = getattr(cause, "server_message", None) or f"status {status}"
            raise SmoldpoError(f"{repo}: the hub did not take it ({said}); {again}") from None
        kind = type(cause).__name__
        raise SmoldpoError(f"{repo}: the hub is not reached ({kind}); {again}") from None
