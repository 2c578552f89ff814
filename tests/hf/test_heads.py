"""Accelerated heads: losses of labelled positions, by `num_items_in_batch`, without logits; answers in the padding."""

import copy
import io

import pytest
import torch
from torch import nn

from albert_fast import ops
from albert_fast.hf import NotAcceleratedError, accelerate, explain, restore
from albert_fast.hf import heads as hf_heads
from albert_fast.hf.guards import TRANSFORMERS_5
from hf.albert import HEADS, LENGTHS, MASK, fast_of, ids, inputs_of, model, transformers, transformers_5

MASKED_LM = ("AlbertForMaskedLM", "AlbertForPreTraining")


def gradients(some: nn.Module, loss: torch.Tensor) -> list[torch.Tensor]:
    return [g for g in torch.autograd.grad(loss, list(some.parameters()), allow_unused=True) if g is not None]


def assert_same_gradients(actual: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


@transformers_5
@pytest.mark.parametrize("head", [head for head in HEADS if "labels" in HEADS[head]])
def test_steps_of_accumulation_give_the_gradient_of_the_large_batch(head):
    """As Trainer sums them: each step is told how many labels there are in all."""
    fast = fast_of(model(getattr(transformers, head)), strict=True)
    inputs = inputs_of(head)
    if head == "AlbertForMultipleChoice":
        inputs = {
            name: torch.cat([value, value.flip(-1)]) for name, value in inputs.items() if name != "attention_mask"
        }
        inputs["labels"] = torch.tensor([2, 0])
    if head == "AlbertForPreTraining":  # as many labels in each row: of the number of rows a step knows nothing
        inputs["labels"] = torch.full((3, 11), -100).index_fill(1, torch.tensor([0]), 7)
    whole = fast(**inputs).loss
    num_items = (inputs["labels"] != -100).sum()
    parts = [
        fast(**{name: value[row : row + 1] for name, value in inputs.items()}, num_items_in_batch=num_items).loss
        for row in range(len(inputs["labels"]))
    ]
    torch.testing.assert_close(sum(parts), whole, rtol=1e-10, atol=0)
    assert_same_gradients(gradients(fast, sum(parts)), gradients(fast, whole))


@transformers_5
@pytest.mark.parametrize("head", MASKED_LM)
@pytest.mark.parametrize("as_dict", [True, False])
def test_without_logits(head, as_dict):
    fast = fast_of(model(getattr(transformers, head)), strict=True)
    inputs = inputs_of(head)
    loss = fast(**inputs).loss
    accelerate(fast, skip_logits=True, strict=True)
    output = fast(**inputs, return_dict=as_dict)
    if as_dict:
        assert output.get("logits", output.get("prediction_logits")) is None
    else:
        assert [tuple(part.shape) for part in output] == [(), (3, 2)][: len(output)]
    assert torch.equal(output[0], loss)
    without_labels = {name: value for name, value in inputs.items() if not name.endswith(("labels", "label"))}
    assert fast(**without_labels)[0].shape == (3, 11, 60)


@transformers_5
@pytest.mark.parametrize("head", MASKED_LM)
def test_outputs_come_in_transformers_order(head):
    stock, inputs = model(getattr(transformers, head)), inputs_of(head)
    fast = fast_of(stock, strict=True)
    for options in ({}, {"return_dict": False}, {"output_hidden_states": True}):
        expected, actual = stock(**inputs, **options), fast(**inputs, **options)
        assert type(actual) is type(expected)
        if options != {"return_dict": False}:
            assert list(actual.keys()) == list(expected.keys())
        assert len(actual) == len(expected)
        for one, other in zip(actual, expected, strict=True):
            assert type(one) is type(other)
        torch.testing.assert_close(actual[0], expected[0], rtol=1e-10, atol=0)
    by_place = (inputs["input_ids"], MASK, inputs["token_type_ids"], None, None, *HEADS[head].values())
    torch.testing.assert_close(fast(*by_place).loss, stock(*by_place).loss, rtol=1e-10, atol=0)


@transformers_5
@pytest.mark.parametrize("head", [*MASKED_LM, "AlbertForQuestionAnswering"])
@pytest.mark.parametrize("skip_logits", [False, True])
def test_compiles_to_one_graph(head, skip_logits):
    if skip_logits and head not in MASKED_LM:
        pytest.skip("it has none")
    fast = fast_of(model(getattr(transformers, head), dtype=torch.float32), strict=True, skip_logits=skip_logits)
    inputs = {**inputs_of(head), "attention_mask": MASK.long()}
    if head in MASKED_LM:
        inputs |= {"num_items_in_batch": torch.tensor(20), "output_hidden_states": True}
    expected = fast(**inputs)  # first, for transformers hangs its hooks on under a lock
    actual = torch.compile(fast, fullgraph=True, backend="aot_eager")(**inputs)
    assert actual.keys() == expected.keys()
    for state in actual.hidden_states or ():
        assert not any(vars(state).values())
    torch.testing.assert_close(actual.loss, expected.loss)
    for one, other in zip(gradients(fast, actual.loss), gradients(fast, expected.loss), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4)


@transformers_5
def test_no_label_at_all():
    fast = fast_of(model(transformers.AlbertForMaskedLM), strict=True)
    loss = fast(ids(), MASK, labels=torch.full((3, 11), -100)).loss
    assert loss == 0.0
    assert all(not g.any() for g in gradients(fast, loss))


@transformers_5
def test_logits_at_padding_are_zeros():
    stock, input_ids = model(transformers.AlbertForMaskedLM), ids()
    assert not fast_of(stock)(input_ids, MASK).logits[~MASK].any()
    padded = fast_of(stock, unpad=False)(input_ids, MASK).logits
    torch.testing.assert_close(padded, stock(input_ids, MASK).logits, rtol=1e-9, atol=1e-9)


@transformers_5
def test_the_loss_never_sees_unlabelled_positions(monkeypatch):
    """The logits that are returned do not carry the loss: its gradient comes from the operation alone."""
    fast, inputs = fast_of(model(transformers.AlbertForMaskedLM)), inputs_of("AlbertForMaskedLM")
    calls = []

    def counted(*args, **options):
        calls.append(args[0].shape)
        return ops.masked_lm_loss(*args, **options)

    class Ops:
        masked_lm_loss = staticmethod(counted)

    monkeypatch.setattr(hf_heads, "ops", Ops)
    output = fast(**inputs)
    assert calls == [(sum(LENGTHS), 16)]
    assert torch.autograd.grad(output.loss, output.logits, allow_unused=True) == (None,)


def change_head(some: nn.Module) -> None:
    some.predictions.dense.register_forward_hook(lambda m, args, output: 1.5 * output)


def change_hidden(some: nn.Module) -> None:
    some.albert.encoder.register_forward_hook(
        lambda m, args, output: type(output)(last_hidden_state=1.5 * output.last_hidden_state)
    )


def _halve(module: nn.Module, args: tuple, output: transformers.utils.ModelOutput) -> None:
    output.last_hidden_state.mul_(0.5)


def change_hidden_in_place(some: nn.Module) -> None:
    some.albert.encoder.register_forward_hook(_halve)


def hook_activation(some: nn.Module) -> None:
    some.predictions.activation.register_forward_hook(lambda m, args, output: output.cumsum(1))


def change_activation(some: nn.Module) -> None:
    some.predictions.activation = nn.ReLU()


@transformers_5
@pytest.mark.parametrize("num_items", [None, 20])
@pytest.mark.parametrize(
    "change", [change_head, change_hidden, change_hidden_in_place, hook_activation, change_activation]
)
def test_what_was_changed_in_between_counts(change, num_items):
    """By whichever way the loss comes."""
    stock, inputs = model(transformers.AlbertForMaskedLM), inputs_of("AlbertForMaskedLM")
    fast = fast_of(stock)
    before = stock(**inputs).loss
    change(stock)
    change(fast)
    expected = stock(**inputs).loss
    assert not torch.allclose(expected, before)
    if num_items is not None:
        expected = expected * (inputs["labels"] != -100).sum() / num_items
    actual = fast(**inputs, num_items_in_batch=num_items).loss
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=0)


