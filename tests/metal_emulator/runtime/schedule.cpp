// Which thread runs when: forward, backward, or shuffled.
#include "runtime.h"

Job* job;
Epochs now;
static u64 random_state;
static u32 group_size[3], group_threads, simdgroups, threads_left;

static u32 random(u32 below) {
  random_state = random_state * 6364136223846793005ull + 1442695040888963407ull;
  return (u32)(random_state >> 33) % below;
}

static void arrange(u32* order, u32 n) {
  for (u32 i = 0; i < n; i++) order[i] = job->schedule == 1 ? n - 1 - i : i;
  if (job->schedule > 1)
    for (u32 i = n; i > 1; i--) {
      u32 k = random(i), kept = order[i - 1];
      order[i - 1] = order[k];
      order[k] = kept;
    }
}

extern "C" void __msl_simd(u32 operation, u32 type, u32 count, u64 values, u64 argument,
                           const char* file, u32 line, u32 column) {
  Fiber& f = *current;
  f.operation = operation;
  f.type = type;
  f.count = count;
  f.values = (void*)values;
  f.argument = argument;
  f.place = {file, line, column};
  f.state = AT_SIMD;
  job->simd_operations++;
  fiber_wait();
}

extern "C" void __msl_barrier(u32 memory, const char* file, u32 line, u32 column) {
  current->memory = memory;
  current->place = {file, line, column};
  current->state = AT_BARRIER;
  job->barriers++;
  fiber_wait();
}

static void set_positions(Fiber& f, u32 index, const u32 group[3], const u32 groups[3]) {
  u32* p = f.positions;
  u32 local[3] = {index % group_size[0], index / group_size[0] % group_size[1],
                  index / group_size[0] / group_size[1]};
  u32 dispatched = job->group[0] * job->group[1] * job->group[2];
  for (u32 i = 0; i < 3; i++) {
    p[IN_GRID + i] = group[i] * job->group[i] + local[i];
    p[GROUP_IN_GRID + i] = group[i];
    p[IN_GROUP + i] = local[i];
    p[GROUP_SIZE + i] = group_size[i];
    p[GRID_SIZE + i] = p[GRID_SIZE_AGAIN + i] = job->threads[i];
    p[GROUPS + i] = groups[i];
    p[DISPATCHED_GROUP_SIZE + i] = job->group[i];
    p[ORIGIN + i] = 0;
  }
  p[INDEX_IN_GROUP] = index;
  p[LANE] = index % LANES;
  p[SIMDGROUP] = index / LANES;
  p[SIMDGROUPS] = simdgroups;
  p[SIMD_WIDTH] = LANES;
  p[DISPATCHED_SIMDGROUPS] = (dispatched + LANES - 1) / LANES;
  p[QUAD_LANE] = index % QUAD_LANES;
  p[QUAD] = index / QUAD_LANES;
  p[QUADS] = (group_threads + QUAD_LANES - 1) / QUAD_LANES;
  p[DISPATCHED_QUADS] = (dispatched + QUAD_LANES - 1) / QUAD_LANES;
}

static void begin_group(u32 number, const u32 groups[3]) {
  u32 group[3] = {number % groups[0], number / groups[0] % groups[1],
                  number / groups[0] / groups[1]};
  for (u32 i = 0; i < 3; i++) {  // the groups at the edge are ragged
    u32 left = job->threads[i] - group[i] * job->group[i];
    group_size[i] = left < job->group[i] ? left : job->group[i];
  }
  group_threads = threads_left = group_size[0] * group_size[1] * group_size[2];
  simdgroups = (group_threads + LANES - 1) / LANES;
  now.group++;
  now.threadgroup++;
  now.device++;
  memory_begin_group();
  for (u32 i = 0; i < group_threads; i++) {
    Fiber& f = fibers[i];
    f.state = RUNNING;
    f.index = i;
    f.lane = i % LANES;
    f.simd = i / LANES;
    set_positions(f, i, group, groups);
    if (f.lane == 0) loads_end(f.simd);
    fiber_start(f);
  }
  job->threads_run += group_threads;
}

