"""Several processes against one: engines, gradients, LAMB, checkpoints; by gloo."""

import copy
import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pretraining.test_examples import SIZE, VOCABULARY, random_store
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from albert_fast import AlbertConfig, AlbertForPreTraining, ops
from albert_fast.pretraining.examples import Batch, Batches, Examples
from albert_fast.pretraining.objective import MaskedLMObjective
from albert_fast.pretraining.plan import ExampleOptions
from albert_fast.training import parallel
from albert_fast.training.lamb import Lamb, parameter_groups
from albert_fast.training.sharded import local, norms, whole
from albert_fast.training.tensor_parallel import check_tensor_ranks

ROWS, MICRO_BATCHES, STEPS, MOST = 8, 2, 5, 0.3
SHAPE = {
    "vocab_size": SIZE,
    "embedding_size": 8,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "initializer_range": 0.1,
}
# (engine, tensor ranks) of two processes.
WAYS = {"ddp": ("ddp", 1), "fsdp": ("fsdp", 1), "tensor": ("ddp", 2)}


@functools.cache
def examples() -> Examples:
    store = random_store(np.random.default_rng(5), documents=30)
    return Examples(store, VOCABULARY, ExampleOptions(length=48, short_probability=0.5), seed=3)


def objective(dtype: torch.dtype = torch.float64, seed: int = 0, **changes: object) -> MaskedLMObjective:
    torch.manual_seed(seed)
    model = AlbertForPreTraining(AlbertConfig(**{**SHAPE, **changes}))
    return MaskedLMObjective(model, torch.ones(SIZE), mask_id=4).to(dtype)


def lamb(module: nn.Module) -> Lamb:
    return Lamb(parameter_groups(module, 0.05), lr=0.02)


def backward(module: nn.Module, batches: list[Batch], world: parallel.World, dtype=torch.float64) -> None:
    """Of one step: divided once by the counts of all micro-batches and ranks."""
    counts = torch.tensor(
        [sum((b.labels >= 0).sum() for b in batches), sum(b.rows for b in batches)], dtype=torch.float64
    )
    factors = world.data_ranks / world.sum(counts)
    for number, batch in enumerate(batches):
        with parallel.accumulate(module, number == len(batches) - 1):
            losses = module(batch).losses
            (losses * factors.to(dtype)).sum().backward()


def step(module: nn.Module, optimizer: Lamb, batches: list[Batch], world: parallel.World) -> torch.Tensor:
    optimizer.zero_grad()
    backward(module, batches, world)
    parameters = list(parallel.named_parameters(module).values())
    norm = parallel.gradient_norm(parameters)
    parallel.clip(parameters, norm, MOST)
    optimizer.step()
    return norm


ALONE = parallel.World(0, 1, 0, 1, 1, torch.device("cpu"), None)


