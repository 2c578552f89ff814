"""The native build: what is compiled when, what is found again, what is said where it cannot be, and its threads."""

from __future__ import annotations

import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch

from albert_fast import backends, native, ops

linux = pytest.mark.skipif(
    platform.system() != "Linux" or platform.machine() != "x86_64" or native.compiler() is None,
    reason="needs a C++ compiler on x86-64 Linux",
)
needs_library = pytest.mark.skipif(native.load() is not None, reason=f"no native library: {native.load()}")

pytestmark = linux

BINDING = '#include "cpu/kernel.h"\nextern "C" int answer() { return albert::avx2::value() + ANSWER; }\n'
HEADER = "#define ANSWER 40\nnamespace albert::avx2 { int value(); }\n"
KERNEL = '#include "kernel.h"\nnamespace albert::ALBERT_ISA { int value() { return 2; } }\n'
# A compiler that writes down what it is asked to compile.
WRAPPER = """#!/bin/sh
case "$*" in *--version*) echo "wrapper $WRAPPER_VERSION"; exit 0;; esac
echo "$*" >> {log}
sleep ${{WRAPPER_SLEEP:-0}}
exec {compiler} "$@"
"""


class Tree:
    """A small csrc, a cache and a compiler of their own, on a processor with AVX-512."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sources, self.cache, self.log = folder / "csrc", folder / "cache", folder / "log"
        (self.sources / "cpu").mkdir(parents=True)
        (self.sources / "binding.cpp").write_text(BINDING)
        (self.sources / "cpu" / "kernel.cpp").write_text(KERNEL)
        (self.sources / "cpu" / "kernel.h").write_text(HEADER)
        self.wrapper = folder / "c++"
        compiler = native.compiler()
        assert compiler is not None
        self.wrapper.write_text(WRAPPER.format(log=self.log, compiler=" ".join(compiler)))
        self.wrapper.chmod(0o755)
        self.monkeypatch = monkeypatch
        monkeypatch.setattr(native, "source_folder", lambda: self.sources)
        self.processor(avx512=True)
        monkeypatch.setenv("ALBERT_FAST_CACHE", str(self.cache))
        monkeypatch.setenv("CXX", str(self.wrapper))
        monkeypatch.delenv("ALBERT_FAST_CXXFLAGS", raising=False)
        native.compiler_version.cache_clear()

    def compiled(self) -> list[str]:
        """The sources compiled since the last call, and `link`."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        self.log.unlink(missing_ok=True)
        names = [next((Path(w).name for w in line.split() if w.endswith(".cpp")), "link") for line in lines]
        return sorted(names)

    def processor(self, *, avx512: bool) -> None:
        self.monkeypatch.setattr(native, "has_avx512", lambda: avx512)

    def without_compiler(self) -> None:
        self.monkeypatch.delenv("CXX")
        self.monkeypatch.setenv("PATH", "")


@pytest.fixture
def tree(tmp_path, monkeypatch):
    yield Tree(tmp_path, monkeypatch)
    native.compiler_version.cache_clear()


ALL = ["binding.cpp", "kernel.cpp", "kernel.cpp", "link"]
WITHOUT_AVX512 = ["binding.cpp", "kernel.cpp", "link"]
# For another process: what `Tree` sets in this one.
OF_A_TREE = "import sys, pathlib; from albert_fast import native; native.has_avx512 = lambda: True; "
OF_A_TREE += "native.source_folder = lambda: pathlib.Path(sys.argv[1])"


