"""Knowledge distillation (Hinton, Vinyals and Dean 2015, arXiv 1503.02531): a small model learns from a big one.

    loss = (1 - w) CE(student, labels) + w T^2 KL(softmax(teacher / T) || softmax(student / T))

The teacher is trained before, and gives its opinion on every batch, in evaluation mode.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def distillation_loss(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float, weight: float) -> Tensor:
    """The loss above.

    Args:
        student, teacher: logits, shape ``(batch, classes)``; no gradient goes into the teacher's.
        labels: shape ``(batch,)``, int64.
        temperature: ``T``, positive.
        weight: ``w``, from 0 (labels alone) to 1 (the teacher alone).
    """
    soft = F.kl_div(
        F.log_softmax(student / temperature, -1),
        F.log_softmax(teacher.detach() / temperature, -1),
        reduction="batchmean",
        log_target=True,
    )
    return (1 - weight) * F.cross_entropy(student, labels) + weight * temperature**2 * soft


__all__ = ["distillation_loss"]
