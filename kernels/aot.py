"""Compiles every kernel for every architecture, without a GPU, and checks what comes of it.

Usage: python -m albert_fast.kernels.aot [--all] [--only KERNEL] [--architectures 80,90,100] [--jobs N] [--json FILE]
                                         [--update]

`calls` and `variants` run the host functions of this folder under `launch.recording`, on tensors without memory, so
that what is compiled is what they launch; the signature comes from Triton's own just-in-time compiler. What is covered:

- what `calls` launches, ALBERT base in training, in bfloat16 and float32, for each architecture, in its default
  configuration;
- with --all, what tuning chooses among for these calls, and what `variants` launches: other sizes, options and
  parameters, one or a few at a time, in their default configurations.

For each it prints registers, spilled bytes, shared memory and the instruction that products became. It exits with 1
where

- a kernel does not compile, in half precision has a product that is not on tensor cores, or in single precision has
  one that is;
- a default configuration spills registers or does not fit into shared memory;
- something is worse than in the table that is committed for this version of Triton, aot_table.json: more than a few
  registers more, spills where there were none, more shared memory, a lesser instruction. --update writes what was
  compiled to the table; with --all nothing else stays there.

What was measured is kept in the cache folder of `albert_fast.native` by what it was measured on: kernel and helpers,
signature, constants, configuration, architecture, version of Triton. A second run takes seconds.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import hashlib
import inspect
import io
import json
import multiprocessing
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from albert_fast import triton_backend
from albert_fast.kernels.launch import ARCHITECTURES, Config, Launch, recording
from albert_fast.kernels.tuning import merge_json, read_json
from albert_fast.native import cache_folder
from albert_fast.ops.attention import AttentionOptions
from albert_fast.ops.encoder import EncoderOptions

TABLE = Path(__file__).parent / "aot_table.json"
DTYPES = (torch.bfloat16, torch.float32)

# Shared memory of a program. The default configurations of 80 also serve 8.6 and 8.9, which have less than 8.0.
DEFAULT_SHARED = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024}
MOST_SHARED = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
TENSOR_MEMORY = 512  # columns, of compute capability 10.0
# By how many registers two builds may differ: compilers change.
REGISTER_TOLERANCE = 8
# What products become, the better the later; "fma" is none of the tensor cores'.
PRODUCTS = {"fma": None, "mma.sync": "mma.sync", "wgmma": "wgmma.mma_async", "tcgen05": "tcgen05.mma"}


@dataclass(frozen=True)
class Measured:
    """What a kernel was compiled to.

    Attributes:
        registers: of a thread; spilled: bytes of them that are stored to memory.
        shared: bytes of a program; tensor_memory: columns.
        products: of `PRODUCTS`, joined by +; "" without products.
        error: why it did not compile; "" where it did.
    """

    registers: int = 0
    spilled: int = 0
    shared: int = 0
    tensor_memory: int = 0
    products: str = ""
    error: str = ""


@dataclass(frozen=True)
class Row:
    """A line of the table."""

    kernel: str
    variant: str  # constants, pointers that are None
    architecture: int
    dtype: str
    config: str
    default: bool
    measured: Measured

    @property
    def name(self) -> str:
        """What the committed table calls it."""
        return " | ".join((self.kernel, self.variant, f"sm_{self.architecture}", self.dtype, self.config))


# ---------------------------------------------------------------------------------------------------------- what to do


def _target(architecture: int) -> GPUTarget:
    return GPUTarget("cuda", architecture, 32)


@functools.cache
def _binder(kernel: Any, architecture: int) -> tuple[Any, Callable[..., Any]]:
    """The compiler's backend, and what sorts arguments into a signature and constants."""
    backend = make_backend(_target(architecture))
    return backend, create_function_from_signature(kernel.signature, kernel.params, backend)


