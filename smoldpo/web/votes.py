"""votes.jsonl: each vote appended and synced at once; none lost, none counted twice."""

from __future__ import annotations

import json
import os
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from smoldpo.evaluation.sequential import Agreement, cohens_kappa, confidence_sequence
from smoldpo.utils.errors import DataError
from smoldpo.utils.files import write_text
from smoldpo.web.ballots import Ballot

WINNERS = ("a", "b", "tie")
SCORE = {"a": 1.0, "tie": 0.5, "b": 0.0}


@dataclass(frozen=True)
class Standing:
    """How the first answers (a) fare against the second: a tie counts one half."""

    votes: int
    share: float
    low: float
    high: float

    @property
    def preferred(self) -> str | None:
        """a or b, where the interval leaves one half out."""
        return "a" if self.low > 0.5 else "b" if self.high < 0.5 else None


class VoteFile:
    """The votes on some ballots. A row is what `train` reads as a pair.

    Attributes:
        by_voter: of each voter the winners by the ballot's id, in the order of voting.
    """

    def __init__(self, path: Path, ballots: list[Ballot]):
        """Read what is there. A line that was cut off when a server was killed is removed.

        Raises:
            DataError: the file holds something else.
        """
        self.path = path
        self._writing = threading.Lock()
        self.by_voter: dict[str, dict[str, str]] = {}
        known = {ballot.id for ballot in ballots}
        for row in self._rows():
            if row["id"] in known:
                self.by_voter.setdefault(row["voter"], {})[row["id"]] = row["winner"]

    def add(self, ballot: Ballot, winner: str, voter: str) -> bool:
        """Append a vote; False where this voter has voted on this ballot.

        Raises:
            OSError: it could not be written; the file is as it was.
            ValueError: no such winner.
        """
        if winner not in WINNERS:
            raise ValueError(winner)
        with self._writing:
            votes = self.by_voter.setdefault(voter, {})
            if ballot.id in votes:
                return False
            row = (
                {"id": ballot.id}
                | asdict(ballot)
                | {
                    "winner": winner,
                    "voter": voter,
                    "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                    "source": "votes",
                }
            )
            _append(self.path, json.dumps(row, ensure_ascii=True) + "\n")
            votes[ballot.id] = winner
            return True

    def undo(self, voter: str) -> str | None:
        """Take back the voter's last vote: the ballot's id, or None where there is none.

        Raises:
            OSError: it could not be written; the file is as it was.
        """
        with self._writing:
            votes = self.by_voter.get(voter, {})
            if not votes:
                return None
            last = next(reversed(votes))
            kept = [r for r in self._rows() if (r["voter"], r["id"]) != (voter, last)]
            write_text(self.path, "".join(json.dumps(row) + "\n" for row in kept))
            del votes[last]
            return last

    def standing(self, voter: str | None = None) -> Standing:
        """Over all votes, or those of one voter."""
        voters = self.by_voter.values() if voter is None else [self.by_voter.get(voter, {})]
        scores = [SCORE[winner] for votes in voters for winner in votes.values()]
        share = sum(scores) / len(scores) if scores else 0.5
        return Standing(len(scores), share, *confidence_sequence(scores))

    def agreements(self) -> list[tuple[str, str, Agreement]]:
        """Of each two voters with ballots in common."""
        found = []
        voters = sorted(self.by_voter)
        for number, one in enumerate(voters):
            for other in voters[:number]:
                ours, theirs = self.by_voter[one], self.by_voter[other]
                common = [ballot for ballot in ours if ballot in theirs]
                agreement = cohens_kappa([ours[i] for i in common], [theirs[i] for i in common])
                if agreement is not None:
                    found.append((other, one, agreement))
        return found

    def _rows(self) -> list[dict[str, Any]]:
        try:
            whole, _, rest = self.path.read_bytes().rpartition(b"\n")
        except FileNotFoundError:
            return []
        if rest:
            os.truncate(self.path, len(whole) + bool(whole))
        rows = []
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                row = json.loads(line)
                if row["winner"] not in WINNERS or not isinstance(row["voter"], str):
                    raise ValueError
                rows.append(row | {"id": str(row["id"])})
            except (ValueError, TypeError, KeyError):
                raise DataError(
                    f"{self.path}, line {number}: is no vote of smoldpo web; give another file "
                    "with --votes"
                ) from None
        return rows


def _append(path: Path, text: str) -> None:
    """Whole and synced, or not at all."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        before = os.fstat(file).st_size
        try:
            left = text.encode()
            while left:
                left = left[os.write(file, left) :]
            os.fsync(file)
        except OSError:
            os.ftruncate(file, before)
            raise
    finally:
        os.close(file)
