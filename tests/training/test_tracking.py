"""The log as it is on the disk, through kills and full disks, and what a terminal shows."""

import fcntl
import itertools
import json
import math
import os
import pty
import re
import resource
import signal
import struct
import subprocess
import sys
import termios
import time
import traceback
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from albert_fast.training import tracking
from albert_fast.training.tracking import LOG, Recorder, fitting, read, train_parts

TESTS = Path(__file__).parents[1]

TRAIN = {
    "step": 1,
    "epoch": 0,
    "progress": 0.25,
    "seconds": 12.5,
    "tokens": 4096,
    "loss": 5.8,
    "masked_lm_loss": 5.12,
    "sentence_order_loss": 0.68,
    "unigram_loss": 6.39,
    "below_unigram": 1.27,
    "masked_accuracy": 0.312,
    "sentence_order_accuracy": 0.83,
    "learning_rate": 1e-3,
    "gradient_norm": 1.5,
    "batch_size": 32,
    "length": 128,
    "tokens_per_second": 125432.0,
    "mfu": 0.42,
    "memory": 34_000_000_000,
    "seconds_left": 3723.0,
}
EVALUATION = {
    "step": 2,
    "seconds": 20.0,
    "tokens": 8192,
    "masked_lm_loss": 5.2,
    "unigram_loss": 6.41,
    "below_unigram": 1.21,
    "masked_accuracy": 0.3,
    "rows": 100,
    "labels": 1900,
    "weights": "ema",
}


def train(step, **others):
    return {**TRAIN, "step": step, **others}


def steps(run):
    return [record["step"] for record in read(run)]


def begin(work, errors):
    """A child that does `work`, a fork: starting Python anew takes seconds. `errors` is its stderr."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.dup2(errors, 2)
            sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
            work()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    return child


def run(work):
    """What a child that does `work` says."""
    reading, writing = os.pipe()
    child = begin(work, writing)
    os.close(writing)
    with open(reading, encoding="utf-8") as errors:
        text = errors.read()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, text
    return text


def on_terminal(work, columns):
    """What a child that does `work` writes to a terminal."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    child = begin(work, theirs)
    os.close(theirs)
    parts = []
    while True:
        try:
            part = os.read(ours, 1 << 16)
        except OSError:  # how Linux ends it
            part = b""
        if not part:
            break
        parts.append(part)
    os.close(ours)
    text = b"".join(parts).decode()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, text
    return text


# ------------------------------------------------------------------------------------------------------------ the file


def test_round_trip(tmp_path):
    odd = train(3, loss=math.nan, gradient_norm=math.inf, mfu=None, below_unigram=-math.inf)
    with Recorder(tmp_path / "a" / "run", quiet=True) as recorder:
        recorder.train(TRAIN)
        recorder.evaluation(EVALUATION)
        recorder.train(odd)
        recorder.event(3, "inf", "nan")
        recorder.train(train(np.int64(4), loss=np.float32("nan"), memory=torch.tensor(7)))
        got = read(tmp_path / "a" / "run")  # flushed at each line
    assert got[:2] == [{"kind": "train", **TRAIN}, {"kind": "evaluation", **EVALUATION}]
    assert math.isnan(got[2].pop("loss"))
    assert math.isnan(odd.pop("loss"))
    assert got[2] == {"kind": "train", **odd}
    assert got[3] == {"kind": "event", "step": 3, "name": "inf", "message": "nan"}
    assert (got[4]["step"], got[4]["memory"]) == (4, 7)
    assert math.isnan(got[4]["loss"])
    for line in (tmp_path / "a" / "run" / LOG).read_text().splitlines():
        json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


def test_no_directory_records_nothing(tmp_path, monkeypatch, capsys):
    """As on all ranks but the first, whatever is asked for."""
    monkeypatch.chdir(tmp_path)
    with Recorder(None, tensorboard=True, wandb="project") as recorder:
        recorder.train(TRAIN)
        recorder.evaluation(EVALUATION)
        recorder.event(1, "a", "b")
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("after", [0, 2, 9])
def test_a_run_that_goes_on(after, tmp_path):
    with Recorder(tmp_path, quiet=True) as recorder:
        for step in range(1, 5):
            recorder.train(train(step))
            recorder.event(step, "finding", "…")
            if step == 2:
                recorder.evaluation(EVALUATION)
    kept = [step for step in (1, 1, 2, 2, 2, 3, 3, 4, 4) if step <= after]
    before = (tmp_path / LOG).read_bytes()
    with open(tmp_path / LOG, "ab") as file:
        file.write(b'{"kind": "train", "step": ')
    with Recorder(tmp_path, after_step=after, quiet=True) as recorder:
        assert steps(tmp_path) == kept
        recorder.train(train(after + 1))
    assert steps(tmp_path) == [*kept, after + 1]
    assert before.startswith(b"".join((tmp_path / LOG).read_bytes().splitlines(keepends=True)[:-1]))
    assert [path.name for path in tmp_path.iterdir()] == [LOG]


