"""How large the package is, against its ceilings: ``python tests/size.py`` prints a table.

Tokens are those of Python's own tokenizer without comments, docstrings and line ends. A function's
lines are those of the formatted source, without its docstring. Exit code 1 if a ceiling is broken.
"""

from __future__ import annotations

import ast
import io
import statistics
import sys
import tokenize
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "cdelta"
CEILINGS = {
    "tokens": 134_300,
    "lines of the largest module": 450,
    "lines of the median function": 8,
    "lines of the longest function": 40,
    "lambdas bound to names": 0,
}
LAYOUT = (
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
)


def count_tokens(text: str) -> int:
    """Tokens of a module; a string that is a statement of its own is a docstring."""
    count, line = 0, []
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.NEWLINE:
            count += 0 if [t.type for t in line] == [tokenize.STRING] else len(line)
            line = []
        elif token.type not in LAYOUT:
            line.append(token)
    return count


def function_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function, decorators and docstring aside."""
    first = node.body[0]
    docstring = ast.get_docstring(node, clean=False) is not None
    return node.end_lineno - node.lineno + 1 - docstring * (first.end_lineno - first.lineno + 1)


def named_lambdas(tree: ast.AST) -> int:
    """Assignments of a lambda to a name."""
    assignments = (ast.Assign, ast.AnnAssign)
    return sum(
        isinstance(node, assignments) and isinstance(node.value, ast.Lambda)
        for node in ast.walk(tree)
    )


def measure(package: Path = PACKAGE) -> dict[str, tuple[int, str]]:
    """The measured value of every ceiling, with the place where it is reached."""
    texts = {p: p.read_text(encoding="utf-8") for p in sorted(package.rglob("*.py"))}
    trees = {path: ast.parse(text) for path, text in texts.items()}
    functions = [
        (function_lines(node), f"{path.relative_to(package)}:{node.lineno} {node.name}")
        for path, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    modules = [(text.count("\n"), str(path.relative_to(package))) for path, text in texts.items()]
    lambdas = {str(p.relative_to(package)): named_lambdas(tree) for p, tree in trees.items()}
    return {
        "tokens": (sum(map(count_tokens, texts.values())), f"{len(texts)} modules"),
        "lines of the largest module": max(modules),
        "lines of the median function": (
            int(statistics.median(lines for lines, _ in functions)),
            f"{len(functions)} functions",
        ),
        "lines of the longest function": max(functions),
        "lambdas bound to names": (sum(lambdas.values()), max(lambdas, key=lambdas.get)),
    }


def main() -> int:
    """Print the table, one line per sub-package and one per ceiling."""
    for room in sorted(p for p in PACKAGE.iterdir() if p.is_dir() and p.name != "__pycache__"):
        tokens = sum(count_tokens(p.read_text(encoding="utf-8")) for p in room.rglob("*.py"))
        print(f"{tokens:10,}  tokens of {room.name}")
    broken = False
    for name, (value, place) in measure().items():
        broken |= value > CEILINGS[name]
        mark = "  TOO LARGE" if value > CEILINGS[name] else ""
        print(f"{value:10,}  {name} (at most {CEILINGS[name]:,}; {place}){mark}")
    return int(broken)


if __name__ == "__main__":
    sys.exit(main())
