"""The site and the README from the notebooks, without Quarto.

    python docs/build.py site      nbs/ → _site/, every page, link and anchor checked
    python docs/build.py readme    nbs/index.ipynb → README.md
"""

import ast
import inspect
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from base64 import b64decode
from importlib import import_module
from pathlib import Path

import yaml
from fastcore.nbio import read_nb
from nbdev.config import get_config, nbpath2html

ROOT = Path(__file__).parents[1]
NBS = ROOT / "nbs"
PAGES = ("CONTRIBUTING.md", "CHANGELOG.md")  # beside the notebooks


def block(text, lang="text"):
    """A fenced code block, its fence longer than any inside."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{lang}\n{text.rstrip()}\n{fence}"


def own_classes(cls):
    """A class and those of its bases that are of the same package."""
    package = cls.__module__.partition(".")[0]
    return [base for base in cls.__mro__ if base.__module__.partition(".")[0] == package]


def table(head, rows, title=""):
    """A Markdown table below its title, or nothing where there are no rows."""
    lines = [head, re.sub(r"[^|]+", "---", head), *rows] if rows else []
    return "\n".join([f"**{title}**\n"] * bool(rows and title) + lines)


def default_of(node):
    """The default of a field as its author would write it in a call."""
    made = next((k.value for k in getattr(node, "keywords", []) if k.arg == "default_factory"), None)
    if made is None:
        return ast.unparse(node)
    return ast.unparse(made.body) if isinstance(made, ast.Lambda) else f"{ast.unparse(made)}()"


def fields(cls):
    """The fields of a dataclass or named tuple with their comments, a table for each class that brings some."""
    tables = []
    for base in reversed(own_classes(cls)):
        source = textwrap.dedent(inspect.getsource(base)).encode()  # ast counts columns in bytes
        rows = []
        for node in ast.parse(source).body[0].body:
            if isinstance(node, ast.AnnAssign):
                comment = source.splitlines()[node.end_lineno - 1][node.end_col_offset :].decode().strip(" #")
                comment = re.sub(r"\}$", "}&#8203;", comment)  # or it would be taken for attributes of the cell
                default = f"`{default_of(node.value)}`" if node.value else ""
                rows.append(f"| `{node.target.id}` | `{ast.unparse(node.annotation)}` | {default} | {comment} |")
        title = "" if base is cls else inspect.getdoc(base).rstrip(".")
        tables.append(table("| field | type | default |   |", rows, title))
    return tables


def methods(cls):
    """The public methods and properties of a class, with what their docstrings say first."""
    rows = {}
    for name, member in ((name, member) for base in own_classes(cls) for name, member in vars(base).items()):
        function = getattr(member, "fget", None) or getattr(member, "__func__", member)
        doc = " ".join((getattr(function, "__doc__", None) or "").split("\n\n")[0].split()).replace("|", "\\|")
        if name.startswith("_") or not inspect.isfunction(function) or not doc or name in rows:
            continue
        given = [str(p.replace(annotation=p.empty)) for p in inspect.signature(function).parameters.values()]
        given = given[not isinstance(member, staticmethod) :]
        call = name if isinstance(member, property) else f"{name}({', '.join(given)})"
        call = re.sub(r"<class '(\w+)'>", r"\1", call)
        rows[name] = f"| `{call}` | {doc} |"
    return [table("| member |   |", rows.values())]


def signature(code):
    """A signature of nbdev's with one parameter a line, spaced as PEP 8 has it, names without their modules."""
    lines = []
    for line in code.split("\n"):
        if not line.startswith("    "):
            lines.append(line.replace(")->", ") -> "))
            continue
        given, hash_, comment = line.partition(" # ")
        for parameter in re.split(r", (?=\w+:)|(?<=\*), ", given.strip().rstrip(",")):
            parameter = re.sub(r"^(\w+):NoneType=", r"\1=", parameter)  # not annotated
            parameter = re.sub(r"^(\w+):(?=\S)([^=]*[^= ])=?", r"\1: \2 = ", parameter).removesuffix(" = ")
            lines.append(f"    {parameter},")
        lines[-1] += hash_ + comment
    text = re.sub(rf"\b(__main__|collections\.abc|{get_config().lib_path.name}\.\w+)\.(?=[A-Z])", "", "\n".join(lines))
    text = re.sub(r"\btorch\.nn\.modules\.\w+\.", "nn.", text)
    return re.sub(r"frozenset\(\{.*\}\)", "frozenset({…})", text)  # a set has no order to show


