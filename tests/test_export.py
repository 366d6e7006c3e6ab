"""The exported embedding path gives the embeddings of the model, in onnxruntime too, for batches of any size."""

import numpy as np
import pytest
import torch

from audiomaepp.config import Config
from audiomaepp.export import export_onnx, export_program
from audiomaepp.model import AudioMAEPlusPlus

KINDS = {
    "macaron": dict(),
    "plain, rope": dict(block="plain", rope=True, pooling_mode="cls+mean"),
    "grid places": dict(grid_shifts=2, pooling_mode="cls"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_onnx(tmp_path, kind):
    """Whoever serves the file would index vectors that the training never produced."""
    onnxruntime = pytest.importorskip("onnxruntime")
    torch.manual_seed(0)
    model = AudioMAEPlusPlus(Config.preset("nano", depth=2, **KINDS[kind])).eval()
    export_onnx(model, tmp_path / "served" / "model.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "served" / "model.onnx")
    for batch in (1, 5):
        spec = torch.randn(batch, 1, 200, 80)
        with torch.no_grad():
            ours = model.get_embedding(spec).numpy()
        served = session.run(["embedding"], {"spec": spec.numpy()})[0]
        assert np.abs(served - ours).max() <= 1e-4 * np.abs(ours).max()


def test_program_is_saved_and_read(tmp_path):
    model = AudioMAEPlusPlus(Config.preset("nano", depth=1)).eval()
    torch.export.save(export_program(model, "frame"), tmp_path / "model.pt2")
    again, spec = torch.export.load(tmp_path / "model.pt2").module(), torch.randn(3, 1, 200, 80)
    with torch.no_grad():
        torch.testing.assert_close(again(spec), model.get_embedding(spec, "frame"))


def test_compiles_in_one_graph():
    """A graph break in the encoder costs whoever compiles it most of what compiling would gain."""
    spec, labels = torch.randn(4, 1, 200, 80), torch.tensor([0, 0, 1, 1])
    model = AudioMAEPlusPlus(Config.preset("nano", depth=1))
    for function, args in ((model.encode, (spec,)), (model.get_embedding, (spec,)), (model, (spec, labels))):
        torch._dynamo.reset()
        found = torch._dynamo.explain(function)(*args)
        assert (found.graph_count, found.graph_break_count) == (1, 0)