@dataclass(frozen=True)
class Job:
    """One launch, for one architecture, in one configuration."""

    launch: Launch
    architecture: int
    config: Config
    default: bool

    @functools.cached_property
    def source_and_options(self) -> tuple[ASTSource, Mapping[str, Any]]:
        """As the just-in-time compiler has them for these arguments."""
        kernel = self.launch.kernel
        backend, binder = _binder(kernel, self.architecture)
        options = {name: value for name, value in self.config.options.items() if name not in self.config.blocks}
        arguments = {**self.launch.arguments, **self.launch.constants, **self.config.options}
        bound, specialization, _ = binder(**arguments)
        parsed, signature, constants, attributes = kernel._pack_args(backend, options, bound, specialization, None)
        return ASTSource(kernel, signature, constants, attributes), vars(parsed)

    @property
    def target(self) -> GPUTarget:
        return _target(self.architecture)

    @functools.cached_property
    def digest(self) -> str:
        """Equal where the measurement is."""
        source, options = self.source_and_options
        text = repr((_MEASURING, source.hash(), sorted(options.items()), self.architecture, triton.__version__))
        return hashlib.sha256(text.encode()).hexdigest()

    @functools.cached_property
    def variant(self) -> str:
        parts = []
        for name in self.launch.kernel.arg_names:
            if name in self.launch.arguments:
                parts += [f"no {name}"] * (self.launch.arguments[name] is None)
            elif name in self.launch.constants:
                value = self.launch.constants[name]
                parts += [name] * value if isinstance(value, bool) else [f"{name}={value}"]
        return " ".join(parts)

    @property
    def specialization(self) -> dict[str, str]:
        """Types and divisibility by argument."""
        source, _ = self.source_and_options
        names = self.launch.kernel.arg_names
        divisible = {names[path[0]] for path, attribute in source.attrs.items() if attribute}
        return {
            name: kind + "%16" * (name in divisible) for name, kind in source.signature.items() if kind != "constexpr"
        }


def _alike(launch: Launch) -> tuple[Any, ...]:
    """Equal for launches that nothing tells apart; a job's digest, which takes long, says what is compiled alike."""
    values = [
        (name, type(x), (x.dtype, x.data_ptr() % 16) if isinstance(x, Tensor) else x)
        for name, x in (launch.arguments | launch.constants).items()
    ]
    return launch.kernel, id(launch.tiles), launch.dtype, *values


def jobs(launches: Iterable[Launch], architectures: Sequence[int], all_configs: bool) -> list[Job]:
    """What to compile, each once."""
    found = []
    for launch in {_alike(launch): launch for launch in launches}.values():
        for architecture in architectures:
            configs = launch.tiles.of(architecture, launch.dtype)
            for config in configs if all_configs else configs[:1]:
                found.append(Job(launch, architecture, config, config is configs[0]))
    return unique(found)


def unique(todo: Iterable[Job]) -> list[Job]:
    """Of those that are compiled to the same, one: a default configuration where there is one."""
    found: dict[str, Job] = {}
    for job in todo:
        if job.digest not in found or (job.default and not found[job.digest].default):
            found[job.digest] = job
    return list(found.values())


def names_of_variants(todo: Sequence[Job]) -> list[str]:
    """Of each job its variant, with what tells it from others of the same name."""
    named: dict[tuple[Any, ...], list[int]] = {}
    for index, job in enumerate(todo):
        launch = job.launch
        name = (launch.kernel.__name__, job.variant, launch.dtype, job.architecture, str(job.config))
        named.setdefault(name, []).append(index)
    result = [job.variant for job in todo]
    for indices in named.values():
        if len(indices) > 1:
            kinds = [todo[index].specialization for index in indices]
            differing = [name for name in kinds[0] if len({kind.get(name) for kind in kinds}) > 1]
            for index, kind in zip(indices, kinds, strict=True):
                result[index] = " ".join([result[index], *(f"{name}:{kind.get(name)}" for name in differing)]).strip()
    return result


# ----------------------------------------------------------------------------------------------------------- compiling


def measure(job: Job) -> Measured:
    """Compiles. What ptxas says is found in what Triton prints of it."""
    source, options = job.source_and_options
    printed = io.StringIO()
    try:
        with triton.knobs.compilation.scope(), triton.knobs.nvidia.scope(), contextlib.redirect_stdout(printed):
            triton.knobs.compilation.always_compile = True
            triton.knobs.nvidia.dump_ptxas_log = True
            compiled = triton.compile(source, target=job.target, options=dict(options))
    except Exception as error:
        return Measured(error=f"{type(error).__name__}: {str(error).strip() or 'no message'}"[:500])
    log, ptx = printed.getvalue(), compiled.asm["ptx"]
    products = [name for name, instruction in PRODUCTS.items() if instruction is not None and instruction in ptx]
    # A product that stays one until the end of Triton's own passes, in a layout of none of the tensor cores'.
    if re.search(r"= tt\.dot\b.*-> tensor<[^>]*#blocked\d*>", compiled.asm["ttgir"]):
        products.insert(0, "fma")
    return Measured(
        registers=max(int(n) for n in re.findall(r"Used (\d+) registers", log)),
        spilled=sum(int(n) for n in re.findall(r"(\d+) bytes spill stores", log)),
        shared=compiled.metadata.shared,
        tensor_memory=compiled.metadata.tmem_size or 0,
        products="+".join(products),
    )


