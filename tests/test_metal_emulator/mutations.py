"""Thirty wrongs done to MLX's own kernels: barriers and guards gone, sizes and strides spoilt."""

import functools
from dataclasses import dataclass

from metal_emulator.build import preprocess
from test_metal_emulator.mlx_kernels import CASES

BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"
FIRST, SHARED, SECOND = (
    "decode attention, first pass",
    "decode attention, first pass for shared heads",
    "decode attention, second pass",
)


@dataclass(frozen=True)
class Mutation:
    """In the kernel's text after ``after`` the next ``old`` becomes ``new``."""

    kernel: str
    after: str
    old: str
    new: str

    def text(self) -> str:
        """Give the spoilt text."""
        whole = _expanded(self.kernel)
        start = 0
        for mark in self.after.split(" ... "):
            start = whole.index(mark, start) + len(mark)
        at = whole.index(self.old, start)
        return whole[:at] + self.new + whole[at + len(self.old) :]


@functools.cache
def _expanded(kernel: str) -> str:
    return preprocess(CASES[kernel]("float32").text)


_SOFTMAX = "void softmax_single_row("
_ENTROPY = "void cross_entropy("
_VECTOR = "void sdpa_vector("
_PASS_1 = "void sdpa_vector_2pass_1("
_GQA = "void sdpa_vector_2pass_1_gqa("
_PASS_2 = "void sdpa_vector_2pass_2("
_QMV = "void qmv_fast_impl("
_STEEL = "void attention("
_LOOP = f"{_STEEL} ... for (int kb = 0;"
_CAUSAL, _MASKED = "prefill attention, causal", "prefill attention, bool mask"

MUTATIONS = [
    Mutation("softmax", _SOFTMAX, BARRIER, ""),
    Mutation("softmax", f"{_SOFTMAX} ... {BARRIER}", BARRIER, ""),
    Mutation("softmax", f"{_SOFTMAX} ... {BARRIER} ... {BARRIER}", BARRIER, ""),
    Mutation("softmax", f"{_SOFTMAX} ... normalizer += exp_x;", BARRIER, ""),
    Mutation("softmax", f"{_SOFTMAX} ... local_normalizer[0] = normalizer;", BARRIER, ""),
    Mutation("softmax", _SOFTMAX, "mem_flags::mem_threadgroup", "mem_flags::mem_none"),
    Mutation("softmax", _SOFTMAX, "+ N_READS <= axis_size", "<= axis_size"),
    Mutation("softmax", _SOFTMAX, "1 / local_normalizer[0]", "1"),
    Mutation("softmax", f"{_SOFTMAX} ... out +=", "+ i) < axis_size", "+ i) <= axis_size"),
    Mutation("softmax", f"{_SOFTMAX} ... exp_x;", "simd_sum(normalizer)", "simd_max(normalizer)"),
    Mutation("cross entropy", _ENTROPY, "(simd_lane_id < n_simdgroups)", "(true)"),
    Mutation("cross entropy", f"{_ENTROPY} ... n_simdgroups =", BARRIER, ""),
    Mutation("cross entropy", f"{_ENTROPY} ... n_simdgroups = ... {BARRIER}", BARRIER, ""),
    Mutation("cross entropy", _ENTROPY, "if (lid == 0)", "if (true)"),
    Mutation("cross entropy", _ENTROPY, "y_n + axis_size :", "y_n :"),
    Mutation("decode attention", _VECTOR, BARRIER, ""),
    Mutation("decode attention", f"{_VECTOR} ... = o[i];", BARRIER, ""),
    Mutation("decode attention", f"{_VECTOR} ... (o[i] / sum_exp_score);", BARRIER, ""),
    Mutation("decode attention", _VECTOR, "i < N; i += BN", "i <= N; i += BN"),
    Mutation("decode attention", _VECTOR, "U outputs[BN * BD]", "U outputs[BN * BD - 1]"),
    Mutation("decode attention", f"{_VECTOR} ... (o[i] /", "if (simd_lid == 0)", "if (true)"),
    Mutation(FIRST, _PASS_1, "batch_idx * num_kv_heads + kv_head_idx", "kv_head_idx"),
    Mutation(FIRST, _PASS_1, "i + (TK - 1) * blocks < N", "i + (TK - 2) * blocks < N"),
    Mutation(SHARED, _GQA, BARRIER, ""),
    Mutation(SHARED, _GQA, "min(kend, s0 + sub)", "s0 + sub"),
    Mutation(SECOND, _PASS_2, "max_score = simd_max(max_score);", ""),
    Mutation("4-bit matrix times vector", _QMV, "scales += out_row", "scales += 1 + out_row"),
    Mutation(_CAUSAL, _LOOP, BARRIER, ""),
    Mutation(_CAUSAL, _LOOP, "row_pos < (col_pos + jj)", "row_pos <= (col_pos + jj)"),
    Mutation(
        _MASKED, f"{_LOOP} ... loader_k", ".load_safe(short2(BD, params->kL_rem))", ".load_unsafe()"
    ),
]
