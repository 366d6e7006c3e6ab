"""Text from files is text: in no page, card or repr does a label, a path or a column become markup."""

import dataclasses
import importlib
import inspect
import json
import os
import pkgutil
import re
from html.parser import HTMLParser
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import yaml

import audiomaepp
from audiomaepp import Run, lab
from audiomaepp.config import Config
from audiomaepp.data import Clip, Recordings, Skipped, split
from audiomaepp.estimator import AudioMAEEmbedder
from audiomaepp.evaluate import Report
from audiomaepp.maps import save_html_map
from audiomaepp.model import AudioMAEPlusPlus
from audiomaepp.report import Shift
from audiomaepp.run import Figures
from audiomaepp.search import Hits
from audiomaepp.source import Source
from audiomaepp.synthetic import Programs
from audiomaepp.train import History

PLAIN = "plain"
MARKUP = [
    "<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "' onmouseover='alert(1)", "</script><b>",
    "<!-- ]]>", "&lt;b&gt; &amp; &quot;", "${x} %{x} $y^{$", "{{ 7*7 }} {% raw %}", "a\n\n<i>", "\\",
]  # fmt: skip
BYTES = os.fsdecode(b"caf\xe9")  # a file's name that is no UTF-8
MARKDOWN = [
    "| a | b |", "---", "# head", "1. one", "- item", "> said", "[a](http://a.b)", "![a](b.png)", "`x`", "```",
    "**a** _b_ ~~c~~", "<http://a.b>", "{: .a }", "a\n\n- b", "    code", "a\n===", "[^1]: note", "\n---\na: b\n---\n",
]  # fmt: skip


class Page(HTMLParser):
    "What a browser makes of a page: its elements with their attributes, and its text."

    def __init__(self, page):
        super().__init__()
        self.elements, self.texts = [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, [name for name, _ in attrs]))

    def handle_endtag(self, tag):
        self.elements.append(tag)

    def handle_comment(self, data):
        self.elements.append("comment")

    def handle_decl(self, decl):
        self.elements.append("declaration")

    unknown_decl = handle_pi = handle_decl

    def handle_data(self, data):
        self.texts.append(data)


def shown(text):
    "A text as a page shows it: spaces count as one, bytes that are no UTF-8 are spelt out."
    return " ".join(text.encode("utf-8", "backslashreplace").decode().split())


def config(text, folder):
    class Named(str):
        __repr__ = str.__str__

    cfg = Config()
    object.__setattr__(cfg, "precision", Named(text))  # no file can do that: every setting is checked
    return cfg._repr_html_()


def history(text, folder):
    return History([{"epoch": 1, text: 0.5, "word": text}])._repr_html_()


def report(text, folder):
    return Report(text).add(text, {"knn": 0.5, "n_test": 9})._repr_html_()


def recordings(text, folder):
    table = pd.DataFrame({"path": [text, "b"], "label": [text, "b"], "fold": [text, "b"]}, dtype=object)
    return Recordings(table, source=text)._repr_html_()


def clip(text, folder):
    table = pd.DataFrame({"path": [text], "label": [text], text: [text]}, dtype=object)
    return Recordings(table, waves=[torch.zeros(16000)])[0]._repr_html_()


def unreadable_clip(text, folder):
    return Recordings(pd.DataFrame({"path": [f"{folder}/{text}"], "label": [text]}, dtype=object))[0]._repr_html_()


def parts(text, folder):
    table = pd.DataFrame({"path": [text, "b", "c", "d"], "label": [text, "b"] * 2}, dtype=object)
    return split(Recordings(table), held_out=[0, 1])._repr_html_()


def skipped(text, folder):
    return Skipped([(text, text)])._repr_html_()


def hits(text, folder):
    found = {"path": [text], "label": [text], "start": [0.0], "end": [text], "similarity": [0.5]}
    return Hits(pd.DataFrame(found, dtype=object))._repr_html_()


