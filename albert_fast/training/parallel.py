"""Several processes as one: who this process is, and the objective as PyTorch's own engines run it.

    torchrun --nproc-per-node 8 …        (one process without it)

    with parallel.start(tensor_ranks=2) as world:
        module = parallel.parallelize(objective, world, "fsdp")
        for last, batch in micro_batches:
            with parallel.accumulate(module, last):
                losses = module(batch).losses
                ((losses[0] / labels + losses[1] / rows) * world.data_ranks).backward()
        norm = parallel.gradient_norm(parameters)
        parallel.clip(parameters, norm, 1.0)

The world is a grid of data_ranks x tensor_ranks, neighbours in the second dimension: data ranks have different batches,
the tensor ranks of one data rank have the same ones and a part each of the encoder's layer (`tensor_parallel`). Random
numbers that the model draws must be the same on those: seed by `data_rank`, not by `rank`.

After a backward, `.grad` is the mean over the data ranks, as both engines have it: the loop multiplies its loss by
`data_ranks` and divides by counts of all ranks.

Which engine: "ddp" replicates weights, gradients and optimizer, which for ALBERT nearly always fits (xxlarge with LAMB
takes 3.6 GB). "fsdp" (FSDP2) divides them, as one unit: the layer serves every pass, and the word table two places. The
gradients of a shared layer are complete only at the end of backward, so that neither engine's communication overlaps
much of it.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel

from albert_fast.ops.checks import check
from albert_fast.training.objective import Objective
from albert_fast.training.sharded import like, local, norms
from albert_fast.training.tensor_parallel import check_tensor_ranks, divide

ENGINES = ("ddp", "fsdp")


# ----------------------------------------------------------------------------------------------------------- the world


@dataclass(frozen=True, eq=False)
class World:
    """This process among the others; as a context manager it stops at the end.

    Attributes:
        rank, size: of all processes.
        data_rank, data_ranks: which batches are this one's.
        tensor_ranks: how many have the same batches, and a part each of the layer.
        device: this process's own.
        mesh: the grid of dimensions ("data", "tensor"); None for one process.
        owns_group: whether `start` made the process group, so that `stop` is to end it.
    """

    rank: int
    size: int
    data_rank: int
    data_ranks: int
    tensor_ranks: int
    device: torch.device
    mesh: DeviceMesh | None
    owns_group: bool = False

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """`tensor` itself, summed in place over the data ranks."""
        if self.mesh is not None and self.data_ranks > 1:
            distributed.all_reduce(tensor, group=self.mesh.get_group("data"))
        return tensor

    def largest(self, value: float) -> float:
        """The largest of all ranks' values."""
        if self.size == 1:
            return value
        held = torch.tensor(value, dtype=torch.float64, device=self.device)
        distributed.all_reduce(held, op=distributed.ReduceOp.MAX)
        return held.item()

    def broadcast(self, value: float) -> float:
        """Rank 0's value."""
        if self.size == 1:
            return value
        held = torch.tensor(value, dtype=torch.float64, device=self.device)
        distributed.broadcast(held, src=0)
        return held.item()

    def barrier(self) -> None:
        """Returns when all ranks have come here."""
        if self.size > 1:
            distributed.barrier()

    def stop(self) -> None:
        """Ends the process group, if `start` made it."""
        if self.owns_group and distributed.is_initialized():
            distributed.destroy_process_group()

    def __enter__(self) -> World:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def start(device: str | None = None, tensor_ranks: int = 1) -> World:
    """Joins the processes that torchrun started; without it, and without a process group, there is one.

    A process group that is there already is used; torchrun's variables (RANK, WORLD_SIZE, LOCAL_RANK and the address)
    make one otherwise.

    Args:
        device: "cpu", or "cuda" for one GPU a process, by LOCAL_RANK; CUDA where there is one when None. One process
            may name its GPU, such as "cuda:1".
        tensor_ranks: how many neighbouring ranks divide the encoder's layer; a divisor of the number of processes.

    Raises:
        ValueError: an argument does not fit the machine or the number of processes.
    """
    name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device is {name!r}; cpu, cuda or one GPU such as cuda:1 was expected") from None
    joined = distributed.is_available() and distributed.is_initialized()
    size = distributed.get_world_size() if joined else int(os.environ.get("WORLD_SIZE", "1"))
    check(
        tensor_ranks >= 1 and size % tensor_ranks == 0,
        f"tensor_ranks is {tensor_ranks}; a divisor of the number of processes, {size}, was expected: torchrun "
        "--nproc-per-node sets that",
    )
    if size == 1:
        _check_found(chosen)
        return World(0, 1, 0, 1, 1, chosen, None)
    if chosen.type == "cuda":
        chosen = _own_gpu(chosen)
    if not joined:
        # gloo beside nccl: what lies in the CPU's memory is to be sent, too.
        backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
        distributed.init_process_group(backend, device_id=chosen if chosen.type == "cuda" else None)
    mesh = init_device_mesh(chosen.type, (size // tensor_ranks, tensor_ranks), mesh_dim_names=("data", "tensor"))
    return World(
        rank=distributed.get_rank(),
        size=size,
        data_rank=mesh.get_local_rank("data"),
        data_ranks=size // tensor_ranks,
        tensor_ranks=tensor_ranks,
        device=chosen,
        mesh=mesh,
        owns_group=not joined,
    )


def _check_found(chosen: torch.device) -> None:
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    there = " or ".join(["cpu", *(f"cuda:{index}" for index in range(gpus))])
    check(
        chosen.type != "cuda" or (chosen.index or 0) < gpus,
        f"device is {chosen} and PyTorch finds {gpus} GPUs here: give {there}",
    )


def _own_gpu(chosen: torch.device) -> torch.device:
    check(
        chosen.index is None,
        f"device is {chosen}, one GPU for several processes; 'cuda' was expected: each takes the GPU of its LOCAL_RANK",
    )
    index, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    check(
        index < gpus,
        f"LOCAL_RANK is {index} and this machine shows {gpus} GPUs: give torchrun --nproc-per-node {max(gpus, 1)}, or "
        "device 'cpu'",
    )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


# --------------------------------------------------------------------------------------------------------- the engines


def parallelize(objective: Objective, world: World, engine: str = "ddp", *, compress: bool = False) -> nn.Module:
    """The module to call in place of `objective`, which becomes a part of it, on the world's device.

    All ranks begin with rank 0's weights. Build the optimizer after this, of `named_parameters` or of the module: FSDP2
    and tensor parallelism put other parameters in place of the objective's.

    Args:
        engine: "ddp" or "fsdp". With tensor_ranks > 1 the data ranks use FSDP2 in any case: DistributedDataParallel
            takes no DTensors. One process needs neither.
        compress: DistributedDataParallel sends gradients in bfloat16, for slow networks. Nothing for one process.

    Raises:
        ValueError: an argument is not one of these, or the model cannot be divided; before any work.
    """
    check(engine in ENGINES, f"engine is {engine!r}; one of {', '.join(ENGINES)} was expected")
    check_tensor_ranks(objective.model.config, world.tensor_ranks)
    check(
        not compress or world.size == 1 or (engine == "ddp" and world.tensor_ranks == 1),
        f"compress is set with engine {engine!r} and {world.tensor_ranks} tensor ranks; it goes with 'ddp' and one: "
        "FSDP2 would also add up the micro-batches' gradients in bfloat16",
    )
    objective.to(world.device)
    if world.mesh is None:
        return objective
    with torch.no_grad():
        for tensor in (*objective.parameters(), *objective.buffers()):
            distributed.broadcast(tensor, src=0)
    if world.tensor_ranks > 1:
        divide(objective.model.albert, world.mesh["tensor"])
        engine = "fsdp"
    if world.data_ranks == 1:
        return objective
    if engine == "fsdp":
        # One unit, gathered once: the layer serves every pass, and a shared weight may not lie in two units.
        fully_shard(objective, mesh=world.mesh["data"], reshard_after_forward=False)
        objective.register_forward_hook(_let_go)
        return objective
    with warnings.catch_warnings():
        # Its new name is not known to older versions.
        warnings.filterwarnings("ignore", message=".*broadcast_buffers", category=FutureWarning)
        module = DistributedDataParallel(
            objective,
            process_group=world.mesh.get_group("data"),
            broadcast_buffers=False,
            init_sync=False,
            gradient_as_bucket_view=True,
        )
    if compress:
        module.register_comm_hook(module.process_group, _in_bfloat16)
    return module


# Without annotations: DistributedDataParallel compares them with classes, and they are strings here.
def _in_bfloat16(group, bucket):  # type: ignore[no-untyped-def]
    """As PyTorch's bf16_compress_hook, which refuses gloo."""
    buffer = bucket.buffer()
    sent = buffer.to(torch.bfloat16).div_(group.size())
    work = distributed.all_reduce(sent, group=group, async_op=True)
    return work.get_future().then(lambda done: buffer.copy_(done.value()[0]))


def _let_go(module: nn.Module, *_: object) -> None:
    """No backward will come to let go of the gathered weights, which would then stand in the parameters' place."""
    if not torch.is_grad_enabled():
        assert isinstance(module, FSDPModule)
        module.reshard()


def named_parameters(parallel: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters by the names that the model has without any engine, shared ones once: what a checkpoint is keyed
    by. They may be DTensors. Not for between a forward and its backward, while FSDP2 has others in their place."""
    objective = parallel.module if isinstance(parallel, DistributedDataParallel) else parallel
    assert isinstance(objective, Objective)
    return dict(objective.model.named_parameters())


@contextlib.contextmanager
def accumulate(parallel: nn.Module, last: bool) -> Iterator[None]:
    """Around forward and backward of one micro-batch: the ranks exchange gradients in the last one alone."""
    if isinstance(parallel, DistributedDataParallel):
        with contextlib.nullcontext() if last else parallel.no_sync():
            yield
    elif isinstance(parallel, FSDPModule):
        parallel.set_requires_gradient_sync(last)
        parallel.set_reshard_after_backward(last)  # the next micro-batch needs the gathered weights again
        try:
            yield
        finally:
            parallel.set_requires_gradient_sync(True)
            parallel.set_reshard_after_backward(True)
    else:
        yield


# ------------------------------------------------------------------------------------------------------- the gradients


def gradient_norm(parameters: Iterable[Tensor]) -> Tensor:
    """The 2-norm of all gradients together, a plain tensor of no dimensions in float32 at least.

    The same parameters must have gradients on all ranks; those without one count as zero.
    """
    chosen = [parameter for parameter in parameters if parameter.grad is not None]
    if not chosen:
        return torch.zeros(())
    gradients = [local(like(parameter.grad, parameter)) for parameter in chosen]
    widest = torch.float32
    for gradient in gradients:
        widest = torch.promote_types(widest, gradient.dtype)
    return torch.linalg.vector_norm(torch.stack(norms(gradients, chosen, widest)))


def clip(parameters: Iterable[Tensor], norm: Tensor, most: float) -> None:
    """Multiplies the gradients by min(1, most / norm), in place, as Google's clip_by_global_norm.

    Args:
        norm: what `gradient_norm` gave; it is not waited for. Gradients of a norm that is not finite become NaN.
    """
    gradients = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
    if gradients:
        torch._foreach_mul_(gradients, (most / norm).clamp(max=1.0))