def python(program: str, *arguments: str, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    options = {"capture_output": True, "text": True, "timeout": 120}
    command = [sys.executable, "-c", program, *arguments]
    result = subprocess.run(command, env={**os.environ, **environment}, **options)
    if check:
        assert result.returncode == 0, result.stdout + result.stderr
    return result


# -------------------------------------------------------------------------------------------------- what is made when


def test_built_once(tree):
    path = native.build()
    assert path.parent == tree.cache
    assert tree.compiled() == ALL
    assert not list(tree.cache.glob("objects/*.part"))
    assert native.build() == path
    assert tree.compiled() == []
    assert not list(tree.cache.glob("*partial*"))
    assert native.build(force=True) == path
    assert tree.compiled() == ALL


def test_found_again_without_a_compiler(tree):
    path = native.build()
    tree.without_compiler()
    assert native.build() == path
    assert native._State().reason is None


def test_a_change_is_compiled_and_nothing_else(tree):
    first = native.build()
    tree.compiled()
    (tree.sources / "cpu" / "kernel.cpp").write_text(KERNEL.replace("2", "3"))
    second = native.build()
    assert second != first
    assert tree.compiled() == ["kernel.cpp", "kernel.cpp", "link"]
    (tree.sources / "cpu" / "kernel.h").write_text(HEADER.replace("40", "41"))
    assert native.build() not in (first, second)
    assert tree.compiled() == ALL
    # Back again: the names of the files decide, not their times.
    for name, text in (("kernel.cpp", KERNEL), ("kernel.h", HEADER)):
        (tree.sources / "cpu" / name).write_text(text)
        os.utime(tree.sources / "cpu" / name, (1, 1))
    assert native.build() == first
    assert tree.compiled() == []
    assert first.is_file()


def test_objects_serve_an_installation_elsewhere_and_later(tree, tmp_path):
    """As after an upgrade that changed one source: the others have another path, and times after the objects'."""
    native.build()
    tree.compiled()
    (tree.sources / "cpu" / "kernel.cpp").write_text(KERNEL.replace("2", "3"))
    elsewhere = tmp_path / "another place for $sources"
    shutil.copytree(tree.sources, elsewhere)
    later = time.time() + 60
    for path in elsewhere.rglob("*"):
        os.utime(path, (later, later))
    tree.monkeypatch.setattr(native, "source_folder", lambda: elsewhere)
    assert native.build().is_file()
    assert tree.compiled() == ["kernel.cpp", "kernel.cpp", "link"]


def test_flags_compiler_and_torch_have_libraries_of_their_own(tree):
    paths = [native.build(), native.build(["-g0"])]
    tree.monkeypatch.setenv("ALBERT_FAST_CXXFLAGS", "-fno-plt")
    paths.append(native.build())
    tree.monkeypatch.delenv("ALBERT_FAST_CXXFLAGS")
    tree.monkeypatch.setenv("WRAPPER_VERSION", "2")
    native.compiler_version.cache_clear()
    paths.append(native.build())
    tree.monkeypatch.setattr(torch, "__version__", "99.0")
    paths.append(native.build())
    assert len(set(paths)) == len(paths)


def test_a_build_that_fails_shows_the_compilers_words(tree):
    good = native.build()
    (tree.sources / "cpu" / "kernel.cpp").write_text(KERNEL.replace("return 2", "return two"))
    with pytest.raises(native.BuildError, match=r"error: .*two"):
        native.build()
    assert list(tree.cache.glob("*.so")) == [good]
    (tree.sources / "cpu" / "kernel.cpp").write_text(KERNEL)
    assert native.build() == good


def test_a_build_that_was_killed_is_done_again(tree):
    program = f"{OF_A_TREE}; native.build()"
    environment = {**os.environ, "WRAPPER_SLEEP": "60"}
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tree.sources)], env=environment, start_new_session=True
    )
    while not tree.log.exists():
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    tree.compiled()
    assert native.build().is_file()
    assert tree.compiled() == ALL


def test_two_processes_build_once(tree):
    program = f"{OF_A_TREE}; print(native.build())"
    command = [sys.executable, "-c", program, str(tree.sources)]
    environment = {**os.environ, "WRAPPER_SLEEP": "0.3"}
    processes = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    results = {process.communicate(timeout=120)[0].strip() for process in processes}
    assert [process.returncode for process in processes] == [0] * 3
    assert len(results) == 1
    assert Path(results.pop()).is_file()
    assert tree.compiled() == ALL


# ----------------------------------------------------------------------------------------------- with AVX-512 or not


