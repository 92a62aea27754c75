"""Training loops whose cuts follow the gradients of the loss (``gramians="loss"``)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from compressm import Compressor
from compressm.layers import SequenceClassifier
from situations.own_loop import Autocast
from situations.trial import SCHEDULE, STEPS, Net, Trial, batch, row

HOST = "Cuts by the loss"


@row(HOST, "AdamW")
def _(trial: Trial) -> None:
    trial.loop(gramians="loss")


@row(HOST, "bfloat16 autocast")
def _(trial: Trial) -> None:
    model = Net()
    trial.loop(model, network=Autocast(model, torch.bfloat16), gramians="loss")


@row(HOST, "gradient scaler (weights are bitwise those without one)")
def _(trial: Trial) -> None:
    plain, scaled = Net(), Net()
    trial.loop(plain, gramians="loss")
    optimizer = torch.optim.AdamW(scaled.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=5)
    compressor = Compressor(scaled, optimizer, STEPS, gramians="loss", scaler=scaler, **SCHEDULE)
    for step in range(STEPS + 1):
        optimizer.zero_grad()
        scaler.scale(scaled(*batch(step))["loss"]).backward()
        scaler.step(optimizer)
        scaler.update()
        if step < STEPS:
            compressor.step()
    trial.cut(compressor)
    trial.same(scaled, plain)


@row(HOST, "accumulated batches, with loss_scale")
def _(trial: Trial) -> None:
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    compressor = Compressor(model, optimizer, STEPS, gramians="loss", loss_scale=1 / 3, **SCHEDULE)
    for step in range(STEPS):
        optimizer.zero_grad()
        for part in range(3):
            (model(*batch(3 * step + part))["loss"] / 3).backward()
        optimizer.step()
        compressor.step()
    trial.cut(compressor)


@row(HOST, "gradient checkpointing (weights are bitwise those without)")
def _(trial: Trial) -> None:
    class Checkpointed(Net):
        def forward(self, u: Tensor, labels: Tensor) -> Any:
            return checkpoint(super().forward, u, labels, use_reentrant=False)

    plain, checkpointed = Net(), Checkpointed()
    for model in (plain, checkpointed):
        trial.loop(model, gramians="loss")
    trial.same(checkpointed, plain)


@row(HOST, "torch.compile, the model in a wrapper")
def _(trial: Trial) -> None:
    torch._dynamo.reset()
    model = Net()
    trial.loop(model, network=torch.compile(model, backend="eager"), gramians="loss")


@row(HOST, "a layer whose parameters are frozen")
def _(trial: Trial) -> None:
    model = Net()
    model.linear.requires_grad_(False)
    trial.loop(model, gramians="loss")


@row(HOST, "padded sequences (what stands at the padding changes nothing)")
def _(trial: Trial) -> None:
    models = [padded(trial, filling) for filling in (0.0, 5.0)]
    trial.same(*models)


def padded(trial: Trial, filling: float) -> nn.Module:
    """Train a classifier on sequences of several lengths, with this at their padding."""
    torch.manual_seed(0)
    model = SequenceClassifier(1, 2, d_model=4, d_state=16, n_layers=2, r_min=0.9, dropout=0.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    compressor = Compressor(model, optimizer, STEPS, gramians="loss", **SCHEDULE)
    lengths = torch.tensor([12, 9, 5, 7])
    for step in range(STEPS):
        u, labels = batch(step)
        u = u.masked_fill(torch.arange(12)[None, :, None] >= lengths[:, None, None], filling)
        optimizer.zero_grad()
        F.cross_entropy(model(u, lengths), labels).backward()
        optimizer.step()
        compressor.step()
    trial.cut(compressor)
    return model


@row(HOST, "Hugging Face Mamba-2 with LoRA")
def _(trial: Trial) -> None:
    import peft
    import transformers

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 8, "state_size": 16, "num_hidden_layers": 2, "vocab_size": 32}
    heads: dict[str, Any] = {"num_heads": 2, "head_dim": 8, "n_groups": 1, "chunk_size": 8}
    base = transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**sizes, **heads))
    model: Any = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["in_proj"]))
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-2)
    compressor = Compressor(model.train(), optimizer, STEPS, gramians="loss", loss_terms="tokens", **SCHEDULE)
    for step in range(STEPS):
        tokens = torch.randint(3, 32, (4, 12), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        compressor.step()
    trial.cut(compressor)


@row(HOST, "loss_terms='tokens' with padded labels")
def _(trial: Trial) -> None:
    import transformers

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"hidden_size": 8, "state_size": 16, "num_hidden_layers": 2, "vocab_size": 32}
    model: Any = transformers.MambaForCausalLM(transformers.MambaConfig(**sizes, use_mambapy=False)).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    compressor = Compressor(model, optimizer, STEPS, gramians="loss", loss_terms="tokens", **SCHEDULE)
    present = torch.ones(4, 12, dtype=torch.long)
    present[::2, 8:] = 0
    for step in range(STEPS):
        tokens = torch.randint(3, 32, (4, 12), generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        labels = tokens.masked_fill(present == 0, -100)
        model(input_ids=tokens, attention_mask=present, labels=labels).loss.backward()
        optimizer.step()
        compressor.step()
    trial.cut(compressor)
