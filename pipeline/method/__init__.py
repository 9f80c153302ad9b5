"""One step of the method (arXiv 2408.01031): three branches, their losses and gradients, and the schedules.

Pure of everything around it: no rank but for the random draws, no engine, no instrument. The networks, the backward
function and whoever wants to look (`tri_branch.Observer`, `lap`) are handed in.
"""