// run the lanes of one simdgroup until all of them wait or are done
static void run_lanes(u32 begin, u32 n) {
  u32 order[LANES];
  arrange(order, n);
  for (u32 i = 0; i < n && !stopped; i++) {
    Fiber& f = fibers[begin + order[i]];
    if (f.state != RUNNING) continue;
    fiber_run(f);
    threads_left -= f.state == DONE;
  }
}

// let the lanes that wait for one another go on; false: none waits for its simdgroup
static bool meet(u32 begin, u32 n) {
  Fiber* first = nullptr;
  for (u32 i = begin; i < begin + n; i++)
    if (fibers[i].state == AT_SIMD && (!first || fibers[i].place.line < first->place.line))
      first = &fibers[i];
  if (!first) return false;
  Fiber* lanes[LANES] = {};
  u32 elsewhere = 0;
  for (u32 i = 0; i < n; i++) {
    Fiber& f = fibers[begin + i];
    bool together = f.state == AT_SIMD && f.operation == first->operation &&
                    f.type == first->type && same_place(f.place, first->place);
    if (together)
      lanes[i] = &f;
    else
      elsewhere += f.state != DONE;
  }
  if (elsewhere) {
    current = first;
    stop("simdgroup operation in divergent flow at %s:%u:%u (%u lanes wait elsewhere)",
         base_name(first->place.file), first->place.line, first->place.column, elsewhere);
    return false;
  }
  resolve(lanes, LANES);
  loads_end(first->simd);
  for (Fiber* f : lanes)
    if (f) f->state = RUNNING;
  return !stopped;
}

// all threads that are left stand at a barrier: it must be the same one, and nobody may be missing
static void pass_barrier() {
  Fiber* first = nullptr;
  u32 memory = 0;
  for (u32 i = group_threads; i-- > 0;) {
    if (fibers[i].state != AT_BARRIER) continue;
    first = &fibers[i];
    memory |= first->memory;
  }
  current = first;
  if (threads_left != group_threads)
    return stop("barrier divergence: %u of %u threads returned before the barrier at %s:%u:%u",
                group_threads - threads_left, group_threads, base_name(first->place.file),
                first->place.line, first->place.column);
  for (u32 i = 0; i < group_threads; i++) {
    const Place& other = fibers[i].place;
    if (!same_place(other, first->place))
      return stop("barrier divergence: threads wait at %s:%u:%u and at %s:%u:%u",
                  base_name(first->place.file), first->place.line, first->place.column,
                  base_name(other.file), other.line, other.column);
    fibers[i].state = RUNNING;
    if (fibers[i].lane == 0) loads_end(fibers[i].simd);
  }
  if (memory & MSL_THREADGROUP) now.threadgroup++;
  if (memory & MSL_DEVICE) now.device++;
}

static void run_group() {
  u32 order[LANES];
  while (!stopped) {
    arrange(order, simdgroups);
    for (u32 i = 0; i < simdgroups && !stopped; i++) {
      u32 begin = order[i] * LANES;
      u32 n = group_threads - begin < LANES ? group_threads - begin : LANES;
      do run_lanes(begin, n);
      while (!stopped && meet(begin, n));
    }
    if (stopped || !threads_left) return;
    pass_barrier();
  }
}

extern "C" int msl_run(Job* given) {
  job = given;
  current = nullptr;
  report_reset();
  random_state = job->schedule;
  u64 threads = (u64)job->group[0] * job->group[1] * job->group[2];
  if (threads == 0 || threads > MOST_THREADS) {
    stop("a threadgroup of %llu threads (limit %u)", threads, MOST_THREADS);
    return 1;
  }
  u32 groups[3];
  for (u32 i = 0; i < 3; i++) groups[i] = (job->threads[i] + job->group[i] - 1) / job->group[i];
  u32 count = groups[0] * groups[1] * groups[2];
  u32* order = (u32*)calloc(count + 1, sizeof(u32));
  arrange(order, count);
  memory_begin();
  for (u32 i = 0; i < count && !stopped; i++) {
    begin_group(order[i], groups);
    run_group();
  }
  memory_end();
  free(order);
  current = nullptr;
  return stopped;
}
