// tests.cpp: the proofs of mp.cu. A suite for each region, named after it and in the same order, so that
// `build/tests --test-suite=E4` asks about one equation alone. The right results are computed here a second time, in
// fp64, from IEEE 754, the article's equations and finite differences; none is taken from mp.cu.
//
// Comparisons are written so that NaN fails, and each tolerance has its reason beside it. e = 2^-24 is the largest
// relative error of one fp32 operation.
#if defined(MP_FUZZ)
// ==== make fuzz: libFuzzer feeds bytes to one reader, which must read them or throw Error ====
#include "mp.cu"

static void read(const std::string& reader, const std::string& path, const std::string& bytes) {
  if (reader == "picture") {
    const auto p = read_picture(path, 2);
    if (p.width * p.height < 4096) read_digit(path, 28);  // larger ones take long
  }
  if (reader == "sheet") read_sheet(path);
  if (reader == "idx") {
    std::vector<uint32_t> size(bytes.size() % 2 ? 1 : 3);
    read_idx(path, size);
  }
  if (reader == "safetensors") {
    const SafeTensors file = read_safetensors(path);
    linear_layers(file, path);
    parse("train", {}, remembered_options(path));
  }
  if (reader == "options") {  // a word a line
    std::istringstream lines(bytes);
    std::vector<std::string> words;
    for (std::string word; std::getline(lines, word);) words.push_back(word);
    parse("train", words);
  }
}
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const std::string reader = getenv("MP_READER"), path = "build/fuzz/" + reader + ".input";
  const std::string bytes(data, data + size);
  std::ofstream(path, std::ios::binary) << bytes;
  try {
    read(reader, path, bytes);
  } catch (const Error&) {}
  return 0;
}
#else
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#define DOCTEST_CONFIG_NO_POSIX_SIGNALS  // a crash must end the program at once
#include <doctest/doctest.h>
#include <fcntl.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <functional>
#include <map>
#include <numeric>
#include <sstream>
#include <utility>

#include "mp.h"

// ==== Words for all suites ====
static constexpr double e = 0x1p-24, infinite = HUGE_VAL;
static constexpr float float_inf = HUGE_VALF, float_nan = NAN;
static constexpr Type fp32 = Type::fp32, fp16 = Type::fp16, bf16 = Type::bf16;

__attribute__((format(printf, 1, 2))) static std::string text(const char* format, ...) {
  char line[500];
  va_list values;
  va_start(values, format);
  vsnprintf(line, sizeof line, format, values);
  va_end(values);
  return line;
}
template <class To, class From> static To same_bits(From x) {
  static_assert(sizeof(To) == sizeof(From), "a number keeps its bits");
  To y;
  memcpy(&y, &x, sizeof y);
  return y;
}

// ---- A 16-bit format, from its definition: `digits` significant bits, `lowest` the exponent of the least normal number
static double nearest(double x) { return std::nearbyint(x); }  // ties to even
static double cut_off(double x) { return std::trunc(x); }
static double ties_away(double x) { return std::round(x); }
struct Format {
  const char* name;
  int digits, lowest;
  int infinity() const { return (3 - 2 * lowest) << (digits - 1); }
  int exponent(double x) const { return x == 0 ? lowest : std::max(std::ilogb(x), lowest); }
  uint16_t encode(double x, double (*whole)(double) = nearest) const {
    const int sign = std::signbit(x) ? 0x8000 : 0;
    if (!(std::fabs(x) < infinite)) return uint16_t(sign | (infinity() + std::isnan(x)));
    const int steps = int(whole(std::ldexp(std::fabs(x), digits - 1 - exponent(x))));
    const int bits = ((exponent(x) - lowest) << (digits - 1)) + steps;  // the leading 1 adds to the exponent
    return uint16_t(sign | std::min(bits, infinity()));
  }
  double decode(uint16_t bits) const {
    const int field = (bits & 0x7fff) >> (digits - 1), fraction = bits & ((1 << (digits - 1)) - 1);
    double x = std::ldexp(fraction + (field ? 1 << (digits - 1) : 0), std::max(field, 1) + lowest - digits);
    if (field == 3 - 2 * lowest) x = fraction ? NAN : infinite;
    return bits & 0x8000 ? -x : x;
  }
  double round(double x) const { return decode(encode(x)); }
  // Half the distance from |x|'s lower neighbour to its upper one: the most that one rounding changes
  double half_step(double x) const { return std::ldexp(1, exponent(x) - digits); }
};
static const Format half_format = {"half", 11, -14}, bfloat16_format = {"bfloat16", 8, -126};
static const Format* format_of(Type type) {  // nullptr: fp32
  if (type == fp16) return &half_format;
  return type == bf16 ? &bfloat16_format : nullptr;
}
static std::string name_of(Type type) { return type == fp32 ? "float" : format_of(type)->name; }
static double round_to(Type type, double x) { return type == fp32 ? double(float(x)) : format_of(type)->round(x); }
static const std::vector<Type> types = {fp32, fp16, bf16}, types_16 = {fp16, bf16};

// The types of a network's layers: all the same, or each its own
using Map = std::vector<Type>;
static const std::vector<Map> maps = {{fp32, fp32, fp32}, {fp16, fp16, fp16}, {bf16, bf16, bf16}, {fp16, fp32, fp16},
                                      {fp32, fp16, fp32}, {bf16, fp32, bf16}, {fp32, fp32, bf16}, {bf16, fp16, fp32}};
static std::string name_of(const Map& map) {
  std::string name;
  for (Type type : map) name += name_of(type) + " ";
  return name;
}

// ---- The reporter of `make check-NAME`: a line for each test, and the first message of each that fails. What it writes
// when a test begins stays if the test never ends; else it is overwritten. ----
struct ForStudents : doctest::IReporter {
  std::ostream& out;
  std::streampos start = 0;
  std::string name, first;
  int failures = 0;
  explicit ForStudents(const doctest::ContextOptions& options) : out(*options.cout) {
    setvbuf(stdout, nullptr, _IOLBF, BUFSIZ);  // a crash must not swallow what the program has printed
  }
  void line(const char* verdict) { out << text("  %-5s ", verdict) << name << "\n" << std::flush; }
  void failed(const std::string& why) {
    if (failures == 0) first = why;
    failures++;
  }
  void report_query(const doctest::QueryData&) override {}
  void test_run_start() override {}
  void test_run_end(const doctest::TestRunStats&) override {}
  void test_case_start(const doctest::TestCaseData& test) override {
    name = test.m_name;
    failures = 0;
    start = out.tellp();
    line("HERE");
  }
  void test_case_reenter(const doctest::TestCaseData&) override {}
  void test_case_end(const doctest::CurrentTestCaseStats&) override {
    if (start >= 0) out.seekp(start);  // a terminal cannot go back
    line(failures > 0 ? "FAIL" : "ok");
    std::istringstream lines(failures > 0 ? first : "");
    for (std::string words; std::getline(lines, words);) out << "          " << words << "\n";
    if (failures > 1) out << "          further failures in this test: " << failures - 1 << "\n";
    out << std::flush;
  }
  void test_case_exception(const doctest::TestCaseException& thrown) override {
    failed("it stopped: " + std::string(thrown.error_string.c_str()));
  }
  void subcase_start(const doctest::SubcaseSignature&) override {}
  void subcase_end() override {}
  void test_case_skipped(const doctest::TestCaseData&) override {}
  void log_message(const doctest::MessageData& message) override { failed(message.m_string.c_str()); }
  void log_assert(const doctest::AssertData& check) override {
    if (!check.m_failed) return;
    std::ostringstream why;  // words, where there are any
    for (int i = 0; i < get_num_active_contexts(); i++) get_active_contexts()[i]->stringify(&why);
    if (why.tellp() == 0) why << check.m_file << ":" << check.m_line << ": wanted " << check.m_expr;
    if (check.m_threw) why << "\nit stopped: " << check.m_exception.c_str();
    failed(why.str());
  }
};
REGISTER_REPORTER("student", 1, ForStudents);

// ---- Tally: one property of many values, checked at the end of its scope. It reports how many fail, one of them, and the
// usual mistake that would explain them all. ----
using Mistakes = std::vector<std::pair<const char*, double>>;  // what each usual mistake gives instead
struct Tally {
  std::string property, example;
  long total = 0, wrong = 0, cut = 0, away = 0, zero = 0, nan = 0, subnormal = 0;
  double best = infinite, least_ratio = infinite, largest_ratio = -infinite;
  std::map<std::string, long> fits;  // how many wrong results are what a usual mistake would give
  explicit Tally(std::string what) : property(std::move(what)) {}
  Tally(const Tally&) = delete;
  ~Tally() noexcept(false) { CHECK_MESSAGE((total > 0 && wrong == 0), words()); }
  void check(bool good, double rank, const std::string& failure) {  // the failure of the least rank becomes the example
    total++;
    if (good) return;
    wrong++;
    if (rank >= best) return;
    best = rank;
    example = failure;
  }
  void rounded(const Format& f, double x, uint16_t got) {  // is `got` x, rounded?
    const uint16_t want = f.encode(x);
    if (std::isnan(x) ? std::isnan(f.decode(got)) : got == want) return check(true, 0, "");
    cut += got == f.encode(x, cut_off);
    away += got == f.encode(x, ties_away);
    zero += (got & 0x7fff) == 0;
    subnormal += std::fabs(x) < std::ldexp(1, f.lowest);
    const bool tie = std::fabs(f.decode(f.encode(x, cut_off)) - x) == f.half_step(x);
    check(false, std::fmin(std::fabs(std::log2(std::fabs(x))), DBL_MAX),  // ordinary numbers first
          text("\n  input  %.9g (0x%08x)%s\n  got    0x%04x = %.9g\n  want   0x%04x = %.9g", x,
               same_bits<uint32_t>(float(x)), tie ? ", halfway between two neighbours" : "", got, f.decode(got), want,
               f.decode(want)));
  }
  void near(double got, double want, double tolerance, int row = -1, int col = 0, const Mistakes& mistakes = {}) {
    const auto is = [&](double x, double slack) {  // whatever the tolerance, no finite number is infinity
      return got == x || (std::isnan(got) && std::isnan(x)) ||
             std::fabs(got - x) <= std::min(tolerance + slack, DBL_MAX);
    };
    total++;
    if (is(want, 0)) return;
    zero += got == 0;
    nan += std::isnan(got);
    for (auto& [mistake, x] : mistakes) fits[mistake] += is(x, 4 * e * std::fabs(x));
    least_ratio = std::min(least_ratio, got / want);
    largest_ratio = std::max(largest_ratio, got / want);
    if (wrong == 0 && row >= 0) example = text(", the first is [%d, %d]", row, col);
    if (wrong == 0) example += text("\n  got    %.9g\n  want   %.9g", std::isnan(got) ? NAN : got, want);
    if (wrong == 0 && tolerance > 0) example += text(", to %.2g", tolerance);
    wrong++;
  }
  std::string words() const {
    const std::string s = text("%s\n%ld of %ld wrong", property.c_str(), wrong, total) + example + "\n";
    for (auto& [mistake, times] : fits)
      if (times >= wrong) return s + "This comes from " + mistake + ".";
    if (zero == wrong && subnormal == wrong) return s + "This comes from making subnormal results zero.";
    if (subnormal == wrong) return s + "Subnormal results alone are wrong.";
    if (zero == wrong) return s + "Every wrong result is 0: is something never written?";
    if (nan == wrong)
      return s +
             "All of them are NaN, as are padding, rows below and what is not written yet:\n"
             "is a bound missing, are rows and columns exchanged, is something not written?";
    if (double(cut) > 0.9 * double(wrong)) return s + "This is what truncation gives: the dropped bits are ignored.";
    if (away == wrong) return s + "This is what rounding ties up gives: ties go to the even neighbour.";
    const bool one_factor = largest_ratio - least_ratio <= 0.01 * std::fabs(largest_ratio);
    if (wrong == 1 || !std::isfinite(largest_ratio) || !one_factor) return s;
    return s + text("All of them are %.4g times what is wanted.", largest_ratio);
  }
};
static void same(const std::string& what, double got, double want, double tolerance = 0) {
  Tally(what).near(got, want, tolerance);
}

// ---- Matrices, and how they come into tensors ----
struct Random {  // the same numbers on every machine
  uint64_t state;
  uint32_t bits() {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return uint32_t(state >> 32);
  }
  double number(double limit, double step) {  // in [-limit, limit], a float; a multiple of `step` if there is one
    const double x = (bits() * 0x1p-31 - 1) * limit;
    return step > 0 ? std::round(x / step) * step : double(float(x));
  }
};
namespace {  // mp.cu has a Matrix, too
struct Matrix {
  int rows = 0, cols = 0;
  std::vector<double> v = {};
  Matrix() = default;
  Matrix(int rows_, int cols_, double x = 0) : rows(rows_), cols(cols_), v(size_t(rows_) * size_t(cols_), x) {}
  double& operator()(int r, int c) { return v[size_t(r) * size_t(cols) + size_t(c)]; }
  double operator()(int r, int c) const { return v[size_t(r) * size_t(cols) + size_t(c)]; }
  std::vector<float> floats() const { return {v.begin(), v.end()}; }
  template <class F> Matrix each(F f) const {
    Matrix m = *this;
    for (double& x : m.v) x = f(x);
    return m;
  }
  double largest() const {
    double x = 0;
    for (double y : v) x = std::isnan(x) || std::fabs(y) <= x ? x : std::fabs(y);
    return x;
  }
  double mean() const { return std::accumulate(v.begin(), v.end(), 0.) / double(v.size()); }
};
}  // namespace
template <class F> static Matrix matrix_of(int rows, int cols, F value) {  // value(row, col)
  Matrix m(rows, cols);
  for (int r = 0; r < rows; r++)
    for (int c = 0; c < cols; c++) m(r, c) = value(r, c);
  return m;
}
static Matrix transposed(const Matrix& m) {
  return matrix_of(m.cols, m.rows, [&](int r, int c) { return m(c, r); });
}
static Matrix operator*(const Matrix& A, const Matrix& B) {
  Matrix C(A.rows, B.cols);
  for (int m = 0; m < A.rows; m++)
    for (int k = 0; k < A.cols; k++)
      for (int n = 0; n < B.cols; n++) C(m, n) += A(m, k) * B(k, n);
  return C;
}
// With a step, products and sums of these are exact in fp32.
static Matrix random_matrix(uint64_t seed, int rows, int cols, double limit, double step = 0) {
  Random random{seed};
  return Matrix(rows, cols).each([&](double) { return random.number(limit, step); });
}
static Matrix operator*(double factor, const Matrix& m) {
  return m.each([&](double x) { return factor * x; });
}
static Matrix one_hot(int rows, int classes) {
  return matrix_of(rows, classes, [&](int r, int c) { return r % classes == c; });
}
static Matrix rounded(const Matrix& m, Type type) {
  return m.each([&](double x) { return round_to(type, x); });
}
static Tensor with_padding(Tensor t) {
  t.cols = t.stride;
  return t;
}
// m into the upper rows of t; the padding and the rows below become `rest`
static void put(const Tensor& t, const Matrix& m, double rest = 0) {
  Matrix all(t.rows, t.stride, rest);
  for (int r = 0; r < m.rows; r++)
    for (int c = 0; c < m.cols; c++) all(r, c) = m(r, c);
  to_device(all.floats(), with_padding(t));
}
static void fill(const Tensor& t, double x) { put(t, Matrix(), x); }
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
template <class T> static Tensor on_device(const std::vector<T>& values) {  // device memory with these bytes
  std::vector<float> words(values.size() * sizeof(T) / 4 + 1);
  memcpy((void*)words.data(), values.data(), values.size() * sizeof(T));
  const Tensor t = make_tensor(1, int(words.size()), fp32);
  to_device(words, t);
  return t;
}
static Mlp network(const std::vector<int>& sizes, int batch, Type type) {
  return make_mlp(sizes, batch, type, Update::master);
}

// ---- Is a matrix what it should be? ----
using Mistaken = std::vector<std::pair<const char*, Matrix>>;  // what usual mistakes give instead of `want`
static void compare(const std::string& property, const Matrix& got, const Matrix& want, const Matrix& tolerance,
                    const Mistaken& mistaken = {}) {
  REQUIRE(got.v.size() == want.v.size());
  Tally tally(property);
  for (int r = 0; r < got.rows; r++)
    for (int c = 0; c < got.cols; c++) {
      Mistakes here;
      for (auto& [mistake, m] : mistaken) here.emplace_back(mistake, m(r, c));
      tally.near(got(r, c), want(r, c), tolerance(r, c), r, c, here);
    }
}
static void compare(const std::string& property, const Matrix& got, const Matrix& want, double tolerance = 0,
                    const Mistaken& mistaken = {}) {
  compare(property, got, want, Matrix(got.rows, got.cols, tolerance), mistaken);
}
// The same for `want` computed in fp32, which may be off by `error`, and then rounded once to `type`
static void compare_rounded(const std::string& property, Type type, const Matrix& got, Matrix want, Matrix error,
                            const Mistaken& mistaken = {}) {
  if (const Format* format = format_of(type))
    for (size_t i = 0; i < want.v.size(); i++) {
      error.v[i] += format->half_step(std::fabs(want.v[i]) + error.v[i]);
      if (std::isinf(format->round(want.v[i]))) want.v[i] = format->round(want.v[i]);
    }
  compare(property, got, want, error, mistaken);
  compare(property + ": values of type " + name_of(type), got, rounded(got, type));
}
// The error of A * B in fp32: K roundings, each of at most 2 e (tensor cores truncate) of a partial sum about sqrt(sum of
// squared products) large, are a random walk. sqrt(K) times that is its deviation; 4 of them are allowed.
static Matrix sum_error(const Matrix& A, const Matrix& B) {
  const auto square = [](double x) { return x * x; };
  return (A.each(square) * B.each(square)).each([&](double sum) { return 4 * 2 * e * std::sqrt(A.cols * sum); });
}

