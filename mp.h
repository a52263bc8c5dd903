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

#if !defined(__CUDACC__)  // other compilers read past CUDA's marks
#define __global__
#define __host__
#define __device__
#endif
#if defined(__CUDACC__) || defined(__clang__)
#define UNROLL _Pragma("unroll")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

// ==== Part 1: the vocabulary ====
// Article: the text this program follows, by section. Paper: Micikevicius et al., Mixed Precision Training, 2017.
// ---- Errors: one line says what was wrong, where, and what to do. main() prints it and ends with 1. ----
struct Error : std::runtime_error {
  using runtime_error::runtime_error;
};
[[noreturn]] void fail(const std::string& text);  // throws Error

// ---- Number formats (article 2.1; IEEE 754 binary16; bfloat16 is the upper half of a float) ----
struct half {
  uint16_t bits;  // 1 sign, 5 exponent, 10 fraction: up to 65504, normal from 2^-14, least 2^-24
};
struct bfloat16 {
  uint16_t bits;  // 1 sign, 8 exponent, 7 fraction: the range of a float, 2 to 3 decimal digits
};
enum class Type { fp32, fp16, bf16 };
// Round to nearest, ties to even; subnormals kept; too large becomes infinity; NaN stays NaN. None of them fails.
__host__ __device__ half float_to_half(float x);
__host__ __device__ float half_to_float(half h);
__host__ __device__ bfloat16 float_to_bfloat16(float x);
__host__ __device__ float bfloat16_to_float(bfloat16 b);
// A neighbour of x, the upper one with probability (x - lower) / (upper - lower); `random`: 64 uniformly random bits.
__host__ __device__ half stochastic_half(float x, uint64_t random);
__host__ __device__ bfloat16 stochastic_bfloat16(float x, uint64_t random);

// ---- Tensor: a matrix in device memory, row after row. A copy of the struct is a view of the same numbers. ----
struct Tensor {
  int rows = 0, cols = 0;
  int stride = 0;  // from one row to the next, in elements: cols rounded up to 8, so that every row is 16-byte aligned
  Type type = Type::fp32;
  std::shared_ptr<char> memory;
  template <class T> T* as() const { return reinterpret_cast<T*>(memory.get()); }
  size_t bytes() const { return size_t(rows) * size_t(stride) * (type == Type::fp32 ? 4 : 2); }
};
Tensor make_tensor(int64_t rows, int64_t cols, Type type);  // zeros; fails if empty, or too large for the device
Tensor first_rows(const Tensor& t, int rows);               // a view of the upper rows
std::vector<float> to_host(const Tensor& t);                // [rows * cols], without the padding
void to_device(const std::vector<float>& values, const Tensor& t);  // [rows * cols], each rounded to t's type

// ---- The matrix products (one operation, three layouts; fp32 sums) ----
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
// A, B, bias and mask of one type, C of any; any size from 1 up; C's padding may be written. Shapes that do not fit fail.
void gemm_naive(Layout, const Tensor& A, const Tensor& B, const Tensor& C, const Epilogue& epilogue = {});
// `splits` blocks share K; their sums are added in a fixed order. 0: as many blocks as keep the machine busy.
void gemm_tiled(Layout, const Tensor& A, const Tensor& B, const Tensor& C, const Epilogue& epilogue = {},
                int splits = 0);
// Tensor cores: fp16, and bf16 from sm_80 on; a CPU imitates their instructions. Other types fail.
void gemm_mma(Layout, const Tensor& A, const Tensor& B, const Tensor& C, const Epilogue& epilogue = {}, int splits = 0);
bool tensor_cores(Type type);  // does this machine have any for this type?
// The best of them for machine and type, which training uses; MP_GEMM=naive|tiled|mma in the environment overrides.
void gemm(Layout, const Tensor& A, const Tensor& B, const Tensor& C, const Epilogue& epilogue = {});

