"""Recognise a spoken digit with a compressed model, sample by sample, as a small device would.

    python recognise.py model-step.onnx seven.wav          # 8 kHz mono WAV, 16 bit

Needs only onnxruntime and numpy. Every 10 ms of audio go through the exported step, whose state is handed back to it;
after every step the logits are those of the sound so far.
"""

from __future__ import annotations

import argparse
import sys
import time
import wave
from pathlib import Path

import numpy as np
import onnxruntime

RATE, HOP, WINDOW, BANDS = 8000, 80, 200, 24  # a frame of 25 ms every 10 ms


def mel_filters(size: int = 256) -> np.ndarray:
    """Triangles, evenly spaced on the mel scale up to 4 kHz; shape ``(bands, size // 2 + 1)``."""
    top = 2595 * np.log10(1 + RATE / 2 / 700)
    edges = 700 * (10 ** (np.linspace(0, top, BANDS + 2) / 2595) - 1)
    frequency = np.fft.rfftfreq(size, 1 / RATE)
    rising = (frequency - edges[:-2, None]) / (edges[1:-1] - edges[:-2])[:, None]
    falling = (edges[2:, None] - frequency) / (edges[2:] - edges[1:-1])[:, None]
    return np.maximum(0, np.minimum(rising, falling))


FILTERS, TAPER = mel_filters(), np.hanning(WINDOW)


def log_mel(frame: np.ndarray) -> np.ndarray:
    """Features of frames ``(..., 200)`` with samples in [-1, 1]: ``(..., 24)``, float32, roughly in [-1, 1]."""
    power = np.abs(np.fft.rfft(frame * TAPER, 256)) ** 2
    return (np.log10(power @ FILTERS.T + 1e-6) / 3).astype(np.float32)


def read_wav(path: Path) -> np.ndarray:
    """Samples in [-1, 1].

    Raises:
        ValueError: not an 8 kHz mono WAV file of 16 bits, or shorter than one frame.
    """
    try:
        with wave.open(str(path)) as file:
            kind = file.getframerate(), file.getnchannels(), 8 * file.getsampwidth()
            samples = np.frombuffer(file.readframes(file.getnframes()), "<i2" if kind[2] == 16 else "u1")
    except (wave.Error, EOFError) as error:
        raise ValueError(f"{path}: not a WAV file ({error})") from error
    if kind != (RATE, 1, 16):
        raise ValueError(f"{path}: {kind[0]} Hz, {kind[1]} channels, {kind[2]} bits; convert it to 8000 Hz, 1, 16")
    if len(samples) < WINDOW:
        raise ValueError(f"{path}: {len(samples)} samples; at least {WINDOW} are needed")
    return samples / 32768


def frames(samples: np.ndarray) -> np.ndarray:
    """A view of shape ``(steps, 200)``."""
    return np.lib.stride_tricks.sliding_window_view(samples, WINDOW)[::HOP]


class Recogniser:
    """An exported step with its state."""

    def __init__(self, path: Path) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        self.names = [node.name for node in self.session.get_inputs()][1:]
        self.reset()

    def reset(self) -> None:
        """Forget everything heard."""
        shapes = [node.shape[1:] for node in self.session.get_inputs()][1:]
        self.state = {name: np.zeros((1, *shape), np.float32) for name, shape in zip(self.names, shapes, strict=True)}

    def step(self, features: np.ndarray) -> np.ndarray:
        """The logits after one more frame, shape ``(10,)``."""
        logits, *state = self.session.run(None, {"input": features[None], **self.state})
        self.state = dict(zip(self.names, state, strict=True))
        return logits[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("wav", type=Path, nargs="+")
    arguments = parser.parse_args()
    recogniser = Recogniser(arguments.model)
    for path in arguments.wav:
        try:
            heard = frames(read_wav(path))
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        recogniser.reset()
        seconds, logits = [], np.zeros(10)
        for frame in heard:
            features = log_mel(frame)
            started = time.perf_counter()
            logits = recogniser.step(features)
            seconds.append(time.perf_counter() - started)
        odds = np.exp(logits - logits.max())
        print(
            f"{path.name}: {logits.argmax()}  (probability {odds.max() / odds.sum():.2f}, {len(heard)} steps of 10 ms, "
            f"{1e6 * np.median(seconds):.0f} microseconds each)"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