def test_what_is_whole_is_not_written_anew(tmp_path, monkeypatch):
    with Recorder(tmp_path, quiet=True) as recorder:
        recorder.train(TRAIN)
    monkeypatch.setattr(tracking, "_replace", lambda *arguments: pytest.fail("nothing is to be cut off"))
    with Recorder(tmp_path, after_step=1, quiet=True):
        assert steps(tmp_path) == [1]


@pytest.mark.parametrize("size", [0, 1, 10, -1])
def test_a_half_written_last_line_is_dropped(size, tmp_path):
    with Recorder(tmp_path, quiet=True) as recorder:
        recorder.train(TRAIN)
        recorder.train(train(2))
    first, second = (tmp_path / LOG).read_bytes().splitlines(keepends=True)
    (tmp_path / LOG).write_bytes(first + second[:size])
    # All but the end of the line is all of the record.
    expected = [1, 2] if size == -1 else [1]
    assert steps(tmp_path) == expected
    with Recorder(tmp_path, after_step=2, quiet=True) as recorder:
        recorder.train(train(3))
    assert steps(tmp_path) == [*expected, 3]


@pytest.mark.parametrize(
    "damage", [b"\xff\xfe", b'{"kind": "train"}', b'{"step": 1}', b"[1]", b"", b'{"kind": "train", "step": "1"}']
)
def test_a_damaged_line_is_named(damage, tmp_path):
    line = json.dumps({"kind": "train", **TRAIN}).encode()
    (tmp_path / LOG).write_bytes(b"\n".join([line, damage, line, b""]))
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / LOG}, line 2 is damaged")):
        read(tmp_path)
    with pytest.raises(ValueError, match="line 2 is damaged"):
        Recorder(tmp_path, after_step=1, quiet=True)
    (tmp_path / LOG).write_bytes(b"\n".join([line, damage]))
    assert steps(tmp_path) == [1]


def test_another_runs_log_is_not_touched(tmp_path):
    with Recorder(tmp_path, quiet=True) as recorder:
        recorder.train(train(7))
    with pytest.raises(ValueError, match=r"has the records of a run, up to step 7: write to another directory"):
        Recorder(tmp_path, quiet=True)
    assert steps(tmp_path) == [7]
    with pytest.raises(ValueError, match=f"{tmp_path / 'none'} has no {LOG}"):
        read(tmp_path / "none")


def test_killed_at_any_moment(tmp_path):
    """kill -9 in the middle of writing; what goes on has each step once."""
    last = 0
    for _ in range(3):
        reading, writing = os.pipe()

        def work(last=last, writing=writing):
            with Recorder(tmp_path, after_step=last or None, quiet=True) as recorder:
                for step in itertools.count(last + 1):
                    recorder.train(train(step))
                    if step % 50 == 0:
                        os.write(writing, b"%d\n" % step)

        child = begin(work, 2)
        last = int(os.read(reading, 100).split()[0])
        time.sleep(0.02)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reading)
        os.close(writing)
    with Recorder(tmp_path, after_step=last, quiet=True):
        pass
    assert steps(tmp_path) == list(range(1, last + 1))


# ----------------------------------------------------------------------------------------------------------- full disks


def fill(directory, size, mended=True, **options):
    """Writes 30 records; after 9 of them, and until the last third, no file may grow beyond `size` bytes."""
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    recorder = Recorder(directory, quiet=True, **options)
    for step in range(1, 31):
        if step == 10:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
        if step == 20 and mended:
            resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
        recorder.train(train(step))
    recorder.close()
    recorder.close()


@pytest.mark.parametrize("size", [0, 6001, 7003])
def test_a_full_disk_that_is_mended(size, tmp_path):
    errors = run(lambda: fill(tmp_path, size))
    assert errors.count("warning") == 1
    assert steps(tmp_path) == list(range(1, 31))


def test_a_full_disk_that_stays(tmp_path):
    """What is there is whole, and how much is lost is said."""
    errors = run(lambda: fill(tmp_path, 6001, mended=False))
    kept = steps(tmp_path)
    assert errors.count("warning") == 2
    assert f"{tmp_path / LOG} cannot be written; the run goes on" in errors
    assert f"lacks the last {30 - len(kept)} records" in errors
    assert 9 < len(kept) < 30
    assert kept == list(range(1, len(kept) + 1))
    assert (tmp_path / LOG).read_bytes().endswith(b"}\n")