// ---- The network (article 4.1): a^0 the input, then for each layer z = a W^T + b, a = f(z) ----
enum class Loss { cross_entropy, squared_error };
enum class Update { master, half, kahan, stochastic };  // article 3.1 and 3.2 step 5; paper 3.1; arXiv 2010.06192
struct Layer {
  Type type = Type::fp32;  // of everything below but `master` and `a`
  int clean_probes = 2;    // consecutive probes in which fp16 could hold everything, at most 2 (--precision auto)
  Tensor master;           // [1, n] fp32: W row after row, then b, both with their padding; empty if update != master
  Tensor weights;          // [1, n] compute copy of the master; in fp32 the master itself
  Tensor gradients;        // [1, n] dL/dW and dL/db, times the loss scale
  Tensor compensation;     // [1, n] what Kahan's sum still owes; else empty
  Tensor W, b;             // [out, in] and [1, out]: views of weights
  Tensor dW, db;           // the same of gradients
  Tensor a;                // [batch, out] f(z), in the type of the layer that reads it. Layer 0 has it alone: the input
  Tensor delta;            // [batch, out] dL/dz, times the loss scale
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
  Tensor log_sum_exp;  // [1, batch] fp32: log sum exp(z), kept by E1 for E3
  // [L] in device memory: the parameters of all layers, for check and update
  std::shared_ptr<struct Parameters> parameters;
};
Mlp make_mlp(const std::vector<int>& sizes, int batch, Type type, Update update);  // fails on a size below 1
void set_types(Mlp& net, const std::vector<Type>& types);  // [L] of layer 1 to L, with master weights (or all one)
struct Footprint {  // bytes, padding included; weights: with master, compensation; gradients: every delta, dW, db
  size_t weights = 0, activations = 0, gradients = 0;
};
Footprint footprint(const Mlp& net);
Tensor kept_W(const Layer& layer);  // views of the parameters as training keeps them: of the master if there is one
Tensor kept_b(const Layer& layer);
void set_parameters(Layer& layer, const std::vector<float>& W, const std::vector<float>& b);  // and their compute copy
void initialise(Mlp& net);  // article 3.2 step 1: W from He's normal distribution (arXiv 1502.01852), b = 0, in fp32

