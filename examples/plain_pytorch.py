"""Compression in a plain PyTorch loop: the three lines are marked (1), (2), (3).

    python examples/plain_pytorch.py [--quick]

Handwritten digits of scikit-learn (8 x 8 pixels), read pixel by pixel as sequences of length 64.
"""

import argparse

import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F

import compressm  # (1)
from compressm.layers import SequenceClassifier, parameter_groups


def digits() -> tuple[torch.Tensor, ...]:
    """Training and test sequences (count, 64, 1) and labels, shuffled."""
    pixels, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    u, y = torch.tensor(pixels, dtype=torch.float32)[order, :, None] / 16, torch.tensor(labels)[order]
    return u[:1400], y[:1400], u[1400:], y[1400:]


def main(quick: bool) -> float:
    torch.manual_seed(0)
    steps = 60 if quick else 1500
    u, y, u_test, y_test = digits()
    model = SequenceClassifier(1, 10, d_model=16, d_state=64, norm="layer", r_min=0.9)
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=4e-3, weight_decay=0.01))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    compressor = compressm.Compressor(model, optimizer, steps, tolerance=0.04)  # (2)

    for _ in range(steps):
        batch = torch.randint(len(u), (50,))
        loss = F.cross_entropy(model(u[batch]), y[batch])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        if event := compressor.step():  # (3)
            print(event)

    model.eval()
    with torch.no_grad():
        accuracy = float((model(u_test).argmax(-1) == y_test).float().mean())
    print(f"test accuracy {accuracy:.3f} with states {list(compressor.state_dims.values())}")
    return accuracy


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="a few steps only")
    main(parser.parse_args().quick)