def test_tensorboard_on_a_full_disk(tmp_path):
    pytest.importorskip("torch.utils.tensorboard")
    errors = run(lambda: fill(tmp_path, 3000, tensorboard=True))
    assert steps(tmp_path) == list(range(1, 31))
    assert errors.count("TensorBoard has failed") == 1


def test_a_terminal_that_takes_nothing(tmp_path):
    def work():
        with Recorder(tmp_path) as recorder:
            recorder.train(TRAIN)
            recorder.event(1, "a", "b")

    full = os.open("/dev/full", os.O_WRONLY)
    assert os.waitpid(begin(work, full), 0)[1] == 0
    os.close(full)
    assert steps(tmp_path) == [1, 1]


# --------------------------------------------------------------------------------------------------------- the terminal


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(tracking, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def test_lines_now_and_then(tmp_path, clock, capsys):
    """The first, the last, and one in ten seconds; evaluations and events at once."""
    with Recorder(tmp_path) as recorder:
        for step in range(1, 26):
            recorder.train(train(step))
            clock.now += 1.0
            if step == 5:
                recorder.evaluation(EVALUATION)
                recorder.event(5, "rollback", "to step 4 [bold]")
    lines = capsys.readouterr().err.splitlines()
    assert [re.search(r"step (\d+)", line)[1] for line in lines] == ["1", "2", "5", "11", "21", "25"]
    assert lines[0] == (
        " 25%  step 1  loss 5.12  unigram -1.27  1h02m left  mlm 31%  sop 83%  125k tok/s  MFU 42%  34 GB"
    )
    assert lines[1] == "step 2: held out: loss 5.20, unigram -1.21, mlm 30%, averaged weights"
    assert lines[2] == "step 5: rollback: to step 4 [bold]"


def test_quiet(tmp_path, capsys):
    with Recorder(tmp_path, quiet=True) as recorder:
        recorder.train(TRAIN)
        recorder.evaluation(EVALUATION)
        recorder.event(1, "a", "b")
    assert capsys.readouterr() == ("", "")


def test_lines_have_what_is_known():
    assert train_parts({"step": 3, "masked_lm_loss": math.nan, "below_unigram": None}) == ["step 3", "loss nan"]
    times = {0.4: "0s", 59.7: "1m00s", 754: "12m34s", 3723: "1h02m", 9e4: "1d01h", math.inf: "?"}
    for seconds, words in times.items():
        assert train_parts({"seconds_left": seconds}) == [f"{words} left"]
    for count, words in {
        0.0: "0",
        950.4: "950",
        999.7: "1000",
        12345.0: "12.3k",
        999_900.0: "1000k",
        2e6: "2M",
    }.items():
        assert train_parts({"tokens_per_second": count}) == [f"{words} tok/s"]


@pytest.mark.parametrize("columns", [5, 40, 80, 100])
def test_a_line_fits(columns):
    parts = train_parts(train(1_234_567))
    line = fitting(parts, columns)
    assert len(line) <= columns
    assert line == " ".join(parts)[: len(line)]
    assert len(line) + 15 > columns or line == " ".join(parts)


def three_steps(directory):
    tracking.REFRESH = 0.0
    with Recorder(directory) as recorder:
        for step in range(1, 4):
            recorder.train(train(1000 * step, progress=step / 3))
            if step == 2:
                recorder.event(2000, "rollback", "to step 1000 [bold]")


@pytest.fixture
def terminal(monkeypatch):
    for name in ("COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


@pytest.mark.parametrize(("columns", "last"), [(100, "34 GB"), (80, "sop 83%"), (60, "1h02m left")])
def test_the_live_line(columns, last, tmp_path, terminal):
    """On a terminal of these columns."""
    pytest.importorskip("rich.live")
    text = on_terminal(lambda: three_steps(tmp_path), columns)
    assert "\x1b[2K" in text, "no line was rewritten"
    lines = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line).rstrip() for line in re.split(r"[\r\n]+", text)]
    shown = [line for line in lines if "━" in line]
    assert all(len(line) < columns for line in shown)
    assert {re.search(r"step (\d+)", line)[1] for line in shown} == {"1000", "2000", "3000"}
    assert all(line.endswith(last) for line in shown)
    assert [line for line in lines if line and "━" not in line] == ["step 2000: rollback: to step 1000 [bold]"]


@pytest.mark.parametrize("lack", ["rich", "cursor"])
def test_a_terminal_without_a_live_line(lack, tmp_path, terminal, monkeypatch):
    if lack == "rich":
        monkeypatch.setitem(sys.modules, "rich.live", None)
    else:
        monkeypatch.setenv("TERM", "dumb")
    text = on_terminal(lambda: three_steps(tmp_path), 100)
    assert [line[:15] for line in text.split("\r\n") if line] == [
        " 33%  step 1000",
        "step 2000: roll",
        "100%  step 3000",
    ]


