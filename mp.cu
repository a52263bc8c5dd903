// mp: a multi-layer perceptron trained in mixed precision, every kernel written by hand, beside the article that
// walkthrough.md reads with you. The banners name its sections (4.2.2 is item 2 of 4.2); E1 to E5 number its equations.
//
// fp16 or bf16 tensors, products summed in fp32, fp32 master weights, dynamic loss scaling, plain SGD; nothing else.
// The method comes first, up to the banner 'Device memory'; the program around it follows.
//
//   make run                    builds it and learns the digits in data/, with a GPU or without
//   make test                   proves it
//   build/mp train --help       what can be switched off, to see what it contributes
//
// The same kernels run on an NVIDIA GPU and, thread by thread, on a CPU: mp.h, part 2. Start reading at train_step().
// What stands between //{ NAME and //} is an exercise.
#include <math.h>  // not cmath: expf, isnan and the like without std::, as in CUDA
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <climits>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <numeric>
#include <set>
#include <sstream>

#include "mp.h"
#if defined(__CUDACC__)  // for mp bench
#define CUDA_NO_HALF     // their half is not ours
#define CUDA_NO_BFLOAT16
#include <cublas_v2.h>
#endif

// ==== 2.1 Number formats: a float rounded to 16 bits, and back ====
__host__ __device__ inline uint32_t bits_of(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
}
__host__ __device__ inline float float_of(uint32_t u) {
  float x;
  memcpy(&x, &u, 4);
  return x;
}

__host__ __device__ half float_to_half(float x) {
  const uint32_t sign = bits_of(x) >> 16 & 0x8000, u = bits_of(x) & 0x7fffffff;
  uint32_t h = 0;
  //{ float_to_half
  if (u > 0x7f800000) {
    h = 0x7e00;  // NaN
  } else if (u >= 0x477ff000) {
    h = 0x7c00;  // from 65520 on, halfway between the largest half and 65536: infinity
  } else {
    const int exponent = int(u >> 23) - 127;
    const int dropped = exponent >= -14 ? 13 : -1 - exponent;  // bits; subnormal halves are spaced a fixed 2^-24 apart
    const uint32_t significand = (u & 0x7fffff) | 0x800000;    // 24 bits, the leading 1 made visible
    if (dropped <= 24) {                                       // else below 2^-25: zero
      const uint32_t rest = significand & ((1u << dropped) - 1), tie = 1u << (dropped - 1);
      h = significand >> dropped;
      if (rest > tie || (rest == tie && (h & 1))) h++;          // to nearest, a tie to the even neighbour
      if (exponent >= -14) h += uint32_t(exponent + 14) << 10;  // 15 - 1: the leading 1 is still in h; so is a carry
    }
  }
  //}
  return half{uint16_t(sign | h)};
}

__host__ __device__ float half_to_float(half h) {
  const uint32_t sign = (h.bits & 0x8000u) << 16, exponent = h.bits >> 10 & 31, fraction = h.bits & 1023;
  float x = 0;
  //{ half_to_float
  if (exponent == 31) x = float_of(0x7f800000 | fraction << 13);                 // infinity, NaN
  else if (exponent > 0) x = float_of((exponent + 112) << 23 | fraction << 13);  // 112 = 127 - 15, the biases
  else x = float(fraction) * 0x1p-24f;                                           // subnormal, zero
  //}
  return float_of(sign | bits_of(x));
}

__host__ __device__ bfloat16 float_to_bfloat16(float x) {
  const uint32_t u = bits_of(x);
  uint32_t b = 0;
  //{ float_to_bfloat16
  // To nearest, ties to even: add just under half of the last kept bit, exactly half if that is 1; drop 16 bits.
  b = (u + 0x7fff + (u >> 16 & 1)) >> 16;
  if ((u & 0x7fffffff) > 0x7f800000) b = u >> 16 | 0x40;  // NaN: the carry could have made it something else
  //}
  return bfloat16{uint16_t(b)};
}
__host__ __device__ float bfloat16_to_float(bfloat16 b) { return float_of(uint32_t(b.bits) << 16); }

// Outside tensor cores kernels compute in fp32: load() widens n neighbouring numbers, store() rounds them, once.
__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(half x) { return machine_float(x); }  // half_to_float() in one instruction
__device__ __forceinline__ float to_float(bfloat16 x) { return bfloat16_to_float(x); }
__device__ __forceinline__ void round_to(float& to, float x) { to = x; }
__device__ __forceinline__ void round_to(half& to, float x) { to = machine_half(x); }
__device__ __forceinline__ void round_to(bfloat16& to, float x) { to = float_to_bfloat16(x); }
// n numbers that one access to memory can move, up to 16 bytes at a time; n is 1, 2 or 8
template <class T, int n> struct alignas(n * sizeof(T) < 16 ? n * sizeof(T) : 16) Packed { T v[n]; };
template <class T, int n> __device__ __forceinline__ void load(const T* p, float (&x)[n]) {
  const Packed<T, n> packed = *(const Packed<T, n>*)p;
  UNROLL for (int j = 0; j < n; j++) x[j] = to_float(packed.v[j]);
}
template <class T, int n> __device__ __forceinline__ void store(T* p, const float (&x)[n]) {
  Packed<T, n> packed;
  UNROLL for (int j = 0; j < n; j++) round_to(packed.v[j], x[j]);
  *(Packed<T, n>*)p = packed;
}
// Looks at the type once, not at every access: calls f with a zero of that type, decltype(zero) in f.
template <class F> __device__ __forceinline__ void with_type(Type type, F f) {
  if (type == Type::fp32) f(0.f);
  else if (type == Type::fp16) f(half{});
  else f(bfloat16{});
}
// A tensor as a kernel sees it. Its type is known at run time only; all threads of a launch take the same branch.
struct Matrix {
  void* data;
  Type type;
  int rows, cols, stride;  // the number at (row, col) is number row * stride + col
  template <class T> __device__ __forceinline__ T* as() const { return (T*)data; }
  template <int n> __device__ __forceinline__ void load(size_t i, float (&x)[n]) const {
    with_type(type, [&](auto zero) { ::load(as<decltype(zero)>() + i, x); });
  }
  template <int n> __device__ __forceinline__ void store(size_t i, const float (&x)[n]) const {
    with_type(type, [&](auto zero) { ::store(as<decltype(zero)>() + i, x); });
  }
  __device__ float operator()(int row, int col) const {
    float x[1];
    load(size_t(row) * stride + col, x);
    return x[0];
  }
  __device__ void set(int row, int col, float x) const { store(size_t(row) * stride + col, {x}); }
};
Matrix matrix(const Tensor& t) { return {t.memory.get(), t.type, t.rows, t.cols, t.stride}; }

// ==== 2.3 The architecture: one training step, boxes A to G ====
void train_step(Mlp& net, const Batch& batch, LossScaler& scaler, float lr) {
  //{ train_step
  preprocess(net, batch, &scaler);                   // A B  pixels / 255, rounded to the compute type
  for (int l = 1; l <= net.L; l++) forward(net, l);  // C D  E2  z = a W^T + b, a = f(z): 16 bits in and out, fp32 sums
  loss(net, scaler);                                 // E    E1  in fp32
  output_delta(net, scaler);                         // F    E3  dL/dz of the last layer, times the loss scale, rounded
  for (int l = net.L; l >= 1; l--) {
    weight_gradient(net, l);      //      E5  dW = delta^T a
    if (l > 1) backward(net, l);  //      E4  delta = (delta W) * f'(z)
  }
  unscale_and_check(net, scaler);  // G    is every gradient finite?
  update(net, scaler, lr);         //      master -= lr g / scale, if so; new compute copies
  scaler.update();                 //      the next step's scale. H, the output: predict()
  //}
}

// A kernel is the work of one thread. launch(kernel, blocks, threads, arguments...) runs it blocks x threads times; what a
// thread works on follows from its number. Launches run in order; for a GPU the host does not wait.
// Kernels that do little for a number take 8 at a time, 16 bytes in 16 bits: one access to memory. n is a multiple of 8.
// A block has elements_per_block of the n: on a GPU 8 for each of 256 threads, on a CPU all for one thread.
struct Share {
  int begin, end, step;  // a thread's numbers: 8 from begin on, 8 from begin + step on, and so on, below end
};
__device__ __forceinline__ Share my_share(int n) {
  const int begin = int(blockIdx.x) * elements_per_block;
  return {begin + int(threadIdx.x) * 8, min(begin + elements_per_block, n), int(blockDim.x) * 8};
}
unsigned blocks_for(int n) { return unsigned(n + elements_per_block - 1) / elements_per_block; }

// Boxes A and B. Images lie in device memory as bytes. StepState, there too, counts the steps: thus every step is
// launched with the same arguments, and a GPU can replay it. Without a state (evaluation) a batch starts at row 0.
__global__ void preprocess_kernel(Batch batch, const StepState* state, Matrix a0, Matrix y) {
  const Share share = my_share(batch.rows * a0.stride);
  for (int i = share.begin; i < share.end; i += share.step) {
    const int row = i / a0.stride, col = i % a0.stride, left = a0.cols - col;  // pixels of this row from here on
    const int place = state ? state->position * batch.rows + row : row;
    const size_t sample = batch.order ? batch.order[place] : place;
    const uint8_t* const pixel = batch.pixels + sample * a0.cols + col;
    float a[8] = {};
    if (left >= 8) {
      UNROLL for (int j = 0; j < 8; j++) a[j] = pixel[j] / 255.f;
    } else {
      for (int j = 0; j < left; j++) a[j] = pixel[j] / 255.f;
    }
    a0.store(i, a);
    for (int j = 0; j < y.cols && col == 0 && batch.labels; j++) y.set(row, j, j == batch.labels[sample]);  // one-hot
  }
}
void preprocess(Mlp& net, const Batch& batch, const LossScaler* scaler) {
  const Matrix a0 = matrix(net.layer[0].a);
  const StepState* const state = scaler ? scaler->state.get() : nullptr;
  net.rows = batch.rows;
  if (!batch.pixels) return;  // input and targets are there already (section 4.3)
  launch(preprocess_kernel, blocks_for(batch.rows * a0.stride), element_threads, batch, state, a0, matrix(net.y));
}

// ==== 3.2 step 1: the parameters begin in fp32 ====
// Random numbers by counting: the i-th of a seed, wherever and whenever it is asked for (splitmix64).
__host__ __device__ inline uint64_t random_bits(uint64_t seed, uint64_t i) {
  uint64_t z = seed * 0xd1342543de82ef95u + (i + 1) * 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}
double uniform(uint64_t seed, uint64_t i) { return (double(random_bits(seed, i) >> 11) + 0.5) * 0x1p-53; }  // never 0

void initialise(Mlp& net) {
  for (int l = 1; l <= net.L; l++) {
    const uint64_t seed = random_bits(net.seed, l);
    const int out = net.layer[l].W.rows, in = net.layer[l].W.cols;
    const double deviation = std::sqrt(2.0 / in);  // He: the variance is 2 / in
    std::vector<float> W(size_t(out) * in);
    for (size_t i = 0; i < W.size(); i++) {  // two uniform numbers make a normal one (Box and Muller)
      const double radius = std::sqrt(-2 * std::log(uniform(seed, 2 * i)));
      W[i] = float(deviation * radius * std::cos(6.283185307179586 * uniform(seed, 2 * i + 1)));
    }
    set_parameters(net.layer[l], W, std::vector<float>(out));
  }
}

// ==== 4.1 E1: the loss ====
// E1 as the article has it, L = 1/2 sum (y - z)^2, and beside it softmax cross-entropy, L = -sum y log softmax(z) =
// sum y (log sum exp(z) - z). In fp32 from the last layer's z, which has no f. Here L is the mean over a batch's rows.
// Sums are added in a fixed order, so that the same seed gives the same bits: here the threads of one block take every
// loss_threads-th row each. Their sums meet in shared memory, which the block's threads share (launch_shared() says how
// many bytes); at __syncthreads() they wait for each other.
__global__ void loss_kernel(Loss kind, Matrix z, Matrix y, int rows, float* log_sum_exp, StepState* state) {
  float* const part = dynamic_shared<float>();  // [loss_threads]
  const int thread = threadIdx.x;
  float total = 0;
  for (int row = thread; row < rows; row += loss_threads) {
    float L = 0;
    //{ E1 loss
    if (kind == Loss::squared_error) {
      for (int i = 0; i < z.cols; i++) L += 0.5f * (y(row, i) - z(row, i)) * (y(row, i) - z(row, i));
    } else {
      float largest = z(row, 0), sum = 0;  // subtracted, so that exp cannot overflow
      for (int i = 1; i < z.cols; i++) largest = fmaxf(largest, z(row, i));
      for (int i = 0; i < z.cols; i++) sum += expf(z(row, i) - largest);
      log_sum_exp[row] = largest + logf(sum);
      for (int i = 0; i < z.cols; i++)
        if (y(row, i) != 0) L += y(row, i) * (log_sum_exp[row] - z(row, i));  // 0 times infinity would be NaN
    }
    //}
    total += L;
  }
  part[thread] = total;
  __syncthreads();
  if (thread > 0) return;
  for (int i = 1; i < min(rows, loss_threads); i++) total += part[i];
  state->loss = total / float(rows);
}
void loss(Mlp& net, LossScaler& scaler) {
  launch_shared(loss_kernel, 1, loss_threads, loss_threads * sizeof(float), net.loss, matrix(net.layer[net.L].a),
                matrix(net.y), net.rows, net.log_sum_exp.as<float>(), scaler.state.get());
}

// ==== 4.2.1 E2: forward, z = a W^T + b, a = f(z) ====
// The article's z = W a, a sample a row, with the bias and the activation that it leaves out. z itself is not kept: only
// f needs it, and ReLU's derivative can be read off a.
void forward(Mlp& net, int l) {
  const Layer& layer = net.layer[l];
  const Tensor a_before = first_rows(net.layer[l - 1].a, net.rows), a = first_rows(layer.a, net.rows);
  //{ E2 forward
  Epilogue bias_and_f;
  bias_and_f.bias = &layer.b;
  bias_and_f.relu = net.relu && l < net.L;
  gemm(Layout::ABt, a_before, layer.W, a, bias_and_f);
  //}
}

// ==== 4.2.2 E3, E4: backward ====
// E3. The derivative of 1/2 (y - z)^2 is z - y (the article halves it), that of cross-entropy is softmax(z) - y, with
// softmax(z) = exp(z - log sum exp(z)); both over the batch, because L is a mean. The loss scale multiplies in fp32,
// before the one rounding to 16 bits, because fp16 rounds anything up to 2^-25 to zero.
__global__ void output_delta_kernel(Loss kind, Matrix z, Matrix y, int rows, const float* log_sum_exp,
                                    const StepState* state, Matrix delta) {
  const int row = blockIdx.x * blockDim.x + threadIdx.x;
  if (row >= rows) return;
  //{ E3 output delta
  for (int i = 0; i < z.cols; i++) {
    const float prediction = kind == Loss::squared_error ? z(row, i) : expf(z(row, i) - log_sum_exp[row]);
    delta.set(row, i, (prediction - y(row, i)) / float(rows) * state->scale);
  }
  //}
}
void output_delta(Mlp& net, const LossScaler& scaler) {
  const Layer& last = net.layer[net.L];
  const dim3 blocks = unsigned(net.rows + row_threads - 1) / row_threads;
  launch(output_delta_kernel, blocks, row_threads, net.loss, matrix(last.a), matrix(net.y), net.rows,
         net.log_sum_exp.as<float>(), scaler.state.get(), matrix(last.delta));
}

