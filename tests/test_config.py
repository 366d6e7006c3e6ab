"""Each setting of a config has an effect or raises an error that says what to use."""

import subprocess
import sys
from dataclasses import dataclass
from typing import Annotated

import pytest

from audiomaepp.config import PRESET_SUMMARIES, PRESETS, Config


def test_a_subclass_that_sets_a_field_without_annotation_is_refused():
    """`mask_ratio = 0.5` in a subclass had no effect: training used 0.75."""
    with pytest.raises(TypeError, match=r"mask_ratio.*Config\(mask_ratio=0\.5\)"):
        type("Mine", (Config,), {"mask_ratio": 0.5})


def test_a_subclass_that_is_no_dataclass_is_refused():
    """An annotation alone has no effect either."""

    class Mine(Config):
        mask_ratio: float = 0.5

    with pytest.raises(TypeError, match=r"Mine sets mask_ratio.*@dataclass"):
        Mine()


def test_a_subclass_that_is_a_dataclass_has_its_defaults():
    @dataclass(frozen=True, kw_only=True)
    class Mine(Config):
        mask_ratio: float = 0.5

    assert Mine().mask_ratio == 0.5 and Mine().replace(depth=2).mask_ratio == 0.5


def test_a_subclass_with_annotations_of_its_own_is_checked_all_the_same():
    """The command line writes help texts into annotations."""

    @dataclass(frozen=True, kw_only=True)
    class Mine(Config):
        block: Annotated[str, "help"] = "macaron"
        use_labels: Annotated[bool, "help"] = True

    for settings in ({"block": "swin"}, {"use_labels": "perhaps"}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            Mine(**settings)


BAD = [
    dict(img_size=230, patch_size=16), dict(img_size=0), dict(img_size=-384), dict(img_size="big"),
    dict(patch_size=16, img_size=8), dict(patch_size=(4, 16, 2)), dict(embed_dim=190), dict(num_heads=5),
    dict(num_heads=0), dict(mask_ratio=0), dict(mask_ratio=1), dict(mask_ratio=float("nan")), dict(mask_ratio=0.999),
    dict(pooling_mode="max"), dict(block="swin"), dict(contrastive_temperature=0), dict(uniformity_weight=-1),
    dict(f_max=9000.0), dict(epochs=0), dict(seed=-1), dict(spec_freq_mask=80), dict(use_labels="perhaps"),
    dict(betas=0.9), dict(views=3), dict(stretch_time=-0.1), dict(shift_mel=100), dict(normalize="loud"),
    dict(spec_filter=-1), dict(grid_shifts=0), dict(grid_shifts=5), dict(embed_dim="192"), dict(embed_dim=True),
    # beyond any use: these would only fill the memory
    dict(depth=10**7), dict(num_heads=10**9), dict(img_size=(10**6, 80)), dict(n_fft=2**20), dict(hop_length=10**9),
]  # fmt: skip


@pytest.mark.parametrize("settings", BAD, ids=str)
def test_a_bad_value_is_refused_with_the_requirement_the_value_and_a_remedy(settings):
    field = next(iter(settings))
    with pytest.raises(ValueError, match=rf"^{field} (with .* )?must .*, got .*; use "):
        Config(**settings)


def test_an_unknown_preset_is_answered_with_a_line_for_each():
    with pytest.raises(ValueError, match="'smal'; use 'small'") as caught:
        Config.preset("smal")
    assert list(PRESET_SUMMARIES) == list(PRESETS)
    assert all(f"\n{name}: {line}" in str(caught.value) for name, line in PRESET_SUMMARIES.items())


@pytest.mark.parametrize("module", ["config", "files", "tables"])
def test_the_modules_behind_the_help_load_no_heavy_library(module):
    program = f"import sys, audiomaepp.{module}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    heavy = {"torch", "numpy", "scipy", "sklearn", "pandas", "pyarrow", "matplotlib", "filelock", "jinja2"}
    assert not heavy & set(loaded)
