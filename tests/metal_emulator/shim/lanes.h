// <metal_simdgroup> and <metal_quadgroup>: each call hands its values to the runtime, which waits
// for the other lanes.
namespace metal {
template <class T> constexpr __constant uint __type_of = ~0u;
#define MSL_TYPE(T, CODE) template <> constexpr __constant uint __type_of<T> = CODE;
MSL_TYPE(char, MSL_CHAR) MSL_TYPE(uchar, MSL_UCHAR) MSL_TYPE(short, MSL_SHORT)
MSL_TYPE(ushort, MSL_USHORT) MSL_TYPE(int, MSL_INT) MSL_TYPE(uint, MSL_UINT)
MSL_TYPE(long, MSL_LONG) MSL_TYPE(ulong, MSL_ULONG)
MSL_TYPE(half, MSL_HALF) MSL_TYPE(bfloat, MSL_BFLOAT) MSL_TYPE(float, MSL_FLOAT)

template <class T> MSL_INLINE T __together(uint operation, T v, ulong argument, __msl_place at) {
  __msl_meet(operation, __type_of<T>, 1, (ulong)(__private T*)&v, argument, at);
  return v;
}
template <class T, int N>
MSL_INLINE vec<T, N> __together_n(uint operation, vec<T, N> v, ulong argument, __msl_place at) {
  __msl_meet(operation, __type_of<T>, N, (ulong)(__private vec<T, N>*)&v, argument, at);
  return v;
}
template <class T>
MSL_INLINE T __filled(uint operation, T v, T fill, ulong argument, __msl_place at) {
  T x[2] = {v, fill};
  __msl_meet(operation, __type_of<T>, 1, (ulong)(__private T*)x, argument, at);
  return x[0];
}
template <class T, int N>
MSL_INLINE vec<T, N> __filled_n(uint operation, vec<T, N> v, vec<T, N> fill, ulong argument,
                                __msl_place at) {
  T x[2 * N];
  for (int i = 0; i < N; i++) x[i] = v[i], x[N + i] = fill[i];
  __msl_meet(operation, __type_of<T>, N, (ulong)(__private T*)x, argument, at);
  for (int i = 0; i < N; i++) v[i] = x[i];
  return v;
}
MSL_INLINE ulong __vote(uint operation, bool b, __msl_place at) {
  ulong r;
  __msl_meet(operation, 0, 0, (ulong)(__private ulong*)&r, b, at);
  return r;
}

#define MSL_LANE_TYPES(X, ...) \
  X(char, __VA_ARGS__) X(uchar, __VA_ARGS__) X(short, __VA_ARGS__) X(ushort, __VA_ARGS__) \
  X(int, __VA_ARGS__) X(uint, __VA_ARGS__) X(half, __VA_ARGS__) X(float, __VA_ARGS__)
#define MSL_LANE_INTEGERS(X, ...) \
  X(char, __VA_ARGS__) X(uchar, __VA_ARGS__) X(short, __VA_ARGS__) X(ushort, __VA_ARGS__) \
  X(int, __VA_ARGS__) X(uint, __VA_ARGS__)
#define MSL_REDUCE(T, NAME, CODE) \
  MSL_INLINE T NAME(T v, __msl_place at = MSL_PLACE) { return __together<T>(CODE, v, 0, at); }
#define MSL_REDUCE_N(NAME, CODE) \
  template <class T, int N> MSL_INLINE vec<T, N> NAME(vec<T, N> v, __msl_place at = MSL_PLACE) { \
    return __together_n<T, N>(CODE, v, 0, at); }
#define MSL_MOVE(T, NAME, CODE) \
  MSL_INLINE T NAME(T v, ushort lane, __msl_place at = MSL_PLACE) { \
    return __together<T>(CODE, v, lane, at); }
#define MSL_MOVE_N(NAME, CODE) \
  template <class T, int N> \
  MSL_INLINE vec<T, N> NAME(vec<T, N> v, ushort lane, __msl_place at = MSL_PLACE) { \
    return __together_n<T, N>(CODE, v, lane, at); }
#define MSL_FILL(T, NAME, CODE) \
  MSL_INLINE T NAME(T v, T fill, ushort delta, __msl_place at = MSL_PLACE) { \
    return __filled<T>(CODE, v, fill, delta, at); } \
  MSL_INLINE T NAME(T v, T fill, ushort delta, ushort width, __msl_place at = MSL_PLACE) { \
    return __filled<T>(CODE, v, fill, (ulong)delta | ((ulong)width << 32), at); }
#define MSL_FILL_N(NAME, CODE) \
  template <class T, int N> MSL_INLINE vec<T, N> NAME(vec<T, N> v, vec<T, N> fill, ushort delta, \
                                                      __msl_place at = MSL_PLACE) { \
    return __filled_n<T, N>(CODE, v, fill, delta, at); }
#define MSL_FILLING(NAME, CODE) MSL_LANE_TYPES(MSL_FILL, NAME, CODE) MSL_FILL_N(NAME, CODE)
#define MSL_REDUCTION(NAME, CODE) MSL_LANE_TYPES(MSL_REDUCE, NAME, CODE) MSL_REDUCE_N(NAME, CODE)
#define MSL_BITS(NAME, CODE) MSL_LANE_INTEGERS(MSL_REDUCE, NAME, CODE) MSL_REDUCE_N(NAME, CODE)
#define MSL_MOVEMENT(NAME, CODE) MSL_LANE_TYPES(MSL_MOVE, NAME, CODE) MSL_MOVE_N(NAME, CODE)
#define MSL_GROUP(G, AMONG) \
  MSL_REDUCTION(G##_sum, MSL_SUM + AMONG) MSL_REDUCTION(G##_product, MSL_PRODUCT + AMONG) \
  MSL_REDUCTION(G##_min, MSL_MIN + AMONG) MSL_REDUCTION(G##_max, MSL_MAX + AMONG) \
  MSL_BITS(G##_and, MSL_AND + AMONG) MSL_BITS(G##_or, MSL_OR + AMONG) \
  MSL_BITS(G##_xor, MSL_XOR + AMONG) \
  MSL_REDUCTION(G##_prefix_inclusive_sum, MSL_INCLUSIVE_SUM + AMONG) \
  MSL_REDUCTION(G##_prefix_exclusive_sum, MSL_EXCLUSIVE_SUM + AMONG) \
  MSL_REDUCTION(G##_prefix_inclusive_product, MSL_INCLUSIVE_PRODUCT + AMONG) \
  MSL_REDUCTION(G##_prefix_exclusive_product, MSL_EXCLUSIVE_PRODUCT + AMONG) \
  MSL_REDUCTION(G##_broadcast_first, MSL_BROADCAST_FIRST + AMONG) \
  MSL_MOVEMENT(G##_broadcast, MSL_BROADCAST + AMONG) \
  MSL_MOVEMENT(G##_shuffle, MSL_SHUFFLE + AMONG) \
  MSL_MOVEMENT(G##_shuffle_xor, MSL_SHUFFLE_XOR + AMONG) \
  MSL_MOVEMENT(G##_shuffle_up, MSL_SHUFFLE_UP + AMONG) \
  MSL_MOVEMENT(G##_shuffle_down, MSL_SHUFFLE_DOWN + AMONG) \
  MSL_MOVEMENT(G##_shuffle_rotate_up, MSL_ROTATE_UP + AMONG) \
  MSL_MOVEMENT(G##_shuffle_rotate_down, MSL_ROTATE_DOWN + AMONG) \
  MSL_FILLING(G##_shuffle_and_fill_up, MSL_FILL_UP + AMONG) \
  MSL_FILLING(G##_shuffle_and_fill_down, MSL_FILL_DOWN + AMONG)
MSL_GROUP(simd, 0)
MSL_GROUP(quad, MSL_QUAD)

struct simd_vote {
  typedef ulong vote_t;
  ulong v;
  explicit constexpr simd_vote(ulong x = 0) : v(x) {}
  explicit constexpr operator ulong() const { return v; }
  constexpr bool all() const { return v == 0xfffffffful; }
  constexpr bool any() const { return v != 0; }
};
MSL_INLINE simd_vote simd_ballot(bool b, __msl_place at = MSL_PLACE) {
  return simd_vote(__vote(MSL_BALLOT, b, at));
}
MSL_INLINE simd_vote simd_active_threads_mask(__msl_place at = MSL_PLACE) {
  return simd_vote(__vote(MSL_BALLOT, true, at));
}
MSL_INLINE bool simd_all(bool b, __msl_place at = MSL_PLACE) { return __vote(MSL_ALL, b, at); }
MSL_INLINE bool simd_any(bool b, __msl_place at = MSL_PLACE) { return __vote(MSL_ANY, b, at); }
MSL_INLINE bool simd_is_first(__msl_place at = MSL_PLACE) { return __vote(MSL_IS_FIRST, 0, at); }
}  // namespace metal