// E4. forward was z = f(z_before) W^T + b, so dL/dz_before = (dL/dz W) * f'(z_before); the article leaves f' out. f is
// ReLU: f' is 1 where a is above 0, else 0.
void backward(Mlp& net, int l) {
  const Layer& layer = net.layer[l];
  const Tensor& a_before = net.layer[l - 1].a;  // a mask may have more rows
  const Tensor delta = first_rows(layer.delta, net.rows), delta_before = first_rows(net.layer[l - 1].delta, net.rows);
  //{ E4 backward
  Epilogue times_f_prime;
  if (net.relu) times_f_prime.mask = &a_before;
  gemm(Layout::AB, delta, layer.W, delta_before, times_f_prime);
  //}
}

// ==== 4.2.3 E5: the weight gradient, dW = delta^T a, db = column sums of delta ====
__global__ void column_sums_kernel(Matrix delta, Matrix db) {  // a block for 8 columns
  float* const part = dynamic_shared<float>();                 // [column_threads][8]
  const int thread = threadIdx.x, col = blockIdx.x * 8;
  float sum[8] = {}, x[8];
  for (int row = thread; row < delta.rows; row += column_threads) {
    delta.load(size_t(row) * delta.stride + col, x);
    UNROLL for (int j = 0; j < 8; j++) sum[j] += x[j];
  }
  store(part + thread * 8, sum);
  __syncthreads();
  if (thread > 0) return;
  for (int i = 1; i < column_threads; i++)
    for (int j = 0; j < 8; j++) sum[j] += part[i * 8 + j];  // in a fixed order
  db.store(col, sum);
}
void column_sums(const Tensor& delta, const Tensor& db) {
  launch_shared(column_sums_kernel, unsigned(delta.stride / 8), column_threads, column_threads * 8 * sizeof(float),
                matrix(delta), matrix(db));
}
void weight_gradient(Mlp& net, int l) {
  const Layer& layer = net.layer[l];
  const Tensor delta = first_rows(layer.delta, net.rows), a_before = first_rows(net.layer[l - 1].a, net.rows);
  //{ E5 weight gradient
  gemm(Layout::AtB, delta, a_before, layer.dW);  // the product sums over the batch
  column_sums(delta, layer.db);
  //}
}

// ==== The matrix products behind E2, E4 and E5: the ladder ====
// C[M,N] = A B in one of three layouts; k counts along the sum. Where C is too small to keep a GPU busy, K is split:
// several blocks compute the same results, each for its own part of K, and store their sums in a workspace;
// split_k_reduce_kernel adds them in a fixed order.
struct Product {
  Layout layout;
  Matrix A, B, C, bias, mask;  // bias and mask: no data if there is none
  int M, N, K;
  bool relu;
  int k_per_split;   // blocks with blockIdx.z = z sum over k from z * k_per_split on; all of K if it is not split
  float* workspace;  // [splits, M, C.stride] if K is split, else null
};
// The end of every product: bias, ReLU or the mask of its derivative, on n neighbouring results of one row. Bias and mask
// have the operands' type T; C may have another, that of the layer that reads it.
template <class T, int n> __device__ __forceinline__ void epilogue(const Product& p, int row, int col, float (&c)[n]) {
  float x[n];
  if (p.workspace) return store(p.workspace + (size_t(blockIdx.z) * p.M + row) * p.C.stride + col, c);
  if (p.bias.data) {
    load(p.bias.as<T>() + col, x);
    UNROLL for (int j = 0; j < n; j++) c[j] += x[j];
  }
  if (p.relu) {
    UNROLL for (int j = 0; j < n; j++) c[j] = c[j] < 0 ? 0 : c[j];
  }
  if (p.mask.data) {
    load(p.mask.as<T>() + size_t(row) * p.mask.stride + col, x);
    UNROLL for (int j = 0; j < n; j++) c[j] = x[j] <= 0 ? 0 : c[j];
  }
  p.C.store(size_t(row) * p.C.stride + col, c);
}

// ---- Rung 1: a thread a result. The equation itself, and the oracle for the rungs above. ----
__global__ void gemm_naive_kernel(Product p) {
  const Layout layout = p.layout;
  const int m = blockIdx.y * blockDim.y + threadIdx.y, n = blockIdx.x * blockDim.x + threadIdx.x;
  if (m >= p.M || n >= p.N) return;
  float c[1] = {};
  //{ gemm_naive
  for (int k = 0; k < p.K; k++) {
    const float a = layout == Layout::AtB ? p.A(k, m) : p.A(m, k);
    const float b = layout == Layout::ABt ? p.B(n, k) : p.B(k, n);
    c[0] += a * b;
  }
  //}
  with_type(p.A.type, [&](auto zero) { epilogue<decltype(zero)>(p, m, n, c); });
}

// ---- Rung 2: a block computes BM x BN results. It brings the operands, BK of k at a time, into shared memory, as tiles
// of floats, [BK][BM] and [BK][BN]: a number brought once serves BN or BM results. A thread computes thread_tile of
// the results, one register tile of TM x TN after another (sizes: mp.h, part 2). ----

// The loader: rows x cols numbers, from g on, into a tile; [cols][rows] if transposed. A thread loads pieces of 8
// numbers of a row, of `height` rows at once; `across` threads share a row. A piece over the matrix's edge is filled up
// with zeros; one beyond it is not written: no result in C needs it.
template <bool transposed, int rows, int cols, int threads>
__device__ __forceinline__ void load_tile_as_floats(float* tile, const Matrix& g, size_t first, int rows_left,
                                                    int cols_left) {
  constexpr int height = transposed ? transposed_rows : 1, across = loads_whole_rows ? 1 : cols / 8;
  static_assert(cols % 8 == 0 && rows % (threads / across * height) == 0, "every thread loads as much");
  const int thread = threadIdx.x, rows_end = min(rows, (rows_left + 7) / 8 * 8), cols_end = min(cols, cols_left);
  const size_t stride = g.stride;
  with_type(g.type, [&](auto zero) {
    const auto* const begin = g.as<const decltype(zero)>() + first;
    for (int r = thread / across * height; r < rows_end; r += threads / across * height)
      for (int c = thread % across * 8; c < cols_end; c += across * 8) {
        const auto* const from = begin + r * stride + c;
        float x[height][8] = {};
        if (r + height <= rows_left && c + 8 <= cols_left) {
          UNROLL for (int i = 0; i < height; i++) {
            load(from + i * stride, x[i]);
            prefetch(from + i * stride + (transposed ? 32 : stride * 8));  // 4 pieces, or 8 rows, ahead
          }
        } else {
          float edge[height][8] = {};  // apart, so that x stays in registers
          for (int i = 0; i < height && r + i < rows_left; i++)
            for (int j = 0; j < 8 && c + j < cols_left; j++) edge[i][j] = to_float(from[i * stride + j]);
          UNROLL for (int i = 0; i < height; i++) load(edge[i], x[i]);
        }
        if constexpr (transposed) store_transposed(tile + c * rows + r, rows, x);
        else store(tile + r * cols + c, x[0]);
      }
  });
}
__host__ __device__ constexpr int tiled_threads(TileSize tile) {
  return tile.M / thread_tile.M * (tile.N / thread_tile.N);
}
template <int BM, int BN> __global__ void __launch_bounds__(tiled_threads({BM, BN})) gemm_tiled_kernel(Product p) {
  constexpr int BK = tiled_BK, threads = tiled_threads({BM, BN});
  // A thread's register tiles, and the vectors in a row of one
  constexpr int down = thread_tile.M / TM, register_tiles = down * (thread_tile.N / TN);
  constexpr int vectors = TN / vector_width;
  const Layout layout = p.layout;
  float* const a_tile = dynamic_shared<float>();  // [BK][BM]
  float* const b_tile = a_tile + BK * BM;         // [BK][BN]
  // Where the block begins, and what is left from there
  const int m0 = blockIdx.y * BM, n0 = blockIdx.x * BN, k0 = blockIdx.z * p.k_per_split;
  const int M_left = p.M - m0, N_left = p.N - n0;
  const int m_thread = int(threadIdx.x) % (BM / thread_tile.M) * (thread_tile.M / TM_parts);
  const int n_thread = int(threadIdx.x) / (BM / thread_tile.M) * thread_tile.N;
  // Row i of a register tile. A GPU's lie in two runs of 4, so that neighbours read neighbours: no bank of memory twice.
  const auto row = [](int i) { return i % (TM / TM_parts) + i / (TM / TM_parts) * (BM / TM_parts); };
  size_t A = layout == Layout::AtB ? size_t(k0) * p.A.stride + m0 : size_t(m0) * p.A.stride + k0;  // the tiles'
  size_t B = layout == Layout::ABt ? size_t(n0) * p.B.stride + k0 : size_t(k0) * p.B.stride + n0;  // first numbers
  Vector sum[register_tiles][TM][vectors] = {};
  for (int K_left = min(p.K - k0, p.k_per_split); K_left > 0; K_left -= BK) {
    //{ gemm_tiled
    if (layout == Layout::AtB) load_tile_as_floats<false, BK, BM, threads>(a_tile, p.A, A, K_left, M_left);
    else load_tile_as_floats<true, BM, BK, threads>(a_tile, p.A, A, M_left, K_left);
    if (layout == Layout::ABt) load_tile_as_floats<true, BN, BK, threads>(b_tile, p.B, B, N_left, K_left);
    else load_tile_as_floats<false, BK, BN, threads>(b_tile, p.B, B, K_left, N_left);
    __syncthreads();  // the tiles are complete
    for (int tile = 0; tile < register_tiles; tile++) {
      const int m = m_thread + tile % down * TM, n = n_thread + tile / down * TN;
      if (m >= M_left || n >= N_left) continue;
      Vector c[TM][vectors];  // in registers
      UNROLL for (int i = 0; i < TM; i++) UNROLL for (int j = 0; j < vectors; j++) c[i][j] = sum[tile][i][j];
      for (int k = 0; k < min(K_left, BK); k++) {
        const float* const a = a_tile + k * BM + m;
        const Vector* const b = (const Vector*)(b_tile + k * BN + n);
        UNROLL for (int i = 0; i < TM; i++) UNROLL for (int j = 0; j < vectors; j++)
            add_product(c[i][j], a[row(i)], b[j]);
      }
      UNROLL for (int i = 0; i < TM; i++) UNROLL for (int j = 0; j < vectors; j++) sum[tile][i][j] = c[i][j];
    }
    __syncthreads();  // all have read them
    A += layout == Layout::AtB ? size_t(BK) * p.A.stride : BK;
    B += layout == Layout::ABt ? BK : size_t(BK) * p.B.stride;
    //}
  }
  with_type(p.A.type, [&](auto zero) {
    for (int tile = 0; tile < register_tiles; tile++)
      UNROLL for (int i = 0; i < TM; i++) UNROLL for (int j = 0; j < TN; j += 8) {
        const int m = m_thread + tile % down * TM + row(i), n = n_thread + tile / down * TN + j;
        float c[8];
        UNROLL for (int e = 0; e < 8; e++) c[e] = element(sum[tile][i][j / vector_width], j % vector_width + e);
        if (m < M_left && n < N_left) epilogue<decltype(zero)>(p, m0 + m, n0 + n, c);
      }
  });
}

// ---- Rung 3: tensor cores. A warp, 32 threads that work in step as its lanes, multiplies 16x16 by 16x8 numbers in one
// instruction, mma. The operands are spread over the lanes' registers by another one, ldmatrix, which reads shared
// memory. Copies into shared memory run stages - 1 tiles ahead of the products.
//
// A tile is panels of 64 x 64 numbers, in rows of 128 bytes, eight chunks of 16 bytes each. Chunk c of row r lies at
// c ^ (r % 8). So the same chunk of eight rows, which ldmatrix reads at once, lies in 32 banks, which are read together.
constexpr int mma_threads = 128, mma_BK = 64, stages = 3;
__device__ __forceinline__ int swizzle(int row, int chunk) { return row * 64 + (chunk ^ (row & 7)) * 8; }

// rows x 64 numbers from g on. k_contiguous: neighbours in memory differ in k, as for A in A B^T; else rows do.
template <bool k_contiguous, int rows, class T>
__device__ __forceinline__ void load_tile(T* tile, const T* g, int stride, int rows_left, int K_left) {
  for (int panel = 0; panel < rows; panel += 64) UNROLL for (int n = 0; n < 64 * 8 / mma_threads; n++) {
      const int r = (n * mma_threads + int(threadIdx.x)) / 8, chunk = threadIdx.x % 8;
      const int y = k_contiguous ? panel + r : r, x = (k_contiguous ? 0 : panel) + chunk * 8;  // in the stored matrix
      const int y_left = (k_contiguous ? rows_left : K_left) - y, x_left = (k_contiguous ? K_left : rows_left) - x;
      const bool inside = y_left > 0 && x_left > 0;
      const T* const from = g + (inside ? y * stride + x : 0);
      copy_16_bytes_async(tile + panel * 64 + swizzle(r, chunk), from, inside ? min(x_left, 8) * 2 : 0);
    }
}
// 16 x 16 numbers of a tile, from (row, k) on, as four 8x8 matrices: lanes 8 i to 8 i + 7 bring the addresses of the rows
// of matrix i, and r[i] becomes the lane's two numbers of it. mma wants the four of its operands in these orders:
//
//            k..k+7   k+8..k+15                    k..k+7   k+8..k+15
//   row..     [0]       [2]                row..     [0]       [1]
//   row+8..   [1]       [3]      A         row+8..   [2]       [3]      B: two operands of 8 columns, [0] [1] and [2] [3]
//
// row is m of A, n of B. down and right say where matrix i lies: 0 or 1.
template <bool k_contiguous, class T>
__device__ __forceinline__ void load_fragment(uint32_t (&r)[4], const T* tile, int row, int k, int down, int right) {
  const T* const panel = tile + row / 64 * 64 * 64;
  const int y = row % 64 + down * 8, x = k + right * 8, j = threadIdx.x % 8;
  ldmatrix_x4<!k_contiguous>(r, panel + (k_contiguous ? swizzle(y + j, x / 8) : swizzle(x + j, y / 8)));
}
// Four warps, two by two; each computes BM/2 x BN/2 results in pieces of 16 x 8.
template <Layout layout, class T, int BM, int BN> __global__ void __launch_bounds__(mma_threads)
    gemm_mma_kernel(Product p) {
  constexpr bool a_contiguous = layout != Layout::AtB, b_contiguous = layout == Layout::ABt;  // along k
  constexpr int MS = BM / 32, NS = BN / 32, tile_size = (BM + BN) * mma_BK;  // MS x NS squares of 16 x 16 for a warp
  T* const tiles = dynamic_shared<T>();                                      // [stages][tile_size]
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, i = lane / 8;
  const int m_warp = warp / 2 * (BM / 2), n_warp = warp % 2 * (BN / 2);
  const int m0 = blockIdx.y * BM, n0 = blockIdx.x * BN, k0 = blockIdx.z * p.k_per_split;
  const int M_left = p.M - m0, N_left = p.N - n0, K_left = min(p.K - k0, p.k_per_split);
  const int steps = (K_left + mma_BK - 1) / mma_BK;
  const T* const A = p.A.as<const T>() + (a_contiguous ? size_t(m0) * p.A.stride + k0 : size_t(k0) * p.A.stride + m0);
  const T* const B = p.B.as<const T>() + (b_contiguous ? size_t(n0) * p.B.stride + k0 : size_t(k0) * p.B.stride + n0);
  const auto load_step = [&](int step) {
    T* const tile = tiles + step % stages * tile_size;
    const int k = step * mma_BK;
    if (step < steps) {
      const T* const a = A + (a_contiguous ? k : size_t(k) * p.A.stride);
      const T* const b = B + (b_contiguous ? k : size_t(k) * p.B.stride);
      load_tile<a_contiguous, BM>(tile, a, p.A.stride, M_left, K_left - k);
      load_tile<b_contiguous, BN>(tile + BM * mma_BK, b, p.B.stride, N_left, K_left - k);
    }
    copy_commit();  // also where there is nothing left to copy: copy_wait() counts commits
  };
  float d[MS][2 * NS][4] = {};
  for (int step = 0; step < stages - 1; step++) load_step(step);
  for (int step = 0; step < steps; step++) {
    copy_wait<stages - 2>();  // this thread's copies of this step have arrived,
    __syncthreads();          // everyone's have, and nobody reads the tile that is loaded next
    load_step(step + stages - 1);
    const T* const a_tile = tiles + step % stages * tile_size;
    const T* const b_tile = a_tile + BM * mma_BK;
    //{ gemm_mma
    UNROLL for (int k = 0; k < mma_BK; k += 16) {
      uint32_t a[MS][4], b[NS][4];
      UNROLL for (int m = 0; m < MS; m++) load_fragment<a_contiguous>(a[m], a_tile, m_warp + m * 16, k, i % 2, i / 2);
      UNROLL for (int n = 0; n < NS; n++) load_fragment<b_contiguous>(b[n], b_tile, n_warp + n * 16, k, i / 2, i % 2);
      UNROLL for (int m = 0; m < MS; m++) UNROLL for (int n = 0; n < 2 * NS; n++)
          mma_16x8x16<T>(d[m][n], a[m], b[n / 2] + n % 2 * 2);
    }
    //}
  }
  UNROLL for (int m = 0; m < MS; m++) UNROLL for (int n = 0; n < 2 * NS; n++) UNROLL for (int e = 0; e < 4; e += 2) {
    const int row = m_warp + m * 16 + lane / 4 + e / 2 * 8, col = n_warp + n * 8 + lane % 4 * 2;
    float c[2] = {d[m][n][e], d[m][n][e + 1]};
    if (row < M_left && n0 + col < p.C.stride) epilogue<T>(p, m0 + row, n0 + col, c);  // zeros into the padding
  }
}

