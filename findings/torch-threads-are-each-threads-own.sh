#!/usr/bin/env bash
# torch 2.13.0, CPU: torch.set_num_threads holds for the thread that calls it and for those that begin
# later, not for the process. Threads that run keep their number, the main thread too. A thread takes
# the last number that anybody set at its first operation, even where it set another one itself. So a
# library that sets one thread in a worker thread slows the workers that the host starts later, and
# nothing shows it in the main thread.
# Seen:
#   main set 4; a thread set 1: main 4, a thread that ran before 4, a new thread 1
#   main set 4, and did nothing yet; a thread set 1: main 1
set -euo pipefail
place=$(mktemp -d)
trap 'rm -rf "$place"' EXIT
python3 -m venv "$place/venv"
"$place/venv/bin/python" -m pip install -q torch==2.13.0 numpy
cat > "$place/threads.py" <<'PY'
import sys
import threading

import torch


def in_a_thread(work):
    found = []
    thread = threading.Thread(target=lambda: found.append(work()))
    thread.start()
    thread.join()
    return found[0]


torch.set_num_threads(4)
if sys.argv[1] == "used":
    torch.ones(8).sum()
    torch.get_num_threads()
    ready, go, of_old = threading.Event(), threading.Event(), []

    def old():
        torch.get_num_threads()
        ready.set()
        go.wait()
        of_old.append(torch.get_num_threads())

    thread = threading.Thread(target=old)
    thread.start()
    ready.wait()
    in_a_thread(lambda: torch.set_num_threads(1))
    go.set()
    thread.join()
    found = torch.get_num_threads(), of_old[0], in_a_thread(torch.get_num_threads)
    print("torch", torch.__version__, "main, a running thread, a new thread:", found)
    sys.exit(found != (4, 4, 1))
in_a_thread(lambda: torch.set_num_threads(1))
found = torch.get_num_threads()
print("torch", torch.__version__, "main, which set 4 and had done nothing:", found)
sys.exit(found != 1)
PY
for main in used unused; do
  "$place/venv/bin/python" "$place/threads.py" "$main" || { echo "changed"; exit 1; }
done
echo "as found: each thread has a number of its own"
