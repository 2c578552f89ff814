"""csrc/cpu's whole model through ctypes, all operands in guarded memory: bit for bit its parts, one after the other."""

from __future__ import annotations

import ctypes
import math
import random
import sys
from ctypes import c_int, c_size_t, c_void_p
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
import gemm_library as g
from test_encoder import Args as EncoderArgs
from test_encoder import Call as EncoderCall
from test_encoder import Case, lib, library  # noqa: F401
from token_library import EmbedArgs, Embedding, fill, needs_compiler

pytestmark = needs_compiler
DTYPES = [torch.float32, torch.bfloat16]
BAD_ARGUMENT, BAD_WEIGHT, SMALL_WORKSPACE, UNALIGNED = 1, 2, 3, 5


class Args(ctypes.Structure):
    """albert_model_args."""

    _fields_ = (
        ("embed", EmbedArgs),
        ("embedded", c_void_p),
        ("projection", c_void_p),
        ("projection_bias", c_void_p),
        ("encoder", EncoderArgs),
        ("pooler", c_void_p),
        ("pooler_bias", c_void_p),
        ("pooled", c_void_p),
    )


class Call(EncoderCall):
    """The encoder's call, and what comes before and after it."""

    def __init__(self, native: ctypes.CDLL, case: Case, size: int, pooler: bool, embedded: bool) -> None:
        super().__init__(native, case, training=False)
        tokens, hidden = case.x.shape
        dtype, code = case.x.dtype, g.CODES[case.x.dtype]
        batch = len(case.lengths)
        native.albert_embed_layer_norm.argtypes = [ctypes.POINTER(EmbedArgs), ctypes.POINTER(g.Parallel)]
        native.albert_gemm.argtypes[0] = ctypes.POINTER(g.Args)
        native.albert_model_workspace_bytes.restype = c_size_t
        native.albert_model_workspace_bytes.argtypes = [ctypes.POINTER(Args), c_int]
        native.albert_model.argtypes = [ctypes.POINTER(Args), c_void_p, c_size_t, ctypes.POINTER(g.Parallel)]
        self.size, self.embed = size, EmbedArgs(tokens=tokens, size=size, dtype=code, eps=1e-5)
        if not embedded:
            for name, rows in (("word", 40), ("position", 99), ("token_type", 2)):
                table = self.keep(g.guarded(torch.randn(rows, size).to(dtype)))
                ids = self.keep(g.guarded(torch.randint(rows, (1, tokens))))
                entry = Embedding(ids=ids.address, id_bytes=8, table=table.address, rows=rows, stride=size)
                setattr(self.embed, name, entry)
            vectors = {name: self.keep(g.guarded(torch.randn(1, size))) for name in ("weight", "bias")}
            fill(self.embed, vectors)
        self.embedded = self.keep(g.guarded(torch.randn(tokens, size).to(dtype)))
        self.projection = self.packed(code, torch.randn(hidden, size).to(dtype))
        self.pooler = self.packed(code, torch.randn(hidden, hidden).to(dtype) / hidden**0.5)
        self.projection_bias, self.pooler_bias = (self.keep(g.guarded(torch.randn(1, hidden))) for _ in range(2))
        self.pooled = self.poisoned(batch, hidden, dtype)
        self.model = Args(
            embed=self.embed,
            embedded=self.embedded.address if embedded else None,
            projection=self.projection,
            projection_bias=self.projection_bias.address,
            encoder=self.args,
            pooler=self.pooler if pooler else None,
            pooler_bias=self.pooler_bias.address if pooler else None,
            pooled=self.pooled.address if pooler else None,
        )
        self.encoder_args = self.args

    def at_once(self, threads: int) -> tuple[Tensor, Tensor]:
        self.args = self.model
        try:
            assert self.run("albert_model", threads) == 0
        finally:
            self.args = self.encoder_args
        return self.output.tensor.clone(), self.pooled.tensor.clone()

    def product(self, x: g.Guarded, weight: int, bias: g.Guarded, y: g.Guarded, activation: int = 0) -> None:
        code = g.CODES[self.case.x.dtype]
        rows, columns = x.tensor.shape
        args = g.Args(m=rows, x=x.address, x_stride=columns, x_dtype=code, y_dtype=code, weight=weight)
        args.y, args.y_stride, args.bias, args.activation = y.address, y.tensor.shape[1], bias.address, activation
        size = self.lib.albert_gemm_workspace_bytes(args, 1)
        assert self.lib.albert_gemm(args, g.aligned(size).address, size, None) == 0

    def in_parts(self) -> tuple[Tensor, Tensor]:
        case, x = self.case, self.embedded
        if self.model.embedded is None:
            x = self.poisoned(case.x.shape[0], self.size, case.x.dtype)
            fill(self.embed, {"y": x})
            assert self.lib.albert_embed_layer_norm(self.embed, None) == 0
        projected = self.poisoned(*case.x.shape, case.x.dtype)
        self.product(x, self.projection, self.projection_bias, projected)
        self.args.input = projected.address
        output = self.forward()
        starts = case.cu_seqlens.tolist()
        first = torch.zeros(len(case.lengths), case.x.shape[1], dtype=case.x.dtype)
        for row, (begin, end) in enumerate(pairwise(starts)):
            if end > begin:
                first[row] = output[begin]
        pooled = self.poisoned(*first.shape, first.dtype)
        self.product(g.guarded(first), self.pooler, self.pooler_bias, pooled, activation=4)
        return output, pooled.tensor


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("embedded", [False, True])
def test_its_parts(lib, dtype, embedded):  # noqa: F811
    for lengths in ([1], [16], [5, 0, 33], [40, 3, 25, 1], [0]):
        heads = random.choice([1, 2, 3])
        case = Case(lengths, heads * random.choice([5, 16, 32]), random.choice([17, 96]), heads, num_groups=2)
        case.cast(dtype)
        call = Call(lib, case, random.choice([7, 16, 64]), pooler=True, embedded=embedded)
        expected = call.in_parts()
        for threads in (1, 2, 3):
            call.output.fill(math.nan)
            call.pooled.fill(math.nan)
            for ours, theirs in zip(call.at_once(threads), expected, strict=True):
                assert torch.equal(ours, theirs.view_as(ours)), (lengths, threads)


