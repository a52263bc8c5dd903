// tests.cpp: the proofs of mp.cu. A suite for each region, named after it and in the same order, so that
// `build/tests --test-suite=E4` (or `make check-E4`) asks about one equation alone. What is right is worked out here a
// second time, in fp64, from IEEE 754, from the article's equations and from slopes: nothing in this file calls the
// code that it judges to say what that code should give.
//
// A comparison is written so that NaN fails it, and a tolerance says where it comes from. e = 2^-24 is the largest
// relative error of one fp32 operation.
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <functional>
#include <limits>
#include <tuple>
#include <utility>

#include "mp.h"
#if !defined(MP_CUDA)
#include <sys/resource.h>
#include <sys/wait.h>

#include <csignal>
#endif

// ==== Words for all suites ===========================================================================================
static constexpr double e = 0x1p-24, infinite = std::numeric_limits<double>::infinity();
static constexpr float float_inf = std::numeric_limits<float>::infinity(), float_nan = NAN;

__attribute__((format(printf, 1, 2))) static std::string text(const char* format, ...) {
  char line[500];
  va_list values;
  va_start(values, format);
  vsnprintf(line, sizeof line, format, values);
  va_end(values);
  return line;
}
template <class To, class From>
static To same_bits(From x) {
  static_assert(sizeof(To) == sizeof(From), "a number keeps its bits");
  To y;
  memcpy(&y, &x, sizeof y);
  return y;
}

// ---- A 16-bit format, from its definition: `digits` significant bits, `lowest` the exponent of the least normal number
static double to_nearest(double x) { return std::nearbyint(x); }  // ties to even
static double cut_off(double x) { return std::trunc(x); }
static double ties_away(double x) { return std::round(x); }
struct Format {
  const char* name;
  Type type;
  int digits, lowest;
  uint16_t (*from_float)(float);  // what is to be proved
  float (*to_float)(uint16_t);
  uint16_t infinity() const { return uint16_t((3 - 2 * lowest) << (digits - 1)); }
  uint16_t encode(double x, double (*whole)(double) = to_nearest) const {
    const uint16_t sign = std::signbit(x) ? 0x8000 : 0;
    x = std::fabs(x);
    if (!(x < infinite)) return uint16_t(sign | infinity() | (std::isnan(x) ? 1 : 0));
    int exponent = lowest;
    if (x >= std::ldexp(1, lowest)) std::frexp(x, &exponent), exponent--;
    const double steps = whole(std::ldexp(x, digits - 1 - exponent));  // the leading 1 adds 1 to the exponent field
    return uint16_t(sign | std::min<int>(((exponent - lowest) << (digits - 1)) + int(steps), infinity()));
  }
  double decode(uint16_t bits) const {
    const int field = (bits & 0x7fff) >> (digits - 1), fraction = bits & ((1 << (digits - 1)) - 1);
    double x = std::ldexp(fraction + (field ? 1 << (digits - 1) : 0), std::max(field, 1) - 1 + lowest - (digits - 1));
    if (field == 3 - 2 * lowest) x = fraction ? NAN : infinite;
    return bits & 0x8000 ? -x : x;
  }
  double round(double x) const { return decode(encode(x)); }
  // Half the distance from |x|'s lower neighbour to its upper one: what one rounding changes at most
  double half_step(double x) const { return std::ldexp(1, (x == 0 ? lowest : std::max(std::ilogb(x), lowest)) - digits); }
};
static const Format half_format = {"half", Type::fp16, 11, -14, [](float x) { return float_to_half(x).bits; },
                                   [](uint16_t b) { return half_to_float(half{b}); }};
static const Format bfloat16_format = {"bfloat16", Type::bf16, 8, -126, [](float x) { return float_to_bfloat16(x).bits; },
                                       [](uint16_t b) { return bfloat16_to_float(bfloat16{b}); }};
static const Format* format_of(Type type) {  // nullptr: fp32, nothing is rounded
  return type == Type::fp16 ? &half_format : type == Type::bf16 ? &bfloat16_format : nullptr;
}
static const char* name_of(Type type) { return format_of(type) ? format_of(type)->name : "float"; }

// ---- Tally: one property over many values. It keeps the count, the smallest failure, and what the failures share. ----
struct Tally {
  std::string property;
  std::vector<std::pair<double, const char*>> known = {};  // a factor that a usual mistake leaves in the result
  long total = 0, wrong = 0, cut = 0, away = 0, zero = 0;
  double smallest = infinite, least_ratio = infinite, largest_ratio = -infinite;
  std::string first = {};
  bool ok() const { return total > 0 && wrong == 0; }
  void fails(double size, const std::string& words) {
    wrong++;
    if (size < smallest) smallest = size, first = words;
  }
  void check(bool good, double size, const std::string& words) { total++, good ? void() : fails(size, words); }
  void rounded(const Format& f, double x, uint16_t got) {  // is `got` x, rounded?
    total++;
    const uint16_t want = f.encode(x);
    if (std::isnan(x) ? std::isnan(f.decode(got)) : got == want) return;
    cut += got == f.encode(x, cut_off), away += got == f.encode(x, ties_away), zero += got == 0;
    wrong++;
    const double size = std::fabs(x) < DBL_MAX ? std::fabs(x) : DBL_MAX;
    if (size >= smallest) return;
    smallest = size;
    const bool tie = std::fabs(f.decode(f.encode(x, cut_off)) - x) == std::fabs(f.decode(f.encode(x, ties_away)) - x);
    first = text("input  %.9g (0x%08x)%s\n got    0x%04x = %.9g\n want   0x%04x = %.9g", x, same_bits<uint32_t>(float(x)),
                 tie && f.decode(want) != x ? ", halfway between two neighbours" : "", got, f.decode(got), want,
                 f.decode(want));
  }
  void near(double got, double want, double tolerance, int row = 0, int col = 0) {
    total++;
    if ((std::isnan(want) && std::isnan(got)) || got == want || std::fabs(got - want) <= tolerance) return;
    zero += got == 0;
    least_ratio = std::min(least_ratio, got / want), largest_ratio = std::max(largest_ratio, got / want);
    if (wrong++) return;
    first = text("[%d, %d]\n got    %.9g\n want   %.9g, to %.2g", row, col, got, want, tolerance);
  }
  std::string words() const {
    std::string s = text("%s: %ld of %ld wrong", property.c_str(), wrong, total);
    if (wrong) s += "; the smallest or first:\n " + first;
    if (wrong && zero == wrong) return s + "\n Every wrong result is 0: is the region still empty?";
    if (wrong && cut == wrong) return s + "\n This is what truncation gives: the dropped bits are ignored.";
    if (wrong && away == wrong) return s + "\n This is what rounding ties up gives: a tie goes to the even neighbour.";
    if (wrong > 1 && largest_ratio - least_ratio <= 0.01 * std::fabs(largest_ratio)) {
      s += text("\n All of them are %.4g times what is wanted", largest_ratio);
      for (auto& [factor, mistake] : known)
        if (std::fabs(largest_ratio / factor - 1) < 0.01) s += text(": %s", mistake);
    }
    return s;
  }
};
#define CHECK_TALLY(tally) CHECK_MESSAGE((tally).ok(), (tally).words())

// ---- Matrices, and how they come into tensors -----------------------------------------------------------------------
struct Random {  // the same numbers on every machine
  uint64_t state;
  uint32_t bits() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return uint32_t(state >> 32);
  }
  double real(double limit) { return (bits() * 0x1p-31 - 1) * limit; }
  double number(double limit, double step) { return step > 0 ? std::round(real(limit / step)) * step : real(limit); }
};
struct Matrix {
  int rows = 0, cols = 0;
  std::vector<double> v = {};
  Matrix() = default;
  Matrix(int rows_, int cols_, double x = 0) : rows(rows_), cols(cols_), v(size_t(rows_) * size_t(cols_), x) {}
  double& operator()(int r, int c) { return v[size_t(r) * size_t(cols) + size_t(c)]; }
  double operator()(int r, int c) const { return v[size_t(r) * size_t(cols) + size_t(c)]; }
  std::vector<float> floats() const { return {v.begin(), v.end()}; }
};
// Numbers in [-limit, limit]; with a step its multiples, whose products and sums fp32 holds exactly.
static Matrix random_matrix(Random& random, int rows, int cols, double limit, double step = 0) {
  Matrix m(rows, cols);
  for (double& x : m.v) x = float(random.number(limit, step));
  return m;
}
static Matrix transposed(const Matrix& m) {
  Matrix t(m.cols, m.rows);
  for (int r = 0; r < m.rows; r++)
    for (int c = 0; c < m.cols; c++) t(c, r) = m(r, c);
  return t;
}
static Matrix rounded(Matrix m, Type type) {
  for (double& x : m.v) x = format_of(type) ? format_of(type)->round(x) : double(float(x));
  return m;
}
static Tensor with_padding(Tensor t) { return t.cols = t.stride, t; }
// m into the upper rows of t; the padding and the rows below hold `rest`
static void put(const Tensor& t, const Matrix& m, double rest = 0) {
  Matrix all(t.rows, t.stride, rest);
  for (int r = 0; r < m.rows; r++)
    for (int c = 0; c < m.cols; c++) all(r, c) = m(r, c);
  to_device(all.floats(), with_padding(t));
}
static Matrix get(const Tensor& t) {
  Matrix m(t.rows, t.cols);
  const std::vector<float> values = to_host(t);
  m.v.assign(values.begin(), values.end());
  return m;
}
static Matrix get(const Tensor& t, int rows) { return get(first_rows(t, rows)); }
static std::vector<uint32_t> bits_of(const std::vector<Tensor>& tensors) {
  std::vector<uint32_t> all;
  for (const Tensor& t : tensors)
    if (t.memory)
      for (float x : to_host(t)) all.push_back(same_bits<uint32_t>(x));
  return all;
}
static Tensor device_bytes(const void* data, size_t bytes) {  // device memory with these bytes
  std::vector<float> words((bytes + 3) / 4);
  memcpy((void*)words.data(), data, bytes);
  const Tensor t = make_tensor(1, int(words.size()), Type::fp32);
  return to_device(words, t), t;
}
template <class F>
static void compare(Tally& tally, const Matrix& got, const Matrix& want, F tolerance) {
  REQUIRE(got.v.size() == want.v.size());
  for (int r = 0; r < got.rows; r++)
    for (int c = 0; c < got.cols; c++) tally.near(got(r, c), want(r, c), tolerance(r, c), r, c);
}
static double exactly(int, int) { return 0; }
static double largest(const Matrix& m) {
  double x = 0;
  for (double v : m.v) x = std::isnan(x) || std::fabs(v) <= x ? x : std::fabs(v);
  return x;
}

// ---- Runs `work` with the threads of a block in several orders, on one OS thread and on two: every run must leave the
// same bits. A missing barrier shows here. A GPU chooses its own order: there it runs twice.
static void same_bits_in_every_order(const char* what, const std::function<std::vector<uint32_t>()>& work) {
  const std::vector<uint32_t> want = work();
  Tally tally{text("%s: the same bits in another order of threads", what)};
  const auto again = [&](const char* order, int number) {
    const std::vector<uint32_t> got = work();
    tally.check(got == want && !got.empty(), number, text("%s (order or seed %d)", order, number));
  };
#if defined(MP_CUDA)
  again("a second run", 0);
#else
  const int os_threads = int(cpu::pool()->helpers.size()) + 1;
  const auto before = std::make_tuple(cpu::order, cpu::seed, cpu::poison);
  cpu::poison = true;
  for (int workers = 1; workers <= 2; workers++) {
    cpu::use_os_threads(workers);
    cpu::order = cpu::forward, again("forward", workers);
    cpu::order = cpu::backward, again("backward", workers);
    cpu::order = cpu::shuffled;
    for (cpu::seed = 1; cpu::seed <= 3; cpu::seed++) again("shuffled", int(cpu::seed));
  }
  std::tie(cpu::order, cpu::seed, cpu::poison) = before;
  cpu::use_os_threads(os_threads);
#endif
  CHECK_TALLY(tally);
}

