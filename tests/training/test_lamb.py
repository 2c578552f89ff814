"""LAMB against its formula, against timm's, and divided over two processes against one."""

import copy
import importlib.util
import math
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from albert_fast import AlbertConfig, AlbertForPreTraining
from albert_fast.training.lamb import Lamb, parameter_groups

SHAPE = {
    "vocab_size": 30,
    "embedding_size": 8,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_hidden_groups": 2,
    "max_position_embeddings": 12,
}


def albert(dtype=torch.float64):
    return AlbertForPreTraining(AlbertConfig(**SHAPE)).to(dtype)


def fresh_gradients(model, generator):
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)


def by_formula(weight, gradients, lr, *, betas=(0.9, 0.999), eps=1e-6, decay=0.01, adapt=True, correct=False):
    """The rule of this package's docstring, step by step, on one tensor."""
    w = weight.double()
    m, v = torch.zeros_like(w), torch.zeros_like(w)
    for t, gradient in enumerate(gradients, 1):
        g = gradient.double()
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        m_hat, v_hat = (m / (1 - betas[0] ** t), v / (1 - betas[1] ** t)) if correct else (m, v)
        u = m_hat / (v_hat.sqrt() + eps) + decay * w
        length, update = math.sqrt((w * w).sum()), math.sqrt((u * u).sum())
        ratio = length / update if adapt and length > 0 and update > 0 else 1.0
        w = w - lr * ratio * u
    return w


@pytest.mark.parametrize("adapt", [True, False])
@pytest.mark.parametrize("correct", [True, False])
@pytest.mark.parametrize("tensor_lr", [True, False])
def test_formula(adapt, correct, tensor_lr):
    weights = [torch.randn(shape, dtype=torch.float64) for shape in ((7, 5), (3,), (), (2, 3, 4), (0, 4))]
    gradients = [[torch.randn_like(weight) for _ in range(20)] for weight in weights]
    parameters = [nn.Parameter(weight.clone()) for weight in weights]
    lr = torch.tensor(0.02, dtype=torch.float64) if tensor_lr else 0.02
    optimizer = Lamb(parameters, lr=lr, weight_decay=0.1, adapt=adapt, bias_correction=correct)
    for step in range(20):
        for parameter, each in zip(parameters, gradients, strict=True):
            parameter.grad = each[step].clone()
        optimizer.step()
        assert all(
            torch.equal(parameter.grad, each[step]) for parameter, each in zip(parameters, gradients, strict=True)
        )
    for parameter, weight, each in zip(parameters, weights, gradients, strict=True):
        wanted = by_formula(weight, each, 0.02, decay=0.1, adapt=adapt, correct=correct)
        torch.testing.assert_close(parameter.detach(), wanted, rtol=1e-12, atol=1e-12)


def test_timm(monkeypatch):
    """Its file is imported without timm around it, which would ask for torchvision."""
    if (found := importlib.util.find_spec("timm")) is None:
        pytest.skip("timm is not installed")
    package = types.ModuleType("timm_optim")
    package.__path__ = [str(Path(found.origin).parent / "optim")]
    monkeypatch.setitem(sys.modules, "timm_optim", package)
    lamb = importlib.import_module("timm_optim.lamb")
    ours, generator = albert(), torch.Generator().manual_seed(torch.initial_seed() % 2**31)
    theirs = copy.deepcopy(ours)
    optimizer = Lamb(parameter_groups(ours, 0.01), lr=1.76e-2)
    options = {"bias_correction": False, "always_adapt": False, "max_grad_norm": None, "eps": 1e-6}
    groups = [{key: group[key] for key in ("params", "weight_decay")} for group in parameter_groups(theirs, 0.01)]
    oracle = lamb.Lamb(groups, lr=1.76e-2, **options)
    for _ in range(50):
        fresh_gradients(ours, generator)
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            other.grad = mine.grad.clone()
        optimizer.step()
        oracle.step()
    for (name, mine), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-12, msg=name)


