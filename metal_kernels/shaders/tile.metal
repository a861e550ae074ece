// Header of flash_tiles: eight query rows in the registers of one simdgroup.

// Queries are multiplied as half (bfloat16_t fits but for numbers that no query has), others as such.
template <typename T>
struct Query {
  typedef half number;
  static half of(T x) {
    return static_cast<half>(metal::clamp(static_cast<float>(x), -65504.0f, 65504.0f));
  }
};
template <>
struct Query<float> {
  typedef float number;
  static float of(float x) { return x; }
};

// Where the two adjacent elements of a lane are in an 8 x 8 matrix: its row and first column.
inline uint lane_row(uint lane) { return ((lane / 4) & 4) + (lane / 2) % 4; }
inline uint lane_column(uint lane) { return ((lane / 4) & 2) * 2 + (lane % 2) * 2; }

inline ushort lane_at(uint row, uint column) {
  return (row & 4) << 2 | (column & 4) << 1 | (row & 3) << 1 | (column & 2) >> 1;
}

// Sum the lanes that have the same row of a matrix, or the same columns.
inline float row_sum(float x) {
  x += simd_shuffle_xor(x, 1);
  return x + simd_shuffle_xor(x, 8);
}
inline float2 column_sum(float2 x) {
  x += simd_shuffle_xor(x, 2);
  x += simd_shuffle_xor(x, 4);
  return x + simd_shuffle_xor(x, 16);
}

// The other way round: the lane gets the elements of its row and columns.
inline float2 transposed(float2 x, uint lane) {
  uint row = lane_row(lane), column = lane_column(lane);
  float2 one = simd_shuffle(x, lane_at(column, row));
  float2 next = simd_shuffle(x, lane_at(column + 1, row));
  return row % 2 == 0 ? float2(one.x, next.x) : float2(one.y, next.y);
}

// c + a b: float32, whatever is multiplied.
template <typename A, typename B>
inline float2 multiply_add(vec<A, 2> a, vec<B, 2> b, float2 c) {
  simdgroup_matrix<A, 8, 8> left;
  simdgroup_matrix<B, 8, 8> right;
  simdgroup_matrix<float, 8, 8> sum;
  reinterpret_cast<thread vec<A, 2>&>(left.thread_elements()) = a;
  reinterpret_cast<thread vec<B, 2>&>(right.thread_elements()) = b;
  reinterpret_cast<thread float2&>(sum.thread_elements()) = c;
  simdgroup_multiply_accumulate(sum, left, right, sum);
  return reinterpret_cast<thread float2&>(sum.thread_elements());
}

// q and o: a lane's two elements of D/8 matrices. Scores are computed as keys times queries and then
// transposed, outputs as weights times values, so that the lane of a matrix of keys or values holds
// neighbors of one token. A sum over dimensions has no order, so they are dealt to lanes as they are
// read: a lane reads a quarter of each group of GS. Levels are multiplied as they are; scales and
// biases follow once for a group: q . (s n + b) = s (q . n) + b sum(q), and
// sum w (s n + b) = sum (w s) n + sum w b.
template <typename T, typename Store, int D, int GS, int BLOCK>
struct Tile {
  typedef typename Store::number number;
  typedef Stage<Store, BLOCK> Staged;
  static constant constexpr int GROUPS = D / GS;
  static constant constexpr int EACH = GS / 8;  // matrices of a group
  static constant constexpr int QUARTER = GS / 4;

  vec<typename Query<T>::number, 2> q[D / 8];
  float2 o[D / 8];
  float2 query_sums[GROUPS];  // of the queries that the lane's columns are
  float biases[GROUPS];       // of the query that the lane's row is, weighted, of the lane's tokens
  float top;
  float sum;
  uint lane;

  // queries: (rows, D); the lane's are ``first`` and the next, zeros beyond the last.
  void start(uint my_lane, const device T* queries, uint first, uint rows) thread {
    lane = my_lane;
    top = LOWEST;
    sum = 0.0f;
    uint row = lane_row(lane);
    UNROLLED for (int g = 0; g < GROUPS; g++) {
      float2 part = float2(0.0f);
      UNROLLED for (int k = 0; k < EACH; k++) {
        int at = g * EACH + k;
        int place = row % 2 == 0 ? Store::template order<QUARTER>(2 * k)
                                 : Store::template order<QUARTER>(2 * k + 1);
        uint dim = g * GS + row / 2 * QUARTER + place;
        UNROLLED for (int e = 0; e < 2; e++) {
          T x = static_cast<T>(0.0f);
          if (first + e < rows) x = queries[(first + e) * D + dim];
          q[at][e] = Query<T>::of(x);
          part[e] += static_cast<float>(q[at][e]);
        }
        o[at] = float2(0.0f);
      }
      query_sums[g] = column_sum(part);
      biases[g] = 0.0f;
    }
  }

