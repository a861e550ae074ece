    // Join the splits of each query row: parts (rows, splits, D), tops and sums (rows, splits)
    // float32 -> out (rows, D), lse (rows). Grid: (32, rows), one simdgroup per row. A row without
    // keys gets 0 and LOWEST.
    uint lane = thread_index_in_simdgroup;
    uint row = threadgroup_position_in_grid.y;
    int splits = tops_shape[1];
    float highest = LOWEST;
    for (int s = int(lane); s < splits; s += 32) {
      highest = metal::max(highest, tops[row * splits + s]);
    }
    highest = simd_max(highest);
    float total = 0.0f;
    float mixed[D / 32];
    UNROLLED for (int i = 0; i < D / 32; i++) mixed[i] = 0.0f;
    for (int s = 0; s < splits; s++) {
      uint at = row * splits + s;
      float weight = metal::fast::exp(tops[at] - highest);
      total += weight * sums[at];
      UNROLLED for (int i = 0; i < D / 32; i++) mixed[i] += weight * parts[at * D + i * 32 + lane];
    }
    UNROLLED for (int i = 0; i < D / 32; i++) {
      out[row * D + i * 32 + lane] = static_cast<T>(total > 0.0f ? mixed[i] / total : 0.0f);
    }
    if (lane == 0) lse[row] = total > 0.0f ? highest + metal::log(total) : LOWEST;