// ---- In any order of a block's threads, and on one OS thread or two, `work` must give the same bits: where a barrier is
// missing, it does not. A GPU chooses the order itself: there `work` runs once more. ----
#if !defined(MP_CUDA)
struct KeepSettings {  // the emulator's, as they were, at the end of a scope
  const int os_threads = cpu::os_threads();
  const cpu::Order order = cpu::order;
  const unsigned seed = cpu::seed;
  const bool poison = cpu::poison;
  ~KeepSettings() {
    cpu::order = order;
    cpu::seed = seed;
    cpu::poison = poison;
    cpu::use_os_threads(os_threads);
  }
};
#endif
static void in_every_order(const std::function<void()>& work) {
#if defined(MP_CUDA)
  work();
#else
  const KeepSettings settings;
  cpu::poison = true;
  for (int os_threads : {1, 2}) {
    cpu::use_os_threads(os_threads);
    for (cpu::Order order : {cpu::forward, cpu::backward, cpu::shuffled, cpu::shuffled, cpu::shuffled}) {
      cpu::order = order;
      cpu::seed++;
      work();
    }
  }
#endif
}
static void same_bits_in_every_order(const std::string& what, const std::function<std::vector<uint32_t>()>& work) {
  std::vector<uint32_t> want;
  Tally tally(what + ": the same bits in every order of threads");
  in_every_order([&] {
    const std::vector<uint32_t> got = work();
    if (want.empty()) want = got;
    tally.check(got == want && !got.empty(), 0, "\nIs a barrier missing, or is something read before it is written?");
  });
}

// ---- Model: the article's network once more, in fp64. What mp stores in 16 bits is rounded once: a layer's tensors to
// the layer's type, an activation to the type of the layer that reads it. ----
struct Model {
  int L = 0;
  bool relu = true, rounds = true;
  Loss kind = Loss::cross_entropy;
  double scale = 1, loss = 0, kink = infinite;        // kink: the least |argument| of a ReLU
  std::vector<Matrix> W, b, a, nudge, delta, dW, db;  // nudge: added to z, to measure dL/dz
  Map type;                                           // of layer 1 to L
  Matrix y;
  explicit Model(const Mlp& net) : L(net.L), relu(net.relu), kind(net.loss), type(size_t(L) + 1) {
    for (auto* part : {&W, &b, &a, &nudge, &delta, &dW, &db}) part->resize(size_t(L) + 1);
    a[0] = get(net.layer[0].a, net.rows);
    y = get(net.y, net.rows);
    for (int l = 1; l <= L; l++) {
      type[l] = net.layer[l].type;
      W[l] = get(net.layer[l].W);
      b[l] = get(net.layer[l].b);
      nudge[l] = Matrix(net.rows, W[l].rows);
    }
  }
  Type reader(int l) const { return type[std::min(l + 1, L)]; }  // the logits have none: they keep the last layer's
  Matrix round(const Matrix& m, Type to) const { return rounds && to != fp32 ? rounded(m, to) : m; }
  double prediction(int row, int i) const {  // z, or softmax(z)
    if (kind == Loss::squared_error) return a[L](row, i);
    double sum = 0;
    for (int j = 0; j < a[L].cols; j++) sum += std::exp(a[L](row, j) - a[L](row, i));
    return 1 / sum;
  }
  void forward(int l, bool f) {  // E2
    Matrix z = a[l - 1] * transposed(W[l]);
    for (int n = 0; n < z.rows; n++)
      for (int i = 0; i < z.cols; i++) {
        z(n, i) += b[l](0, i) + nudge[l](n, i);
        if (!f) continue;
        kink = std::min(kink, std::fabs(z(n, i)));
        if (z(n, i) < 0) z(n, i) = 0;
      }
    a[l] = round(z, reader(l));
  }
  void forward(int l) { forward(l, relu && l < L); }
  void find_loss() {  // E1, mean over the batch
    loss = 0;
    for (int n = 0; n < y.rows; n++)
      for (int i = 0; i < y.cols; i++)
        if (kind == Loss::squared_error) loss += 0.5 * std::pow(y(n, i) - a[L](n, i), 2) / y.rows;
        else if (y(n, i) != 0) loss -= y(n, i) * std::log(prediction(n, i)) / y.rows;
  }
  void output_delta() {  // E3
    const auto slope = [&](int n, int i) { return (prediction(n, i) - y(n, i)) / y.rows * scale; };
    delta[L] = round(matrix_of(y.rows, y.cols, slope), type[L]);
  }
  void backward(int l, bool f_prime) {  // E4
    Matrix d = delta[l] * W[l];
    for (size_t i = 0; i < d.v.size(); i++)
      if (f_prime && a[l - 1].v[i] <= 0) d.v[i] = 0;
    delta[l - 1] = round(d, type[l - 1]);
  }
  void backward(int l) { backward(l, relu); }
  void weight_gradient(int l) {  // E5
    dW[l] = round(transposed(delta[l]) * a[l - 1], type[l]);
    db[l] = round(Matrix(1, delta[l].rows, 1) * delta[l], type[l]);
  }
  double loss_from_a0() {
    for (int l = 1; l <= L; l++) forward(l);
    find_loss();
    return loss;
  }
  // dL/dx for each x of m, a matrix of this model, by central differences: (L(x + h) - L(x - h)) / 2h is off
  // by h^2/6 L''' < 1e-8, if no ReLU changes sides
  Matrix slopes(Matrix& m) {
    const double h = 1e-4;
    Matrix slope(m.rows, m.cols);
    for (size_t i = 0; i < m.v.size(); i++) {
      const double x = m.v[i];
      m.v[i] = x + h;
      const double above = loss_from_a0();
      m.v[i] = x - h;
      slope.v[i] = (above - loss_from_a0()) / (2 * h);
      m.v[i] = x;
    }
    return slope;
  }
};

// A small network, 7-5-6-3. 4 of its 6 rows are in use; the others hold NaN and must not matter. With a `step`, all
// numbers are multiples of it.
static Mlp small_network(const Map& map, bool relu, Loss kind, uint64_t seed, double step = 0) {
  const double limit = step > 0 ? 4 : 1;
  Mlp net = network({7, 5, 6, 3}, 6, fp32);
  set_types(net, map);
  net.rows = 4;
  net.relu = relu;
  net.loss = kind;
  for (int l = 0; l <= net.L; l++) {
    Layer& layer = net.layer[l];
    Matrix a = random_matrix(seed++, 4, layer.a.cols, limit, step);
    if (l > 0 && relu) a = a.each([](double x) { return std::max(x, 0.); });
    put(layer.a, a, NAN);
    if (l == 0) continue;
    const std::vector<float> W = random_matrix(seed++, layer.W.rows, layer.W.cols, limit, step).floats();
    set_parameters(layer, W, random_matrix(seed++, 1, layer.W.rows, limit, step).floats());
    fill(layer.delta, NAN);
    put(first_rows(layer.delta, 4), random_matrix(seed++, 4, layer.a.cols, limit, step));  // E3 and E4 pad it with 0
  }
  put(net.y, kind == Loss::cross_entropy ? one_hot(4, 3) : random_matrix(seed++, 4, 3, 1, step), NAN);
  return net;
}
struct Case {
  Loss kind;
  bool relu;
  const char* words;
};
static const Case cases[] = {{Loss::cross_entropy, true, "cross-entropy, ReLU"},
                             {Loss::cross_entropy, false, "cross-entropy, no activation"},
                             {Loss::squared_error, true, "squared error, ReLU"},
                             {Loss::squared_error, false, "squared error, no activation"}};
// A small network in fp32 after E2, E1 and E3. No argument of a ReLU is near 0, so that slopes exist.
static Mlp far_from_kinks(const Case& c, float scale = 1) {
  for (uint64_t seed = 1;; seed++) {
    Mlp net = small_network({fp32, fp32, fp32}, c.relu, c.kind, 100 * seed);
    Model model(net);
    model.loss_from_a0();
    if (model.kink < 0.005) continue;
    LossScaler scaler(scale);
    for (int l = 1; l <= net.L; l++) forward(net, l);
    loss(net, scaler);
    output_delta(net, scaler);
    return net;
  }
}
// ==== 2.1 Number formats ====
// Rounding goes wrong, if at all, at a value of the format, halfway between two of them, or at a float next to these.
static std::vector<float> critical_floats(const Format& f) {
  std::vector<float> inputs = {float_inf, -float_inf, FLT_MAX, -FLT_MAX, FLT_TRUE_MIN, FLT_MIN};
  for (uint32_t nan : {0x7fc00000u, 0x7f800001u, 0x7f801fffu, 0x7f802000u, 0x7fffffffu, 0xff800001u, 0xffaaa000u, ~0u})
    inputs.push_back(same_bits<float>(nan));  // payloads that truncation loses or a carry overflows
  for (int bits = 0; bits < f.infinity(); bits++) {
    const float x = float(f.decode(uint16_t(bits))), tie = x + float(f.half_step(x));
    for (float point : {x, tie})
      for (float y : {point, std::nextafter(point, -float_inf), std::nextafter(point, float_inf)})
        inputs.insert(inputs.end(), {y, -y});
  }
  Random random{1};
  for (int i = 0; i < 100000; i++) inputs.push_back(same_bits<float>(random.bits()));
  return inputs;
}
template <class T> static void check_rounding(const Format& f, T (*convert)(float)) {
  Tally nans("NaN stays NaN"), others("any other float goes to the nearest"), ties("ties to even"),
      values("values that the format holds");  // the last one reports first
  for (float x : critical_floats(f)) {
    const double low = f.decode(f.encode(x, cut_off));
    Tally* tally = &others;
    if (std::isnan(x)) tally = &nans;
    else if (low == x) tally = &values;
    else if (std::fabs(x - low) == f.half_step(x)) tally = &ties;
    tally->rounded(f, x, convert(x).bits);
  }
}
template <class T> static void check_widening(const Format& f, float (*convert)(T)) {
  Tally values("the value of each of the 65,536 patterns");
  for (int i = 0; i < 65536; i++) {
    const double want = f.decode(uint16_t(i)), got = convert(T{uint16_t(i)});
    const bool nan = std::isnan(want), same = got == want && std::signbit(got) == std::signbit(want);
    values.check(nan ? std::isnan(got) : same, i & 0x7fff, text("0x%04x\n got    %.9g\n want   %.9g", i, got, want));
    values.zero += !nan && !same && got == 0;
  }
}
// Kernels convert by other instructions, 8 numbers at once (here in the update) or one by one (here in E3).
static void check_rounding_in_kernels(const Format& f, Type type) {
  const std::vector<float> inputs = critical_floats(f);
  const int n = int(inputs.size());
  Mlp wide = network({n, 1}, 1, type), single = network({1, n}, 1, type);
  LossScaler scaler(1);
  to_device(inputs, kept_W(wide.layer[1]));
  update(wide, scaler, 0);
  to_device(inputs, single.y);
  single.loss = Loss::squared_error;  // delta is 0 - y
  output_delta(single, scaler);
  const std::vector<float> by_8 = to_host(wide.layer[1].W), by_1 = to_host(single.layer[1].delta);
  Tally wides("rounded in a kernel, 8 at a time"), singles("rounded in a kernel, one by one");
  for (int i = 0; i < n; i++) {
    wides.rounded(f, inputs[i], f.encode(by_8[i]));
    if (inputs[i] != 0) singles.rounded(f, -inputs[i], f.encode(by_1[i]));  // 0 - 0 has no sign
  }
}
static void check_widening_in_kernels(const Format& f, Type type) {
  const Matrix all = matrix_of(1, 65536, [&](int, int i) { return f.decode(uint16_t(i)); });
  Mlp wide = network({65536, 1}, 1, type), single = network({1, 65536}, 1, type);
  LossScaler scaler(1);
  put(wide.layer[1].dW, all);
  update(wide, scaler, -1);  // the master was 0 and becomes dW
  put(single.layer[1].a, all);
  single.loss = Loss::squared_error;  // delta is z - 0
  output_delta(single, scaler);
  compare("widened in a kernel, 8 at a time", get(kept_W(wide.layer[1])), all);
  compare("widened in a kernel, one by one", get(single.layer[1].delta), all);
}

TEST_SUITE("float_to_half") {
  TEST_CASE("a float becomes the nearest half, a tie the even one") { check_rounding(half_format, float_to_half); }
  TEST_CASE("kernels round to half in the same way") { check_rounding_in_kernels(half_format, fp16); }
}
TEST_SUITE("half_to_float") {
  TEST_CASE("each half is the float that its bits say") { check_widening(half_format, half_to_float); }
  TEST_CASE("kernels read halves in the same way") { check_widening_in_kernels(half_format, fp16); }
}
TEST_SUITE("float_to_bfloat16") {
  TEST_CASE("a float becomes the nearest bfloat16, a tie the even one") {
    check_rounding(bfloat16_format, float_to_bfloat16);
  }
  TEST_CASE("a bfloat16 is the upper half of a float") { check_widening(bfloat16_format, bfloat16_to_float); }
  TEST_CASE("kernels convert in the same way") {
    check_rounding_in_kernels(bfloat16_format, bf16);
    check_widening_in_kernels(bfloat16_format, bf16);
  }
}

// ==== 2.3 A training step ====
struct Digits {  // images and labels on the device
  int in, classes;
  std::vector<uint8_t> pixels, labels;
  std::vector<int> order;
  Tensor memory[3];
  Batch batch;
  Digits(int in_, int classes_, int rows, int count, int stride) : in(in_), classes(classes_) {
    const int square = 29 + stride / 3;  // even for stride 27: then 256 pixels in a row have all greys
    for (int i = 0; i < count * in; i++) pixels.push_back(uint8_t(square * i * i + 53 * i + 7));
    for (int i = 0; i < count; i++) {
      labels.push_back(uint8_t((i * 7 + i / 5) % classes));
      order.push_back(i * stride % count);
    }
    memory[0] = on_device(pixels);
    memory[1] = on_device(labels);
    memory[2] = on_device(order);
    batch.pixels = memory[0].as<uint8_t>();
    batch.labels = memory[1].as<uint8_t>();
    batch.order = memory[2].as<int>();
    batch.rows = rows;
  }
  void fill(Model& model, int position) const {  // what box B makes of the batch at this position
    const auto sample = [&](int n) { return order[position * batch.rows + n]; };
    model.a[0] = matrix_of(batch.rows, in, [&](int n, int i) {
      return round_to(model.reader(0), pixels[size_t(sample(n) * in + i)] / 255.0);
    });
    model.y = matrix_of(batch.rows, classes, [&](int n, int i) { return labels[size_t(sample(n))] == i; });
  }
};
static std::vector<uint32_t> parameters(const Mlp& net) {
  std::vector<Tensor> all;
  for (const Layer& l : net.layer) all.insert(all.end(), {l.master, l.weights, l.compensation});
  return bits_of(all);
}
// Every tensor that a training step leaves must be what fp64 computes from the tensors before it, up to the error of
// fp32 sums and of one rounding.
static void check_step(const std::string& what, Mlp& net, const Digits& digits, LossScaler& scaler, float lr) {
  const StepState before = scaler.read();
  Model model(net);
  model.rounds = false;
  model.scale = before.scale;
  std::vector<Matrix> master(1);
  for (int l = 1; l <= net.L; l++) master.push_back(get(net.layer[l].master));
  train_step(net, digits.batch, scaler, lr);
  const StepState after = scaler.read();
  const auto check = [&](const char* name, int l, const Tensor& t, Type type, Matrix& want, const Matrix& error) {
    const Matrix got = get(t);
    compare_rounded(what + name + std::to_string(l), type, got, want, error);
    want = got;  // the next equation begins with what the step left
  };

  digits.fill(model, before.position);
  compare(what + "a0", get(net.layer[0].a), model.a[0]);
  for (int l = 1; l <= net.L; l++) {
    model.forward(l);
    const double bias_added = e * (model.a[l].largest() + model.b[l].largest());
    const Matrix error = sum_error(model.a[l - 1], transposed(model.W[l]));
    check("a", l, net.layer[l].a, model.reader(l), model.a[l], error.each([&](double x) { return x + bias_added; }));
  }
  model.find_loss();
  const double size = 1 + model.a[net.L].largest();  // of exp's argument; 20 operations, each off by e of it
  same(what + "loss", after.loss, model.loss, 20 * e * (size + model.loss));

  bool finite = true;
  model.output_delta();
  Matrix error(net.rows, digits.classes, 20 * e * size * before.scale / net.rows);
  for (int l = net.L; l >= 1; l--) {
    const Layer& layer = net.layer[l];
    check("delta", l, layer.delta, layer.type, model.delta[l], error);
    model.weight_gradient(l);
    const Matrix delta = transposed(model.delta[l]);
    check("dW", l, layer.dW, layer.type, model.dW[l], sum_error(delta, model.a[l - 1]));
    check("db", l, layer.db, layer.type, model.db[l], transposed(sum_error(delta, Matrix(net.rows, 1, 1))));
    finite &= model.dW[l].largest() < infinite && model.db[l].largest() < infinite;
    if (l == 1) continue;
    model.backward(l);
    error = sum_error(model.delta[l], model.W[l]);
  }

  const double rate = finite ? lr / double(before.scale) : 0;
  for (int l = 1; l <= net.L; l++) {
    const Layer& layer = net.layer[l];
    const Matrix g = get(layer.gradients), got = get(layer.master);
    for (size_t i = 0; i < g.v.size() && finite; i++) master[l].v[i] -= rate * g.v[i];
    // 1 / scale, two products and the difference, each off by e of its result
    const double tolerance = finite ? 3 * e * rate * g.largest() + e * got.largest() : 0;
    compare(what + "master", got, master[l], tolerance);
    compare(what + "compute copy", get(layer.weights), rounded(got, layer.type));
  }
  const std::string outcome = what + (finite ? "a finite step, " : "an overflow, ");
  float scale = before.scale;
  if (!finite) scale /= 2;
  else if (before.growth_tracker + 1 == scaler.interval) scale *= 2;
  same(outcome + "next scale", after.scale, scale);
  same(outcome + "skipped steps", after.skipped, before.skipped + !finite);
  same(outcome + "steps", after.step, before.step + 1);
  same(outcome + "position of the next batch", after.position, before.position + 1);
  same(outcome + "halted", after.halted, 0);
}

