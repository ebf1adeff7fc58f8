"""Docstrings of a file of Python, read without importing it, and without looking into expressions: those hold none."""

import ast
from collections import deque
from collections.abc import Iterator
from pathlib import Path

Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def documented(path: Path, *, says: tuple[str, ...] = ()) -> Iterator[tuple[Documented, str]]:
    """Each module, class and function with its docstring, or "", the outer ones first, as `ast.walk` has them.

    Nothing where the file holds none of the strings that are asked for, or is a template or written for another Python.
    """
    source = path.read_bytes()
    if says and not any(what.encode() in source for what in says):
        return
    try:
        nodes: deque[ast.AST] = deque([ast.parse(source)])
    except (SyntaxError, ValueError):
        return
    while nodes:
        node = nodes.popleft()
        nodes.extend(
            child
            for child in ast.iter_child_nodes(node)
            if isinstance(child, ast.stmt | ast.excepthandler | ast.match_case)
        )
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node, ast.get_docstring(node) or ""
