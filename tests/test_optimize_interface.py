"""How ``optimize`` meets its callers: what calls it takes, what it refuses, and in which words."""

from __future__ import annotations

import collections
import copy
import os
import shutil
import subprocess
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils import _pytree

from fxquant import (
    LoweringWarning,
    NativeUnavailableError,
    NotAGraphModuleError,
    QuantGraphModule,
    optimize,
    quantize,
)
from fxquant.native import comparison, library
from fxquant.native.calls import NoPlanError, NotComparableError, key_of, same_results
from fxquant.native.plan_table import PlanTable
from fxquant.native.program import Program, UnlikeError
from tests.native_machine import needs_native

pytestmark = pytest.mark.filterwarnings(
    "ignore::fxquant.LoweringWarning", "error:the native plan:fxquant.LoweringWarning"
)

# -- threads ----------------------------------------------------------------------------------


@needs_native
def test_worker_threads(tmp_path: Path) -> None:
    """No more than processors; who takes no part sleeps on; callers at once, and forks."""
    sources = Path(library.__file__).parent / "src"
    flags = [f for f in library._FLAGS if f not in ("-shared", "-fPIC")]
    made = tmp_path / "threads"
    command = [
        *library._compiler().split(), *flags, f"-I{sources}", str(sources / "threads.cpp"),
        str(Path(__file__).parent / "native_threads.cpp"), "-o", str(made),
    ]  # fmt: skip
    subprocess.run(command, check=True)
    done = subprocess.run([made], capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stdout) == (0, "")


_ON_ONE_PROCESSOR = """
import os, torch
from pathlib import Path
from torch import nn
from fxquant import optimize, quantize
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
x = torch.randn(2, 3, 16, 16)
int8 = quantize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3)).eval(), [(x,)])
fast = optimize(int8, (x,))
torch.set_num_threads(4)
int8(x)
before = len(list(Path("/proc/self/task").iterdir()))
assert torch.equal(fast(x), int8(x)) and len(fast.plans()) == 1
assert len(list(Path("/proc/self/task").iterdir())) == before
"""


@needs_native
def test_a_process_on_one_processor_starts_no_workers() -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", _ON_ONE_PROCESSOR], check=True, env=environment)


# -- building the kernels ---------------------------------------------------------------------


def _script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


@pytest.fixture
def kernels(tmp_path: Path) -> Path:
    """A copy of the library of this machine."""
    library.load()
    return shutil.copy(library._target(), tmp_path / "kernels.so")


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """An empty folder for kernels, and no memory of earlier attempts."""
    folder = tmp_path / "cache"
    folder.mkdir()
    monkeypatch.setenv("FXQUANT_CACHE", str(folder))
    monkeypatch.setattr(library, "cpu_suits", lambda: True)
    monkeypatch.setattr(library, "_failures", {})
    library.load.cache_clear()
    yield folder
    library.load.cache_clear()


class _Compiler:
    """A compiler that counts how often it is called, and makes a copy of some file."""

    def __init__(self, folder: Path, made: Path, rest: str = "") -> None:
        self.calls = folder / "calls"
        self.path = _script(
            folder / "compiler",
            f'echo "$1" >> {self.calls}\n'
            f'while [ "$1" != "-o" ]; do shift; done\ncp {made} "$2"\n{rest}',
        )

    def first_words(self) -> list[str]:
        return self.calls.read_text().split() if self.calls.exists() else []


_FIRST_FLAG = library._FLAGS[0]