// ---- Model: the article's network once more, in fp64. With a format, every value that the design stores in 16 bits is
// rounded once.
struct Model {
  int L = 0;
  bool relu = true;
  Loss kind = Loss::cross_entropy;
  const Format* format = nullptr;
  double scale = 1, loss = 0, kink = infinite;         // kink: how near an argument of ReLU came to 0
  std::vector<Matrix> W, b, a, z, nudge, delta, dW, db;  // nudge: added to z, to measure dL/dz
  Matrix y;
  explicit Model(const Mlp& net)
      : L(net.L), relu(net.relu), kind(net.loss), format(format_of(net.layer[0].type)), W(L + 1u), b(W), a(W), z(W),
        nudge(W), delta(W), dW(W), db(W), y(get(net.y, net.rows)) {
    a[0] = get(net.layer[0].a, net.rows);
    for (int l = 1; l <= L; l++) W[l] = get(net.layer[l].W), b[l] = get(net.layer[l].b);
    for (int l = 1; l <= L; l++) nudge[l] = Matrix(net.rows, W[l].rows);
  }
  double round(double x) const { return format ? format->round(x) : x; }
  double prediction(int row, int i) const {  // z, or softmax(z)
    if (kind == Loss::squared_error) return a[L](row, i);
    double sum = 0;
    for (int j = 0; j < a[L].cols; j++) sum += std::exp(a[L](row, j) - a[L](row, i));
    return 1 / sum;
  }
  void forward_layer(int l) {  // E2
    z[l] = a[l] = Matrix(a[l - 1].rows, W[l].rows);
    for (int n = 0; n < a[l].rows; n++)
      for (int i = 0; i < a[l].cols; i++) {
        double& sum = z[l](n, i) = b[l](0, i) + nudge[l](n, i);
        for (int j = 0; j < W[l].cols; j++) sum += W[l](i, j) * a[l - 1](n, j);
        const bool f = relu && l < L;
        if (f) kink = std::min(kink, std::fabs(sum));
        a[l](n, i) = round(f && sum < 0 ? 0 : sum);
      }
  }
  void find_loss() {  // E1, mean over the batch
    loss = 0;
    for (int n = 0; n < y.rows; n++)
      for (int i = 0; i < y.cols; i++)
        if (kind == Loss::squared_error) loss += 0.5 * std::pow(y(n, i) - a[L](n, i), 2) / y.rows;
        else if (y(n, i) != 0) loss -= y(n, i) * std::log(prediction(n, i)) / y.rows;
  }
  void output_delta() {  // E3
    delta[L] = Matrix(y.rows, y.cols);
    for (int n = 0; n < y.rows; n++)
      for (int i = 0; i < y.cols; i++) delta[L](n, i) = round((prediction(n, i) - y(n, i)) / y.rows * scale);
  }
  void backward_layer(int l) {  // E4: delta of layer l - 1
    delta[l - 1] = Matrix(delta[l].rows, W[l].cols);
    for (int n = 0; n < delta[l].rows; n++)
      for (int j = 0; j < W[l].cols; j++) {
        double sum = 0;
        for (int i = 0; i < W[l].rows; i++) sum += delta[l](n, i) * W[l](i, j);
        delta[l - 1](n, j) = round(relu && a[l - 1](n, j) <= 0 ? 0 : sum);
      }
  }
  void weight_gradient(int l) {  // E5
    dW[l] = Matrix(W[l].rows, W[l].cols), db[l] = Matrix(1, W[l].rows);
    for (int i = 0; i < W[l].rows; i++)
      for (int n = 0; n < delta[l].rows; n++) {
        db[l](0, i) += delta[l](n, i);
        for (int j = 0; j < W[l].cols; j++) dW[l](i, j) += delta[l](n, i) * a[l - 1](n, j);
      }
    for (double& x : dW[l].v) x = round(x);
    for (double& x : db[l].v) x = round(x);
  }
  double find_all() {
    for (int l = 1; l <= L; l++) forward_layer(l);
    return find_loss(), loss;
  }
  void backward() {
    output_delta();
    for (int l = L; l >= 1; l--) {
      weight_gradient(l);
      if (l > 1) backward_layer(l);
    }
  }
  // dL/dx for each x of m, one of this model's own matrices, by central differences: (L(x + h) - L(x - h)) / 2h is off
  // by h^2/6 L''' < 1e-8, if no ReLU changes sides
  Matrix slopes(Matrix& m) {
    Matrix slope(m.rows, m.cols);
    const double h = 1e-4;
    for (size_t i = 0; i < m.v.size(); i++) {
      const double x = m.v[i];
      m.v[i] = x + h, slope.v[i] = find_all() / (2 * h);
      m.v[i] = x - h, slope.v[i] -= find_all() / (2 * h);
      m.v[i] = x;
    }
    return slope;
  }
};

// A small network, 7-5-6-3, of which 4 of 6 rows are in use; the others hold NaN and must not matter. With a step all
// numbers are its multiples, so that every product and sum is exact in fp32.
static Mlp small_network(Type type, bool relu, Loss kind, uint64_t seed, double step = 0) {
  Random random{seed};
  Mlp net = make_mlp({7, 5, 6, 3}, 6, type, Update::master);
  net.rows = 4, net.relu = relu, net.loss = kind;
  for (int l = 0; l <= net.L; l++) {
    Layer& layer = net.layer[l];
    put(layer.a, random_matrix(random, 4, layer.a.cols, step > 0 ? 4 : 1, step), NAN);
    if (l == 0) continue;
    const double limit = step > 0 ? 4 : 1;
    const Matrix W = random_matrix(random, layer.W.rows, layer.W.cols, limit, step);
    set_parameters(layer, W.floats(), random_matrix(random, 1, layer.W.rows, limit, step).floats());
    put(layer.delta, random_matrix(random, 4, layer.a.cols, limit, step), NAN);
  }
  Matrix y = random_matrix(random, 4, 3, 1, step);
  if (kind == Loss::cross_entropy) {
    y = Matrix(4, 3);
    for (int n = 0; n < 4; n++) y(n, int(random.bits() % 3)) = 1;
  }
  put(net.y, y, NAN);
  return net;
}
static Mlp far_from_kinks(bool relu, Loss kind) {  // fp32, with no argument of a ReLU near 0, so that slopes exist
  for (uint64_t seed = 1;; seed++) {
    Mlp net = small_network(Type::fp32, relu, kind, seed);
    Model model(net);
    model.find_all();
    if (model.kink > 0.005) return net;
  }
}
struct Case {
  Loss kind;
  bool relu;
  std::string words;
};
static const std::vector<Case> cases = {{Loss::cross_entropy, true, "cross-entropy, ReLU"},
                                        {Loss::cross_entropy, false, "cross-entropy, no activation"},
                                        {Loss::squared_error, true, "squared error, ReLU"},
                                        {Loss::squared_error, false, "squared error, no activation"}};
static const std::vector<Type> types = {Type::fp32, Type::fp16, Type::bf16};
static const std::pair<double, const char*> no_mean = {4, "4 is the batch: is the division by it missing?"};

// ==== 2.1 Number formats =============================================================================================
// Everything that can go wrong in rounding goes wrong at a value that the format holds, halfway between two of them, or
// at a float next to such a point; infinity's lower neighbour is the value where the next step would be.
static std::vector<float> critical_floats(const Format& f) {
  std::vector<float> inputs = {float_nan, -float_nan, float_inf, -float_inf, FLT_MAX, -FLT_MAX, FLT_TRUE_MIN, FLT_MIN};
  for (uint32_t nan : {0x7f800001u, 0x7f801fffu, 0x7f802000u, 0x7fffffffu, 0xff800001u, 0xffaaa000u, 0xffffffffu})
    inputs.push_back(same_bits<float>(nan));  // with payloads that truncation would lose, or a carry overflow
  for (int bits = 0; bits < f.infinity(); bits++) {
    const double x = f.decode(uint16_t(bits)), tie = x + f.half_step(x);
    for (float point : {float(x), float(tie)})
      for (float y : {point, std::nextafter(point, -float_inf), std::nextafter(point, float_inf)})
        inputs.push_back(y), inputs.push_back(-y);
  }
  Random random{1};
  for (int i = 0; i < 200000; i++) inputs.push_back(same_bits<float>(random.bits()));
  return inputs;
}
static void check_rounding(const Format& f) {
  Tally values{"values that the format holds"}, ties{"ties to even"}, others{"every other float goes to the nearest"},
      nans{"NaN stays NaN"};
  for (float x : critical_floats(f)) {
    const double low = f.decode(f.encode(x, cut_off));
    Tally& tally = std::isnan(x) ? nans : low == x ? values : low + std::copysign(f.half_step(x), x) == x ? ties : others;
    tally.rounded(f, x, f.from_float(x));
  }
  CHECK_TALLY(values);
  CHECK_TALLY(ties);
  CHECK_TALLY(others);
  CHECK_TALLY(nans);
}
// The kernels round with instructions of their own, 8 numbers at once (here box A) or one by one (here E3).
static void check_rounding_in_kernels(const Format& f) {
  const std::vector<float> inputs = critical_floats(f);
  const int n = int(inputs.size());
  const Tensor x = make_tensor(1, n, Type::fp32);
  Mlp wide = make_mlp({n, 1}, 1, f.type, Update::master), single = make_mlp({1, n}, 1, f.type, Update::master);
  Batch batch;
  to_device(inputs, x);
  batch.x = x.as<float>(), batch.rows = 1;
  preprocess(wide, batch, nullptr);
  single.loss = Loss::squared_error;  // then delta is 0 - y
  std::vector<float> y;
  for (float v : inputs) y.push_back(-v);
  to_device(y, single.y);
  output_delta(single, LossScaler(1));
  const std::vector<float> by_8 = to_host(wide.layer[0].a), by_1 = to_host(single.layer[1].delta);
  Tally wides{"rounded in a kernel, 8 at a time"}, singles{"rounded in a kernel, one by one"};
  for (int i = 0; i < n; i++) {
    wides.rounded(f, inputs[i], f.encode(by_8[i]));
    if (inputs[i] != 0) singles.rounded(f, inputs[i], f.encode(by_1[i]));
  }
  CHECK_TALLY(wides);
  CHECK_TALLY(singles);
}
static void check_widening(const Format& f) {
  Tally values{"the value of each of the 65,536 patterns"}, round_trip{"to a float and back"};
  for (int i = 0; i < 65536; i++) {
    const uint16_t bits = uint16_t(i);
    const double want = f.decode(bits), got = f.to_float(bits);
    values.check(std::isnan(want) ? std::isnan(got) : got == want && std::signbit(got) == std::signbit(want), i & 0x7fff,
                 text("0x%04x\n got    %.9g\n want   %.9g", bits, got, want));
    const uint16_t back = f.from_float(f.to_float(bits));
    round_trip.check(std::isnan(want) ? std::isnan(f.decode(back)) : back == bits, i & 0x7fff,
                     text("0x%04x\n got    0x%04x", bits, back));
  }
  CHECK_TALLY(values);
  CHECK_TALLY(round_trip);
}
static void check_widening_in_kernels(const Format& f) {  // 8 at a time in the update, one by one in gemm_naive
  Mlp net = make_mlp({65536, 1}, 1, f.type, Update::master);
  const Tensor column = make_tensor(65536, 1, f.type), one = make_tensor(1, 1, f.type);
  std::vector<float> all;
  for (int i = 0; i < 65536; i++) all.push_back(float(f.decode(uint16_t(i))));
  to_device(all, net.layer[1].dW), to_device(all, column), to_device({1}, one);
  LossScaler scaler(1);
  update(net, scaler, -1);  // the master was 0 and becomes dW
  gemm_naive(Layout::ABt, column, one, column);
  Tally by_8{"widened in a kernel, 8 at a time"}, by_1{"widened in a kernel, one by one"};
  const std::vector<float> master = to_host(kept_W(net.layer[1])), product = to_host(column);
  for (int i = 0; i < 65536; i++) by_8.near(master[i], all[i], 0, i), by_1.near(product[i], all[i], 0, i);
  CHECK_TALLY(by_8);
  CHECK_TALLY(by_1);
}

