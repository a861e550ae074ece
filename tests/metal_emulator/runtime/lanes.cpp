// What the lanes of a simdgroup do together.
#include "runtime.h"

extern const u8 TYPE_SIZE[] = {1, 1, 2, 2, 4, 4, 8, 8, 2, 2, 4};
const u32 MATRIX = 8, LARGEST_VALUE = 64;
const u16 QUIET_NAN = 0x7fc0;

static float load(const void* p, u32 type) {
  if (type == MSL_FLOAT) return *(const float*)p;
  if (type == MSL_HALF) return (float)*(const _Float16*)p;
  return __builtin_bit_cast(float, (u32) * (const u16*)p << 16);
}

static u16 to_bfloat(float f) {  // round to nearest, ties to even
  u32 bits = __builtin_bit_cast(u32, f);
  if ((bits & 0x7fffffff) > 0x7f800000) return QUIET_NAN;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

static void store(void* p, u32 type, float f) {
  if (type == MSL_FLOAT)
    *(float*)p = f;
  else if (type == MSL_HALF)
    *(_Float16*)p = (_Float16)f;
  else
    *(u16*)p = to_bfloat(f);
}

// The compiler calls this to round to bfloat. The result travels in the low half of a float
// register, and a float as the return type gives it the right one.
extern "C" float __truncsfbf2(float f) { return __builtin_bit_cast(float, (u32)to_bfloat(f)); }
extern "C" u32 __msl_lane() { return current->lane; }

struct Value {
  float f;
  i64 i;
};

static Value get(const void* p, u32 type) {
  switch (type) {
    case MSL_CHAR: return {0, *(const signed char*)p};
    case MSL_UCHAR: return {0, *(const u8*)p};
    case MSL_SHORT: return {0, *(const short*)p};
    case MSL_USHORT: return {0, *(const u16*)p};
    case MSL_INT: return {0, *(const int*)p};
    case MSL_UINT: return {0, *(const u32*)p};
    default: return {load(p, type), 0};
  }
}

static void put(void* p, u32 type, Value v) {
  if (type >= MSL_HALF)
    store(p, type, v.f);
  else
    __builtin_memcpy(p, &v.i, TYPE_SIZE[type]);
}

static Value combine(u32 operation, u32 type, Value a, Value b) {
  Value r = {0, 0};
  switch (operation) {
    case MSL_SUM: r = {a.f + b.f, a.i + b.i}; break;
    case MSL_PRODUCT: r = {a.f * b.f, a.i * b.i}; break;
    case MSL_MIN: r = {fminf(a.f, b.f), a.i < b.i ? a.i : b.i}; break;
    case MSL_MAX: r = {fmaxf(a.f, b.f), a.i > b.i ? a.i : b.i}; break;
    case MSL_AND: r.i = a.i & b.i; break;
    case MSL_OR: r.i = a.i | b.i; break;
    case MSL_XOR: r.i = a.i ^ b.i; break;
  }
  u64 rounded;
  put(&rounded, type, r);
  return get(&rounded, type);
}

// pairwise: the order in which Apple's hardware adds is not known
static void reduce(Fiber** lanes, u32 width, u8 in[][LARGEST_VALUE]) {
  Fiber* first = *lanes;
  for (u32 i = 0; !first; i++) first = lanes[i];
  for (u32 k = 0; k < first->count; k++) {
    u32 at = k * TYPE_SIZE[first->type];
    Value v[LANES];
    bool active[LANES];
    for (u32 i = 0; i < width; i++)
      if ((active[i] = lanes[i])) v[i] = get(in[i] + at, first->type);
    for (u32 step = 1; step < width; step *= 2)
      for (u32 i = 0; i < width; i += 2 * step) {
        if (active[i] && active[i + step])
          v[i] = combine(first->operation, first->type, v[i], v[i + step]);
        else if (active[i + step])
          v[i] = v[i + step];
        active[i] |= active[i + step];
      }
    for (u32 i = 0; i < width; i++)
      if (lanes[i]) put((u8*)lanes[i]->values + at, first->type, v[0]);
  }
}

static void prefix(Fiber** lanes, u32 width, const Fiber* first, u8 in[][LARGEST_VALUE]) {
  bool product = first->operation >= MSL_INCLUSIVE_PRODUCT;
  bool inclusive =
      first->operation == MSL_INCLUSIVE_SUM || first->operation == MSL_INCLUSIVE_PRODUCT;
  for (u32 k = 0; k < first->count; k++) {
    u32 at = k * TYPE_SIZE[first->type];
    Value so_far = product ? Value{1, 1} : Value{0, 0};
    for (u32 i = 0; i < width; i++) {
      if (!lanes[i]) continue;
      Value with = combine(product ? MSL_PRODUCT : MSL_SUM, first->type, so_far,
                           get(in[i] + at, first->type));
      put((u8*)lanes[i]->values + at, first->type, inclusive ? with : so_far);
      so_far = with;
    }
  }
}

// the lane that lane i reads; with fill: the lane whose fill value it takes
static int source(const Fiber& f, int i, int width, int first, bool& fill) {
  int a = (int)f.argument, part = (int)(f.argument >> 32) ? (int)(f.argument >> 32) : width;
  int inside = i % part;
  switch (f.operation) {
    case MSL_BROADCAST_FIRST: return first;
    case MSL_SHUFFLE_XOR: return i ^ a;
    case MSL_SHUFFLE_UP: return i < a ? i : i - a;
    case MSL_SHUFFLE_DOWN: return i + a >= width ? i : i + a;
    case MSL_ROTATE_UP: return (i - a) & (width - 1);
    case MSL_ROTATE_DOWN: return (i + a) & (width - 1);
    case MSL_FILL_UP: fill = inside < a; return fill ? i + part - a : i - a;
    case MSL_FILL_DOWN: fill = inside + a >= part; return fill ? i - part + a : i + a;
    default: return a;  // shuffle, broadcast
  }
}

static void move(Fiber** lanes, int width, int first, u8 in[][LARGEST_VALUE]) {
  for (int i = 0; i < width; i++) {
    if (!lanes[i]) continue;
    Fiber& f = *lanes[i];
    u32 bytes = f.count * TYPE_SIZE[f.type];
    bool fill = false;
    int from = source(f, i, width, first, fill);
    if (from >= 0 && from < width && lanes[from]) {
      __builtin_memcpy(f.values, in[from] + (fill ? bytes : 0), bytes);
      continue;
    }
    current = &f;
    warn((u64)f.place.file + f.place.line, 100 + f.place.column,
         "shuffle or broadcast from the inactive lane %d at %s:%u:%u", from,
         base_name(f.place.file), f.place.line, f.place.column);
    __builtin_memset(f.values, 0xff, bytes);
  }
}

static void vote(Fiber** lanes, u32 width, const Fiber* first) {
  u64 active = 0, yes = 0;
  for (u32 i = 0; i < width; i++) {
    if (!lanes[i]) continue;
    active |= 1ull << i;
    yes |= (u64)(lanes[i]->argument != 0) << i;
  }
  for (u32 i = 0; i < width; i++) {
    if (!lanes[i]) continue;
    u64& result = *(u64*)lanes[i]->values;
    switch (first->operation) {
      case MSL_BALLOT: result = yes; break;
      case MSL_ALL: result = yes == active; break;
      case MSL_ANY: result = yes != 0; break;
      default: result = lanes[i] == first;
    }
  }
}

struct MatrixArguments {
  u8 *d, *a, *b, *c;
  u32 td, ta, tb, tc;
};

// d = a b + c in float, k ascending, rounded once: Apple's order is not known
static void multiply(Fiber** lanes) {
  float a[MATRIX][MATRIX], b[MATRIX][MATRIX], c[MATRIX][MATRIX];
  for (u32 pass = 0; pass < 2; pass++)
    for (u32 lane = 0; lane < LANES; lane++) {
      auto& m = *(MatrixArguments*)lanes[lane]->values;
      u32 quad = lane / 4, row = (quad & 4) + lane / 2 % 4, column = (quad & 2) * 2 + lane % 2 * 2;
      for (u32 e = 0; e < 2; e++) {
        if (pass == 0) {
          a[row][column + e] = load(m.a + e * TYPE_SIZE[m.ta], m.ta);
          b[row][column + e] = load(m.b + e * TYPE_SIZE[m.tb], m.tb);
          c[row][column + e] = load(m.c + e * TYPE_SIZE[m.tc], m.tc);
          continue;
        }
        float sum = c[row][column + e];
        for (u32 k = 0; k < MATRIX; k++) sum = fmaf(a[row][k], b[k][column + e], sum);
        store(m.d + e * TYPE_SIZE[m.td], m.td, sum);
      }
    }
}

static void resolve_quads(Fiber** lanes, u32 width) {
  for (u32 i = 0; i < width; i++)
    if (lanes[i]) lanes[i]->operation &= ~MSL_QUAD;
  for (u32 quad = 0; quad < width; quad += QUAD_LANES) {
    bool any = false;
    for (u32 i = quad; i < quad + QUAD_LANES; i++) any |= lanes[i] != nullptr;
    if (any) resolve(lanes + quad, QUAD_LANES);
  }
}

void resolve(Fiber** lanes, u32 width) {
  u32 active = 0, first_lane = 0;
  for (u32 i = width; i-- > 0;)
    if (lanes[i]) active++, first_lane = i;
  Fiber* first = lanes[first_lane];
  u32 operation = first->operation;
  if (operation & MSL_QUAD) return resolve_quads(lanes, width);
  if (operation == MSL_SIMD_BARRIER) {
    if (first->argument & MSL_THREADGROUP) now.simd_threadgroup[first->simd]++;
    if (first->argument & MSL_DEVICE) now.simd_device[first->simd]++;
    return;
  }
  if (operation == MSL_MATRIX) {
    if (active == LANES) return multiply(lanes);
    current = first;
    return stop("matrix operation with %u of %u lanes at %s:%u:%u", active, LANES,
                base_name(first->place.file), first->place.line, first->place.column);
  }
  if (operation >= MSL_BALLOT) return vote(lanes, width, first);
  static u8 in[LANES][LARGEST_VALUE];
  bool has_fill = operation == MSL_FILL_UP || operation == MSL_FILL_DOWN;
  for (u32 i = 0; i < width; i++)
    if (lanes[i])
      __builtin_memcpy(in[i], lanes[i]->values, TYPE_SIZE[first->type] * first->count << has_fill);
  if (operation <= MSL_XOR) return reduce(lanes, width, in);
  if (operation <= MSL_EXCLUSIVE_PRODUCT) return prefix(lanes, width, first, in);
  move(lanes, width, first_lane, in);
}