def documented(text, shown=None):
    """What show_doc says of `shown`, as a box whose heading has the anchor that nbdev's links point to."""
    text = re.sub(r"^---\n", "", text)
    if not get_config().git_url:
        text = re.sub(r"^\[source\]\(.*\)\{.*\}$", "", text, flags=re.M)
    text = re.sub(r"^(#+) (\S+)$", lambda m: f"{m[1]} `{m[2]}` {{ #{m[2].lower()} }}", text, count=1, flags=re.M)
    text = re.sub(r"(?<=^```python\n).*?(?=^```$)", lambda m: signature(m[0]), text, count=1, flags=re.M | re.S)
    if inspect.isclass(shown):
        told = hasattr(shown, "__dataclass_fields__") or hasattr(shown, "_fields")
        if told or "*args, **kwargs" in text:
            text = re.sub(r"^```python\n.*?^```\n", "", text, count=1, flags=re.M | re.S)
        text = re.sub(r"^def (.*?^\)).*?:$", r"class \1", text, count=1, flags=re.M | re.S)
        tables = "\n\n".join([*(fields(shown) if told else []), *methods(shown)])
        text = f'{text}\n\n<div class="members" markdown>\n\n{tables}\n\n</div>'
    return f'<div class="doc" markdown>\n\n{text.strip()}\n\n</div>'


def output(out, picture):
    """A cell's output as Markdown; `picture(bytes, suffix)` stores an image and returns its link."""
    if out["output_type"] == "stream":
        return block("".join(out["text"])) if out["name"] == "stdout" else ""
    if out["output_type"] == "error":
        return block(f"{out['ename']}: {out['evalue']}")
    data = {kind: "".join(value) if isinstance(value, list) else value for kind, value in out["data"].items()}
    if "text/html" in data:
        return re.sub(r"\n\s*", "\n", data["text/html"].strip())
    if "image/png" in data:
        return picture(b64decode(data["image/png"]), ".png")
    if "image/svg+xml" in data:
        return picture(data["image/svg+xml"].encode(), ".svg")
    return data.get("text/markdown") or block(data.get("text/plain", ""))


def joined(outs):
    """The outputs of a cell, what was printed in several goes in one."""
    whole = []
    for out in outs:
        if whole and out["output_type"] == whole[-1]["output_type"] == "stream" and out["name"] == whole[-1]["name"]:
            whole[-1] = {**whole[-1], "text": [*whole[-1]["text"], *out["text"]]}
        else:
            whole.append(out)
    return whole


def parts_of(cell):
    """The directives of a cell, {name: value}, and its source without them."""
    source = cell.get("source") or ""
    directives = dict(re.findall(r"^#\|\s*([\w-]+):?\s*(.*?)\s*$", source, re.M))
    return directives, re.sub(r"^#\|.*\n?", "", source, flags=re.M).strip()


