"""The parts of bench_dpo.py, which is the command."""
