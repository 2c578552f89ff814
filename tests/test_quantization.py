"""int8 models: what a user sees of them."""

import pytest
import torch
from safetensors.torch import save

import albert_fast
from albert_fast import AlbertConfig, AlbertForMaskedLM, AlbertModel, PackedBatch, backends
from albert_fast.checkpoint import QUANTIZATION_FILE as FILE
from albert_fast.quantization import QuantizationError, accuracy_loss, quantize

SHAPE = {
    "vocab_size": 300,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "num_hidden_layers": 3,
    "initializer_range": 0.08,
}


@pytest.fixture
def model() -> AlbertModel:
    return AlbertModel(AlbertConfig(**SHAPE)).eval()


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(5, 300, (3, 21))


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return ((actual.double() - expected.double()).norm() / expected.double().norm()).item()


def available() -> list[str]:
    call = backends.Call("encoder", torch.device("cpu"), torch.float32, head_dim=16, quantized=True)
    return [backend.name for backend in backends.BACKENDS if backends.refusal(backend, call) is None]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("backend", available())
def test_it_is_close_and_the_undo_is_exact(backend, dtype, model, ids, monkeypatch):
    monkeypatch.setenv("ALBERT_FAST_BACKEND", backend)
    model.to(dtype)
    with torch.no_grad():
        before = model(ids).last_hidden_state
        assert albert_fast.quantize(model) is model
        rounded = model(ids).last_hidden_state
        assert 0.0 < relative_error(rounded, before) < 0.06
        assert rounded.dtype == dtype
        assert torch.equal(model(ids).last_hidden_state, rounded)
        assert torch.equal(model.quantize(False)(ids).last_hidden_state, before)


@pytest.mark.parametrize("isa", ["avx2", ""])
@pytest.mark.parametrize("backend", available())
def test_every_backend_rounds_alike(backend, isa, ids, monkeypatch):
    """One pass. Without VNNI, what differs is whose float32 sums go before, which moves few values over a rounding's
    edge. With it attention is rounded, too (csrc/cpu/attention.h), which must cost less than rounding the products:
    0.73 ± 0.03 times of one model, which is why many are judged together."""
    monkeypatch.setenv("ALBERT_FAST_ISA", isa)
    found = []
    for _ in range(16):
        model = AlbertModel(AlbertConfig(**{**SHAPE, "num_hidden_layers": 1})).eval()
        with torch.no_grad():
            monkeypatch.setenv("ALBERT_FAST_BACKEND", "reference")
            exact = model(ids).last_hidden_state
            expected = model.quantize()(ids).last_hidden_state
            monkeypatch.setenv("ALBERT_FAST_BACKEND", backend)
            found.append((model(ids).last_hidden_state, expected, exact))
    actual, expected, exact = (torch.cat(states) for states in zip(*found, strict=True))
    difference = relative_error(actual, expected)
    assert difference < (2e-3 if isa == "avx2" else 0.8 * relative_error(expected, exact))


@pytest.mark.parametrize("backend", available())
def test_biases_are_corrected_in_each_pass(backend, ids, monkeypatch):
    """Each pass by its own means, each layer by its own weights: on every backend. On average over four models: in how
    much of the error is in the means one differs from the next."""
    monkeypatch.setenv("ALBERT_FAST_BACKEND", backend)
    shape = {"num_hidden_layers": 4, "num_hidden_groups": 2, "inner_group_num": 2}
    corrected = plain = wrong_passes = 0.0
    for _ in range(4):
        model = AlbertModel(AlbertConfig(**{**SHAPE, **shape})).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith("orm.bias"):  # inputs with a mean, as in a model that was trained
                    parameter.normal_()
            expected = model(ids).last_hidden_state
            model.quantize(calibration=PackedBatch.from_padded(torch.randint(5, 300, (8, 40))))
            means = model.encoder.input_means
            assert means.shape == (8, 3 * 64 + 128)
            corrected += relative_error(model(ids).last_hidden_state, expected)
            model.encoder.input_means = None
            plain += relative_error(model(ids).last_hidden_state, expected)
            model.encoder.input_means = means.flip(0)
            wrong_passes += relative_error(model(ids).last_hidden_state, expected)
    assert corrected < 0.8 * plain
    assert wrong_passes > 1.1 * corrected


def test_calibration(model, ids):
    batch = PackedBatch.from_padded(ids)
    with torch.no_grad():
        first_input = model.encoder.embedding_hidden_mapping_in(model.embeddings(batch, None))
    model.quantize(calibration=batch)
    torch.testing.assert_close(model.encoder.input_means[0, :64], first_input.mean(0))
    by_hand = model.encoder.input_means
    assert torch.equal(model.quantize().encoder.input_means, model.quantize().encoder.input_means)
    assert not torch.equal(model.encoder.input_means, by_hand)
    assert model.quantize(False).encoder.input_means is None
    with pytest.raises(ValueError, match="no tokens"):
        model.quantize(calibration=PackedBatch.from_padded(ids, torch.zeros_like(ids)))
    with pytest.raises(IndexError, match="300"):
        model.quantize(calibration=PackedBatch.from_padded(ids + 300))
    assert not model.encoder.quantized
    assert "input_means" not in "".join(model.state_dict())


