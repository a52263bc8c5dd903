// mp.h: the words that mp.cu and tests.cpp share (part 1), and enough of CUDA to run kernels without a GPU (part 2).
#pragma once
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <vector>

#if !defined(__CUDACC__)  // a plain C++ compiler reads past CUDA's marks
#define __global__
#define __host__
#define __device__
#endif

// ==== Part 1: the vocabulary ========================================================================================
// Article: the text this program follows, by section. Paper: Micikevicius et al., Mixed Precision Training, 2017.

// ---- Errors: one line that says what was wrong, where, and what to do. main() prints it and ends with status 1. ----
struct Error : std::runtime_error {
  using runtime_error::runtime_error;
};
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));  // throws Error; as printf

// ---- Number formats (article 2.1; IEEE 754 binary16; bfloat16 is the upper half of a float) ------------------------
struct half {
  uint16_t bits;  // 1 sign, 5 exponent, 10 fraction: up to 65504, normal from 2^-14, least 2^-24
};
struct bfloat16 {
  uint16_t bits;  // 1 sign, 8 exponent, 7 fraction: the range of a float, 2 to 3 decimal digits
};
enum class Type { fp32, fp16, bf16 };
// Round to nearest, ties to even; subnormals kept; too large becomes infinity; NaN stays NaN. They raise nothing.
__host__ __device__ half float_to_half(float x);
__host__ __device__ float half_to_float(half h);
__host__ __device__ bfloat16 float_to_bfloat16(float x);
__host__ __device__ float bfloat16_to_float(bfloat16 b);
// One of the two neighbours of x, the upper one with probability (x - lower) / (upper - lower); `random`: 64 even bits.
__host__ __device__ half stochastic_half(float x, uint64_t random);
__host__ __device__ bfloat16 stochastic_bfloat16(float x, uint64_t random);

// ---- Tensor: a matrix in device memory, row after row. A copy of the struct is a view of the same numbers. ---------
struct Tensor {
  int rows = 0, cols = 0;
  int stride = 0;  // from one row to the next, in elements: cols rounded up to 8, so that every row is 16-byte aligned
  Type type = Type::fp32;
  std::shared_ptr<char> memory;
  template <class T> T* as() const { return reinterpret_cast<T*>(memory.get()); }
  size_t bytes() const { return size_t(rows) * size_t(stride) * (type == Type::fp32 ? 4 : 2); }
};
Tensor make_tensor(int rows, int cols, Type type);                  // zeros; fails when the device has not the memory
Tensor first_rows(const Tensor& t, int rows);                       // a view of the upper rows
std::vector<float> to_host(const Tensor& t);                        // [rows * cols], without the padding
void to_device(const std::vector<float>& values, const Tensor& t);  // [rows * cols], each rounded to t's type

// ---- The matrix products (design: one operation, three layouts; fp32 sums whatever the operands' type) -------------
enum class Layout {
  ABt,  // C[M,N] = A[M,K] B[N,K]^T   E2: z = a W^T
  AB,   // C[M,N] = A[M,K] B[K,N]     E4: delta W
  AtB,  // C[M,N] = A[K,M]^T B[K,N]   E5: dW = delta^T a
};
struct Epilogue {                // what happens to a sum before it is rounded, once, to C's type
  const Tensor* bias = nullptr;  // [1, N]: added to every row
  bool relu = false;             // then negative sums become 0 (NaN stays)
  const Tensor* mask = nullptr;  // [M, N]: where it is 0 or below the result is 0: that ReLU's derivative
};
// All operands of one type; any size from 1 up; C's padding may be written. They fail when the shapes do not fit.
void gemm_naive(Layout, const Tensor& A, const Tensor& B, const Tensor& C, const Epilogue& epilogue = {});
// K is shared out to `splits` blocks, whose sums are added in a fixed order; 0: as many as keep the machine busy.
void gemm_tiled(Layout, const Tensor& A, const Tensor& B, const Tensor& C, const Epilogue& epilogue = {},
                int splits = 0);
// Tensor cores: fp16 from sm_75 on, bf16 from sm_80 on; on a CPU their instructions are imitated. Else it fails.
void gemm_mma(Layout, const Tensor& A, const Tensor& B, const Tensor& C, const Epilogue& epilogue = {}, int splits = 0);
bool tensor_cores(Type type);  // are there any for it?
// The best of them for machine and type, which training uses; MP_GEMM=naive|tiled|mma in the environment overrides.
void gemm(Layout, const Tensor& A, const Tensor& B, const Tensor& C, const Epilogue& epilogue = {});