def test_groups():
    model = albert()
    model.albert.pooler.requires_grad_(False)
    decayed, excluded = parameter_groups(model, 0.02)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert decayed["weight_decay"] == 0.02
    assert "adapt" not in decayed
    assert excluded["weight_decay"] == 0
    assert excluded["adapt"] is False
    left = {names[id(parameter)] for parameter in excluded["params"]}
    taken = {names[id(parameter)] for parameter in decayed["params"]}
    assert not left & taken
    assert left | taken == {name for name in names.values() if "pooler" not in name}
    assert "albert.encoder.albert_layer_groups.1.albert_layers.0.full_layer_layer_norm.weight" in left
    assert all(name.endswith((".bias", "LayerNorm.weight", "layer_norm.weight")) for name in left)
    for name in ("word_embeddings", "position_embeddings", "token_type_embeddings"):
        assert f"albert.embeddings.{name}.weight" in taken
    assert len(taken) == sum(1 for name in taken if name.endswith(".weight"))


def test_groups_by_the_module_and_by_the_name():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.normal = nn.LayerNorm(3)  # its name says nothing
            self.layer_norm_scale = nn.Parameter(torch.ones(3))  # its module says nothing
            self.linear = nn.Linear(3, 3, bias=False)

    model = Block()
    decayed, excluded = parameter_groups(model, 0.01)
    assert [id(parameter) for parameter in decayed["params"]] == [id(model.linear.weight)]
    assert len(excluded["params"]) == 3
    only_norms = parameter_groups(nn.LayerNorm(3), 0.01)
    assert only_norms[0]["params"] == []
    Lamb(only_norms)


def test_groups_of_transformers():
    transformers = pytest.importorskip("transformers")
    model = transformers.AlbertForPreTraining(transformers.AlbertConfig(**SHAPE))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    _, excluded = parameter_groups(model, 0.01)
    left = {names[id(parameter)] for parameter in excluded["params"]}
    assert left == {name for name in names.values() if name.endswith("bias") or "norm" in name.lower()}
    assert sum("full_layer_layer_norm.weight" in name for name in left) == 2


def test_excluded_are_plain_adam_without_decay():
    weight, gradients = torch.randn(6, dtype=torch.float64), [torch.randn(6, dtype=torch.float64) for _ in range(5)]
    layer = nn.LayerNorm(6, bias=False).double()
    with torch.no_grad():
        layer.weight.copy_(weight)
    optimizer = Lamb(parameter_groups(layer, 0.5), lr=0.1)
    for gradient in gradients:
        layer.weight.grad = gradient
        optimizer.step()
    wanted = by_formula(weight, gradients, 0.1, decay=0, adapt=False)
    torch.testing.assert_close(layer.weight.detach(), wanted, rtol=1e-13, atol=1e-13)
    assert optimizer.state[layer.weight]["step"] == 5


def test_zero_weights_and_zero_gradients():
    zero, still, gone = (nn.Parameter(torch.full((4,), value)) for value in (0.0, 2.0, 0.0))
    optimizer = Lamb([zero, still, gone], lr=0.5, weight_decay=0.0)
    zero.grad, still.grad, gone.grad = torch.ones(4), torch.zeros(4), torch.zeros(4)
    optimizer.step()
    assert torch.allclose(zero.detach(), torch.tensor(-0.5 * 0.1 / (math.sqrt(1e-3) + 1e-6)), rtol=1e-5)  # ratio 1
    assert torch.equal(still.detach(), torch.full((4,), 2.0))
    assert torch.equal(gone.detach(), torch.zeros(4))
    decayed = nn.Parameter(torch.full((4,), 2.0))
    decayed.grad = torch.zeros(4)
    Lamb([decayed], lr=0.5, weight_decay=0.01).step()
    assert torch.allclose(decayed.detach(), torch.tensor(1.0))  # u is 0.01 w, and the ratio takes that to w


