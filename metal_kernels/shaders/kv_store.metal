// Header: the layout of a row of keys and values, how to stage it and how to read it
// (metal_kernels/kv_layout.py).
#include <metal_simdgroup_matrix>

// Before loops over arrays in registers: only an unrolled index keeps them there.
#define UNROLLED _Pragma("clang loop unroll(full)")

// In place of minus infinity: ordered under fast math too, and differences of it are never NaN.
constant constexpr float LOWEST = -3.0e38f;

// Copy COUNT units of 16 bytes, of which ``count`` exist: neighbors read neighbors, so that a line of
// the cache is touched by one load, and all loads are under way before the first is waited for.
template <int COUNT, int THREADS>
inline void stage(threadgroup uint4* to, const device void* from, int count, uint thread_index) {
  constexpr int EACH = (COUNT + THREADS - 1) / THREADS;
  const device uint4* units = static_cast<const device uint4*>(from);
  uint4 held[EACH];
  UNROLLED for (int i = 0; i < EACH; i++) {
    int at = int(thread_index) + i * THREADS;
    if (at < count) held[i] = units[at];
  }
  UNROLLED for (int i = 0; i < EACH; i++) {
    int at = int(thread_index) + i * THREADS;
    if (at < count) to[at] = held[i];
  }
}