@needs_native
@pytest.mark.parametrize("contents", ["nothing", "text", "another library"])
def test_a_foreign_file_among_the_kernels_is_built_anew(
    contents: str, kernels: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler, target = _Compiler(tmp_path, kernels), library._target()
    monkeypatch.setenv("CXX", str(compiler.path))
    if contents == "another library":
        source = tmp_path / "other.c"
        source.write_text("int fxq_plan_create() { return 0; }\n")
        real = library._COMPILERS[0]
        subprocess.run([real, "-shared", "-fPIC", str(source), "-o", str(target)], check=True)
    else:
        target.write_text("" if contents == "nothing" else "not a library\n" * 100)
    assert library.load().fxq_plan_run
    library.load.cache_clear()
    library.load()
    assert compiler.first_words() == [_FIRST_FLAG]


@needs_native
def test_kernels_that_cannot_be_loaded_when_built_anew(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "nothing").touch()
    compiler = _Compiler(tmp_path, tmp_path / "nothing")
    monkeypatch.setenv("CXX", str(compiler.path))
    library._target().touch()
    for _ in range(2):
        with pytest.raises(NativeUnavailableError, match=r"cannot be loaded.*FXQUANT_CACHE"):
            library.load()
    assert compiler.first_words() == [_FIRST_FLAG]  # not built again and again
    x = torch.randn(1, 3, 9, 9)
    int8 = quantize(nn.Conv2d(3, 8, 3).eval(), [(x,)])
    with pytest.warns(LoweringWarning, match="FXQUANT_CACHE"):
        optimized = optimize(int8, (x,))
    assert torch.equal(optimized(x), int8(x))


def test_a_folder_that_nothing_may_be_run_from(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "nothing").touch()
    compiler = _Compiler(tmp_path, tmp_path / "nothing")
    monkeypatch.setenv("CXX", str(compiler.path))
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_flag=os.ST_NOEXEC))
    with pytest.raises(NativeUnavailableError, match=r"noexec.*FXQUANT_CACHE"):
        library.load()
    assert compiler.first_words() == []


