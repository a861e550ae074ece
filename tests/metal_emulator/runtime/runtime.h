// The runtime: one threadgroup at a time, one fiber for each of its threads. No library headers, so
// that any clang compiles it; it links against the C library alone.
#pragma once
#include "../shim/operations.h"
using u8 = unsigned char;
using u16 = unsigned short;
using u32 = unsigned int;
using i64 = long long;
using u64 = unsigned long long;

extern "C" {
void* calloc(__SIZE_TYPE__, __SIZE_TYPE__);
void free(void*);
void abort(void) __attribute__((noreturn));
int snprintf(char*, __SIZE_TYPE__, const char*, ...) __attribute__((format(printf, 3, 4)));
int vsnprintf(char*, __SIZE_TYPE__, const char*, __builtin_va_list);
float fmaf(float, float, float);
float fminf(float, float);
float fmaxf(float, float);
}

// places in a thread's row of positions: signature.py has the same
enum Position {
  IN_GRID = 0,
  GROUP_IN_GRID = 3,
  IN_GROUP = 6,
  GROUP_SIZE = 9,
  GRID_SIZE = 12,
  GROUPS = 15,
  DISPATCHED_GROUP_SIZE = 18,
  ORIGIN = 21,
  GRID_SIZE_AGAIN = 24,
  INDEX_IN_GROUP = 27,
  LANE = 28,
  SIMDGROUP = 29,
  SIMDGROUPS = 30,
  SIMD_WIDTH = 31,
  DISPATCHED_SIMDGROUPS = 32,
  QUAD_LANE = 33,
  QUAD = 34,
  QUADS = 35,
  DISPATCHED_QUADS = 36,
  POSITIONS = 40
};
const u32 LANES = 32, QUAD_LANES = 4, MOST_THREADS = 1024, MOST_THREADGROUP_BYTES = 32768;
const u32 LINE_BYTES = 128;  // of a GPU's cache

// who touched a byte last, and between which barriers. An epoch counts barriers, over all groups.
enum Touch : u8 { NOBODY, ONE_THREAD, ONE_SIMDGROUP, SEVERAL, ATOMICALLY };
struct Shadow {
  u32 group, epoch, simd_epoch;
  u16 thread, simd;
  Touch touch;
};

// one buffer of the dispatch: the first five come from Python, the counts go back
struct Buffer {
  u64 base, size;
  u32 writable, defined;  // defined: may be read before the kernel writes it
  const char* name;
  u64 read_bytes, read_by_groups, read_distinct, written_bytes, unwritten;
  u64 lines_touched, lines;  // once for each load of a simdgroup; and how many there are
  Shadow *writes, *reads;  // of writable buffers
  u32* reader;             // of the others: the group that read each byte last
};

// one run of a kernel; dispatch.py has the same
struct Job {
  void (*entry)(const u64*, const u32*);
  const u64* arguments;
  Buffer* buffers;
  const char* const* sites;
  u32 buffer_count, site_count;
  u32 threads[3], group[3];
  u32 schedule;  // 0 forward, 1 backward, others: a shuffle of that seed
  u32 checked;
  u64 threads_run, accesses, simd_operations, barriers, threadgroup_bytes;
};

enum State { RUNNING, AT_SIMD, AT_BARRIER, DONE };
struct Place {
  const char* file;
  u32 line, column;
};
struct Fiber {
  void* stack_pointer;
  State state;
  u32 index, lane, simd;
  u32 positions[POSITIONS];
  u32 operation, type, count, memory;  // what it waits for
  void* values;
  u64 argument;
  Place place;
};

extern Job* job;
extern Fiber* current;  // null between threads
extern Fiber fibers[MOST_THREADS];
extern bool stopped;

// the running group, counted over all dispatches, and the barriers that it has passed
struct Epochs {
  u32 group, threadgroup, device, simd_threadgroup[LANES], simd_device[LANES];
};
extern Epochs now;

// report.cpp
void report_reset();
void stop(const char* format, ...) __attribute__((format(printf, 1, 2)));  // and go on
[[noreturn]] void fail(const char* format, ...)
    __attribute__((format(printf, 1, 2)));  // leave the fiber
void warn(u64 where, u32 kind, const char* format, ...) __attribute__((format(printf, 3, 4)));
const char* base_name(const char* path);

// fibers.cpp
void fiber_start(Fiber& fiber);
void fiber_run(Fiber& fiber);
void fiber_wait();

// loads.cpp: the lines that the lanes of a simdgroup touch with one load
void loads_note(Buffer& buffer, u64 offset, u32 size, u32 where);
void loads_end(u32 simd);

// memory.cpp
void memory_begin();
void memory_begin_group();
void memory_end();
extern const u8 TYPE_SIZE[];

// lanes.cpp: resolve what the waiting lanes of one simdgroup ask for; null: an inactive lane
void resolve(Fiber** lanes, u32 width);

inline bool same_place(const Place& a, const Place& b) {
  return a.line == b.line && a.column == b.column && a.file == b.file;
}