TEST_SUITE("train_step") {
  TEST_CASE("every equation of 16 steps, with layers of all types, as the scale moves") {
    const Digits digits(20, 4, 5, 80, 27);
    std::vector<Map> all = maps;
    all.insert(all.end(), {{fp16, fp32}, {fp32, fp16}});
    for (const Map& map : all)
      for (const Case& c : cases) {
        Mlp net = map.size() == 2 ? network({20, 9, 4}, 5, fp32) : network({20, 9, 7, 4}, 5, fp32);
        net.relu = c.relu;
        net.loss = c.kind;
        initialise(net);
        set_types(net, map);
        for (const Layer& layer : net.layer)
          if (layer.W.memory) CHECK(get(layer.W).v == rounded(get(kept_W(layer)), layer.type).v);
        LossScaler scaler(0x1p24f, 2, 0.5f, 2);
        bool grown = false;
        for (int step = 0; step < 16; step++) {
          const float scale = scaler.read().scale;
          check_step(name_of(map) + c.words + text(", step %d, ", step), net, digits, scaler, 0.02f);
          grown |= scaler.read().scale > scale;
        }
        const bool halves = std::count(map.begin(), map.end(), fp16) > 0;  // 2^24 is too large a scale for them
        CHECK_MESSAGE((scaler.read().skipped > 3) == halves,
                      "steps with halves must be skipped at 2^24, and no others");
        CHECK_MESSAGE(grown, "the loss scale never grew");
      }
  }
  TEST_CASE("the bytes that layers of different types take") {
    Mlp net = network({20, 9, 4}, 5, fp32);
    set_types(net, {fp16, fp32});
    const Footprint bytes = footprint(net);
    const size_t layer1 = 9 * 24 + 16, layer2 = 4 * 16 + 8;  // W and b: rows are padded to multiples of 8
    CHECK(bytes.weights == (2 + 4) * layer1 + 4 * layer2);   // fp32 weights are their own master
    CHECK(bytes.activations == 5 * (2 * 24 + 4 * 16 + 4 * 8));
    CHECK(bytes.gradients == 2 * layer1 + 4 * layer2 + 5 * (2 * 16 + 4 * 8));
  }
  TEST_CASE("the same bits in every order of threads") {
    const Digits digits(100, 10, 20, 80, 27);
    for (Update rule : {Update::master, Update::stochastic})
      same_bits_in_every_order("4 steps of 100-70-10 in fp16", [&] {
        Mlp net = make_mlp({100, 70, 10}, 20, fp16, rule);
        initialise(net);
        LossScaler scaler(0x1p20f, 2, 0.5f, 1);
        std::vector<uint32_t> bits;
        for (int step = 0; step < 4; step++) {
          train_step(net, digits.batch, scaler, 0.2f);
          bits.push_back(same_bits<uint32_t>(scaler.read().loss));
        }
        const std::vector<uint32_t> after = parameters(net);
        bits.insert(bits.end(), after.begin(), after.end());
        return bits;
      });
  }
  TEST_CASE("a batch without pixels takes input and targets as they are") {
    Mlp net = network({11, 2}, 2, bf16);
    const Matrix a0 = random_matrix(1, 2, 11, 2, 0.25), y = random_matrix(2, 2, 2, 2, 0.25);
    put(net.layer[0].a, a0);
    put(net.y, y);
    Batch batch;
    batch.rows = 1;
    preprocess(net, batch, nullptr);
    CHECK(net.rows == 1);
    CHECK(get(net.layer[0].a).v == a0.v);
    CHECK(get(net.y).v == y.v);
  }
  TEST_CASE("box H: the class of the largest logit, in a partial batch, too") {
    Mlp net = network({20, 9, 4}, 4, fp32), all = network({20, 9, 4}, 11, fp32);
    initialise(net);
    initialise(all);
    Model model(all);
    std::vector<uint8_t> pixels(11 * 20);
    for (size_t i = 0; i < pixels.size(); i++) {
      pixels[i] = i % 9 < 2 ? 255 : 0;
      model.a[0].v[i] = pixels[i] / 255;
    }
    model.loss_from_a0();
    std::vector<int> want;
    for (auto z = model.a[2].v.begin(); z < model.a[2].v.end(); z += 4)
      want.push_back(int(std::max_element(z, z + 4) - z));
    CHECK(predict(net, pixels) == want);
    CHECK(*std::max_element(want.begin(), want.end()) > *std::min_element(want.begin(), want.end()));
    CHECK(predict(net, {}).empty());
  }
  TEST_CASE("weights start from He's normal distribution, biases from 0") {
    const auto start = [](uint64_t seed) {
      Mlp net = network({300, 200, 10}, 1, fp16);
      net.seed = seed;
      initialise(net);
      return net;
    };
    const Mlp net = start(5);
    const Matrix W = get(kept_W(net.layer[1]));
    const double n = double(W.v.size()), variance = 2.0 / 300;  // each bound: 5 standard deviations of the estimate
    CHECK(std::fabs(W.mean()) <= 5 * std::sqrt(variance / n));
    CHECK(std::fabs(W.each([](double w) { return w * w; }).mean() / variance - 1) <= 5 * std::sqrt(2 / n));
    const double fourth = W.each([](double w) { return std::pow(w, 4); }).mean() / (variance * variance);
    CHECK(std::fabs(fourth - 3) <= 5 * std::sqrt(96 / n));  // 3 for a normal distribution
    CHECK(get(kept_b(net.layer[1])).largest() == 0);
    CHECK(get(net.layer[1].W).v == rounded(W, fp16).v);
    CHECK(parameters(start(5)) == parameters(net));
    CHECK(parameters(start(6)) != parameters(net));
  }
  TEST_CASE("what does not fit is refused") {
    CHECK_THROWS_AS(make_tensor(0, 1, fp32), Error);
    CHECK_THROWS_AS(make_tensor(1 << 16, 1 << 16, fp16), Error);
    CHECK_THROWS_AS(to_device({1, 2, 3}, make_tensor(2, 2, fp32)), Error);
    CHECK_THROWS_AS(network({5, 0, 3}, 1, fp16), Error);
    CHECK_THROWS_AS(network({5, 3}, 0, fp16), Error);
    CHECK_THROWS_AS(make_mlp({5, 3}, 1, fp32, Update::kahan), Error);
  }
}

// ==== 4.1 E1: the loss ====
static Mlp last_layer(const Matrix& z, const Matrix& y, Type type, Loss kind) {  // a network that ends with this
  Mlp net = network({1, z.cols}, z.rows + 2, type);
  net.rows = z.rows;
  net.loss = kind;
  put(net.layer[1].a, z, NAN);
  put(net.y, y, NAN);
  return net;
}
static double loss_of(Mlp& net) {
  LossScaler scaler(1024);  // the loss itself is not scaled
  loss(net, scaler);
  return scaler.read().loss;
}
static const std::pair<Loss, const char*> losses[] = {{Loss::squared_error, "squared error"},
                                                      {Loss::cross_entropy, "cross-entropy"}};

TEST_SUITE("E1") {
  TEST_CASE("the mean of 1/2 sum (y - z)^2, or of -sum y log softmax(z)") {
    for (Type type : types)
      for (auto [kind, words] : losses)
        for (auto [rows, classes] : {std::make_pair(1, 1), {4, 3}, {70, 10}, {33, 17}}) {
          Matrix z = random_matrix(1, rows, classes, 5), y = random_matrix(2, rows, classes, 5);
          if (kind == Loss::cross_entropy) {
            z(0, classes - 1) = 300;            // whose exponential no float can hold
            if (rows > 1) z(1, 0) = -infinite;  // a class whose probability is 0
            y = one_hot(rows, classes);
          }
          Mlp net = last_layer(z, y, type, kind);
          Model model(net);
          model.a[1] = get(net.layer[1].a, rows);
          model.find_loss();
          Tally tally(text("%s, %s, [%d, %d]", words, name_of(type).c_str(), rows, classes));
          // all terms are positive: each addition, and 8 operations on each term, are off by e of the sum
          tally.near(
              loss_of(net), model.loss, e * (classes + rows + 8) * (10 + model.loss), 0, 0,
              {{"a forgotten 1/2", 2 * model.loss}, {"the sum over the batch, not its mean", rows * model.loss}});
        }
  }
  TEST_CASE("NaN and infinity are not hidden") {
    for (double bad : {double(NAN), infinite})
      for (Loss kind : {Loss::squared_error, Loss::cross_entropy}) {
        Matrix z(3, 4);
        z(1, 2) = bad;
        Mlp net = last_layer(z, one_hot(3, 4), fp16, kind);
        CHECK_MESSAGE(!std::isfinite(loss_of(net)), text("one z is %g, and yet the loss is finite", bad));
      }
  }
}

// ==== 4.2.1 E2: forward ====
static void check_row_below(const Tensor& t) {  // four rows are in use; the fifth was 7
  const bool nothing_below_the_last_row = get(t)(4, 0) == 7;
  CHECK_MESSAGE(nothing_below_the_last_row, "it writes below the last row: is a bound missing, or <= for <?");
}
TEST_SUITE("E2") {
  TEST_CASE("a = f(a W^T + b), ReLU on hidden layers, rounded to its reader's type") {
    for (const Map& map : maps)
      for (bool relu : {true, false})
        for (int l = 1; l <= 3; l++) {
          Mlp net = small_network(map, relu, Loss::cross_entropy, 2, 0.0625);  // exact sums: an exact result
          Model model(net), no_bias = model;
          model.a[l - 1] = no_bias.a[l - 1] = get(net.layer[l - 1].a, 4);
          Model no_f = model, f_everywhere = model;
          model.forward(l);
          no_bias.b[l] = Matrix(1, no_bias.b[l].cols);
          no_bias.forward(l);
          no_f.forward(l, false);
          f_everywhere.forward(l, true);
          fill(net.layer[l].a, 7);
          forward(net, l);
          compare(text("%slayer %d, %s", name_of(map).c_str(), l, relu && l < 3 ? "f = ReLU" : "no f"),
                  get(net.layer[l].a, 4), model.a[l], 0,
                  {{"a forgotten bias", no_bias.a[l]},
                   {"a forgotten activation f", no_f.a[l]},
                   {"an f where there should be none", f_everywhere.a[l]}});
          check_row_below(net.layer[l].a);
        }
  }
}

// ==== 4.2.2 E3, E4: backward ====
static constexpr const char *article_E3 = "the article's formula, half the slope",
                            *no_mean = "a forgotten division by the batch", *no_scale = "a forgotten loss scale",
                            *times_batch = "multiplying by the batch: the mean divides by it",
                            *over_scale = "dividing by the loss scale: here it multiplies";
// At most 8 products of 7 terms lie between a pixel and a gradient: 64 e, most of which cancels.
static void compare_slopes(const std::string& what, const Tensor& got, Model& model, Matrix& over) {
  const Matrix slopes = model.slopes(over);
  compare(what, get(got, slopes.rows), slopes, 64 * e * (1 + slopes.largest()), {{no_mean, 4 * slopes}});
}
TEST_SUITE("E3") {
  TEST_CASE("delta is the slope of the loss over z, times the loss scale") {
    for (const Case& c : cases) {
      const Mlp net = far_from_kinks(c, 8);
      Model model(net);
      model.loss_from_a0();
      Model no_exp = model;
      no_exp.kind = Loss::squared_error;
      no_exp.scale = 8;
      no_exp.output_delta();
      const Matrix slope = 8 * model.slopes(model.nudge[net.L]);
      compare(c.words, get(net.layer[net.L].delta, 4), slope, 8 * 100 * e,
              {{no_mean, 4 * slope},
               {times_batch, 16 * slope},
               {article_E3, 0.5 * slope},
               {no_scale, 0.125 * slope},
               {over_scale, 1. / 64 * slope},
               {"z - y, which leaves softmax(z) out", no_exp.delta[net.L]}});
    }
  }
  TEST_CASE("the article's (z - y) / 2 is half the slope of 1/2 (y - z)^2") {
    for (double z : {-1.5, 0.25, 2.0})
      for (double y : {-0.5, 0.0, 3.0}) {
        const auto E1 = [&](double at) { return 0.5 * (y - at) * (y - at); };
        const double h = 0.125;  // a parabola's central difference is exact, and so is fp64 with these numbers
        const double slope = (E1(z + h) - E1(z - h)) / (2 * h), article = (z - y) * 0.5;
        CHECK(article == slope / 2);
        Mlp net = last_layer(Matrix(1, 1, z), Matrix(1, 1, y), fp16, Loss::squared_error);
        output_delta(net, LossScaler(1));
        compare("delta", get(net.layer[1].delta, 1), Matrix(1, 1, slope), 0, {{article_E3, Matrix(1, 1, article)}});
      }
  }
  TEST_CASE("computed in fp32 and rounded once") {
    for (Type type : types)
      for (auto [kind, words] : losses) {
        // exact in fp32: z - y, / 4 and * 1024; not in fp16: z - y has more than 11 bits, and / 4 makes it too small
        const bool exact = kind == Loss::squared_error;
        const double unit = exact ? 0x1p-16 : 1;
        Matrix z = random_matrix(1, 4, 16, 4 * unit, unit / 64);
        const Matrix y = random_matrix(2, 4, 16, 4 * unit, unit / 256);
        if (!exact) z(0, 3) = 1e4;                                        // softmax is 1 there and 0 elsewhere, not NaN
        Mlp net = last_layer(z, exact ? y : one_hot(4, 16), type, kind);  // 16: no padding between rows
        fill(net.layer[1].delta, 7);
        LossScaler scaler(1024);
        loss(net, scaler);
        output_delta(net, scaler);
        Model model(net);
        model.a[1] = get(net.layer[1].a, 4);
        model.output_delta();
        const Matrix early = 1024 * model.delta[1];
        model.scale = 1024;
        model.rounds = exact;
        model.output_delta();
        const std::string what = words + (", " + name_of(type));
        const Matrix got = get(net.layer[1].delta, 4), fp32_error(4, 16, 256 * 20 * e);  // exp, log sum exp: 20 e
        const Matrix& want = model.delta[1];
        const Mistaken mistaken = {{no_mean, 4 * want},
                                   {article_E3, 0.5 * want},
                                   {no_scale, 1. / 1024 * want},
                                   {"rounding before the scale has lifted the value", early}};
        if (exact) compare(what, got, want, 0, mistaken);
        else compare_rounded(what, type, got, want, fp32_error, mistaken);
        check_row_below(net.layer[1].delta);
      }
  }
}
TEST_SUITE("E4") {
  TEST_CASE("delta = (delta W) * f'(z), rounded once, to the type of its layer") {
    for (const Map& map : maps)
      for (bool relu : {true, false})
        for (int l : {2, 3}) {
          Mlp net = small_network(map, relu, Loss::cross_entropy, 3, 0.0625);  // exact sums: an exact result
          Model model(net);
          model.a[l - 1] = get(net.layer[l - 1].a, 4);
          model.delta[l] = get(net.layer[l].delta, 4);
          Model no_mask = model, mask = model;
          model.backward(l);
          no_mask.backward(l, false);
          mask.backward(l, true);
          fill(net.layer[l - 1].delta, 7);
          backward(net, l);
          compare(text("%slayer %d, %s", name_of(map).c_str(), l, relu ? "ReLU" : "no activation"),
                  get(net.layer[l - 1].delta, 4), model.delta[l - 1], 0,
                  {{"the article's formula, which leaves f' out", no_mask.delta[l - 1]},
                   {"an f' where there is no activation", mask.delta[l - 1]}});
          check_row_below(net.layer[l - 1].delta);
        }
  }
  TEST_CASE("delta is the slope of the loss over the z of each hidden layer") {
    for (const Case& c : cases) {
      Mlp net = far_from_kinks(c);
      Model model(net);
      for (int l = net.L; l > 1; l--) {
        backward(net, l);
        compare_slopes(text("%s, layer %d", c.words, l - 1), net.layer[l - 1].delta, model, model.nudge[l - 1]);
      }
    }
  }
}

// ==== 4.2.3 E5: the weight gradient ====
TEST_SUITE("E5") {
  TEST_CASE("dW = delta^T a, db = column sums of delta, rounded once") {
    for (const Map& map : maps) {
      Mlp small = small_network(map, true, Loss::cross_entropy, 5, 0.0625);  // exact sums: an exact result
      Mlp large = network({2, 300}, 70, map[0]);
      put(large.layer[1].delta, random_matrix(1, 70, 300, 1, 0x1p-6));
      put(large.layer[0].a, random_matrix(2, 70, 2, 1, 0x1p-6));
      for (Mlp* net : {&small, &large})
        for (int l = 1; l <= net->L; l++) {
          const Layer& layer = net->layer[l];
          Model model(*net);
          model.a[l - 1] = get(net->layer[l - 1].a, net->rows);
          model.delta[l] = get(layer.delta, net->rows);
          model.weight_gradient(l);
          fill(layer.gradients, NAN);
          weight_gradient(*net, l);
          const std::string what = text("%slayer %d, ", name_of(map).c_str(), l);
          compare(what + "dW", get(layer.dW), model.dW[l]);
          compare(what + "db", get(layer.db), model.db[l]);
          CHECK_MESSAGE(get(layer.gradients).largest() < infinite, "NaN in the padding: it would count as an overflow");
        }
    }
  }
  TEST_CASE("dW and db are the slopes of the loss over every weight and bias") {
    for (const Case& c : cases) {
      Mlp net = far_from_kinks(c);
      Model model(net);
      for (int l = net.L; l >= 1; l--) {
        weight_gradient(net, l);
        if (l > 1) backward(net, l);
        compare_slopes(text("%s, dW%d", c.words, l), net.layer[l].dW, model, model.W[l]);
        compare_slopes(text("%s, db%d", c.words, l), net.layer[l].db, model, model.b[l]);
      }
    }
  }
}

// ==== The matrix products ====
using Gemm = std::function<void(Layout, const Tensor&, const Tensor&, const Tensor&, const Epilogue&)>;
struct Shape {
  int M, N, K;
};
static const std::pair<Layout, const char*> layouts[] = {
    {Layout::ABt, "A B^T"}, {Layout::AB, "A B"}, {Layout::AtB, "A^T B"}};
