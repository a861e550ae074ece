// The compiler built-ins that MLX's bfloat16 mathematics calls by name.
#define MSL_BUILTIN_1(N, RESULT) \
  MSL_INLINE float __metal_##N(float x, bool = false) { return metal::N(x); }
#define MSL_BUILTIN_2(N, RESULT) \
  MSL_INLINE float __metal_##N(float x, float y, bool = false) { return metal::N(x, y); }
#define MSL_BUILTIN_3(N, RESULT) \
  MSL_INLINE float __metal_##N(float x, float y, float z, bool = false) { \
    return metal::N(x, y, z); }
MSL_EACH_UNARY(MSL_BUILTIN_1) MSL_EACH_BINARY(MSL_BUILTIN_2) MSL_EACH_TERNARY(MSL_BUILTIN_3)
MSL_INLINE float __metal_ldexp(float x, int k, bool = false) { return metal::ldexp(x, k); }
MSL_INLINE float __metal_frexp(float x, __private int* e) { return frexpf(x, e); }
MSL_INLINE ushort __metal_get_simdgroup_size(ushort) { return 32; }
MSL_INLINE float __metal_simd_xor(float v) { return v; }
#define MSL_BUILTIN_MOVE(N) \
  MSL_INLINE ushort __metal_simd_##N(ushort v, ushort lane, __msl_place at = MSL_PLACE) { \
    return metal::simd_##N(v, lane, at); }
MSL_BUILTIN_MOVE(broadcast) MSL_BUILTIN_MOVE(shuffle) MSL_BUILTIN_MOVE(shuffle_down)
MSL_BUILTIN_MOVE(shuffle_up) MSL_BUILTIN_MOVE(shuffle_xor) MSL_BUILTIN_MOVE(shuffle_rotate_down)
MSL_BUILTIN_MOVE(shuffle_rotate_up)
#define MSL_BUILTIN_FILL(N) \
  MSL_INLINE ushort __metal_simd_##N(ushort v, ushort fill, ushort delta, ushort width, \
                                     __msl_place at = MSL_PLACE) { \
    return metal::simd_##N(v, fill, delta, width, at); }
MSL_BUILTIN_FILL(shuffle_and_fill_down) MSL_BUILTIN_FILL(shuffle_and_fill_up)
#define MSL_BUILTIN_REDUCE(N) \
  MSL_INLINE float __metal_simd_##N(float v, __msl_place at = MSL_PLACE) { \
    return metal::simd_##N(v, at); }
MSL_BUILTIN_REDUCE(max) MSL_BUILTIN_REDUCE(min) MSL_BUILTIN_REDUCE(product) MSL_BUILTIN_REDUCE(sum)
MSL_BUILTIN_REDUCE(prefix_exclusive_product) MSL_BUILTIN_REDUCE(prefix_exclusive_sum)
MSL_BUILTIN_REDUCE(prefix_inclusive_product) MSL_BUILTIN_REDUCE(prefix_inclusive_sum)
