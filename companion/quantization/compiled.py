"""A token in one call: loops over packed codes that numba compiles for the processor they run on.

torch computes a token of a small model in hundreds of calls, and each costs microseconds whatever
it computes. Here a token passes all blocks in a single call, which reads packed codes as it goes:

    4 bits   vectors are rounded to 7 bits; products are whole numbers of 16 bits
    8 bits   vectors stay in FP32

A processor multiplies many numbers at once if they lie side by side (16 of 16 bits with AVX2). A
4-bit weight is therefore kept transposed: the compiler unrolls the loop over the four inputs of a
word, and what remains runs over outputs, with no sum across. One word of 16 bits holds the codes of
four inputs of one output, the first input lowest. The products of 32 inputs, each at most 15 x 63,
fit the 16 bits that they are added up in; then comes the scale.

Arrays are contiguous, and FP32 if nothing else is said. A weight is a tuple of arrays:
4 bits: codes (I/4, O) uint16, scale (G, O), lowest (G, O); 8 bits: codes (O, I) int8, scale (O,).
`shares` is the number of threads among which a product is divided.
"""

from __future__ import annotations

import numpy as np
from numba import njit, prange
from numba.extending import overload

GROUP = 32  # inputs of one vector that share a scale
HIGHEST = 63  # 7 bits: 32 x 15 x 63 < 2^15
SMALLEST = 1e-30  # below it a group counts as zeros: 63 / largest would overflow

# Sums may be taken in another order: otherwise no loop that adds up can use SIMD instructions
OPTIONS = {"fastmath": {"reassoc", "contract", "nsz"}, "error_model": "numpy", "cache": True}


