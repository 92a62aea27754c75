"""Model cards, and the folder that goes to a hub, with the real huggingface_hub and no network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import compressm
from compressm.layers import LRU, SequenceClassifier
from compressm.saving.card import model_card

# Accuracies of so few digits cannot resolve a max_drop of 0, and setbacks end the cutting.
pytestmark = pytest.mark.filterwarnings("ignore::compressm.training.cushion.CushionWarning")

hub = pytest.importorskip("huggingface_hub")


def trained(model: nn.Module, **arguments: object) -> compressm.Compressor:
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    compressor = compressm.Compressor(model, optimizer, 16, cuts=2, window=0.5, **arguments)  # type: ignore[arg-type]
    for _ in range(16):
        u = torch.randn(2, 12, 1)
        F.mse_loss(model(u), torch.zeros(2, 3)).backward()
        optimizer.step()
        optimizer.zero_grad()
        compressor.step()
    return compressor


@pytest.mark.parametrize("layer", ["lru", "mamba"])
def test_a_card_tells_the_history(layer: str) -> None:
    torch.manual_seed(0)
    model = SequenceClassifier(1, 3, 4, 16, layer=layer)
    compressor = trained(model, states=4)
    text = model_card(model, compressor.history, compressor.savings())
    assert text.startswith("---\nlibrary_name: compressm\n")
    assert "| `blocks.0.ssm` | 16 | 4 |" in text
    assert "- step 4: `blocks.0.ssm` from 16 to 8 states; " in text
    assert ("its bound" if layer == "lru" else "least possible") in text
    assert " (an estimate)." in text
    card = hub.ModelCard(text)
    assert card.data.library_name == "compressm"
    assert "compressed" in card.data.tags


def test_roll_backs_are_told_too() -> None:
    torch.manual_seed(0)
    model = SequenceClassifier(1, 3, 4, 16)
    compressor = trained(
        model, states=8, max_drop=0.1, evaluate=lambda m: float(m.blocks[0].ssm.d_state == 16), check_after=2
    )
    text = model_card(model, compressor.history)
    assert "cut undone, back to step" in text
    assert "metric 0 against 1" in text
    assert "| `blocks.0.ssm` | 16 | 16 |" in text


def test_a_folder_is_saved_and_read_as_a_hub_does(tmp_path: Path) -> None:
    from compressm.integrations.hub import HubModel

    torch.manual_seed(0)
    model = SequenceClassifier(1, 3, 4, 16)
    compressor = trained(model.train(), states=4)
    HubModel(model, compressor).save_pretrained(tmp_path / "small")
    names = {path.name for path in (tmp_path / "small").iterdir()}
    assert {"README.md", "compressm.json", "model.safetensors"} <= names
    assert not any(name.endswith((".bin", ".pt", ".pkl")) for name in names)
    saved = json.loads((tmp_path / "small/compressm.json").read_text())
    assert [event["step"] for event in saved["history"] if event["kind"] == "cut"] == [4, 8]
    again = HubModel.from_pretrained(tmp_path / "small").model
    u = torch.randn(2, 9, 1)
    assert torch.equal(again(u), model.eval()(u))


def test_models_of_other_classes_say_how_they_are_loaded(tmp_path: Path) -> None:
    from compressm.integrations.hub import HubModel

    model = nn.Sequential(LRU(2, 8))
    compressm.compress(model, states=3)
    HubModel(model).save_pretrained(tmp_path / "mine")
    assert 'compressm.load("mine", model=Sequential(...))' in (tmp_path / "mine/README.md").read_text()
    again = HubModel.from_pretrained(tmp_path / "mine", model=nn.Sequential(LRU(2, 8))).model
    assert torch.equal(again(torch.ones(1, 5, 2)), model(torch.ones(1, 5, 2)))
