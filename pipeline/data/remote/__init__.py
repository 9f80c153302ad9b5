"""Objects in a store: addresses, ranges that come whole or not at all, catalogs, single images.

Nothing here decides what is trained on. What a store answers today may make a run wait or stop; only bytes may reject a
sample.
"""
