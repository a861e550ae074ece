// <metal_integer> and <metal_relational>. The overloads are as many as Metal's, so that a call that
// is ambiguous there is ambiguous here.
namespace metal {
template <class T> struct __unsigned { using type = T; };
#define MSL_SIGNED(T) template <> struct __unsigned<T> { using type = u##T; };
MSL_SIGNED(char) MSL_SIGNED(short) MSL_SIGNED(int) MSL_SIGNED(long)
#define MSL_INTEGER(T) \
  MSL_INLINE T max(T x, T y) { return x > y ? x : y; } \
  MSL_INLINE T min(T x, T y) { return x < y ? x : y; } \
  MSL_INLINE T clamp(T x, T low, T high) { return min(max(x, low), high); } \
  MSL_INLINE T max3(T x, T y, T z) { return max(max(x, y), z); } \
  MSL_INLINE T min3(T x, T y, T z) { return min(min(x, y), z); } \
  MSL_INLINE T abs(T x) { return x < 0 ? -x : x; } \
  MSL_INLINE T popcount(T x) { \
    return (T)__builtin_popcountl((ulong)(typename __unsigned<T>::type)x); } \
  MSL_INLINE T clz(T x) { \
    const int bits = 8 * sizeof(T); \
    return (T)(x ? __builtin_clzl((ulong)(typename __unsigned<T>::type)x) - 64 + bits : bits); } \
  MSL_INLINE T ctz(T x) { \
    return (T)(x ? __builtin_ctzl((ulong)(typename __unsigned<T>::type)x) : 8 * sizeof(T)); } \
  MSL_INLINE T rotate(T x, T k) { \
    const uint bits = 8 * sizeof(T), s = (uint)k % bits; \
    auto u = (typename __unsigned<T>::type)x; \
    return s ? (T)((u << s) | (u >> (bits - s))) : x; } \
  MSL_INLINE T extract_bits(T x, uint offset, uint n) { \
    const uint bits = 8 * sizeof(T); \
    T top = (T)((typename __unsigned<T>::type)x << (bits - offset - n)); \
    return n ? (T)(top >> (bits - n)) : (T)0; }
MSL_EACH_INTEGER(MSL_INTEGER)
MSL_INLINE int mulhi(int a, int b) { return (int)(((long)a * (long)b) >> 32); }
MSL_INLINE uint mulhi(uint a, uint b) { return (uint)(((ulong)a * (ulong)b) >> 32); }
MSL_INLINE int mul24(int a, int b) { return a * b; }
MSL_INLINE uint mul24(uint a, uint b) { return a * b; }
MSL_INLINE int mad24(int a, int b, int c) { return a * b + c; }
MSL_INLINE uint mad24(uint a, uint b, uint c) { return a * b + c; }

#define MSL_SELECT(T) MSL_INLINE T select(T a, T b, bool c) { return c ? b : a; }
MSL_EACH_INTEGER(MSL_SELECT) MSL_EACH_FLOAT(MSL_SELECT) MSL_SELECT(bool)
template <class T, int N, class M>
MSL_INLINE vec<T, N> select(vec<T, N> a, vec<T, N> b, vec<M, N> c) {
  vec<T, N> r;
  for (int i = 0; i < N; i++) r[i] = c[i] ? b[i] : a[i];
  return r;
}
template <class M, int N> MSL_INLINE bool all(vec<M, N> c) {
  bool r = true;
  for (int i = 0; i < N; i++) r = r && c[i];
  return r;
}
template <class M, int N> MSL_INLINE bool any(vec<M, N> c) {
  bool r = false;
  for (int i = 0; i < N; i++) r = r || c[i];
  return r;
}
template <int N> MSL_INLINE bool all(__msl_bools<N> c) {
  bool r = true;
  for (int i = 0; i < N; i++) r = r && c[i];
  return r;
}
template <int N> MSL_INLINE bool any(__msl_bools<N> c) { return !all(!c); }
template <class T, int N> MSL_INLINE vec<T, N> select(vec<T, N> a, vec<T, N> b, __msl_bools<N> c) {
  vec<T, N> r;
  for (int i = 0; i < N; i++) r[i] = c[i] ? b[i] : a[i];
  return r;
}
MSL_INLINE bool all(bool c) { return c; }
MSL_INLINE bool any(bool c) { return c; }
}  // namespace metal
