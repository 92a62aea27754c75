"""The pictures of the explanations: what a state is worth, and what a cut does to a layer's memory.

    python benchmarks/method_figures.py

A layer of 24 states whose modes partly repeat each other, drawn with seed 0. Writes docs/images/worth.svg and
docs/images/kernels.svg.
"""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib
import torch

from compressm.theory.balancing import balance, truncate
from compressm.theory.pruning import prune
from compressm.theory.systems import DiagonalSystem

matplotlib.use("Agg")
from matplotlib import pyplot as plt

IMAGES = Path(__file__).parents[1] / "docs" / "images"
KEPT = 6
GREEN, GREY, RED, BLUE = "#009e73", "#8d99ae", "#d55e00", "#0072b2"


def layer() -> DiagonalSystem:
    """24 modes in groups that nearly repeat each other; some are hard to reach, some hard to see."""
    generator = torch.Generator().manual_seed(0)
    groups = torch.arange(24) // 4
    radius = 0.75 + 0.23 * torch.rand(6, generator=generator, dtype=torch.float64)
    phase = math.pi * torch.rand(6, generator=generator, dtype=torch.float64)
    jitter = 0.02 * torch.randn(24, 2, generator=generator, dtype=torch.float64)
    lam = torch.polar((radius[groups] + jitter[:, 0]).clamp(max=0.985), phase[groups] + jitter[:, 1])
    scale = 10 ** (1.2 * torch.randn(24, 2, generator=generator, dtype=torch.float64) - 0.5)
    B = torch.randn(24, 2, generator=generator, dtype=torch.complex128) * scale[:, :1].clamp(max=1)
    C = torch.randn(2, 24, generator=generator, dtype=torch.complex128) * scale[:, 1].clamp(max=1)
    return DiagonalSystem(lam, B * (1 - lam.abs().square()).sqrt()[:, None], C)


def main() -> None:
    """Draw both."""
    plt.rcParams.update(
        {"font.size": 9, "svg.hashsalt": "compressm", "axes.spines.top": False, "axes.spines.right": False}
    )
    system = layer()
    balancing = balance(system)
    reach = (system.B.norm(dim=1) / (1 - system.lam.abs().square()).sqrt()).tolist()
    see = (system.C.norm(dim=0) / (1 - system.lam.abs().square()).sqrt()).tolist()
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    left.loglog(reach, see, "o", color=BLUE)
    left.set(
        xlabel="how far inputs drive it",
        ylabel="how much of it the output shows",
        title="24 states of a layer, as they are",
    )
    energy = balancing.energy / balancing.energy.sum()
    colours = [GREEN if index < KEPT else GREY for index in range(system.n)]
    right.bar(range(1, system.n + 1), energy.tolist(), color=colours)
    right.set(yscale="log", xlabel="direction of the state, in order", ylabel="share of the Hankel energy")
    right.set(title=f"the same layer, balanced: {KEPT} directions hold {float(energy[:KEPT].sum()):.1%}")
    figure.savefig(IMAGES / "worth.svg", metadata={"Date": None})

    kernel = system.kernel(60)[:, 0, 0]
    balanced, modal = truncate(balancing, KEPT), prune(system, KEPT, "modal")
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained", sharey=True)
    for axis, reduction, name, colour in (
        (axes[0], balanced, "balanced truncation", GREEN),
        (axes[1], modal, "the six states that last longest", RED),
    ):
        error = float(system.minus(reduction.system).h2_norm() / system.h2_norm())
        axis.plot(kernel.tolist(), color=GREY, linewidth=3, label=f"{system.n} states")
        axis.plot(reduction.system.kernel(60)[:, 0, 0].tolist(), color=colour, linewidth=1.2, label=f"{KEPT} states")
        axis.set(title=f"{name}: error {error:.0%}", xlabel="steps after an impulse")
        axis.legend(frameon=False)
    axes[0].set(ylabel="output")
    figure.savefig(IMAGES / "kernels.svg", metadata={"Date": None})
    print(
        f"balanced: H∞ error {balanced.certificate.hinf_error:.3g}, promised at most {balanced.certificate.bound:.3g}"
    )


if __name__ == "__main__":
    main()