_MEASURING = inspect.getsource(measure)

_todo: Sequence[Job] = ()  # what the processes that are forked from this one find


def _measure_in_process(index: int) -> tuple[int, Measured]:
    return index, measure(_todo[index])


def measure_all(todo: Sequence[Job], processes: int) -> list[Measured]:
    """In as many processes; what is in the cache is not compiled."""
    global _todo
    path = cache_folder() / f"aot-{triton.__version__}.json"
    kept = read_json(path)
    results: dict[str, Measured] = {}
    for job in todo:
        with contextlib.suppress(KeyError, TypeError):
            results[job.digest] = Measured(**kept[job.digest])
    # Products on the FMA units take longest to compile: they come first.
    missing = [job for job in todo if job.digest not in results]
    missing.sort(key=lambda job: (job.launch.dtype.itemsize, sum(job.config.blocks.values())), reverse=True)
    if not missing:
        return [results[job.digest] for job in todo]
    print(f"compiling {len(missing)} of {len(todo)} in {processes} processes", file=sys.stderr, flush=True)
    _todo = missing
    with (
        tempfile.TemporaryDirectory() as folder,
        multiprocessing.get_context("fork").Pool(processes, _start_process, (folder,)) as pool,
    ):
        for index, measured in pool.imap_unordered(_measure_in_process, range(len(missing))):
            results[missing[index].digest] = measured
            if not measured.error:
                merge_json(path, {missing[index].digest: asdict(measured)})
    return [results[job.digest] for job in todo]


def _start_process(folder: str) -> None:
    os.environ["TRITON_CACHE_DIR"] = folder
    torch.set_num_threads(1)


# ------------------------------------------------------------------------------------------------------------ checking


def problems(row: Row) -> list[str]:
    """What must not be, whatever is committed."""
    found, limit = [], DEFAULT_SHARED[row.architecture]
    measured = row.measured
    if measured.error:
        return [f"does not compile: {measured.error}"]
    if row.dtype in ("bfloat16", "float16") and "fma" in measured.products:
        found.append("a product is not on tensor cores")
    if row.dtype == "float32" and measured.products not in ("", "fma"):
        # `calls` does not allow tf32. Triton 3.6 takes it on 10.0 nevertheless, for tiles of 64 rows and more.
        found.append(f"a product in tf32 ({measured.products}), where full precision is asked for")
    if row.default and measured.spilled:
        found.append(f"spills {measured.spilled} bytes")
    if row.default and measured.shared > limit:
        found.append(f"{measured.shared} bytes of shared memory: at most {limit}")
    if row.default and measured.tensor_memory > TENSOR_MEMORY:
        found.append(f"{measured.tensor_memory} columns of tensor memory: at most {TENSOR_MEMORY}")
    return found


def fits(row: Row) -> bool:
    return row.measured.shared <= MOST_SHARED[row.architecture] and row.measured.tensor_memory <= TENSOR_MEMORY


def regressions(new: Measured, old: Measured) -> list[str]:
    """What is worse than what is committed."""
    found = []
    if new.registers > old.registers + REGISTER_TOLERANCE:
        found.append(f"{new.registers} registers: {old.registers} are committed")
    if new.spilled and not old.spilled:
        found.append(f"spills {new.spilled} bytes: committed without")
    if new.shared > old.shared:
        found.append(f"{new.shared} bytes of shared memory: {old.shared} are committed")
    if not new.error and _rank(new.products) < _rank(old.products):
        found.append(f"products are {new.products or 'gone'}: {old.products} is committed")
    return found


def _rank(products: str) -> list[int]:
    """Orders by the least of the instructions, then by the best."""
    ranks = sorted(list(PRODUCTS).index(name) for name in products.split("+") if name)
    return ranks[:1] + ranks[-1:]


# The committed table: version of Triton -> name of the row -> registers, spilled, shared, tensor memory, products.


def read_table(path: Path, version: str) -> dict[str, Measured]:
    """The rows of this version; {} without any."""
    if not path.is_file():
        return {}
    return {name: Measured(*values) for name, values in json.loads(path.read_text()).get(version, {}).items()}