static Tensor operand(const Matrix& m, Type type, bool across = false,
                      int below = 3) {  // NaN in padding and rows below
  const Matrix laid = across ? transposed(m) : m;
  const Tensor t = make_tensor(laid.rows + below, laid.cols, type);
  put(t, laid, NAN);
  return first_rows(t, laid.rows);
}
// A[M, K] B[N, K]^T in all three layouts, from operands of type `from` to a result of type `to`. Options: the sum of 1
// for a bias, 2 for ReLU and 4 for a mask
static void check_product(const Gemm& gemm, const Matrix& A, const Matrix& B, Type from, Type to, int options = 0,
                          const char* likely = nullptr) {
  const int M = A.rows, N = B.rows;
  const bool relu = options & 2;
  const Matrix b = rounded(random_matrix(3, 1, N, 1), from), f = random_matrix(4, M, N, 1, 0.5);
  const Tensor bias = operand(b, from), mask = operand(f, from);
  Epilogue epilogue;
  epilogue.bias = options & 1 ? &bias : nullptr;
  epilogue.relu = relu;
  epilogue.mask = options & 4 ? &mask : nullptr;
  Matrix want = A * transposed(B), error = sum_error(A, transposed(B));
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++) {
      double &x = want(m, n), &off = error(m, n);
      if (epilogue.bias) {
        x += b(0, n);
        off += e * (std::fabs(x) + std::fabs(b(0, n)));
      }
      if (relu && x < 0) x = 0;
      if (!epilogue.mask || f(m, n) > 0) continue;
      x = 0;
      off = 0;
    }
  Mistaken mistaken;
  if (M == N && N == A.cols)
    mistaken = {{"exchanging A's rows and columns", transposed(A) * transposed(B)},
                {"exchanging B's rows and columns", A * B},
                {"exchanging A and B", B * transposed(A)},
                {"taking B in A's place", B * transposed(B)},
                {"taking A in B's place", A * transposed(A)}};
  for (auto [layout, formula] : layouts) {
    const Tensor whole = make_tensor(M + 2, N, to), C = first_rows(whole, M);
    put(whole, Matrix(M, N, NAN), 7);
    gemm(layout, operand(A, from, layout == Layout::AtB), operand(B, from, layout != Layout::ABt), C, epilogue);
    if (likely) mistaken = {{likely, get(C)}};
    compare_rounded(text("%s, %s to %s, M N K = %d %d %d%s%s%s", formula, name_of(from).c_str(), name_of(to).c_str(), M,
                         N, A.cols, epilogue.bias ? ", bias" : "", relu ? ", ReLU" : "", epilogue.mask ? ", mask" : ""),
                    to, get(C), want, error, mistaken);
    const Matrix all = get(with_padding(whole));
    const bool gradient = layout != Layout::ABt && !epilogue.bias && error.largest() < infinite;
    int bad_padding = 0;  // of gradients, as in E5
    for (int m = 0; m < M && gradient; m++)
      for (int n = N; n < all.cols; n++) bad_padding += all(m, n) != 7 && all(m, n) != 0;
    CHECK_MESSAGE(bad_padding == 0, "padding is neither 0 nor as it was: it would count as a gradient");
    const bool rows_below_untouched = std::count(all.v.end() - 2 * all.cols, all.v.end(), 7.) == 2 * all.cols;
    CHECK_MESSAGE(rows_below_untouched, "it writes below the last row: is a bound missing?");
  }
}
static void check_products(const Gemm& gemm, const std::vector<Type>& of_types = types) {
  const std::pair<Shape, const char*> tiles[] = {
      {{64, 64, 64}, nullptr},  // one tile
      {{192, 192, 192}, "going on to the wrong tile: a single tile is right"},
      {{192, 192, 100}, "a missing or wrong bound on K: whole tiles are right"},
      {{192, 100, 64}, "a missing or wrong bound on N: whole tiles are right"},
      {{100, 192, 64}, "a missing or wrong bound on M: whole tiles are right"}};
#if defined(MP_CUDA)
  const Shape large = {2053, 2061, 70};
#else
  const Shape large = {130 * std::max(cores(), 2) + 1, 203, 70};  // large tiles are taken
#endif
  const std::vector<Shape> shapes = {{1, 1, 1},      {5, 3, 1},      {1, 8, 10},     {8, 1, 17},    {16, 16, 16},
                                     {17, 33, 65},   {64, 64, 64},   {64, 10, 128},  {64, 128, 10}, {10, 128, 64},
                                     {130, 129, 10}, {130, 10, 129}, {65, 66, 130},  {1, 1, 1000},  {3, 130, 7},
                                     {200, 72, 333}, {64, 128, 784}, {128, 784, 64}, {49, 9, 63},   {97, 65, 65},
                                     {193, 129, 65}, large};
  for (Type from : of_types) {
    for (auto& [size, likely] : tiles)
      check_product(gemm, random_matrix(1, size.M, size.K, 1, 0x1p-6), random_matrix(2, size.N, size.K, 1, 0x1p-6),
                    from, from, 0, likely);
    for (auto [M, N, K] : shapes) {
      const Matrix A = rounded(random_matrix(1, M, K, 1), from), B = rounded(random_matrix(2, N, K, 1), from);
      check_product(gemm, A, B, from, from);
      if (M * N * K > 100000) continue;
      for (int options = 1; options < 8; options++) check_product(gemm, A, B, from, from, options);
      for (Type to : types) check_product(gemm, A, B, from, to, 7);
    }
    Matrix A(20, 40, 1), B(30, 40, 1);  // NaN and infinity reach their row's results, through ReLU too, and no others
    A(3, 5) = NAN;
    A(7, 39) = infinite;
    B(29, 0) = -1;
    for (int options : {0, 1, 2}) check_product(gemm, A, B, from, from, options);
  }
}
static void check_orders(const Gemm& gemm) {
  for (auto [M, N, K] : {Shape{17, 33, 65}, {130, 72, 200}, {70, 130, 16}, {70, 10, 130}, {10, 70, 130}})
    for (const auto& named : layouts) {
      const Layout layout = named.first;
      const Tensor A = operand(random_matrix(1, M, K, 1), fp16, layout == Layout::AtB, 200);
      const Tensor B = operand(random_matrix(2, N, K, 1), fp16, layout != Layout::ABt, 200);
      const Tensor C = make_tensor(M, N, fp16);
      same_bits_in_every_order(text("%s, M N K = %d %d %d", named.second, M, N, K), [&] {
        fill(C, NAN);
        gemm(layout, A, B, C, {});
        return bits_of({C});
      });
    }
}
static void check_refusals(const Gemm& gemm) {
  const Tensor A = make_tensor(4, 6, fp16), B = make_tensor(5, 6, fp16), C = make_tensor(4, 5, fp16);
  CHECK_NOTHROW(gemm(Layout::ABt, A, B, C, {}));
  CHECK_THROWS_AS(gemm(Layout::AB, A, B, C, {}), Error);
  CHECK_THROWS_AS(gemm(Layout::AtB, A, B, C, {}), Error);
  CHECK_THROWS_AS(gemm(Layout::ABt, B, A, C, {}), Error);
  CHECK_THROWS_AS(gemm(Layout::ABt, A, B, make_tensor(5, 5, fp16), {}), Error);
  CHECK_THROWS_AS(gemm(Layout::ABt, A, make_tensor(5, 7, fp16), C, {}), Error);
  CHECK_THROWS_AS(gemm(Layout::ABt, make_tensor(4, 6, fp32), B, C, {}), Error);
  const Tensor short_row = make_tensor(1, 4, fp16), fp32_row = make_tensor(1, 5, fp32),
               fp32_all = make_tensor(4, 5, fp32);
  for (const Tensor* wrong : {&A, &short_row, &fp32_row, &fp32_all}) {
    Epilogue bias, mask;
    bias.bias = wrong;
    mask.mask = wrong;
    CHECK_THROWS_AS(gemm(Layout::ABt, A, B, C, bias), Error);
    CHECK_THROWS_AS(gemm(Layout::ABt, A, B, C, mask), Error);
  }
}
static Gemm with_splits(decltype(&gemm_tiled) gemm, int splits) {
  return [=](Layout layout, const Tensor& A, const Tensor& B, const Tensor& C, const Epilogue& epilogue) {
    gemm(layout, A, B, C, epilogue, splits);
  };
}
TEST_SUITE("gemm_naive") {
  TEST_CASE("every layout, type, size and epilogue; NaN and infinity stay") { check_products(gemm_naive); }
  TEST_CASE("the order of the threads does not matter") { check_orders(gemm_naive); }
  TEST_CASE("operands that do not fit are refused") { check_refusals(gemm_naive); }
}
TEST_SUITE("gemm_tiled") {
  static const Gemm whole = with_splits(gemm_tiled, 0), split = with_splits(gemm_tiled, 3);
  TEST_CASE("the order of the threads does not matter") {
    check_orders(with_splits(gemm_tiled, 1));
    check_orders(split);
  }
  TEST_CASE("every layout, type, size and epilogue; NaN and infinity stay") { check_products(whole); }
  TEST_CASE("K shared out to several blocks") { check_products(split); }
  TEST_CASE("operands that do not fit are refused") { check_refusals(whole); }
}
static std::vector<Type> mma_types() {
  if (tensor_cores(bf16)) return {fp16, bf16};
  return {fp16};
}
TEST_SUITE("gemm_mma") {
  static const Gemm whole = with_splits(gemm_mma, 0), split = with_splits(gemm_mma, 3);
  TEST_CASE("every layout, 16-bit type, size and epilogue; NaN and infinity stay") {
    check_products(whole, mma_types());
  }
  TEST_CASE("K shared out to several blocks") { check_products(split, mma_types()); }
  TEST_CASE("the order of the threads does not matter") {
    check_orders(with_splits(gemm_mma, 1));
    check_orders(split);
  }
  TEST_CASE("operands that do not fit are refused, and fp32") {
    check_refusals(whole);
    const Tensor A = make_tensor(4, 4, fp32);
    CHECK_THROWS_AS(gemm_mma(Layout::AB, A, A, A), Error);
  }
}

// ==== 3.1 Loss scaling ====
static Mlp two_layers(Type type, Update rule) {
  Mlp net = make_mlp({9, 5, 3}, 1, type, rule);
  initialise(net);
  return net;
}
static void fill_gradients(const Mlp& net, double g) {
  for (int l = 1; l <= net.L; l++) fill(net.layer[l].gradients, g);
}
static void end_step(Mlp& net, LossScaler& scaler, float lr) {
  unscale_and_check(net, scaler);
  update(net, scaler, lr);
  scaler.update();
}

TEST_SUITE("unscale_and_check") {
  TEST_CASE("a gradient is multiplied by float(1 / scale), in fp32") {
    for (Type type : types)
      for (float scale : {1.f, 1000.f, 65536.f, 3.f, 0x1p-3f}) {
        Mlp net = network({50, 4}, 1, type);
        const Tensor& gradients = net.layer[1].gradients;
        put(gradients, random_matrix(1, 1, gradients.cols, 100));
        LossScaler scaler(scale);
        unscale_and_check(net, scaler);
        same("found_inf, all gradients being finite", scaler.read().found_inf, 0);
        update(net, scaler, -1);  // the master was 0: now it is the gradient
        const double inverse = float(1 / double(scale));
        const Matrix g = get(gradients);
        compare(text("%s, scale %g", name_of(type).c_str(), double(scale)), get(net.layer[1].master),
                rounded(inverse * g, fp32), 0,
                {{"a gradient with the scale still in it", g},
                 {"dividing by 1 / scale, which multiplies by the scale", 1 / inverse * g}});
      }
  }
  TEST_CASE("one infinity or NaN is found wherever it is, before unscaling") {
    for (Type type : types) {
      Mlp net = two_layers(type, Update::master);
      const double finite = type == fp16 ? 65504 : 0x1.fep127;
      for (double g : {infinite, -infinite, double(NAN), finite}) {
        Tally tally(text("%s, one gradient is %g: found_inf for [layer, gradient]", name_of(type).c_str(), g));
        for (int l = 1; l <= net.L; l++)
          for (int i = 0; i < net.layer[l].gradients.cols; i++) {
            fill_gradients(net, 1e-3);
            Matrix one = get(net.layer[l].gradients);
            one(0, i) = g;
            put(net.layer[l].gradients, one);
            LossScaler scaler(65536);
            unscale_and_check(net, scaler);
            tally.near(
                scaler.read().found_inf, g != finite, 0, l, i,
                {{"a comparison with NaN, which is always false", std::isnan(g) ? 0 : -1},
                 {"a found_inf that the next gradient overwrites", i + 8 < net.layer[l].gradients.cols ? 0 : 1}});
          }
      }
    }
  }
  TEST_CASE("one bad gradient: every weight stays, and the step counts as skipped") {
    for (Update rule : {Update::master, Update::half, Update::kahan, Update::stochastic}) {
      Mlp net = two_layers(fp16, rule);
      const std::vector<uint32_t> before = parameters(net);
      LossScaler scaler(65536);
      for (double bad : {infinite, double(NAN)}) {
        fill_gradients(net, 4096);
        put(net.layer[2].db, Matrix(1, 1, bad));
        end_step(net, scaler, 0.5f);
      }
      const StepState s = scaler.read();
      CHECK_MESSAGE(parameters(net) == before, "weights changed, although one gradient was inf or NaN");
      same("steps skipped, after one with inf and one with NaN", s.skipped, 2);
      same("the scale, halved twice", s.scale, 16384);
      same("found_inf before the next step", s.found_inf, 0);
      fill_gradients(net, 4096);
      end_step(net, scaler, 0.5f);
      CHECK_MESSAGE(parameters(net) != before, "weights stayed, although every gradient was finite");
      same("steps skipped, after a finite one", scaler.read().skipped, 2);
    }
  }
}

static void step_with(LossScaler& scaler, bool found_inf, float loss_value = 1) {
  StepState s = scaler.read();
  s.found_inf = found_inf;
  s.loss = loss_value;
  scaler.write(s);
  scaler.update();
}
// '+' a finite step, '!' one with found_inf; scale and tracker after each, as torch.amp.GradScaler has them
static void trace(const std::string& words, LossScaler scaler, const std::string& steps,
                  const std::vector<std::pair<double, int>>& want) {
  Tally scales(words + ": scale after each of " + steps), trackers(words + ": tracker after each of " + steps);
  for (size_t i = 0; i < steps.size(); i++) {
    step_with(scaler, steps[i] == '!');
    scales.near(scaler.read().scale, want[i].first, 0, int(i));
    trackers.near(scaler.read().growth_tracker, want[i].second, 0, int(i));
  }
}
TEST_SUITE("loss_scaling") {
  TEST_CASE("scale and tracker follow torch.amp.GradScaler") {
    trace("defaults", LossScaler(), "!+", {{32768, 0}, {32768, 1}});
    trace("from 8, interval 2", LossScaler(8, 2, 0.5f, 2), "+++!++",
          {{8, 1}, {16, 0}, {16, 1}, {8, 0}, {8, 1}, {16, 0}});
    trace("from 2^127, whose double is infinite", LossScaler(0x1p127f, 2, 0.5f, 1), "+", {{0x1p127, 0}});
    trace("growth 1.1", LossScaler(3e38f, 1.1f, 0.5f, 1), "+", {{double(float(3e38f * double(1.1f))), 0}});
    trace("backoff 0.7", LossScaler(1000, 2, 0.7f), "!", {{700, 0}});
    trace("fixed", LossScaler(1000, 1, 1, 3), "++!+", {{1000, 1}, {1000, 2}, {1000, 0}, {1000, 1}});
    std::vector<std::pair<double, int>> want;
    for (int i = 1; i < 2000; i++) want.push_back({65536, i});
    want.push_back({131072, 0});
    trace("defaults", LossScaler(), std::string(2000, '+'), want);
  }
  TEST_CASE("a dynamic scale that cannot help halts, and then nothing changes") {
    for (float bad_loss : {1.f, float_inf, float_nan}) {
      Mlp net = two_layers(fp16, Update::master);
      const std::vector<uint32_t> before = parameters(net);
      LossScaler scaler(bad_loss == 1 ? 2 : 1024);
      if (bad_loss == 1) step_with(scaler, true);  // to 1: half of that would be below
      const StepState at = scaler.read();
      step_with(scaler, true, bad_loss);
      fill_gradients(net, 1);
      for (int i = 0; i < 3; i++) end_step(net, scaler, 1);
      const StepState s = scaler.read();
      same("halted before", at.halted, 0);
      same("halted", s.halted, 1);
      same("the scale, halted", s.scale, at.scale);
      same("steps, halted", s.step, at.step);
      CHECK_MESSAGE(parameters(net) == before, "weights change after the halt");
    }
  }
}

// ==== 3.2 step 5: the update ====
// One weight by each rule, every operation rounded. A compiler may fuse w - lr * g into one rounding: both are right.
struct Weight {
  double w, c;
};
static Weight updated(Update rule, Type type, Weight now, float g, float lr, bool fused = true) {
  const auto minus_step = [&](double x) {
    return fused ? std::fma(-lr, g, float(x)) : float(x - double(float(double(lr) * g)));
  };
  const auto round = [&](double x) { return round_to(type, float(x)); };
  if (rule == Update::master) return {minus_step(now.w), 0};
  if (rule == Update::half) return {round(minus_step(now.w)), 0};
  const double u = round(minus_step(now.c)), sum = round(now.w + u);
  return {sum, round(u + round(now.w - sum))};
}
static void check_update(Update rule, Type type) {
  Mlp net = make_mlp({50, 9}, 1, type, rule);
  initialise(net);
  const Layer& layer = net.layer[1];
  const Tensor kept = rule == Update::master ? layer.master : layer.weights;
  const float lr = 0.013f, inverse = float(1 / 1000.0);
  const std::string name = name_of(type);
  Tally weights(name + ": [step, weight]"), owes(name + ": its compensation");
  for (int step = 0; step < 20; step++) {
    put(layer.gradients, random_matrix(step, 1, layer.gradients.cols, 30 * (step + 1)));
    Matrix c(1, kept.cols), owed = c;
    if (rule == Update::kahan) c = get(layer.compensation);
    const Matrix w = get(kept), g = get(layer.gradients);
    LossScaler scaler(1000);
    update(net, scaler, lr);
    const Matrix got = get(kept);
    if (rule == Update::kahan) owed = get(layer.compensation);
    for (int i = 0; i < w.cols; i++) {
      const Weight now = {w(0, i), c(0, i)};
      const float gradient = float(g(0, i) * double(inverse));
      Weight want = updated(rule, type, now, gradient, lr);
      const Weight unfused = updated(rule, type, now, gradient, lr, false);
      if (got(0, i) == unfused.w && owed(0, i) == unfused.c) want = unfused;
      const Weight mirrored = updated(rule, type, {now.w, -now.c}, gradient, lr);
      const char* const minus_c = "subtracting c: here it is added, u = c - lr g";
      weights.near(got(0, i), want.w, 0, step, i,
                   {{minus_c, mirrored.w},
                    {"a gradient with the loss scale still in it", updated(rule, type, now, gradient * 1000, lr).w},
                    {"a step uphill: w + lr g instead of w - lr g", updated(rule, type, now, -gradient, lr).w},
                    {"leaving out what the last steps still owe", updated(rule, type, {now.w, 0}, gradient, lr).w},
                    {"a weight that is never written", now.w}});
      owes.near(owed(0, i), want.c, 0, step, i,
                {{"the other sign of c: here c' = u + (w - w')", -want.c},
                 {minus_c, -mirrored.c},
                 {minus_c, mirrored.c},
                 {"a compensation never written", now.c}});
    }
    compare(name + ": the compute copy", get(layer.weights), rounded(got, type));
  }
}
// 512 weights of 1 after 1000 steps of +1e-4 each. Exactly: 1.1
static Layer thousand_small_steps(Type type, Update rule) {
  Mlp net = make_mlp({64, 8}, 1, type, rule);
  set_parameters(net.layer[1], std::vector<float>(512, 1), std::vector<float>(8, 1));
  fill_gradients(net, -1);
  LossScaler scaler(1);
  for (int i = 0; i < 1000; i++) {
    update(net, scaler, 1e-4f);
    scaler.update();
  }
  return net.layer[1];
}
// 8192 random numbers, spread evenly over the dropped bits: x = low + p * step must round up in p * 8192 of the cases.
template <class F> static void check_chance(const Format& f, F stochastic, const std::vector<float>& values) {
  for (float value : values)
    for (float x : {value, -value}) {
      const int dropped = 24 - f.digits + std::max(f.lowest - std::max(std::ilogb(x), -126), 0);
      const double low = f.decode(f.encode(x, cut_off)), up_step = std::copysign(2 * f.half_step(x), x);
      int up = 0, down = 0;
      for (uint64_t i = 0; i < 8192; i++) {  // whether it takes the low random bits or the high ones
        const double got = f.decode(stochastic(x, i << (dropped - 13) | i << 51).bits);
        up += got == low + up_step;
        down += got == low;
      }
      const double want = (x - low) / up_step * 8192;
      CHECK_MESSAGE(
          (up + down == 8192 && std::fabs(up - want) < 1),
          text("%s of %.9g, with 8192 random numbers\n  got    %d up, %d down\n  want   %.6g up, the others down",
               f.name, double(x), up, down, want));
    }
}

