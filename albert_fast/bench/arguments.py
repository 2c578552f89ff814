"""What `albert-fast bench` and `profile` are asked for: the options, checked before any work. Imports nothing heavy."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

MODES = ("inference", "training")
# autocast: float32 weights, the forward pass under torch.autocast to bfloat16.
DTYPES = ("float32", "bfloat16", "float16", "int8", "autocast")
DEVICES = ("cpu", "cuda")
CONFIGS = ("base", "large", "xlarge", "xxlarge")
DEFAULT_PEERS = ("albert_fast", "reference", "transformers-eager", "transformers-sdpa")
PEERS = (
    *DEFAULT_PEERS,
    "transformers-flash",
    "transformers-int8",
    "transformers-compile",
    "transformers-attention",
    "transformers-accelerated",
    "onnxruntime",
    "openvino",
)

SUITES = ("ops", "model", "train", "data", "tasks", "scaling")

# What --pretrain measures, in float32.
PRETRAINING = "pretraining"
TRAINERS = ("albert_fast", "transformers-trainer")

# [CLS], a token that can be masked, [SEP].
SHORTEST_ROW = 3
SHORTEST_PAIR = 8  # of pretraining's examples

Item = TypeVar("Item")


@dataclass(frozen=True)
class Shape:
    """A padded batch: `rows` of `length` tokens, full or with rows of real lengths."""

    rows: int
    length: int
    ragged: bool = False

    def __str__(self) -> str:
        return f"{self.rows}x{self.length}" + (":ragged" if self.ragged else "")


@dataclass(frozen=True)
class Options:
    """The run. `repeats` None: 3 on a CPU, 20 on a GPU; `threads` None: as many as PyTorch takes."""

    shapes: tuple[Shape, ...] = (Shape(2, 128), Shape(6, 128, ragged=True))
    modes: tuple[str, ...] = MODES
    dtypes: tuple[str, ...] = ("float32",)
    compare: tuple[str, ...] = DEFAULT_PEERS
    device: str = "cpu"
    threads: int | None = None
    repeats: int | None = None
    config: str = "base"
    layers: int | None = None
    model: str | None = None
    vocab: str | None = None
    text: tuple[str, ...] = ()
    json: str | None = None
    pretrain: bool = False
    suites: tuple[str, ...] = ()
    quick: bool = False
    only: str = ""
    peers: tuple[str, ...] = ()


@dataclass(frozen=True)
class ProfileOptions:
    """A profile: `work` has one shape, one mode and one dtype. `backend` None: as the package chooses."""

    work: Options
    output: str
    steps: int = 5
    backend: str | None = None


DEFAULTS = Options()
_PRETRAINING_SHAPES = (Shape(8, 128), Shape(8, 128, ragged=True))


def add_to(parser: argparse.ArgumentParser) -> None:
    """Adds the options; what they hold is checked by `options_from`, which the command line reports in one line."""
    _add_work(parser, several=True)
    who = f"who takes part: {', '.join(PEERS)} or an installed peer (default: %(default)s, and who is installed)"
    _add(parser, "--compare", who, metavar="LIST")
    _add(parser, "--repeats", "timed calls of each row (default: 3 on a CPU, 20 on a GPU)", metavar="N")
    parser.add_argument(
        "--pretrain",
        action="store_true",
        help="steps of pretraining, float32, beside transformers' Trainer "
        f"(default shapes: {_joined(_PRETRAINING_SHAPES)})",
    )
    _add(parser, "--suite", f"ready made cases in place of shapes: {', '.join(SUITES)} or all", metavar="LIST")
    parser.add_argument("--quick", action="store_true", help="of --suite fewer and smaller cases: minutes in all")
    only = "of --suite the cases that have this in their name, such as attention-training"
    _add(parser, "--only", only, metavar="TEXT")
    peer = "a Python file with one class of Peer, or an installed peer's name: it takes part, too"
    _add(parser, "--peer", peer, nargs="+", metavar="FILE_OR_NAME", default=[])
    parser.set_defaults(compare=_joined(DEFAULTS.compare))


def add_profile_to(parser: argparse.ArgumentParser) -> None:
    """The same for a profile, checked by `profile_options_from`."""
    _add_work(parser, several=False)
    _add(parser, "--backend", "cpu, cuda, triton or reference (default: as the package chooses)", metavar="NAME")
    steps = "steps, plain and profiled in turn; the fastest count (default: %(default)s)"
    _add(parser, "--steps", steps, metavar="N")
    text = "the trace to write, which chrome://tracing and Perfetto show"
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help=text)
    nothing: dict[str, Any] = {
        "repeats": None,
        "pretrain": False,
        "suite": None,
        "quick": False,
        "only": None,
        "peer": [],
    }
    parser.set_defaults(steps="5", shapes="8x128", mode="training", compare=_joined(DEFAULTS.compare), **nothing)


def _joined(items: Iterable[object]) -> str:
    return ",".join(map(str, items))


def _add(parser: argparse.ArgumentParser, name: str, text: str, **arguments: object) -> None:
    parser.add_argument(name, help=text, **arguments)  # type: ignore[arg-type]


def _add_work(parser: argparse.ArgumentParser, *, several: bool) -> None:
    """What is computed, on what, and where."""
    metavar = "LIST" if several else "ONE"
    shapes = "8x128,8x512,32x128:ragged" if several else "8x512 or 32x128:ragged"
    _add(parser, "--shapes", f"rows x length, such as {shapes} (default: %(default)s)", metavar=metavar)
    modes = "inference, training or both" if several else "inference or training"
    _add(parser, "--mode", f"{modes} (default: %(default)s)", metavar=metavar)
    formats = f"of weights and activations: {', '.join(DTYPES)} (float32 weights, computed with in bfloat16)"
    _add(parser, "--dtype", f"{formats} (default: %(default)s)", metavar=metavar)
    _add(parser, "--device", "cpu or cuda (default: %(default)s)")
    _add(parser, "--threads", "CPU threads (default: as many as PyTorch takes)", metavar="N")
    _add(parser, "--config", f"{', '.join(CONFIGS)} or a config.json; random weights (default: %(default)s)")
    _add(parser, "--layers", "passes of the shared layer, in place of the config's", metavar="N")
    _add(parser, "--model", "a checkpoint directory: its weights in place of random ones", metavar="DIR")
    _add(parser, "--vocab", "a sentencepiece model, or a directory with one", metavar="FILE_OR_DIR")
    _add(parser, "--text", "UTF-8 text in place of Python's own documentation", nargs="+", metavar="FILE", default=[])
    _add(parser, "--json", "write the report there as well", metavar="FILE")
    parser.set_defaults(
        shapes=_joined(DEFAULTS.shapes),
        mode=_joined(DEFAULTS.modes),
        dtype=_joined(DEFAULTS.dtypes),
        device=DEFAULTS.device,
        config=DEFAULTS.config,
    )


def options_from(args: argparse.Namespace) -> Options:
    """Raises ValueError for the first option that cannot be right; the message names it and what was expected."""
    if args.model is not None and args.config != DEFAULTS.config:
        raise ValueError("--model and --config: at most one of them was expected, a checkpoint brings its config")
    for name, path in [("--model", args.model), ("--vocab", args.vocab), *(("--text", file) for file in args.text)]:
        if path is not None and not Path(path).exists():
            raise ValueError(f"{name} is {path!r}, which does not exist")
    if args.config not in CONFIGS and not Path(args.config).is_file():
        raise ValueError(f"--config is {args.config!r}; {', '.join(CONFIGS)} or a config.json was expected")
    check_target("--json", args.json)
    device, dtypes = _names("--device", args.device, DEVICES)[0], _names("--dtype", args.dtype, DTYPES)
    if device != "cpu" and "int8" in dtypes:
        raise ValueError(f"--dtype has 'int8' and --device is {device!r}; int8 runs on the CPU alone")
    modes = _names("--mode", args.mode, MODES)
    if modes == ("training",) and "int8" in dtypes:
        raise ValueError("--dtype has 'int8' and --mode is 'training'; int8 is for inference")
    options = Options(
        shapes=_list("--shapes", args.shapes, _shape),
        modes=modes,
        dtypes=dtypes,
        # Who is installed, or of --peer, is known where peers are.
        compare=_list("--compare", args.compare, lambda name, item: item),
        device=device,
        threads=_count("--threads", args.threads),
        repeats=_count("--repeats", args.repeats),
        config=args.config,
        layers=_count("--layers", args.layers),
        model=args.model,
        vocab=args.vocab,
        text=tuple(args.text),
        json=args.json,
        pretrain=args.pretrain,
        suites=_names("--suite", args.suite, (*SUITES, "all")) if args.suite is not None else (),
        quick=args.quick,
        only=args.only or "",
        peers=tuple(args.peer),
    )
    if options.suites:
        _check_suites(options)
    elif options.quick or options.only:
        raise ValueError("--quick and --only are of --suite, which is not given")
    return _of_pretraining(options) if options.pretrain else options


def _check_suites(options: Options) -> None:
    """Cases bring their own shapes, models and peers."""
    for name in ("shapes", "modes", "dtypes", "compare", "config", "layers", "model", "pretrain"):
        if getattr(options, name) != getattr(DEFAULTS, name):
            raise ValueError(f"--suite and --{_FLAGS.get(name, name)}: at most one of them was expected")


_FLAGS = {"modes": "mode", "dtypes": "dtype"}


def profile_options_from(args: argparse.Namespace) -> ProfileOptions:
    """As `options_from`."""
    work = options_from(args)
    for name, given in (("--shapes", work.shapes), ("--mode", work.modes), ("--dtype", work.dtypes)):
        if len(given) > 1:
            raise ValueError(f"{name} is {_joined(given)!r}; one was expected, a profile is of one thing")
    check_target("-o", args.output)
    steps = _count("--steps", args.steps)
    assert steps is not None
    return ProfileOptions(work, args.output, steps, args.backend)


def check_target(name: str, file: str | None) -> None:
    """A file that is to be written can be there; what cannot be right is found before the work is done."""
    if file is not None and (Path(file).is_dir() or not Path(file).absolute().parent.is_dir()):
        raise ValueError(f"{name} is {file!r}; a file in a directory that exists was expected")


def _of_pretraining(options: Options) -> Options:
    for name, given, default in (
        ("--mode", options.modes, DEFAULTS.modes),
        ("--dtype", options.dtypes, DEFAULTS.dtypes),
        ("--compare", options.compare, DEFAULTS.compare),
        ("--peer", options.peers, DEFAULTS.peers),
    ):
        if given != default:
            raise ValueError(
                f"--pretrain and {name}: at most one of them was expected, steps of training have their own"
            )
    shapes = _PRETRAINING_SHAPES if options.shapes == DEFAULTS.shapes else options.shapes
    for shape in shapes:
        if shape.length < SHORTEST_PAIR:
            raise ValueError(f"--shapes has {str(shape)!r}; --pretrain needs rows of at least {SHORTEST_PAIR} tokens")
    return replace(options, shapes=shapes, modes=(PRETRAINING,), compare=TRAINERS)


def _list(name: str, value: str, read: Callable[[str, str], Item]) -> tuple[Item, ...]:
    """The items of `a,b`, each once, in the order given."""
    items = [item.strip() for item in value.split(",") if item.strip()]
    if not items:
        raise ValueError(f"{name} is {value!r}; at least one was expected")
    return tuple(dict.fromkeys(read(name, item) for item in items))


def _names(name: str, value: str, known: tuple[str, ...]) -> tuple[str, ...]:
    def read(name: str, item: str) -> str:
        if item not in known:
            raise ValueError(f"{name} has {item!r}; {', '.join(known)} was expected")
        return item

    return _list(name, value, read)


def _shape(name: str, item: str) -> Shape:
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)(:ragged)?", item)
    if match is None:
        raise ValueError(f"{name} has {item!r}; rows x length was expected, such as 8x128 or 32x128:ragged")
    shape = Shape(int(match[1]), int(match[2]), ragged=match[3] is not None)
    if shape.length < SHORTEST_ROW:
        raise ValueError(f"{name} has {item!r}; rows of at least {SHORTEST_ROW} tokens were expected")
    return shape


def _count(name: str, value: str | None) -> int | None:
    if value is None:
        return None
    if not re.fullmatch(r"[1-9]\d*", value):
        raise ValueError(f"{name} is {value!r}; a number from 1 was expected")
    return int(value)
