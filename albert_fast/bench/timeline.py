"""The Chrome trace of PyTorch's profiler: the native steps put into it, and what the time of a step went for.

On the CPU the slices of one thread lie inside one another, and each has the time that none inside it has. On a GPU it
is the kernels that count. A kind is told by an operator's name and shapes, and by what it is a part of: a copy inside
`aten::addmm` belongs to the product. Python and autograd between the operators are overhead.
"""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

from albert_fast.native_trace import Span

PRODUCTS, ATTENTION, LOSS, REST = KINDS = ("products", "attention", "loss", "rest")
# csrc/cuda's kernel of all passes, norms included.
ENCODER = "encoder in one kernel"
OVERHEAD = "overhead"

# What the profiler is told to call the step.
STEP = "step"

_NATIVE_CALL = "albert_fast_native::"
_NATIVE = "native"  # the category of the native steps' slices
_PASS = "pass "
_ON_CPU = ("cpu_op", "user_annotation", _NATIVE)
_ON_GPU = ("kernel", "gpu_memcpy", "gpu_memset")

# Who calls operators and computes nothing: this package's operators are in Python, autograd's nodes in C++.
_CALLERS = re.compile(r"albert_fast::|GeneratedBackwardFor|autograd::|torch::autograd::|\w+Backward\d*$")
_PRODUCT = re.compile(r"aten::(\w*mm_?|linear|matmul|mkldnn_linear)|onednn::qlinear.*|albert_fast_native::product")
# Of csrc/cpu/trace.h; all others are the rest.
_NATIVE_KINDS = {
    "product": PRODUCTS,
    "weight gradient": PRODUCTS,
    "attention": ATTENTION,
    "attention backward": ATTENTION,
    "loss": LOSS,
    "loss backward": LOSS,
}

# The kernels of kernels/.
KERNEL_KINDS = {
    "attention_kernel": ATTENTION,
    "few_tokens_attention_kernel": ATTENTION,
    "grad_query_kernel": ATTENTION,
    "grad_key_value_kernel": ATTENTION,
    "labelled_tokens_kernel": LOSS,
    "masked_lm_loss_kernel": LOSS,
    "merge_kernel": LOSS,
    "loss_reduction_kernel": LOSS,
    "gather_kernel": LOSS,
    "table_gradient_kernel": LOSS,
    "few_tokens_product_kernel": PRODUCTS,
    "fold_kernel": REST,
    "gelu_kernel": REST,
    "gelu_backward_kernel": REST,
    "column_sum_kernel": REST,
    "strip_sum_kernel": REST,
    "layer_norm_forward_kernel": REST,
    "layer_norm_apply_kernel": REST,
    "layer_norm_backward_kernel": REST,
    "embed_layer_norm_kernel": REST,
    "embed_layer_norm_backward_kernel": REST,
    "sort_key_kernel": REST,
    "segment_sum_kernel": REST,
    "segment_join_kernel": REST,
}
# Those of cuBLAS, cuBLASLt and CUTLASS, where no operator of PyTorch's has launched them; then those of attention.
_PRODUCT_KERNEL = re.compile(r"gemm|cutlass|cublas|xmma|wgmma|nvjet|splitk", re.IGNORECASE)
_ATTENTION_KERNEL = re.compile(r"flash|fmha|attention", re.IGNORECASE)

Event = dict[str, Any]


@dataclass
class Slice:
    """An event and those that lie inside it; times are whole nanoseconds, as in the trace."""

    event: Event
    begin: int
    end: int
    inside: list[Slice] = field(default_factory=list)

    @property
    def name(self) -> str:
        return self.event["name"]

    @property
    def duration(self) -> int:
        return self.end - self.begin

    @property
    def own(self) -> int:
        """The time that nothing inside it has."""
        return self.duration - sum(child.duration for child in self.inside)


@dataclass
class Part:
    """What one kind's time went for, under one name.

    Attributes:
        calls: how many there were.
        nanoseconds: all of theirs.
        operations: floating-point, that were done; 0 where that is not known.
    """

    kind: str
    name: str
    calls: int = 0
    nanoseconds: int = 0
    operations: int = 0


# --------------------------------------------------------------------------------------------------- the native steps


