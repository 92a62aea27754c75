"""Sequential MNIST by the CompreSSM authors' own training loop: what their published code comes to, on its own terms.

    git clone https://github.com/camail-official/compressm CHECKOUT
    pip install jax equinox optax scipy pyyaml tqdm
    python benchmarks/published_code.py CHECKOUT --data DIRECTORY --states 28 --steps 5000

Their ``train`` runs as it is, with the values of their ``configs/paper/smnist_baseline.yaml`` but for the state
dimension and the number of steps. Only the images are read here, from the four original files, and split as theirs
are, so that torchvision, torchtext, datasets and pillow, which their loaders import, are not needed; and where they
evaluate, the training data are not gone through. Both packages are called compressm: this file imports theirs, and
nothing of ours. Writes ``results/published_code-STATES.json``.
"""

from __future__ import annotations

import argparse
import gzip
import json
import platform
import sys
import tempfile
import time
import types
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np
import yaml

FILES = {"train": "train", "test": "t10k"}


def load_images(folder: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    """Pixels from 0 to 1, float32 of shape (N, 784, 1), and one-hot labels, float32 of shape (N, 10)."""
    with gzip.open(folder / f"{FILES[split]}-images-idx3-ubyte.gz") as file:
        pixels = np.frombuffer(file.read(), np.uint8, offset=16).reshape(-1, 784, 1)
    with gzip.open(folder / f"{FILES[split]}-labels-idx1-ubyte.gz") as file:
        labels = np.frombuffer(file.read(), np.uint8, offset=8)
    return pixels.astype(np.float32) / 255, np.eye(10, dtype=np.float32)[labels]


def import_theirs(checkout: Path) -> types.ModuleType:
    """Their trainer, with empty modules for what only their loaders use."""
    for name in ("torchvision", "torchtext", "datasets", "PIL"):
        module = types.ModuleType(name)
        for attribute in ("transforms", "vocab", "load_dataset", "DatasetDict", "Image"):
            setattr(module, attribute, None)
        sys.modules[name] = module
    sys.path.insert(0, str(checkout))
    from compressm.lab.runs import trainer

    if Path(trainer.__file__).resolve().is_relative_to(checkout.resolve()):
        return trainer
    sys.exit(f"{checkout} holds no package compressm; found {trainer.__file__} instead")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--states", type=int, default=28)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--every", type=int, default=5000, help="steps between evaluations (theirs: 5000)")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--results", type=Path)
    a = parser.parse_args()
    trainer = import_theirs(a.checkout)
    from compressm.data.dataloaders import Dataloader
    from compressm.data.datasets import Dataset

    x, y = load_images(a.data, "train")
    order = np.asarray(jax.random.permutation(jax.random.split(jax.random.PRNGKey(a.seed))[0], len(x)))
    held_out, kept = order[: len(x) // 10], order[len(x) // 10 :]
    splits = {"train": (x[kept], y[kept]), "val": (x[held_out], y[held_out]), "test": load_images(a.data, "test")}
    loaders = {name: Dataloader(*arrays) for name, arrays in splits.items()}
    loaders["train"].loop_epoch = loaders["val"].loop_epoch  # minutes each time, and nothing depends on it
    config = yaml.safe_load((a.checkout / "configs/paper/smnist_baseline.yaml").read_text(encoding="utf-8"))
    model = {**config["model"], "state_dim": a.states}
    training = {**config["training"], "num_steps": a.steps, "eval_steps": a.every, "seed": a.seed}
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as output:
        trained = trainer.train(
            Dataset("smnist", loaders, 1, 10, 784),
            trainer.TrainingConfig(**training),
            trainer.ModelConfig(**model),
            trainer.ReductionConfig(**config["reduction"]),
            output_dir=output,
        )
        metrics = json.loads((Path(output) / "metrics.json").read_text(encoding="utf-8"))
    analysis = trained.get_reduction_analysis(trained.get_all_hankel_singular_values(), 0.98)["block_0"]
    energy = np.asarray(analysis["cumulative_energy"])
    result = {
        "command": f"python benchmarks/published_code.py CHECKOUT --data DIRECTORY --states {a.states} "
        f"--steps {a.steps} --every {a.every} --seed {a.seed}",
        "versions": {"python": platform.python_version(), **{n: version(n) for n in ("jax", "equinox", "optax")}},
        "model": model,
        "training": training,
        "seconds": time.perf_counter() - started,
        "metrics": {key: metrics[key] for key in ("steps", "val_accuracy", "test_accuracy", "best_step")},
        "ranks": {str(tau): int(np.argmax(energy >= 1 - tau)) + 1 for tau in (0.01, 0.02, 0.04)},
    }
    path = a.results or Path(f"results/published_code-{a.states}.json")
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({key: result[key] for key in ("seconds", "metrics", "ranks")}, indent=1))


if __name__ == "__main__":
    main()
