"""The Triton kernels behind `impl="triton"`, as PyTorch custom operators.

Importing a module of this package fixes whether its kernels are compiled or interpreted (TRITON_INTERPRET=1).
"""
