"""Which backend serves a call: forced, best first, and with its own functions in both directions."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from ops.parity import assert_all_close, differentiate, offsets
from torch import Tensor

from albert_fast import backends
from albert_fast import ops as operations
from albert_fast.backends import OPERATIONS, REFERENCE, Backend, BackendError, Call

CPU = torch.device("cpu")
CALL = Call("attention", CPU, torch.float32, head_dim=64)


def fake(
    name: str = "fake",
    unavailable: str | None = None,
    declines: Callable[[Call], str | None] = lambda call: None,
    load: Callable[[], Any] = dict,
) -> Backend:
    return Backend(name, lambda: unavailable, declines, load)


@pytest.fixture
def offered(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes these the backends of the test, before the reference; nothing is forced."""

    def offer(*fakes: Backend) -> None:
        monkeypatch.setattr(backends, "BACKENDS", [*fakes, REFERENCE])

    monkeypatch.delenv("ALBERT_FAST_BACKEND", raising=False)
    return offer


# ----------------------------------------------------------------------------------------------------------- the choice


def test_the_best_that_serves_is_chosen(offered):
    best, second = fake("best"), fake("second")
    offered(best, second)
    assert backends.choose(CALL) is best
    assert not backends.uses_reference(CALL)
    offered(replace(best, unavailable=lambda: "no compiler: install g++"), second)
    assert backends.choose(CALL) is second
    offered(replace(best, declines=lambda call: "head sizes up to 32"), second)
    assert backends.choose(CALL) is second


def test_forward_mode_derivatives_are_the_references(offered, monkeypatch):
    """Others' kernels would give none, as if nothing depended on anything."""
    offered(fake("best"))
    with torch.autograd.forward_ad.dual_level():
        assert backends.uses_reference(CALL)
        monkeypatch.setenv("ALBERT_FAST_BACKEND", "best")
        with pytest.raises(BackendError, match=r"cannot serve attention .*forward-mode derivatives"):
            backends.choose(CALL)
    assert backends.choose(CALL).name == "best"
    monkeypatch.delenv("ALBERT_FAST_BACKEND")
    x, bias, tangent = torch.randn(3, 8), torch.randn(8), torch.randn(3, 8)
    monkeypatch.undo()
    _, actual = torch.func.jvp(lambda x: operations.bias_gelu(x, bias, approximate="tanh"), (x,), (tangent,))
    _, expected = torch.func.jvp(lambda x: torch.nn.functional.gelu(x + bias, approximate="tanh"), (x,), (tangent,))
    torch.testing.assert_close(actual, expected)


def test_the_reference_is_the_last_resort(offered):
    offered(fake(unavailable="no driver"), fake(declines=lambda call: "never"))
    assert backends.choose(CALL) is REFERENCE
    assert backends.uses_reference(CALL)
    offered()
    assert backends.choose(CALL) is REFERENCE


def test_a_backend_is_told_of_the_call_and_asked_only_where_it_is_available(offered):
    asked = []

    def declines(call: Call) -> str | None:
        asked.append(call)
        return None if call.dtype == torch.bfloat16 and call.head_dim == 64 else "bfloat16 with heads of 64 only"

    offered(fake(declines=declines))
    assert backends.choose(CALL) is REFERENCE
    assert backends.choose(replace(CALL, dtype=torch.bfloat16)).name == "fake"
    assert backends.choose(replace(CALL, dtype=torch.bfloat16, head_dim=32)) is REFERENCE
    assert asked[0] is CALL
    asked.clear()
    offered(fake(unavailable="no library", declines=declines))
    backends.choose(CALL)
    assert asked == []


def test_nothing_is_loaded_before_it_is_used(offered):
    def load() -> Any:
        raise AssertionError("loaded")

    offered(fake(load=load))
    assert backends.choose(CALL).name == "fake"
    backends.report(CPU)
    with pytest.raises(AssertionError, match="loaded"):
        backends.implementation("attention", CALL)


def test_every_operation_has_a_reference_in_both_directions():
    names = {name + half for name in OPERATIONS for half in ("", "_backward")} | {"encoder_inference"}
    assert set(REFERENCE.load()) == names
    assert backends.BACKENDS[-1] is REFERENCE
    assert set(OPERATIONS) <= set(vars(operations))