TEST_SUITE("float_to_half") {
  TEST_CASE("a float becomes the nearest half, a tie the even one") { check_rounding(half_format); }
  TEST_CASE("kernels round to half in the same way") { check_rounding_in_kernels(half_format); }
  TEST_CASE("landmarks") {
    const std::vector<std::pair<float, int>> landmarks = {{0.f, 0x0000},
                                                          {-0.f, 0x8000},
                                                          {1.f, 0x3c00},
                                                          {1 + 0x1p-11f, 0x3c00},          // ties
                                                          {1 + 0x3p-11f, 0x3c02},
                                                          {2049.f, 0x6800},
                                                          {2051.f, 0x6802},
                                                          {0x1.002002p0f, 0x3c01},         // just above a tie
                                                          {0.1f, 0x2e66},
                                                          {1.f / 3, 0x3555},
                                                          {65504.f, 0x7bff},               // the largest
                                                          {65519.996f, 0x7bff},
                                                          {65520.f, 0x7c00},               // from here on: infinity
                                                          {-65520.f, 0xfc00},
                                                          {FLT_MAX, 0x7c00},
                                                          {0x1p-14f, 0x0400},              // the least normal
                                                          {0x1p-14f - 0x1p-25f, 0x0400},   // a tie with a subnormal
                                                          {0x3ffp-24f, 0x03ff},            // subnormals
                                                          {0x1p-24f, 0x0001},
                                                          {0x3p-25f, 0x0002},
                                                          {0x5p-25f, 0x0002},
                                                          {0x1p-25f, 0x0000},              // a tie with 0
                                                          {0x1.000002p-25f, 0x0001},
                                                          {-0x1p-25f, 0x8000},
                                                          {1e-8f, 0x0000},
                                                          {1024 * 1e-8f, 0x00ac},          // what a loss scale is for
                                                          {FLT_TRUE_MIN, 0x0000}};
    for (auto [x, bits] : landmarks) {
      INFO("input ", x);
      CHECK(half_format.encode(x) == bits);  // the reference of these tests is tested, too
      CHECK(float_to_half(x).bits == bits);
    }
  }
}
TEST_SUITE("half_to_float") {
  TEST_CASE("each half is the float that its bits say") { check_widening(half_format); }
  TEST_CASE("kernels read halves in the same way") { check_widening_in_kernels(half_format); }
#if defined(__FLT16_MAX__)
  TEST_CASE("the compiler's own half type agrees, both ways") {
    Tally narrow{"to half, as the compiler does it"}, wide{"to float, as the compiler does it"};
    for (float x : critical_floats(half_format)) {
      const uint16_t want = same_bits<uint16_t>(_Float16(x)), got = float_to_half(x).bits;
      narrow.check(std::isnan(x) ? std::isnan(half_format.decode(got)) : got == want, std::fabs(double(x)),
                   text("input  %.9g\n got    0x%04x\n want   0x%04x", double(x), got, want));
    }
    for (int i = 0; i < 65536; i++) {
      const double want = double(same_bits<_Float16>(uint16_t(i))), got = half_to_float(half{uint16_t(i)});
      wide.near(got, want, 0, i);
    }
    CHECK_TALLY(narrow);
    CHECK_TALLY(wide);
  }
#endif
}
TEST_SUITE("float_to_bfloat16") {
  TEST_CASE("a float becomes the nearest bfloat16, a tie the even one") { check_rounding(bfloat16_format); }
  TEST_CASE("a bfloat16 is the upper half of a float") { check_widening(bfloat16_format); }
  TEST_CASE("kernels convert in the same way") {
    check_rounding_in_kernels(bfloat16_format);
    check_widening_in_kernels(bfloat16_format);
  }
}

// ==== 2.3 A training step ============================================================================================
struct Digits {  // random images and labels on the device, in a shuffled order
  int in, classes, count;
  std::vector<uint8_t> pixels, labels;
  std::vector<int> order;
  Tensor memory[3];
  Batch batch;
  Digits(int in_, int classes_, int count_, int rows) : in(in_), classes(classes_), count(count_) {
    Random random{7};
    for (int i = 0; i < count * in; i++) pixels.push_back(uint8_t(random.bits() >> 24));
    for (int i = 0; i < count; i++) labels.push_back(uint8_t(random.bits() % unsigned(classes))), order.push_back(i);
    for (int i = count - 1; i > 0; i--) std::swap(order[i], order[random.bits() % unsigned(i + 1)]);
    memory[0] = device_bytes(pixels.data(), pixels.size());
    memory[1] = device_bytes(labels.data(), labels.size());
    memory[2] = device_bytes(order.data(), order.size() * sizeof(int));
    batch.pixels = memory[0].as<uint8_t>(), batch.labels = memory[1].as<uint8_t>();
    batch.order = memory[2].as<int>(), batch.rows = rows;
  }
  Matrix a(int position, Type type) const {  // what box B makes of the batch at this position
    Matrix m(batch.rows, in);
    for (int n = 0; n < batch.rows; n++)
      for (int i = 0; i < in; i++) m(n, i) = pixels[size_t(order[position * batch.rows + n] * in + i)] / 255.0;
    return rounded(m, type);
  }
  Matrix y(int position) const {
    Matrix m(batch.rows, classes);
    for (int n = 0; n < batch.rows; n++) m(n, labels[size_t(order[position * batch.rows + n])]) = 1;
    return m;
  }
};
static std::vector<Tensor> state_of(const Mlp& net) {
  std::vector<Tensor> all;
  for (const Layer& l : net.layer) all.push_back(l.master), all.push_back(l.weights), all.push_back(l.compensation);
  return all;
}

TEST_SUITE("train_step") {
  TEST_CASE("six steps in fp32 do what the same steps do in fp64") {
    for (const Case& c : cases) {
      const Digits digits(20, 4, 30, 5);
      Mlp net = make_mlp({20, 9, 7, 4}, 5, Type::fp32, Update::master);
      net.relu = c.relu, net.loss = c.kind;
      initialise(net);
      LossScaler scaler(1024, 2, 0.5f, 3);
      Tally losses{c.words + ": loss"}, weights{c.words + ": weights", {{-1, "they go uphill"}}};
      for (int step = 0; step < 6; step++) {
        Model model(net);
        model.a[0] = digits.a(step, Type::fp32), model.y = digits.y(step);
        model.find_all(), model.backward();
        const float lr = 0.02f;
        train_step(net, digits.batch, scaler, lr);
        const StepState s = scaler.read();
        // at most 10 products of at most 20 terms each, whose errors mostly cancel: 100 e of the largest
        losses.near(s.loss, model.loss, 100 * e * (1 + model.loss), step);
        for (int l = 1; l <= net.L; l++) {
          for (size_t i = 0; i < model.W[l].v.size(); i++) model.W[l].v[i] -= lr * model.dW[l].v[i];
          for (size_t i = 0; i < model.b[l].v.size(); i++) model.b[l].v[i] -= lr * model.db[l].v[i];
          const double tolerance = 100 * e * largest(model.dW[l]) * lr + 2 * e * largest(model.W[l]);
          compare(weights, get(net.layer[l].W), model.W[l], [&](int, int) { return tolerance; });
          compare(weights, get(net.layer[l].b), model.b[l], [&](int, int) { return tolerance; });
        }
        CHECK(s.step == unsigned(step + 1));
        CHECK(s.position == step + 1);
        CHECK(s.skipped == 0);
        CHECK(s.scale == (step < 2 ? 1024 : step < 5 ? 2048 : 4096));
      }
      CHECK_TALLY(losses);
      CHECK_TALLY(weights);
    }
  }
  TEST_CASE("in fp16 the loss scale sinks until the gradients fit, and then grows back") {
    const Digits digits(20, 4, 80, 5);
    Mlp net = make_mlp({20, 9, 4}, 5, Type::fp16, Update::master);
    initialise(net);
    LossScaler scaler(0x1p24f, 2, 0.5f, 2);
    int skipped = 0, grown = 0;
    for (int step = 0; step < 16; step++) {
      const StepState before = scaler.read();
      const std::vector<uint32_t> weights = bits_of(state_of(net));
      Model model(net);
      model.a[0] = digits.a(step, Type::fp16), model.y = digits.y(step), model.scale = before.scale;
      model.find_all(), model.backward();
      bool overflow = false;
      for (int l = 1; l <= net.L; l++) overflow |= !(largest(model.dW[l]) <= 65504) || !(largest(model.db[l]) <= 65504);
      train_step(net, digits.batch, scaler, 0.1f);
      const StepState after = scaler.read();
      INFO(text("step %d, scale %g: %s", step, double(before.scale), overflow ? "overflows" : "finite"));
      CHECK(after.skipped == (skipped += overflow));
      CHECK((after.scale < before.scale) == overflow);
      CHECK((bits_of(state_of(net)) == weights) == overflow);
      CHECK(after.halted == 0);
      CHECK(std::fabs(after.loss - model.loss) <= 0x1p-9 * (1 + largest(model.a[net.L])));  // logits to 1 step
      grown += after.scale > before.scale;
    }
    CHECK(skipped > 3);
    CHECK(grown > 0);
  }
  TEST_CASE("the same bits in every order of threads") {
    const Digits digits(100, 10, 80, 20);
    for (Update rule : {Update::master, Update::stochastic})
      same_bits_in_every_order("4 steps of 100-70-10 in fp16", [&] {
        Mlp net = make_mlp({100, 70, 10}, 20, Type::fp16, rule);
        initialise(net);
        LossScaler scaler(0x1p20f, 2, 0.5f, 1);
        std::vector<uint32_t> bits;
        for (int step = 0; step < 4; step++) {
          train_step(net, digits.batch, scaler, 0.2f);
          bits.push_back(same_bits<uint32_t>(scaler.read().loss));
        }
        for (uint32_t b : bits_of(state_of(net))) bits.push_back(b);
        return bits;
      });
  }
  TEST_CASE("box B: pixels / 255, rounded once, of the images whose turn it is") {
    for (Type type : types) {
      Digits digits(13, 3, 256, 4);
      for (int i = 0; i < 13 * 256; i++) digits.pixels[size_t(i)] = uint8_t(i);  // every grey there is
      digits.memory[0] = device_bytes(digits.pixels.data(), digits.pixels.size());
      digits.batch.pixels = digits.memory[0].as<uint8_t>();
      Mlp net = make_mlp({13, 3}, 6, type, Update::master);
      put(net.layer[0].a, Matrix(6, 13, 7), 7), put(net.y, Matrix(6, 3, 7));
      LossScaler scaler(1);
      Tally input{text("%s: a0", name_of(type))}, targets{"one-hot y"};
      for (int position = 0; position < 64; position++) {
        StepState s = scaler.read();
        s.position = position, scaler.write(s);
        preprocess(net, digits.batch, &scaler);
        compare(input, get(net.layer[0].a, 4), digits.a(position, type), exactly);
        compare(targets, get(net.y, 4), digits.y(position), exactly);
      }
      CHECK_TALLY(input);
      CHECK_TALLY(targets);
      CHECK(net.rows == 4);
      CHECK(get(net.layer[0].a)(4, 0) == 7);  // the rows below are not of this batch
      CHECK(get(with_padding(net.layer[0].a))(3, 15) == 0);
    }
  }
  TEST_CASE("box B: points x with targets y") {
    Random random{3};
    const Matrix x = random_matrix(random, 6, 11, 2), y = random_matrix(random, 6, 2, 2);
    const Tensor device_x = device_bytes(x.floats().data(), 6 * 11 * 4), device_y = device_bytes(y.floats().data(), 6 * 2 * 4);
    const std::vector<int> order = {5, 2, 0, 3, 1, 4};
    const Tensor device_order = device_bytes(order.data(), 6 * sizeof(int));
    Mlp net = make_mlp({11, 2}, 3, Type::bf16, Update::master);
    Batch batch;
    batch.x = device_x.as<float>(), batch.y = device_y.as<float>(), batch.rows = 3;
    LossScaler scaler(1);
    StepState s = scaler.read();
    s.position = 1, scaler.write(s);
    for (bool shuffled : {false, true}) {
      batch.order = shuffled ? device_order.as<int>() : nullptr;
      preprocess(net, batch, &scaler);
      Tally input{"a0"}, targets{"y"};
      for (int n = 0; n < 3; n++) {
        const int sample = shuffled ? order[size_t(3 + n)] : 3 + n;
        for (int i = 0; i < 11; i++) input.near(get(net.layer[0].a)(n, i), bfloat16_format.round(x(sample, i)), 0, n, i);
        for (int i = 0; i < 2; i++) targets.near(get(net.y)(n, i), y(sample, i), 0, n, i);
      }
      CHECK_TALLY(input);
      CHECK_TALLY(targets);
    }
  }
  TEST_CASE("box H: the class of the largest logit, also when the last batch is not full") {
    const Digits digits(20, 4, 11, 11);
    Mlp net = make_mlp({20, 9, 4}, 4, Type::fp32, Update::master);
    initialise(net);
    Model model(net);
    model.a[0] = Matrix(11, 20), model.y = Matrix(11, 4);
    for (size_t i = 0; i < digits.pixels.size(); i++) model.a[0].v[i] = digits.pixels[i] / 255.0;
    for (int l = 1; l <= net.L; l++) model.nudge[l] = Matrix(11, model.W[l].rows);
    model.find_all();
    std::vector<int> want;
    for (int n = 0; n < 11; n++) {
      const auto z = model.a[2].v.begin() + 4 * n;
      want.push_back(int(std::max_element(z, z + 4) - z));
    }
    CHECK(predict(net, digits.pixels) == want);
    CHECK(*std::max_element(want.begin(), want.end()) > *std::min_element(want.begin(), want.end()));
    CHECK(predict(net, {}).empty());
  }
  TEST_CASE("weights start from He's normal distribution, biases from 0, and the 16-bit copy is the master rounded") {
    Mlp net = make_mlp({300, 200, 10}, 1, Type::fp16, Update::master), other = net;
    net.seed = 5, initialise(net);
    const Matrix W = get(kept_W(net.layer[1])), copy = get(net.layer[1].W);
    double sum = 0, squares = 0, fourth = 0;
    for (double w : W.v) sum += w, squares += w * w, fourth += w * w * w * w;
    const double n = double(W.v.size()), variance = 2.0 / 300;  // each bound is 5 standard deviations of the estimate
    CHECK(std::fabs(sum / n) <= 5 * std::sqrt(variance / n));
    CHECK(std::fabs(squares / n / variance - 1) <= 5 * std::sqrt(2 / n));
    CHECK(std::fabs(fourth / n / (variance * variance) - 3) <= 5 * std::sqrt(96 / n));  // 3: normal; 1.8: uniform
    CHECK(largest(get(kept_b(net.layer[1]))) == 0);
    CHECK(copy.v == rounded(W, Type::fp16).v);
    CHECK(copy.v != W.v);
    other = make_mlp({300, 200, 10}, 1, Type::fp16, Update::master), other.seed = 6, initialise(other);
    CHECK(get(kept_W(other.layer[1])).v != W.v);
    other.seed = 5, initialise(other);
    CHECK(get(kept_W(other.layer[1])).v == W.v);
  }
  TEST_CASE("what does not fit is refused") {
    CHECK_THROWS_AS(make_tensor(0, 1, Type::fp32), Error);
    CHECK_THROWS_AS(make_tensor(1, 0, Type::fp32), Error);
    CHECK_THROWS_AS(make_tensor(1 << 16, 1 << 16, Type::fp16), Error);
    CHECK_THROWS_AS(to_device({1, 2, 3}, make_tensor(2, 2, Type::fp32)), Error);
    CHECK_THROWS_AS(make_mlp({5}, 1, Type::fp16, Update::master), Error);
    CHECK_THROWS_AS(make_mlp({5, 0, 3}, 1, Type::fp16, Update::master), Error);
    CHECK_THROWS_AS(make_mlp({5, 3}, 0, Type::fp16, Update::master), Error);
    CHECK_THROWS_AS(make_mlp({5, 3}, 1, Type::fp32, Update::kahan), Error);
  }
}

