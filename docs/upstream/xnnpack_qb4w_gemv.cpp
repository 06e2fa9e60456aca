// How fast XNNPACK multiplies one row by an int4 matrix, by the size of its groups.
//
// What a language model does for each token it writes. Each scheme gets matrices of the same shape;
// they are multiplied one after the other, so that `--matrices 8` streams them from memory and
// `--matrices 1` with a small one finds it in the cache. Also runs a kernel of our own for groups
// of 32 (AVX-512 VNNI): what the same bytes cost in another layout.
//
//   W=$(python -c "import executorch, os; print(list(executorch.__path__)[0])")
//   g++ -std=c++17 -O2 -march=native xnnpack_qb4w_gemv.cpp -o gemv -L$W/lib -Wl,--no-as-needed \
//       -lexecutorch -lexecutorch_threadpool -lexecutorch_backend_xnnpack -Wl,-rpath,$W/lib
//   taskset -c 0 ./gemv 8 8192 2048     # matrices, rows, columns: streamed
//   taskset -c 0 ./gemv 1 1024 1024     # in the cache

#include <immintrin.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <limits>
#include <string>
#include <vector>

// XNNPACK's public declarations; the wheel ships the library without its header.
extern "C" {
typedef struct xnn_operator* xnn_operator_t;
struct xnn_quantization_params {
  int32_t zero_point;
  float scale;
};
int xnn_initialize(const void* allocator);
int xnn_run_operator(xnn_operator_t op, void* threadpool);
#define DECLARE(scheme)                                                                          \
  int xnn_reshape_fully_connected_nc_##scheme(xnn_operator_t, size_t, size_t* workspace, void*); \
  int xnn_setup_fully_connected_nc_##scheme(xnn_operator_t, const int8_t*, float*, void*,        \
                                            const xnn_quantization_params*);
DECLARE(qdu8_f32_qb4w)
DECLARE(qdu8_f32_qc4w)
DECLARE(qdu8_f32_qc8w)
int xnn_create_fully_connected_nc_qdu8_f32_qb4w(
    size_t in, size_t out, size_t in_stride, size_t out_stride, size_t block, uint8_t zero_point,
    const uint16_t* scales, const void* kernel, const float* bias, float min, float max,
    uint32_t flags, void* cache, xnn_operator_t* made);
int xnn_create_fully_connected_nc_qdu8_f32_qc4w(
    size_t in, size_t out, size_t in_stride, size_t out_stride, uint8_t zero_point,
    const float* scales, const void* kernel, const float* bias, float min, float max,
    uint32_t flags, void* cache, xnn_operator_t* made);
int xnn_create_fully_connected_nc_qdu8_f32_qc8w(
    size_t in, size_t out, size_t in_stride, size_t out_stride, const float* scales,
    const int8_t* kernel, const float* bias, float min, float max, uint32_t flags, void* cache,
    xnn_operator_t* made);
}

namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr size_t kGroup = 32;
// XNNPACK reads a few bytes beyond a row.
constexpr size_t kPadding = 64;

void check(int status, const char* what) {
  if (status == 0) return;
  std::fprintf(stderr, "%s: XNNPACK's status %d\n", what, status);
  std::exit(1);
}

uint16_t bfloat16(float value) {
  uint32_t bits;
  static_assert(sizeof bits == sizeof value);
  __builtin_memcpy(&bits, &value, sizeof bits);
  return bits >> 16;
}

struct Problem {
  size_t rows, columns;
  std::vector<uint8_t> codes;        // [rows, columns], 0 to 15, zero point 8
  std::vector<float> scales;         // [rows, columns / 32], exact in bfloat16
  std::vector<uint8_t> x;            // [columns], zero point 128
  xnn_quantization_params rounding;  // of x
};

Problem make_problem(size_t rows, size_t columns, uint32_t seed) {
  Problem made{rows, columns, {}, {}, {}, {128, 0.01f}};
  auto next = [&] { return (seed = seed * 1664525 + 1013904223) >> 16; };
  made.codes.resize(rows * columns);
  for (auto& code : made.codes) code = next() % 16;
  made.scales.resize(rows * columns / kGroup);
  for (auto& scale : made.scales) scale = (1 + next() % 64) / 4096.0f;
  made.x.resize(columns + kPadding);
  for (auto& value : made.x) value = next() % 256;
  return made;
}