// ---- The network (article 4.1): a^0 the input, then for each layer z = a W^T + b, a = f(z) ------------------------
enum class Loss { cross_entropy, squared_error };
enum class Update { master, half, kahan, stochastic };  // article 3.1 and 3.2 step 5; paper 3.1; arXiv 2010.06192
struct Layer {
  Type type = Type::fp32;  // of everything below but `master` and `wide_delta`
  Tensor master;           // [1, n] fp32: W row after row, then b, both with their padding; empty if update != master
  Tensor weights;          // [1, n] compute copy of the master; in fp32 the master itself
  Tensor gradients;        // [1, n] dL/dW and dL/db, times the loss scale
  Tensor compensation;     // [1, n] what Kahan's sum still owes; else empty
  Tensor W, b;             // [out, in] and [1, out]: views of weights
  Tensor dW, db;           // the same of gradients
  Tensor a;                // [batch, out] f(z); the logits in the last layer. Layer 0 has this alone: the input
  Tensor delta;            // [batch, out] dL/dz, times the loss scale
  Tensor input;            // [batch, in] a of the layer before in this layer's type, where that one has another
  Tensor wide_delta;       // there too: fp32, this delta [batch, out] or the one before [batch, in], for E4's product
  int clean_probes = 2;    // in a row, that found nothing which fp16 could not hold; counted up to 2
};
struct Mlp {
  int L = 0;                 // layers with weights: layer[1] to layer[L]
  std::vector<Layer> layer;  // [L + 1]
  int batch = 0, rows = 0;   // rows allocated; rows in use, fewer in the last batch of an evaluation
  bool relu = true;          // f on the hidden layers; false: none, as the article writes it
  Loss loss = Loss::cross_entropy;
  Update update = Update::master;
  uint64_t seed = 1;   // of the initial weights and of stochastic rounding
  Tensor y;            // [batch, classes] fp32 targets: one-hot, or numbers
  Tensor row_loss;     // [1, batch] fp32
  Tensor log_sum_exp;  // [1, batch] fp32: log sum exp(z), kept by E1 for E3
};
Mlp make_mlp(const std::vector<int>& sizes, int batch, Type type, Update update);  // fails on a size below 1
void set_types(Mlp& net, const std::vector<Type>& types);  // [L] of layer 1 to L, with master weights (or all one)
struct Footprint {  // bytes of device memory, padding included; activations: every a; gradients: every delta, dW, db
  size_t weights = 0, master = 0, compensation = 0, activations = 0, gradients = 0;
};
Footprint footprint(const Mlp& net);
Tensor kept_W(const Layer& layer);  // views of the parameters as training keeps them: of the master if there is one
Tensor kept_b(const Layer& layer);
void set_parameters(Layer& layer, const std::vector<float>& W, const std::vector<float>& b);  // and their compute copy
void initialise(Mlp& net);  // article 3.2 step 1: W from He's normal distribution (arXiv 1502.01852), b = 0, in fp32

// ---- Loss scaling (article 3.1; paper 3.2; torch.amp.GradScaler). Its state lives on the device. --------------------
struct StepState {
  float scale = 65536;     // multiplies the loss gradient, so that small gradients stay above fp16's 2^-24
  int growth_tracker = 0;  // finite steps since the scale last changed
  int found_inf = 0;       // this step's gradients hold an inf or a NaN: no update
  int skipped = 0;         // updates left out so far
  float loss = 0;          // this step's mean over the batch, unscaled
  int halted = 0;     // a dynamic scale cannot help any more (see LossScaler::update); nothing changes from then on
  int position = 0;   // of the next batch in this epoch
  unsigned step = 0;  // steps since training began
};
struct StepRecord {  // a row of the log
  float loss, loss_scale;
  int found_inf;
};
struct LossScaler {
  float growth = 2, backoff = 0.5f;     // both 1: a fixed scale
  int interval = 2000;                  // finite steps until the scale grows
  std::shared_ptr<StepState> state;     // device memory
  std::shared_ptr<StepRecord> history;  // device memory, a record a step of this epoch; may be empty
  explicit LossScaler(float scale = 65536, float growth = 2, float backoff = 0.5f, int interval = 2000);
  void update();  // after a step: the next scale. Halts if a dynamic scale sinks below 1 or the loss is not finite
  StepState read() const;
  void write(const StepState& s);
};

// ---- A training step: the boxes A to H of article 2.3. Each is a launch or two; the host waits for none. -----------
struct Batch {                             // device memory; images, or else points x with targets y
  const uint8_t* pixels = nullptr;         // [n, in], 0 to 255
  const uint8_t* labels = nullptr;         // [n]
  const float *x = nullptr, *y = nullptr;  // [n, in] and [n, classes]
  const int* order = nullptr;              // [n] a permutation: sample i of the epoch is order[i]; none: i
  int rows = 0;                            // of this batch
};
void preprocess(Mlp& net, const Batch& batch, const LossScaler* scaler);  // A B  a0 = pixel / 255, y = one-hot
void forward(Mlp& net, int l);                                            // C D  E2
void loss(Mlp& net, LossScaler& scaler);                                  // E    E1
void output_delta(Mlp& net, const LossScaler& scaler);                    // F    E3, times the scale
void backward(Mlp& net, int l);                                           // F    E4: delta of layer l - 1
void weight_gradient(Mlp& net, int l);                                    // F    E5
void unscale_and_check(Mlp& net, LossScaler& scaler);                     // G    found_inf
void update(Mlp& net, LossScaler& scaler, float lr);                      // G    w -= lr g / scale, unless found_inf
void train_step(Mlp& net, const Batch& batch, LossScaler& scaler, float lr);
// H, the output for n images (host memory, [n, in] bytes): logits [n, classes], or the class with the largest one
std::vector<float> logits(Mlp& net, const std::vector<uint8_t>& pixels);
std::vector<int> predict(Mlp& net, const std::vector<uint8_t>& pixels);

// ---- Dynamic precision (article 3.1, 3.2 step 6): what would fp16 make of these numbers? ----------------------------
struct Exponents {
  static constexpr int lowest = -80, size = 96;       // exponents from -80 (and below) to 15
  int64_t count[size] = {}, zeros = 0, overflow = 0;  // of 2^(lowest + i) and up; of 0; of 65520 and up, inf, NaN
  void add(const Tensor& t, double factor = 1);       // its numbers times factor
  int64_t between(int from, int to) const;            // how many of 2^from up to, not including, 2^to
  int64_t nonzero() const { return between(lowest, lowest + size) + overflow; }
};
struct Probe {
  Exponents a, delta, dW;  // of a layer; delta and dW times the loss scale
};
std::vector<Probe> probe(const Mlp& net, const Batch& batch, float scale);  // [L + 1] every tensor in fp32
// Why layer l needs fp32, or "". limit: most gradients that may vanish, 0 to 1; headroom: bits free below overflow
std::string trouble(const std::vector<Probe>& seen, int l, bool dynamic, double limit, int headroom);