# ------------------------------------------------------------------------------------------------------------- by force


def test_an_unknown_name_is_answered_with_the_known(offered, monkeypatch):
    offered(fake("first"), fake("second"))
    monkeypatch.setenv("ALBERT_FAST_BACKEND", "frist")
    with pytest.raises(BackendError, match=r"'frist'.*first, second, reference"):
        backends.choose(CALL)


def test_the_forced_one_serves_though_it_is_not_the_best(offered, monkeypatch):
    offered(fake("best"), fake("second"))
    monkeypatch.setenv("ALBERT_FAST_BACKEND", "second")
    assert backends.choose(CALL).name == "second"
    monkeypatch.setenv("ALBERT_FAST_BACKEND", "reference")
    assert backends.choose(CALL) is REFERENCE


def test_the_forced_one_raises_where_it_cannot_serve(offered, monkeypatch):
    offered(fake("picky", declines=lambda call: "heads of 32 only"), fake("broken", unavailable="no g++"))
    monkeypatch.setenv("ALBERT_FAST_BACKEND", "picky")
    with pytest.raises(BackendError, match=r"picky cannot serve attention \(torch.float32, cpu\): heads of 32"):
        backends.choose(CALL)
    monkeypatch.setenv("ALBERT_FAST_BACKEND", "broken")
    with pytest.raises(BackendError, match=r"broken cannot serve attention .*: no g"):
        backends.choose(CALL)
    with pytest.raises(BackendError, match="broken"):
        CALLS["attention"][0](**CALLS["attention"][1]())


# -------------------------------------------------------------------------------------------------------- in every call


def attention_inputs() -> dict[str, Tensor]:
    return {"qkv": torch.randn(8, 3, 2, 4)}


def norm_inputs() -> dict[str, Tensor]:
    matrices = {name: torch.randn(8, 6) for name in ("x", "residual")}
    return matrices | {name: torch.randn(6) for name in ("bias", "weight", "ln_bias")}


def embedding_inputs() -> dict[str, Tensor]:
    tensors = {name: torch.randint(3, (8,)) for name in ("inputs", "position_ids", "token_type_ids")}
    tensors |= {name: torch.randn(3, 6) for name in ("word", "position", "token_type")}
    return tensors | {"weight": torch.randn(6), "bias": torch.randn(6)}


def encoder_inputs() -> dict[str, Tensor]:
    shapes = [(6, 6), (6,)] * 4 + [(6,), (6,), (9, 6), (9,), (6, 9), (6,), (6,), (6,)]
    return {"hidden": torch.randn(8, 6), **{f"p{i}": torch.randn(shape) for i, shape in enumerate(shapes)}}


def loss_inputs() -> dict[str, Tensor]:
    shapes = {"x": (8, 4), "table": (7, 4), "bias": (7,)}
    return {name: torch.randn(shape) for name, shape in shapes.items()} | {"labels": torch.randint(7, (8,))}


def run_attention(qkv: Tensor, **options: Any) -> Tensor:
    return operations.attention(qkv, offsets([5, 3]), 5, **options)


def run_encoder(hidden: Tensor, **arguments: Any) -> Tensor:
    parameters = [arguments.pop(f"p{i}") for i in range(16)]
    options = {"num_layers": 2, "num_heads": 2, "eps": 1e-12, **arguments}
    return operations.encoder(hidden, parameters, offsets([5, 3]), 5, **options)


# For each operation: a function of its tensors, and tensors.
CALLS: dict[str, tuple[Callable[..., Tensor], Callable[[], dict[str, Tensor]]]] = {
    "attention": (run_attention, attention_inputs),
    "bias_gelu": (operations.bias_gelu, lambda: {"x": torch.randn(5, 6), "bias": torch.randn(6)}),
    "dropout_add_layer_norm": (partial(operations.dropout_add_layer_norm, eps=1e-12), norm_inputs),
    "embed_layer_norm": (partial(operations.embed_layer_norm, eps=1e-12), embedding_inputs),
    "encoder": (run_encoder, encoder_inputs),
    "masked_lm_loss": (operations.masked_lm_loss, loss_inputs),
}


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("compiled", [False, True], ids=["", "compiled"])
def test_the_functions_of_the_chosen_backend_are_called(operation, compiled, offered):
    function, inputs = CALLS[operation]
    tensors, called = inputs(), []
    offered()
    expected = differentiate(function, tensors)

    def noted(name: str) -> Callable[..., Any]:
        def implementation(*args: Any) -> Any:
            called.append(name)
            return REFERENCE.load()[name](*args)

        return implementation

    offered(
        fake(
            declines=lambda call: None if call.operation == operation else "another operation",
            load=lambda: {name: noted(name) for name in (operation, f"{operation}_backward")},
        )
    )
    if compiled:
        torch._dynamo.reset()
        function = torch.compile(function, fullgraph=True, backend="aot_eager")
    # p3 is the bias of the keys, whose gradient is zero but for rounding.
    assert_all_close(differentiate(function, tensors), expected, 1e-4, scales={"p3": 1.0})
    assert called == [operation, f"{operation}_backward"]


