"""How good frozen features are: accuracy of k-NN and linear probes, for runs, timm directories and while training.

Models come from `pipeline.models`, images from `pipeline.data`; nothing here changes a weight of what it looks at.
"""