// ---- Data and checkpoints (article 5.1, 5.2). All fail, with the file's name in the message. -----------------------
std::vector<uint8_t> read_file(const std::string& path);
void write_file(const std::string& path, const std::string& bytes);  // all of it, or the old file stays
struct Images {
  int count = 0, pixels = 0, classes = 10;
  std::vector<uint8_t> pixel;  // [count, pixels], row by row, 0 is background
  std::vector<uint8_t> label;  // [count], 0 .. classes - 1
};
struct Dataset {
  Images train, test;
  std::string what;  // for a person: which files were read
};
Dataset load_dataset(const std::string& folder);
struct SavedTensor {
  std::string name;
  std::vector<int64_t> shape;
  std::vector<float> value;  // the product of shape
};
struct SafeTensors {
  std::map<std::string, std::string> metadata;
  std::vector<SavedTensor> tensors;  // in the order of their bytes
};
SafeTensors read_safetensors(const std::string& path);
void write_safetensors(const std::string& path, const SafeTensors& file);

// ==== Part 2: two machines ==========================================================================================
// ---- On an NVIDIA GPU, compiled by nvcc --------------------------------------------------------------------------
#if defined(__CUDACC__)
#define UNROLL _Pragma("unroll")
constexpr int row_threads = 64, column_threads = 64, element_threads = 256, elements_per_block = 2048;
// gemm_tiled: a thread's registers hold ROWS x COLS results, in vectors of WIDE; in all it has THREAD_M x THREAD_N. A
// block has LARGE_M x LARGE_N, or SMALL_M x SMALL_N, and brings DEPTH of K into shared memory at a time.
constexpr int ROWS = 8, COLS = 8, WIDE = 8, THREAD_M = 8, THREAD_N = 8;
constexpr int LARGE_M = 128, LARGE_N = 128, SMALL_M = 64, SMALL_N = 64, DEPTH = 16;
constexpr int load_rows = 1, load_cols = 8;  // what a thread loads at once,
constexpr bool load_in_runs = false;         // its neighbours what lies beside it
struct alignas(16) Wide {
  float v[WIDE];
};
__device__ __forceinline__ void add_product(Wide& sum, float a, const Wide& b) {
  UNROLL for (int j = 0; j < WIDE; j++) sum.v[j] += a * b.v[j];
}
__device__ __forceinline__ float element(const Wide& x, int j) { return x.v[j]; }
__device__ __forceinline__ float machine_float(half h) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(h.bits));
  return x;
}
__device__ __forceinline__ half machine_half(float x) {
  half h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h.bits) : "f"(x));
  return h;
}
typedef float Row[1][8], Column[8][1];
__device__ __forceinline__ Column& transpose(Row& x) { return reinterpret_cast<Column&>(x); }
__device__ __forceinline__ void prefetch(const void*) {}                 // other warps work while one waits for memory
template <class T> __device__ __forceinline__ void poison_shared(T&) {}  // a GPU's shared memory holds anything anyway

// What gemm_mma is made of (PTX manual, 'Warp-level matrix instructions' and 'cp.async'); lane = 4 g + t.
__device__ __forceinline__ uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }
// clang-format off
// Four 8x8 matrices of 16-bit numbers: lane 8 i + j brings the address of row j of matrix i, 16 bytes; r[i] becomes its
// elements (g, 2t) and (g, 2t + 1), or those of its transpose.
template <bool transposed> __device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
#define LDMATRIX(trans) asm volatile("ldmatrix.sync.aligned.m8n8.x4" trans ".shared.b16 {%0,%1,%2,%3}, [%4];" \
    : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory")
  if (transposed) LDMATRIX(".trans");
  else LDMATRIX("");
}
// d (16x8, fp32) += a (16x16) b (16x8): a[i] holds rows g + 8 (i % 2), columns 2t + 8 (i / 2) and the next one; b[i] rows
// 2t + 8 i and the next one, column g; d[i] row g + 8 (i / 2), column 2t + i % 2.
template <class T>
__device__ __forceinline__ void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t* b) {
#define MMA(shape, type, a_b, ...) \
  asm volatile("mma.sync.aligned." shape ".row.col.f32." type "." type ".f32 {%0,%1,%2,%3}, " a_b ", {%0,%1,%2,%3};" \
    : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : __VA_ARGS__)
#if __CUDA_ARCH__ >= 800
#define ALL "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1])
  if (std::is_same<T, half>::value) MMA("m16n8k16", "f16", "{%4,%5,%6,%7}, {%8,%9}", ALL);
  else MMA("m16n8k16", "bf16", "{%4,%5,%6,%7}, {%8,%9}", ALL);
#else  // Turing: two halves of k, and fp16 alone
  if (!std::is_same<T, half>::value) __trap();
  for (int k = 0; k < 2; k++) MMA("m16n8k8", "f16", "{%4,%5}, {%6}", "r"(a[2 * k]), "r"(a[2 * k + 1]), "r"(b[k]));
#endif
}
// 16 bytes from global to shared memory, of which the first `bytes` are read and the others become 0. They have arrived
// when copy_wait<n>() returns and at most the n newest commits are still under way; Turing copies at once.
#if __CUDA_ARCH__ >= 800
__device__ __forceinline__ void copy_16_bytes_async(void* to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :: "r"(shared_address(to)), "l"(from), "r"(bytes) : "memory");
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int n> __device__ __forceinline__ void copy_wait() {
  asm volatile("cp.async.wait_group %0;" :: "n"(n) : "memory");
}
#else
__device__ __forceinline__ void copy_16_bytes_async(void* to, const void* from, int bytes) {
  *static_cast<uint4*>(to) = bytes ? *static_cast<const uint4*>(from) : uint4{};  // rows are padded: all 16 may be read
  for (int i = bytes / 2; i < 8; i++) static_cast<uint16_t*>(to)[i] = 0;
}
__device__ __forceinline__ void copy_commit() {}
template <int n> __device__ __forceinline__ void copy_wait() {}
#endif
// clang-format on