// ---- Loss scaling (article 3.1; paper 3.2; torch.amp.GradScaler). Its state lives on the device. ----
struct StepState {
  float scale = 65536;     // multiplies the loss gradient, so that small gradients stay above fp16's 2^-24
  int growth_tracker = 0;  // finite steps since the scale last changed
  int found_inf = 0;       // this step's gradients hold an inf or a NaN: no update
  int skipped = 0;         // updates left out so far
  float loss = 0;          // this step's mean over the batch, unscaled
  int halted = 0;          // no scale can help any more (LossScaler::update); nothing changes from then on
  int position = 0;        // of the next batch in this epoch
  unsigned step = 0;       // steps since training began
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

// ---- Article 2.3: boxes A to G are a training step. Each is a launch or two; the host waits for none. ----
struct Batch {                      // device memory
  const uint8_t* pixels = nullptr;  // [n, in], 0 to 255; none: the input a^0 and the targets y are there already
  const uint8_t* labels = nullptr;  // [n]
  const int* order = nullptr;       // [n] a permutation: sample i of the epoch is order[i]; none: i
  int rows = 0;                     // of this batch
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
// H, the output for n images (host memory, [n, in]): logits [n, classes], or the class with the largest one
std::vector<float> logits(Mlp& net, const std::vector<uint8_t>& pixels);
std::vector<int> predict(Mlp& net, const std::vector<uint8_t>& pixels);

// ---- Dynamic precision (article 3.1, 3.2 step 6): what would fp16 make of the numbers? ----
struct Exponents {
  static constexpr int lowest = -80, size = 96;       // exponents from -80 (and below) to 15
  int64_t count[size] = {}, zeros = 0, overflow = 0;  // of 2^(lowest + i) and up; of 0; of 65520 and up, inf, NaN
  void add(const Tensor& t, double factor = 1);       // its numbers times factor
  int64_t between(int from, int to) const;            // how many of 2^from up to, not including, 2^to
  int64_t nonzero() const { return between(lowest, lowest + size) + overflow; }
};
struct Probe {
  Exponents a, delta, dW;  // of a layer; the last two times the loss scale
};
std::vector<Probe> probe(const Mlp& net, const Batch& batch, float scale);  // [L + 1] every tensor in fp32
// Why fp16 cannot hold layer l, or "". headroom: bits that must be free below overflow
std::string why_not_fp16(const std::vector<Probe>& seen, int l, bool dynamic, int headroom);

// ---- Data and checkpoints (article 5.1, 5.2). All fail, with the file's name in the message. ----
std::vector<uint8_t> read_file(const std::string& path);
void write_file(const std::string& path, const std::string& bytes);  // all of it, or the old file stays
struct Images {
  int count = 0, pixels = 0, classes = 10;
  std::vector<uint8_t> pixel;  // [count, pixels], row by row, 0 is background
  std::vector<uint8_t> label;  // [count], 0 .. classes - 1
};
struct Dataset {
  Images train, test;
  std::string what;  // files read
};
Dataset load_dataset(const std::string& folder);
struct SavedTensor {
  std::string name;
  std::vector<int64_t> shape;
  std::vector<float> value;  // the product of shape
};
struct SafeTensors {
  std::map<std::string, std::string> metadata;
  std::vector<SavedTensor> tensors;  // in the header's order
};
SafeTensors read_safetensors(const std::string& path);
void write_safetensors(const std::string& path, const SafeTensors& file);

// ==== Part 2: two machines. Either half gives mp.cu the same names: sizes, wrapped instructions, launch(). ====
struct TileSize {
  int M, N;  // M x N results of a matrix product
};
// ---- On an NVIDIA GPU, compiled by nvcc ----
#if defined(__CUDACC__)
#define CUDA_CHECK(call) check(call, #call)
constexpr int loss_threads = 512, row_threads = 64, column_threads = 64, element_threads = 256;
constexpr int elements_per_block = 2048;
// gemm_tiled: what a block computes (large where that keeps the machine busy), what a thread computes, how much of it at
// a time in registers (TM x TN, rows of vectors), in how many pieces TM rows lie, and how much of K lies in shared memory.
constexpr TileSize large_tile = {128, 128}, small_tile = {64, 64}, thread_tile = {8, 8};
constexpr int TM = 8, TM_parts = 2, TN = 8, vector_width = 8, tiled_BK = 16;
struct alignas(16) Vector {
  float v[vector_width];
};
__device__ inline void add_product(Vector& sum, float a, const Vector& b) {
  UNROLL for (int j = 0; j < vector_width; j++) sum.v[j] += a * b.v[j];
}
__device__ inline float element(const Vector& x, int j) { return x.v[j]; }
constexpr int transposed_rows = 1;        // that store_transposed() takes
constexpr bool loads_whole_rows = false;  // neighbouring threads load neighbours, in one access
__device__ inline void store_transposed(float* to, int stride, const float (&x)[1][8]) {
  UNROLL for (int j = 0; j < 8; j++) to[j * stride] = x[0][j];
}
__device__ inline void prefetch(const void*) {}  // while one warp waits for memory, others work
__device__ inline float machine_float(half h) {
  float x;
  asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(h.bits));
  return x;
}
__device__ inline half machine_half(float x) {
  half h;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h.bits) : "f"(x));
  return h;
}
template <class T> __device__ inline T* dynamic_shared() {  // the bytes that launch_shared() was told
  extern __shared__ __align__(128) char shared_memory[];
  return (T*)shared_memory;
}
// What gemm_mma is made of (PTX manual, 'Warp-level matrix instructions' and 'cp.async'); lane = 4 g + t.
__device__ inline uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }
// clang-format off
// Four 8x8 matrices of 16-bit numbers: lane 8 i + j brings the address of row j of matrix i, 16 bytes; r[i] becomes its
// elements (g, 2t) and (g, 2t + 1), or those of its transpose.
template <bool transposed> __device__ inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
#define LDMATRIX(trans) asm volatile("ldmatrix.sync.aligned.m8n8.x4" trans ".shared.b16 {%0,%1,%2,%3}, [%4];" \
    : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory")
  if (transposed) LDMATRIX(".trans");
  else LDMATRIX("");
}
// d (16x8, fp32) += a (16x16) b (16x8): a[i] holds rows g + 8 (i % 2), columns 2t + 8 (i / 2) and the next one; b[i] rows
// 2t + 8 i and the next one, column g; d[i] row g + 8 (i / 2), column 2t + i % 2.
template <class T> __device__ inline void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t* b) {
#define MMA(shape, type, a_b, ...) \
  asm volatile("mma.sync.aligned." shape ".row.col.f32." type "." type ".f32 {%0,%1,%2,%3}, " a_b ", {%0,%1,%2,%3};" \
    : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : __VA_ARGS__)
#if __CUDA_ARCH__ >= 800
#define ALL "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1])
  if (std::is_same<T, half>::value) MMA("m16n8k16", "f16", "{%4,%5,%6,%7}, {%8,%9}", ALL);
  else MMA("m16n8k16", "bf16", "{%4,%5,%6,%7}, {%8,%9}", ALL);
#else  // Turing: two halves of k, and fp16 alone
  for (int k = 0; k < 2; k++) MMA("m16n8k8", "f16", "{%4,%5}, {%6}", "r"(a[2 * k]), "r"(a[2 * k + 1]), "r"(b[k]));
#endif
}
// 16 bytes from global to shared memory, of which the first `bytes` are read and the others become 0. They have arrived
// when copy_wait<n>() returns and at most the n newest commits are still under way; Turing copies at once.
#if __CUDA_ARCH__ >= 800
__device__ inline void copy_16_bytes_async(void* to, const void* from, int bytes) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :: "r"(shared_address(to)), "l"(from), "r"(bytes) : "memory");
}
__device__ inline void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int n> __device__ inline void copy_wait() { asm volatile("cp.async.wait_group %0;" :: "n"(n) : "memory"); }
#else
__device__ inline void copy_16_bytes_async(void* to, const void* from, int bytes) {
  *static_cast<uint4*>(to) = bytes ? *static_cast<const uint4*>(from) : uint4{};  // rows are padded: all 16 may be read
  for (int i = bytes / 2; i < 8; i++) static_cast<uint16_t*>(to)[i] = 0;
}
__device__ inline void copy_commit() {}
template <int n> __device__ inline void copy_wait() {}
#endif
// clang-format on
inline void check(cudaError_t error, const char* call) {  // of a kernel's error: a later one
  if (error == cudaSuccess) return;
  cudaGetLastError();  // takes the error away; the next launch would report it again
  fail(std::string("device: ") + cudaGetErrorString(error) + " (" + call + "); use --resume or a smaller --batch");
}
constexpr bool real_tensor_cores = true;
inline const cudaDeviceProp& device() {
  static cudaDeviceProp p = {};
  int number = 0;
  if (p.major == 0 && (cudaGetDevice(&number) != cudaSuccess || cudaGetDeviceProperties(&p, number) != cudaSuccess))
    fail(std::string("no CUDA device answers (") + cudaGetErrorString(cudaGetLastError()) +
         "); `make BACKEND=cpu` builds a program that needs none");
  return p;
}
inline std::string machine() { return device().name + std::string(" (CUDA)"); }
inline int multiprocessors() { return device().multiProcessorCount; }
inline size_t max_shared_bytes() { return device().sharedMemPerBlockOptin; }
inline int cores() { return multiprocessors(); }
inline bool bf16_tensor_cores() { return device().major >= 8; }  // sm_80
inline cudaStream_t stream() {  // all work goes to this one: the default stream cannot be recorded
  static cudaStream_t s = nullptr;
  if (!s) CUDA_CHECK(cudaStreamCreate(&s));
  return s;
}
template <class... P, class... A>
void launch_shared(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, A... args) {
  const auto most = cudaFuncAttributeMaxDynamicSharedMemorySize;
  if (shared_bytes > 48 * 1024) CUDA_CHECK(cudaFuncSetAttribute((const void*)kernel, most, int(shared_bytes)));
  kernel<<<grid, block, shared_bytes, stream()>>>(args...);
  CUDA_CHECK(cudaGetLastError());
}
// A step that is launched again and again: first plainly, which allocates what it needs; then recorded and replayed.
struct Graph {
  bool warm = false;
  std::shared_ptr<std::remove_pointer_t<cudaGraphExec_t>> recorded;
};
template <class F> void replay(Graph& graph, F step) {
  if (!graph.warm) {
    graph.warm = true;
    return step();
  }
  if (!graph.recorded) {
    cudaGraph_t nodes = nullptr;
    cudaGraphExec_t recorded = nullptr;
    CUDA_CHECK(cudaStreamBeginCapture(stream(), cudaStreamCaptureModeGlobal));
    try {
      step();
    } catch (...) {  // else the stream would go on recording
      cudaStreamEndCapture(stream(), &nodes);
      cudaGetLastError();
      throw;
    }
    CUDA_CHECK(cudaStreamEndCapture(stream(), &nodes));
    CUDA_CHECK(cudaGraphInstantiateWithFlags(&recorded, nodes, 0));
    CUDA_CHECK(cudaGraphDestroy(nodes));
    graph.recorded.reset(recorded, cudaGraphExecDestroy);
  }
  CUDA_CHECK(cudaGraphLaunch(graph.recorded.get(), stream()));
}
#endif

