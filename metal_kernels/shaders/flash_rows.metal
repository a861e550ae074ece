    // Attention of M query rows, one to three, over one key-value head; arguments as in flash_tiles.
    // Eight lanes hold a token, and four tokens side by side have a maximum of their own, so that a
    // whole block is scored before anything is rescaled. Grid: (32 * SG, splits, B*KV).
    typedef Row<T, BITS, D, GS> Store;
    typedef Stage<Store, BLOCK> Staged;
    constexpr int N = D / 8;
    constexpr int ACROSS = 4;
    constexpr int DEEP = BLOCK / ACROSS;
    constexpr int SPACE = Staged::SIZE < M * D / 4 ? M * D / 4 : Staged::SIZE;  // for outputs, too
    threadgroup uint4 space[SG * SPACE];
    threadgroup float tops[SG * M];
    threadgroup float sums[SG * M];

    uint lane = thread_index_in_simdgroup;
    uint group = simdgroup_index_in_threadgroup;
    uint head = threadgroup_position_in_grid.z;
    uint split = threadgroup_position_in_grid.y;
    uint splits = threadgroups_per_grid.y;
    int drafted = q_shape[2];
    int length = lengths[head / keys_shape[1]];
    int2 part = part_of(length, split, splits, BLOCK);
    size_t first = size_t(head) * keys_shape[2];

    uint chunk = lane % 8;
    int slot = int(lane / 8);
    uint scales = chunk * N / GS;
    float query[M][N];
    float query_sum[M];
    float o[M][N];
    float biases[M];
    float highest[M];
    float total[M];
    UNROLLED for (int m = 0; m < M; m++) {
      query_sum[m] = biases[m] = total[m] = 0.0f;
      highest[m] = LOWEST;
      UNROLLED for (int i = 0; i < N; i++) {
        uint dim = chunk * N + Store::template order<N>(i);
        query[m][i] = scale * static_cast<float>(q[size_t(head * M + m) * D + dim]);
        query_sum[m] += query[m][i];
        o[m][i] = 0.0f;
      }
    }
    threadgroup uint4* own = &space[0] + group * SPACE;
    for (int base = part.x + int(group) * BLOCK; base < part.y; base += SG * BLOCK) {
      int live = metal::min(BLOCK, part.y - base);
      size_t at = (first + base) * Store::WIDTH;
      simdgroup_barrier(mem_flags::mem_threadgroup);
      Staged::template fill<32>(own, keys + at, values + at, live, lane);
      simdgroup_barrier(mem_flags::mem_threadgroup);
      float scores[M][DEEP];
      UNROLLED for (int i = 0; i < DEEP; i++) {
        int token = i * ACROSS + slot;
        auto row = Staged::key_row(own, metal::min(token, live - 1));
        float x[N];
        read_floats<Store, N>(row, chunk, x);
        float2 pair = Store::pair(row + Store::KEY_PAIRS, scales);
        UNROLLED for (int m = 0; m < M; m++) {
          float dot = -Store::OFFSET * query_sum[m];
          UNROLLED for (int j = 0; j < N; j++) dot += query[m][j] * x[j];
          if (Store::SCALED) dot = dot * (pair.x / Store::STEP) + query_sum[m] * pair.y;
          dot += simd_shuffle_xor(dot, 1);
          dot += simd_shuffle_xor(dot, 2);
          dot += simd_shuffle_xor(dot, 4);
          int seen = length - base - causal * (drafted - 1 - m % drafted);
          scores[m][i] = token < seen ? dot : LOWEST;
        }
      }
      UNROLLED for (int m = 0; m < M; m++) {
        float higher = highest[m];
        UNROLLED for (int i = 0; i < DEEP; i++) higher = metal::max(higher, scores[m][i]);
        float fade = metal::fast::exp(highest[m] - higher);
        highest[m] = higher;
        total[m] *= fade;
        biases[m] *= fade;
        UNROLLED for (int j = 0; j < N; j++) o[m][j] *= fade;
        UNROLLED for (int i = 0; i < DEEP; i++) {
          scores[m][i] =
              scores[m][i] == LOWEST ? 0.0f : metal::fast::exp(scores[m][i] - higher);
          total[m] += scores[m][i];
        }
      }
      UNROLLED for (int i = 0; i < DEEP; i++) {
        auto row = Staged::value_row(own, metal::min(i * ACROSS + slot, live - 1));
        float x[N];
        read_floats<Store, N>(row + Store::VALUES, chunk, x);
        float2 pair = Store::pair(row + Store::VALUE_PAIRS, scales);
        UNROLLED for (int m = 0; m < M; m++) {
          float scaled = scores[m][i] * (pair.x / Store::STEP);
          if (Store::SCALED) biases[m] += scores[m][i] * pair.y - Store::OFFSET * scaled;
          UNROLLED for (int j = 0; j < N; j++) o[m][j] += scaled * x[j];
        }
      }
    }
    threadgroup float* outs = reinterpret_cast<threadgroup float*>(&space[0]);
    simdgroup_barrier(mem_flags::mem_threadgroup);
    UNROLLED for (int m = 0; m < M; m++) {
      float higher = metal::max(highest[m], simd_shuffle_xor(highest[m], 8));
      higher = metal::max(higher, simd_shuffle_xor(higher, 16));
      float fade = metal::fast::exp(highest[m] - higher);
      float whole = total[m] * fade;
      whole += simd_shuffle_xor(whole, 8);
      whole += simd_shuffle_xor(whole, 16);
      UNROLLED for (int j = 0; j < N; j++) {
        float mixed = (o[m][j] + biases[m]) * fade;
        mixed += simd_shuffle_xor(mixed, 8);
        mixed += simd_shuffle_xor(mixed, 16);
        uint dim = chunk * N + Store::template order<N>(j);
        if (slot == 0) outs[group * SPACE * 4 + m * D + dim] = mixed;
      }
      if (lane == 0) {
        tops[group * M + m] = higher;
        sums[group * M + m] = whole;
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    size_t base = size_t(head * M) * splits;
    join_parts<SG, D, SPACE * 4, M, SG * 32>(
        &tops[0], &sums[0], outs, out + base * D, top + base, sum + base, group * 32 + lane, M,
        uint2(split, splits));
