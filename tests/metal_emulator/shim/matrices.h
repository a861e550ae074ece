// <metal_simdgroup_matrix>: 8 x 8 over 32 lanes. With q = lane / 4 a lane holds row
// (q & 4) + (lane / 2) % 4 and the two columns from (q & 2) * 2 + (lane % 2) * 2 on.
extern "C" uint __msl_lane();
namespace metal {
struct __matrix_arguments { ulong d, a, b, c; uint td, ta, tb, tc; };
template <class T, int R, int C> struct simdgroup_matrix {
  static_assert(R == 8 && C == 8, "only 8x8 simdgroup matrices exist");
  vec<T, 2> __e;
  simdgroup_matrix() {}
  MSL_INLINE __private vec<T, 2>& thread_elements() __private { return __e; }
  MSL_INLINE const __private vec<T, 2>& thread_elements() const __private { return __e; }
};
using simdgroup_half8x8 = simdgroup_matrix<half, 8, 8>;
using simdgroup_float8x8 = simdgroup_matrix<float, 8, 8>;
using simdgroup_bfloat8x8 = simdgroup_matrix<bfloat, 8, 8>;
template <class T, int R, int C>
MSL_INLINE simdgroup_matrix<T, R, C> make_filled_simdgroup_matrix(T v) {
  simdgroup_matrix<T, R, C> m;
  m.__e = (vec<T, 2>)v;
  return m;
}
template <class D, class A, class B, class C>
MSL_INLINE void simdgroup_multiply_accumulate(
    __private simdgroup_matrix<D, 8, 8>& d, __private simdgroup_matrix<A, 8, 8>& a,
    __private simdgroup_matrix<B, 8, 8>& b, __private simdgroup_matrix<C, 8, 8>& c,
    __msl_place at = MSL_PLACE) {
  vec<D, 2> dd; vec<A, 2> aa = a.__e; vec<B, 2> bb = b.__e; vec<C, 2> cc = c.__e;
  __matrix_arguments m = {(ulong)(__private void*)&dd, (ulong)(__private void*)&aa,
                          (ulong)(__private void*)&bb, (ulong)(__private void*)&cc,
                          __type_of<D>, __type_of<A>, __type_of<B>, __type_of<C>};
  __msl_meet(MSL_MATRIX, 0, 0, (ulong)(__private void*)&m, 0, at);
  d.__e = dd;
}
template <class D, class A, class B>
MSL_INLINE void simdgroup_multiply(
    __private simdgroup_matrix<D, 8, 8>& d, __private simdgroup_matrix<A, 8, 8>& a,
    __private simdgroup_matrix<B, 8, 8>& b, __msl_place at = MSL_PLACE) {
  auto zero = make_filled_simdgroup_matrix<D, 8, 8>((D)0);
  simdgroup_multiply_accumulate(d, a, b, zero, at);
}
#define MSL_LOAD_STORE(S) \
  template <class T> \
  MSL_INLINE void simdgroup_load(__private simdgroup_matrix<T, 8, 8>& d, const S T* p, \
                                 ulong row = 8, ulong2 origin = (ulong2)(0ul), \
                                 bool transposed = false) { \
    uint lane = __msl_lane(), q = lane / 4; \
    ulong r = (q & 4) + (lane / 2) % 4, c = (q & 2) * 2 + (lane % 2) * 2; \
    for (uint e = 0; e < 2; e++) \
      d.__e[e] = transposed ? p[(origin.y + c + e) * row + origin.x + r] \
                            : p[(origin.y + r) * row + origin.x + c + e]; \
  } \
  template <class T> \
  MSL_INLINE void simdgroup_store(__private simdgroup_matrix<T, 8, 8>& d, S T* p, ulong row = 8, \
                                  ulong2 origin = (ulong2)(0ul), bool transposed = false) { \
    uint lane = __msl_lane(), q = lane / 4; \
    ulong r = (q & 4) + (lane / 2) % 4, c = (q & 2) * 2 + (lane % 2) * 2; \
    for (uint e = 0; e < 2; e++) { \
      if (transposed) p[(origin.y + c + e) * row + origin.x + r] = d.__e[e]; \
      else p[(origin.y + r) * row + origin.x + c + e] = d.__e[e]; \
    } \
  }
MSL_LOAD_STORE(__global) MSL_LOAD_STORE(__local)
}  // namespace metal