// mp.cu's word on an error of the runtime; of a kernel or a recorded step, too, which shows in a later call
void check(cudaError_t error, const char* call, const char* file, int line);
constexpr bool real_tensor_cores = true, launches_wait = false;  // launch() returns before the kernel has run
inline const cudaDeviceProp& device() {
  static const cudaDeviceProp found = [] {
    int number = 0;
    cudaDeviceProp p;
    if (cudaGetDevice(&number) != cudaSuccess || cudaGetDeviceProperties(&p, number) != cudaSuccess)
      fail("no CUDA device answers (%s); `make BACKEND=cpu` builds a program that needs none",
           cudaGetErrorString(cudaGetLastError()));
    return p;
  }();
  return found;
}
inline std::string machine() { return std::string(device().name) + " (CUDA)"; }
inline int multiprocessors() { return device().multiProcessorCount; }
inline int cores() { return multiprocessors(); }
inline int compute_capability() { return 10 * device().major + device().minor; }  // 75 for sm_75
inline cudaStream_t stream() {  // one, for only a stream of one's own can be captured; copies wait for it
  static cudaStream_t s = nullptr;
  if (!s) check(cudaStreamCreate(&s), "cudaStreamCreate", __FILE__, __LINE__);
  return s;
}
// A step launched again and again: plainly the first time, then recorded, and from then on replayed as a whole.
struct Graph {
  bool warm = false;
  std::shared_ptr<std::remove_pointer_t<cudaGraphExec_t>> recorded;
};
template <class F> void replay(Graph& graph, F step) {
  const auto must = [](cudaError_t error) { check(error, "a recorded step", __FILE__, __LINE__); };
  if (!graph.warm) return graph.warm = true, step();  // what it allocates must be there before the recording
  if (!graph.recorded) {
    cudaGraph_t nodes;
    must(cudaStreamBeginCapture(stream(), cudaStreamCaptureModeGlobal));
    step();
    must(cudaStreamEndCapture(stream(), &nodes));
    cudaGraphExec_t recorded = nullptr;
    must(cudaGraphInstantiateWithFlags(&recorded, nodes, 0));
    must(cudaGraphDestroy(nodes));
    graph.recorded.reset(recorded, cudaGraphExecDestroy);
  }
  must(cudaGraphLaunch(graph.recorded.get(), stream()));
}
template <class... P, class... A> void launch(void (*kernel)(P...), dim3 grid, dim3 block, A... args) {
  kernel<<<grid, block, 0, stream()>>>(args...);
  check(cudaGetLastError(), "a kernel's start", __FILE__, __LINE__);
}
#endif

// ---- CUDA on a CPU: the same kernels, thread by thread -------------------------------------------------------------
// A block runs on one OS thread; its CUDA threads are fibers: stacks that take turns. A thread runs until it must wait
// for others (a barrier, a warp-wide instruction), then the next one runs. Blocks are spread over the cores.
#if !defined(MP_CUDA)
#undef __USE_FORTIFY_LEVEL  // glibc must not check longjmp, which leads to another stack here
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <charconv>
#include <condition_variable>
#include <csetjmp>
#include <cstdio>
#include <cstdlib>
#include <deque>
#include <functional>
#include <mutex>
#include <numeric>
#include <random>
#include <set>
#include <thread>
#if !defined(__has_feature)
#define __has_feature(what) 0
#endif
#if defined(__SANITIZE_ADDRESS__) || __has_feature(address_sanitizer)
#include <sanitizer/common_interface_defs.h>
#define MP_ASAN            // for tests.cpp: programs are slow, and want more memory than a limit allows
#define __shared__ static  // it guards no thread_local arrays: plain ones then, and one OS thread for all blocks
constexpr int most_os_threads = 1;
#else
#define __sanitizer_start_switch_fiber(...)
#define __sanitizer_finish_switch_fiber(...)
#define __shared__ static thread_local  // a block never leaves its OS thread
constexpr int most_os_threads = 1024;
#endif
#if __has_include(<valgrind/valgrind.h>)
#include <valgrind/valgrind.h>
#else
#define VALGRIND_STACK_REGISTER(from, to) 0
#endif
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#if defined(__clang__)
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
using uint3 = dim3;
inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;

// The runtime calls of mp.cu. Device memory is ordinary memory.
enum cudaError_t { cudaSuccess, cudaErrorMemoryAllocation };
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost };
inline const char* cudaGetErrorString(cudaError_t e) { return e ? "out of memory" : "no error"; }
inline cudaError_t cudaMalloc(void** p, size_t bytes) {
  static const size_t all = size_t(sysconf(_SC_PHYS_PAGES)) * size_t(sysconf(_SC_PAGESIZE));
  const size_t large = size_t(1) << 21;  // in pages of 2 MB, for the TLB holds few addresses of pages
  if (bytes >= all || posix_memalign(p, bytes < large ? 64 : large, bytes) != 0) return cudaErrorMemoryAllocation;
#if defined(MADV_HUGEPAGE)
  if (bytes >= large) madvise(*p, bytes, MADV_HUGEPAGE);
#endif
  return cudaSuccess;
}
inline cudaError_t cudaFree(void* p) { return std::free(p), cudaSuccess; }
inline cudaError_t cudaDeviceSynchronize() { return cudaSuccess; }
inline cudaError_t cudaMemset(void* p, int v, size_t bytes) { return std::memset(p, v, bytes), cudaSuccess; }
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  if (bytes) std::memcpy(to, from, bytes);
  return cudaSuccess;
}

