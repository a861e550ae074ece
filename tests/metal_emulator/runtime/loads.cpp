// One load of a simdgroup: the same place in the text, for the n-th time since its lanes last met.
#include "runtime.h"

const u32 SLOTS = 1024, MOST_LINES = 2 * LANES;
struct Load {
  u32 since;  // the meeting it follows; another one's is free
  u32 where, nth, count;
  Buffer* buffer;
  u64 lines[MOST_LINES];
};
struct Times {
  u32 since, where, count;
};
static Load loads[LANES][SLOTS];           // of each simdgroup
static Times times[MOST_THREADS][SLOTS];  // how often each thread came by a place
static u32 meetings[LANES];

static u32 slot_of(u32 a, u32 b) { return (a * 2654435761u + b * 40503u) % SLOTS; }

static u32 nth_time(u32 where, u32 since) {
  for (u32 i = slot_of(where, 0), tried = 0; tried < SLOTS; i = (i + 1) % SLOTS, tried++) {
    Times& t = times[current->index][i];
    if (t.since != since) t = {since, where, 0};
    if (t.where == where) return t.count++;
  }
  fail("more than %u places are read between two meetings of a simdgroup", SLOTS);
}

void loads_note(Buffer& buffer, u64 offset, u32 size, u32 where) {
  u32 simd = current->simd;
  if (!meetings[simd]) meetings[simd] = 1;
  u32 since = meetings[simd], nth = nth_time(where, since);
  for (u32 i = slot_of(where, nth), tried = 0; tried < SLOTS; i = (i + 1) % SLOTS, tried++) {
    Load& load = loads[simd][i];
    if (load.since != since) {
      load.since = since;
      load.where = where;
      load.nth = nth;
      load.count = 0;
      load.buffer = &buffer;
    }
    if (load.where != where || load.nth != nth) continue;
    for (u64 line = offset / LINE_BYTES; line <= (offset + size - 1) / LINE_BYTES; line++) {
      bool known = false;
      for (u32 k = 0; k < load.count; k++) known |= load.lines[k] == line;
      if (known || load.count == MOST_LINES) continue;
      load.lines[load.count++] = line;
      buffer.lines_touched++;
    }
    return;
  }
  fail("more than %u loads between two meetings of a simdgroup", SLOTS);
}

void loads_end(u32 simd) { meetings[simd]++; }
