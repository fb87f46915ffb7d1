"""Section 1: the calls, what they take and what they give."""

from __future__ import annotations

import copy
import inspect
import io
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import fxquant.compat
from tests.conformance.harness import (
    OURS,
    THEIRS,
    Names,
    Peers,
    assert_same,
    assert_same_weights,
    default_mapping,
    equal,
    everywhere,
    observed_with,
    placement,
    quiet,
    run,
    steps,
)
from tests.conformance.models import Calls, CallsTwo, conv, images, linear

pytestmark = pytest.mark.peer

CALLS = ("prepare_fx", "prepare_qat_fx", "convert_fx", "convert_to_reference_fx", "fuse_fx")
X = images()


def small() -> nn.Module:
    """Two convolutions with a batch-norm, a relu and a pooling between."""
    return nn.Sequential(
        conv(3, 4), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), conv(4, 2, 1)
    ).eval()


@pytest.mark.statement("S1.1a")
def test_parameters_order_and_keywords(peers: Peers) -> None:
    for call in CALLS:
        ours, theirs = (
            [(p.name, p.default) for p in inspect.signature(getattr(n, call)).parameters.values()]
            for n in (OURS, THEIRS)
        )
        # torch 2.13 has one more of convert's, by keyword, of which nobody speaks.
        assert ours == [one for one in theirs if one[0] != "keep_original_weights"], call
    made = []
    for names in (THEIRS, OURS):
        mapping = default_mapping(peers.configs(names))
        with quiet():
            fused = names.fuse_fx(small(), None, None)
            torch.manual_seed(1)
            prepared = names.prepare_fx(small(), mapping, (X,), None, None, None)
            torch.manual_seed(1)
            training = names.prepare_qat_fx(small().train(), mapping, (X,), None, None)
            run(prepared, (X,))
            reference = names.convert_to_reference_fx(
                copy.deepcopy(prepared), None, True, mapping, None
            )
            lowered = names.convert_fx(copy.deepcopy(prepared), None, True, mapping, None)
        made.append((fused, prepared, training, reference, lowered))
    for theirs_one, ours_one in zip(*made, strict=True):
        assert isinstance(ours_one, fx.GraphModule)
        assert type(theirs_one).__mro__[-2] is type(ours_one).__mro__[-2]
    (_, their_prepared, _, their_reference, their_lowered), ours_made = made
    _, prepared, _, reference, lowered = ours_made
    equal(placement(prepared), placement(their_prepared), "observers")
    equal(steps(reference), steps(their_reference), "steps")
    equal(steps(lowered), steps(their_lowered), "steps")


@pytest.mark.statement("S1.2a")
@pytest.mark.parametrize("level", ["global", "type", "name", "regex", "order", "nothing"])
def test_qconfig_dicts(peers: Peers, level: str) -> None:
    def mapping(names: Names) -> dict[str, Any]:
        qconfig = names.default_qconfig
        return {
            "global": {"": qconfig, "unknown": 3},
            "type": {"": qconfig, "object_type": [(nn.Linear, None), (F.linear, None)]},
            "name": {"": None, "module_name": [("0", qconfig), ("1", qconfig), ("2", qconfig)]},
            "regex": {"": qconfig, "module_name_regex": [("[1-9]", None)]},
            "order": {"": qconfig, "module_name_object_type_order": [("", nn.Conv2d, 1, None)]},
            "nothing": {},
        }[level]

    model = small() if level != "type" else nn.Sequential(conv(), linear(6, 3)).eval()
    done = peers.compare(model, (X,), mapping)
    for side in (done.theirs, done.ours):
        assert any(
            w.startswith("FutureWarning: Passing a QConfig dictionary to prepare is deprecated")
            for w in side.warned
        )
    if level == "nothing":  # nothing is observed then; what is, where there is a qconfig
        peers.compare(small(), (X,), lambda names: {"": names.default_qconfig})


@pytest.mark.statement("S1.2a")
def test_custom_config_dicts(peers: Peers) -> None:
    part = Calls(lambda s, x: s.inner(F.gelu(x)), inner=nn.Linear(6, 6))
    model = Calls(lambda s, x: s.part(s.a(x)), a=conv(), part=part, note="kept")
    custom = {
        "preserved_attributes": ["note", "absent"],
        "non_traceable_module_name": ["part"],
        "unknown key": 1,
    }
    done = peers.compare(model, (X,), custom=lambda _: custom)
    for side in (done.theirs, done.ours):
        assert side.prepared.note == "kept"
        assert any("FutureWarning: Passing a prepare_custom_config_dict" in w for w in side.warned)


