"""The steps inside the native calls of a whole model."""

import itertools
import threading
import time
from collections import Counter

import pytest
import torch

from albert_fast import AlbertConfig, AlbertForMaskedLM, backends, native_trace
from albert_fast.flops import flops

LENGTHS = [9, 24, 1]
LABELLED = 5


@pytest.fixture(autouse=True)
def _cpu_backend(monkeypatch):
    if backends.CPU.unavailable() is not None:
        pytest.skip(backends.CPU.unavailable())
    monkeypatch.setenv("ALBERT_FAST_BACKEND", "cpu")


@pytest.fixture
def model():
    config = AlbertConfig(
        vocab_size=120,
        embedding_size=8,
        hidden_size=32,
        num_attention_heads=2,
        intermediate_size=48,
        num_hidden_layers=3,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return AlbertForMaskedLM(config)


@pytest.fixture
def inputs():
    mask = torch.arange(24) < torch.tensor(LENGTHS)[:, None]
    labels = torch.full((3, 24), -100)
    labels[1, 3 : 3 + LABELLED] = 7
    return {"input_ids": torch.randint(5, 120, (3, 24)), "attention_mask": mask.long(), "labels": labels}


def train(model, inputs):
    model.zero_grad()
    loss = model(**inputs).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_results_are_the_same_bit_for_bit(model, inputs, dtype):
    model.to(dtype)
    without = train(model, inputs)
    with native_trace.record() as spans:
        results = train(model, inputs)
    assert len(spans) > 0
    assert all(map(torch.equal, results, without))


def test_inference_in_int8_too(model, inputs):
    model.eval().quantize()
    del inputs["labels"]
    with torch.no_grad():
        without = model(**inputs).logits
        with native_trace.record() as spans:
            logits = model(**inputs).logits
    assert torch.equal(logits, without)
    assert Counter(span.name for span in spans if span.pass_index == 1) == {"product": 4, "attention": 1}


def test_the_steps_of_every_pass(model, inputs):
    began = time.perf_counter_ns()
    with native_trace.record() as spans:
        train(model, inputs)
    assert began <= spans[0].begin
    assert spans[-1].end <= time.perf_counter_ns()
    assert all(first.end <= second.begin for first, second in itertools.pairwise(spans))
    assert all(span.begin <= span.end for span in spans)
    outside = [span.name for span in spans if span.pass_index == -1]
    assert outside == ["embeddings", "loss", "loss backward", "embeddings backward"]
    turn = next(i for i, span in enumerate(spans) if span.name == "loss backward")
    forward = ["product", "attention", "product", "product", "product"]
    widths = [(32, 96), (32, 32), (32, 48), (48, 32)]
    for number in range(3):
        steps = [span for span in spans[:turn] if span.pass_index == number]
        assert [step.name for step in steps] == forward
        assert [step.sizes[:0:-1] for step in steps if step.name == "product"] == widths
    passes = [span.pass_index for span in spans if span.pass_index >= 0]
    assert list(dict.fromkeys(passes)) == [0, 1, 2]
    assert sorted(passes[len(forward) * 3 :], reverse=True) == passes[len(forward) * 3 :]
    backward = Counter(span.name for span in spans[turn:] if span.pass_index == 2)
    assert backward == {
        "product": 4,
        "weight gradient": 4,
        "attention backward": 1,
        "LayerNorm": 1,
        "LayerNorm backward": 2,
        "activation": 1,
    }


@pytest.mark.parametrize("recompute", ["none", "ffn", "layer"])
def test_operations_are_those_of_the_formula(model, inputs, recompute):
    """What is made again comes on top."""
    model.set_recompute(recompute)
    config, tokens = model.config, sum(LENGTHS)
    with native_trace.record() as spans:
        train(model, inputs)
    done = Counter()
    for span in spans:
        done["loss" if "loss" in span.name else "attention" if "attention" in span.name else "products"] += (
            span.operations
        )
    needed = flops(config, LENGTHS, training=True, labelled=LABELLED)
    hidden, inner, passes = config.hidden_size, config.intermediate_size, config.num_hidden_layers
    ffn, rest = 2 * tokens * hidden * inner * passes, 2 * tokens * 4 * hidden**2 * passes
    again = {"none": 0, "ffn": ffn, "layer": rest + 2 * ffn}[recompute]
    assert done["attention"] == needed.attention * (4 if recompute == "layer" else 3) // 3
    assert done["products"] == 3 * (rest + 2 * ffn) + again
    assert done["loss"] == 3 * 2 * LABELLED * config.embedding_size * config.vocab_size


def test_other_threads_are_not_seen(model, inputs):
    def work():
        train(model, inputs)

    with native_trace.record() as spans:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert spans == []


def test_one_recorder_a_thread(model, inputs):
    with native_trace.record() as spans:
        with pytest.raises(RuntimeError, match="this thread records already"), native_trace.record():
            pass
        train(model, inputs)
    assert spans, "the first one goes on"


def test_an_error_ends_it(model, inputs):
    inputs["labels"][0, 0] = 120
    with pytest.raises(IndexError), native_trace.record():
        train(model, inputs)
    with native_trace.record() as spans:
        pass
    assert spans == []


def test_too_little_room(model, inputs):
    with pytest.raises(RuntimeError, match=r"\d+ steps were taken, and capacity is 3"), native_trace.record(3):
        train(model, inputs)
    with pytest.raises(ValueError, match="capacity is 0"), native_trace.record(0):
        pass
