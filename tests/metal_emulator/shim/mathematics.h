// <metal_math>, <metal_common>: the same in metal::, fast:: and precise::, all from the C library.
extern "C" {
#define MSL_C_UNARY(N) float N##f(float);
MSL_C_UNARY(exp) MSL_C_UNARY(exp2) MSL_C_UNARY(log) MSL_C_UNARY(log2) MSL_C_UNARY(log10)
MSL_C_UNARY(sin) MSL_C_UNARY(cos) MSL_C_UNARY(tan) MSL_C_UNARY(asin) MSL_C_UNARY(acos)
MSL_C_UNARY(atan) MSL_C_UNARY(sinh) MSL_C_UNARY(cosh) MSL_C_UNARY(tanh) MSL_C_UNARY(asinh)
MSL_C_UNARY(acosh) MSL_C_UNARY(atanh) MSL_C_UNARY(rint) MSL_C_UNARY(round) MSL_C_UNARY(trunc)
MSL_C_UNARY(floor) MSL_C_UNARY(ceil) MSL_C_UNARY(sqrt)
float atan2f(float, float); float powf(float, float); float fmodf(float, float);
float nextafterf(float, float); float ldexpf(float, int); float fmaf(float, float, float);
float frexpf(float, __generic int*);
}
MSL_INLINE float __msl_max(float a, float b) { return a != a ? b : b != b ? a : a > b ? a : b; }
MSL_INLINE float __msl_min(float a, float b) { return a != a ? b : b != b ? a : a < b ? a : b; }
MSL_INLINE float __msl_fract(float x) { return __msl_min(x - floorf(x), 0x1.fffffep-1f); }
MSL_INLINE float __msl_median(float a, float b, float c) {
  return __msl_max(__msl_min(a, b), __msl_min(__msl_max(a, b), c));
}
MSL_INLINE float __msl_sign(float x) { return x > 0 ? 1.0f : x < 0 ? -1.0f : x == x ? x : 0.0f; }

#define MSL_EACH_UNARY(X) \
  X(acos, acosf(x)) X(acosh, acoshf(x)) X(asin, asinf(x)) X(asinh, asinhf(x)) X(atan, atanf(x)) \
  X(atanh, atanhf(x)) X(ceil, ceilf(x)) X(cos, cosf(x)) X(cosh, coshf(x)) \
  X(cospi, cosf(x * 3.14159265358979323846f)) X(exp, expf(x)) X(exp10, powf(10.0f, x)) \
  X(exp2, exp2f(x)) X(fabs, __builtin_fabsf(x)) X(floor, floorf(x)) X(fract, __msl_fract(x)) \
  X(log, logf(x)) X(log10, log10f(x)) X(log2, log2f(x)) X(rint, rintf(x)) X(round, roundf(x)) \
  X(rsqrt, 1.0f / sqrtf(x)) X(sin, sinf(x)) X(sinh, sinhf(x)) \
  X(sinpi, sinf(x * 3.14159265358979323846f)) X(sqrt, sqrtf(x)) X(tan, tanf(x)) \
  X(tanh, tanhf(x)) X(tanpi, tanf(x * 3.14159265358979323846f)) X(trunc, truncf(x))
#define MSL_EACH_BINARY(X) \
  X(atan2, atan2f(x, y)) X(divide, x / y) X(fmax, __msl_max(x, y)) X(fmin, __msl_min(x, y)) \
  X(fmod, fmodf(x, y)) X(nextafter, nextafterf(x, y)) X(pow, powf(x, y)) X(powr, powf(x, y))
#define MSL_EACH_TERNARY(X) \
  X(fmax3, __msl_max(__msl_max(x, y), z)) X(fmin3, __msl_min(__msl_min(x, y), z)) \
  X(fmedian3, __msl_median(x, y, z)) X(fma, fmaf(x, y, z))

#define MSL_UNARY(NAME, RESULT) \
  MSL_INLINE float NAME(float x) { return RESULT; } \
  MSL_INLINE half NAME(half h) { float x = h; return (half)(RESULT); } \
  template <class T, int N> MSL_INLINE vec<T, N> NAME(vec<T, N> v) { \
    vec<T, N> r; for (int i = 0; i < N; i++) r[i] = NAME(v[i]); return r; }
#define MSL_BINARY(NAME, RESULT) \
  MSL_INLINE float NAME(float x, float y) { return RESULT; } \
  MSL_INLINE half NAME(half g, half h) { float x = g, y = h; return (half)(RESULT); } \
  template <class T, int N> MSL_INLINE vec<T, N> NAME(vec<T, N> v, vec<T, N> w) { \
    vec<T, N> r; for (int i = 0; i < N; i++) r[i] = NAME(v[i], w[i]); return r; }
