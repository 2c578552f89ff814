"""Triton kernels, imported as `albert_fast.kernels`. They come with the `triton` backend; there are none yet."""
