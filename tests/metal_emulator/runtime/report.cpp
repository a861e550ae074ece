// What went wrong, and where.
#include "runtime.h"

const u32 MOST_WARNINGS = 32, LONGEST = 512;
static char error[LONGEST];
static char warnings[MOST_WARNINGS][LONGEST];
static struct {
  u64 where;
  u32 kind;
} known[MOST_WARNINGS];
static u32 warning_count;
bool stopped;

extern "C" const char* msl_error() { return error; }
extern "C" u32 msl_warning_count() { return warning_count; }
extern "C" const char* msl_warning(u32 index) { return warnings[index]; }

void report_reset() {
  error[0] = 0;
  warning_count = 0;
  stopped = false;
}

const char* base_name(const char* path) {
  const char* name = path ? path : "?";
  for (const char* p = name; *p; p++)
    if (*p == '/') name = p + 1;
  return name;
}

static void write(char* text, const char* format, __builtin_va_list arguments) {
  int n = vsnprintf(text, LONGEST, format, arguments);
  if (!current || n < 0 || n >= (int)LONGEST) return;
  const u32* p = current->positions;
  snprintf(text + n, LONGEST - n, ", thread (%u,%u,%u) of threadgroup (%u,%u,%u)", p[IN_GROUP],
           p[IN_GROUP + 1], p[IN_GROUP + 2], p[GROUP_IN_GRID], p[GROUP_IN_GRID + 1],
           p[GROUP_IN_GRID + 2]);
}

void stop(const char* format, ...) {
  __builtin_va_list arguments;
  __builtin_va_start(arguments, format);
  if (!stopped) write(error, format, arguments);
  __builtin_va_end(arguments);
  stopped = true;
}

void fail(const char* format, ...) {
  __builtin_va_list arguments;
  __builtin_va_start(arguments, format);
  if (!stopped) write(error, format, arguments);
  __builtin_va_end(arguments);
  stopped = true;
  fiber_wait();
  abort();  // a stopped fiber is never resumed
}

void warn(u64 where, u32 kind, const char* format, ...) {
  for (u32 i = 0; i < warning_count; i++)
    if (known[i].where == where && known[i].kind == kind) return;
  if (warning_count == MOST_WARNINGS) return;
  known[warning_count] = {where, kind};
  __builtin_va_list arguments;
  __builtin_va_start(arguments, format);
  write(warnings[warning_count++], format, arguments);
  __builtin_va_end(arguments);
}

// what -fsanitize calls
struct SourceLocation {
  const char* file;
  u32 line, column;
};
#define TRAP(NAME, MESSAGE)                                                                     \
  extern "C" void __ubsan_handle_##NAME##_abort(SourceLocation* at, u64 value, u64) {           \
    fail(MESSAGE " (%lld) at %s:%u:%u", (i64)value, base_name(at->file), at->line, at->column); \
  }                                                                                             \
  extern "C" void __ubsan_handle_##NAME(SourceLocation* at, u64 value, u64 more) {              \
    __ubsan_handle_##NAME##_abort(at, value, more);                                             \
  }
TRAP(out_of_bounds, "array index out of bounds")
TRAP(divrem_overflow, "integer division by zero or overflow")
