"""Calls csrc/cpu's attention through ctypes, every tensor in guarded memory (gemm_library)."""

from __future__ import annotations

import ctypes
from ctypes import c_double, c_float, c_int, c_int64, c_size_t, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import Any, NamedTuple

import gemm_library as g
import torch
from torch import Tensor


class Args(ctypes.Structure):
    """albert_attention_args."""

    _fields_ = (
        ("dtype", c_int),
        ("batch", c_int64),
        ("heads", c_int64),
        ("head_dim", c_int64),
        ("tokens_q", c_int64),
        ("tokens_k", c_int64),
        ("query", c_void_p),
        ("query_token_stride", c_int64),
        ("query_head_stride", c_int64),
        ("key", c_void_p),
        ("key_token_stride", c_int64),
        ("key_head_stride", c_int64),
        ("value", c_void_p),
        ("value_token_stride", c_int64),
        ("value_head_stride", c_int64),
        ("cu_seqlens_q", c_void_p),
        ("cu_seqlens_k", c_void_p),
        ("causal", c_int),
        ("scale", c_float),
        ("bias", c_void_p),
        ("bias_dtype", c_int),
        ("bias_batch_stride", c_int64),
        ("bias_head_stride", c_int64),
        ("bias_query_stride", c_int64),
        ("dropout_p", c_double),
        ("seed", c_uint64),
        ("site", c_uint32),
        ("output", c_void_p),
        ("output_stride", c_int64),
        ("logsumexp", c_void_p),
        ("quantized", c_int),
    )


class Gradients(ctypes.Structure):
    """albert_attention_gradients."""

    _fields_ = (
        ("grad_output", c_void_p),
        ("grad_output_stride", c_int64),
        ("grad_query", c_void_p),
        ("grad_query_token_stride", c_int64),
        ("grad_query_head_stride", c_int64),
        ("grad_key", c_void_p),
        ("grad_key_token_stride", c_int64),
        ("grad_key_head_stride", c_int64),
        ("grad_value", c_void_p),
        ("grad_value_token_stride", c_int64),
        ("grad_value_head_stride", c_int64),
    )


def load(path: Path) -> ctypes.CDLL:
    library = g.load(path)
    args, gradients, parallel = ctypes.POINTER(Args), ctypes.POINTER(Gradients), ctypes.POINTER(g.Parallel)
    for name in ("albert_attention", "albert_attention_backward"):
        size = getattr(library, name + "_workspace_bytes")
        size.restype, size.argtypes = c_size_t, [args, c_int]
    library.albert_attention.argtypes = [args, c_void_p, c_size_t, parallel]
    library.albert_attention_backward.argtypes = [args, gradients, c_void_p, c_size_t, parallel]
    return library


class Place(NamedTuple):
    """Where a [tokens, heads, head_dim] lies."""

    buffer: g.Guarded
    view: Tensor
    address: int
    token_stride: int
    head_stride: int

    def put(self, args: ctypes.Structure, name: str) -> None:
        setattr(args, name, self.address)
        setattr(args, name + "_token_stride", self.token_stride)
        setattr(args, name + "_head_stride", self.head_stride)


def place(tokens: int, heads: int, head_dim: int, dtype: torch.dtype, heads_first: bool, gap: int) -> Place:
    if heads_first:
        buffer = g.Guarded(heads * tokens, head_dim, dtype, head_dim + gap)
        view = buffer.tensor.unflatten(0, (heads, tokens)).transpose(0, 1)
        return Place(buffer, view, buffer.address, head_dim + gap, tokens * (head_dim + gap))
    buffer = g.Guarded(tokens, heads * head_dim, dtype, heads * head_dim + gap)
    return Place(buffer, buffer.tensor.unflatten(1, (heads, head_dim)), buffer.address, buffer.stride, head_dim)


def place_fused(tokens: int, heads: int, head_dim: int, dtype: torch.dtype) -> list[Place]:
    """query, key and value of one [tokens, 3, heads, head_dim]."""
    width = heads * head_dim
    buffer = g.Guarded(tokens, 3 * width, dtype)
    views = buffer.tensor.unflatten(1, (3, heads, head_dim)).unbind(1)
    addresses = [buffer.address + i * width * dtype.itemsize for i in range(3)]
    return [Place(buffer, v, at, 3 * width, head_dim) for v, at in zip(views, addresses, strict=True)]


