#include "runtime/tensor_ops.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <stdexcept>

namespace sparse_engine {
namespace {

constexpr int64_t kGrain = 8192;  // elements per work item: a few microseconds

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Calls body(offsets, row elements, slot) over pieces of rows of about kGrain elements, in parallel when there is enough work.
template <class F>
void for_rows(const LoopNest& loops, int threads, int64_t weight, const F& body) {
    int64_t rows = loops.rows(), row = loops.row;
    if (rows == 0 || row == 0) return;
    size_t operands = loops.row_strides.size();
    int64_t cost = std::max<int64_t>(1, row * weight);
    if (rows * cost < 2 * kGrain) threads = 1;
    if (cost > 2 * kGrain) {  // long rows: cut each
        int64_t piece = ceil_div(std::max<int64_t>(64, kGrain / weight), 64) * 64, pieces = ceil_div(row, piece);
        parallel_for(rows * pieces, threads, [&](int64_t item, int slot) {
            int64_t at[8];
            loops.offsets(item / pieces, at);
            int64_t begin = item % pieces * piece;
            for (size_t i = 0; i < operands; i++) at[i] += begin * loops.row_strides[i];
            body(at, std::min(piece, row - begin), slot);
        });
        return;
    }
    int64_t group = std::max<int64_t>(1, kGrain / cost), groups = ceil_div(rows, group);
    parallel_for(groups, threads, [&](int64_t item, int slot) {
        int64_t at[8];
        for (int64_t r = item * group; r < std::min(rows, (item + 1) * group); r++) {
            loops.offsets(r, at);
            body(at, row, slot);
        }
    });
}

std::vector<int64_t> without(const std::vector<int64_t>& v, int dim) {
    std::vector<int64_t> r = v;
    r.erase(r.begin() + dim);
    return r;
}

std::vector<int64_t> front(const std::vector<int64_t>& v, size_t n) { return {v.begin(), v.begin() + static_cast<int64_t>(n)}; }

}  // namespace

LoopNest::LoopNest(const std::vector<int64_t>& all_sizes, const std::vector<std::vector<int64_t>>& all_strides) {
    size_t operands = all_strides.size();
    if (operands > 8) throw std::invalid_argument("too many operands");
    std::vector<size_t> order;
    for (size_t d = 0; d < all_sizes.size(); d++)
        if (all_sizes[d] != 1) order.push_back(d);
    std::stable_sort(order.begin(), order.end(),
                     [&](size_t a, size_t b) { return std::llabs(all_strides[0][a]) > std::llabs(all_strides[0][b]); });
    strides.resize(operands);
    for (size_t d : order) {
        bool merge = !sizes.empty();
        for (size_t o = 0; o < operands && merge; o++) merge = strides[o].back() == all_strides[o][d] * all_sizes[d];
        if (merge) {
            sizes.back() *= all_sizes[d];
            for (size_t o = 0; o < operands; o++) strides[o].back() = all_strides[o][d];
        } else {
            sizes.push_back(all_sizes[d]);
            for (size_t o = 0; o < operands; o++) strides[o].push_back(all_strides[o][d]);
        }
    }
    row_strides.assign(operands, 1);
    if (!sizes.empty()) {
        row = sizes.back();
        sizes.pop_back();
        for (size_t o = 0; o < operands; o++) {
            row_strides[o] = strides[o].back();
            strides[o].pop_back();
        }
    }
}

int64_t LoopNest::rows() const {
    int64_t n = 1;
    for (int64_t s : sizes) n *= s;
    return n;
}

void LoopNest::offsets(int64_t index, int64_t* out) const {
    for (size_t o = 0; o < strides.size(); o++) out[o] = 0;
    for (size_t d = sizes.size(); d-- > 0;) {
        int64_t i = index % sizes[d];
        index /= sizes[d];
        for (size_t o = 0; o < strides.size(); o++) out[o] += i * strides[o][d];
    }
}

CopyNode::CopyNode(View from, View to) : loops_(to.sizes, {to.strides, from.strides}), from_(from.ref), to_(to.ref) {
    if (loops_.row_strides[0] != 1 || loops_.row_strides[1] == 1) return;
    for (size_t d = 0; d < loops_.sizes.size() && !strip_; d++)
        // A transpose of whole tiles is faster where rows are long enough for one.
        if (loops_.strides[1][d] == 1 && loops_.sizes[d] >= 8 && (d + 1 < loops_.sizes.size() || loops_.row < 8)) {
            strip_ = loops_.sizes[d], strip_to_step_ = loops_.strides[0][d];
            others_ = loops_;
            const int dim = static_cast<int>(d);
            others_.sizes = without(others_.sizes, dim);
            for (auto& strides : others_.strides) strides = without(strides, dim);
        }
}

// Sixteen numbers of each line of the source at a time go to sixteen rows, whose lines stay in the cache until they are full.
void CopyNode::run_in_strips(Context& context) const {
    constexpr int64_t kStrip = 16;
    const float* from = context.at(from_);
    float* to = context.at(to_);
    const int64_t outer = others_.rows(), row = others_.row, from_step = others_.row_strides[1], strips = ceil_div(strip_, kStrip);
    const int64_t group = std::clamp<int64_t>(kGrain / (kStrip * row), 1, outer), groups = ceil_div(outer, group);
    parallel_for(strips * groups, outer * row * strip_ < 2 * kGrain ? 1 : context.threads, [&](int64_t item, int) {
        const int64_t begin = item / groups * kStrip, n = std::min(kStrip, strip_ - begin), first = item % groups * group;
        for (int64_t r = first; r < std::min(outer, first + group); r++) {
            int64_t at[8];
            others_.offsets(r, at);
            const float* source = from + at[1] + begin;
            float* target = to + at[0] + begin * strip_to_step_;
            for (int64_t i = 0; i < row; i++)
                for (int64_t j = 0; j < n; j++) target[i + j * strip_to_step_] = source[i * from_step + j];
        }
    });
}

void CopyNode::run(Context& context) const {
    const KernelTable& k = kernels();
    const float* from = context.at(from_);
    float* to = context.at(to_);
    int64_t to_step = loops_.row_strides[0], from_step = loops_.row_strides[1];
    if (loops_.rows() == 0 || loops_.row == 0) return;
    if (strip_) return run_in_strips(context);
    // A transpose: the source is contiguous along another dimension. Walk it in strips, so that each of its lines is used while it is in
    // the cache.
    if (to_step == 1 && from_step != 1 && from_step != 0 && !loops_.sizes.empty() && loops_.strides[1].back() == 1 &&
        loops_.sizes.back() >= 8) {
        int64_t columns = loops_.sizes.back(), to_columns = loops_.strides[0].back(), rows = loops_.row;
        int64_t outer = loops_.rows() / columns, strip = 64, strips = ceil_div(rows, strip);
        parallel_for(outer * strips, loops_.rows() * rows < 2 * kGrain ? 1 : context.threads, [&](int64_t item, int) {
            int64_t at[8];
            loops_.offsets(item / strips * columns, at);
            int64_t begin = item % strips * strip, n = std::min(strip, rows - begin);
            const float* source = from + at[1] + begin * from_step;
            float* target = to + at[0] + begin;
            constexpr int64_t kBlock = 64;
            float tile[kBlock * 64];
            for (int64_t c = 0; c < columns; c += kBlock) {
                int64_t wide = std::min(kBlock, columns - c);
                k.transpose_in(source + c, static_cast<size_t>(from_step), static_cast<int>(n), static_cast<int>(wide), tile, 64);
                for (int64_t j = 0; j < wide; j++) std::memcpy(target + (c + j) * to_columns, tile + j * 64, size_t(n) * sizeof(float));
            }
        });
        return;
    }
    if (to_step == 1 && from_step == 1 && !loops_.sizes.empty() && loops_.row <= kGrain) {
        const int64_t rows = loops_.sizes.back(), group = std::clamp<int64_t>(kGrain / std::max<int64_t>(1, loops_.row), 1, rows);
        const int64_t groups = ceil_div(rows, group), outer = loops_.rows() / std::max<int64_t>(1, rows);
        parallel_for(outer * groups, loops_.rows() * loops_.row < 2 * kGrain ? 1 : context.threads, [&](int64_t item, int) {
            const int64_t begin = item % groups * group;
            int64_t at[8];
            loops_.offsets(item / groups * rows + begin, at);
            if (past_cache && loops_.strides[0].back() == loops_.row)
                return k.stream_rows(from + at[1], loops_.strides[1].back(), to + at[0], std::min(group, rows - begin), loops_.row);
            k.copy_rows(from + at[1], loops_.strides[1].back(), to + at[0], loops_.strides[0].back(), std::min(group, rows - begin),
                        loops_.row);
        });
        return;
    }
    for_rows(loops_, context.threads, 1, [&](const int64_t* at, int64_t n, int) {
        const float* x = from + at[1];
        float* y = to + at[0];
        if (to_step == 1) {
            k.copy(x, from_step, y, n);
        } else {
            for (int64_t i = 0; i < n; i++) y[i * to_step] = x[i * from_step];
        }
    });
}

FillNode::FillNode(View to, float value) : loops_(to.sizes, {to.strides}), to_(to.ref), value_(value) {}

void FillNode::run(Context& context) const {
    float* to = context.at(to_);
    for_rows(loops_, context.threads, 1, [&](const int64_t* at, int64_t n, int) {
        for (int64_t i = 0; i < n; i++) to[at[0] + i * loops_.row_strides[0]] = value_;
    });
}

UnaryNode::UnaryNode(View x, View y, Epilogue activation)
    : loops_(y.sizes, {y.strides, x.strides}), x_(x.ref), y_(y.ref), activation_(activation) {}

void UnaryNode::run(Context& context) const {
    const KernelTable& k = kernels();
    const float* x = context.at(x_);
    float* y = context.at(y_);
    int64_t y_step = loops_.row_strides[0], x_step = loops_.row_strides[1];
    for_rows(loops_, context.threads, 4, [&](const int64_t* at, int64_t n, int) {
        if (y_step == 1 && x_step == 1) {
            k.activate(activation_.kind, activation_.p0, activation_.p1, x + at[1], y + at[0], n);
            return;
        }
        for (int64_t i = 0; i < n; i++)
            k.activate(activation_.kind, activation_.p0, activation_.p1, x + at[1] + i * x_step, y + at[0] + i * y_step, 1);
    });
}

BinaryNode::BinaryNode(View a, View b, View y, Binary kind, Epilogue activation)
    : loops_(y.sizes, {y.strides, a.strides, b.strides}), a_(a.ref), b_(b.ref), y_(y.ref), kind_(kind), activation_(activation) {}

void BinaryNode::run(Context& context) const {
    const KernelTable& k = kernels();
    const float *a = context.at(a_), *b = context.at(b_);
    float* y = context.at(y_);
    int64_t y_step = loops_.row_strides[0], a_step = loops_.row_strides[1], b_step = loops_.row_strides[2];
    bool plain = y_step == 1 && (a_step == 0 || a_step == 1) && (b_step == 0 || b_step == 1);
    for_rows(loops_, context.threads, 1, [&](const int64_t* at, int64_t n, int) {
        float* to = y + at[0];
        if (plain) {
            k.binary(kind_, a + at[1], static_cast<int>(a_step), b + at[2], static_cast<int>(b_step), to, n);
            if (activation_.kind != Activation::none) k.activate(activation_.kind, activation_.p0, activation_.p1, to, to, n);
            return;
        }
        for (int64_t i = 0; i < n; i++) {
            float* one = to + i * y_step;
            k.binary(kind_, a + at[1] + i * a_step, 0, b + at[2] + i * b_step, 0, one, 1);
            if (activation_.kind != Activation::none) k.activate(activation_.kind, activation_.p0, activation_.p1, one, one, 1);
        }
    });
}

AffineNode::AffineNode(View x, View y, int axis, std::vector<float> scale, std::vector<float> shift, Epilogue activation)
    : loops_(without(y.sizes, axis), {without(y.strides, axis), without(x.strides, axis)}),
      x_(x.ref),
      y_(y.ref),
      channels_(y.sizes[axis]),
      x_step_(x.strides[axis]),
      y_step_(y.strides[axis]),
      scale_(std::move(scale)),
      shift_(std::move(shift)),
      activation_(activation) {}

void AffineNode::run(Context& context) const {
    const KernelTable& k = kernels();
    const float* x = context.at(x_);
    float* y = context.at(y_);
    int64_t y_step = loops_.row_strides[0], x_step = loops_.row_strides[1], rows = loops_.rows();
    parallel_for(channels_, channels_ * rows * loops_.row < 2 * kGrain ? 1 : context.threads, [&](int64_t c, int) {
        int64_t at[8];
        for (int64_t r = 0; r < rows; r++) {
            loops_.offsets(r, at);
            const float* from = x + at[1] + c * x_step_;
            float* to = y + at[0] + c * y_step_;
            if (y_step == 1 && x_step == 1) {
                k.scale_shift(from, scale_[c], shift_[c], to, loops_.row);
                if (activation_.kind != Activation::none) k.activate(activation_.kind, activation_.p0, activation_.p1, to, to, loops_.row);
                continue;
            }
            for (int64_t i = 0; i < loops_.row; i++) {
                float* one = to + i * y_step;
                *one = from[i * x_step] * scale_[c] + shift_[c];
                if (activation_.kind != Activation::none) k.activate(activation_.kind, activation_.p0, activation_.p1, one, one, 1);
            }
        }
    });
}

void PoolNode::run(Context& context) const {
    const KernelTable& k = kernels();
    int64_t batch = y_.sizes[0], channels = y_.sizes[1], out_h = y_.sizes[2], out_w = y_.sizes[3], height = x_.sizes[2],
            width = x_.sizes[3];
    const float* x = context.at(x_.ref);
    float* y = context.at(y_.ref);
    bool small = batch * channels * out_h * out_w * o_.kernel_h * o_.kernel_w < 2 * kGrain;
    // Bands of rows outermost within an image: threads keep their pixels from layer to layer.
    int64_t bands = !small && batch == 1 && context.threads > 1 ? std::min<int64_t>(out_h, 2 * context.threads) : 1;
    int64_t planes = batch * channels, work = std::max<int64_t>(1, out_h * out_w * o_.kernel_h * o_.kernel_w / bands);
    int64_t group = std::clamp<int64_t>(4 * kGrain / work, 1, std::max<int64_t>(1, planes)), groups = ceil_div(planes, group);
    const float empty = o_.max ? -std::numeric_limits<float>::infinity() : 0.0f;
    // The windows of a row, joined down the rows first: [padding | the row | padding, and slack for whole vectors].
    const int64_t reach = std::max(width, (out_w - 1) * o_.stride_w + (o_.kernel_w - 1) * o_.dilation_w + 1 - o_.pad_left);
    const size_t line_floats = static_cast<size_t>(o_.pad_left + reach + 4 * k.lanes);
    parallel_for(bands * groups, small ? 1 : context.threads, [&](int64_t item, int slot) {
        int64_t band = item / groups, plane0 = item % groups * group;
        int64_t row0 = out_h * band / bands, row1 = out_h * (band + 1) / bands;
        float* line = context.scratch(slot, line_floats);
        std::fill(line, line + line_floats, empty);
        for (int64_t index = plane0; index < std::min(planes, plane0 + group); index++) {
            int64_t n = index / channels, c = index % channels;
            const float* from = x + n * x_.strides[0] + c * x_.strides[1];
            float* to = y + n * y_.strides[0] + c * y_.strides[1];
            for (int64_t oy = row0; oy < row1; oy++) {
                float* row = to + oy * y_.strides[2];
                int64_t top = oy * o_.stride_h - o_.pad_top;
                int64_t first = top >= 0 ? 0 : ceil_div(-top, o_.dilation_h);
                int64_t last = std::min(o_.kernel_h, height > top ? ceil_div(height - top, o_.dilation_h) : 0);
                if (last <= first) {
                    std::fill(row, row + out_w, empty);
                } else {
                    auto join = o_.max ? k.max_rows : k.add_rows;
                    auto slide = o_.max ? k.max_taps : k.add_taps;
                    join(from + (top + first * o_.dilation_h) * x_.strides[2], o_.dilation_h * x_.strides[2],
                         static_cast<int>(last - first), line + o_.pad_left, width);
                    slide(line, static_cast<int>(o_.kernel_w), o_.dilation_w, o_.stride_w, row, out_w);
                }
                if (o_.max) continue;
                // The divisor counts padding up to the padded border when asked to, and never what ceil_mode adds beyond it.
                auto extent = [&](int64_t o, int64_t stride, int64_t kernel, int64_t pad0, int64_t pad1, int64_t size) {
                    int64_t begin = o * stride - pad0, end = std::min(begin + kernel, size + pad1);
                    if (!o_.count_include_pad) begin = std::max<int64_t>(begin, 0), end = std::min(end, size);
                    return end - begin;
                };
                int64_t high = extent(oy, o_.stride_h, o_.kernel_h, o_.pad_top, o_.pad_bottom, height);
                for (int64_t ox = 0; ox < out_w; ox++) {
                    int64_t count = o_.divisor ? o_.divisor : high * extent(ox, o_.stride_w, o_.kernel_w, o_.pad_left, o_.pad_right, width);
                    row[ox] /= static_cast<float>(count);
                }
            }
        }
    });
}

void AdaptiveAveragePoolNode::run(Context& context) const {
    const KernelTable& k = kernels();
    int64_t batch = y_.sizes[0], channels = y_.sizes[1], out_h = y_.sizes[2], out_w = y_.sizes[3], height = x_.sizes[2],
            width = x_.sizes[3];
    const float* x = context.at(x_.ref);
    float* y = context.at(y_.ref);
    int64_t planes = batch * channels, group = std::max<int64_t>(1, kGrain / std::max<int64_t>(1, height * width));
    const bool whole = out_h == 1 && out_w == 1 && x_.strides[3] == 1 && x_.strides[2] == width && y_.strides[1] == 1;
    parallel_for(ceil_div(planes, group), planes * height * width < 2 * kGrain ? 1 : context.threads, [&](int64_t item, int) {
        const int64_t end = std::min(planes, (item + 1) * group);
        for (int64_t index = item * group; index < end; index++) {
            int64_t n = index / channels, c = index % channels;
            const float* from = x + n * x_.strides[0] + c * x_.strides[1];
            if (whole) {
                const int64_t count = std::min(channels - c, end - index);
                float* to = y + n * y_.strides[0] + c;
                k.sum_rows(from, x_.strides[1], count, height * width, to);
                for (int64_t i = 0; i < count; i++) to[i] /= static_cast<float>(height * width);
                index += count - 1;
                continue;
            }
            for (int64_t oy = 0; oy < out_h; oy++)
                for (int64_t ox = 0; ox < out_w; ox++) {
                    int64_t y0 = oy * height / out_h, y1 = ceil_div((oy + 1) * height, out_h), x0 = ox * width / out_w,
                            x1 = ceil_div((ox + 1) * width, out_w);
                    float total = 0;
                    if (x_.strides[3] == 1 && x_.strides[2] == width && x1 - x0 == width) {
                        total = k.reduce_sum(from + y0 * width, (y1 - y0) * width);
                    } else {
                        for (int64_t i = y0; i < y1; i++)
                            for (int64_t j = x0; j < x1; j++) total += from[i * x_.strides[2] + j * x_.strides[3]];
                    }
                    y[n * y_.strides[0] + c * y_.strides[1] + oy * y_.strides[2] + ox * y_.strides[3]] =
                        total / static_cast<float>((y1 - y0) * (x1 - x0));
                }
        }
    });
}

ReduceNode::ReduceNode(View x, View y, std::vector<int> dims, Reduction kind) : x_(x.ref), y_(y.ref), kind_(kind) {
    std::vector<int64_t> kept_sizes, kept_x, kept_y, reduced_sizes, reduced_x;
    for (size_t d = 0; d < x.sizes.size(); d++) {
        if (std::find(dims.begin(), dims.end(), static_cast<int>(d)) != dims.end()) {
            reduced_sizes.push_back(x.sizes[d]), reduced_x.push_back(x.strides[d]);
            count_ *= x.sizes[d];
        } else {
            kept_sizes.push_back(x.sizes[d]), kept_x.push_back(x.strides[d]), kept_y.push_back(y.strides[d]);
        }
    }
    kept_ = LoopNest(kept_sizes, {kept_x, kept_y});
    reduced_ = LoopNest(reduced_sizes, {reduced_x});
}

void ReduceNode::run(Context& context) const {
    const KernelTable& k = kernels();
    const float* x = context.at(x_);
    float* y = context.at(y_);
    int64_t reduced_rows = reduced_.rows(), step = reduced_.row_strides[0];
    auto combine = [&](float a, float b) {
        switch (kind_) {
            case Reduction::amax: return std::isnan(b) || b > a ? b : a;
            case Reduction::amin: return std::isnan(b) || b < a ? b : a;
            default: return a + b;
        }
    };
    float start = kind_ == Reduction::amax   ? -std::numeric_limits<float>::infinity()
                  : kind_ == Reduction::amin ? std::numeric_limits<float>::infinity()
                                             : 0.0f;
    bool sums = kind_ == Reduction::mean || kind_ == Reduction::sum;
    float scale = kind_ == Reduction::mean ? 1.0f / static_cast<float>(count_) : 1.0f;
    for_rows(kept_, context.threads, std::max<int64_t>(1, count_), [&](const int64_t* at, int64_t n, int) {
        int64_t inner[8];
        // Along the kept pixels where those are contiguous, along the reduced ones otherwise.
        if (sums && kept_.row_strides[0] == 1 && kept_.row_strides[1] == 1 && n >= 8) {
            float* to = y + at[1];
            std::fill(to, to + n, 0.0f);
            for (int64_t r = 0; r < reduced_rows; r++) {
                reduced_.offsets(r, inner);
                for (int64_t i = 0; i < reduced_.row; i++) k.add_into(x + at[0] + inner[0] + i * step, 1, to, n);
            }
            if (scale != 1.0f) k.scale_shift(to, scale, 0.0f, to, n);
            return;
        }
        if (sums && step == 1 && reduced_rows == 1 && kept_.row_strides[1] == 1) {
            k.sum_rows(x + at[0], kept_.row_strides[0], n, reduced_.row, y + at[1]);
            if (scale != 1.0f) k.scale_shift(y + at[1], scale, 0.0f, y + at[1], n);
            return;
        }
        for (int64_t j = 0; j < n; j++) {
            const float* from = x + at[0] + j * kept_.row_strides[0];
            float total = start;
            for (int64_t r = 0; r < reduced_rows; r++) {
                reduced_.offsets(r, inner);
                if (sums && step == 1) {
                    total += k.reduce_sum(from + inner[0], reduced_.row);
                } else {
                    for (int64_t i = 0; i < reduced_.row; i++) total = combine(total, from[inner[0] + i * step]);
                }
            }
            y[at[1] + j * kept_.row_strides[1]] = total * scale;
        }
    });
}

SoftmaxNode::SoftmaxNode(View x, View y, int dim)
    : loops_(without(y.sizes, dim), {without(y.strides, dim), without(x.strides, dim)}),
      x_(x.ref),
      y_(y.ref),
      length_(y.sizes[dim]),
      x_step_(x.strides[dim]),
      y_step_(y.strides[dim]) {}

void SoftmaxNode::run(Context& context) const {
    const KernelTable& k = kernels();
    const float* x = context.at(x_);
    float* y = context.at(y_);
    if (length_ == 0) return;
    for_rows(loops_, context.threads, 16 * length_, [&](const int64_t* at, int64_t n, int slot) {
        const float* from = x + at[1];
        float* to = y + at[0];
        if (loops_.row_strides[0] == 1 && loops_.row_strides[1] == 1 && n > 1) {
            k.softmax_columns(from, static_cast<size_t>(x_step_), length_, to, static_cast<size_t>(y_step_), n);
            return;
        }
        float* line = x_step_ == 1 && y_step_ == 1 ? nullptr : context.scratch(slot, static_cast<size_t>(length_));
        for (int64_t j = 0; j < n; j++) {
            const float* row = from + j * loops_.row_strides[1];
            float* out = to + j * loops_.row_strides[0];
            if (x_step_ == 1 && y_step_ == 1) {
                k.softmax_row(row, length_, out);
                continue;
            }
            for (int64_t i = 0; i < length_; i++) line[i] = row[i * x_step_];
            k.softmax_row(line, length_, line);
            for (int64_t i = 0; i < length_; i++) out[i * y_step_] = line[i];
        }
    });
}

LayerNormNode::LayerNormNode(View x, View y, int dims, std::vector<float> weight, std::vector<float> bias, float eps)
    : x_(x.ref), y_(y.ref), weight_(std::move(weight)), bias_(std::move(bias)), eps_(eps) {
    size_t kept = x.sizes.size() - static_cast<size_t>(dims);
    loops_ = LoopNest(front(y.sizes, kept), {front(y.strides, kept), front(x.strides, kept)});
    LoopNest inner;
    length_ = 1;
    x_step_ = x.strides.back(), y_step_ = y.strides.back();
    for (size_t d = x.sizes.size(); d-- > kept;) {
        if (x.sizes[d] != 1 && length_ > 1 && (x.strides[d] != x_step_ * length_ || y.strides[d] != y_step_ * length_))
            throw std::invalid_argument("layer norm: the normalised dimensions are not one strided run");
        if (x.sizes[d] != 1 && length_ == 1) x_step_ = x.strides[d], y_step_ = y.strides[d];
        length_ *= x.sizes[d];
    }
}

void LayerNormNode::run(Context& context) const {
    const KernelTable& k = kernels();
    const float* x = context.at(x_);
    float* y = context.at(y_);
    const float *weight = weight_.empty() ? nullptr : weight_.data(), *bias = bias_.empty() ? nullptr : bias_.data();
    for_rows(loops_, context.threads, 4 * length_, [&](const int64_t* at, int64_t n, int slot) {
        const float* from = x + at[1];
        float* to = y + at[0];
        if (loops_.row_strides[0] == 1 && loops_.row_strides[1] == 1 && (n > 1 || x_step_ != 1)) {
            k.layer_norm_columns(from, static_cast<size_t>(x_step_), length_, weight, bias, eps_, to, static_cast<size_t>(y_step_), n);
            return;
        }
        float* line = x_step_ == 1 && y_step_ == 1 ? nullptr : context.scratch(slot, static_cast<size_t>(length_));
        for (int64_t j = 0; j < n; j++) {
            const float* row = from + j * loops_.row_strides[1];
            float* out = to + j * loops_.row_strides[0];
            if (x_step_ == 1 && y_step_ == 1) {
                k.layer_norm_row(row, length_, weight, bias, eps_, out);
                continue;
            }
            for (int64_t i = 0; i < length_; i++) line[i] = row[i * x_step_];
            k.layer_norm_row(line, length_, weight, bias, eps_, line);
            for (int64_t i = 0; i < length_; i++) out[i * y_step_] = line[i];
        }
    });
}

GroupNormNode::GroupNormNode(View x, View y, int64_t groups, std::vector<float> weight, std::vector<float> bias, float eps)
    : x_(std::move(x)), y_(std::move(y)), groups_(groups), weight_(std::move(weight)), bias_(std::move(bias)), eps_(eps) {
    auto of_pixels = [](const std::vector<int64_t>& v) { return std::vector<int64_t>(v.begin() + 2, v.end()); };
    pixels_ = LoopNest(of_pixels(x_.sizes), {of_pixels(y_.strides), of_pixels(x_.strides)});
}

void GroupNormNode::run(Context& context) const {
    const KernelTable& k = kernels();
    const float* x = context.at(x_.ref);
    float* y = context.at(y_.ref);
    const LoopNest& pixels = pixels_;
    int64_t batch = x_.sizes[0], channels = x_.sizes[1], per_group = channels / groups_, rows = pixels.rows();
    int64_t count = per_group * rows * pixels.row;
    parallel_for(batch * groups_, batch * groups_ * count < 2 * kGrain ? 1 : context.threads, [&](int64_t item, int) {
        int64_t n = item / groups_, group = item % groups_, at[8];
        double total = 0, squares = 0;
        for (int pass = 0; pass < 2; pass++) {
            double mean = total / static_cast<double>(count);
            for (int64_t c = group * per_group; c < (group + 1) * per_group; c++)
                for (int64_t r = 0; r < rows; r++) {
                    pixels.offsets(r, at);
                    const float* from = x + n * x_.strides[0] + c * x_.strides[1] + at[1];
                    for (int64_t i = 0; i < pixels.row; i++) {
                        double v = from[i * pixels.row_strides[1]];
                        if (pass == 0) {
                            total += v;
                        } else {
                            squares += (v - mean) * (v - mean);
                        }
                    }
                }
        }
        double mean = total / static_cast<double>(count), inverse = 1.0 / std::sqrt(squares / static_cast<double>(count) + eps_);
        for (int64_t c = group * per_group; c < (group + 1) * per_group; c++) {
            float scale = static_cast<float>(inverse) * (weight_.empty() ? 1.0f : weight_[c]);
            float shift = (bias_.empty() ? 0.0f : bias_[c]) - static_cast<float>(mean) * scale;
            for (int64_t r = 0; r < rows; r++) {
                pixels.offsets(r, at);
                const float* from = x + n * x_.strides[0] + c * x_.strides[1] + at[1];
                float* to = y + n * y_.strides[0] + c * y_.strides[1] + at[0];
                if (pixels.row_strides[0] == 1 && pixels.row_strides[1] == 1) {
                    k.scale_shift(from, scale, shift, to, pixels.row);
                } else {
                    for (int64_t i = 0; i < pixels.row; i++)
                        to[i * pixels.row_strides[0]] = from[i * pixels.row_strides[1]] * scale + shift;
                }
            }
        }
    });
}

namespace {

// The dense panels of a matrix that is only known at run time: rows × columns from any strides, in panels of `panel` rows, one part after
// another.
struct DynamicPanels {
    int panel, part;
    int64_t rows, columns;
    int64_t floats() const { return ceil_div(rows, panel) * panel * columns; }

