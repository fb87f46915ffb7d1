"""Rewrites imports and uses, leaving everything else of the file as it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import libcst as cst
from libcst import metadata as meta

from fxquant.migrate.finding import Finding
from fxquant.migrate.names import MODULES, MOVED, TARGET
from fxquant.migrate.survey import (
    Survey,
    Surveyor,
    alias_name,
    imported_module,
    local_name,
)

_PACKAGE, _, _MODULE = TARGET.rpartition(".")
_ALIASES = ("fxq", "fxquant_compat", "_fxquant_compat")


@dataclass(frozen=True, slots=True)
class Migration:
    """A file before and after.

    Attributes:
        findings: in the order of the file.
        before: its text.
        after: its text with the names moved.
    """

    findings: tuple[Finding, ...]
    before: str
    after: str

    @property
    def changed(self) -> bool:
        """Whether there is anything to write."""
        return self.before != self.after


def migrate_source(source: str) -> Migration:
    """Move the names of one module.

    Args:
        source: its text.

    Raises:
        libcst.ParserSyntaxError: it is no Python that can be parsed.
    """
    wrapper = meta.MetadataWrapper(cst.parse_module(source), unsafe_skip_copy=True)
    surveyor = Surveyor()
    wrapper.visit(surveyor)
    survey = surveyor.survey
    mover = _Mover(survey)
    tree = wrapper.module.visit(mover)
    assert isinstance(tree, cst.Module)
    if mover.needs_alias:
        tree = _with_import(tree, _compat_as(mover.alias))
    findings = tuple(sorted(set(survey.findings), key=lambda f: (f.line, f.column, f.text)))
    return Migration(findings=findings, before=source, after=tree.code)


def _with_import(tree: cst.Module, statement: cst.ImportFrom) -> cst.Module:
    """``tree`` with one more import, behind the last one at the top level."""
    last = max(
        (i for i, line in enumerate(tree.body) if _is_import(line)),
        default=0 if tree.get_docstring() is not None else -1,
    )
    line = cst.SimpleStatementLine(body=[statement])
    return tree.with_changes(body=[*tree.body[: last + 1], line, *tree.body[last + 1 :]])


def _is_import(line: cst.CSTNode) -> bool:
    return isinstance(line, cst.SimpleStatementLine) and any(
        isinstance(one, cst.Import | cst.ImportFrom) for one in line.body
    )


class _Mover(cst.CSTTransformer):
    """Moves what a survey found.

    Attributes:
        alias: the name for ``fxquant.compat`` where the file's own name for the module must stay.
        needs_alias: whether it is used.
    """

    def __init__(self, survey: Survey) -> None:
        super().__init__()
        self.survey = survey
        self.alias = next(name for name in _ALIASES if name not in survey.names)
        self.needs_alias = False
        self._taken_over: set[str] = set()

    def visit_Module(self, node: cst.Module) -> None:  # noqa: N802  # libcst's name
        """Find the modules of which every use moves: their names are taken over."""
        finder = _ModuleNames()
        node.visit(finder)
        self._taken_over = {
            name
            for name in finder.names
            if self.survey.roots.get(name) and not self.survey.kept.get(name)
        }

    def leave_Attribute(  # noqa: N802  # libcst's name
        self, original_node: cst.Attribute, updated_node: cst.Attribute
    ) -> cst.BaseExpression:
        """``tq.quantize_fx.prepare_fx -> tq.prepare_fx``, or under the alias."""
        name = self.survey.moved_uses.get(original_node)
        if name is None:
            return updated_node
        root: cst.BaseExpression = original_node
        while isinstance(root, cst.Attribute):
            root = root.value
        assert isinstance(root, cst.Name)
        if root.value not in self._taken_over:
            self.needs_alias = True
            root = root.with_changes(value=self.alias)
        return updated_node.with_changes(value=root)

    def leave_SimpleStatementLine(  # noqa: N802  # libcst's name
        self,
        original_node: cst.SimpleStatementLine,
        updated_node: cst.SimpleStatementLine,
    ) -> cst.SimpleStatementLine | cst.FlattenSentinel[cst.SimpleStatementLine]:
        """An import line becomes one, or two: what stays, and what moves."""
        if len(updated_node.body) != 1:
            return updated_node
        (statement,) = updated_node.body
        made: Sequence[cst.BaseSmallStatement] | None = None
        if isinstance(statement, cst.ImportFrom):
            made = self._from_import(statement)
        elif isinstance(statement, cst.Import):
            made = self._import(statement)
        if made is None:
            return updated_node
        first, *rest = made
        lines = [updated_node.with_changes(body=[first])]
        lines.extend(cst.SimpleStatementLine(body=[one]) for one in rest)
        return cst.FlattenSentinel(lines)

    def _from_import(self, node: cst.ImportFrom) -> Sequence[cst.BaseSmallStatement] | None:
        module = imported_module(node)
        if module not in MODULES:
            return None
        if isinstance(node.names, cst.ImportStar):
            return self._star(node)
        modules = [a for a in node.names if self._is_taken_over(f"{module}.{alias_name(a)}", a)]
        moving = [a for a in node.names if alias_name(a) in MOVED]
        if not modules and not moving:
            return None
        staying = [a for a in node.names if a not in modules and a not in moving]
        if not staying and not modules:
            return [node.with_changes(module=_dotted(TARGET))]
        made: list[cst.BaseSmallStatement] = []
        if staying:
            made.append(_with_names(node, staying))
        if moving:
            made.append(_plain_import(_dotted(TARGET), moving))
        made.extend(_compat_as(local_name(alias)) for alias in modules)
        return made

    def _is_taken_over(self, qualified: str, alias: cst.ImportAlias) -> bool:
        return qualified in MODULES and local_name(alias) in self._taken_over

    def _star(self, node: cst.ImportFrom) -> Sequence[cst.BaseSmallStatement] | None:
        names = sorted(self.survey.star_names)
        if not names:
            return None
        explicit = _plain_import(
            _dotted(TARGET), [cst.ImportAlias(name=cst.Name(name)) for name in names]
        )
        return [node, explicit] if self.survey.kept.get("*") else [explicit]

    def _import(self, node: cst.Import) -> Sequence[cst.BaseSmallStatement] | None:
        """``import torch.ao.quantization as tq``; without a new name only ``torch`` is left."""
        names = [self._without_module(alias) for alias in node.names]
        taken = [a for a in names if a.asname is not None and self._is_taken_over(alias_name(a), a)]
        if not taken and names == list(node.names):
            return None
        staying = [a for a in names if a not in taken]
        made: list[cst.BaseSmallStatement] = [_compat_as(local_name(alias)) for alias in taken]
        if staying:
            made.insert(0, _with_names(node, staying))
        return made

    def _without_module(self, alias: cst.ImportAlias) -> cst.ImportAlias:
        """``torch.ao.quantization -> torch`` where the module has no use left."""
        used = self.survey.kept.get("torch") or not self.survey.roots.get("torch")
        if alias.asname is not None or alias_name(alias) not in MODULES or used:
            return alias
        return alias.with_changes(name=cst.Name("torch"))


class _ModuleNames(cst.CSTVisitor):
    """The names under which a file has modules of torch.ao all to themselves.

    ``import torch.ao.quantization`` binds ``torch``, which has other uses, so it is not among them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def visit_Import(self, node: cst.Import) -> None:  # noqa: N802  # libcst's name
        """``import torch.ao.quantization as tq``."""
        for alias in node.names:
            if alias.asname is not None and alias_name(alias) in MODULES:
                self.names.add(local_name(alias))

    def visit_ImportFrom(self, node: cst.ImportFrom) -> None:  # noqa: N802  # libcst's name
        """``from torch.ao.quantization import quantize_fx``."""
        module = imported_module(node)
        if module is None or isinstance(node.names, cst.ImportStar):
            return
        for alias in node.names:
            if f"{module}.{alias_name(alias)}" in MODULES:
                self.names.add(local_name(alias))


