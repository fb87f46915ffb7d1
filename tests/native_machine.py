"""Whether this machine can run native plans."""

from __future__ import annotations

import shutil

import pytest

from fxquant.native import library

needs_native = pytest.mark.skipif(
    not library.cpu_suits() or all(shutil.which(c) is None for c in ("g++", "clang++")),
    reason="the native kernels need AVX512 with VNNI and a C++ compiler",
)
