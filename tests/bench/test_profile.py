"""`albert-fast profile`: parts that add up, under the right names, on models that take no time."""

import argparse
import json
import re
from pathlib import Path

import pytest
import torch

from albert_fast import AlbertConfig, backends, cli, flops
from albert_fast.bench import profile, timeline
from albert_fast.bench.arguments import Shape, add_profile_to, profile_options_from
from albert_fast.bench.console import make_console
from albert_fast.bench.data import load_tokenizer, make_batch, read_text
from albert_fast.bench.timeline import ATTENTION, ENCODER, LOSS, OVERHEAD, PRODUCTS, REST, Part
from albert_fast.native_trace import Span

VOCABULARY = 2100
CONFIG = AlbertConfig(
    vocab_size=VOCABULARY,
    embedding_size=8,
    hidden_size=32,
    num_attention_heads=2,
    intermediate_size=48,
    num_hidden_layers=2,
    max_position_embeddings=64,
)
HAS_CPU = backends.CPU.unavailable() is None
BACKENDS = [pytest.param("cpu", marks=pytest.mark.skipif(not HAS_CPU, reason="no native library")), "reference"]


@pytest.fixture(autouse=True)
def quick_probes(monkeypatch):
    monkeypatch.setattr(flops, "_CPU_SIZES", ((64, 64, 64),))
    monkeypatch.setattr(flops, "_PROBE_SECONDS", 0.0)


@pytest.fixture
def config_file(tmp_path):
    CONFIG.save_pretrained(tmp_path / "tiny")
    return str(tmp_path / "tiny" / "config.json")


@pytest.fixture
def profiled(config_file, tmp_path):
    """What the command writes: the report, and the trace's events."""

    def run(*arguments: str) -> tuple[dict, list[dict]]:
        trace, table = tmp_path / "trace.json", tmp_path / "table.json"
        files = ["--config", config_file, "-o", str(trace), "--json", str(table)]
        assert cli.main(["profile", "--shapes", "3x24:ragged", "--steps", "3", *files, *arguments]) == 0
        return json.loads(table.read_text()), json.loads(trace.read_text())["traceEvents"]

    return run


def rows(report: dict) -> dict[str, dict]:
    return {row["name"]: row for row in report["rows"]}


# ---------------------------------------------------------------------------------------------------------- the command


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("mode", ["inference", "training"])
def test_the_parts_add_up(backend, mode, profiled, capsys):
    report, events = profiled("--backend", backend, "--mode", mode)
    table = rows(report)
    labelled = mode == "training"
    assert list(table) == [PRODUCTS, ATTENTION, *([LOSS] if labelled else []), REST, OVERHEAD, "step"]
    step = table.pop("step")
    assert step["milliseconds"] == report["milliseconds"] == min(report["all_milliseconds"])
    assert len(report["all_milliseconds"]) == 3
    for quantity in ("milliseconds", "share", "gflop", "floor_milliseconds"):
        total = sum(row[quantity] or 0.0 for row in table.values())
        assert total == pytest.approx(step[quantity]), quantity
    for name, row in table.items():
        if name != OVERHEAD:
            assert row["milliseconds"] > 0
            assert sum(part["milliseconds"] for part in row["parts"]) == pytest.approx(row["milliseconds"])
    # Nothing of the profiled step is left out: its operators, and what was between them.
    profiled_step = timeline.step(events)
    parts = timeline.parts_on_cpu(profiled_step, VOCABULARY)
    assert sum(part.nanoseconds for part in parts) == profiled_step.duration
    assert report["profiled_milliseconds"] == min(report["all_profiled_milliseconds"]) == profiled_step.duration / 1e6
    between = sum(part.nanoseconds for part in parts if part.kind == OVERHEAD) / 1e6
    assert 0 < between == pytest.approx(report["profiled_overhead_milliseconds"])
    assert report["backends"]["float32"] == dict.fromkeys(backends.OPERATIONS, backend)
    printed = capsys.readouterr().out
    assert f"float32 {mode} 3x24:ragged" in printed
    for name in (*table, "step"):
        assert re.search(rf"^{name} +-?[\d.,]+ +-?[\d.]+%", printed, re.MULTILINE), name


def test_names_are_printed_as_they_are(profiled, capsys):
    report, _ = profiled("--mode", "inference")
    report["machine"]["processor"] = "[/abacus] [of] :bell:"
    report["rows"][0]["parts"][0].update(name="[/beads]", share=1.0)
    profile.print_profile(report, make_console())
    printed = capsys.readouterr().out
    assert "[/abacus] [of] :bell:" in printed
    assert "x [/beads]" in printed


