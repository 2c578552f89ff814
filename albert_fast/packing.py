"""PackedBatch: rows of different lengths one after the other, without padding, and the way back.

A padded batch [batch, seq] becomes [tokens] once, before the embeddings, and is padded once, at the end; nothing in
between computes a padded position. Two modes:

exact (the default)
    tokens is the number of real tokens. Finding it takes one synchronisation when the mask is on an accelerator, none
    when `lengths` is given on the host.
fixed capacity
    tokens is a bound that is known beforehand and everything stays on the device: for CUDA graphs and for compilers,
    which need shapes that do not depend on values. The tokens beyond the last row belong to no row; their outputs mean
    nothing, `pad` drops them, and no gradient comes from them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from albert_fast.ops.checks import check, check_tensor, describe, values_can_be_read


@dataclass(frozen=True)
class PackedBatch:
    """Packed inputs of a model, and where they came from.

    Made by `from_padded` or `from_sequences`. A model that is given one returns packed outputs, [tokens, …]: `pad`
    brings them into [batch, seq, …], and `rows` into a list.

    Attributes:
        cu_seqlens: int32 [batch + 1], on the device: row r is the tokens cu_seqlens[r] to cu_seqlens[r + 1].
        max_seqlen: an upper bound of the rows' lengths.
        batch_size, seq_length: the padded shape.
        indices: int64 [tokens], each token's place in the flattened padded batch (batch_size * seq_length for a token
            of no row); None when every place is taken, so that packing is a view.
        input_ids, token_type_ids, position_ids: int64 [tokens], or None.
        inputs_embeds: [tokens, E], in place of input_ids, or None.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    batch_size: int
    seq_length: int
    indices: Tensor | None = None
    input_ids: Tensor | None = None
    token_type_ids: Tensor | None = None
    position_ids: Tensor | None = None
    inputs_embeds: Tensor | None = None

    @classmethod
    def from_padded(
        cls,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        *,
        lengths: Sequence[int] | None = None,
        capacity: int | None = None,
        shared: bool = False,
    ) -> PackedBatch:
        """Packs a padded batch.

        Args:
            input_ids: int64 [batch, seq], or None with `inputs_embeds` [batch, seq, E].
            attention_mask: [batch, seq] of any dtype, 0 where there is padding, at any place of the row. None: no
                padding.
            token_type_ids: int64 [batch, seq]; zeros when None.
            position_ids: int64 [batch or 1, seq]; the column in the padded row when None.
            lengths: the rows' lengths on the host, in place of `attention_mask`, when the padding is at the end.
            capacity: number of tokens to allot (fixed capacity); at least the number of real ones.
            shared: what depends on sizes alone may be other batches' tensors, too, and is not to be written to.

        Raises:
            ValueError, TypeError: a shape does not fit; the message names the argument.
        """
        check(
            (input_ids is None) != (inputs_embeds is None),
            "input_ids and inputs_embeds: exactly one of them was expected",
        )
        tokens = input_ids if input_ids is not None else inputs_embeds
        assert tokens is not None
        if input_ids is not None:
            check_tensor("input_ids", input_ids, (None, None), dtype=(torch.int64, torch.int32))
        else:
            check_tensor("inputs_embeds", tokens, (None, None, None))
        shape = (tokens.shape[0], tokens.shape[1])
        batch = cls.layout(shape, tokens.device, attention_mask, lengths=lengths, capacity=capacity)
        own: Callable[[Tensor], Tensor] = (lambda tensor: tensor) if shared else Tensor.clone
        if token_type_ids is None:
            token_type_ids = own(zeros(batch.tokens, tokens.device))
        else:
            check_tensor("token_type_ids", token_type_ids, shape, like=tokens)
            token_type_ids = batch.pack(token_type_ids)
        if position_ids is None:
            position_ids = own(batch._columns())
        else:
            rows = shape[0] if position_ids.dim() == 2 and position_ids.shape[0] == shape[0] else 1
            check_tensor("position_ids", position_ids, (rows, shape[1]), like=tokens)
            position_ids = batch.pack(position_ids.expand(shape))
        return replace(
            batch,
            cu_seqlens=own(batch.cu_seqlens),
            input_ids=None if input_ids is None else batch.pack(input_ids),
            inputs_embeds=None if inputs_embeds is None else batch.pack(inputs_embeds),
            token_type_ids=token_type_ids,
            position_ids=position_ids,
        )

    @classmethod
    def from_sequences(
        cls,
        input_ids: Sequence[Sequence[int] | Tensor],
        token_type_ids: Sequence[Sequence[int] | Tensor] | None = None,
        *,
        device: torch.device | str | None = None,
    ) -> PackedBatch:
        """Packs rows that were never padded.

        Args:
            input_ids: for each row its ids.
            token_type_ids: for each row as many types; zeros when None.
            device: where the batch shall be.

        Raises:
            ValueError: there is no row, or a row of token_type_ids has another length than that of input_ids.
        """
        check(len(input_ids) > 0, "input_ids has no rows; at least one was expected")
        rows = [torch.as_tensor(row, dtype=torch.int64).reshape(-1) for row in input_ids]
        lengths = [row.numel() for row in rows]
        types = [torch.zeros_like(row) for row in rows]
        if token_type_ids is not None:
            types = [torch.as_tensor(row, dtype=torch.int64).reshape(-1) for row in token_type_ids]
            found = [row.numel() for row in types]
            check(found == lengths, f"token_type_ids has rows of {found} tokens and input_ids of {lengths}")
        shape = (len(rows), max(1, *lengths))
        layout = cls.layout(shape, torch.device(device or "cpu"), None, lengths=lengths)
        return replace(
            layout,
            cu_seqlens=layout.cu_seqlens.clone(),
            input_ids=torch.cat(rows).to(device),
            token_type_ids=torch.cat(types).to(device),
            position_ids=layout._columns().clone(),
        )

    @classmethod
    def layout(
        cls,
        shape: tuple[int, int],
        device: torch.device,
        attention_mask: Tensor | None = None,
        *,
        lengths: Sequence[int] | None = None,
        capacity: int | None = None,
    ) -> PackedBatch:
        """Where the tokens of a padded batch of `shape` [batch, seq] go, without any inputs. Arguments as
        `from_padded`; its tensors may be shared."""
        batch_size, seq_length = shape
        places = batch_size * seq_length
        if lengths is not None:
            check(attention_mask is None, "attention_mask and lengths: at most one of them was expected")
            fits = len(lengths) == batch_size and all(0 <= length <= seq_length for length in lengths)
            check(
                fits,
                f"lengths is {list(lengths)[:8]}; {batch_size} lengths from 0 to {seq_length} were expected",
            )
            if capacity is None and all(length == seq_length for length in lengths):
                lengths = None
        if attention_mask is not None:
            check_tensor("attention_mask", attention_mask, shape)
            check(
                attention_mask.device == device,
                f"attention_mask is on {attention_mask.device}; {device} was expected",
            )
            # On the CPU a mask of ones is found by one look at it, before anything is made of it.
            reads = capacity is None and attention_mask.is_cpu and values_can_be_read(attention_mask)
            if reads and torch.equal(attention_mask, _ones(*shape, attention_mask.dtype, device)):
                attention_mask = None
        if attention_mask is None and lengths is None and capacity is None:
            return cls(_full_cu_seqlens(batch_size, seq_length, device), seq_length, batch_size, seq_length)
        if lengths is not None:
            columns = torch.arange(seq_length)
            mask = (columns < torch.tensor(list(lengths), dtype=torch.int64)[:, None]).flatten()
            cu_seqlens = _cu_seqlens(torch.tensor(list(lengths), dtype=torch.int32))
        elif attention_mask is not None:
            mask = (attention_mask != 0).flatten()
            cu_seqlens = _cu_seqlens(mask.view(shape).sum(dim=1, dtype=torch.int32))
        else:
            mask = torch.ones(places, dtype=torch.bool, device=device)
            cu_seqlens = _full_cu_seqlens(batch_size, seq_length, device)
        if capacity is not None:
            if capacity < places:
                _check_capacity(cu_seqlens, capacity)
            indices = _indices_of_fixed_length(mask, capacity)
        else:
            indices = mask.nonzero().squeeze(1)
            if indices.numel() == places:
                return cls(_full_cu_seqlens(batch_size, seq_length, device), seq_length, batch_size, seq_length)
        cu_seqlens, indices = cu_seqlens.to(device), indices.to(device)
        return cls(cu_seqlens, seq_length, batch_size, seq_length, indices)

    @property
    def tokens(self) -> int:
        """Size of the packed dimension."""
        return self.batch_size * self.seq_length if self.indices is None else self.indices.shape[0]

    @property
    def device(self) -> torch.device:
        return self.cu_seqlens.device

    def pack(self, x: Tensor, fill: float | None = None) -> Tensor:
        """[batch, seq, …] -> [tokens, …]. `fill` is the value of the tokens of no row (fixed capacity); else it is
        any."""
        flat = x.flatten(0, 1)
        if self.indices is None:
            return flat
        packed = flat.index_select(0, self.indices.clamp(max=flat.shape[0] - 1))
        if fill is not None:
            no_row = self.indices == flat.shape[0]
            packed = packed.masked_fill(no_row.view(-1, *[1] * (packed.dim() - 1)), fill)
        return packed

    def pad(self, x: Tensor, fill: float = 0.0) -> Tensor:
        """[tokens, …] -> [batch, seq, …], `fill` at the padded positions."""
        check(
            x.dim() >= 1 and x.shape[0] == self.tokens,
            lambda: f"x is {describe(x)}; [{self.tokens} tokens, …] was expected",
        )
        if self.indices is None:
            return x.view(self.batch_size, self.seq_length, *x.shape[1:])
        places = self.batch_size * self.seq_length
        # One place more, for the tokens of no row.
        flat = x.new_full((places + 1, *x.shape[1:]), fill).index_copy(0, self.indices, x)
        return flat[:places].unflatten(0, (self.batch_size, self.seq_length))

    def pad_attention(self, weights: Tensor) -> Tensor:
        """Probabilities between the packed positions of each row -> between its padded ones.

        Args:
            weights: [batch, heads, seq, seq], counted within the packed rows.

        Returns:
            [batch, heads, seq, seq], zero where the query or the key is padding.
        """
        if self.indices is None:
            return weights
        places = self.batch_size * self.seq_length
        real = torch.zeros(places + 1, dtype=torch.bool, device=self.device)
        real[self.indices] = True
        real = real[:places].view(self.batch_size, self.seq_length)
        position = (real.cumsum(dim=1) - 1).clamp(min=0)[:, None]  # [batch, 1, seq]
        weights = weights.take_along_dim(position[..., None], dim=2).take_along_dim(position[:, :, None], dim=3)
        return weights * (real[:, None, :, None] & real[:, None, None, :])

    def first(self, x: Tensor) -> Tensor:
        """The first token of each row of x [tokens, …], as [batch, …]; zeros for an empty row."""
        if self.indices is None:
            return x.unflatten(0, (self.batch_size, self.seq_length))[:, 0]
        start, end = self.cu_seqlens[:-1].long(), self.cu_seqlens[1:].long()
        # With no token at all there is nothing to select from.
        x = F.pad(x, (0, 0) * (x.dim() - 1) + (0, 1))
        empty = (start == end).view(-1, *[1] * (x.dim() - 1))
        return x.index_select(0, start).masked_fill(empty, 0.0)

    def rows(self, x: Tensor) -> list[Tensor]:
        """x [tokens, …] as one tensor for each row (views; the offsets come to the host)."""
        offsets = self.cu_seqlens.tolist()
        return [x[start:end] for start, end in pairwise(offsets)]

    def to(self, device: torch.device | str, **options: Any) -> PackedBatch:
        """The batch with its tensors on `device`; options as `Tensor.to`."""
        moved: dict[str, Any] = {
            name: value.to(device, **options) for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **moved)

    def _columns(self) -> Tensor:
        """Each token's column in the padded batch, int64 [tokens]."""
        if self.indices is not None:
            return self.indices % self.seq_length
        return _full_columns(self.batch_size, self.seq_length, self.device)