// ---- CUDA on a CPU: the same kernels, thread by thread ----
// A block runs on one OS thread; its CUDA threads are fibers, stacks that take turns: one runs until it must wait for
// others, at a barrier or a warp-wide instruction, then the next. Blocks are spread over the cores.
#if !defined(MP_CUDA)
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <deque>
#include <functional>
#include <random>
#include <thread>
#if defined(MP_ASAN)  // a build with AddressSanitizer, which must be told of every switch of stacks
#include <sanitizer/common_interface_defs.h>
#else
#define __sanitizer_start_switch_fiber(...)
#define __sanitizer_finish_switch_fiber(...)
#endif
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
using std::min;
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;
// The runtime calls of mp.cu. Device memory is ordinary memory.
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost };
inline void cudaMalloc(void** p, size_t bytes) {
  static const size_t all = sysconf(_SC_PHYS_PAGES) * size_t(sysconf(_SC_PAGESIZE));
  const size_t large = 1 << 21;  // in pages of 2 MB, so that the processor's TLB needs fewer entries
  if (bytes >= all || posix_memalign(p, bytes < large ? 64 : large, bytes) != 0) throw std::bad_alloc();
#if defined(MADV_HUGEPAGE)
  if (bytes >= large) madvise(*p, bytes, MADV_HUGEPAGE);
#endif
}
inline void cudaFree(void* p) { std::free(p); }
inline void cudaDeviceSynchronize() {}
inline void cudaMemset(void* p, int v, size_t bytes) { std::memset(p, v, bytes); }
inline void cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  std::copy_n((const char*)from, bytes, (char*)to);
}
#define CUDA_CHECK(call) call  // nothing to check: cudaMalloc throws
// Element-wise kernels have one thread a block, with many elements. gemm_tiled's names are explained in the GPU's half.
constexpr int loss_threads = 32, row_threads = 8, column_threads = 1, element_threads = 1, elements_per_block = 8192;
constexpr TileSize large_tile = {192, 128}, small_tile = {96, 64};
constexpr TileSize thread_tile = {48, 64};  // few threads: each costs a switch of stacks at every barrier
constexpr int tiled_BK = 64, TM_parts = 1;
#if defined(__AVX512F__)
constexpr int TM = 8, TN = 32, vector_width = 16;  // 16 of 32 registers: sums enough to hide a sum's latency
#else
constexpr int TM = 6, TN = 16, vector_width = 8;  // 12 of 16 registers
#endif
typedef float Vector __attribute__((vector_size(4 * vector_width), may_alias));
__forceinline__ void add_product(Vector& sum, float a, const Vector& b) { sum += a * b; }
__forceinline__ float element(const Vector& x, int j) { return x[j]; }
constexpr bool loads_whole_rows = true;  // a thread loads whole cache lines
__forceinline__ void prefetch(const void* p) { __builtin_prefetch(p); }
// Eight neighbours at once. Vectors, not memcpy: an instruction that reads a register written in parts would stall.
typedef uint32_t Bits_8 __attribute__((vector_size(32), may_alias, aligned(4)));
typedef uint16_t Short_8 __attribute__((vector_size(16), may_alias, aligned(2)));
typedef float Float_8 __attribute__((vector_size(32), may_alias, aligned(4)));
__forceinline__ void load(const float* p, float (&x)[8]) { (Float_8&)x = *(const Float_8*)p; }
__forceinline__ void store(float* p, const float (&x)[8]) { *(Float_8*)p = (const Float_8&)x; }
#if __has_builtin(__builtin_shufflevector)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, Bits_8{__VA_ARGS__})
#endif
// Rows d apart exchange halves: a's numbers with j & d set for b's without. j counts 0 to 7, b's elements 8 to 15.
template <int d, int... j> __forceinline__ void exchange(Float_8* row, std::integer_sequence<int, j...>) {
  UNROLL for (int i = 0; i < 8; i++) {
    if (i & d) continue;
    const Float_8 a = row[i], b = row[i + d];
    row[i] = SHUFFLE(a, b, (j & d ? j - d + 8 : j)...);
    row[i + d] = SHUFFLE(a, b, (j & d ? j + 8 : j + d)...);
  }
}
constexpr int transposed_rows = 8;
__forceinline__ void store_transposed(float* to, int stride, float (&x)[8][8]) {
  constexpr std::make_integer_sequence<int, 8> lanes;
  exchange<4>((Float_8*)x, lanes);
  exchange<2>((Float_8*)x, lanes);
  exchange<1>((Float_8*)x, lanes);
  UNROLL for (int j = 0; j < 8; j++) store(to + j * stride, x[j]);
}
__forceinline__ void load(const bfloat16* p, float (&x)[8]) {
  (Bits_8&)x = __builtin_convertvector(*(const Short_8*)p, Bits_8) << 16;
}
__forceinline__ void store(bfloat16* p, const float (&x)[8]) {  // float_to_bfloat16, 8 at once
  const Float_8 value = (const Float_8&)x;
  const Bits_8 u = (const Bits_8&)x;
  const Bits_8 rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16;
  const Bits_8 b = value != value ? u >> 16 | 0x40 : rounded;  // only NaN differs from itself
  *(Short_8*)p = __builtin_convertvector(b, Short_8);
}
// Halves by the machine's own instruction where there is one, else by mp.cu's bit operations
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
// Of a block's threads, and of the blocks: MP_ORDER=forward|backward|N, N being the seed of a shuffle
enum Order { forward, backward, shuffled };
inline Order order = forward;
inline unsigned seed = 1;
inline bool poison = false;  // shared memory starts as NaN: whenever MP_ORDER is set