@pytest.mark.statement("S1.3a")
@pytest.mark.parametrize(
    "example", [(X,), X, None, (torch.ones(3),), ("text", 2), ()], ids=lambda e: type(e).__name__
)
def test_example_inputs_may_be_anything(peers: Peers, example: Any) -> None:
    peers.compare(small(), (X,), example_inputs=example)
    for names in (THEIRS, OURS):
        for call in ("prepare_fx", "prepare_qat_fx"):
            with pytest.raises(TypeError, match=r"missing 1 required positional .*example_inputs"):
                getattr(names, call)(small(), default_mapping(peers.configs(names)))


@pytest.mark.statement("S1.4a")
@pytest.mark.parametrize("form", ["module", "graph module", "graph of a graph", "pre-fused"])
def test_what_can_be_prepared(peers: Peers, form: str) -> None:
    import torch.ao.nn.intrinsic as nni

    model: nn.Module = small()
    if form == "pre-fused":
        model = nn.Sequential(nni.ConvReLU2d(conv(), nn.ReLU()), conv()).eval()
    if form.startswith("graph"):
        model = fx.symbolic_trace(model)
    if form == "graph of a graph":
        model = fx.symbolic_trace(nn.Sequential(model).eval())
    peers.compare(model, (X,))


@pytest.mark.statement("S1.4a")
def test_a_model_from_a_package(peers: Peers) -> None:
    from torch.package import PackageExporter, PackageImporter

    file = io.BytesIO()
    with quiet():
        with PackageExporter(file) as exporter:
            exporter.extern("**")
            exporter.save_pickle("model", "model.pkl", fx.symbolic_trace(small()))
        file.seek(0)
        model = PackageImporter(file).load_pickle("model", "model.pkl")
    peers.compare(model, (X,))


@pytest.mark.statement("S1.4a", "S1.5a")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("call", ["prepare_fx", "prepare_qat_fx"])
def test_training_and_evaluation_mode(peers: Peers, call: str, training: bool) -> None:
    model = nn.Sequential(conv(), nn.ReLU(), linear(6, 3)).train(training)
    mapping = (lambda n: n.get_default_qat_qconfig_mapping("x86")) if "qat" in call else None
    made = {
        names.library: peers.prepare(names, model, (X,), mapping or default_mapping, call=call)[0]
        for names in (THEIRS, OURS)
    }
    assert made["fxquant"].training == made["torch.ao"].training == training
    equal(placement(made["fxquant"]), placement(made["torch.ao"]), "observers")


@pytest.mark.statement("S1.4b")
def test_a_training_batch_norm_is_not_folded(peers: Peers) -> None:
    model = small()
    for names in (THEIRS, OURS):
        with quiet():
            with pytest.raises(AssertionError, match="Fusion only for eval!"):
                peers.prepare(names, model.train(), (X,))
            with pytest.raises(AssertionError, match="Fusion only for eval!"):
                names.fuse_fx(small().train())
    peers.compare(model.eval(), (X,))


@pytest.mark.statement("S1.5a")
def test_results_are_graph_modules_that_survive(peers: Peers) -> None:
    done = peers.compare(small(), (X,))
    for model in (done.ours.prepared, done.ours.reference, done.ours.lowered):
        assert isinstance(model, fx.GraphModule)
        assert isinstance(model.meta, dict)
        assert not model.training
        expected = run(model, (X,))
        assert_same(run(copy.deepcopy(model), (X,)), expected)
        assert_same(run(fx.Transformer(model).transform(), (X,)), expected)
        with quiet():
            assert_same(run(torch.jit.script(model), (X,)), expected)
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        with quiet():
            assert_same(run(torch.load(file, weights_only=False), (X,)), expected)
        other = copy.deepcopy(model)
        for value in other.state_dict().values():
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                value.zero_()
        assert other.load_state_dict(model.state_dict()).missing_keys == []
        assert_same(run(other, (X,)), expected)


@pytest.mark.statement("S1.6a")
def test_the_model_is_left_as_it_was(peers: Peers) -> None:
    for names in (THEIRS, OURS):
        model = small()
        before = copy.deepcopy(model.state_dict())
        tree = [(name, type(module)) for name, module in model.named_modules()]
        with quiet():
            prepared = names.prepare_fx(model, default_mapping(peers.configs(names)), (X,))
        run(prepared, (X,))
        with quiet():
            names.convert_fx(prepared)
        assert [(name, type(module)) for name, module in model.named_modules()] == tree
        assert_same(model.state_dict(), before)
    peers.compare(model, (X,))


