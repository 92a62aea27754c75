"""Compression inside Lightning: the three lines are marked (1), (2), (3).

    python examples/lightning_lru.py [--quick]

Handwritten digits of scikit-learn (8 x 8 pixels), read pixel by pixel as sequences of length 64.
"""

import argparse

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from compressm.integrations.lightning import CompressionCallback  # (1)
from compressm.layers import SequenceClassifier, parameter_groups
from plain_pytorch import digits


class Classifier(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = SequenceClassifier(1, 10, d_model=16, d_state=64, norm="layer", r_min=0.9)

    def training_step(self, batch, index):
        u, y = batch
        return F.cross_entropy(self.net(u), y)

    def validation_step(self, batch, index):
        u, y = batch
        self.log("accuracy", (self.net(u).argmax(-1) == y).float().mean(), prog_bar=True)

    test_step = validation_step

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(parameter_groups(self.net, lr=4e-3, weight_decay=0.01))
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def main(quick: bool) -> float:
    pl.seed_everything(0)
    u, y, u_test, y_test = digits()
    train = DataLoader(TensorDataset(u[:1200], y[:1200]), batch_size=50, shuffle=True)
    validation = DataLoader(TensorDataset(u[1200:], y[1200:]), batch_size=200)
    test = DataLoader(TensorDataset(u_test, y_test), batch_size=200)
    compression = CompressionCallback(tolerance=0.04)  # (2)
    trainer = pl.Trainer(
        max_epochs=3 if quick else 60,
        accelerator="cpu",
        gradient_clip_val=1.0,
        callbacks=[compression, ModelCheckpoint(monitor="accuracy", mode="max")],  # (3)
        enable_progress_bar=not quick,
        logger=not quick,
        default_root_dir="runs/lightning_lru",
    )
    model = Classifier()
    trainer.fit(model, train, validation)
    for event in compression.compressor.history:
        print(event)
    # The best checkpoint may be of another size than the last weights: it loads all the same.
    (result,) = trainer.test(model, test, ckpt_path="best", verbose=False)
    print(f"test accuracy {result['accuracy']:.3f} with states {list(compression.compressor.state_dims.values())}")
    return result["accuracy"]


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="a few epochs only")
    main(parser.parse_args().quick)
