"""`albert-fast bench --pretrain`: a step of pretraining, beside transformers' Trainer on the same rows.

A step is what the loops do once they have a batch: masked-LM and sentence-order loss, gradients, their norm clipped,
and AdamW, in float32. Rows are drawn and masked beforehand, once. This package gets them packed; the Trainer, which has
no other way, padded. Both begin with the same weights and no dropout, so that their losses must be the same: the first
is held against float64, and those of the following steps, which show that gradients and optimizer agree, against each
other.

`python -m albert_fast.bench.pretraining DIRECTORY` is the process of a peer (see `worker`).
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from albert_fast import AlbertConfig, AlbertForPreTraining
from albert_fast.bench.arguments import TRAINERS, Shape
from albert_fast.bench.data import Text
from albert_fast.bench.parity import Results
from albert_fast.bench.peers.albert_fast import forced_backend
from albert_fast.bench.peers.base import missing
from albert_fast.bench.work import Row, Work, time_rows
from albert_fast.bench.worker import TURN, Process, WorkerError, median, peak_bytes, read_request, synchronize
from albert_fast.ops.masked_lm_loss import IGNORE_INDEX
from albert_fast.pretraining.examples import Batch, ExampleOptions, Examples
from albert_fast.pretraining.masking import Vocabulary
from albert_fast.pretraining.objective import MaskedLMObjective
from albert_fast.pretraining.sentences import split
from albert_fast.pretraining.store import TokenStore
from albert_fast.tokenizer import AlbertTokenizer
from albert_fast.training import parallel
from albert_fast.training.lamb import Lamb, parameter_groups

OURS, THEIRS = TRAINERS

BATCHES = 2  # that the steps take in turn
RAGGED = 0.5  # share of rows of random length

# The first loss, relative to float64; and the others, after as many steps, relative to this package's.
LIMIT = 1e-4
LIMIT_AFTER_STEPS = 1e-3

LEARNING_RATE, BETAS, EPS, WEIGHT_DECAY, CLIP = 1e-4, (0.9, 0.999), 1e-6, 0.01, 1.0


# ---------------------------------------------------------------------------------------------------------------- data


def make_examples(tokenizer: AlbertTokenizer, text: Text, shape: Shape) -> Examples:
    """Of the whole text as one document, with n-gram masks and sentence order; the same ones each time.

    Full rows are cut as the original's. Of ragged ones half have a random length, and none ends within a sentence.
    """
    sentences = tokenizer([sentence for paragraph in text.paragraphs for sentence in split(paragraph)])["input_ids"]
    store = TokenStore.from_documents([[ids[1:-1] for ids in sentences]], len(tokenizer))
    short = RAGGED if shape.ragged else 0.0
    options = ExampleOptions(shape.length, short_probability=short, google_compat=not shape.ragged)
    return Examples(store, Vocabulary.from_tokenizer(tokenizer), options)


def make_batches(tokenizer: AlbertTokenizer, text: Text, shape: Shape, count: int = BATCHES) -> list[Batch]:
    """Batches of the examples. Raises ValueError where there is too little text."""
    examples = make_examples(tokenizer, text, shape)
    if examples.size(0) < count * shape.rows:
        raise ValueError(f"--text has too little text for {count} batches of {shape}: give more of it")
    return [examples.batch(0, range(n * shape.rows, (n + 1) * shape.rows)) for n in range(count)]


def lengths(batches: Sequence[Batch]) -> list[int]:
    """Tokens of each row."""
    return [length for batch in batches for length in batch.cu_seqlens.diff().tolist()]


def labelled(batches: Sequence[Batch]) -> int:
    return sum(int((batch.labels != IGNORE_INDEX).sum()) for batch in batches)


# ----------------------------------------------------------------------------------------------------------- measuring


class Trained(Process):
    """The process of a peer that trains."""

    def __init__(
        self,
        peer: str,
        config: AlbertConfig,
        state_dict: Mapping[str, Tensor],
        batches: Sequence[Batch],
        device: torch.device,
    ) -> None:
        request = {
            "config": config.to_dict(),
            "state_dict": dict(state_dict),
            "batches": [asdict(batch) for batch in batches],
            "device": str(device),
        }
        super().__init__(peer, "albert_fast.bench.pretraining", request)

    def losses(self) -> list[float]:
        """Of one step with each batch; builds the peer first. `seconds` are those of a step from then on."""
        return self._ask("losses")

    def results(self) -> Results:
        return {"losses": torch.tensor(self.losses(), dtype=torch.float64)}

    def call(self) -> None:
        """One step with each batch: the loop takes no fewer."""
        self.losses()


def compare(
    work: Work,
    config: AlbertConfig,
    state_dict: Mapping[str, Tensor],
    batches: Sequence[Batch],
    device: torch.device,
    repeats: int,
    say: Callable[[str], None] = lambda text: None,
) -> None:
    """Fills in the rows of `work`: who has the right losses is timed, in turn.

    Args:
        config: without dropout, which each draws in its own way.
        state_dict: of AlbertForPreTraining.
        repeats: turns of each.
    """
    workers: dict[str, Trained] = {}
    try:
        # The processes begin while the oracle is computed.
        for name in (OURS, THEIRS):
            work.rows.append(Row(name, limit=LIMIT, reason=refuses(name)))
            if work.rows[-1].reason is None:
                workers[name] = Trained(name, config, state_dict, batches, device)
        say(f"{work.title}: the oracle, in float64")
        expected = oracle(config, state_dict, batches[0], device)
        ours: list[float] = []
        for row in work.rows:
            if row.peer not in workers:
                continue
            say(f"{work.title}: parity of {row.peer}")
            try:
                losses = workers[row.peer].losses()
                ours = ours or losses
                row.error = abs(losses[0] - expected) / expected
                row.reason = _what_is_wrong(losses, ours, row.error)
            except WorkerError as error:
                row.reason = str(error)
            row.passed = row.reason is None
            if not row.passed:
                workers.pop(row.peer).close()
        time_rows(work, workers, repeats, lambda text: say(f"{work.title}: {text}"))
    finally:
        for worker in workers.values():
            worker.close()


def oracle(config: AlbertConfig, state_dict: Mapping[str, Tensor], batch: Batch, device: torch.device) -> float:
    """The first step's loss in float64, by plain PyTorch."""
    model = AlbertForPreTraining(config).to(device).double().eval()
    model.load_state_dict(state_dict)
    batch = batch.to(device)
    with forced_backend("reference"), torch.no_grad():
        outputs = model(batch.packed(), labels=batch.labels, sentence_order_label=batch.sentence_order_label)
    return float(outputs.loss)