@transformers_5
def test_what_was_changed_in_place_counts_in_inference_mode():
    stock, input_ids = model(transformers.AlbertForMaskedLM), ids()
    fast = fast_of(stock, strict=True)
    with torch.inference_mode():
        before = fast(input_ids, MASK).logits
        for some in (stock, fast):
            change_hidden_in_place(some)
        expected, actual = (some(input_ids, MASK).logits for some in (stock, fast))
    torch.testing.assert_close(actual[MASK], expected[MASK], rtol=1e-9, atol=1e-9)
    assert not torch.allclose(actual, before)


@pytest.mark.parametrize("head", ["AlbertForMaskedLM", "AlbertForTokenClassification", "AlbertForQuestionAnswering"])
def test_hooks_before_find_arguments_where_they_were(head):
    fast, inputs = fast_of(model(getattr(transformers, head))), inputs_of(head)
    seen = []
    fast.register_forward_pre_hook(lambda m, args: seen.append(args))
    labels = list(HEADS[head].values())
    by_place = (inputs["input_ids"], inputs["attention_mask"], inputs["token_type_ids"], None, None, *labels)
    if not TRANSFORMERS_5:
        by_place = (*by_place[:4], None, *by_place[4:])  # head_mask
    torch.testing.assert_close(fast(*by_place).loss, fast(**inputs).loss)
    assert len(seen[0]) == len(by_place)
    assert all(seen[0][place] is value for place, value in enumerate(by_place[:3]))
    assert seen[1] == ()