@needs_native
@pytest.mark.parametrize("words", ["{} -m64", "env {} -m64", "'{}' '-m64'"])
def test_compilers_with_arguments(
    words: str, kernels: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    compiler = _Compiler(tmp_path, kernels)
    monkeypatch.setenv("CXX", words.format(compiler.path))
    library.load()
    assert compiler.first_words() == ["-m64"]


@needs_native
def test_a_compiler_in_a_folder_with_a_space(
    kernels: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "my tools").mkdir()
    compiler = _Compiler(tmp_path, kernels)
    moved = compiler.path.rename(tmp_path / "my tools" / "compiler")
    monkeypatch.setenv("CXX", str(moved))
    library.load()
    assert compiler.first_words() == [_FIRST_FLAG]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("echo out of order >&2\nexit 1", "out of order"),
        ("exit 3", "code 3"),
        ("exit 0", "without a file"),
        ("printf '\\377\\376' >&2\nexit 1", "could not build"),
        ("sleep 100 & wait", r"stopped after 0\.2 s"),
    ],
)
def test_a_compiler_that_fails_is_tried_once(
    text: str, message: str, cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls = tmp_path / "calls"
    broken = _script(tmp_path / "broken", f"echo x >> {calls}\n{text}")
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setattr(library, "_SECONDS", 0.2)
    for _ in range(2):
        with pytest.raises(NativeUnavailableError, match=message) as caught:
            library.load()
        assert str(broken) in str(caught.value)
        assert "FXQUANT_CACHE" not in str(caught.value)
    # With and without the one flag that not all compilers know.
    assert calls.read_text() == ("x\n" if "sleep" in text else "x\nx\n")


def test_a_compiler_that_cannot_be_run(
    cache: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    broken = _script(tmp_path / "broken", "")
    broken.write_text("#!/no/such/interpreter\n")
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(NativeUnavailableError, match="cannot be run") as caught:
        library.load()
    assert "FXQUANT_CACHE" not in str(caught.value)


@pytest.mark.parametrize("words", ["no-such-compiler -m64", "'open"])
def test_names_of_no_compiler(words: str, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", words)
    with pytest.raises(NativeUnavailableError, match=f"{words}.*CXX"):
        library.load()


# -- which calls get a plan -------------------------------------------------------------------


class _Two(nn.Module):
    """Two convolutions; who inherits from it says what comes in and goes out."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3)

    def layers(self, x: Tensor) -> Tensor:
        y: Tensor = self.b(F.relu(self.a(x)))
        return y

    def forward(self, x: Tensor) -> Any:
        return self.layers(x)


def _image(size: int = 9) -> Tensor:
    return torch.randn(2, 3, size, size)


def _int8(model: nn.Module | None = None, *inputs: Any) -> QuantGraphModule:
    return quantize((model or _Two()).eval(), [inputs or (_image(),)])


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Program]:
    """Every program that is made."""
    programs: list[Program] = []

    class Counted(Program):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            programs.append(self)

    monkeypatch.setattr(comparison, "Program", Counted)
    return programs


@needs_native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_autocast_is_off_inside(dtype: torch.dtype) -> None:
    model = nn.Sequential(_Two(), nn.Softmax(1), nn.ConvTranspose2d(8, 8, 2))  # some is torch's
    int8, x = _int8(model), _image()
    optimized = optimize(int8)
    with torch.autocast("cpu", torch.bfloat16):
        expected = int8(x.to(dtype))
        assert expected.dtype == torch.float32
        for _ in range(3):
            assert torch.equal(optimized(x.to(dtype)), expected)
    assert len(optimized.plans()) == 1
    for _ in range(2):
        assert torch.equal(optimized(x), int8(x))


@needs_native
def test_seventeen_shapes_in_turn_make_no_plan_for_the_last(made: list[Program]) -> None:
    int8 = _int8()
    optimized, inputs = optimize(int8), [_image(size) for size in range(9, 26)]
    for _ in range(20):
        for x in inputs:
            optimized(x)
    assert len(made) == 16
    assert "plans for many others" in str(optimized)
    assert all(torch.equal(optimized(x), int8(x)) for x in inputs)


@needs_native
def test_what_comes_often_takes_the_place_of_what_was_used_longest_ago(
    made: list[Program],
) -> None:
    optimized, inputs = optimize(_int8()), [_image(size) for size in range(9, 26)]
    *first, new = inputs
    for x in first:
        optimized(x)
    for x in (first[0], first[2]):
        optimized(x)
    for _ in range(12):
        optimized(new)
    assert len(made) == 17
    for x in (*first[2:], first[0], new):  # all but the second
        optimized(x)
    assert len(made) == 17
    assert len(optimized.plans()) == 16
    for _ in range(8):
        optimized(first[1])
    assert len(made) == 18


def test_a_table_counts_calls_of_some_kinds_only() -> None:
    table = PlanTable()
    for i in range(16):
        table[i,] = "none"
    for i in range(1000):
        assert not table.has_room_for((i + 100,))
    assert len(table._refused) == 64


@needs_native
def test_two_threads_with_the_same_new_shape_make_one_plan(
    made: list[Program], monkeypatch: pytest.MonkeyPatch
) -> None:
    int8, x = _int8(), _image()
    optimized, expected = optimize(int8), int8(x)
    both = threading.Barrier(2)
    has_room_for = PlanTable.has_room_for

    def together(table: PlanTable, key: Any) -> bool:
        both.wait(30)
        return has_room_for(table, key)

    monkeypatch.setattr(PlanTable, "has_room_for", together)
    found: list[Tensor] = []
    threads = [threading.Thread(target=lambda: found.append(optimized(x))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [torch.equal(y, expected) for y in found] == [True, True]
    assert len(made) == 1


@needs_native
def test_printing_while_plans_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    optimized = optimize(_int8(), (_image(),))
    optimized(_image(10))
    counted, sizes = sys.modules["fxquant.optimize"]._counted, iter(range(11, 20))

    def meanwhile(nodes: tuple[fx.Node, ...]) -> str:
        optimized(_image(next(sizes)))
        return counted(nodes)

    monkeypatch.setattr(sys.modules["fxquant.optimize"], "_counted", meanwhile)
    assert "[2, 3, 9, 9]" in str(optimized)
    assert len(optimized.plans()) == 4


class _Nested(_Two):
    def forward(
        self, batch: Mapping[str, Any], scale: float = 1.0, mask: Tensor | None = None
    ) -> Any:
        return {"y": self.layers(batch["x"]) * scale, "rest": batch["rest"][0]}


@needs_native
def test_inputs_may_be_nested_and_plain_values(made: list[Program]) -> None:
    def batch(size: int) -> dict[str, Any]:
        return {"x": _image(size), "rest": [torch.randn(2), None, "name"]}

    int8 = _int8(_Nested(), batch(9))
    optimized = optimize(int8, (batch(9),))
    assert len(made) == 1
    for size, *rest in ((9,), (9, 1.0), (9, 0.5), (9, 2), (9, True), (12, 0.5)):
        for _ in range(2):
            given = batch(size)
            expected, found = int8(given, *rest), optimized(given, *rest)
            assert torch.equal(found["y"], expected["y"])
            assert found["rest"] is given["rest"][0]
    assert len(made) == 5  # 1.0 is the default
    assert "([2, 3, 12, 12], [2], None, 'name'), 0.5, None" in str(optimized)
    assert "ran the model" not in str(optimized)


@needs_native
def test_parameters_are_tensors(made: list[Program]) -> None:
    int8, x = _int8(), nn.Parameter(_image())
    optimized = optimize(int8)
    for _ in range(2):
        assert torch.equal(optimized(x), int8(x))
    optimized(x.detach())
    assert len(made) == 1


def test_keys_of_calls() -> None:
    x = torch.zeros(2, 3)
    alike = [
        (x, torch.ones(2, 3)), (x, nn.Parameter(x)), ([x], [x + 1]), ({"a": x}, {"a": x + 1}),
        (1, 1), (float("nan"), float("nan")), (None, None), ([], []),
    ]  # fmt: skip
    for a, b in alike:
        assert key_of((a,)) == key_of((b,))
        assert hash(key_of((a,))) == hash(key_of((b,)))
    different = [
        x, x.t(), x.double(), x[:1], [x], (x,), {"a": x}, {"b": x}, 0.0, -0.0, 0, False, None, "",
        "0", [0], [], (), {}, collections.OrderedDict(a=x), [[x], None], [[x, None]],
    ]  # fmt: skip
    assert len({key_of((value,)) for value in different}) == len(different)


class _Tagged(Tensor):
    pass


@dataclass
class _Unregistered:
    x: Tensor


_WITHOUT_KEY: list[tuple[Callable[[], Any], str]] = [
    (lambda: _image().as_subclass(_Tagged), "_Tagged"),
    (lambda: [_image().as_subclass(_Tagged)], "_Tagged"),
    (lambda: _Unregistered(_image()), "_Unregistered"),
    (lambda: torch.quantize_per_tensor(_image(), 0.1, 3, torch.quint8), "quantized"),
    (lambda: _image().to("meta"), "on meta"),
    (lambda: _image().to_sparse(), "sparse"),
    (lambda: torch.complex(_image(), _image()).conj(), "conjugate"),
    (lambda: torch.complex(_image(), _image()).conj().imag, "negative"),
    (lambda: torch._efficientzerotensor((2, 3, 9, 9)), "zeros"),
]


@pytest.mark.parametrize(("value", "reason"), _WITHOUT_KEY, ids=[r for _, r in _WITHOUT_KEY])
def test_inputs_that_no_plan_reads(value: Callable[[], Any], reason: str) -> None:
    with pytest.raises(NoPlanError, match=reason):
        key_of((value(),))


@needs_native
@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (lambda: torch.complex(_image(), _image()).conj().imag, "negative"),
        (lambda: torch._efficientzerotensor((2, 3, 9, 9)), "zeros"),
        (lambda: _image().as_subclass(_Tagged), "_Tagged"),
    ],
)
def test_calls_without_a_plan_run_the_model_and_are_told(
    value: Callable[[], Any], reason: str, made: list[Program]
) -> None:
    int8, x = _int8(), value()
    optimized = optimize(int8, x)
    for _ in range(2):
        assert torch.equal(optimized(x), int8(x))
    assert made == []
    assert "Some calls ran the model as it is: an input is" in str(optimized)
    assert reason in str(optimized)
    assert str(optimized) == optimized.profile(x)


@needs_native
def test_a_call_that_is_unlike_runs_the_model_and_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    int8, x = _int8(), _image()
    optimized = optimize(int8, x)

    def run(*_: Any) -> Any:
        raise UnlikeError("here")

    monkeypatch.setattr(Program, "run", run)
    assert torch.equal(optimized(x), int8(x))
    assert "unlike those that its plan is for (here)" in str(optimized)


@needs_native
def test_a_trace_records_the_model_and_no_constant() -> None:
    int8, x = _int8(), _image()
    optimized = optimize(int8, x)
    traced = torch.jit.trace(optimized, (x,), check_trace=False)
    for _ in range(2):
        x = _image()
        assert torch.equal(traced(x), int8(x))


# -- results ----------------------------------------------------------------------------------


@dataclass
class _Output:
    y: Tensor
    rest: list[Tensor]


class _Named(NamedTuple):
    y: Tensor
    rest: dict[str, Tensor]


class _Registered:
    def __init__(self, y: Tensor) -> None:
        self.y = y


_pytree.register_pytree_node(_Registered, lambda r: ([r.y], None), lambda c, _: _Registered(*c))


class _Opaque:
    def __init__(self, y: Tensor) -> None:
        self.y = y


@fx.wrap
def _registered(y: Tensor) -> _Registered:
    return _Registered(y)


@fx.wrap
def _opaque(y: Tensor) -> _Opaque:
    return _Opaque(y)


_FORMS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "dataclass": lambda y, x: _Output(y, [x]),
    "named tuple": lambda y, x: _Named(y, {"x": x}),
    "registered": lambda y, _: _registered(y),
    "list": lambda y, x: [y, [x, None]],
    "tuple": lambda y, x: (y, 3, "text"),
    "dict": lambda y, x: {"y": y, "x": {"x": [x]}},
}


class _Formed(_Two):
    def __init__(self, form: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.form = form

    def forward(self, x: Tensor) -> Any:
        return self.form(self.layers(x), x)


@needs_native
@pytest.mark.parametrize("form", _FORMS)
def test_results_of_any_form(form: str, made: list[Program]) -> None:
    int8 = _int8(_Formed(_FORMS[form]))
    with warnings.catch_warnings():
        warnings.simplefilter("error", LoweringWarning)
        optimized = optimize(int8, _image())
    assert len(optimized.plans()) == 1
    x = _image()
    expected = int8(x)
    for _ in range(2):
        found = optimized(x)
        assert type(found) is type(expected)
        assert same_results(expected, found)
    assert len(made) == 1


@needs_native
def test_results_that_nobody_can_look_into(made: list[Program]) -> None:
    int8, x = _int8(_Formed(lambda y, _: _opaque(y))), _image()
    with pytest.warns(LoweringWarning, match=r"holds a _Opaque, which cannot be compared") as seen:
        optimized = optimize(int8, x)
    assert {warning.filename for warning in seen} == {__file__}
    for _ in range(2):
        assert torch.equal(optimized(x).y, int8(x).y)
    assert len(made) == 1
    assert "everything: the result holds a _Opaque" in str(optimized)


def test_comparing_results() -> None:
    x, y = torch.tensor([1.0, float("nan")]), torch.tensor([1.0, 2.0])
    made: list[Callable[[Tensor], Any]] = [
        lambda t: t, lambda t: [t], lambda t: (3, t), lambda t: {"a": {"b": t}},
        lambda t: _Output(t, []), lambda t: _Output(y, [t]), lambda t: _Named(t, {}),
        lambda t: _Registered(t), lambda t: {"r": [_Registered(t)]},
    ]  # fmt: skip
    for make in made:
        assert same_results(make(x), make(x.clone()))
        assert not same_results(make(x), make(y))
        assert not same_results(make(x), make(x.double()))
        assert not same_results(make(x), None)
    for one, other in (
        (1, 2),
        (None, x),
        ([x], [x, x]),
        ([x], (x,)),
        ({"a": x}, {"b": x}),
        (1, 1.0),
    ):
        assert not same_results(one, other)
        assert not same_results(other, one)
    assert same_results(float("nan"), float("nan"))
    with pytest.raises(NotComparableError, match="_Opaque"):
        same_results([_Opaque(x)], [_Opaque(x)])


# -- a snapshot -------------------------------------------------------------------------------


@needs_native
def test_new_state_is_refused() -> None:
    optimized = optimize(_int8())
    for owner in (optimized, nn.Sequential(optimized)):
        with pytest.raises(RuntimeError, match="takes no new state"):
            owner.load_state_dict(copy.deepcopy(owner.state_dict()))


def _load(int8: QuantGraphModule) -> None:
    int8.load_state_dict(_int8().state_dict())


def _write(int8: QuantGraphModule) -> None:
    with torch.no_grad():
        next(int8.buffers()).add_(1)


def _replace(int8: QuantGraphModule) -> None:
    name, buffer = next(int8.named_buffers())
    int8.register_buffer(name, buffer.clone())


@needs_native
@pytest.mark.parametrize("change", [_load, _write, _replace])
def test_a_model_that_was_changed_gets_no_new_plan(
    change: Callable[[QuantGraphModule], None],
) -> None:
    int8, x = _int8(), _image()
    optimized, other = optimize(int8, x), optimize(int8)
    expected = int8(x).clone()
    change(int8)
    assert torch.equal(optimized(x), expected)  # the old plan, and all of it
    for call in (lambda: optimized(_image(12)), lambda: other(x)):
        with pytest.raises(RuntimeError, match=r"changed after optimize \(.*optimize again"):
            call()
    with pytest.raises(RuntimeError, match="optimize again"):  # would run the new model
        optimized(x.as_subclass(_Tagged))
    again = optimize(int8, x)
    for size in (9, 12):
        y = _image(size)
        assert torch.equal(again(y), int8(y))


@needs_native
def test_packed_constants_that_were_replaced() -> None:
    int8, x = _int8(), _image()
    optimized = optimize(int8, x)
    name = int8.state.packs[0].name
    int8.__dict__[name] = getattr(_int8(), name)
    with pytest.raises(RuntimeError, match=f"{name}.*optimize again"):
        optimized(_image(12))


class _Remembering(_Two):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Any:
        return self.layers(x), self.seen.add_(x.mean())


@needs_native
def test_what_a_model_writes_to_itself_is_no_change() -> None:
    optimized = optimize(_int8(_Remembering()), _image())
    for size in (9, 10, 11):
        optimized(_image(size))


# -- arguments of optimize --------------------------------------------------------------------


@needs_native
def test_forms_of_example_inputs(made: list[Program]) -> None:
    int8, x = _int8(), _image()
    for examples in (x, (x,), [x], {"x": x}):
        optimized = optimize(int8, examples)
        assert len(optimized.plans()) == 1
        assert torch.equal(optimized(x), int8(x))
    assert len(made) == 4


@pytest.mark.filterwarnings("ignore::fxquant.LoweringWarning")
def test_a_model_that_is_optimized_already() -> None:
    optimized = optimize(_int8())
    with pytest.raises(NotAGraphModuleError, match="optimized already"):
        optimize(optimized)  # type: ignore[arg-type]  # the error is what is tested