#define MSL_TERNARY(NAME, RESULT) \
  MSL_INLINE float NAME(float x, float y, float z) { return RESULT; } \
  MSL_INLINE half NAME(half f, half g, half h) { \
    float x = f, y = g, z = h; return (half)(RESULT); } \
  template <class T, int N> MSL_INLINE vec<T, N> NAME(vec<T, N> u, vec<T, N> v, vec<T, N> w) { \
    vec<T, N> r; for (int i = 0; i < N; i++) r[i] = NAME(u[i], v[i], w[i]); return r; }
#define MSL_COMMON(T) \
  MSL_INLINE T abs(T x) { return (T)__builtin_fabsf((float)x); } \
  MSL_INLINE T ldexp(T x, int k) { return (T)ldexpf((float)x, k); } \
  MSL_INLINE T max(T x, T y) { return (T)__msl_max(x, y); } \
  MSL_INLINE T min(T x, T y) { return (T)__msl_min(x, y); } \
  MSL_INLINE T max3(T x, T y, T z) { return max(max(x, y), z); } \
  MSL_INLINE T min3(T x, T y, T z) { return min(min(x, y), z); } \
  MSL_INLINE T median3(T x, T y, T z) { return (T)__msl_median(x, y, z); } \
  MSL_INLINE T clamp(T x, T low, T high) { return min(max(x, low), high); } \
  MSL_INLINE T mix(T x, T y, T a) { return x + (y - x) * a; } \
  MSL_INLINE T saturate(T x) { return min(max(x, (T)0), (T)1); } \
  MSL_INLINE T sign(T x) { return (T)__msl_sign(x); } \
  MSL_INLINE T step(T edge, T x) { return x < edge ? (T)0 : (T)1; } \
  MSL_INLINE T fdim(T x, T y) { return x > y ? x - y : (T)0; } \
  MSL_INLINE T sincos(T x, __private T& c) { c = cos(x); return sin(x); }
#define MSL_OVER_VECTORS \
  template <class T, int N> MSL_INLINE vec<T, N> max(vec<T, N> v, vec<T, N> w) { \
    vec<T, N> r; for (int i = 0; i < N; i++) r[i] = max(v[i], w[i]); return r; } \
  template <class T, int N> MSL_INLINE vec<T, N> min(vec<T, N> v, vec<T, N> w) { \
    vec<T, N> r; for (int i = 0; i < N; i++) r[i] = min(v[i], w[i]); return r; } \
  template <class T, int N> MSL_INLINE vec<T, N> abs(vec<T, N> v) { \
    vec<T, N> r; for (int i = 0; i < N; i++) r[i] = abs(v[i]); return r; } \
  template <class T, int N> \
  MSL_INLINE vec<T, N> clamp(vec<T, N> v, vec<T, N> low, vec<T, N> high) { \
    vec<T, N> r; for (int i = 0; i < N; i++) r[i] = clamp(v[i], low[i], high[i]); return r; } \
  template <class T, int N> MSL_INLINE vec<T, N> mix(vec<T, N> v, vec<T, N> w, vec<T, N> a) { \
    vec<T, N> r; for (int i = 0; i < N; i++) r[i] = mix(v[i], w[i], a[i]); return r; }
#define MSL_MATHEMATICS \
  MSL_EACH_UNARY(MSL_UNARY) MSL_EACH_BINARY(MSL_BINARY) MSL_EACH_TERNARY(MSL_TERNARY) \
  MSL_EACH_FLOAT(MSL_COMMON) MSL_OVER_VECTORS
#define MSL_CLASSES(T) \
  MSL_INLINE bool isnan(T x) { return __builtin_isnan((float)x); } \
  MSL_INLINE bool isinf(T x) { return __builtin_isinf((float)x); } \
  MSL_INLINE bool isfinite(T x) { return __builtin_isfinite((float)x); } \
  MSL_INLINE bool signbit(T x) { return __builtin_signbit((float)x); } \
  MSL_INLINE T copysign(T x, T y) { return (T)__builtin_copysignf((float)x, (float)y); }

namespace metal {
MSL_MATHEMATICS
namespace fast { MSL_MATHEMATICS }
namespace precise { MSL_MATHEMATICS }
MSL_EACH_FLOAT(MSL_CLASSES)
MSL_INLINE bool isnan(bfloat x) { return __builtin_isnan((float)x); }
MSL_INLINE bool isinf(bfloat x) { return __builtin_isinf((float)x); }
MSL_INLINE bool isfinite(bfloat x) { return __builtin_isfinite((float)x); }
template <class T, int N> MSL_INLINE T dot(vec<T, N> a, vec<T, N> b) {
  T s = a[0] * b[0];
  for (int i = 1; i < N; i++) s += a[i] * b[i];
  return s;
}
template <class T, int N> MSL_INLINE T length_squared(vec<T, N> a) { return dot(a, a); }
template <int N> MSL_INLINE float length(vec<float, N> a) { return sqrt(dot(a, a)); }
}  // namespace metal
