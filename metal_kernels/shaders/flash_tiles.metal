    // Attention of M query rows over one key-value head, in 8 x 8 matrix tiles of float32.
    // q (B, H, L, D): of M = H / KV * L rows a head, row m is new token m % L; keys, values (B, KV,
    // capacity, WIDTH), the same rows if quantized. TILES: of eight rows, padded: the number of rows
    // is data. Grid: (32 * SG, splits, B*KV), one threadgroup per split.
    // out (B*KV, M, splits, D), unnormalized; top (the maximum) and sum (of weights), both
    // (B*KV, M, splits).
    typedef Row<T, BITS, D, GS> Store;
    typedef Stage<Store, BLOCK> Staged;
    constexpr bool SHARED = TILES > 1;  // one tile: each simdgroup has its own tokens; more: its own rows
    constexpr int PARTS = SHARED ? 1 : SG;
    constexpr int SPACE = !SHARED && Staged::SIZE < 2 * D ? 2 * D : Staged::SIZE;  // for outputs, too
    threadgroup uint4 space[PARTS * SPACE];
    threadgroup float tops[PARTS * 8];
    threadgroup float sums[PARTS * 8];

    uint lane = thread_index_in_simdgroup;
    uint group = simdgroup_index_in_threadgroup;
    uint head = threadgroup_position_in_grid.z;
    uint split = threadgroup_position_in_grid.y;
    uint splits = threadgroups_per_grid.y;
    uint drafted = q_shape[2];
    uint rows = q_shape[1] / keys_shape[1] * drafted;
    int length = lengths[head / keys_shape[1]];
    int2 part = part_of(length, split, splits, BLOCK);
    size_t first = size_t(head) * keys_shape[2];

    uint first_row = SHARED ? group * 8 : 0;
    uint place = first_row + lane_row(lane);
    bool exists = place < rows;
    int seen = length - causal * int(drafted - 1 - place % drafted);
    Tile<T, Store, D, GS, BLOCK> tile;
    tile.start(lane, q + size_t(head) * rows * D, first_row + lane_column(lane), rows);
    if (SHARED) {
      for (int base = part.x; base < part.y; base += BLOCK) {
        int live = metal::min(BLOCK, part.y - base);
        size_t at = (first + base) * Store::WIDTH;
        threadgroup_barrier(mem_flags::mem_threadgroup);
        Staged::template fill<SG * 32>(&space[0], keys + at, values + at, live, group * 32 + lane);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        tile.attend(&space[0], live, seen - base, scale);
      }
    } else {
      threadgroup uint4* own = &space[0] + group * SPACE;
      for (int base = part.x + int(group) * BLOCK; base < part.y; base += SG * BLOCK) {
        int live = metal::min(BLOCK, part.y - base);
        size_t at = (first + base) * Store::WIDTH;
        simdgroup_barrier(mem_flags::mem_threadgroup);
        Staged::template fill<32>(own, keys + at, values + at, live, lane);
        simdgroup_barrier(mem_flags::mem_threadgroup);
        tile.attend(own, live, seen - base, scale);
      }
    }
    float total = row_sum(tile.sum);
    bool first_column = lane_column(lane) == 0;
    if (SHARED) {
      size_t at = size_t(head * rows + place) * splits + split;
      tile.write(out + at * D, exists);
      if (exists && first_column) {
        top[at] = tile.top;
        sum[at] = total;
      }
    } else {
      threadgroup float* outs = reinterpret_cast<threadgroup float*>(&space[0]);
      simdgroup_barrier(mem_flags::mem_threadgroup);
      tile.write(outs + group * SPACE * 4 + place * D, exists);
      if (first_column) {
        tops[group * 8 + place] = tile.top;
        sums[group * 8 + place] = total;
      }
      threadgroup_barrier(mem_flags::mem_threadgroup);
      size_t base = size_t(head * rows) * splits;
      join_parts<PARTS, D, SPACE * 4, 8, SG * 32>(
          &tops[0], &sums[0], outs, out + base * D, top + base, sum + base, group * 32 + lane, rows,
          uint2(split, splits));
    }
