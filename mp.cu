// mp: a multi-layer perceptron trained in mixed precision, every kernel written by hand, in the order of the article
// that walkthrough.md reads with you. Its section numbers stand in the banners: 2.1, 4.2.2 and so on; E1 to E5 are the
// article's equations.
//
// It does: fp16 or bf16 storage and arithmetic with fp32 sums, fp32 master weights, dynamic loss scaling, plain SGD.
// It refuses: convolutions, other optimizers, several GPUs, a framework. Some 760 lines of method come first.
//
//   make run                    builds it and learns the digits in data/, with a GPU or without
//   make test                   proves it
//   build/mp train --help       what can be switched off, to see what it was good for
//
// The same kernels run on an NVIDIA GPU and, thread by thread, on a CPU: mp.h, part 2. Start reading at train_step().
#include <fcntl.h>
#include <math.h>  // not cmath: isnan and its like without std::, as in CUDA
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <climits>
#include <csignal>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iomanip>
#include <set>
#include <sstream>
#include <string_view>

#include "mp.h"
#if defined(__CUDACC__)  // for mp bench
#define CUDA_NO_HALF     // their half is not ours
#define CUDA_NO_BFLOAT16
#include <cublas_v2.h>
#endif

// ==== 2.1 Number formats: a float rounded to 16 bits, and back =======================================================
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
    const int dropped = exponent >= -14 ? 13 : -1 - exponent;  // bits; a subnormal half counts in steps of 2^-24
    const uint32_t significand = (u & 0x7fffff) | 0x800000;    // 24 bits, the leading 1 made visible
    if (dropped <= 24) {                                       // else below 2^-25: zero
      const uint32_t rest = significand & ((1u << dropped) - 1), tie = 1u << (dropped - 1);
      h = significand >> dropped;
      if (rest > tie || (rest == tie && (h & 1))) h++;          // to nearest, a tie to the even neighbour
      if (exponent >= -14) h += uint32_t(exponent + 14) << 10;  // a carry out of the fraction belongs there too
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
  b = (u + 0x7fff + (u >> 16 & 1)) >> 16;                 // half a step less one bit, the bit if that makes it even
  if ((u & 0x7fffffff) > 0x7f800000) b = u >> 16 | 0x40;  // NaN, before the carry could make it something else
  //}
  return bfloat16{uint16_t(b)};
}
__host__ __device__ float bfloat16_to_float(bfloat16 b) { return float_of(uint32_t(b.bits) << 16); }

// Kernels are written once for the three types, and move 8 neighbouring numbers at a time: 16 or 32 bytes.
__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(half x) { return machine_float(x); }
__device__ __forceinline__ float to_float(bfloat16 x) { return bfloat16_to_float(x); }
template <class T> __device__ T round_to(float x);
template <> __device__ __forceinline__ float round_to(float x) { return x; }
template <> __device__ __forceinline__ half round_to(float x) { return machine_half(x); }
template <> __device__ __forceinline__ bfloat16 round_to(float x) { return float_to_bfloat16(x); }
// n neighbours, aligned to the largest power of two that divides their size, at most 16: 6 floats to 8 bytes
template <class T, int n> struct alignas((n * sizeof(T) | 16) & -(n * sizeof(T) | 16)) Group { T v[n]; };
template <class T, int n> __device__ __forceinline__ void load(const T* p, float (&x)[n]) {
  const Group<T, n> group = *(const Group<T, n>*)p;
  UNROLL for (int j = 0; j < n; j++) x[j] = to_float(group.v[j]);
}
template <class T, int n> __device__ __forceinline__ void store(T* p, const float (&x)[n]) {
  Group<T, n> group;
  UNROLL for (int j = 0; j < n; j++) group.v[j] = round_to<T>(x[j]);
  *(Group<T, n>*)p = group;
}

// A tensor as a kernel sees it
template <class T> struct Matrix {
  T* data;
  int rows, cols, stride;
  __device__ T* row(int r) const { return data + size_t(r) * stride; }
};
template <class T> Matrix<T> matrix(const Tensor& t) { return {t.as<T>(), t.rows, t.cols, t.stride}; }

// Calls f with a zero of the C++ type that `type` names.
template <class F> void with_type(Type type, F f) {
  if (type == Type::fp16) f(half{});
  else if (type == Type::bf16) f(bfloat16{});
  else f(0.f);
}

// ==== 2.3 The architecture: one training step, boxes A to H ==========================================================
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

// Boxes A and B. On a GPU the images lie in its memory as bytes; the step counter there says whose turn it is, so that
// the host need not wait. n elements are shared out 8 at a time: element_threads a block, elements_per_block each.
struct Share {
  int begin, end, step;
};
__device__ __forceinline__ Share my_share(int n) {
  const int begin = int(blockIdx.x) * elements_per_block, end = begin + elements_per_block;
  return {begin + int(threadIdx.x) * 8, end < n ? end : n, int(blockDim.x) * 8};
}
template <class... P, class... A> void launch_elements(void (*kernel)(P...), int n, A... args) {
  launch(kernel, unsigned((n + elements_per_block - 1) / elements_per_block), element_threads, args...);
}

template <class T> __global__ void preprocess_kernel(Batch batch, const StepState* state, Matrix<T> a0) {
  const int first = state ? state->position * batch.rows : 0;
  const Share share = my_share(batch.rows * a0.stride);
  for (int i = share.begin; i < share.end; i += share.step) {
    const int row = first + i / a0.stride, col = i % a0.stride;
    const size_t from = size_t(batch.order ? batch.order[row] : row) * a0.cols + col;
    float a[8] = {};
    if (batch.x) {
      for (int j = 0; j < 8 && col + j < a0.cols; j++) a[j] = batch.x[from + j];
    } else if (col + 8 <= a0.cols) {
      UNROLL for (int j = 0; j < 8; j++) a[j] = batch.pixels[from + j] / 255.f;
    } else {
      for (int j = 0; col + j < a0.cols; j++) a[j] = batch.pixels[from + j] / 255.f;
    }
    store(a0.data + i, a);
  }
}
__global__ void targets_kernel(Batch batch, const StepState* state, Matrix<float> y) {
  const int row = blockIdx.x * blockDim.x + threadIdx.x, place = (state ? state->position * batch.rows : 0) + row;
  if (row >= batch.rows) return;
  const size_t sample = size_t(batch.order ? batch.order[place] : place);
  for (int i = 0; i < y.cols; i++)
    y.row(row)[i] = batch.y ? batch.y[sample * y.cols + i] : batch.labels[sample] == i ? 1.f : 0.f;
}
static dim3 rows_grid(int rows) { return unsigned(rows + row_threads - 1) / row_threads; }
void preprocess(Mlp& net, const Batch& batch, const LossScaler* scaler) {
  const Tensor& a0 = net.layer[0].a;
  const StepState* state = scaler ? scaler->state.get() : nullptr;
  net.rows = batch.rows;
  with_type(a0.type, [&](auto zero) {
    using T = decltype(zero);
    launch_elements(preprocess_kernel<T>, batch.rows * a0.stride, batch, state, matrix<T>(a0));
  });
  if (batch.labels || batch.y)
    launch(targets_kernel, rows_grid(batch.rows), row_threads, batch, state, matrix<float>(net.y));
}

// ==== 3.2 step 1: the parameters begin in fp32 =======================================================================
// Random numbers by counting: the i-th of a seed, wherever and whenever it is asked for (splitmix64).
__host__ __device__ inline uint64_t random_bits(uint64_t seed, uint64_t i) {
  uint64_t z = seed * 0xd1342543de82ef95u + (i + 1) * 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}
static double uniform(uint64_t seed, uint64_t i) { return (double(random_bits(seed, i) >> 11) + 0.5) * 0x1p-53; }

void initialise(Mlp& net) {
  for (int l = 1; l <= net.L; l++) {
    const uint64_t seed = random_bits(net.seed, l);
    std::vector<float> W(size_t(net.layer[l].W.rows) * net.layer[l].W.cols);
    const double deviation = std::sqrt(2.0 / net.layer[l].W.cols);  // He: the variance is 2 / in
    for (size_t i = 0; i < W.size(); i++)  // two uniform numbers make a normal one (Box and Muller)
      W[i] = float(deviation * std::sqrt(-2 * std::log(uniform(seed, 2 * i))) *
                   std::cos(6.283185307179586 * uniform(seed, 2 * i + 1)));
    set_parameters(net.layer[l], W, std::vector<float>(net.layer[l].W.rows));
  }
}

// ==== 4.1 E1: the loss ===============================================================================================
// E1 as the article has it, L = 1/2 sum (y - z)^2, and beside it softmax cross-entropy, L = -sum y log softmax(z).
// Either in fp32 from the 16-bit logits z, a thread a row. The article has no batch: here L is the mean over its rows.
template <class T> __global__ void loss_kernel(Loss kind, Matrix<T> logits, Matrix<float> targets, int rows,
                                               float* log_sum_exp, float* row_loss) {
  const int row = blockIdx.x * blockDim.x + threadIdx.x, n = logits.cols;
  if (row >= rows) return;
  const T* z = logits.row(row);
  const float* y = targets.row(row);
  float L = 0;
  //{ E1 loss
  if (kind == Loss::squared_error) {
    for (int i = 0; i < n; i++) L += 0.5f * (y[i] - to_float(z[i])) * (y[i] - to_float(z[i]));
  } else {
    float largest = to_float(z[0]), sum = 0;  // subtracted, so that exp cannot overflow
    for (int i = 1; i < n; i++) largest = to_float(z[i]) > largest ? to_float(z[i]) : largest;
    for (int i = 0; i < n; i++) sum += expf(to_float(z[i]) - largest);
    log_sum_exp[row] = largest + logf(sum);
    for (int i = 0; i < n; i++) L += y[i] != 0 ? y[i] * (log_sum_exp[row] - to_float(z[i])) : 0;
  }
  //}
  row_loss[row] = L;
}
__global__ void mean_kernel(const float* row_loss, int rows, StepState* state) {  // one block of 32, a fixed order
  __shared__ float part[32];
  poison_shared(part);
  const int thread = threadIdx.x;
  float sum = 0;
  for (int row = thread; row < rows; row += 32) sum += row_loss[row];
  part[thread] = sum;
  __syncthreads();
  if (thread > 0) return;
  for (int i = 1; i < 32; i++) sum += part[i];
  state->loss = sum / float(rows);
}
void loss(Mlp& net, LossScaler& scaler) {
  const Tensor& z = net.layer[net.L].a;
  with_type(z.type, [&](auto zero) {
    launch(loss_kernel<decltype(zero)>, rows_grid(net.rows), row_threads, net.loss, matrix<decltype(zero)>(z),
           matrix<float>(net.y), net.rows, net.log_sum_exp.as<float>(), net.row_loss.as<float>());
  });
  launch(mean_kernel, 1, 32, net.row_loss.as<float>(), net.rows, scaler.state.get());
}

// ==== 4.2.1 E2: forward, z = a W^T + b, a = f(z) =====================================================================
// Under --precision auto a layer may have another type than its neighbour (section 3.2 step 6 below):
static void convert(const Tensor& from, const Tensor& to);
static const Tensor& input_of(const Mlp& net, int l);  // a of the layer before, in this layer's type
// The article's z = W a for a batch of rows, with the bias and the activation that it leaves out. z itself is not kept:
// it is the argument of f alone, and ReLU's derivative can be read off a.
void forward(Mlp& net, int l) {
  const Layer& layer = net.layer[l];
  if (layer.input.memory) convert(net.layer[l - 1].a, layer.input);
  const Tensor a_before = first_rows(input_of(net, l), net.rows), a = first_rows(layer.a, net.rows);
  //{ E2 forward
  Epilogue bias_and_f;
  bias_and_f.bias = &layer.b;
  bias_and_f.relu = net.relu && l < net.L;
  gemm(Layout::ABt, a_before, layer.W, a, bias_and_f);
  //}
}

// ==== 4.2.2 E3, E4: backward =========================================================================================
// E3. The derivative of 1/2 (y - z)^2 is z - y (the article halves it), that of cross-entropy is softmax(z) - y; both
// divided by the batch, for L is a mean. The loss scale multiplies in fp32, before the one rounding to 16 bits: there a
// derivative up to 2^-25 would become zero.
template <class T> __global__ void output_delta_kernel(Loss kind, Matrix<T> logits, Matrix<float> targets, int rows,
                                                       const float* log_sum_exp, const StepState* state,
                                                       Matrix<T> out) {
  const int row = blockIdx.x * blockDim.x + threadIdx.x;
  if (row >= rows) return;
  const T* z = logits.row(row);
  const float* y = targets.row(row);
  T* delta = out.row(row);
  //{ E3 output delta
  for (int i = 0; i < logits.cols; i++) {
    const float prediction = kind == Loss::squared_error ? to_float(z[i]) : expf(to_float(z[i]) - log_sum_exp[row]);
    delta[i] = round_to<T>((prediction - y[i]) / float(rows) * state->scale);
  }
  //}
}
void output_delta(Mlp& net, const LossScaler& scaler) {
  const Layer& last = net.layer[net.L];
  with_type(last.type, [&](auto zero) {
    using T = decltype(zero);
    launch(output_delta_kernel<T>, rows_grid(net.rows), row_threads, net.loss, matrix<T>(last.a), matrix<float>(net.y),
           net.rows, net.log_sum_exp.as<float>(), scaler.state.get(), matrix<T>(last.delta));
  });
}

// E4. forward was z = f(z_before) W^T + b, so dL/dz_before = (dL/dz W) * f'(z_before); the article leaves f' out. f is
// ReLU: f' is 1 where a is above 0, else 0.
void backward(Mlp& net, int l) {
  const Layer &layer = net.layer[l], &before = net.layer[l - 1];
  Tensor delta = first_rows(layer.delta, net.rows), delta_before = first_rows(before.delta, net.rows);
  Tensor W = layer.W, a_before = before.a;
  if (layer.type != before.type) {  // a border: the product in fp32, so that a layer in fp32 is given no less
    const Tensor wide = first_rows(layer.wide_delta, net.rows);
    W = kept_W(layer);
    if (before.type == Type::fp32) convert(delta, wide), delta = wide;
    else a_before = layer.input, delta_before = wide;
  }
  //{ E4 backward
  Epilogue times_f_prime;
  if (net.relu) times_f_prime.mask = &a_before;
  gemm(Layout::AB, delta, W, delta_before, times_f_prime);
  //}
  if (delta_before.type != before.type) convert(delta_before, first_rows(before.delta, net.rows));
}

// ==== 4.2.3 E5: the weight gradient, dW = delta^T a, db = column sums of delta =======================================
template <class T> __global__ void column_sums_kernel(Matrix<T> delta, T* db) {  // a block for 8 columns
  __shared__ float part[column_threads][8];
  poison_shared(part);
  const int thread = threadIdx.x, col = blockIdx.x * 8;
  float sum[8] = {}, x[8];
  for (int row = thread; row < delta.rows; row += column_threads) {
    load(delta.row(row) + col, x);
    UNROLL for (int j = 0; j < 8; j++) sum[j] += x[j];
  }
  for (int j = 0; j < 8; j++) part[thread][j] = sum[j];
  __syncthreads();
  if (thread > 0) return;
  for (int i = 1; i < column_threads; i++)
    for (int j = 0; j < 8; j++) sum[j] += part[i][j];  // in a fixed order
  store(db + col, sum);
}
void weight_gradient(Mlp& net, int l) {
  const Layer& layer = net.layer[l];
  const Tensor delta = first_rows(layer.delta, net.rows), a_before = first_rows(input_of(net, l), net.rows);
  //{ E5 weight gradient
  gemm(Layout::AtB, delta, a_before, layer.dW);  // the sum over the batch is the product's own
  with_type(layer.type, [&](auto zero) {
    using T = decltype(zero);
    launch(column_sums_kernel<T>, unsigned(delta.stride / 8), column_threads, matrix<T>(delta), layer.db.as<T>());
  });
  //}
}

// ==== The matrix products behind E2, E4 and E5: the ladder ===========================================================
struct Operands {  // what a kernel needs to know of one product
  const void *A, *B, *bias, *mask;
  void* C;
  float* parts;  // [splits, M, stride_c] where K is shared out to blocks: their sums, for add_parts_kernel; else none
  int stride_a, stride_b, stride_c, stride_mask, M, N, K;
  int K_part;  // of K for a block: those from blockIdx.z * K_part on
  bool relu;
};
// The end of every product: bias, ReLU or the mask of its derivative, on n neighbouring results of one row.
template <class T, int n> __device__ __forceinline__ void finish(const Operands& p, int row, int col, float (&c)[n]) {
  float x[n];
  if (p.parts) return store(p.parts + (size_t(blockIdx.z) * p.M + row) * p.stride_c + col, c);
  if (p.bias) {
    load((const T*)p.bias + col, x);
    UNROLL for (int j = 0; j < n; j++) c[j] += x[j];
  }
  if (p.relu) {
    UNROLL for (int j = 0; j < n; j++) c[j] = c[j] < 0 ? 0 : c[j];
  }
  if (p.mask) {
    load((const T*)p.mask + size_t(row) * p.stride_mask + col, x);
    UNROLL for (int j = 0; j < n; j++) c[j] = x[j] <= 0 ? 0 : c[j];
  }
  store((T*)p.C + size_t(row) * p.stride_c + col, c);
}

// Rung 1: a thread a result. The equation itself, and the oracle for the rungs above.
template <Layout layout, class T> __global__ void gemm_naive_kernel(Operands p) {
  const int m = blockIdx.y * blockDim.y + threadIdx.y, n = blockIdx.x * blockDim.x + threadIdx.x;
  if (m >= p.M || n >= p.N) return;
  const T *A = (const T*)p.A, *B = (const T*)p.B;
  float c[1] = {};
  //{ gemm_naive
  for (int k = 0; k < p.K; k++) {
    const T a = layout == Layout::AtB ? A[size_t(k) * p.stride_a + m] : A[size_t(m) * p.stride_a + k];
    const T b = layout == Layout::ABt ? B[size_t(n) * p.stride_b + k] : B[size_t(k) * p.stride_b + n];
    c[0] += to_float(a) * to_float(b);
  }
  //}
  finish<T>(p, m, n, c);
}

