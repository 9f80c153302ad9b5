"""The networks of a run as plain models: opened, cut out, proven, described; and the weights that a run begins with.

Whatever leaves this room is a timm module, a directory that timm loads without this project, or a bundle for other runs
to begin from. Nothing here trains, and nothing here evaluates.
"""
