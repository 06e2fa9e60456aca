// The vector code of attention.cpp, compiled for the instruction set that the compiler's options
// name. `KERNELS` is the name of what it exports.
//
// Keys are read in blocks with an online softmax, so scratch memory does not grow with the text.
// Few rows (a decode step) read the cache where it lies: each key and value is loaded once for all
// heads that share it. Many rows (a prompt) share a packed copy of each block.

#include "attention.h"

#include <utility>  // of the C++ library only types

#if defined(__aarch64__)
#include <arm_neon.h>
#elif defined(__AVX__)
#include <immintrin.h>
#endif

// GCC warns that vectors wider than the baseline's are passed differently; none leaves this file.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

#define INLINE static inline __attribute__((always_inline))

namespace mobilellm {
namespace {

// Floats of a vector.
#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif
// Tiles of a product: so many rows times so many vectors stay in registers.
#if defined(__aarch64__)
constexpr int kTileRows = 5, kDotHeads = 4;
#elif defined(__AVX512F__)
constexpr int kTileRows = 6, kDotHeads = 1;
#else
constexpr int kTileRows = 3, kDotHeads = 1;
#endif
constexpr int kTileVectors = 4;
// Rows in scratch are padded to so many vectors, which a dot product reads in one go.
constexpr int kUnroll = W == 4 ? 4 : W == 8 ? 2 : 1, kUnit = kUnroll * W;
// Keys of a block, and of a panel of packed keys.
constexpr int64_t kBlock = 128, kPanel = kTileVectors * W;
// From so many rows on, packing a block costs less than it saves.
constexpr int64_t kPackedRows = 20;
// Rows whose scores of a block are in scratch at a time.
constexpr int64_t kScoreRows = 30;

typedef float Vector __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef int32_t Integers __attribute__((vector_size(4 * W), aligned(4), may_alias));

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE int64_t round_up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

INLINE Vector load(const float* from) { return *reinterpret_cast<const Vector*>(from); }
INLINE void store(float* to, Vector x) { *reinterpret_cast<Vector*>(to) = x; }
INLINE Vector all(float x) { return x - Vector{}; }
INLINE Vector greater(Vector a, Vector b) {
#if defined(__aarch64__)
  return vmaxq_f32(a, b);
#else
  return a > b ? a : b;
#endif
}

#if defined(__aarch64__)
// Two neighbouring vectors in one instruction, which compilers form too rarely from two loads.
// `Offset` is in vectors.
template <int Offset>
INLINE void load_pair(const float* from, Vector& a, Vector& b) {
  asm("ldp %q0, %q1, [%2, %3]"
      : "=w"(a), "=w"(b)
      : "r"(from), "i"(16 * Offset), "m"(*reinterpret_cast<const float(*)[(Offset + 2) * W]>(from)));
}
#endif

INLINE float sum_of(Vector x) {
  float sum = 0;
  for (int i = 0; i < W; ++i) sum += x[i];
  return sum;
}

INLINE float greatest_of(Vector x) {
  float found = x[0];
  for (int i = 1; i < W; ++i) found = x[i] > found ? x[i] : found;
  return found;
}

// The sums of W vectors, as one vector.
#if defined(__aarch64__)
INLINE Vector sums_of(const Vector* x) {
  return vpaddq_f32(vpaddq_f32(x[0], x[1]), vpaddq_f32(x[2], x[3]));
}
#else
// Of two vectors' neighbouring groups of S lanes, the sums: those of `a` and of `b` in turn.
constexpr int lane_of(int i, int S) { return (i / S % 2 ? W : 0) + i / (2 * S) * 2 * S + i % S; }

template <int S, int... I>
INLINE Vector fold(Vector a, Vector b, std::integer_sequence<int, I...>) {
  return __builtin_shufflevector(a, b, lane_of(I, S)...) +
      __builtin_shufflevector(a, b, lane_of(I, S) + S...);
}

template <int S>
INLINE Vector fold(Vector a, Vector b) {
  return fold<S>(a, b, std::make_integer_sequence<int, W>());
}

INLINE Vector sums_of(const Vector* x) {
  if constexpr (W == 4) {
    return fold<1>(fold<2>(x[0], x[2]), fold<2>(x[1], x[3]));
  } else if constexpr (W == 8) {
    Vector y[4];
    for (int i = 0; i < 4; ++i) y[i] = fold<4>(x[i], x[i + 4]);
    return fold<1>(fold<2>(y[0], y[2]), fold<2>(y[1], y[3]));
  } else {
    Vector y[8], z[4];
    for (int i = 0; i < 8; ++i) y[i] = fold<8>(x[i], x[i + 8]);
    for (int i = 0; i < 4; ++i) z[i] = fold<4>(y[i], y[i + 4]);
    return fold<1>(fold<2>(z[0], z[2]), fold<2>(z[1], z[3]));
  }
}
#endif

// 2 to the power of x <= 0, within 1 ulp; exactly 0 from -127 downwards. The polynomial is the
// minimax one of degree 6 for 2^r, r in [-1/2, 1/2].
INLINE Vector exp2_of(Vector x) {
  const Vector magic = all(12582912.0f);  // 1.5 * 2^23: the sum's low bits are x, rounded
  const Vector shifted = greater(x, all(-127.0f)) + magic;
  const Vector r = greater(x, all(-127.0f)) - (shifted - magic);
  Vector p = all(0.00015345810970757157f);
  p = p * r + 0.0013399930903688073f;
  p = p * r + 0.009618489071726799f;
  p = p * r + 0.05550328642129898f;
  p = p * r + 0.24022646248340607f;
  p = p * r + 0.6931471824645996f;
  p = p * r + 1.0f;
  return (Vector)((Integers)p + ((Integers)shifted << 23));
}

INLINE float exp2_of(float x) { return exp2_of(all(x))[0]; }

// ---- Rows of a tensor as floats. ----

INLINE const float* floats(const Rows& rows) { return static_cast<const float*>(rows.data); }

// Codes as floats. Compilers convert int8 to float element by element, hence the intrinsics.
INLINE void read_codes(const int8_t* from, int64_t count, int8_t zero, float scale, float* to) {
  int64_t i = 0;
#if defined(__aarch64__)
  const int8x16_t zeros = vdupq_n_s8(zero);
  for (; i + 16 <= count; i += 16) {
    const int8x16_t codes = vld1q_s8(from + i);
    const int16x8_t low = vsubl_s8(vget_low_s8(codes), vget_low_s8(zeros));
    const int16x8_t high = vsubl_high_s8(codes, zeros);
    store(to + i, vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))) * scale);
    store(to + i + 4, vcvtq_f32_s32(vmovl_high_s16(low)) * scale);
    store(to + i + 8, vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))) * scale);
    store(to + i + 12, vcvtq_f32_s32(vmovl_high_s16(high)) * scale);
  }