TEST_SUITE("stochastic_rounding") {
  TEST_CASE("the nearer the upper neighbour, the likelier it is") {
    check_chance(
        half_format, stochastic_half,
        {1.f, 1 + 0x1p-11f, 1 + 0x1p-23f, 1.1f, 0x1.ffcp3f, 0x1.fffffep3f, 1234.567f, 65472.5f, 65503.f, 0x1p-14f,
         0x1.8001p-14f, 0x1.fffp-15f, 0x1.2345p-16f, 0x1.8p-20f, 0x1.4p-24f, 0x1p-24f, 0x1p-25f, 0x1.8p-30f, 0x1p-36f});
    check_chance(bfloat16_format, stochastic_bfloat16,
                 {1.f, 1.001f, 1 + 0x1p-8f, 0x1.fffffep3f, 3e38f, 0x1p-126f, 0x1.234p-130f});
  }
  TEST_CASE("what the format holds stays, and so do infinity and NaN") {
    Tally halves("half"), bfloats("bfloat16");
    for (uint64_t random : {uint64_t(0), ~uint64_t(0), uint64_t(0x123456789abcdef0)}) {
      const auto check = [&](float x, float y) {
        halves.rounded(half_format, x, stochastic_half(x, random).bits);
        bfloats.rounded(bfloat16_format, y, stochastic_bfloat16(y, random).bits);
      };
      for (int i = 0; i < 65536; i++)
        check(float(half_format.decode(uint16_t(i))), float(bfloat16_format.decode(uint16_t(i))));
      for (float nan : {same_bits<float>(0x7f800001u), same_bits<float>(~0u)}) check(nan, nan);
      for (float sign : {1.f, -1.f}) check(sign * 65520, sign * FLT_MAX);
    }
  }
  TEST_CASE("1000 small steps are right on average") {
    // Neighbours are d apart: a step of 1e-4 becomes d with probability p = 1e-4 / d, else 0; variance d^2 p (1 - p).
    // Both bounds are 5 standard deviations of the estimate from 512 weights.
    for (Type type : types_16) {
      const double d = 2 * format_of(type)->half_step(1), p = 1e-4 / d, variance = 1000 * d * d * p * (1 - p);
      const Matrix w = get(thousand_small_steps(type, Update::stochastic).W);
      same("the mean of 512 weights", w.mean(), 1.1, 5 * std::sqrt(variance / 512));
      const double found = w.each([](double x) { return (x - 1.1) * (x - 1.1); }).mean();
      same("their variance; each has its own chance", found, variance, 5 * std::sqrt(2. / 512) * variance);
    }
  }
  TEST_CASE("another weight, another layer, another step and another seed choose anew") {
    const auto after = [](uint64_t seed, int steps) {  // weights of 1, moved to 1 + 2^-11: half way to the next
      Mlp net = make_mlp({30, 30, 30}, 1, fp16, Update::stochastic);
      net.seed = seed;
      LossScaler scaler(1);
      fill_gradients(net, -1);
      for (int step = 0; step < steps; step++) {
        for (int l = 1; l <= 2; l++) fill(net.layer[l].weights, 1);
        update(net, scaler, 0x1p-11f);
        scaler.update();
      }
      return get(net.layer[1].W).v == get(net.layer[2].W).v ? Matrix() : get(net.layer[1].W);
    };
    const Matrix W = after(1, 1);
    for (double w : W.v) CHECK_MESSAGE((w == 1 || w == 1 + 0x1p-10), "neighbours of 1 + 2^-11");
    same("the mean of 900 weights", W.mean(), 1 + 0x1p-11, 5 * 0x1p-11 / 30);  // 5 standard deviations of 900 coins
    CHECK_MESSAGE(after(1, 1).v == W.v, "the same seed and step, but other weights");
    CHECK_MESSAGE(after(1, 2).v != W.v, "the next step, but the same choices");
    CHECK_MESSAGE(after(2, 1).v != W.v, "another seed, but the same choices");
  }
}
TEST_SUITE("update_master") {
  TEST_CASE("master -= lr g / scale in fp32; the compute copy is rounded") {
    for (Type type : types) check_update(Update::master, type);
  }
  TEST_CASE("1000 small steps are 0.1 for a master, and nothing without one") {
    for (Type type : types_16) {
      compare("the master", get(kept_W(thousand_small_steps(type, Update::master))), Matrix(8, 64, 1.1), 1000 * e);
      compare("half: stays 1", get(thousand_small_steps(type, Update::half).W), Matrix(8, 64, 1));
    }
  }
  TEST_CASE("half: the sum itself is rounded to 16 bits") {
    for (Type type : types_16) check_update(Update::half, type);
  }
}
TEST_SUITE("update_kahan") {
  TEST_CASE("w and c follow arXiv 2010.06192, every operation in 16 bits") {
    for (Type type : types_16) check_update(Update::kahan, type);
  }
}

// ==== CUDA on a CPU ====
#if !defined(MP_CUDA)  // a GPU needs no emulator, and this file no compiler for kernels
// Reverses a block's numbers, four for each thread but the last. The last thread ends at once, and its place in shared
// memory stays as it was.
template <bool wait, bool barrier, bool bound> __global__ void reverse_kernel(const int* in, int* out) {
  int* const tile = dynamic_shared<int>();
  const int i = threadIdx.x, n = blockDim.x, first = blockIdx.x * 4 * n, last = bound ? 4 * n - 5 : 4 * n - 1;
  if (i == n - 1) return;
  copy_16_bytes_async(tile + 4 * i, in + first + 4 * i, 16);
  copy_commit();
  if (wait) copy_wait<0>();
  if (barrier) __syncthreads();
  for (int j = 4 * i; j < 4 * i + 4; j++) out[first + j] = tile[last - j];
}
__global__ void count_poison_kernel(int* out) {  // of 101 bytes
  uint8_t* const bytes = dynamic_shared<uint8_t>();
  if (uintptr_t(bytes) % 128 == 0) out[blockIdx.x] = int(std::count(bytes, bytes + 101, 0xff));
  std::fill(bytes, bytes + 101, 0);
}
__global__ void log_kernel(std::vector<int>* log) {
  const int block = (blockIdx.z * gridDim.y + blockIdx.y) * gridDim.x + blockIdx.x;
  const int thread = (threadIdx.z * blockDim.y + threadIdx.y) * blockDim.x + threadIdx.x;
  log->push_back(block * int(blockDim.x * blockDim.y * blockDim.z) + thread);
}
// Tensor cores' instructions, one warp
template <bool transposed> __global__ void ldmatrix_kernel(const uint16_t* rows, uint32_t (*out)[4]) {
  ldmatrix_x4<transposed>(out[threadIdx.x], rows + 8 * threadIdx.x);
}
// C += A B; the PTX manual numbers a fragment's elements i and the lanes in groups of four.
template <class T> __global__ void mma_kernel(const Format* f, const Matrix* A, const Matrix* B, Matrix* C) {
  const int group = threadIdx.x / 4, lane = threadIdx.x % 4;
  T a[8], b[4];
  float d[4];
  for (int i = 0; i < 8; i++) a[i] = {f->encode((*A)(group + i / 2 % 2 * 8, lane * 2 + i % 2 + i / 4 * 8))};
  for (int i = 0; i < 4; i++) b[i] = {f->encode((*B)(lane * 2 + i % 2 + i / 2 * 8, group))};
  for (int i = 0; i < 4; i++) d[i] = float((*C)(group + i / 2 * 8, lane * 2 + i % 2));
  uint32_t a_words[4], b_words[2];
  memcpy(a_words, a, 16);
  memcpy(b_words, b, 8);
  mma_16x8x16<T>(d, a_words, b_words);
  for (int i = 0; i < 4; i++) (*C)(group + i / 2 * 8, lane * 2 + i % 2) = d[i];
}
// Two copies: what has arrived before, between and after their waits
__global__ void late_copy_kernel(const float* from, float* seen) {
  float* const to = dynamic_shared<float>();
  copy_16_bytes_async(to, from, 16);
  copy_commit();
  copy_16_bytes_async(to + 4, from + 4, 6);
  copy_commit();
  memcpy(seen, to, 32);
  copy_wait<1>();
  memcpy(seen + 8, to, 32);
  copy_wait<0>();
  memcpy(seen + 16, to, 32);
}

// Kernels that end badly
static void load_some_matrix() {
  uint32_t r[4];
  ldmatrix_x4<false>(r, dynamic_shared<char>());
}
static void multiply_some_matrices() {
  const uint32_t a[4] = {}, b[2] = {};
  float d[4] = {};
  mma_16x8x16<half>(d, a, b);
}
__global__ void half_a_barrier_kernel() { threadIdx.x == 0 ? load_some_matrix() : __syncthreads(); }
__global__ void two_instructions_kernel() { threadIdx.x == 0 ? load_some_matrix() : multiply_some_matrices(); }
__global__ void misaligned_kernel() { copy_16_bytes_async(dynamic_shared<char>(), dynamic_shared<char>() + 4, 16); }
__global__ void write_100th_byte_kernel() { dynamic_shared<char>()[99] = 1; }
// What a kernel says on standard error in a process of its own, and how that ends
static std::string last_words(void (*kernel)(), int shared_bytes = 100) {
  const KeepSettings settings;
  cpu::use_os_threads(1);  // fork() takes no other thread along
  int ends[2], status = 0;
  REQUIRE(pipe(ends) == 0);
  const pid_t child = fork();
  if (child == 0) {
    const rlimit no_core = {0, 0};
    setrlimit(RLIMIT_CORE, &no_core);
    dup2(ends[1], 2);
    alarm(60);
    launch_shared(kernel, 1, 32, shared_bytes);
    _exit(0);
  }
  close(ends[1]);
  std::string words;
  char buffer[256];
  for (ssize_t n; (n = ::read(ends[0], buffer, sizeof buffer)) > 0;) words.append(buffer, size_t(n));
  close(ends[0]);
  waitpid(child, &status, 0);
  if (WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT) return words + "aborted";
  return words + (status == 0 ? "went on" : "?");
}
// 7 blocks, which reverse 4 n - 4 numbers each: in how many orders of threads are they wrong?
using Ints = std::vector<int>;
static int wrong_orders(void (*kernel)(const int*, int*), int n) {
  Ints in(28 * n), want(in.size());
  std::iota(in.begin(), in.end(), 1000);
  for (int first = 0; first < 28 * n; first += 4 * n)
    std::reverse_copy(in.begin() + first, in.begin() + first + 4 * n - 4, want.begin() + first);
  int wrong = 0;
  in_every_order([&] {
    Ints out(in.size());
    launch_shared(kernel, 7, n, 16 * n, in.data(), out.data());
    wrong += out != want;
  });
  return wrong;
}

TEST_SUITE("cuda_on_a_cpu") {
  TEST_CASE("ldmatrix: lane 4 g + t gets elements (g, 2t) and (g, 2t + 1) of each matrix, or of its transpose") {
    alignas(16) uint16_t rows[256];
    for (int i = 0; i < 256; i++) rows[i] = uint16_t(i * 251);
    uint32_t plain[32][4], across[32][4];
    launch(ldmatrix_kernel<false>, 1, 32, rows, plain);
    launch(ldmatrix_kernel<true>, 1, 32, rows, across);
    for (int lane = 0; lane < 32; lane++)
      for (int i = 0; i < 8; i++) {  // two numbers of 16 bits in each word
        const int matrix = i / 2 * 64, g = lane / 4, col = lane % 4 * 2 + i % 2, shift = i % 2 * 16;
        CHECK(uint16_t(plain[lane][i / 2] >> shift) == rows[matrix + 8 * g + col]);
        CHECK(uint16_t(across[lane][i / 2] >> shift) == rows[matrix + 8 * col + g]);
      }
  }
  TEST_CASE("mma: d += a b, by the PTX manual's fragments") {
    for (Type type : types_16) {
      const Matrix A = rounded(random_matrix(1, 16, 16, 1), type), B = rounded(random_matrix(2, 16, 8, 1), type);
      Matrix C = A * B, D = C.each([](double) { return 0.5; });
      for (double& x : C.v) x += 0.5;
      const auto kernel = type == fp16 ? mma_kernel<half> : mma_kernel<bfloat16>;
      launch(kernel, 1, 32, format_of(type), &A, &B, &D);
      // products of 11-bit numbers are exact in fp32; 16 additions of sums up to 17 are off by e of that each
      compare(name_of(type), D, C, 16 * 17 * e);
    }
  }
  TEST_CASE("a copy lands at its wait, not before, and what it does not read is 0") {
    alignas(16) float from[8] = {1, 2, 3, 4, 5, 6, 7, 8}, seen[24];
    launch_shared(late_copy_kernel, 1, 1, 32, from, seen);
    const float half_of_6 = same_bits<float>(same_bits<uint32_t>(6.f) & 0xffff);
    const float none = float_nan, want[] = {none, none, none, none, none, none, none, none, 1, 2,         3, 4,
                                            none, none, none, none, 1,    2,    3,    4,    5, half_of_6, 0, 0};
    Tally tally("number [i] of 8 at the start, after the first wait and after the second");
    for (int i = 0; i < 24; i++) tally.near(seen[i], want[i], 0, i);
  }
  TEST_CASE("in every order of threads the same; a missing barrier, wait or bound shows") {
    for (int threads : {2, 31, 33, 128}) {
      INFO(threads, " threads");
      CHECK(wrong_orders(reverse_kernel<true, true, true>, threads) == 0);
      CHECK(wrong_orders(reverse_kernel<false, true, true>, threads) > 0);
      CHECK(wrong_orders(reverse_kernel<true, true, false>, threads) > 0);
      if (threads > 2) CHECK(wrong_orders(reverse_kernel<true, false, true>, threads) > 0);
    }
  }
  TEST_CASE("every thread of every block once: forward, backward, or as the seed says; poison before each block") {
    const KeepSettings settings;
    const auto run = [](cpu::Order order, unsigned seed) {
      Ints log;
      cpu::order = order;
      cpu::seed = seed;
      launch(log_kernel, dim3(3, 2, 2), dim3(5, 4, 2), &log);
      return log;
    };
    cpu::use_os_threads(1);
    Ints forward(480), sorted = run(cpu::shuffled, 1), poisoned(3);
    std::iota(forward.begin(), forward.end(), 0);
    CHECK(run(cpu::forward, 1) == forward);
    CHECK(run(cpu::backward, 1) == Ints(forward.rbegin(), forward.rend()));
    CHECK(sorted != forward);
    CHECK(sorted == run(cpu::shuffled, 1));
    CHECK(sorted != run(cpu::shuffled, 2));
    std::sort(sorted.begin(), sorted.end());
    CHECK(sorted == forward);
    cpu::poison = true;
    launch_shared(count_poison_kernel, 3, 1, 101, poisoned.data());
    CHECK(poisoned == Ints(3, 101));
  }
  TEST_CASE("more blocks than cores: each once, on one OS thread, two and seven") {
    const KeepSettings settings;
    for (int os_threads : {1, 2, 7}) {
      cpu::use_os_threads(os_threads);
      for (int run = 0; run < 50; run++) {
        Ints in(100 * 64, 5), out(in.size());
        launch_shared(reverse_kernel<true, true, true>, 100, 16, 256, in.data(), out.data());
        CHECK(std::count(out.begin(), out.end(), 5) == 100 * 60);
      }
    }
  }
  TEST_CASE("threads that would wait for ever end the program and say where") {
    const auto says = [](const std::string& words, const std::string& part) {
      CHECK_MESSAGE(words.find(part) != std::string::npos, "wanted: ", part, "; got: ", words);
    };
    const std::string words = last_words(half_a_barrier_kernel);
    for (const char* part : {"block (0,0,0)", "the threads wait for each other", "thread 0 waits in ldmatrix",
                             "thread 1 waits in __syncthreads", "aborted"})
      says(words, part);
    says(last_words(two_instructions_kernel), "different instructions");
    says(last_words(misaligned_kernel), "multiple of 16 bytes");
    CHECK(last_words(write_100th_byte_kernel) == "went on");
#if defined(MP_ASAN)
    says(last_words(write_100th_byte_kernel, 99), "AddressSanitizer: heap-buffer-overflow");
#endif
  }
}
#endif

// ==== PyTorch's own figures ====
// nn.Sequential(Linear(6, 5), ReLU(), Linear(5, 4)), cross-entropy, rate 0.5, 12 images in batches of 4 in file order:
// losses of 24 steps by PyTorch 2.15 on a CPU, in fp32 and with torch.amp.autocast (float16), and the loss scales of
// GradScaler(init_scale=2**20, growth_interval=3).
static const double fp32_losses[] = {1.49022341, 1.67901206, 1.42582583, 1.3837347,  1.43274081, 1.32005167,
                                     1.38757038, 1.33581066, 1.26466322, 1.41413689, 1.2900877,  1.22817302,
                                     1.42953551, 1.26563978, 1.19894624, 1.430439,   1.25689578, 1.17242205,
                                     1.41977394, 1.25278461, 1.14683914, 1.39883196, 1.24772668, 1.12118161};
static const double fp16_losses[] = {1.4903,  1.76861, 1.60632, 1.4903,  1.67899, 1.42587, 1.38372, 1.43278,
                                     1.3323,  1.36728, 1.41267, 1.27416, 1.3911,  1.32695, 1.23514, 1.40488,
                                     1.28079, 1.25037, 1.41724, 1.2228,  1.21055, 1.45601, 1.24011, 1.16982};