def oracle_losses(
    config: AlbertConfig, state_dict: Mapping[str, Tensor], batches: Sequence[Batch], device: torch.device
) -> list[float]:
    """The losses of one step with each batch, in float64 and plain PyTorch."""
    step = _steps(AlbertForPreTraining(config).to(device).double(), state_dict)
    with forced_backend("reference"):
        return [float(step(batch.to(device))) for batch in batches]


def refuses(peer: str) -> str | None:
    packages = ("transformers", "accelerate") if peer == THEIRS else ()
    return missing(packages)


def _what_is_wrong(losses: list[float], ours: list[float], error: float) -> str | None:
    if not error <= LIMIT:  # NaN is wrong, too
        return f"wrong: its first loss is {losses[0]:.6f}, off by {error:.1e}, and at most {LIMIT:.0e} was expected"
    for step, (loss, other) in enumerate(zip(losses, ours, strict=True)):
        if not abs(loss - other) <= LIMIT_AFTER_STEPS * abs(other):
            return f"wrong: after {step} steps its loss is {loss:.6f}, and {OURS}'s {other:.6f}"
    return None


# ------------------------------------------------------------------------------------------------------- in the process


class Turns:
    """Lets a loop take steps when it is told to, and times them: the loop calls `begin` before a step and `end` after.

    Orders are "losses", which is answered with those of one pass over the batches; "call", with the seconds of one
    step, the mean of a pass; and "peak". As with every peer short passes are repeated, and the median without the first
    counts. The program ends with the orders.
    """

    def __init__(
        self, orders: Iterator[str], answer: Callable[[object], None], batches: int, device: torch.device
    ) -> None:
        self._orders, self._answer, self._batches, self._device = orders, answer, batches, device
        self._order: str | None = None
        self._start = 0.0
        self._seconds: list[float] = []
        self._losses: list[Tensor] = []

    def begin(self) -> None:
        while self._order is None:
            order = next(self._orders, None)
            if order is None:
                raise SystemExit
            if order == "peak":
                self._answer(peak_bytes(self._device))
            else:
                self._order = order
        synchronize(self._device)
        self._start = time.perf_counter()

    def end(self, loss: Tensor) -> None:
        synchronize(self._device)
        self._seconds.append(time.perf_counter() - self._start)
        self._losses.append(loss)
        if len(self._seconds) % self._batches:
            return
        if self._order == "losses":
            self._answer([float(loss) for loss in self._losses])
        else:
            starts = range(0, len(self._seconds), self._batches)
            passes = [sum(self._seconds[start : start + self._batches]) for start in starts]
            if passes[0] <= TURN and sum(passes[1:]) < TURN:
                return
            self._answer(median(passes[1:] or passes) / self._batches)
        self._order = None
        self._seconds.clear()
        self._losses.clear()