// A scale and its bias: halves of one word (the scale is the low one), or two words of float32.
template <typename T>
struct Pair {
  static constant constexpr int WORDS = 1;
  static float2 at(const threadgroup uint* pairs, uint group) {
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
  static float2 at(const threadgroup uint* pairs, uint group) {
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
  static float2 at(const threadgroup uint* pairs, uint group) {
    return float2(as_type<float>(pairs[2 * group]), as_type<float>(pairs[2 * group + 1]));
  }
  static void put(device uint* pairs, uint group, float scale, float bias) {
    pairs[2 * group] = as_type<uint>(scale);
    pairs[2 * group + 1] = as_type<uint>(bias);
  }
};

// What a dense number is multiplied as.
template <typename T>
struct Dense {
  typedef float number;
};
template <>
struct Dense<half> {
  typedef half number;
};

// A row of uint32 words: quantized keys, quantized values, scales and biases of the keys, of the
// values, and padding to 16 bytes.
template <typename T, int BITS, int D, int GS>
struct Row {
  typedef uint word;
  typedef half number;  // exact for all levels
  static constant constexpr bool SCALED = true;
  static constant constexpr int GROUPS = D / GS;
  static constant constexpr int VALUES = D * BITS / 32;
  static constant constexpr int KEY_PAIRS = 2 * VALUES;
  static constant constexpr int VALUE_PAIRS = KEY_PAIRS + GROUPS * Pair<T>::WORDS;
  static constant constexpr int USED = VALUE_PAIRS + GROUPS * Pair<T>::WORDS;
  static constant constexpr int WIDTH = (USED + 3) / 4 * 4;

  // A level is or-ed into the mantissa of 1024, at its top: what is read is STEP * level + OFFSET.
  static constant constexpr int SHIFT = 10 - BITS;
  static constant constexpr float STEP = 1 << SHIFT;
  static constant constexpr float OFFSET = 1024.0f;

  // Words have their numbers in the order 0, n/2, 1, n/2 + 1, ...: two at a time.
  template <int COUNT>
  static void spread(uint bits, thread half2* x) {
    constexpr uint MASK = ((1u << BITS) - 1u) * 0x10001u << SHIFT;
    UNROLLED for (int i = 0; i < COUNT / 2; i++) {
      int left = SHIFT - BITS * i;
      uint moved = left >= 0 ? bits << metal::max(left, 0) : bits >> metal::max(-left, 0);
      x[i] = as_type<half2>((moved & MASK) | 0x64006400u);
    }
  }

  // The place, among N numbers that were read, of the i-th of them.
  template <int N>
  static constexpr int order(int i) {
    constexpr int PER = N < 32 / BITS ? N : 32 / BITS;
    return i / PER * PER + i % 2 * (PER / 2) + i % PER / 2;
  }

  // The chunk-th N numbers of a part, which are 2, 4, 8 or 16 bytes.
  template <int N>
  static void read(const threadgroup uint* part, uint chunk, thread half2* x) {
    constexpr int BYTES = N * BITS / 8;
    constexpr int PER = 32 / BITS;
    if (BYTES == 2) {
      uint bits = reinterpret_cast<const threadgroup ushort*>(part)[chunk];
      spread<N>(bits | bits << 8, x);  // the upper half of the numbers into the upper half word
    } else if (BYTES == 4) {
      spread<PER>(part[chunk], x);
    } else if (BYTES == 8) {
      uint2 words = reinterpret_cast<const threadgroup uint2*>(part)[chunk];
      UNROLLED for (int i = 0; i < 2; i++) spread<PER>(words[i], x + i * PER / 2);
    } else {
      uint4 words = reinterpret_cast<const threadgroup uint4*>(part)[chunk];
      UNROLLED for (int i = 0; i < 4; i++) spread<PER>(words[i], x + i * PER / 2);
    }
  }

  static float2 pair(const threadgroup uint* pairs, uint group) {
    return Pair<T>::at(pairs, group);
  }
};

// A row of dense numbers: keys and values are separate arrays, nothing is scaled.
template <typename T, int D, int GS>
struct Row<T, 16, D, GS> {
  typedef T word;
  typedef typename Dense<T>::number number;
  static constant constexpr bool SCALED = false;
  static constant constexpr int GROUPS = D / GS;
  static constant constexpr int VALUES = 0;
  static constant constexpr int KEY_PAIRS = 0;
  static constant constexpr int VALUE_PAIRS = 0;
  static constant constexpr int WIDTH = D;
  static constant constexpr float STEP = 1.0f;
  static constant constexpr float OFFSET = 0.0f;

  template <int N>
  static constexpr int order(int i) { return i; }

  template <int N>
  static void read(const threadgroup T* part, uint chunk, thread vec<number, 2>* x) {
    UNROLLED for (int i = 0; i < N / 4; i++) {
      vec<T, 4> four = reinterpret_cast<const threadgroup vec<T, 4>*>(part)[chunk * (N / 4) + i];
      x[2 * i] = vec<number, 2>(static_cast<number>(four.x), static_cast<number>(four.y));
      x[2 * i + 1] = vec<number, 2>(static_cast<number>(four.z), static_cast<number>(four.w));
    }
  }

  static float2 pair(const threadgroup T*, uint) { return float2(1.0f, 0.0f); }
};

// The same as float32.
template <typename Store, int N>
inline void read_floats(const threadgroup typename Store::word* part, uint chunk, thread float* x) {
  vec<typename Store::number, 2> pairs[N / 2];
  Store::template read<N>(part, chunk, pairs);
  UNROLLED for (int i = 0; i < N; i++) x[i] = static_cast<float>(pairs[i / 2][i % 2]);
}

// A few staged tokens: rows of both, or keys and then values.
template <typename Store, int BLOCK>
struct Stage {
  typedef typename Store::word word;
  static constant constexpr int UNITS = Store::WIDTH * sizeof(word) / sizeof(uint4);  // of a row
  static constant constexpr int KEYS = BLOCK * UNITS;
  static constant constexpr int SIZE = Store::SCALED ? KEYS : 2 * KEYS;

  template <int THREADS>
  static void fill(threadgroup uint4* to, const device word* keys, const device word* values,
                   int live, uint thread_index) {
    stage<KEYS, THREADS>(to, keys, live * UNITS, thread_index);
    if (!Store::SCALED) stage<KEYS, THREADS>(to + KEYS, values, live * UNITS, thread_index);
  }
  static const threadgroup word* key_row(const threadgroup uint4* from, int token) {
    return reinterpret_cast<const threadgroup word*>(from + token * UNITS);
  }
  static const threadgroup word* value_row(const threadgroup uint4* from, int token) {
    int rows = Store::SCALED ? 0 : KEYS;
    return reinterpret_cast<const threadgroup word*>(from + rows + token * UNITS);
  }
};

// The tokens of a sequence that one threadgroup reads: whole blocks.
inline int2 part_of(int length, uint split, uint splits, int block) {
  int share = ((length + int(splits) - 1) / int(splits) + block - 1) / block * block;
  int begin = metal::min(length, int(split) * share);
  return int2(begin, metal::min(length, begin + share));
}

// Merge the results of PARTS simdgroups that read different tokens; each has SPACE floats, rows of D.
template <int PARTS, int D, int SPACE, int ROWS, int THREADS>
inline void join_parts(const threadgroup float* tops, const threadgroup float* sums,
                       const threadgroup float* outs, device float* out, device float* top,
                       device float* sum, uint thread_index, uint rows, uint2 split) {
  for (uint i = thread_index; i < rows * D; i += THREADS) {
    uint row = i / D;
    float highest = LOWEST;
    for (int p = 0; p < PARTS; p++) highest = metal::max(highest, tops[p * ROWS + row]);
    float total = 0.0f;
    float mixed = 0.0f;
    for (int p = 0; p < PARTS; p++) {
      float weight = metal::fast::exp(tops[p * ROWS + row] - highest);
      total += weight * sums[p * ROWS + row];
      mixed += weight * outs[p * SPACE + i];
    }
    uint at = row * split.y + split.x;
    out[at * D + i % D] = mixed;
    if (i % D == 0) {
      top[at] = highest;
      sum[at] = total;
    }
  }
}
