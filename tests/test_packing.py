"""PackedBatch: there and back again, in both modes, for any mask."""

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from albert_fast import PackedBatch

SHAPES = [(1, 1), (1, 17), (5, 1), (4, 15), (3, 63)]


def masks(batch: int, seq: int) -> dict[str, Tensor]:
    """Padding at the end, at the beginning, with holes, anywhere; a batch of one full and otherwise empty rows."""
    lengths = torch.randint(0, seq + 1, (batch, 1))
    columns = torch.arange(seq)
    masks = {
        "right": columns < lengths,
        "left": columns >= seq - lengths,
        "holes": torch.rand(batch, seq) < 0.5,
        "full": torch.ones(batch, seq, dtype=torch.bool),
        "empty": torch.zeros(batch, seq, dtype=torch.bool),
        "one empty row": (columns < lengths) & (torch.arange(batch)[:, None] != random.randrange(batch)),
    }
    return {name: mask.to(random.choice([torch.bool, torch.int64, torch.float32])) for name, mask in masks.items()}


parametrize_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
parametrize_mask = pytest.mark.parametrize("kind", list(masks(1, 1)))


def capacities(mask: Tensor) -> list[int | None]:
    """Exact, and fixed: just enough, some more, and more than there are places."""
    real = int((mask != 0).sum())
    return [None, real, real + 3, mask.numel() + 5]


@parametrize_shape
@parametrize_mask
def test_there_and_back_again(shape, kind, device):
    mask = masks(*shape)[kind].to(device)
    real = mask != 0
    for capacity in capacities(mask):
        batch = PackedBatch.layout(shape, device, mask, capacity=capacity)
        x = torch.randn(*shape, 2, device=device)
        packed = batch.pack(x)
        count = int(real.sum())
        assert batch.tokens == packed.shape[0] == (count if capacity is None else capacity)
        # The real tokens, row by row, in their order.
        assert torch.equal(packed[:count], x[real])
        padded = batch.pad(packed)
        assert torch.equal(padded, x * real[..., None])
        assert torch.equal(batch.pad(packed, fill=-7.0), torch.where(real[..., None], x, -7.0))
        # Packing what was padded changes nothing.
        assert torch.equal(batch.pack(padded)[:count], packed[:count])


@parametrize_shape
@parametrize_mask
def test_offsets(shape, kind, device):
    mask = masks(*shape)[kind].to(device)
    lengths = (mask != 0).sum(dim=1)
    for capacity in capacities(mask):
        batch = PackedBatch.layout(shape, device, mask, capacity=capacity)
        assert batch.cu_seqlens.dtype == torch.int32
        assert batch.cu_seqlens.device.type == batch.device.type == device.type
        assert batch.cu_seqlens[0] == 0
        assert torch.equal(batch.cu_seqlens.diff(), lengths.int())
        assert isinstance(batch.max_seqlen, int)
        assert batch.max_seqlen >= lengths.max()
        assert (batch.batch_size, batch.seq_length) == shape


@parametrize_shape
@parametrize_mask
def test_all_the_inputs(shape, kind, device):
    mask = masks(*shape)[kind].to(device)
    real = mask != 0
    count = int(real.sum())
    ids, types, positions = (torch.randint(50, shape, device=device) for _ in range(3))
    for capacity in capacities(mask):
        batch = PackedBatch.from_padded(ids, mask, types, positions, capacity=capacity)
        assert torch.equal(batch.input_ids[:count], ids[real])
        assert torch.equal(batch.token_type_ids[:count], types[real])
        assert torch.equal(batch.position_ids[:count], positions[real])
        # Ids of no row are rows of the tables all the same: nothing is read out of bounds.
        assert batch.input_ids.numel() == batch.tokens
        assert batch.inputs_embeds is None
        if batch.tokens:
            assert batch.input_ids.min() >= 0
            assert batch.input_ids.max() < 50

        # Left out: zeros, and each token's column, wherever the padding is.
        batch = PackedBatch.from_padded(ids, mask, capacity=capacity)
        assert not batch.token_type_ids.any()
        columns = torch.arange(shape[1], device=device).expand(shape)
        assert torch.equal(batch.position_ids[:count], columns[real])
        assert not batch.tokens or batch.position_ids.max() < shape[1]

        embeds = torch.randn(*shape, 3, device=device)
        batch = PackedBatch.from_padded(None, mask, inputs_embeds=embeds, capacity=capacity)
        assert batch.input_ids is None
        assert torch.equal(batch.inputs_embeds[:count], embeds[real])

        batch = PackedBatch.from_padded(ids, mask, position_ids=positions[:1], capacity=capacity)
        assert torch.equal(batch.position_ids[:count], positions[:1].expand(shape)[real])


