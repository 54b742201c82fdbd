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
    if not isinstance(node, ast.Attribute):
        return None
    if ast.unparse(node) in names:
        # an attribute that the class has bound
        return names[ast.unparse(node)]
    if node.attr not in sections:
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
                for left, right in _pairs(target, node.value):
                    if isinstance(left, ast.Name) and (found := _section(right, sections, names)):
                        names[left.id] = found
    return names


def _attributes(class_: ast.ClassDef, sections: set[str]) -> dict[str, str]:
    """``self.<name>`` -> the section that a method of the class binds it to."""
    names: dict[str, str] = {}
    for node in ast.walk(class_):
        if isinstance(node, ast.Assign) and len(node.targets) == 1:
            for left, right in _pairs(node.targets[0], node.value):
                text = ast.unparse(left)
                if text.startswith("self.") and (found := _section(right, sections, {})):
                    names[text] = found
    return names


def _pairs(target: ast.expr, value: ast.expr) -> list[tuple[ast.expr, ast.expr]]:
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
        return list(zip(target.elts, value.elts, strict=True))
    return [(target, value)]


def read_by_methods(source: str, classes: dict[str, str]) -> dict[str, set[str]]:
    """``section.method`` -> the options that the method of a section's class reads, by name or as strings."""
    found: dict[str, set[str]] = {}
    for class_ in ast.parse(source).body:
        if isinstance(class_, ast.ClassDef) and class_.name in classes:
            own: dict[str, set[str]] = {}
            for method in class_.body:
                if isinstance(method, ast.FunctionDef) and not method.name.startswith("__"):
                    nodes = list(ast.walk(method))
                    own[method.name] = {x.attr for x in nodes if isinstance(x, ast.Attribute)}
                    own[method.name] |= {x.value for x in nodes if isinstance(x, ast.Constant)}
            for name, read in own.items():
                # what it reads by way of the class's other methods
                called = {other for other in own if other in read}
                found[f"{classes[class_.name]}.{name}"] = read.union(*(own[x] for x in called))
    return found


def flags_read(
    source: str,
    sections: dict[str, set[str]],
    classes: dict[str, str] | None = None,
    methods: dict[str, set[str]] | None = None,
) -> set[str]:
    """Dotted names of the flags that a module evaluates.

    Args:
        sections: Section -> its options.
        classes: Class of a section -> section, for arguments that are one. It counts where the module
            imports it from `flame.config.sections`: torchtitan has classes of the same names.
        methods: What `read_by_methods` found; a method that is named counts as its options.
    """
    found: set[str] = set()
    tree = ast.parse(source)
    imported = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "flame.config.sections"
        for alias in node.names
        if alias.asname is None
    }
    own = {name: section for name, section in (classes or {}).items() if name in imported}

    def visit(node: ast.AST, names: dict[str, str]) -> None:
        if isinstance(node, ast.ClassDef):
            names = names | _attributes(node, set(sections))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            names = names | _bindings(node, set(sections), own)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            section = _section(node.value, set(sections), names)
            if section and node.attr in sections[section]:
                found.add(f"{section}.{node.attr}")
            elif section:
                read = (methods or {}).get(f"{section}.{node.attr}", set())
                found.update(f"{section}.{option}" for option in read & sections[section])
        for child in ast.iter_child_nodes(node):
            visit(child, names)

    visit(tree, {})
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