@pytest.mark.parametrize("head", MASKED_LM)
@pytest.mark.parametrize("as_dict", [True, False])
def test_hooks_after_see_what_transformers_gives(head, as_dict):
    stock, inputs = model(getattr(transformers, head)), inputs_of(head)
    seen = []
    stock.register_forward_hook(lambda m, args, output: seen.append((type(output), output[0])))
    fast = fast_of(stock)
    for some in (stock, fast):
        some(**inputs, return_dict=as_dict)
    (expected_type, expected), (actual_type, actual) = seen
    assert actual_type is expected_type
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("mask", [MASK, torch.ones_like(MASK)], ids=["padded", "full"])
def test_hidden_states_are_plain_tensors_of_their_own(gradients, mask):
    fast = fast_of(model(transformers.AlbertForMaskedLM), strict=True)
    kept = []
    fast.albert.encoder.register_forward_hook(lambda m, args, output: kept.append(output[0]))
    with torch.set_grad_enabled(gradients):
        states = fast(ids(), mask, output_hidden_states=True).hidden_states
    assert len(states) == 4
    file = io.BytesIO()
    torch.save([kept[0], *states], file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True)[2], states[1])
    assert len({state.untyped_storage().data_ptr() for state in states}) == 4
    row = states[0][0, 0].nbytes
    assert all(state.untyped_storage().nbytes() <= state.nbytes + row for state in states)


class Around(nn.Module):
    """Takes what a call of transformers without further arguments gives."""

    def __init__(self, albert: nn.Module) -> None:
        super().__init__()
        self.inner = albert

    def forward(self, input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds, return_dict=True):
        output = self.inner(input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        return output if return_dict else output.to_tuple()


@transformers_5
@pytest.mark.parametrize("head", ["AlbertForMaskedLM", "AlbertForSequenceClassification", "AlbertForQuestionAnswering"])
@pytest.mark.parametrize("as_dict", [True, False])
def test_a_module_around_the_base_model(head, as_dict):
    stock, inputs = model(getattr(transformers, head)), inputs_of(head)
    fast = fast_of(stock, strict=True)
    for some in (stock, fast):
        some.albert = Around(some.albert)
    expected, actual = (some(**inputs, return_dict=as_dict) for some in (stock, fast))
    assert type(actual) is type(expected)
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-9, atol=0)


@transformers_5
def test_strict_holds_for_the_head():
    fast = fast_of(model(transformers.AlbertForMaskedLM), strict=True)
    change_head(fast)
    with pytest.raises(NotAcceleratedError, match="dense has hooks"):
        fast(ids())


