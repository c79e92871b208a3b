#!/usr/bin/env bash
# transformers 5.23.0: disable_progress_bar() does not reach the bar over a GGUF file's tensors.
# Files of an architecture that the newer reader does not handle (llama among them) go through
# the older one, whose bar is tqdm's own: neither transformers' verbosity nor its switch for bars counts.
# Seen on standard error, with both set:
#   Converting and de-quantizing GGUF tensors...: 100%|...| 11/11
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/python" -m pip install -q \
  transformers==5.23.0 torch==2.13.0 gguf==0.19.0 accelerate==1.15.0
cat > "$place/read.py" <<'PY'
import sys

import numpy as np
import torch
import transformers
from gguf import GGUFWriter
from transformers import AutoModelForCausalLM

folder, width = sys.argv[1], 16
writer = GGUFWriter(f"{folder}/tiny.gguf", "llama")
writer.add_block_count(1)
writer.add_context_length(32)
writer.add_embedding_length(width)
writer.add_feed_forward_length(width)
writer.add_head_count(2)
writer.add_head_count_kv(2)
writer.add_layer_norm_rms_eps(1e-5)
writer.add_vocab_size(8)
writer.add_tokenizer_model("gpt2")
writer.add_token_list(list("abcdefgh"))
square = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
shapes = {"token_embd": (8, width), "output_norm": (width,)}
shapes |= {f"blk.0.{name}": (width,) for name in ("attn_norm", "ffn_norm")}
shapes |= {f"blk.0.{name}": (width, width) for name in square}
for name, shape in shapes.items():
    writer.add_tensor(f"{name}.weight", np.ones(shape, np.float32))
writer.write_header_to_file()
writer.write_kv_data_to_file()
writer.write_tensors_to_file()
writer.close()
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
AutoModelForCausalLM.from_pretrained(folder, gguf_file="tiny.gguf", dtype=torch.float32)
print("transformers", transformers.__version__)
PY
"$place/venv/bin/python" "$place/read.py" "$place" 2> "$place/said"
tr '\r' '\n' < "$place/said" | grep "de-quantizing GGUF" | tail -n 1 ||
  { echo "changed: no bar"; exit 1; }
echo "as found: the bar is drawn"
