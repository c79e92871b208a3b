"""python -m smoldpo"""

from smoldpo.cli import main

main()
