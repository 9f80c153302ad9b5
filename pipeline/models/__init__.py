"""The networks of a run as plain models: opened, cut out, proven, described.

Whatever leaves this room is a timm module or a directory that timm loads without this project. Nothing here trains, and
nothing here evaluates.
"""
