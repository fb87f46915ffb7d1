"""The ``reference`` target: the specs of ``x86``, executed as float ops between Q and DQ."""

from __future__ import annotations

from dataclasses import replace

from fxquant.targets.x86 import X86

REFERENCE = replace(X86, name="reference", executes=False)