#elif defined(__AVX512F__)
  for (; i + W <= count; i += W) {
    const auto codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i));
    const Vector x = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(codes));
    store(to + i, (x - static_cast<float>(zero)) * scale);
  }
#elif defined(__AVX2__)
  for (; i + W <= count; i += W) {
    const auto codes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + i));
    const Vector x = _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(codes));
    store(to + i, (x - static_cast<float>(zero)) * scale);
  }
#endif
  for (; i < count; ++i) to[i] = static_cast<float>(from[i] - zero) * scale;
}

// One row as floats, with zeros up to `padded`.
INLINE void read_row(const Rows& rows, int64_t token, int64_t head, int64_t width, int64_t padded,
                     float* to) {
  const int64_t at = token * rows.token + head * rows.head;
  if (rows.scales == nullptr) {
    const float* from = floats(rows) + at;
    int64_t i = 0;
    for (; i + W <= width; i += W) store(to + i, load(from + i));
    for (; i < width; ++i) to[i] = from[i];
  } else {
    const int8_t* from = static_cast<const int8_t*>(rows.data) + at;
    const int64_t place = token * rows.scale_token + head * rows.scale_head;
    read_codes(from, width, rows.zero_points[place], rows.scales[place], to);
  }
  for (int64_t i = width; i < padded; ++i) to[i] = 0;
}

// ---- Products. ----

#if defined(__aarch64__)
// Two columns of a row of `b`, times one lane of the factors: no scalar is loaded by itself.
template <int R, int V, int Lane, int Column>
INLINE void add_columns(const Vector* factors, const float* b, Vector* sum) {
  Vector first, second;
  load_pair<Column>(b, first, second);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r) {
    Vector* const to = sum + r * V + Column;
    to[0] = vfmaq_laneq_f32(to[0], first, factors[r], Lane);
    to[1] = vfmaq_laneq_f32(to[1], second, factors[r], Lane);
  }
}

