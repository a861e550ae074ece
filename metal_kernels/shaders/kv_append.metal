    // Rotate one token's key, quantize it and the value: one simdgroup for each (token, key-value head).
    // keys, values (B, L, KV, D); bias (KV, D) if BIASED; positions (B, L); freqs (D/2)
    // -> rows (B, KV, L, WIDTH). Grid: (32, L, B*KV). Lanes 0 to 15 hold the key, others the value.
    typedef Row<T, BITS, D, GS> Store;
    constexpr int N = D / 16;           // adjacent elements of a lane
    constexpr int LANES = GS / N;       // lanes of a group
    constexpr int USED = N * BITS;      // bits of a lane
    constexpr int SHARING = USED >= 32 ? 1 : 32 / USED;  // lanes of a word
    constexpr float LEVELS = (1 << BITS) - 1;
    constexpr float LEAST = 1e-7f;      // mx.quantize's smallest scale

    uint lane = thread_index_in_simdgroup;
    uint token = threadgroup_position_in_grid.y;
    uint head = threadgroup_position_in_grid.z;
    uint length = threadgroups_per_grid.y;
    uint heads = keys_shape[2];
    uint b = head / heads;
    uint kv = head % heads;
    bool is_key = lane < 16;
    uint first = lane % 16 * N;
    size_t from = (size_t(b * length + token) * heads + kv) * D;

    float x[N];
    UNROLLED for (int i = 0; i < N; i++) {
      uint dim = first + i;
      if (is_key) {
        uint across = (dim + D / 2) % D;
        float one = static_cast<float>(keys[from + dim]);
        float other = static_cast<float>(keys[from + across]);
        if (BIASED) {
          one += static_cast<float>(bias[kv * D + dim]);
          other += static_cast<float>(bias[kv * D + across]);
          one = static_cast<float>(static_cast<T>(one));  // rounded as a sum in the dtype of the model
          other = static_cast<float>(static_cast<T>(other));
        }
        float angle = positions[b * length + token] / freqs[dim % (D / 2)];
        float turn = metal::precise::sin(angle);
        turn = dim < D / 2 ? -turn : turn;
        x[i] = static_cast<float>(static_cast<T>(one * metal::precise::cos(angle) + other * turn));
      } else {
        x[i] = static_cast<float>(values[from + dim]);
      }
    }
    float low = x[0];
    float high = x[0];
    UNROLLED for (int i = 1; i < N; i++) {
      low = metal::min(low, x[i]);
      high = metal::max(high, x[i]);
    }
    for (ushort step = 1; step < LANES; step *= 2) {
      low = metal::min(low, simd_shuffle_xor(low, step));
      high = metal::max(high, simd_shuffle_xor(high, step));
    }
    // As mx.quantize: the end farther from zero is exact, and so is zero if it is in the range.
    float step = metal::max((high - low) / LEVELS, LEAST);
    bool side = metal::abs(low) > metal::abs(high);
    step = side ? step : -step;
    float edge = side ? low : high;
    float whole = metal::rint(edge / step);
    step = whole == 0.0f ? step : edge / whole;
    float start = whole == 0.0f ? 0.0f : edge;

    device uint* row = rows + (size_t(head) * length + token) * Store::WIDTH;
    uint part = is_key ? 0 : Store::VALUES;
    uint word = 0;
    UNROLLED for (int i = 0; i < N; i++) {
      float level = metal::clamp(metal::rint((x[i] - start) / step), 0.0f, LEVELS);
      word |= static_cast<uint>(level) << (i * BITS % 32);
      if ((i + 1) * BITS % 32 == 0) {
        row[part + (first + i) * BITS / 32] = word;
        word = 0;
      }
    }
    if (SHARING > 1) {
      word <<= lane % SHARING * (USED % 32);
      for (ushort s = 1; s < SHARING; s *= 2) word |= simd_shuffle_xor(word, s);
      if (lane % SHARING == 0) row[part + first * BITS / 32] = word;
    }
    if (int(lane) < Store::WIDTH - Store::USED) row[Store::USED + lane] = 0;
    if (lane % LANES == 0) {
      device uint* pair = row + (is_key ? Store::KEY_PAIRS : Store::VALUE_PAIRS);
      Pair<T>::put(pair, lane % 16 / LANES, step, start);
    }
