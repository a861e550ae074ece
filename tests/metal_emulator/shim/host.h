// From the runtime's raw addresses and positions to a kernel's typed arguments.
namespace __msl_host {
template <class F, int I> struct nth;
template <class R, class A, class... B> struct nth<R(A, B...), 0> { using type = A; };
template <class R, class A, class... B, int I> struct nth<R(A, B...), I> {
  using type = typename nth<R(B...), I - 1>::type;
};
template <class A> struct pointer;
#define MSL_POINTER(S) \
  template <class T> struct pointer<S T*> { \
    static MSL_INLINE S T* get(ulong v) { return (S T*)v; } }; \
  template <class T> struct pointer<S T&> { \
    static MSL_INLINE S T& get(ulong v) { return *(S T*)v; } };
MSL_POINTER(__global) MSL_POINTER(__constant)
template <class A> struct position { static MSL_INLINE A get(const uint* p) { return (A)*p; } };
template <class E, int N> struct position<metal::vec<E, N>> {
  static MSL_INLINE metal::vec<E, N> get(const uint* p) {
    metal::vec<E, N> r;
    for (int i = 0; i < N; i++) r[i] = (E)p[i];
    return r;
  }
};
}  // namespace __msl_host