static const int log2_scales[] = {20, 19, 18, 17, 17, 17, 18, 18, 17, 17, 17, 18,
                                  18, 18, 19, 18, 18, 18, 19, 18, 18, 18, 19, 18};

// The same steps by mp
static void check_recorded(Type type) {
  const auto numbers = [](int n, int salt) {
    std::vector<float> values;
    for (int i = 0; i < n; i++) values.push_back(float((i * 37 + salt) % 64 - 32) / 64);
    return values;
  };
  const Digits digits(6, 4, 4, 12, 1);
  Mlp net = network({6, 5, 4}, 4, type);
  set_parameters(net.layer[1], numbers(30, 11), numbers(5, 3));
  set_parameters(net.layer[2], numbers(20, 29), numbers(4, 17));
  LossScaler scaler = type == fp16 ? LossScaler(0x1p20f, 2, 0.5f, 3) : LossScaler(1, 1, 1);
  Tally losses_of_steps("loss of [step]"), scales("log2 of the scale of [step]");
  for (int step = 0; step < 24; step++) {
    StepState state = scaler.read();
    state.position = step % 3;
    scaler.write(state);
    scales.near(std::ilogb(state.scale), type == fp16 ? log2_scales[step] : 0, 0, step);
    train_step(net, digits.batch, scaler, 0.5f);
    // fp32: a loss is some 20 operations; a step adds its own errors to weights of about 1.
    // fp16: logits of about 1 are rounded to 2^-11; another order of adding may round one of them the other way
    const float got = scaler.read().loss;
    if (type == fp32) losses_of_steps.near(got, fp32_losses[step], 20 * (step + 1) * e, step);
    else losses_of_steps.near(got, fp16_losses[step], 0x1p-11, step);
  }
}
TEST_SUITE("pytorch") {
  TEST_CASE("fp32 losses are PyTorch's") { check_recorded(fp32); }
  TEST_CASE("fp16 losses and loss scales are PyTorch's, through overflow and growth") { check_recorded(fp16); }
}

// ==== 5 The program: data, checkpoints, and mp itself, called as a person calls it ====
#include <sys/file.h>
#include <sys/stat.h>

#include <iterator>

namespace {

namespace fs = std::filesystem;
using std::string;
using Words = std::vector<string>;

struct Folder {  // a new one for each test case, gone at its end
  string path = (fs::temp_directory_path() / "mp-XXXXXX").string();
  Folder() { REQUIRE(mkdtemp(path.data()) != nullptr); }
  ~Folder() { fs::remove_all(path); }
  string file(const string& name) const { return path + "/" + name; }
  void put(const string& name, const string& bytes) const { std::ofstream(file(name), std::ios::binary) << bytes; }
  string get(const string& name) const {  // empty if there is no such file
    std::ifstream stream(file(name), std::ios::binary);
    return {std::istreambuf_iterator<char>(stream), {}};
  }
  int mode(const string& name) const { return int(fs::status(file(name)).permissions()); }
  long files() const { return std::distance(fs::directory_iterator(path), {}); }
};
void says(const string& message, const Words& words) {
  for (const string& word : words) CHECK_MESSAGE(message.find(word) != string::npos, "no '", word, "' in: ", message);
}
Words split(const string& text) {
  std::istringstream stream(text);
  return {std::istream_iterator<string>(stream), {}};
}
template <class F> string error_of(F f) {  // the message, empty if all went well
  try {
    f();
  } catch (const Error& error) {
    CHECK(string(error.what()).find('\n') == string::npos);
    return error.what();
  }
  return "";
}
string error_of_data(const Folder& folder) {
  return error_of([&] { load_dataset(folder.path); });
}

// ---- Files, put together from their formats' definitions ----
string little(uint64_t value, int bytes) {
  string s;
  for (int i = 0; i < bytes; i++) s += char(value >> 8 * i & 255);
  return s;
}
string big(uint64_t n) { return {char(n >> 24), char(n >> 16), char(n >> 8), char(n)}; }
string zeros(size_t count) { return string(count, '\0'); }
string stored(const string& bytes) {  // deflate without compression
  return "\1" + little(bytes.size(), 2) + little(~bytes.size(), 2) + bytes;
}
string chunk(const string& type, const string& data) {  // its checksum is not checked
  return big(data.size()) + type + data + "sums";
}
string png(uint32_t width, uint32_t height, const string& pixels, int kind = 0, const string& more = "") {
  const size_t wide = width * (kind == 4 ? 2 : 1);  // 4: grey and alpha
  string rows;                                      // each begins with its filter: none
  for (size_t at = 0; at < pixels.size(); at += wide) rows += zeros(1) + pixels.substr(at, wide);
  return "\x89PNG\r\n\x1a\n" + chunk("IHDR", big(width) + big(height) + "\x08" + char(kind) + zeros(3)) + more +
         chunk("IDAT", "\x78\x01" + stored(rows) + "sums") + chunk("IEND", "");
}
string exif_of(int way) {  // TIFF with one entry, how the camera was held, in either byte order
  if (way % 2) return string("MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0", 19) + char(way) + zeros(6);
  return string("II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0", 18) + char(way) + zeros(7);
}
string sheet(uint32_t rows, uint32_t side) {  // a tile's pixels tell its row and column
  string pixels;
  for (uint32_t y = 0; y < rows * side; y++)
    for (uint32_t x = 0; x < 100 * side; x++) pixels += char(y / side * 3 + x / side + 7 * (y % side) + x % side);
  return png(100 * side, rows * side, pixels);
}
string labels(const string& values) { return big(0x801) + big(values.size()) + values; }
string images(uint32_t count, uint32_t rows, uint32_t columns, const string& pixels) {
  return big(0x803) + big(count) + big(rows) + big(columns) + pixels;
}
const string train_images = "train-images-idx3-ubyte", train_labels = "train-labels-idx1-ubyte",
             test_images = "t10k-images-idx3-ubyte", test_labels = "t10k-labels-idx1-ubyte";
void put_mnist(const Folder& folder) {  // each name of another kind
  folder.put("train-images.idx3-ubyte", images(3, 2, 2, "abcdefghijkl"));
  folder.put(train_labels, labels({0, 9, 5}));
  folder.put("t10k-images", images(1, 2, 2, "wxyz"));
  folder.put(test_labels, labels({7}));
}
string tensors(const string& header, const string& data) { return little(header.size(), 8) + header + data; }
string entry(const string& name, const string& type, const string& shape, const string& offsets) {  // of the header
  return "\"" + name + R"(":{"dtype":")" + type + R"(","shape":[)" + shape + R"(],"data_offsets":[)" + offsets + "]}";
}
struct Foreign {  // a safetensors file of another program, tensor by tensor
  string header, data;
  void add(const string& name, const string& type, const string& shape, const string& bytes) {
    const string begin = std::to_string(data.size());
    data += bytes;
    header += (header == "" ? "" : ",") + entry(name, type, shape, begin + "," + std::to_string(data.size()));
  }
  string bytes() const { return tensors("{" + header + "}", data); }
};
string bytes_of(const std::vector<float>& values) { return {(const char*)values.data(), 4 * values.size()}; }

// A file cut anywhere before its last `spare` bytes must be refused, and one with a bit flipped in its first `sure` bytes,
// too. Bits flipped behind those must do no harm.
template <class F> void damage(const string& bytes, size_t sure, size_t spare, F read) {
  CHECK(read(bytes) == "");
  for (size_t size = 0; size < bytes.size() - spare; size++)
    CHECK_MESSAGE(read(bytes.substr(0, size)) != "", size, " bytes left");
  for (size_t bit = 0; bit < 8 * bytes.size(); bit++) {
    string flipped = bytes;
    flipped[bit / 8] = char(flipped[bit / 8] ^ 1 << bit % 8);
    CHECK_MESSAGE((read(flipped) != "" || bit / 8 >= sure), "bit ", bit, " flipped");
  }
}

// ---- The program at work ----
struct Outcome {
  int status;  // 1000 + the signal that killed it
  string out, err;
};
struct Workplace : Folder {  // with data so small that a run takes milliseconds
  explicit Workplace(int count = 300) {
    for (const bool test : {false, true}) {  // 4 x 4 pixels; two bright ones tell the class
      string pixels, classes;
      Random random{test};
      for (int i = 0; i < (test ? 100 : count); i++) {
        const int c = i * 7 % 10;
        classes += char(c);
        for (int p = 0; p < 16; p++) {
          pixels += char(random.bits() >> 26 | (p == c || p == (3 * c + 5) % 16 ? 192 : 0));
        }
      }
      put(test ? test_images : train_images, images(uint32_t(classes.size()), 4, 4, pixels));
      put(test ? test_labels : train_labels, labels(classes));
    }
  }
  // By a shell, in this folder: `words` may redirect, `before` may set variables and limits.
  pid_t start(const string& words, const string& before = "") const {
    const char* const name = getenv("MP_PROGRAM");
    const string program = fs::absolute(name ? name : "build/mp").string();
    const string line = "cd " + path + " && exec >out 2>err; " + before + " exec " + program + " " + words;
    const pid_t child = fork();
    REQUIRE(child >= 0);
    if (child != 0) return child;
    alarm(200);  // one that hangs fails its test
    execl("/bin/sh", "sh", "-c", line.c_str(), nullptr);
    _exit(127);
  }
  Outcome finish(pid_t child) const {
    int status = 0;
    REQUIRE(waitpid(child, &status, 0) == child);
    return {WIFEXITED(status) ? WEXITSTATUS(status) : 1000 + WTERMSIG(status), get("out"), get("err")};
  }
  Outcome run(const string& words, const string& before = "") const { return finish(start(words, before)); }
  Outcome train(string words, const string& before = "") const {  // small and short, if not told otherwise
    for (const string option : {"--epochs 2", "--batch 10", "--layers 16,8,10", "--data ."})
      if (words.find(option.substr(0, option.find(' '))) == string::npos) words = option + " " + words;
    return run("train " + words, before);
  }
  Outcome resume(const string& words) const { return run("train --data . --resume " + words); }
  Outcome test(const string& model) const { return run("test --data . " + model); }
  SafeTensors model(const string& name) const { return read_safetensors(file(name)); }
};
Outcome succeed(const Outcome& o) {
  CHECK_MESSAGE((o.status == 0 && o.err == ""), "status ", o.status, ", ", o.err);
  return o;
}
void refuse(const Outcome& o, const Words& words, int status = 1) {  // 2: the usage follows
  CHECK_MESSAGE(o.status == status, o.out, o.err);
  CHECK_MESSAGE(o.err.rfind("mp: ", 0) == 0, o.err);
  if (status == 1) CHECK_MESSAGE(o.err.find('\n') + 1 == o.err.size(), "more than a line: ", o.err);
  if (status == 2) CHECK_MESSAGE((o.out == "" && o.err.find("\nusage: mp train") != string::npos), o.err);
  says(o.err.substr(0, o.err.find('\n')), words);
}
string last_line(const string& s) { return s.size() < 2 ? s : s.substr(s.rfind('\n', s.size() - 2)); }

using Row = std::vector<double>;
std::vector<Row> rows_of(size_t columns, string text) {  // of each line that is so many numbers
  for (char& c : text)
    if (c == ',' || c == '%') c = ' ';
  std::vector<Row> rows;
  std::istringstream lines(text);
  for (string line; std::getline(lines, line);) {
    Row row;
    bool numbers = true;
    char* end;
    for (const string& word : split(line)) {
      row.push_back(strtod(word.c_str(), &end));
      numbers = numbers && !*end;
    }
    if (numbers && row.size() == columns) rows.push_back(row);
  }
  return rows;
}
enum { EPOCH, LOSS, ACCURACY, SCALE, SKIPPED, RATE, SECONDS };  // of the table, which has a row an epoch
auto table_of(const Outcome& o) { return rows_of(7, o.out); }
auto log_of(const Folder& folder, int step = 0) {  // step, epoch, loss, loss_scale, found_inf
  const string csv = folder.get("log.csv");
  const auto rows = rows_of(5, csv);
  string again = "step,epoch,loss,loss_scale,found_inf\n";
  for (const auto& row : rows)
    again += text("%d,%.0f,%.9g,%.9g,%.0f\n", step++, row[1], float(row[2]), float(row[3]), row[4]);
  CHECK(csv == again);
  return rows;
}

}  // namespace

TEST_SUITE("data") {
  TEST_CASE("a file is replaced as a whole or not at all, and stays who may read it") {
    const Folder folder;
    const string path = folder.file("file"), link = folder.file("link");
    const mode_t mask = umask(027);
    write_file(path, string("\0\xff\n", 3));
    umask(mask);
    CHECK(folder.mode("file") == 0640);
    CHECK(read_file(path) == std::vector<uint8_t>{0, 255, '\n'});
    REQUIRE(chmod(path.c_str(), 0600) == 0);
    fs::create_symlink("file", link);
    write_file(link, "new");  // the file that it leads to
    CHECK(fs::is_symlink(link));
    CHECK(folder.get("file") == "new");
    CHECK(folder.mode("file") == 0600);
    says(error_of([&] { write_file(folder.file("no/file"), ""); }), {"no/file"});
    says(error_of([&] { write_file(folder.path, ""); }), {folder.path});
    CHECK(folder.files() == 2);  // no temporary file is left
    says(error_of([&] { read_file(folder.path); }), {folder.path});
  }
  TEST_CASE("two write to one path: whoever reads it sees a whole file") {
    const Folder folder;
    const string path = folder.file("file"), one(100000, '1'), two(150000, '2');
    write_file(path, one);
    const pid_t other = fork();
    string failed;
    for (int i = 0; i < 100; i++) {
      failed += error_of([&] { write_file(path, other ? one : two); });
      const string seen = folder.get("file");
      if (seen != one && seen != two) failed += "damaged";
    }
    if (other == 0) _exit(failed != "");
    int status = 1;
    waitpid(other, &status, 0);
    CHECK(status == 0);
    CHECK(failed == "");
    CHECK(folder.files() == 1);
  }
  TEST_CASE("sheets: row r of tiles is digit r mod 10") {
    const Folder folder;
    folder.put("test.png", sheet(1, 3));
    says(error_of_data(folder), {"train.png: no such file"});
    folder.put("train.png", sheet(12, 3));
    put_mnist(folder);
    const Dataset data = load_dataset(folder.path);
    says(data.what, {"sheets in "});
    REQUIRE((data.train.count == 1200 && data.train.pixels == 9));
    CHECK(data.test.label == std::vector<uint8_t>(100, 0));
    int wrong = 0;
    for (int i = 0; i < 1200; i++) wrong += data.train.label[i] != i / 100 % 10;
    for (int i = 0; i < 10800; i++)
      wrong += data.train.pixel[i] != uint8_t(i / 900 * 3 + i / 9 % 100 + i % 9 / 3 * 7 + i % 3);
    CHECK(wrong == 0);
    folder.put("train.png", sheet(1, 1));
    const auto read = [&](const string& bytes) {
      folder.put("test.png", bytes);
      return error_of_data(folder);
    };
    for (const string& bytes :
         {zeros(9), png(99, 1, zeros(600)), png(250, 2, zeros(600)), png(200, 3, zeros(600)), png(65500, 65500, "x")})
      says(read(bytes), {"test.png: "});
    damage(sheet(1, 1), 24, 4, read);  // 24: the signature, width and height
  }
  TEST_CASE("MNIST's files, by any of their names") {
    const Folder folder;
    says(error_of([] { load_dataset("no"); }), {"no: ", "make mnist", "make digits"});
    says(error_of_data(folder), {"train.png", "train-images", "make mnist", "make digits"});
    const string train = "train-images.idx3-ubyte", good = images(1, 2, 2, "wxyz");
    folder.put(train, "");
    says(error_of_data(folder), {"train-labels", "make mnist"});
    put_mnist(folder);
    const Dataset data = load_dataset(folder.path);
    CHECK(data.train.count == 3);
    CHECK(string(data.train.pixel.begin(), data.train.pixel.end()) == "abcdefghijkl");
    CHECK(data.train.label == std::vector<uint8_t>{0, 9, 5});
    CHECK(string(data.test.pixel.begin(), data.test.pixel.end()) == "wxyz");
    const auto with = [&](const string& name, const string& bytes) {
      put_mnist(folder);
      folder.put(name, bytes);
      return error_of_data(folder);
    };
    says(with(test_labels, labels({10})), {test_labels, "10", "0 to 9"});
    says(with(test_labels, labels({1, 2})), {"2 labels", "1 images"});
    says(with(test_labels, good), {test_labels, "idx"});
    says(with(train, images(769546, 494770, 48448661, "abcd")), {train, "4 follow"});  // 2^64 + 4 bytes
    says(with(train, big(0xd03) + images(3, 2, 2, zeros(48)).substr(4)), {train, "float"});
    says(with(train, "\x1f\x8b\x08"), {train, "gunzip"});
  }
}

