    // Attention of M query rows over one key-value head, in 8 x 8 matrix tiles; float32 throughout.
    // q (B*KV, M, D), M = R * L rows, row m being new token m % L; keys, values (B*KV, capacity,
    // WIDTH), the same rows if quantized. Grid: (32 * SG, splits, B*KV), one threadgroup per split.
    // out (B*KV, M, splits, D), unnormalized; top (the maximum) and sum (of weights), both
    // (B*KV, M, splits).
    typedef Row<T, BITS, D, GS> Store;
    typedef typename Store::word word_t;
    constexpr int TILES = (M + 7) / 8;
    constexpr bool SHARED = TILES > 1;  // one tile: each simdgroup has its own tokens; more: its own rows
    constexpr int PARTS = SHARED ? 1 : SG;
    constexpr int ROW_PAIRS = Store::WIDTH * sizeof(word_t) / sizeof(uint2);
    constexpr int STAGED = SHARED ? BLOCK * ROW_PAIRS : 2;
    constexpr int ROUNDS = D > 64 ? 2 : 1;  // outputs are exchanged in halves: space for more groups
    constexpr int WIDTH = D / ROUNDS;
    threadgroup uint4 key_stage[STAGED / 2];  // as uint4 for its alignment
    threadgroup uint4 value_stage[BITS == 16 ? STAGED / 2 : 1];
    threadgroup float tops[SHARED ? 1 : PARTS * M];
    threadgroup float sums[SHARED ? 1 : PARTS * M];
    threadgroup float outs[SHARED ? 1 : PARTS * M * WIDTH];

    uint lane = thread_index_in_simdgroup;
    uint group = simdgroup_index_in_threadgroup;
    uint head = threadgroup_position_in_grid.z;
    uint split = threadgroup_position_in_grid.y;
    uint splits = threadgroups_per_grid.y;
    int length = lengths[head / keys_shape[1]];
    int share = ((length + int(splits) - 1) / int(splits) + 7) / 8 * 8;
    int begin = int(split) * share;
    int end = metal::min(length, begin + share);
    size_t first = size_t(head) * keys_shape[2];

    uint place = (SHARED ? group * 8 : 0) + lane_row(lane);
    int seen = CAUSAL ? length - (L - 1) + int(place % L) : length;
    Tile<D> tile;
    tile.start(lane);
    UNROLLED for (int k = 0; k < D / 8; k++) {
      UNROLLED for (int e = 0; e < 2; e++) {
        uint dim = (lane_column(lane) + e) * (D / 8) + k;
        uint at = (head * M + place) * D + dim;
        tile.q[k][e] = place < M ? scale * static_cast<float>(q[at]) : 0.0f;
      }
    }
    if (SHARED) {
      for (int base = begin; base < end; base += BLOCK) {
        int live = metal::min(BLOCK, end - base);
        size_t at = (first + base) * Store::WIDTH;
        for (int i = int(group * 32 + lane); i < live * ROW_PAIRS; i += SG * 32) {
          pairs_of(&key_stage[0])[i] = pairs_of(keys + at)[i];
          if (BITS == 16) pairs_of(&value_stage[0])[i] = pairs_of(values + at)[i];
        }
        threadgroup_barrier(mem_flags::mem_threadgroup);
        const threadgroup uint4* value_rows = BITS == 16 ? &value_stage[0] : &key_stage[0];
        tile.template attend<Store, BLOCK, GS>(
            reinterpret_cast<const threadgroup word_t*>(&key_stage[0]),
            reinterpret_cast<const threadgroup word_t*>(value_rows), live, seen - base);
        threadgroup_barrier(mem_flags::mem_threadgroup);
      }
    } else {
      for (int base = begin + int(group) * BLOCK; base < end; base += SG * BLOCK) {
        size_t at = (first + base) * Store::WIDTH;
        tile.template attend<Store, BLOCK, GS>(
            keys + at, values + at, metal::min(BLOCK, end - base), seen - base);
      }
    }
    float total = tile.total();
    bool first_column = lane_column(lane) == 0;
    if (SHARED) {
      uint at = (head * M + place) * splits + split;
      if (place < M) tile.template write<D / 4>(out + size_t(at) * D, 0);
      if (place < M && first_column) {
        top[at] = tile.top;
        sum[at] = total;
      }
    } else {
      uint at = group * M + place;
      if (place < M && first_column) {
        tops[at] = tile.top;
        sums[at] = total;
      }
      uint base = head * M * splits;
      UNROLLED for (uint start = 0; start < D / 4; start += WIDTH / 4) {
        if (start > 0) threadgroup_barrier(mem_flags::mem_threadgroup);
        if (place < M) tile.template write<WIDTH / 4>(&outs[0] + at * WIDTH, start);
        threadgroup_barrier(mem_flags::mem_threadgroup);
        join_parts<PARTS, M, D, WIDTH, SG * 32>(
            &tops[0], &sums[0], &outs[0], out + size_t(base) * D, top + base, sum + base,
            group * 32 + lane, start, uint2(split, splits));
      }
    }
