"""The masked-LM loss, forward: attention of the labelled tokens to the word table, which is both keys and values.

For the logits z = table x + bias of a labelled token with label y, L = logsumexp(z) and p = softmax(z),

    loss = L - (1 - s) z[y] - (s / V) sum(z) + c L²
    its gradient with respect to x = (1 + 2 c L) sum_j p_j table_j - (1 - s) table_y - (s / V) sum_j table_j

and the one sum over the vocabulary that needs all logits is what attention computes, with the online softmax. A few
rows of labelled tokens do not fill a GPU: the tiles of all of them, vocabulary included, are therefore numbered one
after the other and shared evenly among a fixed number of programs, as in stream-K (Osama et al., arXiv 2301.03598).
What a program finds for a block of rows is a part; a second kernel merges the parts of a row, always in the same order,
and adds what concerns the label alone.

Precision: logits, softmax and sums in float32; the exponentials are rounded to the dtype of x before their product with
the table. The logit of the label is summed in another order than those of the tiles. A last kernel reduces the losses.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpretedFunction

from albert_fast import backends
from albert_fast.kernels.labelled_tokens import labelled_tokens
from albert_fast.kernels.launch import (
    ARCHITECTURES,
    Config,
    Tiles,
    dot_precision,
    launch,
    multiprocessors,
    next_power_of_2,
)
from albert_fast.ops.masked_lm_loss import nothing_kept

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Where the maxima begin: finite, so that a difference of two is never NaN, and times log2(e) as well.
_LOWEST = tl.constexpr(-2e38)
# Tiles that a program has at least: parts of fewer cost more to merge than they save.
_LEAST_TILES = tl.constexpr(4)
# -log(0.51): labels with a probability beyond a half have the largest logit; others may share it.
_SURE = tl.constexpr(0.673)

_ZEROED = tl.constexpr(16)  # tokens that a program zeroes at once

# Columns of x. Beyond, the reference serves.
MOST_COLUMNS = 512

# Rows whose parts are kept at a time, for each multiprocessor, and those that its programs hold at once.
_ROWS = 128
_MOST_ROWS_IN_PROGRAMS = 256


@triton.jit
def load_rows(pointer, first, end, ROWS: tl.constexpr, SIZE: tl.constexpr, BLOCK_E: tl.constexpr):
    """Rows from `first` on of a contiguous [end, SIZE], as [ROWS, BLOCK_E]; zero beyond."""
    row, column = tl.arange(0, ROWS)[:, None], tl.arange(0, BLOCK_E)[None, :]
    mask = row < end - first
    if SIZE < BLOCK_E:
        mask = mask & (column < SIZE)
    return tl.load(pointer + first.to(tl.int64) * SIZE + (row * SIZE + column), mask=mask, other=0.0)


@triton.jit
def gather_rows(pointer, row, exists, stride, SIZE: tl.constexpr, BLOCK_E: tl.constexpr):
    """Rows `row` of [any, SIZE], as [rows, BLOCK_E]; zero where there is none."""
    column = tl.arange(0, BLOCK_E)[None, :]
    mask = exists[:, None]
    if SIZE < BLOCK_E:
        mask = mask & (column < SIZE)
    return tl.load(pointer + row.to(tl.int64)[:, None] * stride + column, mask=mask, other=0.0)


@triton.jit
def store_rows(pointer, row, exists, values, SIZE: tl.constexpr):
    """The reverse of `gather_rows`, contiguous."""
    column = tl.arange(0, values.shape[1])[None, :]
    pointers = pointer + row.to(tl.int64)[:, None] * SIZE + column
    tl.store(pointers, values.to(pointer.dtype.element_ty), mask=exists[:, None] & (column < SIZE))


@triton.jit
def _shares(rows, vocabulary, block_m, block_v, programs):
    """Tiles of a block of rows, tiles in all, and programs that have any: program p those from p * all // programs."""
    tiles = tl.cdiv(vocabulary, block_v)
    total = (tl.cdiv(rows, block_m) * tiles).to(tl.int64)
    return tiles, total, tl.minimum(programs, tl.cdiv(total, _LEAST_TILES).to(tl.int32))