// Rung 2: a block computes a tile of BM x BN results. It brings the operands BK at a time into shared memory, as floats
// and with k first, where each is read BM or BN times instead of from far away. Of the tile a thread computes THREAD_M x
// THREAD_N: `down` times `across` register tiles of ROWS x COLS, one after another. load_floats: rows x cols numbers from
// g on, [cols][rows] if transposed. Up to the next multiple of 8 what lies beyond the operand's edge becomes 0; what is
// further out is left as it is, for it reaches only sums that are not stored.
template <bool transposed, int rows, int cols, int threads, class T>
__device__ __forceinline__ void load_floats(float* tile, const T* g, int stride, int rows_left, int cols_left) {
  constexpr int tall = transposed ? load_rows : 1, wide = transposed ? 8 : load_cols;
  constexpr int pieces = rows / tall * (cols / wide), each = pieces / threads;
  static_assert(rows % tall == 0 && cols % wide == 0 && pieces % threads == 0, "every thread loads as much");
  const int thread = threadIdx.x;
  for (int n = 0; n < each; n++) {
    const int i = load_in_runs ? thread * each + n : n * threads + thread;
    const int r = i / (cols / wide) * tall, c0 = i % (cols / wide) * wide;
    for (int c = c0; c < c0 + wide && c < cols_left && r < (rows_left + 7) / 8 * 8; c += 8) {
      const T* from = g + size_t(r) * stride + c;
      float x[tall][8] = {};
      if (r + tall <= rows_left && c + 8 <= cols_left) {
        UNROLL for (int j = 0; j < tall; j++) {
          load(from + size_t(j) * stride, x[j]);
          prefetch(from + size_t(j) * stride + (transposed ? 32 : size_t(stride) * 8));  // 4 turns, or 8 rows, ahead
        }
      } else {
        UNROLL for (int e = 0; e < tall * 8; e++) {
          const int j = e / 8, k = e % 8;
          if (r + j < rows_left && c + k < cols_left) x[j][k] = to_float(from[size_t(j) * stride + k]);
        }
      }
      if constexpr (transposed) {
        float(&y)[8][tall] = transpose(x);
        UNROLL for (int j = 0; j < 8; j++) store(tile + (c + j) * rows + r, y[j]);
      } else {
        store(tile + r * cols + c, x[0]);
      }
    }
  }
}
// One array for all types and layouts, for on a CPU every OS thread has it in its stack
template <int n> __device__ __forceinline__ float* shared_floats() {
  alignas(64) __shared__ float array[n];
  poison_shared(array);
  return array;
}
template <Layout layout, class T, int BM, int BN, int BK>
__global__ void __launch_bounds__(BM / THREAD_M * (BN / THREAD_N)) gemm_tiled_kernel(Operands p) {
  constexpr int threads = BM / THREAD_M * (BN / THREAD_N), down = THREAD_M / ROWS, across = THREAD_N / COLS;
  float *const a_tile = shared_floats<BK*(BM + BN)>(), *const b_tile = a_tile + BK * BM;  // [BK][BM], [BK][BN]
  const int thread = threadIdx.x, m0 = blockIdx.y * BM, n0 = blockIdx.x * BN, k0 = blockIdx.z * p.K_part;
  const int thread_m = thread % (BM / THREAD_M) * THREAD_M, thread_n = thread / (BM / THREAD_M) * THREAD_N;
  const int M = p.M - m0, N = p.N - n0;  // rows and columns from the block's tile on
  const T* A = (const T*)p.A + (layout == Layout::AtB ? size_t(k0) * p.stride_a + m0 : size_t(m0) * p.stride_a + k0);
  const T* B = (const T*)p.B + (layout == Layout::ABt ? size_t(n0) * p.stride_b + k0 : size_t(k0) * p.stride_b + n0);
  Wide sum[down * across][ROWS][COLS / WIDE] = {};
  for (int K = p.K - k0 < p.K_part ? p.K - k0 : p.K_part; K > 0; K -= BK) {  // numbers left to sum over
    //{ gemm_tiled
    if (layout == Layout::AtB) load_floats<false, BK, BM, threads>(a_tile, A, p.stride_a, K, M);
    else load_floats<true, BM, BK, threads>(a_tile, A, p.stride_a, M, K);
    if (layout == Layout::ABt) load_floats<true, BN, BK, threads>(b_tile, B, p.stride_b, N, K);
    else load_floats<false, BK, BN, threads>(b_tile, B, p.stride_b, K, N);
    __syncthreads();  // the tiles are whole
    const int depth = K < BK ? K : BK;
    for (int piece = 0; piece < down * across; piece++) {
      const int m = thread_m + piece % down * ROWS, n = thread_n + piece / down * COLS;
      if (m >= M || n >= N) continue;
      Wide c[ROWS][COLS / WIDE];  // the piece, in registers
      UNROLL for (int i = 0; i < ROWS; i++) UNROLL for (int j = 0; j < COLS / WIDE; j++) c[i][j] = sum[piece][i][j];
      const float *a = a_tile + m, *b = b_tile + n;
      for (int k = 0; k < depth; k++, a += BM, b += BN)
        UNROLL for (int i = 0; i < ROWS; i++) UNROLL for (int j = 0; j < COLS / WIDE; j++)
            add_product(c[i][j], ((const Group<float, ROWS>*)a)->v[i], ((const Wide*)b)[j]);
      UNROLL for (int i = 0; i < ROWS; i++) UNROLL for (int j = 0; j < COLS / WIDE; j++) sum[piece][i][j] = c[i][j];
    }
    __syncthreads();  // nobody reads them any more
    A += layout == Layout::AtB ? size_t(BK) * p.stride_a : BK;
    B += layout == Layout::ABt ? BK : size_t(BK) * p.stride_b;
    //}
  }
  for (int piece = 0; piece < down * across; piece++)
    UNROLL for (int i = 0; i < ROWS; i++) UNROLL for (int j = 0; j < COLS; j += 8) {
      const int m = thread_m + piece % down * ROWS + i, n = thread_n + piece / down * COLS + j;
      float c[8];
      UNROLL for (int e = 0; e < 8; e++) c[e] = element(sum[piece][i][j / WIDE], j % WIDE + e);
      if (m < M && n < N) finish<T>(p, m0 + m, n0 + n, c);
    }
}

// Rung 3: tensor cores. A warp multiplies 16x16 by 16x8 numbers in one instruction, its operands spread over the lanes'
// registers by another, ldmatrix, from shared memory. Copies to there run ahead of the products by stages - 1 steps.
// A tile is panels of 64 x 64 numbers in rows of 128 bytes, eight chunks of 16 bytes each. Chunk c of row r lies at
// place c ^ (r % 8): so the same chunk of eight rows, which ldmatrix reads at once, comes from eight groups of banks.
constexpr int mma_threads = 128;
__device__ __forceinline__ int place(int row, int chunk) { return row * 64 + (chunk ^ (row & 7)) * 8; }

// rows x 64 numbers from g on. along: k runs along the stored rows, as in A of A B^T; else it counts them.
template <bool along, int rows, class T>
__device__ __forceinline__ void load_tile(T* tile, const T* g, int stride, int rows_left, int K) {
  UNROLL for (int n = 0; n < rows * 8 / mma_threads; n++) {
    const int i = n * mma_threads + int(threadIdx.x), panel = i / 512 * 64, r = i / 8 % 64, chunk = i % 8;
    const int y = along ? panel + r : r, x = (along ? 0 : panel) + chunk * 8;
    const int left = y < (along ? rows_left : K) ? (along ? K : rows_left) - x : 0;  // numbers that exist from here on
    const int bytes = left >= 8 ? 16 : left > 0 ? left * 2 : 0;
    copy_16_bytes_async(tile + panel * 64 + place(r, chunk), bytes ? g + size_t(y) * stride + x : g, bytes);
  }
}
// 16 x 16 numbers at (row, k) as four 8x8 matrices: the one that lanes 8 i to 8 i + 7 name lies at (8 dr, 8 dk) in them
template <bool along, class T>
__device__ __forceinline__ void load_fragment(uint32_t (&r)[4], const T* tile, int row, int k, int dr, int dk) {
  const int j = threadIdx.x % 8, panel = row / 64 * 64;
  row = row % 64 + dr * 8, k += dk * 8;
  ldmatrix_x4<!along>(r, tile + panel * 64 + (along ? place(row + j, k / 8) : place(k + j, row / 8)));
}
// Four warps, two by two; each computes BM/2 x BN/2 results in pieces of 16 x 8.
template <Layout layout, class T, int BM, int BN, int stages> __global__ void __launch_bounds__(mma_threads)
    gemm_mma_kernel(Operands p) {
  constexpr bool a_along = layout != Layout::AtB, b_along = layout == Layout::ABt;
  constexpr int MS = BM / 32, NS = BN / 32;  // squares of 16 x 16 in a warp's part
  alignas(128) __shared__ T tiles[stages][(BM + BN) * 64];
  poison_shared(tiles);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, wm = warp / 2 * (BM / 2), wn = warp % 2 * (BN / 2);
  const int m0 = blockIdx.y * BM, n0 = blockIdx.x * BN, k0 = blockIdx.z * p.K_part, M = p.M - m0, N = p.N - n0;
  const int K = p.K - k0 < p.K_part ? p.K - k0 : p.K_part, steps = (K + 63) / 64;
  const T* A = (const T*)p.A + (a_along ? size_t(m0) * p.stride_a + k0 : size_t(k0) * p.stride_a + m0);
  const T* B = (const T*)p.B + (b_along ? size_t(n0) * p.stride_b + k0 : size_t(k0) * p.stride_b + n0);
  const auto load_step = [&](int step) {
    T* tile = tiles[step % stages];
    const size_t k = size_t(step) * 64;
    if (step < steps) {
      load_tile<a_along, BM>(tile, A + (a_along ? k : k * p.stride_a), p.stride_a, M, K - step * 64);
      load_tile<b_along, BN>(tile + BM * 64, B + (b_along ? k : k * p.stride_b), p.stride_b, N, K - step * 64);
    }
    copy_commit();
  };
  float d[MS][2 * NS][4] = {};
  for (int step = 0; step < stages - 1; step++) load_step(step);
  for (int step = 0; step < steps; step++) {
    copy_wait<stages - 2>();  // this thread's copies of this step have arrived,
    __syncthreads();          // everyone's have, and nobody reads the tile that is loaded next
    load_step(step + stages - 1);
    const T *a_tile = tiles[step % stages], *b_tile = a_tile + BM * 64;
    //{ gemm_mma
    UNROLL for (int k = 0; k < 64; k += 16) {
      uint32_t a[MS][4], b[NS][4];
      UNROLL for (int m = 0; m < MS; m++) load_fragment<a_along>(a[m], a_tile, wm + m * 16, k, lane / 8 % 2, lane / 16);
      UNROLL for (int n = 0; n < NS; n++) load_fragment<b_along>(b[n], b_tile, wn + n * 16, k, lane / 16, lane / 8 % 2);
      UNROLL for (int m = 0; m < MS; m++) UNROLL for (int n = 0; n < 2 * NS; n++)
          mma_16x8x16<T>(d[m][n], a[m], b[n / 2] + n % 2 * 2);
    }
    //}
  }
  UNROLL for (int m = 0; m < MS; m++) UNROLL for (int n = 0; n < 2 * NS; n++) UNROLL for (int i = 0; i < 4; i += 2) {
    const int row = wm + m * 16 + lane / 4 + i * 4, col = wn + n * 8 + lane % 4 * 2;
    float c[2] = {d[m][n][i], d[m][n][i + 1]};
    if (row < M && n0 + col < p.stride_c) finish<T>(p, m0 + row, n0 + col, c);  // the padding gets zeros
  }
}

// Where a product has too few tiles to fill a GPU, blocks share its K; then their sums are added in a fixed order.
template <class T> __global__ void add_parts_kernel(Operands p, int splits) {
  const float* parts = p.parts;
  p.parts = nullptr;
  const Share share = my_share(p.M * p.stride_c);
  for (int i = share.begin; i < share.end; i += share.step) {
    float sum[8] = {}, x[8];
    for (int z = 0; z < splits; z++) {
      load(parts + size_t(z) * p.M * p.stride_c + i, x);
      UNROLL for (int j = 0; j < 8; j++) sum[j] += x[j];
    }
    finish<T>(p, i / p.stride_c, i % p.stride_c, sum);
  }
}
static float* room_for_parts(size_t count);
template <class T, int BM, int BN, int BK>
static void launch_split(void (*kernel)(Operands), Operands p, int threads, int splits) {
  dim3 grid(unsigned(p.N + BN - 1) / BN, unsigned(p.M + BM - 1) / BM);
  const int steps = (p.K + BK - 1) / BK, busy = multiprocessors() / int(grid.x * grid.y);
  if (splits < 1) splits = std::min(busy, steps / 2);
  p.K_part = (steps + std::max(splits, 1) - 1) / std::max(splits, 1) * BK;
  grid.z = unsigned(p.K + p.K_part - 1) / p.K_part;
  if (grid.z > 1) p.parts = room_for_parts(size_t(grid.z) * p.M * p.stride_c);
  launch(kernel, grid, threads, p);
  if (grid.z > 1) launch_elements(add_parts_kernel<T>, p.M * p.stride_c, p, int(grid.z));
}

static Operands operands(Layout layout, const Tensor& A, const Tensor& B, const Tensor& C, const Epilogue& e) {
  const int K = layout == Layout::AtB ? A.rows : A.cols;
  const bool a_fits = (layout == Layout::AtB ? A.cols : A.rows) == C.rows;
  const bool b_fits = layout == Layout::ABt ? B.rows == C.cols && B.cols == K : B.cols == C.cols && B.rows == K;
  const bool bias_fits = !e.bias || e.bias->cols == C.cols;
  const bool mask_fits = !e.mask || (e.mask->rows >= C.rows && e.mask->cols == C.cols);
  if (!a_fits || !b_fits || !bias_fits || !mask_fits || K < 1)
    fail("a matrix product of [%d, %d] and [%d, %d] does not fit into [%d, %d], its bias or its mask", A.rows, A.cols,
         B.rows, B.cols, C.rows, C.cols);
  if (A.type != C.type || B.type != C.type || (e.bias && e.bias->type != C.type) || (e.mask && e.mask->type != C.type))
    fail("a matrix product of different types");
  Operands p = {};
  p.A = A.memory.get(), p.B = B.memory.get(), p.C = C.memory.get();
  p.stride_a = A.stride, p.stride_b = B.stride, p.stride_c = C.stride;
  p.M = C.rows, p.N = C.cols, p.K = p.K_part = K, p.relu = e.relu;
  if (e.bias) p.bias = e.bias->memory.get();
  if (e.mask) p.mask = e.mask->memory.get(), p.stride_mask = e.mask->stride;
  return p;
}
// Calls f with the layout as a type, so that kernels know it when they are compiled.
template <class F> void with_layout(Layout layout, F f) {
  if (layout == Layout::ABt) f(std::integral_constant<Layout, Layout::ABt>());
  else if (layout == Layout::AB) f(std::integral_constant<Layout, Layout::AB>());
  else f(std::integral_constant<Layout, Layout::AtB>());
}
void gemm_naive(Layout layout, const Tensor& A, const Tensor& B, const Tensor& C, const Epilogue& epilogue) {
  const Operands p = operands(layout, A, B, C, epilogue);
  const dim3 grid(unsigned(p.N + 15) / 16, unsigned(p.M + 15) / 16), block(16, 16);
  with_type(C.type, [&](auto zero) {
    with_layout(layout, [&](auto known) { launch(gemm_naive_kernel<known.value, decltype(zero)>, grid, block, p); });
  });
}
void gemm_tiled(Layout layout, const Tensor& A, const Tensor& B, const Tensor& C, const Epilogue& epilogue,
                int splits) {
  const Operands p = operands(layout, A, B, C, epilogue);
  // Where they keep every core busy, and have rows enough. The sums are the same, in the same order.
  const bool large = p.M > SMALL_M && int64_t(p.M) * p.N >= int64_t(cores()) * LARGE_M * LARGE_N;
  with_type(C.type, [&](auto zero) {
    with_layout(layout, [&](auto known) {
      using T = decltype(zero);
      constexpr int per_thread = THREAD_M * THREAD_N;
      if (large)
        launch_split<T, LARGE_M, LARGE_N, DEPTH>(gemm_tiled_kernel<known.value, T, LARGE_M, LARGE_N, DEPTH>, p,
                                                 LARGE_M * LARGE_N / per_thread, splits);
      else
        launch_split<T, SMALL_M, SMALL_N, DEPTH>(gemm_tiled_kernel<known.value, T, SMALL_M, SMALL_N, DEPTH>, p,
                                                 SMALL_M * SMALL_N / per_thread, splits);
    });
  });
}
bool tensor_cores(Type type) {
  return compute_capability() >= (type == Type::fp16 ? 75 : type == Type::bf16 ? 80 : INT_MAX);
}
void gemm_mma(Layout layout, const Tensor& A, const Tensor& B, const Tensor& C, const Epilogue& epilogue, int splits) {
  const Operands p = operands(layout, A, B, C, epilogue);
  if (!tensor_cores(C.type)) fail("tensor cores multiply fp16 from sm_75 on, bf16 from sm_80 on; gemm_tiled all types");
  const bool large = int64_t(p.M) * p.N >= int64_t(multiprocessors()) * 128 * 64;
  const auto multiply = [&](auto zero) {
    with_layout(layout, [&](auto known) {
      using T = decltype(zero);
      if (large) launch_split<T, 128, 64, 64>(gemm_mma_kernel<known.value, T, 128, 64, 2>, p, mma_threads, splits);
      else launch_split<T, 64, 64, 64>(gemm_mma_kernel<known.value, T, 64, 64, 3>, p, mma_threads, splits);
    });
  };
  C.type == Type::fp16 ? multiply(half{}) : multiply(bfloat16{});
}
// The rung that training climbs to.
void gemm(Layout layout, const Tensor& A, const Tensor& B, const Tensor& C, const Epilogue& epilogue) {
  static const char* const wanted = std::getenv("MP_GEMM");
  static const std::string rung = wanted ? wanted : real_tensor_cores ? "mma" : "tiled";
  if (rung == "naive") gemm_naive(layout, A, B, C, epilogue);
  else if (rung == "mma" && tensor_cores(C.type)) gemm_mma(layout, A, B, C, epilogue);
  else if (rung == "mma" || rung == "tiled") gemm_tiled(layout, A, B, C, epilogue);
  else fail("MP_GEMM=%s: must be naive, tiled or mma", wanted);
}

// ==== 3.1 Loss scaling ===============================================================================================
// Box G: from a gradient times the loss scale to the gradient, in fp32, where it cannot vanish again. Whether it is
// finite is asked before: an inf must not be divided away.
__device__ __forceinline__ float unscaled(float scaled_gradient, float inverse_scale, int& found_inf) {
  float gradient = 0;
  //{ unscale_and_check
  found_inf |= !(fabsf(scaled_gradient) <= 3.40282347e38f);  // written so that NaN, too, is found
  gradient = scaled_gradient * inverse_scale;
  //}
  return gradient;
}
// This kernel only looks, at all gradients, before update_kernel multiplies any of them.
template <class T> __global__ void check_kernel(const T* gradients, int n, StepState* state) {
  int found_inf[8] = {};
  const Share share = my_share(n);
  for (int i = share.begin; i < share.end; i += share.step) {
    float g[8];
    load(gradients + i, g);
    UNROLL for (int j = 0; j < 8; j++) unscaled(g[j], 1, found_inf[j]);
  }
  for (int j = 0; j < 8; j++)
    if (found_inf[j]) atomicOr(&state->found_inf, 1);
}
void unscale_and_check(Mlp& net, LossScaler& scaler) {
  for (int l = 1; l <= net.L; l++) {
    const Tensor& gradients = net.layer[l].gradients;
    with_type(gradients.type, [&](auto zero) {
      using T = decltype(zero);
      launch_elements(check_kernel<T>, gradients.cols, gradients.as<T>(), gradients.cols, scaler.state.get());
    });
  }
}

