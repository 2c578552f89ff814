"""Accelerated models inside what people build around transformers: Trainer, pipelines, peft, export, processes."""

import copy
import os
import socket
import threading
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from albert_fast import hf
from albert_fast.hf import accelerate, explain
from albert_fast.hf.guards import TRANSFORMERS_5
from hf.albert import LENGTHS, MASK, fast_of, ids, model, served, transformers, transformers_5


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """As it was. TrainingArguments write into it what accelerate, and the arguments that follow them in the process,
    read: in transformers 4 `bf16` alone makes every later Trainer compute in bfloat16."""
    with mock.patch.dict(os.environ):
        yield


class Texts(Dataset):
    """Rows of different lengths, with labels at some of their tokens, or one of each row."""

    def __init__(self, head: str, rows: int = 16) -> None:
        generator = torch.Generator().manual_seed(3)
        self.rows = []
        for row in range(rows):
            length = 4 + row % 8
            row_ids = torch.randint(5, 60, (12,), generator=generator)
            mask = (torch.arange(12) < length).long()
            labels = torch.where((torch.arange(12) % (2 + row % 3) == 0) & mask.bool(), row_ids, -100)
            if head == "AlbertForSequenceClassification":
                labels = torch.tensor(row % 2)
            self.rows.append({"input_ids": row_ids, "attention_mask": mask, "labels": labels})

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, row: int) -> dict[str, torch.Tensor]:
        return self.rows[row]


def trained(some: nn.Module, folder, head: str = "AlbertForMaskedLM", **options) -> dict:
    """One step of Trainer over all 16 rows: the loss that it logs, the gradient's norm and the parameters after it."""
    pytest.importorskip("accelerate", minversion="1.1")
    arguments = {"per_device_train_batch_size": 16, "max_steps": 1, "max_grad_norm": 1e9, **options}
    trainer = transformers.Trainer(
        model=some,
        args=transformers.TrainingArguments(
            output_dir=str(folder),
            optim="sgd",
            learning_rate=0.1,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            seed=1,
            **arguments,
        ),
        train_dataset=Texts(head),
    )
    trainer.train()
    log = trainer.state.log_history[0]
    return {"loss": log["loss"], "norm": log["grad_norm"], "parameters": [p.detach() for p in some.parameters()]}


def assert_same_training(actual: dict, expected: dict, tolerance: float = 1e-3) -> None:
    assert actual["loss"] == pytest.approx(expected["loss"], rel=tolerance, abs=1e-3)  # four digits are logged
    assert actual["norm"] == pytest.approx(expected["norm"], rel=tolerance)
    for one, other in zip(actual["parameters"], expected["parameters"], strict=True):
        torch.testing.assert_close(one, other, rtol=10 * tolerance, atol=tolerance)


@pytest.fixture
def stock() -> nn.Module:
    return model(transformers.AlbertForMaskedLM, dtype=torch.float32, initializer_range=0.1)


def test_trainer_as_transformers(stock, tmp_path):
    assert_same_training(trained(fast_of(stock, strict=True), tmp_path), trained(stock, tmp_path))


@transformers_5
@pytest.mark.parametrize("head", ["AlbertForMaskedLM", "AlbertForSequenceClassification"])
@pytest.mark.parametrize("door", ["in place", "class"])
def test_trainer_accumulates_to_the_large_batch(head, door, tmp_path):
    """transformers 5 gives four times the gradient here (its issue 47688)."""
    stock = model(getattr(transformers, head), dtype=torch.float32, initializer_range=0.1)
    if door == "in place":
        fast = accelerate(stock, strict=True)
    else:
        fast = getattr(hf, head)(stock.config)
        fast.load_state_dict(stock.state_dict())
    whole = trained(copy.deepcopy(fast), tmp_path, head)
    steps = trained(fast, tmp_path, head, per_device_train_batch_size=4, gradient_accumulation_steps=4)
    assert_same_training(steps, whole)


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({"bf16": True}, 2e-2),
        ({"gradient_checkpointing": True}, 1e-3),
        ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}, 1e-3),
        ({"dataloader_num_workers": 2}, 1e-3),
        ({"torch_compile": True, "torch_compile_backend": "aot_eager"}, 1e-3),
    ],
    ids=str,
)
def test_trainer_with(options, tolerance, stock, tmp_path):
    whole = trained(fast_of(stock, strict=True), tmp_path)
    assert_same_training(trained(fast_of(stock, strict=True), tmp_path, **options), whole, tolerance)


