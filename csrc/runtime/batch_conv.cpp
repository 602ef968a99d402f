#include "runtime/batch_conv.h"

#include <algorithm>
#include <cstring>
#include <numeric>

#include "cpu/kernels_batch.h"

namespace sparse_engine {
namespace {

constexpr int64_t kWindowFloats = 160 * 1024;  // of the source at a time: with the rest it stays in an L2 of one megabyte
constexpr int64_t kRowBlock = 64;              // rows of the weight whose outputs are collected before they are brought back into images
constexpr int64_t kGradientRows = 16;          // rows of the gradient that are brought into lanes together
constexpr int64_t kChunks = 8;                 // partial sums of the weight gradient

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Rows of an odd number of vectors spread over all sets of the L1, also where channels are read across them.
int64_t odd(int64_t vectors) { return vectors | 1; }

// One per thread for all layers: what the last one has left in the cache is written again, not fetched.
float* thread_scratch(int64_t floats) {
    thread_local AlignedBuffer buffer;
    buffer.reserve(size_t(floats) * sizeof(float));
    return buffer.as<float>();
}

BatchAxis forward_axis(int64_t in, int64_t out, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation) {
    BatchAxis axis;
    axis.size = out, axis.source_size = in;
    BatchAxis::Class c{0, 1, out, stride, {}, {}};
    for (int64_t k = 0; k < kernel; k++) c.shift.push_back(k * dilation - pad), c.tap.push_back(static_cast<int>(k));
    axis.classes.push_back(c);
    return axis;
}

BatchAxis backward_axis(int64_t in, int64_t out, int64_t kernel, int64_t stride, int64_t pad, int64_t dilation) {
    BatchAxis axis;
    axis.size = in, axis.source_size = out;
    for (int64_t first = 0; first < stride; first++) {
        // Input first + i · stride meets output (first + i · stride + pad − k · dilation) / stride where that divides.
        BatchAxis::Class c{first, stride, in > first ? ceil_div(in - first, stride) : 0, 1, {}, {}};
        for (int64_t k = kernel - 1; k >= 0; k--) {
            int64_t distance = first + pad - k * dilation;
            if (distance % stride == 0) c.shift.push_back(distance / stride), c.tap.push_back(static_cast<int>(k));
        }
        axis.classes.push_back(c);
    }
    return axis;
}

}  // namespace

// Source rows [low, high) of one group of images, [row][channel][column][lane].
struct BatchConv::Window {
    const BatchConv& conv;
    const BatchKernels& k;
    float* rows;
    float* spare;  // for one channel's new rows
    int64_t capacity;
    const float* images;
    bool channels_last;
    int valid;  // images in the group
    int64_t low = 0, high = 0;

    int64_t row_floats() const { return conv.channels_ * conv.padded_ * k.lanes; }
    float* at(int64_t source_row) const { return rows + (source_row - low) * row_floats(); }

    void clear_edges() {
        int64_t lanes = k.lanes, width = conv.horizontal_.source_size, right = conv.padded_ - conv.left_ - width;
        if (conv.left_ == 0 && right == 0) return;
        for (int64_t i = 0; i < capacity * conv.channels_; i++) {
            float* line = rows + i * conv.padded_ * lanes;
            std::memset(line, 0, size_t(conv.left_ * lanes) * sizeof(float));
            std::memset(line + (conv.left_ + width) * lanes, 0, size_t(right * lanes) * sizeof(float));
        }
    }

