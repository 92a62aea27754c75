"""What a step needs at the least, and how fast this machine is: together the shortest possible time of a row.

A `Work` counts floating point operations, exponentials and bytes of memory traffic; a `Rates` holds what the machine
was measured to do of each in a second. The limit is the roofline model's (Williams, Waterman, Patterson 2009)

    limit = max(flops / flop rate + exponentials / exponential rate, bytes / bandwidth)

Operations and exponentials add up, since they are done by the same vector units; transfers run beside them.

The counts are those of the methods known for each recurrence, not of the one that our code happens to use: where there
are several, the one with the fewest operations counts. All of them are taken to run at the rate of one large matrix
product. Traffic is what no fusion could avoid: inputs, outputs, and what the backward pass needs of the forward pass.

A multiply-add is two operations. An addition or multiplication that stands alone takes the same slot of the vector
unit, and is counted as two.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

FLOAT = 4  # bytes


@dataclass(frozen=True)
class Work:
    """Operations, exponentials and bytes moved."""

    flops: float = 0.0
    exps: float = 0.0
    bytes: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.exps + other.exps, self.bytes + other.bytes)

    def __mul__(self, times: float) -> Work:
        return Work(times * self.flops, times * self.exps, times * self.bytes)

    __rmul__ = __mul__


@dataclass(frozen=True)
class Rates:
    """What a machine does in a second.

    Attributes:
        gflops: of a float32 matrix product, in 1e9 operations a second.
        gexps: float32 exponentials, in 1e9 a second.
        gbytes: of a copy, read and write counted, in 1e9 bytes a second.
    """

    gflops: float
    gexps: float
    gbytes: float

    def limit_ms(self, work: Work) -> float:
        """The shortest possible time, in milliseconds."""
        computing = work.flops / self.gflops + work.exps / self.gexps
        return max(computing, work.bytes / self.gbytes) / 1e6

    def to_dict(self) -> dict[str, float]:
        """Plain values, for JSON; four digits."""
        return {key: float(f"{value:.4g}") for key, value in asdict(self).items()}


# The least that an exponential costs: a polynomial of degree 5 and its range reduction and scaling, 10 multiply-adds.
_FLOPS_OF_AN_EXPONENTIAL = 20


def measure_rates(device: str = "cpu", seconds: float = 1.0) -> Rates:
    """Measure this machine, with as many threads as PyTorch uses. Each rate is the best of what ``seconds`` allow.

    The matrix product is square, of order 2048 (GPU: 8192). The copy moves 256 MB, far beyond any cache. The
    exponential runs over data in cache; where a polynomial at the matrix product's rate would be faster than PyTorch's
    exponential, that rate is taken.
    """
    order = 2048 if device == "cpu" else 8192
    a, b, c = (torch.randn(order, order, device=device) for _ in range(3))
    gflops = 2 * order**3 / _best_seconds(lambda: torch.mm(a, b, out=c), device, seconds) / 1e9
    source, target = (torch.zeros(64 * 2**20, device=device) for _ in range(2))
    gbytes = 2 * FLOAT * source.numel() / _best_seconds(lambda: target.copy_(source), device, seconds) / 1e9
    x = torch.randn(2**15 * torch.get_num_threads() if device == "cpu" else 2**20, device=device)
    y = torch.empty_like(x)
    gexps = x.numel() / _best_seconds(lambda: torch.exp(x, out=y), device, seconds) / 1e9
    return Rates(gflops, max(gexps, gflops / _FLOPS_OF_AN_EXPONENTIAL), gbytes)


def _best_seconds(run: Callable[[], object], device: str, seconds: float) -> float:
    best, started = math.inf, time.perf_counter()
    run()
    while time.perf_counter() - started < seconds or best == math.inf:
        if device != "cpu":
            torch.cuda.synchronize()
        begun = time.perf_counter()
        run()
        if device != "cpu":
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begun)
    return best


# --- the LTI scan and the training step of the LRU -------------------------------------------------------------------


def lti_training(batch: int, length: int, n: int, p: int, q: int) -> Work:
    """`lti_scan`, forward and backward: the cheapest of three methods; the traffic of inputs, outputs and gradients.

    For each of the ``batch * length`` steps, forward:

    - recurrence: ``4 n (p + q)`` for ``B u`` and ``Re(C x)`` (a real by a complex matrix, two multiply-adds an
      entry), and ``8 n`` for ``lam x``;
    - one Toeplitz matrix of the whole kernel, its lower triangle: ``(length + 1) p q``;
    - Fourier transforms of twice the length: ``5 log2(2 length)`` for each of ``p + q`` channels (a real transform of
      N points takes 2.5 N log2 N), and ``8 p q`` for the products at ``length`` frequencies.

    The last two need the kernel, ``4 n p q length`` for the whole batch. Backward, every product is needed twice more
    (gradients of both factors), and transforms once more.
    """
    steps = batch * length
    recurrence = 3 * steps * (4 * n * (p + q) + 8 * n)
    kernel = 3 * 4 * n * p * q * length
    toeplitz = 3 * steps * (length + 1) * p * q + kernel
    transforms = 2 * 5 * math.log2(2 * length) * (p + q)
    fourier = steps * (transforms + 3 * 8 * p * q) + kernel
    # u and y forward; u, the gradients of y and of u backward.
    return Work(flops=min(recurrence, toeplitz, fourier), bytes=FLOAT * steps * (3 * p + 2 * q))


def convolution_training(batch: int, length: int, d: int) -> Work:
    """One filter as long as the sequence in each of ``d`` channels, forward and backward.

    As in `lti_training` with one input and one output, but the filter is given: one Toeplitz matrix, its lower
    triangle, or Fourier transforms. Traffic: u, y and the filter forward; u, the filter and the gradients of all three
    backward.
    """
    steps = batch * length
    toeplitz = 3 * (length + 1)
    fourier = 2 * 5 * math.log2(2 * length) * 2 + 3 * 8
    return Work(flops=d * steps * min(toeplitz, fourier), bytes=FLOAT * d * (5 * steps + 3 * length))


def lru_training_step(batch: int, length: int, n: int, width: int, layers: int, classes: int = 10) -> Work:
    """Forward, backward and Adam of the classifier with ``layers`` blocks of norm, LRU, GELU, GLU, skip.

    A block, for each of ``batch * length`` steps: the LTI scan; the GLU's matrix, ``4 width^2``, three times (forward,
    gradients of input and of weights); 40 multiply-adds an element, forward and backward (batch norm 12, GELU 20, GLU
    and skip 8); 4 exponentials an element (tanh and sigmoid, and both again backward).

    Traffic of a block, in arrays of ``batch * length * width`` floats, with everything fused that can be. Forward 6:
    the norm's statistics read the block's input; the scan reads it again and writes its output; the GLU reads that and,
    for the skip, the input, and writes. Backward 10: the GLU and GELU read the gradient of the output and the scan's
    output, and write the gradient of the latter; the scan reads that and the input, and writes the gradient of the
    norm's output; the norm reads that, the input and the skip's gradient, and writes.

    Encoder and decoder: ``6 batch (length width + width classes)``. Adam: 12 operations and 7 floats a parameter.
    """
    elements = batch * length * width
    scan = lti_training(batch, length, n, width, width)
    glu = 3 * 2 * elements * 2 * width
    block = Work(flops=scan.flops + glu + 2 * 40 * elements, exps=4 * elements, bytes=16 * FLOAT * elements)
    parameters = layers * (3 * n + 4 * n * width + 5 * width + 2 * width**2) + (2 + classes) * width + classes
    ends = Work(flops=6 * batch * (length * width + width * classes) + 12 * parameters, bytes=7 * FLOAT * parameters)
    return layers * block + ends


# --- the selective scan ----------------------------------------------------------------------------------------------


def selective_training(batch: int, length: int, d: int, n: int) -> Work:
    """`selective_scan`, forward and backward, without the states of all steps in memory.

    For each of ``batch * length * d * n`` states and steps, in multiply-adds or what takes as long. Forward 4 and one
    exponential: ``delta A``; ``input B`` and its sum with ``a h``; ``C h``. Backward the states are computed again, 3
    and one exponential; then, 9: gradient of h (2), of C, B and the input (1 each), of the exponent (2), of delta and A
    (1 each).

    Traffic: forward u, delta, y and B, C; backward u, delta, the gradients of y, u and delta, and B, C with theirs.
    """
    cells = batch * length * d * n
    floats = batch * length * (8 * d + 6 * n)
    return Work(flops=2 * (4 + 3 + 9) * cells, exps=2 * cells, bytes=FLOAT * floats)


# --- the scan with one decay per head --------------------------------------------------------------------------------


def ssd_training(batch: int, length: int, heads: int, p: int, n: int, groups: int = 1) -> Work:
    """`ssd_scan`, forward and backward (every product twice more).

    In chunks of T steps, for each step and head, forward: the scores ``C . B`` and their products with x, lower
    triangle, ``(T + 1) (p + n groups / heads)``; into and out of the states ``4 p n``, and ``2 p n / T`` for their
    decay; with T the whole length, no states. The best T counts; T = 1 is the recurrence itself.

    Traffic: forward x, y, decays, B, C; backward x, the gradients of y and x, decays and B, C with theirs.
    """

    def forward(chunk: int) -> float:
        within = (chunk + 1) * (p + n * groups / heads)
        return within if chunk >= length else within + 4 * p * n + 2 * p * n / chunk

    flops = 3 * batch * length * heads * min(forward(chunk) for chunk in _chunks(length))
    floats = batch * length * (heads * (5 * p + 3) + 6 * groups * n)
    return Work(flops=flops, bytes=FLOAT * floats)


def mamba2_mixer_training(batch: int, length: int, heads: int, p: int, n: int, taps: int = 4) -> Work:
    """Forward and backward of Mamba-2's layer of width ``d = heads p / 2`` and one group, scan and all around it.

    For each step, with ``c = heads p + 2 n`` channels in the convolution: the scan; projections into ``heads p + c +
    heads`` and out of ``heads p`` channels; ``taps`` multiply-adds a channel; all three times (forward, and the
    gradients of both factors). Exponentials: SiLU of the convolution and of the gate, forward and backward.

    Traffic, in channels, with everything fused that can be. Forward: the layer's input and output; the projection is
    written and read, by the convolution and by the norm, which reads the scan's output too, and writes. Backward all of
    it again, and the gradients of what was written.
    """
    steps, inner = batch * length, heads * p
    channels = inner + 2 * n
    projections = inner // 2 * (inner + channels + heads) + inner * (inner // 2)
    flops = 3 * 2 * steps * (projections + taps * channels)
    floats = 3 * steps * (inner + 2 * (inner + channels + heads) + 2 * inner)
    around = Work(flops=flops, exps=2 * steps * (channels + inner), bytes=FLOAT * floats)
    return around + ssd_training(batch, length, heads, p, n)


def mamba2_model_training_step(
    batch: int, length: int, heads: int, p: int, n: int, layers: int, vocabulary: int
) -> Work:
    """Forward and backward of a language model of ``layers`` Mamba-2 layers and a map to the vocabulary.

    Beside the layers: the map, three products of ``batch * length`` rows. Norms, embedding and Adam are left out.
    """
    head = Work(flops=3 * 2 * batch * length * (heads * p // 2) * vocabulary)
    return layers * mamba2_mixer_training(batch, length, heads, p, n) + head


# --- a decay for every key dimension, and the delta rule -------------------------------------------------------------


def gla_training(batch: int, length: int, heads: int, p: int, n: int) -> Work:
    """`gla_scan`, forward and backward (every product twice more).

    As `ssd_training`, with keys and queries of each head's own. In chunks of more than one step the decays since
    the chunk's start are multiplied into keys and queries, once for the scores and once for the state, ``8 n``. Every
    step's decays are one exponential a dimension, forward and again backward.

    Traffic: forward x, y and decays, B, C; backward x, the gradients of y and x, and decays, B, C with theirs.
    """

    def forward(chunk: int) -> float:
        if chunk == 1:
            return 6 * p * n
        within = (chunk + 1) * (p + n) + 8 * n
        return within if chunk >= length else within + 4 * p * n + 2 * p * n / chunk

    steps = batch * length * heads
    least = min(forward(chunk) for chunk in _chunks(length))
    return Work(flops=3 * steps * least, exps=2 * steps * n, bytes=FLOAT * steps * (5 * p + 9 * n))


def delta_training(batch: int, length: int, heads: int, p: int, n: int, gated: bool) -> Work:
    """`delta_scan`, forward and backward (every product twice more).

    The recurrence, for each step and head: reading the state with the key, writing, and reading with the query, ``2 p
    n`` each, and as much for the decay if there is one. In chunks of T steps, the decay is ``2 p n / T``, but there are
    four products with triangles, ``2 T (p + n)``: keys with keys, without the diagonal, and the system that they make;
    queries with keys, and the result with the values written. With T the whole length, no states.

    Traffic: forward v, y, k, q, beta, decays; backward v, k, q, beta, decays and the gradients of all of them and y.
    """

    def forward(chunk: int) -> float:
        decay = 2 * p * n / chunk if gated else 0.0
        if chunk == 1:
            return 6 * p * n + decay
        within = 2 * chunk * (p + n)
        return within if chunk >= length else within + 6 * p * n + decay

    steps = batch * length * heads
    floats = 5 * p + 6 * n + (6 if gated else 3)
    return Work(flops=3 * steps * min(forward(chunk) for chunk in _chunks(length)), bytes=FLOAT * steps * floats)


def _chunks(length: int) -> list[int]:
    """Lengths of chunks to choose from: the powers of two, up to one that covers the sequence."""
    return [2**k for k in range(math.ceil(math.log2(length)) + 1)]


# --- one token -------------------------------------------------------------------------------------------------------


def token(parameters: int, state: int, width: int, batch: int) -> Work:
    """One step of a layer: its weights read once for the batch, the state of every sequence read and written.

    A multiply-add for each weight and three for each number of the state (decay, input, output), for each sequence. The
    weights are taken to come from memory, as those of a model larger than the cache do; a single layer, whose weights
    stay in the cache from token to token, may be faster than this.
    """
    numbers = parameters + batch * (2 * state + 2 * width)
    return Work(flops=2 * batch * (parameters + 3 * state), bytes=FLOAT * numbers)


# --- reductions ------------------------------------------------------------------------------------------------------


def reduction(n: int, states: int) -> Work:
    """Balanced truncation of one complex system with n states, as a real one of order ``m = 2 n``, to ``2 states``.

    The square-root method, with the operation counts of Golub, Van Loan, Matrix Computations, 4th ed.: two symmetric
    eigenvalue problems with vectors ``9 m^3`` each, one product ``2 m^3``, one singular value decomposition with
    vectors ``21 m^3``; two projections ``2 m^2 r`` each, one nonsymmetric eigenvalue problem with vectors ``25 r^3``,
    of order ``r = 2 states``. Double precision takes twice the time of single. Gramians and certificate, of order
    ``m^2``, are left out.
    """
    m, r = 2 * n, 2 * states
    return Work(flops=2 * (41 * m**3 + 4 * m**2 * r + 25 * r**3), bytes=2 * FLOAT * 2 * m**2)