def test_trainer_evaluates_and_predicts(stock, tmp_path):
    pytest.importorskip("accelerate", minversion="1.1")
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path), per_device_eval_batch_size=5, report_to=[], use_cpu=True, disable_tqdm=True
    )
    found = []
    for some in (fast_of(stock, strict=True), stock):
        output = transformers.Trainer(model=some, args=arguments).predict(Texts("AlbertForMaskedLM"))
        real = torch.stack([row["attention_mask"] for row in Texts("AlbertForMaskedLM").rows]).bool()
        found.append((output.metrics["test_loss"], torch.as_tensor(output.predictions)[real]))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------------ two processes


def _one_of_two(rank: int, folder: str, port: int, head: str) -> None:
    """As torchrun starts it."""
    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    fast = accelerate(torch.load(f"{folder}/model.pt", weights_only=False), strict=True)
    steps = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "ddp_backend": "gloo"}
    found = trained(fast, f"{folder}/{rank}", head, **steps)
    assert torch.distributed.get_world_size() == 2
    torch.save(found, f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def test_trainer_in_two_processes(tmp_path):
    """Rows of different lengths, with different numbers of labels, in two steps of accumulation on either side."""
    # transformers 4 takes the mean of means: right where each row has one label.
    head = "AlbertForMaskedLM" if TRANSFORMERS_5 else "AlbertForSequenceClassification"
    stock = model(getattr(transformers, head), dtype=torch.float32, initializer_range=0.1)
    torch.save(stock, tmp_path / "model.pt")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_one_of_two, args=(str(tmp_path), port, head), nprocs=2)
    whole = trained(stock, tmp_path, head)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt", weights_only=False)
        assert_same_training({**found, "loss": whole["loss"]}, whole)  # it logs that of its own process alone
    assert torch.load(tmp_path / "0.pt", weights_only=False)["loss"] == pytest.approx(whole["loss"], abs=2e-3)


# --------------------------------------------------------------------------------------------------------------- peft


def lora(base: nn.Module, **options) -> nn.Module:
    peft = pytest.importorskip("peft")
    chosen = {"r": 2, "lora_alpha": 8, "init_lora_weights": False, "target_modules": ["query", "value"], **options}
    return peft.get_peft_model(base, peft.LoraConfig(**chosen))


@pytest.mark.parametrize("first", ["accelerate", "peft"])
def test_lora_inside_the_layer_is_transformers_own(first, stock):
    seed = torch.seed()
    expected = lora(copy.deepcopy(stock))
    torch.manual_seed(seed)
    fast = lora(fast_of(stock)) if first == "accelerate" else accelerate(lora(copy.deepcopy(stock)))
    fast.load_state_dict(expected.state_dict())
    input_ids = ids()
    labels = torch.where(MASK, input_ids, -100)
    expected.eval()
    fast.eval()
    (path,) = explain(fast, input_ids=input_ids)
    assert "query is a peft.tuners.lora.layer.Linear" in path.refusal
    theirs, ours = (some(input_ids=input_ids, attention_mask=MASK, labels=labels) for some in (expected, fast))
    torch.testing.assert_close(ours.logits[MASK], theirs.logits[MASK], rtol=1e-4, atol=1e-4)
    assert not TRANSFORMERS_5 or not ours.logits[~MASK].any()  # who serves is not to be seen
    torch.testing.assert_close(ours.loss, theirs.loss)
    assert not torch.allclose(theirs.logits, stock(input_ids, MASK).logits)
    # Merged, it is fast again.
    merged = fast.merge_and_unload()
    assert served(merged, input_ids=input_ids)
    torch.testing.assert_close(merged(input_ids).logits, expected(input_ids=input_ids).logits, rtol=1e-3, atol=1e-3)


