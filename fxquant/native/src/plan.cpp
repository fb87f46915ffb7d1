// The C interface: plans are built step by step, and run. `fxquant/native/library.py` mirrors it.
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <map>
#include <memory>
#include <new>
#include <numeric>
#include <vector>

#include "attention.h"
#include "depthwise.h"
#include "elementwise.h"
#include "gemm.h"
#include "normalization.h"
#include "pooling.h"
#include "threads.h"

using namespace fxq;

namespace {

// Memory for constants, all zero at first. It comes in large pages where the system has them: the
// weights of a large model are read once a call, each page of them anew.
class Store {
 public:
  Store() = default;
  Store(const Store&) = delete;
  Store& operator=(const Store&) = delete;
  ~Store() {
    for (uint8_t* chunk : chunks_) std::free(chunk);
  }

  template <typename T>
  T* keep(size_t count) {
    constexpr size_t kBehind = 64;  // bytes that vectors may read further
    const size_t bytes = (count * sizeof(T) + 2 * kBehind - 1) / kBehind * kBehind;
    if (bytes > left_) grow(bytes);
    uint8_t* const data = next_;
    next_ += bytes, left_ -= bytes;
    return reinterpret_cast<T*>(data);
  }

  // What was made under this key before, or what `make` makes now: plans for several shapes of one
  // model share their weights.
  using Key = std::array<int64_t, 6>;
  template <typename T, typename F>
  T once(const Key& key, const F& make) {
    auto& known = made_[key];
    if (known == nullptr) known = std::make_shared<T>(make());
    return *static_cast<const T*>(known.get());
  }

  size_t bytes() const { return total_; }

 private:
  void grow(size_t bytes) {
    constexpr size_t kPage = size_t{1} << 21;
    const size_t size = (std::max(bytes, total_ / 8) + kPage - 1) / kPage * kPage;
    next_ = static_cast<uint8_t*>(std::aligned_alloc(kPage, size));
    if (next_ == nullptr) throw std::bad_alloc();
    madvise(next_, size, MADV_HUGEPAGE);  // a wish, which may be refused
    memset(next_, 0, size);
    chunks_.push_back(next_);
    left_ = size, total_ += size;
  }