// ---- The host's side of the ladder ----
__global__ void split_k_reduce_kernel(Product p, int splits) {
  const float* const workspace = p.workspace;
  p.workspace = nullptr;  // so that epilogue() goes on to C
  const Share share = my_share(p.M * p.C.stride);
  for (int i = share.begin; i < share.end; i += share.step) {
    float sum[8] = {}, x[8];
    for (int z = 0; z < splits; z++) {
      load(workspace + size_t(z) * p.M * p.C.stride + i, x);
      UNROLL for (int j = 0; j < 8; j++) sum[j] += x[j];
    }
    with_type(p.A.type, [&](auto zero) { epilogue<decltype(zero)>(p, i / p.C.stride, i % p.C.stride, sum); });
  }
}
float* workspace_of(size_t count);
// A block for each tile of C. If these are too few for the machine, `splits` blocks share a tile's K, in steps of BK.
// bytes: of shared memory for each of the (tile.M + tile.N) * BK numbers of the operands
void launch_tiles(void (*kernel)(Product), Product p, TileSize tile, int BK, int threads, int bytes, int splits) {
  dim3 grid(unsigned(p.N + tile.N - 1) / tile.N, unsigned(p.M + tile.M - 1) / tile.M);
  const int steps = (p.K + BK - 1) / BK;
  if (splits < 1) splits = min(multiprocessors() / int(grid.x * grid.y), steps / 2);  // 2 steps each at least
  splits = std::max(splits, 1);
  p.k_per_split = (steps + splits - 1) / splits * BK;
  grid.z = unsigned(p.K + p.k_per_split - 1) / p.k_per_split;
  const int results = p.M * p.C.stride;
  if (grid.z > 1) p.workspace = workspace_of(size_t(grid.z) * results);
  launch_shared(kernel, grid, threads, (tile.M + tile.N) * BK * bytes, p);
  if (grid.z > 1) launch(split_k_reduce_kernel, blocks_for(results), element_threads, p, int(grid.z));
}
Product product(Layout layout, const Tensor& A, const Tensor& B, const Tensor& C, const Epilogue& e) {
  Product p = {};
  p.layout = layout;
  p.A = matrix(A);
  p.B = matrix(B);
  p.C = matrix(C);
  p.M = C.rows;
  p.N = C.cols;
  p.K = p.k_per_split = layout == Layout::AtB ? A.rows : A.cols;
  p.relu = e.relu;
  if (e.bias) p.bias = matrix(*e.bias);
  if (e.mask) p.mask = matrix(*e.mask);
  const bool a_fits = (layout == Layout::AtB ? A.cols : A.rows) == p.M;
  const bool b_fits = layout == Layout::ABt ? B.rows == p.N && B.cols == p.K : B.cols == p.N && B.rows == p.K;
  const bool bias_fits = !e.bias || (p.bias.cols == p.N && p.bias.type == A.type);
  const bool mask_fits = !e.mask || (p.mask.rows >= p.M && p.mask.cols == p.N && p.mask.type == A.type);
  if (!a_fits || !b_fits || !bias_fits || !mask_fits || p.K < 1 || A.type != B.type)
    fail("a matrix product: sizes or types of the operands, the bias or the mask do not fit each other");
  return p;
}
void gemm_naive(Layout layout, const Tensor& A, const Tensor& B, const Tensor& C, const Epilogue& e) {
  const Product p = product(layout, A, B, C, e);
  launch(gemm_naive_kernel, dim3(unsigned(p.N + 15) / 16, unsigned(p.M + 15) / 16), dim3(16, 16), p);
}
void gemm_tiled(Layout layout, const Tensor& A, const Tensor& B, const Tensor& C, const Epilogue& e, int splits) {
  const Product p = product(layout, A, B, C, e);
  // Large tiles, where M needs them and there are enough for every core. The sums and their order are the same in both.
  const bool large = p.M > small_tile.M && int64_t(p.M) * p.N >= int64_t(cores()) * large_tile.M * large_tile.N;
  const TileSize tile = large ? large_tile : small_tile;
  void (*const kernel)(Product) =
      large ? gemm_tiled_kernel<large_tile.M, large_tile.N> : gemm_tiled_kernel<small_tile.M, small_tile.N>;
  launch_tiles(kernel, p, tile, tiled_BK, tiled_threads(tile), sizeof(float), splits);
}
bool tensor_cores(Type type) { return type == Type::fp16 || (type == Type::bf16 && bf16_tensor_cores()); }
// Large tiles need 96 KiB of shared memory, which a block may have from sm_80 on, and results for every multiprocessor.
// A CPU does without: to imitate them, too, would double the time of compiling.
template <Layout layout, class T> void launch_mma(const Product& p, int splits) {
  constexpr int side = real_tensor_cores ? 128 : 64;
  const bool enough = int64_t(p.M) * p.N >= int64_t(multiprocessors()) * side * side;
  const bool large = enough && max_shared_bytes() >= 96 * 1024;
  const TileSize tile = large ? TileSize{side, side} : TileSize{64, 64};
  void (*const kernel)(Product) = large ? gemm_mma_kernel<layout, T, side, side> : gemm_mma_kernel<layout, T, 64, 64>;
  launch_tiles(kernel, p, tile, mma_BK, mma_threads, stages * sizeof(T), splits);
}
template <class T> void launch_mma(const Product& p, int splits) {
  if (p.layout == Layout::ABt) launch_mma<Layout::ABt, T>(p, splits);
  else if (p.layout == Layout::AB) launch_mma<Layout::AB, T>(p, splits);
  else launch_mma<Layout::AtB, T>(p, splits);
}
void gemm_mma(Layout layout, const Tensor& A, const Tensor& B, const Tensor& C, const Epilogue& e, int splits) {
  const Product p = product(layout, A, B, C, e);
  if (!tensor_cores(A.type)) fail("tensor cores multiply fp16, from sm_80 on bf16; gemm_tiled all types");
  if (A.type == Type::fp16) launch_mma<half>(p, splits);
  else launch_mma<bfloat16>(p, splits);
}
// The rung that training uses.
void gemm(Layout layout, const Tensor& A, const Tensor& B, const Tensor& C, const Epilogue& e) {
  static const char* const wanted = std::getenv("MP_GEMM");
  const std::string best = real_tensor_cores ? "mma" : "tiled", rung = wanted ? wanted : best;
  if (rung == "naive") gemm_naive(layout, A, B, C, e);
  else if (rung == "mma" && tensor_cores(A.type)) gemm_mma(layout, A, B, C, e);
  else if (rung == "mma" || rung == "tiled") gemm_tiled(layout, A, B, C, e);
  else fail("MP_GEMM=" + rung + ": must be naive, tiled or mma");
}

// ==== 3.1 Loss scaling ====
// Box G, for a gradient still times the loss scale. It is finite if its size is at most the largest float: with NaN
// every comparison is false. Unscaled in fp32, because a smaller one would vanish in 16 bits.
__device__ __forceinline__ bool unscale(float& gradient, float inverse_scale) {  // was it finite?
  bool finite = true;
  //{ unscale_and_check
  finite = fabsf(gradient) <= 3.40282347e38f;
  gradient *= inverse_scale;
  //}
  return finite;
}
__device__ __forceinline__ bool is_finite(float gradient) { return unscale(gradient, 1); }
struct Parameters {  // of a layer, all [1, n]; no data in those that the update's rule does not keep
  Matrix master, weights, compensation, gradients;
};
// A launch for all layers: blockIdx.y counts them. Those smaller than the largest have blocks with nothing to do.
template <class... P, class... A> void launch_layers(void (*kernel)(P...), const Mlp& net, A... args) {
  int largest = 0;
  for (const Layer& layer : net.layer) largest = std::max(largest, layer.weights.cols);
  launch(kernel, dim3(blocks_for(largest), net.L), element_threads, net.parameters.get(), args...);
}
// All gradients are checked before update_kernel unscales any: one that is not finite stops the whole update.
__global__ void check_kernel(const Parameters* layers, StepState* state) {
  const Matrix gradients = layers[blockIdx.y].gradients;
  int found_inf[8] = {};
  const Share share = my_share(gradients.cols);
  for (int i = share.begin; i < share.end; i += share.step) {
    float g[8];
    gradients.load(i, g);
    UNROLL for (int j = 0; j < 8; j++) found_inf[j] |= !is_finite(g[j]);
  }
  for (int j = 0; j < 8; j++)
    if (found_inf[j]) atomicOr(&state->found_inf, 1);
}
void unscale_and_check(Mlp& net, LossScaler& scaler) { launch_layers(check_kernel, net, scaler.state.get()); }

// As torch.amp.GradScaler.update(): a smaller scale after inf or NaN, a larger one after `interval` finite steps.
__global__ void scaler_kernel(StepState* state, StepRecord* history, float growth, float backoff, int interval) {
  StepState s = *state;
  if (s.halted) return;
  if (history) history[s.position] = {s.loss, s.scale, s.found_inf};
  if (s.found_inf) s.skipped++;
  //{ loss_scaling
  if (s.found_inf) {
    s.scale *= backoff;
    s.growth_tracker = 0;
  } else if (++s.growth_tracker >= interval) {
    s.growth_tracker = 0;
    if (s.scale * growth <= 3.40282347e38f) s.scale *= growth;  // 2^127 doubled would be infinite
  }
  //}
  // A smaller scale helps when a gradient was too large. It never will when the loss itself, which is not scaled, is
  // inf or NaN, nor when unscaled gradients overflow: halt with the weights as they are, for the host to say why.
  if (s.found_inf && growth > 1 && (s.scale < 1 || !(fabsf(s.loss) <= 3.40282347e38f))) {
    state->halted = 1;  // scale and found_inf stay as they were: later steps of this epoch change nothing
    return;
  }
  s.found_inf = 0;
  s.position++;
  s.step++;
  *state = s;
}
void LossScaler::update() { launch(scaler_kernel, 1, 1, state.get(), history.get(), growth, backoff, interval); }

// ==== 3.2 step 5: the update ====
// The article's error correction (3.1). lr g is often less than half a unit in the last place of a 16-bit w; then
// w - lr g rounds to w, and nothing is learnt. Four rules, and the bytes that each keeps for a weight:
//   master      6  w in fp32, and a copy rounded to 16 bits
//   half        2  w itself, rounded to nearest: what goes wrong without the others
//   kahan       4  w, and a second 16-bit number: what rounding w lost (Kahan 1965; arXiv 2010.06192)
//   stochastic  2  w, rounded up or down by chance, so that it is right on average
__host__ __device__ half stochastic_half(float x, uint64_t random) {
  const uint32_t sign = bits_of(x) >> 16 & 0x8000, u = bits_of(x) & 0x7fffffff;
  const int exponent = int(u >> 23) - 127;
  // From 65504 on there is no upper neighbour; zero and fp32's own subnormals become zero.
  if (u >= 0x477fe000 || u < 0x800000) return float_to_half(x);
  uint32_t h = 0;
  //{ stochastic_rounding
  const int dropped = exponent >= -14 ? 13 : min(-1 - exponent, 63);
  const uint64_t significand = (u & 0x7fffff) | 0x800000, below = (uint64_t(1) << dropped) - 1;
  h = uint32_t((significand + (random & below)) >> dropped);  // the larger the dropped bits, the more often they carry
  if (exponent >= -14) h += uint32_t(exponent + 14) << 10;
  //}
  return half{uint16_t(sign | h)};
}
__host__ __device__ bfloat16 stochastic_bfloat16(float x, uint64_t random) {
  const uint32_t u = bits_of(x);
  if ((u & 0x7fffffff) >= 0x7f7f0000) return float_to_bfloat16(x);
  return bfloat16{uint16_t((u + uint32_t(random & 0xffff)) >> 16)};
}
__device__ __forceinline__ void round_to(float& to, float x, uint64_t) { to = x; }
__device__ __forceinline__ void round_to(half& to, float x, uint64_t random) { to = stochastic_half(x, random); }
__device__ __forceinline__ void round_to(bfloat16& to, float x, uint64_t random) {
  to = stochastic_bfloat16(x, random);
}
// Rounded to T: to nearest, or, with a random number, by chance
template <class T, class... Random> __device__ __forceinline__ float rounded(float x, Random... random) {
  T t;
  round_to(t, x, random...);
  return to_float(t);
}

