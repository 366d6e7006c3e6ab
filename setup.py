"""Package metadata from settings.ini, the one place where it is written."""

from configparser import ConfigParser
from pathlib import Path

from setuptools import setup

ini = ConfigParser(delimiters=["="])
ini.read(Path(__file__).with_name("settings.ini"), encoding="utf-8")
meta = ini["DEFAULT"]


def lines(key):
    return [line for line in meta[key].splitlines() if line]


setup(
    description=meta["description"],
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    keywords=meta["keywords"],
    author=meta["author"],
    license=meta["license"],
    python_requires=f">={meta['min_python']}",
    classifiers=lines("classifiers"),
    install_requires=lines("requirements"),
    extras_require={"dev": lines("dev_requirements"), "export": lines("export_requirements")},
    entry_points={"console_scripts": lines("console_scripts"), "nbdev": ["audiomaepp=audiomaepp._modidx:d"]},
)
