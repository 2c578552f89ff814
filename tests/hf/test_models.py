"""The same-named classes, and the Auto classes that make them."""

import copy
import pickle

import pytest
import torch

from albert_fast import hf
from albert_fast.hf import accelerate, explain, register, restore, unregister
from hf.albert import HEADS, MASK, config, ids, inputs_of, model, served, transformers

NAMES = [name for name in hf.__all__ if name.startswith("Albert")]
AUTO = {
    "AutoModel": "AlbertModel",
    "AutoModelForPreTraining": "AlbertForPreTraining",
    "AutoModelForMaskedLM": "AlbertForMaskedLM",
    "AutoModelForSequenceClassification": "AlbertForSequenceClassification",
    "AutoModelForTokenClassification": "AlbertForTokenClassification",
    "AutoModelForQuestionAnswering": "AlbertForQuestionAnswering",
    "AutoModelForMultipleChoice": "AlbertForMultipleChoice",
}


@pytest.mark.parametrize("name", NAMES)
def test_checkpoints_go_both_ways(name, tmp_path):
    stock = model(getattr(transformers, name), dtype=torch.float32)
    stock.save_pretrained(tmp_path / "stock")
    fast = getattr(hf, name).from_pretrained(tmp_path / "stock").eval()
    assert isinstance(fast, getattr(transformers, name))
    assert list(fast.state_dict()) == list(stock.state_dict())
    inputs = {key: value for key, value in inputs_of(name).items() if key in ("input_ids", "token_type_ids")}
    assert served(fast, **inputs)
    torch.testing.assert_close(fast(**inputs)[0], stock(**inputs)[0], rtol=1e-4, atol=1e-4)

    fast.save_pretrained(tmp_path / "fast")
    back, notes = getattr(transformers, name).from_pretrained(tmp_path / "fast", output_loading_info=True)
    assert type(back) is getattr(transformers, name)
    assert back.config.architectures == [name]
    assert not any(notes.values())
    assert "auto_map" not in back.config.to_dict()
    for key, value in stock.state_dict().items():
        assert torch.equal(back.state_dict()[key], value), key


def test_every_class_of_transformers_is_there():
    public = transformers.models.albert.modeling_albert.__all__
    assert {name for name in public if name != "AlbertPreTrainedModel"} >= set(NAMES)
    assert set(NAMES) == set(HEADS)


def test_a_subclass_as_in_speech():
    class CustomAlbert(hf.AlbertModel):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs).last_hidden_state

    custom, input_ids = CustomAlbert(config()).eval(), ids()
    assert served(custom, input_ids=input_ids)
    stock = transformers.AlbertModel(config()).eval()
    stock.load_state_dict(custom.state_dict())
    hidden = custom(input_ids, attention_mask=MASK)
    expected = stock(input_ids, attention_mask=MASK).last_hidden_state
    torch.testing.assert_close(hidden[MASK], expected[MASK], rtol=1e-4, atol=1e-4)


def test_options_and_undoing():
    fast, input_ids = hf.AlbertForMaskedLM(config()).eval(), ids()
    accelerate(fast, strict=True)
    fast.albert.encoder.albert_layer_groups[0].albert_layers[0].ffn.register_forward_hook(lambda m, a, o: o)
    with pytest.raises(hf.NotAcceleratedError):
        fast(input_ids)
    restore(fast)
    assert "not accelerated" in explain(fast)[0].refusal
    assert fast(input_ids).logits.shape == (3, 11, 60)


def test_copies_and_pickles():
    fast, input_ids = hf.AlbertForMaskedLM(config()).eval(), ids()
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        assert type(other) is hf.AlbertForMaskedLM
        assert served(other, input_ids=input_ids)
        assert torch.equal(other(input_ids, labels=input_ids).loss, fast(input_ids, labels=input_ids).loss)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_in_half_precision(dtype, tmp_path):
    stock = model(transformers.AlbertForMaskedLM, dtype=dtype, initializer_range=0.1)
    stock.save_pretrained(tmp_path)
    fast = hf.AlbertForMaskedLM.from_pretrained(tmp_path, dtype=dtype).eval()
    assert fast.dtype == dtype
    input_ids = ids()
    exact = copy.deepcopy(stock).double()(input_ids).logits
    ours, theirs = ((some(input_ids).logits.double() - exact).norm() for some in (fast, stock))
    assert ours <= 2 * theirs


@pytest.fixture
def registered():
    register()
    register()  # twice is as once
    yield
    unregister()


@pytest.mark.parametrize("auto", AUTO)
def test_auto_classes(auto, registered, tmp_path):
    made = getattr(transformers, auto).from_config(config())
    assert type(made) is getattr(hf, AUTO[auto])
    made.save_pretrained(tmp_path)
    assert type(getattr(transformers, auto).from_pretrained(tmp_path)) is getattr(hf, AUTO[auto])
    unregister()
    assert type(getattr(transformers, auto).from_pretrained(tmp_path)) is getattr(transformers, AUTO[auto])


def test_what_was_registered_before_comes_back():
    class Own(transformers.AlbertModel):
        pass

    mapping = transformers.AutoModel._model_mapping._extra_content
    transformers.AutoModel.register(transformers.AlbertConfig, Own, exist_ok=True)
    try:
        register()
        assert type(transformers.AutoModel.from_config(config())) is hf.AlbertModel
        unregister()
        unregister()
        assert type(transformers.AutoModel.from_config(config())) is Own
    finally:
        mapping.pop(transformers.AlbertConfig, None)


# ------------------------------------------------------------------------------------------- recomputing in backward


@pytest.mark.parametrize("door", ["class", "in place"])
def test_gradient_checkpointing(door):
    fast = hf.AlbertForMaskedLM(config()) if door == "class" else accelerate(model(dtype=torch.float32))
    fast.train()
    input_ids = ids()

    def gradients():
        return torch.autograd.grad(fast(input_ids)[0].square().mean(), list(fast.parameters()), allow_unused=True)

    before = gradients()
    kept = kept_bytes(fast, input_ids)
    fast.gradient_checkpointing_enable()
    accelerate(fast)  # which leaves it as it is
    assert fast.is_gradient_checkpointing
    assert kept_bytes(fast, input_ids) < 0.7 * kept
    # Another order of sums. The worst of 4,000 draws was 4e-5 of a gradient's norm, and where that is nothing but
    # rounding (key.bias) 1e-7 of the largest.
    largest = max(other.norm() for other in before if other is not None)
    for one, other in zip(gradients(), before, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert (one - other).norm() <= 1e-3 * other.norm() + 1e-6 * largest
    fast.gradient_checkpointing_disable()
    assert kept_bytes(fast, input_ids) > 0.9 * kept


def kept_bytes(some: torch.nn.Module, input_ids: torch.Tensor) -> int:
    """Of what the graph of one forward pass keeps, the parameters apart."""
    own = {parameter.data_ptr() for parameter in some.parameters()}
    kept = {}

    def pack(tensor):
        if tensor.data_ptr() not in own:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        some(input_ids)
    return sum(kept.values())
