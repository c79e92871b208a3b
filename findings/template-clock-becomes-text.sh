#!/usr/bin/env bash
# transformers 5.23.0: a template argument that is a function reaches the chat template as text.
# Templates of Llama 3.2 and others write today's date by strftime_now. transformers 4 lets a caller
# pass one of the same name, which fixes the date. In 5.23.0 whatever is given beside the messages is
# turned into plain data first: the call ends in "'str' object is not callable".
# Seen:
#   transformers 4.57.6 Today is 09 Mar 2025
#   transformers 5.23.0 TypeError: 'str' object is not callable
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
cat > "$place/render.py" <<'PY'
import transformers
from tokenizers import Tokenizer, models

tokenizer = transformers.PreTrainedTokenizerFast(
    tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
)
tokenizer.chat_template = "Today is {{ strftime_now('%d %b %Y') }}"
try:
    found = tokenizer.apply_chat_template(
        [{"role": "user", "content": "a"}], tokenize=False, strftime_now=lambda _: "09 Mar 2025"
    )
except TypeError as error:
    found = f"TypeError: {error}"
print("transformers", transformers.__version__, found)
PY
for version in 4.57.6 5.23.0; do
  python3 -m venv "$place/$version"
  "$place/$version/bin/python" -m pip install -q "transformers==$version" jinja2
  "$place/$version/bin/python" "$place/render.py" 2>/dev/null | tee "$place/said-$version"
done
if grep -q "Today is 09 Mar 2025" "$place/said-4.57.6" && grep -q TypeError "$place/said-5.23.0"; then
  echo "as found: a function is text to the template, and was none in version 4"
else
  echo "changed"
  exit 1
fi
