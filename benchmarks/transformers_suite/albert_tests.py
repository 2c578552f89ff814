"""transformers' common tests of a model, applied to ALBERT: a tiny configuration, and inputs for it.

For `run.py`, which brings the package `tests` that the common tests are in.
"""

from __future__ import annotations

import unittest
from typing import Any

import torch
from tests.test_configuration_common import ConfigTester
from tests.test_modeling_common import ModelTesterMixin, ids_tensor, random_attention_mask
from transformers import (
    AlbertConfig,
    AlbertForMaskedLM,
    AlbertForMultipleChoice,
    AlbertForPreTraining,
    AlbertForQuestionAnswering,
    AlbertForSequenceClassification,
    AlbertForTokenClassification,
    AlbertModel,
)
from transformers.testing_utils import torch_device


class AlbertModelTester:
    """What the common tests ask for; the sizes are all different, so that none can stand for another."""

    def __init__(self, parent: unittest.TestCase) -> None:
        self.parent = parent
        self.is_training = True
        self.batch_size, self.seq_length = 5, 11
        self.num_choices, self.num_labels = 4, 3
        self.vocab_size, self.embedding_size, self.hidden_size, self.intermediate_size = 83, 20, 24, 40
        self.num_hidden_layers, self.num_hidden_groups, self.num_attention_heads = 2, 2, 6
        self.max_position_embeddings = 48

    def get_config(self) -> AlbertConfig:
        names = ("vocab_size", "embedding_size", "hidden_size", "intermediate_size", "num_hidden_layers")
        names += ("num_hidden_groups", "num_attention_heads", "max_position_embeddings")
        return AlbertConfig(**{name: getattr(self, name) for name in names}, bos_token_id=2, eos_token_id=3)

    def prepare_config_and_inputs_for_common(self) -> tuple[AlbertConfig, dict[str, torch.Tensor]]:
        shape = (self.batch_size, self.seq_length)
        inputs = {
            "input_ids": ids_tensor(shape, self.vocab_size),
            "token_type_ids": ids_tensor(shape, 2),
            "attention_mask": random_attention_mask(shape),
        }
        return self.get_config(), inputs


class AlbertModelTest(ModelTesterMixin, unittest.TestCase):
    all_model_classes = (
        AlbertModel,
        AlbertForPreTraining,
        AlbertForMaskedLM,
        AlbertForSequenceClassification,
        AlbertForTokenClassification,
        AlbertForQuestionAnswering,
        AlbertForMultipleChoice,
    )

    def setUp(self) -> None:
        self.model_tester = AlbertModelTester(self)

    def _prepare_for_class(self, inputs: dict[str, Any], model_class: type, return_labels: bool = False) -> Any:
        """With the two labels of pre-training, which the common tests know of no model."""
        inputs = super()._prepare_for_class(inputs, model_class, return_labels=return_labels)
        if return_labels and model_class.__name__ == "AlbertForPreTraining":
            shape = (self.model_tester.batch_size, self.model_tester.seq_length)
            inputs["labels"] = torch.zeros(shape, dtype=torch.long, device=torch_device)
            inputs["sentence_order_label"] = torch.ones(shape[0], dtype=torch.long, device=torch_device)
        return inputs

    def test_config(self) -> None:
        ConfigTester(self, config_class=AlbertConfig, hidden_size=36).run_common_tests()

    def test_shapes_of_outputs(self) -> None:
        tester = self.model_tester
        batch, length, classes = tester.batch_size, tester.seq_length, tester.num_labels
        expected = {
            "AlbertModel": {"last_hidden_state": (length, tester.hidden_size), "pooler_output": (tester.hidden_size,)},
            "AlbertForPreTraining": {"prediction_logits": (length, tester.vocab_size), "sop_logits": (2,)},
            "AlbertForMaskedLM": {"logits": (length, tester.vocab_size)},
            "AlbertForSequenceClassification": {"logits": (classes,)},
            "AlbertForTokenClassification": {"logits": (length, classes)},
            "AlbertForQuestionAnswering": {"start_logits": (length,), "end_logits": (length,)},
            "AlbertForMultipleChoice": {"logits": (tester.num_choices,)},
        }
        for model_class in self.all_model_classes:
            config, inputs = tester.prepare_config_and_inputs_for_common()
            if model_class in (AlbertForSequenceClassification, AlbertForTokenClassification):
                config.num_labels = classes
            inputs = self._prepare_for_class(inputs, model_class, return_labels=True)
            with torch.no_grad():
                outputs = model_class(config).to(torch_device).eval()(**inputs)
            assert ("loss" in outputs) == (model_class is not AlbertModel), model_class.__name__
            for name, shape in expected[model_class.__name__].items():
                assert tuple(outputs[name].shape) == (batch, *shape), f"{model_class.__name__}, {name}"
