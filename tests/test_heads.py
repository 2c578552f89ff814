"""What the heads' losses read, build and infer; heads over a bare encoder. Their parity is in test_model.py."""

import pytest
import torch
from torch import Tensor

import albert_fast
from albert_fast import AlbertConfig, AlbertForMaskedLM, AlbertModel
from albert_fast.early_exit import AlbertForEarlyExit
from albert_fast.span_head import AlbertForSpanQuestionAnswering

# All but speech's: a bare encoder's checkpoint has no layers that listen.
HEADS = (
    albert_fast.AlbertForPreTraining,
    albert_fast.AlbertForMaskedLM,
    albert_fast.AlbertForSequenceClassification,
    albert_fast.AlbertForTokenClassification,
    albert_fast.AlbertForQuestionAnswering,
    albert_fast.AlbertForMultipleChoice,
    albert_fast.AlbertForSeq2SeqLM,
    AlbertForEarlyExit,
    AlbertForSpanQuestionAnswering,
)


def shape(**overrides) -> dict:
    return {
        "vocab_size": 60,
        "embedding_size": 8,
        "hidden_size": 32,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "max_position_embeddings": 40,
        "classifier_dropout_prob": 0.0,
        **overrides,
    }


def test_no_labels_give_zero_loss_and_gradients():
    model = AlbertForMaskedLM(AlbertConfig(**shape()))
    loss = model(torch.randint(50, (2, 6)), labels=torch.full((2, 6), -100)).loss
    loss.backward()
    assert loss == 0
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_loss_builds_no_logits():
    """The largest tensor of a training step is far below batch x seq x vocabulary."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(result):
                if isinstance(tensor, Tensor):
                    self.numel = max(self.numel, tensor.numel())
            return result

    # So many words that the table is larger than what a step keeps for its backward.
    vocabulary, batch, seq, labelled = 50_000, 4, 32, 6
    model = AlbertForMaskedLM(AlbertConfig(**shape(vocab_size=vocabulary)))
    labels = torch.full((batch, seq), -100)
    labels.view(-1)[torch.randperm(batch * seq)[:labelled]] = 7
    ids = torch.randint(vocabulary, (batch, seq))
    with Largest() as largest:
        output = model(ids, labels=labels)
        output.loss.backward()
    assert output.logits is None
    table = model.albert.embeddings.word_embeddings.weight.numel()
    assert largest.numel <= max(table, labelled * vocabulary) < batch * seq * vocabulary
    assert model(ids, labels=labels, return_logits=True).logits.shape == (batch, seq, vocabulary)


def test_classification_losses():
    """The loss follows problem_type, or is inferred; the config is left as it was."""
    transformers = pytest.importorskip("transformers")
    for labels, labels_count in (
        (torch.rand(3), 1),
        (torch.tensor([0, 2, 1]), 3),
        (torch.rand(3, 3).round(), 3),
    ):
        fields = shape(num_labels=labels_count)
        peer = transformers.AlbertForSequenceClassification(transformers.AlbertConfig(**fields))
        model = albert_fast.AlbertForSequenceClassification(AlbertConfig(**fields))
        model.load_state_dict(peer.state_dict())
        ids = torch.randint(50, (3, 5))
        torch.testing.assert_close(model.eval()(ids, labels=labels).loss, peer.eval()(ids, labels=labels).loss)
        assert model.config.problem_type is None


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("head", HEADS)
def test_a_head_over_a_bare_encoder_is_initialised(head, tied, tmp_path):
    """Memory that nobody wrote is NaN in the tests."""
    encoder = AlbertModel(AlbertConfig(**shape(tie_word_embeddings=tied)), add_pooling_layer=False)
    encoder.save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="newly initialized"):
        model = head.from_pretrained(tmp_path)
    for name, parameter in model.named_parameters():
        assert parameter.isfinite().all(), name
        if name.endswith("bias"):
            assert not parameter.any(), name
