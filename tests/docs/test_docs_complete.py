"""Pages that describe code say all of it, and nothing that is not there."""

from __future__ import annotations

import re
from pathlib import Path

from fxquant.passes.inline_references import InlineReferences
from fxquant.pipelines import (
    compat_folding_pipeline,
    compat_fuse_pipeline,
    compat_lowering_pipeline,
    compat_prepare_pipeline,
    compat_qat_prepare_pipeline,
    compat_reference_pipeline,
    equalize_pipeline,
    fuse_pipeline,
    lowering_pipeline,
    prepare_pipeline,
    qat_prepare_pipeline,
    reference_pipeline,
)
from fxquant.qconfig_mapping import QConfigMapping
from fxquant.targets.document import markdown

ROOT = Path(__file__).parents[2]


def test_every_pass_has_its_file_and_its_entry() -> None:
    pipelines = (
        fuse_pipeline(),
        compat_fuse_pipeline(),
        equalize_pipeline(),
        prepare_pipeline(QConfigMapping(), ()),
        qat_prepare_pipeline(QConfigMapping(), ()),
        reference_pipeline(),
        lowering_pipeline(),
        compat_prepare_pipeline(QConfigMapping(), ()),
        compat_qat_prepare_pipeline(QConfigMapping(), ()),
        compat_reference_pipeline(),
        compat_folding_pipeline(),
        compat_lowering_pipeline(),
    )
    names = {item.name for pipeline in pipelines for item in pipeline.passes}
    names.add(InlineReferences.name)  # run alone, on copies
    entries = set(re.findall(r"^## (\S+)$", (ROOT / "docs/passes.md").read_text(), re.MULTILINE))
    files = {
        path.stem.replace("_", "-")
        for path in (ROOT / "passes").glob("*.py")
        if path.stem[0] != "_"
    }
    assert names == entries == files


def test_the_page_on_targets_is_what_the_table_says() -> None:
    assert (ROOT / "docs/targets.md").read_text() == markdown()