TEST_SUITE("checkpoints") {
  TEST_CASE("what is written comes back, bit for bit") {
    const Folder folder;
    const string path = folder.file("m"), special = little(0x7fc0123480000001, 8) + little(0xff8000010001ffff, 8);
    Foreign file;
    file.add("0.weight", "F32", "1,4", special);
    file.add("0.bias", "F32", "1", bytes_of({-2}));
    string header = R"({"__metadata__":{"a":"1","mp.state":"2"},)" + file.header + "}";
    header.resize((header.size() + 7) / 8 * 8, ' ');
    std::vector<float> value(4);
    memcpy(value.data(), special.data(), 16);
    write_safetensors(path, {{{"mp.state", "2"}, {"a", "1"}}, {{"0.weight", {1, 4}, value}, {"0.bias", {1}, {-2}}}});
    CHECK(folder.get("m") == tensors(header, file.data));
    write_safetensors(path, read_safetensors(path));
    CHECK(folder.get("m") == tensors(header, file.data));
  }
  TEST_CASE("files of other programs: types, order, white space, escapes, what is no weight") {
    const Folder folder;
    const string header = R"( { "b" : {"data_offsets":[8,14],"dtype":"BF16","shape":[3]} , "\ud83d\"}":
        {"dtype":"F64","shape":[],"data_offsets":[0,8]},"h":{"dtype":"F16","shape":[ 2 , 1 ],"data_offsets":[14,18]},
        "n":{"dtype":"F8_E5M2","shape":[0,3],"data_offsets":[18,18]},"i":{"dtype":"I16","shape":[1],"data_offsets":[18,20]},
        "__metadata__":{"\\\"":"\u00e9\n{\"loss\": [1, 2]}","loss":"0.0312"}} )";
    folder.put("m", tensors(header, zeros(8) + little(0x4049bf807f80, 6) + little(0x80013c00, 6)));
    const SafeTensors file = read_safetensors(folder.file("m"));
    CHECK(file.metadata.at("loss") == "0.0312");
    REQUIRE(file.tensors.size() == 2);
    CHECK(file.tensors[0].name == "b");
    CHECK(file.tensors[0].value == std::vector<float>{INFINITY, -1, 3.140625f});
    CHECK(file.tensors[1].shape == std::vector<int64_t>{2, 1});
    CHECK(file.tensors[1].value == std::vector<float>{1, -0x1p-24f});
  }
  TEST_CASE("what is no safetensors file is refused") {
    const Folder folder;
    const auto read = [&](const string& bytes) {
      folder.put("m", bytes);
      return error_of([&] { read_safetensors(folder.file("m")); });
    };
    const auto read_header = [&](const string& inner) { return read(tensors("{" + inner + "}", "12345678")); };
    for (const string lie : {"2 0,8,8", "-2 0,8", "2e0 0,8", "9223372036854775808 0,8", "3 0,12", "2 8,0", "1 0,4",
                             "4294967296,4294967296 0,8"})
      says(read_header(entry("x", "F32", split(lie)[0], split(lie)[1])), {"/m: "});
    const string x = entry("x", "F32", "2", "0,8"), number = R"("__metadata__":{"k":1},)";
    for (const string& inner :
         {R"("x":{"dtype":"F32"})" + zeros(0), "\"x\"" + zeros(0), "\"x\\" + zeros(0), x + "}0", number + x})
      says(read_header(inner), {"/m: "});
    for (const string type : {"F64", "F8_E4M3"}) says(read_header(entry("x", type, "8", "0,8")), {"x", type});
    says(read("PK\x03\x04 and what else PyTorch writes"), {"not a safetensors file"});
    damage(tensors(R"({"__metadata__":{"a":"1\n"},)" + x + "}", "12345678"), 8, 0, read);
  }
}

TEST_SUITE("command_line") {
  TEST_CASE("usage, help and version; each command has its own options") {
    const Workplace w;
    for (const string words : {"", "fly", "test", "test m n", "predict m", "train x"}) refuse(w.run(words), {}, 2);
    for (const string words : {"test m --lr", "predict m x --seed", "article --lr", "bench --lr", "compare --precision",
                               "compare --save", "histogram --log", "histogram --resume"})
      refuse(w.run(words + " 1"), {words.substr(words.find("--"))}, 2);
    const string help = succeed(w.run("--help")).out;
    says(help,
         split("--data [data] --layers [784,128,10] --precision fp32|fp16|bf16|auto [fp16] --loss-scale dynamic|N "
               "--update master|half|kahan|stochastic [master] --scale-init [65536] --growth-interval [2000] "
               "--loss xent|mse [xent] --epochs [15] --batch [64] --lr [0.3] --seed [1] --shuffle [on] "
               "--init --save --resume --log"));
    says(succeed(w.run("train --help")).out, {"--growth-interval"});
    std::istringstream lines(help);
    for (string line; std::getline(lines, line);) CHECK_MESSAGE(line.size() <= 80, line);
    CHECK(succeed(w.run("--version")).out.rfind("mp ", 0) == 0);
  }
  TEST_CASE("a malformed option: which, and what is allowed") {
    const Workplace w;
    for (const string wrong : {"lr 0 -1 nan inf 1x 1e400", "loss-scale 0 -1 nan inf word", "scale-init 0 -1 nan inf 1x",
                               "epochs 0 -1 1.5 1x nan 1e30", "batch 0 -1 1.5 1e30", "growth-interval 0 -1 1.5 1e30",
                               "seed -1 1.5 y", "layers 16 16,0,10 16,,10 16,8,10, 16,8x,10 16,1e10,10",
                               "precision fp8", "update adam", "loss l1", "shuffle no"}) {
      const Words words = split(wrong);
      for (size_t i = 1; i < words.size(); i++)
        refuse(w.train("--" + words[0] + " " + words[i]), {"--" + words[0] + " '" + words[i] + "'"}, 2);
    }
    says(w.train("--precision fp8").err, {"must be one of fp32|fp16|bf16|auto"});
    for (const string wrong :
         {"--speed 3", "--lr", "--save --log x", "--resume ''", "--precision fp32 --update half",
          "--precision auto --update kahan", "--precision fp32 --loss-scale dynamic", "--init m --resume m"})
      refuse(w.train(wrong), {split(wrong)[0]}, 2);
  }
  TEST_CASE("data that cannot be used") {
    const Workplace w;
    refuse(w.train("--data 'no\nwhere'"), {"no?where: "});
    refuse(w.train("--layers 784,8,10"), {"784,8,10", "layers 16,...,10"});
    refuse(w.train("--layers 16,8,9"), {"16,8,9", "layers 16,...,10"});
    refuse(w.train("--layers 16,100000,100000,10"), {"10000100000", "--layers"});
#if !defined(MP_ASAN) && !defined(MP_CUDA)  // they need more room than this
    refuse(w.train("--layers 16,10000000,10 --batch 1", "ulimit -v 300000;"), {"out of memory"});
#endif
    refuse(w.train("--batch 301"), {"--batch 301", "300 images"});
    for (const string options : {"--batch 300", "--layers 16,10"}) succeed(w.train(options));
    w.put(test_images, images(100, 3, 3, zeros(900)));
    refuse(w.train(""), {"layers 9,...,10"});
  }
}

TEST_SUITE("training") {
  TEST_CASE("the table, the log and mp test agree, and the scale follows GradScaler") {
    const Workplace w;
    const Outcome o =
        succeed(w.train("--batch 64 --epochs 5 --scale-init 1e9 --growth-interval 3 --save m --log log.csv"));
    says(o.out, {"\n16-8-10 · fp16, fp32 master, dynamic loss scale\n"});
    CHECK(o.out.find_first_of("\r\033") == string::npos);  // they are for terminals
    CHECK(w.train("--precision bf16").out.find("dynamic") == string::npos);
    const auto rows = table_of(o);
    const auto steps = log_of(w);
    REQUIRE((rows.size() == 5 && steps.size() == 20));  // 300 images: four batches of 64, some left out
    CHECK((steps[0][4] == 1 && steps[19][2] < steps[0][2]));
    double scale = 1e9, tracker = 0, skipped = 0, sum = 0;
    for (int i = 0; i < 20; i++) {
      CHECK((steps[i][1] == i / 4 + 1 && std::fabs(steps[i][3] / scale - 1) < 1e-8));  // nine digits
      const bool skip = steps[i][4] != 0;
      skipped += skip;
      tracker = skip ? 0 : tracker + 1;
      if (skip) scale /= 2;
      if (tracker == 3) {
        scale *= 2;
        tracker = 0;
      }
      sum += steps[i][2];
      if (i % 4 != 3) continue;
      const auto& row = rows[i / 4];
      CHECK((row[EPOCH] == i / 4 + 1 && row[SKIPPED] == skipped && row[RATE] > 0 && row[SECONDS] >= 0));
      CHECK((std::fabs(row[LOSS] - sum / 4) < 0.6e-4 && std::fabs(row[SCALE] / scale - 1) < 1e-5));  // four decimals
      sum = 0;
    }
    const string accuracy = text("\ntest accuracy %.2f%%\n", rows[4][ACCURACY]);
    const Outcome tested = succeed(w.test("m"));
    CHECK((last_line(o.out) == accuracy && last_line(tested.out) == accuracy));
    const auto digits = rows_of(11, tested.out);
    REQUIRE(digits.size() == 10);
    double right = 0;
    for (int i = 0; i < 10; i++) right += digits[i][i + 1];
    CHECK(right == rows[4][ACCURACY]);
  }
  TEST_CASE("the log may be any file, device or pipe, and loses no row") {
    const Workplace w;
    succeed(w.train("--save m --log log.csv"));
    const auto rows = rows_of(5, w.get("log.csv"));
    succeed(w.train("--log /dev/null"));
    const Outcome o = succeed(w.train("--log /dev/stdout"));  // a file, which has the table, too
    CHECK((rows_of(5, o.out) == rows && table_of(o).size() == 2));
    CHECK(o.out.find('\0') == string::npos);
    const Outcome more = w.resume("m --epochs 3 --log /dev/stdout");
    says(more.out, {"16-8-10", "test accuracy"});
    CHECK((rows_of(5, more.out).size() == 30 && table_of(more).size() == 1));
    succeed(w.train("--log /dev/stdout | cat >piped"));
    CHECK(rows_of(5, w.get("piped")) == rows);
    succeed(w.train("--log /dev/fd/3 3>third"));
    CHECK(rows_of(5, w.get("third")) == rows);
  }
  TEST_CASE("images come in the order of the file, or shuffled anew in each epoch") {
    const Workplace w(30);
    string file = w.get(train_images);
    for (const int black : {0, 1, 7}) file.replace(16 + 16 * black, 16, zeros(16));  // all logits are 0
    w.put(train_images, file);
    const auto losses = [&](const string& shuffle) {  // of each image; the weights stand still
      succeed(w.train("--batch 1 --lr 1e-30 --loss-scale 1 --log log.csv --shuffle " + shuffle));
      std::vector<Row> epoch(2);
      for (const auto& step : log_of(w)) epoch.at(int(step[1]) - 1).push_back(step[2]);
      return epoch;
    };
    auto plain = losses("off"), mixed = losses("on");
    REQUIRE(plain[0].size() == 30);
    for (int i = 0; i < 30; i++) CHECK((std::fabs(plain[0][i] - std::log(10)) < 1e-6) == (i < 2 || i == 7));
    CHECK(plain[0] == plain[1]);
    CHECK((mixed[0] != mixed[1] && mixed[0] != plain[0]));
    for (auto* epoch : {&plain[0], &mixed[0], &mixed[1]}) std::sort(epoch->begin(), epoch->end());
    CHECK((mixed[0] == plain[0] && mixed[1] == plain[0]));  // every image once
  }
  TEST_CASE("where no loss scale can help, a dynamic one stops and says why, a fixed one goes on") {
    const Workplace w;
    succeed(w.train("--save m"));
    const string before = w.get("m");
    refuse(w.resume("m --epochs 4 --lr 1e4"), {"step 6", "epoch 3", " of layer ", "--lr", "bf16"});
    CHECK((w.get("m") == before));
    const Outcome fixed = succeed(w.train("--epochs 3 --lr 1e4 --loss-scale 0.25 --log log.csv"));
    double skipped = 0;
    for (const auto& step : log_of(w)) skipped += step[4];
    const auto rows = table_of(fixed);
    CHECK((rows.size() == 3 && skipped > 50 && rows[2][SKIPPED] == skipped));
    CHECK(succeed(w.train("")).out.find("Skipped steps") == string::npos);
    for (const string hopeless : {"--loss-scale 1e30", "--precision fp32 --lr 1e20"})
      says(w.train(hopeless).out, {"Skipped steps"});
  }
  TEST_CASE("MP_GEMM picks a rung of the ladder, and every rung learns the same") {
    const Workplace w;
    double first = 0;
    for (const string rung : {"naive", "tiled", "mma"})
      for (const string precision : {"fp32", "fp16"}) {  // fp32 has no tensor cores
        succeed(w.train("--log log.csv --precision " + precision, "MP_GEMM=" + rung));
        const double loss = log_of(w).at(59)[2];
        if (first == 0) first = loss;
        // what 60 steps make of sums in another order, or of numbers with 11 bits
        CHECK(std::fabs(loss - first) <= 60 * 0x1p-11 * first);
      }
    refuse(w.train("", "MP_GEMM=cublas"), {"MP_GEMM=cublas", "naive, tiled or mma"});
  }
  TEST_CASE("the article's network: a line as it stands, a parabola with ReLU") {
    const Outcome o = succeed(Workplace().run("article"));
    const auto rows = rows_of(3, o.out);
    REQUIRE((!rows.empty() && rows.back()[0] == 100));
    CHECK(rows.back()[1] == doctest::Approx((1. / 5 - 1. / 9) / 2).epsilon(0.03));  // E1 of the best line, y = 1/3
    CHECK(rows.back()[2] < rows.back()[1] / 10);
  }
  TEST_CASE("the digits in data/ are learned, and photographs of others are read") {
#if defined(MP_ASAN)
    const string epochs = " --epochs 1";  // it is slow
    const int least = 85, photographs = 5;
#else
    const string epochs;
    const int least = 96, photographs = 10;
#endif
    const Workplace w;
    const Outcome o = succeed(w.run("train --save m --data " + fs::absolute("data").string() + epochs));
    CHECK_MESSAGE((!table_of(o).empty() && table_of(o).back()[ACCURACY] >= least + 0.5), o.out);
    string photos;  // their names begin with the digit that they show
    for (const auto& file : fs::directory_iterator("data/photos")) photos += " " + fs::absolute(file.path()).string();
    const Outcome read = succeed(w.run("predict m" + photos));
    int right = 0;
    for (const char* at = read.out.c_str(); (at = strstr(at, "/photos/")); at++) right += at[8] == strchr(at, ':')[2];
    CHECK_MESSAGE(right >= photographs, read.out);
    // A camera held upside down says so in EXIF: a 9 is a 6 then.
    const auto nine = read_file("data/photos/9_in_the_dark.jpg");
    const string exif = "\xff\xd8\xff\xe1" + zeros(1) + "\x22" + "Exif" + zeros(2) + exif_of(3);
    w.put("turned.jpg", exif + string(nine.begin() + 2, nine.end()));
    if (photographs == 10) says(w.run("predict m turned.jpg").out, {"turned.jpg: 6"});
  }
}

