"""Ranks, and the student's state over them: sharded by DeepSpeed, followed by the EMA teacher, agreed on, saved.

`core` is what a step uses; `layouts` and `zero3` are the ZeRO stages below it. Nothing here knows data or a run.
Importing the package imports no torch, for `sizes`.
"""