@parametrize_shape
def test_lengths_are_a_mask_on_the_right(shape, device):
    ids = torch.randint(50, shape, device=device)
    lengths = [random.randint(0, shape[1]) for _ in range(shape[0])]
    mask = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]
    for capacity in capacities(mask):
        by_lengths = PackedBatch.from_padded(ids, lengths=lengths, capacity=capacity)
        by_mask = PackedBatch.from_padded(ids, mask.to(device), capacity=capacity)
        assert vars(by_lengths).keys() == vars(by_mask).keys()
        for name, value in vars(by_lengths).items():
            other = getattr(by_mask, name)
            same = torch.equal(value, other) if isinstance(value, Tensor) else value == other
            assert same, name


@parametrize_shape
@pytest.mark.parametrize("given", ["nothing", "mask", "lengths"])
def test_a_full_batch_is_a_view(shape, given, device):
    ids = torch.randint(50, shape, device=device)
    options: dict[str, Any] = {
        "nothing": {},
        "mask": {"attention_mask": torch.ones(shape, device=device)},
        "lengths": {"lengths": [shape[1]] * shape[0]},
    }[given]
    batch = PackedBatch.from_padded(ids, token_type_ids=ids, **options)
    assert batch.indices is None
    assert batch.input_ids.data_ptr() == ids.data_ptr()
    assert batch.token_type_ids.data_ptr() == ids.data_ptr()
    x = torch.randn(batch.tokens, 3, device=device)
    padded = batch.pad(x)
    assert padded.shape == (*shape, 3)
    assert padded.data_ptr() == x.data_ptr()
    assert batch.pack(padded).data_ptr() == x.data_ptr()
    assert batch.first(x).data_ptr() == x.data_ptr()


@parametrize_mask
def test_gradients_come_from_real_tokens_only(kind, device):
    shape = (4, 7)
    mask = masks(*shape)[kind].to(device)
    real = (mask != 0)[..., None]
    for capacity in capacities(mask):
        batch = PackedBatch.layout(shape, device, mask, capacity=capacity)
        x = torch.randn(*shape, 2, device=device, dtype=torch.float64, requires_grad=True)
        upstream = torch.randn(*shape, 2, device=device, dtype=torch.float64)
        padded = batch.pad(batch.pack(x) * 3.0)
        (grad,) = torch.autograd.grad(padded, x, upstream)
        assert torch.equal(grad, 3.0 * upstream * real)
        first = batch.first(batch.pack(x))
        upstream = torch.randn_like(first)
        (grad,) = torch.autograd.grad(first, x, upstream)
        expected = torch.zeros_like(grad)
        for row in range(shape[0]):
            places = real[row, :, 0].nonzero()
            if places.numel():
                expected[row, places[0, 0]] = upstream[row]
        assert torch.equal(grad, expected)


@parametrize_shape
@parametrize_mask
def test_first_and_rows(shape, kind, device):
    mask = masks(*shape)[kind].to(device)
    x = torch.randn(*shape, 2, device=device)
    for capacity in capacities(mask):
        batch = PackedBatch.layout(shape, device, mask, capacity=capacity)
        packed = batch.pack(x)
        rows, first = batch.rows(packed), batch.first(packed)
        assert len(rows) == len(first) == shape[0]
        for row in range(shape[0]):
            own = x[row][mask[row] != 0]
            assert torch.equal(rows[row], own)
            assert torch.equal(first[row], own[0] if len(own) else torch.zeros_like(first[row]))
        # Of any rank, and of integers.
        assert batch.first(packed[:, 0]).shape == (shape[0],)
        assert batch.first(packed[:, :1].long()).dtype == torch.int64


def test_tokens_of_no_row_can_be_given_a_value(device):
    mask = torch.tensor([[1, 1, 0], [0, 1, 0]], device=device)
    batch = PackedBatch.layout((2, 3), device, mask, capacity=6)
    labels = torch.arange(6, device=device).view(2, 3)
    assert batch.pack(labels, fill=-100).tolist() == [0, 1, 4, -100, -100, -100]
    x = torch.randn(2, 3, 2, device=device)
    assert not batch.pack(x, fill=0.0)[3:].any()


@parametrize_mask
def test_nothing_of_a_token_of_no_row_is_seen(kind, device):
    mask = masks(3, 5)[kind].to(device)
    batch = PackedBatch.layout((3, 5), device, mask, capacity=20)
    x = torch.randn(20, 2, device=device)
    padded, first = batch.pad(x), batch.first(x)
    x[int((mask != 0).sum()) :] = float("nan")
    assert torch.equal(batch.pad(x), padded)
    assert torch.equal(batch.first(x), first)