def add_native_spans(events: list[Event], spans: Sequence[Span]) -> None:
    """Puts the spans into the calls that they were taken in, those of a pass into a slice of its own.

    Args:
        events: the trace's, added to.
        spans: of one thread, in order, their times on the trace's clock: nanoseconds since its base.

    Raises:
        RuntimeError: a span lies in no call.
    """
    calls = [_slice(e) for e in events if e.get("cat") == "cpu_op" and e["name"].startswith(_NATIVE_CALL)]
    calls.sort(key=lambda call: call.begin)
    begins = [call.begin for call in calls]

    def call_of(span: Span) -> Slice:
        middle = (span.begin + span.end) // 2
        at = bisect.bisect_right(begins, middle) - 1
        if at < 0 or calls[at].end < middle:
            raise RuntimeError(f"the native step {span.name!r} lies in no call of the trace: their clocks differ")
        return calls[at]

    for call, taken in groupby(spans, key=call_of):
        for pass_index, of_pass in groupby(taken, key=lambda span: span.pass_index):
            # The clocks agree to a few microseconds, by which the first and the last may stand out of the call.
            slices = [(s, max(s.begin, call.begin), min(s.end, call.end)) for s in of_pass]
            if pass_index >= 0:
                events.append(_event(call, f"{_PASS}{pass_index}", slices[0][1], slices[-1][2], {}))
            for span, begin, end in slices:
                arguments = dict(zip("mnk", span.sizes, strict=True)) | {"operations": span.operations}
                events.append(_event(call, span.name, begin, max(begin, end), arguments))


def _event(call: Slice, name: str, begin: int, end: int, arguments: dict[str, int]) -> Event:
    """A slice on the thread of `call`."""
    place = {key: call.event[key] for key in ("pid", "tid")}
    times = {"ts": begin / 1e3, "dur": (end - begin) / 1e3}
    return {"ph": "X", "cat": _NATIVE, "name": name, **place, **times, "args": arguments}


# ----------------------------------------------------------------------------------------------------------- the step


def step(events: Iterable[Event]) -> Slice:
    """The step of the profile, with all that the thread that took it did."""
    slices = [_slice(e) for e in events if e.get("cat") in _ON_CPU]
    thread = next(s.event["tid"] for s in slices if s.name == STEP)
    return next(s for s in _nested(s for s in slices if s.event["tid"] == thread) if s.name == STEP)


def parts_on_cpu(step: Slice, vocabulary: int) -> list[Part]:
    """What the step's time went for; they add up to all of it.

    Args:
        step: as `step` gives it.
        vocabulary: rows of the word table: a product with as many is the loss's.
    """
    parts: dict[tuple[str, str], Part] = {}
    for slice_, kind, label, is_whole in _kinds(step, vocabulary):
        part = parts.setdefault((kind, label), Part(kind, label))
        part.nanoseconds += slice_.own
        if is_whole:
            part.calls += 1
            part.operations += _operations(slice_)
    return list(parts.values())


def parts_on_gpu(events: Sequence[Event], step: Slice, vocabulary: int) -> list[Part]:
    """What the GPU's time went for from the begin to the end of the step, which waits for it.

    Raises:
        RuntimeError: there is nothing on the GPU.
    """
    slices = [_slice(e) for e in events if e.get("cat") in _ON_CPU]
    launched: dict[int, tuple[str, str]] = {}
    for thread in {s.event["tid"] for s in slices}:
        for top in _nested(s for s in slices if s.event["tid"] == thread):
            for slice_, kind, label, _ in _kinds(top, vocabulary):
                identifier = slice_.event.get("args", {}).get("External id")
                if identifier is not None:
                    launched[identifier] = (kind, label)
    parts: dict[tuple[str, str], Part] = {}
    for event in events:
        if event.get("cat") not in _ON_GPU or not step.begin <= _slice(event).begin < step.end:
            continue
        kind = _kernel_kind(event["name"], launched.get(event.get("args", {}).get("External id"), (REST, ""))[0])
        name = event["name"].removeprefix("void ")[:60]
        part = parts.setdefault((kind, name), Part(kind, name))
        part.calls += 1
        part.nanoseconds += _slice(event).duration
    if not parts:
        raise RuntimeError("the profiler saw nothing on the GPU: is CUPTI there, and may this user trace kernels?")
    return list(parts.values())


