"""Images from WebDataset shards to augmented crops, and from folders to shards; import the submodule you need.

The sample at a position, its crops and its masks are pure functions of (seed, position); the whole state is one
integer. Nothing here knows a network.
"""
