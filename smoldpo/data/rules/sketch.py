"""MinHash sketches: how alike two texts are, told from 64 small numbers each.

A text is the set of its overlapping 5-byte pieces (its shingles), case and spacing aside. The
share of equal numbers in two sketches estimates |A ∩ B| / |A ∪ B|, to a standard error of 0.06.

N = texts, P = permutations (numbers in a sketch), S = shingles of one text
"""

from __future__ import annotations

import numpy as np

from smoldpo.data.rules.prompts import plain

PERMUTATIONS = 64
ROWS_IN_BAND = 4
"""Texts are compared when 4 numbers in a row agree: at a likeness of 0.7 some of the 16 bands does
with a probability of 0.99, at 0.3 with 0.12."""
SHINGLE = 5
CHUNK = 65_536
"""Shingles, or pairs, that are worked on at once: bounds the memory that a huge text needs."""

_MULTIPLIERS = (
    np.random.default_rng(20240607).integers(0, 2**32, PERMUTATIONS, dtype=np.uint64) | 1
).astype(np.uint32)


def shingles(text: str, salt: int = 0) -> np.ndarray:
    """A 32-bit hash of every shingle, [S]; `salt` tells apart texts that are not to be confused."""
    data = np.frombuffer(plain(text).encode("utf-8", "replace"), np.uint8).astype(np.uint32)
    if len(data) < SHINGLE:
        return np.empty(0, np.uint32)
    hashes = data[: len(data) - SHINGLE + 1] + np.uint32(salt)
    for step in range(1, SHINGLE):
        hashes = hashes * np.uint32(0x01000193) + data[step : len(data) - SHINGLE + 1 + step]
    for factor, shift in ((0x9E3779B1, 15), (0x85EBCA77, 13)):
        hashes = hashes * np.uint32(factor)
        hashes ^= hashes >> np.uint32(shift)
    return hashes


def sketch(hashes: np.ndarray) -> np.ndarray:
    """The smallest hash under each permutation, its upper 16 bits, [P].

    Multiplying by an odd number permutes the 32-bit numbers; 16 bits of the smallest are enough to
    tell two apart, and halve the memory.
    """
    if not len(hashes):
        return np.zeros(PERMUTATIONS, np.uint16)
    smallest = np.full(PERMUTATIONS, 2**32 - 1, np.uint32)
    for start in range(0, len(hashes), CHUNK):
        part = hashes[None, start : start + CHUNK] * _MULTIPLIERS[:, None]
        smallest = np.minimum(smallest, part.min(axis=1))
    mixed = smallest * np.uint32(0x9E3779B1)  # the upper bits of a minimum are mostly zero
    return (mixed >> np.uint32(16)).astype(np.uint16)


def likeness(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Estimated likeness of sketches, row by row: [N, P], [N, P] -> [N]."""
    return (ours == theirs).mean(axis=1)


def similar(sketches: np.ndarray, threshold: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs (i, j), i < j, whose sketches agree to `threshold`, and how much: three arrays.

    Sorting by each band brings texts with an equal band together. Within such a group each is
    compared with the first and with the one before it: linear, whatever the size of the group.
    """
    bands = np.ascontiguousarray(sketches).view(np.uint64)
    found = [np.empty((0, 2), np.int64)]
    for band in bands.T:
        order = np.argsort(band, kind="stable")
        ordered = band[order]
        again = np.flatnonzero(ordered[1:] == ordered[:-1]) + 1
        starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
        first = starts[np.searchsorted(starts, again, side="right") - 1]
        for other in (first, again - 1):
            found.append(_alike(sketches, order[other], order[again], threshold))
    pairs = np.unique(np.concatenate(found), axis=0)
    alike = likeness(sketches[pairs[:, 0]], sketches[pairs[:, 1]])
    return pairs[:, 0], pairs[:, 1], alike


def _alike(
    sketches: np.ndarray, ours: np.ndarray, theirs: np.ndarray, threshold: float
) -> np.ndarray:
    """Those of the candidates that agree to `threshold`, [M, 2]; by chunks, to bound memory."""
    kept = [np.empty((0, 2), np.int64)]
    for start in range(0, len(ours), CHUNK):
        i, j = ours[start : start + CHUNK], theirs[start : start + CHUNK]
        good = likeness(sketches[i], sketches[j]) >= threshold
        kept.append(np.stack([i[good], j[good]], axis=1))
    return np.concatenate(kept)
