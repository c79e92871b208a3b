"""Clean pairs written by a grammar, to plant faults in. No two are alike; none has a fault."""

from __future__ import annotations

import random
from typing import Any

THINGS = [
    "kettle", "lantern", "bicycle", "orchard", "violin", "compass", "teapot", "ladder", "garden",
    "engine", "blanket", "harbour", "pencil", "window", "basket", "mirror", "carpet", "rocket",
    "saddle", "anchor", "candle", "hammer", "button", "bottle",
]  # fmt: skip
PLACES = [
    "kitchen", "meadow", "workshop", "station", "attic", "library", "market", "valley", "castle",
    "office", "barn", "cellar",
]  # fmt: skip
VERBS = [
    "clean", "repair", "paint", "store", "move", "describe", "choose", "replace", "protect",
    "measure", "arrange", "sharpen",
]  # fmt: skip
REASONS = (
    "the damp air spoils it quickly",
    "guests arrive on Saturday",
    "my neighbour borrowed the tools",
    "winter begins early in our region",
    "the previous owner never did",
    "our children play nearby",
    "it once belonged to a sailor",
    "nobody wrote the steps down",
)
ADVICE = (
    "Begin with a dry cloth and work slowly from the top.",
    "Ask a friend to hold the other end while you tighten it.",
    "Read the label first, since some materials react badly.",
    "Leave everything to rest overnight before you touch it again.",
    "Keep the small parts in a cup so that none of them gets lost.",
    "Choose a bright day, because daylight shows every mark.",
    "A thin layer of wax keeps the surface safe for years.",
    "Write down each step, and you will be faster next time.",
    "Warm water works better here than any strong cleaner.",
    "Test your plan on a hidden corner before you commit.",
)


def clean_row(number: int) -> dict[str, Any]:
    """A pair without a fault; different numbers, different texts."""
    rng = random.Random(number)
    thing, place, verb = rng.choice(THINGS), rng.choice(PLACES), rng.choice(VERBS)
    extra = " and ".join(rng.sample(THINGS, 3))
    question = (
        f"How should I {verb} a {thing} in the {place}, given that {rng.choice(REASONS)}? "
        f"I also have {extra} at hand, and {rng.choice(REASONS)}. Someone said: "
        f"{rng.choice(ADVICE)} Then I would {rng.choice(VERBS)} my {rng.choice(THINGS)}; "
        f"that took {number + 2} hours."
    )
    chosen = " ".join(
        f"{line} The {rng.choice(THINGS)} near the {rng.choice(PLACES)} can wait."
        for line in rng.sample(ADVICE, 3)
    )
    rejected = " ".join(
        f"{line} Some people {rng.choice(VERBS)} a {rng.choice(THINGS)} instead."
        for line in rng.sample(ADVICE, 2)
    )
    return {
        "prompt": [{"role": "user", "content": question}],
        "chosen": f"{chosen} That covers case number {number}.",
        "rejected": f"{rejected} I said that about {number} before.",
    }
