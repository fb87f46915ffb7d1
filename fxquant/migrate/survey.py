"""Reads a module: which names of torch.ao it uses, under which of its own, and where."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import libcst as cst
from libcst import metadata as meta
from libcst.helpers import get_full_name_for_node

from fxquant.migrate.finding import Finding, Kind
from fxquant.migrate.names import (
    EAGER_MODULES,
    MODULES,
    MOVED,
    OLD_KEYWORDS,
    OTHER_PREFIXES,
    STAYS,
    TARGET,
    UNKNOWN,
)

_STEPS_WITH_INPUTS = ("prepare_fx", "prepare_qat_fx")
_STEPS = (*_STEPS_WITH_INPUTS, "convert_fx", "convert_to_reference_fx", "fuse_fx")


def module_and_name(qualified: str) -> tuple[str, str] | None:
    """``torch.ao.quantization.qconfig.QConfig -> (torch.ao.quantization.qconfig, QConfig)``."""
    module, _, name = qualified.rpartition(".")
    return (module, name) if module in MODULES and qualified not in MODULES else None


@dataclass
class Survey:
    """What a module uses.

    Attributes:
        findings: what to say, in no order.
        moved_uses: attribute expressions to rewrite -> the name in ``fxquant.compat``.
        roots: name of a module in the file -> uses of it that move.
        kept: name of a module in the file -> uses of it that stay.
        star_names: names that a star import brings and the file uses.
        names: every name that the file binds or reads.
    """

    findings: list[Finding] = field(default_factory=list)
    moved_uses: dict[cst.CSTNode, str] = field(default_factory=dict)
    roots: dict[str, int] = field(default_factory=dict)
    kept: dict[str, int] = field(default_factory=dict)
    star_names: set[str] = field(default_factory=set)
    names: set[str] = field(default_factory=set)


class Surveyor(cst.CSTVisitor):
    """Fills a :class:`Survey`."""

    METADATA_DEPENDENCIES = (
        meta.PositionProvider,
        meta.QualifiedNameProvider,
        meta.ParentNodeProvider,
        meta.ScopeProvider,
    )

    def __init__(self) -> None:
        super().__init__()
        self.survey = Survey()
        self._has_star = False

    # -- imports ----------------------------------------------------------------------------------

    def visit_ImportFrom(self, node: cst.ImportFrom) -> bool:  # noqa: N802  # libcst's name
        """Names that are imported one by one."""
        module = imported_module(node)
        if module is None:
            return False
        if isinstance(node.names, cst.ImportStar):
            if module in MODULES:
                self._has_star = True
                self._say(node, Kind.MOVES, f"import * from {module}: the names in use, one by one")
            return False
        for alias in node.names:
            qualified = f"{module}.{alias_name(alias)}"
            known = module in MODULES or module in EAGER_MODULES
            if not self._prefix(alias, qualified) and known:
                self._imported(alias, module, alias_name(alias))
        return False

    def visit_Import(self, node: cst.Import) -> bool:  # noqa: N802  # libcst's name
        """Modules that are imported whole."""
        for alias in node.names:
            self._prefix(alias, alias_name(alias))
        return False

    def _imported(self, node: cst.CSTNode, module: str, name: str) -> None:
        if f"{module}.{name}" in MODULES:
            return  # a module: its uses are looked at
        if name in MOVED:
            note = f"; {MOVED[name]}" if MOVED[name] else ""
            self._say(node, Kind.MOVES, f"{module}.{name} -> {TARGET}.{name}{note}")
        else:
            self._say(node, Kind.STAYS, f"{module}.{name}: {STAYS.get(name, UNKNOWN)}")

    def _prefix(self, node: cst.CSTNode, qualified: str) -> bool:
        """Say what is known of a module that does not move."""
        for prefix, text in OTHER_PREFIXES.items():
            if qualified == prefix or qualified.startswith(f"{prefix}."):
                self._say(node, Kind.CHECK, f"{qualified}: {text}")
                return True
        return False

    # -- uses -------------------------------------------------------------------------------------

    def visit_Attribute(self, node: cst.Attribute) -> None:  # noqa: N802  # libcst's name
        """``tq.QConfigMapping``: an attribute of a module, however it was imported."""
        for qualified in self._qualified(node):
            found = module_and_name(qualified)
            root = get_full_name_for_node(node)
            if found is None or root is None:
                continue
            root = root.partition(".")[0]
            module, name = found
            if name in MOVED:
                self.survey.moved_uses[node] = name
                self.survey.roots[root] = self.survey.roots.get(root, 0) + 1
            else:
                self.survey.kept[root] = self.survey.kept.get(root, 0) + 1
            self._imported(node, module, name)

    def visit_Name(self, node: cst.Name) -> None:  # noqa: N802  # libcst's name
        """Names that only a star import can have brought, and uses of modules as values."""
        self.survey.names.add(node.value)
        parent = self.get_metadata(meta.ParentNodeProvider, node)
        for qualified in self._qualified(node):
            if qualified in MODULES and not isinstance(parent, cst.Attribute):
                self.survey.kept[node.value] = self.survey.kept.get(node.value, 0) + 1

    def visit_Call(self, node: cst.Call) -> None:  # noqa: N802  # libcst's name
        """Arguments that have another name by now, or another meaning."""
        for name in self._step(node):
            self._arguments(node, name)
        function = get_full_name_for_node(node.func) or ""
        if any(
            q.startswith("torchvision.models.quantization.") for q in self._qualified(node.func)
        ):
            for argument in node.args:
                if argument.keyword is not None and argument.keyword.value == "quantize":
                    text = f"quantize= of {function}(): pass False, then prepare_fx"
                    self._say(argument, Kind.CHECK, text)
        if function.rpartition(".")[2] == "fuse_model":
            self._say(node, Kind.CHECK, "fuse_model() is of eager mode; prepare_fx fuses by itself")

    def visit_Assign(self, node: cst.Assign) -> None:  # noqa: N802  # libcst's name
        """``torch.backends.quantized.engine = ...``."""
        for target in node.targets:
            if get_full_name_for_node(target.target) == "torch.backends.quantized.engine":
                self._say(
                    node,
                    Kind.CHECK,
                    "the engine is not needed: fxquant chooses one for each weight that it packs",
                )

    def _step(self, node: cst.Call) -> Iterator[str]:
        for qualified in self._qualified(node.func):
            found = module_and_name(qualified)
            if found is not None and found[1] in _STEPS:
                yield found[1]
                return
        if self._has_star and isinstance(node.func, cst.Name) and node.func.value in _STEPS:
            yield node.func.value

    def _arguments(self, node: cst.Call, step: str) -> None:
        keywords = {a.keyword.value: a for a in node.args if a.keyword is not None}
        for name, argument in keywords.items():
            if name in OLD_KEYWORDS:
                self._say(argument, Kind.CHECK, f"{step}({name}=...): {OLD_KEYWORDS[name]}")
        if any(argument.star for argument in node.args):
            return
        positional = [a for a in node.args if a.keyword is None]
        if step in _STEPS_WITH_INPUTS and len(positional) < 3 and "example_inputs" not in keywords:
            self._say(
                node,
                Kind.CHECK,
                f"{step}() without example_inputs: pass a tuple of inputs that the model accepts",
            )
        mapping = keywords.get("qconfig_mapping", positional[1] if len(positional) > 1 else None)
        if step not in _STEPS_WITH_INPUTS or mapping is None:
            return
        if isinstance(mapping.value, cst.Dict):
            text = "draws the deprecation of torch.ao, and unknown keys draw a warning"
            self._say(mapping, Kind.CHECK, f"{step}() with a dict: {text}")

    # -- star imports -----------------------------------------------------------------------------

    def leave_Module(self, original_node: cst.Module) -> None:  # noqa: N802  # libcst's name
        """Which names of a star import are in use: those that nothing else binds."""
        if not self._has_star:
            return
        scopes = set(self.metadata[meta.ScopeProvider].values())
        for scope in scopes:
            if not isinstance(scope, meta.Scope):
                continue
            for access in scope.accesses:
                name = get_full_name_for_node(access.node)
                if name is None:
                    continue
                name = name.partition(".")[0]
                if not access.referents and name in MOVED:
                    self.survey.star_names.add(name)
                    self._imported(access.node, "*", name)
                elif not access.referents and name in STAYS:
                    self.survey.kept["*"] = self.survey.kept.get("*", 0) + 1
                    self._imported(access.node, "*", name)

    # -- helpers ----------------------------------------------------------------------------------

    def _qualified(self, node: cst.CSTNode) -> Iterator[str]:
        for found in self.get_metadata(meta.QualifiedNameProvider, node, set()) or ():
            if found.source is meta.QualifiedNameSource.IMPORT:
                yield found.name

    def _say(self, node: cst.CSTNode, kind: Kind, text: str) -> None:
        start = self.get_metadata(meta.PositionProvider, node).start
        self.survey.findings.append(
            Finding(line=start.line, column=start.column + 1, text=text, kind=kind)
        )


def imported_module(node: cst.ImportFrom) -> str | None:
    """The module of ``from module import ...``; ``None`` for a relative import."""
    if node.relative or node.module is None:
        return None
    return get_full_name_for_node(node.module)


def alias_name(alias: cst.ImportAlias) -> str:
    """What is imported, without its new name."""
    return str(get_full_name_for_node(alias.name))


def local_name(alias: cst.ImportAlias) -> str:
    """The name that an import binds in the file."""
    if alias.asname is not None and isinstance(alias.asname.name, cst.Name):
        return alias.asname.name.value
    return alias_name(alias).partition(".")[0]
