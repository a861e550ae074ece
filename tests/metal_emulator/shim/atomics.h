// <metal_atomic>. A fiber runs alone until it waits, so a plain read and write is atomic; the marks
// tell the instrumenter that it is meant to be.
extern "C" void __msl_atomic_begin();
extern "C" void __msl_atomic_end();
namespace metal {
template <class T> struct atomic { T __v; };
// OpenCL has types of these names: the rewriter renames Metal's
typedef atomic<int> __id_atomic_int;
typedef atomic<uint> __id_atomic_uint;
typedef atomic<bool> __id_atomic_bool;
typedef atomic<float> __id_atomic_float;
#define MSL_ATOMIC(S, NAME, RESULT) \
  template <class T> \
  MSL_INLINE T atomic_##NAME##_explicit(volatile S atomic<T>* p, T v, memory_order) { \
    __msl_atomic_begin(); \
    T c = ((S atomic<T>*)p)->__v; \
    ((S atomic<T>*)p)->__v = (T)(RESULT); \
    __msl_atomic_end(); \
    return c; \
  }
#define MSL_ATOMICS(S) \
  MSL_ATOMIC(S, fetch_add, c + v) MSL_ATOMIC(S, fetch_sub, c - v) \
  MSL_ATOMIC(S, fetch_max, c > v ? c : v) MSL_ATOMIC(S, fetch_min, c < v ? c : v) \
  MSL_ATOMIC(S, fetch_and, c & v) MSL_ATOMIC(S, fetch_or, c | v) MSL_ATOMIC(S, fetch_xor, c ^ v) \
  MSL_ATOMIC(S, exchange, v) \
  template <class T> \
  MSL_INLINE T atomic_load_explicit(const volatile S atomic<T>* p, memory_order) { \
    __msl_atomic_begin(); \
    T c = ((const S atomic<T>*)p)->__v; \
    __msl_atomic_end(); \
    return c; \
  } \
  template <class T> \
  MSL_INLINE void atomic_store_explicit(volatile S atomic<T>* p, T v, memory_order) { \
    __msl_atomic_begin(); \
    ((S atomic<T>*)p)->__v = v; \
    __msl_atomic_end(); \
  } \
  template <class T> MSL_INLINE bool atomic_compare_exchange_weak_explicit( \
      volatile S atomic<T>* p, __private T* expected, T v, memory_order, memory_order) { \
    __msl_atomic_begin(); \
    T c = ((S atomic<T>*)p)->__v; \
    bool same = c == *expected; \
    if (same) ((S atomic<T>*)p)->__v = v; \
    else *expected = c; \
    __msl_atomic_end(); \
    return same; \
  }
MSL_ATOMICS(__global) MSL_ATOMICS(__local)
}  // namespace metal
