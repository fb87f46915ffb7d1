"""The pipelines: every pass in order, each line with its reason."""

from __future__ import annotations

from fxquant.kernel_table import KernelTable
from fxquant.pass_manager import Fact, Pass, Pipeline
from fxquant.passes.absorb_clamps import AbsorbClamps
from fxquant.passes.annotate import Annotate
from fxquant.passes.annotate_half import AnnotateHalf
from fxquant.passes.cancel_quantize import CancelQuantize
from fxquant.passes.cast_half import CastHalf
from fxquant.passes.convert_nested import ConvertNested
from fxquant.passes.correct_bias import CorrectBias
from fxquant.passes.equalize_weights import EqualizeWeights
from fxquant.passes.exchange_quantized import ExchangeQuantized
from fxquant.passes.expose_parameters import ExposeParameters
from fxquant.passes.fit_weights import FitWeights
from fxquant.passes.fold_batch_norm import FoldBatchNorm, folded_as_torch
from fxquant.passes.fold_channel_scale import FoldChannelScale
from fxquant.passes.fold_weights import FoldWeights
from fxquant.passes.freeze_weights import FreezeWeights
from fxquant.passes.functionalize import Functionalize
from fxquant.passes.fuse_listed import FuseListed
from fxquant.passes.fuse_patterns import FusePatterns, TorchFusionRule
from fxquant.passes.fuse_qat import TORCH_FUSION_PATTERNS, TRANSPOSED, FuseQat
from fxquant.passes.guard_boundary import GuardBoundary
from fxquant.passes.inline_modules import InlineModules
from fxquant.passes.insert_channel_means import InsertChannelMeans
from fxquant.passes.insert_observers import InsertObservers
from fxquant.passes.insert_shared_observers import InsertSharedObservers
from fxquant.passes.join_fused import JoinFused
from fxquant.passes.lay_out_weights import LayOutWeights
from fxquant.passes.lower import Lower
from fxquant.passes.mark_boundary import MarkBoundary
from fxquant.passes.nest_modules import NestModules
from fxquant.passes.prepack import Prepack
from fxquant.passes.propagate_qconfigs import PropagateQConfigs, Subject
from fxquant.passes.recognize_channel_shuffle import RecognizeChannelShuffle
from fxquant.passes.recognize_linear import RecognizeLinear
from fxquant.passes.remove_identities import WITHOUT_GRADIENT, RemoveIdentities
from fxquant.passes.round_biases import RoundBiases
from fxquant.passes.round_joined import RoundJoined
from fxquant.passes.separate_padding import SeparatePadding
from fxquant.passes.share_parameters import ShareParameters
from fxquant.passes.shift_signed import ShiftSigned
from fxquant.passes.spell_as_torch import SpellAsTorch
from fxquant.passes.split_shared import SplitShared
from fxquant.passes.take_pieces import TakePieces
from fxquant.passes.tell_unhonoured import TellUnhonoured
from fxquant.passes.to_reference import TorchNames, ToReference
from fxquant.passes.train_weights import TrainWeights
from fxquant.patterns.library import (
    FUSION_PATTERNS,
    QAT_FUSION_PATTERNS,
    of_any_shape,
    with_any_operand,
)
from fxquant.qconfig_mapping import QConfigMapping


def fuse_pipeline() -> Pipeline:
    """Float graph to float graph: what quantization wants folded, folded."""
    return Pipeline(
        "fuse",
        (
            FuseListed(),  # the user's functions come before ours
            Functionalize(),  # in-place writes would hide who reads what
            RemoveIdentities(),  # dropout and identity would stand between pattern members
            FoldBatchNorm(),  # weights must be final before they are observed
        ),
    )


def compat_fuse_pipeline() -> Pipeline:
    """Float graph to float graph: what torch.ao makes one module of, made one."""
    fuse = FusePatterns(
        of_any_shape(with_any_operand(FUSION_PATTERNS)),
        agreement=(),
        governing=TorchFusionRule(QConfigMapping()),
    )
    return Pipeline(
        "compat-fuse",
        (
            FuseListed(),  # the user's functions come before ours
            Functionalize(),  # in-place writes would hide who reads what
            FoldBatchNorm(folded_as_torch),  # what is behind a batch-norm is behind its layer
            fuse,  # marks what belongs together
            JoinFused(),  # callers look for one module
        ),
        # Identities stay; there are no qconfigs to ask.
        given=frozenset({Fact.NO_IDENTITIES, Fact.QCONFIGS}),
    )


