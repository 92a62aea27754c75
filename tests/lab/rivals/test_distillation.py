"""The loss of knowledge distillation, against its definition."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from compressm.lab.rivals.distillation import distillation_loss


def test_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(7, 4, dtype=torch.float64, generator=generator) for _ in range(2))
    labels = torch.randint(4, (7,), generator=generator)
    T, w = 2.0, 0.3
    p, q = (teacher / T).softmax(-1), (student / T).softmax(-1)
    kl = (p * (p / q).log()).sum(-1).mean()
    hard = -student.log_softmax(-1)[torch.arange(7), labels].mean()
    torch.testing.assert_close(distillation_loss(student, teacher, labels, T, w), (1 - w) * hard + w * T**2 * kl)


def test_no_gradient_goes_into_the_teacher_and_none_comes_from_an_equal_one() -> None:
    student = torch.randn(5, 3, requires_grad=True)
    teacher = student.detach().clone().requires_grad_()
    labels = torch.zeros(5, dtype=torch.int64)
    distillation_loss(student, teacher, labels, 2.0, 0.5).backward()
    assert teacher.grad is None
    plain = student.detach().clone().requires_grad_()
    (0.5 * F.cross_entropy(plain, labels)).backward()
    torch.testing.assert_close(student.grad, plain.grad)
