    // Add two rows, and normalize the sum by its root mean square: x, y (R, N), weight (N)
    // -> sum (R, N), rounded as an addition in T, and out (R, N). Grid: (THREADS, R), a threadgroup a row.
    constexpr int SIMDGROUPS = THREADS / 32;
    threadgroup float shares[SIMDGROUPS];
    uint lane = thread_index_in_simdgroup;
    int width = x_shape[1];
    size_t first = size_t(threadgroup_position_in_grid.y) * width;
    int start = int(thread_position_in_threadgroup.x);

    float squares = 0.0f;
    for (int i = start; i < width; i += THREADS) {
      T both = static_cast<T>(static_cast<float>(x[first + i]) + static_cast<float>(y[first + i]));
      sum[first + i] = both;
      squares += static_cast<float>(both) * static_cast<float>(both);
    }
    squares = simd_sum(squares);
    if (lane == 0) shares[simdgroup_index_in_threadgroup] = squares;
    threadgroup_barrier(mem_flags::mem_threadgroup);
    squares = simd_sum(int(lane) < SIMDGROUPS ? shares[lane] : 0.0f);
    float scale = metal::precise::rsqrt(squares / width + eps);
    for (int i = start; i < width; i += THREADS) {
      T scaled = static_cast<T>(static_cast<float>(sum[first + i]) * scale);
      out[first + i] = static_cast<T>(static_cast<float>(weight[i]) * static_cast<float>(scaled));
    }
