    // Add the bias to a token's queries, keys and values, normalize queries and keys, and rotate them:
    // x (B, H, D), bias (H, D) if BIASED, q_weight and k_weight (D) if NORMED, positions of the
    // sequences, freqs (D/2) -> out (B, H, D). Grid: (32, B*H), a simdgroup for each head. The first
    // `queries` heads are queries, those up to `turned` keys; the rest are values, to which the bias is added.
    constexpr int HALF = D / 2;
    constexpr int N = (HALF + 31) / 32;  // pairs of a lane
    int lane = int(thread_index_in_simdgroup);
    uint at = threadgroup_position_in_grid.y;
    uint heads = x_shape[1];
    int head = int(at % heads);
    uint sequence = at / heads;
    size_t first = size_t(at) * D;
    bool turns = head < turned;

    float one[N];
    float other[N];
    float squares = 0.0f;
    for (int j = 0; j < N; j++) {
      int i = lane + 32 * j;
      one[j] = 0.0f;
      other[j] = 0.0f;
      if (i < HALF) {
        one[j] = static_cast<float>(x[first + i]);
        other[j] = static_cast<float>(x[first + HALF + i]);
        if (BIASED) {  // rounded as an addition in T
          one[j] = static_cast<float>(static_cast<T>(one[j] + static_cast<float>(bias[head * D + i])));
          float added = other[j] + static_cast<float>(bias[head * D + HALF + i]);
          other[j] = static_cast<float>(static_cast<T>(added));
        }
      }
      squares += one[j] * one[j] + other[j] * other[j];
    }
    if (NORMED) {
      float scale = metal::precise::rsqrt(simd_sum(squares) / D + eps);
      bool asks = head < queries;
      for (int j = 0; j < N; j++) {
        int i = lane + 32 * j;
        if (i < HALF && turns) {
          float low = static_cast<float>(static_cast<T>(one[j] * scale));
          float high = static_cast<float>(static_cast<T>(other[j] * scale));
          low *= static_cast<float>(asks ? q_weight[i] : k_weight[i]);
          high *= static_cast<float>(asks ? q_weight[HALF + i] : k_weight[HALF + i]);
          one[j] = static_cast<float>(static_cast<T>(low));
          other[j] = static_cast<float>(static_cast<T>(high));
        }
      }
    }
    for (int j = 0; j < N; j++) {
      int i = lane + 32 * j;
      if (i < HALF) {
        float angle = turns ? positions[sequence] / freqs[i] : 0.0f;
        float cosine = metal::precise::cos(angle);
        float sine = metal::precise::sin(angle);
        out[first + i] = static_cast<T>(one[j] * cosine - other[j] * sine);
        out[first + HALF + i] = static_cast<T>(other[j] * cosine + one[j] * sine);
      }
    }
