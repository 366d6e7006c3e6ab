"""Package metadata from settings.ini, the one place where it is written."""

import re
import tomllib
from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

ini = ConfigParser(delimiters=["="])
ini.read(Path(__file__).with_name("settings.ini"), encoding="utf-8")
meta = ini["DEFAULT"]


def lines(key):
    return [line for line in meta[key].splitlines() if line]


def long_description():
    """README.md with absolute links, which also work on a package index."""
    home = Path(__file__).parent
    urls = tomllib.loads((home / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]
    text = (home / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"(!\[[^]]*\]\()(?!https?:)", rf"\1{urls['Repository']}/raw/main/", text)
    return re.sub(r"((?<!!)\[[^]]*\]\()(?!https?:|#|mailto:)", rf"\1{urls['Repository']}/blob/main/", text)


setup(
    description=meta["description"],
    long_description=long_description(),
    long_description_content_type="text/markdown",
    keywords=meta["keywords"],
    author=meta["author"],
    license=meta["license"],
    python_requires=f">={meta['min_python']}",
    classifiers=lines("classifiers"),
    install_requires=lines("requirements"),
    extras_require={name: lines(f"{name}_requirements") for name in ("dev", "export", "jupyter")},
    entry_points={"console_scripts": lines("console_scripts"), "nbdev": ["audiomaepp=audiomaepp._modidx:d"]},
)