    void pack(const float* a, int64_t row_stride, int64_t column_stride, float factor, float* to) const {
        for (int64_t c0 = 0; c0 < columns; c0 += part)
            for (int64_t r0 = 0; r0 < rows; r0 += panel)
                for (int64_t c = c0; c < std::min<int64_t>(columns, c0 + part); c++)
                    for (int64_t r = r0; r < r0 + panel; r++) *to++ = r < rows ? a[r * row_stride + c * column_stride] * factor : 0.0f;
    }

    // out[rows, width] = panels · x[columns, width]
    void multiply(SpmmKernel kernel, const float* packed, const float* x, int64_t x_stride, float* out, int64_t out_stride) const {
        static const std::vector<uint16_t> row_ids = [] {
            std::vector<uint16_t> ids(65536);
            std::iota(ids.begin(), ids.end(), uint16_t(0));
            return ids;
        }();
        int64_t panels = ceil_div(rows, panel);
        for (int64_t first = 0; first < panels; first += 65535) {
            int64_t some = std::min<int64_t>(65535, panels - first);
            SpmmArgs a{};
            a.x_stride = static_cast<size_t>(x_stride);
            a.out = out + first * panel * out_stride, a.out_stride = static_cast<size_t>(out_stride);
            a.rows = static_cast<int>(std::min<int64_t>(rows - first * panel, some * panel));
            a.low = -std::numeric_limits<float>::infinity(), a.high = -a.low;
            a.panel_rows = row_ids.data();
            const float* w = packed;
            for (int64_t c0 = 0; c0 < columns; c0 += part) {
                int64_t c1 = std::min<int64_t>(columns, c0 + part);
                PanelRun run{static_cast<uint16_t>(c1 - c0), static_cast<uint16_t>(some)};
                a.first = c0 == 0, a.last = c1 == columns;
                a.runs = &run, a.runs_end = &run + 1;
                a.values = w + first * panel * (c1 - c0);
                a.x = x + c0 * x_stride;
                kernel(a);
                w += panels * panel * (c1 - c0);
            }
        }
    }
};

struct DenseShape {
    int panel, log, vectors;
};
DenseShape dense_shape(const KernelTable& k, int64_t rows) {
    if (rows >= 4 && k.max_vectors[3] >= 2) return {8, 3, k.max_vectors[3]};
    return rows >= 3 ? DenseShape{4, 2, k.max_vectors[2]} : DenseShape{1, 0, 4};
}

}  // namespace

MatmulNode::MatmulNode(View a, View b, View y) : a_(a.ref), b_(b.ref), y_(y.ref) {
    size_t outer = y.sizes.size() - 2;
    batch_ = LoopNest(front(y.sizes, outer), {front(y.strides, outer), front(a.strides, outer), front(b.strides, outer)});
    i_ = y.sizes[outer], j_ = y.sizes[outer + 1], k_ = a.sizes[outer + 1];
    a_i_ = a.strides[outer], a_k_ = a.strides[outer + 1], b_k_ = b.strides[outer], y_i_ = y.strides[outer];
    if ((b.strides[outer + 1] != 1 || y.strides[outer + 1] != 1) && j_ > 1)
        throw std::invalid_argument("matmul: the last dimension of b and y must be contiguous");
}

void MatmulNode::run(Context& context) const {
    const KernelTable& k = kernels();
    const float *a = context.at(a_), *b = context.at(b_);
    float* y = context.at(y_);
    int64_t rows = batch_.rows(), batches = rows * batch_.row;
    if (i_ == 0 || j_ == 0) return;
    DenseShape shape = dense_shape(k, i_);
    DynamicPanels panels{shape.panel, 256, i_, k_};
    int64_t tile = int64_t(shape.vectors) * k.lanes, tiles = ceil_div(j_, tile);
    // Items are whole batches where there are enough of them, so that `a` is packed once for each.
    bool split = batches < 2 * context.threads;
    int64_t per_item = split ? 1 : tiles;
    parallel_for(batches * (split ? tiles : 1), batches * i_ * j_ * k_ < 65536 ? 1 : context.threads, [&](int64_t item, int slot) {
        int64_t batch = split ? item / tiles : item, at[8];
        batch_.offsets(batch / batch_.row, at);
        for (int o = 0; o < 3; o++) at[o] += batch % batch_.row * batch_.row_strides[o];
        float* packed = context.scratch(slot, size_t(panels.floats() + i_ * tile));
        float* edge = packed + panels.floats();
        if (k_ > 0) panels.pack(a + at[1], a_i_, a_k_, 1.0f, packed);
        int64_t first = split ? item % tiles : 0;
        for (int64_t t = first; t < first + per_item; t++) {
            int64_t j0 = t * tile, n = std::min(tile, j_ - j0);
            int vectors = static_cast<int>(ceil_div(n, k.lanes));
            float* to = y + at[0] + j0;
            if (k_ == 0) {
                for (int64_t i = 0; i < i_; i++) std::memset(to + i * y_i_, 0, size_t(n) * sizeof(float));
                continue;
            }
            SpmmKernel kernel = k.dense[shape.log][vectors];
            if (n == int64_t(vectors) * k.lanes) {
                panels.multiply(kernel, packed, b + at[2] + j0, b_k_, to, y_i_);
                continue;
            }
            // A partial vector must not spill into its neighbours.
            panels.multiply(kernel, packed, b + at[2] + j0, b_k_, edge, tile);
            for (int64_t i = 0; i < i_; i++) std::memcpy(to + i * y_i_, edge + i * tile, size_t(n) * sizeof(float));
        }
    });
}

AttentionNode::AttentionNode(View q, View k, View v, View y, float scale, bool causal, bool has_mask, View mask)
    : q_(q.ref), k_(k.ref), v_(v.ref), y_(y.ref), mask_(mask.ref), scale_(scale), causal_(causal), has_mask_(has_mask) {
    size_t outer = y.sizes.size() - 2;
    std::vector<std::vector<int64_t>> strides = {front(y.strides, outer), front(q.strides, outer), front(k.strides, outer),
                                                 front(v.strides, outer)};
    if (has_mask) strides.push_back(front(mask.strides, outer));
    batch_ = LoopNest(front(y.sizes, outer), strides);
    queries_ = q.sizes[outer], depth_ = q.sizes[outer + 1], keys_ = k.sizes[outer], value_depth_ = v.sizes[outer + 1];
    q_d_ = q.strides[outer + 1], k_l_ = k.strides[outer], k_d_ = k.strides[outer + 1], v_l_ = v.strides[outer], v_d_ = v.strides[outer + 1],
    y_d_ = y.strides[outer + 1];
    if (has_mask) mask_q_ = mask.strides[outer], mask_k_ = mask.strides[outer + 1];
    if ((q.strides[outer] != 1 || y.strides[outer] != 1) && queries_ > 1)
        throw std::invalid_argument("attention: queries and output must be contiguous along the length");
}

// Per head: S^T[key, query] = K · Q^T, softmax down the keys, O^T[depth, query] = V^T · P^T; queries along the vector throughout, one tile
// of them at a time.
void AttentionNode::run(Context& context) const {
    const KernelTable& k = kernels();
    const float *q = context.at(q_), *key = context.at(k_), *v = context.at(v_), *mask = has_mask_ ? context.at(mask_) : nullptr;
    float* y = context.at(y_);
    int64_t heads = batch_.rows() * batch_.row;
    if (heads == 0 || queries_ == 0) return;
    DenseShape shape = dense_shape(k, 8);
    DynamicPanels first{shape.panel, 256, keys_, depth_}, second{shape.panel, 256, value_depth_, keys_};
    int64_t tile = int64_t(shape.vectors) * k.lanes, tiles = ceil_div(queries_, tile);
    parallel_for(heads, heads * queries_ * keys_ * depth_ < 65536 ? 1 : context.threads, [&](int64_t head, int slot) {
        int64_t at[8];
        batch_.offsets(head / batch_.row, at);
        for (size_t o = 0; o < batch_.row_strides.size(); o++) at[o] += head % batch_.row * batch_.row_strides[o];
        float* packed_k = context.scratch(slot, size_t(first.floats() + second.floats() + (keys_ + value_depth_) * tile));
        float* packed_v = packed_k + first.floats();
        float* scores = packed_v + second.floats();
        float* edge = scores + keys_ * tile;
        first.pack(key + at[2], k_l_, k_d_, scale_, packed_k);
        second.pack(v + at[3], v_d_, v_l_, 1.0f, packed_v);
        for (int64_t t = 0; t < tiles; t++) {
            int64_t q0 = t * tile, n = std::min(tile, queries_ - q0);
            int vectors = static_cast<int>(ceil_div(n, k.lanes));
            SpmmKernel kernel = k.dense[shape.log][vectors];
            first.multiply(kernel, packed_k, q + at[1] + q0, q_d_, scores, tile);
            if (mask)
                for (int64_t j = 0; j < keys_; j++)
                    for (int64_t i = 0; i < n; i++) scores[j * tile + i] += mask[at[4] + (q0 + i) * mask_q_ + j * mask_k_];
            if (causal_)
                for (int64_t j = 0; j < keys_; j++)
                    for (int64_t i = 0; i < std::min(n, j - q0); i++) scores[j * tile + i] = -std::numeric_limits<float>::infinity();
            k.softmax_columns(scores, static_cast<size_t>(tile), keys_, scores, static_cast<size_t>(tile), n);
            float* to = y + at[0] + q0;
            bool whole = n == int64_t(vectors) * k.lanes;
            second.multiply(kernel, packed_v, scores, tile, whole ? to : edge, whole ? y_d_ : tile);
            if (!whole)
                for (int64_t d = 0; d < value_depth_; d++) std::memcpy(to + d * y_d_, edge + d * tile, size_t(n) * sizeof(float));
        }
    });
}

}  // namespace sparse_engine
