"""The animated picture of the README: an LRU of 64 states is cut while it learns handwritten digits.

    python scripts/cut_animation.py            draw docs/images/cut.png from results/cut_animation.json
    python scripts/cut_animation.py --measure  train first, a minute or two on two cores, and store that file

Every frame shows the eigenvalues (poles) of the layer, its Hankel singular values and the accuracy on held-out digits
at one training step, as recorded in the run. The picture is an animated PNG, drawn for a column of 390 pixels.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import math
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RECORD, PICTURE = ROOT / "results" / "cut_animation.json", ROOT / "docs" / "images" / "cut.png"
STEPS, STATES, EVERY = 2000, 64, 40
INK, BIG, SMALL, GONE, PALE = "#1d3557", "#8d99ae", "#0b6e4f", "#e07a1f", "#d9dee7"
MILLISECONDS, PAUSE = 120, 2500


def measure(path: Path) -> None:
    """Train the model twice, once with cuts and once without, and store what the frames show."""
    runs = {"shrunk": _train(cut=True), "full": _train(cut=False)}
    command = "python scripts/" + shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    path.write_text(json.dumps({"command": command, "steps": STEPS, **runs}) + "\n", encoding="utf-8")


def _train(cut: bool) -> list[dict[str, Any]]:
    """One training run; poles, Hankel singular values and accuracy at every `EVERY`-th step."""
    import torch

    import compressm
    from compressm.lab.config import DataConfig
    from compressm.lab.data.datasets import load_data
    from compressm.lab.data.sequences import BatchOrder
    from compressm.layers import SequenceClassifier, parameter_groups

    torch.manual_seed(0)
    data = load_data(DataConfig(name="digits", validation=0.25))
    model = SequenceClassifier(1, data.n_classes, d_model=16, d_state=STATES, r_min=0.5, dropout=0.1)
    optimizer = torch.optim.AdamW(parameter_groups(model, 4e-3, 0.01, 0.5))
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, [g["lr"] for g in optimizer.param_groups], STEPS)
    compressor = None
    if cut:
        compressor = compressm.Compressor(
            model, optimizer, STEPS, tolerance=0.05, cuts=4, window=0.5, scheduler=scheduler
        )
    order, frames = BatchOrder(len(data.train), 50, 0), list[dict[str, Any]]()
    for step in range(STEPS + 1):
        if step % EVERY == 0:
            frames.append({"step": step, **_look(model, data)})
        u, y = data.batch(data.train, order.indices(step))
        loss = torch.nn.functional.cross_entropy(model.train()(u), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step() if step < STEPS - 1 else None
        if compressor is not None and step < STEPS:
            compressor.step()
    return frames


def _look(model: Any, data: Any) -> dict[str, Any]:
    """The layer's poles and Hankel singular values, and the share of held-out digits that are classified right."""
    import torch

    import compressm
    from compressm.adapters import find_layers
    from compressm.lab.runs.tasks import learning_of, scores_on

    ((layer, _),) = find_layers(model).values()
    lam = torch.exp(torch.complex(-layer.nu_log.exp(), layer.theta_log.exp())).detach()
    (spectrum,) = compressm.analyze(model)
    accuracy = float(scores_on(learning_of("classification", None), model, data, data.validation, 500).mean())
    return {
        "poles": [[round(float(z.real), 4), round(float(z.imag), 4)] for z in lam],
        "hsv": [float(f"{float(value):.4g}") for value in spectrum.hsv.flatten()],
        "accuracy": round(accuracy, 4),
    }


