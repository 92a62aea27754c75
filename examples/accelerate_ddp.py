"""Compression with Accelerate in several processes: the three lines are marked (1), (2), (3).

    torchrun --nproc-per-node 2 examples/accelerate_ddp.py [--quick]     two processes, on the CPU or one GPU each
    python examples/accelerate_ddp.py [--quick]                          one process

Handwritten digits of scikit-learn (8 x 8 pixels), read pixel by pixel as sequences of length 64.
"""

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import compressm  # (1)
from compressm.layers import SequenceClassifier, parameter_groups
from plain_pytorch import digits


def main(quick: bool) -> float:
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    set_seed(0)
    u, y, u_test, y_test = digits()
    epochs, world = 3 if quick else 60, accelerator.num_processes
    train = DataLoader(TensorDataset(u, y), batch_size=50 // world, shuffle=True, drop_last=True)
    test = DataLoader(TensorDataset(u_test, y_test), batch_size=200)
    model = SequenceClassifier(1, 10, d_model=16, d_state=64, norm="layer", r_min=0.9)
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=4e-3, weight_decay=0.01))
    model, optimizer, train, test = accelerator.prepare(model, optimizer, train, test)
    steps = epochs * len(train)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer.optimizer, steps)
    compressor = compressm.Compressor(model, optimizer, steps, tolerance=0.04, scheduler=scheduler)  # (2)

    for _ in range(epochs):
        model.train()
        for batch, labels in train:
            loss = F.cross_entropy(model(batch), labels)
            optimizer.zero_grad()
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            if event := compressor.step():  # (3) all processes make the same cut
                accelerator.print(event)

    model.eval()
    hits = []
    with torch.no_grad():
        for batch, labels in test:
            hits.append(accelerator.gather_for_metrics(model(batch).argmax(-1) == labels))
    accuracy = float(torch.cat(hits).float().mean())
    accelerator.print(f"test accuracy {accuracy:.3f} with states {list(compressor.state_dims.values())}")
    accelerator.end_training()
    return accuracy


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="a few epochs only")
    main(parser.parse_args().quick)