// ==== 4.1 E1: the loss ===============================================================================================
static Mlp logits_only(const Matrix& z, const Matrix& y, Type type, Loss kind) {  // a network seen from its last layer
  Mlp net = make_mlp({1, z.cols}, z.rows + 2, type, Update::master);
  net.rows = z.rows, net.loss = kind;
  put(net.layer[1].a, z, NAN), put(net.y, y, NAN);
  return net;
}
TEST_SUITE("E1") {
  TEST_CASE("the loss is the mean over the batch of 1/2 sum (y - z)^2, or of -sum y log softmax(z)") {
    Random random{11};
    for (Type type : types)
      for (Loss kind : {Loss::squared_error, Loss::cross_entropy})
        for (auto [rows, classes] : {std::make_pair(1, 1), {4, 3}, {70, 10}, {33, 17}}) {
          const Matrix z = random_matrix(random, rows, classes, 5);
          Matrix y = random_matrix(random, rows, classes, 5);
          for (int n = 0; n < rows && kind == Loss::cross_entropy; n++)
            for (int i = 0; i < classes; i++) y(n, i) = i == n % classes;
          Mlp net = logits_only(z, y, type, kind);
          LossScaler scaler(1024);  // the loss itself is not scaled
          loss(net, scaler);
          Model model(net);
          model.a[1] = get(net.layer[1].a, rows), model.find_loss();
          Tally tally{text("%s, %s, [%d, %d]", kind == Loss::squared_error ? "squared error" : "cross-entropy",
                           name_of(type), rows, classes),
                      {{2, "the 1/2"}, {0.5, "a 1/2 too much"}, {double(rows), "the batch: a mean, not a sum"},
                       {1.0 / rows, "divided by the batch twice"}}};
          // all terms are positive: each addition, and a few operations on each term, e of a sum of at most 5 + 17
          tally.near(scaler.read().loss, model.loss, e * (classes + rows + 8) * (10 + model.loss));
          CHECK_TALLY(tally);
        }
  }
  TEST_CASE("large logits do not overflow") {
    for (Type type : types) {
      Matrix z(2, 3), y(2, 3);
      z(0, 0) = 1e4, z(0, 2) = -1e4, z(1, 1) = -1e4, z(1, 0) = -1e4, z(1, 2) = -1e4, y(0, 2) = 1, y(1, 0) = 1;
      Mlp net = logits_only(z, y, type, Loss::cross_entropy);
      LossScaler scaler(1);
      loss(net, scaler);
      z = rounded(z, type);  // (20000 + log 3) / 2
      CHECK(std::fabs(scaler.read().loss - (z(0, 0) - z(0, 2) + std::log(3)) / 2) <= 4 * e * 1e4);
    }
  }
  TEST_CASE("NaN and infinity are not hidden") {
    for (double bad : {double(NAN), infinite})
      for (Loss kind : {Loss::squared_error, Loss::cross_entropy}) {
        Matrix z(3, 4), y(3, 4);
        z(1, 2) = bad, y(0, 0) = y(1, 1) = y(2, 3) = 1;
        Mlp net = logits_only(z, y, Type::fp16, kind);
        LossScaler scaler(1);
        loss(net, scaler);
        CHECK_FALSE(std::isfinite(scaler.read().loss));
      }
  }
}

// ==== 4.2.1 E2: forward ==============================================================================================
TEST_SUITE("E2") {
  TEST_CASE("z = a W^T + b and a = f(z), f = ReLU on the hidden layers, rounded once") {
    for (Type type : types)
      for (bool relu : {true, false}) {
        Mlp net = small_network(type, relu, Loss::cross_entropy, 2, 0.0625);  // all sums are exact: so is the result
        for (int l = net.L; l >= 1; l--) {
          Model model(net);
          model.a[l - 1] = get(net.layer[l - 1].a, 4), model.forward_layer(l);
          forward(net, l);
          Tally tally{text("%s, layer %d, %s", name_of(type), l, relu ? "ReLU" : "no activation")};
          compare(tally, get(net.layer[l].a, 4), model.a[l], exactly);
          CHECK_TALLY(tally);
          CHECK(std::isnan(get(net.layer[l].a)(4, 0)));  // a row that is not of this batch
        }
      }
  }
  TEST_CASE("without f the network is one linear map") {
    Mlp net = far_from_kinks(false, Loss::squared_error);
    Model model(net);
    for (int l = 1; l <= net.L; l++) forward(net, l);
    model.find_all();
    Tally tally{"z of the last layer"};
    compare(tally, get(net.layer[3].a, 4), model.a[3], [&](int, int) { return 20 * e * largest(model.a[3]); });
    CHECK_TALLY(tally);
  }
}

// ==== 4.2.2 E3, E4: backward =========================================================================================
TEST_SUITE("E3") {
  TEST_CASE("delta is the slope of the loss over z, times the loss scale") {
    for (const Case& c : cases) {
      Mlp net = far_from_kinks(c.relu, c.kind);
      LossScaler scaler(8);
      for (int l = 1; l <= net.L; l++) forward(net, l);
      loss(net, scaler), output_delta(net, scaler);
      Model model(net);
      Matrix slope = model.slopes(model.nudge[net.L]);
      for (double& x : slope.v) x *= 8;
      Tally tally{c.words,
                  {no_mean, {0.5, "the article's formula, half the slope"}, {0.125, "the loss scale is missing"}, {-1, "the sign"}}};
      compare(tally, get(net.layer[net.L].delta, 4), slope, [&](int, int) { return 8 * 100 * e; });
      CHECK_TALLY(tally);
    }
  }
  TEST_CASE("the article's (z - y) / 2 is exactly half the slope of 1/2 (y - z)^2") {
    for (double z : {-1.5, 0.25, 2.0})
      for (double y : {-0.5, 0.0, 3.0}) {
        const double h = 0.125;  // E1 is a parabola: its central difference is exact, and so is fp64 with these numbers
        const auto E1 = [&](double at) { return 0.5 * (y - at) * (y - at); };
        const double slope = (E1(z + h) - E1(z - h)) / (2 * h), article = (z - y) * 0.5;
        CHECK(article == slope / 2);
        Mlp net = logits_only(Matrix(1, 1, z), Matrix(1, 1, y), Type::fp16, Loss::squared_error);
        output_delta(net, LossScaler(1));
        CHECK(get(net.layer[1].delta, 1)(0, 0) == slope);
      }
  }
  TEST_CASE("computed in fp32 and rounded once") {
    Random random{12};
    for (Type type : types)
      for (Loss kind : {Loss::squared_error, Loss::cross_entropy}) {
        const Matrix z = random_matrix(random, 4, 10, 4, 0.015625);
        Matrix y = random_matrix(random, 4, 10, 4, 0.00390625);  // y and z - y need more than 11 bits
        for (int n = 0; n < 4 && kind == Loss::cross_entropy; n++)
          for (int i = 0; i < 10; i++) y(n, i) = i == n;
        Mlp net = logits_only(z, y, type, kind);
        LossScaler scaler(1024);
        loss(net, scaler), output_delta(net, scaler);
        Model model(net);
        model.a[1] = get(net.layer[1].a, 4), model.format = nullptr, model.scale = 1024, model.output_delta();
        Tally tally{text("%s, %s", kind == Loss::squared_error ? "squared error" : "cross-entropy", name_of(type)),
                    {no_mean, {0.5, "the article's formula"}}};
        const Matrix got = get(net.layer[1].delta, 4);
        const Format* f = format_of(type);
        for (int n = 0; n < 4; n++)
          for (int i = 0; i < 10; i++) {
            const double want = model.delta[1](n, i);
            // z - y, / 4 and * 1024 are exact here. softmax is not: exp takes log sum exp's error of 10 e and its own
            const double fp32 = kind == Loss::squared_error ? 0 : 20 * e * 256;
            if (fp32 == 0) tally.near(got(n, i), f ? f->round(want) : want, 0, n, i);
            else tally.near(got(n, i), want, fp32 + (f ? f->half_step(std::fabs(want) + fp32) : 0), n, i);
          }
        CHECK_TALLY(tally);
        CHECK(std::isfinite(get(net.layer[1].delta, 4)(3, 9)));
      }
  }
  TEST_CASE("the scale multiplies before the rounding, where 2^-26 still exists") {
    Mlp net = logits_only(Matrix(4, 1, 0x1p-24), Matrix(4, 1), Type::fp16, Loss::squared_error);
    output_delta(net, LossScaler(1));
    CHECK(get(net.layer[1].delta, 4)(0, 0) == 0);  // 2^-24 / 4 is no half
    output_delta(net, LossScaler(1024));
    CHECK(get(net.layer[1].delta, 4)(0, 0) == 0x1p-16);
  }
  TEST_CASE("large logits give 0 and 1, not NaN") {
    Matrix z(1, 3), y(1, 3);
    z(0, 0) = 1e4, z(0, 2) = -1e4, y(0, 2) = 1;
    Mlp net = logits_only(z, y, Type::fp16, Loss::cross_entropy);
    LossScaler scaler(1);
    loss(net, scaler), output_delta(net, scaler);
    CHECK(get(net.layer[1].delta, 1).v == std::vector<double>{1, 0, -1});
  }
}

