"""Fused kernels of the training step, each next to its eager reference.

Every operation takes `impl="eager" | "triton"`; nothing here knows about `pipeline`.
`bench` holds the tools; no kernel imports it.
"""