def equalize_pipeline(*, open_clamps: bool = False) -> Pipeline:
    """Fused float graph to fused float graph, with weights that share one scale better.

    Args:
        open_clamps: see :class:`EqualizeWeights`.
    """
    return Pipeline(
        "equalize",
        (EqualizeWeights(open_clamps),),  # the pipeline "fuse" did what it needs
        given=frozenset({Fact.FUNCTIONAL, Fact.NO_IDENTITIES, Fact.BATCH_NORM_FOLDED}),
    )


def prepare_pipeline(
    mapping: QConfigMapping,
    known_paths: tuple[str, ...],
    nest: NestModules = NestModules(),  # noqa: B008  # frozen
    *,
    elsewhere: tuple[Subject, ...] = (),
    bias_correction: bool = True,
) -> Pipeline:
    """Float graph to prepared graph.

    Args:
        mapping: the user's qconfigs.
        known_paths: module paths of the user's model, for rules that match nothing.
        nest: what becomes of modules that cannot be traced.
        elsewhere: ops in other graphs of the model, likewise.
        bias_correction: also watch what correct-bias needs.
    """
    watch = (InsertChannelMeans(),) if bias_correction else ()
    return Pipeline(
        "prepare",
        (
            PropagateQConfigs(mapping, known_paths, elsewhere),  # first: a bad rule is told
            nest,  # what is in them is no matter of this graph
            Functionalize(),  # in-place writes would hide who reads what
            RemoveIdentities(),  # dropout and identity would stand between pattern members
            TakePieces(),  # specs are about ops with one result
            RecognizeChannelShuffle(),  # four ops on int8 values take five times as long as one
            RecognizeLinear(),  # a product with a constant has no int8 kernel
            SeparatePadding(),  # int8 convolutions pad with zeros only
            FoldBatchNorm(),  # weights must be final before they are observed
            FoldChannelScale(),  # a product with a constant has no int8 kernel
            FusePatterns(),  # values inside a pattern are not observed
            Annotate(),  # specs from qconfig and op table
            AnnotateHalf(),  # of what annotate left alone
            ShareParameters(),  # which tensors have one range
            InsertObservers(),  # everything before reads a float graph
            *watch,  # after the observers: they watch what the kernel will read
        ),
    )


def qat_prepare_pipeline(
    mapping: QConfigMapping,
    known_paths: tuple[str, ...],
    nest: NestModules = NestModules(),  # noqa: B008  # frozen
    *,
    elsewhere: tuple[Subject, ...] = (),
) -> Pipeline:
    """Float graph to a graph that trains with what int8 will round.

    Args:
        mapping: the user's qconfigs.
        known_paths: module paths of the user's model, for rules that match nothing.
        nest: what becomes of modules that cannot be traced.
        elsewhere: ops in other graphs of the model, likewise.
    """
    return Pipeline(
        "qat-prepare",
        (
            PropagateQConfigs(mapping, known_paths, elsewhere),  # first: a bad rule is told
            nest,  # what is in them is no matter of this graph
            Functionalize(),  # in-place writes would hide who reads what
            RemoveIdentities(WITHOUT_GRADIENT),  # they would stand between pattern members
            TakePieces(),  # specs are about ops with one result
            RecognizeChannelShuffle(),  # four ops on int8 values take five times as long as one
            RecognizeLinear(trains=True),  # a product with a constant has no int8 kernel
            SeparatePadding(),  # int8 convolutions pad with zeros only
            FuseQat(),  # batch-norms train with the weight they will be folded into
            FusePatterns(QAT_FUSION_PATTERNS),  # values inside a pattern are not rounded
            Annotate(),  # specs from qconfig and op table
            ShareParameters(),  # which tensors have one range
            InsertObservers(),  # the qconfigs' fake quantizers
            RoundJoined(),  # int8 has one range for what is joined
            TrainWeights(),  # of what is annotated, the weights
        ),
    )