def _slice(event: Event) -> Slice:
    begin = round(event["ts"] * 1e3)
    return Slice(event, begin, begin + round(event["dur"] * 1e3))


def _nested(slices: Iterable[Slice]) -> list[Slice]:
    """Those of one thread that lie in no other, with the others inside them."""
    top: list[Slice] = []
    around: list[Slice] = []
    for s in sorted(slices, key=lambda s: (s.begin, -s.end)):
        while around and around[-1].end <= s.begin:
            around.pop()
        (around[-1].inside if around else top).append(s)
        around.append(s)
    return top


# ---------------------------------------------------------------------------------------------------------- the kinds


def _kinds(
    slice_: Slice, vocabulary: int, within: tuple[str, str] | None = None
) -> Iterator[tuple[Slice, str, str, bool]]:
    """The slice and all inside it: of which kind its own time is, under which name, and whether the name is its own."""
    found = _kind(slice_, vocabulary)
    name = "between native steps" if slice_.event["cat"] == _NATIVE else slice_.name
    if slice_.event["cat"] == "user_annotation" or _CALLERS.match(slice_.name):
        yield slice_, OVERHEAD, name, True
        within = within if found is None else (found, name)
    elif found is not None:
        within = (found, _label(slice_))
        yield slice_, *within, True
    else:
        yield slice_, *(within or (REST, name)), within is None
    for child in slice_.inside:
        yield from _kinds(child, vocabulary, within)


def _kind(slice_: Slice, vocabulary: int) -> str | None:
    """What an operator or a native step is by its name; None where it is what it is a part of."""
    name = slice_.name
    if slice_.event["cat"] == _NATIVE:
        return None if name.startswith(_PASS) else _NATIVE_KINDS.get(name, REST)
    matrices = _matrices(slice_)
    if "masked_lm_loss" in name:
        return LOSS
    if _PRODUCT.fullmatch(name):
        if any(vocabulary in shape for shape in matrices):
            return LOSS
        return ATTENTION if any(len(shape) > 2 for shape in matrices[1:]) else PRODUCTS
    if "embed" not in name and any(shape[-1] == vocabulary for shape in matrices):
        return LOSS  # logits
    return ATTENTION if "attention" in name or "softmax" in name else None


def _kernel_kind(name: str, launched_by: str) -> str:
    """By the name where the kernel is this package's, else by the operator that launched it, else by the name again."""
    if "resident_encoder" in name:
        return ENCODER
    own = KERNEL_KINDS.get(re.sub(r"_\d\w*$", "", name))  # Triton may append how it was specialised
    if own is not None:
        return own
    if launched_by in (PRODUCTS, ATTENTION, LOSS):
        return launched_by
    return ATTENTION if _ATTENTION_KERNEL.search(name) else PRODUCTS if _PRODUCT_KERNEL.search(name) else REST


def _matrices(slice_: Slice) -> list[list[int]]:
    """The shapes, of two dimensions at least, among an operator's inputs; lists of tensors are left out."""
    given = slice_.event.get("args", {}).get("Input Dims", [])
    return [shape for shape in given if len(shape) > 1 and not isinstance(shape[0], list)]


def _product(slice_: Slice) -> tuple[int, int, int, int] | None:
    """batch, m, k and n of an operator that multiplies [batch, m, k] by [batch, k, n]; None where it is none."""
    if not re.fullmatch(r"aten::\w*mm_?", slice_.name):
        return None
    a, b = _matrices(slice_)[-2:]
    return a[0] if len(a) > 2 else 1, a[-2], a[-1], b[-1]


def _label(slice_: Slice) -> str:
    """Its name, with the width of a product's input and output."""
    if slice_.event["cat"] == _NATIVE and _NATIVE_KINDS.get(slice_.name) == PRODUCTS:
        return "{name} {args[k]} -> {args[n]}".format_map(slice_.event)
    product = _product(slice_)
    return slice_.name if product is None else f"{slice_.name} {product[2]} -> {product[3]}"


def _operations(slice_: Slice) -> int:
    if slice_.event["cat"] == _NATIVE:
        return slice_.event["args"].get("operations", 0)
    product = _product(slice_)
    return 0 if product is None else 2 * product[0] * product[1] * product[2] * product[3]