// In float64, with a scale per group of 32.
std::vector<double> reference(const Problem& problem) {
  std::vector<double> y(problem.rows);
  for (size_t n = 0; n < problem.rows; ++n) {
    for (size_t k = 0; k < problem.columns; ++k) {
      const double scale = problem.scales[(n * problem.columns + k) / kGroup];
      const int weight = problem.codes[n * problem.columns + k] - 8;
      y[n] += scale * weight * (problem.x[k] - 128) * double(problem.rounding.scale);
    }
  }
  return y;
}

// ---- XNNPACK. ----

// 4: groups of `group`, or one scale for each row where it is 0. 8: one scale for each row.
xnn_operator_t make_operator(const Problem& p, int bits, size_t group, float* y,
                             xnn_quantization_params* padded) {
  xnn_operator_t op = nullptr;
  std::vector<float> of_rows(p.rows, 0.01f);
  std::vector<uint8_t> packed(p.rows * p.columns / 2);
  for (size_t i = 0; i < packed.size(); ++i) packed[i] = p.codes[2 * i] | p.codes[2 * i + 1] << 4;
  size_t workspace = 0;
  const auto* x = reinterpret_cast<const int8_t*>(p.x.data());
  if (bits == 4 && group) {
    std::vector<uint16_t> scales;
    for (size_t n = 0; n < p.rows; ++n) {
      for (size_t k = 0; k < p.columns; k += group) {
        scales.push_back(bfloat16(p.scales[(n * p.columns + k) / kGroup]));
      }
    }
    check(xnn_create_fully_connected_nc_qdu8_f32_qb4w(
              p.columns, p.rows, p.columns, p.rows, group, 8, scales.data(), packed.data(), nullptr,
              -kInfinity, kInfinity, 0, nullptr, &op), "create qb4w");
    check(xnn_reshape_fully_connected_nc_qdu8_f32_qb4w(op, 1, &workspace, nullptr), "reshape");
    check(xnn_setup_fully_connected_nc_qdu8_f32_qb4w(op, x, y, nullptr, padded), "setup");
  } else if (bits == 4) {
    check(xnn_create_fully_connected_nc_qdu8_f32_qc4w(
              p.columns, p.rows, p.columns, p.rows, 8, of_rows.data(), packed.data(), nullptr,
              -kInfinity, kInfinity, 0, nullptr, &op), "create qc4w");
    check(xnn_reshape_fully_connected_nc_qdu8_f32_qc4w(op, 1, &workspace, nullptr), "reshape");
    check(xnn_setup_fully_connected_nc_qdu8_f32_qc4w(op, x, y, nullptr, padded), "setup");
  } else {
    std::vector<int8_t> codes(p.codes.begin(), p.codes.end());
    check(xnn_create_fully_connected_nc_qdu8_f32_qc8w(
              p.columns, p.rows, p.columns, p.rows, of_rows.data(), codes.data(), nullptr,
              -kInfinity, kInfinity, 0, nullptr, &op), "create qc8w");
    check(xnn_reshape_fully_connected_nc_qdu8_f32_qc8w(op, 1, &workspace, nullptr), "reshape");
    check(xnn_setup_fully_connected_nc_qdu8_f32_qc8w(op, x, y, nullptr, padded), "setup");
  }
  if (workspace) check(1, "a workspace is wanted");
  return op;
}

// ---- The same bytes in another layout: four columns of sixteen rows in one vector. ----

#if defined(__AVX512VNNI__)
// Packed by panels of 16 rows: for each group 4 vectors of nibbles, then 16 scales.
struct Panels {
  std::vector<uint8_t> bytes;
  size_t rows, columns;
};
constexpr size_t kPanelGroup = 4 * 64 + 16 * 2;

