"""Triton kernels, imported as `albert_fast.kernels`: one operation a file, its kernels and the functions that launch
them.

`launch` starts every kernel and chooses its tiles, `dropout` has the masks, `aot` compiles everything without a GPU.
Whether the kernels run on a GPU or in Triton's interpreter is decided when they are imported: by TRITON_INTERPRET=1.
"""
