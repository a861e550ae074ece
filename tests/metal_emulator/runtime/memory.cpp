// Every access of device, constant and threadgroup memory: bounds, alignment, races, unset bytes.
#include "runtime.h"

const u64 MOST_ACCESSES = 1ull << 31;  // minutes: a loop without end
const u32 ARENA = 96 * 1024, RED_ZONE = 64, MOST_VARIABLES = 256;
// Metal places threadgroup variables at 16 bytes: an assumption, as MLX casts them to wider types
const u32 LEAST_ALIGNMENT = 16;
enum Kind {
  UNSET,
  RACE_AFTER_WRITE,
  RACE_AFTER_READ,
  UNSET_OUTPUT,
  DEVICE_AFTER_WRITE,
  DEVICE_AFTER_READ
};

alignas(16) static u8 arena[ARENA];
static u32 set_by_group[ARENA];  // the group that wrote each byte
static u16 owner[ARENA];         // the variable each byte belongs to, 0: a red zone
static Shadow writes[ARENA], reads[ARENA];
static struct {
  u64 offset, size;
} variables[MOST_VARIABLES];
static u64 arena_top;

void memory_begin() {
  for (u64 i = 0; i < ARENA; i++) owner[i] = 0;
  for (auto& variable : variables) variable.size = 0;
  arena_top = RED_ZONE;
  for (u32 i = 0; i < job->buffer_count; i++) {
    Buffer& b = job->buffers[i];
    b.writes = b.reads = nullptr;
    b.reader = nullptr;
    if (!job->checked) continue;
    if (b.writable) {
      b.writes = (Shadow*)calloc(b.size + 1, sizeof(Shadow));
      b.reads = (Shadow*)calloc(b.size + 1, sizeof(Shadow));
    } else {
      b.reader = (u32*)calloc(b.size + 1, sizeof(u32));
    }
  }
}

void memory_begin_group() { __builtin_memset(arena, 0xff, arena_top); }

static u64 lines_read(const Buffer& b) {
  u64 lines = 0, last = ~0ull;
  for (u64 k = 0; k < b.size; k++) {
    if (!b.reader[k] || k / LINE_BYTES == last) continue;
    last = k / LINE_BYTES;
    lines++;
  }
  return lines;
}

void memory_end() {
  for (u32 i = 0; i < job->buffer_count; i++) {
    Buffer& b = job->buffers[i];
    for (u64 k = 0; b.writes && k < b.size; k++) b.unwritten += b.writes[k].touch == NOBODY;
    b.lines = b.reader ? lines_read(b) : 0;
    free(b.writes);
    free(b.reads);
    free(b.reader);
  }
}

extern "C" u64 __msl_variable_address(u32 number, u64 size, u32 align, u32 line) {
  if (number >= MOST_VARIABLES) fail("more than %u threadgroup variables", MOST_VARIABLES - 1);
  auto& variable = variables[number];
  if (!variable.size) {
    if (align < LEAST_ALIGNMENT) align = LEAST_ALIGNMENT;
    u64 offset = (arena_top + align - 1) / align * align;
    job->threadgroup_bytes += size;
    if (job->threadgroup_bytes > MOST_THREADGROUP_BYTES || offset + size + RED_ZONE > ARENA)
      fail("%llu bytes of threadgroup memory at line %u (limit %u)", job->threadgroup_bytes, line,
           MOST_THREADGROUP_BYTES);
    for (u64 i = 0; i < size; i++) owner[offset + i] = number;
    __builtin_memset(arena + offset, 0xff, size);
    variable = {offset, size};
    arena_top = offset + size + RED_ZONE;
  }
  return (u64)(arena + variable.offset);
}

static const char* verb(bool write) { return write ? "write" : "read"; }
static const char* whose(const Shadow& s) { return s.group == now.group ? "this" : "another"; }
static const char* site(u32 number) { return number < job->site_count ? job->sites[number] : "?"; }

// note that the current thread touched a byte; a second reader makes it several
static void note(Shadow& s, u32 epoch, u32 simd_epoch, bool write, bool atomic) {
  bool fresh = s.touch == NOBODY || s.group != now.group || s.epoch != epoch;
  if (!write && !fresh && (s.thread != current->index || s.touch > ONE_THREAD)) {
    s.touch = s.simd == current->simd && s.touch < SEVERAL ? ONE_SIMDGROUP : SEVERAL;
  } else {
    s.touch = atomic && write ? ATOMICALLY : ONE_THREAD;
    s.group = now.group;
    s.epoch = epoch;
    s.thread = current->index;
    s.simd = current->simd;
  }
  s.simd_epoch = simd_epoch;
}

// whether what touched a byte before is ordered before the current thread
static bool ordered(const Shadow& s, u32 epoch, u32 simd_epoch) {
  if (s.epoch != epoch) return true;
  bool same_simd = s.simd == current->simd && s.simd_epoch != simd_epoch;
  if (s.touch == ONE_THREAD) return s.thread == current->index || same_simd;
  return s.touch == ONE_SIMDGROUP && same_simd;
}