@triton.jit(do_not_specialize=["first_row", "most_rows", "parts"])
def masked_lm_loss_kernel(
    x,  # [tokens, SIZE]
    table,  # [vocabulary, SIZE], contiguous
    bias,  # [vocabulary]
    positions,  # int32 [tokens]: the labelled ones
    header,  # int32 [4]: how many they are; BLOCK_M, BLOCK_V and the number of programs, for who merges
    statistics,  # float32 [3, parts]: maximum of the logits, sum of exp2, first tile with the maximum
    values,  # float32 [parts, BLOCK_E]: sums of exp2 times the table
    first_row,
    most_rows,
    parts,
    vocabulary,
    x_stride,
    SIZE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    TRAINING: tl.constexpr,
    SHIFT: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
    INTERPRETED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_V: tl.constexpr,
    PER_SM: tl.constexpr,
):
    program = tl.program_id(0)
    if program == 0:
        # Tuning may choose any of the configurations, which the host does not see.
        tl.store(header + 1, BLOCK_M)
        tl.store(header + 2, BLOCK_V)
        tl.store(header + 3, tl.num_programs(0))
    rows = tl.minimum(tl.load(header) - first_row, most_rows)
    if rows <= 0:
        return
    tiles, total, programs = _shares(rows, vocabulary, BLOCK_M, BLOCK_V, tl.num_programs(0))
    if program >= programs:
        return
    begin = (program * total // programs).to(tl.int32)
    end = ((program + 1) * total // programs).to(tl.int32)
    column = tl.arange(0, BLOCK_E)[None, :]
    for row_block in range(begin // tiles, (end - 1) // tiles + 1):
        row = row_block * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = row < rows
        token = tl.load(positions + first_row + row, mask=inside, other=0)
        queries = gather_rows(x, token, inside, x_stride, SIZE, BLOCK_E)  # [M, E]
        row_max = tl.full([BLOCK_M], _LOWEST, tl.float32)
        row_sum = tl.zeros([BLOCK_M], tl.float32)
        best_tile = tl.zeros([BLOCK_M], tl.int32)
        if TRAINING:
            accumulator = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
        first_tile = row_block * tiles
        for tile in range(tl.maximum(begin - first_tile, 0), tl.minimum(end - first_tile, tiles)):
            first = tile * BLOCK_V
            word = tl.arange(0, BLOCK_V)
            keys = load_rows(table, first, vocabulary, BLOCK_V, SIZE, BLOCK_E)  # [V, E]
            # Minus infinity for words that there are not: the tail needs no other mask.
            bias_v = tl.load(bias + first + word, mask=word < vocabulary - first, other=float("-inf"))
            if INTERPRETED:
                # As the backward has them: NumPy rounds A Bᵀ and B Aᵀ differently, which a GPU does not.
                logits = tl.trans(tl.dot(keys, tl.trans(queries), input_precision=PRECISION))  # [M, V]
            else:
                logits = tl.dot(queries, tl.trans(keys), input_precision=PRECISION)  # [M, V]
            logits += bias_v.to(tl.float32)[None, :]
            tile_max = tl.max(logits, axis=1)
            best_tile = tl.where(tile_max > row_max, tile, best_tile)
            new_max = tl.maximum(row_max, tile_max)
            # SHIFT: the exponentials go up to 2**SHIFT, so that float16 holds small ones, too.
            if EXACT:
                probabilities = tl.exp2((logits - new_max[:, None]) * LOG2E + SHIFT)
            else:
                probabilities = tl.exp2(logits * LOG2E - (new_max * LOG2E - SHIFT)[:, None])
            correction = tl.exp2((row_max - new_max) * LOG2E)
            row_sum = row_sum * correction + tl.sum(probabilities, axis=1)
            row_max = new_max
            if TRAINING:
                accumulator = accumulator * correction[:, None]
                accumulator = tl.dot(probabilities.to(keys.dtype), keys, accumulator, input_precision=PRECISION)
        # Program and block of rows both only rise: no two of these pairs have the same sum.
        first_part = (program + row_block) * BLOCK_M
        part = first_part + tl.arange(0, BLOCK_M)
        tl.store(statistics + part, row_max, mask=inside)
        tl.store(statistics + parts + part, row_sum, mask=inside)
        tl.store(statistics + 2 * parts + part, best_tile.to(tl.float32), mask=inside)
        if TRAINING:
            pointers = values + first_part.to(tl.int64) * BLOCK_E + (tl.arange(0, BLOCK_M)[:, None] * BLOCK_E + column)
            tl.store(pointers, accumulator, mask=inside[:, None])


@triton.jit
def _first_largest(queries, table, bias, tile, rows, block_v, vocabulary, SIZE: tl.constexpr, WORDS: tl.constexpr):
    """The first word with the largest logit in a tile of each of the rows, where `rows` is true; [ROWS], int32."""
    ROWS: tl.constexpr = queries.shape[0]
    BLOCK_E: tl.constexpr = queries.shape[1]
    column = tl.arange(0, BLOCK_E)[None, None, :]
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    result = tile * block_v
    for start in tl.range(0, block_v, WORDS, num_stages=4):
        word = (tile * block_v + start)[:, None] + tl.arange(0, WORDS)[None, :]  # [ROWS, WORDS]
        exists = rows[:, None] & (word < vocabulary)
        mask = exists[:, :, None]
        if SIZE < BLOCK_E:
            mask = mask & (column < SIZE)
        keys = tl.load(table + word.to(tl.int64)[:, :, None] * SIZE + column, mask=mask, other=0.0)
        logits = tl.sum(keys.to(tl.float32) * queries[:, None, :], axis=2)
        logits += tl.load(bias + word, mask=exists, other=0.0).to(tl.float32)
        logits = tl.where(exists, logits, float("-inf"))
        new = tl.max(logits, axis=1)
        first = tl.min(tl.where(logits == new[:, None], word, 2**31 - 1), axis=1)
        result = tl.where(new > largest, first, result)
        largest = tl.maximum(largest, new)
    return result


@triton.jit(
    do_not_specialize=[
        "first_row",
        "most_rows",
        "parts",
        "tokens",
        "ignore_index",
        "label_smoothing",
        "z_loss",
    ]
)
def merge_kernel(
    x,
    table,
    bias,
    labels,  # int64 [tokens]
    positions,
    header,
    statistics,
    values,
    table_sum,  # float32 [SIZE], of all words, and their bias's [1]; None without label smoothing
    bias_sum,
    loss,  # float32 [tokens]
    logsumexp,  # float32 [tokens]
    correct,  # uint8 [tokens]
    token_grads,  # [tokens, SIZE]
    first_row,
    most_rows,
    parts,
    tokens,
    vocabulary,
    ignore_index,
    label_smoothing,
    z_loss,
    x_stride,
    SIZE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    TRAINING: tl.constexpr,
    SHIFT: tl.constexpr,
    ROWS: tl.constexpr,
    PARTS: tl.constexpr,
    WORDS: tl.constexpr,
    PER_SM: tl.constexpr,
):
    column = tl.arange(0, BLOCK_E)[None, :]
    labelled = tl.load(header)
    # Tokens without a label.
    end = tl.minimum(most_rows, tokens - first_row)
    for first in range(tl.program_id(0) * _ZEROED, end, tl.num_programs(0) * _ZEROED):
        token = first_row + first + tl.arange(0, _ZEROED)
        zero = tl.load(labels + token, mask=token < tokens, other=ignore_index) == ignore_index
        zero = zero & (token < tokens)
        tl.store(loss + token, tl.zeros([_ZEROED], tl.float32), mask=zero)
        tl.store(logsumexp + token, tl.zeros([_ZEROED], tl.float32), mask=zero)
        tl.store(correct + token, tl.zeros([_ZEROED], tl.int8), mask=zero)
        if TRAINING:
            store_rows(token_grads, token, zero, tl.zeros([_ZEROED, BLOCK_E], tl.float32), SIZE)

    rows = tl.minimum(labelled - first_row, most_rows)
    block_m, block_v = tl.load(header + 1), tl.load(header + 2)
    tiles, total, programs = _shares(rows, vocabulary, block_m, block_v, tl.load(header + 3))
    for first in range(tl.program_id(0) * ROWS, rows, tl.num_programs(0) * ROWS):
        row = first + tl.arange(0, ROWS)
        inside = row < rows
        # Before the parts: these loads wait for each other.
        labelled_token = tl.load(positions + first_row + row, mask=inside, other=0)
        label = tl.load(labels + labelled_token, mask=inside, other=-1)
        # A label that is no word has no logit, and matches none.
        word_exists = (label >= 0) & (label < vocabulary)
        word = tl.where(word_exists, label, 0).to(tl.int32)
        queries = gather_rows(x, labelled_token, inside, x_stride, SIZE, BLOCK_E).to(tl.float32)
        target_row = gather_rows(table, word, word_exists, SIZE, SIZE, BLOCK_E).to(tl.float32)
        target = tl.sum(queries * target_row, axis=1)
        target += tl.load(bias + word, mask=word_exists, other=0.0).to(tl.float32)
        # A block of rows is a multiple of ROWS. The programs that have its first tile and its last one.
        row_block = first // block_m
        first_program = (((row_block * tiles + 1) * programs.to(tl.int64) - 1) // total).to(tl.int32)
        last_program = (((row_block + 1) * tiles * programs.to(tl.int64) - 1) // total).to(tl.int32)
        row_max = tl.full([ROWS], _LOWEST, tl.float32)
        row_sum = tl.zeros([ROWS], tl.float32)
        best_tile = tl.zeros([ROWS], tl.int32)
        accumulator = tl.zeros([ROWS, BLOCK_E], tl.float32)
        for first_of_some in range(first_program, last_program + 1, PARTS):
            program = first_of_some + tl.arange(0, PARTS)
            part = (program + row_block)[None, :] * block_m + (row % block_m)[:, None]  # [ROWS, PARTS]
            exists = inside[:, None] & (program <= last_program)[None, :]
            maxima = tl.load(statistics + part, mask=exists, other=_LOWEST)
            sums = tl.load(statistics + parts + part, mask=exists, other=0.0)
            tile = tl.load(statistics + 2 * parts + part, mask=exists, other=0.0).to(tl.int32)
            new_max = tl.maximum(row_max, tl.max(maxima, axis=1))
            first_tile = tl.min(tl.where(maxima == new_max[:, None], tile, 2**31 - 1), axis=1)
            best_tile = tl.where(new_max > row_max, first_tile, best_tile)
            weights = tl.exp2((maxima - new_max[:, None]) * LOG2E)
            correction = tl.exp2((row_max - new_max) * LOG2E)
            row_sum = row_sum * correction + tl.sum(weights * sums, axis=1)
            row_max = new_max
            if TRAINING:
                pointers = values + part.to(tl.int64)[:, :, None] * BLOCK_E + column[None, :, :]
                part_values = tl.load(pointers, mask=exists[:, :, None], other=0.0)  # [ROWS, PARTS, E]
                accumulator = accumulator * correction[:, None] + tl.sum(weights[:, :, None] * part_values, axis=1)
        row_sum = tl.where(inside, row_sum, 1.0)
        total_log = tl.where(inside, row_max + (tl.log2(row_sum) - SHIFT) * LN2, 0.0)
        minus_log = total_log - target
        # No logit is larger than the logsumexp, but by rounding.
        minus_log = tl.where(word_exists & (minus_log < 0.0), 0.0, minus_log)
        token_loss = (1.0 - label_smoothing) * minus_log + z_loss * total_log * total_log
        if table_sum is not None:
            sum_row = tl.load(table_sum + column, mask=column < SIZE, other=0.0)  # [1, E]
            mean = (tl.sum(queries * sum_row, axis=1) + tl.load(bias_sum)) / vocabulary
            token_loss += label_smoothing * (total_log - mean)
        tl.store(loss + labelled_token, token_loss, mask=inside)
        tl.store(logsumexp + labelled_token, total_log, mask=inside)

        is_first = word_exists & (minus_log < _SURE)
        unsure = word_exists & (is_first == 0) & (word // block_v == best_tile)
        if tl.max(unsure.to(tl.int32)) > 0:
            largest = _first_largest(queries, table, bias, best_tile, unsure, block_v, vocabulary, SIZE, WORDS)
            is_first = is_first | (unsure & (largest == word))
        tl.store(correct + labelled_token, is_first.to(tl.int8), mask=inside)

        if TRAINING:
            factor = (1.0 + 2.0 * z_loss * total_log) / row_sum
            grad = accumulator * factor[:, None] - (1.0 - label_smoothing) * target_row
            if table_sum is not None:
                grad -= label_smoothing / vocabulary * sum_row
            store_rows(token_grads, labelled_token, inside, grad, SIZE)


@triton.jit(do_not_specialize=["tokens"])
def loss_reduction_kernel(
    losses,  # float32 [tokens]
    count,  # int32 [1]: how many tokens are labelled; the losses of the others are zero
    loss,  # float32 [1]: the sum, or with MEAN the mean over the labelled ones
    tokens,
    MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program, so that the order of the sum is fixed: 4 bytes a token, of which it reads a million in 0.1 ms."""
    index = tl.arange(0, BLOCK)
    sums = tl.zeros([BLOCK], tl.float32)
    for first in range(0, tokens, BLOCK):
        sums += tl.load(losses + first + index, mask=index < tokens - first, other=0.0)
    total = tl.sum(sums)
    if MEAN:
        total = tl.div_rn(total, tl.maximum(tl.load(count), 1).to(tl.float32))
    tl.store(loss, total)


def _config(block_m: int, block_v: int, per_sm: int, num_warps: int, num_stages: int) -> Config:
    return Config({"BLOCK_M": block_m, "BLOCK_V": block_v, "PER_SM": per_sm}, num_warps, num_stages)


_INTERPRETER = _config(32, 64, 1, 4, 2)

# By BLOCK_E, up to it. PER_SM is how many programs of theirs a multiprocessor holds at once.
TILES = {
    128: Tiles(
        _INTERPRETER,
        half={
            80: (_config(64, 64, 2, 4, 3), _config(128, 64, 1, 8, 2), _config(128, 32, 2, 4, 3)),
            90: (
                _config(128, 128, 1, 8, 3),
                _config(64, 128, 2, 4, 3),  # the fastest on an H200, though it spills 8 bytes
                _config(128, 64, 2, 4, 3),
            ),
            100: (_config(128, 64, 1, 8, 3), _config(64, 64, 2, 4, 3), _config(128, 64, 1, 8, 2)),
        },
        single=dict.fromkeys(ARCHITECTURES, (_config(64, 32, 1, 8, 2), _config(32, 32, 2, 4, 2))),
    ),
    256: Tiles(
        _INTERPRETER,
        half=dict.fromkeys(ARCHITECTURES, (_config(64, 32, 1, 8, 2),)),
        single=dict.fromkeys(ARCHITECTURES, (_config(32, 16, 1, 8, 2),)),
    ),
    512: Tiles(
        _INTERPRETER,
        half=dict.fromkeys(ARCHITECTURES, (_config(32, 16, 1, 8, 2),)),
        single=dict.fromkeys(ARCHITECTURES, (_config(16, 16, 1, 8, 1),)),
    ),
}


def _merge_config(rows: int, words: int, per_sm: int, num_warps: int) -> Config:
    return Config({"ROWS": rows, "PARTS": 8, "WORDS": words, "PER_SM": per_sm}, num_warps)


def _merge_tiles(half: tuple[Config, ...], single: tuple[Config, ...]) -> Tiles:
    interpreter = Config({"ROWS": 16, "PARTS": 2, "WORDS": 16, "PER_SM": 1})
    return Tiles(interpreter, dict.fromkeys(ARCHITECTURES, half), dict.fromkeys(ARCHITECTURES, single))


MERGE_TILES = {
    128: _merge_tiles(
        (_merge_config(2, 16, 8, 2), _merge_config(1, 16, 12, 1), _merge_config(1, 16, 20, 1)),
        (_merge_config(2, 16, 4, 4), _merge_config(1, 16, 12, 2)),
    ),
    256: _merge_tiles((_merge_config(1, 16, 4, 4),), (_merge_config(1, 16, 4, 4),)),
    512: _merge_tiles((_merge_config(1, 4, 4, 4),), (_merge_config(1, 4, 4, 4),)),
}


_REDUCTION = dict.fromkeys(ARCHITECTURES, (Config({"BLOCK": 16384}, num_warps=32),))
REDUCTION_TILES = Tiles(Config({"BLOCK": 64}), half=_REDUCTION, single=_REDUCTION)


def tiles_of(tables: dict[int, Tiles], block_e: int) -> Tiles:
    return tables[max(128, block_e)]


def masked_lm_loss_kept(x: Tensor, training: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for token_grads, positions and count."""
    tokens, size = x.shape
    if size > MOST_COLUMNS:
        return nothing_kept(x, training)
    token_grads = x.new_empty((tokens, size) if training else 0)
    return token_grads, x.new_empty(tokens, dtype=torch.int32), x.new_empty(4, dtype=torch.int32)


def masked_lm_loss(
    x: Tensor,
    table: Tensor,
    bias: Tensor,
    labels: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    reduction: str,
    training: bool,
) -> tuple[Tensor, ...]:
    """The losses, what they are reduced to, logsumexp, correct, and for the backward token_grads, positions and count.

    A label outside the vocabulary matches no word: its loss is that of a logit of 0.
    """
    tokens, size = x.shape
    if size > MOST_COLUMNS:
        reference = backends.REFERENCE.load()["masked_lm_loss"]
        return reference(x, table, bias, labels, ignore_index, label_smoothing, z_loss, reduction, training)
    losses, logsumexp = (x.new_empty(tokens, dtype=torch.float32) for _ in range(2))
    loss = losses.new_empty(0 if reduction == "none" else ())
    correct = x.new_empty(tokens, dtype=torch.bool)
    token_grads, positions, header = masked_lm_loss_kept(x, training)
    results = losses, loss, logsumexp, correct, token_grads, positions, header
    if tokens == 0:
        loss.zero_()
        return results
    x, table = rows_of(x), table.to(x.dtype).contiguous()
    bias, labels = bias.contiguous(), labels.contiguous()
    labelled_tokens(labels, ignore_index, positions, header)
    smoothed = label_smoothing > 0.0
    table_sum = table.sum(dim=0, dtype=torch.float32) if smoothed else None
    bias_sum = bias.sum(dtype=torch.float32) if smoothed else None

    # More rows than the parts have room for take several rounds: those beyond the labelled ones return at once.
    block_e = max(16, next_power_of_2(size))
    processors = multiprocessors(x.device)
    most_rows = processors * _ROWS
    parts = processors * (_ROWS + _MOST_ROWS_IN_PROGRAMS)
    statistics = x.new_empty(3, parts, dtype=torch.float32)
    values = x.new_empty(parts, block_e, dtype=torch.float32) if training else None
    constants = {
        "SIZE": size,
        "BLOCK_E": block_e,
        "TRAINING": training,
        "SHIFT": 15.0 if x.dtype == torch.float16 else 0.0,
    }
    for first_row in range(0, tokens, most_rows):
        launch(
            masked_lm_loss_kernel,
            lambda blocks: (processors * blocks["PER_SM"],),
            x,
            table,
            bias,
            positions,
            header,
            statistics,
            values,
            first_row,
            most_rows,
            parts,
            table.shape[0],
            x.stride(0),
            tiles=tiles_of(TILES, block_e),
            dtype=x.dtype,
            key=(next_power_of_2(tokens), table.shape[0]),
            EXACT=x.dtype == torch.float32,
            PRECISION=dot_precision(x.dtype),
            INTERPRETED=isinstance(masked_lm_loss_kernel, InterpretedFunction),
            **constants,
        )
        launch(
            merge_kernel,
            lambda blocks: (processors * blocks["PER_SM"],),
            x,
            table,
            bias,
            labels,
            positions,
            header,
            statistics,
            values,
            table_sum,
            bias_sum,
            losses,
            logsumexp,
            correct.view(torch.uint8),
            token_grads if training else None,
            first_row,
            most_rows,
            parts,
            tokens,
            table.shape[0],
            ignore_index,
            label_smoothing,
            z_loss,
            x.stride(0),
            tiles=tiles_of(MERGE_TILES, block_e),
            dtype=x.dtype,
            **constants,
        )
    if reduction != "none":
        launch(
            loss_reduction_kernel,
            lambda blocks: (1,),
            losses,
            header,
            loss,
            tokens,
            tiles=REDUCTION_TILES,
            dtype=losses.dtype,
            MEAN=reduction == "mean",
        )
    return results


def rows_of(x: Tensor) -> Tensor:
    """Columns contiguous, any row stride."""
    return x if x.stride(1) == 1 else x.contiguous()