def test_parameters_without_gradients():
    used, unused = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    used.grad = torch.ones(2)
    optimizer = Lamb([used, unused], lr=0.1)
    optimizer.step()
    assert torch.equal(unused.detach(), torch.ones(2))
    assert unused not in optimizer.state
    unused.grad = torch.ones(2)
    optimizer.step()  # the tensor's own first step
    assert optimizer.state[used]["step"] == 2
    assert optimizer.state[unused]["step"] == 1


def test_one_ratio_for_a_shared_matrix():
    """A matrix that two layers use has one name, one state and one norm."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Tanh(), nn.Linear(4, 4, bias=False)).double()
    model[2].weight = model[0].weight
    weight = model[0].weight.detach().clone()
    optimizer = Lamb(parameter_groups(model, 0.01), lr=0.1)
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 0]
    model(torch.randn(5, 4, dtype=torch.float64)).square().sum().backward()
    wanted = by_formula(weight, [model[0].weight.grad], 0.1)
    optimizer.step()
    torch.testing.assert_close(model[0].weight.detach(), wanted, rtol=1e-13, atol=1e-13)
    assert model[2].weight is model[0].weight


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype):
    weight = torch.randn(40, 30).to(dtype)
    parameter = nn.Parameter(weight.clone())
    optimizer = Lamb([parameter], lr=0.05)
    for _ in range(5):
        parameter.grad = torch.randn(40, 30).to(dtype)
        state = {name: value.clone() for name, value in optimizer.state[parameter].items()}
        before = nn.Parameter(parameter.detach().float())
        whole = Lamb([before], lr=0.05)
        if state:
            whole.state[before] = state
        before.grad = parameter.grad.float()
        optimizer.step()
        whole.step()
        assert torch.equal(parameter.detach(), before.detach().to(dtype))
        assert {value.dtype for value in optimizer.state[parameter].values()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_state_dict(dtype, tmp_path):
    generator = torch.Generator().manual_seed(torch.initial_seed() % 2**31)
    model = albert(dtype)
    optimizer = Lamb(parameter_groups(model, 0.01), lr=0.01)
    for _ in range(3):
        fresh_gradients(model, generator)
        optimizer.step()
    torch.save([model.state_dict(), optimizer.state_dict()], tmp_path / "run.pt")
    again = albert(dtype)
    resumed = Lamb(parameter_groups(again, 0.5), lr=1.0)
    weights, state = torch.load(tmp_path / "run.pt")
    again.load_state_dict(weights)
    resumed.load_state_dict(state)
    untouched = copy.deepcopy(state)
    for _ in range(3):
        fresh_gradients(model, generator)
        for mine, other in zip(model.parameters(), again.parameters(), strict=True):
            other.grad = mine.grad.clone()
        optimizer.step()
        resumed.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert state["param_groups"] == untouched["param_groups"]
    for key, values in untouched["state"].items():
        assert all(torch.equal(state["state"][key][name], value) for name, value in values.items())


def test_schedulers_and_closures():
    parameter = nn.Parameter(torch.ones(3))
    for lr in (0.1, torch.tensor(0.1)):
        optimizer = Lamb([parameter], lr=lr)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)

        def loss(optimizer=optimizer):
            optimizer.zero_grad()
            value = parameter.square().sum()
            value.backward()
            return value

        before = parameter.detach().clone()
        assert optimizer.step(loss) == before.square().sum()
        assert torch.all(parameter < before)
        scheduler.step()
        assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.05)
        optimizer.step(loss)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"lr": -1.0}, "lr is -1.0; a number of at least 0 was expected"),
        ({"lr": float("nan")}, "lr is nan"),
        ({"lr": torch.ones(2)}, r"lr is a tensor of shape \[2\]; one number"),
        ({"betas": (0.9, 1.0)}, r"betas is \(0.9, 1.0\); two numbers in \[0, 1\)"),
        ({"betas": (0.9,)}, "betas is"),
        ({"eps": -1e-9}, "eps is -1e-09"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1"),
    ],
)
def test_mistakes(options, says):
    with pytest.raises(ValueError, match=says):
        Lamb([nn.Parameter(torch.ones(2))], **options)
    with pytest.raises(ValueError, match=says):
        Lamb([{"params": [nn.Parameter(torch.ones(2))], **options}])


def test_tensors_of_other_kinds():
    with pytest.raises(ValueError, match="complex64"):
        Lamb([nn.Parameter(torch.ones(2, dtype=torch.complex64))])
    table = nn.Embedding(5, 3, sparse=True)
    optimizer = Lamb(table.parameters())
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match="build embeddings with sparse=False"):
        optimizer.step()


# Two processes.


class Small(nn.Module):
    """Shapes that two ranks cannot divide evenly, and one of which a rank has nothing."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(5, 7)
        self.LayerNorm = nn.LayerNorm(7)
        self.scale = nn.Parameter(torch.full((1,), 2.0))
        self.shared = nn.Linear(7, 7, bias=False)

    def forward(self, x):
        return self.scale * self.shared(self.shared(self.LayerNorm(self.linear(x))))


