"""Tools around the kernels, none of which training imports: times against rivals, and compilation for absent GPUs.

`python -m kernels.bench` times every kernel beside its rivals (`timing`, `rivals`, `clock`); `python -m
kernels.bench.aot` compiles them for architectures that need not be there and tells registers, memory and spills.
"""