@transformers_5
def test_lora_on_the_head_leaves_the_encoder_fast(stock):
    fast = accelerate(lora(copy.deepcopy(stock), target_modules=["predictions.dense"]).eval())
    input_ids = ids()
    assert served(fast, input_ids=input_ids)
    labels = torch.where(MASK, input_ids, -100)
    output = fast(input_ids=input_ids, labels=labels, num_items_in_batch=40)
    expected = nn.functional.cross_entropy(output.logits.flatten(0, 1), labels.flatten(), reduction="sum") / 40
    torch.testing.assert_close(output.loss, expected)


def test_lora_with_gradient_checkpointing(stock):
    """Where transformers' own layers run, they keep their input alone."""
    fast = lora(fast_of(stock)).train()
    input_ids = ids()

    def gradients():
        trained = [p for p in fast.parameters() if p.requires_grad]
        return torch.autograd.grad(fast(input_ids=input_ids, labels=input_ids).loss, trained)

    before = gradients()
    calls = []
    fast.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
    layer = fast.base_model.model.albert.encoder.albert_layer_groups[0].albert_layers[0]
    inner = layer._gradient_checkpointing_func
    layer._gradient_checkpointing_func = lambda *args: calls.append(1) or inner(*args)
    for one, other in zip(gradients(), before, strict=True):
        torch.testing.assert_close(one, other)
    assert len(calls) == 3


# -------------------------------------------------------------------------------------------------- pipelines and texts


@pytest.fixture
def tokenizer():
    """One word an id."""
    tokenizers = pytest.importorskip("tokenizers")
    words = {"<pad>": 0, "<unk>": 1, "[CLS]": 2, "[SEP]": 3, "[MASK]": 4} | {f"w{i}": i for i in range(5, 60)}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    names = {"mask_token": "[MASK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<pad>", **names)


TEXTS = ["w7 w9 [MASK] w12 w30", "w8 [MASK]"]


@pytest.mark.parametrize(
    ("task", "head"),
    [
        ("fill-mask", "AlbertForMaskedLM"),
        ("text-classification", "AlbertForSequenceClassification"),
        ("token-classification", "AlbertForTokenClassification"),
        ("feature-extraction", "AlbertModel"),
    ],
)
def test_pipelines(task, head, tokenizer, tmp_path):
    stock = model(getattr(transformers, head), dtype=torch.float32)
    stock.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    size = 1 if task == "feature-extraction" else 2  # which shows padding
    expected = transformers.pipeline(task, model=stock, tokenizer=tokenizer, device="cpu")(TEXTS, batch_size=size)
    hf.register()
    try:
        made = transformers.pipeline(task, model=str(tmp_path), tokenizer=tokenizer, device="cpu")
    finally:
        hf.unregister()
    assert type(made.model) is getattr(hf, head)
    accelerate(made.model, strict=True)
    actual = made(TEXTS, batch_size=size)
    assert flat(actual) == pytest.approx(flat(expected), rel=1e-3, abs=1e-4)


def flat(results) -> list:
    """The numbers of a pipeline's answer, in order."""
    if isinstance(results, dict):
        return flat([results[key] for key in sorted(results)])
    if isinstance(results, list):
        return [value for part in results for value in flat(part)]
    return [float(results)] if isinstance(results, (int, float)) else []


def test_sentence_transformers(tokenizer, tmp_path):
    sentence_transformers = pytest.importorskip("sentence_transformers")
    model(dtype=torch.float32).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    whole = sentence_transformers.SentenceTransformer(str(tmp_path), device="cpu")  # pools by the mean of real tokens
    texts = ["w7 w9 w11 w12 w30", "w8"]
    expected = whole.encode(texts)
    accelerate(whole, strict=True)
    torch.testing.assert_close(torch.as_tensor(whole.encode(texts)), torch.as_tensor(expected), rtol=1e-4, atol=1e-4)