def test_padding_and_packing_change_nothing(model, ids):
    model.quantize()
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    with torch.no_grad():
        padded = model(ids, mask).last_hidden_state[mask != 0]
        packed = model(PackedBatch.from_padded(ids, mask)).last_hidden_state
        torch.testing.assert_close(packed, padded)
        alone = model(ids[1:2, :9]).last_hidden_state[0]
    assert relative_error(alone, packed[21:30]) < 2e-3


def test_with_gradients_on_it_rounds_alike(ids):
    """The operations then come one by one, and other float32 sums go before them, which moves few values over a
    rounding's edge: in one model of thirty as far as 4e-3. Over sixteen models."""
    errors = []
    for _ in range(16):
        model = AlbertModel(AlbertConfig(**SHAPE)).eval().quantize()
        with torch.no_grad():
            expected = model(ids).last_hidden_state
        errors.append(relative_error(model(ids).last_hidden_state.detach(), expected))
    assert torch.tensor(errors).square().mean().sqrt() < 2e-3


def test_it_follows_its_weights(model, ids):
    with torch.no_grad():
        first = model.quantize()(ids).last_hidden_state
        for parameter in model.encoder.parameters():
            parameter.mul_(1.5)
        second = model(ids).last_hidden_state
        assert relative_error(second, first) > 0.05
        assert relative_error(second, model.quantize(False)(ids).last_hidden_state) < 0.06


def test_it_does_not_train(model, ids):
    model.quantize()
    assert not model.training
    assert not model(ids).last_hidden_state.requires_grad
    with pytest.raises(ValueError, match=r"quantized to int8.*quantize\(False\)"):
        model.train()(ids)
    model.quantize(False)(ids).last_hidden_state.sum().backward()


def test_save_and_load(tmp_path, ids):
    model = AlbertForMaskedLM(AlbertConfig(**SHAPE)).quantize()
    model.save_pretrained(tmp_path / "int8")
    loaded = AlbertForMaskedLM.from_pretrained(tmp_path / "int8")
    other_head = AlbertModel.from_pretrained(tmp_path / "int8", num_labels=3)
    assert loaded.albert.encoder.quantized
    assert other_head.encoder.quantized
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
        assert torch.equal(loaded.albert.encoder.input_means, model.albert.encoder.input_means)
    assert {path.name for path in (tmp_path / "int8").iterdir()} == {"config.json", "model.safetensors", FILE}
    loaded.quantize(False).save_pretrained(tmp_path / "int8")
    assert not (tmp_path / "int8" / FILE).exists()
    assert not AlbertForMaskedLM.from_pretrained(tmp_path / "int8").albert.encoder.quantized


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"{", "cannot be read"),
        (save({}, {"encoder": "int3"}), "int3"),
        (save({"other": torch.zeros(2)}, {"encoder": "int8"}), "other"),
        (save({"input_means": torch.zeros(3, 319)}, {"encoder": "int8"}), r"\[3, 320\] was expected"),
        (save({"input_means": torch.zeros(3, 320).long()}, {"encoder": "int8"}), "was expected"),
    ],
)
def test_a_file_that_cannot_be_used(content, match, model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "model" / FILE).write_bytes(content)
    with pytest.raises(QuantizationError, match=match):
        AlbertModel.from_pretrained(tmp_path / "model")


def test_accuracy_loss_is_measured_on_text(tmp_path, capsys):
    from albert_fast.bench.data import load_tokenizer, read_text
    from albert_fast.cli import main

    text = read_text(())
    tokenizer = load_tokenizer(None, text)
    model = AlbertModel(AlbertConfig(**{**SHAPE, "vocab_size": 2100})).train()
    loss = accuracy_loss(model, tokenizer, text.paragraphs[:20])
    assert 0.0 < loss.relative_error < 0.06
    assert 0.998 < loss.cosine < 1.0
    assert loss.tokens > 200
    assert model.training
    assert not model.encoder.quantized
    with pytest.raises(ValueError, match="texts is empty"):
        accuracy_loss(model, tokenizer, [])
    quantize(model, False).save_pretrained(tmp_path / "float")
    tokenizer.save_pretrained(tmp_path / "float")
    assert main(["quantize", str(tmp_path / "float"), str(tmp_path / "int8")]) == 0
    assert "int8 changes the hidden states" in capsys.readouterr().out
    assert AlbertModel.from_pretrained(tmp_path / "int8").encoder.quantized
    assert (tmp_path / "int8" / "spiece.model").exists()
    assert main(["quantize", str(tmp_path / "float"), str(tmp_path / "int8")]) == 2
    assert "exists" in capsys.readouterr().err