// A register tile's rows are vectors of the machine; element-wise kernels have one thread a block, and many elements.
constexpr int row_threads = 8, column_threads = 1, element_threads = 1, elements_per_block = 8192;
#if defined(__AVX512F__)
constexpr int ROWS = 8, COLS = 32, WIDE = 16;  // 16 of 32 registers: sums enough to hide a sum's latency
#else
constexpr int ROWS = 6, COLS = 16, WIDE = 8;  // 12 of 16 registers
#endif
constexpr int THREAD_M = 48, THREAD_N = 64;  // few threads: each costs a switch at every barrier
constexpr int LARGE_M = 192, LARGE_N = 128, SMALL_M = 96, SMALL_N = 64, DEPTH = 64;
constexpr int load_rows = 8, load_cols = 32;  // what a thread loads at once,
constexpr bool load_in_runs = true;           // and then what lies beside it
typedef float Wide __attribute__((vector_size(4 * WIDE), may_alias));
__forceinline__ void add_product(Wide& sum, float a, const Wide& b) { sum += a * b; }
__forceinline__ float element(const Wide& x, int j) { return x[j]; }
__forceinline__ void prefetch(const void* p) { __builtin_prefetch(p); }

// Eight neighbours at once. Vectors, not memcpy: a register written in parts would stall whoever reads it whole.
typedef uint32_t Bits_8 __attribute__((vector_size(32), may_alias, aligned(4)));
typedef uint16_t Short_8 __attribute__((vector_size(16), may_alias, aligned(2)));
typedef float Float_8 __attribute__((vector_size(32), may_alias, aligned(4)));
__forceinline__ void load(const float* p, float (&x)[8]) { (Float_8&)x = *(const Float_8*)p; }
__forceinline__ void store(float* p, const float (&x)[8]) { *(Float_8*)p = (const Float_8&)x; }
template <int... from>
__forceinline__ void pick(Float_8& to, const Float_8& a, const Float_8& b) {  // elements 0..7 of a, 8..15 of b
#if __has_builtin(__builtin_shufflevector)
  to = __builtin_shufflevector(a, b, from...);
#else
  to = __builtin_shuffle(a, b, Bits_8{from...});
#endif
}
typedef float Square[8][8];
__forceinline__ Square& transpose(Square& x) {  // rows 4, 2, 1 apart exchange their halves
  Float_8* const r = (Float_8*)x;
  UNROLL for (int i = 0; i < 4; i++) {
    const Float_8 a = r[i], b = r[i + 4];
    pick<0, 1, 2, 3, 8, 9, 10, 11>(r[i], a, b), pick<4, 5, 6, 7, 12, 13, 14, 15>(r[i + 4], a, b);
  }
  UNROLL for (int i = 0; i < 8; i++) {
    if (i & 2) continue;
    const Float_8 a = r[i], b = r[i + 2];
    pick<0, 1, 8, 9, 4, 5, 12, 13>(r[i], a, b), pick<2, 3, 10, 11, 6, 7, 14, 15>(r[i + 2], a, b);
  }
  UNROLL for (int i = 0; i < 8; i += 2) {
    const Float_8 a = r[i], b = r[i + 1];
    pick<0, 8, 2, 10, 4, 12, 6, 14>(r[i], a, b), pick<1, 9, 3, 11, 5, 13, 7, 15>(r[i + 1], a, b);
  }
  return x;
}
__forceinline__ void load(const bfloat16* p, float (&x)[8]) {
  (Bits_8&)x = __builtin_convertvector(*(const Short_8*)p, Bits_8) << 16;
}
__forceinline__ void store(bfloat16* p, const float (&x)[8]) {  // float_to_bfloat16, 8 at once
  const Float_8 value = (const Float_8&)x;
  const Bits_8 u = (const Bits_8&)x;
  const Bits_8 b =
      value != value ? u >> 16 | 0x40 : (u + 0x7fff + (u >> 16 & 1)) >> 16;  // only NaN differs from itself
  *(Short_8*)p = __builtin_convertvector(b, Short_8);
}
// Halves by the machine's own instruction, where the compiler offers one; mp.cu's bit operations, where not.
#if defined(__F16C__)
#include <immintrin.h>
__forceinline__ float machine_float(half h) { return _cvtsh_ss(h.bits); }
__forceinline__ half machine_half(float x) { return half{uint16_t(_cvtss_sh(x, 0))}; }
__forceinline__ void load(const half* p, float (&x)[8]) {
  _mm256_storeu_ps(x, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)));
}
__forceinline__ void store(half* p, const float (&x)[8]) {
  _mm_storeu_si128((__m128i*)p, _mm256_cvtps_ph(_mm256_loadu_ps(x), 0));
}
#elif defined(__aarch64__) && __has_builtin(__builtin_bit_cast)
__forceinline__ float machine_float(half h) { return float(__builtin_bit_cast(__fp16, h)); }
__forceinline__ half machine_half(float x) { return __builtin_bit_cast(half, __fp16(x)); }
#else
__forceinline__ float machine_float(half h) { return half_to_float(h); }
__forceinline__ half machine_half(float x) { return float_to_half(x); }
#endif

