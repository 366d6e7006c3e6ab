"""What `make check` holds of the chapters: short cells, examples in sight, a small public surface, plain messages.

    python tests/check_chapters.py [--table] [notebooks …]
"""

import ast
import re
import sys
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from fastcore.nbio import read_nb

NBS = Path(__file__).parents[1] / "nbs"
CELL, STRETCH, PUBLIC = 60, 100, 110  # lines of a cell, exported lines without an example, public names of the package
BANNED = ("would do", "colour", "standardis")  # not in exported code; see the words of CONTRIBUTING.md


class Chapter(NamedTuple):
    name: str
    lines: int  # exported
    longest: int  # lines of the longest exported cell
    stretch: int  # longest stretch of exported lines without a visible example
    public: int  # names in the module's __all__
    banned: list[str]  # exported lines with a word that is not used


def lines_of(source):
    """The lines of code of a cell, without directives and empty lines."""
    return [line for line in source.splitlines() if line.strip() and not line.startswith("#|")]


def only_imports(source):
    """Whether a cell does nothing but import."""
    code = re.sub(r"^\s*[%!].*$", "", source, flags=re.M)
    kinds = (ast.Import, ast.ImportFrom, ast.If)
    body = ast.parse(code).body
    return bool(body) and isinstance(body[0], kinds[:2]) and all(isinstance(node, kinds) for node in body)


def measure(path):
    """What is counted in one notebook; None for one that exports nothing."""
    total = longest = stretch = run = 0
    banned, module = [], None
    for cell in read_nb(path).cells:
        if cell.cell_type != "code" or not lines_of(cell.source):
            module = module or re.search(r"#\|\s*default_exp\s+(\w+)", cell.source) if cell.source else module
            continue
        exported = re.search(r"^#\|\s*exporti?\b", cell.source, re.M)
        hidden = re.search(r"^#\|\s*(hide|default_exp)", cell.source, re.M)
        lines = lines_of(cell.source)
        if exported:
            total += len(lines)
            banned += [line.strip() for line in lines if any(word in line.lower() for word in BANNED)]
            if not only_imports(cell.source):
                longest, run = max(longest, len(lines)), run + len(lines)
                stretch = max(stretch, run)
        elif not hidden and not only_imports(cell.source):
            run = 0
    if module is None or not total:
        return None
    public = len(getattr(import_module(f"audiomaepp.{module[1]}"), "__all__", []))
    return Chapter(module[1], total, longest, stretch, public, banned)


def main(args):
    table = "--table" in args
    paths = [Path(arg) for arg in args if not arg.startswith("--")]
    chapters = [c for c in map(measure, paths or sorted(NBS.glob("*.ipynb"))) if c]
    if table:
        print(f"{'module':12} {'lines':>6} {'longest cell':>13} {'without example':>16} {'public names':>13}")
        for c in chapters:
            print(f"{c.name:12} {c.lines:6} {c.longest:13} {c.stretch:16} {c.public:13}")
        print(f"{'all':12} {sum(c.lines for c in chapters):6} {max(c.longest for c in chapters):13} "
              f"{max(c.stretch for c in chapters):16} {sum(c.public for c in chapters):13}")  # fmt: skip
    wrong = [f"{c.name}: a cell of {c.longest} lines, at most {CELL}" for c in chapters if c.longest > CELL]
    wrong += [f"{c.name}: {c.stretch} exported lines without an example, at most {STRETCH}" for c in chapters
              if c.stretch > STRETCH]  # fmt: skip
    wrong += [f"{c.name}: {line}" for c in chapters for line in c.banned]
    if not paths and (public := sum(c.public for c in chapters)) > PUBLIC:
        wrong.append(f"{public} public names, at most {PUBLIC}")
    print(*wrong, sep="\n")
    return len(wrong)


if __name__ == "__main__":
    sys.exit(bool(main(sys.argv[1:])))
