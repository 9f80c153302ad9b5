"""Everything that a GPU has to show, in a quarter of an hour: `python -m pipeline.bench gpu`.

`battery` starts every part as a process with its own time limit, so that one that crashes or hangs ends alone; a part
is a module here with a function `run(stage)`. It wants a checkout and the libraries of training; DALI it does without.
"""

STAGES = {
    "a": "the machine: versions, copy and matrix ceilings",
    "b": "correctness: the tests marked gpu, kernels at the presets' shapes against fp64",
    "c": "kernels against their rivals",
    "d": "the ViT-L step: several sub-networks, GPU-busy share, against the plain step; both engines",
    "e": "a short run on JPEG shards, then its first steps by eager code",
}
"""The stages in their order."""
