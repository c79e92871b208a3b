#!/usr/bin/env bash
# peft 0.21.2: saving the same adapter in two processes gives two different adapter_config.json.
# target_modules is a list of seven names in the LoraConfig; peft holds a set, and writes its order,
# which follows Python's hash of strings. Whoever compares or hashes adapter folders sees a change.
# Seen (PYTHONHASHSEED=1, then 2):
#   ['q_proj', 'o_proj', 'up_proj', 'down_proj', 'k_proj', 'gate_proj', 'v_proj']
#   ['k_proj', 'o_proj', 'up_proj', 'q_proj', 'v_proj', 'down_proj', 'gate_proj']
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/python" -m pip install -q peft==0.21.2 transformers==5.23.0 torch==2.13.0
cat > "$place/save.py" <<'PY'
import json, pathlib, sys

import peft
from transformers import LlamaConfig, LlamaForCausalLM

names = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
shape = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1)
model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=1, num_key_value_heads=1))
config = peft.LoraConfig(target_modules=names, task_type="CAUSAL_LM")
peft.get_peft_model(model, config).save_pretrained(sys.argv[1])
saved = json.loads(pathlib.Path(sys.argv[1], "adapter_config.json").read_text())
print("peft", peft.__version__, saved["target_modules"])
PY
for seed in 1 2; do
  PYTHONHASHSEED=$seed "$place/venv/bin/python" "$place/save.py" "$place/adapter-$seed" 2>/dev/null
done
if cmp -s "$place/adapter-1/adapter_config.json" "$place/adapter-2/adapter_config.json"; then
  echo "changed: both files are equal"
  exit 1
fi
echo "as found: the files differ"