def test_a_processor_without_avx512_gets_none_of_it(tree):
    tree.processor(avx512=False)
    narrow = native.build()
    assert "-avx2-" in narrow.name
    assert tree.compiled() == WITHOUT_AVX512
    assert native.build() == narrow
    assert tree.compiled() == []
    assert native.build(force=True) == narrow
    assert tree.compiled() == WITHOUT_AVX512


def test_a_processor_with_avx512_needs_a_library_with_it(tree):
    tree.processor(avx512=False)
    narrow = native.build()
    tree.compiled()
    tree.processor(avx512=True)
    whole = native.build()
    assert "-avx512-" in whole.name
    assert tree.compiled() == ["kernel.cpp", "link"], "the other objects are the same"
    assert narrow.is_file()


def test_a_whole_library_serves_every_processor(tree):
    tree.processor(avx512=False)
    narrow = native.build()
    whole = native.build(avx512=True)
    assert whole != narrow
    assert native.build() == whole
    narrow.unlink()
    tree.compiled()
    assert native.build() == whole
    assert tree.compiled() == []


@pytest.mark.parametrize("avx512", [False, True])
def test_without_a_compiler_what_is_there_serves(tree, avx512):
    narrow = native.build(avx512=False)
    tree.processor(avx512=avx512)
    compiler = os.environ["CXX"], os.environ["PATH"]
    tree.without_compiler()
    assert native.build() == narrow
    tree.monkeypatch.setenv("CXX", compiler[0])
    tree.monkeypatch.setenv("PATH", compiler[1])
    whole = native.build(avx512=True)
    tree.without_compiler()
    assert native.build() == whole


def test_a_source_of_avx512_alone(tree):
    (tree.sources / "cpu" / "wide.cpp").write_text("namespace albert::avx512 { int wide() { return kLanes; } }\n")
    tree.monkeypatch.setenv("ALBERT_FAST_CXXFLAGS", "-DkLanes=16")
    native.build(avx512=False)
    assert tree.compiled() == WITHOUT_AVX512
    native.build()
    assert tree.compiled() == ["kernel.cpp", "link", "wide.cpp"]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("flags\t\t: fpu avx2 avx512f avx512bw avx512dq avx512vl avx512_vnni\n", True),
        ("flags\t\t: fpu avx2 avx512f avx512cd avx512er avx512pf\nvmx flags\t: avx512vl\n", False),
        ("flags\t\t: fpu avx2\n", False),
        ("no such line\n", True),
    ],
)
def test_what_the_processor_has(monkeypatch, flags, expected):
    monkeypatch.setattr(Path, "read_text", lambda self: flags)
    assert native.has_avx512.__wrapped__() is expected


# ----------------------------------------------------------------------------------------------- what stands in the way


def reason(monkeypatch: pytest.MonkeyPatch) -> str:
    """What a process that begins now would say, in one line and one warning."""
    with pytest.warns(RuntimeWarning) as caught:
        text = native._State().reason
    assert text is not None
    assert len(caught) == 1
    assert text in str(caught[0].message)
    assert "\n" not in str(caught[0].message)
    return text


def test_no_compiler(tree):
    tree.without_compiler()
    assert "install g++" in reason(tree.monkeypatch)
    tree.monkeypatch.setenv("CXX", "no-such-compiler")
    assert "'no-such-compiler', which is not found" in reason(tree.monkeypatch)


def test_no_ninja(tree):
    tree.monkeypatch.setattr(native, "ninja", lambda: None)
    assert "pip install ninja" in reason(tree.monkeypatch)


@pytest.mark.parametrize(("system", "machine"), [("Darwin", "arm64"), ("Windows", "AMD64"), ("Linux", "aarch64")])
def test_other_machines(tree, system, machine):
    tree.monkeypatch.setattr(platform, "system", lambda: system)
    tree.monkeypatch.setattr(platform, "machine", lambda: machine)
    assert (machine if system == "Linux" else system) in reason(tree.monkeypatch)