# ------------------------------------------------------------------------------------------------------------ exporting


@transformers_5
@pytest.mark.parametrize("head", ["AlbertModel", "AlbertForMaskedLM"])
def test_export(head):
    fast = fast_of(model(getattr(transformers, head), dtype=torch.float32), strict=True)
    input_ids = ids()
    inputs = {"input_ids": input_ids, "attention_mask": MASK.long()}
    dim = torch.export.Dim("rows", min=2, max=16)
    exported = torch.export.export(fast, (), inputs, dynamic_shapes={name: {0: dim} for name in inputs}, strict=False)
    assert any("albert_fast.encoder" in str(node.target) for node in exported.graph.nodes)
    more = {name: torch.cat([value, value]) for name, value in inputs.items()}
    real = torch.cat([MASK, MASK])
    actual, expected = exported.module()(**more)[0], fast(**more)[0]
    torch.testing.assert_close(actual[real], expected[real], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dynamo", [True, False])
def test_onnx_is_transformers_graph(dynamo, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    stock, input_ids = model(transformers.AlbertForMaskedLM, dtype=torch.float32), ids()
    fast, path = fast_of(stock), tmp_path / "model.onnx"
    torch.onnx.export(
        fast, (input_ids,), path, dynamo=dynamo, input_names=["input_ids"], output_names=["logits"], opset_version=18
    )
    assert served(fast, input_ids=input_ids)  # as before
    (logits,) = onnxruntime.InferenceSession(path).run(["logits"], {"input_ids": input_ids.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), stock(input_ids).logits, rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("head", ["AlbertForSequenceClassification", "AlbertForMaskedLM"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_trace_is_transformers_graph(head, dtype):
    """Of whichever rows it was made, in both dtypes: kernels serve the one alone."""
    fast = fast_of(model(getattr(transformers, head), dtype=dtype))
    fast.config.return_dict = False
    input_ids = ids()
    with torch.no_grad():
        traced = torch.jit.trace(fast, (input_ids, torch.ones_like(input_ids)), check_trace=False)
        actual, expected = (some(input_ids, MASK.long())[0] for some in (traced, fast))
    assert served(fast, input_ids=input_ids, attention_mask=MASK)  # as before
    if head == "AlbertForMaskedLM":
        actual, expected = actual[MASK], expected[MASK]
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


# ------------------------------------------------------------------------------------------------- threads and workers


def test_threads():
    fast = fast_of(model(transformers.AlbertForMaskedLM, dtype=torch.float32), strict=True)
    inputs = [ids()[:, :length].contiguous() for length in (3, 5, 8, 11)]
    expected = [fast(some, labels=some).loss for some in inputs]
    wrong = []

    def call(some, loss):
        for _ in range(20):
            if not torch.equal(fast(some, labels=some).loss, loss):
                wrong.append(some)

    threads = [threading.Thread(target=call, args=pair) for pair in zip(inputs, expected, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


class Encoded(Dataset):
    """A data set that runs the model in the loader's workers, as some do with a frozen encoder."""

    def __init__(self, fast: nn.Module) -> None:
        self.fast = fast

    def __len__(self) -> int:
        return 4

    @torch.no_grad()
    def __getitem__(self, row: int) -> torch.Tensor:
        return self.fast(torch.arange(5, 5 + LENGTHS[0])[None] + row).last_hidden_state[0]


def test_data_loader_workers():
    fast = fast_of(model(dtype=torch.float32), strict=True)
    expected = torch.stack([Encoded(fast)[row] for row in range(4)])
    actual = torch.cat(list(DataLoader(Encoded(fast), num_workers=2, multiprocessing_context="fork")))
    torch.testing.assert_close(actual, expected)
