"""The parts of compare_builds.py, which is the command."""