def test_no_sources(tree):
    tree.monkeypatch.setattr(native, "source_folder", lambda: None)
    assert "csrc" in reason(tree.monkeypatch)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_cache_that_cannot_be_written(tree):
    tree.cache.mkdir()
    tree.cache.chmod(0o500)
    with pytest.raises(native.BuildError, match="set ALBERT_FAST_CACHE"):
        native.build()


def test_a_cache_that_is_a_file(tree):
    tree.cache.write_text("")
    with pytest.raises(native.BuildError, match="set ALBERT_FAST_CACHE"):
        native.build()


RUN_A_MODEL = """
import torch, albert_fast
from albert_fast import backends
config = albert_fast.AlbertConfig(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
model = albert_fast.AlbertModel(config).eval()
for _ in range(2):
    model(torch.tensor([[2, 5, 3]])).last_hidden_state.sum().backward()
print(backends.choose(backends.Call("encoder", torch.device("cpu"), torch.float32, 32, "gelu_new")).name)
"""


def test_pytorch_serves_without_a_compiler(tmp_path):
    environment = {"ALBERT_FAST_CACHE": str(tmp_path), "PATH": "", "CXX": ""}
    result = python(RUN_A_MODEL, **environment)
    assert result.stdout.strip() == "reference"
    assert result.stderr.count("RuntimeWarning") == 1
    assert "install g++" in result.stderr
    result = python(RUN_A_MODEL, check=False, ALBERT_FAST_BACKEND="cpu", **environment)
    assert "BackendError: ALBERT_FAST_BACKEND=cpu cannot serve" in result.stderr
    assert "install g++" in result.stderr.splitlines()[-1]