def test_without_a_pooler(library):  # noqa: F811
    call = Call(library, Case([4, 9]), 8, pooler=False, embedded=False)
    output, pooled = call.at_once(2)
    assert torch.equal(output, call.in_parts()[0])
    assert pooled.isnan().all()


def test_errors(library):  # noqa: F811
    call = Call(library, Case([4, 9]), 8, pooler=True, embedded=False)
    size = library.albert_model_workspace_bytes(call.model, 1)
    memory = g.aligned(size + 64)

    def code(address: int = memory.address, given: int = size) -> int:
        return library.albert_model(call.model, address, given, None)

    def with_changes(**changes) -> int:
        fields = {name: getattr(call.model, name) for name in changes}
        for name, value in changes.items():
            setattr(call.model, name, value)
        try:
            return code()
        finally:
            for name, value in fields.items():
                setattr(call.model, name, value)

    assert code() == 0
    call.output.fill(math.nan)
    assert code(given=size - 1) == SMALL_WORKSPACE
    assert code(address=memory.address + 8) == UNALIGNED
    assert with_changes(projection=call.pooler) == BAD_WEIGHT
    assert with_changes(projection=None) == BAD_WEIGHT
    assert with_changes(pooler=call.projection) == BAD_WEIGHT
    for field, value in (("all_states", 1), ("passes", 0), ("hidden", 31)):
        old = getattr(call.model.encoder, field)
        setattr(call.model.encoder, field, value)
        assert code() != 0, field
        setattr(call.model.encoder, field, old)
    for field, value in (("tokens", 12), ("size", 0), ("dtype", 1)):
        old = getattr(call.model.embed, field)
        setattr(call.model.embed, field, value)
        assert code() != 0, field
        setattr(call.model.embed, field, old)
    call.model.embed.dropout.p = 0.1
    assert code() == BAD_ARGUMENT
    call.model.embed.dropout.p = 0.0
    call.model.embed.word.rows = 1  # an id beyond the table
    assert code() == BAD_ARGUMENT
    assert call.output.tensor.isnan().all()