// -- Fibers: switch_stack(&from.sp, to.sp) saves what a C++ call must find unchanged, and goes on where `to` stopped.
// One instruction a line, because ; begins a comment for Apple's assembler. --
void switch_stack(void*** save, void** load) asm("mp_switch_stack");
#if defined(__x86_64__)
constexpr int saved_words = 8, return_address = 6;  // one word is padding: sp stays even
asm(".text\n"
    "mp_switch_stack: push %rbp\n push %rbx\n push %r12\n push %r13\n push %r14\n push %r15\n"
    "mov %rsp, (%rdi)\n mov %rsi, %rsp\n"
    "pop %r15\n pop %r14\n pop %r13\n pop %r12\n pop %rbx\n pop %rbp\n ret\n");
#elif defined(__aarch64__)  // x19 to x30 (where to return to), d8 to d15
constexpr int saved_words = 20, return_address = 11;
// clang-format off
#define SAVED(op) op " x19, x20, [sp]\n" op " x21, x22, [sp, 16]\n" op " x23, x24, [sp, 32]\n" op " x25, x26, [sp, 48]\n" \
  op " x27, x28, [sp, 64]\n" op " x29, x30, [sp, 80]\n" op " d8, d9, [sp, 96]\n" op " d10, d11, [sp, 112]\n" \
  op " d12, d13, [sp, 128]\n" op " d14, d15, [sp, 144]\n"