template <int R, int V, int Lane, int... Pair>
INLINE void add_row(const Vector* factors, const float* b, Vector* sum,
                    std::integer_sequence<int, Pair...>) {
  (add_columns<R, V, Lane, 2 * Pair>(factors, b, sum), ...);
  if constexpr (V % 2 == 1) {
    const Vector last = load(b + (V - 1) * W);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      Vector& to = sum[r * V + V - 1];
      to = vfmaq_laneq_f32(to, last, factors[r], Lane);
    }
  }
}
#endif

// c [R, V * W] = a [R, depth] b [depth, V * W], plus c * keep[row] unless `keep` is null.
template <int R, int V>
INLINE void product(const float* a, int64_t a_row, const float* b, int64_t b_row, float* c,
                    int64_t c_row, int64_t depth, const float* keep) {
  Vector sum[R * V];
  if (keep == nullptr) {
#pragma GCC unroll 64
    for (int i = 0; i < R * V; ++i) sum[i] = Vector{};
  } else {
#pragma GCC unroll 64
    for (int i = 0; i < R * V; ++i) sum[i] = load(c + i / V * c_row + i % V * W) * keep[i / V];
  }
  int64_t k = 0;
#if defined(__aarch64__)
  using Pairs = std::make_integer_sequence<int, V / 2>;
  for (; k + 4 <= depth; k += 4, b += 4 * b_row) {
    Vector factors[R];
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) factors[i] = load(a + i * a_row + k);
    add_row<R, V, 0>(factors, b, sum, Pairs());
    add_row<R, V, 1>(factors, b + b_row, sum, Pairs());
    add_row<R, V, 2>(factors, b + 2 * b_row, sum, Pairs());
    add_row<R, V, 3>(factors, b + 3 * b_row, sum, Pairs());
  }
#endif
  for (; k < depth; ++k, b += b_row) {
    Vector row[V];
#pragma GCC unroll 16
    for (int i = 0; i < V; ++i) row[i] = load(b + i * W);
#pragma GCC unroll 64
    for (int i = 0; i < R * V; ++i) sum[i] += row[i % V] * a[i / V * a_row + k];
  }
#pragma GCC unroll 64
  for (int i = 0; i < R * V; ++i) store(c + i / V * c_row + i % V * W, sum[i]);
}

// The same for any number of rows and vectors.
template <int V>
INLINE void product_rows(const float* a, int64_t a_row, const float* b, int64_t b_row, float* c,
                         int64_t c_row, int64_t rows, int64_t depth, const float* keep) {
  constexpr int R = V > kTileVectors ? 3 : kTileRows;
  for (; rows >= R; rows -= R, a += R * a_row, c += R * c_row, keep += keep ? R : 0) {
    product<R, V>(a, a_row, b, b_row, c, c_row, depth, keep);
  }
  switch (rows) {
    case 5: return product<R < 5 ? R : 5, V>(a, a_row, b, b_row, c, c_row, depth, keep);
    case 4: return product<R < 4 ? R : 4, V>(a, a_row, b, b_row, c, c_row, depth, keep);
    case 3: return product<3, V>(a, a_row, b, b_row, c, c_row, depth, keep);
    case 2: return product<2, V>(a, a_row, b, b_row, c, c_row, depth, keep);
    case 1: return product<1, V>(a, a_row, b, b_row, c, c_row, depth, keep);
  }
}

void product_of(const float* a, int64_t a_row, const float* b, int64_t b_row, float* c,
                int64_t c_row, int64_t rows, int64_t depth, int64_t vectors, const float* keep) {
#if defined(__aarch64__)
  // With few rows there are registers for more vectors.
  if (rows <= 3) {
    for (; vectors >= 8; vectors -= 8, b += 8 * W, c += 8 * W) {
      product_rows<8>(a, a_row, b, b_row, c, c_row, rows, depth, keep);
    }
  }
#endif
  for (; vectors >= 4; vectors -= 4, b += 4 * W, c += 4 * W) {
    product_rows<4>(a, a_row, b, b_row, c, c_row, rows, depth, keep);
  }
  switch (vectors) {
    case 3: return product_rows<3>(a, a_row, b, b_row, c, c_row, rows, depth, keep);
    case 2: return product_rows<2>(a, a_row, b, b_row, c, c_row, rows, depth, keep);
    case 1: return product_rows<1>(a, a_row, b, b_row, c, c_row, rows, depth, keep);
  }
}