// The scaler: after every step the next scale, exactly as torch.amp.GradScaler.update().
__global__ void scaler_kernel(StepState* state, StepRecord* history, float growth, float backoff, int interval) {
  StepState s = *state;
  if (s.halted) return;
  if (history) history[s.position] = {s.loss, s.scale, s.found_inf};
  if (s.found_inf) s.skipped++;
  //{ loss_scaling
  if (s.found_inf) {
    s.scale *= backoff;
    s.growth_tracker = 0;
  } else if (++s.growth_tracker == interval) {
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
  s.found_inf = 0, s.position++, s.step++;
  *state = s;
}
void LossScaler::update() { launch(scaler_kernel, 1, 1, state.get(), history.get(), growth, backoff, interval); }

// ==== 3.2 step 5: the update =========================================================================================
// The article's error correction (3.1). lr g is often less than half a unit in the last place of a 16-bit w; then
// w - lr g rounds to w, and nothing is learnt. Four ways to add it up, and the bytes a weight they keep:
//   master      6  an fp32 sum, of which the 16-bit weights are a rounded copy
//   half        2  w itself, rounded to nearest: what goes wrong without the others
//   kahan       4  w, and what the rounding lost in a second 16-bit number (Kahan 1965; arXiv 2010.06192)
//   stochastic  2  w, rounded up or down by chance, so that it is right on average
template <class T> __device__ __forceinline__ float rounded(float x) { return to_float(round_to<T>(x)); }
__host__ __device__ half stochastic_half(float x, uint64_t random) {
  const uint32_t sign = bits_of(x) >> 16 & 0x8000, u = bits_of(x) & 0x7fffffff;
  const int exponent = int(u >> 23) - 127;
  if (u >= 0x477fe000 || u < 0x800000)
    return float_to_half(x);  // from 65504 on there is no upper neighbour; 0 is exact
  uint32_t h = 0;
  //{ stochastic_rounding
  const int dropped = exponent >= -14 ? 13 : exponent > -64 ? -1 - exponent : 63;
  const uint64_t significand = (u & 0x7fffff) | 0x800000, below = (uint64_t(1) << dropped) - 1;
  h = uint32_t((significand + (random & below)) >> dropped);  // the dropped bits carry as often as they are large
  if (exponent >= -14) h += uint32_t(exponent + 14) << 10;
  //}
  return half{uint16_t(sign | h)};
}
__host__ __device__ bfloat16 stochastic_bfloat16(float x, uint64_t random) {
  const uint32_t u = bits_of(x);
  if ((u & 0x7fffffff) >= 0x7f7f0000) return float_to_bfloat16(x);
  return bfloat16{uint16_t((u + uint32_t(random & 0xffff)) >> 16)};
}
__device__ __forceinline__ float stochastic(half, float x, uint64_t random) {
  return to_float(stochastic_half(x, random));
}
__device__ __forceinline__ float stochastic(bfloat16, float x, uint64_t random) {
  return to_float(stochastic_bfloat16(x, random));
}
__device__ __forceinline__ float stochastic(float, float x, uint64_t) { return x; }

template <class T> __global__ void update_kernel(Update rule, float* master, T* weights, T* compensation,
                                                 const T* gradients, int n, float lr, uint64_t seed,
                                                 const StepState* state) {
  if (state->found_inf) return;  // one bad gradient skips the whole step
  const Share share = my_share(n);
  const float inverse_scale = float(1 / double(state->scale));
  const uint64_t step_seed = random_bits(seed, state->step);
  for (int i = share.begin; i < share.end; i += share.step) {
    int checked_before = 0;
    float g[8], w[8], c[8];
    load(gradients + i, g);
    UNROLL for (int j = 0; j < 8; j++) g[j] = unscaled(g[j], inverse_scale, checked_before);
    if (rule == Update::master) {
      load(master + i, w);
      //{ update_master
      UNROLL for (int j = 0; j < 8; j++) w[j] -= lr * g[j];
      store(master + i, w);
      //}
    } else if (rule == Update::kahan) {
      load(weights + i, w), load(compensation + i, c);
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
        if (rule == Update::stochastic) w[j] = stochastic(T{}, w[j], random_bits(step_seed, uint64_t(i + j)));
      }
    }
    if (sizeof(T) < 4 || rule != Update::master) store(weights + i, w);  // fp32 weights are the master
  }
}
void update(Mlp& net, LossScaler& scaler, float lr) {
  for (int l = 1; l <= net.L; l++) {
    const Layer& layer = net.layer[l];
    with_type(layer.type, [&](auto zero) {
      using T = decltype(zero);
      launch_elements(update_kernel<T>, layer.weights.cols, net.update, layer.master.as<float>(), layer.weights.as<T>(),
                      layer.compensation.as<T>(), layer.gradients.as<T>(), layer.weights.cols, lr,
                      random_bits(net.seed, net.L + l), scaler.state.get());
    });
  }
}

// ==== Device memory, and a network in it =============================================================================
void fail(const char* format, ...) {
  char text[1000] = "";
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  for (char& c : text)  // names from a file may hold line ends and what moves a terminal's cursor
    if (c == 127 || (c && uint8_t(c) < ' ')) c = '?';
  throw Error(text);
}
__attribute__((format(printf, 1, 2))) static std::string format(const char* words, ...) {
  char text[600];
  va_list arguments;
  va_start(arguments, words);
  vsnprintf(text, sizeof text, words, arguments);
  va_end(arguments);
  return text;
}