def write_table(path: Path, version: str, rows: Iterable[Row], *, whole: bool) -> None:
    """Writes rows of this version, in place of all others where they are the `whole` of it. A row a line, so that a
    change shows as one."""
    versions = json.loads(path.read_text()) if path.is_file() else {}
    before = {} if whole else versions.get(version, {})
    versions[version] = before | {row.name: list(asdict(row.measured).values())[:-1] for row in rows}
    texts = []
    for name, committed in sorted(versions.items()):
        lines = ",\n".join(f"  {json.dumps(row)}: {json.dumps(values)}" for row, values in sorted(committed.items()))
        texts.append(f' "{name}": {{\n{lines}\n }}')
    path.write_text("{\n" + ",\n".join(texts) + "\n}\n")


# ------------------------------------------------------------------------------------------------------------ the calls


class _Calls:
    """The operations on tensors of a dtype that have no memory: 4096 tokens in 32 rows, with ALBERT's sizes."""

    tokens, batch, vocabulary = 4096, 32, 30000

    def __init__(self, dtype: torch.dtype, parameter_dtype: torch.dtype) -> None:
        self.operations = triton_backend.load()
        self.dtype, self.parameter_dtype = dtype, parameter_dtype
        self.offsets, self.seed = self.integers(self.batch + 1, torch.int32), self.integers(None)
        self.ids = self.integers(self.tokens)

    def new(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device="meta")

    def parameter(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.parameter_dtype, device="meta")

    def integers(self, size: int | None, dtype: torch.dtype = torch.int64) -> Tensor:
        return torch.empty(() if size is None else size, dtype=dtype, device="meta")

    def encoder(
        self, dropout_p: float, longest: int, activation: str = "gelu_new", recompute: str = "none", width: int = 768
    ) -> None:
        arguments = self.encoder_arguments(dropout_p, longest, activation, recompute, width)
        hidden = self.new(self.tokens, width)
        self.operations["encoder_inference"](hidden, *arguments)
        _, kept = self.operations["encoder"](hidden, *arguments)
        self.operations["encoder_backward"](torch.empty_like(hidden), kept, *arguments)

    def encoder_few_tokens(
        self, activation: str = "gelu_new", width: int = 768, tokens: int = 128, batch: int = batch
    ) -> None:
        parameters, _, *others = self.encoder_arguments(0.0, tokens, activation, "none", width)
        offsets = self.integers(batch + 1, torch.int32)
        self.operations["encoder_inference"](self.new(tokens, width), parameters, offsets, *others)

    def encoder_arguments(
        self, dropout_p: float, longest: int, activation: str, recompute: str, width: int
    ) -> tuple[list[Tensor], Tensor, int, EncoderOptions]:
        matrix, vector, inner = (width, width), (width,), 4 * width
        shapes: list[tuple[int, ...]] = [matrix, vector] * 4
        shapes += [vector, vector, (inner, width), (inner,), (width, inner), vector, vector, vector]
        options = EncoderOptions(
            num_layers=32,  # more than are gathered: the first pass of a run has another way than those after it
            num_groups=1,
            inner_group_num=1,
            num_heads=width // 64,
            activation=activation,
            eps=1e-12,
            hidden_dropout_p=dropout_p,
            attention_dropout_p=dropout_p,
            seed=self.seed if dropout_p else None,
            bias=None,
            recompute=recompute,
            return_all=False,
        )
        return [self.parameter(*shape) for shape in shapes], self.offsets, longest, options

    def attention(
        self, head_dim: int, longest: int, dropout_p: float, causal: bool = False, biased: bool = False
    ) -> None:
        query, key, value = self.new(self.tokens, 3, 768 // head_dim, head_dim).unbind(1)
        bias = self.new(self.batch, 1, longest, longest) if biased else None
        seed = self.seed if dropout_p else None
        options = AttentionOptions(causal, dropout_p, seed, site=1, scale=head_dim**-0.5, bias=bias)
        arguments = self.offsets, self.offsets, longest, longest, options
        output, logsumexp = self.operations["attention"](query, key, value, *arguments)
        grad = torch.empty_like(output)
        self.operations["attention_backward"](grad, query, key, value, output, logsumexp, *arguments)

    def dropout_add_layer_norm(self, dropout_p: float, width: int = 768) -> None:
        x, residual, grad = (self.new(self.tokens, width) for _ in range(3))
        bias, *norm = (self.parameter(width) for _ in range(3))
        arguments = x, bias, residual, *norm, 1e-12, dropout_p, self.seed if dropout_p else None, 2, self.offsets
        self.operations["dropout_add_layer_norm"](*arguments)
        self.operations["dropout_add_layer_norm_backward"](grad, *arguments)

    def bias_gelu(self, approximate: str) -> None:
        x, grad = (self.new(self.tokens, 3072) for _ in range(2))
        arguments = x, self.parameter(3072), approximate
        self.operations["bias_gelu"](*arguments)
        self.operations["bias_gelu_backward"](grad, *arguments)

    def embed_layer_norm(self, dropout_p: float, embeds: bool = False, types: int = 2) -> None:
        inputs = self.parameter(self.tokens, 128) if embeds else self.ids
        tables = (self.parameter(size, 128) for size in (self.vocabulary, 512, types))
        norm = (self.parameter(128) for _ in range(2))
        options = 1e-12, dropout_p, self.seed if dropout_p else None, 0, self.offsets, 0
        arguments = inputs, self.ids, self.ids, *tables, *norm, *options
        output = self.operations["embed_layer_norm"](*arguments)
        self.operations["embed_layer_norm_backward"](torch.empty_like(output), *arguments)

    def masked_lm_loss(
        self, smoothing: float, z_loss: float, training: bool = True, size: int = 128, reduction: str = "mean"
    ) -> None:
        x = self.new(self.tokens, size)
        arguments = x, self.parameter(self.vocabulary, size), self.parameter(self.vocabulary), self.ids
        options = -100, smoothing, z_loss, reduction
        _, loss, logsumexp, _, *kept = self.operations["masked_lm_loss"](*arguments, *options, training)
        if training:
            self.operations["masked_lm_loss_backward"](loss, *arguments, logsumexp, *kept, *options)


def calls(dtype: torch.dtype) -> None:
    """Launches every kernel as ALBERT base does in training, and attention with heads of 128."""
    call = _Calls(dtype, dtype)
    call.encoder(0.1, longest=128)
    if dtype != torch.float32:  # whose products cuBLAS has
        call.encoder_few_tokens()
        call.encoder_few_tokens(batch=64)  # rows, with which the general attention serves
    call.attention(64, longest=512, dropout_p=0.1)  # for longer rows there are other kernels
    if dtype != torch.float32:  # without tensor cores products take long to compile
        call.attention(128, longest=512, dropout_p=0.0)
    call.dropout_add_layer_norm(0.1)
    call.bias_gelu("tanh")
    call.embed_layer_norm(0.1)
    call.masked_lm_loss(0.1, 1e-4)


def variants(dtype: torch.dtype) -> None:
    """Launches what differs from `calls`: parameters in float32, other sizes, options."""
    call = _Calls(dtype, torch.float32)
    call.masked_lm_loss(0.0, 0.0, reduction="sum")
    if dtype == torch.float16:
        return  # that gradient is scaled there; all else is as in bfloat16
    call.masked_lm_loss(0.0, 0.0, training=False)
    call.masked_lm_loss(0.0, 0.0, size=256)
    call.masked_lm_loss(0.0, 0.0, size=512)
    call.embed_layer_norm(0.0)
    call.embed_layer_norm(0.1, embeds=True)
    call.embed_layer_norm(0.0, types=9)
    call.bias_gelu("none")
    call.bias_gelu("relu")
    call.dropout_add_layer_norm(0.0)
    call.encoder(0.1, longest=128, activation="gelu", recompute="layer")
    call.encoder(0.1, longest=128, activation="relu", recompute="ffn")
    call.encoder(0.0, longest=512)
    call.dropout_add_layer_norm(0.1, width=2048)
    call.encoder(0.1, longest=128, width=4096)
    call.attention(64, longest=512, dropout_p=0.1, causal=True, biased=True)
    call.attention(128, longest=128, dropout_p=0.1)
    if dtype == torch.bfloat16:
        call.encoder_few_tokens("gelu", tokens=256, batch=1)
        call.encoder_few_tokens("relu", width=1024)
        call.attention(32, longest=128, dropout_p=0.0)
        call.attention(64, longest=512, dropout_p=0.0, biased=True)
        call.attention(128, longest=512, dropout_p=0.1, causal=True, biased=True)


def record(calls: Callable[[torch.dtype], None], dtypes: Sequence[torch.dtype] = DTYPES) -> list[Launch]:
    """What `calls` launches, for each dtype."""
    with recording() as launches:
        for dtype in dtypes:
            calls(dtype)
    return launches


# --------------------------------------------------------------------------------------------------------- the command


def main(
    arguments: Sequence[str] | None = None,
    calls: Callable[[torch.dtype], None] = calls,
    variants: Callable[[torch.dtype], None] = variants,
    table: Path = TABLE,
) -> int:
    parser = argparse.ArgumentParser(prog="python -m albert_fast.kernels.aot", description=__doc__.partition("\n")[0])
    parser.add_argument("--all", action="store_true", help="configurations for tuning, and `variants`, too")
    parser.add_argument("--only", metavar="KERNEL", default="", help="kernels whose name has this in it")
    parser.add_argument("--architectures", type=_architectures, metavar="80,90,100", default=ARCHITECTURES)
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), metavar="N", help="processes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="writes the rows there, too")
    parser.add_argument("--update", action="store_true", help="writes the rows of this run to the committed table")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: kernels that are interpreted cannot be compiled")

    start = time.perf_counter()
    launches = record(calls)
    basic = {job.digest for job in jobs(launches, ARCHITECTURES, False)}
    more = jobs(record(variants, (*DTYPES, torch.float16)), ARCHITECTURES, False)
    every = unique([*jobs(launches, ARCHITECTURES, True), *more])
    # Names are the same whichever part of it is compiled.
    names = {job.digest: name for job, name in zip(every, names_of_variants(every), strict=True)}

    scope = [job for job in every if options.all or job.digest in basic]
    todo = [
        job for job in scope if options.only in job.launch.kernel.__name__ and job.architecture in options.architectures
    ]
    rows = [
        Row(
            job.launch.kernel.__name__,
            names[job.digest],
            job.architecture,
            str(job.launch.dtype).removeprefix("torch."),
            str(job.config),
            job.default,
            measured,
        )
        for job, measured in zip(todo, measure_all(todo, options.jobs), strict=True)
    ]
    rows.sort(key=lambda row: (row.kernel, row.dtype, row.variant, row.architecture, not row.default))
    print_rows(rows)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))
    committed = read_table(table, triton.__version__)
    if options.update:
        write_table(table, triton.__version__, rows, whole=options.all and len(todo) == len(scope))
        committed = read_table(table, triton.__version__)
    found = [(row, problem) for row in rows for problem in check(row, committed)]
    took = time.perf_counter() - start
    print(f"\n{len(rows)} compilations, triton {triton.__version__}, {took:.1f} s; {compared(rows, committed)}")
    if found:
        print(f"\n{len(found)} problems:")
        for row, problem in found:
            print(f"  {row.name}\n    {problem}")
    return 1 if found else 0