def reference_pipeline(
    nested: ConvertNested = ConvertNested(),  # noqa: B008  # frozen
) -> Pipeline:
    """Prepared graph to quantize, float op, dequantize.

    Args:
        nested: converts the parts of modules that cannot be traced.
    """
    return Pipeline(
        "reference",
        (
            nested,  # they were prepared on their own
            FreezeWeights(),  # what trained is float modules again, which all others know
            RemoveIdentities(),  # dropout that was active in training
            CorrectBias(),  # needs the float weights, and takes the channel means out
            SplitShared(),  # what the observers saw is known, and nothing is rounded yet
            ToReference(),  # parameters are computed here, once
            RoundBiases(),  # steps of a sum are known once its scales are
            AbsorbClamps(),  # needs final parameters
            CancelQuantize(),  # moved values and absorbed clamps leave pairs that do nothing
            InlineModules(),  # what stays in FP32 needs no module objects
            CastHalf(),  # constants are arguments of functions by now
        ),
        given=frozenset({Fact.OBSERVED, Fact.FUNCTIONAL}),
    )


def lowering_pipeline(made_on: str = "", kernels: KernelTable | None = None) -> Pipeline:
    """Reference graph to kernels.

    Args:
        made_on: the machine that the graph was quantized on, where it was another one.
        kernels: measured times to choose kernels by.
    """
    return Pipeline(
        "lower",
        (
            FitWeights(made_on),  # a graph from another machine may overflow kernels of this one
            Lower(kernels),  # kernels, in graph order
            LayOutWeights(),  # what is left is floating point
            GuardBoundary(),  # callers see the float model's inputs and outputs
            Prepack(),  # weights packed once, not per call
        ),
        given=frozenset({Fact.REFERENCE, Fact.ABSORBED, Fact.CANCELLED}),
    )


def compat_prepare_pipeline(
    mapping: QConfigMapping,
    known_paths: tuple[str, ...],
    nest: NestModules = NestModules(),  # noqa: B008  # frozen
    boundary: MarkBoundary = MarkBoundary(),  # noqa: B008  # frozen
) -> Pipeline:
    """Float graph to prepared graph as torch.ao prepares it: every op of its list observed.

    Args:
        mapping: the user's qconfigs.
        known_paths: module paths of the user's model, for rules that match nothing.
        nest: what becomes of modules that are quantized on their own.
        boundary: which inputs and results are quantized tensors.
    """
    return Pipeline(
        "compat-prepare",
        (
            PropagateQConfigs(mapping, known_paths),  # rules name the ops that the user wrote
            nest,  # by qconfig; what is in them is no matter of this graph
            boundary,  # nothing observes what comes quantized
            FuseListed(),  # the user's functions come before ours
            Functionalize(),  # in-place writes would hide who reads what
            FoldBatchNorm(folded_as_torch),  # weights must be final, and torch's, before that
            FusePatterns(  # values inside a pattern are not observed
                with_any_operand(FUSION_PATTERNS),
                agreement=(),  # torch.ao fuses first and looks for qconfigs then
                governing=TorchFusionRule(mapping),
            ),
            Annotate(),  # specs from qconfig and op table
            TellUnhonoured(),  # while the ops of a pattern still follow each other
            InsertSharedObservers(),  # one at every quantized value; sharing is by module
        ),
        # Identities and dropouts stay: they are observed like other ops.
        given=frozenset({Fact.NO_IDENTITIES}),
    )


def compat_qat_prepare_pipeline(
    mapping: QConfigMapping,
    known_paths: tuple[str, ...],
    nest: NestModules = NestModules(),  # noqa: B008  # frozen
    boundary: MarkBoundary = MarkBoundary(),  # noqa: B008  # frozen
) -> Pipeline:
    """Float graph to a graph that trains, as torch.ao prepares it; see compat_prepare_pipeline.

    Args:
        mapping: the user's qconfigs.
        known_paths: module paths of the user's model, for rules that match nothing.
        nest: what becomes of modules that are quantized on their own.
        boundary: which inputs and results are quantized tensors.
    """
    return Pipeline(
        "compat-qat-prepare",
        (
            PropagateQConfigs(mapping, known_paths),  # rules name the ops that the user wrote
            nest,  # by qconfig; what is in them is no matter of this graph
            boundary,  # nothing observes what comes quantized
            FuseListed(trains=True),  # the user's functions come before ours
            Functionalize(),  # in-place writes would hide who reads what
            FuseQat(refused=TRANSPOSED),  # as torch.ao, which has no module for them
            FusePatterns(  # values inside a pattern are not rounded
                TORCH_FUSION_PATTERNS, agreement=(), governing=TorchFusionRule(mapping)
            ),
            Annotate(),  # specs from qconfig and op table
            TellUnhonoured(),  # while the ops of a pattern still follow each other
            InsertSharedObservers(),  # one at every quantized value; sharing is by module
            TrainWeights(),  # of what is annotated, the weights
        ),
        # Identities and dropouts stay: they are observed like other ops.
        given=frozenset({Fact.NO_IDENTITIES}),
    )