@parametrize_mask
def test_attention_weights_go_back_between_the_padded_positions(kind, device):
    shape, heads = (3, 6), 2
    mask = masks(*shape)[kind].to(device) != 0
    for capacity in capacities(mask):
        batch = PackedBatch.layout(shape, device, mask, capacity=capacity)
        weights = torch.zeros(3, heads, 6, 6, device=device)
        expected = torch.zeros(3, heads, 6, 6, device=device)
        for row in range(3):
            length = int(mask[row].sum())
            own = torch.rand(heads, length, length, device=device)
            weights[row, :, :length, :length] = own
            expected[row][:, mask[row][:, None] & mask[row]] = own.flatten(1)
        assert torch.equal(batch.pad_attention(weights), expected)


# --------------------------------------------------------------------------------------------------------- sequences


def test_rows_that_were_never_padded(device):
    lengths = random.sample([1, 15, 17, 63, 0], 5)
    rows = [torch.randint(50, (length,)) for length in lengths]
    types = [torch.randint(2, (length,)).tolist() for length in lengths]
    sequences = [row if random.random() < 0.5 else row.tolist() for row in rows]
    batch = PackedBatch.from_sequences(sequences, types, device=device)
    assert batch.device.type == device.type
    assert (batch.batch_size, batch.seq_length, batch.tokens) == (5, 63, sum(lengths))
    for found, row in zip(batch.rows(batch.input_ids), rows, strict=True):
        assert found.tolist() == row.tolist()
    assert [row.tolist() for row in batch.rows(batch.token_type_ids)] == types
    assert [row.tolist() for row in batch.rows(batch.position_ids)] == [list(range(n)) for n in lengths]
    padded = batch.pad(batch.input_ids)
    again = PackedBatch.from_padded(padded, lengths=lengths)
    assert torch.equal(again.input_ids, batch.input_ids)
    assert torch.equal(again.cu_seqlens, batch.cu_seqlens)
    assert not PackedBatch.from_sequences(sequences).token_type_ids.any()


def test_sequences_of_one_length_are_a_full_batch():
    batch = PackedBatch.from_sequences([[1, 2], [3, 4]])
    assert batch.indices is None
    assert batch.input_ids.tolist() == [1, 2, 3, 4]
    assert batch.position_ids.tolist() == [0, 1, 0, 1]


def test_sequences_of_nothing():
    batch = PackedBatch.from_sequences([[], []])
    assert batch.tokens == 0
    assert batch.cu_seqlens.tolist() == [0, 0, 0]
    assert batch.pad(torch.zeros(0, 3)).shape == (2, 1, 3)
    assert not batch.first(torch.zeros(0, 3)).any()


# ------------------------------------------------------------------------------------------------ devices, compilers


def test_to_moves_every_tensor():
    ids = torch.randint(50, (2, 4))
    batch = PackedBatch.from_padded(ids, torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]]))
    moved = batch.to("meta")
    assert moved.device.type == "meta"
    for name, value in vars(batch).items():
        other = getattr(moved, name)
        if isinstance(value, Tensor):
            assert other.is_meta, name
            assert other.shape == value.shape
        else:
            assert other == value


def test_a_fixed_capacity_never_looks_at_a_value():
    """On the meta device there are none: whatever asked for one would raise."""
    ids = torch.zeros(3, 5, dtype=torch.int64, device="meta")
    mask = torch.zeros(3, 5, device="meta")
    for options in ({"attention_mask": mask}, {}):
        batch = PackedBatch.from_padded(ids, capacity=9, **options)
        assert batch.input_ids.shape == batch.position_ids.shape == (9,)
        x = torch.zeros(9, 4, device="meta")
        assert batch.pad(x).shape == (3, 5, 4)
        assert batch.first(x).shape == (3, 4)
        assert batch.pad_attention(torch.zeros(3, 2, 5, 5, device="meta")).shape == (3, 2, 5, 5)


