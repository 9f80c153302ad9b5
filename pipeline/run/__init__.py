"""The life of a run: the loop, the step over all ranks, the run directory, the Slurm job around it, the watchdog.

`loop` reads from top to bottom; what comes before the first step is in `start`, what follows from a step is decided in
`policy` and said in `console`. Nothing here knows the method's formulas or how weights are sharded, and nothing below
knows that there is a run.
"""