namespace cpu {
// Of the threads of a block, and of the blocks. MP_ORDER=forward|backward|N chooses, N being the seed of a shuffle.
enum Order { forward, backward, shuffled };
inline Order order = forward;
inline unsigned seed = 1;
inline bool poison = false;  // __shared__ starts as NaN: whenever MP_ORDER is set

// -- Fibers: go(from, to) leaves one stack and goes on where the other one stopped --
constexpr size_t stack_bytes = 64 * 1024;
void fiber_main();
struct Fiber {
  std::shared_ptr<void> memory;  // a part that nobody may touch, then the stack; none: the OS thread's own stack
  const void* bottom = nullptr;
  size_t bytes = stack_bytes;
  void* sp = nullptr;    // where it stopped,
  jmp_buf state;         // or that for portable fibers,
  bool started = false;  // from its first stop on
  void* fake = nullptr;  // AddressSanitizer's
  Fiber() = default;
  explicit Fiber(size_t number) {
    void* p = mmap(nullptr, 2 * stack_bytes + 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED || mprotect(p, stack_bytes, PROT_NONE) != 0) fail("out of memory: no stack for a thread");
    memory.reset(p, [](void* all) { munmap(all, 2 * stack_bytes + 4096); });
    bottom = (char*)p + stack_bytes + number % 4 * 1088;  // staggered, or the busiest lines would share a cache set
    void** const top = (void**)((char*)bottom + stack_bytes);
    top[-2] = (void*)fiber_main, sp = top - 8;  // looks as if fiber_main was about to be returned to
    (void)VALGRIND_STACK_REGISTER(bottom, top);
  }
};
#if defined(__x86_64__) && !defined(MP_PORTABLE_FIBERS)
__attribute__((naked, noinline)) inline void switch_stack(void** /*save*/, void* /*load*/) {
  asm("push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15; mov %rsp, (%rdi); mov %rsi, %rsp;"
      "pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp; ret");  // what a C++ call expects to find unchanged
}
inline void go(Fiber& from, Fiber& to) { switch_stack(&from.sp, to.sp); }
#else
inline void go(Fiber& from, Fiber& to) {
  from.started = true;
  if (_setjmp(from.state)) return;
  if (to.started) _longjmp(to.state, 1);
  ucontext_t c;
  getcontext(&c);
  c.uc_stack.ss_sp = (void*)to.bottom, c.uc_stack.ss_size = to.bytes, c.uc_link = nullptr;
  makecontext(&c, fiber_main, 0);
  setcontext(&c);
}
#endif

// -- A block: its threads, its warps, and whose turn it is --
struct Launch {
  dim3 grid, block;
  std::function<void()> kernel;  // with its arguments
};
struct Barrier {
  int arrived = 0, passed = 0;
  const char* what = "";  // the instruction that its threads wait in
  void open() { arrived = 0, passed++; }
};
struct Thread {
  Fiber* fiber;
  Barrier* at = nullptr;
  int passed, commits;
  std::multimap<int, std::function<void()>> copies;  // under way, by their commit
};
struct Warp {
  std::map<unsigned, Barrier> barrier;  // one for each mask that lanes wait with
  void* lane[32];
};
struct Block {
  const Launch* launch;
  int size = 0, begun = 0, alive = 0, me = 0, turn = 0;  // turn: a place in `queue`
  std::vector<Thread> thread;
  std::vector<int> queue;  // thread numbers in the order in which they begin
  std::vector<Warp> warp;
  std::set<void*> poisoned;  // the __shared__ arrays met so far
  Barrier all;
  Fiber os, *running = &os;  // the OS thread's own stack; the one in use
  std::deque<Fiber> fibers;  // [i] begins the next thread of the queue when thread i of it waits
};
inline thread_local Block* now = nullptr;
inline Thread& this_thread() { return now->thread[now->me]; }

[[noreturn]] inline void die(const char* why) {
  std::fprintf(stderr, "block (%u,%u,%u), thread %d: %s\n", blockIdx.x, blockIdx.y, blockIdx.z, now->me, why);
  for (int i = 0, shown = 0; i < now->size && shown < 8; i++)
    if (now->thread[i].at) std::fprintf(stderr, "  thread %d waits in %s\n", i, now->thread[i].at->what), shown++;
  std::abort();  // here a debugger shows every stack
}
inline Fiber& next_fiber() {  // of a thread that need not wait any more, or one that begins the next thread
  Block& b = *now;
  const bool all_begun = b.begun == b.size;
  if (order != forward) b.turn = b.size - 1;  // search from the head: the first threads run far ahead of the others
  for (int i = 0; i < b.size && (all_begun || order != forward); i++) {
    if (++b.turn >= b.size) b.turn = 0;
    const Thread& t = b.thread[b.queue[b.turn]];
    if (t.at && t.at->passed != t.passed) return *t.fiber;
  }
  if (all_begun && b.alive) die("the threads wait for each other (a barrier that not all of them reach?)");
  if (all_begun) return b.os;
  while (int(b.fibers.size()) < b.begun) b.fibers.emplace_back(b.fibers.size());
  return b.fibers[b.begun - 1];
}
inline void jump() {
  Fiber &from = *now->running, &to = next_fiber();
  now->running = &to;
  __sanitizer_start_switch_fiber(&from.fake, to.bottom, to.bytes);
  go(from, to);
  __sanitizer_finish_switch_fiber(from.fake, nullptr, nullptr);
}
template <class F = void (*)()> void wait_at(
    Barrier& barrier, int expected, const char* what, F last = [] {}) {
  if (barrier.arrived && barrier.what != what && std::strcmp(barrier.what, what))
    die("threads of one warp wait in different instructions");
  barrier.what = what;
  if (++barrier.arrived >= expected) return last(), barrier.open();
  Thread& t = this_thread();
  const int me = now->me;
  const uint3 index = threadIdx;
  t.at = &barrier, t.passed = barrier.passed, t.fiber = now->running;
  jump();
  t.at = nullptr, now->me = me, threadIdx = index;
}
inline dim3 place(unsigned i, dim3 size) { return {i % size.x, i / size.x % size.y, i / size.x / size.y}; }
// One after another; one that waits keeps the stack, and another stack goes on here. A kernel must not throw.
inline void run_threads() noexcept {
  Block& b = *now;
  while (b.begun < b.size) {
    b.me = b.queue[b.begun++], threadIdx = place(b.me, blockDim);
    this_thread().commits = 0, this_thread().copies.clear();
    b.launch->kernel();
    b.alive--;
    if (b.all.arrived && b.all.arrived == b.alive) b.all.open();  // nobody else can come
  }
}
inline void fiber_main() {
  [[maybe_unused]] Fiber& os = now->os;  // where the first one comes from
  __sanitizer_finish_switch_fiber(nullptr, os.bottom ? nullptr : &os.bottom, os.bottom ? nullptr : &os.bytes);
  for (;; jump()) run_threads();
}
inline int count(dim3 size) { return int(size.x * size.y * size.z); }
inline void run_block(int number, const Launch& launch) {
  static thread_local Block block;
  Block& b = *(now = &block);
  const int n = count(launch.block), blocks = count(launch.grid);
  if (order == backward) number = blocks - 1 - number;
  if (order == shuffled) number = int((number + 7919ull * seed) % blocks);
  gridDim = launch.grid, blockDim = launch.block, blockIdx = place(number, gridDim);
  b.launch = &launch, b.size = b.alive = n, b.begun = 0, b.turn = n - 1;
  b.thread.resize(n), b.queue.resize(n), b.warp.resize((n + 31) / 32), b.poisoned.clear();
  std::iota(b.queue.begin(), b.queue.end(), 0);
  if (order == backward) std::reverse(b.queue.begin(), b.queue.end());
  if (order == shuffled) std::shuffle(b.queue.begin(), b.queue.end(), std::minstd_rand(seed * 40503u + number));
  run_threads();
  if (b.alive) jump();  // back when the last thread has ended
}

// -- The pool: whoever is free takes the next block --
inline void wait_a_moment([[maybe_unused]] int waited) {  // most waits are short: not worth a call of the system
#if defined(__x86_64__)
  if (waited < 1000) return __builtin_ia32_pause();
#endif
  std::this_thread::yield();
}
struct Pool {
  std::atomic<int> left{0}, unfinished{0};  // blocks that nobody has taken, below 0 at the pool's end; that still run
  std::mutex mutex;
  std::condition_variable wake;
  std::vector<std::thread> helpers;
  const Launch* launch = nullptr;
  explicit Pool(int workers) {
    for (int n = 2; n <= std::min(workers, most_os_threads); n++) try {
        helpers.emplace_back([this] { help(); });
      } catch (const std::exception& error) {
        stop();
        fail("thread %d of %d cannot be started: %s; set MP_THREADS to a smaller number", n, workers, error.what());
      }
  }
  ~Pool() { stop(); }
  void stop() {
    tell(-1);
    for (auto& h : helpers) h.join();
  }
  void tell(int blocks) {
    const std::lock_guard<std::mutex> lock(mutex);  // nobody is between a look at `left` and sleep
    left = blocks;
    wake.notify_all();
  }
  void work() {
    for (int n = left; n > 0;)
      if (left.compare_exchange_weak(n, n - 1)) run_block(count(launch->grid) - n, *launch), unfinished--, n = left;
  }
  void help() {
    for (; left >= 0; work()) {
      for (int n = 0; n < 3000 && left == 0; n++) wait_a_moment(n);  // some 1 ms, then sleep
      if (left != 0) continue;
      std::unique_lock<std::mutex> lock(mutex);
      wake.wait(lock, [this] { return left != 0; });
    }
  }
  void run(const Launch& l) {
    const int blocks = count(l.grid);
    if (blocks == 1 || helpers.empty()) {  // not worth the telling
      for (int i = 0; i < blocks; i++) run_block(i, l);
      return;
    }
    launch = &l, unfinished = blocks;
    tell(blocks);
    work();
    for (int n = 0; unfinished > 0; n = std::min(n + 1, 1000)) wait_a_moment(n);
  }
};
inline std::unique_ptr<Pool>& pool() {  // MP_THREADS=N, else every core
  static std::unique_ptr<Pool> p = [] {
    const auto number = [](const char* name, const char* s, unsigned most, const char* what) {
      unsigned n = 0;
      const auto [end, error] = std::from_chars(s, s + std::strlen(s), n);
      if (error != std::errc() || *end || n < 1 || n > most) fail("%s=%s: must be %s", name, s, what);
      return n;
    };
    if (const char* s = std::getenv("MP_ORDER")) {
      poison = true;
      order = !std::strcmp(s, "forward") ? forward : !std::strcmp(s, "backward") ? backward : shuffled;
      if (order == shuffled) seed = number("MP_ORDER", s, ~0u, "forward, backward or a seed from 1 up");
    }
    int workers = int(std::max(1u, std::thread::hardware_concurrency()));
    if (const char* s = std::getenv("MP_THREADS")) workers = int(number("MP_THREADS", s, 1024, "from 1 to 1024"));
    return std::make_unique<Pool>(workers);
  }();
  return p;
}
inline void use_os_threads(int n) { pool().reset(), pool() = std::make_unique<Pool>(n); }

// -- Instructions in which the lanes of a warp meet: the last to come does the work of all --
inline int lane_id() { return now->me % 32; }
template <class Lane, class F> void together(unsigned mask, Lane& mine, const char* what, F all_lanes) {
  Warp& warp = now->warp[now->me / 32];
  mask &= ~0u >> std::max(0, 32 - (now->size - now->me + lane_id()));  // the last warp may have fewer lanes
  if (!(mask >> lane_id() & 1)) die("a lane is not in its own mask");
  warp.lane[lane_id()] = &mine;
  wait_at(warp.barrier[mask], __builtin_popcount(mask), what, [&] { all_lanes((Lane**)warp.lane, mask); });
}
template <class T> T exchange(unsigned mask, T value, int from, const char* what) {  // what lane `from` brought
  struct Lane {
    T in, out;
    int from;
  } mine{value, value, from};
  std::memset((void*)&mine.out, 0xff, sizeof(T));  // undefined in CUDA, where no such lane takes part
  together(mask, mine, what, [](Lane** lane, unsigned lanes) {
    for (int i = 0; i < 32; i++)
      if ((lanes >> i & 1) && (lanes >> lane[i]->from & 1)) lane[i]->out = lane[lane[i]->from]->in;
  });
  return mine.out;
}
}  // namespace cpu

