// Header: the layout of a row of keys and values, and how to read it (metal_kernels/kv_layout.py).
#include <metal_simdgroup_matrix>

// Before loops over arrays in registers: only an unrolled index keeps them there.
#define UNROLLED _Pragma("clang loop unroll(full)")

// In place of minus infinity: ordered under fast math too, and differences of it are never NaN.
constant constexpr float LOWEST = -3.0e38f;

// Narrow and wide reads, one overload for each address space.
inline uint half_word(const device uint* words, uint i) {
  return reinterpret_cast<const device ushort*>(words)[i];
}
inline uint half_word(const threadgroup uint* words, uint i) {
  return reinterpret_cast<const threadgroup ushort*>(words)[i];
}
inline uint2 word_pair(const device uint* words, uint i) {
  return reinterpret_cast<const device uint2*>(words)[i];
}
inline uint2 word_pair(const threadgroup uint* words, uint i) {
  return reinterpret_cast<const threadgroup uint2*>(words)[i];
}
template <typename T>
inline vec<T, 4> four(const device T* numbers, uint i) {
  return reinterpret_cast<const device vec<T, 4>*>(numbers)[i];
}
template <typename T>
inline vec<T, 4> four(const threadgroup T* numbers, uint i) {
  return reinterpret_cast<const threadgroup vec<T, 4>*>(numbers)[i];
}

// A scale and its bias: halves of one word (the scale is the low one), or two words of float32.
template <typename T>
struct Pair {
  static constant constexpr int WORDS = 1;
  template <typename P>
  static float2 at(P pairs, uint group) {
    uint both = pairs[group];
    return float2(as_type<float>(both << 16), as_type<float>(both & 0xffff0000u));  // bfloat16_t
  }
  static void put(device uint* pairs, uint group, float scale, float bias) {
    uint high = as_type<ushort>(static_cast<T>(bias));
    pairs[group] = (high << 16) | as_type<ushort>(static_cast<T>(scale));
  }
};
template <>
struct Pair<half> {
  static constant constexpr int WORDS = 1;
  template <typename P>
  static float2 at(P pairs, uint group) {
    half2 both = as_type<half2>(pairs[group]);
    return float2(static_cast<float>(both.x), static_cast<float>(both.y));
  }
  static void put(device uint* pairs, uint group, float scale, float bias) {
    pairs[group] = as_type<uint>(half2(static_cast<half>(scale), static_cast<half>(bias)));
  }
};
template <>
struct Pair<float> {
  static constant constexpr int WORDS = 2;
  template <typename P>
  static float2 at(P pairs, uint group) {
    return float2(as_type<float>(pairs[2 * group]), as_type<float>(pairs[2 * group + 1]));
  }
  static void put(device uint* pairs, uint group, float scale, float bias) {
    pairs[2 * group] = as_type<uint>(scale);
    pairs[2 * group + 1] = as_type<uint>(bias);
  }
};

// A row of uint32 words: quantized keys, quantized values, scales of the keys, of the values.
template <typename T, int BITS, int D, int GS>
struct Row {
  typedef uint32_t word;
  static constant constexpr int GROUPS = D / GS;
  static constant constexpr int VALUES = D * BITS / 32;
  static constant constexpr int KEY_PAIRS = 2 * VALUES;
  static constant constexpr int VALUE_PAIRS = KEY_PAIRS + GROUPS * Pair<T>::WORDS;
  static constant constexpr int WIDTH = VALUE_PAIRS + GROUPS * Pair<T>::WORDS;

  template <int COUNT>
  static void spread(uint bits, thread float* x) {
    UNROLLED for (int i = 0; i < COUNT; i++) {
      x[i] = static_cast<float>((bits >> (i * BITS)) & ((1u << BITS) - 1u));
    }
  }

  // The chunk-th N numbers of a part, not scaled yet: pairs of words, one word or half a word.
  template <int N, typename P>
  static void read(P part, uint chunk, thread float* x) {
    constexpr int PER = 32 / BITS;
    constexpr int WORDS = N / PER;
    if (WORDS == 0) {
      spread<N>(half_word(part, chunk), x);
    } else if (WORDS == 1) {
      spread<PER>(part[chunk], x);
    }
    UNROLLED for (int i = 0; i < WORDS / 2; i++) {
      uint2 both = word_pair(part, chunk * (WORDS / 2) + i);
      spread<PER>(both.x, x + 2 * i * PER);
      spread<PER>(both.y, x + (2 * i + 1) * PER);
    }
  }

  template <typename P>
  static float2 pair(P pairs, uint group) { return Pair<T>::at(pairs, group); }
};

// A row of dense numbers: keys and values are separate arrays, nothing is scaled.
template <typename T, int D, int GS>
struct Row<T, 16, D, GS> {
  typedef T word;
  static constant constexpr int GROUPS = 1;
  static constant constexpr int VALUES = 0;
  static constant constexpr int KEY_PAIRS = 0;
  static constant constexpr int VALUE_PAIRS = 0;
  static constant constexpr int WIDTH = D;

  template <int N, typename P>
  static void read(P part, uint chunk, thread float* x) {
    UNROLLED for (int i = 0; i < N / 4; i++) {
      vec<T, 4> numbers = four(part, chunk * (N / 4) + i);
      UNROLLED for (int j = 0; j < 4; j++) x[4 * i + j] = static_cast<float>(numbers[j]);
    }
  }

  template <typename P>
  static float2 pair(P, uint) { return float2(1.0f, 0.0f); }
};

// Merge the results of simdgroups that read different tokens: PARTS of M rows -> one of M rows.
// outs (PARTS, M, W): the four quarters of a row of D, W / 4 numbers of each, from ``start`` on.
template <int PARTS, int M, int D, int W, int THREADS>
inline void join_parts(const threadgroup float* tops, const threadgroup float* sums,
                       const threadgroup float* outs, device float* out, device float* top,
                       device float* sum, uint thread_index, uint start, uint2 split) {
  for (uint i = thread_index; i < M * W; i += THREADS) {
    uint row = i / W;
    float highest = LOWEST;
    for (int p = 0; p < PARTS; p++) highest = metal::max(highest, tops[p * M + row]);
    float total = 0.0f;
    float mixed = 0.0f;
    for (int p = 0; p < PARTS; p++) {
      float weight = metal::exp(tops[p * M + row] - highest);
      total += weight * sums[p * M + row];
      mixed += weight * outs[p * M * W + i];
    }
    uint at = row * split.y + split.x;
    out[at * D + i % W / (W / 4) * (D / 4) + start + i % (W / 4)] = mixed;
    if (i % W == 0) {
      top[at] = highest;
      sum[at] = total;
    }
  }
}
