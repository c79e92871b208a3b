#!/usr/bin/env bash
# transformers 5.23.0 reads a llama GGUF file without its rotary scaling, and says nothing:
# neither that of Llama 3 (the tensor rope_freqs.weight), nor linear or YaRN scaling (the keys
# llama.rope.scaling.*). llama.cpp applies each. Expected: rope_parameters with the scaling, or an
# error. Seen: rope_type default for all three.
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
from gguf import GGUFWriter, RopeScalingType
from transformers import AutoModelForCausalLM

folder, width, head = sys.argv[1], 64, 32
square = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


def read(name, scaling=None, frequencies=None):
    writer = GGUFWriter(f"{folder}/{name}.gguf", "llama")
    writer.add_block_count(1)
    writer.add_context_length(1024)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(width)
    writer.add_head_count(width // head)
    writer.add_head_count_kv(width // head)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(8)
    writer.add_rope_freq_base(500000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(list("abcdefgh"))
    if scaling is not None:
        writer.add_rope_scaling_type(scaling)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(256)
    tensors = {"token_embd.weight": (8, width), "output_norm.weight": (width,)}
    tensors |= {f"blk.0.{norm}.weight": (width,) for norm in ("attn_norm", "ffn_norm")}
    tensors |= {f"blk.0.{name}.weight": (width, width) for name in square}
    for tensor, shape in tensors.items():
        writer.add_tensor(tensor, np.ones(shape, np.float32))
    if frequencies is not None:
        writer.add_tensor("rope_freqs.weight", frequencies)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    model = AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=f"{name}.gguf", dtype=torch.float32
    )
    print(f"{name}: {model.config.rope_parameters}")
    return model.config.rope_parameters["rope_type"]


print("transformers", transformers.__version__)
found = [
    read("llama3", frequencies=np.full(head // 2, 8.0, np.float32)),
    read("linear", scaling=RopeScalingType.LINEAR),
    read("yarn", scaling=RopeScalingType.YARN),
]
sys.exit(0 if found == ["default"] * 3 else 1)
PY
mkdir "$place/files"
"$place/venv/bin/python" "$place/read.py" "$place/files" 2> /dev/null ||
  { echo "changed: scaling is read, or refused"; exit 1; }
echo "as found: the scaling is dropped"
