"""Small ALBERTs of transformers, and all that a call of one gives, for the tests of albert_fast.hf."""

import copy

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers", minversion="4.57")

from ops.parity import relative_error  # noqa: E402

from albert_fast.hf import accelerate, explain  # noqa: E402
from albert_fast.hf.guards import TRANSFORMERS_5  # noqa: E402

transformers_5 = pytest.mark.skipif(not TRANSFORMERS_5, reason="transformers 4 does not have it")

SIZES = {
    "vocab_size": 60,
    "embedding_size": 16,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "initializer_range": 0.3,  # attention is nearly uniform with transformers' 0.02
    "classifier_dropout_prob": 0.0,
}
LENGTHS = (11, 4, 1)
MASK = torch.arange(11) < torch.tensor(LENGTHS)[:, None]


def config(**changes) -> "transformers.AlbertConfig":
    return transformers.AlbertConfig(**{**SIZES, **changes})


def model(
    kind: type | None = None, implementation: str = "sdpa", dtype: torch.dtype = torch.float64, **changes
) -> nn.Module:
    kind = kind or transformers.AlbertModel
    made = kind._from_config(config(**changes), attn_implementation=implementation).to(dtype).eval()
    for parameter in made.parameters():  # biases and LayerNorms of more than zeros and ones
        parameter.data += 0.1 * torch.randn_like(parameter)
    return made


def ids() -> Tensor:
    return torch.randint(5, SIZES["vocab_size"], (3, 11))


def fast_of(stock: nn.Module, **options) -> nn.Module:
    return accelerate(copy.deepcopy(stock), **options)


def served(fast: nn.Module, **inputs) -> bool:
    return [path.refusal for path in explain(fast, **inputs)] == [None]


def results(some: nn.Module, inputs: dict[str, Tensor], weight: Tensor | None = None) -> dict[str, Tensor]:
    """Real positions of the hidden states, logits, the loss, and the gradient of every parameter."""
    mask = inputs["attention_mask"].bool().flatten(0, -2)
    output = some(**inputs, output_hidden_states=True)
    found = {}
    for name, value in output.items():
        if name == "hidden_states":
            found |= {f"hidden_states {i}": state[mask] for i, state in enumerate(value)}
        else:
            found[name] = value[mask] if value.shape[:2] == mask.shape else value
    loss = found.get("loss")
    if loss is None:
        slopes = {name: torch.linspace(-1, 1, value.numel()).to(value).view_as(value) for name, value in found.items()}
        loss = sum((value * slopes[name]).sum() for name, value in found.items())
    named = dict(some.named_parameters())
    grads = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    found |= {name: torch.zeros_like(p) if g is None else g for (name, p), g in zip(named.items(), grads, strict=True)}
    return {name: value.detach() for name, value in found.items()}


# Whose gradients are zero but for rounding, and those that show its scale: a softmax does not see a common addend.
ROUNDING_ONLY = {"key.bias": "query.bias"}


def assert_equal(
    actual: dict[str, Tensor],
    expected: dict[str, Tensor],
    tolerance: float = 1e-9,
    rounding_only: dict[str, str] = ROUNDING_ONLY,
) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        shown_by = [name.replace(one, other) for one, other in rounding_only.items() if one in name]
        scale = expected[shown_by[0]].norm().item() if shown_by else None
        assert relative_error(actual[name], value, scale) <= tolerance, name


# What each head is given beside the tokens.
HEADS = {
    "AlbertModel": {},
    "AlbertForMaskedLM": {"labels": torch.where(MASK & (torch.arange(33).view(3, 11) % 3 == 0), 7, -100)},
    "AlbertForPreTraining": {"labels": torch.where(MASK, 7, -100), "sentence_order_label": torch.tensor([0, 1, 0])},
    "AlbertForSequenceClassification": {"labels": torch.tensor([0, 1, 0])},
    "AlbertForTokenClassification": {"labels": torch.where(MASK, 1, -100)},
    "AlbertForQuestionAnswering": {
        "start_positions": torch.tensor([3, 1, 0]),
        "end_positions": torch.tensor([7, 3, 0]),
    },
    "AlbertForMultipleChoice": {"labels": torch.tensor([2])},
}


def inputs_of(head: str) -> dict[str, Tensor]:
    inputs = {"input_ids": ids(), "attention_mask": MASK, "token_type_ids": torch.randint(2, (3, 11))}
    if (
        head == "AlbertForQuestionAnswering"
    ):  # where transformers' softmax sees the padding, and this package's does not
        inputs["attention_mask"] = torch.ones_like(MASK)
    if head == "AlbertForMultipleChoice":
        inputs = {name: value[None] for name, value in inputs.items()}
    return {**inputs, **HEADS[head]}