#if defined(__aarch64__)
// Adds two vectors of H rows of q times those of 4 keys; if `Fresh`, to 0.
template <int H, int Offset, bool Fresh>
INLINE void add_pair(const float* q, int64_t q_row, const float* k, int64_t k_row, Vector* sum) {
  Vector low[H], high[H];
#pragma GCC unroll 4
  for (int h = 0; h < H; ++h) load_pair<Offset>(q + h * q_row, low[h], high[h]);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    Vector first, second;
    load_pair<Offset>(k + i * k_row, first, second);
#pragma GCC unroll 4
    for (int h = 0; h < H; ++h) {
      Vector& to = sum[h * 4 + i];
      to = Fresh ? first * low[h] : to + first * low[h];
      to += second * high[h];
    }
  }
}

// Adds the products of H rows of q with 4 keys.
template <int H, bool Fresh, int... Pair>
INLINE void add_pairs(const float* q, int64_t q_row, const float* k, int64_t k_row, Vector* sum,
                      std::integer_sequence<int, Pair...>) {
  (add_pair<H, 2 * Pair, Fresh && Pair == 0>(q, q_row, k, k_row, sum), ...);
}
#endif

// part[h * 4 + i] = q[h] k[i] of 4 keys, lane by lane. If not 0, `Width` is the width.
template <int H, int Width>
INLINE void dot_parts(const float* q, const float* k, int64_t k_row, int64_t width, Vector* part) {
#if defined(__aarch64__)
  if constexpr (Width != 0) {
    using Pairs = std::make_integer_sequence<int, Width / (2 * W)>;
    return add_pairs<H, true>(q, Width, k, k_row, part, Pairs());
  }
#endif
#pragma GCC unroll 16
  for (int i = 0; i < 4 * H; ++i) part[i] = Vector{};
#if defined(__aarch64__)
  using Pairs = std::make_integer_sequence<int, kUnroll / 2>;
  for (int64_t j = 0; j < width; j += kUnit) {
    add_pairs<H, false>(q + j, width, k + j, k_row, part, Pairs());
  }
#else
  for (int64_t j = 0; j < width; j += kUnit) {
#pragma GCC unroll 64
    for (int i = 0; i < 4 * H * kUnroll; ++i) {
      const int64_t at = j + i / (4 * H) * W;
      const int key = i % 4, head = i / 4 % H;
      part[head * 4 + key] += load(k + key * k_row + at) * load(q + head * width + at);
    }
  }
#endif
}

// scores[h * kBlock, W] = q [H, width] of W keys, each a row of its own.
template <int H, int Width>
INLINE void dot_products(const float* q, const float* k, int64_t k_row, int64_t width,
                         float* scores) {
  Vector sum[W * H];
#pragma GCC unroll 4
  for (int first = 0; first < W; first += 4) {
    Vector part[4 * H];
    dot_parts<H, Width>(q, k + first * k_row, k_row, width, part);
#pragma GCC unroll 16
    for (int i = 0; i < 4 * H; ++i) sum[i / 4 * W + first + i % 4] = part[i];
  }
#pragma GCC unroll 4
  for (int h = 0; h < H; ++h) store(scores + h * kBlock, sums_of(sum + h * W));
}

// Scores of `count` keys, a multiple of W, with H rows, or with all rows.
template <int H>
void score_rows(const float* q, const float* k, int64_t k_row, int64_t count, int64_t width,
                float* scores) {
  // The width of nearly all models has code of its own where there are registers enough.
  constexpr int kUsual = W == 4 && kDotHeads > 1 ? 64 : 0;
  if (kUsual != 0 && width == kUsual) {
    for (int64_t i = 0; i < count; i += W) {
      dot_products<H, kUsual>(q, k + i * k_row, k_row, width, scores + i);
    }
  } else {
    for (int64_t i = 0; i < count; i += W) {
      dot_products<H, 0>(q, k + i * k_row, k_row, width, scores + i);
    }
  }
}