__global__ void update_kernel(const Parameters* layers, Update rule, float lr, uint64_t seed, const StepState* state) {
  if (state->found_inf) return;  // one bad gradient skips the whole step
  const Parameters p = layers[blockIdx.y];
  const Share share = my_share(p.weights.cols);
  const float inverse_scale = float(1 / double(state->scale));  // as GradScaler does
  const uint64_t step_seed = random_bits(random_bits(seed, gridDim.y + blockIdx.y + 1), state->step);
  with_type(p.weights.type, [&](auto zero) {
    using T = decltype(zero);
    float* const master = p.master.as<float>();
    T* const weights = p.weights.as<T>();
    T* const compensation = p.compensation.as<T>();
    const T* const gradients = p.gradients.as<const T>();
    for (int i = share.begin; i < share.end; i += share.step) {
      float g[8], w[8], c[8];
      load(gradients + i, g);
      UNROLL for (int j = 0; j < 8; j++) unscale(g[j], inverse_scale);
      if (rule == Update::master) {
        load(master + i, w);
        //{ update_master
        UNROLL for (int j = 0; j < 8; j++) w[j] -= lr * g[j];
        store(master + i, w);
        //}
      } else if (rule == Update::kahan) {  // every operation rounded to T, as if there were no fp32
        load(weights + i, w);
        load(compensation + i, c);
        //{ update_kahan
        for (int j = 0; j < 8; j++) {
          const float u = rounded<T>(c[j] - lr * g[j]), sum = rounded<T>(w[j] + u);
          c[j] = u + rounded<T>(w[j] - sum);  // what the sum has lost of u
          w[j] = sum;
        }
        //}
        store(compensation + i, c);
      } else {
        load(weights + i, w);
        for (int j = 0; j < 8; j++) {
          w[j] -= lr * g[j];
          if (rule == Update::stochastic) w[j] = rounded<T>(w[j], random_bits(step_seed, uint64_t(i + j)));
        }
      }
      if (sizeof(T) < sizeof(float)) store(weights + i, w);  // in fp32 the weights are the master
    }
  });
}
void update(Mlp& net, LossScaler& scaler, float lr) {
  launch_layers(update_kernel, net, net.update, lr, net.seed, scaler.state.get());
}