Panels pack(const Problem& p) {
  Panels made{{}, p.rows, p.columns};
  made.bytes.resize(p.rows / 16 * (p.columns / kGroup) * kPanelGroup);
  uint8_t* out = made.bytes.data();
  for (size_t n = 0; n < p.rows; n += 16) {
    for (size_t k = 0; k < p.columns; k += kGroup) {
      for (size_t vector = 0; vector < 4; ++vector) {
        for (size_t i = 0; i < 64; ++i) {
          const size_t row = n + i / 4, column = k + 8 * vector + i % 4;
          const uint8_t* code = &p.codes[row * p.columns + column];
          *out++ = code[0] | code[4] << 4;
        }
      }
      for (size_t row = n; row < n + 16; ++row) {
        const uint16_t scale = bfloat16(p.scales[(row * p.columns + k) / kGroup]);
        __builtin_memcpy(out, &scale, 2);
        out += 2;
      }
    }
  }
  return made;
}

// Nothing but reading the bytes: what no kernel can be faster than.
int64_t read_only(const Panels& w) {
  __m512i a = _mm512_setzero_si512(), b = a, c = a, d = a;
  for (size_t i = 0; i + 256 <= w.bytes.size(); i += 256) {
    const uint8_t* bytes = w.bytes.data() + i;
    a = _mm512_xor_si512(a, _mm512_loadu_si512(bytes));
    b = _mm512_xor_si512(b, _mm512_loadu_si512(bytes + 64));
    c = _mm512_xor_si512(c, _mm512_loadu_si512(bytes + 128));
    d = _mm512_xor_si512(d, _mm512_loadu_si512(bytes + 192));
  }
  const __m512i all = _mm512_xor_si512(_mm512_xor_si512(a, b), _mm512_xor_si512(c, d));
  return _mm512_reduce_add_epi64(all);
}

// The dot-product instruction takes unsigned weights and signed x, so no bit of the weights is
// moved to its sign. 8 times the sum of a group's x is subtracted: what their zero point adds.
void multiply(const Panels& w, const int8_t* x, float x_scale, float* y) {
  const size_t groups = w.columns / kGroup;
  std::vector<int32_t> eights(groups);
  for (size_t g = 0; g < groups; ++g) {
    for (size_t k = 0; k < kGroup; ++k) eights[g] -= 8 * x[g * kGroup + k];
  }
  const __m512i low = _mm512_set1_epi8(15);
  const uint8_t* bytes = w.bytes.data();
  for (size_t n = 0; n < w.rows; n += 16) {
    __m512 sum = _mm512_setzero_ps();
    for (size_t g = 0; g < groups; ++g, bytes += kPanelGroup) {
      __m512i a = _mm512_set1_epi32(eights[g]), b = _mm512_setzero_si512();
      const int8_t* part = x + g * kGroup;
      for (int vector = 0; vector < 4; ++vector, part += 8) {
        const __m512i pair = _mm512_loadu_si512(bytes + 64 * vector);
        int32_t first, second;
        __builtin_memcpy(&first, part, 4);
        __builtin_memcpy(&second, part + 4, 4);
        a = _mm512_dpbusd_epi32(a, _mm512_and_si512(pair, low), _mm512_set1_epi32(first));
        b = _mm512_dpbusd_epi32(b, _mm512_and_si512(_mm512_srli_epi32(pair, 4), low),
                                _mm512_set1_epi32(second));
      }
      _mm_prefetch(reinterpret_cast<const char*>(bytes + 1024), _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(bytes + 1088), _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(bytes + 1152), _MM_HINT_T0);
      _mm_prefetch(reinterpret_cast<const char*>(bytes + 1216), _MM_HINT_T0);
      const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes + 256));
      const __m512 scales =
          _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
      sum = _mm512_fmadd_ps(_mm512_cvtepi32_ps(_mm512_add_epi32(a, b)), scales, sum);
    }
    _mm512_storeu_ps(y + n, _mm512_mul_ps(sum, _mm512_set1_ps(x_scale)));
  }
}
#endif

// ---- Times. ----

struct Contender {
  std::string name;
  size_t bytes;  // of one matrix with its scales
  std::function<void(size_t)> run;
  std::vector<double> seconds;
};

double seconds_of(const std::function<void()>& work) {
  const auto started = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - started).count();
}