void score_keys(const float* q, int64_t rows, const float* k, int64_t k_row, int64_t count,
                int64_t width, float* scores) {
  constexpr int H = kDotHeads;
  for (; rows >= H; rows -= H, q += H * width, scores += H * kBlock) {
    score_rows<H>(q, k, k_row, count, width, scores);
  }
  switch (rows) {
    case 3: return score_rows<H < 3 ? H : 3>(q, k, k_row, count, width, scores);
    case 2: return score_rows<H < 2 ? H : 2>(q, k, k_row, count, width, scores);
    case 1: return score_rows<1>(q, k, k_row, count, width, scores);
  }
}

// ---- The attention. ----

// The parts of scratch memory.
struct Scratch {
  float *q, *out, *keys, *values, *tail, *scores, *greatest, *sums, *keep;
};

INLINE Scratch parts_of(float* memory, int64_t padded) {
  Scratch s;
  s.q = memory;
  s.out = s.q + kMostRows * padded;
  s.keys = s.out + kMostRows * padded;
  s.values = s.keys + kBlock * padded;
  s.tail = s.values + kBlock * padded;
  s.scores = s.tail + W * padded;
  s.greatest = s.scores + kScoreRows * kBlock;
  s.sums = s.greatest + kMostRows;
  s.keep = s.sums + kMostRows;
  return s;
}

int64_t scratch_of(int64_t width) {
  const int64_t padded = round_up(width, kUnit);
  return (2 * kMostRows + 2 * kBlock + W) * padded + kScoreRows * kBlock + 3 * kMostRows;
}

// Scores of a block become weights. `seen` of them count, up to `until` the rest becomes 0.
// Logarithms are to the base 2: `factor` is the scale times log2(e).
INLINE void soften(float* scores, int64_t seen, int64_t until, float factor, float& greatest,
                   float& sum, float& keep) {
  const float low = -__builtin_inff();
  for (int64_t i = seen; i < until; ++i) scores[i] = low;
  if (seen <= 0) {
    for (int64_t i = 0; i < until; ++i) scores[i] = 0;
    keep = 1;
    return;
  }
  const int64_t end = round_up(seen, W);
  Vector largest = load(scores);
  for (int64_t i = W; i < end; i += W) largest = greater(largest, load(scores + i));
  const float here = greatest_of(largest);
  const float now = here > greatest ? here : greatest;
  // Without a score but minus infinity, every weight is 0.
  const float base = now == low ? 0 : now;
  Vector total{};
  for (int64_t i = 0; i < end; i += W) {
    // Subtracted first: the product with a large score is rounded by more than 1.
    const Vector weight = exp2_of((load(scores + i) - base) * factor);
    total += weight;
    store(scores + i, weight);
  }
  for (int64_t i = end; i < until; ++i) scores[i] = 0;
  keep = exp2_of((greatest - base) * factor);
  sum = sum * keep + sum_of(total);
  greatest = now;
}

// scores * scale + mask, for the calls that have a mask or a scale that is not positive.
INLINE void add_mask(float* scores, int64_t seen, float scale, const float* mask) {
  for (int64_t i = 0; i < seen; ++i) scores[i] = scores[i] * scale + (mask ? mask[i] : 0.0f);
}

// Keys [n, n + count) as panels [width, kPanel] for `product_of`.
void pack_keys(const Attention& call, int64_t head, int64_t n, int64_t count, int64_t padded,
               float* row, float* to) {
  const int64_t until = round_up(count, kPanel);
  for (int64_t i = 0; i < until; ++i) {
    float* column = to + i / kPanel * kPanel * call.width + i % kPanel;
    if (i < count) read_row(call.k, n + i, head, call.width, padded, row);
    for (int64_t j = 0; j < call.width; ++j) column[j * kPanel] = i < count ? row[j] : 0.0f;
  }
}

// Scores with the keys of a block, which lie in rows: W of them at a time, the last ones from a
// copy that has W.
void score_block(const float* q, int64_t rows, const float* k, int64_t k_row, int64_t count,
                 int64_t padded, float* copy, float* scores) {
  const int64_t i = count / W * W;
  score_keys(q, rows, k, k_row, i, padded, scores);
  if (i == count) return;
  for (int64_t j = 0; j < W; ++j) {
    const float* from = k + least(i + j, count - 1) * k_row;
    for (int64_t d = 0; d < padded; d += W) store(copy + j * padded + d, load(from + d));
  }
  score_keys(q, rows, copy, padded, W, padded, scores + i);
}