def test_a_fixed_capacity_compiles_to_one_graph_for_all_masks(device):
    graphs = []

    def backend(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(module)
        return module.forward

    def there_and_back(ids: Tensor, mask: Tensor, x: Tensor) -> tuple[Tensor, ...]:
        batch = PackedBatch.from_padded(ids, mask, capacity=12)
        packed = batch.pack(x, fill=0.0)
        return batch.pad(packed), batch.first(packed), batch.input_ids, batch.cu_seqlens

    torch._dynamo.reset()
    compiled = torch.compile(there_and_back, fullgraph=True, backend=backend)
    for _ in range(3):
        mask = torch.rand(3, 5, device=device) < 0.5
        mask[0, :3] = False  # at most 12 are left
        arguments = torch.randint(50, (3, 5), device=device), mask, torch.randn(3, 5, 2, device=device)
        for found, expected in zip(compiled(*arguments), there_and_back(*arguments), strict=True):
            assert torch.equal(found, expected)
    assert len(graphs) == 1


def test_a_full_batch_compiles(device):
    def there_and_back(ids: Tensor) -> Tensor:
        batch = PackedBatch.from_padded(ids)
        return batch.pad(batch.input_ids) + batch.pad(batch.position_ids)

    torch._dynamo.reset()
    compiled = torch.compile(there_and_back, fullgraph=True, backend="eager")
    for shape in ((3, 5), (3, 6), (2, 9)):
        ids = torch.randint(50, shape, device=device)
        assert torch.equal(compiled(ids), there_and_back(ids))


def test_a_batch_is_its_owners(device):
    """What is written to one that was packed is seen by no other, and by no model that packs for itself."""
    ids = torch.randint(1, 50, (2, 9), device=device)
    makers = (lambda: PackedBatch.from_padded(ids), lambda: PackedBatch.from_sequences(list(ids), device=device))
    shared = PackedBatch.from_padded(ids, shared=True)
    expected = [getattr(shared, name).clone() for name in ("cu_seqlens", "token_type_ids", "position_ids")]
    for make in makers:
        batch = make()
        for tensor in (batch.cu_seqlens, batch.token_type_ids, batch.position_ids):
            tensor.add_(1)
        for other in (shared, make(), PackedBatch.from_padded(ids, shared=True)):
            found = [other.cu_seqlens, other.token_type_ids, other.position_ids]
            assert all(map(torch.equal, found, expected))


# ------------------------------------------------------------------------------------------------------------ errors

IDS = torch.zeros(2, 4, dtype=torch.int64)
MASK = torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]])


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ({}, ValueError, "input_ids and inputs_embeds: exactly one"),
        ({"input_ids": IDS, "inputs_embeds": torch.zeros(2, 4, 3)}, ValueError, "exactly one"),
        ({"input_ids": IDS[0]}, ValueError, "input_ids is .* shape"),
        ({"input_ids": IDS.float()}, TypeError, "input_ids is float32"),
        ({"inputs_embeds": torch.zeros(2, 4)}, ValueError, "inputs_embeds is .* shape"),
        ({"input_ids": IDS, "attention_mask": MASK[:, :3]}, ValueError, "attention_mask is .* shape"),
        ({"input_ids": IDS, "attention_mask": MASK.to("meta")}, ValueError, "attention_mask is on meta"),
        ({"input_ids": IDS, "attention_mask": MASK, "lengths": [3, 1]}, ValueError, "at most one"),
        ({"input_ids": IDS, "lengths": [3]}, ValueError, r"lengths is \[3\]; 2 lengths from 0 to 4"),
        ({"input_ids": IDS, "lengths": [3, 5]}, ValueError, "lengths is "),
        ({"input_ids": IDS, "lengths": [3, -1]}, ValueError, "lengths is "),
        ({"input_ids": IDS, "token_type_ids": IDS[:, :3]}, ValueError, "token_type_ids is .* shape"),
        ({"input_ids": IDS, "token_type_ids": IDS.to("meta")}, ValueError, "token_type_ids is on meta"),
        ({"input_ids": IDS, "position_ids": IDS[:, :3]}, ValueError, "position_ids is .* shape"),
        ({"input_ids": IDS, "position_ids": IDS[0]}, ValueError, "position_ids is .* shape"),
        ({"input_ids": IDS, "position_ids": IDS.to("meta")}, ValueError, "position_ids is on meta"),
        ({"input_ids": IDS, "attention_mask": MASK, "capacity": 3}, ValueError, "capacity is 3"),
        ({"input_ids": IDS, "lengths": [3, 1], "capacity": 3}, ValueError, "capacity is 3"),
        ({"input_ids": IDS, "capacity": 7}, ValueError, "capacity is 7"),
        ({"input_ids": IDS, "capacity": -1}, ValueError, "capacity is -1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_argument_is_named(arguments, error, match):
    with pytest.raises(error, match=match):
        PackedBatch.from_padded(**arguments)


def test_wrong_sequences_are_named():
    with pytest.raises(ValueError, match="input_ids has no rows"):
        PackedBatch.from_sequences([])
    with pytest.raises(ValueError, match="token_type_ids has rows"):
        PackedBatch.from_sequences([[1, 2], [3]], [[0, 0], [0, 0]])
    with pytest.raises(ValueError, match="token_type_ids has rows"):
        PackedBatch.from_sequences([[1, 2], [3]], [[0, 0]])


def test_wrong_packed_tensors_are_named():
    batch = PackedBatch.from_padded(IDS, MASK)
    with pytest.raises(ValueError, match=r"x is .*4 tokens"):
        batch.pad(torch.zeros(5, 3))
    with pytest.raises(ValueError, match=r"x is .*4 tokens"):
        batch.pad(torch.tensor(1.0))
