"""What a sweep leaves, read back."""

import json

from smoldpo.sweep import splits


def results(folder):
    return json.loads((folder / "results.json").read_text())


def timeless(folder):
    """results.json without what a clock says."""
    found = results(folder)
    for trial in found["trials"]:
        trial.pop("seconds")
    return found


def sides(folder):
    return {
        side: [
            json.loads(line) for line in splits.split_file(folder, side).read_text().splitlines()
        ]
        for side in splits.SPLITS
    }