# ---------------------------------------------------------------------------------- TensorBoard, and Weights & Biases


@pytest.mark.parametrize(
    ("flag", "hidden", "cure"),
    [
        ({"tensorboard": True}, "tensorboard", r"log\.tensorboard .* pip install 'albert_fast\[train\]'"),
        ({"wandb": "project"}, "wandb", r"log\.wandb .* pip install wandb"),
    ],
    ids=["tensorboard", "wandb"],
)
def test_what_is_not_installed(flag, hidden, cure, tmp_path, monkeypatch):
    for name in list(sys.modules):
        if name == "torch.utils.tensorboard" or name.split(".")[0] == hidden:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, hidden, None)
    with pytest.raises(ValueError, match=cure):
        Recorder(tmp_path / "run", quiet=True, **flag)
    assert list(tmp_path.iterdir()) == []


def test_tensorboard(tmp_path):
    """Figures by step; of a run that goes on, each step once."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Recorder(tmp_path, quiet=True, tensorboard=True, config={"a": {"b": 1}}) as recorder:
        for step in range(1, 5):
            recorder.train(train(step, mfu=None, loss=math.nan if step == 4 else float(step)))
        recorder.evaluation(EVALUATION)
        recorder.event(4, "collapse", "what to do")
    with Recorder(tmp_path, quiet=True, tensorboard=True, after_step=2) as recorder:
        recorder.train(train(3, mfu=None, loss=30.0))
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert [event.step for event in events.Scalars("evaluation/below_unigram")] == [2]
    assert "train/mfu" not in events.Tags()["scalars"]
    assert "config/text_summary" in events.Tags()["tensors"]


class Service:
    """What is used of wandb, in the process."""

    class Failure(Exception):
        pass

    def __init__(self, monkeypatch):
        self.runs, self.lines, self.finished, self.broken = [], [], 0, False
        self.errors = SimpleNamespace(Error=self.Failure)
        self.Settings = lambda **options: options
        self.id = "abc"
        monkeypatch.setitem(sys.modules, "wandb", self)

    def init(self, **options):
        if self.broken:
            raise self.Failure("no API key")
        self.runs.append(options)
        return self

    def define_metric(self, name, **options):
        pass

    def log(self, figures):
        if self.broken:
            raise RuntimeError("gone")
        self.lines.append(figures)

    def finish(self):
        self.finished += 1


def test_wandb(tmp_path, monkeypatch, capsys):
    service = Service(monkeypatch)
    run = tmp_path / "albert"
    with Recorder(run, quiet=True, wandb="novels", config={"a": 1}) as recorder:
        recorder.train(train(1, mfu=None))
        recorder.evaluation(EVALUATION)
        recorder.event(2, "collapse", "what to do")
    with Recorder(run, quiet=True, wandb="novels", after_step=1) as recorder:
        recorder.train(train(2))
        service.broken = True
        recorder.train(train(3))
        recorder.train(train(4))
    options, again = service.runs
    assert (options["project"], options["name"], options["config"]) == ("novels", "albert", {"a": 1})
    assert (options["id"], again["id"]) == (None, "abc")
    assert [line["step"] for line in service.lines] == [1, 2, 2, 2]
    assert service.lines[0]["train/loss"] == TRAIN["loss"]
    assert "train/mfu" not in service.lines[0]
    assert service.lines[1]["evaluation/rows"] == 100
    assert service.lines[2] == {"step": 2, "event": "collapse: what to do"}
    assert service.finished == 1
    assert steps(run) == [1, 2, 3, 4]
    assert capsys.readouterr().err.count("Weights & Biases has failed and is left alone") == 1
    with pytest.raises(ValueError, match=r"no API key; `wandb login`, or set WANDB_MODE=offline"):
        Recorder(tmp_path / "other", quiet=True, wandb="novels")


def two_runs(directory):
    with Recorder(directory, quiet=True, wandb="novels", config={"a": 1}) as recorder:
        recorder.train(TRAIN)
        recorder.event(1, "a", "b")
    with Recorder(directory, quiet=True, wandb="novels", after_step=1) as recorder:
        recorder.train(train(2))


@pytest.mark.slow
def test_wandb_itself(tmp_path, monkeypatch):
    """Offline: nothing leaves the machine."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("HOME", "WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home"))
    directory = tmp_path / "run"
    code = f"from training.test_tracking import two_runs; two_runs({str(directory)!r})"
    ended = subprocess.run([sys.executable, "-c", code], cwd=TESTS, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr.count("warning")) == (0, 0), ended.stderr
    (name,) = {path.name.rsplit("-", 1)[1] for path in (directory / "wandb").glob("offline-run-*")}
    assert (directory / "wandb-id").read_text().strip() == name
    assert steps(directory) == [1, 1, 2]