@njit(**OPTIONS)
def rounded(x):
    """A vector (I,) as whole numbers (I,) int16, their scales (I/32,), each group's rounded sum."""
    codes = np.empty(len(x), np.int16)
    scales = np.empty(len(x) // GROUP, np.float32)
    sums = np.empty_like(scales)
    for g in range(len(scales)):
        own, held = x[g * GROUP : (g + 1) * GROUP], codes[g * GROUP : (g + 1) * GROUP]
        largest = np.float32(0)
        for number in own:
            largest = max(largest, abs(number))
        steps = np.float32(HIGHEST) / largest if largest > SMALLEST else np.float32(0)
        total = np.float32(0)
        for i in range(len(own)):
            step = np.rint(own[i] * steps)
            held[i] = np.int16(step)
            total += step
        scales[g] = largest / np.float32(HIGHEST)
        sums[g] = scales[g] * total
    return codes, scales, sums


@njit(**OPTIONS)
def _add(codes, x, whole):
    """Add the products of four inputs with their codes to a whole number for each output."""
    for o in range(len(whole)):
        for place in range(4):
            code = np.int16((codes[o] >> (4 * place)) & 15)
            whole[o] += np.int16(code * x[place])


@njit(**OPTIONS)
def _some_groups(weight, vector, start, stop, out):
    """out (O,) = what the groups of 32 inputs from `start` to `stop` give."""
    codes, scale, lowest = weight
    x, x_scale, x_sum = vector
    group = len(x) // len(scale)  # inputs that share a scale of the weight
    whole = np.empty(len(out), np.int16)
    out[:] = 0
    for g in range(start, stop):
        whole[:] = 0
        for word in range(g * GROUP // 4, (g + 1) * GROUP // 4):
            _add(codes[word], x[4 * word : 4 * word + 4], whole)
        s, low = scale[g * GROUP // group], lowest[g * GROUP // group]
        for o in range(len(out)):
            out[o] += np.float32(whole[o]) * x_scale[g] * s[o] + low[o] * x_sum[g]


@njit(parallel=True, **OPTIONS)
def four_bits(weight, x, out, shares):
    """out (O,) = a 4-bit weight times x (I,); each thread takes a share of the inputs."""
    vector, groups = rounded(x), len(x) // GROUP
    sums = np.empty((shares, len(out)), np.float32)
    for share in prange(shares):
        start, stop = share * groups // shares, (share + 1) * groups // shares
        _some_groups(weight, vector, start, stop, sums[share])
    _add_up(sums, out)


@njit(**OPTIONS)
def _add_up(sums, out):
    """out (O,) = the sum of sums (S, O). In `four_bits` numba would divide it among threads too."""
    out[:] = sums[0]
    for share in range(1, len(sums)):
        out += sums[share]


@njit(parallel=True, **OPTIONS)
def eight_bits(weight, x, out, shares):
    """out (O,) = an 8-bit weight times x (I,); each thread takes a share of the outputs."""
    codes, scale = weight
    for share in prange(shares):
        for o in range(share * len(codes) // shares, (share + 1) * len(codes) // shares):
            total = np.float32(0)
            for i in range(len(x)):
                total += np.float32(codes[o, i]) * x[i]
            out[o] = total * scale[o]


@njit(parallel=True, **OPTIONS)
def expanded(weight, out):
    """A 4-bit weight in full, transposed: out (I, O)."""
    codes, scale, lowest = weight
    group = len(out) // len(scale)
    for i in prange(len(out)):
        s, low = scale[i // group], lowest[i // group]
        for o in range(len(s)):
            code = np.int32((codes[i // 4, o] >> (4 * (i % 4))) & 15)
            out[i, o] = np.float32(code) * s[o] + low[o]


def product(weights, layer, x, out, shares):
    """out (O,) = the weight of one layer, of weights with a first axis of L, times x (I,)."""


@overload(product, jit_options=OPTIONS)
def _product(weights, layer, x, out, shares):
    def four(weights, layer, x, out, shares):
        codes, scale, lowest = weights
        four_bits((codes[layer], scale[layer], lowest[layer]), x, out, shares)

    def eight(weights, layer, x, out, shares):
        codes, scale = weights
        eight_bits((codes[layer], scale[layer]), x, out, shares)

    return four if len(weights) == 3 else eight


@njit(**OPTIONS)
def normed(x, weight, epsilon):
    """RMSNorm of a vector (W,)."""
    mean_square = np.sum(x * x) / np.float32(len(x))
    return x * weight * (np.float32(1) / np.sqrt(mean_square + epsilon))


@njit(**OPTIONS)
def turn(heads, cos, sin):
    """Rotary positions, in place: heads (H, D), angles (D/2,)."""
    half = heads.shape[1] // 2
    for head in heads:
        for i in range(half):
            a, b = head[i], head[half + i]
            head[i], head[half + i] = a * cos[i] - b * sin[i], b * cos[i] + a * sin[i]


@njit(**OPTIONS)
def attend(queries, keys, values, positions, out):
    """Each query (H, D) reads the first keys and values (K, C, D) of its group: out (H, D)."""
    group, scale = len(queries) // len(keys), np.float32(1) / np.sqrt(np.float32(len(queries[0])))
    weights = np.empty(positions, np.float32)
    for h in range(len(queries)):
        for s in range(positions):
            weights[s] = _dot(queries[h], keys[h // group, s]) * scale
        weights[:] = np.exp(weights - np.max(weights))
        weights /= np.sum(weights)
        out[h] = 0
        for s in range(positions):
            _add_scaled(values[h // group, s], weights[s], out[h])


@njit(**OPTIONS)
def _dot(a, b):
    total = np.float32(0)
    for i in range(len(a)):
        total += a[i] * b[i]
    return total


@njit(**OPTIONS)
def _add_scaled(vector, weight, out):
    for i in range(len(out)):
        out[i] += vector[i] * weight


@njit(**OPTIONS)
def token(x, angles, cache, position, norms, epsilon, attention, mlp, shares):
    """Pass one token's vector x (W,) through all L blocks, in place; its keys go into the cache.

    angles: cos and sin (D/2,); cache: keys and values (L, K, C, D); norms (L, 2, W), of attention
    and MLP; attention: weights of query-key-value and out; mlp: of gate-up and down, each with a
    first axis of L.
    """
    keys, values = cache
    layers, kv_heads, _, width = keys.shape
    every = np.empty((attention[0][1].shape[-1] // width, width), np.float32)
    heads, turning = len(every) - 2 * kv_heads, len(every) - kv_heads
    mixed, change = np.empty((heads, width), np.float32), np.empty_like(x)
    both = np.empty(mlp[0][1].shape[-1], np.float32)
    gate, up = both[: len(both) // 2], both[len(both) // 2 :]
    for layer in range(layers):
        product(attention[0], layer, normed(x, norms[layer, 0], epsilon), every.ravel(), shares)
        turn(every[:turning], *angles)
        keys[layer, :, position] = every[heads:turning]
        values[layer, :, position] = every[turning:]
        attend(every[:heads], keys[layer], values[layer], position + 1, mixed)
        product(attention[1], layer, mixed.ravel(), change, shares)
        x += change
        product(mlp[0], layer, normed(x, norms[layer, 1], epsilon), both, shares)
        product(mlp[1], layer, up * gate / (np.float32(1) + np.exp(-gate)), change, shares)
        x += change
