#!/usr/bin/env bash
# transformers 5.23.0 reads the tokenizer of a GGUF file whose tokenizer.ggml.pre is llama-bpe (Llama
# 3) or tekken (Mistral), and says nothing of it that words which are tokens are whole there, whatever
# merges make of them: llama.cpp sets ignore_merges for these names, and tokenizer.json of Llama 3 has
# "ignore_merges": true. Expected: the word "abc", a token, is one token. Seen: it is put together by
# merges, and is in pieces.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/python" -m pip install -q \
  transformers==5.23.0 tokenizers==0.23.3 torch==2.13.0 gguf==0.19.0 accelerate==1.15.0
cat > "$place/read.py" <<'PY'
import sys

import transformers
from gguf import GGUFWriter
from transformers import AutoTokenizer

folder = sys.argv[1]


def read(name):
    writer = GGUFWriter(f"{folder}/{name}.gguf", "llama")
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(8)
    writer.add_feed_forward_length(8)
    writer.add_head_count(1)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(6)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    writer.add_token_list(["a", "b", "c", "ab", "abc", "</s>"])
    writer.add_token_types([1, 1, 1, 1, 1, 3])
    writer.add_token_merges(["a b"])
    writer.add_eos_token_id(5)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=f"{name}.gguf")
    found = tokenizer.tokenize("abc")
    print(f"{name}: {found}")
    return found


print("transformers", transformers.__version__)
found = [read("llama-bpe"), read("tekken")]
sys.exit(0 if found == [["ab", "c"]] * 2 else 1)
PY
mkdir "$place/files"
"$place/venv/bin/python" "$place/read.py" "$place/files" 2> /dev/null ||
  { echo "changed: words that are tokens are whole"; exit 1; }
echo "as found: words that are tokens are read in pieces"
