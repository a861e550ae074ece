// <metal_limits>.
namespace metal {
template <class T> struct numeric_limits {};
#define MSL_LIMITS(T, LEAST, LARGEST, LOWEST, DIGITS, INTEGER, MORE) \
  template <> struct numeric_limits<T> { \
    static constexpr T min() { return LEAST; } \
    static constexpr T max() { return LARGEST; } \
    static constexpr T lowest() { return LOWEST; } \
    static constexpr __constant int digits = DIGITS; \
    static constexpr __constant bool is_specialized = true; \
    static constexpr __constant bool is_integer = INTEGER; \
    static constexpr __constant bool has_infinity = !INTEGER; \
    MORE \
  };
#define MSL_INTEGER_LIMITS(T, LEAST, LARGEST, DIGITS) \
  MSL_LIMITS(T, LEAST, LARGEST, LEAST, DIGITS, true, )
#define MSL_FLOAT_LIMITS(T, LEAST, LARGEST, EPSILON, DIGITS) \
  MSL_LIMITS(T, (T)LEAST, (T)LARGEST, (T)-LARGEST, DIGITS, false, \
    static constexpr T infinity() { return (T)__builtin_inff(); } \
    static constexpr T quiet_NaN() { return (T)__builtin_nanf(""); } \
    static constexpr T epsilon() { return (T)EPSILON; } \
    static constexpr T denorm_min() { return (T)0; })
MSL_INTEGER_LIMITS(bool, false, true, 1)
MSL_INTEGER_LIMITS(char, (char)-128, 127, 7)
MSL_INTEGER_LIMITS(uchar, 0, 255, 8)
MSL_INTEGER_LIMITS(short, (short)-32768, 32767, 15)
MSL_INTEGER_LIMITS(ushort, 0, 65535, 16)
MSL_INTEGER_LIMITS(int, (-2147483647 - 1), 2147483647, 31)
MSL_INTEGER_LIMITS(uint, 0u, 4294967295u, 32)
MSL_INTEGER_LIMITS(long, (-9223372036854775807L - 1), 9223372036854775807L, 63)
MSL_INTEGER_LIMITS(ulong, 0ul, 18446744073709551615ul, 64)
MSL_FLOAT_LIMITS(float, 1.17549435e-38f, 3.40282347e+38f, 1.1920929e-7f, 24)
MSL_FLOAT_LIMITS(half, 6.103515625e-5f, 65504.0f, 9.765625e-4f, 11)
MSL_FLOAT_LIMITS(bfloat, 1.17549435e-38f, 3.38953139e+38f, 0.0078125f, 8)
}  // namespace metal