def train_ours(
    config: AlbertConfig, state_dict: Mapping[str, Tensor], batches: Sequence[Batch], device: torch.device, turns: Turns
) -> None:
    """Steps of this package, without end."""
    step = _steps(AlbertForPreTraining(config).to(device), state_dict)
    moved = [batch.to(device) for batch in batches]
    while True:
        for batch in moved:
            turns.begin()
            turns.end(step(batch))


def _steps(model: AlbertForPreTraining, state_dict: Mapping[str, Tensor]) -> Callable[[Batch], Tensor]:
    """What `pretraining.trainer` does with a batch, from these weights on; it gives the loss."""
    model.load_state_dict(state_dict)
    dtype, device = model.dtype, model.device
    objective = MaskedLMObjective(model.train(), torch.zeros(model.config.vocab_size, device=device), mask_id=4)
    groups = parameter_groups(model, WEIGHT_DECAY)
    optimizer = Lamb(groups, lr=LEARNING_RATE, betas=BETAS, eps=EPS, bias_correction=True, adapt=False)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def step(batch: Batch) -> Tensor:
        optimizer.zero_grad()
        sums = objective(batch)
        loss = (sums.losses / sums.counts[:2].clamp(min=1).to(dtype)).sum()
        loss.backward()
        parallel.clip(parameters, parallel.gradient_norm(parameters), CLIP)
        optimizer.step()
        return loss.detach()

    return step


def train_theirs(
    config: AlbertConfig, state_dict: Mapping[str, Tensor], batches: Sequence[Batch], device: torch.device, turns: Turns
) -> None:
    """Steps of transformers' Trainer, without end: nothing is logged, saved or evaluated, and its data is ready."""
    import transformers

    values = {key: value for key, value in config.to_dict().items() if key != "dtype"}
    theirs = transformers.AlbertConfig.from_dict(values)
    theirs._attn_implementation = "sdpa"
    model = transformers.AlbertForPreTraining(theirs)
    model.load_state_dict(dict(state_dict))
    padded = [batch.padded() for batch in batches]

    class Trainer(transformers.Trainer):
        def get_train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(padded, batch_size=None)  # type: ignore[arg-type]

        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            self.loss = super().training_step(*args, **kwargs)
            return self.loss

    class Callback(transformers.TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            turns.begin()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            turns.end(trainer.loss)

    with tempfile.TemporaryDirectory() as directory:
        arguments = transformers.TrainingArguments(
            output_dir=directory,
            max_steps=10**9,
            learning_rate=LEARNING_RATE,
            adam_beta1=BETAS[0],
            adam_beta2=BETAS[1],
            adam_epsilon=EPS,
            weight_decay=WEIGHT_DECAY,
            max_grad_norm=CLIP,
            lr_scheduler_type="constant",
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=device.type == "cpu",
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=padded, callbacks=[Callback()])
        trainer.train()


def main(directory: str) -> None:
    request, answer = read_request(directory)
    batches = [Batch(**values) for values in request["batches"]]
    device = torch.device(request["device"])
    turns = Turns(map(str.strip, sys.stdin), answer, len(batches), device)
    config = AlbertConfig.from_dict(request["config"])
    train = train_ours if request["peer"] == OURS else train_theirs
    train(config, request["state_dict"], batches, device, turns)


if __name__ == "__main__":
    main(sys.argv[1])