TEST_SUITE("E4") {
  TEST_CASE("delta = (delta W) * f'(z), rounded once") {
    for (Type type : types)
      for (bool relu : {true, false}) {
        Mlp net = small_network(type, relu, Loss::cross_entropy, 3, 0.0625);
        Random random{4};
        for (int l = net.L; l > 1; l--) {
          Matrix a = random_matrix(random, 4, net.layer[l - 1].a.cols, 2, 0.5);  // negative, 0 and positive
          for (double& x : a.v) x = relu && x < 0 ? 0 : x;
          put(net.layer[l - 1].a, a, NAN);
          put(net.layer[l].delta, random_matrix(random, 4, net.layer[l].a.cols, 4, 0.0625), NAN);
          Model model(net);
          model.a[l - 1] = a, model.delta[l] = get(net.layer[l].delta, 4), model.backward_layer(l);
          backward(net, l);
          Tally tally{text("%s, layer %d, %s", name_of(type), l, relu ? "ReLU" : "no activation")};
          compare(tally, get(net.layer[l - 1].delta, 4), model.delta[l - 1], exactly);
          CHECK_TALLY(tally);
          CHECK(std::isnan(get(net.layer[l - 1].delta)(4, 0)));
        }
      }
  }
  TEST_CASE("delta is the slope of the loss over the z of each hidden layer") {
    for (const Case& c : cases) {
      Mlp net = far_from_kinks(c.relu, c.kind);
      LossScaler scaler(1);
      for (int l = 1; l <= net.L; l++) forward(net, l);
      loss(net, scaler), output_delta(net, scaler);
      for (int l = net.L; l > 1; l--) {
        backward(net, l);
        Model model(net);
        const Matrix slope = model.slopes(model.nudge[l - 1]);
        Tally tally{text("%s, layer %d", c.words.c_str(), l - 1), {no_mean}};
        // 8 products of at most 7 terms lie between the pixels and this: 64 e, most of which cancels
        compare(tally, get(net.layer[l - 1].delta, 4), slope, [&](int, int) { return 64 * e * (1 + largest(slope)); });
        CHECK_TALLY(tally);
      }
    }
  }
}

// ==== 4.2.3 E5: the weight gradient ==================================================================================
TEST_SUITE("E5") {
  TEST_CASE("dW = delta^T a and db = column sums of delta, over the rows in use, rounded once") {
    for (Type type : types) {
      Mlp net = small_network(type, true, Loss::cross_entropy, 5, 0.0625);
      Model model(net);
      for (int l = 1; l <= net.L; l++) {
        put(net.layer[l].gradients, Matrix(1, net.layer[l].gradients.cols, NAN));
        put(first_rows(net.layer[l].delta, 4), get(net.layer[l].delta, 4));  // padded with 0, as E3 and E4 leave it
        model.a[l] = get(net.layer[l].a, 4), model.delta[l] = get(net.layer[l].delta, 4);
        model.weight_gradient(l), weight_gradient(net, l);
        Tally dW{text("%s, layer %d, dW", name_of(type), l)}, db{text("%s, layer %d, db", name_of(type), l)};
        compare(dW, get(net.layer[l].dW), model.dW[l], exactly);
        compare(db, get(net.layer[l].db), model.db[l], exactly);
        CHECK_TALLY(dW);
        CHECK_TALLY(db);
        for (double g : get(net.layer[l].gradients).v) CHECK_MESSAGE(std::isfinite(g), "the gradients' padding");
      }
    }
  }
  TEST_CASE("dW and db are the slopes of the loss over every weight and bias") {
    for (const Case& c : cases) {
      Mlp net = far_from_kinks(c.relu, c.kind);
      LossScaler scaler(1);
      for (int l = 1; l <= net.L; l++) forward(net, l);
      loss(net, scaler), output_delta(net, scaler);
      for (int l = net.L; l >= 1; l--) {
        weight_gradient(net, l);
        if (l > 1) backward(net, l);
        Model model(net);
        const Matrix dW = model.slopes(model.W[l]), db = model.slopes(model.b[l]);
        Tally weights{text("%s, layer %d, dW", c.words.c_str(), l), {no_mean}};
        Tally biases{text("%s, layer %d, db", c.words.c_str(), l), {no_mean}};
        compare(weights, get(net.layer[l].dW), dW, [&](int, int) { return 64 * e * (1 + largest(dW)); });  // as in E4
        compare(biases, get(net.layer[l].db), db, [&](int, int) { return 64 * e * (1 + largest(db)); });
        CHECK_TALLY(weights);
        CHECK_TALLY(biases);
      }
    }
  }
  TEST_CASE("db of many columns and rows") {
    Random random{6};
    Mlp net = make_mlp({2, 300}, 70, Type::fp16, Update::master);
    const Matrix delta = random_matrix(random, 70, 300, 1, 0.015625);
    put(net.layer[1].delta, delta), put(net.layer[0].a, Matrix(70, 2));
    weight_gradient(net, 1);
    Model model(net);
    model.delta[1] = delta, model.weight_gradient(1);
    Tally tally{"db"};
    compare(tally, get(net.layer[1].db), model.db[1], exactly);
    CHECK_TALLY(tally);
  }
}

// ==== The matrix products ============================================================================================
using Gemm = void (*)(Layout, const Tensor&, const Tensor&, const Tensor&, const Epilogue&);
struct Shape {
  int M, N, K;
};
static const std::vector<std::pair<Layout, const char*>> layouts = {
    {Layout::ABt, "A B^T"}, {Layout::AB, "A B"}, {Layout::AtB, "A^T B"}};
static Tensor operand(const Matrix& m, Type type, bool across) {  // NaN in the padding and in three rows below
  const Matrix laid = across ? transposed(m) : m;
  const Tensor t = make_tensor(laid.rows + 3, laid.cols, type);
  return put(t, laid, NAN), first_rows(t, laid.rows);
}
// K fp32 roundings, each at most e of a partial sum that is about sqrt(sum of squared products) large, add up like a
// random walk: sqrt(K) times that, and 4 of its deviations. Bias and rounding to 16 bits follow.
static double product_tolerance(double want, double squares, double bias, int K, Type type) {
  const double sum = 4 * e * std::sqrt(K * squares) + e * (std::fabs(want) + std::fabs(bias));
  return sum + (format_of(type) ? format_of(type)->half_step(std::fabs(want) + sum) : 0);
}
static void check_product(Gemm gemm, Shape shape, Type type, bool bias, bool relu, bool mask) {
  const auto [M, N, K] = shape;
  Random random{uint64_t(M * 1000003 + N * 1009 + K)};
  const Matrix A = rounded(random_matrix(random, M, K, 1), type), B = rounded(random_matrix(random, N, K, 1), type);
  const Matrix b = rounded(random_matrix(random, 1, N, 1), type), f = random_matrix(random, M, N, 1, 0.5);
  Matrix want(M, N), squares(M, N);
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++) {
      double sum = 0, square = 0;
      for (int k = 0; k < K; k++) {
        const double product = A.v[size_t(m) * K + k] * B.v[size_t(n) * K + k];
        sum += product, square += product * product;
      }
      if (bias) sum += b(0, n);
      if (relu && sum < 0) sum = 0;
      want(m, n) = mask && f(m, n) <= 0 ? 0 : sum, squares(m, n) = square;
    }
  for (auto [layout, formula] : layouts) {
    const Tensor whole = make_tensor(M + 2, N, type), C = first_rows(whole, M);  // two rows that must stay as they are
    put(whole, Matrix(M, N, NAN), 7);
    const Tensor device_b = operand(b, type, false), device_f = operand(f, type, false);
    Epilogue epilogue;
    epilogue.relu = relu;
    if (bias) epilogue.bias = &device_b;
    if (mask) epilogue.mask = &device_f;
    gemm(layout, operand(A, type, layout == Layout::AtB), operand(B, type, layout != Layout::ABt), C, epilogue);
    Tally tally{text("%s, %s, M N K = %d %d %d%s%s%s", formula, name_of(type), M, N, K, bias ? ", bias" : "",
                     relu ? ", ReLU" : "", mask ? ", mask" : "")};
    compare(tally, get(C), want, [&](int m, int n) {
      return mask && f(m, n) <= 0 ? 0 : product_tolerance(want(m, n), squares(m, n), bias ? b(0, n) : 0, K, type);
    });
    CHECK_TALLY(tally);
    const Matrix all = get(with_padding(whole));
    CHECK_MESSAGE(std::all_of(all.v.end() - 2 * all.cols, all.v.end(), [](double x) { return x == 7; }),
                  "rows below the result were written");
  }
}
static void check_products(Gemm gemm) {
  const std::vector<Shape> shapes = {{1, 1, 1},      {5, 3, 1},       {1, 8, 10},       {8, 1, 17},     {16, 16, 16},
                                     {17, 33, 65},   {64, 64, 64},    {64, 128, 784},   {128, 784, 64}, {64, 10, 128},
                                     {64, 128, 10},  {10, 128, 64},   {130, 129, 10},   {130, 10, 129}, {65, 66, 130},
                                     {200, 72, 333}, {1, 1, 1000},    {3, 130, 7}};
  for (Shape shape : shapes)
    for (Type type : types) check_product(gemm, shape, type, false, false, false);
  for (Shape shape : {Shape{5, 10, 3}, {17, 33, 20}, {70, 75, 70}, {10, 20, 66}, {33, 10, 40}})
    for (Type type : types)
      for (int options = 1; options < 8; options++)
        check_product(gemm, shape, type, options & 1, options & 2, options & 4);
}
static void check_not_finite(Gemm gemm) {  // NaN and infinity reach the result, through ReLU too, and no other row
  for (Type type : types) {
    Matrix A(20, 40, 1), B(30, 40, 1);
    A(3, 5) = NAN, A(7, 39) = infinite, B(29, 0) = -1;
    const Tensor C = make_tensor(20, 30, type);
    Epilogue epilogue;
    epilogue.relu = true;
    gemm(Layout::ABt, operand(A, type, false), operand(B, type, false), C, epilogue);
    Tally tally{text("%s: a row with NaN, a row with infinity", name_of(type))};
    compare(tally, get(C),
            [] {
              Matrix want(20, 30, 40);
              for (int n = 0; n < 30; n++) want(3, n) = NAN, want(7, n) = infinite;
              for (int m = 0; m < 20; m++) want(m, 29) = m == 3 ? double(NAN) : m == 7 ? infinite : 38;
              return want;
            }(),
            exactly);
    CHECK_TALLY(tally);
  }
}
static void check_orders(Gemm gemm) {
  Random random{21};
  for (auto [M, N, K] : {Shape{17, 33, 65}, {130, 72, 200}, {70, 130, 16}, {70, 10, 130}, {10, 70, 130}})
    for (auto [layout, formula] : layouts) {
      const Tensor A = operand(random_matrix(random, M, K, 1), Type::fp16, layout == Layout::AtB);
      const Tensor B = operand(random_matrix(random, N, K, 1), Type::fp16, layout != Layout::ABt);
      const Tensor C = make_tensor(M, N, Type::fp16);
      same_bits_in_every_order(text("%s, M N K = %d %d %d", formula, M, N, K).c_str(), [&, wanted = layout] {
        put(C, Matrix(M, N, NAN));
        gemm(wanted, A, B, C, {});
        return bits_of(std::vector<Tensor>{C});
      });
    }
}
static void check_refusals(Gemm gemm) {
  const Tensor A = make_tensor(4, 6, Type::fp16), B = make_tensor(5, 6, Type::fp16), C = make_tensor(4, 5, Type::fp16);
  const Tensor wide = make_tensor(4, 6, Type::fp32), bias = make_tensor(1, 4, Type::fp16);
  Epilogue wrong_bias, wrong_mask;
  wrong_bias.bias = &bias, wrong_mask.mask = &A;
  CHECK_NOTHROW(gemm(Layout::ABt, A, B, C, {}));
  CHECK_THROWS_AS(gemm(Layout::AB, A, B, C, {}), Error);
  CHECK_THROWS_AS(gemm(Layout::AtB, A, B, C, {}), Error);
  CHECK_THROWS_AS(gemm(Layout::ABt, B, A, C, {}), Error);
  CHECK_THROWS_AS(gemm(Layout::ABt, A, B, make_tensor(5, 5, Type::fp16), {}), Error);
  CHECK_THROWS_AS(gemm(Layout::ABt, A, make_tensor(5, 7, Type::fp16), C, {}), Error);
  CHECK_THROWS_AS(gemm(Layout::ABt, wide, B, C, {}), Error);
  CHECK_THROWS_AS(gemm(Layout::ABt, A, B, C, wrong_bias), Error);
  CHECK_THROWS_AS(gemm(Layout::ABt, A, B, C, wrong_mask), Error);
}
TEST_SUITE("gemm_naive") {
  TEST_CASE("three layouts, three types, any size, with bias, ReLU and mask") { check_products(gemm_naive); }
  TEST_CASE("NaN and infinity stay") { check_not_finite(gemm_naive); }
  TEST_CASE("the order of the threads does not matter") { check_orders(gemm_naive); }
  TEST_CASE("operands that do not fit are refused") { check_refusals(gemm_naive); }
}
TEST_SUITE("gemm_tiled") {
  TEST_CASE("three layouts, three types, any size, with bias, ReLU and mask") { check_products(gemm_tiled); }
  TEST_CASE("NaN and infinity stay") { check_not_finite(gemm_tiled); }
  TEST_CASE("the order of the threads does not matter") { check_orders(gemm_tiled); }
  TEST_CASE("operands that do not fit are refused") { check_refusals(gemm_tiled); }
}