def defined(code):
    """What exported code defines at its top level, {name: first line of its docstring}; imports define nothing."""
    names = {}
    for node in ast.parse(code).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names[node.name] = (ast.get_docstring(node) or "").split("\n")[0]
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {name.id: "" for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    return names


def folded(summary, text, kind):
    """Markdown behind a line that opens it."""
    return f'<details class="{kind}" markdown>\n<summary markdown="span">{summary}</summary>\n\n{text}\n\n</details>'


def source_fold(cell, boxed):
    """The source of an exported cell, folded; names without a box of their own are listed on the fold."""
    code = parts_of(cell)[1]
    names = defined(code)
    rest = {name: doc for name, doc in names.items() if name not in boxed}
    if not names:
        return ""
    told = [f"`{name}`: {doc}" for name, doc in rest.items() if doc] or [", ".join(f"`{name}`" for name in rest)]
    summary = "Source" if len(rest) < len(names) else "<br>".join(told)
    anchors = [f'<div id="{name.lower()}" markdown></div>' for name in rest]
    link = [f'[source]({cell.url}){{ .source target="_blank" }}'] if rest and cell.url else []
    return folded(summary, "\n\n".join([*anchors, *link, block(code, "python")]), "code")


def with_sources(cells, written, urls):
    """The cells of a page, and in their places the exported ones of the notebook as `written`, as folds."""
    exported, place = [], {cell.id: i for i, cell in enumerate(written)}
    for i, cell in enumerate(written):
        if cell.cell_type == "code" and {"export", "exporti"} & parts_of(cell)[0].keys():
            cell.update(cell_type="export", url=urls.get(cell.id))
            exported.append((i, cell))
            place |= dict.fromkeys(defined(parts_of(cell)[1]), i)
    placed, last = [], -1
    for cell in cells:
        shown = re.search(r"^show_doc\((\w+)\)", cell.source, re.M)
        last = place.get(cell.id, place.get(shown and shown[1], last))
        placed.append((last, cell))
    return [cell for _, cell in sorted(placed + exported, key=lambda pair: pair[0])]


def source_urls(path, git_url, branch):
    """Where the cells of a module stand on the web, {cell id: address}."""
    lines = path.read_text(encoding="utf-8").splitlines() if git_url and path.exists() else []
    marks = {m[1]: i for i, line in enumerate(lines) if (m := re.match(r"# %% .*#([\w-]+)$", line))}
    base = f"{git_url}/blob/{branch}/{path.parent.name}/{path.name}"
    return {mark: f"{base}#L{i + 2}" for mark, i in marks.items()}


def page(nb, picture, module=None):
    """A notebook as Markdown: prose, what the reader should see of the code of `module`, what came out."""
    parts = []
    boxed = {m[1] for cell in nb.cells if (m := re.search(r"^show_doc\((\w+)\)", cell.source or "", re.M))}
    for cell in nb.cells:
        source = cell.get("source") or ""
        directives, code = parts_of(cell)
        if cell.cell_type == "export":
            parts += [fold] if (fold := source_fold(cell, boxed)) else []
        elif cell.cell_type == "raw" and source.startswith("---"):
            front = yaml.safe_load(source.strip().strip("-"))
            parts.append(f"# {front['title']}")
            parts += [f"{front['description']}\n{{: .subtitle }}"] if "description" in front else []
        elif cell.cell_type == "markdown" and not source.startswith("<!-- WARNING"):
            parts.append(source)
        elif cell.cell_type == "code" and code and not {"hide", "default_exp"} & directives.keys():
            outs = joined(cell.get("outputs", [])) if directives.get("output") != "false" else []
            if shown := re.match(r"show_doc\((\w+)\)", code):
                texts = [o["data"]["text/markdown"] for o in outs if "text/markdown" in o.get("data", {})]
                parts += [documented(text, getattr(module, shown[1], None)) for text in texts]
                continue
            if directives.get("echo") != "false":
                parts.append(block(code, "python"))
            shown = [text for o in outs if (text := output(o, picture)).strip()]
            for text in shown:  # without `markdown` HTML stays as it is
                marked, gap = ("", "\n") if text.startswith("<") else (" markdown", "\n\n")
                parts.append(gap.join([f'<div class="output"{marked}>', text, "</div>"]))
    return "\n\n".join(parts) + "\n"


def mathml(text):
    """Formulas as MathML, which browsers draw without a script."""
    from latex2mathml.converter import convert

    def draw(m):
        markup = convert(m[1] or m[2], display="block" if m[1] else "inline")
        markup = re.sub(r"[*_\\`]", lambda c: f"&#{ord(c[0])};", markup)  # nothing in it is Markdown
        return markup if m[1] else f"<span>{markup}</span>"  # at the start of a line a bare tag would end the paragraph

    code = r"(^(?P<fence>`{3,}).*?^(?P=fence)$|`[^`\n]+`)"
    formula = r"\$\$(.+?)\$\$|(?<![\\\w$])\$(?=\S)([^$]+?)(?<=\S)\$(?!\w)"
    parts = re.split(code, text, flags=re.M | re.S)
    prose = [re.sub(formula, draw, part, flags=re.S) for part in parts[::3]]
    return "".join(a + b for a, b in zip(prose, [*parts[1::3], ""], strict=True))


def module_of(to):
    """The module that a page is about, None for one without."""
    package = get_config().lib_path.name
    return import_module(f"{package}.{to.stem}") if (get_config().lib_path / f"{to.stem}.py").exists() else None


def write_pages(processed, docs):
    """Turn nbdev's processed notebooks into the pages of `docs`; return the navigation, {title: page} in order."""
    books = sorted(processed.rglob("*.ipynb"), key=lambda p: (p.stem != "index", len(p.parts), p))
    pages = {book: nbpath2html(book.relative_to(processed)).with_suffix(".md") for book in books}
    texts = {}
    for book, to in pages.items():
        (docs / to).parent.mkdir(parents=True, exist_ok=True)
        pictures = []

        def picture(data, suffix, to=to, pictures=pictures):
            pictures.append(docs / to.parent / f"{to.stem}-{len(pictures) + 1}{suffix}")
            pictures[-1].write_bytes(data)
            return f"![]({pictures[-1].name})"

        nb, written, config = read_nb(book), read_nb(NBS / book.relative_to(processed)), get_config()
        urls = source_urls(config.lib_path / f"{to.stem}.py", config.git_url, config.branch)
        nb.cells = with_sources(nb.cells, written.cells, urls)
        texts[to] = mathml(page(nb, picture, module_of(to)))
    for name in PAGES:
        texts[Path(name)] = (ROOT / name).read_text(encoding="utf-8")
    known = {to.with_suffix(suffix).name: to for to in texts for suffix in (".html", ".md")}
    known |= {book.name: to for book, to in pages.items()}
    anchors = {to: set(re.findall(r"(?:\{ #|<div id=\")([\w.]+)", text)) for to, text in texts.items()}
    package = import_module(f"{get_config().lib_path.name}._modidx").d["syms"]
    exported = {name.rpartition(".")[2].lower() for names in package.values() for name in names}
    for module, names in package.items():
        to = known[f"{module.rpartition('.')[2]}.html"]
        top = {name.removeprefix(f"{module}.") for name in names}
        if absent := [name for name in top if "." not in name and name.lower() not in anchors[to]]:
            raise SystemExit(f"{to} must show every exported name, got no {', '.join(absent)}; define it at top level")
    for to, text in texts.items():

        def link(m, to=to):
            target, anchor = known.get(Path(m[1]).name), m[2] or ""
            if not target:
                return m[0]
            if anchor and "." in anchor and anchor not in anchors[target]:
                anchor = anchor.split(".")[0]  # a method without a box of its own: its class
            if anchor in exported - anchors[target]:
                anchor = ""  # a method that a class has from elsewhere: its page
            return f"]({os.path.relpath(target, to.parent)}{anchor and '#' + anchor})"

        text = re.sub(r"\]\(([\w./-]+\.(?:html|ipynb|md))(?:#([\w.-]*))?\)", link, text)
        (docs / to).write_text(text, encoding="utf-8")
    titles = {to: re.search(r"^# (.*)$", text, re.M)[1] for to, text in texts.items()}
    return {"Home" if to.stem == "index" else titles[to]: str(to) for to in texts}


def site():
    """Build _site/ with nbdev's own processing of the notebooks; any warning of mkdocs is an error."""
    from nbdev.serve import proc_nbs

    os.environ["PYTHONWARNINGS"] = "ignore:Found cells containing imports"  # in nbdev's worker processes
    os.environ.update(MPLBACKEND="agg", TQDM_DISABLE="1", NO_MKDOCS_2_WARNING="1")
    try:
        processed = proc_nbs(path=NBS, force=True, n_workers=min(4, os.cpu_count()))
    except Exception as error:
        print(f"{error}\n\nFor the docs nbdev runs the cells that export or import, and no others:")
        print("imports need a cell of their own, and what they need must be imported or exported too.")
        return 1
    with tempfile.TemporaryDirectory() as tmp:
        docs = Path(tmp) / "docs"
        if (NBS / "images").is_dir():
            shutil.copytree(NBS / "images", docs / "images")
        nav = write_pages(processed, docs)
        shutil.copy(ROOT / "docs/site.css", docs)
        config = {"INHERIT": str(ROOT / "docs/mkdocs.yml"), "docs_dir": str(docs), "site_dir": str(ROOT / "_site")}
        config["nav"] = [{title: to} for title, to in nav.items()]
        (Path(tmp) / "mkdocs.yml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        # without --quiet, under which --strict overlooks warnings
        command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", f"{tmp}/mkdocs.yml"]
        mkdocs = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if mkdocs.returncode:
        print("\n".join(line for line in mkdocs.stdout.splitlines() if not line.startswith("INFO")))
        return 1
    print(f"{len(nav)} pages in _site/; open _site/index.html")
    return 0


def readme():
    """Write README.md: the first page, with links that work from the project's top folder."""
    text = page(read_nb(NBS / "index.ipynb"), picture=lambda data, suffix: "")
    text = re.sub(r"</?div[^>]*>\n+", "", text)
    text = re.sub(r"\]\((?!https?:|#|mailto:)(?:\./)?((?!\.\./)[^)]+)\)", r"](nbs/\1)", text).replace("](../", "](")
    (ROOT / "README.md").write_text(text.replace("\n\n\n", "\n\n"), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit({"site": site, "readme": readme}[sys.argv[1]]())
