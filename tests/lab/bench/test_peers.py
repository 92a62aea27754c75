"""The peers compute what we compute; else their times would mean nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.nn import functional as F

from compressm.lab.bench import ours, peers_torch
from compressm.lab.bench.worker import Step


@pytest.mark.slow
def test_jax_classifier_learns_as_ours() -> None:
    """Same weights, same batch: the same losses over steps of Adam, and the same running statistics."""
    pytest.importorskip("jax")
    pytest.importorskip("equinox")
    pytest.importorskip("optax")
    from compressm.lab.bench import peers_jax

    model = ours.classifier(12, 6, layers=2)
    inputs, labels = ours.sequences(4, 50)
    theirs = peers_jax.Trainer(model, inputs, labels)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(5):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), labels)
        loss.backward()
        optimizer.step()
        assert theirs() == pytest.approx(loss.item(), rel=2e-5)  # float32, Adam's division by small roots
    network, running, _ = theirs._state
    for block, statistics in zip(model.blocks, running, strict=True):
        torch.testing.assert_close(torch.tensor(statistics[0].tolist()), block.norm.running_mean, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(torch.tensor(statistics[1].tolist()), block.norm.running_var, rtol=1e-4, atol=1e-5)
    # A gradient that is zero up to rounding moves Adam by a whole step either way: compare all but few such entries.
    moved = torch.tensor(network.blocks[0].ssm.B_re.tolist()) - model.blocks[0].ssm.B_re.detach()
    assert moved.abs().median() < 1e-6


def test_loops_equal_ours() -> None:
    for mine, loop, sizes in (
        (ours.selective, peers_torch.selective_loop, {"n": 3, "d": 5}),
        (ours.ssd, peers_torch.ssd_loop, {"n": 3, "heads": 2, "p": 4}),
        (ours.lti, peers_torch.lti_loop, {"n": 3, "width": 4}),
        (ours.siso, peers_torch.siso_loop, {"n": 3, "d": 4}),
        (ours.siso, peers_torch.siso_fft, {"n": 3, "d": 4}),
        (ours.convolution, peers_torch.convolution_direct, {"d": 4}),
        (ours.gla, peers_torch.gla_loop, {"n": 3, "heads": 2, "p": 4}),
        (ours.delta, peers_torch.delta_loop, {"n": 3, "heads": 2, "p": 4, "gated": True}),
        (ours.delta, peers_torch.delta_loop, {"n": 3, "heads": 2, "p": 4, "gated": False}),
    ):
        same_gradients(mine(**sizes, batch=2, length=20), loop(**sizes, batch=2, length=20))


@pytest.mark.slow
def test_a_step_imports_no_library() -> None:
    """Memory is counted from after the imports: what the first step imported would count as memory of the step."""
    code = (
        "import sys; from compressm.lab.bench import ours; before = set(sys.modules)\n"
        "ours.lru_training_step(4, 4, 1, 2, 16)(); ours.selective(4, 16, 1, 8)(); ours.ssd(4, 2, 4, 1, 8)()\n"
        "ours.gla(4, 2, 4, 1, 8)(); ours.delta(4, 2, 4, 1, 8, True)()\n"
        "print(len(set(sys.modules) - before))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 50  # torch.compile, with sympy, would be over 800


def test_hugging_faces_scans_equal_ours() -> None:
    pytest.importorskip("transformers", minversion="5.20")
    from compressm.lab.bench import peers_hf

    tensors = ours.selective_tensors(n=3, d=5, batch=2, length=20)
    u, delta, A, B, C = tensors
    theirs = peers_hf.MAMBA_SCAN(u.mT, delta.mT, A, B.mT, C.mT).mT
    torch.testing.assert_close(ours.selective_scan(*tensors), theirs, rtol=1e-4, atol=1e-5)
    sizes = {"n": 3, "heads": 2, "p": 4, "batch": 2, "length": 300}  # two of their chunks
    same_gradients(ours.ssd(**sizes), peers_hf.ssd(**sizes))
    for gated in (True, False):
        same_gradients(ours.delta(**sizes, gated=gated), peers_hf.delta(**sizes, gated=gated))


@pytest.mark.filterwarnings("ignore")  # of a machine without a GPU
def test_plain_functions_of_flash_linear_attention_equal_ours() -> None:
    pytest.importorskip("triton")
    pytest.importorskip("fla")
    from compressm.lab.bench import peers_fla

    sizes = {"n": 3, "heads": 2, "p": 4, "batch": 2, "length": 128}  # theirs want whole chunks
    same_gradients(ours.gla(**sizes), peers_fla.gla(**sizes))
    for gated in (True, False):
        same_gradients(ours.delta(**sizes, gated=gated), peers_fla.delta(**sizes, gated=gated))


def test_mixers_are_the_same_but_for_the_scan(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers", minversion="5.20")
    from compressm.lab.bench import peers_hf

    for module in (peers_hf.modeling_mamba, peers_hf.modeling_mamba2):
        for name in (
            "mamba_selective_scan",
            "mamba_inner_fn",
            "mamba2_chunk_scan",
            "mamba2_split_conv1d_scan_combined",
        ):
            if hasattr(module, name):  # what the benchmark exchanges in its own process is put back here
                monkeypatch.setattr(module, name, getattr(module, name))
    for mixer, sizes in (
        (peers_hf.mamba_mixer, {"n": 3, "d": 8}),
        (peers_hf.mamba2_mixer, {"n": 3, "heads": 4, "p": 2}),
    ):
        expected = mixer(**sizes, batch=2, length=20, scan="theirs")()
        # Built after theirs has run: the exchange is one for the whole module.
        got = mixer(**sizes, batch=2, length=20, scan="ours")()
        assert len(got) == len(expected) > 5
        for ours_, theirs in zip(got, expected, strict=True):
            torch.testing.assert_close(ours_, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))


def same_gradients(mine: Step, theirs: Step) -> None:
    for got, expected in zip(mine(), theirs(), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize("family", ["lru", "mamba2"])
def test_the_three_forms_of_a_step_compute_the_same(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime")
    from compressm.lab.bench import peers_onnx, steps

    monkeypatch.setattr(steps, "TOKENS", 3)
    threads = torch.get_num_threads()
    forms = [steps.stepped(family, 4, 2), peers_onnx.stepped(family, 4, 2)]
    if family == "lru":  # compilation takes most of a minute
        forms.append(steps.stepped(family, 4, 2, compiled=True))
    torch.set_num_threads(threads)
    truth, *others = [torch.as_tensor(form()) for form in forms]
    for other in others:
        torch.testing.assert_close(other, truth, rtol=1e-4, atol=1e-5)


def test_mamba2_is_cut_in_the_rows_of_a_training() -> None:
    """A step of a model that was cut, and a whole training in which it is; the losses of both ways are the same."""
    pytest.importorskip("transformers", minversion="5.20")
    from compressm.lab.bench import mamba2_training

    sizes = {"n": 12, "heads": 2, "p": 4, "layers": 1, "batch": 2, "length": 24}
    for cut_to in (None, 4):
        ours, theirs = (mamba2_training.training_step(**sizes, cut_to=cut_to, scan=s) for s in ("ours", "theirs"))
        for _ in range(2):
            assert ours() == pytest.approx(theirs(), rel=1e-4)
    mamba2_training.training_run(**sizes, scan="ours", steps=20, cut_to=4)()  # which asserts that it was cut
