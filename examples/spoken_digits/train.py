"""Spoken digits, end to end: train an LRU classifier, shrink it meanwhile, export one time step of it to ONNX.

    git clone https://github.com/Jakobovski/free-spoken-digit-dataset
    pip install "compressm[deploy]"
    python train.py --data free-spoken-digit-dataset/recordings --output digits
    python recognise.py digits/model-step.onnx free-spoken-digit-dataset/recordings/7_theo_0.wav

Free Spoken Digit Dataset, CC BY-SA 4.0: 3000 recordings, 8 kHz, 6 speakers, named DIGIT_SPEAKER_TAKE.wav. One speaker
is never heard in training and tests how well the model does for a stranger. Of the others, takes 0 to 4 are the test
set of the data's authors and takes 5 to 9 the validation set, the only one that any setting here was chosen on.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from recognise import BANDS, Recogniser, frames, log_mel, read_wav
from torch.nn import functional as F

import compressm
from compressm.layers import SequenceClassifier, parameter_groups
from compressm.saving.export import to_onnx


@dataclass(frozen=True)
class Clip:
    features: np.ndarray  # (steps, bands)
    digit: int


def load(folder: Path, stranger: str) -> dict[str, list[Clip]]:
    """All recordings as features, by part: train, validation, test and stranger."""
    parts: dict[str, list[Clip]] = {"train": [], "validation": [], "test": [], "stranger": []}
    for path in sorted(folder.glob("*_*_*.wav")):
        digit, speaker, take = path.stem.split("_")
        known = "test" if int(take) < 5 else "validation" if int(take) < 10 else "train"
        clip = Clip(log_mel(frames(read_wav(path))), int(digit))
        parts["stranger" if speaker == stranger else known].append(clip)
    for part, clips in parts.items():
        if not clips:
            sys.exit(f"error: {folder} holds no recordings for the part '{part}'; see the top of {Path(__file__).name}")
    return parts


def batches(clips: list[Clip], size: int, generator: np.random.Generator):
    """One epoch. Clips of like length go together, cut to the shortest of them: nothing is padded."""
    order = np.argsort([len(clip.features) * generator.uniform(0.95, 1.05) for clip in clips])
    groups = np.split(order, range(size, len(order), size))
    for index in generator.permutation(len(groups)):
        chosen = [clips[i] for i in groups[index]]
        length = min(len(clip.features) for clip in chosen)
        starts = [generator.integers(len(clip.features) - length + 1) for clip in chosen]
        u = np.stack([clip.features[at : at + length] for at, clip in zip(starts, chosen, strict=True)])
        loudness = generator.normal(0, 0.15, (len(chosen), 1, 1))
        noise = generator.normal(0, 0.05, u.shape)
        yield torch.from_numpy(u + loudness + noise).float(), torch.tensor([clip.digit for clip in chosen])


@torch.no_grad()
def accuracy(model: SequenceClassifier, clips: list[Clip]) -> float:
    training = model.training
    model.eval()
    right = [int(model(torch.from_numpy(clip.features)[None]).argmax()) == clip.digit for clip in clips]
    model.train(training)
    return sum(right) / len(right)


def exported_accuracy(path: Path, clips: list[Clip]) -> float:
    """The accuracy of the exported step, run frame by frame in ONNX Runtime."""
    recogniser, right = Recogniser(path), 0
    for clip in clips:
        recogniser.reset()
        logits = [recogniser.step(features) for features in clip.features][-1]
        right += int(logits.argmax()) == clip.digit
    return right / len(clips)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with the recordings")
    parser.add_argument("--output", type=Path, default=Path("digits"))
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--states", type=int, default=128, help="states per layer at the start")
    parser.add_argument("--tolerance", type=float, default=0.05, help="Hankel energy that each cut may discard")
    parser.add_argument("--no-compression", action="store_true", help="stay big, for comparison")
    parser.add_argument("--stranger", default="theo", help="the speaker who is never heard in training")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()

    parts = load(arguments.data, arguments.stranger)
    print(", ".join(f"{part} {len(clips)}" for part, clips in parts.items()))
    torch.manual_seed(arguments.seed)
    generator = np.random.default_rng(arguments.seed)
    model = SequenceClassifier(BANDS, 10, d_model=32, d_state=arguments.states, n_layers=2, r_min=0.5)
    optimizer = torch.optim.AdamW(parameter_groups(model, 4e-3, weight_decay=0.05, ssm_lr_factor=0.5))
    rates = [group["lr"] for group in optimizer.param_groups]
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, rates, arguments.steps)
    compressor = compressm.Compressor(model, optimizer, arguments.steps, tolerance=arguments.tolerance)

    started, step = time.perf_counter(), 0
    while step < arguments.steps:
        for u, digits in batches(parts["train"], 32, generator):
            loss = F.cross_entropy(model(u), digits, label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            scheduler.step()
            if not arguments.no_compression and (event := compressor.step()) and event.kind == "cut":
                print(f"step {event.step}: states {list(compressor.state_dims.values())}")
            step += 1
            if step % 400 == 0:
                print(f"step {step}: loss {loss.item():.3f}, validation {accuracy(model, parts['validation']):.1%}")
            if step == arguments.steps:
                break
    seconds = time.perf_counter() - started

    model.eval()
    compressm.save(model, arguments.output / "model")
    example = torch.from_numpy(np.concatenate([clip.features for clip in parts["validation"]])[None, :1000])
    result = {"seconds": seconds, "state_dims": list(compressor.state_dims.values()), "seed": arguments.seed}
    for name, int8 in (("model-step.onnx", False), ("model-step-int8.onnx", True)):
        report = to_onnx(model, arguments.output / name, step=True, int8=int8, example=example)
        scores = {part: exported_accuracy(arguments.output / name, parts[part]) for part in list(parts)[1:]}
        result[name] = {"bytes": report.bytes, "max_error": report.max_error, **scores}
        print(f"{name}: {report.bytes / 1000:.0f} kB; " + ", ".join(f"{p} {score:.1%}" for p, score in scores.items()))
    (arguments.output / "result.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"trained in {seconds:.0f} s; states per layer {result['state_dims']}")


if __name__ == "__main__":
    main()