def _cu_seqlens(lengths: Tensor) -> Tensor:
    return F.pad(lengths.cumsum(dim=0, dtype=torch.int32), (1, 0))


_Made = TypeVar("_Made", bound=Callable[..., Tensor])


def _kept_on_the_cpu(make: _Made) -> _Made:
    """For tensors that depend on sizes alone, and that nobody writes to: on the CPU the last few are used again.

    An operation takes 30 microseconds after a model's weights have driven PyTorch's code from the caches.
    """

    @lru_cache(maxsize=16)
    def kept(*arguments: Any) -> Tensor:
        # Made for any use: a tensor of inference mode cannot be saved for a backward.
        with torch.inference_mode(False):
            return make(*arguments)

    def made(*arguments: Any) -> Tensor:
        # Under a mode (fake tensors, a tracer) tensors are what it makes them.
        plain = not torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() == 0
        return kept(*arguments) if plain and arguments[-1].type == "cpu" else make(*arguments)

    return cast(_Made, made)


@_kept_on_the_cpu
def zeros(tokens: int, device: torch.device) -> Tensor:
    """Types of tokens where there are none: int64 [tokens], not to be written to."""
    return torch.zeros(tokens, dtype=torch.int64, device=device)


@_kept_on_the_cpu
def _ones(batch_size: int, seq_length: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.ones(batch_size, seq_length, dtype=dtype, device=device)


@_kept_on_the_cpu
def _full_columns(batch_size: int, seq_length: int, device: torch.device) -> Tensor:
    return torch.arange(seq_length, device=device).repeat(batch_size)


@_kept_on_the_cpu
def _full_cu_seqlens(batch_size: int, seq_length: int, device: torch.device) -> Tensor:
    return torch.arange(batch_size + 1, dtype=torch.int32, device=device) * seq_length


def _indices_of_fixed_length(mask: Tensor, capacity: int) -> Tensor:
    """Places of the real tokens [capacity], and mask.numel() for those that are left: no shape depends on a value."""
    places = mask.numel()
    target = torch.where(mask, mask.cumsum(dim=0) - 1, capacity).clamp(max=capacity)
    indices = torch.full((capacity + 1,), places, dtype=torch.int64, device=mask.device)
    return indices.scatter(0, target, torch.arange(places, device=mask.device))[:capacity]


def _check_capacity(cu_seqlens: Tensor, capacity: int) -> None:
    message = f"capacity is {capacity} and there are more real tokens: raise it"
    if values_can_be_read(cu_seqlens):
        check(int(cu_seqlens[-1]) <= capacity, message)
    elif cu_seqlens.device.type == "cuda":
        torch._assert_async(cu_seqlens[-1] <= capacity, message)