// ==== 3.1 Loss scaling ===============================================================================================
static void step_with(LossScaler& scaler, bool found_inf, float loss_value = 1) {  // the end of a step
  StepState s = scaler.read();
  s.found_inf = found_inf, s.loss = loss_value;
  scaler.write(s), scaler.update();
}
using Trace = std::vector<std::pair<float, int>>;  // scale and tracker after each step
static void check_trace(const char* words, LossScaler scaler, const char* steps, const Trace& want) {
  Tally scales{text("%s, steps %s: scale", words, steps)}, trackers{text("%s, steps %s: tracker", words, steps)};
  for (int i = 0; steps[i]; i++) {
    step_with(scaler, steps[i] == '!');
    scales.near(scaler.read().scale, want[size_t(i)].first, 0, i);
    trackers.near(scaler.read().growth_tracker, want[size_t(i)].second, 0, i);
  }
  CHECK_TALLY(scales);
  CHECK_TALLY(trackers);
}
static Mlp two_layers(Type type, Update rule) {
  Mlp net = make_mlp({9, 5, 3}, 1, type, rule);
  initialise(net);
  return net;
}

TEST_SUITE("unscale_and_check") {
  TEST_CASE("a gradient is multiplied by float(1 / scale), in fp32") {
    Random random{31};
    for (Type type : types)
      for (float scale : {1.f, 1000.f, 65536.f, 3.f, 0x1p-3f}) {
        Mlp net = make_mlp({50, 4}, 1, type, Update::master);
        const Tensor& gradients = net.layer[1].gradients;
        put(gradients, random_matrix(random, 1, gradients.cols, 100));
        LossScaler scaler(scale);
        unscale_and_check(net, scaler);
        CHECK(scaler.read().found_inf == 0);
        update(net, scaler, -1);  // the master was 0: now it is the gradient
        Tally tally{text("%s, scale %g", name_of(type), double(scale)), {{double(scale), "the scale is still in it"}}};
        const Matrix g = get(gradients), w = get(net.layer[1].master);
        const float inverse = float(1 / double(scale));
        for (int i = 0; i < g.cols; i++) tally.near(w(0, i), float(g(0, i) * double(inverse)), 0, 0, i);
        CHECK_TALLY(tally);
      }
  }
  TEST_CASE("one infinity or NaN is found wherever it is, before the scale divides it away") {
    for (Type type : types) {
      Mlp net = two_layers(type, Update::master);
      Tally tally{text("%s: found", name_of(type))};
      for (int l = 1; l <= net.L; l++)
        for (int i : {0, 4, 40, 44, net.layer[l].gradients.cols - 8, net.layer[l].gradients.cols - 8 + net.layer[l].b.cols - 1})
          for (double bad : {infinite, -infinite, double(NAN), 60000.0, 0.0}) {
            Matrix g(1, net.layer[l].gradients.cols, 1e-3);
            if (i >= g.cols) continue;
            g(0, i) = bad;
            for (int other = 1; other <= net.L; other++) put(net.layer[other].gradients, Matrix(1, 1));
            put(net.layer[l].gradients, g);
            LossScaler scaler(65536);
            unscale_and_check(net, scaler);
            tally.near(scaler.read().found_inf, std::isfinite(bad) ? 0 : 1, 0, l, i);
          }
      CHECK_TALLY(tally);
    }
  }
  TEST_CASE("one bad gradient leaves every weight as it was, and the step is counted as skipped") {
    for (Update rule : {Update::master, Update::half, Update::kahan, Update::stochastic}) {
      Mlp net = two_layers(Type::fp16, rule);
      Tally same{"all weights after a skipped step"}, moved{"weights after a good step"};
      for (int l = 1; l <= net.L; l++)
        for (bool bias : {false, true})
          for (bool last : {false, true})
            for (double bad : {infinite, double(NAN)}) {
              for (int k = 1; k <= net.L; k++) {
                put(net.layer[k].dW, Matrix(net.layer[k].W.rows, net.layer[k].W.cols, 4096));
                put(net.layer[k].db, Matrix(1, net.layer[k].b.cols, 4096));
              }
              const std::vector<uint32_t> before = bits_of(state_of(net));
              const Tensor part = bias ? net.layer[l].db : net.layer[l].dW;
              Matrix g = get(part);
              (last ? g.v.back() : g.v.front()) = bad;
              put(part, g);
              LossScaler scaler(65536);
              unscale_and_check(net, scaler), update(net, scaler, 0.5f), scaler.update();
              same.check(bits_of(state_of(net)) == before, l, text("layer %d, %s", l, bias ? "b" : "W"));
              const StepState s = scaler.read();
              same.check(s.skipped == 1 && s.scale == 32768 && s.found_inf == 0, l, "the scaler's state");
              put(part, Matrix(g.rows, g.cols, 4096));
              unscale_and_check(net, scaler), update(net, scaler, 0.5f), scaler.update();
              moved.check(bits_of(state_of(net)) != before && scaler.read().skipped == 1, l, "a good step");
            }
      CHECK_TALLY(same);
      CHECK_TALLY(moved);
    }
  }
}

TEST_SUITE("loss_scaling") {
  TEST_CASE("scale and tracker follow torch.amp.GradScaler") {
    check_trace("defaults", LossScaler(), "!+", {{32768, 0}, {32768, 1}});
    check_trace("from 8, interval 2", LossScaler(8, 2, 0.5f, 2), "+++!++",
                {{8, 1}, {16, 0}, {16, 1}, {8, 0}, {8, 1}, {16, 0}});
    check_trace("from 2^127, interval 1: twice that is infinite", LossScaler(0x1p127f, 2, 0.5f, 1), "+", {{0x1p127f, 0}});
    check_trace("from 2^126, interval 1", LossScaler(0x1p126f, 2, 0.5f, 1), "+", {{0x1p127f, 0}});
    check_trace("from 3e38, growth 1.1", LossScaler(3e38f, 1.1f, 0.5f, 1), "+", {{3e38f * 1.1f, 0}});
    check_trace("from 1000, backoff 0.7", LossScaler(1000, 2, 0.7f), "!", {{700, 0}});
    check_trace("fixed", LossScaler(1000, 1, 1, 3), "++!+", {{1000, 1}, {1000, 2}, {1000, 0}, {1000, 1}});
  }
  TEST_CASE("defaults: 65536, doubled after 2000 finite steps in a row") {
    LossScaler scaler;
    Tally scales{"scale"}, trackers{"tracker"};
    for (int i = 1; i <= 2000; i++) {
      step_with(scaler, false);
      scales.near(scaler.read().scale, i < 2000 ? 65536 : 131072, 0, i);
      trackers.near(scaler.read().growth_tracker, i % 2000, 0, i);
    }
    CHECK_TALLY(scales);
    CHECK_TALLY(trackers);
  }
  TEST_CASE("the tracker belongs to the state that is saved") {
    LossScaler scaler(1, 2, 0.5f, 4);
    StepState s;
    s.scale = 1024, s.growth_tracker = 3;
    scaler.write(s), scaler.update();
    CHECK(scaler.read().scale == 2048);
    CHECK(scaler.read().growth_tracker == 0);
  }
  TEST_CASE("w = 1, rate 0.1: gradients .5 .5 inf .25 .25") {
    Mlp net = make_mlp({1, 1}, 1, Type::fp32, Update::master);
    set_parameters(net.layer[1], {1}, {0});
    LossScaler scaler(4, 2, 0.5f, 2);
    const float gradient[] = {.5f, .5f, float_inf, .25f, .25f}, w[] = {.95f, .9f, .9f, .875f, .85f};
    const float scale[] = {4, 8, 4, 4, 8};
    const int tracker[] = {1, 0, 0, 1, 0};
    for (int i = 0; i < 5; i++) {
      put(net.layer[1].dW, Matrix(1, 1, gradient[i] * scaler.read().scale));
      unscale_and_check(net, scaler), update(net, scaler, 0.1f), scaler.update();
      INFO("step ", i + 1);
      CHECK(std::fabs(get(net.layer[1].W)(0, 0) - double(w[i])) <= 4 * (i + 1) * e);  // 0.1f, product, difference
      CHECK(scaler.read().scale == scale[i]);
      CHECK(scaler.read().growth_tracker == tracker[i]);
      CHECK(scaler.read().skipped == (i >= 2));
    }
  }
  TEST_CASE("a dynamic scale that cannot help halts, and then nothing changes") {
    for (float bad_loss : {1.f, float_inf, float_nan}) {
      Mlp net = two_layers(Type::fp16, Update::master);
      LossScaler scaler(bad_loss == 1 ? 2 : 1024);
      const std::vector<uint32_t> before = bits_of(state_of(net));
      if (bad_loss == 1) step_with(scaler, true);  // to 1; half of that is below
      CHECK(scaler.read().halted == 0);
      const float scale = scaler.read().scale;
      step_with(scaler, true, bad_loss);
      INFO("loss ", bad_loss);
      CHECK(scaler.read().halted == 1);
      CHECK(scaler.read().scale == scale);
      const unsigned step = scaler.read().step;
      for (int l = 1; l <= net.L; l++) put(net.layer[l].gradients, Matrix(1, net.layer[l].gradients.cols, 1));
      for (int i = 0; i < 3; i++) unscale_and_check(net, scaler), update(net, scaler, 1), scaler.update();
      CHECK(bits_of(state_of(net)) == before);
      CHECK(scaler.read().halted == 1);
      CHECK(scaler.read().scale == scale);
      CHECK(scaler.read().step == step);
    }
  }
  TEST_CASE("a fixed scale goes on however many steps it skips") {
    LossScaler scaler(0.25f, 1, 1);
    for (int i = 0; i < 300; i++) step_with(scaler, true, float_nan);
    CHECK(scaler.read().halted == 0);
    CHECK(scaler.read().skipped == 300);
    CHECK(scaler.read().scale == 0.25f);
    CHECK(scaler.read().step == 300);
  }
  TEST_CASE("the log has each step's loss, the scale that it used, and whether it was skipped") {
    LossScaler scaler(8, 2, 0.5f, 2);
    const Tensor memory = make_tensor(1, 16, Type::fp32);
    scaler.history = std::shared_ptr<StepRecord>(memory.memory, memory.as<StepRecord>());
    for (int i = 0; i < 4; i++) step_with(scaler, i == 2, float(i));
    const std::vector<float> records = to_host(memory), scales = {8, 8, 16, 8};
    for (size_t i = 0; i < 4; i++) {
      CHECK(records[3 * i] == float(i));
      CHECK(records[3 * i + 1] == scales[i]);
      CHECK(same_bits<int>(records[3 * i + 2]) == (i == 2));
    }
  }
}

