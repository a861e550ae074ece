    // Attention of one to three query rows over one key-value head; arguments as in flash_tiles.
    // Eight lanes hold a token, and four tokens side by side have a maximum of their own, so that
    // eight tokens are scored before anything is rescaled. Grid: (32 * SG, splits, B*KV).
    typedef Row<T, BITS, D, GS> Store;
    constexpr int N = D / 8;
    constexpr int DEEP = 8;
    constexpr int ACROSS = 4;
    threadgroup float tops[SG * M];
    threadgroup float sums[SG * M];
    threadgroup float outs[SG * M * D];

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

    uint chunk = lane % 8;
    int slot = int(lane / 8);
    uint scales = chunk * N / GS;
    float query[M][N];
    float o[M][N];
    float highest[M];
    float total[M];
    UNROLLED for (int m = 0; m < M; m++) {
      UNROLLED for (int i = 0; i < N; i++) {
        query[m][i] = scale * static_cast<float>(q[(head * M + m) * D + chunk * N + i]);
        o[m][i] = 0.0f;
      }
      highest[m] = LOWEST;
      total[m] = 0.0f;
    }
    for (int base = begin + int(group) * DEEP * ACROSS; base < end; base += SG * DEEP * ACROSS) {
      int live = end - base;
      const device typename Store::word* key_rows = keys + (first + base) * Store::WIDTH;
      const device typename Store::word* value_rows = values + (first + base) * Store::WIDTH;
      float2 key_pairs[Store::GROUPS];
      float2 value_pairs[Store::GROUPS];
      UNROLLED for (int g = 0; g < Store::GROUPS; g++) {
        key_pairs[g] = value_pairs[g] = float2(0.0f);
        if (int(lane) < live) {
          key_pairs[g] = Store::pair(key_rows + lane * Store::WIDTH + Store::KEY_PAIRS, g);
          value_pairs[g] = Store::pair(value_rows + lane * Store::WIDTH + Store::VALUE_PAIRS, g);
        }
      }
      float scores[M][DEEP];
      UNROLLED for (int i = 0; i < DEEP; i++) {
        int token = i * ACROSS + slot;
        float numbers[N];
        UNROLLED for (int j = 0; j < N; j++) numbers[j] = 0.0f;
        if (token < live) Store::template read<N>(key_rows + token * Store::WIDTH, chunk, numbers);
        float2 pair = float2(0.0f);
        UNROLLED for (int g = 0; g < Store::GROUPS; g++) {
          float2 theirs = simd_shuffle(key_pairs[g], ushort(token));
          pair = g == int(scales) ? theirs : pair;
        }
        UNROLLED for (int m = 0; m < M; m++) {
          float dot = 0.0f;
          UNROLLED for (int j = 0; j < N; j++) dot += query[m][j] * (numbers[j] * pair.x + pair.y);
          dot += simd_shuffle_xor(dot, 1);
          dot += simd_shuffle_xor(dot, 2);
          dot += simd_shuffle_xor(dot, 4);
          int seen = CAUSAL ? length - base - (L - 1) + m % L : live;
          scores[m][i] = token < metal::min(seen, live) ? dot : LOWEST;
        }
      }
      UNROLLED for (int m = 0; m < M; m++) {
        float higher = highest[m];
        UNROLLED for (int i = 0; i < DEEP; i++) higher = metal::max(higher, scores[m][i]);
        float fade = metal::exp(highest[m] - higher);
        highest[m] = higher;
        total[m] *= fade;
        UNROLLED for (int j = 0; j < N; j++) o[m][j] *= fade;
        UNROLLED for (int i = 0; i < DEEP; i++) {
          scores[m][i] = scores[m][i] == LOWEST ? 0.0f : metal::exp(scores[m][i] - higher);
          total[m] += scores[m][i];
        }
      }
      UNROLLED for (int i = 0; i < DEEP; i++) {
        int token = i * ACROSS + slot;
        float numbers[N];
        UNROLLED for (int j = 0; j < N; j++) numbers[j] = 0.0f;
        if (token < live) {
          const device typename Store::word* part = value_rows + token * Store::WIDTH;
          Store::template read<N>(part + Store::VALUES, chunk, numbers);
        }
        float2 pair = float2(0.0f);
        UNROLLED for (int g = 0; g < Store::GROUPS; g++) {
          float2 theirs = simd_shuffle(value_pairs[g], ushort(token));
          pair = g == int(scales) ? theirs : pair;
        }
        UNROLLED for (int m = 0; m < M; m++) {
          UNROLLED for (int j = 0; j < N; j++) {
            o[m][j] += scores[m][i] * (numbers[j] * pair.x + pair.y);
          }
        }
      }
    }
    UNROLLED for (int m = 0; m < M; m++) {
      float higher = metal::max(highest[m], simd_shuffle_xor(highest[m], 8));
      higher = metal::max(higher, simd_shuffle_xor(higher, 16));
      float fade = metal::exp(highest[m] - higher);
      float whole = total[m] * fade;
      whole += simd_shuffle_xor(whole, 8);
      whole += simd_shuffle_xor(whole, 16);
      UNROLLED for (int j = 0; j < N; j++) {
        float mixed = o[m][j] * fade;
        mixed += simd_shuffle_xor(mixed, 8);
        mixed += simd_shuffle_xor(mixed, 16);
        if (slot == 0) outs[(group * M + m) * D + chunk * N + j] = mixed;
      }
      if (lane == 0) {
        tops[group * M + m] = higher;
        sums[group * M + m] = whole;
      }
    }
    threadgroup_barrier(mem_flags::mem_threadgroup);
    uint base = head * M * splits;
    join_parts<SG, M, D, D, SG * 32>(
        &tops[0], &sums[0], &outs[0], out + size_t(base) * D, top + base, sum + base,
        group * 32 + lane, 0, uint2(split, splits));