@transformers_5
def test_a_forward_of_ones_own_is_left_alone():
    class Own(transformers.AlbertForMaskedLM):
        def forward(self, input_ids, labels=None, **kwargs):
            output = super().forward(input_ids, labels=labels, **kwargs)
            assert labels is None or output.loss is not None
            return output

    stock = model(Own)
    input_ids = ids()
    fast = fast_of(stock, strict=True)
    labels = torch.where(MASK, input_ids, -100)
    torch.testing.assert_close(fast(input_ids, labels).loss, stock(input_ids, labels).loss, rtol=1e-9, atol=0)
    # What is called by hand is what transformers has.
    hidden = fast.albert(input_ids).last_hidden_state
    assert fast.predictions(hidden).shape == (3, 11, 60)


def test_answers_are_never_in_the_padding():
    """Each row as it is alone, without padding."""
    stock, input_ids = model(transformers.AlbertForQuestionAnswering), ids()
    starts, ends = torch.tensor([3, 1, 0]), torch.tensor([7, 3, 0])
    fast = fast_of(stock, strict=True)
    inputs = {"input_ids": input_ids, "attention_mask": MASK, "start_positions": starts, "end_positions": ends}
    together = fast(**inputs)
    alone = [
        stock(
            input_ids[row : row + 1, :length], start_positions=starts[row : row + 1], end_positions=ends[row : row + 1]
        )
        for row, length in enumerate(LENGTHS)
    ]
    mean = sum(output.loss for output in alone) / 3
    torch.testing.assert_close(together.loss, mean, rtol=1e-10, atol=0)
    assert_same_gradients(gradients(fast, together.loss), gradients(stock, mean))
    for name in ("start_logits", "end_logits"):
        for row, length in enumerate(LENGTHS):
            torch.testing.assert_close(together[name][row, :length], alone[row][name][0], rtol=1e-9, atol=1e-9)
            assert (together[name][row, length:] < -1e30).all()
    in_place = fast(**inputs, return_dict=False)
    assert [torch.equal(one, other) for one, other in zip(in_place, together.values(), strict=True)] == [True] * 3
    padded = fast_of(stock, strict=True, unpad=False)
    torch.testing.assert_close(padded(**inputs).loss, stock(**inputs).loss, rtol=1e-10, atol=0)


def test_answers_in_the_padding_do_not_count():
    """As a label 0 before padding on the left."""
    fast = fast_of(model(transformers.AlbertForQuestionAnswering), strict=True)
    input_ids, mask = ids(), MASK.flip(1)
    inputs = {"start_positions": torch.tensor([0, 0, 11]), "end_positions": torch.tensor([5, 9, 10])}
    output = fast(input_ids, attention_mask=mask, **inputs)
    start = nn.functional.cross_entropy(output.start_logits[:1], inputs["start_positions"][:1])
    end = nn.functional.cross_entropy(output.end_logits, inputs["end_positions"])
    torch.testing.assert_close(output.loss, (start + end) / 2, rtol=1e-10, atol=0)
    beyond = torch.tensor([11, 0, 0])
    nothing = fast(input_ids, attention_mask=mask, start_positions=beyond, end_positions=beyond).loss
    assert nothing == 0.0
    assert not any(g.any() for g in gradients(fast, nothing))


def test_restore_takes_the_hooks_away():
    stock, inputs = model(transformers.AlbertForMaskedLM), inputs_of("AlbertForMaskedLM")
    own = []
    stock.register_forward_hook(lambda m, args, output: own.append(m))
    fast = fast_of(stock)
    again = copy.deepcopy(accelerate(fast))  # twice is as once
    for some in (fast, again):
        restore(some)
        assert len(some._forward_hooks) == 1
        assert len(some._forward_pre_hooks) == 0
        assert some.__dict__.keys() == stock.__dict__.keys()
        assert torch.equal(some(**inputs).loss, stock(**inputs).loss)
    assert len(own) == 4
    assert explain(fast)[0].refusal is not None


@pytest.mark.parametrize("kind", ["AlbertModel", "AlbertForQuestionAnswering"])
def test_skip_logits_needs_logits(kind):
    with pytest.raises(ValueError, match="no masked-LM head"):
        accelerate(model(getattr(transformers, kind)), skip_logits=True)
