"""What an export wrote, and how well it agrees with the model."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how well it agrees with the model.

    Attributes:
        path: the file.
        format: ``"onnx"`` or ``"torch"``.
        step: whether it is one time step instead of the sequence model.
        int8: whether its weights are 8-bit integers.
        bytes: size of the file.
        max_error: largest absolute difference between its outputs and PyTorch's.
        largest_output: largest absolute output of PyTorch, to hold the error against.
        checked_steps: length of the sequences that were compared.
        inputs, outputs: names in the graph, with shapes.
        relative_error: root mean square of that difference over whole sequences, as a share of the standard deviation
            of PyTorch's outputs, each output's own where there are several. A simulation's FIT is lower by at most
            about this share.
        calibrated: whether the sequences that were compared were given, and not drawn at random.
        precisions: with int8, what became of every layer: ``"int8"``, ``"int8 weights"`` or ``"float32"``.
        costs: with int8, the relative error if only that layer were ``"int8"``; empty where all layers are.
    """

    path: str
    format: str
    step: bool
    int8: bool
    bytes: int
    max_error: float
    largest_output: float
    checked_steps: int
    inputs: dict[str, list[int | str]]
    outputs: tuple[str, ...]
    relative_error: float = 0.0
    calibrated: bool = False
    precisions: dict[str, str] = field(default_factory=dict[str, str])
    costs: dict[str, float] = field(default_factory=dict[str, float])

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "outputs": list(self.outputs)}

    def __str__(self) -> str:
        given = "the given sequences" if self.calibrated else "random inputs"
        lines = [
            f"{self.path}: {self.bytes / 1000:.0f} kB; largest error against PyTorch {self.max_error:.1e} over "
            f"{self.checked_steps} steps, where outputs reach {self.largest_output:.1e}"
        ]
        if self.int8:
            lines.append(
                f"8 bits change the outputs by {self.relative_error:.2%} of their standard deviation on {given}"
                + ("" if self.calibrated else ", which are not your data: check with some of those (--data)")
            )
        kept = {name: how for name, how in self.precisions.items() if how != "int8"}
        lines += [f"{name}: {how}; int8 alone would cost {self.costs[name]:.2%}" for name, how in kept.items()]
        return "\n".join(lines)


__all__ = ["ExportReport"]
