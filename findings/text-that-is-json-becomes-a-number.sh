#!/usr/bin/env bash
# datasets 5.2.0: a column in which some cells are text and some are not (prompts that are text in one
# row and messages in the next) gets the type Json. A text of such a column that happens to be JSON
# comes back as what the JSON says: another kind of value, or another text. In a column of texts alone
# it stays. The values are so in the Arrow table and in what to_parquet writes, where a text and a
# number are one thing; so a preference set of short answers loses some of them without a word.
# Seen:
#   texts alone          ['42', '007', 'true', 'null', '"quoted"', 'hello']
#   beside one list      [42, 7, True, None, 'quoted', 'hello']
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/python" -m pip install -q datasets==5.2.0
cat > "$place/texts.py" <<'PY'
import json
import pathlib
import sys

import datasets

datasets.disable_progress_bars()
place = pathlib.Path(sys.argv[1])
texts = ["42", "007", "true", "null", '"quoted"', "hello"]


def read(name, cells):
    file = place / f"{name}.jsonl"
    file.write_text("".join(json.dumps({"prompt": cell}) + "\n" for cell in cells))
    cache = str(place / f"{name}-cache")
    return datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=cache)


alone = read("alone", texts)["prompt"][:]
beside = read("beside", [*texts, [{"role": "user", "content": "hi"}]])
beside.to_parquet(str(place / "beside.parquet"))
again = datasets.Dataset.from_parquet(str(place / "beside.parquet"), cache_dir=str(place / "c"))
print("datasets", datasets.__version__)
print("texts alone:", alone)
print("beside a list of messages:", beside["prompt"][:-1])
found = [42, 7, True, None, "quoted", "hello"]
if alone != texts or beside["prompt"][:-1] != found or again["prompt"][:-1] != found:
    sys.exit("changed")
print("as found: texts became numbers, true, nothing, and lost their quotes")
PY
"$place/venv/bin/python" "$place/texts.py" "$place"