def train(model, optimizer, inputs):
    for each in inputs:
        optimizer.zero_grad()
        model(each).square().sum().backward()
        optimizer.step()


def two_processes(rank, folder):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,))
        torch.manual_seed(3)
        whole = Small().double()
        model = copy.deepcopy(whole)
        inputs = torch.randn(6, 4, 5, dtype=torch.float64)  # the same on both: the mean of equal gradients is theirs
        reference = Lamb(parameter_groups(whole, 0.05), lr=0.03)
        fully_shard(model, mesh=mesh, reshard_after_forward=False)
        optimizer = Lamb(parameter_groups(model, 0.05), lr=0.03)
        train(whole, reference, inputs[:3])
        train(model, optimizer, inputs[:3])

        # A checkpoint, and another model that goes on from it.
        state = get_optimizer_state_dict(model, optimizer)
        dcp.save({"optimizer": state}, checkpoint_id=f"{folder}/saved")
        torch.distributed.barrier()
        resumed = fully_shard(Small().double(), mesh=mesh, reshard_after_forward=False)
        with torch.no_grad():
            for mine, other in zip(resumed.parameters(), model.parameters(), strict=True):
                mine.to_local().copy_(other.to_local())
        resumed_optimizer = Lamb(parameter_groups(resumed, 0.05), lr=0.03)
        loaded = {"optimizer": get_optimizer_state_dict(resumed, resumed_optimizer)}
        dcp.load(loaded, checkpoint_id=f"{folder}/saved")
        set_optimizer_state_dict(resumed, resumed_optimizer, loaded["optimizer"])

        train(whole, reference, inputs[3:])
        train(resumed, resumed_optimizer, inputs[3:])
        for (name, parameter), wanted in zip(resumed.named_parameters(), whole.parameters(), strict=True):
            assert isinstance(parameter, DTensor)
            got = parameter.detach().full_tensor()
            torch.testing.assert_close(got, wanted.detach(), rtol=1e-12, atol=1e-12, msg=name)
            moment = resumed_optimizer.state[parameter]["exp_avg"]
            assert moment.placements == parameter.placements

        # Divided by columns, as tensor parallelism does, beside one that is not divided.
        weight, plain = torch.randn(3, 5, dtype=torch.float64), torch.randn(4, dtype=torch.float64)
        gradient = torch.randn(3, 5, dtype=torch.float64)
        columns = nn.Parameter(distribute_tensor(weight, mesh, [Shard(1)]))
        beside = nn.Parameter(plain.clone())
        columns.grad, beside.grad = distribute_tensor(gradient, mesh, [Shard(0)]), plain.clone()  # other places, too
        Lamb([columns, beside], lr=0.1).step()
        wanted = by_formula(weight, [gradient], 0.1)
        torch.testing.assert_close(columns.detach().full_tensor(), wanted, rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(beside.detach(), by_formula(plain, [plain], 0.1), rtol=1e-13, atol=1e-13)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.slow  # test_parallel.py does five steps of all engines
def test_two_processes(tmp_path):
    torch.multiprocessing.spawn(two_processes, (str(tmp_path),), nprocs=2)
