"""The notebook docs/quickstart.ipynb, its code run from top to bottom."""

import json
from pathlib import Path

import torch
from PIL import Image

NOTEBOOK = Path(__file__).parents[2] / "docs" / "quickstart.ipynb"


def test_the_cells_run_from_top_to_bottom(monkeypatch):
    """In this process, without a kernel: the cells are plain Python, and a kernel takes longer to start."""
    monkeypatch.chdir(NOTEBOOK.parent)
    cells = [cell for cell in json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] for cell in cells), "outputs are not kept in the repository"
    names: dict = {}
    for cell in cells:
        exec(compile("".join(cell["source"]), str(NOTEBOOK), "exec"), names)
    assert names["latents"].shape == (4, 8, 16, 16) and 26 < names["ratios"].mean() < 32
    assert [image.size for image in names["images"]] == [(128, 128)] * 4
    assert all(isinstance(image, Image.Image) for image in names["plain"])
    assert torch.isfinite(names["distances"]).all() and len(names["found"]) == 4
