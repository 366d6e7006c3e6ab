"""A config is what its user wrote: nothing in it is ignored without a word."""

from dataclasses import dataclass

import pytest

from audiomaepp.config import Config


def test_a_subclass_that_sets_a_field_without_annotation_is_refused():
    """`mask_ratio = 0.5` in a subclass was ignored: everything went on with 0.75."""
    with pytest.raises(TypeError, match=r"mask_ratio.*Config\(mask_ratio=0\.5\)"):
        type("Mine", (Config,), {"mask_ratio": 0.5})


def test_a_subclass_that_is_no_dataclass_is_refused():
    """An annotation alone has as little effect."""

    class Mine(Config):
        mask_ratio: float = 0.5

    with pytest.raises(TypeError, match=r"Mine sets mask_ratio.*@dataclass"):
        Mine()


def test_a_subclass_that_is_a_dataclass_has_its_defaults():
    @dataclass(frozen=True, kw_only=True)
    class Mine(Config):
        mask_ratio: float = 0.5

    assert Mine().mask_ratio == 0.5 and Mine().replace(depth=2).mask_ratio == 0.5