static void access_threadgroup(u64 offset, u32 size, bool write, bool atomic, u32 where) {
  if (offset + size > ARENA || !owner[offset] || owner[offset + size - 1] != owner[offset])
    fail("%s of %u bytes outside threadgroup memory at %s", verb(write), size, site(where));
  u32 epoch = now.threadgroup, simd_epoch = now.simd_threadgroup[current->simd];
  for (u64 k = offset; k < offset + size; k++) {
    if (!write && set_by_group[k] != now.group)
      warn(where, UNSET, "read of unset threadgroup memory at %s", site(where));
    if (write || atomic) set_by_group[k] = now.group;
    Shadow &w = writes[k], &r = reads[k];
    if (w.touch && w.touch != ATOMICALLY && !atomic && w.group == now.group &&
        !ordered(w, epoch, simd_epoch))
      warn(where, RACE_AFTER_WRITE,
           "race in threadgroup memory: %s after a write by thread %u at %s", verb(write), w.thread,
           site(where));
    if (write && !atomic && r.touch && r.group == now.group && !ordered(r, epoch, simd_epoch))
      warn(where, RACE_AFTER_READ,
           "race in threadgroup memory: write after a read by thread %u at %s", r.thread,
           site(where));
    note(write ? w : r, epoch, simd_epoch, write, atomic);
  }
}

static Buffer* buffer_at(u64 address) {
  static u32 last;
  for (u32 i = 0; i < job->buffer_count; i++) {
    u32 k = (last + i) % job->buffer_count;
    Buffer& b = job->buffers[k];
    if (address >= b.base && address < b.base + b.size) return last = k, &b;
  }
  return nullptr;
}

static u64 distance(const Buffer& b, u64 address) {
  return address < b.base ? b.base - address : address - b.base;
}

[[noreturn]] static void outside(u64 address, u32 size, bool write, u32 where) {
  if (!job->buffer_count) fail("%s of %u bytes in no buffer at %s", verb(write), size, site(where));
  Buffer* nearest = job->buffers;  // the access is meant for the buffer that begins or ends nearest
  u64 least = ~0ull;
  for (u32 i = 0; i < job->buffer_count; i++) {
    Buffer& b = job->buffers[i];
    u64 end = address - b.base - b.size, near = distance(b, address);
    if (address >= b.base + b.size && end < near) near = end;
    if (near < least) least = near, nearest = &b;
  }
  fail("out of bounds: %s of %u bytes at byte %lld of '%s', which has %llu, at %s", verb(write),
       size, (i64)(address - nearest->base), nearest->name, nearest->size, site(where));
}

static void count_read(Buffer& b, u64 offset, u32 size, u32 where) {
  b.read_bytes += size;
  if (!b.reader) return;
  loads_note(b, offset, size, where);
  for (u64 k = offset; k < offset + size; k++) {
    b.read_distinct += b.reader[k] == 0;
    b.read_by_groups += b.reader[k] != now.group;
    b.reader[k] = now.group;
  }
}

static void access_device(u64 address, u32 size, bool write, bool atomic, u32 where) {
  Buffer* b = buffer_at(address);
  if (!b || address + size > b->base + b->size) outside(address, size, write, where);
  if (write && !b->writable) fail("write to the input '%s' at %s", b->name, site(where));
  u64 offset = address - b->base;
  if (write)
    b->written_bytes += size;
  else
    count_read(*b, offset, size, where);
  if (!b->writes) return;
  u32 epoch = now.device, simd_epoch = now.simd_device[current->simd];
  for (u64 k = offset; k < offset + size; k++) {
    Shadow &w = b->writes[k], &r = b->reads[k];
    if (!write && !w.touch && !b->defined)
      warn(where, UNSET_OUTPUT, "read of the unset output '%s' at %s", b->name, site(where));
    if (w.touch && w.touch != ATOMICALLY && !atomic &&
        (w.group != now.group || !ordered(w, epoch, simd_epoch)))
      warn(where, DEVICE_AFTER_WRITE,
           "race on '%s': %s after a write by thread %u of %s threadgroup at %s", b->name,
           verb(write), w.thread, whose(w), site(where));
    if (write && !atomic && r.touch && (r.group != now.group || !ordered(r, epoch, simd_epoch)))
      warn(where, DEVICE_AFTER_READ,
           "race on '%s': write after a read by thread %u of %s threadgroup at %s", b->name,
           r.thread, whose(r), site(where));
    note(write ? w : r, epoch, simd_epoch, write, atomic);
  }
}

// info: bits 0-15 size, 16 write, 17 atomic, 18-20 address space, 21-25 log2 of the alignment
extern "C" void __msl_access(u64 address, u32 info, u32 where) {
  if (++job->accesses > MOST_ACCESSES)
    fail("the kernel does not come to an end at %s", site(where));
  u32 size = info & 0xffff, space = info >> 18 & 7;
  bool write = info >> 16 & 1, atomic = info >> 17 & 1;
  u64 align = 1ull << (info >> 21 & 31);
  bool in_arena = address >= (u64)arena && address < (u64)arena + ARENA;
  if (space == 4) {  // a pointer of any space: the thread's own memory is not watched
    if (!in_arena && !buffer_at(address)) return;
    space = in_arena ? 3 : 1;
  }
  if (address & (align - 1))
    fail("misaligned %s of %u bytes, which need %llu-byte alignment, at %s", verb(write), size,
         align, site(where));
  if (space != 3) return access_device(address, size, write, atomic, where);
  if (!in_arena)
    fail("%s of %u bytes outside threadgroup memory at %s", verb(write), size, site(where));
  access_threadgroup(address - (u64)arena, size, write, atomic, where);
}

extern "C" void __msl_access_many(u64 address, u64 size, u32 info, u32 where) {
  const u64 PIECE = 32768;
  for (u64 done = 0; done < size; done += PIECE) {
    u64 piece = size - done < PIECE ? size - done : PIECE;
    __msl_access(address + done, (info & ~0xffffu) | (u32)piece, where);
  }
}