asm(".text\n .balign 4\n mp_switch_stack: sub sp, sp, 160\n" SAVED("stp") "mov x2, sp\n str x2, [x0]\n mov sp, x1\n"
    SAVED("ldp") "add sp, sp, 160\n ret\n");
// clang-format on
#else
#error "no switch_stack() for this processor: there are two, for x86-64 and for arm64"
#endif
constexpr size_t stack_bytes = 64 * 1024, mapped_bytes = 2 * stack_bytes + 4096;
void fiber_main();
struct Fiber {
  std::shared_ptr<void> memory;  // guard pages, then the stack; null for the OS thread's own stack
  const void* bottom = nullptr;
  size_t bytes = stack_bytes;
  void** sp = nullptr;   // where it stopped
  void* fake = nullptr;  // AddressSanitizer's
  Fiber() = default;
  explicit Fiber(size_t number) {
    void* p = mmap(nullptr, mapped_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED || mprotect(p, stack_bytes, PROT_NONE) != 0) fail("out of memory: no stack for a thread");
    memory.reset(p, [](void* all) { munmap(all, mapped_bytes); });
    bottom = (char*)p + stack_bytes + number % 4 * 1088;  // staggered: else they would share sets of the cache
    sp = (void**)((char*)bottom + stack_bytes) - saved_words;
    sp[return_address] = (void*)fiber_main;  // the first switch to it returns to fiber_main
  }
};
// -- A block: its threads, its warps, and whose turn it is --
struct Launch {
  dim3 grid, block;
  size_t shared_bytes;
  std::function<void()> kernel;  // with its arguments
};
struct Barrier {
  int arrived = 0, passed = 0;  // threads that wait; how often it opened
  const char* what = "";        // the instruction that they wait in
};
struct Copy {  // a copy_16_bytes_async under way
  void* to;
  const void* from;
  int bytes, commit;
};
struct Thread {
  Fiber* fiber;
  Barrier* at = nullptr;
  int passed, commits;
  std::vector<Copy> copies;
};
struct Warp {
  Barrier barrier;
  void* lane[32];
};
struct Block {
  const Launch* launch;
  int size = 0, begun = 0, alive = 0, me = 0, turn = 0;  // turn: a place in `queue`
  std::vector<Thread> thread;
  std::vector<int> queue;  // thread numbers in the order in which they begin
  std::vector<Warp> warp;
  void* shared;                                       // dynamic shared memory
  std::map<size_t, std::shared_ptr<void>> shared_of;  // by size: exact, so that AddressSanitizer sees an overrun
  Barrier all;                                        // __syncthreads()
  Fiber os, *running = &os;                           // the OS thread's own stack; the one in use
  std::deque<Fiber> fibers;  // [i] begins the next thread of the queue when thread i of it waits
};
inline thread_local Block* now = nullptr;
inline Thread& this_thread() { return now->thread[now->me]; }
[[noreturn]] inline void die(const char* why) {
  std::fprintf(stderr, "block (%u,%u,%u), thread %d: %s\n", blockIdx.x, blockIdx.y, blockIdx.z, now->me, why);
  for (int i = 0; i < min(now->size, 8); i++)
    if (now->thread[i].at) std::fprintf(stderr, "  thread %d waits in %s\n", i, now->thread[i].at->what);
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
  Fiber& from = *now->running;
  Fiber& to = next_fiber();
  now->running = &to;
  __sanitizer_start_switch_fiber(&from.fake, to.bottom, to.bytes);
  switch_stack(&from.sp, to.sp);
  __sanitizer_finish_switch_fiber(from.fake, nullptr, nullptr);
}
inline void open(Barrier& barrier) { barrier = {0, barrier.passed + 1, ""}; }
// Waits until `expected` threads are here; the last one opens the barrier.
inline void wait_at(Barrier& barrier, int expected, const char* what) {
  barrier.what = what;
  if (++barrier.arrived >= expected) return open(barrier);
  Thread& t = this_thread();
  const int me = now->me;
  const dim3 index = threadIdx;
  t.at = &barrier;
  t.passed = barrier.passed;
  t.fiber = now->running;
  jump();
  t.at = nullptr;
  now->me = me;
  threadIdx = index;
}
inline dim3 place(unsigned i, dim3 size) { return {i % size.x, i / size.x % size.y, i / size.x / size.y}; }
// Runs threads one after another. One that waits keeps this stack; the rest continue on another. Kernels must not throw.
inline void run_threads() noexcept {
  Block& b = *now;
  while (b.begun < b.size) {
    b.me = b.queue[b.begun++];
    threadIdx = place(b.me, blockDim);
    this_thread().commits = 0;
    this_thread().copies.clear();
    b.launch->kernel();
    b.alive--;
    if (b.all.arrived && b.all.arrived == b.alive) open(b.all);  // nobody else can come
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
  now = &block;
  Block& b = block;
  const int n = count(launch.block), blocks = count(launch.grid);
  if (order == backward) number = blocks - 1 - number;
  if (order == shuffled) number = int((number + 7919ull * seed) % blocks);
  gridDim = launch.grid;
  blockDim = launch.block;
  blockIdx = place(number, gridDim);
  b.launch = &launch;
  b.size = b.alive = n;
  b.begun = 0;
  b.turn = n - 1;
  b.thread.resize(n);
  b.queue.resize(n);
  b.warp.resize((n + 31) / 32);
  std::shared_ptr<void>& shared = b.shared_of[launch.shared_bytes];
  const auto alignment = std::align_val_t(128);
  if (!shared) shared = {operator new(launch.shared_bytes, alignment), [=](void* p) { operator delete(p, alignment); }};
  b.shared = shared.get();
  if (poison) std::memset(b.shared, 0xff, launch.shared_bytes);
  for (int i = 0; i < n; i++) b.queue[i] = i;
  if (order == backward) std::reverse(b.queue.begin(), b.queue.end());
  if (order == shuffled) std::shuffle(b.queue.begin(), b.queue.end(), std::minstd_rand(seed * 40503u + number));
  run_threads();
  if (b.alive) jump();  // back when the last thread has ended
}
// -- The pool: whoever is free takes the next block --
inline void wait_a_moment(int waited) {  // most waits are too short for a system call
  if (waited > 4000) return std::this_thread::sleep_for(std::chrono::microseconds(50));
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}
struct Pool {
  std::atomic<int> left{0};        // blocks that nobody has taken yet
  std::atomic<int> unfinished{0};  // blocks that wait or run
  std::atomic<bool> over{false};   // the helpers are to end
  std::vector<std::thread> helpers;
  const Launch* launch = nullptr;
  explicit Pool(int workers) {
    try {
      for (int n = 2; n <= workers; n++) helpers.emplace_back([this] { help(); });
    } catch (...) {}  // the system has no more threads to give: go on with these
  }
  ~Pool() {
    over = true;
    for (auto& h : helpers) h.join();
  }
  void work() {
    while (left > 0) {
      const int n = left--;
      if (n <= 0) return;  // another one was faster
      run_block(count(launch->grid) - n, *launch);
      unfinished--;
    }
  }
  void help() {
    for (int waited = 0; !over; waited++) {
      if (left > 0) waited = 0;
      work();
      wait_a_moment(waited);
    }
  }
  void run(const Launch& l) {
    const int blocks = count(l.grid);
    if (blocks == 1 || helpers.empty()) {  // too little work to wake the helpers
      for (int i = 0; i < blocks; i++) run_block(i, l);
      return;
    }
    launch = &l;
    unfinished = blocks;
    left = blocks;
    work();
    for (int waited = 0; unfinished > 0; waited++) wait_a_moment(waited);
  }
};
inline int number_in(const char* name, int most) {
  const char* const s = std::getenv(name);
  if (std::atoi(s) < 1 || std::atoi(s) > most)
    fail(name + std::string("=") + s + ": must be a whole number from 1 to " + std::to_string(most));
  return std::atoi(s);
}
inline std::unique_ptr<Pool>& pool() {
  static std::unique_ptr<Pool> p;
  if (p) return p;
  const std::string wanted = std::getenv("MP_ORDER") ? std::getenv("MP_ORDER") : "";
  poison = !wanted.empty();
  if (wanted == "backward") order = backward;
  else if (poison && wanted != "forward") order = shuffled;
  if (order == shuffled) seed = unsigned(number_in("MP_ORDER", 1000000));
  const int cores = int(std::thread::hardware_concurrency());
  p = std::make_unique<Pool>(std::getenv("MP_THREADS") ? number_in("MP_THREADS", 1024) : cores);
  return p;
}
inline int os_threads() { return int(pool()->helpers.size()) + 1; }
inline void use_os_threads(int n) { pool() = std::make_unique<Pool>(n); }
// -- Instructions in which the 32 lanes of a warp meet: the last lane to arrive does the work of all --
template <class Lane, class F> void together(Lane& mine, const char* what, F all_lanes) {
  Warp& warp = now->warp[now->me / 32];
  if (warp.barrier.arrived && std::strcmp(warp.barrier.what, what))
    die("threads of one warp wait in different instructions");
  warp.lane[now->me % 32] = &mine;
  if (warp.barrier.arrived == 31) all_lanes((Lane**)warp.lane);
  wait_at(warp.barrier, 32, what);
}
}  // namespace cpu
template <class T> T* dynamic_shared() { return (T*)cpu::now->shared; }
inline void __syncthreads() { cpu::wait_at(cpu::now->all, cpu::now->alive, "__syncthreads"); }
// What gemm_mma is made of, as described in the GPU's half
template <bool transposed> void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  struct Lane {
    uint32_t* r;
    const uint16_t* row;
  } mine{r, static_cast<const uint16_t*>(row)};
  if (uintptr_t(row) % 16) cpu::die("ldmatrix: the address is no multiple of 16 bytes");
  cpu::together(mine, "ldmatrix", [](Lane** lane) {
    for (int l = 0; l < 32; l++)
      for (int i = 0; i < 4; i++)
        for (int odd = 0, g = l / 4, t = l % 4 * 2; odd < 2; odd++) {
          const uint32_t bits = transposed ? lane[8 * i + t + odd]->row[g] : lane[8 * i + g]->row[t + odd];
          lane[l]->r[i] = odd ? lane[l]->r[i] | bits << 16 : bits;
        }
  });
}
inline float machine_float(bfloat16 b) { return bfloat16_to_float(b); }
template <class T> void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t* b) {
  struct Lane {
    float* d;
    const uint32_t *a, *b;
  } mine{d, a, b};
  cpu::together(mine, "mma", [](Lane** lane) {
    float A[16][16], B[16][8];
    for (int l = 0; l < 32; l++)
      for (int odd = 0, g = l / 4, t = l % 4 * 2; odd < 2; odd++) {
        for (int i = 0; i < 4; i++)
          A[g + i % 2 * 8][t + odd + i / 2 * 8] = machine_float(T{uint16_t(lane[l]->a[i] >> 16 * odd)});
        for (int i = 0; i < 2; i++) B[t + odd + i * 8][g] = machine_float(T{uint16_t(lane[l]->b[i] >> 16 * odd)});
      }
    for (int l = 0; l < 32; l++)
      for (int i = 0; i < 4; i++)
        for (int k = 0; k < 16; k++) lane[l]->d[i] += A[l / 4 + i / 2 * 8][k] * B[k][l % 4 * 2 + i % 2];
  });
}
// As late as the rules allow: until the wait the target holds NaN, and only then the source is read.
inline void copy_16_bytes_async(void* to, const void* from, int bytes) {
  if ((uintptr_t(to) | uintptr_t(from)) % 16 || bytes < 0 || bytes > 16)
    cpu::die("copy_16_bytes_async: an address is no multiple of 16 bytes, or the count is wrong");
  std::memset(to, 0xff, 16);
  cpu::this_thread().copies.push_back({to, from, bytes, cpu::this_thread().commits});
}
inline void copy_commit() { cpu::this_thread().commits++; }
template <int n> void copy_wait() {
  std::vector<cpu::Copy>& copies = cpu::this_thread().copies;  // in the order of their commits
  size_t landed = 0;
  for (; landed < copies.size() && copies[landed].commit < cpu::this_thread().commits - n; landed++) {
    const cpu::Copy& c = copies[landed];
    std::memcpy(c.to, c.from, c.bytes);
    std::memset((char*)c.to + c.bytes, 0, 16 - c.bytes);
  }
  copies.erase(copies.begin(), copies.begin() + long(landed));
}
inline size_t max_shared_bytes() { return SIZE_MAX; }
inline int multiprocessors() { return 1; }        // a product is not split for a CPU's few cores
inline int cores() { return cpu::os_threads(); }  // each takes a block at a time
constexpr bool real_tensor_cores = false;
inline bool bf16_tensor_cores() { return true; }
struct Graph {};
template <class F> void replay(Graph&, F step) { step(); }  // a launch costs next to nothing here
inline int atomicOr(int* p, int v) { return __atomic_fetch_or(p, v, __ATOMIC_RELAXED); }
template <class... P, class... A>
void launch_shared(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared_bytes, A... args) {
  cpu::pool()->run({grid, block, shared_bytes, [&] { kernel(args...); }});
}
inline std::string machine() {
  const std::string threads = cpu::os_threads() > 1 ? " threads" : " thread";
  return "CPU, " + std::to_string(cpu::os_threads()) + threads + " (no GPU used: everything works, only slower)";
}
#endif
template <class K, class Size, class Block, class... A> void launch(K kernel, Size grid, Block block, A... args) {
  launch_shared(kernel, grid, block, 0, args...);
}
