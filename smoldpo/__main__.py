"""python -m smoldpo"""

from __future__ import annotations

from smoldpo.cli.main import main

main()