def of_step(number: int, world: parallel.World, micro_batches: int = MICRO_BATCHES) -> list[Batch]:
    """This rank's micro-batches; all ranks' together are the same rows for any number of either."""
    parts = Batches(examples(), 0, ROWS // micro_batches, rank=world.data_rank, ranks=world.data_ranks)
    return [parts[number * micro_batches + micro] for micro in range(micro_batches)]


def assert_same(actual: dict, wanted: dict, tolerance: float, of: str) -> None:
    assert actual.keys() == wanted.keys()
    for name, value in wanted.items():
        got = whole(actual[name])
        torch.testing.assert_close(
            got, value.detach(), rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{of} {n}: {m}"
        )


def train_against_one(world: parallel.World, engine: str, tolerance: float = 1e-10) -> None:
    one = objective()
    optimizer_of_one = lamb(one)
    module = parallel.parallelize(copy.deepcopy(one) if world.rank == 0 else objective(seed=1), world, engine)
    optimizer = lamb(module)
    for number in range(STEPS):
        wanted = step(one, optimizer_of_one, of_step(number, ALONE, micro_batches=1), ALONE)
        norm = step(module, optimizer, of_step(number, world), world)
        assert type(norm) is torch.Tensor
        assert wanted > MOST
        torch.testing.assert_close(norm, wanted, rtol=tolerance, atol=0)
    names, of_one = parallel.named_parameters(module), parallel.named_parameters(one)
    assert_same(names, of_one, tolerance, engine)
    lengths = norms([local(p.detach()) for p in names.values()], list(names.values()))
    for name, length in zip(names, lengths, strict=True):
        torch.testing.assert_close(length, of_one[name].detach().norm(), rtol=tolerance, atol=tolerance)
    for name, parameter in names.items():
        moments, of_whole = optimizer.state[parameter], optimizer_of_one.state[of_one[name]]
        assert_same(moments, of_whole, tolerance, name)


def worlds_agree(rank: int) -> None:
    world, tensor = parallel.start("cpu"), parallel.start("cpu", tensor_ranks=2)
    assert (world.rank, world.size, world.data_rank, world.data_ranks, world.tensor_ranks) == (rank, 2, rank, 2, 1)
    assert (tensor.rank, tensor.size, tensor.data_rank, tensor.data_ranks, tensor.tensor_ranks) == (rank, 2, 0, 1, 2)
    assert world.is_main == (rank == 0)
    for each, wanted in ((world, 3), (tensor, rank + 1)):
        value = torch.tensor([rank + 1.0], dtype=torch.float64)
        assert each.sum(value) is value
        assert value == wanted
        assert each.largest(-0.5 - rank) == -0.5
        assert each.broadcast(0.1 + rank) == 0.1
        each.barrier()
        each.stop()  # the group is the test's
    assert torch.distributed.is_initialized()
    with pytest.raises(ValueError, match="tensor_ranks is 3; a divisor of the number of processes, 2"):
        parallel.start("cpu", 3)


def engines_are_as_one() -> None:
    for engine, tensor_ranks in WAYS.values():
        train_against_one(parallel.start("cpu", tensor_ranks), engine)


def norms_of_all_placements() -> None:
    mesh = parallel.start("cpu").mesh
    tensor = torch.arange(15, dtype=torch.float64).reshape(3, 5)
    pairs = [(Replicate(), Replicate()), (Shard(0), Replicate()), (Shard(1), Shard(0)), (Replicate(), Shard(1))]
    parameters = [nn.Parameter(distribute_tensor(tensor, mesh, places)) for places in pairs]
    parameters.append(nn.Parameter(tensor.clone()))
    for length in norms([local(parameter.detach()) for parameter in parameters], parameters):
        torch.testing.assert_close(length, tensor.norm(), rtol=1e-14, atol=0)
    for parameter in parameters:
        parameter.grad = distribute_tensor(tensor, mesh, pairs[1]) if isinstance(parameter, DTensor) else tensor.clone()
    total = parallel.gradient_norm(parameters)
    torch.testing.assert_close(total, 5**0.5 * tensor.norm(), rtol=1e-14, atol=0)
    parallel.clip(parameters, total, 1.0)
    torch.testing.assert_close(whole(parameters[2].grad), tensor / total, rtol=1e-14, atol=0)


def compressed_gradients_are_near() -> None:
    world = parallel.start("cpu")
    one = objective(torch.float32)
    wanted = gradients(one, of_step(0, ALONE, 1), ALONE, torch.float32)
    module = parallel.parallelize(copy.deepcopy(one), world, compress=True)
    for name, gradient in gradients(module, of_step(0, world, 1), world, torch.float32).items():
        error = (gradient - wanted[name]).norm() / (wanted[name].norm() + 1e-6)
        assert 1e-6 < error < 1e-2, f"{name}: {error}"


# --------------------------------------------------------------------------------------------------------- checkpoints


def tensors(module: nn.Module, optimizer: Lamb) -> dict[str, torch.Tensor]:
    optimizer.allocate()
    found: dict[str, torch.Tensor] = {}
    for name, parameter in parallel.named_parameters(module).items():
        found[f"model/{name}"] = parameter.detach()
        found |= {f"optimizer/{key}/{name}": value for key, value in optimizer.state[parameter].items()}
    return found


def goes_on(world: parallel.World, engine: str, before: str, after: str, number: int) -> dict[str, torch.Tensor]:
    """Another process that reads a checkpoint, makes a step and writes one; what it wrote."""
    module = parallel.parallelize(objective(seed=7), world, engine)
    optimizer = lamb(module)
    dcp.load(tensors(module, optimizer), checkpoint_id=before, no_dist=world.size == 1)
    step(module, optimizer, of_step(number, world), world)
    with torch.no_grad():
        module(of_step(0, world)[0])  # an evaluation, after which FSDP2 must not show the gathered weights
    found = tensors(module, optimizer)
    dcp.save(found, checkpoint_id=after, no_dist=world.size == 1)
    return found


def three_worlds_go_on(folder: str) -> None:
    for number, name in enumerate(("fsdp", "ddp", "tensor"), 1):
        engine, tensor_ranks = WAYS[name]
        world = parallel.start("cpu", tensor_ranks)
        found = goes_on(world, engine, f"{folder}/{number}", f"{folder}/{number + 1}", number)
        # Weights and two moments; of the layer's 16 tensors, ten.
        weights = sum(key.startswith("model/") for key in found)
        divided = sum(isinstance(tensor, DTensor) for tensor in found.values())
        assert divided == 3 * {"fsdp": weights, "ddp": 0, "tensor": 10}[name]


# -------------------------------------------------------------------------------------------------- tensor parallelism


def gradients(module: nn.Module, batches: list[Batch], world: parallel.World, dtype=torch.float64) -> dict:
    module.zero_grad()
    backward(module, batches, world, dtype)
    return {name: whole(p.grad) for name, p in parallel.named_parameters(module).items()}


def parts_of_layers() -> None:
    world = parallel.start("cpu", 2)
    batch = of_step(0, world)[0]
    # Several layers, with and without a fused activation, and all that backward may compute again.
    for activation in ("quick_gelu", "gelu_new"):
        one = objective(num_hidden_layers=2, num_hidden_groups=2, inner_group_num=2, hidden_act=activation)
        module = parallel.parallelize(copy.deepcopy(one), world)
        assert list(module.state_dict()) == list(one.state_dict())
        wanted = gradients(one, [batch], ALONE)
        for recompute in ("none", "ffn", "layer"):
            module.model.set_recompute(recompute)
            assert_same(gradients(module, [batch], world), wanted, 1e-10, f"{activation}, {recompute}")

    # All states, and a bias of each head's own.
    bias = torch.randn(batch.rows, 4, batch.max_seqlen, batch.max_seqlen, dtype=torch.float64)
    torch.distributed.broadcast(bias, 0)
    with torch.no_grad():
        of_one, divided = (o.model.albert(batch.packed(), bias, output_hidden_states=True) for o in (one, module))
    torch.testing.assert_close(divided.hidden_states, of_one.hidden_states, rtol=1e-10, atol=1e-10)
    with pytest.raises(ValueError, match="no rank has all heads"):
        module.model.albert(batch.packed(), output_attentions=True)


def bfloat16_is_as_near_as_in_one_process() -> None:
    world = parallel.start("cpu", 2)
    batches, dtype = of_step(0, world), torch.float32
    one = objective(dtype)
    module = parallel.parallelize(copy.deepcopy(one), world)
    exact = gradients(one, batches, ALONE, dtype)
    with torch.autocast("cpu", torch.bfloat16):
        of_one, divided = gradients(one, batches, ALONE, dtype), gradients(module, batches, world, dtype)
    for name, gradient in exact.items():
        error, allowed = ((each[name] - gradient).norm() for each in (divided, of_one))
        assert divided[name].dtype == dtype
        assert error <= 4 * allowed + 1e-6 * gradient.norm(), f"{name}: {error} and {allowed}"


def masks_of_tensor_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What all ranks have is dropped alike on each, and as one process does it; the heads' masks differ."""
    world = parallel.start("cpu", 2)
    one = objective(hidden_dropout_prob=0.2)
    module = parallel.parallelize(copy.deepcopy(one), world)
    torch.manual_seed(11)
    wanted = gradients(one, of_step(0, world), ALONE)
    torch.manual_seed(11)
    assert_same(gradients(module, of_step(0, world), world), wanted, 1e-10, "hidden dropout")
    dropped = objective(hidden_dropout_prob=0.2, attention_probs_dropout_prob=0.2)
    attention = dropped.model.albert.encoder.albert_layer_groups[0].albert_layers[0].attention
    with torch.no_grad():
        for linear in (attention.query, attention.key, attention.value):
            linear.weight[16:] = linear.weight[:16]  # the second rank's heads are the first one's
    module = parallel.parallelize(dropped, world)
    contexts: list[torch.Tensor] = []
    sites: list[int] = []
    attend = ops.attention

    def watched(*args: Any, **options: Any) -> torch.Tensor:
        sites.append(options["site"])
        contexts.append(attend(*args, **options))
        return contexts[-1]

    monkeypatch.setattr(ops, "attention", watched)
    torch.manual_seed(11)
    for name, gradient in gradients(module, of_step(0, world), world).items():
        of_first = gradient.clone()
        torch.distributed.broadcast(of_first, 0)
        assert torch.equal(gradient, of_first), name
    assert sites[:3] == [1, 3, 5]
    # Of the first pass, whose input is the same.
    first, second = contexts[0].detach().clone(), contexts[0].detach().clone()
    torch.distributed.broadcast(first, 0)
    torch.distributed.broadcast(second, 1)
    assert (first != second).any(dim=1).double().mean() > 0.9


def test_what_cannot_be_divided() -> None:
    world = parallel.World(0, 6, 0, 2, 3, torch.device("cpu"), None)
    with pytest.raises(ValueError, match="tensor_ranks is 3; a divisor of the model's 4 attention heads and of its 48"):
        parallel.parallelize(objective(), world)
    with pytest.raises(ValueError, match="tensor_ranks is 0"):
        check_tensor_ranks(AlbertConfig(**SHAPE), 0)
    with pytest.raises(ValueError, match="engine is 'zero'; one of ddp, fsdp"):
        parallel.parallelize(objective(), ALONE, "zero")
    two = parallel.World(0, 2, 0, 2, 1, torch.device("cpu"), None)
    with pytest.raises(ValueError, match="compress is set with engine 'fsdp' and 1 tensor ranks"):
        parallel.parallelize(objective(), two, "fsdp", compress=True)


# ------------------------------------------------------------------------------------------------ the processes' tests


def two_processes(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    try:
        worlds_agree(rank)
        norms_of_all_placements()
        engines_are_as_one()
        compressed_gradients_are_near()
        three_worlds_go_on(folder)
        parts_of_layers()
        bfloat16_is_as_near_as_in_one_process()
        with pytest.MonkeyPatch.context() as monkeypatch:
            masks_of_tensor_ranks(monkeypatch)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_two_processes(tmp_path: Path) -> None:
    """All that two are asked, since to start them takes most of the time. Beside it: one process, FSDP2,
    DistributedDataParallel, tensor parallelism and one process again, each from the checkpoint of the one before, are
    as one process that went on."""
    one = objective()
    optimizer = lamb(one)
    step(one, optimizer, of_step(0, ALONE), ALONE)
    dcp.save(tensors(one, optimizer), checkpoint_id=tmp_path / "1", no_dist=True)
    torch.multiprocessing.spawn(two_processes, (str(tmp_path),), nprocs=2)
    last = goes_on(ALONE, "ddp", f"{tmp_path}/4", f"{tmp_path}/5", 4)
    for number in range(1, 5):
        step(one, optimizer, of_step(number, ALONE), ALONE)
    assert_same(last, tensors(one, optimizer), 1e-10, "after five steps")


def four_processes() -> None:
    torch.set_num_threads(1)
    with parallel.start("cpu", tensor_ranks=2) as world:
        assert (world.data_rank, world.data_ranks) == (world.rank // 2, 2)
        train_against_one(world, "ddp")
    assert not torch.distributed.is_initialized()


@pytest.mark.slow
def test_a_grid_of_two_by_two() -> None:
    """FSDP2 over tensor parallelism, matrices divided twice; by torchrun."""
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    tests = Path(__file__).resolve().parents[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*run, "-m", "training.test_parallel"], cwd=tests, env=environment, check=True, timeout=600)


# --------------------------------------------------------------------------------------------------------- one process


def test_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with parallel.start("cpu") as world:
        assert not torch.distributed.is_initialized()
        assert (world.rank, world.size, world.data_ranks, world.mesh, world.is_main) == (0, 1, 1, None, True)
        value = torch.ones(2)
        assert world.sum(value) is value
        assert (world.largest(2.5), world.broadcast(-1.0)) == (2.5, -1.0)
        world.barrier()
        one = objective()
        assert parallel.parallelize(one, world, "fsdp", compress=True) is one
        assert list(parallel.named_parameters(one)) == [name for name, _ in one.model.named_parameters()]
    with pytest.raises(ValueError, match="tensor_ranks is 2; a divisor of the number of processes, 1"):
        parallel.start("cpu", 2)
    with pytest.raises(ValueError, match="device is 'foo'; cpu, cuda or one GPU"):
        parallel.start("foo")
    with pytest.raises(ValueError, match=r"device is cuda:99 and PyTorch finds \d+ GPUs here: give "):
        parallel.start("cuda:99")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="device is cuda:1, one GPU for several processes"):
        parallel.start("cuda:1")
    monkeypatch.setenv("LOCAL_RANK", "99")
    with pytest.raises(ValueError, match="LOCAL_RANK is 99 and this machine shows"):
        parallel.start("cuda")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_norm_and_clipping(dtype: torch.dtype) -> None:
    parameters = [nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in ((7, 5), (3,), (), (0, 4), (2,))]
    for parameter in parameters[:-1]:
        parameter.grad = torch.randn_like(parameter)
    before = [parameter.grad.clone() for parameter in parameters[:-1]]
    norm = parallel.gradient_norm(iter(parameters))
    assert norm.dtype == torch.promote_types(dtype, torch.float32)
    wanted = torch.cat([gradient.double().flatten() for gradient in before]).norm()
    torch.testing.assert_close(norm.double(), wanted, rtol=1e-6, atol=0)
    parallel.clip(parameters, norm, float(norm) * 1.01)
    assert all(torch.equal(p.grad, gradient) for p, gradient in zip(parameters, before, strict=False))
    parallel.clip(parameters, norm, float(norm) / 4)
    for parameter, gradient in zip(parameters, before, strict=False):
        torch.testing.assert_close(parameter.grad, gradient / 4)
    assert parameters[-1].grad is None
    assert parallel.gradient_norm(parameters[-1:]) == 0
    parallel.clip(parameters[-1:], torch.zeros(()), 1.0)
    for parameter in parameters[:-1]:
        parameter.grad.zero_()
    parallel.clip(parameters, parallel.gradient_norm(parameters), 1.0)
    assert all(not parameter.grad.any() for parameter in parameters[:-1])


if __name__ == "__main__":
    four_processes()
