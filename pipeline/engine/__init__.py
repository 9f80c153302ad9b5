"""DeepSpeed around the student, and the EMA teacher that follows its fp32 master weights.

`core` is what the trainer uses; `layouts` and `zero3` are the ZeRO stages below it. Importing the package imports no
torch, for `sizes`.
"""
