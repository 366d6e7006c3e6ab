"""`import audiomaepp` is cheap, and every public name is there when asked for."""

import subprocess
import sys

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
