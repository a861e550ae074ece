// Header of flash_tiles: eight query rows in the registers of one simdgroup.

// Rows are aligned to 8 bytes, so blocks of them are moved two words at a time.
inline threadgroup uint2* pairs_of(threadgroup uint4* stage) {
  return reinterpret_cast<threadgroup uint2*>(stage);
}
template <typename W>
inline const device uint2* pairs_of(const device W* rows) {
  return reinterpret_cast<const device uint2*>(rows);
}

// Where the two adjacent elements of a lane are in an 8 x 8 matrix: its row and first column.
inline uint lane_row(uint lane) { return ((lane / 4) & 4) + (lane / 2) % 4; }
inline uint lane_column(uint lane) { return ((lane / 4) & 2) * 2 + (lane % 2) * 2; }

inline float2 multiply_add(float2 a, float2 b, float2 c) {
  simdgroup_matrix<float, 8, 8> A, B, C;
  reinterpret_cast<thread float2&>(A.thread_elements()) = a;
  reinterpret_cast<thread float2&>(B.thread_elements()) = b;
  reinterpret_cast<thread float2&>(C.thread_elements()) = c;
  simdgroup_multiply_accumulate(C, A, B, C);
  return reinterpret_cast<thread float2&>(C.thread_elements());
}

// q and o: a lane's two elements of D/8 matrices. Dimensions are assigned so that every lane reads
// whole words: an eighth of a key, a quarter of a value. A sum over dimensions has no order.
template <int D>
struct Tile {
  float2 q[D / 8];
  float2 o[D / 8];
  float top;
  float sum;
  uint lane;

  void start(uint my_lane) thread {
    UNROLLED for (int k = 0; k < D / 8; k++) o[k] = float2(0.0f);
    top = LOWEST;
    sum = 0.0f;
    lane = my_lane;
  }

  // Add BLOCK tokens, of which ``live`` exist and the row of this lane may see ``seen``.
  template <typename Store, int BLOCK, int GS, typename P>
  void attend(P keys, P values, int live, int seen) thread {
    if (live == BLOCK) {
      take<Store, BLOCK, GS, true>(keys, values, BLOCK, seen);
    } else {
      take<Store, BLOCK, GS, false>(keys, values, live, seen);
    }
  }

  // FULL: every guard of a read is true at compile time, so that reads do not wait for it.
  template <typename Store, int BLOCK, int GS, bool FULL, typename P>
  void take(P keys, P values, int live, int seen) thread {
    live = FULL ? BLOCK : live;
    seen = metal::min(seen, live);
    float2 scores[BLOCK / 8];
    float highest = top;
    UNROLLED for (int f = 0; f < BLOCK / 8; f++) {
      int token = 8 * f + int(lane_column(lane));
      scores[f] = score<Store, GS>(keys + 8 * f * Store::WIDTH, live - 8 * f);
      scores[f].x = token < seen ? scores[f].x : LOWEST;
      scores[f].y = token + 1 < seen ? scores[f].y : LOWEST;
      highest = metal::max(highest, metal::max(scores[f].x, scores[f].y));
    }
    highest = metal::max(highest, simd_shuffle_xor(highest, 1));
    highest = metal::max(highest, simd_shuffle_xor(highest, 8));
    float fade = metal::exp(top - highest);
    top = highest;
    sum *= fade;
    UNROLLED for (int k = 0; k < D / 8; k++) o[k] *= fade;
    UNROLLED for (int f = 0; f < BLOCK / 8; f++) {
      int token = 8 * f + int(lane_column(lane));
      float2 weight = float2(token < seen ? metal::exp(scores[f].x - top) : 0.0f,
                             token + 1 < seen ? metal::exp(scores[f].y - top) : 0.0f);
      sum += weight.x + weight.y;
      gather<Store, GS>(values + 8 * f * Store::WIDTH, live - 8 * f, weight);
    }
  }

  // Eight rows against eight tokens: the lane gets its row against tokens column and column + 1.
  template <typename Store, int GS, typename P>
  float2 score(P keys, int live) thread {
    constexpr int N = D / 8;
    constexpr int PIECE = N < 8 ? N : 8;  // few at a time: registers limit how many groups run
    uint row = lane_row(lane), column = lane_column(lane);
    float2 pair = one_pair<Store>(keys + Store::KEY_PAIRS, live);
    uint group = row * N / GS;
    float2 a = simd_shuffle(pair, ushort(column * Store::GROUPS + group));
    float2 b = simd_shuffle(pair, ushort((column + 1) * Store::GROUPS + group));
    float2 dots = float2(0.0f);
    UNROLLED for (int piece = 0; piece < N / PIECE; piece++) {
      float one[PIECE], next[PIECE];
      UNROLLED for (int k = 0; k < PIECE; k++) one[k] = next[k] = 0.0f;
      uint chunk = row * (N / PIECE) + piece;
      if (int(column) < live) Store::template read<PIECE>(keys + column * Store::WIDTH, chunk, one);
      if (int(column) + 1 < live) {
        Store::template read<PIECE>(keys + (column + 1) * Store::WIDTH, chunk, next);
      }
      UNROLLED for (int k = 0; k < PIECE; k++) {
        float2 two = float2(one[k] * a.x + a.y, next[k] * b.x + b.y);
        dots = multiply_add(q[piece * PIECE + k], two, dots);
      }
    }
    return dots;
  }

  // Add eight weighted tokens: the lane reads a quarter of token ``row``.
  template <typename Store, int GS, typename P>
  void gather(P values, int live, float2 weight) thread {
    constexpr int N = D / 4;
    constexpr int PIECE = 8;
    uint row = lane_row(lane), quarter = lane_column(lane) / 2;
    float2 pair = one_pair<Store>(values + Store::VALUE_PAIRS, live);
    pair = simd_shuffle(pair, ushort(row * Store::GROUPS + quarter * N / GS));
    UNROLLED for (int piece = 0; piece < N / PIECE; piece++) {
      float numbers[PIECE];
      UNROLLED for (int k = 0; k < PIECE; k++) numbers[k] = 0.0f;
      uint chunk = quarter * (N / PIECE) + piece;
      if (int(row) < live) {
        Store::template read<PIECE>(values + row * Store::WIDTH + Store::VALUES, chunk, numbers);
      }
      UNROLLED for (int k = 0; k < PIECE / 2; k++) {
        float2 two = float2(numbers[2 * k], numbers[2 * k + 1]) * pair.x + pair.y;
        uint at = piece * (PIECE / 2) + k;
        o[at] = multiply_add(weight, two, o[at]);
      }
    }
  }

  // Each lane loads one scale and bias of these eight tokens, to be shuffled.
  template <typename Store, typename P>
  float2 one_pair(P pairs, int live) thread {
    uint token = lane / Store::GROUPS;
    bool mine = lane < 8 * Store::GROUPS && int(token) < live;
    return mine ? Store::pair(pairs + token * Store::WIDTH, lane % Store::GROUPS) : float2(0.0f);
  }

  float total() thread {
    float whole = sum + simd_shuffle_xor(sum, 1);
    return whole + simd_shuffle_xor(whole, 8);
  }

  // Write WIDTH numbers of each quarter, from ``start`` on.
  template <int WIDTH, typename P>
  void write(P row, uint start) thread {
    UNROLLED for (uint i = 0; i < WIDTH; i++) {
      row[lane_column(lane) / 2 * WIDTH + i] = o[(start + i) / 2][i % 2];
    }
  }
};