@pytest.mark.statement("S1.6a")
def test_a_prepared_model_is_converted_as_often_as_wanted(peers: Peers) -> None:
    """torch.ao consumes it: see docs/differences.md."""
    done = peers.compare(small(), (X,))
    with quiet():
        first = fxquant.compat.convert_fx(done.ours.prepared)
        second = fxquant.compat.convert_fx(done.ours.prepared)
    assert_same(run(first, (X,)), run(second, (X,)))
    assert_same_weights(first, done.theirs.lowered)
    assert_same(run(second, (X,)), run(done.theirs.lowered, (X,)))


@pytest.mark.statement("S1.7a")
@pytest.mark.parametrize("qconfig", ["default_qconfig", "default_per_channel_qconfig"])
def test_a_prepared_model_computes_the_float_result(peers: Peers, qconfig: str) -> None:
    model = small()
    with torch.no_grad():
        expected = model(X)
    done = peers.compare(model, (X,), everywhere(qconfig))
    for side in (done.theirs, done.ours):
        given = run(side.prepared, (X,))
        largest = float((given - expected).abs().max())
        assert largest < 1e-5, "folding a batch-norm rounds its products once, in float32"
    bare = Calls(lambda s, x: s.a(x), a=conv())
    done = peers.compare(bare, (X,), everywhere(qconfig))
    with torch.no_grad():
        assert_same(run(done.ours.prepared, (X,)), bare(X))


@pytest.mark.statement("S1.8a")
@pytest.mark.parametrize("functional", [False, True])
def test_stack_traces_of_nodes_survive(peers: Peers, functional: bool) -> None:
    if functional:
        weight = nn.Parameter(torch.randn(5, 8))
        model = Calls(lambda s, x: F.linear(x, s.weight), weight=weight)
    else:
        model = Calls(lambda s, x: s.linear(x), linear=linear())
    done = peers.compare(model, (X,))
    for graph in (done.ours.prepared, done.ours.reference, done.ours.lowered):
        found = [node for node in graph.graph.nodes if "linear" in str(node.name)]
        assert any(node.op.startswith("call") and node.stack_trace is not None for node in found), (
            graph.graph
        )
        assert any("test_entry_points" in str(node.stack_trace) for node in found)


@pytest.mark.statement("S1.9a")
def test_preserved_attributes(peers: Peers) -> None:
    model = Calls(lambda s, x: s.a(x), a=conv(), note="kept", other="dropped")

    def custom(names: Names) -> Any:
        return names.PrepareCustomConfig().set_preserved_attributes(["note", "absent"])

    def convert(names: Names) -> dict[str, Any]:
        config = names.ConvertCustomConfig().set_preserved_attributes(["note"])
        return {"convert_custom_config": config}

    done = peers.compare(model, (X,), custom=custom, convert=convert)
    for side in (done.theirs, done.ours):
        for graph in (side.prepared, side.reference, side.lowered):
            for one in (graph, copy.deepcopy(graph)):
                assert one.note == "kept"
                assert not hasattr(one, "other")
                assert not hasattr(one, "absent")
                assert one.meta["_user_preserved_attributes"] == {"note": "kept"}
    done = peers.compare(model, (X,), custom=custom)
    for side in (done.theirs, done.ours):
        assert not hasattr(side.lowered, "note")


@pytest.mark.statement("S1.1a", "S1.9a")
def test_fuse_fx_folds_and_keeps_what_it_is_told(peers: Peers) -> None:
    for names in (THEIRS, OURS):
        model = small()
        model.note = "kept"
        config = peers.configs(names).FuseCustomConfig().set_preserved_attributes(["note"])
        with quiet():
            fused = names.fuse_fx(model, config)
        assert fused.note == "kept"
        assert not any(isinstance(module, nn.BatchNorm2d) for module in fused.modules())
        assert not hasattr(fused, "1")
        with torch.no_grad():
            assert float((fused(X) - model(X)).abs().max()) < 1e-5
    peers.compare(model, (X,))


@pytest.mark.statement("S1.3a")
def test_without_example_inputs_two_inputs_and_arithmetic(peers: Peers) -> None:
    model = CallsTwo(lambda s, x, y: torch.cat([F.relu(s.a(x) + s.a(y)), s.a(x) * 2]), a=conv())
    done = peers.compare(model, (X, X * 2), example_inputs=None, lowered_alike=False)
    assert len(observed_with(done.ours.prepared)) == len(observed_with(done.theirs.prepared))