#define CHECK(call) check(call, #call, __FILE__, __LINE__)
void check(cudaError_t error, const char* call, const char* file, int line) {
  if (error == cudaSuccess) return;
  fail(
      "the device failed: %s (%s:%d: %s); what --save wrote last is whole: go on from it with --resume; "
      "compute-sanitizer before the same command names the kernel",
      cudaGetErrorString(error), file, line, call);
}
template <class T> static std::shared_ptr<T> device_array(size_t count) {
  const size_t bytes = std::max(count * sizeof(T), size_t(1));
  void* p = nullptr;
  const cudaError_t error = cudaMalloc(&p, bytes);
  if (error == cudaErrorMemoryAllocation)
    fail("out of memory: no room for another %.1f MiB; make --batch or --layers smaller", double(bytes) / (1 << 20));
  CHECK(error);
  CHECK(cudaMemset(p, 0, bytes));
  return std::shared_ptr<T>(static_cast<T*>(p), [](T* memory) { cudaFree(memory); });
}
template <class T> static std::shared_ptr<T> on_device(const std::vector<T>& values) {
  const std::shared_ptr<T> memory = device_array<T>(values.size());
  CHECK(cudaMemcpy(memory.get(), values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
  return memory;
}

// For the sums of launch_split(): as much as the largest product has asked for. Recorded steps may point to older rooms.
static float* room_for_parts(size_t count) {
  static std::vector<std::shared_ptr<float>> rooms;
  static size_t size = 0;
  if (count > size) rooms.push_back(device_array<float>(count)), size = count;
  return rooms.back().get();
}
static int padded(int cols) { return (cols + 7) / 8 * 8; }
Tensor make_tensor(int rows, int cols, Type type) {
  if (rows < 1 || cols < 1 || (int64_t(cols) + 7) * rows > 1 << 30)  // kernels index with ints
    fail("[%d, %d] is no size for a tensor: both at least 1, and at most 2^30 numbers in all", rows, cols);
  Tensor t{rows, cols, padded(cols), type, nullptr};
  t.memory = device_array<char>(t.bytes());
  return t;
}
Tensor first_rows(const Tensor& t, int rows) { return {rows, t.cols, t.stride, t.type, t.memory}; }
// [rows, cols] of the numbers of a flat tensor, from number `first` on
static Tensor part_of(const Tensor& flat, int first, int rows, int cols) {
  char* const begin = flat.memory.get() + size_t(first) * (flat.type == Type::fp32 ? 4 : 2);
  return {rows, cols, padded(cols), flat.type, {flat.memory, begin}};
}
std::vector<float> to_host(const Tensor& t) {
  std::vector<uint32_t> raw(t.bytes() / 4);
  CHECK(cudaMemcpy(raw.data(), t.memory.get(), t.bytes(), cudaMemcpyDeviceToHost));
  const uint16_t* raw_16 = reinterpret_cast<const uint16_t*>(raw.data());
  std::vector<float> values;
  for (int row = 0; row < t.rows; row++)
    for (int i = row * t.stride; i < row * t.stride + t.cols; i++)
      values.push_back(t.type == Type::fp32   ? float_of(raw[i])
                       : t.type == Type::fp16 ? half_to_float(half{raw_16[i]})
                                              : bfloat16_to_float(bfloat16{raw_16[i]}));
  return values;
}
void to_device(const std::vector<float>& values, const Tensor& t) {
  if (values.size() != size_t(t.rows) * t.cols)
    fail("%zu numbers do not fill a tensor of [%d, %d]", values.size(), t.rows, t.cols);
  std::vector<uint32_t> raw(t.bytes() / 4);
  uint16_t* raw_16 = reinterpret_cast<uint16_t*>(raw.data());
  for (int row = 0; row < t.rows; row++)
    for (int col = 0; col < t.cols; col++) {
      const float x = values[size_t(row) * t.cols + col];
      const int i = row * t.stride + col;
      if (t.type == Type::fp32) raw[i] = bits_of(x);
      else raw_16[i] = t.type == Type::fp16 ? float_to_half(x).bits : float_to_bfloat16(x).bits;
    }
  CHECK(cudaMemcpy(t.memory.get(), raw.data(), t.bytes(), cudaMemcpyHostToDevice));
}

// Each layer anew in its type; the compute copies are the masters, rounded. Layer 0, the input, has layer 1's.
void set_types(Mlp& net, const std::vector<Type>& types) {
  for (int l = 0; l <= net.L; l++) {
    Layer& layer = net.layer[l];
    const int out = layer.a.cols;
    layer.type = types[l > 0 ? l - 1 : 0];
    layer.a = make_tensor(net.batch, out, layer.type);
    if (l == 0) continue;
    const int in = net.layer[l - 1].a.cols, W_size = out * padded(in), n = W_size + padded(out);
    if (net.update == Update::master && !layer.master.memory) layer.master = make_tensor(1, n, Type::fp32);
    if (net.update == Update::kahan) layer.compensation = make_tensor(1, n, layer.type);
    layer.delta = make_tensor(net.batch, out, layer.type);
    layer.gradients = make_tensor(1, n, layer.type);
    layer.weights = layer.type == Type::fp32 ? layer.master : make_tensor(1, n, layer.type);
    layer.W = part_of(layer.weights, 0, out, in), layer.b = part_of(layer.weights, W_size, 1, out);
    layer.dW = part_of(layer.gradients, 0, out, in), layer.db = part_of(layer.gradients, W_size, 1, out);
    if (layer.type != Type::fp32 && layer.master.memory) convert(layer.master, layer.weights);
    layer.input = layer.wide_delta = Tensor();
    if (layer.type == net.layer[l - 1].type) continue;
    layer.input = make_tensor(net.batch, in, layer.type);
    layer.wide_delta = make_tensor(net.batch, layer.type == Type::fp32 ? in : out, Type::fp32);
  }
}
Mlp make_mlp(const std::vector<int>& sizes, int batch, Type type, Update update) {
  if (sizes.size() < 2) fail("a network needs at least an input and an output layer");
  if (type == Type::fp32 && update != Update::master) fail("fp32 weights lose nothing in an update: master is theirs");
  Mlp net;
  net.L = int(sizes.size()) - 1, net.batch = net.rows = batch, net.update = update;
  net.layer.resize(sizes.size());
  for (int l = 0; l <= net.L; l++) {
    const int in = l > 0 ? sizes[l - 1] : 0, out = net.layer[l].a.cols = sizes[l];
    if ((int64_t(in) + 8) * out > 1 << 30) fail("a layer of %d x %d has more than 2^30 weights", out, in);
    if (std::max(l > 0 ? out : 0, batch) > 1000000)
      fail("a layer or a batch of more than 1,000,000");  // a CUDA grid is 65535 high
  }
  set_types(net, std::vector<Type>(net.L, type));
  net.y = make_tensor(batch, sizes.back(), Type::fp32);
  net.row_loss = make_tensor(1, batch, Type::fp32), net.log_sum_exp = make_tensor(1, batch, Type::fp32);
  return net;
}
Footprint footprint(const Mlp& net) {
  Footprint bytes;
  const auto size = [](const Tensor& t) { return t.memory ? t.bytes() : 0; };
  for (const Layer& layer : net.layer) {
    if (layer.master.memory != layer.weights.memory) bytes.master += size(layer.master);
    bytes.weights += size(layer.weights), bytes.compensation += size(layer.compensation);
    bytes.activations += size(layer.a) + size(layer.input);
    bytes.gradients += size(layer.delta) + size(layer.wide_delta) + size(layer.gradients);
  }
  return bytes;
}
// The parameters as they are kept: the master, or the weights where there is none
static const Tensor& kept(const Layer& layer) { return layer.master.memory ? layer.master : layer.weights; }
Tensor kept_W(const Layer& layer) { return part_of(kept(layer), 0, layer.W.rows, layer.W.cols); }
Tensor kept_b(const Layer& layer) { return part_of(kept(layer), layer.W.rows * layer.W.stride, 1, layer.W.rows); }
void set_parameters(Layer& layer, const std::vector<float>& W, const std::vector<float>& b) {
  to_device(W, kept_W(layer)), to_device(b, kept_b(layer));
  to_device(W, layer.W), to_device(b, layer.b);
}

LossScaler::LossScaler(float scale, float growth_, float backoff_, int interval_)
    : growth(growth_), backoff(backoff_), interval(interval_), state(device_array<StepState>(1)) {
  write(StepState{scale});
}
StepState LossScaler::read() const {
  StepState s;
  CHECK(cudaMemcpy(&s, state.get(), sizeof s, cudaMemcpyDeviceToHost));
  return s;
}
void LossScaler::write(const StepState& s) { CHECK(cudaMemcpy(state.get(), &s, sizeof s, cudaMemcpyHostToDevice)); }

// ==== 3.2 step 6: evaluation and dynamic precision ===================================================================
// Box H, the output: forward alone, with the 16-bit weights that training uses, and the largest logit wins.
std::vector<float> logits(Mlp& net, const std::vector<uint8_t>& pixels) {
  const size_t in = size_t(net.layer[0].a.cols), count = pixels.size() / in;
  const std::shared_ptr<uint8_t> bytes = on_device(pixels);
  std::vector<float> all;
  for (size_t first = 0; first < count; first += size_t(net.batch)) {
    Batch batch;
    batch.pixels = bytes.get() + first * in;
    batch.rows = int(std::min(size_t(net.batch), count - first));
    preprocess(net, batch, nullptr);
    for (int l = 1; l <= net.L; l++) forward(net, l);
    const std::vector<float> z = to_host(first_rows(net.layer[net.L].a, batch.rows));
    all.insert(all.end(), z.begin(), z.end());
  }
  return all;
}
std::vector<int> predict(Mlp& net, const std::vector<uint8_t>& pixels) {
  const std::vector<float> all = logits(net, pixels);
  const int classes = net.layer[net.L].a.cols;
  std::vector<int> answer;
  for (const float* z = all.data(); z < all.data() + all.size(); z += classes)
    answer.push_back(int(std::max_element(z, z + classes) - z));
  return answer;
}

// Each layer has a type of its own. Where it is not the one before's, what passes between them is converted.
template <class From, class To> __global__ void convert_kernel(const From* from, To* to, int n) {
  const Share share = my_share(n);
  for (int i = share.begin; i < share.end; i += share.step) {
    float x[8];
    load(from + i, x);
    store(to + i, x);
  }
}
static void convert(const Tensor& from, const Tensor& to) {  // of one shape
  const int n = from.rows * from.stride;
  with_type(from.type, [&](auto x) {
    with_type(to.type, [&](auto y) {
      using From = decltype(x);
      using To = decltype(y);
      launch_elements(convert_kernel<From, To>, n, from.as<From>(), to.as<To>(), n);
    });
  });
}
static const Tensor& input_of(const Mlp& net, int l) {
  return net.layer[l].input.memory ? net.layer[l].input : net.layer[l - 1].a;
}
// Dynamic precision. The article adjusts the shares of 16 and 32 bits by the loss of precision seen, and gives no
// method. Here: once an epoch a batch goes forward and backward in fp32 throughout (probe), the exponents of what it
// leaves are counted, and a layer whose numbers fp16 cannot hold (trouble) moves to fp32 until that is over.
void Exponents::add(const Tensor& t, double factor) {
  for (const float value : to_host(t)) {
    const float x = float(std::fabs(value * factor));
    if (x == 0) zeros++;
    else if (!(x < 65520)) overflow++;  // what fp16 rounds to infinity; NaN too
    else count[std::max(int(bits_of(x) >> 23) - 127, lowest) - lowest]++;
  }
}
int64_t Exponents::between(int from, int to) const {  // numbers of 2^from to 2^to, without it
  int64_t sum = 0;
  for (int i = std::max(from - lowest, 0); i < std::min(to - lowest, size); i++) sum += count[i];
  return sum;
}
std::vector<Probe> probe(const Mlp& net, const Batch& batch, float scale) {
  std::vector<int> sizes;
  for (const Layer& layer : net.layer) sizes.push_back(layer.a.cols);
  Mlp wide = make_mlp(sizes, batch.rows, Type::fp32, Update::master);
  wide.relu = net.relu, wide.loss = net.loss;
  for (int l = 1; l <= net.L; l++) convert(kept(net.layer[l]), wide.layer[l].weights);
  LossScaler scaler(scale);
  preprocess(wide, batch, nullptr);
  for (int l = 1; l <= net.L; l++) forward(wide, l);
  loss(wide, scaler), output_delta(wide, scaler);
  std::vector<Probe> seen(net.layer.size());
  for (int l = net.L; l >= 0; l--) {
    seen[l].a.add(wide.layer[l].a);
    if (l == 0) break;
    weight_gradient(wide, l);
    if (l > 1) backward(wide, l);
    seen[l].delta.add(wide.layer[l].delta), seen[l].dW.add(wide.layer[l].dW);
  }
  return seen;
}
// The rule: why layer l needs fp32, or "". An input or activation that fp16 cannot hold ruins every step, and so does an
// infinite gradient under a fixed scale (a dynamic one halves itself, which costs a step). Small gradients are lost one by
// one. Of dW count those that would become 0 or lose bits, below 2^-14; of delta, whose errors average out in dW's sum,
// only those that would become 0. The limit, 50 %: 15 epochs of data/ with a dynamic scale show up to 3 and 9 %, and fp16
// learns as well as fp32; MNIST at a scale of 2^-16, where it does not, shows 100 and 70 % and more.
std::string trouble(const std::vector<Probe>& seen, int l, bool dynamic, double limit, int headroom) {
  std::string text;
  const auto overflow = [&](const char* what, const Exponents& e) {
    const int64_t n = e.overflow + e.between(16 - headroom, 16);
    if (text.empty() && n) text = format("%lld of its %s overflow", (long long)n, what);
  };
  const auto vanish = [&](const char* what, const Exponents& e, int below) {
    const double share = double(e.between(Exponents::lowest, below)) / double(std::max<int64_t>(e.nonzero(), 1));
    const char* lost = below < -14 ? "0" : "0 or subnormal";
    if (text.empty() && share > limit) text = format("%.0f%% of its %s would be %s", 100 * share, what, lost);
  };
  overflow("inputs", seen[l - 1].a), overflow("activations", seen[l].a);
  if (!dynamic) overflow("deltas", seen[l].delta), overflow("weight gradients", seen[l].dW);
  vanish("weight gradients", seen[l].dW, -14), vanish("deltas", seen[l].delta, -25);
  return text;
}

// ==== 4.3, 5.2 The example: 1-5-1 ====================================================================================
// The article's listing as it was meant: inputs 1, hidden 5, output 1 (one hidden layer: the article counts two), E1,
// SGD 0.01, 100 epochs, a GradScaler; the data that it leaves undefined are points of y = x^2. Written as in the
// article, without an activation, the network is one linear map, and the best line through this parabola is flat.
static std::vector<float> learn_parabola(bool relu, std::vector<float>& epoch_loss) {
  const int n = 256, batch_rows = 4, epochs = 100;
  std::vector<float> x, y;
  std::vector<int> order;
  for (int i = 0; i < n; i++) x.push_back(-1 + 2 * (i + 0.5f) / n), y.push_back(x.back() * x.back());
  // Of all epochs. 101 and 256 have no common factor: each has every point once, neighbours far apart.
  for (int i = 0; i < n * epochs; i++) order.push_back(i * 101 % n);
  Mlp net = make_mlp({1, 5, 1}, batch_rows, Type::fp16, Update::master);
  net.relu = relu, net.loss = Loss::squared_error;
  initialise(net);
  LossScaler scaler;
  const auto x_device = on_device(x), y_device = on_device(y);
  const auto order_device = on_device(order);
  Batch batch{nullptr, nullptr, x_device.get(), y_device.get(), order_device.get(), batch_rows};
  for (int epoch = 0; epoch < epochs; epoch++) {
    double sum = 0;
    for (int step = 0; step < n / batch_rows; step++) train_step(net, batch, scaler, 0.01f), sum += scaler.read().loss;
    epoch_loss.push_back(float(sum / (n / batch_rows)));
  }
  std::vector<float> answer;
  batch.y = nullptr, batch.order = nullptr;
  for (int i = 0; i < n; i += batch_rows) {
    batch.x = x_device.get() + i;
    preprocess(net, batch, nullptr);
    for (int l = 1; l <= net.L; l++) forward(net, l);
    for (float z : to_host(net.layer[2].a)) answer.push_back(z);
  }
  return answer;
}
static int article() {
  std::vector<float> line_loss, relu_loss;
  const std::vector<float> line = learn_parabola(false, line_loss), relu = learn_parabola(true, relu_loss);
  printf("%s · 1-5-1 · fp16, fp32 master, dynamic loss scale · E1, SGD 0.01, 256 points of y = x^2, batch 4\n\n",
         machine().c_str());
  printf("  epoch  loss without activation  loss with ReLU\n");
  for (int epoch : {1, 3, 10, 30, 100})
    printf("%7d  %23.5f  %14.5f\n", epoch, line_loss[epoch - 1], relu_loss[epoch - 1]);
  printf("\n      x     x^2  without activation  with ReLU\n");
  for (int i = 0; i < 256; i += 17) {
    const float x = -1 + 2 * (i + 0.5f) / 256;
    printf("%7.3f  %6.3f  %18.3f  %9.3f\n", x, x * x, line[i], relu[i]);
  }
  return 0;
}

// stb_image allocates whatever a file asks for, so its caller says first how large one allocation may be.
static size_t stb_most = 0;  // bytes
static void* stb_resize(void* old, size_t bytes) { return bytes <= stb_most ? std::realloc(old, bytes) : nullptr; }
#define STBI_MALLOC(bytes) stb_resize(nullptr, bytes)
#define STBI_REALLOC(old, bytes) stb_resize(old, bytes)
#define STBI_FREE(old) std::free(old)
#define STBI_ONLY_PNG
#define STBI_ONLY_JPEG
#define STBI_NO_STDIO
#define STB_IMAGE_IMPLEMENTATION
#include <stb/stb_image.h>

// ==== 5.1 Data: sheets of digits, or MNIST's four files ==============================================================
using Bytes = std::vector<uint8_t>;
Bytes read_file(const std::string& path) {
  struct stat info;
  if (stat(path.c_str(), &info) != 0) fail("%s: %s; check the name", path.c_str(), strerror(errno));
  if (!S_ISREG(info.st_mode))
    fail("%s: this is a %s; name a file", path.c_str(), S_ISDIR(info.st_mode) ? "folder" : "device or a pipe");
  if (info.st_size > INT_MAX) fail("%s: 2 GB or more, which no file for mp has; name another", path.c_str());
  Bytes bytes(size_t(info.st_size));
  errno = EIO;  // stays if the file got shorter meanwhile
  if (!std::ifstream(path, std::ios::binary).read(reinterpret_cast<char*>(bytes.data()), info.st_size))
    fail("%s: cannot be read: %s; check its permissions", path.c_str(), strerror(errno));
  return bytes;
}
// parse(bytes of the file); it fails without the file's name, which is put before its message, and the advice after.
template <class F> static auto parse_file(const std::string& path, const char* advice, F parse) {
  const Bytes bytes = read_file(path);
  try {
    return parse(bytes);
  } catch (const Error& error) {
    fail("%s: %s; %s", path.c_str(), error.what(), advice);
  } catch (const std::bad_alloc&) {
    fail("%s: out of memory; take a smaller file", path.c_str());
  }
}

// The file to write, where a link leads; fails if it cannot be. Also before training, rather than after an hour of it.
static std::string check_can_save(const std::string& path) {
  struct stat info;
  if (stat(path.c_str(), &info) == 0 && !S_ISREG(info.st_mode))
    fail("%s: this is a folder, a device or a pipe; name a file to save to", path.c_str());
  std::error_code missing;
  const std::string there = std::filesystem::canonical(path, missing).string(), target = missing ? path : there;
  const auto folder = std::filesystem::path(target).parent_path() / ".";
  const auto writable = [](const std::string& f) { return access(f.c_str(), W_OK) == 0 || errno == ENOENT; };
  if (access(folder.c_str(), W_OK | X_OK) != 0 || !writable(target) || !writable(target + ".unfinished"))
    fail("%s: cannot be saved: %s; make its folder first, or save elsewhere", path.c_str(), strerror(errno));
  return target;
}
// All who write to one path take turns under one temporary name. The lock dies with its owner, and what a killed one left
// behind is written over.
static FILE* open_temporary(const std::string& path) {
  for (;;) {
    const int number = open(path.c_str(), O_RDWR | O_CREAT | O_NOFOLLOW | O_CLOEXEC, 0666);
    if (number < 0) return nullptr;
    struct stat mine, there;
    const bool locked = flock(number, LOCK_EX) == 0 || errno == ENOTSUP || errno == ENOLCK;
    if (locked && fstat(number, &mine) == 0 && stat(path.c_str(), &there) == 0 && mine.st_ino == there.st_ino)
      return ftruncate(number, 0) == 0 ? fdopen(number, "wb") : nullptr;
    close(number);  // whoever had it has renamed it meanwhile
  }
}
// Whoever reads the path sees the old file or the new one, never half of it; after a power cut too, for the bytes reach
// the disk before the name does.
void write_file(const std::string& path, const std::string& bytes) {
  const std::string target = check_can_save(path), temporary = target + ".unfinished";
  const bool old = std::filesystem::exists(target);
  FILE* const file = open_temporary(temporary);
  const bool written = file && fwrite(bytes.data(), 1, bytes.size(), file) == bytes.size() && fflush(file) == 0 &&
                       fsync(fileno(file)) == 0 && rename(temporary.c_str(), target.c_str()) == 0;
  const int reason = errno;
  if (file && !written) unlink(temporary.c_str());
  if (file) fclose(file);
  if (!written)
    fail("%s: not written: %s; make room or save elsewhere%s", path.c_str(), strerror(reason),
         old ? ", the old file is kept" : "");
  const int folder = open((std::filesystem::path(target).parent_path() / ".").c_str(), O_RDONLY);
  fsync(folder);  // the new name
  close(folder);
}

static uint32_t big_endian(const uint8_t* b) { return uint32_t(b[0]) << 24 | b[1] << 16 | b[2] << 8 | b[3]; }
template <class T> static T little_endian(const uint8_t* b) {  // as all of CUDA's machines are; from any address
  T value;
  memcpy(&value, b, sizeof value);
  return value;
}
static uint32_t crc32(const uint8_t* bytes, size_t count) {  // PNG's and gzip's: 0xedb88320, lowest bit first
  static uint32_t table[256];
  for (uint32_t i = 0; i < 256 && table[255] == 0; i++) {
    table[i] = i;
    for (int bit = 0; bit < 8; bit++) table[i] = table[i] >> 1 ^ (table[i] & 1) * 0xedb88320;
  }
  uint32_t crc = ~0u;
  for (size_t i = 0; i < count; i++) crc = crc >> 8 ^ table[(crc ^ bytes[i]) & 255];
  return ~crc;
}
constexpr size_t kDeflateRatio = 1032;  // deflate, in gzip and PNG, packs at most 258 bytes into two bits

// stb_image believes the lengths of a PNG's chunks and skips their checksums, so this comes first.
static void check_png(const Bytes& file) {
  if (file.size() < 33 || memcmp(file.data(), "\x89PNG\r\n\x1a\n\0\0\0\rIHDR", 16) != 0) fail("this is no PNG");
  size_t at = 8, length;
  do {
    length = file.size() - at < 12 ? file.size() : big_endian(&file[at]);
    if (length + 12 > file.size() - at) fail("the file ends within the chunk at byte %zu", at);
    const uint32_t crc = big_endian(&file[at + 8 + length]);
    if (crc32(&file[at + 4], length + 4) != crc) fail("damaged: wrong checksum in the chunk at byte %zu", at);
    if (length == 0 && file[at + 4] == 'I' && file[at + 5] == 'D') fail("no data in the chunk at byte %zu", at);
    at += length + 12;
  } while (memcmp(&file[at - length - 8], "IEND", 4) != 0);
}
// stb_image writes a JPEG's Huffman table before it counts the codes, which are at most 256, and follows segments to
// wherever they lead. Whatever it may take for a marker is one here.
static void check_jpeg(const Bytes& file) {
  for (size_t at = 2, end; at + 1 < file.size(); at = end) {
    const int marker = file[at] == 0xff ? file[at + 1] : 0;
    end = at + 1;
    if (marker == 0xd9) return;                                              // the end
    if (marker == 0 || marker == 0xff || (marker & 0xf8) == 0xd0) continue;  // pixels, filling, a restart: no segment
    const size_t length = file.size() - at < 4 ? 0 : size_t(file[at + 2] << 8 | file[at + 3]);
    end = at + 2 + length;
    if (length < 2 || end > file.size()) fail("the file ends within the segment at byte %zu", at);
    for (size_t table = at + 4; marker == 0xc4 && table < end;) {
      size_t codes = 0;
      for (size_t i = table + 1; i <= table + 16; i++) codes += i < end ? file[i] : 256;
      if (codes > 256 || table + 17 + codes > end) fail("damaged: the Huffman table at byte %zu", table);
      table += 17 + codes;
    }
  }
}

// A sheet: square tiles, 100 in a row; row r of tiles shows the digit r mod 10 and no other.
static Images parse_sheet(const Bytes& file) {
  check_png(file);
  const size_t width = big_endian(&file[16]), height = big_endian(&file[20]), side = width / 100;
  const int bits = file[24], kind = file[25];  // kind: 1 palette, 2 colour, 4 alpha, or a sum
  if (kind != 0) fail("%s%s", kind & 3 ? "in colour" : "grey", kind & 4 ? " with alpha" : "");
  if (bits != 8) fail("%d bits a pixel", bits);
  if (side == 0 || width % 100 != 0) fail("%zu pixels wide, no multiple of 100", width);
  if (height == 0 || height % side != 0) fail("%zu pixels high, no multiple of its tiles' %zu", height, side);
  if (width * height / kDeflateRatio > file.size()) fail("%zu x %zu pixels cannot be in this file", width, height);
  stb_most = 2 * (file.size() + (width + 1) * height) + (1 << 16);
  int w, h, channels;
  const std::unique_ptr<uint8_t, void (*)(void*)> sheet(
      stbi_load_from_memory(file.data(), int(file.size()), &w, &h, &channels, 1), stbi_image_free);
  if (!sheet) fail("damaged, or no memory left: its pixels cannot be decoded");
  Images images;
  images.count = int(height / side * 100);
  images.pixels = int(side * side);
  for (size_t tile = 0; tile < size_t(images.count); tile++) {
    images.label.push_back(uint8_t(tile / 100 % 10));
    for (size_t row = 0; row < side; row++) {
      const uint8_t* from = sheet.get() + (tile / 100 * side + row) * width + tile % 100 * side;
      images.pixel.insert(images.pixel.end(), from, from + side);
    }
  }
  return images;
}

// `784,128,10`
template <class T> static std::string joined(const std::vector<T>& items, const char* between) {
  std::ostringstream text;
  for (const T& item : items) text << (&item == items.data() ? "" : between) << item;
  return text.str();
}
static Bytes gunzip(const Bytes& file) {  // RFC 1952: ten bytes, optional fields, deflate, CRC-32, length
  if (file.size() < 18 || file[2] != 8 || file[3] >> 5 != 0) fail("damaged: no gzip header");
  const size_t end = file.size() - 8, length = little_endian<uint32_t>(&file[end + 4]);
  const int flags = file[3];
  size_t at = 10 + (flags & 4 ? 2 + file[10] + 256 * file[11] : 0);
  for (const int text : {8, 16}) {  // a name, a comment
    while ((flags & text) && at < end && file[at] != 0) at++;
    at += (flags & text) != 0;
  }
  at += flags & 2;
  const size_t most = at < end ? std::min<size_t>((end - at) * kDeflateRatio, 1 << 30) : 0;
  if (length == 0 || length > most) fail("damaged or cut short: %zu bytes cannot be in it", length);
  Bytes bytes(length);
  char* const to = reinterpret_cast<char*>(bytes.data());
  const char* const from =
      reinterpret_cast<const char*>(&file[at]);  // with the trailer: stb_image reads a little ahead
  if (stbi_zlib_decode_noheader_buffer(to, int(length), from, int(file.size() - at)) != int(length) ||
      crc32(bytes.data(), length) != little_endian<uint32_t>(&file[end]))
    fail("damaged or cut short: wrong gzip checksum or length");
  return bytes;
}

// idx: a magic number, 0x800 plus the number of dimensions; the dimensions, also big-endian; then a byte for each item.
static Bytes parse_idx(const Bytes& file, std::vector<uint32_t>& dimension) {
  const bool gzip = file.size() >= 2 && file[0] == 0x1f && file[1] == 0x8b;
  Bytes bytes = gzip ? gunzip(file) : file;
  const size_t header = 4 + 4 * dimension.size(), magic = 0x800 + dimension.size();
  const char* const kind = dimension.size() == 1 ? "labels" : "images";
  if (bytes.size() < header || big_endian(bytes.data()) != magic) fail("no idx file of %s (number %zu)", kind, magic);
  const size_t there = bytes.size() - header;
  double promised = 1;  // exact up to 2^53, and no file is larger
  for (size_t i = 0; i < dimension.size(); i++) {
    dimension[i] = big_endian(&bytes[4 + 4 * i]);
    promised *= dimension[i];
  }
  if (there == 0) fail("no %s in it", kind);
  if (promised != double(there))
    fail("the header promises %s bytes, %zu follow", joined(dimension, " x ").c_str(), there);
  bytes.erase(bytes.begin(), bytes.begin() + long(header));
  return bytes;
}
static Images read_mnist(const std::string& images_path, const std::string& labels_path) {
  const char* const advice = "get it again (`make mnist`)";
  Images images;
  std::vector<uint32_t> size(3), labels(1);
  images.pixel = parse_file(images_path, advice, [&](const Bytes& file) { return parse_idx(file, size); });
  images.count = int(size[0]);
  images.pixels = int(size[1] * size[2]);
  images.label = parse_file(labels_path, advice, [&](const Bytes& file) {
    const Bytes label = parse_idx(file, labels);
    if (labels[0] != size[0]) fail("%u labels for the %u images of %s", labels[0], size[0], images_path.c_str());
    for (size_t i = 0; i < label.size(); i++)
      if (label[i] >= images.classes) fail("label %zu is %d, not 0 to %d", i, label[i], images.classes - 1);
    return label;
  });
  return images;
}

Dataset load_dataset(const std::string& folder) {
  const char* const advice = "`make digits` draws sheets into data/, `make mnist` downloads MNIST into build/mnist";
  const char* const sheet = "a sheet is an 8-bit grey PNG of square tiles, 100 in a row (`make digits` draws one)";
  std::vector<std::string> names = {"train.png", "test.png"};
  for (const std::string set : {"train-", "t10k-"})
    for (const char* content : {"images-idx3-ubyte", "labels-idx1-ubyte"}) names.push_back(set + content);
  std::string path[6];  // empty where a file is missing
  std::error_code none;
  if (!std::filesystem::is_directory(folder, none)) fail("%s: there is no such folder; %s", folder.c_str(), advice);
  for (int i = 0; i < 6; i++)
    for (const char* ending : {".gz", ""}) {
      const auto candidate = std::filesystem::path(folder) / (names[i] + ending);
      if (std::filesystem::exists(candidate, none)) path[i] = candidate.string();
    }
  const bool sheets = !(path[0] + path[1]).empty(), mnist = !(path[2] + path[3] + path[4] + path[5]).empty();
  if (!sheets && !mnist) fail("%s: holds neither sheets of digits nor MNIST's files; %s", folder.c_str(), advice);
  for (int i = sheets ? 0 : 2; i < (sheets ? 2 : 6); i++)
    if (path[i].empty()) fail("%s: %s is missing; %s", folder.c_str(), names[i].c_str(), advice);
  Dataset data;
  data.train = sheets ? parse_file(path[0], sheet, parse_sheet) : read_mnist(path[2], path[3]);
  data.test = sheets ? parse_file(path[1], sheet, parse_sheet) : read_mnist(path[4], path[5]);
  const int pixels = data.train.pixels, others = data.test.pixels;
  if (pixels != others) fail("%s: images of %d and of %d pixels; take one kind", folder.c_str(), pixels, others);
  data.what = sheets ? "sheets " + path[0] + ", " + path[1] : "MNIST's files in " + folder;
  if (sheets && mnist) data.what += " (MNIST's files are there too; the sheets win)";
  return data;
}

// ==== 5.2 Checkpoints: safetensors, which PyTorch's users exchange ===================================================
// Eight bytes, the length of the header; the header, JSON; the numbers. Little-endian, as all of CUDA's machines are.
// {"__metadata__": {"epoch": "3"}, "0.weight": {"dtype": "F32", "shape": [128, 784], "data_offsets": [0, 401408]}}
struct HeaderReader {  // of the JSON that can stand there: objects, strings, lists of whole numbers
  const char *at, *end;
  [[noreturn]] void refuse(const std::string& what) const {
    fail("%.70s, %td bytes before the header's end", what.c_str(), end - at);
  }
  char next() {  // the next character that is not white space; 0 at the end
    while (at < end && (*at == ' ' || *at == '\t' || *at == '\r' || *at == '\n')) at++;
    return at < end ? *at : '\0';
  }
  bool accept(char wanted) { return next() == wanted && ++at; }
  void expect(char wanted) {
    if (!accept(wanted)) refuse(std::string("no ") + wanted);
  }
  char take() {  // a character of a string
    if (at == end || uint8_t(*at) < ' ') refuse("an unfinished string");
    return *at++;
  }
  std::string string() {
    std::string text;
    expect('"');
    for (char c = take(); c != '"'; c = take()) {
      const size_t escape = c == '\\' ? std::string_view("\"\\/bfnrt").find(take()) : 0;
      if (escape == std::string_view::npos) refuse("an unknown escape");  // \u: no writer of tensors needs it
      text += c == '\\' ? "\"\\/\b\f\n\r\t"[escape] : c;
    }
    return text;
  }
  template <class F> void list(char open, char close, F item) {
    expect(open);
    if (accept(close)) return;
    do item();
    while (accept(','));
    expect(close);
  }
  std::vector<int64_t> numbers() {
    std::vector<int64_t> values;
    list('[', ']', [&] {
      const char first = next();
      const auto [stop, error] = std::from_chars(at, end, values.emplace_back());
      if (error != std::errc() || first == '-' || (first == '0' && stop > at + 1)) refuse("no whole number");
      at = stop;
    });
    return values;
  }
  // Calls member(key) before each value, for it to read; returns how many there were
  template <class F> size_t object(F member) {
    std::set<std::string> keys;
    list('{', '}', [&] {
      const auto [key, fresh] = keys.insert(string());
      if (!fresh) refuse("a second " + *key);
      expect(':');
      member(*key);
    });
    return keys.size();
  }
};

static SafeTensors parse_safetensors(const Bytes& file) {
  const uint64_t length = file.size() < 8 ? UINT64_MAX : little_endian<uint64_t>(file.data());
  if (length > 100'000'000 || length > file.size() - 8) fail("no safetensors file, or cut short");
  const size_t size = file.size() - 8 - length;  // of the numbers
  const uint8_t* const numbers = file.data() + 8 + length;
  HeaderReader header{reinterpret_cast<const char*>(file.data()) + 8, reinterpret_cast<const char*>(numbers)};
  SafeTensors result;
  std::multimap<std::vector<int64_t>, std::pair<std::string, SavedTensor>> entries;  // data_offsets: dtype, tensor
  header.object([&](const std::string& name) {
    const auto metadata = [&](const std::string& key) { result.metadata[key] = header.string(); };
    if (name == "__metadata__") return void(header.object(metadata));
    std::string type;
    std::vector<int64_t> shape, offsets;
    const size_t members = header.object([&](const std::string& key) {
      if (key == "dtype") type = header.string();
      else if (key == "shape") shape = header.numbers();
      else if (key == "data_offsets") offsets = header.numbers();
      else header.refuse("unknown " + key);
    });
    if (members != 3 || offsets.size() != 2) header.refuse("a tensor without dtype, shape or data_offsets");
    entries.insert({offsets, {type, {name, shape, {}}}});
  });
  if (header.next() || header.at != header.end) header.refuse("more than one object");
  size_t done = 0;  // bytes of the numbers; the next tensor begins there
  for (auto& [offsets, entry] : entries) {
    auto& [type, tensor] = entry;
    const size_t width = type == "F64" ? 8 : type == "F32" ? 4 : type == "F16" || type == "BF16" ? 2 : 0;
    const size_t begin = size_t(offsets[0]), end = size_t(offsets[1]);
    const char* const name = tensor.name.c_str();
    if (width == 0) fail("tensor \"%.60s\" is %.20s, not F32, F16, BF16 or F64", name, type.c_str());
    auto bytes = double(width);  // exact up to 2^53, and no file is larger
    for (const int64_t n : tensor.shape) bytes *= double(n);
    if (begin != done || end < begin || end > size || bytes != double(end - begin))
      fail("tensor \"%.60s\" does not fit: its type, shape, data_offsets %zu to %zu, the file", name, begin, end);
    for (tensor.value.reserve((end - begin) / width); done < end; done += width) {
      const uint8_t* from = numbers + done;
      tensor.value.push_back(type == "F32"   ? little_endian<float>(from)
                             : type == "F64" ? float(little_endian<double>(from))
                             : type == "F16" ? half_to_float(little_endian<half>(from))
                                             : bfloat16_to_float(little_endian<bfloat16>(from)));
    }
    result.tensors.push_back(std::move(tensor));
  }
  if (done != size) fail("%zu bytes behind the last tensor", size - done);
  return result;
}
SafeTensors read_safetensors(const std::string& path) {
  return parse_file(path, "save it again, with safetensors.torch.save_file or mp train", parse_safetensors);
}

void write_safetensors(const std::string& path, const SafeTensors& file) {
  std::ostringstream header;
  std::string data;
  header << "{\"__metadata__\":{";
  for (const auto& [key, value] : file.metadata)
    header << (key == file.metadata.begin()->first ? "" : ",") << std::quoted(key) << ":" << std::quoted(value);
  header << "}";
  for (const SavedTensor& tensor : file.tensors) {
    header << "," << std::quoted(tensor.name) << R"(:{"dtype":"F32","shape":[)" << joined(tensor.shape, ",")
           << R"(],"data_offsets":[)" << data.size();
    data.append(reinterpret_cast<const char*>(tensor.value.data()), tensor.value.size() * sizeof(float));
    header << "," << data.size() << "]}";
  }
  header << "}";
  std::string text = header.str();
  text.resize((text.size() + 7) / 8 * 8, ' ');  // so that the numbers start at a multiple of their size
  const uint64_t length = text.size();
  write_file(path, std::string(reinterpret_cast<const char*>(&length), 8) + text + data);
}

// ==== 5.2 Options: one table, which the command line, --help and --resume read =======================================
struct UsageError : Error {  // main() ends with 2
  using Error::Error;
};
struct Options {
  std::string data = "data", init, save, resume, log, sweep, svg;
  std::vector<int> layers = {784, 128, 10};
  Type precision = Type::fp16;
  Update update = Update::master;
  Loss loss = Loss::cross_entropy;
  float loss_scale = -1;  // 0: dynamic; -1: dynamic for fp16, none (1) for the others
  float scale_init = 65536, lr = 0.3f;
  int growth_interval = 2000, epochs = 15, batch = 64;
  uint64_t seed = 1;
  bool shuffle = true, automatic = false;  // automatic: a type for each layer, beginning with precision
  float vanish_limit = 50;                 // per cent
  std::vector<std::string> given, files;   // options that stood on the command line; words that are none
  bool has(const char* name) const { return std::find(given.begin(), given.end(), name) != given.end(); }
  bool dynamic() const { return loss_scale < 0 ? precision == Type::fp16 : loss_scale == 0; }
  float fixed_scale() const { return loss_scale < 0 ? 1 : loss_scale; }  // where it is not dynamic
};
static const std::vector<std::string> type_names = {"fp32", "fp16", "bf16", "auto"}, loss_names = {"xent", "mse"},
                                      update_names = {"master", "half", "kahan", "stochastic"},
                                      switch_names = {"off", "on"};

[[noreturn]] static void misuse(const std::string& text) { throw UsageError(text); }
static std::string text_of(double x) {
  char text[40];
  for (int digits = 6; digits <= 9; digits++) {  // the fewest that name this float
    snprintf(text, sizeof text, "%.*g", digits, x);
    if (float(std::strtod(text, nullptr)) == float(x)) break;
  }
  return text;
}
template <class T> static T number(const std::string& text, double least, double most) {
  char* end = nullptr;
  const double x = std::strtod(text.c_str(), &end);
  if (text.empty() || *end || std::isspace(text[0])) misuse("is no number");
  if (!(x >= least && x <= most)) misuse("must be from " + text_of(least) + " to " + text_of(most));
  if (std::is_integral_v<T> && x != std::floor(x)) misuse("must be a whole number");
  return T(x);
}
static std::vector<int> numbers(const std::string& text, double least, double most) {  // 784,128,10
  std::vector<int> values;
  std::istringstream words(text + ",");  // so that nothing before the end is a word, too
  for (std::string word; std::getline(words, word, ',');) values.push_back(number<int>(word, least, most));
  return values;
}
static int choice(const std::string& text, const std::vector<std::string>& names) {
  const auto found = std::find(names.begin(), names.end(), text);
  if (found == names.end()) misuse("must be one of " + joined(names, ", "));
  return int(found - names.begin());
}

using O = Options;
using S = std::string;
struct Option {
  const char *name, *values, *help;
  bool saved;  // in a checkpoint
  std::function<void(O&, const S&)> set;
  std::function<S(const O&)> get;
};
static Option option(const char* name, const char* values, const char* help, S O::*field) {
  return {name, values, help, false, [=](O& o, const S& s) { o.*field = s; }, [=](const O& o) { return o.*field; }};
}
template <class T>
static Option option(const char* name, const char* values, const char* help, T O::*field, double least, double most) {
  const auto set = [=](O& o, const S& s) { o.*field = number<T>(s, least, most); };
  const auto get = [=](const O& o) { return std::is_integral_v<T> ? std::to_string(o.*field) : text_of(o.*field); };
  return {name, values, help, true, set, get};
}
template <class T>
static Option option(const char* name, const char* values, const char* help, T O::*field, const std::vector<S>& all) {
  const auto set = [=](O& o, const S& s) { o.*field = T(choice(s, all)); };
  return {name, values, help, true, set, [=](const O& o) { return all[size_t(o.*field)]; }};
}
constexpr double least_rate = 1e-30, most_rate = 1e30;
static const Option option_table[] = {
    option("data", "DIR", "train.png and test.png, sheets of digits, or MNIST's four files", &O::data),
    {"layers", "N,N,...", "sizes: pixels, hidden layers, classes", true,
     [](O& o, const S& s) {
       o.layers = numbers(s, 1, 1e6);
       if (o.layers.size() < 2) misuse("needs at least an input and an output, such as 784,10");
     },
     [](const O& o) { return joined(o.layers, ","); }},
    {"precision", "fp32|fp16|bf16|auto", "of all but masters, sums, loss, update; auto: by layer", true,
     [](O& o, const S& s) {
       const int i = choice(s, type_names);
       o.automatic = i == 3;
       o.precision = o.automatic ? Type::fp16 : Type(i);
     },
     [](const O& o) { return type_names[o.automatic ? 3 : int(o.precision)]; }},
    option("vanish-limit", "N", "auto: most gradients, in per cent, that fp16 may blur or flush", &O::vanish_limit, 0,
           100),
    option("update", "master|half|kahan|stochastic", "how w - lr g is added up", &O::update, update_names),
    {"loss-scale", "dynamic|N", "what multiplies the loss gradient (fp32 and bf16: 1)", true,
     [](O& o, const S& s) { o.loss_scale = s == "dynamic" ? 0 : number<float>(s, least_rate, 3e38); },
     [](const O& o) { return o.dynamic() ? S("dynamic") : text_of(o.fixed_scale()); }},
    option("scale-init", "N", "the dynamic scale's first value", &O::scale_init, least_rate, 3e38),
    option("growth-interval", "N", "finite steps until it doubles", &O::growth_interval, 1, 2e9),
    option("loss", "xent|mse", "softmax cross-entropy, or E1 on one-hot targets", &O::loss, loss_names),
    option("epochs", "N", "counted from the very beginning, also after --resume", &O::epochs, 1, 1e6),
    option("batch", "N", "images a step", &O::batch, 1, 1e6),
    option("lr", "X", "learning rate of plain SGD", &O::lr, least_rate, most_rate),
    option("seed", "N", "of the first weights, the shuffling, stochastic rounding", &O::seed, 0, 9e15),
    option("shuffle", "on|off", "off: images in the order of the file", &O::shuffle, switch_names),
    option("init", "FILE", "first weights from a safetensors file, PyTorch's for instance", &O::init),
    option("save", "FILE", "checkpoint after every epoch", &O::save),
    option("resume", "FILE", "go on from a checkpoint; other options override what it says", &O::resume),
    option("log", "FILE.csv", "a row a step: step,epoch,loss,loss_scale,found_inf", &O::log),
    {"sweep", "scale|lr", "of compare: accuracy over the loss scale, or over the learning rate", false,
     [](O& o, const S& s) {
       choice(s, {"scale", "lr"}), o.sweep = s;
     },
     [](const O& o) { return o.sweep; }},
    option("svg", "FILE.svg", "of histogram and compare --sweep: the picture", &O::svg),
};
static const Option* find_option(const std::string& name) {
  for (const Option& option : option_table)
    if (name == option.name) return &option;
  return nullptr;
}
static void set_option(Options& o, const Option& option, const std::string& value) {
  try {
    option.set(o, value);
  } catch (const UsageError& error) {
    misuse(std::string("--") + option.name + " '" + value + "' " + error.what());
  }
}
static void refuse_contradictions(const Options& o) {
  const std::string update = "--update " + update_names[int(o.update)];
  if (o.precision == Type::fp32 && o.update != Update::master)
    misuse(update + " with --precision fp32: fp32 weights lose nothing that it could save");
  if (o.precision == Type::fp32 && o.dynamic())
    misuse("--loss-scale dynamic with --precision fp32: its gradients do not vanish, there is nothing to scale for");
  if (o.automatic && o.update != Update::master)
    misuse(update + " with --precision auto: its layers move by their fp32 masters");
  if (!o.automatic && o.has("vanish-limit")) misuse("--vanish-limit is for --precision auto");
  if (!o.dynamic() && (o.has("scale-init") || o.has("growth-interval")))
    misuse("--scale-init and --growth-interval are for a dynamic scale: add --loss-scale dynamic");
  std::error_code none;
  for (const std::string& other : {o.save, o.resume, o.init})
    for (const std::string& mine : {o.log, o.svg})
      if (!mine.empty() && (mine == other || std::filesystem::equivalent(mine, other, none)))
        misuse((mine == o.log ? "--log " : "--svg ") + mine + " would overwrite the checkpoint " + other);
  if (!o.init.empty() && !o.resume.empty()) misuse("--init and --resume both bring weights: give one of them");
}

// ==== 5.2 What a checkpoint holds ====================================================================================
struct Training {  // the state that a checkpoint keeps and --resume restores
  Mlp net;
  StepState state;
  int epoch = 0;  // finished
};
// PyTorch's names for nn.Sequential(Linear, ReLU, Linear, ...): layer l is its module 2 (l - 1).
static std::string name_of(int l, const char* what) { return std::to_string(2 * (l - 1)) + "." + what; }

static void save_checkpoint(const std::string& path, const Options& o, const Training& t) {
  SafeTensors file;
  for (const Option& option : option_table)
    if (option.saved) file.metadata[option.name] = option.get(o);
  file.metadata["epoch"] = std::to_string(t.epoch), file.metadata["position"] = std::to_string(t.state.position);
  file.metadata["step"] = std::to_string(t.state.step), file.metadata["skipped"] = std::to_string(t.state.skipped);
  file.metadata["scale"] = text_of(t.state.scale), file.metadata["tracker"] = std::to_string(t.state.growth_tracker);
  std::vector<int> clean;
  for (int l = 1; l <= t.net.L; l++) {
    const Layer& layer = t.net.layer[l];
    file.tensors.push_back({name_of(l, "weight"), {layer.W.rows, layer.W.cols}, to_host(kept_W(layer))});
    file.tensors.push_back({name_of(l, "bias"), {layer.W.rows}, to_host(kept_b(layer))});
    if (layer.compensation.memory)
      file.tensors.push_back({name_of(l, "compensation"), {layer.compensation.cols}, to_host(layer.compensation)});
    clean.push_back(layer.clean_probes);
  }
  if (o.automatic) file.metadata["clean-probes"] = joined(clean, ",");
  write_safetensors(path, file);
}

static const SavedTensor* find_tensor(const SafeTensors& file, const std::string& name) {
  for (const SavedTensor& tensor : file.tensors)
    if (tensor.name == name) return &tensor;
  return nullptr;
}
// The weights of a file that any program may have written: its matrices called *.weight, in the order of the numbers in
// their names, each with the *.bias that belongs to it.
struct Linear {
  const SavedTensor *weight, *bias;
};
static std::map<long, Linear> linear_layers(const SafeTensors& file) {
  std::map<long, Linear> layers;
  for (const SavedTensor& weight : file.tensors) {
    const std::string& name = weight.name;
    const size_t stem = name.size() - std::min<size_t>(name.size(), 6);
    if (weight.shape.size() != 2 || weight.value.empty() || name.substr(stem) != "weight") continue;
    const SavedTensor* const bias = find_tensor(file, name.substr(0, stem) + "bias");
    if (!bias || bias->shape != std::vector{weight.shape[0]}) continue;
    const size_t last = name.find_last_of("0123456789"), before = name.find_last_not_of("0123456789", last);
    layers[last == name.npos ? -1 : std::strtol(&name[before + 1], nullptr, 10)] = {&weight, bias};
  }
  return layers;
}
// The sizes of the file's layers, which must fit one another, and --layers
static void take_layers(Options& o, const SafeTensors& file, const std::string& path) {
  std::vector<int> sizes;
  for (const auto& [place, layer] : linear_layers(file)) {
    const long out = layer.weight->shape[0], in = layer.weight->shape[1];
    if (sizes.empty()) sizes.push_back(int(in));
    if (sizes.back() != in)
      fail("%s: %s takes %ld numbers, the layer before it gives %d", path.c_str(), layer.weight->name.c_str(), in,
           sizes.back());
    sizes.push_back(int(out));
  }
  if (sizes.empty()) fail("%s: holds no layer: a matrix 0.weight and its 0.bias, as PyTorch names them", path.c_str());
  const std::string held = joined(sizes, ","), asked = joined(o.layers, ",");
  if (o.has("layers") && held != asked)
    fail("%s: holds layers %s, not --layers %s; leave the option away", path.c_str(), held.c_str(), asked.c_str());
  o.layers = sizes;
}
static void take_weights(Mlp& net, const SafeTensors& file) {
  int l = 1;
  for (const auto& [place, layer] : linear_layers(file))
    set_parameters(net.layer[l++], layer.weight->value, layer.bias->value);
}
// Hands a word of the file's metadata to `use`, which may misuse(): the file is damaged then.
template <class F>
static void read_metadata(const SafeTensors& file, const std::string& path, const char* name, F use) {
  const auto entry = file.metadata.find(name);
  if (entry == file.metadata.end())
    fail("%s: holds weights but no training state (no %s); use --init", path.c_str(), name);
  try {
    use(entry->second);
  } catch (const UsageError& error) {
    fail("%s: its %s '%s' %s; the file is damaged", path.c_str(), name, entry->second.c_str(), error.what());
  }
}
// The map of --precision auto: a layer is in fp16 after two clean probes, and at first.
static void set_types(Mlp& net) {
  std::vector<Type> types;
  for (int l = 1; l <= net.L; l++) types.push_back(net.layer[l].clean_probes < 2 ? Type::fp32 : Type::fp16);
  set_types(net, types);
}
static void take_types(Mlp& net, const SafeTensors& file, const std::string& path) {
  if (!file.metadata.count("clean-probes")) return;  // not saved by auto
  read_metadata(file, path, "clean-probes", [&](const std::string& text) {
    const std::vector<int> clean = numbers(text, 0, 2);
    if (int(clean.size()) != net.L) misuse("must have a number for each layer");
    for (int l = 1; l <= net.L; l++) net.layer[l].clean_probes = clean[l - 1];
  });
  set_types(net);
}
// The options that a checkpoint remembers, but for those on the command line
static void take_options(Options& o, const SafeTensors& file, const std::string& path) {
  const auto precision = file.metadata.find("precision");
  const bool new_precision =
      o.has("precision") && precision != file.metadata.end() && precision->second != find_option("precision")->get(o);
  Options held;
  for (const Option& option : option_table) {
    if (!option.saved || o.has(option.name) || !file.metadata.count(option.name)) continue;
    if (new_precision && !strcmp(option.name, "loss-scale")) continue;  // it has its own default
    read_metadata(file, path, option.name,
                  [&](const std::string& value) { option.set(o, value), option.set(held, value); });
  }
  try {
    refuse_contradictions(held);
  } catch (const UsageError& error) {
    fail("%s: it says %s; the file is damaged", path.c_str(), error.what());
  }
}

// ==== 5.2 The training loop ==========================================================================================
static volatile std::sig_atomic_t stop_signal = 0;
static void on_signal(int number) { stop_signal = number; }
static double seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}
static std::string describe(const Options& o) {
  std::string text = machine() + " · " + joined(o.layers, "-") + " · ";
  text += o.automatic ? "auto: fp16 or fp32 by layer" : type_names[int(o.precision)];
  if (o.precision != Type::fp32)
    text += o.update == Update::master ? ", fp32 master" : ", no master, " + update_names[int(o.update)] + " update";
  if (o.dynamic()) return text + ", dynamic loss scale";
  return text + (o.fixed_scale() == 1 ? "" : ", loss scale " + text_of(o.loss_scale));
}
static double accuracy(Mlp& net, const Images& test) {  // per cent
  const std::vector<int> answer = predict(net, test.pixel);
  size_t right = 0;
  for (size_t i = 0; i < answer.size(); i++) right += answer[i] == test.label[i];
  return 100.0 * double(right) / double(answer.size());
}
// The step that halted has left its tensors as they were: where is the first number that is not finite?
static std::string first_not_finite(const Mlp& net) {
  std::string found;
  const auto look = [&](const char* name, int l, const Tensor& t) {
    const std::vector<float> values = to_host(t);
    const auto bad = std::find_if(values.begin(), values.end(), [](float x) { return !std::isfinite(x); });
    const int at = int(bad - values.begin());
    if (found.empty() && bad != values.end())
      found = format("%s of layer %d is %g at row %d, column %d", name, l, *bad, at / t.cols, at % t.cols);
  };
  for (int l = 1; l <= net.L; l++) {
    look("the weights W", l, net.layer[l].W), look("the bias b", l, net.layer[l].b);
    look("in the forward pass the activation a", l, net.layer[l].a);
  }
  for (int l = net.L; l >= 1; l--) {
    look("in the backward pass delta", l, net.layer[l].delta);
    look("in the backward pass the gradient dW", l, net.layer[l].dW), look("the gradient db", l, net.layer[l].db);
  }
  return found;
}

// The log is written in place. A resumed run keeps the rows of the steps before it and goes on after them.
static std::string old_rows(const std::string& path, unsigned first_step) {
  std::string rows = "step,epoch,loss,loss_scale,found_inf\n", row;
  if (first_step == 0 || !std::filesystem::is_regular_file(path)) return rows;
  std::ifstream old(path);
  for (std::getline(old, row); std::getline(old, row) && !old.eof();)  // a row without its end was cut off
    if (std::strtoul(row.c_str(), nullptr, 10) < first_step) rows += row + "\n";
  return rows;
}
struct Run {
  Options o;
  Dataset data;
  Training t;
  LossScaler scaler;
  Batch batch;
  std::shared_ptr<uint8_t> pixels, labels;  // of the training images, on the device
  std::shared_ptr<int> order;
  Graph graph;                                         // of a step
  int steps = 0;                                       // of an epoch; a last, partial batch is left out
  int fetched = 0;                                     // of this epoch: those whose losses are here
  double loss_sum = 0;                                 // of those
  double mean_loss = 0, test_accuracy = 0, taken = 0;  // of the last epoch; seconds of all
  bool quiet = false;                                  // no row an epoch
  FILE* log = nullptr;
};
static void check_fit(const Options& o, const Images& images) {
  std::vector<int> fitting = o.layers;
  fitting.front() = images.pixels, fitting.back() = images.classes;
  if (fitting != o.layers)
    fail("layers %s do not fit the data in %s: %d pixels an image, %d classes; use --layers %s",
         joined(o.layers, ",").c_str(), o.data.c_str(), images.pixels, images.classes, joined(fitting, ",").c_str());
  if (o.batch > images.count)
    fail("--batch %d: %s holds only %d images to train on", o.batch, o.data.c_str(), images.count);
}
// Where a checkpoint left off. A scale on the command line begins anew; another --batch begins at the same image.
static void restore(Run& run, const SafeTensors& file) {
  const Options& o = run.o;
  StepState& state = run.t.state;
  const auto read = [&](const char* name, auto& n, double least, double most) {
    read_metadata(file, o.resume, name, [&](auto& s) { n = number<std::decay_t<decltype(n)>>(s, least, most); });
  };
  int64_t old_batch = 0, image = 0;
  read("epoch", run.t.epoch, 0, 2e9), read("step", state.step, 0, 2e9), read("skipped", state.skipped, 0, 2e9);
  read("batch", old_batch, 0, 2e9), read("position", image, 0, 2e9), image *= old_batch;
  state.position = int(std::min(image / o.batch, int64_t(run.steps)));
  if (state.position == run.steps) run.t.epoch++, state.position = 0;
  bool was_dynamic = false;
  read_metadata(file, o.resume, "loss-scale", [&](const std::string& s) { was_dynamic = s == "dynamic"; });
  if (o.dynamic() && was_dynamic && !o.has("loss-scale") && !o.has("scale-init"))
    read("scale", state.scale, least_rate, 3.4e38), read("tracker", state.growth_tracker, 0, 2e9);
  if (state.growth_tracker >= o.growth_interval) state.growth_tracker = 0;
  for (int l = 1; l <= run.t.net.L; l++) {
    const Tensor& compensation = run.t.net.layer[l].compensation;
    const SavedTensor* const saved = find_tensor(file, name_of(l, "compensation"));
    if (!saved || !compensation.memory) continue;
    if (saved->value.size() != size_t(compensation.cols))
      fail("%s: %s has the wrong size; the file is damaged", o.resume.c_str(), saved->name.c_str());
    to_device(saved->value, compensation);
  }
}
static void prepare(Run& run) {
  Options& o = run.o;
  Mlp& net = run.t.net;
  const std::string from = o.resume.empty() ? o.init : o.resume;
  SafeTensors file;
  if (!from.empty()) file = read_safetensors(from);
  if (!o.resume.empty()) take_options(o, file, from), o.save = o.save.empty() ? o.resume : o.save;
  if (!from.empty()) take_layers(o, file, from);  // after the options: the weights' own shapes decide
  refuse_contradictions(o);
  if (!o.save.empty() && !run.quiet) check_can_save(o.save);
  if (run.data.what.empty()) run.data = load_dataset(o.data);
  const Images& images = run.data.train;
  check_fit(o, images);
  run.steps = images.count / o.batch;

  net = make_mlp(o.layers, o.batch, o.precision, o.update);
  net.loss = o.loss, net.seed = o.seed;
  if (from.empty()) initialise(net);
  else take_weights(net, file);
  if (o.automatic && !o.resume.empty()) take_types(net, file, from);
  run.t.state.scale = o.dynamic() ? o.scale_init : o.fixed_scale();
  if (!o.resume.empty()) restore(run, file);
  run.scaler = o.dynamic() ? LossScaler(65536, 2, 0.5f, o.growth_interval) : LossScaler(1, 1, 1, 1);
  run.scaler.history = device_array<StepRecord>(run.steps);
  run.pixels = on_device(images.pixel), run.labels = on_device(images.label);
  run.order = device_array<int>(images.count);
  run.batch.pixels = run.pixels.get(), run.batch.labels = run.labels.get(), run.batch.order = run.order.get();
  run.batch.rows = o.batch;
  if (o.log.empty()) return;
  write_file(o.log, old_rows(o.log, run.t.state.step));
  if (!(run.log = fopen(o.log.c_str(), "a")))
    fail("%s: %s; name another file for --log", o.log.c_str(), strerror(errno));
}

// What the device knows of the steps since the last time: its state, their losses, the log's rows.
static void fetch(Run& run) {
  StepState& state = run.t.state;
  state = run.scaler.read();
  std::vector<StepRecord> records(state.position + state.halted - run.fetched);
  CHECK(cudaMemcpy(records.data(), run.scaler.history.get() + run.fetched, records.size() * sizeof(StepRecord),
                   cudaMemcpyDeviceToHost));
  unsigned step = state.step + state.halted - unsigned(records.size());
  for (const StepRecord& r : records) {
    const float loss = std::isnan(r.loss) ? NAN : r.loss;  // without x86's minus sign
    run.loss_sum += loss, run.fetched++;
    if (run.log) fprintf(run.log, "%u,%d,%.9g,%.9g,%d\n", step++, run.t.epoch + 1, loss, r.loss_scale, r.found_inf);
  }
  if (run.log && (fflush(run.log) != 0 || ferror(run.log)))
    fail("%s: cannot be written: %s; make room or log elsewhere", run.o.log.c_str(), strerror(errno));
  if (state.halted)
    fail(
        "step %u (epoch %d, batch %d) cannot be saved by a smaller loss scale than its %g: %s; use a smaller --lr, "
        "or --precision bf16 or fp32 (no checkpoint holds anything of this epoch)",
        state.step, run.t.epoch + 1, state.position, state.scale, first_not_finite(run.t.net).c_str());
}
static void show_progress(const Run& run, int done, double since) {
  static double shown = 0;
  if (!isatty(STDOUT_FILENO) || seconds() - shown < 0.1) return;
  shown = seconds();
  const std::string line = std::string(40 * done / run.steps, '#') + std::string(40, '.');
  printf("\r%5d  [%.40s] %d of %d steps, %.0f s", run.t.epoch + 1, line.c_str(), done, run.steps, shown - since);
  fflush(stdout);
}
// Once an epoch, before its first step: which layers must be in fp32, and why; which need not any more.
static void choose_types(Run& run) {
  Mlp& net = run.t.net;
  const std::vector<Probe> seen = probe(net, run.batch, run.t.state.scale);
  bool moved = false;
  for (int l = 1; l <= net.L; l++) {
    Layer& layer = net.layer[l];
    const bool wide = layer.type == Type::fp32;  // back only with room to spare: 3 bits
    const std::string why = trouble(seen, l, run.o.dynamic(), run.o.vanish_limit / 100, wide ? 3 : 0);
    layer.clean_probes = why.empty() ? std::min(layer.clean_probes + 1, 2) : 0;
    if (wide == (layer.clean_probes < 2)) continue;
    moved = true;
    if (!run.quiet)
      printf("       layer %d %s, at scale %g\n", l,
             wide ? "back to fp16: two probes found nothing" : ("to fp32: " + why).c_str(), run.t.state.scale);
  }
  if (moved) set_types(net), run.graph = Graph();  // recorded anew
}
static std::string map_of(const Mlp& net) {  // `16 32   98.7%`: bits by layer, multiply-adds done in 16
  std::string map;
  double products[2] = {};  // in 16 bits, in 32
  for (int l = 1; l <= net.L; l++) {
    const Tensor& W = net.layer[l].W;
    map += W.type == Type::fp32 ? "32 " : "16 ";
    products[W.type == Type::fp32] += double(W.rows) * W.cols;
  }
  return map + format("%9.1f%%", 100 * products[0] / (products[0] + products[1]));
}
// Which image comes when, onto the device: it depends on seed and epoch alone, so that a resumed run sees the same.
static void shuffle(Run& run) {
  std::vector<int> order(run.data.train.count);
  for (int i = 0; i < int(order.size()); i++) order[i] = i;
  const uint64_t seed = random_bits(run.o.seed, 1u << 20 | unsigned(run.t.epoch));
  for (int i = int(order.size()) - 1; run.o.shuffle && i > 0; i--)
    std::swap(order[i], order[random_bits(seed, i) % unsigned(i + 1)]);
  CHECK(cudaMemcpy(run.order.get(), order.data(), order.size() * sizeof(int), cudaMemcpyHostToDevice));
}
// An epoch, or what is left of it after --resume. The host does not wait for a GPU before its end.
static void train_epoch(Run& run) {
  Training& t = run.t;
  shuffle(run);
  run.scaler.write(t.state);
  const int first = t.state.position;
  run.fetched = first, run.loss_sum = 0;
  const double start = seconds();
  if (run.o.automatic && first == 0) choose_types(run);
  for (int step = first; step < run.steps && !stop_signal; step++) {
    replay(run.graph, [&] { train_step(t.net, run.batch, run.scaler, run.o.lr); });
    if (launches_wait && step % 32 == 31) fetch(run);  // a GPU would have to be waited for
    show_progress(run, step + 1, start);
  }
  fetch(run);
  if (isatty(STDOUT_FILENO)) printf("\r\033[K");
  if (stop_signal && t.state.position < run.steps) return;
  const double taken = seconds() - start, count = run.fetched - first;
  t.state.position = 0, t.epoch++;
  run.taken += taken, run.mean_loss = run.loss_sum / count, run.test_accuracy = accuracy(t.net, run.data.test);
  if (run.quiet) return;
  printf("%5d  %10.5g  %12.2f%%  %10g  %7d  %8.0f  %7.2f%s\n", t.epoch, run.mean_loss, run.test_accuracy, t.state.scale,
         t.state.skipped, count * run.o.batch / taken, taken, run.o.automatic ? ("  " + map_of(t.net)).c_str() : "");
  fflush(stdout);
}
static int train(const Options& options) {
  Run run;
  run.o = options;
  prepare(run);
  const Options& o = run.o;
  printf("%s\n%s: %d images to train on, %d to test\n", describe(o).c_str(), run.data.what.c_str(),
         run.data.train.count, run.data.test.count);
  if (run.t.epoch < o.epochs)
    printf("epoch  train loss  test accuracy  loss scale  skipped  images/s  seconds%s\n",
           o.automatic ? "  bits by layer, multiply-adds in 16" : "");
  fflush(stdout);
  for (const int signal_ : {SIGINT, SIGTERM}) signal(signal_, on_signal);
  while (run.t.epoch < o.epochs && !stop_signal) {
    train_epoch(run);
    if (!o.save.empty()) save_checkpoint(o.save, o, run.t);
  }
  if (run.log && fclose(run.log) != 0)
    fail("%s: cannot be written: %s; make room or log elsewhere", o.log.c_str(), strerror(errno));
  if (stop_signal && run.t.epoch < o.epochs) {
    const std::string next =
        o.save.empty() ? "nothing is saved without --save" : "go on with: mp train --resume " + o.save;
    fprintf(stderr, "mp: stopped after step %u; %s\n", run.t.state.step, next.c_str());
    return 128 + stop_signal;
  }
  if (!o.save.empty()) save_checkpoint(o.save, o, run.t);
  printf("test accuracy %.2f%%\n", accuracy(run.t.net, run.data.test));
  return 0;
}

// ==== Plots: in the terminal and as SVG ==============================================================================
static bool utf8() {
  for (const char* name : {"LC_ALL", "LC_CTYPE", "LANG"})
    if (const char* locale = std::getenv(name); locale && *locale)
      return strcasestr(locale, "utf-8") || strcasestr(locale, "utf8");
  return false;
}
static std::string bar(double share, int width) {  // `share` of `width` characters; UTF-8 counts in eighths
  static const char* const parts[] = {"", "▏", "▎", "▍", "▌", "▋", "▊", "▉"};
  const double full = share > 0 ? std::min(share, 1.) * width : 0;  // 0 for NaN, too
  const int eighths = int(full * 8 + 0.5);
  if (!utf8()) return std::string(size_t(full + 0.5), '#');
  std::string text;
  for (int i = 0; i < eighths / 8; i++) text += "█";
  return text + parts[eighths % 8];
}
struct Curve {
  std::string name;
  std::vector<double> y;  // a value for each place on x
};
struct Band {  // of the places from..to on x
  double from, to;
  std::string name;
};
struct Plot {
  std::string title, x, y;         // the axes with their units
  std::vector<std::string> ticks;  // a label for each place on x, or ""; the places are evenly spaced
  std::vector<Curve> curves;
  std::vector<Band> bands;
  double high = 100;  // y runs from 0 to high
  bool bars = false;
};
static void draw(const Plot& p) {  // curves, in the terminal
  const int rows = 16, places = int(p.ticks.size()), wide = std::max(2, 72 / places);
  const char* const no_colour = std::getenv("NO_COLOR");
  const bool colour = isatty(STDOUT_FILENO) && !(no_colour && *no_colour);
  const auto mark = [&](size_t i) {
    static const char* const marks[2][4] = {{"o", "x", "+", "*"}, {"●", "○", "▲", "△"}};
    const char* const m = marks[utf8()][i % 4];
    return colour ? format("\033[3%zum%s\033[0m", 4 - i % 4, m) : m;
  };
  printf("\n%s\n%s\n", p.title.c_str(), p.y.c_str());
  for (int row = rows - 1; row >= 0; row--) {
    if (row % 3 == 0) printf("%6.0f %s", p.high * row / (rows - 1), utf8() ? "┤" : "+");
    else printf("%7s%s", "", utf8() ? "│" : "|");
    for (int at = 0; at < places; at++) {
      std::string cell = " ";
      for (size_t i = p.curves.size(); i-- > 0;)  // the first one on top
        if (int(p.curves[i].y[at] / p.high * (rows - 1) + 0.5) == row) cell = mark(i);
      printf("%*s%s%*s", wide / 2, "", cell.c_str(), wide - wide / 2 - 1, "");
    }
    printf("\n");
  }
  std::string line, axis(size_t(places * wide), ' ');
  for (int i = 0; i < places * wide; i++) line += utf8() ? "─" : "-";
  for (int at = 0; at < places; at++) axis.replace(size_t(at * wide + wide / 2), p.ticks[at].size(), p.ticks[at]);
  printf("%7s%s%s\n%8s%s\n%8s%s\n", "", utf8() ? "└" : "+", line.c_str(), "", axis.c_str(), "", p.x.c_str());
  for (size_t i = 0; i < p.curves.size(); i++) printf("%8s%s %s\n", "", mark(i).c_str(), p.curves[i].name.c_str());
  for (const Band& band : p.bands) printf("%8s%s\n", "", band.name.c_str());
}
static const char svg_style[] = R"(<style>
text{fill:#222;font-size:12px;font-family:sans-serif}.paper{fill:#fff}.grid{stroke:#ccc}.band0{fill:#eee}.band1{fill:#dbe7f3}
g circle,g rect{fill:currentColor}g path{fill:none;stroke:currentColor;stroke-width:2}
.c0{color:#1f6fb4}.c1{color:#c9500b}.c2{color:#2a8a3e}.c3{color:#8d3fa8}
.c1 path{stroke-dasharray:7 3}.c2 path{stroke-dasharray:2 3}.c3 path{stroke-dasharray:9 3 2 3}
@media(prefers-color-scheme:dark){text{fill:#ddd}.paper{fill:#14171c}.grid{stroke:#444}.band0{fill:#22262d}
.band1{fill:#1d2f42}.c0{color:#6cb4f0}.c1{color:#ff9c5a}.c2{color:#6fd086}.c3{color:#d29be8}}
</style><rect class='paper' width='100%' height='100%'/>
)";
// The plots one below the other, if there is a path; the colours are the viewer's, light or dark.
static void write_svg(const std::string& path, const std::vector<Plot>& plots, const std::string& caption) {
  if (path.empty()) return;
  const double left = 62, width = 640;
  double top = 0;
  std::string s;
  const auto text = [&](double x, double y, const char* anchor, const std::string& words) {
    s += format("<text x='%.1f' y='%.1f' text-anchor='%s'>%s</text>\n", x, y, anchor, words.c_str());
  };
  for (const Plot& p : plots) {
    const int lines = p.bars ? 1 : 5;
    const double height = p.bars ? 62 : 250, step = width / double(p.ticks.size()), base = top + 46 + height;
    text(left, top + 18, "start' font-weight='bold", p.title);
    text(left - 50, base - height - 10, "start", p.y);
    text(left + width, base + 31, "end", p.x);
    for (size_t i = 0; i < p.bands.size(); i++) {
      const auto& [from, to, name] = p.bands[i];
      s += format("<rect class='band%zu' x='%.1f' y='%.1f' width='%.1f' height='%g'/>\n", i % 2, left + from * step,
                  base - height, (to - from) * step, height);
      text(left + (from + to) / 2 * step, base - height - 10, "middle", name);
    }
    for (int i = 0; i <= lines; i++) {
      const double y = base - height * i / lines;
      s += format("<path class='grid' d='M%g %.1fh%g'/>", left, y, width);
      text(left - 6, y + 4, "end", format("%.0f", p.high * i / lines));
    }
    for (size_t at = 0; at < p.ticks.size(); at++)
      if (!p.ticks[at].empty()) text(left + (double(at) + .5) * step, base + 15, "middle", p.ticks[at]);
    for (size_t i = 0; i < p.curves.size(); i++) {
      s += format("<g class='c%zu'>", i);
      std::string line;
      for (size_t at = 0; at < p.ticks.size(); at++) {
        const double h = p.curves[i].y[at] / p.high * height, x = left + (double(at) + .5) * step, wide = .35 * step;
        line += format("%s%.1f %.1f", at == 0 ? "M" : "L", x, base - h);
        if (!p.bars) s += format("<circle cx='%.1f' cy='%.1f' r='%zu'/>", x, base - h, 6 - i);  // seen where they meet
        else if (h > 0)
          s += format("<rect x='%.1f' y='%.1f' width='%.1f' height='%.1f'/>", x + (double(i) - 1) * wide, base - h,
                      wide, h);
      }
      if (!p.bars) s += "<path d='" + line + "'/>";
      const double x = left + 155 * double(i), y = base + (p.bars ? 31 : 52);
      s += format("<rect x='%.1f' y='%.1f' width='11' height='11'/></g>\n", x, y - 10);
      text(x + 16, y, "start", p.curves[i].name);
    }
    top = base + (p.bars ? 36 : 62);
  }
  text(left - 50, top + 18, "start", caption);
  const std::string size = format("viewBox='0 0 720 %g' width='720' height='%g'", top + 32, top + 32);
  s = "<svg xmlns='http://www.w3.org/2000/svg' " + size + " role='img'>\n<title>" + plots[0].title + "</title>\n" +
      svg_style + s;
  write_file(path, s + "</svg>\n");
  printf("\nwrote %s\n", path.c_str());
}

// ==== What each technique is for: compare and histogram ==============================================================
// Trains on data that is loaded already, without a row an epoch, until the end or to where no scale can help.
static Run learn(const Options& o, const Dataset& data) {
  Run run;
  run.o = o, run.data = data, run.quiet = true;
  prepare(run);
  try {
    const bool as_it_is = !o.resume.empty() && !o.has("epochs");  // a model to look at, though it may be unfinished
    while (!as_it_is && run.t.epoch < run.o.epochs && !stop_signal) train_epoch(run);
  } catch (const Error&) {
    if (!run.t.state.halted) throw;
  }
  if (stop_signal) fail("stopped");
  return run;
}
// Per cent of the non-zero gradients, deltas and dW, that this run's types flush to zero
static double flushed(const Run& run) {
  const std::vector<Probe> seen = probe(run.t.net, run.batch, run.t.state.scale);
  double zero = 0, all = 0;
  for (int l = 1; l <= run.t.net.L; l++)
    for (const Exponents* e : {&seen[l].delta, &seen[l].dW}) {
      all += double(e->nonzero());
      if (run.t.net.layer[l].type == Type::fp16) zero += double(e->between(Exponents::lowest, -25));
    }
  return 100 * zero / std::max(all, 1.);
}
struct Setting {              // the defaults, fp16 with fp32 masters and a dynamic loss scale, but for one change
  const char *name, *sweeps;  // which sweeps draw it too
  void (*change)(Options&);
};
static const Setting settings[] = {
    {"fp32", "", [](Options& o) { o.precision = Type::fp32; }},
    {"mixed: fp16, master", "scale, lr", [](Options&) {}},
    {"mixed, no loss scaling", "", [](Options& o) { o.loss_scale = 1; }},
    {"fp16, no master", "lr", [](Options& o) { o.update = Update::half; }},
    {"fp16, Kahan", "", [](Options& o) { o.update = Update::kahan; }},
    {"fp16, stochastic", "", [](Options& o) { o.update = Update::stochastic; }},
    {"bf16, master", "lr", [](Options& o) { o.precision = Type::bf16; }},
    {"bf16, no master", "lr", [](Options& o) { o.precision = Type::bf16, o.update = Update::half; }},
    {"auto: fp16 or fp32 by layer", "scale", [](Options& o) { o.automatic = true; }}};
static int compare(const Options& o, const Dataset& data) {
  printf("%-29s accuracy  final loss  skipped   flushed    weights  activations  gradients  seconds\n", "");
  double fp32 = 0;
  int as_good = 0;
  for (const Setting& s : settings) {
    Options changed = o;
    s.change(changed);
    const Run run = learn(changed, data);
    const bool finished = !run.t.state.halted;
    const Footprint bytes = footprint(run.t.net);
    if (changed.precision == Type::fp32) fp32 = run.test_accuracy;
    else as_good += finished && run.test_accuracy >= fp32 - 0.3;
    printf("%-29s %7.2f%%  %10.4g  %7d  %7.2f%%  %9zu  %11zu  %9zu  %7.2f%s\n", s.name, run.test_accuracy,
           run.mean_loss, run.t.state.skipped, flushed(run), bytes.weights + bytes.master + bytes.compensation,
           bytes.activations, bytes.gradients, run.taken, finished ? "" : "  halted");
  }
  const char* const easy = ": this network is easy. Where they stop: mp compare --sweep scale, mp compare --sweep lr.";
  printf("\n%d of 8 come within 0.3 points of fp32%s\n", as_good,
         as_good < 6 ? ": the others show what their missing technique was for." : easy);
  return 0;
}
// Accuracy over a fixed loss scale, with what a dynamic one does, or over the learning rate
static int sweep(const Options& o, const Dataset& data) {
  const bool rates = o.sweep == "lr";
  std::vector<float> values;
  for (int exponent = -24; exponent <= 24; exponent += 2) values.push_back(std::ldexp(1.f, exponent));
  if (rates) values = {1e-4f, 3e-4f, 1e-3f, 3e-3f, 0.01f, 0.03f, 0.1f, 0.3f};
  Plot p = {format("Test accuracy over %s, %s, %d epoch%s", rates ? "the learning rate" : "a fixed loss scale",
                   joined(o.layers, "-").c_str(), o.epochs, o.epochs > 1 ? "s" : ""),
            rates ? "learning rate" : "loss scale",
            "test accuracy, per cent",
            {},
            {},
            {}};
  printf("%13s", p.x.c_str());
  std::vector<Setting> tried;
  for (const Setting& s : settings)
    if (strstr(s.sweeps, o.sweep.c_str()))
      tried.push_back(s), p.curves.push_back({s.name, {}}), printf("  %27s", s.name);
  for (const float value : values) {
    const std::string label = rates ? text_of(value) : "2^" + std::to_string(std::ilogb(value));
    p.ticks.push_back(rates || std::ilogb(value) % 8 == 0 ? label : "");
    printf("\n%13s", label.c_str());
    for (size_t i = 0; i < tried.size(); i++) {
      Options changed = o;
      tried[i].change(changed);
      (rates ? changed.lr : changed.loss_scale) = value;
      const Run run = learn(changed, data);
      p.curves[i].y.push_back(run.test_accuracy);
      printf("  %6.2f%%, %5d steps skipped", run.test_accuracy, run.t.state.skipped), fflush(stdout);
    }
  }
  printf("\n");
  if (!rates) {
    const Run run = learn(o, data);
    const double first = std::log2(o.scale_init), last = std::log2(run.t.state.scale);
    p.bands = {{(std::min(first, last) + 24) / 2, (std::max(first, last) + 24) / 2 + 1,
                format("dynamic: 2^%.0f%s, %.2f%%", first, first == last ? "" : format(" to 2^%.0f", last).c_str(),
                       run.test_accuracy)}};
  }
  draw(p);
  const std::string lost = "Without master weights, a step below half a unit in the last place of a weight is lost; ";
  const char* const cliffs =
      "Left cliff: gradients flush to zero. Right cliff: they overflow and every step is skipped.";
  write_svg(o.svg, {p}, rates ? lost + "bf16 has 8 bits, fp16 11." : cliffs);
  return 0;
}
// Exponents of a, delta and dW, in fp32, against fp16's ranges, without the loss scale and with it
static int histogram(const Options& o, const Dataset& data) {
  Run run = learn(o, data);
  shuffle(run);
  const float scale = run.t.state.scale;
  const std::vector<Probe> seen[] = {probe(run.t.net, run.batch, 1), probe(run.t.net, run.batch, scale)};
  const std::pair<const char*, Exponents Probe::*> tensors[] = {
      {"a", &Probe::a}, {"delta", &Probe::delta}, {"dW", &Probe::dW}};
  static const char* const heights[2][9] = {{" ", ".", ":", "-", "=", "+", "*", "%", "@"},
                                            {" ", "▁", "▂", "▃", "▄", "▅", "▆", "▇", "█"}};
  const int low = -40, high = 18;  // of the picture
  std::vector<Plot> plots;
  printf("Exponents in fp32; height: share of the non-zero values. In fp16 they are\n%-15s|%-11s|%-30s|inf\n",
         "2^-40: 0", "subnormal", "normal, 2^-14 to 65504");
  for (int l = 1; l <= run.t.net.L; l++)
    for (const auto& [name, tensor] : tensors) {
      Plot p = {format("layer %d, %s", l, name), "exponent: |value| from 2^x", "per cent", {}, {}, {}, 10, true};
      p.bands = {{0, 15, "0"}, {15, 26, "subnormal"}, {26, 56, "normal"}, {56, 58, "inf"}};  // from 2^-25, 2^-14, 2^16
      for (int x = low; x < high; x++) p.ticks.push_back(x % 10 ? "" : std::to_string(x));
      const bool activations = tensor == &Probe::a;  // they are not scaled
      for (int scaled = 0; scaled <= !activations; scaled++) {
        const Exponents& e = seen[scaled][l].*tensor;
        const double one_percent = double(std::max<int64_t>(e.nonzero(), 1)) / 100;
        Curve c = {activations ? "values" : scaled ? "times " + text_of(scale) : "without loss scale", {}};
        std::string picture;
        for (int x = low; x < high; x++) {
          const int64_t n = x == 16 ? e.overflow : e.between(x == low ? Exponents::lowest : x, x + 1);
          c.y.push_back(double(n) / one_percent), p.high = std::max(p.high, c.y.back());
          if (x == -25 || x == -14 || x == 16) picture += utf8() ? "│" : "|";
          picture += heights[utf8()][n > 0 ? 1 + std::min(int(c.y.back() / 2.5), 7) : 0];
        }
        printf("%s\nlayer %d, %s, %s: %.1f%% to zero, %.1f%% subnormal, %.1f%% overflow\n", picture.c_str(), l, name,
               c.name.c_str(), double(e.between(Exponents::lowest, -25)) / one_percent,
               double(e.between(-25, -14)) / one_percent, double(e.overflow) / one_percent);
        p.curves.push_back(c);
      }
      plots.push_back(p);
    }
  write_svg(o.svg, plots,
            format("Exponents in fp32 after epoch %d, %s; shares of the non-zero values; below 2^-40 counts as 2^-40.",
                   run.t.epoch, joined(run.o.layers, "-").c_str()));
  return 0;
}
static int pictures(Options o, bool comparing) {  // mp compare, or else mp histogram
  const std::string command = comparing ? "compare" : "histogram";
  if (!o.save.empty() || !o.log.empty()) misuse("mp " + command + " saves no model and no log; mp train does");
  const bool fixed = o.has("precision") || o.has("update") || o.has("loss-scale") || o.has("resume");
  if (comparing && (fixed || !o.files.empty()))
    misuse("mp compare tries every --precision, --update and --loss-scale from the start: no resuming, no files");
  if (comparing && o.sweep.empty() && !o.svg.empty()) misuse("--svg needs --sweep scale or --sweep lr");
  if (!comparing && (!o.sweep.empty() || o.files.size() > 1)) misuse("mp histogram [MODEL] [--svg FILE] [OPTION...]");
  if (!o.svg.empty()) check_can_save(o.svg);
  if (!o.files.empty()) o.resume = o.files[0];
  if (o.resume.empty() && !o.has("epochs")) o.epochs = !comparing ? 1 : o.sweep.empty() ? 15 : 3;
  const Dataset data = load_dataset(o.data);
  for (const int signal_ : {SIGINT, SIGTERM}) signal(signal_, on_signal);
  printf("%s · %s\n%s: %d images to train on, %d to test\n\n", machine().c_str(), joined(o.layers, "-").c_str(),
         data.what.c_str(), data.train.count, data.test.count);
  return !comparing ? histogram(o, data) : o.sweep.empty() ? compare(o, data) : sweep(o, data);
}
static Mlp open_model(Options& o) {  // the first of o.files, with the options that it was trained with
  const std::string& path = o.files[0];
  const SafeTensors file = read_safetensors(path);
  if (file.metadata.count("precision") == 0) o.precision = Type::fp32;  // written by another program
  take_options(o, file, path), take_layers(o, file, path);
  Mlp net = make_mlp(o.layers, 64, o.precision, o.update);
  take_weights(net, file);
  if (o.automatic) take_types(net, file, path);
  return net;
}
static int test(Options o) {
  if (o.files.size() != 1) misuse("mp test MODEL [--data DIR]: one saved model, as --save writes it");
  Mlp net = open_model(o);
  const Dataset data = load_dataset(o.data);
  o.batch = 1;
  check_fit(o, data.test);
  const std::vector<int> answer = predict(net, data.test.pixel);
  int count[10][10] = {}, right = 0;
  for (size_t i = 0; i < answer.size(); i++) count[data.test.label[i]][answer[i]]++;
  printf("%s\n%s: %d images\n\nis \\ read as", describe(o).c_str(), data.what.c_str(), data.test.count);
  for (int c = 0; c < 10; c++) printf("%6d", c);
  for (int digit = 0; digit < 10; digit++) {
    printf("\n%12d", digit);
    for (const int n : count[digit]) printf("%6d", n);
    right += count[digit][digit];
  }
  printf("\n\ntest accuracy %.2f%%\n", 100.0 * right / data.test.count);
  return 0;
}

// ==== How fast: the ladder and the training step =====================================================================
struct Seconds {
  double least, median, most;
};
// Of each of the `times` things that a call of work() does. A run is as many calls as take 20 ms, or one.
template <class F> static Seconds time_of(int times, F work) {
  const auto run = [&](int calls) {
    const double start = seconds();
    for (int i = 0; i < calls; i++) work();
    CHECK(cudaDeviceSynchronize());
    return (seconds() - start) / calls / times;
  };
  const double first = run(1) * times;  // it fills caches and makes recordings, which only a short run feels
  const double once = first < 2 ? run(1) * times : first, begin = seconds();
  const int calls = std::clamp(int(0.02 / once), 1, 1000);
  std::vector<double> runs(first < 2 ? 0 : 1, first / times);
  while (runs.size() < 3 || (runs.size() < 9 && seconds() - begin < 1)) runs.push_back(run(calls));
  std::sort(runs.begin(), runs.end());
  return {runs.front(), runs[runs.size() / 2], runs.back()};
}
// What the machine could do: multiply-adds on numbers that never leave the registers. Each sum feeds itself, for what is
// the same every time a compiler would compute once; 12 of them hide how long one takes, and fit into the registers.
constexpr int peak_sums = 12;
__global__ void peak_kernel(const float* random, float x, int rounds, float* out) {
  Wide sum[peak_sums];
  for (int i = 0; i < peak_sums; i++) sum[i] = reinterpret_cast<const Wide*>(random)[i];
  for (int n = 0; n < rounds; n++) {
    UNROLL for (int i = 0; i < peak_sums; i++) add_product(sum[i], x, sum[i]);
  }
  float total = 0;  // of all: what is not used is not computed
  UNROLL for (int i = 0; i < peak_sums; i++) UNROLL for (int j = 0; j < WIDE; j++) total += element(sum[i], j);
  out[blockIdx.x * blockDim.x + threadIdx.x] = total;
}
static Tensor random_tensor(int rows, int cols, Type type) {
  std::vector<float> values(size_t(rows) * cols);
  for (size_t i = 0; i < values.size(); i++) values[i] = float(uniform(1, i)) - 0.5f;
  const Tensor t = make_tensor(rows, cols, type);
  return to_device(values, t), t;
}
static void csv_row(const std::string& what, Type type, const char* rung, const Seconds& s, double rate,
                    const Footprint& b = {}) {
  printf("%s,%s,%s,%.9g,%.9g,%.9g,%.6g,%zu,%zu,%zu,%zu\n", what.c_str(), type_names[int(type)].c_str(), rung, s.median,
         s.least, s.most, rate, b.weights, b.master, b.activations, b.gradients);
}
static double peak_flops(bool csv) {
  const int threads = 64 * multiprocessors() * element_threads, rounds = 20000;
  const Tensor random = random_tensor(1, peak_sums * WIDE, Type::fp32);
  const auto out = device_array<float>(size_t(threads));
  const Seconds s = time_of(1, [&] {
    launch(peak_kernel, threads / element_threads, element_threads, random.as<const float>(), 1e-9f, rounds, out.get());
  });
  const double peak = 2.0 * peak_sums * WIDE * rounds * threads / s.least;  // a busy neighbour makes no lower peak
  if (csv) csv_row("peak,,,,", Type::fp32, "", s, peak);
  else printf("peak of fp32 multiply-adds, measured: %.1f GFLOP/s\n", peak * 1e-9);
  return peak;
}

struct Rung {
  const char* name;
  std::function<void(Layout, const Tensor&, const Tensor&, const Tensor&)> product;
};
#if defined(__CUDACC__)  // NVIDIA's own products, a yardstick that training never uses, exist on its GPUs alone
static void cublas(Layout layout, const Tensor& A, const Tensor& B, const Tensor& C) {
  static cublasHandle_t handle = nullptr;
  const auto must = [](cublasStatus_t status) {
    if (status != CUBLAS_STATUS_SUCCESS) fail("cuBLAS failed with status %d", int(status));
  };
  if (!handle) must(cublasCreate(&handle)), must(cublasSetStream(handle, stream()));
  const cudaDataType type = C.type == Type::fp32 ? CUDA_R_32F : C.type == Type::fp16 ? CUDA_R_16F : CUDA_R_16BF;
  const float one = 1, zero = 0;  // its matrices go down the columns: C^T = B^T A^T
  must(cublasGemmEx(handle, layout == Layout::ABt ? CUBLAS_OP_T : CUBLAS_OP_N,
                    layout == Layout::AtB ? CUBLAS_OP_T : CUBLAS_OP_N, C.cols, C.rows,
                    layout == Layout::AtB ? A.rows : A.cols, &one, B.memory.get(), type, B.stride, A.memory.get(), type,
                    A.stride, &zero, C.memory.get(), type, C.stride, CUBLAS_COMPUTE_32F, CUBLAS_GEMM_DEFAULT));
}
static const Rung yardstick = {"cuBLAS", cublas};
#else
static const Rung yardstick = {"cuBLAS", nullptr};
#endif
// A product by every rung: rate, share of the peak and of cuBLAS. Small ones are recorded by the dozen, as in training:
// on a GPU a launch takes longer than they do.
static void bench_product(Layout layout, int M, int N, int K, Type type, double peak, bool csv) {
  static const Rung rungs[] = {yardstick,
                               {"naive", [](auto... operands) { gemm_naive(operands...); }},
                               {"tiled", [](auto... operands) { gemm_tiled(operands...); }},
                               {"mma", [](auto... operands) { gemm_mma(operands...); }}};
  static std::map<std::string, double> rate_before;  // of a smaller product by the same rung and type
  const char* const formula = layout == Layout::ABt ? "A B^T" : layout == Layout::AB ? "A B" : "A^T B";
  const char* const type_name = type_names[int(type)].c_str();
  const Tensor A = layout == Layout::AtB ? random_tensor(K, M, type) : random_tensor(M, K, type);
  const Tensor B = layout == Layout::ABt ? random_tensor(N, K, type) : random_tensor(K, N, type);
  const Tensor C = make_tensor(M, N, type);
  const double flops = 2.0 * M * N * K;
  const int times = flops < 1e8 ? 12 : 1;
  double of_cublas = 0;
  if (!csv) printf("\n%s, %s, M N K = %d %d %d\n", formula, type_name, M, N, K);
  for (const Rung& rung : rungs) {
    double& rate = rate_before[std::string(rung.name) + type_name];
    const bool too_slow = rate > 0 && flops / rate > 0.5, is_mma = &rung == rungs + 3;
    if (!rung.product || too_slow || (is_mma && !tensor_cores(type))) continue;
    Graph graph;
    const auto multiply = [&] {
      for (int i = 0; i < times; i++) rung.product(layout, A, B, C);
    };
    const Seconds s = time_of(times, [&] { replay(graph, multiply); });
    rate = flops / s.median;
    if (csv) {
      csv_row(format("product,%s,%d,%d,%d", formula, M, N, K), type, rung.name, s, rate);
      continue;
    }
    if (&rung == rungs) of_cublas = rate;
    printf("  %-6s %9.1f GFLOP/s (%.1f to %.1f) %6.1f%% of the fp32 peak", rung.name, rate * 1e-9,
           flops / s.most * 1e-9, flops / s.least * 1e-9, 100 * rate / peak);
    if (of_cublas > 0) printf(" %6.1f%% of cuBLAS", 100 * rate / of_cublas);
    printf("  %s\n", bar(rate / (of_cublas > 0 ? of_cublas : peak), 30).c_str());
  }
}
// Training steps on random images: microseconds, images a second, bytes. Fewer images where the products of a step alone,
// at `rate` flops a second, would take more than 4.5 seconds: on two cores all of mp bench then takes some 90 at most.
static void bench_step(const std::vector<int>& sizes, int full_batch, double rate, bool csv) {
  const int steps = full_batch < 1000 ? 100 : 1;  // in a call of work()
  const double MiB = 1 << 20;
  const std::string layers = joined(sizes, "-");
  double flops = 0;  // an image: E2 and E5, from the second layer on E4 too
  for (size_t l = 1; l < sizes.size(); l++) flops += (l > 1 ? 6. : 4.) * sizes[l - 1] * sizes[l];
  int batch = full_batch;
  while (batch * flops / rate > 4.5) batch /= 2;
  std::vector<uint8_t> images(size_t(steps) * batch * sizes[0]), classes(size_t(steps) * batch);
  for (size_t i = 0; i < images.size(); i++) images[i] = uint8_t(random_bits(2, i));
  for (size_t i = 0; i < classes.size(); i++) classes[i] = uint8_t(random_bits(3, i) % sizes.back());
  const auto pixels = on_device(images), labels = on_device(classes);
  Batch data;
  data.pixels = pixels.get(), data.labels = labels.get(), data.rows = batch;
  double time[2], kept_bytes[2];  // of fp32 and of fp16
  for (const Type type : {Type::fp32, Type::fp16}) {
    Mlp net = make_mlp(sizes, batch, type, Update::master);
    initialise(net);
    const float scale = type == Type::fp32 ? 1 : 65536;
    LossScaler scaler(scale);
    Graph graph;
    const Seconds s = time_of(steps, [&] {
      scaler.write({scale});  // back to the first image
      for (int i = 0; i < steps; i++) replay(graph, [&] { train_step(net, data, scaler, 0.01f); });
    });
    const Footprint b = footprint(net);
    time[int(type)] = s.median, kept_bytes[int(type)] = double(b.activations + b.gradients);
    if (csv) csv_row(format("step,%s,%d,,", layers.c_str(), batch), type, "", s, batch / s.median, b);
    else
      printf("%-19s %5d  %s %10.0f (%.0f to %.0f) %10.0f %9.2f %7.2f %11.2f %9.2f\n", layers.c_str(), batch,
             type_names[int(type)].c_str(), s.median * 1e6, s.least * 1e6, s.most * 1e6, batch / s.median,
             double(b.weights) / MiB, double(b.master) / MiB, double(b.activations) / MiB, double(b.gradients) / MiB);
  }
  if (csv) return;
  printf("%26s fp32 is %.2f times the time of fp16; bytes of activations and gradients fp16 to fp32 %.2f\n", "",
         time[0] / time[1], kept_bytes[1] / kept_bytes[0]);
  if (batch < full_batch)
    printf("%26s batch %d in place of %d, a step of which would take %.0f seconds and more here\n", "", batch,
           full_batch, full_batch * flops / rate);
}
static int bench(bool csv) {
  printf("%s\n", csv ? "what,layout or layers,M or batch,N,K,type,rung,median s,least s,most s,FLOP/s or images/s,"
                       "bytes of weights,master,activations,gradients"
                     : machine().c_str());
  const double peak = peak_flops(csv);
  const auto products = [&](Layout layout, int M, int N, int K) {
    for (Type type : {Type::fp32, Type::fp16, Type::bf16}) bench_product(layout, M, N, K, type, peak, csv);
  };
  products(Layout::ABt, 64, 128, 784), products(Layout::AB, 64, 784, 128), products(Layout::AtB, 128, 784, 64);
  for (int n : {1024, 4096, 8192})
    for (Layout layout : {Layout::ABt, Layout::AB, Layout::AtB})
      if (n == 1024 || yardstick.product) products(layout, n, n, n);  // a CPU would need minutes for more
  const char* const columns = "batch  type  microseconds  images/s  MiB: weights  master  activations  gradients";
  if (!csv) printf("\na training step      %s\n", columns);
  const Tensor A = random_tensor(1024, 1024, Type::fp32), C = make_tensor(1024, 1024, Type::fp32);
  const double rate = 2.0 * 1024 * 1024 * 1024 / time_of(1, [&] { gemm(Layout::ABt, A, A, C); }).median;
  bench_step({784, 128, 10}, 64, rate, csv);
  bench_step({784, 8192, 10}, 8192, rate, csv);
  bench_step({4096, 4096, 4096, 10}, 4096, rate, csv);
  return 0;
}

// ==== Any picture of a digit, brought to MNIST's form ================================================================
struct Picture {
  int width, height;
  std::vector<float> value;  // [height, width]
};
// [height, width] means over squares of `step` pixels, the first with its corner at (left, top). Outside are zeros.
static Picture resample(const Picture& from, double left, double top, double step, int width, int height) {
  Picture to{width, height, {}};
  const auto overlap = [&](int i, double begin) { return std::min(i + 1., begin + step) - std::max(double(i), begin); };
  for (double y = top; int(to.value.size()) < width * height; y += step)
    for (int n = 0; n < width; n++) {
      const double x = left + n * step;
      double sum = 0;
      for (int j = std::max(0, int(std::floor(y))); j < from.height && j < y + step; j++)
        for (int i = std::max(0, int(std::floor(x))); i < from.width && i < x + step; i++)
          sum += from.value[size_t(j) * size_t(from.width) + size_t(i)] * overlap(i, x) * overlap(j, y);
      to.value.push_back(float(sum / (step * step)));
    }
  return to;
}

// How the camera was held: EXIF's entry 0x112, one 16-bit number, in either order of bytes. 1 where a file has none.
static int orientation(const Bytes& file) {
  const auto end = file.begin() + std::min<long>(long(file.size()), 1 << 16);
  for (const bool little : {true, false}) {
    const std::string_view entry(little ? "\x12\1\3\0\1\0\0\0" : "\1\x12\0\3\0\0\0\1", 8);
    const auto found = std::search(file.begin(), end, entry.begin(), entry.end());
    if (end - found > 9) return found[little ? 8 : 9];
  }
  return 1;
}
// The picture upright. EXIF counts from 1 the eight ways to mirror and to turn it; from 5 on rows are columns.
static Picture upright(const Picture& p, int way) {
  if (way < 2 || way > 8) return p;
  Picture to{way < 5 ? p.width : p.height, way < 5 ? p.height : p.width, {}};
  for (int y = 0; y < to.height; y++)
    for (int x = 0; x < to.width; x++) {
      int column = way < 5 ? x : y, row = way < 5 ? y : x;
      if (way == 2 || way == 3 || way > 6) column = p.width - 1 - column;
      if (way == 3 || way == 4 || way == 6 || way == 7) row = p.height - 1 - row;
      to.value.push_back(p.value[size_t(row) * size_t(p.width) + size_t(column)]);
    }
  return to;
}

// A PNG or JPEG in grey, 0 to 255, its longer side at most 400 pixels. What is transparent shows a paper that its ink
// stands out from.
static Picture parse_picture(const Bytes& file) {
  const bool png = !file.empty() && file[0] == 0x89;
  if (!png && (file.empty() || file[0] != 0xff)) fail("this is no PNG or JPEG");
  png ? check_png(file) : check_jpeg(file);
  int width = 0, height = 0, channels = 0;
  stb_most = 1 << 16;
  if (!stbi_info_from_memory(file.data(), int(file.size()), &width, &height, &channels)) fail("this is no PNG or JPEG");
  const size_t pixels = size_t(width) * size_t(height), kind = png ? file[25] : 0;
  const size_t bits = png ? file[24] * (kind == 3 ? 1 : 1 + (kind & 2) + kind / 4) : 0;  // a pixel, in a PNG
  if (pixels > 50'000'000) fail("%d x %d pixels are more than 50 million", width, height);
  if (pixels * bits / 8 / kDeflateRatio > file.size() || (!png && pixels / 512 > file.size()))  // a bit for 8 x 8
    fail("%d x %d pixels cannot be in this file", width, height);
  stb_most = 2 * file.size() + 9 * size_t(width + 32) * size_t(height + 32) + (1 << 16);
  const std::unique_ptr<uint8_t, void (*)(void*)> grey_and_alpha(
      stbi_load_from_memory(file.data(), int(file.size()), &width, &height, &channels, 2), stbi_image_free);
  if (!grey_and_alpha) fail("damaged, or no memory left: its pixels cannot be decoded");
  const uint8_t* const pixel = grey_and_alpha.get();
  double opaque = 1e-9, light = 0;
  for (size_t i = 0; i < pixels; i++) opaque += pixel[2 * i + 1], light += pixel[2 * i] * pixel[2 * i + 1];
  light /= opaque;  // the mean of what can be seen, which is ink if it is less than half
  const double behind = opaque > 127.5 * double(pixels) ? light : light < 127.5 ? 255 : 0;
  Picture grey{width, height, std::vector<float>(pixels)};
  for (size_t i = 0; i < pixels; i++) grey.value[i] = float(behind + (pixel[2 * i] - behind) * pixel[2 * i + 1] / 255);
  const double step = std::max(1.0, std::max(width, height) / 400.0);
  const Picture small = resample(grey, 0, 0, step, std::max(1, int(width / step)), std::max(1, int(height / step)));
  return upright(small, png ? 1 : orientation(file));
}
// Takes away the paper in its uneven light: the quadratic surface that most pixels lie near. Least absolute deviations,
// by least squares in which a pixel counts the less the farther it lay off the time before.
static void subtract_paper(Picture& p) {
  for (int round = 0; round < 20; round++)
    for (int term = 0; term < 6; term++) {  // they are nearly orthogonal, so one may be fitted after the other
      const auto f = [&](size_t i) {
        const double x = (int(i) % p.width + .5) / p.width - .5, y = (int(i) / p.width + .5) / p.height - .5;
        const double terms[] = {1, x, y, x * y, x * x - 1 / 12., y * y - 1 / 12.};
        return terms[term];
      };
      double sum = 0, squares = 1e-9;
      for (size_t i = 0; i < p.value.size(); i++) {
        const double weight = round ? 1 / (std::fabs(p.value[i]) + 1) : 1;
        sum += weight * f(i) * p.value[i], squares += weight * f(i) * f(i);
      }
      for (size_t i = 0; i < p.value.size(); i++) p.value[i] -= float(sum / squares * f(i));
    }
}
// Leaves 0 where there is paper, 1 where there is ink, between them at its edges.
static void find_ink(Picture& p) {
  subtract_paper(p);
  double tilt = 0, threshold = 0, paper = 0, ink = 0;
  for (const float x : p.value) tilt += x * std::fabs(x);  // the paper's noise is even, the ink is on one side
  for (float& x : p.value) x = tilt < 0 ? -x : x, threshold = std::max(threshold, x / 2.);
  for (int round = 0; round < 20; round++) {  // halfway between the mean of what is below and the mean of what is above
    double sum[2] = {}, count[2] = {1e-9, 1e-9};
    for (const float x : p.value) sum[x > threshold] += std::max(x, 0.f), count[x > threshold]++;
    paper = sum[0] / count[0], ink = sum[1] / count[1], threshold = (paper + ink) / 2;
  }
  if (!(ink > 12 && ink > 10 * paper)) fail("blank: nothing stands out from its background");
  for (float& x : p.value) x = float(std::clamp((x - threshold / 2) / (ink - threshold / 2), 0., 1.));
}
// [side, side] as in MNIST: white on black, fitted into 20/28 of the side, the centre of mass in the middle
static Bytes as_mnist(Picture p, int side) {
  find_ink(p);
  double mass = 0, x_sum = 0, y_sum = 0;
  int left = p.width, right = 0, top = p.height, bottom = 0;
  for (int i = 0; i < int(p.value.size()); i++) {
    const int x = i % p.width, y = i / p.width;
    mass += p.value[i], x_sum += p.value[i] * (x + .5), y_sum += p.value[i] * (y + .5);
    if (p.value[i] < .25) continue;
    left = std::min(left, x), right = std::max(right, x + 1), top = std::min(top, y), bottom = std::max(bottom, y + 1);
  }
  const double step = std::max(right - left, bottom - top) * 28. / (20 * side), middle = side * step / 2;
  p = resample(p, x_sum / mass - middle, y_sum / mass - middle, step, side, side);
  const float most = *std::max_element(p.value.begin(), p.value.end());
  Bytes bytes;
  for (const float x : p.value) bytes.push_back(uint8_t(std::lround(255 * x / most)));
  return bytes;
}
static void show(const Bytes& pixels, int side, std::vector<float> z) {  // what the network saw, and softmax of z
  const auto best = std::max_element(z.begin(), z.end());
  const float most = *best;
  float sum = 0;
  for (float& x : z) sum += x = std::exp(x - most);
  printf("%td (%.1f%%)\n", best - z.begin(), 100 / sum);
  for (int line = 0; line < std::max((side + 1) / 2, 10); line++) {  // two rows of pixels
    printf("  ");
    for (int x = 0; x < side; x++) {
      const auto at = [&](int y) { return y < side ? pixels[y * side + x] : 0; };
      const int upper = at(2 * line), lower = at(2 * line + 1);
      static const char* const block[] = {" ", "▀", "▄", "█"};
      if (utf8()) printf("%s", block[(upper > 127) + 2 * (lower > 127)]);
      else putchar(" .:-=+*#%@"[(upper + lower) * 10 / 511]);
    }
    if (line < 10) printf("  %d %5.1f%% %s", line, 100 * z[line] / sum, bar(z[line] / sum, 20).c_str());
    printf("\n");
  }
}
static int answer(Options o) {
  if (o.files.size() < 2) misuse("mp predict MODEL IMAGE...: a saved model, then PNG or JPEG files");
  Mlp net = open_model(o);
  const int side = int(std::lround(std::sqrt(o.layers.front())));
  if (side * side != o.layers.front() || o.layers.back() != 10)
    fail("%s: layers %s do not read digits: predict needs a square number of pixels and 10 classes", o.files[0].c_str(),
         joined(o.layers, ",").c_str());
  int status = 0;
  for (size_t n = 1; n < o.files.size(); n++) try {
      const Bytes pixels = parse_file(o.files[n], "predict takes a PNG or JPEG of one digit",
                                      [&](const Bytes& bytes) { return as_mnist(parse_picture(bytes), side); });
      const std::vector<float> z = logits(net, pixels);
      if (!std::all_of(z.begin(), z.end(), [](float x) { return isfinite(x); }))
        fail("%s: %s answers NaN or infinity; train it again, or in fp32", o.files[n].c_str(), o.files[0].c_str());
      printf("%s: ", o.files[n].c_str());
      show(pixels, side, z);
    } catch (const Error& error) {
      fprintf(stderr, "mp: %s\n", error.what());
      status = 1;
    }
  return status;
}

// ==== The command line ===============================================================================================
static const char usage_text[] = R"(usage: mp train [OPTION...]            learn digits, a row of figures an epoch
       mp test MODEL [--data DIR]      what a saved model gets right, and what it takes for what
       mp compare [OPTION...]          with one technique off at a time; --sweep scale|lr [--svg FILE]
       mp histogram [MODEL] [OPTION...]  exponents against fp16's range, after an epoch or of MODEL; [--svg FILE]
       mp predict MODEL IMAGE...       which digit each PNG or JPEG shows
       mp article                      the article's 1-5-1 network, as written and with ReLU
       mp bench [--csv]                the matrix products and the training step: how fast, how large
       mp --help, mp train --help      every option with its default
)";
static int print_help() {
  printf("mp trains a multi-layer perceptron in mixed precision.\n\n%s\noptions of train:\n", usage_text);
  for (const Option& option : option_table) {
    const std::string left = std::string("  --") + option.name + " " + option.values, value = option.get(Options());
    printf("%-42s %s%s\n", left.c_str(), option.help, value.empty() ? "" : (" [" + value + "]").c_str());
  }
  printf("\nMP_GEMM=naive|tiled|mma picks a rung of the matrix product; MP_THREADS=N uses N threads of a CPU; ");
  printf("MP_ORDER=forward|backward|N the order in which it runs a block's threads.\n");
  return 0;
}
static Options parse(const std::string& command, const std::vector<std::string>& words) {
  Options o;
  for (size_t i = 0; i < words.size(); i++) {
    const std::string& word = words[i];
    if (word.rfind("--", 0) != 0) {
      o.files.push_back(word);
      continue;
    }
    const size_t equals = word.find('=');
    const std::string name = word.substr(2, equals - 2);
    const Option* const option = find_option(name);
    if (!option) misuse("unknown option --" + name);
    if (command == "predict" || (command == "test" && name != "data"))
      misuse("--" + name + " is an option of mp train; mp " + command +
             (command == "test" ? " has only --data" : " has none"));
    if (o.has(option->name)) misuse("--" + name + " is given twice");
    const bool apart = equals == word.npos && i + 1 < words.size();  // --name value, not --name=value
    const std::string value = apart ? words[++i] : word.substr(std::min(equals, word.size() - 1) + 1);
    if (value.empty() || value.rfind("--", 0) == 0) misuse("--" + name + " needs a value: " + option->values);
    set_option(o, *option, value);
    o.given.push_back(option->name);
  }
  return o;
}
static int run_command(std::vector<std::string> words) {
  for (const std::string& word : words)
    if (word == "--help" || word == "-h") return print_help();
  if (words.empty()) misuse("no command");
  const std::string command = words[0];
  words.erase(words.begin());
  if (command == "article" && !words.empty()) misuse("article takes no options");
  if (command == "article") return article();
  const bool csv = words == std::vector<std::string>{"--csv"};
  if (command == "bench" && !csv && !words.empty()) misuse("bench takes no option but --csv");
  if (command == "bench") return machine(), bench(csv);
  const bool plain = command == "train", comparing = command == "compare";
  if (!plain && !comparing && command != "test" && command != "histogram" && command != "predict")
    misuse("unknown command '" + command + "'");
  const Options o = parse(command, words);
  machine();  // fails at once where a CUDA build finds no device
  if (command == "test") return test(o);
  if (command == "predict") return answer(o);
  if (!plain) return pictures(o, comparing);
  if (!o.sweep.empty() || !o.svg.empty()) misuse("--sweep and --svg are for mp compare and mp histogram");
  if (!o.files.empty()) misuse("'" + o.files[0] + "' is no option");
  return train(o);
}
// Weak, so that the tests, which have a main of their own, can be linked with this file.
__attribute__((weak)) int main(int argc, char** argv) {
  for (int standard = 0; standard <= 2; standard++)  // a closed one would be given to the next file opened
    if (fcntl(standard, F_GETFD) < 0) open("/dev/null", O_RDWR);
  std::set_terminate([] {  // the one exception that a kernel, whose thread may be another, can meet
    fprintf(stderr, "mp: out of memory; make --layers or --batch smaller, or set MP_THREADS=1\n");
    std::_Exit(1);
  });
  signal(SIGXFSZ, SIG_IGN);             // a limit on file sizes is an error, as a full disk is
  setvbuf(stdout, nullptr, _IOLBF, 0);  // into a pipe or a file, too, each row appears when it is known
  try {
    const int status = run_command({argv + 1, argv + argc});
    if (fflush(stdout) != 0 || ferror(stdout))
      fail("standard output cannot be written: %s; send it elsewhere", strerror(errno));
    return status;
  } catch (const UsageError& error) {
    fprintf(stderr, "mp: %s\n%s", error.what(), usage_text);
    return 2;
  } catch (const std::bad_alloc&) {
    fprintf(stderr, "mp: out of memory; make --layers or --batch smaller\n");
  } catch (const std::exception& error) {  // Error, or one of the file system, say
    fprintf(stderr, "%smp: %s\n", isatty(STDOUT_FILENO) ? "\r\033[K" : "", error.what());
  }
  return 1;
}
