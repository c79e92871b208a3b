#!/usr/bin/env bash
# transformers 5.23.0: from_pretrained(output_loading_info=True) names weights that are missing, left
# over or of another shape. Of three kinds it says nothing, and nothing is logged:
#   two names of one weight        norm.weight beside model.norm.weight: one of them is dropped
#   a sign other than the dot      model_lm_head.weight is taken for lm_head.weight
#   a weight in int8 or float8     without a quantization_config: cast, as if it needed no scale
# Expected: an entry in unexpected_keys, mismatched_keys or error_msgs.
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/python" -m pip install -q transformers==5.23.0 torch==2.13.0 safetensors==0.8.0
cat > "$place/load.py" <<'PY'
import sys

import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

folder = sys.argv[1]
config = LlamaConfig(
    vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
    num_attention_heads=1, num_key_value_heads=1,
)
LlamaForCausalLM(config).save_pretrained(folder)
whole = load_file(f"{folder}/model.safetensors")
up = "model.layers.0.mlp.up_proj.weight"
print("transformers", transformers.__version__)
silent = 0
for kind, weights in {
    "two names": whole | {"norm.weight": whole["model.norm.weight"] + 1},
    "another sign": {n.replace("lm_head", "model_lm_head"): w for n, w in whole.items()},
    "int8": whole | {up: whole[up].to(torch.int8)},
    "float8": whole | {up: whole[up].to(torch.float8_e4m3fn)},
}.items():
    save_file(weights, f"{folder}/model.safetensors", {"format": "pt"})
    _, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    said = {key: value for key, value in info.items() if value}
    print(f"{kind}: loading info {said or 'says nothing'}")
    silent += not said
sys.exit(0 if silent == 4 else 1)
PY
"$place/venv/bin/python" "$place/load.py" "$place/model" 2> /dev/null ||
  { echo "changed: the loading info says something"; exit 1; }
echo "as found: it says nothing"