@pytest.mark.skipif(not HAS_CPU, reason="no native library")
def test_the_native_steps_are_in_their_calls(profiled):
    report, events = profiled("--backend", "cpu")
    pending, calls = [timeline.step(events)], []
    while pending:
        slice_ = pending.pop()
        pending += slice_.inside
        if slice_.name in ("albert_fast_native::encoder", "albert_fast_native::encoder_backward"):
            calls.append(slice_)
    assert len(calls) == 2
    backward, forward = sorted(calls, key=lambda call: -call.begin)
    assert [s.name for s in forward.inside] == ["pass 0", "pass 1"]
    assert [s.name for s in backward.inside] == ["pass 1", "pass 0"]
    for call in calls:
        for of_pass in call.inside:
            assert of_pass.event["tid"] == call.event["tid"]
            assert call.begin <= of_pass.begin <= of_pass.end <= call.end
            assert all(of_pass.begin <= s.begin <= s.end <= of_pass.end for s in of_pass.inside)
            assert not any(s.inside for s in of_pass.inside)
    assert [s.name for s in forward.inside[0].inside] == ["product", "attention", *["product"] * 3]
    parts = {part["name"]: part for part in rows(report)[PRODUCTS]["parts"]}
    tokens = report["work"]["tokens"]
    # Forward: query, key and value of 2 passes.
    assert parts["product 32 -> 96"]["calls"] == 2
    assert parts["product 32 -> 96"]["gflop"] == pytest.approx(2 * 2 * tokens * 32 * 96 / 1e9)