def test_pytorch_serves_where_the_compiler_fails(tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'kernel.cpp:1: error: strange times' >&2\nexit 1\n")
    compiler.chmod(0o755)
    result = python(RUN_A_MODEL, ALBERT_FAST_CACHE=str(tmp_path / "cache"), CXX=str(compiler))
    assert result.stdout.strip() == "reference"
    assert "error: strange times" in result.stderr
    assert result.stderr.count("RuntimeWarning") == 1


def test_calls_that_it_does_not_serve_build_nothing(tmp_path):
    program = """
import torch
from albert_fast import backends, native
native.load = None
for device, dtype in (("cpu", torch.float64), ("cuda", torch.float32), ("cpu", torch.float16)):
    call = backends.Call("attention", torch.device(device), dtype, head_dim=64)
    assert backends.choose(call).name == "reference"
    assert "float" in backends.refusal(backends.CPU, call) or device == "cuda"
assert backends.choose(backends.Call("attention", torch.device("cuda"), torch.float32, 999)).name == "reference"
"""
    python(program, ALBERT_FAST_CACHE=str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_import_looks_for_nothing():
    program = (
        "import sys, albert_fast; assert not {'ninja', 'albert_fast.native', 'albert_fast.cpu'} & set(sys.modules)"
    )
    python(program)


# ---------------------------------------------------------------------------------------------------- the command line


@pytest.mark.parametrize("avx512", [True, False], ids=["on AVX-512", "on AVX2"])
def test_the_build_command(tree, capsys, avx512):
    """It builds for every processor, wherever it runs."""
    from albert_fast.cli import main

    tree.processor(avx512=avx512)
    assert main(["build"]) == 0
    path = Path(capsys.readouterr().out.splitlines()[0])
    assert path.parent == tree.cache
    assert tree.compiled() == ALL
    assert main(["build"]) == 0
    assert tree.compiled() == []
    assert main(["build", "--force"]) == 0
    assert tree.compiled() == ALL
    (tree.sources / "cpu" / "kernel.cpp").write_text("nonsense")
    capsys.readouterr()
    assert main(["build"]) == 1
    assert "nonsense" in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------- in a process


@pytest.mark.slow
def test_from_nothing_in_half_a_minute_and_without_warnings(tmp_path):
    """What this machine builds on first use, by the processor time that it takes, shared by two cores."""
    before = sum(os.times()[2:4])
    program = "from albert_fast import native; print(native.build())"
    path = Path(python(program, ALBERT_FAST_CACHE=str(tmp_path)).stdout.strip())
    seconds = (sum(os.times()[2:4]) - before) / 2
    log = (tmp_path / "objects" / f"{path.name}.log").read_text()
    assert "warning" not in log, log
    print(f"{seconds:.1f} s")
    assert seconds < 30


@pytest.mark.slow
def test_the_whole_library_has_every_kernel_and_no_warnings(tmp_path, monkeypatch):
    """On any machine: of AVX-512 too, whose kernels may be missing without a word from the linker."""
    monkeypatch.setenv("ALBERT_FAST_CACHE", str(tmp_path))
    path = native.build(avx512=True)
    log = (tmp_path / "objects" / f"{path.name}.log").read_text()
    assert "warning" not in log, log
    symbols = subprocess.run(["nm", "-D", "-C", str(path)], capture_output=True, text=True, check=True).stdout
    assert " W albert::avx512::gemm(" in symbols
    assert " w albert::" not in symbols, "declared, called and nowhere defined"


@needs_library
def test_a_library_without_avx512(tmp_path):
    """Whatever ALBERT_FAST_ISA asks for, AVX2 serves. Made of the objects that this machine has anyway."""
    objects = native.cache_folder() / "objects"
    (tmp_path / "objects").mkdir()
    for name in native.Plan.make(avx512=False).object_names():
        if (objects / name).is_file():
            shutil.copy(objects / name, tmp_path / "objects")
    program = """
import os, torch
from albert_fast import native
native.has_avx512 = lambda: False
import test_native
os.environ["ALBERT_FAST_BACKEND"] = "cpu"
assert "-avx2-" in native.build().name
x, parameters = torch.randn(50, 64), test_native.layer()
results = []
for isa in ("", "avx2", "avx512_base", "avx512_bf16"):
    os.environ["ALBERT_FAST_ISA"] = isa
    assert torch.ops.albert_fast_native.isa() == "avx2"
    results.append(test_native.encode(x, parameters))
assert all(torch.equal(result, results[0]) for result in results)
"""
    python(program, ALBERT_FAST_CACHE=str(tmp_path), PYTHONPATH=str(Path(__file__).parent))


@needs_library
def test_compiled_before_it_was_ever_called():
    """torch.compile finds the library, loads it and keeps the graph whole."""
    program = """
import torch
from albert_fast import ops, backends
x, rows = torch.randn(5, 3, 2, 16), torch.tensor([0, 5], dtype=torch.int32)
compiled = torch.compile(lambda x: ops.attention(x, rows, 5), fullgraph=True, backend="aot_eager")
result = compiled(x)
assert torch.ops.albert_fast_native.isa()
torch.testing.assert_close(result, ops.attention(x, rows, 5))
"""
    python(program)


def layer(width: int = 64, inner: int = 128) -> list[torch.Tensor]:
    square, shapes = (width, width), []
    for matrix in (square, square, square, square, None, (inner, width), (width, inner), None):
        shapes += [matrix or (width,), (matrix or (width,))[:1]]
    return [torch.randn(shape) / 8 for shape in shapes]


def encode(x: torch.Tensor, parameters: list[torch.Tensor]) -> torch.Tensor:
    rows = torch.tensor([0, x.shape[0] // 3, x.shape[0]], dtype=torch.int32)
    return ops.encoder(x, parameters, rows, x.shape[0], num_layers=3, num_heads=2, eps=1e-12)


@pytest.fixture
def _cpu(monkeypatch):
    monkeypatch.setenv("ALBERT_FAST_BACKEND", "cpu")


@needs_library
def test_set_num_threads_is_obeyed():
    """A thread more for each that is asked for, and none before."""
    program = """
import os, torch, test_native
os.environ["ALBERT_FAST_BACKEND"] = "cpu"
x, parameters = torch.randn(50, 64), test_native.layer()
torch.set_num_threads(1)
counts, results = [], []
for threads in (1, 3):
    torch.set_num_threads(threads)
    before = len(os.listdir("/proc/self/task"))
    results.append(test_native.encode(x, parameters))
    counts.append(len(os.listdir("/proc/self/task")) - before)
assert counts == [0, 2], counts
assert torch.equal(*results)
"""
    python(program, PYTHONPATH=str(Path(__file__).parent))


@needs_library
def test_in_a_forked_child():
    """The parent's pool has run; the child has no such threads and must not wait for them."""
    program = """
import os, signal, torch, test_native
os.environ["ALBERT_FAST_BACKEND"] = "cpu"
torch.set_num_threads(2)
x, parameters = torch.randn(50, 64), [p.requires_grad_() for p in test_native.layer()]
expected = test_native.encode(x, parameters)
expected.sum().backward()
pid = os.fork()
if pid == 0:
    signal.alarm(30)
    result = test_native.encode(x, parameters)
    grads = torch.autograd.grad(result.sum(), parameters[-1])
    os._exit(0 if torch.equal(result, expected) and torch.allclose(grads[0], parameters[-1].grad) else 3)
_, status = os.waitpid(pid, 0)
assert status == 0, status
assert torch.equal(test_native.encode(x, parameters), expected)
"""
    python(program, PYTHONPATH=str(Path(__file__).parent))


@needs_library
@pytest.mark.usefixtures("_cpu")
def test_several_threads_call_at_once():
    parameters = layer()
    inputs = [torch.randn(40 + 7 * i, 64) for i in range(4)]
    expected = [encode(x, parameters) for x in inputs]
    results: list[list[torch.Tensor]] = [[] for _ in inputs]

    def work(i: int) -> None:
        for _ in range(5):
            results[i].append(encode(inputs[i], parameters))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, each in enumerate(results):
        assert len(each) == 5
        assert all(torch.equal(result, expected[i]) for result in each)


@needs_library
@pytest.mark.usefixtures("_cpu")
def test_the_floating_point_environment_stays_as_it_is(monkeypatch):
    """Rounding mode and flush-to-zero, of this thread and, as far as a sum over them tells, of torch's pool."""
    import ctypes

    libm = ctypes.CDLL("libm.so.6")

    def control() -> bytes:
        buffer = ctypes.create_string_buffer(64)
        libm.fegetenv(buffer)
        # x87 control word; MXCSR without the flags of exceptions that have been seen.
        mxcsr = int.from_bytes(buffer.raw[28:32], "little") & ~0x3F
        return buffer.raw[:2] + mxcsr.to_bytes(4, "little")

    tiny = torch.full((1 << 18,), 1e-38)
    before = control()
    assert bool((tiny * 0.1 > 0).all()), "the tests begin with denormal numbers"
    for dtype in (torch.float32, torch.bfloat16):
        parameters = [p.to(dtype).requires_grad_() for p in layer()]
        encode(torch.randn(50, 64).to(dtype), parameters).sum().backward()
        x, table = torch.randn(30, 16).to(dtype), torch.randn(99, 16).to(dtype).requires_grad_()
        ops.masked_lm_loss(x, table, torch.randn(99).to(dtype), torch.randint(99, (30,))).backward()
    assert control() == before
    assert bool((tiny * 0.1 > 0).all())


@needs_library
@pytest.mark.parametrize("isa", ["avx2", "avx512_base", "avx512_bf16"])
@pytest.mark.usefixtures("_cpu")
def test_instruction_sets_agree(isa, monkeypatch):
    x, parameters = torch.randn(50, 64), layer()
    best = encode(x, parameters)
    monkeypatch.setenv("ALBERT_FAST_ISA", isa)
    torch.testing.assert_close(encode(x, parameters), best, rtol=1e-4, atol=1e-5)


@needs_library
def test_the_report_names_it():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rows = backends.report(torch.device("cpu"))
    assert {name for _, name, _ in rows} == {"cpu"}
    assert {name for _, name, _ in backends.report(torch.device("cpu"), torch.float64)} == {"reference"}
    assert shutil.which("ninja") or native.ninja()