// ==== Device memory, and a network in it ====
namespace fs = std::filesystem;
using std::max;
using std::min;
using std::shared_ptr;
using std::string;
using std::to_string;
using std::vector;
void fail(const string& text) { throw Error(text); }
[[noreturn]] void fail_in(const string& file, const string& what) { fail(file + ": " + what); }
__attribute__((format(printf, 1, 2))) string format(const char* words, ...) {
  char text[1000];
  va_list arguments;
  va_start(arguments, words);
  vsnprintf(text, sizeof text, words, arguments);
  va_end(arguments);
  return text;
}
template <class T> shared_ptr<T> device_array(size_t count) {  // of zeros
  size_t bytes = max(count * sizeof(T), size_t(1));
  void* memory = nullptr;
  CUDA_CHECK(cudaMalloc(&memory, bytes));
  CUDA_CHECK(cudaMemset(memory, 0, bytes));
  return {static_cast<T*>(memory), cudaFree};
}
template <class T> shared_ptr<T> on_device(const vector<T>& values) {
  shared_ptr<T> memory = device_array<T>(values.size());
  CUDA_CHECK(cudaMemcpy(memory.get(), values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
  return memory;
}
// For the partial sums of split K: as much as the largest product has asked for. Recorded steps may point to older ones.
float* workspace_of(size_t count) {
  static vector<shared_ptr<float>> all;
  static size_t size = 0;
  if (count > size) {
    all.push_back(device_array<float>(count));
    size = count;
  }
  return all.back().get();
}
int padded(int cols) { return (cols + 7) / 8 * 8; }
Tensor make_tensor(int64_t rows, int64_t cols, Type type) {
  if (rows < 1 || cols < 1 || (cols + 7) * rows > 1 << 30)  // kernels index with ints
    fail("no tensor can be [" + to_string(rows) + ", " + to_string(cols) + "]: make --layers or --batch smaller");
  Tensor t{int(rows), int(cols), padded(int(cols)), type, nullptr};
  t.memory = device_array<char>(t.bytes());
  return t;
}
Tensor first_rows(const Tensor& t, int rows) { return {rows, t.cols, t.stride, t.type, t.memory}; }
// [rows, cols] of the numbers of a flat tensor, from number `first` on
Tensor part_of(const Tensor& flat, int first, int rows, int cols) {
  size_t width = flat.bytes() / flat.stride;
  return {rows, cols, padded(cols), flat.type, {flat.memory, flat.memory.get() + first * width}};
}
// Number i of an array in the host's memory
float number_at(const void* array, Type type, size_t i) {
  if (type == Type::fp32) return static_cast<const float*>(array)[i];
  if (type == Type::fp16) return half_to_float(static_cast<const half*>(array)[i]);
  return bfloat16_to_float(static_cast<const bfloat16*>(array)[i]);
}
vector<float> to_host(const Tensor& t) {
  vector<char> raw(t.bytes());
  CUDA_CHECK(cudaMemcpy(raw.data(), t.memory.get(), raw.size(), cudaMemcpyDeviceToHost));
  vector<float> values;
  for (int row = 0; row < t.rows; row++)
    for (int i = row * t.stride; i < row * t.stride + t.cols; i++) values.push_back(number_at(raw.data(), t.type, i));
  return values;
}
void to_device(const vector<float>& values, const Tensor& t) {
  if (values.size() != size_t(t.rows) * t.cols)
    fail(format("%zu numbers do not fill a tensor of [%d, %d]", values.size(), t.rows, t.cols));
  vector<char> raw(t.bytes());
  for (size_t n = 0; n < values.size(); n++) {
    size_t i = n / t.cols * t.stride + n % t.cols;
    if (t.type == Type::fp32) ((float*)raw.data())[i] = values[n];
    else if (t.type == Type::fp16) ((half*)raw.data())[i] = float_to_half(values[n]);
    else ((bfloat16*)raw.data())[i] = float_to_bfloat16(values[n]);
  }
  CUDA_CHECK(cudaMemcpy(t.memory.get(), raw.data(), t.bytes(), cudaMemcpyHostToDevice));
}

// Makes the tensors of each layer anew, in its type. The compute copies are the masters, rounded.
void set_types(Mlp& net, const vector<Type>& types) {
  vector<Parameters> parameters;
  for (int l = 0; l <= net.L; l++) {
    Layer& layer = net.layer[l];
    int out = layer.a.cols;
    layer.a = make_tensor(net.batch, out, types[min(l, net.L - 1)]);  // layer l + 1 reads it; nobody the last one
    layer.type = types[max(l - 1, 0)];
    if (l == 0) continue;
    int in = net.layer[l - 1].a.cols;
    int64_t W_size = int64_t(out) * padded(in), n = W_size + padded(out);
    if (net.update == Update::master && !layer.master.memory) layer.master = make_tensor(1, n, Type::fp32);
    if (net.update == Update::kahan) layer.compensation = make_tensor(1, n, layer.type);
    layer.weights = layer.master;
    if (layer.type != Type::fp32) layer.weights = make_tensor(1, n, layer.type);
    if (layer.type != Type::fp32 && layer.master.memory) to_device(to_host(layer.master), layer.weights);
    layer.gradients = make_tensor(1, n, layer.type);
    layer.delta = make_tensor(net.batch, out, layer.type);
    layer.W = part_of(layer.weights, 0, out, in);
    layer.b = part_of(layer.weights, W_size, 1, out);
    layer.dW = part_of(layer.gradients, 0, out, in);
    layer.db = part_of(layer.gradients, W_size, 1, out);
    parameters.push_back(
        {matrix(layer.master), matrix(layer.weights), matrix(layer.compensation), matrix(layer.gradients)});
  }
  net.parameters = on_device(parameters);
}
Mlp make_mlp(const vector<int>& sizes, int batch, Type type, Update update) {
  if (type == Type::fp32 && update != Update::master) fail("fp32 weights lose nothing to rounding: use Update::master");
  Mlp net;
  net.L = sizes.size() - 1;
  net.batch = net.rows = batch;
  net.update = update;
  net.layer.resize(sizes.size());
  for (int l = 0; l <= net.L; l++) net.layer[l].a.cols = sizes[l];
  set_types(net, vector<Type>(net.L, type));
  net.y = make_tensor(batch, sizes.back(), Type::fp32);
  net.log_sum_exp = make_tensor(1, batch, Type::fp32);
  return net;
}
Footprint footprint(const Mlp& net) {
  Footprint bytes;
  for (const Layer& layer : net.layer) {
    if (layer.master.memory != layer.weights.memory) bytes.weights += layer.master.bytes();
    bytes.weights += layer.weights.bytes() + layer.compensation.bytes();
    bytes.activations += layer.a.bytes();
    bytes.gradients += layer.delta.bytes() + layer.gradients.bytes();
  }
  return bytes;
}
// The parameters as training keeps them: the master, or the weights where there is none
const Tensor& kept(const Layer& layer) { return layer.master.memory ? layer.master : layer.weights; }
Tensor kept_W(const Layer& layer) { return part_of(kept(layer), 0, layer.W.rows, layer.W.cols); }
Tensor kept_b(const Layer& layer) { return part_of(kept(layer), layer.W.rows * layer.W.stride, 1, layer.W.rows); }
void set_parameters(Layer& layer, const vector<float>& W, const vector<float>& b) {
  to_device(W, kept_W(layer));
  to_device(b, kept_b(layer));
  to_device(W, layer.W);
  to_device(b, layer.b);
}

LossScaler::LossScaler(float scale, float growth_, float backoff_, int interval_)
    : growth(growth_), backoff(backoff_), interval(interval_), state(device_array<StepState>(1)) {
  write(StepState{scale});
}
StepState LossScaler::read() const {
  StepState s;
  CUDA_CHECK(cudaMemcpy(&s, state.get(), sizeof s, cudaMemcpyDeviceToHost));
  return s;
}
void LossScaler::write(const StepState& s) {
  CUDA_CHECK(cudaMemcpy(state.get(), &s, sizeof s, cudaMemcpyHostToDevice));
}

// ==== 3.2 step 6: evaluation and dynamic precision ====
// Box H, the output: forward alone, with the 16-bit weights that training uses, and the largest logit wins.
vector<float> logits(Mlp& net, const vector<uint8_t>& pixels) {
  int in = net.layer[0].a.cols, count = pixels.size() / in;
  const shared_ptr<uint8_t> bytes = on_device(pixels);
  vector<float> all;
  for (int first = 0; first < count; first += net.batch) {
    Batch batch;
    batch.pixels = bytes.get() + size_t(first) * in;
    batch.rows = min(net.batch, count - first);
    preprocess(net, batch, nullptr);
    for (int l = 1; l <= net.L; l++) forward(net, l);
    vector<float> z = to_host(first_rows(net.layer[net.L].a, batch.rows));
    all.insert(all.end(), z.begin(), z.end());
  }
  return all;
}
vector<int> predict(Mlp& net, const vector<uint8_t>& pixels) {
  vector<float> all = logits(net, pixels);
  int classes = net.layer[net.L].a.cols;
  vector<int> answer;
  for (const float* z = all.data(); z < all.data() + all.size(); z += classes)
    answer.push_back(std::max_element(z, z + classes) - z);
  return answer;
}

// Dynamic precision. The article adjusts the shares of 16 and 32 bits by the loss of precision seen, and gives no
// method. Here: before each epoch a batch goes forward and backward in fp32 (probe), the exponents of its numbers are
// counted, and a layer whose numbers fp16 cannot hold (why_not_fp16) moves to fp32 until that is over.
void Exponents::add(const Tensor& t, double factor) {
  for (const float value : to_host(t)) {
    float x = std::fabs(value * factor);
    if (x == 0) zeros++;
    else if (!(x < 65520)) overflow++;  // what fp16 rounds to infinity; NaN too
    else count[max(int(bits_of(x) >> 23) - 127, lowest) - lowest]++;
  }
}
int64_t Exponents::between(int from, int to) const {
  int64_t sum = 0;
  for (int i = max(from - lowest, 0); i < min(to - lowest, size); i++) sum += count[i];
  return sum;
}
vector<Probe> probe(const Mlp& net, const Batch& batch, float scale) {
  vector<int> sizes;
  for (const Layer& layer : net.layer) sizes.push_back(layer.a.cols);
  Mlp wide = make_mlp(sizes, batch.rows, Type::fp32, Update::master);
  wide.relu = net.relu;
  wide.loss = net.loss;
  for (int l = 1; l <= net.L; l++) to_device(to_host(kept(net.layer[l])), wide.layer[l].weights);
  LossScaler scaler(scale);
  preprocess(wide, batch, nullptr);
  for (int l = 1; l <= net.L; l++) forward(wide, l);
  loss(wide, scaler);
  output_delta(wide, scaler);
  vector<Probe> seen(net.layer.size());
  seen[0].a.add(wide.layer[0].a);
  for (int l = net.L; l >= 1; l--) {
    weight_gradient(wide, l);
    seen[l].a.add(wide.layer[l].a);
    seen[l].delta.add(wide.layer[l].delta);
    seen[l].dW.add(wide.layer[l].dW);
    if (l > 1) backward(wide, l);
  }
  return seen;
}
// An input or activation that fp16 cannot hold ruins every step; so does an infinite gradient under a fixed scale (a
// dynamic one is halved). Small gradients are lost one by one. In dW those count that would become 0 or lose bits,
// below 2^-14; in delta, whose errors average out in dW's sums, only those that would become 0. The limit is one half:
// data/ loses up to 9 % under a dynamic scale and learns well, MNIST at a scale of 2^-16 loses 70 % and does not.
string why_not_fp16(const vector<Probe>& seen, int l, bool dynamic, int headroom) {
  const struct {
    const char* name;
    const Exponents& values;
    bool halved;  // by a dynamic scale, where they overflow
    int lost;     // below 2^lost
  } tensors[] = {{"inputs", seen[l - 1].a, false, Exponents::lowest},
                 {"activations", seen[l].a, false, Exponents::lowest},
                 {"weight gradients", seen[l].dW, dynamic, -14},
                 {"deltas", seen[l].delta, dynamic, -25}};
  for (const auto& t : tensors) {
    int64_t overflow = t.values.overflow + t.values.between(16 - headroom, 16);
    if (overflow > 0 && !t.halved) return format("%lld of its %s overflow", (long long)overflow, t.name);
    double share = t.values.between(Exponents::lowest, t.lost) / (t.values.nonzero() + 1e-9);
    if (share > 0.5)
      return format("%.0f%% of its %s would be 0%s", 100 * share, t.name, t.lost == -14 ? " or subnormal" : "");
  }
  return "";
}
// The map of --precision auto: a layer is in fp16 at first, and again after two clean probes.
void set_types(Mlp& net) {
  vector<Type> types(net.L, Type::fp16);
  for (int l = 1; l <= net.L; l++)
    if (net.layer[l].clean_probes < 2) types[l - 1] = Type::fp32;
  set_types(net, types);
}

// ==== 4.3, 5.2 The example: 1-5-1 ====
// The article's listing as it was meant: one hidden layer of 5 (the article counts two), E1, SGD 0.01, 100 epochs, a
// GradScaler. The data that it leaves undefined are points of y = x^2 on [-1, 1]. Without an activation, as the article
// writes it, the network is one linear map, and the best line through this parabola is flat.
vector<float> learn_parabola(bool relu) {  // the loss of each epoch
  int points = 256, rows = 4, epochs = 100;
  Mlp net = make_mlp({1, 5, 1}, rows, Type::fp16, Update::master);
  net.relu = relu;
  net.loss = Loss::squared_error;
  initialise(net);
  LossScaler scaler;
  Batch batch;
  batch.rows = rows;
  vector<float> x(rows), y(rows), losses(epochs);
  for (int step = 0; step < epochs * points / rows; step++) {
    for (int i = 0; i < rows; i++) {
      int point = (step * rows + i) * 101 % points;  // each epoch has every point once, well mixed
      x[i] = -1 + 2 * (point + 0.5f) / points;
      y[i] = x[i] * x[i];
    }
    to_device(x, net.layer[0].a);
    to_device(y, net.y);
    train_step(net, batch, scaler, 0.01f);
    losses[step * rows / points] += scaler.read().loss / (points / rows);
  }
  return losses;
}
void article() {
  vector<float> line = learn_parabola(false), relu = learn_parabola(true);
  printf("%s\n1-5-1 · fp16, fp32 master, dynamic loss scale · 256 points of y = x^2\n\n", machine().c_str());
  printf("  epoch  loss without activation  loss with ReLU\n");
  for (int epoch : {1, 3, 10, 30, 100}) printf("%7d  %23.5f  %14.5f\n", epoch, line[epoch - 1], relu[epoch - 1]);
}

#define STBI_ONLY_PNG
#define STBI_ONLY_JPEG
#define STBI_NO_STDIO
#define STBI_MAX_DIMENSIONS 65535  // a JPEG's largest
#define STB_IMAGE_IMPLEMENTATION
#include <stb/stb_image.h>

// ==== 5.1 Data: sheets of digits, or MNIST's four files ====
using Bytes = vector<uint8_t>;
Bytes read_file(const string& path) {
  if (!fs::is_regular_file(path)) fail_in(path, "no such file, or a folder, device or pipe: check the name");
  if (fs::file_size(path) > INT_MAX) fail_in(path, "larger than 2 GB: name another");
  Bytes bytes(fs::file_size(path));
  if (!std::ifstream(path, std::ios::binary).read((char*)bytes.data(), bytes.size()))
    fail_in(path, format("cannot be read: %s", strerror(errno)));
  return bytes;
}
// Where a link leads. Fails if no file can be saved there: before training, not after an hour of it.
string check_writable(const string& path) {
  fs::path target = fs::weakly_canonical(fs::absolute(path));
  bool old = fs::exists(target);
  if (old && !fs::is_regular_file(target)) fail_in(path, "is a folder, device or pipe: name a file to save to");
  if (access(target.parent_path().c_str(), W_OK | X_OK) != 0 || (old && access(target.c_str(), W_OK) != 0))
    fail_in(path, format("cannot be saved: %s; make its folder first, or save elsewhere", strerror(errno)));
  return target.string();
}
// Whoever reads the path sees the old file or the new one; after a power cut too: the bytes reach the disk before the name.
void write_file(const string& path, const string& bytes) {
  string target = check_writable(path);
  string unfinished = target.substr(0, target.rfind('/') + 1) + format("mp.%d.unfinished", getpid());
  FILE* const file = fopen(unfinished.c_str(), "wb");
  struct stat old;
  if (file && stat(target.c_str(), &old) == 0) fchmod(fileno(file), old.st_mode);
  bool written = file && fwrite(bytes.data(), 1, bytes.size(), file) == bytes.size() && fflush(file) == 0 &&
                 fsync(fileno(file)) == 0 && rename(unfinished.c_str(), target.c_str()) == 0;
  int reason = errno;
  if (file) fclose(file);
  if (written) return;
  unlink(unfinished.c_str());
  fail_in(path, format("not written: %s; make room or save elsewhere (an old file is kept)", strerror(reason)));
}

// Debian 12's stb_image 2.27 copies a JPEG's Huffman table into room for 256 codes, however many there are.
void check_jpeg(const string& path, const Bytes& file) {
  for (size_t at = 2; at + 4 < file.size();) {
    int marker = file[at] == 0xff ? file[at + 1] : 0;
    if (marker == 0xd9) return;                                                          // the end
    bool alone = marker < 0xc0 || marker == 0xff || (marker >= 0xd0 && marker <= 0xd8);  // pixel, fill, start, restart
    size_t end = alone ? at + 1 : at + 2 + 256 * file[at + 2] + file[at + 3];
    for (size_t table = at + 4; marker == 0xc4 && table < min(end, file.size());) {
      int codes = std::accumulate(&file[table] + 1, file.data() + min(table + 17, file.size()), 0);
      if (codes > 256) fail_in(path, format("damaged: the Huffman table at byte %zu", table));
      table += 17 + codes;
    }
    at = end;
  }
}
template <class T> struct Picture {
  int width, height;
  vector<T> value;  // [height, width, channels]
};
// A PNG or JPEG: grey, and alpha if channels is 2
Picture<uint8_t> read_picture(const string& path, int channels) {
  Bytes file = read_file(path);
  int size = file.size(), width = 0, height = 0, found = 0;
  if (size > 0 && file[0] == 0xff) check_jpeg(path, file);
  if (!stbi_info_from_memory(file.data(), size, &width, &height, &found)) fail_in(path, "not a PNG or JPEG");
  double pixels = double(width) * height;
  if (pixels > 100e6) fail_in(path, format("%d x %d pixels are more than 100 million", width, height));
  // A JPEG has at least a bit for 8 x 8 pixels, a PNG a bit for each, of which deflate packs at most 1032 into one.
  if (pixels / (file[0] == 0xff ? 512 : 8 * 1032) > size)
    fail_in(path, format("%d x %d pixels cannot be in this file", width, height));
  shared_ptr<uint8_t> pixel(stbi_load_from_memory(file.data(), size, &width, &height, &found, channels), free);
  if (!pixel) fail_in(path, "damaged, or no memory left: its pixels cannot be decoded");
  return {width, height, {pixel.get(), pixel.get() + size_t(width) * height * channels}};
}
// A sheet: square tiles, 100 in a row; row r of tiles shows the digit r mod 10 and no other.
Images read_sheet(const string& path) {
  Picture<uint8_t> sheet = read_picture(path, 1);
  int side = sheet.width / 100;
  if (side == 0 || sheet.width % 100 != 0 || sheet.height % side != 0)
    fail_in(path, format("%d x %d pixels do not divide into rows of 100 square tiles", sheet.width, sheet.height));
  Images images;
  images.count = sheet.height / side * 100;
  images.pixels = side * side;
  for (int tile = 0; tile < images.count; tile++) {
    images.label.push_back(tile / 100 % 10);
    for (int y = 0; y < side; y++) {
      const uint8_t* from = &sheet.value[(tile / 100 * side + y) * sheet.width + tile % 100 * side];
      images.pixel.insert(images.pixel.end(), from, from + side);
    }
  }
  return images;
}
// idx: two zeros; the type of the numbers; how many dimensions; their sizes, big-endian; the numbers.
Bytes read_idx(const string& path, vector<uint32_t>& size) {
  Bytes file = read_file(path);
  if (file.size() > 1 && file[0] == 0x1f && file[1] == 0x8b) fail_in(path, "is compressed: run gunzip on it");
  size_t header = 4 + 4 * size.size();
  if (file.size() < header || file[0] != 0 || file[1] != 0 || file[3] != size.size())
    fail_in(path, format("not an idx file of %zu dimensions; get it again (`make mnist`)", size.size()));
  if (file[2] != 8) fail_in(path, format("holds %s, not bytes", file[2] > 12 ? "floats" : "other whole numbers"));
  double promised = 1;  // exact up to 2^53, and no file is larger
  for (size_t i = 0; i < size.size(); i++) {
    for (size_t byte = 4 + 4 * i; byte < 8 + 4 * i; byte++) size[i] = size[i] << 8 | file[byte];
    promised *= size[i];
  }
  size_t there = file.size() - header;
  if (promised == 0 || promised != there)
    fail_in(path, format("its header promises %.0f bytes, %zu follow; get it again (`make mnist`)", promised, there));
  return {file.begin() + header, file.end()};
}
// The first file of the folder, in alphabetical order, whose name begins so; "" if there is none
string find_file(const string& folder, const string& beginning) {
  std::set<string> found;
  std::error_code no_folder;
  for (const auto& entry : fs::directory_iterator(folder, no_folder))
    if (entry.path().filename().string().rfind(beginning, 0) == 0) found.insert(entry.path().string());
  return found.empty() ? "" : *found.begin();
}
Images read_mnist(const string& folder, const string& set) {
  string images_path = find_file(folder, set + "-images"), labels_path = find_file(folder, set + "-labels");
  if (images_path.empty() || labels_path.empty())
    fail_in(folder,
            "holds neither train.png and test.png (`make digits` draws them into data/) nor files that begin with "
            "train-images, train-labels, t10k-images and t10k-labels (`make mnist` downloads them into build/mnist)");
  vector<uint32_t> size(3), labels(1);
  Images images;
  images.pixel = read_idx(images_path, size);
  images.label = read_idx(labels_path, labels);
  images.count = size[0];
  images.pixels = size[1] * size[2];
  if (labels[0] != size[0]) fail_in(labels_path, format("%u labels for %u images", labels[0], size[0]));
  int largest = *std::max_element(images.label.begin(), images.label.end());
  if (largest >= images.classes)
    fail_in(labels_path, format("a label is %d, not 0 to %d", largest, images.classes - 1));
  return images;
}
Dataset load_dataset(const string& folder) {
  string train = folder + "/train.png", test = folder + "/test.png";
  if (fs::exists(train) || fs::exists(test)) return {read_sheet(train), read_sheet(test), "sheets in " + folder};
  return {read_mnist(folder, "train"), read_mnist(folder, "t10k"), "MNIST's files in " + folder};
}

// ==== 5.2 Checkpoints: safetensors, which PyTorch's users exchange ====
// Eight bytes, the length of the header; the header, JSON; the numbers. Little-endian, as all of CUDA's machines are.
// {"__metadata__": {"by": "mp"}, "0.weight": {"dtype": "F32", "shape": [128, 784], "data_offsets": [0, 401408]}}
struct Header {  // reads that JSON: objects of objects, strings, lists of whole numbers; takes , and : for white space
  const string& path;
  const char *at, *end;
  uint64_t used = 0;  // bytes of all tensors so far
  [[noreturn]] void damaged(const string& how) {
    fail_in(path, format("damaged: %s, %td bytes before its header's end; save it again", how.c_str(), end - at));
  }
  char next() {  // 0 at the end
    while (at < end && strchr(" \t\r\n,:", *at) && *at) at++;
    return at < end ? *at : '\0';
  }
  void expect(char c) {
    if (next() != c) damaged(string("no ") + c);
    at++;
  }
  string text() {  // escapes stay as they are written
    expect('"');
    const char* begin = at;
    while (at < end && *at != '"') at += *at == '\\' ? 2 : 1;
    at = min(at, end);
    expect('"');
    return {begin, at - 1};
  }
  vector<uint64_t> numbers() {
    vector<uint64_t> values;
    expect('[');
    while (next() != ']') {
      const auto [stop, error] = std::from_chars(at, end, values.emplace_back());
      if (error != std::errc()) damaged("no whole number");
      at = stop;
    }
    expect(']');
    return values;
  }
  // for (string key; header.member(key);) goes through an object, whose values are to be read in the loop
  bool member(string& key) {
    if (next() == '{') at++;
    bool more = next() == '"';
    if (more) key = text();
    else expect('}');
    return more;
  }
};
// Its value stays empty where it is passed over: scalars, empty tensors and whole numbers are other programs' counters.
SavedTensor read_tensor(Header& header, const string& name, const uint8_t* numbers, size_t size) {
  static const string dtypes[] = {"F32", "F16", "BF16"};  // in the order of Type
  string dtype;
  vector<uint64_t> shape, offsets;
  for (string key; header.member(key);) {
    if (key == "dtype") dtype = header.text();
    else if (key == "shape") shape = header.numbers();
    else if (key == "data_offsets") offsets = header.numbers();
    else header.damaged("unknown " + key);
  }
  if (offsets.size() != 2 || offsets[0] > offsets[1] || offsets[1] > size) header.damaged("data_offsets of " + name);
  header.used += offsets[1] - offsets[0];
  if (header.used > size) header.damaged("overlapping tensors");  // many could ask for more memory than there is
  SavedTensor tensor{name, {shape.begin(), shape.end()}, {}};
  double count = 1;  // exact up to 2^53, and no file is larger
  for (const uint64_t n : shape) count *= n;
  if (shape.empty() || count == 0 || dtype[0] == 'I' || dtype[0] == 'U' || dtype == "BOOL") return tensor;
  int type = std::find(dtypes, dtypes + 3, dtype) - dtypes;
  if (type == 3)
    fail_in(header.path, format("%s is %s, not F32, F16 or BF16: convert it", name.c_str(), dtype.c_str()));
  Bytes raw(numbers + offsets[0], numbers + offsets[1]);  // aligned, as they may not be in the file
  if (count * (type == 0 ? 4 : 2) != raw.size()) header.damaged("the shape of " + name);
  for (size_t i = 0; i < count; i++) tensor.value.push_back(number_at(raw.data(), Type(type), i));
  return tensor;
}
SafeTensors read_safetensors(const string& path) {
  Bytes file = read_file(path);
  uint64_t length = 0;
  std::copy_n(file.begin(), min(file.size(), sizeof length), (uint8_t*)&length);
  if (file.size() < 8 || length > file.size() - 8) fail_in(path, "not a safetensors file, or cut short");
  const uint8_t* numbers = file.data() + 8 + length;
  size_t size = file.size() - 8 - length;
  Header header{path, (const char*)file.data() + 8, (const char*)numbers};
  SafeTensors result;
  for (string name; header.member(name);) {
    if (name == "__metadata__") {
      for (string key; header.member(key);) result.metadata[key] = header.text();
      continue;
    }
    SavedTensor tensor = read_tensor(header, name, numbers, size);
    if (!tensor.value.empty()) result.tensors.push_back(tensor);
  }
  if (header.used != size || header.next() != 0) header.damaged("there is more in it than its tensors");
  return result;
}
template <class T> string joined(const vector<T>& items, char between = ',') {  // 784,128,10
  string text;
  for (const T& item : items) text += between + to_string(item);
  return text.substr(1);
}
void write_safetensors(const string& path, const SafeTensors& file) {
  string header = "{\"__metadata__\":{", numbers;
  for (const auto& [key, value] : file.metadata) header += "\"" + key + "\":\"" + value + "\",";
  if (!file.metadata.empty()) header.pop_back();
  header += "}";
  for (const SavedTensor& t : file.tensors) {
    header += ",\"" + t.name + "\":{\"dtype\":\"F32\",\"shape\":[" + joined(t.shape);
    header += "],\"data_offsets\":[" + to_string(numbers.size());
    numbers.append((const char*)t.value.data(), t.value.size() * sizeof(float));
    header += "," + to_string(numbers.size()) + "]}";
  }
  header += "}";
  header.resize((header.size() + 7) / 8 * 8, ' ');  // so that the numbers start at a multiple of their size
  uint64_t length = header.size();
  write_file(path, string((const char*)&length, 8) + header + numbers);
}

// ==== 5.2 Options: one table, which the command line, --help and --resume read ====
namespace {
struct UsageError : Error {  // main() ends with 2
  using Error::Error;
};
[[noreturn]] void misuse(const string& text) { throw UsageError(text); }
int complain(string text) {  // in one line; returns the program's exit status
  for (char& c : text)
    if (iscntrl(uint8_t(c))) c = '?';  // names may hold line ends, and what moves a terminal's cursor
  fprintf(stderr, "mp: %s\n", text.c_str());
  return 1;
}
struct Options {
  std::map<string, string> text;  // of every option: the table's, a checkpoint's or the command line's
  vector<string> given, files;    // options of the command line; its words that are none
  vector<int> layers;
  Type precision;
  Update update;
  Loss loss;
  bool automatic;  // each layer has its own type, `precision` at first
  bool shuffle, dynamic;
  float scale, lr;  // scale: the dynamic one's first value, or the fixed one
  int growth_interval, epochs, batch;
  uint64_t seed;
  const string& operator[](const char* name) const { return text.at(name); }
  bool has(const char* name) const { return std::count(given.begin(), given.end(), name) > 0; }
};
const char* const type_names[] = {"fp32", "fp16", "bf16"};
struct Option {
  const char *name, *values, *initial, *help;
  const char* commands;  // that take it; "checkpoint" stands for mp.options, the words that a checkpoint remembers
};
const char trainings[] = "train compare histogram checkpoint";
const char techniques[] = "train histogram checkpoint";  // compare tries them all
const Option option_table[] = {
    {"data", "DIR", "data", "sheets train.png and test.png, or MNIST's four files", "train test compare histogram"},
    {"layers", "N,N,...", "784,128,10", "sizes: pixels, hidden layers, classes", trainings},
    {"precision", "fp32|fp16|bf16|auto", "fp16", "storage type; masters, sums, loss stay fp32; auto: per layer",
     techniques},
    {"update", "master|half|kahan|stochastic", "master", "how w - lr g is computed and stored", techniques},
    {"loss-scale", "dynamic|N", "dynamic", "what multiplies the loss gradient (fp32, bf16: 1)", techniques},
    {"scale-init", "N", "65536", "the dynamic scale's first value", trainings},
    {"growth-interval", "N", "2000", "finite steps until it doubles", trainings},
    {"loss", "xent|mse", "xent", "softmax cross-entropy, or E1 on one-hot targets", trainings},
    {"epochs", "N", "15", "total number of epochs, including those before --resume", trainings},
    {"batch", "N", "64", "images per step", trainings},
    {"lr", "X", "0.3", "learning rate of plain SGD", trainings},
    {"seed", "N", "1", "for first weights, shuffling and stochastic rounding", trainings},
    {"shuffle", "off|on", "on", "off: images in the order of the file", trainings},
    {"init", "FILE", "", "first weights from a safetensors file, PyTorch's for instance", "train compare histogram"},
    {"save", "FILE", "", "checkpoint after every epoch", "train"},
    {"resume", "FILE", "", "continue from a checkpoint; other options override it", "train"},
    {"log", "FILE.csv", "", "a row per step: step,epoch,loss,loss_scale,found_inf", "train"},
};
const Option& option_named(const string& name) {
  for (const Option& option : option_table)
    if (name == option.name) return option;
  misuse("unknown option --" + name);
}

double number(const Options& o, const char* name, double least, double most, bool whole = false) {
  const string& text = o[name];
  char* end = nullptr;
  double x = std::strtod(text.c_str(), &end);
  if (*end || !(x >= least && x <= most) || (whole && x != std::floor(x)))
    misuse(
        format("--%s '%s' must be a %snumber from %g to %g", name, text.c_str(), whole ? "whole " : "", least, most));
  return x;
}
int choice(const Options& o, const char* name) {  // which of the table's values it is
  const char* all = option_named(name).values;
  std::istringstream values(all);
  int i = 0;
  for (string value; std::getline(values, value, '|'); i++)
    if (value == o[name]) return i;
  misuse(format("--%s '%s' must be one of %s", name, o[name].c_str(), all));
}
vector<int> whole_numbers(const string& text) {  // 784,128,10: as far as it is that
  vector<int> numbers;
  std::istringstream words(text);
  char comma = 0;
  for (int n; words >> n; words >> comma) numbers.push_back(n);
  return numbers;
}
// From what stands in `text` to what the program computes with.
void understand(Options& o) {
  o.layers = whole_numbers(o["layers"]);
  if (o.layers.size() < 2 || joined(o.layers) != o["layers"] || *std::min_element(o.layers.begin(), o.layers.end()) < 1)
    misuse("--layers '" + o["layers"] + "' must be whole numbers from 1, two or more, such as 784,10");
  int type = choice(o, "precision");
  o.automatic = type == 3;
  o.precision = o.automatic ? Type::fp16 : Type(type);
  o.update = Update(choice(o, "update"));
  o.loss = Loss(choice(o, "loss"));
  o.shuffle = choice(o, "shuffle");
  o.dynamic = o["loss-scale"] == "dynamic";
  o.scale = number(o, o.dynamic ? "scale-init" : "loss-scale", 1e-30, 3e38);
  o.growth_interval = number(o, "growth-interval", 1, 2e9, true);
  o.epochs = number(o, "epochs", 1, 1e6, true);
  o.batch = number(o, "batch", 1, 1e6, true);
  o.lr = number(o, "lr", 1e-30, 3e38);
  o.seed = number(o, "seed", 0, 9e15, true);
  string update = "--update " + o["update"] + " with --precision " + o["precision"] + ": ";
  if (o.precision == Type::fp32 && o.update != Update::master) misuse(update + "fp32 weights lose nothing to rounding");
  if (o.automatic && o.update != Update::master) misuse(update + "a layer needs its fp32 master to move");
  if (o.precision == Type::fp32 && o.dynamic)
    misuse("--loss-scale dynamic with --precision fp32: fp32 gradients do not vanish, nothing needs scaling");
  if (!o["init"].empty() && !o["resume"].empty()) misuse("--init and --resume both set the weights: give one of them");
}
// `--name value` and `--name=value` into o.text.
void take_words(Options& o, const string& command, const vector<string>& words) {
  string old_precision = o.text["precision"];
  o.given.clear();
  for (size_t i = 0; i < words.size(); i++) {
    const string& word = words[i];
    if (word.rfind("--", 0) != 0) {
      o.files.push_back(word);
      continue;
    }
    size_t equals = word.find('=');
    const Option& option = option_named(word.substr(2, equals - 2));
    string name = string("--") + option.name;
    string value;
    if (equals != word.npos) value = word.substr(equals + 1);
    else if (i + 1 < words.size()) value = words[++i];
    if (!strstr(option.commands, command.c_str())) misuse(name + " is not an option of mp " + command);
    if (value.empty() || value.rfind("--", 0) == 0) misuse(name + " needs a value: " + option.values);
    o.text[option.name] = value;
    o.given.push_back(option.name);
  }
  const string& precision = o["precision"];  // a new one brings its own default
  if (precision != old_precision && !o.has("loss-scale"))
    o.text["loss-scale"] = precision == "fp32" || precision == "bf16" ? "1" : "dynamic";
}
// What the command line says comes last; before it what a checkpoint remembers; before that the table.
Options parse(const string& command, const vector<string>& words, const string& remembered = "") {
  Options o;
  for (const Option& option : option_table) o.text[option.name] = option.initial;
  std::istringstream text(remembered);
  take_words(o, "checkpoint", {std::istream_iterator<string>(text), {}});
  take_words(o, command, words);
  understand(o);
  return o;
}

// ==== 5.2 What a checkpoint holds ====
struct Training {
  Options o;
  Dataset data;
  Mlp net;
  LossScaler scaler;
  StepState state;  // as it stands between two epochs
  int epoch = 0;    // finished
  int steps = 0;    // of an epoch; a last, partial batch is left out
  Batch batch;
  shared_ptr<uint8_t> pixels, labels;  // of the training images, on the device
  shared_ptr<int> order;
  Graph graph;
  double mean_loss = 0, test_accuracy = 0, seconds = 0;  // of the last epoch
};
string state_text(const Training& t) {
  const StepState& s = t.state;
  vector<int> map;
  for (int l = 1; l <= t.net.L; l++) map.push_back(t.net.layer[l].clean_probes);
  string numbers = format("epoch %d step %u scale %.9g tracker %d skipped %d map ", t.epoch, s.step, s.scale,
                          s.growth_tracker, s.skipped);
  return numbers + joined(map);
}
void read_state(const string& text, const string& path, Training& t) {
  StepState& s = t.state;
  int map_at = 0;
  sscanf(text.c_str(), "epoch %d step %u scale %f tracker %d skipped %d map %n", &t.epoch, &s.step, &s.scale,
         &s.growth_tracker, &s.skipped, &map_at);
  vector<int> map = whole_numbers(text.substr(map_at));
  map.resize(t.net.L, -1);
  for (int l = 1; l <= t.net.L; l++) t.net.layer[l].clean_probes = std::clamp(map[l - 1], 0, 2);
  bool possible = min({t.epoch, s.growth_tracker, s.skipped}) >= 0 && s.growth_tracker < 2e9 && s.scale > 0 &&
                  std::isfinite(s.scale);
  if (state_text(t) != text || !possible) fail_in(path, "its mp.state '" + text + "' is damaged");
}
void save_checkpoint(const string& path, const Training& t) {
  string words;
  for (const Option& option : option_table)
    if (strstr(option.commands, "checkpoint")) words += format(" --%s ", option.name) + t.o[option.name];
  SafeTensors file;
  file.metadata = {{"mp.options", words.substr(1)}, {"mp.state", state_text(t)}};
  for (int l = 1; l <= t.net.L; l++) {
    const Layer& layer = t.net.layer[l];
    string stem = to_string(2 * (l - 1)) + ".";  // in PyTorch's nn.Sequential(Linear, ReLU, Linear, ...)
    file.tensors.push_back({stem + "weight", {layer.W.rows, layer.W.cols}, to_host(kept_W(layer))});
    file.tensors.push_back({stem + "bias", {layer.W.rows}, to_host(kept_b(layer))});
    if (layer.compensation.memory)
      file.tensors.push_back({stem + "compensation", {layer.compensation.cols}, to_host(layer.compensation)});
  }
  write_safetensors(path, file);
}
// The words that say how a file was made. Another program's file is computed with in fp32.
string remembered_options(const string& path) {
  SafeTensors file = read_safetensors(path);
  if (file.metadata.count("mp.options") == 0) return "--precision fp32";
  try {
    parse("train", {}, file.metadata["mp.options"]);
  } catch (const UsageError& error) {
    fail_in(path, string("damaged, its mp.options: ") + error.what());
  }
  return file.metadata["mp.options"];
}

// The tensors of a layer as any program may have saved it, by the last part of their names: weight [out, in], and bias
// [out] or none. `compensation` is mp's own.
using Linear = std::map<string, const SavedTensor*>;
// A key to sort names by: each digit after the count of those left, so that fc2 comes before fc10.
string natural_order(const string& name) {
  string key;
  for (size_t i = 0; i < name.size(); i++) {
    size_t digits = strspn(&name[i], "0123456789");
    if (digits > 0) key += char('0' + digits);
    key += name[i];
  }
  return key;
}
vector<Linear> linear_layers(const SafeTensors& file, const string& path) {
  std::map<string, Linear> layers;  // by the first part of their names, in order
  for (const SavedTensor& t : file.tensors) {
    size_t end = t.name.rfind('.') + 1;  // 0 if there is no dot
    string part = t.name.substr(end);
    bool matrix =
        part == "weight" && t.shape.size() == 2 && t.name.find("lora_") == t.name.npos;       // LoRA's stand beside
    bool used = matrix || (part == "bias" && t.shape.size() == 1) || part == "compensation";  // a layer's matrix
    if (!used || !layers[natural_order(t.name.substr(0, end))].emplace(part, &t).second)
      fail_in(path, t.name + " belongs to no layer (a matrix X.weight, X.bias): its part would be lost");
  }
  vector<Linear> in_order;
  for (auto& [X, layer] : layers) {
    const string& name = layer.begin()->second->name;
    const SavedTensor *bias = layer["bias"], *weight = layer["weight"];
    if (!weight || (bias && bias->shape[0] != weight->shape[0])) fail_in(path, name + " fits no matrix X.weight");
    if (!in_order.empty() && in_order.back()["weight"]->shape[0] != weight->shape[1])
      fail_in(path, weight->name + " does not take what " + in_order.back()["weight"]->name + " gives");
    in_order.push_back(layer);
  }
  if (in_order.empty()) fail_in(path, "holds no layer: a matrix 0.weight and its 0.bias, as PyTorch names them");
  return in_order;
}
// A network with the weights of a file, and where that is mp's own with its state; with fresh weights if `path` is empty
Training open_network(const Options& options, const string& path) {
  Training t;
  t.o = options;
  Options& o = t.o;
  SafeTensors file;
  vector<Linear> layers;
  if (!path.empty()) {
    file = read_safetensors(path);
    layers = linear_layers(file, path);
    vector<int> sizes = {int(layers[0]["weight"]->shape[1])};
    for (Linear& layer : layers) sizes.push_back(layer["weight"]->shape[0]);
    if (o.has("layers") && sizes != o.layers)
      fail_in(path, "holds layers " + joined(sizes) + ", not --layers " + o["layers"]);
    o.layers = sizes;
    o.text["layers"] = joined(sizes);
  }
  t.net = make_mlp(o.layers, o.batch, o.precision, o.update);
  t.net.loss = o.loss;
  t.net.seed = o.seed;
  if (path.empty()) initialise(t.net);
  bool ours = o["init"].empty() && file.metadata.count("mp.state") > 0;  // --init takes the weights alone
  Options before = o;
  if (ours) {
    read_state(file.metadata["mp.state"], path, t);
    before = parse("train", {}, file.metadata["mp.options"]);
  } else if (!o["resume"].empty()) {
    fail_in(path, "holds weights but no training state (saved by another program or an older mp): use --init");
  }
  if (!ours || o.dynamic != before.dynamic || o.scale != before.scale) {
    t.state.scale = o.scale;  // it begins anew
    t.state.growth_tracker = 0;
  }
  if (o.automatic) set_types(t.net);
  for (size_t i = 0; i < layers.size(); i++) {
    Layer& layer = t.net.layer[i + 1];
    const SavedTensor *bias = layers[i]["bias"], *compensation = layers[i]["compensation"];
    set_parameters(layer, layers[i]["weight"]->value, bias ? bias->value : vector<float>(layer.b.cols));
    if (!ours || !compensation || !layer.compensation.memory) continue;
    if (int(compensation->value.size()) != layer.compensation.cols)
      fail_in(path, compensation->name + " has a wrong size");
    to_device(compensation->value, layer.compensation);
  }
  return t;
}

// ==== 5.2 The training loop ====
string describe(const Options& o) {  // in two lines
  string text = machine() + "\n" + joined(o.layers, '-') + " · ";
  text += o.automatic ? "auto: fp16 or fp32 by layer" : o["precision"];
  if (o.update != Update::master) text += ", no master, " + o["update"] + " update";
  else if (o.precision != Type::fp32) text += ", fp32 master";
  if (o.dynamic) text += ", dynamic loss scale";
  else if (o.scale != 1) text += ", loss scale " + o["loss-scale"];
  return text;
}
double accuracy(Mlp& net, const Images& test) {  // per cent
  vector<int> answer = predict(net, test.pixel);
  int right = 0;
  for (int i = 0; i < test.count; i++) right += answer[i] == test.label[i];
  return 100.0 * right / test.count;
}
void check_fit(const Options& o, const Images& images) {
  if (images.pixels != o.layers.front() || images.classes != o.layers.back())
    fail_in(o["data"],
            format("its images need layers %d,...,%d, not %s", images.pixels, images.classes, o["layers"].c_str()));
}
Training begin_training(const Options& options, const Dataset& data) {
  Training t = open_network(options, options["init"] + options["resume"]);  // one of them at most
  const Options& o = t.o;
  t.data = data;
  check_fit(o, data.train);
  check_fit(o, data.test);
  if (o.batch > data.train.count)
    fail_in(o["data"], format("only %d images to train on, --batch %d", data.train.count, o.batch));
  t.steps = data.train.count / o.batch;
  t.scaler = o.dynamic ? LossScaler(65536, 2, 0.5f, o.growth_interval) : LossScaler(1, 1, 1, 1);
  t.scaler.history = device_array<StepRecord>(t.steps);
  t.pixels = on_device(data.train.pixel);
  t.labels = on_device(data.train.label);
  t.order = device_array<int>(data.train.count);
  t.batch = {t.pixels.get(), t.labels.get(), t.order.get(), o.batch};
  return t;
}
// Which image comes when: it depends on seed and epoch alone, so that a resumed run sees the same.
void shuffle(Training& t) {
  vector<int> order(t.data.train.count);
  std::iota(order.begin(), order.end(), 0);
  uint64_t seed = random_bits(t.o.seed, 1 << 20 | t.epoch);
  for (int i = order.size() - 1; t.o.shuffle && i > 0; i--) std::swap(order[i], order[random_bits(seed, i) % (i + 1)]);
  CUDA_CHECK(cudaMemcpy(t.order.get(), order.data(), order.size() * sizeof(int), cudaMemcpyHostToDevice));
}
// Before an epoch: which layers must be in fp32, and why; which need not any more.
void choose_types(Training& t, bool quiet) {
  vector<Probe> seen = probe(t.net, t.batch, t.state.scale);
  bool moved = false;
  for (int l = 1; l <= t.net.L; l++) {
    Layer& layer = t.net.layer[l];
    bool wide = layer.type == Type::fp32;
    string why = why_not_fp16(seen, l, t.o.dynamic, wide ? 3 : 0);  // back only with 3 bits to spare
    layer.clean_probes = why.empty() ? min(layer.clean_probes + 1, 2) : 0;
    if (wide == (layer.clean_probes < 2)) continue;
    moved = true;
    string news = wide ? "back to fp16: two probes found nothing" : "to fp32: " + why;
    if (!quiet) printf("       layer %d %s, at scale %g\n", l, news.c_str(), t.state.scale);
  }
  if (!moved) return;
  set_types(t.net);
  t.graph = Graph();  // to be recorded anew
}
string map_of(const Mlp& net) {  // `16 32  98.7%`: bits by layer, the share of multiply-adds in 16
  string bits;
  double narrow = 0, all = 0;
  for (int l = 1; l <= net.L; l++) {
    const Tensor& W = net.layer[l].W;
    double products = double(W.rows) * W.cols;
    all += products;
    if (W.type != Type::fp32) narrow += products;
    bits += W.type == Type::fp32 ? "32 " : "16 ";
  }
  return bits + format("%5.1f%%", 100 * narrow / all);
}
double now_in_seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}
bool live_terminal() {
  const char* kind = getenv("TERM");
  return isatty(STDOUT_FILENO) && kind && strcmp(kind, "dumb") != 0;
}
void show_progress(const Training& t, int done) {  // at most ten times a second
  static double shown = 0;
  if (now_in_seconds() - shown < 0.1 || !live_terminal()) return;
  shown = now_in_seconds();
  printf("\r%5d  [%-40s] %d of %d steps", t.epoch + 1, string(40 * done / t.steps, '#').c_str(), done, t.steps);
  fflush(stdout);
}
// One epoch. The host does not wait for the device before its end.
vector<StepRecord> train_epoch(Training& t, bool quiet = false) {
  double start = now_in_seconds();
  shuffle(t);
  t.state.position = 0;
  t.scaler.write(t.state);
  if (t.o.automatic) choose_types(t, quiet);
  for (int step = 0; step < t.steps; step++) {
    replay(t.graph, [&] { train_step(t.net, t.batch, t.scaler, t.o.lr); });
    show_progress(t, step + 1);
  }
  t.state = t.scaler.read();
  vector<StepRecord> records(t.state.position + t.state.halted);
  size_t bytes = records.size() * sizeof(StepRecord);
  CUDA_CHECK(cudaMemcpy(records.data(), t.scaler.history.get(), bytes, cudaMemcpyDeviceToHost));
  t.seconds = now_in_seconds() - start;
  if (live_terminal()) printf("\r\033[K");
  t.epoch++;
  t.mean_loss = 0;
  for (const StepRecord& r : records) t.mean_loss += r.loss / double(records.size());
  if (quiet || !t.state.halted) t.test_accuracy = accuracy(t.net, t.data.test);  // else its tensors are looked at
  return records;
}
// The step that halted left its tensors as they were. Where is the first number that is not finite?
string first_not_finite(const Mlp& net) {
  vector<std::tuple<const char*, int, Tensor>> tensors;  // in the order of a step
  for (int l = 1; l <= net.L; l++) {
    const Layer& layer = net.layer[l];
    tensors.insert(tensors.end(), {{"W", l, layer.W}, {"b", l, layer.b}, {"a", l, layer.a}});
  }
  for (int l = net.L; l >= 1; l--) {
    const Layer& layer = net.layer[l];
    tensors.insert(tensors.end(), {{"delta", l, layer.delta}, {"dW", l, layer.dW}, {"db", l, layer.db}});
  }
  for (const auto& [name, l, t] : tensors) {
    vector<float> values = to_host(t);
    for (int i = 0; i < int(values.size()); i++)
      if (!std::isfinite(values[i]))
        return format("%s of layer %d is %g at row %d, column %d", name, l, values[i], i / t.cols, i % t.cols);
  }
  return "";
}

// Opens the log at its end. Of an old one are kept the header and the rows of the steps before this one.
FILE* open_log(const Training& t) {
  const string &path = t.o["log"], header = "step,epoch,loss,loss_scale,found_inf";
  FILE* log = path == "/dev/stdout" ? stdout : fopen(path.c_str(), "a");  // opened anew it would overwrite the table
  if (!log) fail_in(path, format("%s; name another file for --log", strerror(errno)));
  bool file = log != stdout && fs::is_regular_file(path);
  size_t kept = 0;  // bytes
  std::ifstream old(file ? path : "");
  for (string row; std::getline(old, row); kept += row.size() + 1) {
    if (kept == 0 && row != header) fail_in(path, "is there, and no log: name another file for --log");
    if (old.eof() || (kept > 0 && std::strtoul(row.c_str(), nullptr, 10) >= t.state.step)) break;  // eof: cut short
  }
  if (file) fs::resize_file(path, kept);
  if (file ? kept == 0 : t.state.step == 0) fprintf(log, "%s\n", header.c_str());
  return log;
}
void write_log(FILE* log, const Training& t, const vector<StepRecord>& records) {
  unsigned step = t.state.step + t.state.halted - records.size();
  for (const StepRecord& r : records)
    fprintf(log, "%u,%d,%.9g,%.9g,%d\n", step++, t.epoch, r.loss, r.loss_scale, r.found_inf);
  if (fflush(log) != 0 || ferror(log))
    fail_in(t.o["log"], format("cannot be written: %s; make room or log elsewhere", strerror(errno)));
}

void train(const vector<string>& words, Options o) {
  string resume = o["resume"];
  if (!resume.empty()) o = parse("train", words, remembered_options(resume));
  string save = o["save"].empty() ? resume : o["save"];
  if (!save.empty()) check_writable(save);
  if (!save.empty() && o["log"] == save) misuse("--log and --save name one file: " + save);
  Training t = begin_training(o, load_dataset(o["data"]));
  FILE* log = o["log"].empty() ? nullptr : open_log(t);
  printf("%s\n%s: %d images to train on, %d to test\n", describe(t.o).c_str(), t.data.what.c_str(), t.data.train.count,
         t.data.test.count);
  printf("epoch  train loss  accuracy  loss scale  skipped  images/s  seconds%s\n", o.automatic ? " bits  in 16" : "");
  if (!save.empty() && t.epoch >= o.epochs) save_checkpoint(save, t);  // there is nothing left to train
  while (t.epoch < o.epochs) {
    vector<StepRecord> records = train_epoch(t);
    if (log) write_log(log, t, records);
    if (t.state.halted)
      fail(format(
          "step %u (epoch %d): %s, which no loss scale below %g can prevent; use a smaller --lr, or bf16 or fp32",
          t.state.step, t.epoch, first_not_finite(t.net).c_str(), t.state.scale));
    printf("%5d  %10.5f  %7.2f%%  %10g  %7d  %8.0f  %7.2f", t.epoch, t.mean_loss, t.test_accuracy, t.state.scale,
           t.state.skipped, t.steps * o.batch / t.seconds, t.seconds);
    printf(o.automatic ? " %s\n" : "\n", map_of(t.net).c_str());
    if (!save.empty()) save_checkpoint(save, t);
  }
  if (t.state.skipped > int(t.state.step) / 2)
    printf("Skipped steps: gradients overflowed. Use a smaller --loss-scale or --lr.\n");
  printf("test accuracy %.2f%%\n", accuracy(t.net, t.data.test));
}

// ==== What each technique is for: compare and histogram ====
// Trains without a word, to the last epoch or until no loss scale can help.
Training learn(const Options& o, const Dataset& data) {
  Training t = begin_training(o, data);
  while (t.epoch < o.epochs && !t.state.halted) train_epoch(t, true);
  return t;
}
// Per cent of the non-zero gradients, deltas and dW, that this training's types flush to zero
double flushed(const Training& t) {
  vector<Probe> seen = probe(t.net, t.batch, t.state.scale);
  double zero = 0, all = 1e-9;
  for (int l = 1; l <= t.net.L; l++)
    for (const Exponents* e : {&seen[l].delta, &seen[l].dW}) {
      all += e->nonzero();
      if (t.net.layer[l].type == Type::fp16) zero += e->between(Exponents::lowest, -25);
    }
  return 100 * zero / all;
}
// The defaults, fp16 with fp32 masters and a dynamic loss scale, but for one change
const struct Setting {
  const char *name, *options;
} settings[] = {{"fp32", "--precision fp32"},
                {"mixed: fp16, master", ""},
                {"mixed, no loss scaling", "--loss-scale 1"},
                {"fp16, no master", "--update half"},
                {"fp16, Kahan", "--update kahan"},
                {"fp16, stochastic", "--update stochastic"},
                {"bf16, master", "--precision bf16"},
                {"bf16, no master", "--precision bf16 --update half"},
                {"auto: 16 or 32 by layer", "--precision auto"}};
void compare(const vector<string>& words, const Options& o) {
  Dataset data = load_dataset(o["data"]);
  printf("%s\n%s · %s\n\n", machine().c_str(), joined(o.layers, '-').c_str(), data.what.c_str());
  printf("flushed: gradients that became 0; KiB of weights, a, gradients; seconds an epoch\n\n");
  printf("%-23s accuracy    loss  skips flushed weights    a grads   sec\n", "");
  for (const Setting& s : settings) {
    Training t = learn(parse("compare", words, s.options), data);
    Footprint bytes = footprint(t.net);
    printf("%-23s %7.2f%% %7.4f %6d %6.2f%% %7.0f %4.0f %5.0f %5.2f%s\n", s.name, t.test_accuracy, t.mean_loss,
           t.state.skipped, flushed(t), bytes.weights / 1024., bytes.activations / 1024., bytes.gradients / 1024.,
           t.seconds, t.state.halted ? " halted" : "");
  }
}

// Prints a tensor's exponents, as shares of its non-zero values.
void print_exponents(const string& name, const Exponents& e) {
  const char* const heights[] = {" ", "▁", "▂", "▃", "▄", "▅", "▆", "▇", "█"};
  double one_percent = max<int64_t>(e.nonzero(), 1) / 100.;
  printf("%s: %.1f%% to zero, %.1f%% subnormal, %.1f%% overflow\n", name.c_str(),
         e.between(Exponents::lowest, -25) / one_percent, e.between(-25, -14) / one_percent, e.overflow / one_percent);
  for (int x = -40; x < 20; x++) {
    double share = e.between(x > -40 ? x : Exponents::lowest, x + 1) / one_percent;
    if (x == 16) share = e.overflow / one_percent;
    if (x == -25 || x == -14 || x == 16) printf("│");
    printf("%s", heights[min(int(std::ceil(share / 2.5)), 8)]);
  }
  printf("\n");
}
// Exponents of a, delta and dW in fp32, without the loss scale and with it, against fp16's ranges
void histogram(const vector<string>& words) {
  Options o = parse("histogram", words, "--epochs 1");
  Training t = learn(o, load_dataset(o["data"]));
  shuffle(t);
  vector<Probe> plain = probe(t.net, t.batch, 1), scaled = probe(t.net, t.batch, t.state.scale);
  printf("%s\n\nExponents in fp32; height: share of the non-zero values. In fp16 they are\n%-15s│%-11s│%-30s│inf\n",
         describe(t.o).c_str(), "2^-40: 0", "subnormal", "normal, 2^-14 to 65504");
  for (int l = 1; l <= t.net.L; l++) {
    string layer = format("layer %d, ", l), with = format(", times %g", t.state.scale);
    print_exponents(layer + "a", plain[l].a);
    print_exponents(layer + "delta", plain[l].delta);
    print_exponents(layer + "delta" + with, scaled[l].delta);
    print_exponents(layer + "dW", plain[l].dW);
    print_exponents(layer + "dW" + with, scaled[l].dW);
  }
}

// ==== test and predict: what a saved model reads ====
void test(const vector<string>& words, const string& model) {
  Training t = open_network(parse("test", words, remembered_options(model)), model);
  Dataset data = load_dataset(t.o["data"]);
  check_fit(t.o, data.test);
  vector<int> answer = predict(t.net, data.test.pixel);
  int right = 0, count[10][10] = {};  // images that show the one and are taken for the other
  for (int i = 0; i < data.test.count; i++) count[data.test.label[i]][answer[i]]++;
  printf("%s\n%s: %d images\n\nis \\ read as", describe(t.o).c_str(), data.what.c_str(), data.test.count);
  for (int digit = 0; digit < 10; digit++) printf("%6d", digit);
  for (int digit = 0; digit < 10; digit++) {
    printf("\n%12d", digit);
    for (int n : count[digit]) printf("%6d", n);
    right += count[digit][digit];
  }
  printf("\n\ntest accuracy %.2f%%\n", 100.0 * right / data.test.count);
}

using Grey = Picture<float>;
double sum(const Grey& p) { return std::accumulate(p.value.begin(), p.value.end(), 0.); }
// How the camera was held: EXIF's entry 0x112, one 16-bit number, in either order of bytes. 1 where a file has none.
int orientation(const Bytes& file) {
  for (const auto& [entry, at] : {std::pair("\x12\1\3\0\1\0\0\0", 8), std::pair("\1\x12\0\3\0\0\0\1", 9)}) {
    auto found = std::search(file.begin(), file.end(), entry, entry + 8);
    if (file.end() - found > 9 && found[at] > 0 && found[at] < 9) return found[at];
  }
  return 1;
}
// In grey, 0 to 255, upright, less than 400 pixels long. Where most is transparent, what is not is the ink.
Grey read_grey(const string& path) {
  Picture<uint8_t> from = read_picture(path, 2);
  int step = 1 + max(from.width, from.height) / 400, width = from.width / step, height = from.height / step;
  int way = orientation(read_file(path));  // one of eight; from 5 on rows are columns
  Grey grey{width, height, vector<float>(width * height)};
  if (way > 4) std::swap(grey.width, grey.height);
  Grey channel[] = {grey, grey};
  for (int y = 0; y < height * step; y++)
    for (int x = 0; x < width * step; x++) {
      int i = x / step, j = y / step;
      if (way > 4) std::swap(i, j);
      if (way & 2) i = grey.width - 1 - i;
      if ((way - 1) & 2) j = grey.height - 1 - j;
      const uint8_t* pixel = &from.value[2 * (size_t(y) * from.width + x)];
      for (int c : {0, 1}) channel[c].value[j * grey.width + i] += pixel[c] / float(step * step);
    }
  return sum(channel[1]) < 127.5 * width * height ? channel[1] : channel[0];
}
// Each pixel becomes the greatest, or the least, of the square that reaches that far from it.
Grey extreme(const Grey& p, int reach, bool greatest, int passes = 2) {
  Grey to{p.height, p.width, p.value};
  for (int i = 0; i < int(p.value.size()); i++) {  // along the rows, which become columns for the other pass
    int x = i % p.width, y = i / p.width;
    auto begin = p.value.begin() + i - min(x, reach), end = p.value.begin() + i + min(p.width - x, reach + 1);
    to.value[x * p.height + y] = greatest ? *std::max_element(begin, end) : *std::min_element(begin, end);
  }
  return passes > 1 ? extreme(to, reach, greatest, passes - 1) : to;
}
// Leaves 0 where there is paper, 1 where there is ink, between them at its edges. False: nothing stands out.
bool find_ink(Grey& p) {
  int longer = max(p.width, p.height), reach = longer / 5, count = p.width * p.height;
  Grey lightest = extreme(p, reach, true), darkest = extreme(p, reach, false);
  double vote = 0;  // most pixels, above all at the picture's edge, are nearer to paper than to ink
  for (int i = 0; i < count; i++) {
    int x = i % p.width, y = i / p.width, depth = min(min(x, p.width - 1 - x), min(y, p.height - 1 - y));
    vote += (depth < longer / 20. ? 4 : 1) * (2 * p.value[i] - lightest.value[i] - darkest.value[i]);
  }
  // What no square of paper covers is ink. A shadow is paper: squares reach into it from beyond the picture's edge.
  Grey paper = vote > 0 ? extreme(lightest, reach, false) : extreme(darkest, reach, true);
  for (int i = 0; i < count; i++)
    p.value[i] = vote > 0 ? 255 - 255 * p.value[i] / max(paper.value[i], 64.f) : p.value[i] - paper.value[i];
  vector<float> sorted = p.value;
  std::sort(sorted.begin(), sorted.end());
  double grain = sorted[count / 4];
  auto above = std::lower_bound(sorted.begin(), sorted.end(), (grain + sorted.back()) / 2);
  double ink = std::accumulate(above, sorted.end(), 0.) / (sorted.end() - above) - grain;
  for (float& x : p.value) x = std::clamp((12 * (x - grain) / ink - 1) / 11, 0., 1.);
  return ink > 28;
}
struct Piece {  // pixels of ink that touch each other, and the box round them
  vector<int> pixels;
  double ink = 0, left = 1e9, right = 0, top = 1e9, bottom = 0;
  double size() const { return max(right - left, bottom - top); }
  void add(const Grey& p, int i) {
    pixels.push_back(i);
    ink += p.value[i];
    left = min<double>(left, i % p.width);
    right = max<double>(right, i % p.width + 1);
    top = min<double>(top, i / p.width);
    bottom = max<double>(bottom, i / p.width + 1);
  }
};
vector<Piece> find_pieces(Grey p) {  // all but specks
  vector<Piece> pieces;
  for (int start = 0; start < int(p.value.size()); start++) {
    Piece piece;
    for (vector<int> next = {start}; !next.empty();) {
      int i = next.back(), x = i % p.width, y = i / p.width;
      next.pop_back();
      if (p.value[i] < .25) continue;
      piece.add(p, i);
      p.value[i] = 0;
      for (int j = max(0, y - 1); j < min(p.height, y + 2); j++)
        for (int k = max(0, x - 1); k < min(p.width, x + 2); k++) next.push_back(j * p.width + k);
    }
    if (piece.size() > .03 * max(p.width, p.height)) pieces.push_back(piece);
  }
  return pieces;
}
// Leaves the piece with most ink and what lies near it; pieces at the edge or round others only where nothing else is.
bool keep_digit(Grey& p, const string& path) {
  vector<Piece> clear, doubtful, all = find_pieces(p);
  for (const Piece& a : all) {
    bool odd = a.left == 0 || a.top == 0 || a.right == p.width || a.bottom == p.height;
    for (const Piece& b : all)
      if (a.left < b.left && b.right < a.right && a.top < b.top && b.bottom < a.bottom) odd |= b.size() > .2 * a.size();
    if (!odd || a.size() > .5 * max(p.width, p.height)) (odd ? doubtful : clear).push_back(a);
  }
  if (clear.empty()) clear = doubtful;
  if (clear.empty()) return false;
  Piece digit = *std::max_element(clear.begin(), clear.end(), [](auto& a, auto& b) { return a.ink < b.ink; });
  Grey only{p.width, p.height, vector<float>(p.value.size())};
  for (const Piece& a : clear) {
    double gap = max(max(a.left - digit.right, digit.left - a.right), max(a.top - digit.bottom, digit.top - a.bottom));
    if (gap < .4 * digit.size())
      for (int i : a.pixels) only.value[i] = p.value[i];
    else if (a.size() > .6 * digit.size() && a.ink > .2 * digit.ink)
      fail_in(path, "more than one digit, far apart: cut it up, a picture each");
  }
  p = only;
  return true;
}
// [side, side] as in MNIST: the ink fitted into 20/28, its centre of mass at centre/28 (MNIST's are at 14.5, data/'s at 14)
Grey fitted(const Grey& p, int side, double centre) {
  Piece ink;
  double x_sum = 0, y_sum = 0, mass = sum(p), most = *std::max_element(p.value.begin(), p.value.end());
  for (int i = 0; i < int(p.value.size()); i++) {
    x_sum += p.value[i] * (i % p.width + .5);
    y_sum += p.value[i] * (i / p.width + .5);
    if (p.value[i] >= .25 * most) ink.add(p, i);
  }
  double step = ink.size() * 28 / (20 * side), middle = step * side * centre / 28;
  Grey to{side, side, {}};
  for (int n = 0; n < side * side; n++) {  // means over squares of `step` pixels
    double x = x_sum / mass - middle + n % side * step, y = y_sum / mass - middle + n / side * step, inside = 0;
    for (int j = max(0., y); j < p.height && j < y + step; j++)
      for (int i = max(0., x); i < p.width && i < x + step; i++)  // what of pixel (j, i) lies inside
        inside += p.value[j * p.width + i] * (min(i + 1., x + step) - max<double>(i, x)) *
                  (min(j + 1., y + step) - max<double>(j, y));
    to.value.push_back(inside / (step * step));
  }
  return to;
}
// 0 to 255, white on black, with strokes of usual width: 2.2 pixels of 28
void as_mnist(Grey& p, int side) {
  Grey large = fitted(p, 140, 14);
  double ink = sum(large), rim = ink - sum(extreme(large, 1, false));  // the outermost pixels of each stroke
  double excess = 2 * ink / max(rim, 1e-9) - 2.2 * 5;
  Grey usual = extreme(large, std::lround(std::fabs(excess) / 2), excess < 0);
  p = fitted(sum(usual) > .1 * ink ? usual : large, side, 14.25);
  float most = *std::max_element(p.value.begin(), p.value.end());
  for (float& x : p.value) x = std::round(255 * x / most);
}
// A picture of the network's size whose border is mostly black is its input as it is; mostly white: inverted.
Bytes read_digit(const string& path, int side) {
  Grey p = read_grey(path);
  int dark = 0, light = 0;  // pixels of its border
  for (int i = 0; i < side && p.width == side && p.height == side; i++)
    for (int at : {i, side * i, side * i + side - 1, side * side - 1 - i}) {
      dark += p.value[at] < 32;
      light += p.value[at] > 223;
    }
  if (light > 2 * side)
    for (float& x : p.value) x = 255 - x;
  if (max(dark, light) <= 2 * side || *std::max_element(p.value.begin(), p.value.end()) <= 20) {
    if (p.value.empty() || !find_ink(p) || !keep_digit(p, path))
      fail_in(path, "blank: nothing stands out from its background");
    as_mnist(p, side);
  }
  return {p.value.begin(), p.value.end()};
}
void predict_picture(Mlp& net, const string& path, int side) {
  Bytes pixels = read_digit(path, side);
  vector<float> z = logits(net, pixels);
  auto best = std::max_element(z.begin(), z.end());
  double sum = std::accumulate(z.begin(), z.end(), 0., [&](double s, float x) { return s + std::exp(x - *best); });
  if (!std::isfinite(sum)) fail_in(path, "the model answers NaN or infinity; train it again, or in fp32");
  printf("%s: %td (%.1f%%)\n", path.c_str(), best - z.begin(), 100 / sum);
  const char* const shades[] = {" ", "░", "▒", "▓", "█"};
  for (int y = 0; y + 1 < side; y += 2) {  // two rows of pixels a line
    printf("  ");
    for (int i = y * side; i < (y + 1) * side; i++) printf("%s", shades[(pixels[i] + pixels[i + side]) / 103]);
    printf("\n");
  }
}
int predict_pictures(const vector<string>& words, const vector<string>& files) {  // returns the program's exit status
  Training t = open_network(parse("predict", words, remembered_options(files[0])), files[0]);
  int side = std::lround(std::sqrt(t.o.layers.front()));
  if (side * side != t.o.layers.front() || t.o.layers.back() != 10)
    fail_in(files[0], "its layers " + t.o["layers"] + " do not read square pictures of 10 digits");
  int status = 0;
  for (size_t i = 1; i < files.size(); i++) {
    try {
      predict_picture(t.net, files[i], side);
    } catch (const std::exception& error) {  // the others are read all the same
      status = complain(error.what());
    }
  }
  return status;
}

// ==== How fast: the ladder ====
// Seconds of the fastest call: slower ones tell of the machine's other work, the first of cold caches.
template <class F> double least_seconds(F work) {
  double least = 1e9, begin = now_in_seconds();
  for (int run = 0; run < 3 || now_in_seconds() - begin < 0.5; run++) {
    double start = now_in_seconds();
    work();
    CUDA_CHECK(cudaDeviceSynchronize());
    least = min(least, now_in_seconds() - start);
  }
  return least;
}

Tensor random_matrix(int n, Type type) {  // a GPU multiplies zeros faster than other numbers
  vector<float> values;
  for (int i = 0; i < n * n; i++) values.push_back(uniform(1, i));
  Tensor t = make_tensor(n, n, type);
  to_device(values, t);
  return t;
}

void multiply(const string& rung, Layout layout, const Tensor& A, const Tensor& B, const Tensor& C) {
  if (rung == "naive") return gemm_naive(layout, A, B, C);
  if (rung == "tiled") return gemm_tiled(layout, A, B, C);
  if (rung == "mma") return gemm_mma(layout, A, B, C);
#if defined(__CUDACC__)
  static cublasHandle_t handle = nullptr;
  cudaDataType types[] = {CUDA_R_32F, CUDA_R_16F, CUDA_R_16BF}, type = types[int(C.type)];
  cublasOperation_t turn[] = {CUBLAS_OP_N, CUBLAS_OP_T};
  int n = C.rows;
  float one = 1, zero = 0;  // its matrices go down the columns: C^T = B^T A^T
  if ((!handle && (cublasCreate(&handle) || cublasSetStream(handle, stream()))) ||
      cublasGemmEx(handle, turn[layout == Layout::ABt], turn[layout == Layout::AtB], n, n, n, &one, B.memory.get(),
                   type, n, A.memory.get(), type, n, &zero, C.memory.get(), type, n, CUBLAS_COMPUTE_32F,
                   CUBLAS_GEMM_DEFAULT))
    fail("cuBLAS failed");
#endif
}
void bench_product(Layout layout, int n, Type type) {
  const char* const names[] = {"ABt", "AB", "AtB"};
  Tensor A = random_matrix(n, type), B = random_matrix(n, type), C = make_tensor(n, n, type);
  double of_cublas = 0;
  for (string rung : {"cuBLAS", "naive", "tiled", "mma"}) {
    if ((rung == "cuBLAS" && !real_tensor_cores) || (rung == "mma" && !tensor_cores(type))) continue;
    double rate = 2. * n * n * n / least_seconds([&] { multiply(rung, layout, A, B, C); });
    printf("%-7s %5d  %s  %-6s %9.1f", names[int(layout)], n, type_names[int(type)], rung.c_str(), rate * 1e-9);
    if (rung == "cuBLAS") of_cublas = rate;
    if (of_cublas > 0) printf("  %5.1f%% of cuBLAS", 100 * rate / of_cublas);
    printf("\n");
  }
}
void bench() {
  printf("%s\n\nproduct     n  type  rung    GFLOP/s\n", machine().c_str());
  for (int n = real_tensor_cores ? 4096 : 512; n >= 512; n /= 2)
    for (Layout layout : {Layout::ABt, Layout::AB, Layout::AtB})
      for (Type type : {Type::fp32, Type::fp16, Type::bf16}) bench_product(layout, n, type);
}

// ==== The command line ====
const char usage_text[] = R"(usage: mp train [OPTION...]              learn digits; prints a row per epoch
       mp test MODEL [--data DIR]        a saved model's confusion table
       mp compare [OPTION...]            one technique off at a time
       mp histogram [OPTION...]          exponents against fp16's range
       mp predict MODEL IMAGE...         which digit each PNG or JPEG shows
       mp article                        the article's own example, 1-5-1
       mp bench                          how fast the matrix products are
       mp --help | mp --version          every option and its default | version
)";
void print_help() {
  printf("mp trains a multi-layer perceptron in mixed precision.\n\n%s\noptions:\n", usage_text);
  for (const Option& option : option_table) {
    printf("  --%s %s", option.name, option.values);
    if (*option.initial) printf(" [%s]", option.initial);
    printf("\n      %s\n", option.help);
  }
  printf(
      "\nMP_GEMM=naive|tiled|mma picks a rung of the matrix product; MP_THREADS=N uses\n"
      "N threads of a CPU; MP_ORDER=forward|backward|N orders a block's threads.\n");
}
int run_command(const string& command, const vector<string>& words) {  // returns the program's exit status
  Options o = parse(command, words);
  size_t files = o.files.size();
  if (command == "train" && files == 0) train(words, o);
  else if (command == "test" && files == 1) test(words, o.files[0]);
  else if (command == "compare" && files == 0) compare(words, o);
  else if (command == "histogram" && files == 0) histogram(words);
  else if (command == "predict" && files > 1) return predict_pictures(words, o.files);
  else if (command == "article" && files == 0) article();
  else if (command == "bench" && files == 0) bench();
  else misuse("mp " + command + ": no such command, or the wrong number of files");
  return 0;
}
}  // namespace

// Weak, so that the tests, which have a main of their own, can be linked with this file.
__attribute__((weak)) int main(int argc, char** argv) {
  vector<string> words(argv + 1, argv + argc);
  setvbuf(stdout, nullptr, _IOLBF, 0);  // into a pipe or a file, too, each row appears when it is known
  try {
    int status = 0;
    if (words.empty()) misuse("no command");
    if (std::count(words.begin(), words.end(), "--help")) print_help();
    else if (words[0] == "--version")
      printf("mp 2.0, %s back end, vectors of %d floats\n", real_tensor_cores ? "CUDA" : "CPU", vector_width);
    else status = run_command(words[0], {words.begin() + 1, words.end()});
    if (fflush(stdout) || ferror(stdout))
      fail(format("standard output cannot be written: %s; send it elsewhere", strerror(errno)));
    return status;
  } catch (const UsageError& error) {
    complain(error.what());
    fputs(usage_text, stderr);
    return 2;
  } catch (const std::bad_alloc&) {
    return complain("out of memory; make --layers or --batch smaller");
  } catch (const std::exception& error) {  // Error, or one of the file system
    return complain(error.what());
  }
}
