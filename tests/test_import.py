"""`import audiomaepp` is cheap, and every public name is there when asked for."""

import ast
import re
import subprocess
import sys
import textwrap
from configparser import ConfigParser
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

import audiomaepp

HEAVY = "torch torchaudio umap numba sklearn matplotlib pandas pyarrow anywidget accelerate transformers numpy".split()


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


def test_a_wrong_path_is_reported_without_torch(tmp_path):
    code = f"""
        import sys
        from audiomaepp.data import open_recordings
        for path in {[str(tmp_path / "gone"), str(tmp_path)]!r}:
            try: open_recordings(path)
            except (FileNotFoundError, ValueError) as error: print(error)
        print([m for m in ("torch", "torchaudio", "sklearn", "umap", "numba") if m in sys.modules])"""
    missing, empty, loaded = python(textwrap.dedent(code)).splitlines()
    assert "gone does not exist" in missing and "contains no audio" in empty and loaded == "[]"


def test_a_module_is_there_without_its_import():
    assert python("import audiomaepp; print(audiomaepp.train.Trainer.__name__)") == "Trainer"


def test_editors_see_the_names_that_are_loaded_lazily():
    tree = ast.parse(Path(audiomaepp.__file__).read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen == {name: f"audiomaepp.{module}" for name, module in audiomaepp._WHERE.items()}


def imported_packages():
    "Return {package: modules of ours that import it}, at the top of a file or inside a function."
    found = {}
    for path in Path(audiomaepp.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in names:
                found.setdefault(name.partition(".")[0], set()).add(path.name)
    return found


def test_every_import_is_a_declared_requirement():
    ini = ConfigParser(delimiters=["="])
    ini.read(Path(__file__).parents[1] / "settings.ini", encoding="utf-8")
    keys = [key for key in ini["DEFAULT"] if key.endswith("requirements") and key != "dev_requirements"]
    lines = [line for key in keys for line in ini["DEFAULT"][key].splitlines() if line]
    declared = {normalized(re.match(r"[\w.-]+", line)[0]) for line in lines}
    ours = {"audiomaepp", "IPython"}  # Jupyter brings IPython, and nothing else needs it
    distributions = packages_distributions()
    missing = {
        package: sorted(modules)
        for package, modules in imported_packages().items()
        if package not in sys.stdlib_module_names | ours
        and not declared & {normalized(name) for name in distributions.get(package, [package])}
    }
    assert not missing, "add these to the requirements in settings.ini"


def normalized(name):
    return re.sub(r"[-_.]+", "-", name).lower()
