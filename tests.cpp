// tests.cpp: the proofs of mp.cu. A suite for each region, named after it and in the same order, so that
// `build/tests --test-suite=E4` asks about one equation alone. What is right is worked out here a second time, in fp64,
// from IEEE 754, from the article's equations and from slopes: no code is asked what it should give.
//
// Comparisons are written so that NaN fails, and a tolerance says where it comes from. e = 2^-24 is the largest
// relative error of one fp32 operation.
#if defined(MP_FUZZ)
// ==== make fuzz: libFuzzer throws bytes at one reader, which may refuse them and do nothing else ====================
#include "mp.cu"

static const std::map<std::string, void (*)(const Bytes&)> readers = {
    {"sheet", [](const Bytes& b) { parse_sheet(b); }},
    {"idx",
     [](const Bytes& b) {
       std::vector<uint32_t> dimension(b.size() > 3 && b[3] == 1 ? 1 : 3);
       parse_idx(b, dimension);
     }},
    {"gz", [](const Bytes& b) { gunzip(b); }},
    {"safetensors",
     [](const Bytes& b) {
       const SafeTensors file = parse_safetensors(b);
       Options o;
       take_options(o, file, "file"), take_layers(o, file, "file");
     }},
    {"options",
     [](const Bytes& b) {  // a word a line
       std::istringstream lines(std::string(b.begin(), b.end()));
       std::vector<std::string> words;
       for (std::string command; std::getline(lines, command);) words.push_back(command);
       refuse_contradictions(parse("train", words));
     }},
    {"picture", [](const Bytes& b) {
       const Picture p = parse_picture(b);
       if (p.value.size() < 4096) as_mnist(p, 28);  // larger ones take long, and go the same way
     }}};

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* bytes, size_t size) {
  static const auto read = readers.at(getenv("MP_READER"));
  try {
    read(Bytes(bytes, bytes + size));
  } catch (const Error&) {}
  return 0;
}
#else
#define DOCTEST_CONFIG_IMPLEMENT_WITH_MAIN
#include <doctest/doctest.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
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
#include <tuple>
#include <utility>

#include "mp.h"

// ==== Words for all suites ===========================================================================================
static constexpr double e = 0x1p-24, infinite = HUGE_VAL;
static constexpr float float_inf = HUGE_VALF, float_nan = NAN;

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
  Type type;
  int digits, lowest;
  uint16_t (*from_float)(float);  // what is to be proved
  float (*to_float)(uint16_t);
  int infinity() const { return (3 - 2 * lowest) << (digits - 1); }
  uint16_t encode(double x, double (*whole)(double) = nearest) const {
    const int sign = std::signbit(x) ? 0x8000 : 0;
    if (!(std::fabs(x) < infinite)) return uint16_t(sign | (infinity() + std::isnan(x)));
    const int exponent = x == 0 ? lowest : std::max(std::ilogb(x), lowest);
    const int steps = int(whole(std::ldexp(std::fabs(x), digits - 1 - exponent)));  // a leading 1 adds to the exponent
    return uint16_t(sign | std::min(((exponent - lowest) << (digits - 1)) + steps, infinity()));
  }
  double decode(uint16_t bits) const {
    const int field = (bits & 0x7fff) >> (digits - 1), fraction = bits & ((1 << (digits - 1)) - 1);
    double x = std::ldexp(fraction + (field ? 1 << (digits - 1) : 0), std::max(field, 1) + lowest - digits);
    if (field == 3 - 2 * lowest) x = fraction ? NAN : infinite;
    return bits & 0x8000 ? -x : x;
  }
  double round(double x) const { return decode(encode(x)); }
  // Half the distance from |x|'s lower neighbour to its upper one: what one rounding changes at most
  double half_step(double x) const {
    return std::ldexp(1, (x == 0 ? lowest : std::max(std::ilogb(x), lowest)) - digits);
  }
};
static const Format half_format = {"half",
                                   Type::fp16,
                                   11,
                                   -14,
                                   [](float x) { return float_to_half(x).bits; },
                                   [](uint16_t b) { return half_to_float(half{b}); }};
static const Format bfloat16_format = {"bfloat16",
                                       Type::bf16,
                                       8,
                                       -126,
                                       [](float x) { return float_to_bfloat16(x).bits; },
                                       [](uint16_t b) { return bfloat16_to_float(bfloat16{b}); }};
static const Format* format_of(Type type) {  // nullptr: fp32, nothing is rounded
  return type == Type::fp16 ? &half_format : type == Type::bf16 ? &bfloat16_format : nullptr;
}
static const char* name_of(Type type) { return format_of(type) ? format_of(type)->name : "float"; }
static const std::vector<Type> types = {Type::fp32, Type::fp16, Type::bf16}, types_16 = {Type::fp16, Type::bf16};

// ---- The reporter of `make check-NAME`: a line a test, and of one that fails the first message, which a Tally wrote ----
struct ForStudents : doctest::IReporter {
  const doctest::TestCaseData* test = nullptr;
  std::string first;
  int failures = 0;
  explicit ForStudents(const doctest::ContextOptions&) {}
  void failed(const std::string& why) {
    if (!failures++) first = why;
  }
  void report_query(const doctest::QueryData&) override {}
  void test_run_start() override {}
  void test_run_end(const doctest::TestRunStats&) override {}
  void test_case_start(const doctest::TestCaseData& t) override { test = &t, failures = 0; }
  void test_case_reenter(const doctest::TestCaseData&) override {}
  void test_case_end(const doctest::CurrentTestCaseStats&) override {
    if (!test) return;  // after a crash it is called twice
    printf("  %-5s %s\n", failures ? "FAIL" : "ok", test->m_name);
    std::istringstream lines(first);
    for (std::string line; failures && std::getline(lines, line);) printf("          %s\n", line.c_str());
    if (failures > 1) printf("          and %d more checks of this test fail\n", failures - 1);
    fflush(stdout);  // what follows may never end
    test = nullptr;
  }
  void test_case_exception(const doctest::TestCaseException& e_) override {
    failed(std::string(e_.is_crash ? "crashed: " : "stopped: ") + e_.error_string.c_str());
    if (e_.is_crash) test_case_end({});
  }
  void subcase_start(const doctest::SubcaseSignature&) override {}
  void subcase_end() override {}
  void test_case_skipped(const doctest::TestCaseData&) override {}
  void log_message(const doctest::MessageData& m) override { failed(m.m_string.c_str()); }
  void log_assert(const doctest::AssertData& a) override {
    if (!a.m_failed) return;
    std::ostringstream why;
    for (int i = 0; i < get_num_active_contexts(); i++) get_active_contexts()[i]->stringify(&why), why << "\n";
    if (why.tellp() <= 0 || strchr(a.m_expr, ' '))  // a Tally's words say it all; of a step's number one asks what for
      why << a.m_file << ":" << a.m_line << ": " << a.m_expr << " is not so: " << a.m_decomp.c_str();
    if (a.m_threw) why << " it stopped: " << a.m_exception.c_str();
    failed(why.str());
  }
};
REGISTER_REPORTER("student", 1, ForStudents);

// ---- Tally: one property over many values, judged when it goes out of scope. It says how many fail, which is the
// smallest or first, and which usual mistake would do that. --------------------------------------------------------
struct Tally {
  std::string property;
  std::vector<std::pair<double, const char*>> known = {};  // a factor that a usual mistake leaves in the result
  long total = 0, wrong = 0, cut = 0, away = 0, zero = 0;
  double smallest = infinite, least_ratio = infinite, largest_ratio = -infinite;
  std::string first = {};
  std::map<std::string, long> fits = {};  // how many wrong results are what a usual mistake would give
  long nan = 0;
  explicit Tally(std::string what, std::vector<std::pair<double, const char*>> factors = {})
      : property(std::move(what)), known(std::move(factors)) {}
  Tally(const Tally&) = delete;
  ~Tally() noexcept(false) {
    const bool every_value_is_right = total > 0 && wrong == 0;
    CHECK_MESSAGE(every_value_is_right, words());
  }
  void check(bool good, double size, const std::string& failure) {
    total++, wrong += !good;
    if (!good && size < smallest) smallest = size, first = failure;
  }
  void rounded(const Format& f, double x, uint16_t got) {  // is `got` x, rounded?
    const uint16_t want = f.encode(x);
    const bool good = std::isnan(x) ? std::isnan(f.decode(got)) : got == want;
    if (good) return check(true, 0, "");
    cut += got == f.encode(x, cut_off), away += got == f.encode(x, ties_away), zero += got == 0;
    const bool tie = std::fabs(f.decode(f.encode(x, cut_off)) - x) == f.half_step(x);
    check(false, std::fabs(x) < DBL_MAX ? std::fabs(x) : DBL_MAX,
          text("input  %.9g (0x%08x)%s\n got    0x%04x = %.9g\n want   0x%04x = %.9g", x, same_bits<uint32_t>(float(x)),
               tie ? ", halfway between two neighbours" : "", got, f.decode(got), want, f.decode(want)));
  }
  using Mistakes = std::vector<std::pair<const char*, double>>;  // what each would give instead of `want`
  void near(double got, double want, double tolerance, int row = 0, int col = 0, const Mistakes& mistakes = {}) {
    total++;
    if ((std::isnan(want) && std::isnan(got)) || got == want || std::fabs(got - want) <= tolerance) return;
    zero += got == 0, nan += std::isnan(got);
    for (auto& [mistake, value] : mistakes) fits[mistake] += got == value || std::fabs(got - value) <= tolerance;
    least_ratio = std::min(least_ratio, got / want), largest_ratio = std::max(largest_ratio, got / want);
    if (wrong++) return;
    first = text("[%d, %d]\n got    %.9g\n want   %.9g, to %.2g", row, col, got, want, tolerance);
  }
  std::string words() const {
    std::string s = text("%s: %ld of %ld wrong; the smallest or first:\n ", property.c_str(), wrong, total) + first;
    for (auto& [mistake, times] : fits)
      if (times == wrong) return s + "\n This is what comes of " + mistake + ".";
    if (zero == wrong) return s + "\n Every wrong result is 0: is something never written?";
    if (nan == wrong)
      return s +
             "\n All of them are NaN. NaN stands in the padding, below the last row, and in results not yet written:"
             "\n is a bound missing, are rows and columns exchanged, or is something never written?";
    if (cut > 0.9 * double(wrong)) return s + "\n This is what truncation gives: the dropped bits are ignored.";
    if (away == wrong) return s + "\n This is what rounding ties up gives: a tie goes to the even neighbour.";
    if (wrong == 1 || !std::isfinite(largest_ratio) ||
        !(largest_ratio - least_ratio <= 0.01 * std::fabs(largest_ratio)))
      return s;
    s += text("\n All of them are %.4g times what is wanted", largest_ratio);
    for (auto& [factor, mistake] : known)
      if (std::fabs(largest_ratio / factor - 1) < 0.01) s += text(": %s", mistake);
    return s;
  }
};

// ---- Matrices, and how they come into tensors -----------------------------------------------------------------------
struct Random {  // the same numbers on every machine
  uint64_t state;
  uint32_t bits() { return uint32_t((state = state * 6364136223846793005u + 1442695040888963407u) >> 32); }
  double number(double limit, double step) {  // in [-limit, limit], a float; a multiple of `step` if there is one
    const double x = (bits() * 0x1p-31 - 1) * limit;
    return step > 0 ? std::round(x / step) * step : double(float(x));
  }
};
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
  double mean() const {
    double sum = 0;
    for (double x : v) sum += x;
    return sum / double(v.size());
  }
};
static Matrix transposed(const Matrix& m) {
  Matrix t(m.cols, m.rows);
  for (int r = 0; r < m.rows; r++)
    for (int c = 0; c < m.cols; c++) t(c, r) = m(r, c);
  return t;
}
static Matrix operator*(const Matrix& A, const Matrix& B) {
  Matrix C(A.rows, B.cols);
  for (int m = 0; m < A.rows; m++)
    for (int k = 0; k < A.cols; k++)
      for (int n = 0; n < B.cols; n++) C(m, n) += A(m, k) * B(k, n);
  return C;
}
// With a step, products and sums of these are exact in fp32.
static Matrix random_matrix(Random& random, int rows, int cols, double limit, double step = 0) {
  return Matrix(rows, cols).each([&](double) { return random.number(limit, step); });
}
static Matrix rounded(const Matrix& m, Type type) {
  return m.each([&](double x) { return format_of(type) ? format_of(type)->round(x) : double(float(x)); });
}
static Tensor with_padding(Tensor t) { return t.cols = t.stride, t; }
// m into the upper rows of t; the padding and the rows below become `rest`
static void put(const Tensor& t, const Matrix& m, double rest = 0) {
  Matrix all(t.rows, t.stride, rest);
  for (int r = 0; r < m.rows; r++)
    for (int c = 0; c < m.cols; c++) all(r, c) = m(r, c);
  to_device(all.floats(), with_padding(t));
}
static Matrix get(const Tensor& t) {
  Matrix m(t.rows, t.cols);
  const std::vector<float> values = to_host(t);
  return m.v.assign(values.begin(), values.end()), m;
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
  const Tensor t = make_tensor(1, int(words.size()), Type::fp32);
  return to_device(words, t), t;
}
using Mistaken = std::vector<std::pair<const char*, Matrix>>;  // usual mistakes, and what they give instead of `want`
template <class F>
static void compare(Tally& tally, const Matrix& got, const Matrix& want, F tolerance, const Mistaken& mistaken = {}) {
  REQUIRE(got.v.size() == want.v.size());
  for (int r = 0; r < got.rows; r++)
    for (int c = 0; c < got.cols; c++) {
      Tally::Mistakes here;
      for (auto& [mistake, m] : mistaken) here.emplace_back(mistake, m(r, c));
      tally.near(got(r, c), want(r, c), tolerance(r, c), r, c, here);
    }
}
static void compare(const std::string& property, const Matrix& got, const Matrix& want, double tolerance = 0,
                    std::vector<std::pair<double, const char*>> known = {}, const Mistaken& mistaken = {}) {
  Tally tally(property, std::move(known));
  compare(
      tally, got, want, [&](int, int) { return tolerance; }, mistaken);
}

// ---- Whatever the order of a block's threads, and on one OS thread or two, `work` must leave the same bits: a missing
// barrier shows here. A GPU chooses its own order; there it runs twice.
static void same_bits_in_every_order(const std::string& what, const std::function<std::vector<uint32_t>()>& work) {
  const std::vector<uint32_t> want = work();
  Tally tally(what + ": the same bits in another order of threads");
  const auto again = [&](const char* order, int number) {
    const std::vector<uint32_t> got = work();
    tally.check(got == want && !got.empty(), number, text("%s %d\n Is a barrier missing?", order, number));
  };
#if defined(MP_CUDA)
  again("run", 2);
#else
  const int os_threads = int(cpu::pool()->helpers.size()) + 1;
  const auto before = std::make_tuple(cpu::order, cpu::seed, cpu::poison);
  cpu::poison = true;
  for (int workers = 1; workers <= 2; workers++) {
    cpu::use_os_threads(workers);
    cpu::order = cpu::forward, again("forward, OS threads:", workers);
    cpu::order = cpu::backward, again("backward, OS threads:", workers);
    cpu::order = cpu::shuffled;
    for (cpu::seed = 1; cpu::seed <= 3; cpu::seed++) again("shuffled, seed", int(cpu::seed));
  }
  std::tie(cpu::order, cpu::seed, cpu::poison) = before;
  cpu::use_os_threads(os_threads);
#endif
}

// ---- Model: the article's network once more, in fp64. With a format, what the design stores in 16 bits is rounded once.
struct Model {
  int L = 0;
  bool relu = true;
  Loss kind = Loss::cross_entropy;
  const Format* format = nullptr;
  double scale = 1, loss = 0, kink = infinite;        // kink: how near an argument of ReLU came to 0
  std::vector<Matrix> W, b, a, nudge, delta, dW, db;  // nudge: added to z, to measure dL/dz
  Matrix y;
  explicit Model(const Mlp& net)
      : L(net.L),
        relu(net.relu),
        kind(net.loss),
        format(format_of(net.layer[0].type)),
        W(size_t(L) + 1),
        b(W),
        a(W),
        nudge(W),
        delta(W),
        dW(W),
        db(W),
        y(get(net.y, net.rows)) {
    a[0] = get(net.layer[0].a, net.rows);
    for (int l = 1; l <= L; l++) W[l] = get(net.layer[l].W), b[l] = get(net.layer[l].b);
    for (int l = 1; l <= L; l++) nudge[l] = Matrix(net.rows, W[l].rows);
  }
  Matrix round(const Matrix& m) const { return format ? rounded(m, format->type) : m; }
  double prediction(int row, int i) const {  // z, or softmax(z)
    if (kind == Loss::squared_error) return a[L](row, i);
    double sum = 0;
    for (int j = 0; j < a[L].cols; j++) sum += std::exp(a[L](row, j) - a[L](row, i));
    return 1 / sum;
  }
  void forward(int l) {  // E2
    Matrix z = a[l - 1] * transposed(W[l]);
    for (int n = 0; n < z.rows; n++)
      for (int i = 0; i < z.cols; i++) z(n, i) += b[l](0, i) + nudge[l](n, i);
    if (relu && l < L) z = z.each([&](double x) { return kink = std::min(kink, std::fabs(x)), x < 0 ? 0 : x; });
    a[l] = round(z);
  }
  void find_loss() {  // E1, mean over the batch
    loss = 0;
    for (int n = 0; n < y.rows; n++)
      for (int i = 0; i < y.cols; i++)
        if (kind == Loss::squared_error) loss += 0.5 * std::pow(y(n, i) - a[L](n, i), 2) / y.rows;
        else if (y(n, i) != 0) loss -= y(n, i) * std::log(prediction(n, i)) / y.rows;
  }
  void output_delta() {  // E3
    Matrix d(y.rows, y.cols);
    for (int n = 0; n < y.rows; n++)
      for (int i = 0; i < y.cols; i++) d(n, i) = (prediction(n, i) - y(n, i)) / y.rows * scale;
    delta[L] = round(d);
  }
  void backward(int l) {  // E4
    Matrix d = delta[l] * W[l];
    for (size_t i = 0; i < d.v.size(); i++) d.v[i] = relu && a[l - 1].v[i] <= 0 ? 0 : d.v[i];
    delta[l - 1] = round(d);
  }
  void weight_gradient(int l) {  // E5
    dW[l] = round(transposed(delta[l]) * a[l - 1]), db[l] = round(Matrix(1, delta[l].rows, 1) * delta[l]);
  }
  double forward_all() {
    for (int l = 1; l <= L; l++) forward(l);
    return find_loss(), loss;
  }
  void step_gradients() {
    forward_all(), output_delta();
    for (int l = L; l >= 1; l--) {
      weight_gradient(l);
      if (l > 1) backward(l);
    }
  }
  // dL/dx for each x of m, one of this model's own matrices, by central differences: (L(x + h) - L(x - h)) / 2h is off
  // by h^2/6 L''' < 1e-8, if no ReLU changes sides
  Matrix slopes(Matrix& m) {
    const double h = 1e-4;
    Matrix slope(m.rows, m.cols);
    for (size_t i = 0; i < m.v.size(); i++) {
      const double x = m.v[i];
      m.v[i] = x + h, slope.v[i] = forward_all() / (2 * h);
      m.v[i] = x - h, slope.v[i] -= forward_all() / (2 * h);
      m.v[i] = x;
    }
    return slope;
  }
};

