"""`import audiomaepp` is cheap, and every public name is there when asked for."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import audiomaepp

HEAVY = "torch torchaudio umap numba sklearn matplotlib pandas pyarrow plotly accelerate transformers numpy".split()


def python(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_import_loads_nothing_heavy():
    code = f"import sys, audiomaepp; print([m for m in {HEAVY} if m in sys.modules])"
    assert python(code) == "[]"


@pytest.mark.parametrize("name", audiomaepp.__all__)
def test_every_public_name_is_there(name):
    assert getattr(audiomaepp, name) is not None
    assert name in dir(audiomaepp)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'Confg'"):
        audiomaepp.Confg  # noqa: B018
    assert not hasattr(audiomaepp, "Confg")


def test_version_is_the_installed_one():
    from importlib.metadata import version

    assert audiomaepp.__version__ == version("audiomaepp")


def test_a_module_is_there_without_its_import():
    assert python("import audiomaepp; print(audiomaepp.train.Trainer.__name__)") == "Trainer"


def test_editors_see_the_names_that_are_loaded_lazily():
    tree = ast.parse(Path(audiomaepp.__file__).read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen == {name: f"audiomaepp.{module}" for name, module in audiomaepp._WHERE.items()}
