#!/usr/bin/env bash
# torch 2.13.0, CPU: functions that look at each number alone give other bits with other numbers of
# threads, with torch.use_deterministic_algorithms(True) as well. A tensor is cut where the threads'
# parts end; numbers at a cut that fill no vector register go through other code, which rounds
# otherwise. So equal seeds on one machine do not give equal weights for another OMP_NUM_THREADS, even
# without any sum over threads; and a number alone has not the bits that it has in a longer row.
# exp, tanh and erf did not differ.
# Seen on x86-64 with AVX-512, float32, 100,003 numbers, 1 thread against 2, 3, 5: numbers that differ
#   sigmoid [1, 2, 1], silu [1, 2, 1], gelu (tanh) [1, 6, 1], softplus [5, 9, 5], pow [15, 26, 15]
# and bfloat16: rsqrt [12, 16, 8]
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/python" -m pip install -q torch==2.13.0 numpy
cat > "$place/bits.py" <<'PY'
import sys

import torch
import torch.nn.functional as F

torch.use_deterministic_algorithms(True)
torch.manual_seed(0)
functions = {
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "gelu (tanh)": lambda x: F.gelu(x, approximate="tanh"),
    "softplus": F.softplus,
    "pow": lambda x: x.pow(1.7),
}
numbers = torch.rand(100_003) * 4 + 0.01
print("torch", torch.__version__, torch.backends.cpu.get_cpu_capability())
differing = {}
for name, function in functions.items():
    found = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        found.append(function(numbers))
    differing[name] = [int((other != found[0]).sum()) for other in found[1:]]
    print(name, differing[name])
if not all(map(sum, differing.values())):
    sys.exit("changed: a function has the same bits for any number of threads")
print("as found: their bits depend on the number of threads")
PY
"$place/venv/bin/python" "$place/bits.py"
