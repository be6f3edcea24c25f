"""Triton pieces that the decode and the extend step of gated delta nets share."""

import triton
import triton.language as tl


@triton.jit
def decay_of(a, A_log, dt_bias):
    """``-exp(A_log) * softplus(a + dt_bias)`` in float32: the log of the decay, at most 0; NaN of NaN."""
    x = a.to(tl.float32) + dt_bias.to(tl.float32)
    grown = tl.exp(tl.where(x > 20.0, 20.0, x))
    # log(1 + y) loses small y in the sum; the quotient puts back what the rounding of 1 + y took.
    one_more = 1.0 + grown
    exact = one_more == 1.0
    log1p = tl.where(exact, grown, tl.log(one_more) * (grown / tl.where(exact, 1.0, one_more - 1.0)))
    return -tl.exp(A_log.to(tl.float32)) * tl.where(x > 20.0, x, log1p)


@triton.jit
def unit_length(x, axis: tl.constexpr):
    """``x * rsqrt(sum(x^2) + 1e-6)`` along ``axis``, float32."""
    wide = x.to(tl.float32)
    return wide * tl.rsqrt(tl.sum(wide * wide, axis=axis, keep_dims=True) + 1e-6)
