"""One step of the method (arXiv 2408.01031): three branches, their losses and gradients, and the schedules.

Nothing here knows an engine, an instrument or a rank (but as a key of random draws). The networks, the backward
function and whoever wants to look (`tri_branch.Observer`, `lap`) are handed in.
"""