  // Add the staged tokens: ``live`` exist, and the row of this lane may see the first ``seen``.
  void attend(const threadgroup uint4* staged, int live, int seen, float scale) thread {
    if (live == BLOCK) {
      take<true>(staged, BLOCK, seen, scale);
    } else {
      take<false>(staged, live, seen, scale);
    }
  }

  // FULL: every guard is true at compile time.
  template <bool FULL>
  void take(const threadgroup uint4* staged, int live, int seen, float scale) thread {
    float2 scores[BLOCK / 8];
    float highest = top;
    UNROLLED for (int f = 0; f < BLOCK / 8; f++) {
      int token = 8 * f + int(lane_column(lane));
      scores[f] = float2(LOWEST);
      if (FULL || 8 * f < live) {
        float2 found = scale * score<FULL>(staged, 8 * f, live);
        scores[f].x = token < seen ? found.x : LOWEST;
        scores[f].y = token + 1 < seen ? found.y : LOWEST;
      }
      highest = metal::max(highest, metal::max(scores[f].x, scores[f].y));
    }
    highest = metal::max(highest, simd_shuffle_xor(highest, 1));
    highest = metal::max(highest, simd_shuffle_xor(highest, 8));
    float fade = metal::fast::exp(top - highest);
    top = highest;
    sum *= fade;
    UNROLLED for (int k = 0; k < D / 8; k++) o[k] *= fade;
    UNROLLED for (int g = 0; g < GROUPS; g++) biases[g] *= fade;
    UNROLLED for (int f = 0; f < BLOCK / 8; f++) {
      int token = 8 * f + int(lane_column(lane));
      float2 weight = float2(token < seen ? metal::fast::exp(scores[f].x - top) : 0.0f,
                             token + 1 < seen ? metal::fast::exp(scores[f].y - top) : 0.0f);
      sum += weight.x + weight.y;
      if (FULL || 8 * f < live) gather<FULL>(staged, 8 * f, live, weight);
    }
  }

  // The last token in place of one that does not exist: what is read is finite, and weighs nothing.
  template <bool FULL>
  int existing(int token, int live) thread {
    return FULL ? token : metal::min(token, live - 1);
  }

  // Eight tokens from ``first`` on against eight rows: the lane gets its row against two tokens.
  template <bool FULL>
  float2 score(const threadgroup uint4* staged, int first, int live) thread {
    auto mine = Staged::key_row(staged, existing<FULL>(first + int(lane_row(lane)), live));
    float2 dots = float2(0.0f);
    UNROLLED for (int g = 0; g < GROUPS; g++) {
      vec<number, 2> x[QUARTER / 2];
      Store::template read<QUARTER>(mine, g * 4 + lane_column(lane) / 2, x);
      float2 part = Store::SCALED ? -Store::OFFSET * query_sums[g] : dots;
      UNROLLED for (int k = 0; k < EACH; k++) part = multiply_add(x[k], q[g * EACH + k], part);
      if (Store::SCALED) {
        float2 pair = Store::pair(mine + Store::KEY_PAIRS, g);
        dots += part * (pair.x / Store::STEP) + query_sums[g] * pair.y;
      } else {
        dots = part;
      }
    }
    return transposed(dots, lane);
  }

  // Add eight weighted tokens from ``first`` on: the lane reads a quarter of each group of one.
  template <bool FULL>
  void gather(const threadgroup uint4* staged, int first, int live, float2 weight) thread {
    uint row = lane_row(lane), column = lane_column(lane);
    auto mine = Staged::value_row(staged, existing<FULL>(first + int(row), live));
    auto one = Staged::value_row(staged, existing<FULL>(first + int(column), live));
    auto next = Staged::value_row(staged, existing<FULL>(first + int(column) + 1, live));
    UNROLLED for (int g = 0; g < GROUPS; g++) {
      vec<number, 2> x[QUARTER / 2];
      Store::template read<QUARTER>(mine + Store::VALUES, g * 4 + column / 2, x);
      float2 scaled = weight;
      if (Store::SCALED) {
        float2 a = Store::pair(one + Store::VALUE_PAIRS, g);
        float2 b = Store::pair(next + Store::VALUE_PAIRS, g);
        scaled *= float2(a.x, b.x) / Store::STEP;
        float2 bias = weight * float2(a.y, b.y) - Store::OFFSET * scaled;
        biases[g] += bias.x + bias.y;
      }
      UNROLLED for (int k = 0; k < EACH; k++) {
        o[g * EACH + k] = multiply_add(scaled, x[k], o[g * EACH + k]);
      }
    }
  }

  // Write the output of the lane's row, not yet divided by the sum of its weights.
  template <typename P>
  void write(P row, bool exists) thread {
    UNROLLED for (int g = 0; g < GROUPS; g++) {
      float bias = Store::SCALED ? row_sum(biases[g]) : 0.0f;
      UNROLLED for (int i = 0; i < QUARTER; i++) {
        uint dim = g * GS + lane_column(lane) / 2 * QUARTER + Store::template order<QUARTER>(i);
        if (exists) row[dim] = o[g * EACH + i / 2][i % 2] + bias;
      }
    }
  }
};
