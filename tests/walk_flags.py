"""Which flags of the trainer some code reads: the dataclass tree against the syntax tree of the package.

A flag counts as read where ``<configuration>.<section>.<option>`` is evaluated, or ``<name>.<option>`` for a name
that the same function has bound to a section. A configuration is a name or an attribute called ``config``; the
sections of torchtitan's configuration go by other names (``c``, ``titan``, ``job_config``) and count for nothing.
"""

import ast
from pathlib import Path

ROOT_NAME = "config"


def _section(node: ast.expr, sections: set[str], names: dict[str, str]) -> str | None:
    """The section that an expression is, if it is one."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if not isinstance(node, ast.Attribute) or node.attr not in sections:
        return None
    root = node.value
    if isinstance(root, ast.Name):
        # a name that stands for a section, or for somebody else's configuration, is not the root
        return node.attr if root.id == ROOT_NAME and root.id not in names else None
    is_config = isinstance(root, ast.Attribute) and root.attr == ROOT_NAME
    return node.attr if is_config else None


def _bindings(function: ast.AST, sections: set[str], classes: dict[str, str]) -> dict[str, str]:
    """Local name -> section, and -> "" for a ``config`` that is annotated as another class's."""
    names: dict[str, str] = {}
    if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
        arguments = function.args
        for argument in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs):
            kind = ast.unparse(argument.annotation) if argument.annotation else ""
            if kind in classes:
                names[argument.arg] = classes[kind]
            elif argument.arg == ROOT_NAME and kind != "JobConfig":
                names[argument.arg] = ""
    for node in ast.walk(function):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                pairs = [(target, node.value)]
                if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    pairs = list(zip(target.elts, node.value.elts, strict=True))
                for left, right in pairs:
                    if isinstance(left, ast.Name) and (found := _section(right, sections, names)):
                        names[left.id] = found
    return names


def flags_read(
    source: str, sections: dict[str, set[str]], classes: dict[str, str] | None = None
) -> set[str]:
    """Dotted names of the flags that a module evaluates.

    Args:
        sections: Section -> its options.
        classes: Class of a section -> section, for arguments that are one.
    """
    found: set[str] = set()

    def visit(node: ast.AST, names: dict[str, str]) -> None:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            names = names | _bindings(node, set(sections), classes or {})
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            section = _section(node.value, set(sections), names)
            if section and node.attr in sections[section]:
                found.add(f"{section}.{node.attr}")
        for child in ast.iter_child_nodes(node):
            visit(child, names)

    visit(ast.parse(source), {})
    return found


def assigned_to_titan(source: str) -> dict[str, ast.expr]:
    """``section.option`` of torchtitan -> the value given to it, of the statements ``c.section.option = value``."""
    found: dict[str, ast.expr] = {}
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                words = ast.unparse(target).split(".")
                if len(words) == 3 and words[0] == "c":
                    found[".".join(words[1:])] = node.value
    return found


def names_read(folder: Path, *, without: tuple[str, ...] = ()) -> set[str]:
    """Every attribute that the modules below a folder evaluate."""
    found: set[str] = set()
    for file in folder.rglob("*.py"):
        if not any(part in without for part in file.relative_to(folder).parts):
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
                    found.add(node.attr)
    return found