@pytest.mark.skipif(not HAS_CPU, reason="no native library")
def test_int8_and_autocast(profiled):
    for dtype, mode in (("int8", "inference"), ("autocast", "training")):
        report, _ = profiled("--dtype", dtype, "--mode", mode)
        names = [part["name"] for part in rows(report)[PRODUCTS]["parts"]]
        assert "product 32 -> 96" in names
        assert report["matrix_gflops"].keys() == ({"int8", "bfloat16"} if dtype == "int8" else {"bfloat16"})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shapes", "8x128,8x512"], "--shapes is '8x128,8x512'; one was expected"),
        (["--mode", "inference,training"], "--mode is 'inference,training'"),
        (["--dtype", "int8"], "int8 is for inference"),
        (["--steps", "0"], "--steps is '0'"),
        (["--backend", "abacus"], "--backend is 'abacus'; cpu, cuda, triton, reference was expected"),
        (["--backend", "triton"], "triton"),
        (["-o", "nowhere/trace.json"], "-o is 'nowhere/trace.json'"),
        (["--json", "nowhere/table.json"], "--json is 'nowhere/table.json'"),
        (["--shapes", "1x513"], "512 positions"),
    ],
)
def test_a_wrong_option_is_one_line(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert cli.main(["profile", "-o", str(tmp_path / "trace.json"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_options():
    parser = argparse.ArgumentParser()
    add_profile_to(parser)
    options = profile_options_from(parser.parse_args(["-o", "trace.json", "--steps", "7", "--layers", "3"]))
    assert (options.work.shapes, options.work.modes) == ((Shape(8, 128),), ("training",))
    assert (options.steps, options.backend, options.work.layers) == (7, None, 3)


def test_needed_operations_are_those_of_the_floor():
    text = read_text(())
    batch = make_batch(load_tokenizer(None, text), text, Shape(3, 24, ragged=True))
    for mode, labelled in (("inference", 0), ("training", batch.labelled)):
        needed = profile.needed_operations(CONFIG, batch, mode)
        total = flops.flops(CONFIG, batch.lengths, mode == "training", labelled)
        assert sum(operations.products for operations in needed.values()) == total.products
        assert sum(operations.attention for operations in needed.values()) == total.attention
        assert needed[LOSS].total == 3 * 2 * labelled * CONFIG.embedding_size * VOCABULARY


# ------------------------------------------------------------------------------------------------------------- timeline


class Trace:
    """Events of one thread, times in microseconds."""

    def __init__(self) -> None:
        self.events: list[dict] = []

    def add(self, category, name, begin, end, tid=7, **arguments):
        place = {"ph": "X", "cat": category, "name": name, "pid": 1, "tid": tid, "ts": begin, "dur": end - begin}
        self.events.append({**place, "args": arguments})
        return self

    def op(self, name, begin, end, *shapes, **arguments):
        return self.add("cpu_op", name, begin, end, **{"Input Dims": list(shapes), **arguments})

    def parts(self):
        parts = timeline.parts_on_cpu(timeline.step(self.events), 1000)
        return {(part.kind, part.name): part.nanoseconds / 1e3 for part in parts}


def test_what_is_inside_belongs_to_what_it_is_inside_of():
    trace = Trace().add("user_annotation", timeline.STEP, 100, 200)
    trace.op("aten::linear", 110, 140, [4, 8], [16, 8], [16]).op("aten::t", 111, 113, [16, 8])
    trace.op("aten::addmm", 115, 139, [16], [4, 8], [8, 16]).op("aten::copy_", 116, 120, [4, 16], [4, 16])
    trace.op("albert_fast::encoder", 150, 170, [4, 16]).op("aten::zeros", 152, 155)
    trace.op("albert_fast::masked_lm_loss", 180, 190, [4, 8]).op("aten::to", 182, 183, [1000, 8])
    trace.op("aten::addmm", 40, 50, [16], [4, 8], [8, 16])  # before the step
    trace.add("cpu_op", "aten::addmm", 150, 160, tid=8)  # in another thread
    assert trace.parts() == {
        (PRODUCTS, "aten::linear"): 6,
        (PRODUCTS, "aten::addmm 8 -> 16"): 24,
        (REST, "aten::zeros"): 3,
        (LOSS, "albert_fast::masked_lm_loss"): 1,
        (OVERHEAD, "albert_fast::encoder"): 17,
        (OVERHEAD, "albert_fast::masked_lm_loss"): 9,
        (OVERHEAD, timeline.STEP): 40,
    }


@pytest.mark.parametrize(
    ("name", "shapes", "kind"),
    [
        ("aten::mm", [[4, 8], [8, 16]], PRODUCTS),
        ("aten::_int_mm", [[4, 8], [8, 16]], PRODUCTS),
        ("aten::addmm_", [[16, 8], [16, 4], [4, 8]], PRODUCTS),
        ("aten::mm", [[4, 8], [8, 1000]], LOSS),
        ("aten::mm", [[1000, 4], [4, 8]], LOSS),
        ("aten::logsumexp", [[4, 1000]], LOSS),
        ("aten::_log_softmax", [[4, 1000]], LOSS),
        ("aten::embedding", [[1000, 8], [4]], REST),
        ("aten::embedding_dense_backward", [[4, 8], [4]], REST),
        ("aten::add_", [[1000, 8], [1000, 8]], REST),
        ("aten::bmm", [[2, 4, 8], [2, 8, 4]], ATTENTION),
        ("aten::matmul", [[2, 2, 4, 8], [2, 2, 8, 4]], ATTENTION),
        ("aten::matmul", [[2, 4, 8], [8, 16]], PRODUCTS),
        ("aten::softmax", [[2, 2, 4, 4]], ATTENTION),
        ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", [[2, 2, 4, 8]], ATTENTION),
        ("aten::native_layer_norm", [[4, 16]], REST),
        ("albert_fast_native::product", [[4, 8], [500], [4, 16]], PRODUCTS),
        ("albert_fast_native::attention_backward", [[4, 2, 8]], ATTENTION),
        ("albert_fast_native::dropout_add_layer_norm", [[4, 16]], REST),
        ("AddmmBackward0", [[4, 16]], OVERHEAD),
        ("autograd::engine::evaluate_function: AddmmBackward0", [], OVERHEAD),
    ],
)
def test_the_kind_of_an_operator(name, shapes, kind):
    trace = Trace().add("user_annotation", timeline.STEP, 0, 10).op(name, 2, 5, *shapes)
    assert sum(us for (of, _), us in trace.parts().items() if of == kind) == 3 + 7 * (kind == OVERHEAD)


def test_spans_stay_in_their_call_and_one_outside_is_an_error():
    def span(name, begin, end, pass_index=-1):
        return Span(name, pass_index, begin, end, (4, 8, 16), 1024)

    call = Trace().op("albert_fast_native::encoder", 10, 20).events
    spans = [
        span("product", 9_990, 12_000, 0),
        span("attention", 12_000, 15_000, 1),
        span("LayerNorm", 15_000, 20_030, 1),
    ]
    timeline.add_native_spans(call, spans)
    slices = [(e["name"], e["ts"], e["ts"] + e["dur"]) for e in call[1:]]
    first, second = ("pass 0", 10.0, 12.0), ("pass 1", 12.0, 20.0)
    assert slices == [first, ("product", *first[1:]), second, ("attention", 12, 15), ("LayerNorm", 15, 20)]
    assert {e["tid"] for e in call} == {7}
    with pytest.raises(RuntimeError, match="'product' lies in no call"):
        timeline.add_native_spans(call, [span("product", 21_000, 22_000)])


# ------------------------------------------------------------------------------------------------------------ on a GPU


def gpu_trace() -> Trace:
    """What a step on a GPU leaves: operators that launch, kernels that run later, on a stream."""
    trace = Trace().add("user_annotation", timeline.STEP, 0, 100)
    trace.op("aten::linear", 2, 8, [4, 8], [16, 8], [16], **{"External id": 1})
    trace.op("aten::addmm", 3, 7, [16], [4, 8], [8, 16], **{"External id": 2})
    trace.op("aten::mm", 10, 12, [4, 8], [8, 1000], **{"External id": 3})
    trace.op("albert_fast::encoder", 20, 30, [4, 16], **{"External id": 4})

    def kernel(name, begin, end, launched_by=None, category="kernel"):
        trace.add(category, name, begin, end, tid=99, **({"External id": launched_by} if launched_by else {}))

    kernel("ampere_sgemm_128x64_tn", 40, 50, 2)
    kernel("void cutlass::Kernel2<cutlass_80_tensorop_s1688gemm>(Params)", 50, 54, 3)
    kernel("attention_kernel", 60, 66, 4)
    kernel("layer_norm_forward_kernel_0d1d2", 66, 67, 4)
    kernel("nvjet_hsh_128x256_64x4", 70, 77, 4)
    kernel("Memset (Device)", 80, 81, category="gpu_memset")
    kernel("masked_lm_loss_kernel", 101, 130, 4)  # of the next step
    return trace


def test_kernels_by_who_launched_them_or_by_name():
    trace = gpu_trace()
    step = timeline.step(trace.events)
    parts = timeline.parts_on_gpu(trace.events, step, 1000)
    times: dict[str, int] = {}
    for part in parts:
        times[part.kind] = times.get(part.kind, 0) + part.nanoseconds // 1000
    assert times == {PRODUCTS: 10 + 7, LOSS: 4, ATTENTION: 6, REST: 1 + 1}
    with pytest.raises(RuntimeError, match="nothing on the GPU"):
        timeline.parts_on_gpu([e for e in trace.events if e["tid"] != 99], step, 1000)


def test_every_kernel_of_this_package_has_a_kind():
    sources = Path(timeline.__file__).parents[2] / "kernels"
    names = {
        name
        for file in sources.glob("*.py")
        for name in re.findall(r"^def (\w+_kernel)\(", file.read_text(), re.MULTILINE)
    }
    assert names == set(timeline.KERNEL_KINDS)


def test_an_encoder_in_one_kernel_has_the_floor_of_both():
    needed = {
        PRODUCTS: flops.Operations(300, 0),
        ATTENTION: flops.Operations(0, 40),
        LOSS: flops.Operations(0, 0),
    }
    floors = {PRODUCTS: 0.003, ATTENTION: 0.0004, LOSS: 0.0}
    kernel = Part(ENCODER, "resident_encoder<bf16>", 1, 4_000_000)
    table = rows({"rows": profile.table_rows([kernel, Part(PRODUCTS, "sgemm", 1, 1_000_000)], 6.0, needed, floors)})
    assert list(table) == [ENCODER, PRODUCTS, OVERHEAD, "step"]
    assert table[ENCODER]["floor_milliseconds"] == pytest.approx(3.4)
    assert table[ENCODER]["gflop"] == pytest.approx(340e-9)
    assert table[PRODUCTS]["floor_milliseconds"] is None
    assert table[OVERHEAD]["milliseconds"] == pytest.approx(1.0)


def test_the_fastest_step(monkeypatch):
    lengths = iter([9.0, 0.03, 0.01, 0.02])  # the first one warms the profiler up

    def profiled_step(function, device):
        return {"traceEvents": Trace().add("user_annotation", timeline.STEP, 0, next(lengths) * 1e6).events}

    monkeypatch.setattr(profile, "profile", profiled_step)
    calls = []
    measured = profile.measure(lambda: calls.append(0), torch.device("cpu"), 3, lambda text: None)
    assert measured.step == timeline.step(measured.trace["traceEvents"])
    assert measured.step.duration == 0.01 * 1e9
    assert measured.profiled_nanoseconds == [30_000_000, 10_000_000, 20_000_000]
    assert (len(measured.seconds), len(calls)) == (3, 2 + 3)