template <class T> void poison_shared(T& array) {  // the first thread of a block to come fills it with NaN
  if (cpu::poison && cpu::now->poisoned.insert(&array).second) std::memset((void*)&array, 0xff, sizeof(T));
}
inline void __syncthreads() { cpu::wait_at(cpu::now->all, cpu::now->alive, "__syncthreads"); }
inline void __syncwarp(unsigned mask = ~0u) { cpu::exchange(mask, 0, cpu::lane_id(), "__syncwarp"); }
template <class T> T __shfl_sync(unsigned mask, T v, int from) {
  return cpu::exchange(mask, v, from & 31, "__shfl_sync");
}
template <class T> T __shfl_xor_sync(unsigned mask, T v, int bits) {
  return cpu::exchange(mask, v, cpu::lane_id() ^ bits, "__shfl_xor_sync");
}
template <class T> T __shfl_down_sync(unsigned mask, T v, int n) {
  const int lane = cpu::lane_id();
  return cpu::exchange(mask, v, lane + n < 32 ? lane + n : lane, "__shfl_down_sync");
}
// What gemm_mma is made of; the GPU's half of this file says what each does.
template <bool transposed> void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  struct Lane {
    uint32_t* r;
    const uint16_t* row;
  } mine{r, static_cast<const uint16_t*>(row)};
  if (uintptr_t(row) % 16) cpu::die("ldmatrix: the address is no multiple of 16 bytes");
  cpu::together(~0u, mine, "ldmatrix", [](Lane** lane, unsigned) {
    for (int l = 0; l < 32; l++)
      for (int i = 0; i < 4; i++)
        for (int odd = 0, g = l / 4, t = l % 4 * 2; odd < 2; odd++) {
          const uint16_t bits = transposed ? lane[8 * i + t + odd]->row[g] : lane[8 * i + g]->row[t + odd];
          std::memcpy((char*)&lane[l]->r[i] + 2 * odd, &bits, 2);
        }
  });
}
template <class T> void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t* b) {
  struct Lane {
    float* d;
    const uint32_t *a, *b;
  } mine{d, a, b};
  cpu::together(~0u, mine, "mma", [](Lane** lane, unsigned) {
    float A[16][16], B[16][8];
    const auto number = [](uint32_t bits) {
      return std::is_same<T, half>::value ? machine_float(half{uint16_t(bits)})
                                          : bfloat16_to_float(bfloat16{uint16_t(bits)});
    };
    for (int l = 0; l < 32; l++)
      for (int odd = 0, g = l / 4, t = l % 4 * 2; odd < 2; odd++) {
        for (int i = 0; i < 4; i++) A[g + i % 2 * 8][t + odd + i / 2 * 8] = number(lane[l]->a[i] >> 16 * odd);
        for (int i = 0; i < 2; i++) B[t + odd + i * 8][g] = number(lane[l]->b[i] >> 16 * odd);
      }
    for (int l = 0; l < 32; l++)
      for (int i = 0; i < 4; i++)
        for (int k = 0; k < 16; k++) lane[l]->d[i] += A[l / 4 + i / 2 * 8][k] * B[k][l % 4 * 2 + i % 2];
  });
}
// As late as the rules allow: until its wait the target holds NaN, and the source is read only then.
inline void copy_16_bytes_async(void* to, const void* from, int bytes) {
  if ((uintptr_t(to) | uintptr_t(from)) % 16 || bytes < 0 || bytes > 16)
    cpu::die("copy_16_bytes_async: an address is no multiple of 16 bytes, or the count is wrong");
  std::memset(to, 0xff, 16);
  const auto land = [=] { std::memcpy(to, from, bytes), std::memset((char*)to + bytes, 0, 16 - bytes); };
  cpu::this_thread().copies.emplace(cpu::this_thread().commits, land);
}
inline void copy_commit() { cpu::this_thread().commits++; }
template <int n> void copy_wait() {
  auto& copies = cpu::this_thread().copies;
  const auto newest = copies.lower_bound(cpu::this_thread().commits - n);
  for (auto c = copies.begin(); c != newest; c = copies.erase(c)) c->second();
}
inline int multiprocessors() { return 1; }                           // a product is not split for a CPU's few cores
inline int cores() { return int(cpu::pool()->helpers.size()) + 1; }  // each takes a block at a time
constexpr bool real_tensor_cores = false, launches_wait = true;
inline int compute_capability() { return 80; }  // of the instructions imitated above
struct Graph {};
template <class F> void replay(Graph&, F step) { step(); }  // a launch costs next to nothing here
inline int atomicOr(int* p, int v) { return __atomic_fetch_or(p, v, __ATOMIC_RELAXED); }
template <class... P, class... A> void launch(void (*kernel)(P...), dim3 grid, dim3 block, A... args) {
  cpu::pool()->run({grid, block, [&] { kernel(args...); }});
}
inline std::string machine() {
  const size_t n = cpu::pool()->helpers.size() + 1;
  return "CPU, " + std::to_string(n) + (n > 1 ? " threads" : " thread") +
         " (no GPU used: everything works, only slower)";
}
#endif
