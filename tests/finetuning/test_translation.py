"""Translation: files in pairs, targets, and a run that learns to copy."""

from pathlib import Path

import pytest
import torch

from albert_fast.finetuning.config import CONFIGURATION, FinetuneConfig
from albert_fast.finetuning.reading import DataError
from albert_fast.finetuning.rows import pack
from albert_fast.finetuning.run import Pipeline, finetune
from albert_fast.finetuning.trainer import Finetuner
from albert_fast.finetuning.translation import Translation
from albert_fast.packing import PackedBatch
from albert_fast.seq2seq import AlbertForSeq2SeqLM
from albert_fast.tokenizer import AlbertTokenizer
from albert_fast.training import parallel, tracking

from .conftest import sentence

SAID = ["the film was rather dull", "the film was rather fine"]


def task_of(directory) -> Translation:
    return Translation(FinetuneConfig(length=24), AlbertTokenizer.from_pretrained(directory))


def write(path: Path, lines: list[str]) -> str:
    path.write_text("\n".join(lines) + "\n")
    return str(path)


def test_files_in_pairs(model_directory, tmp_path):
    task = task_of(model_directory)
    a, b = write(tmp_path / "a.de", ["x", "y"]), write(tmp_path / "a.en", ["v", "w"])
    assert [(e.source, e.target) for e in task.read_all([a, b])] == [("x", "v"), ("y", "w")]
    assert [(e.source, e.target) for e in task.read_all([a], labelled=False)] == [("x", None), ("y", None)]
    with pytest.raises(DataError, match="an even number of files"):
        task.read_all([a])
    short = write(tmp_path / "b.en", ["v"])
    with pytest.raises(DataError, match=r"a\.de, line 2: .*b\.en has no such line"):
        task.read_all([a, short])


def test_losses(model_directory, draw):
    """Each target token is predicted from [CLS], the ones before it, and the source."""
    task = task_of(model_directory)
    pairs = [task.from_line(None, sentence(draw, True)) for _ in range(3)]
    pairs = [type(pair)(pair.place, pair.source, sentence(draw, False)) for pair in pairs]
    model = AlbertForSeq2SeqLM.from_pretrained(model_directory).eval()
    rows = task.rows(pairs, labelled=True)
    for row, pair in zip(rows, pairs, strict=True):
        assert [task.tokenizer.cls_token_id, *row.target] == task.tokenizer.encode(
            pair.target, truncation=True, max_length=24
        )
    batch = pack(rows, task.collate)
    loss, _ = task.loss(model, batch)
    expected = 0.0
    for row in rows:
        decoder = PackedBatch.from_sequences([[task.tokenizer.cls_token_id, *row.target[:-1]]])
        labels = torch.tensor(row.target)
        expected += model(PackedBatch.from_sequences([row.input_ids]), None, decoder, labels, reduction="sum").loss
    torch.testing.assert_close(loss, expected)
    assert task.targets(batch) == sum(len(row.target) for row in rows)


def test_it_begins_with_what_the_encoder_has(model_directory, tmp_path):
    """Of a checkpoint without a decoder the encoder's layer is the decoder's; of one with a decoder it is its own."""
    pairs = [write(tmp_path / "a.src", ["film"] * 4), write(tmp_path / "a.tgt", ["story"] * 4)]
    options = ["task=translation", f"data.train={pairs}", f"data.dev={pairs}", "length=24", "epochs=4", "device=cpu"]
    options += ["log={quiet: true, peak_flops: 1e12}", "batch.size=4", "evaluate.every=4"]
    config = CONFIGURATION.parse(None, [*options, f"model={model_directory}", f"output={tmp_path / 'run'}"])
    trainer = Finetuner(config, parallel.start("cpu"))
    model = trainer.learner.model
    layer = model.albert.encoder.albert_layer_groups[0].albert_layers[0]
    assert torch.equal(model.decoder.layer.ffn.weight, layer.ffn.weight)
    assert trainer.run() == 0
    best = tmp_path / "run" / "best"
    kept = AlbertForSeq2SeqLM.from_pretrained(best)
    assert not torch.equal(
        kept.decoder.layer.ffn.weight, kept.albert.encoder.albert_layer_groups[0].albert_layers[0].ffn.weight
    )
    again = CONFIGURATION.parse(None, [*options, f"model={best}", f"output={tmp_path / 'more'}"])
    model = Finetuner(again, parallel.start("cpu")).learner.model
    assert torch.equal(model.decoder.layer.ffn.weight, kept.decoder.layer.ffn.weight)


def test_it_learns_to_write_one_word(model_directory, draw, tmp_path):
    """What is thought of the film, as the source says; one answer for all has BLEU 83.8."""
    files = {}
    for name, count in (("train", 200), ("dev", 30)):
        kinds = [bool(i % 2) for i in range(count)]
        files[name] = [
            write(tmp_path / f"{name}.src", [sentence(draw, kind) for kind in kinds]),
            write(tmp_path / f"{name}.tgt", [SAID[kind] for kind in kinds]),
        ]
    config = CONFIGURATION.parse(
        None,
        [
            "task=translation",
            f"model={model_directory}",
            f"data.train={files['train']}",
            f"data.dev={files['dev']}",
            f"output={tmp_path / 'run'}",
            "length=24",
            "epochs=32",
            "label_smoothing=0.0",
            "optimizer.learning_rate=0.002",
            "batch.size=16",
            "evaluate.every=200",
            "decoding.beams=2",
            "log={every: 10, quiet: true, peak_flops: 1e12}",
            "device=cpu",
        ],
    )
    assert finetune(config) == 0
    evaluations = [record for record in tracking.read(tmp_path / "run") if record["kind"] == "evaluation"]
    assert evaluations[-1]["bleu"] > 95
    pipeline = Pipeline(tmp_path / "run" / "best", device="cpu")
    assert pipeline.evaluate(files["dev"])["bleu"] == pytest.approx(max(e["bleu"] for e in evaluations), abs=5)