TEST_SUITE("checkpoints") {
  TEST_CASE("the same seed gives the same bytes, whatever the threads and their order") {
    const Workplace w;
    const auto bytes = [&](const string& seed, const string& before) {
      succeed(w.train("--layers 16,130,10 --batch 100 --update stochastic --save m --seed " + seed, before));
      return w.get("m");
    };
    const string one = bytes("1", "");
    for (const string setting :
         {"", "MP_THREADS=1", "MP_THREADS=2", "MP_ORDER=forward", "MP_ORDER=backward", "MP_ORDER=7"})
      CHECK_MESSAGE((bytes("1", setting) == one), setting);
    CHECK((bytes("3000000000", "") != bytes("4000000000", "")));
  }
  TEST_CASE("2 epochs and 3 more are 5 in one go, byte for byte, in every mode") {
    for (const string mode :
         {"--growth-interval 7", "--update kahan", "--update stochastic", "--update half --lr 0.01", "--precision fp32",
          "--precision bf16 --update kahan --lr 0.01", "--precision=bf16 --loss-scale=dynamic",
          "--loss-scale 512 --loss mse", "--shuffle off --seed 3000000000"}) {
      INFO(mode);
      const Workplace w;
      succeed(w.train(mode + " --epochs 5 --save once --log log.csv"));
      const string log = w.get("log.csv");
      succeed(w.train(mode + " --epochs 2 --save m --log log.csv"));
      w.put("log.csv", w.get("log.csv") + "60,3,9,9,0\n6");  // as a kill between log and checkpoint leaves it
      const Outcome o = succeed(w.resume("m --epochs 5 --log log.csv"));
      CHECK((table_of(o).size() == 3 && w.get("log.csv") == log));
      CHECK((w.get("m") == w.get("once")));
      const Outcome finished = succeed(w.resume("m --save copy"));
      CHECK((table_of(finished).empty() && last_line(finished.out) == last_line(o.out)));
      CHECK((w.get("copy") == w.get("m")));
    }
  }
  TEST_CASE("killed at any moment and resumed: as if never stopped") {
    const Workplace w(1000);
    const string options = "--batch 1 --epochs 6 --lr 0.02 --update kahan --growth-interval 300 --log log.csv --save ";
    succeed(w.train(options + "want"));
    const string want = w.get("want"), log = w.get("log.csv");
    Random random{1};
    int killed = 0;
    for (int i = 0; i < 12; i++) {
      const size_t length = random.bits() % log.size();
      for (const char* name : {"m", "log.csv"}) fs::remove(w.file(name));
      const pid_t child = w.start("train --data . --layers 16,8,10 " + options + "m");
      siginfo_t ended = {};
      for (unsigned later = random.bits() >> 28;
           later > 0 && ended.si_pid == 0;) {  // as soon as the log is so long, or a little later
        later -= w.get("log.csv").size() > length;
        waitid(P_PID, id_t(child), &ended, WEXITED | WNOHANG | WNOWAIT);
      }
      kill(child, SIGKILL);
      killed += w.finish(child).status > 1000;
      if (w.get("m").empty()) continue;  // its first checkpoint was not there
      succeed(w.resume("m --log log.csv"));
      CHECK((w.get("m") == want && w.get("log.csv") == log));
    }
    CHECK(killed >= 3);
  }
  TEST_CASE("what a file remembers, and options beside --resume that override it") {
    const Workplace w;
    succeed(w.train("--save m --batch 100"));
    const std::map<string, string> want = {
        {"mp.options",
         "--layers 16,8,10 --precision fp16 --update master --loss-scale dynamic --scale-init 65536 "
         "--growth-interval 2000 --loss xent --epochs 2 --batch 100 --lr 0.3 --seed 1 --shuffle on"},
        {"mp.state", "epoch 2 step 6 scale 65536 tracker 6 skipped 0 map 2,2"}};
    CHECK(w.model("m").metadata == want);
    const string before = w.get("m");
    for (const string option : {"--loss-scale 128", "--precision fp32"}) {
      fs::remove(w.file("log.csv"));
      succeed(w.resume("m --save a --epochs 3 --log log.csv --lr 0.05 " + option));
      for (const auto& step : log_of(w, 6)) CHECK(step[3] == (option.back() == '8' ? 128 : 1));
      says(w.model("a").metadata.at("mp.options"), {"--batch 100", "--lr 0.05", option});
    }
    refuse(w.resume("m --layers 16,9,10"), {"m: ", "16,8,10", "16,9,10"});
    refuse(w.resume("m --precision fp32 --update half"), {"--update half", "fp32"}, 2);
    fs::create_symlink("m", w.file("link"));
    refuse(w.resume("m --epochs 3 --log m"), {"--log and --save"}, 2);
    w.put("notes", "one line");
    for (const string log : {"link", "notes"}) refuse(w.resume("m --epochs 3 --log " + log), {log + ": ", "no log"});
    CHECK(w.get("notes") == "one line");
    CHECK((w.get("m") == before));
    // The scale goes on where it was, unless it is told anew.
    succeed(
        w.resume("m --save a --epochs 3 --precision fp16 --loss-scale dynamic --growth-interval 7 --scale-init 65536"));
    says(w.model("a").metadata.at("mp.state"), {"scale 131072 tracker 2 "});
  }
  TEST_CASE("damaged mp.options, mp.state or compensation") {
    const Workplace w;
    succeed(w.train("--save m --update kahan"));
    SafeTensors model = w.model("m");
    // Resumes from the file with another value behind that name.
    const auto with = [&](const string& key, const string& name, const string& value) {
      SafeTensors file = model;
      string& words = file.metadata.at("mp." + key);
      const size_t at = words.find(name) + name.size() + 1;
      words.replace(at, words.find(' ', at) - at, value);
      write_safetensors(w.file("c"), file);
      return w.resume("c --epochs 3");
    };
    succeed(with("options", "seed", "2"));
    for (const string wrong :
         {"options lr 0 -1 x", "options seed y", "options update half,half", "options shuffle --save",
          "options precision fp64 fp32", "state epoch x 1.5 -1", "state step 1e30 -1", "state scale 0 nan inf",
          "state tracker -1 2147483647", "state map 2 2,2,2 x"}) {
      const Words words = split(wrong);
      for (size_t i = 2; i < words.size(); i++) refuse(with(words[0], words[1], words[i]), {"c: ", "damaged"});
    }
    SavedTensor& compensation = model.tensors.at(2);
    compensation.value.pop_back();
    compensation.shape[0]--;
    refuse(with("options", "seed", "2"), {"c: ", "0.compensation"});
  }
  TEST_CASE("files of other programs: every float is used, or its tensor is named") {
    const Workplace w;
    const Outcome o = succeed(w.train("--layers 16,12,12,12,10 --epochs 5 --precision fp32 --lr 0.1 --save m"));
    CHECK(table_of(o).at(4)[ACCURACY] > 80);
    SafeTensors m = w.model("m");
    const string want = last_line(o.out), fc = "fc1 fc2 fc3 fc4";
    const auto theirs = [&](const string& names, int biases = 4) {  // the last layer first
      Foreign file;
      for (int l = 3; l >= 0; l--) {
        const string stem = split(names)[l], out = l == 3 ? "10" : "12", in = l == 0 ? ",16" : ",12";
        if (l < biases) file.add(stem + ".bias", "F32", out, bytes_of(m.tensors.at(2 * l + 1).value));
        file.add(stem + ".weight", "F32", out + in, bytes_of(m.tensors.at(2 * l).value));
      }
      return file;
    };
    const auto tested = [&](const Foreign& file) {
      w.put("theirs", file.bytes());
      return w.test("theirs");
    };
    for (const string names : {"fc1 fc2 fc10 out", "inp.0 mid.0.1 mid.1.1 out.2", "fc fc2 fc10 out", "0 2 4 16",
                               R"(r\u00e9\\1 r\u00e9\\2 r\u00e9\\3 r\u00e9\\\"{4)"})
      CHECK_MESSAGE(last_line(tested(theirs(names)).out) == want, names);
    Foreign more = theirs(fc);  // another's metadata, whole numbers, scalars, an empty tensor
    more.header = R"("__metadata__":{"loss":"0.0312","lr":"0.001","precision":"int8"},)" + more.header;
    for (const string type : {"I64", "F64"}) more.add("step" + type, type, "", zeros(8));
    for (const string type : {"BOOL", "I8"}) more.add(type + ".weight", type, "4,2", zeros(8));
    more.add("fc0.weight", "BF16", "0,16", "");
    CHECK(last_line(tested(more).out) == want);
    Foreign biasless = theirs(fc, 3);  // bias=False counts as zeros
    const Outcome without = succeed(tested(biasless));
    biasless.add("fc4.bias", "F32", "10", zeros(40));
    CHECK(without.out == tested(biasless).out);
    for (const string unused : {"bn.running_mean 12", "norm.weight 12", "conv.weight 4,1,1,3", "fc2.lora_A 1,12",
                                "z.bias 12", "fc1.lora_A.weight 1,12", "fc2.lora_A.weight 1,12", "z.weight 1,12"}) {
      Foreign file = theirs(fc);
      file.add(split(unused)[0], "F32", split(unused)[1], zeros(48));
      if (unused[2] == '2') file.add("fc2.lora_B.weight", "F32", "12,1", zeros(48));  // both fit behind fc2
      refuse(tested(file), {"theirs: ", split(unused)[0]});
    }
    // An older mp's file, without mp.options, counts as another program's: fp32, and its compensation is passed over.
    m.metadata = {{"epoch", "1"}, {"step", "30"}, {"precision", "bf16"}, {"layers", "16,8,10"}};
    m.tensors.push_back({"0.compensation", {204}, std::vector<float>(204, 1)});
    write_safetensors(w.file("old"), m);
    says(w.test("old").out, {"16-12-12-12-10 · fp32", want});
    refuse(w.resume("old"), {"old: holds weights but no training state", "older mp", "--init"});
  }
  TEST_CASE("--init takes the weights, and nothing else") {
    const Workplace w;
    succeed(w.train("--save m --epochs 1 --lr 0.1 --seed 5"));
    SafeTensors file = w.model("m");
    file.metadata.clear();
    write_safetensors(w.file("theirs"), file);
    for (const string words : {"new", "a --init m", "b --init theirs"}) succeed(w.train("--save " + words));
    CHECK((w.get("a") == w.get("b") && w.get("a") != w.get("new")));
    CHECK(w.model("a").metadata == w.model("new").metadata);
    refuse(w.resume("theirs"), {"theirs: holds weights but no training state", "--init"});
    refuse(w.train("--init nothing"), {"nothing: "});
    write_safetensors(w.file("a"), {});
    refuse(w.train("--init a"), {"a: holds no layer"});
  }
  TEST_CASE("where nothing can be written, mp fails before training if it can, and the old file stays") {
    const Workplace w;
    succeed(w.train("--save m --layers 16,40,10"));
    const string before = w.get("m");
    CHECK(w.train("--save m --layers 16,40,10 --seed 2", "ulimit -f 4;").status != 0);  // fewer than it has
    CHECK((w.get("m") == before));
    REQUIRE(mkfifo(w.file("pipe").c_str(), 0600) == 0);
    for (const string words : {"--save no/x", "--log no/x", "--save .", "--log .", "--log /dev/full", "--save pipe"}) {
      const Outcome o = w.train(words);
      refuse(o, {split(words)[1] + ": "});
      CHECK_MESSAGE(table_of(o).empty(), "trained first: ", words);
    }
    CHECK(fs::is_fifo(w.file("pipe")));
    refuse(w.train(">/dev/full"), {"standard output", "No space left"});
    const int lock = open(w.file("m").c_str(), O_RDWR);
    REQUIRE(flock(lock, LOCK_EX) == 0);
    succeed(w.train("--save m"));  // mp asks for no locks, which some file systems have not
    close(lock);
  }
}

TEST_SUITE("dynamic_precision") {
  TEST_CASE("exponents: what fp16 makes zero, subnormal, normal and infinite") {
    const Tensor t = make_tensor(1, 9, Type::fp32);
    to_device({0, 0x1p-24f, -0x1p-23f, 0x1.ff8p-13f, 0x1p-12f, 0x1.ffcp17f, 0x1.ffep17f, float_nan, -float_inf}, t);
    Exponents seen;
    seen.add(t, 0.25);
    CHECK((seen.zeros == 1 && seen.overflow == 3 && seen.nonzero() == 8));
    CHECK((seen.between(Exponents::lowest, -25) == 1 && seen.between(-25, -14) == 2 && seen.between(-14, 16) == 2));
  }
  static string map_of(const Workplace& w, const string& model) {
    const string state = w.model(model).metadata.at("mp.state");
    return state.substr(state.find("map "));
  }
  TEST_CASE("with ordinary settings nothing moves, and the weights are those of fp16") {
    const Workplace w;
    succeed(w.train("--save a --precision fp16 --epochs 4"));
    const Outcome o = succeed(w.train("--save b --precision auto --epochs 4"));
    const SafeTensors a = w.model("a"), b = w.model("b");
    for (size_t i = 0; i < a.tensors.size(); i++) CHECK(a.tensors[i].value == b.tensors[i].value);
    CHECK(map_of(w, "b") == "map 2,2");
    says(o.out, {"16 16", "100.0%"});
  }
  TEST_CASE("layers move before the first step, come back when the scale does, and resume to the same bytes") {
    const Workplace w;
    const string mode = "--precision auto --loss-scale 1e-6 ";
    const Outcome o = succeed(w.train(mode + "--epochs 5 --save once"));
    says(o.out, {"layer 1 to fp32: ", "layer 2 to fp32: ", "weight gradients would be 0", "32 32"});
    CHECK(o.out.find("to fp32") < o.out.find("\n    1 "));
    CHECK(map_of(w, "once") == "map 0,0");
    succeed(w.train(mode + "--epochs 2 --save m"));
    succeed(w.resume("m --epochs 5"));
    CHECK((w.get("m") == w.get("once")));
    succeed(w.resume("m --epochs 6 --loss-scale dynamic"));  // one clean probe, which the checkpoint remembers
    CHECK(map_of(w, "m") == "map 1,1");
    says(w.resume("m --epochs 7").out, {"layer 1 back to fp16", "layer 2 back to fp16", "16 16"});
    CHECK(map_of(w, "m") == "map 2,2");
  }
  TEST_CASE("only the layer that suffers moves") {
    const Workplace w;
    succeed(w.train("--layers 16,12,12,12,10 --epochs 3 --lr 0.1 --save m"));
    SafeTensors file = w.model("m");
    file.metadata.clear();
    for (const int smaller : {2, 3})  // layer 2 makes layer 3's input small, whose weights undo that
      for (float& x : file.tensors.at(smaller).value) x *= 0x1p-12f;
    for (float& x : file.tensors.at(4).value) x *= 0x1p12f;
    write_safetensors(w.file("suffering"), file);
    const string options = "--layers 16,12,12,12,10 --init suffering --precision auto --loss-scale 0.5 --lr 1e-9";
    const Outcome o = succeed(w.train(options + " --epochs 1 --save part"));
    says(o.out, {"layer 3 to fp32: ", "16 16 32 16"});
    says(w.test("part").out, {"auto", last_line(o.out)});  // in the types that it was trained in
    succeed(w.train(options + " --epochs 2 --save whole"));
    CHECK((w.get("part") != w.get("whole")));
    says(w.resume("part --epochs 2").out, {"16 16 32 16"});  // the map, too, is as it was left
    CHECK(map_of(w, "whole") == "map 2,2,0,2");
    CHECK((w.get("part") == w.get("whole")));
  }
}

TEST_SUITE("histogram") {
  TEST_CASE("a row a tensor, without the scale and with it") {
    const Workplace w;
    const Outcome o = succeed(w.run("histogram --data . --layers 16,8,10 --batch 10"));
    says(o.out, {"layer 1, a: ", "layer 1, delta: ", "layer 2, dW, times 65536: ", "▁"});
    succeed(w.train("--save m"));
    succeed(w.run("histogram --init m --data ."));
  }
}

TEST_SUITE("compare") {
  TEST_CASE("a row a technique") {
    const Workplace w;
    const Outcome o = succeed(w.run("compare --data . --layers 16,8,10 --batch 10 --epochs 1"));
    says(o.out, {"fp32", "no loss scaling", "Kahan", "stochastic", "bf16, no master", "auto"});
  }
}

TEST_SUITE("predict") {
  static int ink(int x, int y) {  // a seven in 20 x 20 pixels
    return (y >= 3 && y < 6 && x >= 5 && x < 16) || (y >= 6 && y < 17 && x >= 10 && x < 13);
  }
  // wide x wide pixels, each pixel(ink): the seven, `times` as large, its corner at (left, top)
  template <class F> static string picture(F pixel, int wide = 20, int times = 1, int left = 0, int top = 0) {
    string bytes;
    for (int y = -top; y < wide - top; y++)
      for (int x = -left; x < wide - left; x++) bytes += pixel(x < 0 || y < 0 ? 0 : ink(x / times, y / times));
    return bytes;
  }
  static string grey(int i) { return string(1, char(220 - 200 * i)); }
  // A network that knows nothing: it answers 0 for every picture, and the drawing below shows what it saw.
  static string ignorant(int in, char byte = '\0') {
    Foreign file;
    file.add("0.weight", "F32", text("10,%d", in), string(size_t(40 * in), byte));
    return file.bytes();
  }
  TEST_CASE("in whatever way a seven is drawn and held, the network sees the same") {
    const Workplace w;
    w.put("m", ignorant(784));
    const auto light = [](int i) { return string(1, char(30 + 200 * i)); };
    const auto black = [](int i) { return zeros(1) + string(1, char(255 * i)); };
    const auto white = [](int i) { return "\xff" + string(1, char(255 * i)); };
    Words pictures = {png(20, 20, picture(grey)),
                      png(20, 20, picture(light)),
                      png(20, 20, picture(black), 4),
                      png(20, 20, picture(white), 4),
                      png(50, 50, picture(grey, 50, 1, 29, 3)),
                      png(60, 60, picture(grey, 60, 3))};
    for (int way = 1; way <= 8; way++) {  // EXIF's; from 5 on rows and columns are exchanged
      string turned;
      for (int i = 0; i < 400; i++) {
        const int across = way < 5 ? i % 20 : i / 20, down = way < 5 ? i / 20 : i % 20;
        turned += grey(ink(way & 2 ? 19 - across : across, (way - 1) & 2 ? 19 - down : down));
      }
      pictures.push_back(png(20, 20, turned, 0, chunk("eXIf", exif_of(way))));
    }
    string want;
    for (const string& bytes : pictures) {
      w.put("x.png", bytes);
      const Outcome o = succeed(w.run("predict m x.png"));
      if (want.empty()) want = o.out;
      CHECK_MESSAGE(o.out == want, o.out, want);
    }
    CHECK(std::count(want.begin(), want.end(), '\n') == 15);
    says(want, {"x.png: 0 (10.0%)\n", "█"});
  }
  TEST_CASE("nothing else in the picture changes the answer; two digits are refused") {
    const Workplace w;
    w.put("m", ignorant(784));
    const auto seen = [&](const string& pixels) {
      w.put("x.png", png(120, 120, pixels));
      return w.run("predict m x.png");
    };
    string speck = picture(grey, 120, 3, 30, 30), edge = speck, frame = speck, two = speck;
    const string want = succeed(seen(speck)).out;
    speck.replace(242, 3, 3, '\0');
    for (int i = 0; i < 120; i++) {
      edge.replace(i * 120, 6, 6, '\0');
      if (i > 35 && i < 85) two.replace(i * 120 + 112, 3, 3, '\0');
      for (const int at : {600 + i, 13680 + i, i * 120 + 5, i * 120 + 114})
        if (i > 4 && i < 115) frame[at] = '\0';
    }
    for (const string& pixels : {speck, edge, frame}) CHECK(succeed(seen(pixels)).out == want);
    refuse(seen(two), {"x.png: ", "more than one digit"});
    string hairline = picture(grey, 240, 1, 240, 240), mark = hairline;
    for (int i = 5; i < 235; i++) hairline[i * 240 + 120] = '\0';
    for (int i = 0; i < 12; i++) mark.replace(i * 240, 12, 12, '\0');
    w.put("x.png", png(240, 240, hairline));
    says(succeed(w.run("predict m x.png")).out, {"▓"});
    w.put("x.png", png(240, 240, mark));
    refuse(w.run("predict m x.png"), {"x.png: ", "blank"});
    const string raw = picture([](int i) { return string(1, char(250 - 200 * i)); }, 28);  // is the input as it is
    w.put("x.png", png(28, 28, raw));
    says(succeed(w.run("predict m x.png")).out, {"x.png: 0 (10.0%)\n" + string(30, ' ') + "\n       ▒"});
  }
  TEST_CASE("a line for each picture that cannot be read, and an answer for the others") {
    const Workplace w;
    w.put("m", ignorant(784));
    w.put("oblong", ignorant(783));
    w.put("nan", ignorant(784, '\xff'));
    w.put("good.png", png(20, 20, picture(grey)));
    // stb_image copies a JPEG's Huffman table of any length into an array of 256
    const string huffman = "\xff\xd8\xff\xc4" + big(19 + 4080).substr(2) + zeros(1) + string(16, '\xff') + zeros(4080);
    const std::pair<string, string> bad[] = {{"PNG or JPEG", "hello"},
                                             {"", ""},
                                             {"blank", png(9, 9, string(81, 'x'))},
                                             {"", png(9, 9, "x")},
                                             {"100 million", png(10001, 10000, "x")},
                                             {"5000 x 5000", png(5000, 5000, "x")},
                                             {"Huffman", huffman},
                                             {"Huffman", "\xff\xff" + huffman}};
    for (const auto& [words, bytes] : bad) {
      w.put("bad.png", bytes);
      const Outcome o = w.run("predict m good.png bad.png good.png");
      refuse(o, {"bad.png: ", words});
      CHECK(o.out.find("good.png: 0 (10.0%)") < o.out.rfind("good.png: 0 (10.0%)"));
    }
    refuse(w.run("predict nan good.png"), {"good.png: ", "NaN"});
    refuse(w.run("predict oblong good.png"), {"oblong: ", "783", "square"});
    refuse(w.run("predict good.png good.png"), {"good.png: "});
  }
}

// `make fuzz` begins with these.
TEST_SUITE("fuzz") {
  TEST_CASE("seeds, into the folder MP_SEEDS" * doctest::skip()) {
    Foreign file;
    file.header = R"("__metadata__":{"mp.options":"--update kahan --lr 1","mp.state":"epoch 1 step 2"})";
    file.add("0.weight", "F32", "1,2", "12345678");
    file.add("0.bias", "BF16", "1", "90");
    const auto photo = read_file("data/photos/8_pale.jpg");
    const std::pair<string, string> seeds[] = {
        {"sheet", sheet(2, 3)},
        {"idx", images(3, 2, 2, "abcdefghijkl")},
        {"idx", labels({0, 9, 5})},
        {"safetensors", file.bytes()},
        {"options", "--data\nd\n--layers=4,2\n--lr\n.1\n--update\nkahan\n--seed=7\n--save\nm\n--log\nm"},
        {"picture", png(6, 3, string(36, '0'), 4, chunk("eXIf", exif_of(6)))},
        {"picture", {photo.begin(), photo.end()}}};
    for (const auto& [reader, input] : seeds) {
      const string folder = getenv("MP_SEEDS") + ("/" + reader);
      fs::create_directories(folder);
      write_file(folder + text("/seed-%zu", input.size()), input);
    }
  }
}
#endif