@pytest.mark.parametrize(
    ("operation", "dropout_p"),
    [
        *[pytest.param(operation, 0.0, id=operation) for operation in OPERATIONS],
        *[
            pytest.param(operation, 0.1, id=f"{operation}, dropout", marks=marks)
            for operation, marks in (
                ("attention", ()),
                ("dropout_add_layer_norm", ()),
                ("embed_layer_norm", pytest.mark.slow),
                ("encoder", pytest.mark.slow),
            )
        ],
    ],
)
def test_compiled_with_every_number_dynamic(operation, dropout_p, offered):
    """torch.compile(dynamic=True): sizes and Python's numbers, probabilities too, are symbols from the first call
    on."""
    function, inputs = CALLS[operation]
    options: dict[str, Any] = {}
    if operation in ("attention", "dropout_add_layer_norm", "embed_layer_norm"):
        options = {"dropout_p": dropout_p, "seed": torch.tensor(7), "site": 3}
    elif operation == "encoder":
        options = {"attention_dropout_p": dropout_p, "hidden_dropout_p": dropout_p, "seed": torch.tensor(7)}
    offered()
    torch._dynamo.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=True)
    tensors = inputs()
    results = [differentiate(partial(f, **options), tensors) for f in (compiled, function)]
    assert_all_close(*results, 1e-4, scales={"p3": 1.0})


@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_call_tells_device_dtype_and_sizes(operation, offered):
    seen = []

    def declines(call: Call) -> str:
        seen.append(call)
        return "only looking"

    function, inputs = CALLS[operation]
    offered(fake(declines=declines))
    function(**inputs())
    call = next(call for call in seen if call.operation == operation)
    assert (call.device, call.dtype) == (CPU, torch.float32)
    assert call.head_dim == {"attention": 4, "encoder": 3}.get(operation)
    assert call.activation == {"encoder": "gelu_new"}.get(operation)


# ----------------------------------------------------------------------------------------------------------- the report


def test_the_report_says_who_serves_and_why_the_others_do_not(offered):
    def declines(call: Call) -> str | None:
        return None if call.operation == "attention" else "attention only"

    offered(fake("broken", unavailable="no compiler: install g++"), fake("picky", declines=declines))
    rows = backends.report(CPU)
    assert [name for name, _, _ in rows] == list(OPERATIONS)
    for name, chosen, others in rows:
        assert chosen == ("picky" if name == "attention" else "reference")
        assert others["broken"] == "no compiler: install g++"
        assert others.get("picky") == (None if name == "attention" else "attention only")
        assert chosen not in others


def test_compiling_warns_of_nothing_here():
    """In a fresh process: PyTorch says only once that it looks through a functools.cache."""
    program = """
import torch, albert_fast
config = albert_fast.AlbertConfig(
    vocab_size=50, embedding_size=8, hidden_size=16, num_attention_heads=2, intermediate_size=24, num_hidden_layers=2
)
ids = torch.randint(50, (2, 9))
mask = (torch.arange(9) < torch.tensor([[9], [4]])).long()
labels = ids.where(mask == 1, -100)
model = torch.compile(albert_fast.AlbertForMaskedLM(config), backend="aot_eager", fullgraph=True)
model(ids[:1], labels=ids[:1]).loss.backward()
torch.compile(albert_fast.AlbertForMaskedLM(config), backend="aot_eager")(ids, mask, labels=labels).loss.backward()
"""
    command = [sys.executable, "-W", "error:Dynamo detected:UserWarning", "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