// ==== 3.2 step 5: the update =========================================================================================
// One weight by each rule, every operation rounded. A compiler may fuse w - lr * g into one rounding: both are right.
struct Weight {
  float w, c;
};
static Weight updated(Update rule, const Format* f, Weight now, float g, float lr, bool fused) {
  const auto minus = [&](float x) { return fused ? std::fma(-lr, g, x) : float(double(x) - double(float(double(lr) * g))); };
  const auto round = [&](double x) { return f ? float(f->round(float(x))) : float(x); };
  if (rule == Update::master) return {minus(now.w), 0};
  if (rule == Update::half) return {round(minus(now.w)), 0};
  const float u = round(minus(now.c)), sum = round(double(now.w) + u);
  return {sum, round(double(u) + round(double(now.w) - sum))};
}
static void check_update(Update rule, Type type) {
  Random random{41};
  Mlp net = make_mlp({50, 9}, 1, type, rule);
  initialise(net);
  const Layer& layer = net.layer[1];
  const Tensor kept = rule == Update::master ? layer.master : layer.weights;
  const Format* f = format_of(type);
  const float scale = 1000, lr = 0.013f, inverse = float(1 / 1000.0);
  Tally weights{text("%s: weights", name_of(type))}, copies{text("%s: the compute copy of the master", name_of(type))},
      compensations{text("%s: compensation", name_of(type))};
  for (int step = 0; step < 20; step++) {
    put(layer.gradients, random_matrix(random, 1, layer.gradients.cols, 30 * (step + 1)));
    const Matrix w = get(kept), g = get(layer.gradients), c = rule == Update::kahan ? get(layer.compensation) : w;
    LossScaler scaler(scale);
    update(net, scaler, lr);
    const Matrix got = get(kept), copy = get(layer.weights), owed = rule == Update::kahan ? get(layer.compensation) : w;
    for (int i = 0; i < w.cols; i++) {
      const Weight now = {float(w(0, i)), float(c(0, i))};
      const float gradient = float(g(0, i) * double(inverse));
      Weight want = updated(rule, f, now, gradient, lr, true), plain = updated(rule, f, now, gradient, lr, false);
      if (got(0, i) == plain.w && (rule != Update::kahan || owed(0, i) == plain.c)) want = plain;
      weights.near(got(0, i), want.w, 0, step, i);
      if (rule == Update::kahan) compensations.near(owed(0, i), want.c, 0, step, i);
      if (rule == Update::master) copies.near(copy(0, i), f ? f->round(got(0, i)) : got(0, i), 0, step, i);
    }
  }
  CHECK_TALLY(weights);
  if (rule == Update::kahan) CHECK_TALLY(compensations);
  if (rule == Update::master) CHECK_TALLY(copies);
}
// 512 weights of 1 after 1000 steps of +1e-4 each. Exactly: 1.1
static Mlp thousand_small_steps(Type type, Update rule) {
  Mlp net = make_mlp({64, 8}, 1, type, rule);
  set_parameters(net.layer[1], std::vector<float>(512, 1), std::vector<float>(8, 1));
  put(net.layer[1].gradients, Matrix(1, net.layer[1].gradients.cols, -1));
  LossScaler scaler(1);
  for (int i = 0; i < 1000; i++) update(net, scaler, 1e-4f), scaler.update();
  return net;
}
static double mean(const Matrix& m) {
  double sum = 0;
  for (double x : m.v) sum += x;
  return sum / double(m.v.size());
}

TEST_SUITE("stochastic_rounding") {
  // Of 8192 random numbers, spread evenly over the bits that are dropped, as many round up as the dropped part is large.
  static void check_chance(const char* name, const Format& f, float x, int dropped, uint16_t (*round)(float, uint64_t)) {
    const double low = f.decode(f.encode(x, cut_off)), step = std::copysign(2 * f.half_step(x), x), chance = (x - low) / step;
    int up = 0, down = 0;
    for (uint64_t i = 0; i < 8192; i++) {
      const double got = f.decode(round(x, i << (dropped - 13) | i << 51));  // whether it takes the low bits or the high
      up += got == low + step && chance > 0, down += got == low;
    }
    INFO(text("%s of %.9g: %d of 8192 up, %d down", name, double(x), up, down));
    CHECK(up + down == 8192);
    CHECK(std::fabs(up - chance * 8192) < 1);
  }
  TEST_CASE("the upper neighbour as often as x is near it") {
    const auto to_half = [](float x, uint64_t random) { return stochastic_half(x, random).bits; };
    const auto to_bfloat16 = [](float x, uint64_t random) { return stochastic_bfloat16(x, random).bits; };
    for (float sign : {1.f, -1.f}) {
      for (float x : {1.f, 1 + 0x1p-11f, 1 + 0x1p-23f, 1.1f, 0x1.ffcp3f, 0x1.fffffep3f, 1234.567f, 65472.5f, 65503.f,
                      0x1p-14f, 0x1.8001p-14f})
        check_chance("half", half_format, sign * x, 13, to_half);
      for (auto [x, dropped] : {std::make_pair(0x1.fffp-15f, 14), {0x1.2345p-16f, 15}, {0x1.8p-20f, 19}, {0x1.4p-24f, 23},
                                {0x1p-24f, 23}, {0x1p-25f, 24}, {0x1.8p-30f, 29}, {0x1p-36f, 35}})
        check_chance("half", half_format, sign * x, dropped, to_half);
      for (float x : {1.f, 1.001f, 1 + 0x1p-8f, 0x1.fffffep3f, 3e38f, 0x1p-126f, 0x1.234p-130f})
        check_chance("bfloat16", bfloat16_format, sign * x, 16, to_bfloat16);
    }
  }
  TEST_CASE("what the format holds stays, whatever the random number") {
    for (uint64_t random : {uint64_t(0), ~uint64_t(0), uint64_t(0x123456789abcdef0)}) {
      Tally halves{"half"}, bfloats{"bfloat16"};
      for (int i = 0; i < 65536; i++) {
        const float x = float(half_format.decode(uint16_t(i))), y = float(bfloat16_format.decode(uint16_t(i)));
        if (x != 0) halves.rounded(half_format, x, stochastic_half(x, random).bits);
        bfloats.rounded(bfloat16_format, y, stochastic_bfloat16(y, random).bits);
      }
      for (float x : {65504.f, 65520.f, FLT_MAX, float_inf, -float_inf, float_nan, same_bits<float>(0x7f800001u), 0x1p-70f})
        if (std::isnan(x) || x > 1 || x < -1 || random == 0) halves.rounded(half_format, x, stochastic_half(x, random).bits);
      for (float x : {FLT_MAX, float_inf, -float_inf, float_nan, same_bits<float>(0x7f800001u), same_bits<float>(0xffffffffu)})
        bfloats.rounded(bfloat16_format, x, stochastic_bfloat16(x, random).bits);
      CHECK_TALLY(halves);
      CHECK_TALLY(bfloats);
    }
  }
  TEST_CASE("1000 small steps are right on average") {
    // A step of 1e-4 in neighbours d apart goes up with chance p = 1e-4 / d: variance d^2 p (1 - p) each, 1000 steps, 512
    // weights; 5 deviations of the mean. bfloat16: d = 2^-7.
    for (Type type : {Type::fp16, Type::bf16}) {
      const double d = 2 * format_of(type)->half_step(1), p = 1e-4 / d, deviation = d * std::sqrt(1000 * p * (1 - p));
      const Matrix w = get(thousand_small_steps(type, Update::stochastic).layer[1].W);
      CHECK(std::fabs(mean(w) - 1.1) <= 5 * deviation / std::sqrt(512));
      double variance = 0;
      for (double x : w.v) variance += (x - 1.1) * (x - 1.1) / 512;
      CHECK(std::fabs(variance / (deviation * deviation) - 1) <= 5 * std::sqrt(2. / 512));  // each has its own chance
    }
  }
  TEST_CASE("w - lr g becomes one of its two neighbours; another step, another layer and another seed choose anew") {
    const auto after = [](uint64_t seed, int steps) {
      Mlp net = make_mlp({30, 30, 30}, 1, Type::fp16, Update::stochastic);
      net.seed = seed;
      std::vector<Matrix> W;
      LossScaler scaler(1);
      for (int step = 0; step < steps; step++)
        for (int l = 1; l <= 2; l++) {
          set_parameters(net.layer[l], std::vector<float>(900, 1), std::vector<float>(30, 1));
          put(net.layer[l].gradients, Matrix(1, net.layer[l].gradients.cols, -1));
          if (l == 2) update(net, scaler, 0x1p-11f), scaler.update(), W = {get(net.layer[1].W), get(net.layer[2].W)};
        }
      return W;
    };
    const std::vector<Matrix> W = after(1, 1);
    Tally tally{"1 + 2^-11 becomes 1 or 1 + 2^-10"};
    for (double w : W[0].v) tally.check(w == 1 || w == 1 + 0x1p-10, 0, text("got %.9g", w));
    CHECK_TALLY(tally);
    CHECK(std::fabs(mean(W[0]) - (1 + 0x1p-11)) <= 5 * 0x1p-11 / 30);  // 5 deviations of 900 coins
    CHECK(W[0].v != W[1].v);
    CHECK(after(1, 1)[0].v == W[0].v);
    CHECK(after(1, 2)[0].v != W[0].v);
    CHECK(after(2, 1)[0].v != W[0].v);
  }
}
TEST_SUITE("update_master") {
  TEST_CASE("master -= lr g / scale in fp32, and the compute copy is the master rounded") {
    for (Type type : types) check_update(Update::master, type);
  }
  TEST_CASE("1000 small steps are 0.1 for a master, and nothing without one") {
    float want = 1;
    for (int i = 0; i < 1000; i++) want += 1e-4f;
    CHECK(std::fabs(want - 1.1) < 1000 * e);
    for (Type type : {Type::fp16, Type::bf16}) {
      const Mlp master = thousand_small_steps(type, Update::master), none = thousand_small_steps(type, Update::half);
      Tally sum{text("%s: the master", name_of(type))}, copy{text("%s: its copy", name_of(type))}, stuck{"half: stays 1"};
      compare(sum, get(kept_W(master.layer[1])), Matrix(8, 64, want), exactly);
      compare(copy, get(master.layer[1].W), Matrix(8, 64, format_of(type)->round(want)), exactly);
      compare(stuck, get(none.layer[1].W), Matrix(8, 64, 1), exactly);
      CHECK_TALLY(sum);
      CHECK_TALLY(copy);
      CHECK_TALLY(stuck);
    }
  }
  TEST_CASE("half: the sum itself is rounded to 16 bits") {
    for (Type type : {Type::fp16, Type::bf16}) check_update(Update::half, type);
  }
}
TEST_SUITE("update_kahan") {
  TEST_CASE("w and the compensation follow arXiv 2010.06192, every operation in 16 bits") {
    for (Type type : {Type::fp16, Type::bf16}) check_update(Update::kahan, type);
  }
  TEST_CASE("1000 small steps are 0.1, to a step of the format") {
    for (Type type : {Type::fp16, Type::bf16}) {
      Weight want = {1, 0};
      for (int i = 0; i < 1000; i++) want = updated(Update::kahan, format_of(type), want, -1, 1e-4f, false);
      const Mlp net = thousand_small_steps(type, Update::kahan);
      Tally sum{text("%s: weights", name_of(type))}, owed{text("%s: what they still owe", name_of(type))};
      compare(sum, get(net.layer[1].W), Matrix(8, 64, want.w), exactly);
      compare(owed, get(net.layer[1].compensation), Matrix(1, net.layer[1].compensation.cols, want.c), exactly);
      CHECK_TALLY(sum);
      CHECK_TALLY(owed);
      CHECK(std::fabs(want.w - 1.1) <= 2 * format_of(type)->half_step(1.1));
    }
  }
}

