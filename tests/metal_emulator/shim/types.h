// Scalars, vectors, packed vectors, vector constructors and casts.
typedef char int8_t; typedef unsigned char uint8_t; typedef short int16_t;
typedef unsigned short uint16_t; typedef int int32_t; typedef unsigned int uint32_t;
typedef long int64_t; typedef unsigned long uint64_t;
typedef unsigned char uchar; typedef unsigned short ushort;
typedef unsigned int uint; typedef unsigned long ulong;
typedef __SIZE_TYPE__ size_t; typedef __PTRDIFF_TYPE__ ptrdiff_t;
typedef __UINTPTR_TYPE__ uintptr_t; typedef __INTPTR_TYPE__ intptr_t;
typedef __bf16 bfloat;

namespace metal {
template <class T, int N> using vec = T __attribute__((ext_vector_type(N)));
}
#define MSL_VECTOR(T, N) typedef T T##N __attribute__((ext_vector_type(N)));
#define MSL_VECTORS(T) MSL_VECTOR(T, 2) MSL_VECTOR(T, 3) MSL_VECTOR(T, 4)
MSL_EACH_INTEGER(MSL_VECTORS) MSL_EACH_FLOAT(MSL_VECTORS) MSL_VECTORS(bfloat)
// Clang has no vectors of bool here. Its comparisons give vectors of masks, 0 and -1, which become
// 0 and 1 in these; lint.py refuses a mask that is used as a number.
template <int N> struct __msl_bools;
#define MSL_BOOLS(N, ...) \
  template <> struct __msl_bools<N> { \
    bool __VA_ARGS__; \
    __msl_bools() = default; \
    constexpr __msl_bools(bool b) { for (int i = 0; i < N; i++) (*this)[i] = b; } \
    template <class M> constexpr __msl_bools(metal::vec<M, N> mask) { \
      for (int i = 0; i < N; i++) (*this)[i] = mask[i] != 0; \
    } \
    constexpr bool& operator[](int i) { return (&x)[i]; } \
    constexpr bool operator[](int i) const { return (&x)[i]; } \
  }; \
  typedef __msl_bools<N> bool##N;
MSL_BOOLS(2, x, y) MSL_BOOLS(3, x, y, z) MSL_BOOLS(4, x, y, z, w)
#define MSL_BOOL_OPERATOR(SIGN) \
  template <int N> MSL_INLINE __msl_bools<N> operator SIGN(__msl_bools<N> a, __msl_bools<N> b) { \
    __msl_bools<N> r; \
    for (int i = 0; i < N; i++) r[i] = a[i] SIGN b[i]; \
    return r; \
  }
MSL_BOOL_OPERATOR(&) MSL_BOOL_OPERATOR(|) MSL_BOOL_OPERATOR(^) MSL_BOOL_OPERATOR(&&)
MSL_BOOL_OPERATOR(||) MSL_BOOL_OPERATOR(==) MSL_BOOL_OPERATOR(!=)
template <int N> MSL_INLINE __msl_bools<N> operator!(__msl_bools<N> a) {
  return a ^ __msl_bools<N>(true);
}
// what vec<T, N> means where nothing is deduced from it
template <class T, int N> struct __msl_vec_of { using type = metal::vec<T, N>; };
template <int N> struct __msl_vec_of<bool, N> { using type = __msl_bools<N>; };
namespace metal {
template <class T, int N> using __vec = typename __msl_vec_of<T, N>::type;
}

