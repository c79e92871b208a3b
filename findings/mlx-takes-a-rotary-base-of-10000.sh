#!/usr/bin/env bash
# mlx-lm 0.32.2: a Llama folder whose config.json transformers 5 wrote (a version that mlx-lm itself
# requires) is computed with a rotary base of 10,000. transformers 5 writes the base into
# rope_parameters; mlx-lm looks for rope_theta at the top, and has a default where it finds none.
# SmolLM2's base is 100,000, Llama 3's 500,000: the model loads, and answers as another model would.
# Seen: written 500000.0, computed with 10000
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/python" -m pip install -q 'mlx[cpu]==0.32.4' mlx-lm==0.32.2 transformers==5.23.0
cat > "$place/load.py" <<'PY'
import pathlib, sys

import mlx.core as mx
import mlx_lm
from mlx.utils import tree_flatten
from mlx_lm.models.llama import Model, ModelArgs
from mlx_lm.utils import load_model
from transformers import LlamaConfig

folder = pathlib.Path(sys.argv[1])
shape = dict(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1)
rope = {"rope_type": "default", "rope_theta": 500000.0}
config = LlamaConfig(
    **shape, num_attention_heads=1, num_key_value_heads=1, rope_parameters=rope,
    tie_word_embeddings=True,
)
config.save_pretrained(folder)
weights = dict(tree_flatten(Model(ModelArgs.from_dict(config.to_dict())).parameters()))
mx.save_safetensors(str(folder / "model.safetensors"), weights)
model, _ = load_model(folder)
base = model.layers[0].self_attn.rope.base
print("mlx-lm", mlx_lm.__version__, "written", rope["rope_theta"], "computed with", base)
sys.exit(base != 10000)
PY
if ! "$place/venv/bin/python" "$place/load.py" "$place/model"; then
  echo "changed: another base"
  exit 1
fi
echo "as found: the base is lost"