// ==== CUDA on a CPU ==================================================================================================
#if !defined(MP_CUDA)  // on a GPU there is no emulation to prove, and this file has no compiler for kernels
template <bool barrier>
__global__ void reverse_kernel(const int* in, int* out) {
  __shared__ int tile[128];
  poison_shared(tile);
  const int i = threadIdx.x, n = blockDim.x, first = blockIdx.x * n;
  tile[i] = in[first + i];
  if (barrier) __syncthreads();
  out[first + i] = tile[n - 1 - i];
}
template <bool barrier>
__global__ void rotate_kernel(int* out) {  // everybody reads the neighbour's number, and only then writes his own
  __shared__ int tile[128];
  const int i = threadIdx.x, n = blockDim.x;
  tile[i] = i;
  __syncthreads();
  const int neighbour = tile[(i + 1) % n];
  if (barrier) __syncthreads();
  tile[i] = neighbour;
  __syncthreads();
  out[blockIdx.x * n + i] = tile[i];
}
template <bool barrier>
__global__ void warp_kernel(int* out) {  // the same within a warp
  __shared__ int tile[128];
  poison_shared(tile);
  const int i = threadIdx.x, n = blockDim.x;
  tile[i] = i;
  if (barrier) __syncwarp();
  out[i] = tile[std::min(i ^ 1, n - 1)];
}
__global__ void unwritten_kernel(float* out) {
  __shared__ float tile[8];
  poison_shared(tile);
  if (threadIdx.x != 5) tile[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = tile[threadIdx.x];
}
__global__ void leave_early_kernel(int* out, int stay) {  // from `stay` on threads end; the others sum up a tree
  __shared__ int tile[128];
  const int i = threadIdx.x;
  if (i >= stay) return;
  tile[i] = i + int(blockIdx.x);
  for (int half_way = 64; half_way > 0; half_way /= 2) {
    __syncthreads();
    if (i < half_way && i + half_way < stay) tile[i] += tile[i + half_way];
  }
  if (i == 0) out[blockIdx.x] = tile[0];
}
__global__ void visit_kernel(int* visits, int* wrong) {
  const dim3 g = gridDim, b = blockDim;
  const uint3 block = blockIdx, t = threadIdx;
  const int x = block.x * b.x + t.x, y = block.y * b.y + t.y, z = block.z * b.z + t.z;
  __syncthreads();  // the indices outlive a switch of fibers
  if (t.x != threadIdx.x || t.y != threadIdx.y || t.z != threadIdx.z || block.x != blockIdx.x || g.y != gridDim.y)
    atomicOr(wrong, 1);
  visits[(z * int(g.y * b.y) + y) * int(g.x * b.x) + x]++;
}
template <class T>
__global__ void shuffle_kernel(T* all, T* down, T* flipped, T* evens, T* low) {
  const int i = threadIdx.x, lane = i % 32;
  const T mine = T(100 * i + 7);
  all[i] = __shfl_sync(~0u, mine, 3);
  down[i] = __shfl_down_sync(~0u, mine, 4);
  flipped[i] = __shfl_xor_sync(~0u, mine, 1);
  if (lane % 2 == 0) evens[i] = __shfl_xor_sync(0x55555555u, mine, 2);
  else evens[i] = __shfl_xor_sync(0xaaaaaaaau, mine, 2);  // the other half, meanwhile
  __syncthreads();
  if (lane < 4) low[i] = __shfl_sync(0xfu, mine, (lane + 1) & 3);
}
// How many orders of threads change what `work` leaves: none, unless a barrier is missing
static int orders_that_differ(const std::vector<int>& want, const std::function<std::vector<int>()>& work) {
  const auto before = std::make_tuple(cpu::order, cpu::seed, cpu::poison);
  int different = 0;
  cpu::poison = true, cpu::seed = 3;
  for (cpu::Order order : {cpu::forward, cpu::backward, cpu::shuffled}) cpu::order = order, different += work() != want;
  std::tie(cpu::order, cpu::seed, cpu::poison) = before;
  return different;
}
// What a program says on standard error before it ends by abort()
static std::string last_words(const std::function<void()>& program) {
  const int os_threads = int(cpu::pool()->helpers.size()) + 1;
  cpu::use_os_threads(1);  // fork() takes no other thread along
  int ends[2], status = 0;
  REQUIRE(pipe(ends) == 0);
  const pid_t child = fork();
  if (child == 0) {
    const rlimit no_core = {0, 0};
    setrlimit(RLIMIT_CORE, &no_core), std::signal(SIGABRT, SIG_DFL);  // not doctest's business
    dup2(ends[1], 2), alarm(20);
    program();
    _exit(0);
  }
  close(ends[1]);
  std::string words;
  char buffer[256];
  for (ssize_t n; (n = ::read(ends[0], buffer, sizeof buffer)) > 0;) words.append(buffer, size_t(n));
  close(ends[0]), waitpid(child, &status, 0);
  cpu::use_os_threads(os_threads);
  return words + (WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT ? "\naborted" : "\nwent on");
}
__global__ void half_a_barrier_kernel(int) {
  if (threadIdx.x == 0) __syncwarp();
  else __syncthreads();
}
__global__ void not_in_mask_kernel(int) { __syncwarp(0x0eu); }
__global__ void two_masks_kernel(int) { __syncwarp(threadIdx.x == 0 ? 0x3u : 0x7u); }
__global__ void two_instructions_kernel(int) {
  if (threadIdx.x == 0) __syncwarp();
  else __shfl_sync(~0u, 1, 0);
}

TEST_SUITE("cuda_on_a_cpu") {
  TEST_CASE("a barrier makes every order of threads the same, and its absence shows") {
    for (int threads : {2, 31, 32, 33, 100, 128}) {
      const int blocks = 5, count = blocks * threads;
      std::vector<int> in, reversed, rotated, swapped;
      for (int i = 0; i < count; i++) in.push_back(1000 + i);
      for (int i = 0; i < count; i++) reversed.push_back(in[size_t(i / threads * threads + threads - 1 - i % threads)]);
      for (int i = 0; i < count; i++) rotated.push_back((i + 1) % threads);
      for (int i = 0; i < threads; i++) swapped.push_back(std::min(i ^ 1, threads - 1));
      const auto run = [&](void (*reverse)(const int*, int*), void (*rotate)(int*), void (*swap)(int*)) {
        std::vector<int> out(size_t(count), -1);
        if (reverse) launch(reverse, blocks, threads, in.data(), out.data());
        if (rotate) launch(rotate, blocks, threads, out.data());
        if (swap) launch(swap, 1, threads, out.data()), out.resize(size_t(threads));
        return out;
      };
      INFO(threads, " threads");
      CHECK(orders_that_differ(reversed, [&] { return run(reverse_kernel<true>, nullptr, nullptr); }) == 0);
      CHECK(orders_that_differ(reversed, [&] { return run(reverse_kernel<false>, nullptr, nullptr); }) > 0);
      CHECK(orders_that_differ(rotated, [&] { return run(nullptr, rotate_kernel<true>, nullptr); }) == 0);
      CHECK(orders_that_differ(rotated, [&] { return run(nullptr, rotate_kernel<false>, nullptr); }) > 0);
      CHECK(orders_that_differ(swapped, [&] { return run(nullptr, nullptr, warp_kernel<true>); }) == 0);
      CHECK(orders_that_differ(swapped, [&] { return run(nullptr, nullptr, warp_kernel<false>); }) > 0);
    }
  }
  TEST_CASE("__shared__ memory that nobody wrote reads as NaN") {
    std::vector<float> out(8);
    const bool before = cpu::poison;
    cpu::poison = true;
    for (int run = 0; run < 2; run++) {  // also when a block before has left its numbers there
      launch(unwritten_kernel, 3, 8, out.data());
      for (int i = 0; i < 8; i++) CHECK((i == 5 ? std::isnan(out[5]) : out[size_t(i)] == 1));
    }
    cpu::poison = before;
  }
  TEST_CASE("threads that end early are not waited for") {
    for (int stay : {1, 31, 64, 65, 128}) {
      std::vector<int> want;
      for (int block = 0; block < 40; block++) want.push_back(stay * (stay - 1) / 2 + stay * block);
      CHECK(orders_that_differ(want, [&] {
              std::vector<int> out(40);
              launch(leave_early_kernel, 40, 128, out.data(), stay);
              return out;
            }) == 0);
    }
  }
  TEST_CASE("every thread of every block runs once, in one, two and three dimensions") {
    for (auto [grid, block] : {std::make_pair(dim3(3, 2, 2), dim3(5, 3, 2)), {dim3(1000), dim3(1)}, {dim3(1), dim3(1000)},
                               {dim3(4, 7), dim3(8, 8)}, {dim3(1, 1, 50), dim3(1, 2, 20)}}) {
      const size_t count = size_t(grid.x) * grid.y * grid.z * block.x * block.y * block.z;
      const dim3 g = grid, b = block;
      CHECK(orders_that_differ(std::vector<int>(count, 1), [&] {
              std::vector<int> visits(count);
              int wrong = 0;
              launch(visit_kernel, g, b, visits.data(), &wrong);
              visits[0] += 100 * wrong;
              return visits;
            }) == 0);
    }
  }
  TEST_CASE("more blocks than cores: the same on one OS thread, two and seven") {
    const int before = int(cpu::pool()->helpers.size()) + 1;
    std::vector<int> in(100 * 128), want(in.size());
    for (size_t i = 0; i < in.size(); i++) in[i] = int(i), want[i / 128 * 128 + 127 - i % 128] = int(i);
    for (int os_threads : {1, 2, 7}) {
      cpu::use_os_threads(os_threads);
      int different = 0;
      for (int run = 0; run < 50; run++) {
        std::vector<int> out(in.size());
        launch(reverse_kernel<true>, 100, 128, in.data(), out.data());
        different += out != want;
      }
      CHECK(different == 0);
    }
    cpu::use_os_threads(before);
  }
  TEST_CASE_TEMPLATE("lanes of a warp exchange numbers, also in warps that are not full", T, int, float, double) {
    for (int threads : {1, 5, 32, 45, 64, 77}) {
      const auto expected = [&](int i, int from) {  // -1: a lane that does not exist leaves its result undefined
        return from < std::min(32, threads - i / 32 * 32) ? T(100 * (i / 32 * 32 + from) + 7) : T(-1);
      };
      std::vector<int> want(size_t(5 * threads), 0);
      CHECK(orders_that_differ(want, [&] {
              std::vector<T> got(size_t(5 * threads));
              T* p = got.data();
              launch(shuffle_kernel<T>, 1, threads, p, p + threads, p + 2 * threads, p + 3 * threads, p + 4 * threads);
              std::vector<int> wrong;
              for (int which = 0; which < 5; which++)
                for (int i = 0; i < threads; i++) {
                  const int lane = i % 32, down = lane + 4 < 32 ? lane + 4 : lane;
                  const int from[] = {3, down, lane ^ 1, lane ^ 2, (lane + 1) & 3};
                  const T value = expected(i, from[which]);
                  wrong.push_back(value != T(-1) && (which < 4 || lane < 4) && !(got[size_t(which * threads + i)] == value));
                }
              return wrong;
            }) == 0);
    }
  }
  TEST_CASE("threads that would wait for ever say where, and the program ends") {
    const auto contains = [](const std::string& words, const char* part) {
      CHECK_MESSAGE(words.find(part) != std::string::npos, "wanted: ", part, "\ngot: ", words);
    };
    const std::string words = last_words([] { launch(half_a_barrier_kernel, 1, 32, 0); });
    contains(words, "block (0,0,0)");
    contains(words, "the threads wait for each other");
    contains(words, "thread 0 waits in __syncwarp");
    contains(words, "thread 1 waits in __syncthreads");
    contains(words, "aborted");
    contains(last_words([] { launch(not_in_mask_kernel, 1, 4, 0); }), "not in its own mask");
    contains(last_words([] { launch(two_masks_kernel, 1, 3, 0); }), "different masks");
    contains(last_words([] { launch(two_instructions_kernel, 1, 32, 0); }), "different instructions");
    contains(last_words([] { launch(unwritten_kernel, 1, 8, (float*)std::vector<float>(8).data()); }), "went on");
  }
}
#endif
