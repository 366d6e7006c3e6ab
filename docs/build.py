"""The site and the README from the notebooks, without Quarto.

    python docs/build.py site      nbs/ → _site/, every page, link and anchor checked
    python docs/build.py readme    nbs/index.ipynb → README.md
"""

import ast
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
import tomllib
from base64 import b64decode
from functools import partial
from html import escape
from importlib import import_module
from pathlib import Path

import yaml
from fastcore.nbio import read_nb
from nbdev.config import get_config, nbpath2html

ROOT = Path(__file__).resolve().parents[1]
NBS = ROOT / "nbs"
PACKAGE = get_config(ROOT).lib_path.name
PAGES = ("CONTRIBUTING.md", "CHANGELOG.md")  # beside the notebooks
FLOORS = ("The method", "Sound in", "Vectors out", "Pictures", "The lab", "Reach", "Shell")  # by first digit


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
    text = re.sub(rf"\b(__main__|collections\.abc|{PACKAGE}\.\w+)\.(?=[A-Z])", "", "\n".join(lines))
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


def alternative(directives, code):
    """What a figure shows, in words: `#| fig-alt:`, or the title that its code gives it."""
    if text := directives.get("fig-alt"):
        return str(yaml.safe_load(text)) if text[0] in "\"'" else text
    titles = re.findall(r"""(?:\btitle=|\b(?:set_title|suptitle)\()(["'])(.+?)\1""", code)
    return "; ".join(dict.fromkeys(title for _, title in titles))


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
    """What exported code defines at its top level, {name: first line of its docstring, or its comment}; no imports."""
    names, lines = {}, code.encode().splitlines()  # ast counts columns in bytes
    for node in ast.parse(code).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names[node.name] = (ast.get_docstring(node) or "").split("\n")[0]
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            comment = lines[node.end_lineno - 1][node.end_col_offset :].decode().strip(" #")
            names |= {name.id: comment for target in targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    return names


def folded(summary, text, kind):
    """Markdown behind a line that opens it; the search looks at the line only."""
    opening = f'<details class="{kind}" markdown>\n<summary markdown="span">{summary}</summary>'
    return f"{opening}\n<section data-search-exclude markdown>\n\n{text}\n\n</section>\n</details>"


def is_test(node):
    """Whether a statement only checks something."""
    if isinstance(node, (ast.For, ast.With)):
        return all(map(is_test, node.body))
    call = isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and ast.unparse(node.value.func)
    return isinstance(node, ast.Assert) or bool(call) and call.startswith("test_")


def source_fold(cell, boxed):
    """The source of an exported cell, folded; names without a box of their own are listed on the fold."""
    code = parts_of(cell)[1]
    names = defined(code)
    rest = {name: doc for name, doc in names.items() if name not in boxed}
    if not names:
        return ""
    told = [f"`{name}`: {doc}" for name, doc in rest.items() if doc] or [", ".join(f"`{name}`" for name in rest)]
    summary = "Source" if len(rest) < len(names) else "<br>".join(told)
    anchors = [f'<div id="{name.lower()}" markdown></div>' for name in rest]  # a link to one opens the fold
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


def on_web(path):
    """The address of a file of the project, or nothing for a project without one."""
    config = get_config()
    return f"{config.git_url}/blob/{config.branch}/{path.relative_to(ROOT).as_posix()}" if config.git_url else ""


def source_urls(path):
    """The addresses of the cells of a module, {cell id: address}."""
    lines = path.read_text(encoding="utf-8").splitlines() if on_web(path) and path.exists() else []
    marks = {m[1]: i for i, line in enumerate(lines) if (m := re.match(r"# %% .*#([\w-]+)$", line))}
    return {mark: f"{on_web(path)}#L{i + 2}" for mark, i in marks.items()}


def page(nb, picture, module=None, sources=()):
    """A notebook as Markdown: prose, links to `sources` below the title, the code to be seen, what came out."""
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
            parts += [f"Source: {' · '.join(sources)}\n{{: .sources }}"] if sources else []
        elif cell.cell_type == "markdown" and not source.startswith("<!-- WARNING"):
            parts.append(source)
        elif cell.cell_type == "code" and code and not {"hide", "default_exp"} & directives.keys():
            outs = joined(cell.get("outputs", [])) if directives.get("output") != "false" else []
            if shown := re.match(r"show_doc\((\w+)\)", code):
                texts = [o["data"]["text/markdown"] for o in outs if "text/markdown" in o.get("data", {})]
                parts += [documented(text, getattr(module, shown[1], None)) for text in texts]
                continue
            if directives.get("echo") != "false":
                text = block(code, "python")
                tests = not outs and not re.match("[%!]", code) and all(map(is_test, ast.parse(code).body))
                parts.append(folded("Tests", text, "code tests") if tests else text)
            figure = partial(picture, alt=alternative(directives, code))
            shown = [text for o in outs if (text := output(o, figure)).strip()]
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


def exports(module):
    """The full names of what a module exports, its methods too."""
    return import_module(f"{PACKAGE}._modidx").d["syms"].get(module.__name__, {})


def module_of(to):
    """The module that a page is about, None for one without."""
    return import_module(f"{PACKAGE}.{to.stem}") if (ROOT / PACKAGE / f"{to.stem}.py").exists() else None


def reference(modules):
    """The page of all names: of `modules`, {page: {name: what it does}}, the public ones before the helpers."""
    package = import_module(PACKAGE)

    def row(to, name, doc):
        module = module_of(to)
        value = getattr(module, name) if name in module.__all__ else None
        if not doc and isinstance(value, (dict, tuple, frozenset)):
            doc = ", ".join(f"`{key}`" for key in (sorted(value) if isinstance(value, frozenset) else value))
        shown = name.replace("_", "&#95;<wbr>")
        return f"| [<code>{shown}</code>]({to}#{name.lower()}) | {doc.replace('|', '&#124;')} |"

    rows = {to: {name: row(to, name, doc) for name, doc in names.items()} for to, names in modules.items()}
    parts = ["# Reference", "All names, by chapter; the public ones first.\n{: .subtitle }"]
    top = set(getattr(package, "__all__", ()))
    if first := [row for names in rows.values() for name, row in names.items() if name in top]:
        parts += [f"## {package.__name__}", f"`from {package.__name__} import …` has these names too:"]
        parts += [table("| name |   |", first)]
    for to, names in rows.items():
        module = module_of(to)
        public = {name for name in module.__all__ if name in names}
        helpers = [row for name, row in names.items() if name not in public]
        parts += [f"## {to.stem}", f"`{module.__name__}` · [chapter]({to})"]
        parts += [table("| name |   |", [row for name, row in names.items() if name in public])]
        parts += [folded("Helpers", table("| name |   |", helpers), "code")] if helpers else []
    return "\n\n".join(["<div class=\"names\" markdown>", *parts, "</div>"]) + "\n"


def navigation(pages, titles):
    """The order of the pages: where to begin, the guides, the chapters by floor, all names."""
    floors = {}
    for book, to in pages.items():
        if book.parent.name != "tutorials" and book.stem != "index":
            digit = book.stem[0]
            floor = FLOORS[int(digit)] if digit.isdigit() else "Foundations"
            floors.setdefault(floor, []).append({titles[to]: str(to)})
    guides = [{titles[to]: str(to)} for book, to in pages.items() if book.parent.name == "tutorials"]
    return [
        {"Get started": "index.md"},
        {"Guides": [*guides, {"Contributing": "CONTRIBUTING.md"}]},
        {"Chapters": [{floor: chapters} for floor, chapters in floors.items()]},
        {"Reference": [{"Names": "reference.md"}, {"Changes": "CHANGELOG.md"}]},
    ]


def write_pages(processed, docs):
    """Turn nbdev's processed notebooks into the pages of `docs`; return the navigation."""
    books = sorted(processed.rglob("*.ipynb"), key=lambda p: (p.stem != "index", len(p.parts), p))
    pages = {book: nbpath2html(book.relative_to(processed)).with_suffix(".md") for book in books}
    texts, modules = {}, {}
    for book, to in pages.items():
        (docs / to).parent.mkdir(parents=True, exist_ok=True)
        pictures = []

        def picture(data, suffix, alt, to=to, pictures=pictures):
            pictures.append(docs / to.parent / f"{to.stem}-{len(pictures) + 1}{suffix}")
            pictures[-1].write_bytes(data)
            return f'<img src="{pictures[-1].name}" alt="{escape(alt)}">'

        nb, source, module = read_nb(book), NBS / book.relative_to(processed), ROOT / PACKAGE / f"{to.stem}.py"
        nb.cells = with_sources(nb.cells, read_nb(source).cells, source_urls(module))
        sources = [f"[{path.name}]({on_web(path)})" for path in (source, module) if on_web(path) and path.exists()]
        texts[to] = mathml(page(nb, picture, module_of(to), sources))
        if module_of(to):
            exported = [parts_of(cell)[1] for cell in nb.cells if cell.cell_type == "export"]
            modules[to] = {name: doc for code in exported for name, doc in defined(code).items()}
    for name in PAGES:
        texts[Path(name)] = (ROOT / name).read_text(encoding="utf-8")
    texts[Path("reference.md")] = reference(modules)
    known = {to.with_suffix(suffix).name: to for to in texts for suffix in (".html", ".md")}
    known |= {book.name: to for book, to in pages.items()}
    anchors = {to: set(re.findall(r"(?:\{ #|<div id=\")([\w.]+)", text)) for to, text in texts.items()}
    for to, names in modules.items():
        exported = {name.removeprefix(f"{module_of(to).__name__}.") for name in exports(module_of(to))}
        if absent := [name for name in exported if "." not in name and name not in names]:
            raise SystemExit(f"{to} must show every exported name, got no {', '.join(absent)}; define it at top level")
    for to, text in texts.items():

        def link(m, to=to):
            target, anchor = known.get(Path(m[1]).name), m[2] or ""
            if not target:
                return m[0]
            if anchor and "." in anchor and anchor not in anchors[target]:
                anchor = anchor.split(".")[0]  # a method without a box of its own: its class
            return f"]({os.path.relpath(target, to.parent)}{anchor and '#' + anchor})"

        text = re.sub(r"\]\(([\w./-]+\.(?:html|ipynb|md))(?:#([\w.-]*))?\)", link, text)
        (docs / to).write_text(text, encoding="utf-8")
    return navigation(pages, {to: re.search(r"^# (.*)$", text, re.M)[1] for to, text in texts.items()})


def faults(site):
    """What is wrong with the pages: pictures without a text, and anything that would be fetched from elsewhere."""
    found = []
    for path in sorted([*site.rglob("*.html"), *site.rglob("*.css")]):
        text, name = path.read_text(encoding="utf-8"), path.relative_to(site)
        text = re.sub(r"(<script\b[^>]*>).*?</script>", r"\1", text, flags=re.S)  # a script may write tags
        for tag in re.findall(r"<(?:script|link|img|iframe|audio|video|source|embed|object)\b[^>]*>", text):
            if re.search(r"""\b(?:src|href|data|srcset)=["']?(?:https?:)?//""", tag) and "canonical" not in tag:
                found.append(f"{name}: nothing may be fetched from elsewhere, got {tag[:200]}; keep a copy in docs/")
            if tag.startswith("<img") and not re.search(r"""\balt=["'](?!["'])""", tag):
                found.append(f"{name}: an image must have a text, got {tag[:200]}; add `#| fig-alt:` to its cell")
        for address in re.findall(r"""(?:url\(|@import)\s*["']?((?:https?:)?//[^"')]+)""", text):
            found.append(f"{name}: nothing may be fetched from elsewhere, got {address}; keep a copy in docs/")
    return found


def live_maps(docs):
    """Make a page of each map in images/*.json, and show it in place of its picture wherever that stands."""
    made = {}
    for payload in sorted((docs / "images").glob("*.json")):
        from audiomaepp.explorer import render_page

        page = payload.with_suffix(".html")
        page.write_text(render_page(json.loads(payload.read_text(encoding="utf-8"))), encoding="utf-8")
        payload.unlink()
        made[payload.with_suffix(".png").name] = page.name
    for path in docs.rglob("*.md") if made else []:

        def live(m):
            alt, folder, name = m.groups()
            if name not in made:
                return m[0]
            return f'<iframe class="live" src="{folder}{made[name]}" title="{escape(alt)}" loading="lazy"></iframe>'

        text = path.read_text(encoding="utf-8")
        path.write_text(re.sub(r"!\[([^\]]*)\]\(([^)\s]*/)([^)/\s]+\.png)\)", live, text), encoding="utf-8")


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
    made = ROOT / "_site"
    with tempfile.TemporaryDirectory() as tmp:
        docs = Path(tmp) / "docs"
        if (NBS / "images").is_dir():
            shutil.copytree(NBS / "images", docs / "images")
        config = {"INHERIT": str(ROOT / "docs/mkdocs.yml"), "docs_dir": str(docs), "site_dir": str(made)}
        address = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"].get("Docs")
        config |= {"nav": write_pages(processed, docs), "site_url": address}
        live_maps(docs)
        shutil.copy(ROOT / "docs/site.css", docs)
        shutil.copytree(ROOT / "docs/iframe-worker", docs / "assets/iframe-worker")
        (Path(tmp) / "mkdocs.yml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        # without --quiet, under which --strict overlooks warnings
        command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", f"{tmp}/mkdocs.yml"]
        mkdocs = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if mkdocs.returncode:
        print("\n".join(line for line in mkdocs.stdout.splitlines() if not line.startswith("INFO")))
        return 1
    if found := faults(made):
        print("\n".join(found))
        return 1
    print(f"{len(list(made.rglob('*.html')))} pages in _site/; open _site/index.html")
    return 0


def readme():
    """Write README.md: the first page, with links that work from the project's top folder."""
    text = page(read_nb(NBS / "index.ipynb"), picture=lambda data, suffix, alt: "")
    text = re.sub(r"</?div[^>]*>\n+", "", text)
    text = re.sub(r"\]\((?!https?:|#|mailto:)(?:\./)?((?!\.\./)[^)]+)\)", r"](nbs/\1)", text).replace("](../", "](")
    (ROOT / "README.md").write_text(text.replace("\n\n\n", "\n\n"), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit({"site": site, "readme": readme}[sys.argv[1]]())
