"""The site's pages on kdlib, written from its docstrings; nothing is imported, so signatures read as in the source.

A docstring says where its function is derived, `Derived in: chapters/01_distillation`.  That becomes a link to the
chapter here, and `derived` collects the links back.
"""

import ast
import inspect
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

ROLES = {"function": "py:func", "class": "py:class", "data": "py:data", "module": "py:mod"}
CHAPTER = re.compile(r"\bchapters/(\d\d_\w+)")


@dataclass(frozen=True)
class Entry:
    """One thing that kdlib offers: a function, class or constant of a module, or the module itself."""

    module: str
    name: str  # empty for the module
    kind: str  # Sphinx's word for it; what is in a class is a method, property or attribute
    signature: str
    doc: str
    members: tuple["Entry", ...] = ()

    @property
    def link(self) -> str:
        """A cross-reference to this entry, shown without the package's name."""
        target = f"{self.module}.{self.name}".rstrip(".")
        return f"{{{ROLES[self.kind]}}}`{target.removeprefix('kdlib.')} <{target}>`"

    @property
    def summary(self) -> str:
        """The first paragraph of the docstring, without where it comes from."""
        return re.split(r"\s+(?:Source|Derived in):|\n\n", self.doc)[0].replace("\n", " ")


def modules(root: Path) -> dict[str, list[Entry]]:
    """The public entries of every module by the module's name, the module itself first; undocumented ones are left out.

    A constant is documented by a string on the line after it.
    """
    found = {}
    for path in sorted((root / "kdlib").rglob("*.py")):
        name = ".".join(path.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
        tree = ast.parse(path.read_text())
        entries = [Entry(name, "", "module", "", ast.get_docstring(tree) or ""), *_entries(name, tree)]
        found[name] = [entry for entry in entries if entry.doc or entry.kind == "module"]
    return found


def derived(root: Path) -> dict[str, list[Entry]]:
    """By chapter, the entries whose docstrings say that they are derived there."""
    found: dict[str, list[Entry]] = {}
    for entry in (entry for entries in modules(root).values() for entry in entries):
        for said in re.findall(r"Derived in:\s*((?:chapters/\w+[,\s]*(?:and\s+)?)+)", entry.doc):
            for chapter in CHAPTER.findall(said):
                found.setdefault(chapter, []).append(entry)
    return found


def pages(root: Path) -> dict[str, str]:
    """The pages as MyST Markdown by their name: `index`, and one for each module."""
    found = modules(root)
    links = {f"{e.module}.{e.name}": e.link for entries in found.values() for e in entries if e.name}
    index = ["# The library", "", "What `kdlib` offers, room by room, in the words of its docstrings.", ""]
    for module, entries in found.items():
        index.append(f"- {{doc}}`{module}`: {markdown(entries[0].summary, module, links)}")
    return {"index": "\n".join([*index, ""])} | {name: _page(name, entries, links) for name, entries in found.items()}


def _page(module: str, entries: list[Entry], links: dict[str, str]) -> str:
    lines = [f"# {module}", "", f":::{{py:module}} {module}", ":::", ""]
    lines += [markdown(entries[0].doc, module, links), ""]
    for entry in entries[1:]:
        lines += [f"::::{{py:{entry.kind}}} {entry.name}{entry.signature}", "", markdown(entry.doc, module, links), ""]
        for member in entry.members:
            lines += [f":::{{py:{member.kind}}} {member.name}{member.signature}", ""]
            lines += [markdown(member.doc, module, links), "", ":::", ""]
        lines += ["::::", ""]
    return "\n".join(lines)


def markdown(doc: str, module: str = "", links: Mapping[str, str] = MappingProxyType({})) -> str:
    """A docstring as MyST: code that names something of kdlib, and every chapter, becomes a link.

    Outside of code, what Markdown would take for HTML or for a formula is escaped.
    """

    def part(text: str) -> str:
        if text.startswith("`"):
            name = text.strip("`").removesuffix("()").removeprefix("kdlib.")
            return links.get(f"{module}.{name}") or links.get(f"kdlib.{name}") or text
        text = re.sub(r"\s+(Source|Derived in):", r"\n\n**\1:**", text)
        return CHAPTER.sub(r"{doc}`/chapters/\1`", re.sub(r"[<$]", r"\\\g<0>", text))

    return "".join(part(text) for text in re.split(r"(`[^`]*`)", doc))


def _entries(module: str, parent: ast.Module | ast.ClassDef) -> Iterator[Entry]:
    """The public functions, classes and documented names of a module, or of a class."""
    within = isinstance(parent, ast.ClassDef)
    for node, after in zip(parent.body, [*parent.body[1:], None], strict=True):
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
            yield _function(module, node, within)
        elif isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
            members = tuple(member for member in _entries(module, node) if member.doc)
            yield Entry(module, node.name, "class", "", ast.get_docstring(node) or "", members)
        elif isinstance(node, ast.Assign | ast.AnnAssign) and (doc := _string(after)):
            target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            for name in target.elts if isinstance(target, ast.Tuple) else [target]:
                yield Entry(module, ast.unparse(name), "attribute" if within else "data", _value(node, within), doc)


def _string(node: ast.stmt | None) -> str:
    """The text of a statement that is nothing but a string."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
        return inspect.cleandoc(node.value.value)
    return ""


def _value(node: ast.Assign | ast.AnnAssign, within: bool) -> str:
    """Type and default of a field as the options of its directive."""
    if not (within and isinstance(node, ast.AnnAssign)):
        return ""
    default = f"\n:value: {json.dumps(ast.unparse(node.value))}" if node.value else ""
    return f"\n:type: {json.dumps(ast.unparse(node.annotation))}{default}"


def _function(module: str, node: ast.FunctionDef, within: bool) -> Entry:
    arguments = ast.unparse(node.args)
    returned = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    kind, signature = "function", f"({arguments}){returned}"
    if within:
        kind, signature = "method", re.sub(r"^\((self|cls)(, )?", "(", signature)
        if any(ast.unparse(decorator).endswith("property") for decorator in node.decorator_list):
            kind, signature = "property", f"\n:type: {json.dumps(ast.unparse(node.returns))}" if node.returns else ""
    return Entry(module, node.name, kind, signature, ast.get_docstring(node) or "")
