"""The LRU peer: the same classifier and the same training step in JAX and Equinox, on `jax.lax.associative_scan`.

This is how LRUs are commonly trained in JAX (the CompreSSM paper's code among others): the recurrence as a parallel
prefix over complex64 states, mapped over the batch, everything compiled into one step with Adam from optax, buffers
donated. Of the ways to write it the quickest was kept: see `LRU`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax import Array

from compressm.lab.bench.ours import classifier, sequences
from compressm.lab.bench.worker import Step

jax.devices()  # loads the backend before memory is measured

Statistics = tuple[Array, Array]
"""Running mean and variance of a batch norm."""


class LRU(eqx.Module):
    """``x_k = lam x_{k-1} + gamma B u_k``, ``y_k = Re(C x_k) + D u_k``; the parameters of `compressm.layers.LRU`."""

    nu_log: Array
    theta_log: Array
    gamma_log: Array
    B_re: Array
    B_im: Array
    C_re: Array
    C_im: Array
    D: Array

    def __call__(self, u: Array) -> Array:
        """Shapes ``(batch, length, width)``."""
        lam = jnp.exp(-jnp.exp(self.nu_log) + 1j * jnp.exp(self.theta_log))
        gamma = jnp.exp(self.gamma_log)[:, None]
        driven = jax.lax.complex(u @ (gamma * self.B_re).T, u @ (gamma * self.B_im).T)
        powers = jnp.broadcast_to(lam, driven.shape[1:])
        states = jax.vmap(lambda sequence: jax.lax.associative_scan(_combine, (powers, sequence))[1])(driven)
        return states.real @ self.C_re.T - states.imag @ self.C_im.T + self.D * u


def _combine(earlier: tuple[Array, Array], later: tuple[Array, Array]) -> tuple[Array, Array]:
    return later[0] * earlier[0], later[0] * earlier[1] + later[1]


class Linear(eqx.Module):
    """``W x + b`` on the last axis."""

    weight: Array
    bias: Array

    def __call__(self, x: Array) -> Array:
        return x @ self.weight.T + self.bias


class BatchNorm(eqx.Module):
    """Batch norm over batch and time, in training; returns the running statistics too, as PyTorch updates them."""

    weight: Array
    bias: Array

    def __call__(self, x: Array, running: Statistics) -> tuple[Array, Statistics]:
        mean, variance = x.mean((0, 1)), x.var((0, 1))
        count = x.shape[0] * x.shape[1]
        running = (0.9 * running[0] + 0.1 * mean, 0.9 * running[1] + 0.1 * variance * count / (count - 1))
        return (x - mean) * jax.lax.rsqrt(variance + 1e-5) * self.weight + self.bias, running


class Block(eqx.Module):
    """Norm, LRU, GELU, GLU, around a residual connection."""

    norm: BatchNorm
    ssm: LRU
    glu: Linear

    def __call__(self, u: Array, running: Statistics) -> tuple[Array, Statistics]:
        z, running = self.norm(u, running)
        value, gate = jnp.split(self.glu(jax.nn.gelu(self.ssm(z), approximate=True)), 2, axis=-1)
        return u + value * jax.nn.sigmoid(gate), running


class Classifier(eqx.Module):
    """Encoder, blocks, mean over time, decoder: the model of `compressm.layers.SequenceClassifier`."""

    encoder: Linear
    blocks: list[Block]
    decoder: Linear

    def __call__(self, u: Array, running: Sequence[Statistics]) -> tuple[Array, list[Statistics]]:
        z, new = self.encoder(u), list[Statistics]()
        for block, statistics in zip(self.blocks, running, strict=True):
            z, statistics = block(z, statistics)
            new.append(statistics)
        return self.decoder(z.mean(1)), new


def from_torch(model: Any) -> tuple[Classifier, list[Statistics]]:
    """The same weights, and the running statistics of a fresh model."""

    def array(parameter: Any) -> Array:
        return jnp.array(parameter.detach().numpy())

    def linear(layer: Any) -> Linear:
        return Linear(array(layer.weight), array(layer.bias))

    def block(source: Any) -> Block:
        ssm = LRU(**{name: array(parameter) for name, parameter in source.ssm.named_parameters()})
        return Block(BatchNorm(array(source.norm.weight), array(source.norm.bias)), ssm, linear(source.glu))

    running = [(array(source.norm.running_mean), array(source.norm.running_var)) for source in model.blocks]
    return Classifier(linear(model.encoder), [block(b) for b in model.blocks], linear(model.decoder)), running


class Trainer:
    """A model with its optimizer; every call makes one step on the same batch and returns the loss before it."""

    def __init__(self, model: Any, inputs: Any, labels: Any, lr: float = 1e-3) -> None:
        network, running = from_torch(model)
        optimizer = optax.adam(lr)

        def loss(network: Classifier, running: list[Statistics], u: Array, labels: Array) -> tuple[Array, Any]:
            logits, running = network(u, running)
            return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), running

        @eqx.filter_jit(donate="all-except-first")
        def step(batch: tuple[Array, Array], network: Classifier, running: list[Statistics], state: Any) -> Any:
            (value, running), grads = eqx.filter_value_and_grad(loss, has_aux=True)(network, running, *batch)
            updates, state = optimizer.update(grads, state)
            return eqx.apply_updates(network, updates), running, state, value

        self._batch = jnp.array(inputs.numpy()), jnp.array(labels.numpy())
        self._state = network, running, optimizer.init(eqx.filter(network, eqx.is_array))
        self._step: Any = step

    def __call__(self) -> float:
        *state, value = self._step(self._batch, *self._state)
        self._state = jax.block_until_ready(tuple(state))
        return float(value)


def lru_training_step(
    n: int,
    width: int,
    layers: int,
    batch: int,
    length: int,
    radius: Sequence[float] = (0.9, 0.999),
    device: str = "cpu",
) -> Step:
    """Forward, backward and Adam, from the weights and on the batch of our side."""
    platform = "gpu" if device == "cuda" else device
    jax.config.update("jax_default_device", jax.devices(platform)[0])
    return Trainer(classifier(n, width, layers, radius=radius), *sequences(batch, length))


def device_peak_mb() -> float | None:
    """Device memory at its highest so far; None on a CPU."""
    device = jax.config.jax_default_device or jax.devices()[0]  # pyright: ignore[reportAttributeAccessIssue]
    statistics = device.memory_stats() if device.platform != "cpu" else None
    return statistics["peak_bytes_in_use"] / 1e6 if statistics else None