  std::vector<uint8_t*> chunks_;
  std::map<Key, std::shared_ptr<void>> made_;
  uint8_t* next_ = nullptr;
  size_t left_ = 0, total_ = 0;
};

struct Plan {
  std::vector<std::unique_ptr<Step>> steps;
  std::vector<const Step*> order;
  std::shared_ptr<Store> store;
  template <typename S>
  void add(std::unique_ptr<S> step) {
    order.push_back(step.get());
    steps.push_back(std::move(step));
  }
};

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

struct ConvolutionArguments {
  Tensor in, out, other, parameters;
  const int8_t* weight;       // [output channels][input channels / groups][kernel_h][kernel_w]
  const float* weight_scale;  // per output channel
  const float* bias;          // per output channel; null for none
  int64_t identity;           // of the node in its model
  int32_t has_other, groups, kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w;
  int32_t dilation_h, dilation_w, fbgemm, to_float, activation, in_zero_point, depthwise, dynamic;
  float in_scale, inverse, zero_point, low, high, alpha, beta, other_scale, other_zero_point, out_scale;
};

struct MoveArguments {  // steps of one or two inputs
  Tensor a, b, out;
  int64_t stride_n, stride_c, stride_h, stride_w, element;
  const void* table;  // bytes, channels or factors
  const float* term;
  __m512 (*exp16)(__m512);
  int32_t a_zero_point, b_zero_point, function, count_padding, divisor, from_bytes;
  int32_t kernel_h, kernel_w, window_stride_h, window_stride_w, padding_h, padding_w;
  int32_t dilation_h, dilation_w;
  float a_scale, b_scale, inverse, zero_point, low, multiplier, epsilon;
};

struct AttentionArguments {
  Tensor query, key, value, mask, out;  // [images * length][heads * size]; only the mask's place
  int64_t images, heads, mask_image, mask_head, mask_query, mask_key;
  int32_t mask_kind;
  float scale;
};

int64_t fxq_convolution_arguments_size() { return sizeof(ConvolutionArguments); }
int64_t fxq_move_arguments_size() { return sizeof(MoveArguments); }
int64_t fxq_attention_arguments_size() { return sizeof(AttentionArguments); }

std::shared_ptr<Store>* fxq_store_create() { return new auto(std::make_shared<Store>()); }
void fxq_store_destroy(std::shared_ptr<Store>* store) { delete store; }
int64_t fxq_store_bytes(const std::shared_ptr<Store>* store) {
  return static_cast<int64_t>((*store)->bytes());
}

Plan* fxq_plan_create(const std::shared_ptr<Store>* store) { return new Plan{{}, {}, *store}; }
void fxq_plan_destroy(Plan* plan) { delete plan; }

struct Constants {
  int32_t* correction;
  float *scale, *bias;
  double largest;  // of the results
};

// channel_at[i]: the channel whose constants are the i-th; -1 for none.
static Constants constants_of(Store& store, const ConvolutionArguments& a,
                              const std::vector<int64_t>& channel_at) {
  const size_t padded = channel_at.size();
  const int64_t inputs = a.in.c / a.groups, window = int64_t{a.kernel_h} * a.kernel_w;
  Constants made{store.keep<int32_t>(padded), store.keep<float>(padded), store.keep<float>(padded), 0};
  for (size_t at = 0; at < padded; at++) {
    const int64_t o = channel_at[at];
    if (o < 0) continue;
    int64_t sum = 0, magnitude = 0;
    for (int64_t i = 0; i < inputs * window; i++) {
      const int64_t weight = a.weight[o * inputs * window + i];
      sum += weight;
      magnitude += std::abs(weight);
    }
    const double reach = 255.0 * magnitude * a.in_scale * std::fabs(a.weight_scale[o]);
    const double bias_size = a.bias == nullptr ? 0.0 : std::fabs(a.bias[o]);
    const double added = a.has_other ? 255.0 * a.other_scale : 0.0;
    made.largest = std::max(made.largest, (reach + bias_size + added) * a.inverse + 255);
    made.correction[at] = static_cast<int32_t>(-sum * a.in_zero_point);
    made.scale[at] = a.weight_scale[o];
    made.bias[at] = a.bias == nullptr ? 0.0f : a.bias[o];
    if (a.fbgemm) {
      const float both = a.weight_scale[o] * a.in_scale;
      made.scale[at] = both / a.out_scale;
      made.bias[at] = a.bias == nullptr ? 0.0f : a.bias[o] / both;
    }
  }
  return made;
}

static Requantize requantize_of(const ConvolutionArguments& a, const Constants& c) {
  return {c.correction,
          c.scale,
          c.bias,
          a.in_scale,
          a.inverse,
          a.zero_point,
          a.low,
          a.high,
          a.fbgemm,
          a.to_float,
          static_cast<Activation>(a.activation),
          a.alpha,
          a.beta,
          nullptr,
          a.other_scale,
          a.other_zero_point,
          a.dynamic,
          c.largest < 1e9};
}

enum class Kept : int64_t { weights, constants, padding };

static Store::Key of_kind(Store::Key key, Kept kind) {
  key[0] = static_cast<int64_t>(kind);
  return key;
}

static const uint8_t* padding_row(Store& store, const ConvolutionArguments& a) {
  return store.once<uint8_t*>(of_kind({0, a.identity, a.in.c, 0, 0, 0}, Kept::padding), [&] {
    const size_t bytes = static_cast<size_t>(round_up(a.in.c, 64) + 64);
    auto* row = store.keep<uint8_t>(bytes);
    memset(row, a.in_zero_point, bytes);
    return row;
  });
}

static void add_depthwise(Plan* plan, const ConvolutionArguments& a) {
  auto step = std::make_unique<DepthwiseConvolution>();
  auto& d = *step;
  d.in = a.in, d.out = a.out, d.other = a.other, d.has_other = a.has_other != 0;
  d.kernel_h = a.kernel_h, d.kernel_w = a.kernel_w, d.stride_h = a.stride_h;
  d.stride_w = a.stride_w, d.padding_h = a.padding_h, d.padding_w = a.padding_w;
  d.dilation_h = a.dilation_h, d.dilation_w = a.dilation_w;
  d.tile_pixels = 1;
  d.column_groups = a.kernel_w <= 4 ? 1 : 2;
  const int64_t whole = round_up(a.out.c, 64);
  const int64_t period = std::lcm(a.out.c, int64_t{64});  // bytes until pixels and chunks meet again
  const bool dense = a.in.pixel == a.in.c && a.out.pixel == a.out.c &&
                     (!a.has_other || a.other.pixel == a.other.c);
  d.flat = dense && a.stride_w == 1 && 10 * a.out.c < 7 * whole && period <= 64 * 32;
  if (a.dilation_w == 1 && !d.flat) {
    if (a.stride_w == 1 && a.kernel_w <= 3) d.tile_pixels = 2;
    if (a.stride_w == 1 && a.kernel_w == 5) d.tile_pixels = 4;
    if (a.stride_w == 1 && (a.kernel_w == 6 || a.kernel_w == 7)) d.tile_pixels = 2;
    if (a.stride_w == 2 && (a.kernel_w == 5 || a.kernel_w == 6)) d.tile_pixels = 2;
  }
  const int64_t chunks = (d.flat ? period : whole) / 64;
  d.chunks = static_cast<int>(chunks);
  const int64_t group_size = int64_t{d.tile_pixels} * 256;
  std::vector<int64_t> channel_at(chunks * 64, -1);  // of each lane
  for (int64_t lane = 0; lane < chunks * 64; lane++) {
    const int64_t byte = lane / 64 * 64 + depthwise_channel(static_cast<int>(lane % 64));
    const int64_t channel = d.flat ? byte % a.out.c : byte;
    if (channel < a.out.c) channel_at[lane] = channel;
  }
  Store& store = *plan->store;
  const Store::Key layout{0, a.identity, d.flat, d.tile_pixels, chunks, 1};
  d.weights = store.once<int8_t*>(of_kind(layout, Kept::weights), [&] {
    auto* packed = store.keep<int8_t>(chunks * a.kernel_h * d.column_groups * group_size);
    for (int64_t lane = 0; lane < chunks * 64; lane++) {
      const int64_t channel = channel_at[lane];
      if (channel < 0) continue;
      for (int64_t ky = 0; ky < a.kernel_h; ky++) {
        for (int64_t column = 0; column < 4 * d.column_groups; column++) {
          for (int64_t t = 0; t < d.tile_pixels; t++) {
            const int64_t kx = column - t * a.stride_w;
            if (kx < 0 || kx >= a.kernel_w) continue;
            const int64_t group = (lane / 64 * a.kernel_h + ky) * d.column_groups + column / 4;
            packed[group * group_size + t * 256 + lane % 64 * 4 + column % 4] =
                a.weight[(channel * a.kernel_h + ky) * a.kernel_w + kx];
          }
        }
      }
    }
    return packed;
  });
  d.requantize = requantize_of(a, store.once<Constants>(of_kind(layout, Kept::constants), [&] {
    return constants_of(store, a, channel_at);
  }));
  d.padding_row = padding_row(store, a);
  plan->add(std::move(step));
}

void fxq_add_convolution(Plan* plan, const ConvolutionArguments* arguments) {
  const ConvolutionArguments& a = *arguments;
  if (a.depthwise) return add_depthwise(plan, a);
  auto step = std::make_unique<GemmConvolution>();
  auto& g = *step;
  g.in = a.in, g.out = a.out, g.other = a.other, g.parameters = a.parameters;
  g.has_other = a.has_other != 0;
  g.groups = a.groups, g.kernel_h = a.kernel_h, g.kernel_w = a.kernel_w;
  g.pointwise = a.kernel_h * a.kernel_w == 1 && a.stride_h == 1 && a.stride_w == 1 &&
                a.padding_h == 0 && a.padding_w == 0;
  g.whole_lines = (a.in.pixel == 4 || a.in.pixel == a.in.c) && a.in.c <= 4 && a.groups == 1 &&
                  a.padding_w == 0 && a.dilation_w == 1 && a.kernel_w <= 16;
  const int64_t inputs = a.in.c / a.groups, outputs = a.out.c / a.groups;
  const int64_t window = int64_t{a.kernel_h} * a.kernel_w;
  // Where the weights of a position lie: behind those of others in a string, or in one of their own.
  const int64_t positions = g.whole_lines ? a.kernel_h : window;
  const int64_t pixel = g.whole_lines ? a.in.pixel : 0;
  const int64_t fours =
      round_up(g.whole_lines ? a.kernel_w * a.in.pixel : inputs, 4) / 4;
  g.groups_of_4 = static_cast<int>(fours);
  g.channels = channel_blocks(outputs);
  int64_t size = 0;
  for (int64_t group = 0; group < a.groups; group++) {
    for (const ChannelBlock& block : g.channels) {
      g.packed_offset.push_back(size);
      size += positions * fours * 64 * block.vectors;
    }
  }
  Store& store = *plan->store;
  const Store::Key layout{0, a.identity, pixel, fours, size, 0};
  g.weights = store.once<int8_t*>(of_kind(layout, Kept::weights), [&] {
    auto* packed = store.keep<int8_t>(size);
    for (int64_t group = 0; group < a.groups; group++) {
      for (size_t b = 0; b < g.channels.size(); b++) {
        const ChannelBlock& block = g.channels[b];
        int8_t* to = packed + g.packed_offset[group * g.channels.size() + b];
        for (int64_t p = 0; p < window; p++) {
          const int64_t string = g.whole_lines ? p / a.kernel_w : p;
          for (int64_t i = 0; i < inputs; i++) {
            const int64_t k = p % a.kernel_w * pixel + i;  // in the string
            for (int64_t o = 0; o < 16 * block.vectors && block.channel + o < outputs; o++) {
              const int64_t channel = group * outputs + block.channel + o;
              to[((string * fours + k / 4) * 16 * block.vectors + o) * 4 + k % 4] =
                  a.weight[(channel * inputs + i) * window + p];
            }
          }
        }
      }
    }
    return packed;
  });
  g.requantize = requantize_of(a, store.once<Constants>(of_kind(layout, Kept::constants), [&] {
    const int64_t padded = round_up(outputs, 16);
    std::vector<int64_t> channel_at(a.groups * padded, -1);
    for (int64_t o = 0; o < a.out.c; o++) channel_at[o / outputs * padded + o % outputs] = o;
    return constants_of(store, a, channel_at);
  }));
  g.padding_row = padding_row(store, a);
  if (!g.pointwise) {
    for (int64_t y = 0; y < a.out.h; y++) {
      for (int64_t ky = 0; ky < a.kernel_h; ky++) {
        const int64_t iy = y * a.stride_h - a.padding_h + ky * a.dilation_h;
        g.line_offset.push_back(iy < 0 || iy >= a.in.h ? -1 : iy * a.in.w * a.in.pixel);
      }
    }
    const int64_t reach = int64_t{a.dilation_w} * (a.kernel_w - 1);
    g.first_inside = (a.padding_w + a.stride_w - 1) / a.stride_w;
    const int64_t room = a.in.w + a.padding_w - 1 - reach;
    g.last_inside = room < 0 ? 0 : std::min(a.out.w, room / a.stride_w + 1);
    for (int64_t i = 0; i < 8; i++) g.steps[i] = i * a.stride_w * a.in.pixel;
    for (int64_t x = 0; x < a.out.w; x++) {
      for (int64_t kx = 0; kx < a.kernel_w; kx++) {
        const int64_t ix = x * a.stride_w - a.padding_w + kx * a.dilation_w;
        g.column_offset.push_back(ix < 0 || ix >= a.in.w ? -1 : ix * a.in.pixel);
        if (g.whole_lines) break;
      }
    }
  }
  plan->add(std::move(step));
}

void fxq_add_quantize(Plan* plan, const MoveArguments* a) {
  auto step = std::make_unique<Quantize>();
  step->in = a->a, step->out = a->out;
  step->stride_n = a->stride_n, step->stride_c = a->stride_c;
  step->stride_h = a->stride_h, step->stride_w = a->stride_w;
  step->inverse = a->inverse, step->zero_point = a->zero_point;
  step->margin = a->padding_w, step->dynamic = a->from_bytes != 0, step->parameters = a->b;
  plan->add(std::move(step));
}

void fxq_add_choose(Plan* plan, const MoveArguments* a) {
  auto step = std::make_unique<ChooseParameters>();
  step->in = a->a, step->out = a->out, step->highest = a->divisor;
  plan->add(std::move(step));
}

void fxq_add_dequantize(Plan* plan, const MoveArguments* a) {
  auto step = std::make_unique<Dequantize>();
  step->in = a->a, step->out = a->out;
  step->scale = a->a_scale, step->zero_point = static_cast<float>(a->a_zero_point);
  plan->add(std::move(step));
}

void fxq_add_add(Plan* plan, const MoveArguments* a) {
  auto step = std::make_unique<Add>();
  step->a = a->a, step->b = a->b, step->out = a->out;
  step->a_scale = a->a_scale, step->a_zero_point = static_cast<float>(a->a_zero_point);
  step->b_scale = a->b_scale, step->b_zero_point = static_cast<float>(a->b_zero_point);
  step->inverse = a->inverse, step->zero_point = a->zero_point, step->low = a->low;
  plan->add(std::move(step));
}

void fxq_add_multiply(Plan* plan, const MoveArguments* a) {
  auto step = std::make_unique<Multiply>();
  step->a = a->a, step->b = a->b, step->out = a->out;
  step->a_zero_point = a->a_zero_point, step->b_zero_point = a->b_zero_point;
  step->multiplier = a->multiplier, step->zero_point = a->zero_point, step->low = a->low;
  plan->add(std::move(step));
}

void fxq_add_channel_affine(Plan* plan, const MoveArguments* a) {
  auto step = std::make_unique<ChannelAffine>();
  step->in = a->a, step->out = a->out;
  const auto* factor = static_cast<const float*>(a->table);
  step->factor.assign(round_up(a->out.c, 16), 0.0f);
  step->term = step->factor;
  std::copy(factor, factor + a->out.c, step->factor.begin());
  std::copy(a->term, a->term + a->out.c, step->term.begin());
  step->in_zero_point = static_cast<float>(a->a_zero_point);
  step->zero_point = a->zero_point, step->low = a->low;
  plan->add(std::move(step));
}

void fxq_add_copy(Plan* plan, const MoveArguments* a) {
  auto step = std::make_unique<CopyChannels>();
  step->in = a->a, step->out = a->out, step->element = a->element;
  if (a->table != nullptr) {
    const auto* source = static_cast<const int32_t*>(a->table);
    step->source.assign(source, source + a->out.c);
    step->halves = a->out.c % 2 == 0;
    for (int64_t c = 0; c < a->out.c; c++)
      step->halves = step->halves && source[c] == c / 2 + c % 2 * (a->out.c / 2);
  }
  plan->add(std::move(step));
}

void fxq_add_lookup(Plan* plan, const MoveArguments* a) {
  auto step = std::make_unique<Lookup>();
  step->in = a->a, step->out = a->out;
  const auto* table = static_cast<const uint8_t*>(a->table);
  step->table.assign(table, table + 256);
  plan->add(std::move(step));
}

void fxq_add_float_map(Plan* plan, const MoveArguments* a) {
  auto step = std::make_unique<FloatMap>();
  step->a = a->a, step->b = a->b, step->out = a->out;
  step->function = static_cast<FloatFunction>(a->function), step->exp16 = a->exp16;
  plan->add(std::move(step));
}

void fxq_add_layer_norm(Plan* plan, const MoveArguments* a) {
  auto step = std::make_unique<LayerNorm>();
  step->a = a->a, step->b = a->b, step->out = a->out, step->has_other = a->function != 0;
  const auto* factor = static_cast<const float*>(a->table);
  step->factor.assign(factor, factor + a->out.c);
  step->term.assign(a->term, a->term + a->out.c);
  step->epsilon = a->epsilon;
  plan->add(std::move(step));
}

void fxq_add_attention(Plan* plan, const AttentionArguments* a) {
  auto step = std::make_unique<Attention>();
  step->query = a->query, step->key = a->key, step->value = a->value, step->out = a->out;
  step->images = a->images, step->heads = a->heads, step->scale = a->scale;
  step->mask = a->mask, step->mask_kind = static_cast<MaskKind>(a->mask_kind);
  step->mask_image = a->mask_image, step->mask_head = a->mask_head;
  step->mask_query = a->mask_query, step->mask_key = a->mask_key;
  plan->add(std::move(step));
}

static Window window_of(const MoveArguments& a) {
  return {a.kernel_h, a.kernel_w,  a.window_stride_h, a.window_stride_w,
          a.padding_h, a.padding_w, a.dilation_h,      a.dilation_w};
}

void fxq_add_max_pool(Plan* plan, const MoveArguments* a) {
  auto step = std::make_unique<MaxPool>();
  step->in = a->a, step->out = a->out, step->window = window_of(*a);
  plan->add(std::move(step));
}

void fxq_add_average_pool(Plan* plan, const MoveArguments* a) {
  auto step = std::make_unique<AveragePool>();
  step->in = a->a, step->out = a->out, step->window = window_of(*a);
  step->count_padding = a->count_padding, step->divisor = a->divisor;
  step->zero_point = a->a_zero_point;
  plan->add(std::move(step));
}

void fxq_add_global_mean(Plan* plan, const MoveArguments* a) {
  auto step = std::make_unique<GlobalMean>();
  step->in = a->a, step->out = a->out, step->from_bytes = a->from_bytes;
  step->scale = a->a_scale, step->zero_point = static_cast<float>(a->a_zero_point);
  plan->add(std::move(step));
}

// Whether all numbers were such as the kernels take; otherwise the results are of no use.
int32_t fxq_plan_run(const Plan* plan, uint8_t* const* slots, int64_t first, int64_t last,
                     int32_t threads) {
  std::atomic<bool> strange{false};
  const Call call{slots, &strange};
  run_steps(plan->order.data() + first, static_cast<size_t>(last - first), call, threads);
  return strange.load(std::memory_order_relaxed) ? 0 : 1;
}

}  // extern "C"
#pragma GCC visibility pop