def comparison_of(text, path=None, n=8):
    "A comparison of two settings whose every name comes from a file; nothing was trained."
    classes, rng = [text, "b"], np.random.default_rng(0)
    labels = np.arange(n) % 2
    settings = {text: {"mask_ratio": 0.5}, "other": {}}
    experiment = lab.Experiment(
        settings, [0], Config().to_dict(), None, text, text, classes, {}, {"fold": text}, {text: text}
    )
    results = [
        lab.Result.of((name, "mean", 0), (rng.normal(size=(n, 4)), rng.normal(size=(n, 4))), (labels, labels),
                      reconstruction=0.5, seconds=1.0)
        for name in (*settings, lab.BASELINE)
    ]  # fmt: skip
    results[0].warning = text
    held_out = pd.DataFrame({"path": [f"{text}{i}" for i in range(n)], "label": [classes[i] for i in labels],
                             text: [text, "b"] * (n // 2)})  # fmt: skip
    histories = {(name, 0): History([{"step": 1, "loss": 0.5, text: 0.5}]) for name in settings}
    rest = 0.5, Skipped([(path or text, text)]), {(text, 1): text}
    return lab.Comparison(experiment, held_out, results[:2], histories, results[2:], *rest)


def comparison(text, folder):
    return comparison_of(text)._repr_html_()


def shift(text, folder):
    return comparison_of(text).shift(text, "other")._repr_html_()


def a_run(text, folder):
    "Sounds, protocol and rows whose names come from files."
    cfg = Config.preset("nano", depth=1, embed_dim=32, decoder_embed_dim=32)
    cfg.save(folder / "config.json")
    AudioMAEPlusPlus(cfg).write(folder)
    (folder / "data.json").write_text(json.dumps(dataclasses.asdict(Source(data=text))))
    Report(text).add(text, {"knn": 0.5, "n_test": 9}).to_json(folder / "results.json")
    return Run(folder)._repr_html_()


def lab_report(text, folder):
    return comparison_of(text).report(folder / "report.html", title=text, repeat=text).read_text("utf-8")


def html_map(text, folder):
    table = {text: [text, "b", "c"], "fraction": [0.1, 0.2, 0.3]}
    paths = [save_html_map(np.zeros((3, 2)), table, folder / f"{i}.html", text, held_out=text, color=column)
             for i, column in enumerate(table)]  # fmt: skip
    return "".join(path.read_text("utf-8") for path in paths)


def model_card(text, folder):
    "Read with a Markdown parser, as the Hub does."
    markdown = pytest.importorskip("markdown")
    extensions = ["tables", "fenced_code", "attr_list", "md_in_html", "toc"]
    return markdown.markdown(card_of(text, folder).split("\n---\n", 1)[1], extensions=extensions)


def card_of(text, folder):
    cfg = Config.preset("nano", depth=1, embed_dim=32, decoder_embed_dim=32)
    AudioMAEPlusPlus(cfg).generate_model_card(text, {text: {text: 0.5}}).save(folder / "README.md")
    return (folder / "README.md").read_text("utf-8")


PAGES = [config, history, report, recordings, clip, unreadable_clip, parts, skipped, hits, comparison, shift, a_run,
         lab_report, html_map, model_card]  # fmt: skip


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    "Each page made once of a harmless word."
    return {page: Page(page(PLAIN, tmp_path_factory.mktemp("plain"))) for page in PAGES}


@pytest.mark.parametrize(("page", "text"), [*product(PAGES, MARKUP), *product([model_card], MARKDOWN)])
def test_no_element_and_no_attribute_comes_out_of_the_data(page, text, pages, tmp_path):
    made = page(text, tmp_path)
    made.encode()  # it can be written
    found = Page(made)
    assert found.elements == pages[page].elements
    if page is not html_map:  # whose labels are in its script
        assert shown(text) in shown("".join(found.texts))


@pytest.mark.parametrize("page", [history, report, skipped, hits, html_map, model_card])
def test_a_name_that_is_no_utf_8_is_spelt_out(page, tmp_path):
    made = page(BYTES, tmp_path)
    assert made.encode() and (page is html_map or "caf\\xe9" in "".join(Page(made).texts))


def test_a_report_lists_a_path_that_is_no_utf_8(tmp_path):
    path = comparison_of(PLAIN, path=BYTES).report(tmp_path / "report.html", maps=False)
    assert "caf\\xe9" in path.read_text("utf-8")


def test_every_class_that_shows_itself_as_html_is_tried():
    modules = [importlib.import_module(f"audiomaepp.{m.name}") for m in pkgutil.iter_modules(audiomaepp.__path__)
               if m.name != "__main__"]  # fmt: skip
    classes = {cls for module in modules for name, cls in inspect.getmembers(module, inspect.isclass)
               if cls.__module__ == module.__name__ and name[0] != "_" and hasattr(cls, "_repr_html_")}  # fmt: skip
    tried = {Config, History, Report, Recordings, Clip, Skipped, Hits, Run, lab.Comparison, Shift}
    others = {AudioMAEEmbedder, Figures, Programs}  # shown by scikit-learn; pictures alone; Recordings like any other
    assert classes - others == tried


def test_one_function_escapes_for_all_modules():
    package = Path(audiomaepp.__file__).parent
    import_html = re.compile(r"^\s*(import html|from html import|.*\bmarkupsafe\b)", re.M)
    assert [p.name for p in package.glob("*.py") if import_html.search(p.read_text("utf-8"))] == ["tables.py"]


@pytest.mark.parametrize("text", MARKUP)
def test_the_map_shows_every_label_as_it_is(text, tmp_path):
    """The page's script sets texts, so what it shows is what its JSON holds."""
    page = html_map(text, tmp_path)
    for held in re.findall(r"application/json[^>]*>(.*?)</script>", page, re.S):
        data = json.loads(held)
        words, numbers = data["columns"]
        assert shown(words["name"]) == shown(text) and numbers["name"] == "fraction" and data["n"] == 3
        assert sorted(map(shown, words["classes"])) == sorted(map(shown, (text, "b", "c")))
        assert shown(data["title"]) == shown(text) and shown(text) in shown(data["note"])


@pytest.mark.parametrize("text", MARKUP + MARKDOWN)
def test_the_front_matter_of_a_card_stays_what_it_is(text, tmp_path):
    from huggingface_hub import ModelCard

    plain, made = (card_of(word, tmp_path) for word in (PLAIN, text))
    assert yaml.safe_load(made.split("---\n")[1]) == yaml.safe_load(plain.split("---\n")[1])
    assert made.split("---\n")[1] == plain.split("---\n")[1]
    assert ModelCard.load(tmp_path / "README.md").data.to_dict() == ModelCard(plain).data.to_dict()