double worst(const std::vector<float>& y, const std::vector<double>& expected) {
  double norm = 0, error = 0;
  for (size_t n = 0; n < expected.size(); ++n) {
    norm = std::max(norm, std::abs(expected[n]));
    error = std::max(error, std::abs(y[n] - expected[n]));
  }
  return error / norm;
}

}  // namespace

int main(int argc, char** argv) {
  const size_t count = argc > 1 ? std::atoi(argv[1]) : 8;
  const size_t rows = argc > 2 ? std::atoi(argv[2]) : 8192;
  const size_t columns = argc > 3 ? std::atoi(argv[3]) : 2048;
  const size_t repeats = argc > 4 ? std::atoi(argv[4]) : 40;
  if (!count || rows % 16 || columns % 256) check(1, "rows: of 16, columns: of 256");
  check(xnn_initialize(nullptr), "initialize");

  std::vector<Problem> problems;
  for (size_t i = 0; i < count; ++i) problems.push_back(make_problem(rows, columns, 7 + i));
  std::vector<float> y(rows + kPadding);
  // XNNPACK reads the rounding of as many rows as its largest tile has.
  std::vector<xnn_quantization_params> padded(32, problems[0].rounding);
  std::vector<Contender> contenders;
  auto add = [&](const std::string& name, int bits, size_t group) {
    std::vector<xnn_operator_t> operators;
    for (const auto& problem : problems) {
      operators.push_back(make_operator(problem, bits, group, y.data(), padded.data()));
    }
    const size_t scales = group ? rows * columns / group * 2 : rows * 4;
    contenders.push_back({name, rows * columns * bits / 8 + scales,
                          [operators](size_t i) { xnn_run_operator(operators[i], nullptr); }, {}});
  };
  add("XNNPACK int4, groups of 32", 4, 32);
  add("XNNPACK int4, groups of 64", 4, 64);
  add("XNNPACK int4, groups of 128", 4, 128);
  add("XNNPACK int4, groups of 256", 4, 256);
  add("XNNPACK int4, scale per row", 4, 0);
  add("XNNPACK int8, scale per row", 8, 0);
#if defined(__AVX512VNNI__)
  std::vector<Panels> panels;
  std::vector<std::vector<int8_t>> signed_x;
  for (const auto& problem : problems) {
    panels.push_back(pack(problem));
    signed_x.emplace_back();
    for (const uint8_t value : problem.x) signed_x.back().push_back(int(value) - 128);
  }
  contenders.push_back({"ours int4, groups of 32", rows * columns / 32 * 18,
                        [&](size_t i) {
                          multiply(panels[i], signed_x[i].data(), problems[i].rounding.scale,
                                   y.data());
                        }, {}});
  static volatile int64_t sink;
  contenders.push_back({"reading the same bytes", rows * columns / 32 * 18,
                        [&](size_t i) { sink = read_only(panels[i]); }, {}});
#endif

  const auto expected = reference(problems[0]);
  for (const auto& one : contenders) {
    if (one.name.find("groups of 32") == std::string::npos) continue;
    one.run(0);
    const double error = worst(y, expected);
    std::printf("%-30s error %.1e\n", one.name.c_str(), error);
    if (error > 1e-5) check(1, "a wrong result");
  }
  for (size_t repeat = 0; repeat < repeats; ++repeat) {
    for (auto& one : contenders) {
      const auto all = [&] { for (size_t i = 0; i < count; ++i) one.run(i); };
      all();  // the others have been in the cache meanwhile
      one.seconds.push_back(seconds_of(all));
    }
  }
  std::printf("%zu matrices of %zu x %zu, %.1f MB in groups of 32\n", count, rows, columns,
              count * rows * columns / 32 * 18 / 1e6);
  for (auto& one : contenders) {
    std::sort(one.seconds.begin(), one.seconds.end());
    const double products = double(count) * rows * columns, bytes = double(count) * one.bytes;
    const double best = one.seconds.front(), median = one.seconds[one.seconds.size() / 2];
    std::printf("%-30s best %9.4f ms, median %9.4f ms, %6.1f G products/s, %5.1f GB/s\n",
                one.name.c_str(), best * 1e3, median * 1e3, products / best / 1e9,
                bytes / best / 1e9);
  }
}
