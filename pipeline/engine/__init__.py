"""Ranks, and the student's state over them: sharded by DeepSpeed or FSDP2, followed by the teacher, agreed on, saved.

`core` is what a step uses; `layouts` is what it asks of an engine, `zero`, `zero3` and `fully_shard` are those. Nothing
here knows data or a run.
Importing the package imports no torch, for `sizes`.
"""
