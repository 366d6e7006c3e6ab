"""What a user sees in Jupyter: each test runs cells in a real kernel and looks at the stored outputs."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
TRAINING = """
import signal
import torch
from audiomaepp.config import Config
from audiomaepp.train import Trainer

cfg = Config(
    embed_dim=32, depth=1, num_heads=2, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2, patch_size=(20, 16),
    batch_size=4, epochs=3, warmup_epochs=1, precision="fp32",
)
torch.manual_seed(0)
batches = [{"spec": torch.randn(4, 1, *cfg.img_size), "label": torch.arange(4) // 2} for _ in range(2)]
"""


def run_cells(*cells):
    "Run cells in a new kernel and return the outputs of each."
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    folder = {"metadata": {"path": str(ROOT / "nbs")}}
    NotebookClient(book, timeout=300, kernel_name="python3", resources=folder).execute()
    return [cell.outputs for cell in book.cells]


def pages(outputs):
    "Return the HTML of each display among the outputs of a cell."
    return [out.data["text/html"] for out in outputs if out.output_type == "display_data"]


def pictures(outputs):
    "Return the pictures among the outputs of a cell."
    return [out["data"]["image/png"] for out in outputs if "image/png" in out.get("data", {})]


def test_a_training_leaves_its_curves_and_its_table():
    fit = "{0} = Trainer(cfg, quiet={1})\n{0}.fit(batches, lambda model: {{'knn': 0.5}});"
    interrupt = "Trainer(cfg, callback=lambda row: row['epoch'] == 2 and signal.raise_signal(signal.SIGINT))"
    outputs = run_cells(
        TRAINING, fit.format("shown", False), fit.format("quiet", True),
        f"try: {interrupt}.fit(batches)\nexcept BaseException as stopped: print(type(stopped).__name__)",
        "import sys\nprint('matplotlib.pyplot' in sys.modules and sys.modules['matplotlib.pyplot'].get_fignums())",
        "print(all(map(torch.equal, shown.model.state_dict().values(), quiet.model.state_dict().values())))",
    )
    page, = pages(outputs[1])
    assert page.count("data:image/png;base64,") == 1 and page.count("<table ") == 1
    assert page.index("<img") < page.index("<table ") and page.count("<tr>") == 1 + 3  # the head and each epoch
    assert len(page) < 60_000  # a notebook with several trainings stays small
    assert outputs[2] == []
    page, = pages(outputs[3])
    assert page.count("data:image/png;base64,") == 1 and page.count("<tr>") == 1 + 2
    assert outputs[4][0].text.strip() in ("False", "[]")  # no figure appears below a later cell
    assert outputs[5][0].text.strip() == "True"  # the weights of a training do not depend on what is shown


WITHOUT_WIDGETS = """
import sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("ipywidgets", "anywidget"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Missing())
"""
COMPARISON = """
from audiomaepp import Config, compare_losses, synthesize

base = Config.preset("nano", epochs=1, warmup_epochs=0, depth=1, decoder_depth=1)
lab = compare_losses(synthesize(n=2), {"plain": {}}, base=base)
"""


def test_no_warning_greets_a_user_without_widgets():
    outputs = run_cells(WITHOUT_WIDGETS, COMPARISON, "import huggingface_hub, umap")
    said = "".join(out.text for cell in outputs for out in cell if out.output_type == "stream")
    assert "Warning" not in said
    assert "100%" in said  # the progress bar, as text


def test_the_progress_of_a_comparison_is_a_widget_where_there_are_widgets():
    pytest.importorskip("ipywidgets", reason="needs ipywidgets: pip install 'audiomaepp[jupyter]'")
    *_, bars = run_cells(COMPARISON)
    assert any("application/vnd.jupyter.widget-view+json" in out.get("data", {}) for out in bars)
    assert not [out.text for out in bars if out.output_type == "stream"]


@pytest.mark.parametrize(
    "chapter, control, value", [("01_losses", "temperature", 0.5), ("02_model", "mask_ratio", 0.9)]
)
def test_a_slider_draws_the_picture_again(chapter, control, value):
    pytest.importorskip("ipywidgets", reason="needs ipywidgets: pip install 'audiomaepp[jupyter]'")
    code = [cell for cell in nbformat.read(ROOT / f"nbs/{chapter}.ipynb", 4).cells if cell.cell_type == "code"]
    at = next(i for i, cell in enumerate(code) if f"interact(show, {control}=" in cell.source)
    assert any("image/png" in out.get("data", {}) for out in code[at - 1].outputs)  # for pages without a kernel
    skip = "#| slow", "#| eval: false", "#| default_exp"
    cells = [cell.source for cell in code[:at] if not cell.source.startswith(skip)]
    *_, still, slider, moved, expected = run_cells(
        "%matplotlib inline", *cells, code[at].source, f"show.widget.children[0].value = {value}", f"show({value})"
    )
    assert pictures(slider) == pictures(still)
    assert pictures(moved) == pictures(expected) != pictures(still)