def compat_adopt_pipeline(
    nest: NestModules = NestModules(),  # noqa: B008  # frozen
    boundary: MarkBoundary = MarkBoundary(),  # noqa: B008  # frozen
) -> Pipeline:
    """Float graph, which torch.ao fused and gave qconfigs, to the graph that torch.ao prepared.

    Args:
        nest: what becomes of modules that are quantized on their own.
        boundary: which inputs and results are quantized tensors.
    """
    fuse = FusePatterns(  # values inside a pattern are not observed
        with_any_operand(FUSION_PATTERNS), agreement=(), governing=TorchFusionRule(QConfigMapping())
    )
    return Pipeline("compat-adopt", _adopting(nest, boundary, fuse), given=_NOTED_BY_TORCH)


def compat_qat_adopt_pipeline(
    nest: NestModules = NestModules(),  # noqa: B008  # frozen
    boundary: MarkBoundary = MarkBoundary(),  # noqa: B008  # frozen
) -> Pipeline:
    """The same for a graph that trains; see compat_adopt_pipeline."""
    fuse = FusePatterns(  # values inside a pattern are not rounded
        TORCH_FUSION_PATTERNS, agreement=(), governing=TorchFusionRule(QConfigMapping())
    )
    passes = (*_adopting(nest, boundary, fuse), TrainWeights())  # of what is annotated
    return Pipeline("compat-qat-adopt", passes, given=_NOTED_BY_TORCH)


_NOTED_BY_TORCH = frozenset({Fact.NO_IDENTITIES, Fact.BATCH_NORM_FOLDED, Fact.QCONFIGS})


def _adopting(nest: NestModules, boundary: MarkBoundary, fuse: FusePatterns) -> tuple[Pass, ...]:
    return (
        nest,  # by qconfig; what is in them is no matter of this graph
        boundary,  # nothing observes what comes quantized
        Functionalize(),  # in-place writes would hide who reads what
        fuse,
        Annotate(),  # specs from qconfig and op table
        InsertSharedObservers(),  # one at every quantized value; sharing is by module
    )


def compat_reference_pipeline(
    nested: ConvertNested = ConvertNested(),  # noqa: B008  # frozen
    names: TorchNames = TorchNames(),  # noqa: B008  # frozen
    *,
    keep_modules: bool = False,
) -> Pipeline:
    """Prepared graph to quantize, float op, dequantize, one pair for each observer.

    Args:
        nested: converts the modules that are quantized on their own.
        names: of scales and zero points.
        keep_modules: as :attr:`ToReference.keep_modules`, for a graph that is not lowered.
    """
    return Pipeline(
        "compat-reference",
        (
            nested,  # takes the observers of their results, which the next would replace
            FreezeWeights(),  # what trained is float modules again, which all others know
            # Nothing is cancelled behind it: callers count the steps.
            ToReference(names, keep_modules=keep_modules),
            ExchangeQuantized(),  # integers and floats in the graph, quantized tensors outside
            *((SpellAsTorch(),) if keep_modules else ()),  # callers count the casts by name
        ),
        given=frozenset({Fact.OBSERVED}),
    )


def compat_folding_pipeline() -> Pipeline:
    """Reference graph of the compat profile, as callers see it, to the one that is lowered."""
    return Pipeline(
        "compat-fold",
        (FoldWeights(),),  # callers count the steps before, and nobody needs the floats after
        given=frozenset({Fact.REFERENCE}),
    )


def compat_lowering_pipeline() -> Pipeline:
    """Reference graph of the compat profile to kernels."""
    return Pipeline(
        "compat-lower",
        (
            CancelQuantize(),  # shapes are read from integers
            ShiftSigned(),  # behind which all activations are bytes
            FitWeights(),  # only where a kernel of this machine would overflow
            Lower(),  # kernels, in graph order
            Prepack(),  # weights packed once, not per call
            ExposeParameters(),  # callers look for them by name
            SpellAsTorch(),  # and count the steps by name
        ),
        given=frozenset({Fact.REFERENCE, Fact.ABSORBED, Fact.CANCELLED}),
    )