// float4(a, b2, c): every component counted
template <class V> struct __msl_vector {
  static constexpr __constant bool is = false;
  static constexpr __constant int size = 1;
};
template <class E, int N> struct __msl_vector<metal::vec<E, N>> {
  using element = E;
  static constexpr __constant bool is = true;
  static constexpr __constant int size = N;
};
template <int N> struct __msl_vector<__msl_bools<N>> {
  using element = bool;
  static constexpr __constant bool is = true;
  static constexpr __constant int size = N;
};
template <class V, int I> MSL_INLINE constexpr void __msl_put(V& v) {}
template <class V, int I, class A, class... Rest>
MSL_INLINE constexpr void __msl_put(V& v, A a, Rest... rest) {
  using E = typename __msl_vector<V>::element;
  constexpr int n = __msl_vector<A>::size;
  if constexpr (__msl_vector<A>::is) {
    for (int k = 0; k < n; k++) v[I + k] = (E)a[k];
  } else {
    v[I] = (E)a;
  }
  __msl_put<V, I + n>(v, rest...);
}
template <class V> MSL_INLINE constexpr V __msl_make() { return V{}; }
template <class V, class A> MSL_INLINE constexpr V __msl_make(A a) {
  if constexpr (__msl_vector<A>::is) {
    static_assert(__msl_vector<A>::size == __msl_vector<V>::size, "vector size mismatch");
    V v;
    __msl_put<V, 0>(v, a);
    return v;
  } else {
    V v;
    for (int k = 0; k < __msl_vector<V>::size; k++) v[k] = (typename __msl_vector<V>::element)a;
    return v;
  }
}
template <class V, class A, class B, class... Rest>
MSL_INLINE constexpr V __msl_make(A a, B b, Rest... rest) {
  constexpr int n =
      __msl_vector<B>::size + (__msl_vector<A>::size + ... + __msl_vector<Rest>::size);
  static_assert(n == __msl_vector<V>::size, "wrong number of vector components");
  V v;
  __msl_put<V, 0>(v, a, b, rest...);
  return v;
}

// packed_float3 and the others: no padding, the scalar's alignment
#define MSL_PACKED_OF(T, N, ...) \
  struct packed_##T##N { \
    T __VA_ARGS__; \
    packed_##T##N() = default; \
    packed_##T##N(T##N v) { for (int i = 0; i < N; i++) (*this)[i] = v[i]; } \
    T& operator[](int i) { return (&x)[i]; } \
    T operator[](int i) const { return (&x)[i]; } \
    operator T##N() const { T##N v; for (int i = 0; i < N; i++) v[i] = (*this)[i]; return v; } \
  }; \
  template <> struct __msl_vector<packed_##T##N> { \
    using element = T; \
    static constexpr __constant bool is = true; \
    static constexpr __constant int size = N; \
  };
#define MSL_PACKED(T) \
  MSL_PACKED_OF(T, 2, x, y) MSL_PACKED_OF(T, 3, x, y, z) MSL_PACKED_OF(T, 4, x, y, z, w)
MSL_EACH_SMALL_INTEGER(MSL_PACKED) MSL_EACH_FLOAT(MSL_PACKED) MSL_PACKED(bfloat)

// static_cast<half>(b) and half(b) are legal in Metal, and clang converts no bfloat to half
template <class To> MSL_INLINE constexpr To __msl_cast() { return To(); }
template <class To, class From> MSL_INLINE constexpr To __msl_cast(From x) {
  constexpr bool over_float = (__is_same(To, half) && __is_same(From, bfloat)) ||
                              (__is_same(To, bfloat) && __is_same(From, half));
  if constexpr (over_float) return (To)(float)x;
  else return static_cast<To>(x);
}
template <class To, class From> MSL_INLINE To as_type(From x) {
  static_assert(sizeof(To) == sizeof(From), "as_type size mismatch");
  return __builtin_bit_cast(To, x);
}

// clang's C++ for OpenCL has no pointer += for a class that converts to an integer
template <class T, class C, class = typename C::value_type>
MSL_INLINE __private auto& operator+=(T* __private& p, C c) {
  return p = p + (typename C::value_type)c;
}
template <class T, class C, class = typename C::value_type>
MSL_INLINE __private auto& operator-=(T* __private& p, C c) {
  return p = p - (typename C::value_type)c;
}
