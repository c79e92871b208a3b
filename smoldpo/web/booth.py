"""Voting, blind: what a voter is shown next, on which side, and what became of it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from smoldpo.data.cleaning.text import hash64
from smoldpo.web.ballots import Ballot, read_ballots
from smoldpo.web.votes import VoteFile

CHOICES = ("left", "right", "tie", "skip", "undo")


@dataclass(frozen=True)
class Shown:
    """A ballot as a voter sees it: the first answer on the right where it is swapped."""

    ballot: Ballot
    swapped: bool

    @property
    def left(self) -> str:
        return self.ballot.b if self.swapped else self.ballot.a

    @property
    def right(self) -> str:
        return self.ballot.a if self.swapped else self.ballot.b

    def winner(self, choice: str) -> str:
        """a, b or tie."""
        return choice if choice == "tie" else "a" if (choice == "left") != self.swapped else "b"


class Booth:
    """One source's ballots and votes.

    Order and sides are each voter's own, and follow from the texts and the voter's name: a page
    that is loaded again shows the same.
    """

    def __init__(self, name: str, source: Path, votes: Path):
        """Read ballots and votes.

        Raises:
            UsageError, DataError: as `read_ballots` and `VoteFile`.
        """
        self.name, self.source = name, source
        self.ballots, self.same = read_ballots(source)
        self.votes = VoteFile(votes, self.ballots)
        self._skipped: dict[str, list[str]] = {}
        self._ended: set[str] = set()

    def next(self, voter: str) -> Shown | None:
        """The next ballot without this voter's vote; skipped ones come last."""
        voted, skipped = self.votes.by_voter.get(voter, {}), self._skipped.get(voter, [])
        left = [ballot for ballot in self.ballots if ballot.id not in voted]
        if not left or self.has_ended(voter):
            return None

        def turn(ballot: Ballot) -> tuple[int, int]:
            late = skipped.index(ballot.id) + 1 if ballot.id in skipped else 0
            return late, hash64(voter, ballot.id)

        return self._shown(min(left, key=turn), voter)

    def _shown(self, ballot: Ballot, voter: str) -> Shown:
        return Shown(ballot, bool(hash64("side", voter, ballot.id) & 1))

    def choose(self, voter: str, ballot: str, choice: str) -> None:
        """Take a choice about a ballot; one that was voted on before, or is not there, is ignored.

        Raises:
            OSError: the vote could not be written.
            ValueError: no such choice.
        """
        if choice not in CHOICES:
            raise ValueError(choice)
        skipped = self._skipped.setdefault(voter, [])
        if self.has_ended(voter):
            return
        if choice == "undo":
            self.votes.undo(voter)
            return
        if ballot in skipped:
            skipped.remove(ballot)
        if choice == "skip":
            skipped.append(ballot)
            return
        for each in self.ballots:
            if each.id == ballot:
                self.votes.add(each, self._shown(each, voter).winner(choice), voter)

    def end(self, voter: str) -> None:
        """The voter sees the names now, and votes no more."""
        self._ended.add(voter)

    def has_ended(self, voter: str) -> bool:
        return voter in self._ended

    @property
    def models(self) -> tuple[str, str]:
        """The names of first and second answers; several are joined."""
        names = ({getattr(b, side) for b in self.ballots} for side in ("model_a", "model_b"))
        first, second = (", ".join(sorted(each)) for each in names)
        return first, second