class Call:
    """One problem: its inputs in guarded memory. cu_q and cu_k are lists; options as albert_attention_args has them."""

    def __init__(
        self,
        library: ctypes.CDLL,
        tensors: tuple[Tensor, Tensor, Tensor],
        cu_q: list[int],
        cu_k: list[int],
        *,
        layout: str = "tokens",
        bias: Tensor | None = None,
        **options: Any,
    ):
        query, key, _ = tensors
        self.library, self.dtype, self.layout = library, query.dtype, layout
        (self.tokens_q, self.heads, self.head_dim), self.tokens_k = query.shape, key.shape[0]
        self.args = Args(dtype=g.CODES[self.dtype], batch=len(cu_q) - 1, heads=self.heads, head_dim=self.head_dim)
        self.args.tokens_q, self.args.tokens_k = self.tokens_q, self.tokens_k
        for name, option in options.items():
            setattr(self.args, name, option)
        self.kept = []
        for name, tensor, spot in zip(("query", "key", "value"), tensors, self.places(), strict=True):
            spot.view.copy_(tensor)
            spot.put(self.args, name)
            self.kept.append(spot.buffer)
        for name, offsets in (("cu_seqlens_q", cu_q), ("cu_seqlens_k", cu_k)):
            buffer = g.guarded(torch.tensor([offsets], dtype=torch.int32))
            setattr(self.args, name, buffer.address)
            self.kept.append(buffer)
        if bias is not None:
            batch, heads, queries, keys = bias.shape
            buffer = g.guarded(bias.reshape(-1, keys), keys + 3)
            self.args.bias, self.args.bias_dtype = buffer.address, g.CODES[bias.dtype]
            self.args.bias_query_stride = buffer.stride
            self.args.bias_head_stride = queries * buffer.stride if heads > 1 else 0
            self.args.bias_batch_stride = heads * queries * buffer.stride if batch > 1 else 0
            self.kept.append(buffer)

    def places(self) -> list[Place]:
        if self.layout == "fused":
            return place_fused(self.tokens_q, self.heads, self.head_dim, self.dtype)
        sizes = (self.tokens_q, self.tokens_k, self.tokens_k)
        shape = (self.heads, self.head_dim, self.dtype, self.layout == "heads", 5)
        return [place(tokens, *shape) for tokens in sizes]

    def _run(self, function: str, threads: int, *arguments: Any) -> None:
        size = getattr(self.library, function + "_workspace_bytes")(self.args, threads)
        workspace = g.aligned(max(size, 1)).fill(0xFF)  # NaN whatever it is read as
        code = getattr(self.library, function)(self.args, *arguments, workspace.address, size, g.parallel(threads))
        assert code == 0
        for buffer in (*self.kept, workspace):
            buffer.check()

    def forward(self, threads: int = 1, logsumexp: bool = True) -> tuple[Tensor, Tensor]:
        output = g.Guarded(self.tokens_q, self.heads * self.head_dim, self.dtype, self.heads * self.head_dim + 7)
        parts = 2 if self.args.bias else 1
        lse = g.Guarded(parts * self.heads, self.tokens_q, torch.float32)
        for buffer in (output, lse):
            buffer.fill(float("nan"))
        self.args.output, self.args.output_stride = output.address, output.stride
        self.args.logsumexp = lse.address if logsumexp else None
        self._run("albert_attention", threads)
        output.check()
        lse.check()
        return output.tensor.clone(), lse.tensor.unflatten(0, (parts, self.heads)).squeeze(0).clone()

    def backward(self, grad_output: Tensor, output: Tensor, logsumexp: Tensor, threads: int = 1) -> list[Tensor]:
        width = self.heads * self.head_dim
        buffers = [g.guarded(grad_output, width + 3), g.guarded(output, width + 1)]
        buffers.append(g.guarded(logsumexp.flatten(0, -2)))
        gradients = Gradients(grad_output=buffers[0].address, grad_output_stride=buffers[0].stride)
        self.args.output, self.args.output_stride = buffers[1].address, buffers[1].stride
        self.args.logsumexp = buffers[2].address
        spots = self.places()
        for name, spot in zip(("grad_query", "grad_key", "grad_value"), spots, strict=True):
            spot.buffer.fill(float("nan"))
            spot.put(gradients, name)
        self._run("albert_attention_backward", threads, gradients)
        for buffer in (*buffers, *(spot.buffer for spot in spots)):
            buffer.check()
        return [spot.view.clone() for spot in spots]
