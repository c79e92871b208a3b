"""`smoldpo plan`: what a run will take, from a few real steps of it.

counting.py  -> how much work each part of the run is
measuring.py -> a few real steps at a few freeze depths -> rates.py: seconds a unit of work
forecast.py, memory.py, disk.py -> time, memory and disk at every depth -> planner.py, pick.py, table.py
"""
