"""The plugin that makes torch.ao unusable refuses every way to it and leaves torch working."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

USES = {
    "from import": "from torch.ao.quantization import MinMaxObserver",
    "from parent": "from torch.ao import quantization",
    "import as": "import torch.ao.quantization as tq",
    "star": "exec('from torch.ao.quantization import *')",
    "attribute": "import torch; torch.ao.quantization",
    "import, then attribute": "import torch.ao.quantization; torch.ao.quantization.observer",
    "not loaded by torch": "import torch.ao.quantization.quantize_fx",
    "import_module": "import importlib; importlib.import_module('torch.ao.ns.fx.utils')",
    "old alias": "from torch.quantization import QConfig",
    "alias in nn": "import torch; torch.nn.quantized.Linear",
    "alias of intrinsic": "from torch.nn.intrinsic import ConvReLU2d",
    "alias of qat": "import torch.nn.qat as nnqat; nnqat.Linear",
    "hasattr": "import torch; hasattr(torch.ao.quantization, 'observer')",
    "loaded by torch, then used": (
        "import torch._inductor.decomposition, sys; "
        "sys.modules['torch.ao.quantization.fx._decomposed'].quantize_per_tensor"
    ),
}

SPARED = {
    "script": "torch.jit.script(nn.Linear(2, 2))",
    "trace and copy": "copy.deepcopy(torch.fx.symbolic_trace(nn.Linear(2, 2)))",
    "export": "torch.export.export(nn.Linear(2, 2), (torch.ones(1, 2),)).run_decompositions()",
    "dynamo": "torch.compile(nn.Linear(2, 2), backend='eager')(torch.ones(1, 2))",
    "inductor's lowerings": "import torch._inductor.lowering, torch._inductor.decomposition",
    "kernels": "torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8).dequantize()",
    "walking over modules": "[inspect.getmodule(m) for m in list(sys.modules.values())]",
    "duck typing": "torch.ao.__name__, 'torch.ao.quantization' in sys.modules",
}

HEADER = "import copy, inspect, sys\nimport pytest, torch\nfrom torch import nn\n"


def run_poisoned(directory: Path, *files: tuple[str, str]) -> subprocess.CompletedProcess[str]:
    for name, text in files:
        (directory / name).write_text(text)
    (directory / "pytest.ini").write_text("[pytest]\nmarkers = peer\n")
    options = ["--import-mode=importlib", "-q", "-p", "no:cacheprovider", f"--rootdir={directory}"]
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "tests.poison_torch_ao", *options, str(directory)],
        cwd=ROOT,
        env={**os.environ, "PYTEST_ADDOPTS": ""},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_every_use_is_refused_and_torch_itself_is_spared(tmp_path: Path) -> None:
    lines = ["from tests.poison_torch_ao import PoisonedError\n"]
    for number, use in enumerate(USES.values()):
        lines.append(f"def test_use_{number}():\n")
        lines.append(
            f"    with pytest.raises(PoisonedError, match='test_refused'):\n        {use}\n"
        )
    for number, use in enumerate(SPARED.values()):
        lines.append(f"def test_spared_{number}():\n    {use}\n")
    result = run_poisoned(tmp_path, ("test_refused.py", HEADER + "".join(lines)))
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"{len(USES) + len(SPARED)} passed" in result.stdout


@pytest.mark.parametrize(
    "mark", ["pytestmark = pytest.mark.peer", "pytestmark = [pytest.mark.peer]"]
)
def test_peer_tests_are_left_out(tmp_path: Path, mark: str) -> None:
    peer_file = f"from torch.ao import quantization\nimport pytest\n{mark}\ndef test_peer(): ...\n"
    mixed_file = textwrap.dedent("""
        import pytest

        @pytest.mark.peer
        def test_peer():
            from torch.ao import quantization

        def test_ours(): ...
    """)
    result = run_poisoned(tmp_path, ("test_peer.py", peer_file), ("test_mixed.py", mixed_file))
    assert result.returncode == 0, result.stdout + result.stderr
    assert "1 passed, 1 deselected" in result.stdout