def _architectures(text: str) -> tuple[int, ...]:
    found = tuple(int(name) for name in text.split(","))
    if not set(found) <= set(ARCHITECTURES):
        raise argparse.ArgumentTypeError(f"of {', '.join(map(str, ARCHITECTURES))}, not {text}")
    return found


def check(row: Row, committed: Mapping[str, Measured]) -> list[str]:
    old = committed.get(row.name)
    return problems(row) + (regressions(row.measured, old) if old is not None else [])


def compared(rows: Sequence[Row], committed: Mapping[str, Measured]) -> str:
    if not committed:
        return "no table is committed for this version"
    new = sum(row.name not in committed for row in rows)
    return "all are in the committed table" if not new else f"{new} are not in the committed table: --update"


def print_rows(rows: Sequence[Row]) -> None:
    """Kernels and variants as headings, a line for each architecture and configuration."""
    width = max((len(row.config) for row in rows), default=0)
    heading = None
    for row in rows:
        if heading != (row.kernel, row.dtype, row.variant):
            heading = (row.kernel, row.dtype, row.variant)
            print(f"\n{row.kernel} {row.dtype} ({row.variant})")
        measured = row.measured
        remarks = (
            ["default"] * row.default + ["does not fit"] * (not fits(row)) + ["does not compile"] * bool(measured.error)
        )
        print(
            f"  sm_{row.architecture:<3} {row.config:{width}} {measured.registers:4} registers"
            f" {measured.spilled:5} spilled {measured.shared / 1024:6.1f} KB {measured.products:16}"
            f" {', '.join(remarks)}".rstrip()
        )


if __name__ == "__main__":
    sys.exit(main())