// A small network, 7-5-6-3, of which 4 of 6 rows are in use; the others hold NaN and must not matter. With a step all
// numbers are its multiples.
static Mlp small_network(Type type, bool relu, Loss kind, uint64_t seed, double step = 0) {
  Random random{seed};
  const double limit = step > 0 ? 4 : 1;
  Mlp net = make_mlp({7, 5, 6, 3}, 6, type, Update::master);
  net.rows = 4, net.relu = relu, net.loss = kind;
  for (int l = 0; l <= net.L; l++) {
    Layer& layer = net.layer[l];
    Matrix a = random_matrix(random, 4, layer.a.cols, limit, step);
    if (l > 0 && relu) a = a.each([](double x) { return x < 0 ? 0 : x; });
    put(layer.a, a, NAN);
    if (l == 0) continue;
    const std::vector<float> W = random_matrix(random, layer.W.rows, layer.W.cols, limit, step).floats();
    set_parameters(layer, W, random_matrix(random, 1, layer.W.rows, limit, step).floats());
    put(layer.delta, Matrix(), NAN);
    put(first_rows(layer.delta, 4), random_matrix(random, 4, layer.a.cols, limit, step));  // E3 and E4 pad it with 0
  }
  Matrix y = random_matrix(random, 4, 3, 1, step);
  for (int n = 0; n < 4 && kind == Loss::cross_entropy; n++)
    for (int i = 0; i < 3; i++) y(n, i) = i == int(n + seed) % 3;
  put(net.y, y, NAN);
  return net;
}
static Mlp far_from_kinks(bool relu, Loss kind) {  // fp32, with no argument of a ReLU near 0, so that slopes exist
  for (uint64_t seed = 1;; seed++) {
    Mlp net = small_network(Type::fp32, relu, kind, seed);
    Model model(net);
    model.forward_all();
    if (model.kink < 0.005) continue;
    for (int l = 1; l <= net.L; l++) forward(net, l);
    return net;
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
static const std::pair<double, const char*> no_mean = {4, "4 is the batch: is the division by it missing?"};

// ==== 2.1 Number formats =============================================================================================
// What can go wrong in rounding goes wrong at a value that the format holds, halfway between two of them, or at a float
// next to such a point.
static std::vector<float> critical_floats(const Format& f) {
  std::vector<float> inputs = {float_inf, -float_inf, FLT_MAX, -FLT_MAX, FLT_TRUE_MIN, FLT_MIN};
  for (uint32_t nan : {0x7fc00000u, 0x7f800001u, 0x7f801fffu, 0x7f802000u, 0x7fffffffu, 0xff800001u, 0xffaaa000u, ~0u})
    inputs.push_back(same_bits<float>(nan));  // with payloads that truncation would lose, or a carry overflow
  for (int bits = 0; bits < f.infinity(); bits++) {
    const double x = f.decode(uint16_t(bits)), tie = x + f.half_step(x);
    for (float point : {float(x), float(tie)})
      for (float y : {point, std::nextafter(point, -float_inf), std::nextafter(point, float_inf)})
        inputs.push_back(y), inputs.push_back(-y);
  }
  Random random{1};
  for (int i = 0; i < 100000; i++) inputs.push_back(same_bits<float>(random.bits()));
  return inputs;
}
static void check_rounding(const Format& f) {
  Tally nans("NaN stays NaN"), others("any other float goes to the nearest"), ties("ties to even"),
      values("values that the format holds");  // the last one speaks first
  for (float x : critical_floats(f)) {
    const double low = f.decode(f.encode(x, cut_off)), dropped = std::fabs(x - low);
    Tally& tally = std::isnan(x) ? nans : low == x ? values : dropped == f.half_step(x) ? ties : others;
    tally.rounded(f, x, f.from_float(x));
  }
}
// The kernels round with instructions of their own, 8 numbers at once (here box B) or one by one (here E3).
static void check_rounding_in_kernels(const Format& f) {
  const std::vector<float> inputs = critical_floats(f);
  const int n = int(inputs.size());
  Mlp wide = make_mlp({n, 1}, 1, f.type, Update::master), single = make_mlp({1, n}, 1, f.type, Update::master);
  const Tensor x = on_device(inputs);
  Batch batch;
  batch.x = x.as<float>(), batch.rows = 1;
  preprocess(wide, batch, nullptr);
  std::vector<float> y;
  for (float v : inputs) y.push_back(-v);
  to_device(y, single.y);
  single.loss = Loss::squared_error;  // delta is 0 - y
  output_delta(single, LossScaler(1));
  const std::vector<float> by_8 = to_host(wide.layer[0].a), by_1 = to_host(single.layer[1].delta);
  Tally wides("rounded in a kernel, 8 at a time"), singles("rounded in a kernel, one by one");
  for (int i = 0; i < n; i++) {
    wides.rounded(f, inputs[i], f.encode(by_8[i]));
    if (inputs[i] != 0) singles.rounded(f, inputs[i], f.encode(by_1[i]));  // 0 - 0 has no sign
  }
}
static void check_widening(const Format& f) {
  Tally values("the value of each of the 65,536 patterns"), round_trip("to a float and back");
  for (int i = 0; i < 65536; i++) {
    const uint16_t bits = uint16_t(i), back = f.from_float(f.to_float(bits));
    const double want = f.decode(bits), got = f.to_float(bits);
    const bool nan = std::isnan(want), same = got == want && std::signbit(got) == std::signbit(want);
    values.check(nan ? std::isnan(got) : same, i & 0x7fff, text("0x%04x\n got    %.9g\n want   %.9g", i, got, want));
    values.zero += !nan && !same && got == 0;
    round_trip.check(nan ? std::isnan(f.decode(back)) : back == bits, i & 0x7fff, text("0x%04x gave 0x%04x", i, back));
  }
}
static void check_widening_in_kernels(const Format& f) {  // 8 at a time in the update, one by one in gemm_naive
  Mlp net = make_mlp({65536, 1}, 1, f.type, Update::master);
  const Tensor column = make_tensor(65536, 1, f.type), one = make_tensor(1, 1, f.type);
  Matrix all(65536, 1);
  for (int i = 0; i < 65536; i++) all(i, 0) = f.decode(uint16_t(i));
  put(net.layer[1].dW, transposed(all)), put(column, all), put(one, Matrix(1, 1, 1));
  LossScaler scaler(1);
  update(net, scaler, -1);  // the master was 0 and becomes dW
  gemm_naive(Layout::ABt, column, one, column);
  compare("widened in a kernel, 8 at a time", get(kept_W(net.layer[1])), transposed(all));
  compare("widened in a kernel, one by one", get(column), all);
}

TEST_SUITE("float_to_half") {
  TEST_CASE("a float becomes the nearest half, a tie the even one") { check_rounding(half_format); }
  TEST_CASE("kernels round to half in the same way") { check_rounding_in_kernels(half_format); }
  TEST_CASE("landmarks: ties at 1, 2049 and 2051, the largest, the least normal and subnormal, what a scale is for") {
    const std::vector<std::pair<float, int>> landmarks = {{0.f, 0x0000},
                                                          {-0.f, 0x8000},
                                                          {1.f, 0x3c00},
                                                          {1 + 0x1p-11f, 0x3c00},
                                                          {1 + 0x3p-11f, 0x3c02},
                                                          {0x1.002002p0f, 0x3c01},
                                                          {2049.f, 0x6800},
                                                          {2051.f, 0x6802},
                                                          {0.1f, 0x2e66},
                                                          {1.f / 3, 0x3555},
                                                          {65504.f, 0x7bff},
                                                          {65519.996f, 0x7bff},
                                                          {65520.f, 0x7c00},
                                                          {-65520.f, 0xfc00},
                                                          {FLT_MAX, 0x7c00},
                                                          {0x1p-14f, 0x0400},
                                                          {0x1p-14f - 0x1p-25f, 0x0400},
                                                          {0x3ffp-24f, 0x03ff},
                                                          {0x1p-24f, 0x0001},
                                                          {0x3p-25f, 0x0002},
                                                          {0x5p-25f, 0x0002},
                                                          {0x1p-25f, 0x0000},
                                                          {0x1.000002p-25f, 0x0001},
                                                          {-0x1p-25f, 0x8000},
                                                          {1e-8f, 0x0000},
                                                          {1024 * 1e-8f, 0x00ac},
                                                          {FLT_TRUE_MIN, 0x0000}};
    Tally tally("landmarks"), reference("these tests' own rounding");
    for (auto [x, bits] : landmarks) {
      reference.check(half_format.encode(x) == bits, 0, text("%.9g", double(x)));
      tally.rounded(half_format, x, float_to_half(x).bits);
    }
  }
}
TEST_SUITE("half_to_float") {
  TEST_CASE("each half is the float that its bits say") { check_widening(half_format); }
  TEST_CASE("kernels read halves in the same way") { check_widening_in_kernels(half_format); }
#if defined(__FLT16_MAX__)
  TEST_CASE("the compiler's own half type agrees, both ways") {
    Tally narrow("to half"), wide("to float");
    for (float x : critical_floats(half_format)) {
      const uint16_t want = same_bits<uint16_t>(_Float16(x)), got = float_to_half(x).bits;
      narrow.check(std::isnan(x) ? std::isnan(half_format.decode(got)) : got == want, std::fabs(double(x)),
                   text("%.9g\n got    0x%04x\n want   0x%04x", double(x), got, want));
    }
    for (int i = 0; i < 65536; i++)
      wide.near(half_to_float(half{uint16_t(i)}), double(same_bits<_Float16>(uint16_t(i))), 0, i);
  }
#endif
}
TEST_SUITE("float_to_bfloat16") {
  TEST_CASE("a float becomes the nearest bfloat16, a tie the even one") { check_rounding(bfloat16_format); }
  TEST_CASE("a bfloat16 is the upper half of a float") { check_widening(bfloat16_format); }
  TEST_CASE("kernels convert in the same way") {
    check_rounding_in_kernels(bfloat16_format), check_widening_in_kernels(bfloat16_format);
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
    for (int i = 0; i < 256 && i < count * in; i++) pixels[size_t(i)] = uint8_t(i);  // every grey
    for (int i = count - 1; i > 0; i--) std::swap(order[i], order[random.bits() % unsigned(i + 1)]);
    memory[0] = on_device(pixels), memory[1] = on_device(labels), memory[2] = on_device(order);
    batch.pixels = memory[0].as<uint8_t>(), batch.labels = memory[1].as<uint8_t>();
    batch.order = memory[2].as<int>(), batch.rows = rows;
  }
  void fill(Model& model, int position, Type type) const {  // what box B makes of the batch at this position
    Matrix a(batch.rows, in), y(batch.rows, classes);
    for (int n = 0; n < batch.rows; n++) {
      const int sample = order[position * batch.rows + n];
      for (int i = 0; i < in; i++) a(n, i) = pixels[size_t(sample * in + i)] / 255.0;
      y(n, labels[size_t(sample)]) = 1;
    }
    model.a[0] = rounded(a, type), model.y = y;
  }
};
static std::vector<uint32_t> parameters(const Mlp& net) {
  std::vector<Tensor> all;
  for (const Layer& l : net.layer) all.insert(all.end(), {l.master, l.weights, l.compensation});
  return bits_of(all);
}

TEST_SUITE("train_step") {
  TEST_CASE("six steps in fp32 do what the same steps do in fp64") {
    for (const Case& c : cases) {
      const Digits digits(20, 4, 30, 5);
      const float lr = 0.02f;
      Mlp net = make_mlp({20, 9, 7, 4}, 5, Type::fp32, Update::master);
      net.relu = c.relu, net.loss = c.kind;
      initialise(net);
      LossScaler scaler(1024, 2, 0.5f, 3);
      for (int step = 0; step < 6; step++) {
        Model model(net);
        digits.fill(model, step, Type::fp32), model.step_gradients();
        const StepState before = scaler.read();
        train_step(net, digits.batch, scaler, lr);
        const StepState after = scaler.read();
        const bool counted = after.step == before.step + 1 && after.position == step + 1 && after.skipped == 0;
        CHECK(counted);
        CHECK(after.scale == before.scale * (step % 3 == 2 ? 2 : 1));
        // at most 10 products of at most 20 terms lie in a row, and their errors mostly cancel: 100 e of the largest
        CHECK(std::fabs(after.loss - model.loss) <= 100 * e * (1 + model.loss));
        for (int l = 1; l <= net.L; l++) {
          Matrix W = model.W[l];
          for (size_t i = 0; i < W.v.size(); i++) W.v[i] -= lr * model.dW[l].v[i];
          for (int i = 0; i < W.rows; i++) model.b[l](0, i) -= lr * model.db[l](0, i);
          const double tolerance =
              100 * e * lr * std::max(model.dW[l].largest(), model.db[l].largest()) + 2 * e * W.largest();
          compare(text("%s, step %d, W %d", c.words.c_str(), step, l), get(net.layer[l].W), W, tolerance);
          compare(text("%s, step %d, b %d", c.words.c_str(), step, l), get(net.layer[l].b), model.b[l], tolerance);
        }
      }
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
      const std::vector<uint32_t> weights = parameters(net);
      Model model(net);
      model.scale = before.scale;
      digits.fill(model, step, Type::fp16), model.step_gradients();
      bool finite = true;
      for (int l = 1; l <= net.L; l++) finite &= model.dW[l].largest() <= 65504 && model.db[l].largest() <= 65504;
      train_step(net, digits.batch, scaler, 0.1f);
      const StepState after = scaler.read();
      INFO(text("step %d, scale %g: %s", step, double(before.scale), finite ? "finite" : "overflows"));
      CHECK(after.skipped == (skipped += !finite));
      CHECK((after.scale < before.scale) == !finite);
      CHECK((parameters(net) == weights) == !finite);
      CHECK(after.halted == 0);
      CHECK(std::fabs(after.loss - model.loss) <= 0x1p-9 * (1 + model.a[net.L].largest()));  // logits to a step
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
        std::vector<uint32_t> losses;
        for (int step = 0; step < 4; step++)
          train_step(net, digits.batch, scaler, 0.2f), losses.push_back(same_bits<uint32_t>(scaler.read().loss));
        std::vector<uint32_t> bits = parameters(net);
        return bits.insert(bits.end(), losses.begin(), losses.end()), bits;
      });
  }
  TEST_CASE("box B: pixels / 255, rounded once, and one-hot labels, of the images whose turn it is") {
    for (Type type : types) {
      const Digits digits(13, 3, 40, 4);
      Mlp net = make_mlp({13, 3}, 6, type, Update::master);
      put(net.layer[0].a, Matrix(), 7);
      LossScaler scaler(1);
      StepState s = scaler.read();
      for (s.position = 0; s.position < 10; s.position++) {
        scaler.write(s);
        preprocess(net, digits.batch, &scaler);
        Model model(net);
        digits.fill(model, s.position, type);
        compare(text("%s, position %d, a0", name_of(type), s.position), get(net.layer[0].a, 4), model.a[0]);
        compare(text("%s, position %d, y", name_of(type), s.position), get(net.y, 4), model.y);
      }
      CHECK(net.rows == 4);
      CHECK(get(with_padding(net.layer[0].a))(3, 15) == 0);
      CHECK(get(net.layer[0].a)(4, 0) == 7);  // a row that is not of this batch
    }
  }
  TEST_CASE("box B: points x with targets y") {
    Random random{3};
    const Matrix x = random_matrix(random, 6, 11, 2), y = random_matrix(random, 6, 2, 2);
    const std::vector<int> order = {5, 2, 0, 3, 1, 4};
    const Tensor device_x = on_device(x.floats()), device_y = on_device(y.floats()), device_order = on_device(order);
    Mlp net = make_mlp({11, 2}, 3, Type::bf16, Update::master);
    Batch batch;
    batch.x = device_x.as<float>(), batch.y = device_y.as<float>(), batch.rows = 3;
    LossScaler scaler(1);
    StepState s = scaler.read();
    s.position = 1, scaler.write(s);
    for (bool shuffled : {false, true}) {
      batch.order = shuffled ? device_order.as<int>() : nullptr;
      preprocess(net, batch, &scaler);
      Tally input("a0"), targets("y");
      for (int n = 0; n < 3; n++) {
        const int sample = shuffled ? order[size_t(3 + n)] : 3 + n;
        for (int i = 0; i < 11; i++)
          input.near(get(net.layer[0].a)(n, i), bfloat16_format.round(x(sample, i)), 0, n, i);
        for (int i = 0; i < 2; i++) targets.near(get(net.y)(n, i), y(sample, i), 0, n, i);
      }
    }
  }
  TEST_CASE("box H: the class of the largest logit, also when the last batch is not full") {
    Mlp net = make_mlp({20, 9, 4}, 4, Type::fp32, Update::master),
        all = make_mlp({20, 9, 4}, 11, Type::fp32, Update::master);
    initialise(net), initialise(all);
    Model model(all);
    std::vector<uint8_t> pixels(11 * 20);
    for (size_t i = 0; i < pixels.size(); i++) pixels[i] = i % 9 < 2 ? 255 : 0, model.a[0].v[i] = pixels[i] / 255;
    model.forward_all();
    std::vector<int> want;
    for (auto z = model.a[2].v.begin(); z < model.a[2].v.end(); z += 4)
      want.push_back(int(std::max_element(z, z + 4) - z));
    CHECK(predict(net, pixels) == want);
    CHECK(*std::max_element(want.begin(), want.end()) > *std::min_element(want.begin(), want.end()));
    CHECK(predict(net, {}).empty());
  }
  TEST_CASE("weights start from He's normal distribution, biases from 0, and the 16-bit copy is the master rounded") {
    const auto start = [](uint64_t seed) {
      Mlp net = make_mlp({300, 200, 10}, 1, Type::fp16, Update::master);
      net.seed = seed;
      return initialise(net), net;
    };
    const Mlp net = start(5);
    const Matrix W = get(kept_W(net.layer[1]));
    const double n = double(W.v.size()), variance = 2.0 / 300;  // each bound: 5 standard deviations of the estimate
    CHECK(std::fabs(W.mean()) <= 5 * std::sqrt(variance / n));
    CHECK(std::fabs(W.each([](double w) { return w * w; }).mean() / variance - 1) <= 5 * std::sqrt(2 / n));
    const double fourth = W.each([](double w) { return std::pow(w, 4); }).mean() / (variance * variance);
    CHECK(std::fabs(fourth - 3) <= 5 * std::sqrt(96 / n));  // 3 for a normal distribution
    CHECK(get(kept_b(net.layer[1])).largest() == 0);
    CHECK(get(net.layer[1].W).v == rounded(W, Type::fp16).v);
    CHECK(get(net.layer[1].W).v != W.v);
    CHECK(parameters(start(5)) == parameters(net));
    CHECK(parameters(start(6)) != parameters(net));
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
static Mlp last_layer(const Matrix& z, const Matrix& y, Type type, Loss kind) {  // a network of which only this matters
  Mlp net = make_mlp({1, z.cols}, z.rows + 2, type, Update::master);
  net.rows = z.rows, net.loss = kind;
  put(net.layer[1].a, z, NAN), put(net.y, y, NAN);
  return net;
}
static Matrix one_hot(int rows, int classes) {
  Matrix y(rows, classes);
  for (int n = 0; n < rows; n++) y(n, n % classes) = 1;
  return y;
}
static double loss_of(Mlp& net) {
  LossScaler scaler(1024);  // the loss itself is not scaled
  return loss(net, scaler), scaler.read().loss;
}
static const std::vector<std::pair<Loss, const char*>> losses = {{Loss::squared_error, "squared error"},
                                                                 {Loss::cross_entropy, "cross-entropy"}};

TEST_SUITE("E1") {
  TEST_CASE("the loss is the mean over the batch of 1/2 sum (y - z)^2, or of -sum y log softmax(z)") {
    Random random{11};
    for (Type type : types)
      for (auto [kind, words] : losses)
        for (auto [rows, classes] : {std::make_pair(1, 1), {4, 3}, {70, 10}, {33, 17}}) {
          const Matrix z = random_matrix(random, rows, classes, 5), y = random_matrix(random, rows, classes, 5);
          Mlp net = last_layer(z, kind == Loss::cross_entropy ? one_hot(rows, classes) : y, type, kind);
          Model model(net);
          model.a[1] = get(net.layer[1].a, rows), model.find_loss();
          Tally tally(text("%s, %s, [%d, %d]", words, name_of(type), rows, classes),
                      {{2, "is the 1/2 missing?"}, {rows, "it is the mean over the batch, not the sum"}});
          // each addition, and 8 operations on each term, e of a sum of positive terms
          tally.near(loss_of(net), model.loss, e * (classes + rows + 8) * (10 + model.loss));
        }
  }
  TEST_CASE("large logits do not overflow") {
    Matrix z(2, 3, -1e4);
    z(0, 0) = 1e4;
    Matrix y(2, 3);
    y(0, 2) = y(1, 0) = 1;
    for (Type type : types) {
      Mlp net = last_layer(z, y, type, Loss::cross_entropy);
      const double want = rounded(z, type)(0, 0) + std::log(3) / 2;  // (2 z + log 3) / 2
      CHECK(std::fabs(loss_of(net) - want) <= 8 * e * want);
    }
  }
  TEST_CASE("NaN and infinity are not hidden") {
    for (double bad : {double(NAN), infinite})
      for (Loss kind : {Loss::squared_error, Loss::cross_entropy}) {
        Matrix z(3, 4);
        z(1, 2) = bad;
        Mlp net = last_layer(z, one_hot(3, 4), Type::fp16, kind);
        CHECK_FALSE(std::isfinite(loss_of(net)));
      }
  }
}

// ==== 4.2.1 E2: forward ==============================================================================================
TEST_SUITE("E2") {
  TEST_CASE("z = a W^T + b and a = f(z), f = ReLU on the hidden layers, rounded once") {
    for (Type type : types)
      for (bool relu : {true, false}) {
        const Mlp start = small_network(type, relu, Loss::cross_entropy, 2, 0.0625);  // exact sums: an exact result
        for (int l = 1; l <= start.L; l++) {
          Mlp net = start;
          Model model(net);
          model.a[l - 1] = get(net.layer[l - 1].a, 4), model.forward(l);
          net.layer[l].a = make_tensor(6, model.a[l].cols, type), put(net.layer[l].a, Matrix(), 7);
          forward(net, l);
          const char* f = relu && l < net.L ? "f = ReLU" : "no f";
          Model no_bias = model, no_f = model, f_everywhere = model;
          no_bias.b[l] = Matrix(1, no_bias.b[l].cols), no_bias.forward(l), no_f.relu = false, no_f.forward(l);
          f_everywhere.L++, f_everywhere.relu = true, f_everywhere.forward(l);
          compare(text("%s, layer %d, %s", name_of(type), l, f), get(net.layer[l].a, 4), model.a[l], 0, {},
                  {{"a forgotten bias", no_bias.a[l]},
                   {"a forgotten activation f", no_f.a[l]},
                   {"an f where there should be none", f_everywhere.a[l]}});
          CHECK_MESSAGE(get(net.layer[l].a)(4, 0) == 7, "a row that is not of this batch was written");
        }
      }
  }
}

// ==== 4.2.2 E3, E4: backward =========================================================================================
static constexpr const char *article_E3 = "the article's formula, half the slope",
                            *no_scale = "the loss scale is missing", *no_softmax = "z - y: softmax(z) is left out";
static Matrix z_less_y(Model model, double scale) {
  model.kind = Loss::squared_error, model.scale = scale, model.output_delta();
  return model.delta[model.L];
}
TEST_SUITE("E3") {
  TEST_CASE("delta is the slope of the loss over z, times the loss scale") {
    for (const Case& c : cases) {
      Mlp net = far_from_kinks(c.relu, c.kind);
      LossScaler scaler(8);
      loss(net, scaler), output_delta(net, scaler);
      Model model(net);
      model.forward_all();
      const Matrix no_exp = z_less_y(model, 8);
      const Matrix slope = model.slopes(model.nudge[net.L]).each([](double x) { return 8 * x; });
      compare(c.words, get(net.layer[net.L].delta, 4), slope, 8 * 100 * e,
              {no_mean, {0.5, article_E3}, {0.125, no_scale}}, {{no_softmax, no_exp}});
    }
  }
  TEST_CASE("the article's (z - y) / 2 is exactly half the slope of 1/2 (y - z)^2") {
    for (double z : {-1.5, 0.25, 2.0})
      for (double y : {-0.5, 0.0, 3.0}) {
        const auto E1 = [&](double at) { return 0.5 * (y - at) * (y - at); };
        const double h = 0.125;  // a parabola's central difference is exact, and so is fp64 with these numbers
        const double slope = (E1(z + h) - E1(z - h)) / (2 * h), article = (z - y) * 0.5;
        CHECK(article == slope / 2);
        Mlp net = last_layer(Matrix(1, 1, z), Matrix(1, 1, y), Type::fp16, Loss::squared_error);
        output_delta(net, LossScaler(1));
        compare("delta", get(net.layer[1].delta, 1), Matrix(1, 1, slope), 0, {},
                {{article_E3, Matrix(1, 1, slope / 2)}});
      }
  }
  TEST_CASE("computed in fp32 and rounded once") {
    Random random{12};
    for (Type type : types)
      for (auto [kind, words] : losses) {
        const bool exact = kind == Loss::squared_error;  // z - y, / 4 and * 1024 are; z - y needs more than 11 bits
        const Matrix z = random_matrix(random, 4, 16, 4, 0x1p-6), y = random_matrix(random, 4, 16, 4, 0x1p-8);
        Mlp net = last_layer(z, exact ? y : one_hot(4, 16), type, kind);  // 16: a row ends where the next begins
        put(net.layer[1].delta, Matrix(), 7);
        LossScaler scaler(1024);
        loss(net, scaler), output_delta(net, scaler);
        Model model(net);
        model.a[1] = get(net.layer[1].a, 4), model.scale = 1024;
        if (!exact) model.format = nullptr;
        model.output_delta();
        const Matrix &want = model.delta[1], got = get(net.layer[1].delta, 4);
        Tally tally(text("%s, %s", words, name_of(type)), {no_mean, {0.5, article_E3}, {1. / 1024, no_scale}});
        const auto tolerance = [&, fp32 = 256 * 20 * e](int n, int i) {  // exp, and the error of log sum exp: 20 e
          const Format* f = format_of(type);
          return exact ? 0 : fp32 + (f ? f->half_step(std::fabs(want(n, i)) + fp32) : 0);
        };
        compare(tally, got, want, tolerance, {{no_softmax, z_less_y(model, 1024)}});
        const bool nothing_below_the_last_row = get(net.layer[1].delta, 5)(4, 0) == 7;
        CHECK_MESSAGE(nothing_below_the_last_row, "it writes below the last row: is a bound missing, or <= for <?");
      }
  }
  TEST_CASE("the scale multiplies before the rounding, where 2^-26 still exists") {
    Mlp net = last_layer(Matrix(4, 1, 0x1p-24), Matrix(4, 1), Type::fp16, Loss::squared_error);
    output_delta(net, LossScaler(1));
    compare("2^-24 / 4, which is no half", get(net.layer[1].delta, 4), Matrix(4, 1), 0, {no_mean});
    output_delta(net, LossScaler(1024));
    compare("2^-24 / 4 * 1024", get(net.layer[1].delta, 4), Matrix(4, 1, 0x1p-16), 0, {no_mean, {0.5, article_E3}},
            {{"rounding before the scale has lifted the value", Matrix(4, 1)}});
  }
  TEST_CASE("large logits give 0 and 1, not NaN") {
    Matrix z(1, 3), y(1, 3);
    z(0, 0) = 1e4, z(0, 2) = -1e4, y(0, 2) = 1;
    Mlp net = last_layer(z, y, Type::fp16, Loss::cross_entropy);
    loss_of(net), output_delta(net, LossScaler(1));
    Matrix want(1, 3);
    want(0, 0) = 1, want(0, 2) = -1;
    compare("softmax of 10000, 0, -10000, less the target", get(net.layer[1].delta, 1), want);
  }
}
TEST_SUITE("E4") {
  TEST_CASE("delta = (delta W) * f'(z), rounded once") {
    for (Type type : types)
      for (bool relu : {true, false}) {
        const Mlp start = small_network(type, relu, Loss::cross_entropy, 3, 0.0625);  // exact sums: an exact result
        for (int l = start.L; l > 1; l--) {
          Mlp net = start;
          Model model(net);
          model.a[l - 1] = get(net.layer[l - 1].a, 4), model.delta[l] = get(net.layer[l].delta, 4), model.backward(l);
          net.layer[l - 1].delta = make_tensor(6, model.delta[l - 1].cols, type),
                        put(net.layer[l - 1].delta, Matrix(), 7);
          backward(net, l);
          Model no_mask = model, mask = model;
          no_mask.relu = false, no_mask.backward(l), mask.relu = true, mask.backward(l);
          compare(text("%s, layer %d, %s", name_of(type), l, relu ? "ReLU" : "no activation"),
                  get(net.layer[l - 1].delta, 4), model.delta[l - 1], 0, {},
                  {{"the article's formula, which leaves f' out", no_mask.delta[l - 1]},
                   {"an f' where there is no activation", mask.delta[l - 1]}});
          CHECK_MESSAGE(get(net.layer[l - 1].delta)(4, 0) == 7, "a row that is not of this batch was written");
        }
      }
  }
  TEST_CASE("delta is the slope of the loss over the z of each hidden layer") {
    for (const Case& c : cases) {
      Mlp net = far_from_kinks(c.relu, c.kind);
      LossScaler scaler(1);
      loss(net, scaler), output_delta(net, scaler);
      for (int l = net.L; l > 1; l--) {
        backward(net, l);
        Model model(net);
        const Matrix slope = model.slopes(model.nudge[l - 1]);
        // at most 8 products of 7 terms lie between a pixel and this: 64 e, most of which cancels
        compare(text("%s, layer %d", c.words.c_str(), l - 1), get(net.layer[l - 1].delta, 4), slope,
                64 * e * (1 + slope.largest()), {no_mean});
      }
    }
  }
}

// ==== 4.2.3 E5: the weight gradient ==================================================================================
TEST_SUITE("E5") {
  TEST_CASE("dW = delta^T a and db = column sums of delta, over the rows in use, rounded once") {
    Random random{6};
    for (Type type : types) {
      Mlp small = small_network(type, true, Loss::cross_entropy, 5, 0.0625);  // exact sums: an exact result
      Mlp large = make_mlp({2, 300}, 70, type, Update::master);
      put(large.layer[1].delta, random_matrix(random, 70, 300, 1, 0x1p-6));
      put(large.layer[0].a, random_matrix(random, 70, 2, 1, 0x1p-6));
      for (Mlp* net : {&small, &large})
        for (int l = 1; l <= net->L; l++) {
          Model model(*net);
          model.a[l - 1] = get(net->layer[l - 1].a, net->rows), model.delta[l] = get(net->layer[l].delta, net->rows);
          put(net->layer[l].gradients, Matrix(), NAN);
          model.weight_gradient(l), weight_gradient(*net, l);
          compare(text("%s, layer %d, dW", name_of(type), l), get(net->layer[l].dW), model.dW[l]);
          compare(text("%s, layer %d, db", name_of(type), l), get(net->layer[l].db), model.db[l]);
          CHECK(get(net->layer[l].gradients).largest() < infinite);  // the padding is looked through for NaN, too
        }
    }
  }
  TEST_CASE("dW and db are the slopes of the loss over every weight and bias") {
    for (const Case& c : cases) {
      Mlp net = far_from_kinks(c.relu, c.kind);
      LossScaler scaler(1);
      loss(net, scaler), output_delta(net, scaler);
      for (int l = net.L; l >= 1; l--) {
        weight_gradient(net, l);
        if (l > 1) backward(net, l);
        Model model(net);
        for (bool bias : {false, true}) {
          const Matrix slope = model.slopes(bias ? model.b[l] : model.W[l]);
          compare(text("%s, layer %d, %s", c.words.c_str(), l, bias ? "db" : "dW"),
                  get(bias ? net.layer[l].db : net.layer[l].dW), slope, 64 * e * (1 + slope.largest()), {no_mean});
        }  // the tolerance is E4's
      }
    }
  }
}

// ==== The matrix products ============================================================================================
using Gemm = std::function<void(Layout, const Tensor&, const Tensor&, const Tensor&, const Epilogue&)>;
struct Shape {
  int M, N, K;
};
static const std::vector<std::pair<Layout, const char*>> layouts = {
    {Layout::ABt, "A B^T"}, {Layout::AB, "A B"}, {Layout::AtB, "A^T B"}};
static Tensor operand(const Matrix& m, Type type, bool across = false) {  // NaN in the padding and in three rows below
  const Matrix laid = across ? transposed(m) : m;
  const Tensor t = make_tensor(laid.rows + 3, laid.cols, type);
  return put(t, laid, NAN), first_rows(t, laid.rows);
}
// A[M, K] B[N, K]^T by all three layouts
static void check_product(const Gemm& gemm, const Matrix& A, const Matrix& B, Type type, int options = 0) {
  const int M = A.rows, N = B.rows, K = A.cols;
  const bool bias = options & 1, relu = options & 2, mask = options & 4;
  Random random{5};
  const auto square = [](double x) { return x * x; };
  const Matrix b = rounded(random_matrix(random, 1, N, 1), type), f = random_matrix(random, M, N, 1, 0.5);
  const Matrix squares = A.each(square) * transposed(B.each(square));
  const bool finite = std::all_of(squares.v.begin(), squares.v.end(), [](double x) { return std::isfinite(x); });
  Matrix want = A * transposed(B);
  for (int m = 0; m < M; m++)
    for (int n = 0; n < N; n++) {
      if (bias) want(m, n) += b(0, n);
      if ((relu && want(m, n) < 0) || (mask && f(m, n) <= 0)) want(m, n) = 0;
    }
  for (auto [layout, formula] : layouts) {
    const Tensor whole = make_tensor(M + 2, N, type), C = first_rows(whole, M);
    put(whole, Matrix(M, N, NAN), 7);
    const Tensor device_b = operand(b, type), device_f = operand(f, type);
    Epilogue epilogue;
    epilogue.bias = bias ? &device_b : nullptr, epilogue.relu = relu, epilogue.mask = mask ? &device_f : nullptr;
    gemm(layout, operand(A, type, layout == Layout::AtB), operand(B, type, layout != Layout::ABt), C, epilogue);
    Tally tally(text("%s, %s, M N K = %d %d %d%s%s%s", formula, name_of(type), M, N, K, bias ? ", bias" : "",
                     relu ? ", ReLU" : "", mask ? ", mask" : ""));
    // K roundings, each at most e of a partial sum about sqrt(sum of squared products) large, are a random walk:
    // sqrt(K) times that, and 4 of its deviations. Then the bias is added, and the sum rounded to 16 bits.
    compare(tally, get(C), want, [&](int m, int n) {
      if (mask && f(m, n) <= 0) return 0.0;
      const double sum = 4 * e * std::sqrt(K * squares(m, n)) + e * (std::fabs(want(m, n)) + std::fabs(bias * b(0, n)));
      return sum + (format_of(type) ? format_of(type)->half_step(std::fabs(want(m, n)) + sum) : 0);
    });
    const Matrix all = get(with_padding(whole));
    int padding_neither_kept_nor_0 = 0;  // a NaN there would be taken for an overflow: gradients are checked with it
    for (int m = 0; m < M && layout != Layout::ABt && !bias && finite; m++)
      for (int n = N; n < all.cols; n++) padding_neither_kept_nor_0 += all(m, n) != 7 && all(m, n) != 0;
    CHECK(padding_neither_kept_nor_0 == 0);
    const bool rows_below_untouched = std::count(all.v.end() - 2 * all.cols, all.v.end(), 7.) == 2 * all.cols;
    CHECK(rows_below_untouched);
  }
}
static void check_products(const Gemm& gemm, const std::vector<Type>& of_types = types) {
  const std::vector<Shape> shapes = {
      {1, 1, 1},     {5, 3, 1},      {1, 8, 10},     {8, 1, 17},     {16, 16, 16},   {17, 33, 65},  {64, 64, 64},
      {64, 10, 128}, {64, 128, 10},  {10, 128, 64},  {130, 129, 10}, {130, 10, 129}, {65, 66, 130}, {1, 1, 1000},
      {3, 130, 7},   {200, 72, 333}, {64, 128, 784}, {128, 784, 64}, {49, 9, 63},    {97, 65, 65},  {193, 129, 65}};
  Random random{20};
  for (auto [M, N, K] : shapes)
    for (Type type : of_types) {
      const Matrix A = rounded(random_matrix(random, M, K, 1), type), B = rounded(random_matrix(random, N, K, 1), type);
      check_product(gemm, A, B, type);
      for (int options = 1; options < 8 && M * N * K < 100000; options++) check_product(gemm, A, B, type, options);
    }
}
static void check_not_finite(
    const Gemm& gemm, const std::vector<Type>& of_types =
                          types) {  // NaN and infinity reach their row's results, through ReLU too, and no others
  Matrix A(20, 40, 1), B(30, 40, 1);
  A(3, 5) = NAN, A(7, 39) = infinite, B(29, 0) = -1;
  for (Type type : of_types)
    for (int options : {0, 1, 2}) check_product(gemm, A, B, type, options);
}
static void check_orders(const Gemm& gemm) {
  Random random{21};
  for (auto [M, N, K] : {Shape{17, 33, 65}, {130, 72, 200}, {70, 130, 16}, {70, 10, 130}, {10, 70, 130}})
    for (size_t i = 0; i < layouts.size(); i++) {
      const Layout layout = layouts[i].first;
      const Tensor A = operand(random_matrix(random, M, K, 1), Type::fp16, layout == Layout::AtB);
      const Tensor B = operand(random_matrix(random, N, K, 1), Type::fp16, layout != Layout::ABt);
      const Tensor C = make_tensor(M, N, Type::fp16);
      same_bits_in_every_order(text("%s, M N K = %d %d %d", layouts[i].second, M, N, K), [&] {
        put(C, Matrix(), NAN);
        return gemm(layout, A, B, C, {}), bits_of({C});
      });
    }
}
static void check_refusals(const Gemm& gemm) {
  const Tensor A = make_tensor(4, 6, Type::fp16), B = make_tensor(5, 6, Type::fp16), C = make_tensor(4, 5, Type::fp16);
  const Tensor bias = make_tensor(1, 4, Type::fp16);
  Epilogue wrong_bias, wrong_mask;
  wrong_bias.bias = &bias, wrong_mask.mask = &A;
  CHECK_NOTHROW(gemm(Layout::ABt, A, B, C, {}));
  CHECK_THROWS_AS(gemm(Layout::AB, A, B, C, {}), Error);
  CHECK_THROWS_AS(gemm(Layout::AtB, A, B, C, {}), Error);
  CHECK_THROWS_AS(gemm(Layout::ABt, B, A, C, {}), Error);
  CHECK_THROWS_AS(gemm(Layout::ABt, A, B, make_tensor(5, 5, Type::fp16), {}), Error);
  CHECK_THROWS_AS(gemm(Layout::ABt, A, make_tensor(5, 7, Type::fp16), C, {}), Error);
  CHECK_THROWS_AS(gemm(Layout::ABt, make_tensor(4, 6, Type::fp32), B, C, {}), Error);
  CHECK_THROWS_AS(gemm(Layout::ABt, A, B, C, wrong_bias), Error);
  CHECK_THROWS_AS(gemm(Layout::ABt, A, B, C, wrong_mask), Error);
}
TEST_SUITE("gemm_naive") {
  TEST_CASE("three layouts, three types, any size, with bias, ReLU and mask") { check_products(gemm_naive); }
  TEST_CASE("NaN and infinity stay") { check_not_finite(gemm_naive); }
  TEST_CASE("the order of the threads does not matter") { check_orders(gemm_naive); }
  TEST_CASE("operands that do not fit are refused") { check_refusals(gemm_naive); }
}
// Of a size for which large tiles are taken, against the naive kernel: the reference in fp64 would take minutes.
static void check_large(const Gemm& gemm, const std::vector<Type>& of_types) {
#if defined(MP_CUDA)
  const int M = 2053, N = 2061, K = 70;
#else
  const int M = 130 * std::max(cores(), 2) + 1, N = 203, K = 70;
#endif
  Random random{22};
  const Matrix A = random_matrix(random, M, K, 1), B = random_matrix(random, N, K, 1);
  for (Type type : of_types)
    for (const auto& way : layouts) {
      const Layout layout = way.first;
      const Tensor a = operand(A, type, layout == Layout::AtB), b = operand(B, type, layout != Layout::ABt);
      const Tensor C = make_tensor(M, N, type), want = make_tensor(M, N, type);
      put(C, Matrix(), NAN);
      gemm(layout, a, b, C, {}), gemm_naive(layout, a, b, want);
      const std::vector<float> got = to_host(C), naive = to_host(want);
      size_t wrong = 0;  // both sums within K e |sum| of the truth, K terms of at most 4 x 4; then each rounded its way
      for (size_t i = 0; i < got.size(); i++) {
        const double sum = 2. * K * e * 16 * K;
        const double step = format_of(type) ? 2 * format_of(type)->half_step(std::fabs(naive[i]) + sum) : 0;
        wrong += !(std::fabs(got[i] - naive[i]) <= sum + step);
      }
      INFO(text("%s, %s, against gemm_naive", way.second, name_of(type)));
      CHECK(wrong == 0);
    }
}
static Gemm with_splits(decltype(&gemm_tiled) gemm, int splits) {
  return [=](Layout layout, const Tensor& A, const Tensor& B, const Tensor& C, const Epilogue& epilogue) {
    gemm(layout, A, B, C, epilogue, splits);
  };
}
TEST_SUITE("gemm_tiled") {
  TEST_CASE("three layouts, three types, any size, with bias, ReLU and mask") {
    check_products(with_splits(gemm_tiled, 0));
  }
  TEST_CASE("K shared out to several blocks") { check_products(with_splits(gemm_tiled, 3)); }
  TEST_CASE("large products") { check_large(with_splits(gemm_tiled, 0), types); }
  TEST_CASE("NaN and infinity stay") { check_not_finite(with_splits(gemm_tiled, 0)); }
  TEST_CASE("the order of the threads does not matter") {
    for (int splits : {1, 3}) check_orders(with_splits(gemm_tiled, splits));
  }
  TEST_CASE("operands that do not fit are refused") { check_refusals(with_splits(gemm_tiled, 0)); }
}
TEST_SUITE("gemm_mma") {
  static std::vector<Type> mma_types() {
    std::vector<Type> there;
    for (Type type : types_16)
      if (tensor_cores(type)) there.push_back(type);
    return there;
  }
  TEST_CASE("three layouts, both 16-bit types, any size, with bias, ReLU and mask") {
    check_products(with_splits(gemm_mma, 0), mma_types());
  }
  TEST_CASE("K shared out to several blocks") { check_products(with_splits(gemm_mma, 3), mma_types()); }
  TEST_CASE("large products") { check_large(with_splits(gemm_mma, 0), mma_types()); }
  TEST_CASE("NaN and infinity stay") { check_not_finite(with_splits(gemm_mma, 0), mma_types()); }
  TEST_CASE("the order of the threads does not matter" * doctest::skip(!tensor_cores(Type::fp16))) {
    for (int splits : {1, 3}) check_orders(with_splits(gemm_mma, splits));
  }
  TEST_CASE("operands that do not fit are refused, and fp32" * doctest::skip(!tensor_cores(Type::fp16))) {
    check_refusals(with_splits(gemm_mma, 0));
    const Tensor A = make_tensor(4, 4, Type::fp32), C = make_tensor(4, 4, Type::fp32);
    CHECK_THROWS_AS(gemm_mma(Layout::AB, A, A, C), Error);
  }
}

// ==== 3.1 Loss scaling ===============================================================================================
static Mlp two_layers(Type type, Update rule) {
  Mlp net = make_mlp({9, 5, 3}, 1, type, rule);
  return initialise(net), net;
}
static void fill_gradients(const Mlp& net, double g) {
  for (int l = 1; l <= net.L; l++) put(net.layer[l].gradients, Matrix(), g);
}
static void end_step(Mlp& net, LossScaler& scaler, float lr) {
  unscale_and_check(net, scaler), update(net, scaler, lr), scaler.update();
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
        const double inverse = float(1 / double(scale));
        compare(text("%s, scale %g", name_of(type), double(scale)), get(net.layer[1].master),
                get(gradients).each([&](double g) { return double(float(g * inverse)); }), 0,
                {{double(scale), "the scale is still in it"}});
      }
  }
  TEST_CASE("one infinity or NaN is found wherever it is, before the scale divides it away") {
    for (Type type : types) {
      Mlp net = two_layers(type, Update::master);
      for (double g :
           {infinite, -infinite, double(NAN), type == Type::fp16 ? 65504 : 0x1.fep127}) {  // the last: finite
        Tally tally(text("%s, one gradient is %g: found_inf for [layer, gradient]", name_of(type), g));
        for (int l = 1; l <= net.L; l++)
          for (int i = 0; i < net.layer[l].gradients.cols; i++) {
            fill_gradients(net, 1e-3);
            Matrix one = get(net.layer[l].gradients);
            one(0, i) = g, put(net.layer[l].gradients, one);
            LossScaler scaler(65536);
            unscale_and_check(net, scaler);
            tally.near(scaler.read().found_inf, std::isfinite(g) ? 0 : 1, 0, l, i,
                       {{"a comparison with NaN, which is always false", std::isnan(g) ? 0 : -1}});
          }
      }
    }
  }
  TEST_CASE("one bad gradient leaves every weight as it was, and the step is counted as skipped") {
    for (Update rule : {Update::master, Update::half, Update::kahan, Update::stochastic}) {
      Mlp net = two_layers(Type::fp16, rule);
      Tally good("the next one does"), skipped("a skipped step changes nothing");
      for (int l = 1; l <= net.L; l++)
        for (const Tensor& part : {net.layer[l].dW, net.layer[l].db})
          for (bool last : {false, true})
            for (double bad : {infinite, double(NAN)}) {
              fill_gradients(net, 4096);
              Matrix g = get(part);
              (last ? g.v.back() : g.v.front()) = bad, put(part, g);
              const std::vector<uint32_t> before = parameters(net);
              LossScaler scaler(65536);
              end_step(net, scaler, 0.5f);
              const StepState s = scaler.read();
              skipped.check(parameters(net) == before && s.skipped == 1 && s.scale == 32768 && s.found_inf == 0, l,
                            text("layer %d, %s, %g", l, part.rows > 1 ? "W" : "b", bad));
              fill_gradients(net, 4096), end_step(net, scaler, 0.5f);
              good.check(parameters(net) != before && scaler.read().skipped == 1, l,
                         text("layer %d, %s, after %g", l, part.rows > 1 ? "W" : "b", bad));
            }
    }
  }
}

TEST_SUITE("loss_scaling") {
  static void step_with(LossScaler & scaler, bool found_inf, float loss_value = 1) {
    StepState s = scaler.read();
    s.found_inf = found_inf, s.loss = loss_value;
    scaler.write(s), scaler.update();
  }
  // '+' a finite step, '!' one with found_inf; scale and tracker after each, as torch.amp.GradScaler has them
  static void trace(const std::string& words, LossScaler scaler, const char* steps,
                    const std::vector<std::pair<double, int>>& want) {
    Tally scales(words + ": scale after each of " + steps), trackers(words + ": tracker after each of " + steps);
    for (int i = 0; steps[i]; i++) {
      step_with(scaler, steps[i] == '!');
      scales.near(scaler.read().scale, want[size_t(i)].first, 0, i);
      trackers.near(scaler.read().growth_tracker, want[size_t(i)].second, 0, i);
    }
  }
  TEST_CASE("scale and tracker follow torch.amp.GradScaler") {
    trace("defaults", LossScaler(), "!+", {{32768, 0}, {32768, 1}});
    trace("from 8, interval 2", LossScaler(8, 2, 0.5f, 2), "+++!++",
          {{8, 1}, {16, 0}, {16, 1}, {8, 0}, {8, 1}, {16, 0}});
    trace("from 2^127, whose double is infinite", LossScaler(0x1p127f, 2, 0.5f, 1), "+", {{0x1p127, 0}});
    trace("from 2^126", LossScaler(0x1p126f, 2, 0.5f, 1), "+", {{0x1p127, 0}});
    trace("growth 1.1", LossScaler(3e38f, 1.1f, 0.5f, 1), "+", {{double(float(3e38f * double(1.1f))), 0}});
    trace("backoff 0.7", LossScaler(1000, 2, 0.7f), "!", {{700, 0}});
    trace("fixed", LossScaler(1000, 1, 1, 3), "++!++++",
          {{1000, 1}, {1000, 2}, {1000, 0}, {1000, 1}, {1000, 2}, {1000, 0}, {1000, 1}});
    LossScaler restored(1, 2, 0.5f, 4);  // the tracker belongs to the state that is saved
    StepState s;
    s.scale = 1024, s.growth_tracker = 3, restored.write(s);
    trace("restored", restored, "+", {{2048, 0}});
    std::vector<std::pair<double, int>> want;
    for (int i = 1; i < 2000; i++) want.push_back({65536, i});
    want.push_back({131072, 0});
    trace("defaults", LossScaler(), std::string(2000, '+').c_str(), want);
  }
  TEST_CASE("w = 1, rate 0.1: gradients .5 .5 inf .25 .25") {
    Mlp net = make_mlp({1, 1}, 1, Type::fp32, Update::master);
    set_parameters(net.layer[1], {1}, {0});
    LossScaler scaler(4, 2, 0.5f, 2);
    const float gradient[] = {.5f, .5f, float_inf, .25f, .25f}, w[] = {.95f, .9f, .9f, .875f, .85f};
    for (int i = 0; i < 5; i++) {
      put(net.layer[1].dW, Matrix(1, 1, gradient[i] * scaler.read().scale)), end_step(net, scaler, 0.1f);
      INFO("step ", i + 1);
      CHECK(std::fabs(get(net.layer[1].W)(0, 0) - double(w[i])) <= 4 * (i + 1) * e);  // 0.1f, product, difference
      CHECK(scaler.read().scale == std::vector<float>{4, 8, 4, 4, 8}[size_t(i)]);
      CHECK(scaler.read().growth_tracker == std::vector<int>{1, 0, 0, 1, 0}[size_t(i)]);
      CHECK(scaler.read().skipped == (i >= 2));
    }
  }
  TEST_CASE("a dynamic scale that cannot help halts, and then nothing changes") {
    for (float bad_loss : {1.f, float_inf, float_nan}) {
      Mlp net = two_layers(Type::fp16, Update::master);
      const std::vector<uint32_t> before = parameters(net);
      LossScaler scaler(bad_loss == 1 ? 2 : 1024);
      if (bad_loss == 1) step_with(scaler, true);  // to 1: half of that would be below
      CHECK(scaler.read().halted == 0);
      const StepState at = scaler.read();
      step_with(scaler, true, bad_loss);
      CHECK(scaler.read().halted == 1);
      for (int i = 0; i < 3; i++) fill_gradients(net, 1), end_step(net, scaler, 1);
      CHECK(parameters(net) == before);
      CHECK(scaler.read().halted == 1);
      CHECK(scaler.read().scale == at.scale);
      CHECK(scaler.read().step == at.step);
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
    const std::vector<float> rows = to_host(memory), scales = {8, 8, 16, 8};
    for (size_t i = 0; i < 4; i++) {
      CHECK(rows[3 * i] == float(i));
      CHECK(rows[3 * i + 1] == scales[i]);
      CHECK(same_bits<int>(rows[3 * i + 2]) == (i == 2));
    }
  }
}

// ==== 3.2 step 5: the update =========================================================================================
// One weight by each rule, every operation rounded. A compiler may fuse w - lr * g into one rounding: both are right.
struct Weight {
  double w, c;
};
static Weight updated(Update rule, Type type, Weight now, float g, float lr, bool fused) {
  const auto minus = [&](double x) {
    return fused ? std::fma(-lr, g, float(x)) : float(x - double(float(double(lr) * g)));
  };
  const auto round = [&](double x) { return format_of(type) ? format_of(type)->round(float(x)) : float(x); };
  if (rule == Update::master) return {minus(now.w), 0};
  if (rule == Update::half) return {round(minus(now.w)), 0};
  const double u = round(minus(now.c)), sum = round(now.w + u);
  return {sum, round(u + round(now.w - sum))};
}
static void check_update(Update rule, Type type) {
  Random random{41};
  Mlp net = make_mlp({50, 9}, 1, type, rule);
  initialise(net);
  const Layer& layer = net.layer[1];
  const Tensor kept = rule == Update::master ? layer.master : layer.weights;
  const float lr = 0.013f, inverse = float(1 / 1000.0);
  Tally weights(text("%s: [step, weight]", name_of(type))), owes(text("%s: its compensation", name_of(type)));
  for (int step = 0; step < 20; step++) {
    put(layer.gradients, random_matrix(random, 1, layer.gradients.cols, 30 * (step + 1)));
    const Matrix none(1, kept.cols), w = get(kept), g = get(layer.gradients);
    const Matrix c = rule == Update::kahan ? get(layer.compensation) : none;
    LossScaler scaler(1000);
    update(net, scaler, lr);
    const Matrix got = get(kept), owed = rule == Update::kahan ? get(layer.compensation) : none;
    for (int i = 0; i < w.cols; i++) {
      const float gradient = float(g(0, i) * double(inverse));
      Weight want = updated(rule, type, {w(0, i), c(0, i)}, gradient, lr, true);
      const Weight unfused = updated(rule, type, {w(0, i), c(0, i)}, gradient, lr, false);
      if (got(0, i) == unfused.w && owed(0, i) == unfused.c) want = unfused;
      const Weight scaled = updated(rule, type, {w(0, i), c(0, i)}, gradient * 1000, lr, true);
      const Weight uphill = updated(rule, type, {w(0, i), c(0, i)}, -gradient, lr, true);
      const Weight forgetful = updated(rule, type, {w(0, i), 0}, gradient, lr, true);
      weights.near(got(0, i), want.w, 0, step, i,
                   {{"a gradient with the loss scale still in it", scaled.w},
                    {"a step uphill: w + lr g instead of w - lr g", uphill.w},
                    {"leaving out what the last steps still owe", forgetful.w},
                    {"a weight that is never written", w(0, i)}});
      owes.near(owed(0, i), want.c, 0, step, i,
                {{"the wrong sign of what was lost", -want.c}, {"a compensation never written", c(0, i)}});
    }
    compare(text("%s: the compute copy", name_of(type)), get(layer.weights), rounded(got, type));
  }
}
// 512 weights of 1 after 1000 steps of +1e-4 each. Exactly: 1.1
static Layer thousand_small_steps(Type type, Update rule) {
  Mlp net = make_mlp({64, 8}, 1, type, rule);
  set_parameters(net.layer[1], std::vector<float>(512, 1), std::vector<float>(8, 1));
  fill_gradients(net, -1);
  LossScaler scaler(1);
  for (int i = 0; i < 1000; i++) update(net, scaler, 1e-4f), scaler.update();
  return net.layer[1];
}

TEST_SUITE("stochastic_rounding") {
  // Of 8192 random numbers, spread evenly over the bits that are dropped, as many round up as the dropped part is large.
  template <class F> static void check_chance(const Format& f, float x, int dropped, F round) {
    const double low = f.decode(f.encode(x, cut_off)), up_step = std::copysign(2 * f.half_step(x), x);
    int up = 0, down = 0;
    for (uint64_t i = 0; i < 8192; i++) {  // whether it takes the low random bits or the high ones
      const double got = f.decode(round(x, i << (dropped - 13) | i << 51).bits);
      up += got == low + up_step, down += got == low;
    }
    INFO(text("%s of %.9g: %d of 8192 up, %d down", f.name, double(x), up, down));
    CHECK(up + down == 8192);
    CHECK(std::fabs(up - (x - low) / up_step * 8192) < 1);
  }
  TEST_CASE("the upper neighbour as often as x is near it") {
    for (float sign : {1.f, -1.f}) {
      for (float x : {1.f, 1 + 0x1p-11f, 1 + 0x1p-23f, 1.1f, 0x1.ffcp3f, 0x1.fffffep3f, 1234.567f, 65472.5f, 65503.f,
                      0x1p-14f, 0x1.8001p-14f})
        check_chance(half_format, sign * x, 13, stochastic_half);
      for (auto [x, dropped] : {std::make_pair(0x1.fffp-15f, 14),
                                {0x1.2345p-16f, 15},
                                {0x1.8p-20f, 19},
                                {0x1.4p-24f, 23},
                                {0x1p-24f, 23},
                                {0x1p-25f, 24},
                                {0x1.8p-30f, 29},
                                {0x1p-36f, 35}})
        check_chance(half_format, sign * x, dropped, stochastic_half);
      for (float x : {1.f, 1.001f, 1 + 0x1p-8f, 0x1.fffffep3f, 3e38f, 0x1p-126f, 0x1.234p-130f})
        check_chance(bfloat16_format, sign * x, 16, stochastic_bfloat16);
    }
  }
  TEST_CASE("what the format holds stays, whatever the random number, and so do infinity and NaN") {
    Tally halves("half"), bfloats("bfloat16");
    for (uint64_t random : {uint64_t(0), ~uint64_t(0), uint64_t(0x123456789abcdef0)}) {
      for (int i = 0; i < 65536; i++) {
        const float x = float(half_format.decode(uint16_t(i))), y = float(bfloat16_format.decode(uint16_t(i)));
        if (x != 0) halves.rounded(half_format, x, stochastic_half(x, random).bits);
        bfloats.rounded(bfloat16_format, y, stochastic_bfloat16(y, random).bits);
      }
      for (float x : {65520.f, FLT_MAX, same_bits<float>(0x7f800001u), same_bits<float>(~0u)})
        halves.rounded(half_format, x, stochastic_half(x, random).bits);
      for (float x : {FLT_MAX, -FLT_MAX, same_bits<float>(0x7f800001u), same_bits<float>(~0u)})
        bfloats.rounded(bfloat16_format, x, stochastic_bfloat16(x, random).bits);
    }
  }
  TEST_CASE("0 stays 0, whatever the random number") {
    CHECK(stochastic_half(0, ~uint64_t(0)).bits == 0);
    CHECK(stochastic_half(-0.f, ~uint64_t(0)).bits == 0x8000);
  }
  TEST_CASE("1000 small steps are right on average") {
    // 1e-4 among neighbours d apart goes up with chance p = 1e-4 / d: variance d^2 p (1 - p), 1000 times, in 512 weights.
    // Both bounds are 5 standard deviations of the estimate.
    for (Type type : types_16) {
      const double d = 2 * format_of(type)->half_step(1), p = 1e-4 / d, variance = 1000 * d * d * p * (1 - p);
      const Matrix w = get(thousand_small_steps(type, Update::stochastic).W);
      CHECK(std::fabs(w.mean() - 1.1) <= 5 * std::sqrt(variance / 512));
      const double found = w.each([](double x) { return (x - 1.1) * (x - 1.1); }).mean();
      CHECK(std::fabs(found / variance - 1) <= 5 * std::sqrt(2. / 512));  // each weight has its own chance
    }
  }
  TEST_CASE("another weight, another layer, another step and another seed choose anew") {
    const auto after = [](uint64_t seed, int steps) {  // 1 + 2^-11 lies in the middle
      Mlp net = make_mlp({30, 30, 30}, 1, Type::fp16, Update::stochastic);
      net.seed = seed;
      LossScaler scaler(1);
      fill_gradients(net, -1);
      for (int step = 0; step < steps; step++) {
        for (int l = 1; l <= 2; l++)
          set_parameters(net.layer[l], std::vector<float>(900, 1), std::vector<float>(30, 1));
        update(net, scaler, 0x1p-11f), scaler.update();
      }
      return std::make_pair(get(net.layer[1].W), get(net.layer[2].W));
    };
    const auto [W1, W2] = after(1, 1);
    for (double w : W1.v) CHECK_MESSAGE((w == 1 || w == 1 + 0x1p-10), "neighbours of 1 + 2^-11");
    CHECK(std::fabs(W1.mean() - (1 + 0x1p-11)) <= 5 * 0x1p-11 / 30);  // 5 standard deviations of 900 coins
    CHECK(W1.v != W2.v);
    CHECK(after(1, 1).first.v == W1.v);
    CHECK(after(1, 2).first.v != W1.v);
    CHECK(after(2, 1).first.v != W1.v);
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
    for (Type type : types_16) {
      const Layer layer = thousand_small_steps(type, Update::master);
      compare("the master", get(kept_W(layer)), Matrix(8, 64, want));
      compare("its copy", get(layer.W), Matrix(8, 64, format_of(type)->round(want)));
      compare("half: stays 1", get(thousand_small_steps(type, Update::half).W), Matrix(8, 64, 1));
    }
  }
  TEST_CASE("half: the sum itself is rounded to 16 bits") {
    for (Type type : types_16) check_update(Update::half, type);
  }
}
TEST_SUITE("update_kahan") {
  TEST_CASE("w and the compensation follow arXiv 2010.06192, every operation in 16 bits") {
    for (Type type : types_16) check_update(Update::kahan, type);
  }
  TEST_CASE("1000 small steps are 0.1, to a step of the format") {
    for (Type type : types_16) {
      Weight want = {1, 0};
      for (int i = 0; i < 1000; i++) want = updated(Update::kahan, type, want, -1, 1e-4f, false);
      CHECK(std::fabs(want.w - 1.1) <= 2 * format_of(type)->half_step(1.1));
      const Layer layer = thousand_small_steps(type, Update::kahan);
      compare("the weights", get(layer.W), Matrix(8, 64, want.w));
      compare("what they still owe", get(layer.compensation), Matrix(1, layer.compensation.cols, want.c));
    }
  }
}

// ==== CUDA on a CPU ==================================================================================================
#if !defined(MP_CUDA)  // on a GPU there is no emulation to prove, and this file has no compiler for kernels
template <bool barrier> __global__ void reverse_kernel(const int* in, int* out) {
  __shared__ int tile[128];
  poison_shared(tile);
  const int i = threadIdx.x, n = blockDim.x, first = blockIdx.x * n;
  tile[i] = in[first + i];
  if (barrier) __syncthreads();
  out[first + i] = tile[n - 1 - i];
}
template <bool barrier> __global__ void rotate_kernel(const int* in, int* out) {  // all read, and only then write
  __shared__ int tile[128];
  const int i = threadIdx.x, n = blockDim.x, first = blockIdx.x * n;
  tile[i] = in[first + i];
  __syncthreads();
  const int neighbour = tile[(i + 1) % n];
  if (barrier) __syncthreads();
  tile[i] = neighbour;
  __syncthreads();
  out[first + i] = tile[i];
}
template <bool barrier> __global__ void swap_kernel(const int* in, int* out) {  // within a warp
  __shared__ int tile[128];
  poison_shared(tile);
  const int i = threadIdx.x, n = blockDim.x, first = blockIdx.x * n;
  tile[i] = in[first + i];
  if (barrier) __syncwarp();
  out[first + i] = tile[std::min(i ^ 1, n - 1)];
}
__global__ void unwritten_kernel(float* out) {  // only block 0 writes number 5
  __shared__ float tile[8];
  poison_shared(tile);
  const int i = threadIdx.x, block = blockIdx.x;
  if (i != 5 || block == 0) tile[i] = 1;
  __syncthreads();
  out[block * 8 + i] = tile[i];
}
__global__ void log_kernel(std::vector<int>* log) { log->push_back(int(blockIdx.x * blockDim.x + threadIdx.x)); }
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
__global__ void visit_kernel(int* visits) {
  const dim3 g = gridDim, b = blockDim;
  const uint3 block = blockIdx, t = threadIdx;
  __syncthreads();  // the indices outlive a switch of fibers
  const bool same = t.x == threadIdx.x && t.y == threadIdx.y && t.z == threadIdx.z && block.z == blockIdx.z;
  const int x = block.x * b.x + t.x, y = block.y * b.y + t.y, z = block.z * b.z + t.z;
  visits[(z * int(g.y * b.y) + y) * int(g.x * b.x) + x] += same ? 1 : 100;
}
template <class T> __global__ void shuffle_kernel(T* out) {  // five exchanges, a row of `out` each
  const int i = threadIdx.x, n = blockDim.x, lane = i % 32;
  const T mine = T(100 * i + 7);
  out[i] = __shfl_sync(~0u, mine, 3);
  out[n + i] = __shfl_down_sync(~0u, mine, 4);
  out[2 * n + i] = __shfl_xor_sync(~0u, mine, 1);
  if (lane % 2 == 0) out[3 * n + i] = __shfl_xor_sync(0x55555555u, mine, 2);
  else out[3 * n + i] = __shfl_xor_sync(0xaaaaaaaau, mine, 2);  // the other half, meanwhile
  __syncthreads();
  if (lane < 4) out[4 * n + i] = __shfl_sync(0xfu, mine, (lane + 1) & 3);
}
__global__ void half_a_barrier_kernel() { threadIdx.x == 0 ? __syncwarp() : __syncthreads(); }
__global__ void not_in_mask_kernel() { __syncwarp(0x0eu); }
__global__ void two_instructions_kernel() { threadIdx.x == 0 ? __syncwarp() : void(__shfl_sync(~0u, 1, 0)); }
__global__ void good_kernel() { __syncthreads(); }
__global__ void overlapping_masks_kernel() {  // correct: all 32 lanes meet after half of them have met
  if (threadIdx.x < 16) __shfl_down_sync(0xffffu, 1, 8);
  __syncwarp();
}
__global__ void overflow_kernel() {  // more than the stack of any thread but the first, which has the OS thread's
  volatile char large[80 * 1024];
  large[threadIdx.x] = 1;
  if (large[threadIdx.x]) __syncthreads();
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
// What a kernel, run by itself, says on standard error, and how that ends
static std::string last_words(void (*kernel)(), cpu::Order order = cpu::forward) {
  const int os_threads = int(cpu::pool()->helpers.size()) + 1;
  cpu::use_os_threads(1);  // fork() takes no other thread along
  int ends[2], status = 0;
  REQUIRE(pipe(ends) == 0);
  const pid_t child = fork();
  if (child == 0) {
    const rlimit no_core = {0, 0};
    setrlimit(RLIMIT_CORE, &no_core);
    for (int died : {SIGABRT, SIGSEGV}) std::signal(died, SIG_DFL);  // not doctest's business
    dup2(ends[1], 2), alarm(60);
    cpu::order = order;
    launch(kernel, 1, 32);
    _exit(0);
  }
  close(ends[1]);
  std::string words;
  char buffer[256];
  for (ssize_t n; (n = ::read(ends[0], buffer, sizeof buffer)) > 0;) words.append(buffer, size_t(n));
  close(ends[0]), waitpid(child, &status, 0);
  cpu::use_os_threads(os_threads);
  return words + (WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT ? "aborted" : status ? "?" : "went on");
}

// The instructions of tensor cores, one warp; their layouts are the PTX manual's, which numbers a fragment's elements i.
static void ldmatrix_kernel(const uint16_t* rows, bool transposed, uint32_t* out) {
  alignas(16) static thread_local uint16_t tile[32 * 8];
  const int lane = int(threadIdx.x);
  std::memcpy(tile + 8 * lane, rows + 8 * lane, 16);
  __syncwarp();
  uint32_t r[4];
  transposed ? ldmatrix_x4<true>(r, tile + 8 * lane) : ldmatrix_x4<false>(r, tile + 8 * lane);
  std::memcpy(out + 4 * lane, r, 16);
}
template <class T> static void mma_kernel(const T* a, const T* b, float* d) {
  const int lane = int(threadIdx.x);
  uint32_t a_fragment[4], b_fragment[2];
  float d_fragment[4];
  std::memcpy(a_fragment, a + 8 * lane, 16), std::memcpy(b_fragment, b + 4 * lane, 8);
  std::memcpy(d_fragment, d + 4 * lane, 16);
  mma_16x8x16<T>(d_fragment, a_fragment, b_fragment);
  std::memcpy(d + 4 * lane, d_fragment, 16);
}
static void late_copy_kernel(const float* from, float* seen) {  // [6]: after each stage of two copies
  alignas(16) static thread_local float to[8];
  copy_16_bytes_async(to, from, 16), copy_commit();
  copy_16_bytes_async(to + 4, from + 4, 6), copy_commit();
  seen[0] = to[0], seen[1] = to[4];
  copy_wait<1>();
  seen[2] = to[3], seen[3] = to[4];
  copy_wait<0>();
  std::memcpy(seen + 4, to + 4, 16);
}
static void misaligned_kernel() {
  alignas(16) static thread_local float to[8];
  copy_16_bytes_async(to, to + 1, 16);
}

TEST_SUITE("cuda_on_a_cpu") {
  TEST_CASE("ldmatrix: lane 4 g + t gets elements (g, 2t) and (g, 2t + 1) of each matrix, or of its transpose") {
    std::vector<uint16_t> rows(256);
    for (size_t i = 0; i < rows.size(); i++) rows[i] = uint16_t(i * 251);
    for (bool transposed : {false, true}) {
      std::vector<uint32_t> out(128);
      launch(ldmatrix_kernel, 1, 32, rows.data(), transposed, out.data());
      for (size_t lane = 0; lane < 32; lane++)
        for (size_t i = 0; i < 4; i++)
          for (size_t e = 0, g = lane / 4, t = 2 * (lane % 4); e < 2; e++)
            CHECK(uint16_t(out[4 * lane + i] >> 16 * e) ==
                  rows[64 * i + (transposed ? 8 * (t + e) + g : 8 * g + t + e)]);
    }
  }
  TEST_CASE_TEMPLATE("mma: d += a b, by the PTX manual's fragments", T, half, bfloat16) {
    const Type type = std::is_same<T, half>::value ? Type::fp16 : Type::bf16;
    Random random{30};
    const Matrix A = rounded(random_matrix(random, 16, 16, 1), type),
                 B = rounded(random_matrix(random, 16, 8, 1), type);
    const Matrix C = rounded(random_matrix(random, 16, 8, 1), type), want = A * B;
    const auto number = [](double x) {
      if constexpr (std::is_same<T, half>::value) return float_to_half(float(x));
      else return float_to_bfloat16(float(x));
    };
    std::vector<T> a, b;
    std::vector<float> d;
    const auto d_row = [](int lane, int i) { return lane / 4 + (i < 2 ? 0 : 8); };
    const auto d_col = [](int lane, int i) { return lane % 4 * 2 + (i & 1); };
    for (int lane = 0; lane < 32; lane++) {
      const int group = lane >> 2, in_group = lane % 4;
      for (int i = 0; i < 8; i++)
        a.push_back(
            number(A((i < 2 || (i >= 4 && i < 6)) ? group : group + 8, in_group * 2 + (i & 1) + (i < 4 ? 0 : 8))));
      for (int i = 0; i < 4; i++) b.push_back(number(B(in_group * 2 + (i & 1) + (i < 2 ? 0 : 8), group)));
      for (int i = 0; i < 4; i++) d.push_back(float(C(d_row(lane, i), d_col(lane, i))));
    }
    launch(mma_kernel<T>, 1, 32, a.data(), b.data(), d.data());
    for (int lane = 0; lane < 32; lane++)
      for (int i = 0; i < 4; i++) {
        const int row = d_row(lane, i), col = d_col(lane, i);
        // products of 11-bit numbers are exact in fp32; 16 additions of sums below 16 x 4 x 4 round by half a step each
        CHECK(std::fabs(d[size_t(4 * lane + i)] - (want(row, col) + C(row, col))) <= 16 * 256 * std::ldexp(1., -24));
      }
  }
  TEST_CASE("a copy lands at its wait, not before, and what it does not read is 0") {
    alignas(16) float from[8] = {1, 2, 3, 4, 5, 6, 7, 8}, seen[8] = {};
    launch(late_copy_kernel, 1, 1, (const float*)from, (float*)seen);
    CHECK((std::isnan(seen[0]) && std::isnan(seen[1])));
    CHECK((seen[2] == 4 && std::isnan(seen[3])));
    uint32_t second;
    std::memcpy(&second, seen + 5, 4);
    uint32_t six;
    std::memcpy(&six, from + 5, 4);
    CHECK((seen[4] == 5 && second == (six & 0xffff) && seen[6] == 0 && seen[7] == 0));
    CHECK(last_words(misaligned_kernel).find("multiple of 16 bytes") != std::string::npos);
  }
  TEST_CASE("a barrier makes every order of threads the same, and its absence shows") {
    using Kernel = void (*)(const int*, int*);
    for (int threads : {2, 31, 32, 33, 100, 128}) {
      std::vector<int> in, reversed, rotated, swapped;
      for (int i = 0; i < 5 * threads; i++) in.push_back(1000 + i);
      for (int i = 0; i < 5 * threads; i++) {
        const int first = i / threads * threads, thread = i % threads;
        reversed.push_back(in[size_t(first + threads - 1 - thread)]);
        rotated.push_back(in[size_t(first + (thread + 1) % threads)]);
        swapped.push_back(in[size_t(first + std::min(thread ^ 1, threads - 1))]);
      }
      const auto differ = [&](const std::vector<int>& want, Kernel kernel) {
        return orders_that_differ(want, [&] {
          std::vector<int> out(in.size());
          return launch(kernel, 5, threads, in.data(), out.data()), out;
        });
      };
      INFO(threads, " threads");
      CHECK(differ(reversed, reverse_kernel<true>) == 0);
      CHECK(differ(reversed, reverse_kernel<false>) > 0);
      CHECK(differ(rotated, rotate_kernel<true>) == 0);
      CHECK(differ(rotated, rotate_kernel<false>) > 0);
      CHECK(differ(swapped, swap_kernel<true>) == 0);
      CHECK(differ(swapped, swap_kernel<false>) > 0);
    }
  }
  TEST_CASE("forward, backward and every seed: another order of threads and of blocks, and poison before each block") {
    const int os_threads = int(cpu::pool()->helpers.size()) + 1;
    const auto before = std::make_tuple(cpu::order, cpu::seed, cpu::poison);
    const auto run = [](cpu::Order order, unsigned seed) {
      std::vector<int> log;
      cpu::order = order, cpu::seed = seed, launch(log_kernel, 3, 40, &log);
      return log;
    };
    cpu::use_os_threads(1);
    std::vector<int> forward, sorted = run(cpu::shuffled, 1);
    for (int i = 0; i < 120; i++) forward.push_back(i);
    CHECK(run(cpu::forward, 1) == forward);
    CHECK(run(cpu::backward, 1) == std::vector<int>(forward.rbegin(), forward.rend()));
    CHECK(sorted != forward);
    CHECK(sorted == run(cpu::shuffled, 1));
    CHECK(sorted != run(cpu::shuffled, 2));
    std::sort(sorted.begin(), sorted.end());
    CHECK(sorted == forward);
    std::vector<float> out(3 * 8);
    cpu::order = cpu::forward, cpu::poison = true, launch(unwritten_kernel, 3, 8, out.data());
    for (size_t i = 0; i < out.size(); i++) CHECK((i == 13 || i == 21 ? std::isnan(out[i]) : out[i] == 1));
    std::tie(cpu::order, cpu::seed, cpu::poison) = before;
    cpu::use_os_threads(os_threads);
  }
  TEST_CASE("threads that end early are not waited for") {
    for (int stay : {1, 31, 64, 65, 128}) {
      std::vector<int> want;
      for (int block = 0; block < 40; block++) want.push_back(stay * (stay - 1) / 2 + stay * block);
      CHECK(orders_that_differ(want, [&] {
              std::vector<int> out(40);
              return launch(leave_early_kernel, 40, 128, out.data(), stay), out;
            }) == 0);
    }
  }
  TEST_CASE("every thread of every block runs once, in one, two and three dimensions") {
    for (const auto& size : {std::make_pair(dim3(3, 2, 2), dim3(5, 3, 2)),
                             {1000, 1},
                             {1, 1000},
                             {dim3(4, 7), dim3(8, 8)},
                             {dim3(1, 1, 50), dim3(1, 2, 20)}}) {
      const dim3 g = size.first, b = size.second;
      const size_t count = size_t(g.x) * g.y * g.z * b.x * b.y * b.z;
      CHECK(orders_that_differ(std::vector<int>(count, 1), [&] {
              std::vector<int> visits(count);
              return launch(visit_kernel, g, b, visits.data()), visits;
            }) == 0);
    }
  }
  TEST_CASE("more blocks than cores: the same on one OS thread, two and seven") {
    const int before = int(cpu::pool()->helpers.size()) + 1;
    std::vector<int> in(100 * 128), want(in.size());
    for (size_t i = 0; i < in.size(); i++) in[i] = int(i), want[i / 128 * 128 + 127 - i % 128] = int(i);
    for (int os_threads : {1, 2, 7}) {
      cpu::use_os_threads(os_threads);
      for (int run = 0; run < 50; run++) {
        std::vector<int> out(in.size());
        launch(reverse_kernel<true>, 100, 128, in.data(), out.data());
        CHECK(out == want);
      }
    }
    cpu::use_os_threads(before);
  }
  TEST_CASE_TEMPLATE("lanes of a warp exchange numbers, also in warps that are not full", T, int, float, double) {
    for (int n : {1, 5, 32, 45, 64, 77})
      CHECK(orders_that_differ(std::vector<int>(size_t(5 * n)), [&] {
              std::vector<T> got(size_t(5 * n));
              launch(shuffle_kernel<T>, 1, n, got.data());
              std::vector<int> wrong;
              for (int i = 0; i < 5 * n; i++) {
                const int thread = i % n, lane = thread % 32, warp = thread - lane, which = i / n;
                const int from[] = {3, lane + 4 < 32 ? lane + 4 : lane, lane ^ 1, lane ^ 2, (lane + 1) & 3};
                const bool defined = warp + from[which] < n && (which < 4 || lane < 4);  // else the lane does not exist
                wrong.push_back(defined && !(got[size_t(i)] == T(100 * (warp + from[which]) + 7)));
              }
              return wrong;
            }) == 0);
  }
  TEST_CASE("threads that would wait for ever say where, and the program ends") {
    const std::string words = last_words(half_a_barrier_kernel);
    const auto contains = [](const std::string& all, const char* part) {
      CHECK_MESSAGE(all.find(part) != std::string::npos, "wanted: ", part, "; got: ", all);
    };
    for (const char* part : {"block (0,0,0)", "the threads wait for each other", "thread 0 waits in __syncwarp",
                             "thread 1 waits in __syncthreads", "aborted"})
      contains(words, part);
    contains(last_words(not_in_mask_kernel), "not in its own mask");
    contains(last_words(two_instructions_kernel), "different instructions");
    contains(last_words(good_kernel), "went on");
    CHECK(last_words(overflow_kernel).find("went on") == std::string::npos);
  }
  TEST_CASE("lanes may wait with a mask of all while others are busy with a mask of some") {
    for (cpu::Order order : {cpu::forward, cpu::backward, cpu::shuffled})
      CHECK(last_words(overlapping_masks_kernel, order) == "went on");
  }
}
#endif

// ==== PyTorch's own figures ==========================================================================================
// nn.Sequential(Linear(6, 5), ReLU(), Linear(5, 4)) on 12 images in batches of 4, 24 steps in file order, by PyTorch 2.15 on a
// CPU: losses, and the loss scales of torch.amp.autocast (float16) and GradScaler(init_scale=2**20, growth_interval=3).
struct Recorded {
  const char* name;
  Loss loss;
  float lr;
  double fp32[24], fp16[24];  // losses
  int log2_scale[24];         // of fp16
};
static const Recorded recorded[] = {
    {"cross-entropy",
     Loss::cross_entropy,
     0.5f,
     {1.49022341, 1.67901206, 1.42582583, 1.3837347,  1.43274081, 1.32005167, 1.38757038, 1.33581066,
      1.26466322, 1.41413689, 1.2900877,  1.22817302, 1.42953551, 1.26563978, 1.19894624, 1.430439,
      1.25689578, 1.17242205, 1.41977394, 1.25278461, 1.14683914, 1.39883196, 1.24772668, 1.12118161},
     {1.49030399, 1.76860845, 1.60631549, 1.49030399, 1.67898989, 1.42586625, 1.38372469, 1.43278468,
      1.33229613, 1.36727643, 1.41267049, 1.27415812, 1.39110291, 1.32694662, 1.23513651, 1.40487766,
      1.28078866, 1.25037062, 1.4172442,  1.22279882, 1.21055448, 1.4560082,  1.24011469, 1.16981876},
     {20, 19, 18, 17, 17, 17, 18, 18, 17, 17, 17, 18, 18, 18, 19, 18, 18, 18, 19, 18, 18, 18, 19, 18}},
    {"squared error",
     Loss::squared_error,
     0.1f,
     {0.897318482, 0.991039038, 0.685812354, 0.569068968, 0.668896019, 0.482338369, 0.453166962, 0.524701953,
      0.394814342, 0.405712843, 0.45710057,  0.358452976, 0.389543772, 0.424062371, 0.339256048, 0.38536337,
      0.406629354, 0.328387022, 0.385279924, 0.396411359, 0.321139753, 0.384876519, 0.38776958,  0.317064106},
     {0.89744699,  1.16781998,  0.992802382, 0.89744699,  1.16781998,  0.992802382, 0.742527783, 0.856549442,
      0.587287605, 0.523102343, 0.616670012, 0.439181089, 0.435380697, 0.500431359, 0.376757205, 0.403633177,
      0.450987101, 0.369909883, 0.387015104, 0.420641243, 0.346920967, 0.380946904, 0.399555415, 0.332198799},
     {20, 19, 18, 17, 16, 15, 15, 15, 16, 16, 16, 17, 17, 17, 18, 17, 17, 17, 18, 18, 18, 19, 18, 18}}};

// The same 24 steps by mp; the loss scale of each goes to `log2_scale`.
static std::vector<double> recorded_steps(const Recorded& r, Type type, std::vector<int>& log2_scale) {
  const auto numbers = [](int n, int salt) {
    std::vector<float> values;
    for (int i = 0; i < n; i++) values.push_back(float((i * 37 + salt) % 64 - 32) / 64);
    return values;
  };
  std::vector<uint8_t> pixel, label;
  for (int i = 0; i < 72; i++) pixel.push_back(uint8_t((i * i * 29 + i * 53 + 7) % 256));
  for (int i = 0; i < 12; i++) label.push_back(uint8_t((i * 7 + i / 5) % 4));
  const Tensor pixels = on_device(pixel), labels = on_device(label);
  Mlp net = make_mlp({6, 5, 4}, 4, type, Update::master);
  net.loss = r.loss;
  set_parameters(net.layer[1], numbers(30, 11), numbers(5, 3));
  set_parameters(net.layer[2], numbers(20, 29), numbers(4, 17));
  LossScaler scaler = type == Type::fp16 ? LossScaler(0x1p20f, 2, 0.5f, 3) : LossScaler(1, 1, 1);
  Batch batch;
  batch.pixels = pixels.as<uint8_t>(), batch.labels = labels.as<uint8_t>(), batch.rows = 4;
  std::vector<double> mean_losses;
  for (int step = 0; step < 24; step++) {
    StepState state = scaler.read();
    state.position = step % 3;
    scaler.write(state);
    log2_scale.push_back(std::ilogb(state.scale));
    train_step(net, batch, scaler, r.lr);
    mean_losses.push_back(scaler.read().loss);
  }
  return mean_losses;
}
TEST_SUITE("pytorch") {
  TEST_CASE("fp32 losses are PyTorch's") {
    for (const Recorded& r : recorded) {
      std::vector<int> scales;
      const std::vector<double> got = recorded_steps(r, Type::fp32, scales);
      // a loss is some 20 operations; a step adds its own errors to weights of about 1
      for (int i = 0; i < 24; i++)
        CHECK_MESSAGE(std::fabs(got[i] - r.fp32[i]) <= 20 * (i + 1) * e, r.name, ", step ", i, ": ", got[i], ", not ",
                      r.fp32[i]);
    }
  }
  TEST_CASE("fp16 losses and loss scales are PyTorch's, through overflow and growth") {
    for (const Recorded& r : recorded) {
      std::vector<int> scales;
      const std::vector<double> got = recorded_steps(r, Type::fp16, scales);
      for (int i = 0; i < 24; i++) {
        CHECK_MESSAGE(scales[i] == r.log2_scale[i], r.name, ", step ", i, ": scale 2^", scales[i], ", not 2^",
                      r.log2_scale[i]);
        // logits of about 1 are rounded to 2^-11; another order of adding may round one of them the other way
        CHECK_MESSAGE(std::fabs(got[i] - r.fp16[i]) <= 0x1p-11, r.name, ", step ", i, ": ", got[i], ", not ",
                      r.fp16[i]);
      }
    }
  }
}

// ==== 5 The program: data, checkpoints, and mp itself, called as a person calls it ===================================
namespace {

using std::string;
using Words = std::vector<string>;

struct Folder {  // a new one for each test case, gone at its end
  string path = (std::filesystem::temp_directory_path() / "mp-XXXXXX").string();
  Folder() { REQUIRE(mkdtemp(path.data()) != nullptr); }
  ~Folder() { std::filesystem::remove_all(path); }
  void put(const string& name, const string& bytes) const {
    std::ofstream(path + "/" + name, std::ios::binary) << bytes;
  }
  string get(const string& name) const {  // empty if there is no such file
    std::ifstream file(path + "/" + name, std::ios::binary);
    return {std::istreambuf_iterator<char>(file), {}};
  }
  Words names() const {  // of its files
    Words all;
    for (const auto& file : std::filesystem::directory_iterator(path)) all.push_back(file.path().filename().string());
    return std::sort(all.begin(), all.end()), all;
  }
};
void check_words(const string& message, const Words& words) {
  for (const string& word : words) CHECK_MESSAGE(message.find(word) != string::npos, "no '", word, "' in: ", message);
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
uint32_t crc(const string& bytes) {
  uint32_t rest = ~0u;
  for (const char byte : bytes) {
    rest ^= uint8_t(byte);
    for (int bit = 0; bit < 8; bit++) rest = rest >> 1 ^ (rest & 1 ? 0xedb88320 : 0);
  }
  return ~rest;
}
string stored(const string& bytes) {  // deflate without compression
  string blocks;
  for (size_t at = 0; at == 0 || at < bytes.size(); at += 65535) {
    const string part = bytes.substr(at, 65535);
    blocks += char(at + 65535 >= bytes.size()) + little(part.size(), 2) + little(~part.size(), 2) + part;
  }
  return blocks;
}
string gzip(const string& bytes, int flags = 0, const string& fields = "") {
  return "\x1f\x8b\x08" + string(1, char(flags)) + string(6, '\0') + fields + stored(bytes) + little(crc(bytes), 4) +
         little(bytes.size(), 4);
}
string chunk(const string& type, const string& data) { return big(data.size()) + type + data + big(crc(type + data)); }
string png(uint32_t width, uint32_t height, const string& pixels, int bits = 8, int kind = 0) {
  const size_t wide = size_t(width) * size_t(bits / 8) * size_t(1 + (kind & 2) + kind / 4);  // grey, colour; alpha
  string rows;  // each begins with its filter: none
  for (size_t at = 0; at < pixels.size(); at += wide) rows += '\0' + pixels.substr(at, wide);
  return "\x89PNG\r\n\x1a\n" + chunk("IHDR", big(width) + big(height) + char(bits) + char(kind) + string(3, '\0')) +
         chunk("IDAT", "\x78\x01" + stored(rows) + "????") + chunk("IEND", "");
}
string sheet(uint32_t rows, uint32_t side) {  // every pixel of a tile is a mixture of its row and its column
  string pixels;
  for (uint32_t y = 0; y < rows * side; y++)
    for (uint32_t x = 0; x < 100 * side; x++) pixels += char(y / side * 3 + x / side + 7 * (y % side) + x % side);
  return png(100 * side, rows * side, pixels);
}
string labels(const string& values) { return big(0x801) + big(values.size()) + values; }
string images(uint32_t count, uint32_t rows, uint32_t columns, const string& pixels) {
  return big(0x803) + big(count) + big(rows) + big(columns) + pixels;
}
string tensors(const string& header, const string& data) { return little(header.size(), 8) + header + data; }
string entry(const string& name, const string& type, const string& shape, const string& offsets) {  // of the header
  return "\"" + name + R"(":{"dtype":")" + type + R"(","shape":[)" + shape + R"(],"data_offsets":[)" + offsets + "]}";
}
const string train_images = "train-images-idx3-ubyte", train_labels = "train-labels-idx1-ubyte",
             test_images = "t10k-images-idx3-ubyte", test_labels = "t10k-labels-idx1-ubyte";
void put_mnist(const Folder& folder) {
  folder.put(train_images, images(3, 2, 2, "abcdefghijkl"));
  folder.put(train_labels + ".gz", gzip(labels({0, 9, 5}), 31, little(3, 2) + "abcname" + '\0' + "text" + '\0' + "cc"));
  folder.put(test_images + ".gz", gzip(images(1, 2, 2, "wxyz")));
  folder.put(test_labels, labels({7}));
}
// Cuts the file after each byte, then flips each bit. Every cut must be told, and every flip from byte `sure` on.
template <class F> void damage(const string& bytes, size_t sure, F read) {
  CHECK(read(bytes) == "");
  for (size_t size = 0; size < bytes.size(); size++) CHECK_MESSAGE(read(bytes.substr(0, size)) != "", size, " left");
  for (size_t bit = 0; bit < 8 * bytes.size(); bit++) {
    string flipped = bytes;
    flipped[bit / 8] = char(flipped[bit / 8] ^ 1 << bit % 8);
    CHECK_MESSAGE((read(flipped) != "" || bit / 8 < sure), "bit ", bit, " flipped");
  }
}

// ---- The program at work ----
struct Outcome {
  int status;  // 1000 and the signal's number where one killed it
  string out, err;
};
struct Workplace : Folder {  // with data so small that a run takes milliseconds
  explicit Workplace(int count = 300) {
    for (const bool test : {false, true}) {  // 4 x 4 pixels; two bright ones tell the class
      string pixels, classes;
      unsigned random = test;
      for (int i = 0; i < (test ? 100 : count); i++) {
        const int c = i * 7 % 10;
        classes += char(c);
        for (int p = 0; p < 16; p++) {
          random = random * 1664525 + 1013904223;
          pixels += char(random >> 26 | (p == c || p == (3 * c + 5) % 16 ? 192 : 0));
        }
      }
      put(test ? test_images : train_images, images(uint32_t(classes.size()), 4, 4, pixels));
      put(test ? test_labels : train_labels, labels(classes));
    }
  }
  // In this folder, by a shell: `words` may redirect, `before` may set variables and limits.
  pid_t start(const string& words, const string& before = "") const {
    const char* const name = getenv("MP_PROGRAM");
    const string program = std::filesystem::absolute(name ? name : "build/mp").string();
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
  Outcome train(string words, const string& before = "") const {
    for (const string option : {"--epochs 2", "--batch 10", "--layers 16,8,10", "--data ."})
      if (words.find(option.substr(0, option.find(' '))) == string::npos) words = option + " " + words;
    return run("train " + words, before);
  }
  Outcome resume(const string& words) const { return run("train --data . --resume " + words); }
  SafeTensors model(const string& name) const { return read_safetensors(path + "/" + name); }
};
void check_success(const Outcome& o) {
  CHECK_MESSAGE((o.status == 0 && o.err == ""), "status ", o.status, ", ", o.err);
}
void check_refused(const Outcome& o, const Words& words, int status = 1) {  // 2: the usage follows
  CHECK_MESSAGE(o.status == status, o.out, o.err);
  CHECK_MESSAGE(o.err.rfind("mp: ", 0) == 0, o.err);
  CHECK_MESSAGE((status == 2 || o.err.find('\n') + 1 == o.err.size()), "more than a line: ", o.err);
  CHECK_MESSAGE((status != 2 || (o.out == "" && o.err.find("\nusage: mp train") != string::npos)), o.err);
  check_words(o.err.substr(0, o.err.find('\n')), words);
}
string last_line(const string& s) { return s.size() < 2 ? s : s.substr(s.rfind('\n', s.size() - 2)); }

template <size_t N> std::vector<std::array<double, N>> rows_of(const string& text) {  // the lines that are N numbers
  std::vector<std::array<double, N>> rows;
  std::istringstream lines(text);
  for (string line; std::getline(lines, line);) {
    std::array<double, N> row;
    size_t n = 0;
    const char* at = line.c_str() + strspn(line.c_str(), " ");
    for (char* end; n < N && *at && (row[n] = strtod(at, &end), end != at); n++) at = end + strspn(end, " ,%");
    if (n == N && !*at) rows.push_back(row);
  }
  return rows;
}
enum { EPOCH, LOSS, ACCURACY, SCALE, SKIPPED, RATE, SECONDS };  // of the table, which has a row an epoch
auto table_of(const Outcome& o) { return rows_of<7>(o.out); }
auto log_of(const Folder& folder, int step = 0) {  // step, epoch, loss, loss_scale, found_inf
  const string csv = folder.get("log.csv");
  const auto rows = rows_of<5>(csv);
  string again = "step,epoch,loss,loss_scale,found_inf\n";
  char line[100];
  for (const auto& row : rows) {
    snprintf(line, sizeof line, "%d,%.0f,%.9g,%.9g,%.0f\n", step++, row[1], float(row[2]), float(row[3]), row[4]);
    again += line;
  }
  CHECK(csv == again);
  return rows;
}

}  // namespace

TEST_SUITE("data") {
  TEST_CASE("a file is replaced as a whole or not at all") {
    const Folder folder;
    const string path = folder.path + "/file";
    write_file(path, string("\0\xff\n", 3));
    CHECK(read_file(path) == std::vector<uint8_t>{0, 255, '\n'});
    std::filesystem::create_symlink("file", folder.path + "/link");
    write_file(folder.path + "/link", "");  // through the link: the file is the one replaced
    CHECK(read_file(path).empty());
    CHECK(std::filesystem::is_symlink(folder.path + "/link"));
    check_words(error_of([&] { write_file(folder.path + "/no/file", ""); }), {"no/file", "make its folder first"});
    check_words(error_of([&] { write_file(folder.path, ""); }), {"folder"});
    CHECK(folder.names() == Words{"file", "link"});  // no temporary file is left
    check_words(error_of([&] { read_file(folder.path); }), {"folder"});
    check_words(error_of([&] { read_file("/dev/null"); }), {"device"});
    check_words(error_of([&] { read_file(path + "\n2"); }), {"file?2: No such file", "check the name"});
  }
  TEST_CASE("sheets: row r of tiles is digit r mod 10") {
    const Folder folder;
    folder.put("test.png", sheet(1, 3));
    check_words(error_of_data(folder), {"train.png is missing", "make digits"});
    folder.put("train.png", sheet(12, 3));
    const Dataset data = load_dataset(folder.path);
    CHECK((data.train.count == 1200 && data.train.pixels == 9));
    CHECK(data.test.label == std::vector<uint8_t>(100, 0));
    int wrong = 0;
    for (int i = 0; i < 1200; i++) wrong += data.train.label[i] != i / 100 % 10;
    for (int i = 0; i < 10800; i++)
      wrong += data.train.pixel[i] != uint8_t(i / 900 * 3 + i / 9 % 100 + i % 9 / 3 * 7 + i % 3);
    CHECK(wrong == 0);
    put_mnist(folder);
    check_words(load_dataset(folder.path).what, {"train.png", "MNIST", "the sheets win"});
    const string narrow(10000, 'x');
    // clang-format off
    const std::pair<string, string> bad[] = {
        {"no PNG", "hello"}, {"in colour", png(100, 1, narrow, 8, 2)}, {"in colour", png(100, 1, narrow, 8, 3)},
        {"grey with alpha", png(100, 1, narrow, 8, 4)}, {"16 bits", png(100, 1, narrow, 16)},
        {"0 pixels wide", png(0, 2, "")}, {"99 pixels wide", png(99, 1, narrow)}, {"250 pixels wide", png(250, 2, narrow)},
        {"0 pixels high", png(200, 0, "")}, {"3 pixels high", png(200, 3, string(600, 'x'))},
        {"cannot be in this file", png(65500, 65500, "x")}, {"cannot be decoded", png(100, 2, string(100, 'x'))},
        {"images of 9 and of 1 pixels", sheet(1, 1)}};
    // clang-format on
    const auto read = [&](const string& bytes) { return folder.put("test.png", bytes), error_of_data(folder); };
    for (const auto& [words, bytes] : bad) check_words(read(bytes), {folder.path, words});
    folder.put("train.png", sheet(1, 1));
    damage(sheet(1, 1), 0, read);
  }
  TEST_CASE("MNIST's files, plain and gzipped") {
    const Folder folder;
    check_words(error_of([] { load_dataset("no\n"); }), {"no?: there is no such folder", "make mnist", "make digits"});
    check_words(error_of_data(folder), {"neither", "make mnist", "make digits"});
    folder.put(train_images, "");
    check_words(error_of_data(folder), {train_labels + " is missing", "make mnist"});
    put_mnist(folder);
    const Dataset data = load_dataset(folder.path);
    CHECK(data.train.count == 3);
    CHECK(string(data.train.pixel.begin(), data.train.pixel.end()) == "abcdefghijkl");
    CHECK(data.train.label == std::vector<uint8_t>{0, 9, 5});
    CHECK(string(data.test.pixel.begin(), data.test.pixel.end()) == "wxyz");
    const auto with = [&](const string& name, const string& bytes) {
      const Folder copy;
      put_mnist(copy);
      copy.put(name, bytes);
      return error_of_data(copy);
    };
    check_words(with(test_labels, labels({10})), {test_labels, "label 0 is 10, not 0 to 9", "make mnist"});
    check_words(with(test_labels, labels("")), {test_labels, "no labels in it"});
    check_words(with(test_labels, labels({1, 2})), {test_labels, "2 labels for the 1 images"});
    check_words(with(test_labels, images(1, 1, 1, "x")), {test_labels, "no idx file of labels"});
    check_words(with(test_labels, labels({7}) + "x"), {test_labels, "promises 1 bytes, 2 follow"});
    check_words(with(train_images, images(3, 2, 3, "abcdefghijklmnopqr")), {"images of 6 and of 4 pixels"});
    check_words(with(train_images, images(~0u, ~0u, ~0u, "abc")), {"4294967295 x 4294967295 x", "3 follow"});
    check_words(with(train_images, images(769546, 494770, 48448661, "abcd")), {"promises", "4 follow"});  // 2^64 + 4
    check_words(with(train_images, images(0, 28, 28, "")), {"no images in it"});
    check_words(with(test_labels, "\x1f\x8b\x08" + string(15, '\0') + "\xff\xff\xff\xff"), {"damaged or cut short"});
    const auto read = [&](const string& bytes) { return with(test_labels, bytes); };
    damage(gzip(labels({7})), 11, read);  // byte 10 has bits that deflate ignores
    damage(labels({7}), 9, read);
    damage(images(3, 1, 4, "abcdefghijkl"), 99, [&](const string& bytes) { return with(train_images, bytes); });
  }
}

TEST_SUITE("checkpoints") {
  TEST_CASE("what is written comes back, bit for bit") {
    const Folder folder;
    const string path = folder.path + "/model", odd = "a \"quoted\\\" name, \xe6\xb7\xb7";
    const uint32_t bits[] = {0, 1, 0x80000000, 0x7f800000, 0xff800001, 0x7fc01234, 0x3f800001, 0xff7fffff};
    std::vector<float> value(8);
    memcpy(value.data(), bits, sizeof bits);
    SafeTensors file{{{"step", "12"}, {odd, odd}}, {{"0.weight", {2, 4}, value}, {odd, {}, {3}}, {"none", {0, 5}, {}}}};
    for (const bool empty : {false, true}) {
      if (empty) file = {};
      write_safetensors(path, file);
      const SafeTensors back = read_safetensors(path);
      CHECK(back.metadata == file.metadata);
      REQUIRE(back.tensors.size() == file.tensors.size());
      for (size_t i = 0; i < file.tensors.size(); i++) {
        const SavedTensor &got = back.tensors[i], &want = file.tensors[i];
        CHECK((got.name == want.name && got.shape == want.shape && got.value.size() == want.value.size()));
        for (size_t j = 0; j < want.value.size(); j++) CHECK(memcmp(&got.value.at(j), &want.value[j], 4) == 0);
      }
    }
    write_safetensors(path, {{{"b", "2"}, {"a", "1"}}, {{"x", {1, 2}, {1, -2}}}});
    const string header = R"({"__metadata__":{"a":"1","b":"2"},)" + entry("x", "F32", "1,2", "0,8") + "}";
    CHECK(folder.get("model") == tensors(header + string(7, ' '), string("\0\0\x80\x3f\0\0\0\xc0", 8)));
  }
  TEST_CASE("files of other programs: types, order, white space, escapes") {
    const Folder folder;
    const string header = R"( { "b" : {"data_offsets":[8,14],"dtype":"BF16","shape":[3]} , "a\/é\"":
        {"dtype":"F64","shape":[],"data_offsets":[0,8]},"h":{"dtype":"F16","shape":[ 2 , 1 ],"data_offsets":[14,18]}} )";
    folder.put("m", tensors(header, little(0xc000000000000000, 8) + little(0x4049bf807f80, 6) + little(0x80013c00, 4)));
    const SafeTensors file = read_safetensors(folder.path + "/m");
    REQUIRE(file.tensors.size() == 3);
    CHECK(file.tensors[0].name == "a/é\"");
    CHECK((file.tensors[0].shape.empty() && file.tensors[0].value == std::vector<float>{-2}));
    CHECK(file.tensors[1].value == std::vector<float>{INFINITY, -1, 3.140625f});
    CHECK(file.tensors[2].shape == std::vector<int64_t>{2, 1});
    CHECK(file.tensors[2].value == std::vector<float>{1, -ldexpf(1, -24)});
  }
  TEST_CASE("what is no safetensors file is refused") {
    const Folder folder;
    const auto read = [&](const string& bytes) {
      folder.put("m", bytes);
      return error_of([&] { read_safetensors(folder.path + "/m"); });
    };
    const string x = entry("x", "F32", "2", "0,8");
    // clang-format off
    const std::pair<string, string> bad[] = {
        {"without dtype", entry("x", "F32", "2", "0,8,8")}, {"no whole number", entry("x", "F32", "-2", "0,8")},
        {"no whole number", entry("x", "F32", "2,", "0,8")}, {"no ]", entry("x", "F32", "2e0", "0,8")},
        {"no whole number", entry("x", "F32", "9223372036854775808", "0,8")}, {"\"x\" is I64", entry("x", "I64", "1", "0,8")},
        {"0 to 12", entry("x", "F32", "3", "0,12")}, {"8 to 0", entry("x", "F32", "2", "8,0")},
        {"4 to 8", entry("x", "F32", "1", "4,8")}, {"4 bytes behind", entry("x", "F32", "1", "0,4")},
        {"\"x\" does not fit", entry("x", "F32", "4294967296,4294967296", "0,8")},
        {"\"x\" does not fit", entry("x", "F16", "4611686018427387904,2", "0,0")},
        {"\"y\" does not fit", x + "," + entry("y", "F32", "1", "4,8")}, {"unknown layout", R"("x":{"layout":1})"},
        {"a second x", x + "," + x}, {"a second k", R"("__metadata__":{"k":"1","k":"2"})"},
        {"no \"", R"("__metadata__":{"k":1})"}, {"no :", R"("x")"}, {"more than one object", x + "}" + '\0'},
        {"unknown escape", R"("\x":1)"}, {"unknown escape", R"("\u0061":1)"},
        {"unfinished string", "\"a\nb\":1"}};
    // clang-format on
    for (const auto& [words, inner] : bad) check_words(read(tensors("{" + inner + "}", "12345678")), {"/m: ", words});
    check_words(read("PK\x03\x04 and what else PyTorch writes"), {"no safetensors file"});
    check_words(read(little(~0ull, 8) + "{}"), {"no safetensors file", "; save it again"});
    const string good = tensors(R"({"__metadata__":{"a":"1\n"},)" + x + "}", "12345678");
    damage(good, good.size(), read);
  }
}

TEST_SUITE("command_line") {
  TEST_CASE("usage, and every option with its default") {
    const Workplace w;
    for (const string words : {"", "fly", "article --lr 1", "test", "test m --lr 1", "train x"})
      check_refused(w.run(words), {}, 2);
    // clang-format off
    const std::pair<string, string> options[] = {
        {"data DIR", "[data]"}, {"layers N", "[784,128,10]"}, {"precision fp32|fp16|bf16", "[fp16]"}, {"epochs N", "["},
        {"update master|half|kahan|stochastic", "[master]"}, {"loss-scale dynamic|N", "[dynamic]"}, {"batch N", "[64]"},
        {"scale-init N", "[65536]"}, {"growth-interval N", "[2000]"}, {"loss xent|mse", "[xent]"}, {"lr X", "["},
        {"seed N", "[1]"}, {"shuffle on|off", "[on]"}, {"init F", ""}, {"save F", ""}, {"resume F", ""}, {"log F", ""}};
    // clang-format on
    for (const string words : {"--help", "train --help"}) {
      const Outcome o = w.run(words);
      check_success(o);
      for (const auto& [option, standard] : options) {
        check_words(o.out, {"\n  --" + option});
        const string rest = o.out.substr(o.out.find("\n  --" + option) + 1);
        check_words(rest.substr(0, rest.find('\n')), {standard});
      }
    }
  }
  TEST_CASE("a malformed option: which, and what is allowed") {
    const Workplace w;
    // clang-format off
    const std::pair<string, string> wrong[] = {
        {"--speed 3", "unknown option --speed"}, {"--lr", "--lr needs a value"}, {"--save --log x", "--save needs a value"},
        {"--save ''", "--save"}, {"--resume ''", "--resume"},  // else an unset variable in a script would begin anew
        {"--lr 1 --seed 2 --lr 1", "--lr is given twice"}, {"--loss-scale word", "--loss-scale 'word' "},
        {"--layers 784", "--layers '784' needs"}, {"--layers 784,0,10", "--layers '784,0,10' must be from 1"},
        {"--layers 784,,10", "--layers '784,,10' "}, {"--layers 10000000000", "--layers '10000000000' "},
        {"--precision fp8", "--precision 'fp8' must be one of fp32, fp16, bf16"}, {"--seed -1", "--seed '-1' must be from 0"},
        {"--update adam", "--update 'adam' must be one of master, half, kahan, stochastic"},
        {"--loss l1", "--loss 'l1' must be one of xent, mse"}, {"--shuffle no", "--shuffle 'no' must be one of off, on"},
        {"--precision fp32 --update half", "--update half with --precision fp32: fp32 weights lose nothing"},
        {"--precision fp32 --update kahan", "--update kahan with --precision fp32: fp32 weights lose nothing"},
        {"--precision fp32 --update stochastic", "--update stochastic with --precision fp32: fp32 weights lose nothing"},
        {"--precision fp32 --loss-scale dynamic", "--loss-scale dynamic with --precision fp32: "}};
    // clang-format on
    for (const auto& [options, words] : wrong) check_refused(w.train(options), {words}, 2);
    for (const string option : {"--epochs", "--batch", "--growth-interval", "--lr", "--loss-scale", "--scale-init"})
      for (const string value : {"0", "-1", "nan", "inf", "1x", "", "1e400"})
        check_refused(w.train(option + " '" + value + "'"), {option, value}, 2);
    for (const string option : {"--epochs", "--batch", "--growth-interval", "--seed"})
      check_refused(w.train(option + " 1.5"), {option + " '1.5' must be a whole number"}, 2);
  }
#if !defined(MP_ASAN) && !defined(MP_CUDA)  // they need more room than any limit leaves
  TEST_CASE("where threads cannot be started, a line says so") {
    const Outcome o = Workplace().train("", "ulimit -v 1000000; MP_THREADS=1024");
    check_refused(o, {" of 1024 cannot be started", "MP_THREADS"});
  }
#endif
  TEST_CASE("every sensible combination runs") {
    const Workplace w;
    for (const string precision : {"fp16", "bf16", "fp32"})
      for (const string update : {"master", "half", "kahan", "stochastic"})
        for (const string scale : {"", " --loss-scale dynamic", " --loss-scale 1", " --loss-scale 1024"}) {
          const bool dynamic = scale == "" ? precision == "fp16" : scale == " --loss-scale dynamic";
          if (precision == "fp32" && (update != "master" || dynamic)) continue;
          const string options = "--precision " + precision + " --update " + update + scale;
          INFO(options);
          const Outcome o = w.train(options);
          check_success(o);
          const string first = o.out.substr(0, o.out.find('\n'));
          check_words(first, {"16-8-10", precision, precision == "fp32" ? "" : update});
          CHECK((first.find("dynamic loss scale") != string::npos) == dynamic);
          const auto rows = table_of(o);
          CHECK((rows.size() == 2 && rows[1][LOSS] < rows[0][LOSS] && rows[1][ACCURACY] > 50));
        }
    for (const string options : {"--loss mse", "--layers 16,10", "--batch 300"}) check_success(w.train(options));
  }
  TEST_CASE("data that cannot be used") {
    const Workplace w;
    check_refused(w.train("--data nowhere"), {"nowhere: there is no such folder"});
    check_refused(w.train("--layers 784,8,10"), {"784,8,10", "16 pixels", "--layers 16,8,10"});
    check_refused(w.train("--layers 16,8,9"), {"16,8,9", "10 classes", "--layers 16,8,10"});
    check_refused(w.train("--layers 16,100000,100000,10"), {"100000"});
    check_refused(w.train("--batch 301"), {"--batch 301", "300 images"});
    w.put(test_labels, labels(string(100, 10)));
    check_refused(w.train(""), {test_labels, "label 0 is 10"});
    w.put("train.png", sheet(1, 4).substr(0, 300));
    w.put("test.png", sheet(1, 4));
    check_refused(w.train(""), {"train.png: the file ends within"});
    w.put("train.png", sheet(10, 14)), w.put("test.png", sheet(10, 14));
    check_success(w.train("--epochs 1 --layers 196,8,10"));
    check_refused(w.train("--layers 784,128,10"), {"784,128,10", "196 pixels", "--layers 196,128,10"});
    w.put("train.png", sheet(10, 32)), w.put("test.png", sheet(10, 32));
    check_refused(w.train("--layers 784,128,10"), {"1024 pixels", "--layers 1024,128,10"});
    w.put("test.png", png(2800, 28, string(2800 * 28 * 3, 'x'), 8, 2));
    check_refused(w.train("--layers 784,128,10"), {"test.png: in colour", "8-bit grey"});
  }
}

TEST_SUITE("training") {
  TEST_CASE("the table, the log and mp test agree, and the scale follows GradScaler") {
    const Workplace w;
    const Outcome o = w.train("--batch 64 --epochs 5 --scale-init 1e9 --growth-interval 3 --save m --log log.csv");
    check_success(o);
    check_words(o.out.substr(0, o.out.find('\n')), {"CPU", "16-8-10", "fp16, fp32 master, dynamic loss scale"});
    CHECK(o.out.find_first_of("\r\033") == string::npos);  // they are for terminals
    const auto rows = table_of(o);
    const auto steps = log_of(w);
    REQUIRE((rows.size() == 5 && steps.size() == 20));  // 300 images: four batches of 64, some left out
    CHECK((steps[0][4] == 1 && steps[19][2] < steps[0][2]));
    double scale = 1e9, tracker = 0, skipped = 0, sum = 0;
    for (int i = 0; i < 20; i++) {
      CHECK(steps[i][3] == doctest::Approx(scale).epsilon(1e-8));  // nine digits
      if (steps[i][4] != 0) scale /= 2, tracker = 0, skipped++;
      else if (++tracker == 3) scale *= 2, tracker = 0;
      CHECK(steps[i][1] == i / 4 + 1);
      sum += steps[i][2];
      if (i % 4 != 3) continue;
      const auto& row = rows[i / 4];
      CHECK((row[EPOCH] == i / 4 + 1 && row[SKIPPED] == skipped && row[RATE] > 0 && row[SECONDS] >= 0));
      CHECK(std::fabs(row[LOSS] - sum / 4) < 0.6e-4);  // four decimals
      CHECK(row[SCALE] == doctest::Approx(scale).epsilon(1e-5));
      sum = 0;
    }
    char accuracy[40];
    snprintf(accuracy, sizeof accuracy, "\ntest accuracy %.2f%%\n", rows[4][ACCURACY]);
    const Outcome tested = w.run("test m --data .");
    check_success(tested);
    CHECK((last_line(tested.out) == accuracy && last_line(o.out) == accuracy));
    const auto digits = rows_of<11>(tested.out);
    REQUIRE(digits.size() == 10);
    double right = 0;
    for (int i = 0; i < 10; i++) {
      CHECK(
          (digits[i][0] == i && std::accumulate(digits[i].begin() + 1, digits[i].end(), 0.) == 10));  // of the hundred
      right += digits[i][i + 1];
    }
    CHECK(right == rows[4][ACCURACY]);
  }
  TEST_CASE("images come in the order of the file, or shuffled anew in each epoch") {
    const auto losses = [](const Workplace& w, const string& shuffle) {  // of each image; the weights stand still
      check_success(w.train("--batch 1 --lr 1e-30 --loss-scale 1 --log log.csv --shuffle " + shuffle));
      std::vector<double> all;
      for (const auto& step : log_of(w)) all.push_back(step[2]);
      REQUIRE(all.size() == 60);
      return all;
    };
    const Workplace forward(30), backward(30);
    string pixels, classes;
    for (int i = 29; i >= 0; i--)
      pixels += forward.get(train_images).substr(16 + 16 * i, 16), classes += char(i * 7 % 10);
    backward.put(train_images, images(30, 4, 4, pixels));
    backward.put(train_labels, labels(classes));
    std::vector<double> a = losses(forward, "off"), b = losses(backward, "off"), mixed = losses(forward, "on");
    CHECK(std::equal(a.begin(), a.begin() + 30, a.begin() + 30));
    CHECK(std::equal(a.begin(), a.end(), b.rbegin()));
    CHECK(!std::equal(mixed.begin(), mixed.begin() + 30, mixed.begin() + 30));
    std::sort(b.begin(), b.begin() + 30);
    for (const auto from : {mixed.begin(), mixed.begin() + 30}) {
      CHECK(!std::equal(from, from + 30, a.begin()));
      std::sort(from, from + 30);
      CHECK(std::equal(from, from + 30, b.begin()));  // every image once
    }
  }
  TEST_CASE("where no loss scale can help, a dynamic one stops and says why, a fixed one goes on") {
    const Workplace w;
    check_success(w.train("--save m"));
    const string before = w.get("m");
    check_refused(w.resume("m --epochs 4 --lr 1e4"), {"step 6", "epoch 3", " of layer ", "--lr", "bf16"});
    CHECK((w.get("m") == before));
    const Outcome fixed = w.train("--epochs 3 --lr 1e4 --loss-scale 1024 --log log.csv");
    check_success(fixed);
    double skipped = 0;
    for (const auto& step : log_of(w)) skipped += step[4];
    const auto rows = table_of(fixed);
    CHECK((rows.size() == 3 && skipped > 50 && rows[2][SKIPPED] == skipped));
  }
  TEST_CASE("MP_GEMM picks a rung of the ladder, and every rung learns the same") {
    const Workplace w;
    std::vector<double> losses;
    for (const string rung : {"naive", "tiled", "mma"})
      for (const string precision : {"fp32", "fp16"}) {
        check_success(w.train("--log log --save " + rung + precision + " --precision " + precision, "MP_GEMM=" + rung));
        const string log = w.get("log");
        losses.push_back(std::stod(log.substr(log.find(',', log.rfind("\n59,") + 4) + 1)));
      }
    // after 60 steps sums added up in other orders, or 11-bit numbers, have parted by no more than this
    for (double loss : losses) CHECK(std::fabs(loss - losses[0]) <= 60 * 0x1p-11 * losses[0]);
    CHECK(w.get("mmafp32") == w.get("tiledfp32"));  // there are no tensor cores for fp32
    check_refused(w.train("", "MP_GEMM=cublas"), {"MP_GEMM=cublas: must be naive, tiled or mma"});
    check_refused(w.run("bench --fast"), {"bench takes no option but --csv"}, 2);
  }
  TEST_CASE("the article's network: a line as it stands, a parabola with ReLU") {
    const Outcome o = Workplace().run("article");
    check_success(o);
    const auto rows = rows_of<3>(o.out);
    REQUIRE((!rows.empty() && rows.back()[0] == 100));
    CHECK(rows.back()[1] == doctest::Approx((1. / 5 - 1. / 9) / 2).epsilon(0.03));  // E1 of the best line, y = 1/3
    CHECK(rows.back()[2] < rows.back()[1] / 10);
  }
  TEST_CASE("the digits in data/ are learned") {
    string options = "--data " + std::filesystem::absolute("data").string();
    double least = 96.5;
#if defined(MP_ASAN)
    options += " --epochs 1", least = 85;  // it is slow
#endif
    const Workplace w;
    const Outcome o = w.run("train --save m " + options);
    check_success(o);
    CHECK_MESSAGE((!table_of(o).empty() && table_of(o).back()[ACCURACY] >= least), o.out);
    string photos;  // their names begin with the digit that they show
    for (const auto& file : std::filesystem::directory_iterator("data/photos"))
      photos += " " + std::filesystem::absolute(file.path()).string();
    const Outcome read = w.run("predict m" + photos);
    check_success(read);
    int right = 0;
    for (const char* at = read.out.c_str(); (at = strstr(at, "/photos/")); at++) right += at[8] == strchr(at, ':')[2];
    CHECK_MESSAGE(right >= (least > 90 ? 10 : 5), read.out);
    // A camera held upside down says so in EXIF, in either order of bytes: a 9 is a 6 then.
    const auto bytes = read_file("data/photos/9_in_the_dark.jpg");
    const string nine(bytes.begin(), bytes.end()),
        head = "\xff\xd8\xff\xe1" + string("\0\x22", 2) + "Exif" + string(2, '\0');
    const auto with_exif = [&](const char* tiff, int way) {
      string entry(tiff, 26);
      entry[entry[0] == 'I' ? 18 : 19] = char(way);
      return head + entry + nine.substr(2);
    };
    const char* const little = "II*\0\x08\0\0\0\1\0\x12\1\3\0\1\0\0\0\0\0\0\0\0\0\0\0";
    const char* const big_end = "MM\0*\0\0\0\x08\0\1\1\x12\0\3\0\0\0\1\0\0\0\0\0\0\0\0";
    w.put("upright.jpg", with_exif(little, 1)), w.put("turned.jpg", with_exif(little, 3));
    w.put("turned_too.jpg", with_exif(big_end, 3));
    const Outcome held = w.run("predict m upright.jpg turned.jpg turned_too.jpg");
    if (least > 90) check_words(held.out, {"upright.jpg: 9", "turned.jpg: 6", "turned_too.jpg: 6"});
  }
}

TEST_SUITE("checkpoints") {
  TEST_CASE("the same seed gives the same bytes, whatever the threads and their order") {
    const Workplace w;
    const auto bytes = [&](const string& seed, const string& before) {
      check_success(w.train("--layers 16,130,10 --batch 100 --update stochastic --save m --seed " + seed, before));
      return w.get("m");
    };
    Words all = {bytes("1", "")};
    for (const string setting :
         {"", "MP_THREADS=1", "MP_THREADS=2", "MP_ORDER=forward", "MP_ORDER=backward", "MP_ORDER=7"})
      CHECK_MESSAGE((bytes("1", setting) == all[0]), setting);
    for (const string seed : {"0", "2", "3000000000", "4000000000"}) all.push_back(bytes(seed, ""));
    std::sort(all.begin(), all.end());
    CHECK((std::unique(all.begin(), all.end()) == all.end()));
  }
  TEST_CASE("2 epochs and 3 more are 5 in one go, byte for byte") {
    for (const string mode : {"--growth-interval 7", "--update kahan", "--update stochastic", "--update half --lr 0.01",
                              "--precision fp32", "--precision bf16 --update kahan --lr 0.01",
                              "--loss-scale 512 --loss mse", "--shuffle off --seed 3000000000"}) {
      INFO(mode);
      const Workplace w;
      check_success(w.train(mode + " --epochs 5 --save once --log log.csv"));
      const string log = w.get("log.csv");
      check_success(w.train(mode + " --epochs 2 --save m --log log.csv"));
      const Outcome o = w.resume("m --epochs 5 --log log.csv");
      check_success(o);
      CHECK((table_of(o).size() == 3 && w.get("log.csv") == log));
      CHECK((w.get("m") == w.get("once")));
      const Outcome finished = w.resume("m --save copy");
      check_success(finished);
      CHECK((table_of(finished).empty() && last_line(finished.out) == last_line(o.out)));
      CHECK((w.get("copy") == w.get("m")));
    }
  }
  TEST_CASE("stopped or killed at any moment, resumed: as if never stopped") {
    const Workplace w(2000);
    const string options = "--batch 1 --epochs 3 --lr 0.02 --update kahan --growth-interval 300 --log log.csv --save ";
    check_success(w.train(options + "want"));
    const string want = w.get("want"), log = w.get("log.csv");
    // A signal, and at how many rows of the log: 2000 are an epoch, after which a checkpoint is written
    std::vector<std::array<int, 2>> stops = {{SIGINT, 2500}, {SIGTERM, 2500}};
    unsigned random = 1;
    for (int i = 0; i < 20; i++) {
      random = random * 1664525 + 1013904223;
      stops.push_back({SIGKILL, i % 2 ? int(random >> 8) % 5500 : 2000 + i % 4 * 1000 + int(random >> 8) % 3});
    }
    for (const auto& stop : stops) {
      INFO("signal ", stop[0], " when the log has ", stop[1], " rows");
      bool stopped = false;
      for (int attempt = 0; attempt < 5 && !stopped; attempt++) {  // on a busy machine a signal may come late
        for (const char* name : {"/m", "/log.csv"}) unlink((w.path + name).c_str());
        const pid_t child = w.start("train --data . --layers 16,8,10 " + options + "m");
        siginfo_t ended = {};
        for (long rows = 0; rows < stop[1] && ended.si_pid == 0;) {
          const string now = w.get("log.csv");
          rows = std::count(now.begin(), now.end(), '\n') - 1;
          waitid(P_PID, id_t(child), &ended, WEXITED | WNOHANG | WNOWAIT);
        }
        kill(child, stop[0]);
        const Outcome o = w.finish(child);
        stopped = o.status == 1000 + SIGKILL;
        if (stop[0] == SIGKILL || o.status == 0) continue;
        check_refused(o, {"stopped after step ", "mp train --resume m"}, 128 + stop[0]);
        stopped = std::stoi(w.model("m").metadata.at("step")) % 2000 != 0;  // within an epoch
      }
      CHECK(stopped);
      if (stop[0] == SIGKILL && stop[1] <= 2001 && w.get("m").empty()) continue;  // its first checkpoint was not there
      check_success(w.resume("m --log log.csv"));
      CHECK((w.get("m") == want));
      CHECK((w.get("log.csv") == log));
    }
  }
  TEST_CASE("of two runs that save to one file, each writes it whole") {
    const Workplace w;
    const string options = "--epochs 30 --layers 16,200,10 --save ";
    const auto in_the_background = [&](const string& seed) {
      return w.start("train --batch 100 --data . " + options + "m --seed " + seed, "exec >out" + seed + ";");
    };
    for (const string seed : {"1", "2"})
      check_success(w.train("--batch 100 " + options + "alone" + seed + " --seed " + seed));
    for (int round = 0; round < 5; round++) {
      const pid_t one = in_the_background("1"), two = in_the_background("2");
      siginfo_t ended = {};
      for (int damaged = 0; ended.si_pid == 0;) {
        damaged += !w.get("m").empty() && error_of([&] { w.model("m"); }) != "";
        CHECK(damaged == 0);
        waitid(P_PID, id_t(one), &ended, WEXITED | WNOHANG | WNOWAIT);
      }
      CHECK(w.finish(one).status == 0);
      CHECK(w.finish(two).status == 0);
      CHECK((w.get("m") == w.get("alone1") || w.get("m") == w.get("alone2")));
      CHECK(w.get("m.unfinished").empty());
    }
  }
  TEST_CASE("options beside --resume override the checkpoint's; a damaged one is refused") {
    const Workplace w;
    check_success(w.train("--save m --growth-interval 7 --lr 0.1"));
    const SafeTensors model = w.model("m");
    const std::pair<string, double> options[] = {{"--loss-scale 128", 128}, {"--precision fp32", 1}};
    for (const auto& option : options) {
      std::filesystem::remove(w.path + "/log.csv");
      check_success(w.resume("m --save a --epochs 3 --log log.csv --lr 0.05 " + option.first));
      for (const auto& step : log_of(w, 60)) CHECK(step[3] == option.second);
      CHECK(w.model("a").metadata.at("lr") == "0.05");
    }
    CHECK(w.model("m").metadata == model.metadata);
    check_success(w.train("--save n --loss-scale 1024"));
    check_success(w.resume("n --precision fp16 --epochs 2"));  // what it was before: so is the scale
    CHECK(w.model("n").metadata.at("loss-scale") == "1024");
    for (const string log : {"m", "./m", "link"}) {
      if (log == "link") std::filesystem::create_symlink("m", w.path + "/link");
      check_refused(w.resume("m --log " + log), {"--log " + log + " would overwrite the checkpoint m"}, 2);
    }
    CHECK(w.run("histogram m --data . --svg link").status == 2);
    check_refused(w.resume("m --layers 16,9,10"), {"m: ", "16,8,10", "--layers 16,9,10"});
    check_refused(w.resume("m --precision fp32 --update half"), {"--update half with --precision fp32"}, 2);
    check_refused(w.resume("m --init m"), {"--init and --resume"}, 2);
    const auto with = [&](const string& key, const string& value, const string& batch = "10") {
      SafeTensors changed = model;
      changed.metadata[key] = value;
      write_safetensors(w.path + "/c", changed);
      return w.resume("c --epochs 3 --batch " + batch);
    };
    const Outcome o = with("position", "15", "100");  // of the 30 steps that an epoch had; it has 3 now
    check_success(o);
    for (const auto& row : table_of(o)) CHECK(row[LOSS] > 0);
    CHECK(with("position", "2000000000", "1").status <= 1);
    check_success(with("layers", "16,8,10,10"));  // the tensors' shapes count
    const std::pair<string, string> damaged[] = {
        {"epoch", "x"},   {"epoch", "1.5"},  {"epoch", "-1"}, {"step", "1e30"}, {"scale", "0"},        {"scale", "nan"},
        {"scale", "inf"}, {"tracker", "-1"}, {"lr", "0"},     {"update", ""},   {"precision", "fp64"}, {"seed", "y"}};
    for (const auto& [key, value] : damaged)
      check_refused(with(key, value), {"c: ", key + " '" + value + "'", "damaged"});
    check_refused(with("precision", "fp32"), {"c: it says --loss-scale dynamic with --precision fp32", "damaged"});
  }
  TEST_CASE("--init takes the weights of any program's file, and nothing else") {
    const Workplace w;
    check_success(w.train("--save ours --epochs 1 --update half --lr 0.1 --seed 5"));  // its weights are halves
    const SafeTensors ours = w.model("ours");
    REQUIRE(ours.tensors.size() == 4);
    const string name[] = {"fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"}, shape[] = {"8,16", "8", "10,8", "10"};
    string header, data;
    for (const int i : {3, 0, 2, 1}) {
      const string from = std::to_string(data.size());
      for (const float x : ours.tensors[i].value) data += little(float_to_half(x).bits, 2);
      header += (header == "" ? "{" : ",") + entry(name[i], "F16", shape[i], from + "," + std::to_string(data.size()));
    }
    w.put("theirs", tensors(header + "}", data));
    check_success(w.train("--save new"));
    check_success(w.train("--save a --init ours"));
    check_success(w.train("--save b --init theirs"));
    CHECK((w.get("a") == w.get("b") && w.get("a") != w.get("new")));
    CHECK(w.model("a").metadata == w.model("new").metadata);
    check_success(w.run("test theirs --data ."));
    check_refused(w.resume("theirs"), {"theirs: holds weights but no training state", "--init"});
    check_refused(w.train("--init ours --layers 16,9,10"), {"ours", "16,8,10", "16,9,10"});
    check_refused(w.train("--init nothing"), {"nothing: No such file"});
    check_refused(w.train("--init " + test_labels), {test_labels, "no safetensors file"});
    write_safetensors(w.path + "/a", {{}, {ours.tensors[1]}});
    check_refused(w.train("--init a"), {"a: holds no layer"});
    w.put("a",
          tensors("{" + entry("0.weight", "F32", "0,16", "0,0") + "," + entry("0.bias", "F32", "0", "0,0") + "}", ""));
    check_refused(w.train("--init a"), {"a: holds no layer"});
  }
  TEST_CASE("what cannot be written is told, if possible before training, and the old file stays") {
    const Workplace w;
    check_success(w.train("--save m --layers 16,40,10"));
    const string before = w.get("m");
    const Outcome full = w.train("--save m --layers 16,40,10 --seed 2", "ulimit -f 4;");  // at most 4 KB; it has 5
    check_refused(full, {"m: not written", "File too large", "the old file is kept"});
    CHECK((w.get("m") == before));
    CHECK(w.names() == Words{"err", "m", "out", test_images, test_labels, train_images, train_labels});
    for (const string option : {"--save", "--log"})
      for (const string file : {"no/x", ".", "/dev/full"}) {
        const Outcome o = w.train(option + " " + file);
        check_refused(o, {file + ": "});
        CHECK_MESSAGE(table_of(o).empty(), "trained first: ", option, " ", file);
      }
    check_refused(w.train(">/dev/full"), {"standard output", "No space left"});
    const string long_name(250, 'n');  // the file could be there, but not the one that becomes it
    check_refused(w.train("--save " + long_name + " >table"), {long_name, "File name too long"});
    CHECK(w.get("table").empty());
    std::filesystem::create_directory(w.path + "/locked");
    std::filesystem::permissions(w.path + "/locked", std::filesystem::perms(0500));
    const Outcome locked = w.train("--save locked/m");
    if (geteuid() == 0) return;  // root may write anywhere
    check_refused(locked, {"locked/m", "Permission denied"});
    CHECK(table_of(locked).empty());
  }
}

TEST_SUITE("dynamic_precision") {
  TEST_CASE("exponents: what fp16 makes zero, subnormal, normal and infinite") {
    const Tensor t = make_tensor(1, 9, Type::fp32);
    to_device({0, 0x1p-26f, -0x1p-25f, 0x1.ff8p-15f, 0x1p-14f, 65504, 65520, float_nan, -float_inf}, t);
    Exponents counted;
    counted.add(t);
    CHECK((counted.zeros == 1 && counted.overflow == 3 && counted.nonzero() == 8));
    CHECK((counted.between(Exponents::lowest, -25) == 1 && counted.between(-25, -14) == 2));
    CHECK(counted.between(-14, 16) == 2);
    Exponents scaled;
    scaled.add(t, 0x1p-20);
    CHECK((scaled.between(Exponents::lowest, -25) == 4 && scaled.overflow == 2));
  }
  TEST_CASE("with ordinary settings nothing moves, and the weights are those of fp16") {
    const Workplace w;
    check_success(w.train("--save a --precision fp16 --epochs 4"));
    const Outcome o = w.train("--save b --precision auto --epochs 4");
    check_success(o);
    const SafeTensors a = w.model("a"), b = w.model("b");
    for (size_t i = 0; i < a.tensors.size(); i++) CHECK(a.tensors[i].value == b.tensors[i].value);
    CHECK(b.metadata.at("clean-probes") == "2,2");
    check_words(o.out, {"16 16", "100.0%"});
    CHECK(o.out.find("to fp32") == string::npos);
  }
  TEST_CASE("layers move before the first step, come back when the scale does, and resume to the same bytes") {
    const Workplace w;
    const string mode = "--precision auto --loss-scale 1e-6 ";
    const Outcome o = w.train(mode + "--epochs 5 --save once");
    check_success(o);
    check_words(o.out, {"layer 1 to fp32: ", "layer 2 to fp32: ", "weight gradients would be 0", "32 32"});
    CHECK(o.out.find("to fp32") < o.out.find("\n    1 "));
    CHECK(w.model("once").metadata.at("clean-probes") == "0,0");
    check_success(w.train("--precision fp32 --epochs 5 --save fp32"));
    const double wide = double(table_of(w.resume("fp32 --epochs 6"))[0][ACCURACY]);
    CHECK(std::fabs(std::stod(last_line(o.out).substr(15)) - wide) < 5);
    check_success(w.train(mode + "--epochs 2 --save m"));
    check_success(w.resume("m --epochs 5"));
    CHECK((w.get("m") == w.get("once")));
    check_success(w.resume("m --epochs 6 --loss-scale dynamic"));  // one clean probe, which the checkpoint remembers
    CHECK(w.model("m").metadata.at("clean-probes") == "1,1");
    const Outcome back = w.resume("m --epochs 7");
    check_success(back);
    check_words(back.out, {"layer 1 back to fp16", "layer 2 back to fp16", "16 16"});
    CHECK(w.model("m").metadata.at("clean-probes") == "2,2");
  }
  TEST_CASE("only the layer that suffers moves: its input scaled down, its weights up, the function the same") {
    const Workplace w;
    check_success(w.train("--layers 16,12,12,12,10 --epochs 3 --lr 0.1 --save m"));
    SafeTensors file = w.model("m");
    file.metadata.clear();
    for (SavedTensor& t : file.tensors)  // layer 2 is module 2, layer 3 module 4
      for (float& x : t.value) x *= t.name[0] == '2' ? 0x1p-12f : t.name == "4.weight" ? 0x1p12f : 1;
    write_safetensors(w.path + "/suffering", file);
    const string options = "--layers 16,12,12,12,10 --init suffering --precision auto --loss-scale 0.5 --lr 1e-9";
    const Outcome o = w.train(options + " --epochs 1 --save part");
    check_success(o);
    check_words(o.out, {"layer 3 to fp32: ", "16 16 32 16"});
    check_success(w.train(options + " --epochs 2 --save whole"));
    CHECK((w.get("part") != w.get("whole")));
    check_words(w.resume("part --epochs 2").out, {"16 16 32 16"});  // the map, too, is as it was left
    CHECK(w.model("whole").metadata.at("clean-probes") == "2,2,0,2");
    CHECK((w.get("part") == w.get("whole")));
  }
  TEST_CASE("what makes no sense with auto is refused") {
    const Workplace w;
    check_refused(w.train("--precision auto --update kahan"), {"--update kahan with --precision auto"}, 2);
    check_refused(w.train("--vanish-limit 10"), {"--vanish-limit", "--precision auto"}, 2);
  }
}

TEST_SUITE("histogram") {
  TEST_CASE("a row a tensor, without the scale and with it, plain where the locale is, and as SVG") {
    const Workplace w;
    const Outcome o =
        w.run("histogram --data . --layers 16,8,10 --batch 10 --svg h.svg", "unset LC_CTYPE LANG; LC_ALL=C");
    check_success(o);
    check_words(
        o.out,
        {"layer 1, a, values: ", "layer 1, delta, without loss scale: ", "layer 2, dW, times 65536: ", "wrote h.svg"});
    CHECK(o.out.find("\033") == string::npos);
    CHECK(o.out.find("▁") == string::npos);
    check_words(w.get("h.svg"), {"<svg", "prefers-color-scheme:dark", "subnormal", "layer 2, dW", "</svg>"});
    check_success(w.train("--save m"));
    const string before = w.get("m");
    check_success(w.run("histogram m --data ."));
    CHECK((w.get("m") == before));
    SafeTensors unfinished = w.model("m");
    unfinished.metadata["epochs"] = "9";
    write_safetensors(w.path + "/m", unfinished);
    check_success(w.run("histogram m --data . --svg h.svg"));
    check_words(w.get("h.svg"), {"after epoch " + unfinished.metadata.at("epoch") + ","});
    check_refused(w.run("histogram --sweep lr --data ."), {"mp histogram [MODEL]"}, 2);
  }
}

TEST_SUITE("compare") {
  TEST_CASE("a row a technique; what is kept costs bytes; sweeps draw their curves") {
    const Workplace w;
    const string small = "compare --data . --layers 16,8,10 --batch 10 --epochs 1 ";
    const Outcome o = w.run(small);
    check_success(o);
    check_words(o.out, {"fp32", "no loss scaling", "Kahan", "stochastic", "bf16, no master", "auto", "of 8 come"});
    for (const string sweep : {"scale", "lr"}) {
      const Outcome swept = w.run(small + "--sweep " + sweep + " --svg s.svg");
      check_success(swept);
      check_words(w.get("s.svg"), {"test accuracy, per cent", sweep == "lr" ? "bf16, no master" : "dynamic: 2^16"});
    }
    check_refused(w.run(small + "--precision bf16"), {"mp compare tries every --precision"}, 2);
    check_refused(w.run(small + "--svg x"), {"--svg needs --sweep"}, 2);
    check_refused(w.train("--sweep lr"), {"--sweep and --svg"}, 2);
  }
}

TEST_SUITE("predict") {
  // A seven in 20 x 20 pixels
  static int ink(int x, int y) {
    return (y >= 3 && y < 6 && x >= 5 && x < 16) || (y >= 6 && y < 17 && x >= 10 && x < 13);
  }
  // A network that knows nothing: all chances are equal, and the picture beside them is what it saw.
  static string ignorant(int in, int out, char byte = '\0') {
    const string x = std::to_string(in), y = std::to_string(out), weights = std::to_string(4 * in * out),
                 end = std::to_string(4 * (in + 1) * out);
    return tensors("{" + entry("0.weight", "F32", y + "," + x, "0," + weights) + "," +
                       entry("0.bias", "F32", y, weights + "," + end) + "}",
                   string(size_t(4 * (in + 1) * out), byte));
  }
  TEST_CASE("dark or light ink, colour, alpha, 16 bits, larger, off-centre: the network sees the same") {
    const Workplace w;
    w.put("m", ignorant(784, 10));
    // rows of 20 x 20, `times` as large and moved within `wide` pixels, each as pixel(ink) gives it
    const auto picture = [](int wide, int times, int left, int top, auto pixel) {
      string bytes;
      for (int y = 0; y < wide; y++)
        for (int x = 0; x < wide; x++)
          bytes += pixel(x < left || y < top ? 0 : ink((x - left) / times, (y - top) / times));
      return bytes;
    };
    const auto grey = [](int i) { return string(1, char(220 - 200 * i)); };
    const auto twice = [](int i) { return string(2, char(220 - 200 * i)); };
    const auto colour = [](int i) { return i ? string("\x10\x20\x80") : string("\xf0\xe0\xd0"); };
    const auto opaque = [&](int i) { return colour(i) + "\xff"; };
    w.put("grey.png", png(20, 20, picture(20, 1, 0, 0, grey)));
    w.put("light.png", png(20, 20, picture(20, 1, 0, 0, [](int i) { return string(1, char(30 + 200 * i)); })));
    w.put("16_bits.png", png(20, 20, picture(20, 1, 0, 0, twice), 16));
    w.put("colour.png", png(20, 20, picture(20, 1, 0, 0, colour), 8, 2));
    w.put("opaque.png", png(20, 20, picture(20, 1, 0, 0, opaque), 8, 6));
    w.put("black.png", png(20, 20, picture(20, 1, 0, 0, [](int i) { return '\0' + string(1, char(255 * i)); }), 8, 4));
    w.put("white.png",
          png(20, 20, picture(20, 1, 0, 0, [](int i) { return '\xff' + string(1, char(255 * i)); }), 8, 4));
    w.put("aside.png", png(50, 50, picture(50, 1, 29, 3, grey)));
    w.put("large.png", png(60, 60, picture(60, 3, 0, 0, grey)));
    string want;
    for (const string name : {"grey", "light", "16_bits", "colour", "opaque", "black", "white", "aside", "large"}) {
      const Outcome o = w.run("predict m " + name + ".png", "LC_ALL=C.UTF-8");
      check_success(o);
      CHECK_MESSAGE(o.out.rfind(name + ".png: 0 (10.0%)\n", 0) == 0, o.out);
      const string seen = o.out.substr(o.out.find('\n'));
      if (want.empty()) want = seen;
      CHECK_MESSAGE(seen == want, o.out, want);
    }
    CHECK_MESSAGE(std::count(want.begin(), want.end(), '\n') == 15, want);
    check_words(want, {"█", "  9  10.0% ██"});
    check_words(w.run("predict m grey.png", "LC_ALL=C").out, {"@@@", "  9  10.0% ##"});
    w.put("nan", ignorant(784, 10, '\xff'));
    check_refused(w.run("predict nan grey.png"), {"grey.png: nan answers NaN or infinity"});
  }
  TEST_CASE("what cannot be read is told in a line, and the others are answered") {
    const Workplace w;
    string noise(10000, '\0');
    unsigned random = 1;
    for (char& grey : noise) random = random * 1664525 + 1013904223, grey = char(128 + (random >> 24) % 9);
    w.put("m", ignorant(784, 10)), w.put("oblong", ignorant(783, 10)), w.put("nine", ignorant(784, 9));
    string seven;
    for (int i = 0; i < 400; i++) seven += char(250 - 200 * ink(i % 20, i / 20));
    w.put("good.png", png(20, 20, seven));
    const auto dht = [](const string& counts, size_t values) {
      return "\xff\xc4" + big(19 + values).substr(2) + '\0' + counts + string(values, 'x');
    };
    const string none(14, '\0'), jpeg = "\xff\xd8";
    // clang-format off
    const std::pair<string, string> bad[] = {
        {"no PNG or JPEG", "hello"}, {"no PNG or JPEG", ""}, {"no PNG or JPEG", "RIFF\xff\xfe"}, {"blank", png(100, 100, string(10000, 'x'))},
        {"blank", png(100, 100, noise)}, {"blank", png(1, 1, "x")}, {"ends within the chunk", png(9, 9, "x").substr(0, 50)},
        {"8000 x 8000 pixels are more than 50 million", png(8000, 8000, "x")},
        {"5000 x 5000 pixels cannot be in this file", png(5000, 5000, "x")}, {"cannot be decoded", png(9, 9, "x")},
        {"ends within the segment at byte 2", jpeg + "\xff\xe0\x10\x10 "}, {"segment at byte 2", jpeg + "\xff\xfe"},
        {"Huffman table at byte 6", jpeg + dht(string(16, '\xff'), 4080)},  // stb_image writes them all into room for 256
        {"Huffman table at byte 6", jpeg + dht(none + "\x02\xff", 257)}, {"no PNG", jpeg + dht(none + "\x01\xff", 256)},
        {"Huffman table at byte 7", jpeg + "\xff" + dht(none + "\x01\x02", 2)}};
    // clang-format on
    for (const auto& [words, bytes] : bad) {
      w.put("bad.png", bytes);
      const Outcome o = w.run("predict m good.png bad.png good.png");
      check_refused(o, {"mp: bad.png: ", words});
      CHECK(o.out.find("good.png: 0 (10.0%)") < o.out.rfind("good.png: 0 (10.0%)"));
    }
    check_refused(w.run("predict m good.png no.png"), {"no.png: No such file"});
    check_refused(w.run("predict oblong good.png"), {"oblong: layers 783,10", "square"});
    check_refused(w.run("predict nine good.png"), {"nine: layers 784,9", "10 classes"});
    check_refused(w.run("predict good.png good.png"), {"good.png: "});
    check_refused(w.run("predict m"), {"mp predict MODEL IMAGE..."}, 2);
    check_refused(w.run("predict m good.png --seed 2"), {"--seed", "mp predict has none"}, 2);
  }
}

// `make fuzz` begins with these.
TEST_SUITE("fuzz") {
  TEST_CASE("seeds, into the folder MP_SEEDS" * doctest::skip()) {
    const string x = entry("0.weight", "F32", "1,2", "0,8") + "," + entry("0.bias", "BF16", "1", "8,10");
    const auto with_options = R"({"__metadata__":{"lr":"1","update":"kahan"},)";
    Words pictures = {png(9, 9, string(30, ' ') + string(51, 'z')), png(6, 3, string(18, '0'), 16, 4)};
    for (const string name : {"3_transparent.png", "7_tiny.png", "8_pale.jpg"}) {
      const auto bytes = read_file("data/photos/" + name);
      pictures.emplace_back(bytes.begin(), bytes.end());
    }
    const string all = gzip(string(1000, 'a'), 31, little(3, 2) + "abcname" + '\0' + "text" + '\0' + "cc");
    // clang-format off
    const std::map<string, Words> seeds = {
        {"sheet", {sheet(1, 1), sheet(2, 3), png(100, 1, string(100, 'x'), 8, 2), png(100, 1, string(200, 'x'), 16)}},
        {"idx", {labels({0, 9, 5}), images(3, 2, 2, "abcdefghijkl"), images(~0u, ~0u, ~0u, "abcd"), gzip(labels({7}))}},
        {"gz", {gzip("abc"), all}},
        {"safetensors", {tensors("{" + x + "}", "1234567890"), tensors(with_options + x + "}", "1234567890")}},
        {"options", {"--data\nd\n--layers=4,2\n--lr\n.1\nfile", "--precision\nfp32\n--loss-scale\n8\n--scale-init\n1e3",
                     "--update\nkahan\n--batch\n3\n--shuffle\noff\n--seed=7\n--save\nm\n--log\nm"}},
        {"picture", pictures}};
    // clang-format on
    for (const auto& [reader, inputs] : seeds) {
      const string folder = getenv("MP_SEEDS") + ("/" + reader);
      std::filesystem::create_directories(folder);
      for (const string& input : inputs) write_file(folder + text("/seed-%08x", crc(input)), input);
    }
  }
}
#endif
