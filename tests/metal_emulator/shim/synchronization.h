// Barriers, fences, threadgroup variables; and the source position of a call.
struct __msl_place { const __constant char* file; uint line, column; };
#define MSL_PLACE __msl_place{__builtin_FILE(), __builtin_LINE(), __builtin_COLUMN()}
extern "C" {
void __msl_simd(uint operation, uint type, uint count, ulong values, ulong argument,
                const __constant char* file, uint line, uint column);
void __msl_barrier(uint memory, const __constant char* file, uint line, uint column);
ulong __msl_variable_address(uint number, ulong size, uint align, uint line);
}
// wait for the other lanes of the simdgroup, and do with them what all ask for
MSL_INLINE void __msl_meet(uint operation, uint type, uint count, ulong values, ulong argument,
                           __msl_place at) {
  __msl_simd(operation, type, count, values, argument, at.file, at.line, at.column);
}
template <class T> MSL_INLINE __local T& __msl_variable(uint number, uint line) {
  return *(__local T*)__msl_variable_address(number, sizeof(T), alignof(T), line);
}

namespace metal {
enum class mem_flags : uint {
  mem_none = 0, mem_device = MSL_DEVICE, mem_threadgroup = MSL_THREADGROUP, mem_texture = 4,
  mem_threadgroup_imageblock = 8, mem_object_data = 16
};
MSL_INLINE constexpr mem_flags operator|(mem_flags a, mem_flags b) {
  return (mem_flags)((uint)a | (uint)b);
}
MSL_INLINE constexpr mem_flags operator&(mem_flags a, mem_flags b) {
  return (mem_flags)((uint)a & (uint)b);
}
enum memory_order { memory_order_relaxed = 0, memory_order_seq_cst = 5 };
enum thread_scope {
  thread_scope_thread, thread_scope_simdgroup, thread_scope_threadgroup, thread_scope_device
};
MSL_INLINE void threadgroup_barrier(mem_flags flags, __msl_place at = MSL_PLACE) {
  __msl_barrier((uint)flags, at.file, at.line, at.column);
}
MSL_INLINE void simdgroup_barrier(mem_flags flags, __msl_place at = MSL_PLACE) {
  __msl_meet(MSL_SIMD_BARRIER, 0, 0, 0, (ulong)flags, at);
}
MSL_INLINE void atomic_thread_fence(mem_flags, memory_order = memory_order_seq_cst,
                                    thread_scope = thread_scope_device) {}
}  // namespace metal