void attend(const Attention& call, int64_t head, int64_t first, int64_t count, float* memory) {
  const int64_t width = call.width, padded = round_up(width, kUnit), vectors = padded / W;
  const Scratch s = parts_of(memory, padded);
  const int64_t last_query = (first + count - 1) / call.group;
  const int64_t keys = call.causal ? least(call.keys, call.start + last_query + 1) : call.keys;
  const bool packed = count >= kPackedRows;
  const bool direct = !packed && call.k.scales == nullptr && width == padded;
  // A mask is added to the scaled score, so then the scale cannot wait for the exponential.
  const bool scaled = call.mask != nullptr || !(call.scale > 0);
  const float factor = (scaled ? 1.0f : call.scale) * 1.4426950408889634f;

  for (int64_t r = 0; r < count; ++r) {
    const int64_t row = first + r;
    read_row(call.q, row / call.group, head * call.group + row % call.group, width, padded,
             s.q + r * padded);
    s.greatest[r] = -__builtin_inff();
    s.sums[r] = 0;
  }
  for (int64_t i = 0; i < count * padded; i += W) store(s.out + i, Vector{});

  for (int64_t n = 0; n < keys; n += kBlock) {
    const int64_t block = least(kBlock, keys - n);
    const float *k = s.keys, *v = s.values;
    int64_t k_row = padded, v_row = padded;
    if (direct) {
      k = floats(call.k) + n * call.k.token + head * call.k.head;
      v = floats(call.v) + n * call.v.token + head * call.v.head;
      k_row = call.k.token;
      v_row = call.v.token;
    } else {
      if (packed) {
        pack_keys(call, head, n, block, padded, s.scores, s.keys);
      } else {
        for (int64_t i = 0; i < block; ++i) {
          read_row(call.k, n + i, head, width, padded, s.keys + i * padded);
        }
      }
      for (int64_t i = 0; i < block; ++i) {
        read_row(call.v, n + i, head, width, padded, s.values + i * padded);
      }
    }
    for (int64_t r = 0; r < count; r += kScoreRows) {
      const int64_t rows = least(kScoreRows, count - r);
      // The last row sees most.
      const int64_t sees = call.start + (first + r + rows - 1) / call.group + 1 - n;
      const int64_t until = call.causal ? least(block, sees) : block;
      if (until <= 0) continue;
      const float* q = s.q + r * padded;
      if (packed) {
        for (int64_t i = 0; i < until; i += kPanel) {
          product_of(q, padded, s.keys + i * width, kPanel, s.scores + i, kBlock, rows, width,
                     least(kTileVectors, (until - i + W - 1) / W), nullptr);
        }
      } else {
        score_block(q, rows, k, k_row, until, padded, s.tail, s.scores);
      }
      for (int64_t i = 0; i < rows; ++i) {
        const int64_t query = (first + r + i) / call.group;
        const int64_t seen = call.causal ? least(until, call.start + query + 1 - n) : until;
        float* scores = s.scores + i * kBlock;
        if (scaled) {
          const float* mask = call.mask ? call.mask + query * call.keys + n : nullptr;
          add_mask(scores, seen, call.scale, mask);
        }
        soften(scores, seen, round_up(until, W), factor, s.greatest[r + i], s.sums[r + i],
               s.keep[r + i]);
      }
      product_of(s.scores, kBlock, v, v_row, s.out + r * padded, padded, rows, until, vectors,
                 s.keep + r);
    }
  }

  for (int64_t r = 0; r < count; ++r) {
    const int64_t row = first + r;
    float* to = call.out + row / call.group * call.out_token +
        (head * call.group + row % call.group) * call.out_head;
    const float* from = s.out + r * padded;
    // A row that sees no key becomes 0.
    const float share = s.sums[r] > 0 ? 1 / s.sums[r] : 0;
    int64_t i = 0;
    for (; i + W <= width; i += W) store(to + i, load(from + i) * share);
    for (; i < width; ++i) to[i] = from[i] * share;
  }
}

} // namespace

extern const Kernels KERNELS;
const Kernels KERNELS = {scratch_of, attend};

} // namespace mobilellm