def _dotted(name: str) -> cst.Attribute | cst.Name:
    made = cst.parse_expression(name)
    assert isinstance(made, cst.Attribute | cst.Name)
    return made


def _with_names(
    node: cst.ImportFrom | cst.Import, names: Sequence[cst.ImportAlias]
) -> cst.ImportFrom | cst.Import:
    """``node`` with fewer names; a comma behind the last stays only inside parentheses."""
    *others, last = names
    if isinstance(node, cst.Import) or node.lpar is None:
        last = last.with_changes(comma=cst.MaybeSentinel.DEFAULT)
    return node.with_changes(names=[*others, last])


def _plain_import(
    module: cst.Attribute | cst.Name, names: Sequence[cst.ImportAlias]
) -> cst.ImportFrom:
    """``from module import a, b``, on one line, or on several where it would be too long."""
    plain = [alias.with_changes(comma=cst.MaybeSentinel.DEFAULT) for alias in names]
    made = cst.ImportFrom(module=module, names=plain)
    if len(cst.Module(body=[]).code_for_node(made)) <= 88:
        return made
    comma = cst.Comma(
        whitespace_after=cst.ParenthesizedWhitespace(
            indent=True, last_line=cst.SimpleWhitespace("    ")
        )
    )
    end = cst.Comma(whitespace_after=cst.ParenthesizedWhitespace(indent=True))
    spread = [alias.with_changes(comma=comma) for alias in plain[:-1]]
    return made.with_changes(
        names=[*spread, plain[-1].with_changes(comma=end)],
        lpar=cst.LeftParen(
            whitespace_after=cst.ParenthesizedWhitespace(
                indent=True, last_line=cst.SimpleWhitespace("    ")
            )
        ),
        rpar=cst.RightParen(),
    )


def _compat_as(name: str) -> cst.ImportFrom:
    """``from fxquant import compat as name``."""
    asname = None if name == _MODULE else cst.AsName(name=cst.Name(name))
    return cst.ImportFrom(
        module=_dotted(_PACKAGE), names=[cst.ImportAlias(name=cst.Name(_MODULE), asname=asname)]
    )