def draw(record: Mapping[str, Any], picture: Path) -> None:
    """Draw all frames into one animated PNG. Programs that show no animations show the last one."""
    from PIL import Image

    frames = [Image.open(io.BytesIO(content)) for content in _frames(record)]
    palette = frames[-1].convert("RGB").quantize(64)
    small = [frame.convert("RGB").quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    durations = [MILLISECONDS] * (len(small) - 1) + [PAUSE]
    small[-1].save(
        picture, format="PNG", save_all=True, append_images=small, default_image=True, duration=durations, loop=0
    )


def _frames(record: Mapping[str, Any]) -> Iterator[bytes]:
    for index in range(len(record["shrunk"])):
        yield _frame(record, index)


def _frame(record: Mapping[str, Any], index: int) -> bytes:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    plt.rcParams.update({"font.size": 8.5, "axes.titlesize": 9.5, "axes.titlelocation": "left", "text.color": INK})
    figure = plt.figure(figsize=(3.9, 3.95), dpi=200, layout="constrained")
    grid = figure.add_gridspec(2, 2, height_ratios=(1.2, 1))
    shrunk, full = record["shrunk"], record["full"]
    _poles(figure.add_subplot(grid[0, 0]), shrunk, index)
    _spectrum(figure.add_subplot(grid[0, 1]), shrunk, index)
    _accuracy(figure.add_subplot(grid[1, :]), shrunk, full, index, record["steps"])
    content = io.BytesIO()
    figure.savefig(content, format="png")
    plt.close(figure)
    return content.getvalue()


def _poles(axis: Any, frames: Sequence[Mapping[str, Any]], index: int) -> None:
    """The poles in the unit disc; those from before a cut leave as rings that widen over three frames."""
    circle = [2 * math.pi * i / 200 for i in range(201)]
    axis.plot([math.cos(a) for a in circle], [math.sin(a) for a in circle], color=PALE, linewidth=1.2)
    now = frames[index]["poles"]
    for age in range(1, min(3, index) + 1):
        before, after = (frame["poles"] for frame in frames[index - age : index - age + 2])
        if len(before) > len(after):
            scale = 1 + 0.09 * (age - 1)
            axis.plot(
                [scale * x for x, _ in before], [scale * y for _, y in before], "o", markersize=4 + age,
                markerfacecolor="none", markeredgecolor=GONE, alpha=1.15 - 0.3 * age,
            )  # fmt: skip
    axis.plot([x for x, _ in now], [y for _, y in now], "o", color=SMALL, markersize=3.2)
    axis.set(xlim=(-1.25, 1.25), ylim=(-1.25, 1.25), aspect="equal", title=f"{len(now)} poles (eigenvalues)")
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)


def _spectrum(axis: Any, frames: Sequence[Mapping[str, Any]], index: int) -> None:
    """The Hankel singular values as bars, relative to the largest."""
    values = [value / frames[index]["hsv"][0] for value in frames[index]["hsv"]]
    axis.bar(range(1, len(values) + 1), values, width=1, color=SMALL, bottom=1e-4)
    axis.set(yscale="log", ylim=(1e-4, 2), xlim=(0, len(frames[0]["hsv"]) + 1), title="Hankel singular values")
    axis.set(xticks=[], yticks=[1, 1e-2, 1e-4])
    axis.minorticks_off()
    axis.spines[["top", "right"]].set_visible(False)


def _accuracy(axis: Any, shrunk: Any, full: Any, index: int, steps: int) -> None:
    """The accuracy on held-out digits so far: of the model that is cut, and in grey of the one that is not."""
    at = [frame["step"] for frame in full[: index + 1]]
    axis.plot(at, [100 * frame["accuracy"] for frame in full[: index + 1]], color=BIG, linewidth=1.6)
    axis.plot(at, [100 * frame["accuracy"] for frame in shrunk[: index + 1]], color=SMALL, linewidth=2)
    for before, after in itertools.pairwise(shrunk[: index + 1]):
        if len(after["poles"]) < len(before["poles"]):
            axis.axvline(before["step"], color=GONE, linewidth=1, linestyle=":")
    here, big = shrunk[index], full[index]
    axis.text(
        0.98, 0.30, f"{len(here['poles'])} states: {here['accuracy']:.1%}", color=SMALL, weight="bold",
        transform=axis.transAxes, ha="right",
    )  # fmt: skip
    axis.text(
        0.98, 0.13, f"{len(big['poles'])} states, uncut: {big['accuracy']:.1%}", color="#6b7688",
        transform=axis.transAxes, ha="right",
    )  # fmt: skip
    axis.set(xlim=(0, steps), ylim=(0, 103), title="Accuracy on held-out digits, %  (dotted: cuts)")
    axis.set_xticks([0, steps // 2, steps])
    axis.set(xticklabels=["0", f"step {steps // 2:,}", f"{steps:,}"], yticks=[0, 50, 100])
    axis.get_xticklabels()[-1].set_ha("right")
    axis.spines[["top", "right"]].set_visible(False)


def main() -> None:
    parser = argparse.ArgumentParser(description="The animated picture of the README.")
    parser.add_argument("--measure", action="store_true", help="train first, and store the record")
    parser.add_argument("--output", type=Path, default=PICTURE, help="where to draw it")
    arguments = parser.parse_args()
    if arguments.measure:
        measure(RECORD)
    draw(json.loads(RECORD.read_text(encoding="utf-8")), arguments.output)


if __name__ == "__main__":
    main()