    void need(int64_t from, int64_t to) {
        if (to <= high && from >= low) return;
        if (from >= high || from < low) {
            low = high = from;
        } else if (to - low > capacity) {
            std::memmove(rows, at(from), size_t((high - from) * row_floats()) * sizeof(float));
            low = from;
        }
        int64_t width = conv.horizontal_.source_size, height = conv.vertical_.source_size, lanes = k.lanes;
        int64_t pixels = height * width, channels = conv.channels_;
        const auto ld = static_cast<size_t>(channels * pixels);
        if (channels_last) {
            for (int64_t r = high; r < to; r++)
                for (int64_t i = 0; i < width; i++)
                    k.to_lanes(images + (r * width + i) * channels, ld, valid, static_cast<int>(channels), at(r) + (conv.left_ + i) * lanes,
                               static_cast<size_t>(conv.padded_ * lanes));
            high = to;
            return;
        }
        // As many rows at a time as there is room for where single ones are too short for whole vectors.
        if (width < lanes) to = std::min(height, low + capacity);
        for (int64_t c = 0; c < channels; c++) {
            const float* source = images + c * pixels + high * width;
            float* edge = at(high) + (c * conv.padded_ + conv.left_) * lanes;
            if (width >= lanes) {
                for (int64_t r = high; r < to; r++, source += width, edge += row_floats())
                    k.to_lanes(source, ld, valid, static_cast<int>(width), edge, static_cast<size_t>(lanes));
                continue;
            }
            k.to_lanes(source, ld, valid, static_cast<int>((to - high) * width), spare, static_cast<size_t>(lanes));
            for (int64_t r = high; r < to; r++, edge += row_floats())
                std::memcpy(edge, spare + (r - high) * width * lanes, size_t(width * lanes) * sizeof(float));
        }
        high = to;
    }
};

BatchConv::BatchConv(const ConvGeometry& g, bool backward, int64_t matrix_rows, const std::vector<int64_t>& row_ptr,
                     const std::vector<int32_t>& col)
    : rows_(backward ? g.channels : matrix_rows), channels_(backward ? matrix_rows : g.channels) {
    auto axis = backward ? backward_axis : forward_axis;
    vertical_ = axis(g.height, g.out_height(), g.kernel_h, g.stride_h, g.pad_top, g.dilation_h);
    horizontal_ = axis(g.width, g.out_width(), g.kernel_w, g.stride_w, g.pad_left, g.dilation_w);
    int64_t most = horizontal_.source_size;
    for (const auto& c : horizontal_.classes)
        if (!c.shift.empty() && c.count > 0) {
            left_ = std::max(left_, -c.shift.front());
            most = std::max(most, (c.count - 1) * c.source_step + c.shift.back() + 1);
        }
    padded_ = left_ + most;
    for (const auto& c : vertical_.classes) taps_most_ = std::max(taps_most_, c.tap.size());
    const int64_t row_vectors = channels_ * padded_, lanes = batch_kernels().lanes;
    int64_t reach = 1;
    for (const auto& c : vertical_.classes)
        if (!c.shift.empty()) reach = std::max(reach, c.shift.back() - c.shift.front() + 1);
    possible_ = reach * row_vectors < 65536 && window_rows(1) * row_vectors * lanes <= 4 * kWindowFloats;
    if (!possible_) return;

    // Where each tap of the kernel stands: class and place within it.
    auto places = [](const BatchAxis& a, int64_t kernel) {
        std::vector<std::pair<size_t, size_t>> place(static_cast<size_t>(kernel), {SIZE_MAX, 0});
        for (size_t c = 0; c < a.classes.size(); c++)
            for (size_t t = 0; t < a.classes[c].tap.size(); t++) place[a.classes[c].tap[t]] = {c, t};
        return place;
    };
    const auto rows_of_taps = places(vertical_, g.kernel_h), columns_of_taps = places(horizontal_, g.kernel_w);
    const int64_t taps = g.taps(), nnz = row_ptr.back();
    start_.assign(size_t(rows_) * vertical_.classes.size() * horizontal_.classes.size() * (taps_most_ + 1) + 1, 0);
    std::vector<uint32_t> range(nnz);
    offset_.resize(nnz), order_.resize(nnz), values_.assign(nnz, 0.0f);
    std::vector<uint16_t> offset(nnz);
    for (int64_t m = 0, e = 0; m < matrix_rows; m++)
        for (; e < row_ptr[m + 1]; e++) {
            int64_t channel = col[e] / taps, tap = col[e] % taps;
            auto [yc, yt] = rows_of_taps[tap / g.kernel_w];
            auto [xc, xt] = columns_of_taps[tap % g.kernel_w];
            const auto &v = vertical_.classes[yc], &h = horizontal_.classes[xc];
            int64_t row = backward ? channel : m, source = backward ? m : channel;
            range[e] = static_cast<uint32_t>(start_of(row, yc, xc) + yt);
            offset[e] = static_cast<uint16_t>((v.shift[yt] - v.shift[0]) * row_vectors + source * padded_ + h.shift[xt] - h.shift[0]);
            start_[range[e] + 1]++;
        }
    // Entries lie in the order of the ranges; the last slot of each class has none of its own and only ends the one before.
    std::partial_sum(start_.begin(), start_.end(), start_.begin());
    std::vector<uint32_t> next(start_.begin(), start_.end());
    for (int64_t e = 0; e < nnz; e++) order_[next[range[e]]++] = static_cast<uint32_t>(e);
    for (size_t i = 0; i + 1 < start_.size(); i++)
        std::sort(order_.begin() + start_[i], order_.begin() + start_[i + 1],
                  [&](uint32_t a, uint32_t b) { return offset[a] != offset[b] ? offset[a] < offset[b] : a < b; });
    for (int64_t i = 0; i < nnz; i++) offset_[i] = offset[order_[i]];
}

void BatchConv::set_values(const float* values) {
    for (size_t i = 0; i < order_.size(); i++) values_[i] = values[order_[i]];
}

int64_t BatchConv::nbytes() const {
    return static_cast<int64_t>(start_.size() * 4 + offset_.size() * 2 + order_.size() * 4 + values_.size() * 4);
}

// Output rows that are computed together: whole vectors of pixels go back into the images, all rows of small ones.
int64_t BatchConv::rows_per_chunk() const {
    const int64_t width = horizontal_.size, lanes = batch_kernels().lanes;
    int64_t rows = ceil_div(lanes, width);
    while (rows < vertical_.size && rows * width % lanes) rows++;
    return std::min(rows, vertical_.size);
}

// Source rows that `chunk` output rows need, at most.
int64_t BatchConv::window_rows(int64_t chunk) const {
    int64_t most = 1;
    for (int64_t y = 0; y < vertical_.size; y += chunk) {
        int64_t from, to;
        first_and_last(y, std::min(vertical_.size, y + chunk), &from, &to);
        most = std::max(most, to - from);
    }
    return most;
}

// The source rows [from, to) that output rows [y0, y1) read.
void BatchConv::first_and_last(int64_t y0, int64_t y1, int64_t* from, int64_t* to) const {
    *from = vertical_.source_size, *to = 0;
    for (int64_t y = y0; y < y1; y++) {
        const auto& c = vertical_.of(y);
        if (c.shift.empty()) continue;
        int64_t base = (y - c.first) / c.step * c.source_step;
        *from = std::min(*from, std::max<int64_t>(0, base + c.shift.front()));
        *to = std::max(*to, std::min(vertical_.source_size, base + c.shift.back() + 1));
    }
    if (*from >= *to) *from = *to = 0;
}

void BatchConv::run(Images<const float> x, int64_t images, Images<float> y, const float* bias, int threads) const {
    const BatchKernels& k = batch_kernels();
    const int64_t lanes = k.lanes, groups = ceil_div(images, lanes), width = horizontal_.size, height = vertical_.size;
    const int64_t chunk = rows_per_chunk(), chunks = ceil_div(height, chunk);
    const int64_t row_floats = channels_ * padded_ * lanes, source_pixels = vertical_.source_size * horizontal_.source_size;
    const int64_t capacity = std::min(vertical_.source_size, std::max(window_rows(chunk), kWindowFloats / row_floats));
    // Few groups are cut into bands of output rows, so that every thread has something.
    const int64_t bands = std::min(chunks, groups >= 2 * threads ? 1 : ceil_div(2 * threads, groups));
    const int64_t block_row = odd(chunk * width) * lanes, block_floats = std::min(kRowBlock, rows_) * block_row;
    const int64_t spare = horizontal_.source_size < lanes ? source_pixels * lanes : 0;

    parallel_for(groups * bands, threads, [&](int64_t item, int) {
        const int64_t group = item / bands, band = item % bands;
        const int valid = static_cast<int>(std::min(lanes, images - group * lanes));
        float* memory = thread_scratch(capacity * row_floats + spare + block_floats);
        Window window{
            *this,           k,    memory, memory + capacity * row_floats, capacity, x.data + group * lanes * channels_ * source_pixels,
            x.channels_last, valid};
        float* block = memory + capacity * row_floats + spare;
        window.clear_edges();
        for (int64_t i = chunks * band / bands; i < chunks * (band + 1) / bands; i++) {
            const int64_t y0 = i * chunk, y1 = std::min(height, y0 + chunk);
            int64_t from, to;
            first_and_last(y0, y1, &from, &to);
            if (from < to) window.need(from, to);
            for (int64_t row0 = 0; row0 < rows_; row0 += kRowBlock) {
                BatchConvArgs a{};
                a.rows = std::min(kRowBlock, rows_ - row0);
                a.offset = offset_.data(), a.values = values_.data();
                a.ranges = start_of(1, 0, 0);
                a.bias = bias ? bias + row0 : nullptr;
                a.out_row = static_cast<size_t>(block_row);
                for (int64_t line = y0; line < y1; line++) {
                    const size_t yc = static_cast<size_t>(line) % vertical_.classes.size();
                    const auto& v = vertical_.classes[yc];
                    const int64_t base = (line - v.first) / v.step * v.source_step;
                    // Taps whose rows exist: they are neighbours.
                    size_t tap0 = 0, tap1 = v.shift.size();
                    while (tap0 < tap1 && base + v.shift[tap0] < 0) tap0++;
                    while (tap1 > tap0 && base + v.shift[tap1 - 1] >= vertical_.source_size) tap1--;
                    const int64_t row_at = v.shift.empty() ? 0 : base + v.shift[0] - window.low;
                    for (size_t xc = 0; xc < horizontal_.classes.size(); xc++) {
                        const auto& h = horizontal_.classes[xc];
                        const int64_t column = left_ + (h.shift.empty() ? 0 : h.shift[0]);
                        const uint32_t* ranges = start_.data() + start_of(row0, yc, xc);
                        a.begin = ranges + tap0, a.end = ranges + tap1;
                        a.step = static_cast<size_t>(h.source_step), a.out_step = static_cast<size_t>(h.step * lanes);
                        const int64_t tiles = ceil_div(h.count, kBatchVectors);
                        for (int64_t tile = 0; tile < tiles; tile++) {
                            const int64_t i0 = h.count * tile / tiles;
                            a.vectors = static_cast<int>(h.count * (tile + 1) / tiles - i0);
                            a.x = window.rows + row_at * row_floats + (column + i0 * h.source_step) * lanes;
                            a.out = block + ((line - y0) * width + h.first + i0 * h.step) * lanes;
                            k.conv(a);
                        }
                    }
                }
                float* images_out = y.data + group * lanes * rows_ * height * width;
                const auto ld = static_cast<size_t>(rows_ * height * width);
                const int64_t pixels = (y1 - y0) * width;
                if (y.channels_last) {
                    for (int64_t p = 0; p < pixels; p++)
                        k.from_lanes(block + p * lanes, static_cast<size_t>(block_row), valid, static_cast<int>(a.rows),
                                     images_out + (y0 * width + p) * rows_ + row0, ld);
                } else {
                    for (int64_t r = 0; r < a.rows; r++)
                        k.from_lanes(block + r * block_row, static_cast<size_t>(lanes), valid, static_cast<int>(pixels),
                                     images_out + ((row0 + r) * height + y0) * width, ld);
                }
            }
        }
    });
}

void BatchConv::weight_grad(Images<const float> dy, Images<const float> x, int64_t images, float* dvalues, int threads) const {
    const BatchKernels& k = batch_kernels();
    const int64_t lanes = k.lanes, groups = ceil_div(images, lanes), width = horizontal_.size, height = vertical_.size;
    const int64_t row_floats = channels_ * padded_ * lanes, source_pixels = vertical_.source_size * horizontal_.source_size;
    const int64_t nnz = static_cast<int64_t>(order_.size());
    // Long enough that the sums across the lanes cost little.
    int64_t chunk = rows_per_chunk();
    while (chunk < height && (chunk * width < 64 || window_rows(chunk + 1) * row_floats <= kWindowFloats)) chunk++;
    const int64_t capacity = std::min(vertical_.source_size, std::max(window_rows(chunk), kWindowFloats / row_floats));
    const int64_t spare = horizontal_.source_size < lanes ? source_pixels * lanes : 0;
    const int64_t gradient_floats = odd(chunk * width) * lanes;
    const BatchAxis::Class &v = vertical_.classes[0], &h = horizontal_.classes[0];
    // A fixed number of partial sums, added in a fixed order: the result does not depend on the number of threads.
    const int64_t partials = std::min(groups, kChunks);
    std::vector<float> partial(size_t(partials) * nnz, 0.0f);

    parallel_for(partials, threads, [&](int64_t part, int) {
        float* sums = partial.data() + part * nnz;
        float* memory = thread_scratch(capacity * row_floats + spare + kGradientRows * gradient_floats);
        float* gradient = memory + capacity * row_floats + spare;
        for (int64_t group = groups * part / partials; group < groups * (part + 1) / partials; group++) {
            const int valid = static_cast<int>(std::min(lanes, images - group * lanes));
            Window window{
                *this,           k,    memory, memory + capacity * row_floats, capacity, x.data + group * lanes * channels_ * source_pixels,
                x.channels_last, valid};
            window.clear_edges();
            for (int64_t y0 = 0; y0 < height; y0 += chunk) {
                const int64_t y1 = std::min(height, y0 + chunk);
                int64_t from, to;
                first_and_last(y0, y1, &from, &to);
                if (from == to) continue;
                window.need(from, to);
                for (int64_t row0 = 0; row0 < rows_; row0 += kGradientRows) {
                    const int64_t row1 = std::min(rows_, row0 + kGradientRows);
                    const float* images_dy = dy.data + group * lanes * rows_ * height * width;
                    const auto ld = static_cast<size_t>(rows_ * height * width);
                    const int64_t pixels = (y1 - y0) * width;
                    if (dy.channels_last) {
                        for (int64_t p = 0; p < pixels; p++)
                            k.to_lanes(images_dy + (y0 * width + p) * rows_ + row0, ld, valid, static_cast<int>(row1 - row0),
                                       gradient + p * lanes, static_cast<size_t>(gradient_floats));
                    } else {
                        for (int64_t row = row0; row < row1; row++)
                            k.to_lanes(images_dy + (row * height + y0) * width, ld, valid, static_cast<int>(pixels),
                                       gradient + (row - row0) * gradient_floats, static_cast<size_t>(lanes));
                    }
                    for (int64_t row = row0; row < row1; row++) {
                        const uint32_t* ranges = start_.data() + start_of(row, 0, 0);
                        for (size_t tap = 0; tap < v.shift.size(); tap++) {
                            if (ranges[tap] == ranges[tap + 1]) continue;
                            // Output rows whose source exists.
                            int64_t a0 = y0, a1 = y1;
                            while (a0 < a1 && a0 * v.source_step + v.shift[tap] < 0) a0++;
                            while (a1 > a0 && (a1 - 1) * v.source_step + v.shift[tap] >= vertical_.source_size) a1--;
                            if (a0 == a1) continue;
                            BatchDotsArgs a{};
                            a.dy = gradient + (row - row0) * gradient_floats + (a0 - y0) * width * lanes;
                            a.dy_row = static_cast<size_t>(width * lanes);
                            a.x = window.rows + (a0 * v.source_step + v.shift[0] - window.low) * row_floats + (left_ + h.shift[0]) * lanes;
                            a.x_row = static_cast<size_t>(v.source_step * row_floats), a.step = static_cast<size_t>(h.source_step);
                            a.height = a1 - a0, a.width = width;
                            a.offset = offset_.data() + ranges[tap], a.entries = ranges[tap + 1] - ranges[tap];
                            a.out = sums + ranges[tap];
                            k.dots(a);
                        }
                    }
                }
            }
        }
    });
    for (int64_t i = 0; i < nnz; i++) {
        float sum = partial[i];
        for (int64_t part = 1; part < partials; part++) sum += partial[part * nnz + i];
        dvalues[order_[i]] = sum;
    }
}

}  // namespace sparse_engine
