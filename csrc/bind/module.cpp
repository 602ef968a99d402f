// The Python module `_C`: thin. It checks what comes in, releases the GIL and calls the core. Memory crosses as addresses
// (tensor.data_ptr()).
#include <pybind11/functional.h>
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>

#include "core/bfloat16.h"
#include "core/cpu_features.h"
#include "core/host_team.h"
#include "core/recycled.h"
#include "core/thread_pool.h"
#include "core/trace.h"
#include "cpu/kernels_pairs.h"
#include "runtime/layers.h"
#include "runtime/linear_operator.h"
#include "runtime/losses.h"
#include "runtime/pair_product.h"
#include "runtime/peak.h"
#include "runtime/plan.h"
#include "runtime/row_tiles.h"
#include "runtime/tensor_ops.h"
#include "runtime/vector_product.h"
#include "runtime/winograd.h"

namespace py = pybind11;
using namespace sparse_engine;

namespace {

template <class T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;
using Release = py::call_guard<py::gil_scoped_release>;
// buffer, offset in floats
using PyRef = std::pair<int, int64_t>;
// buffer, offset, sizes, strides
using PyView = std::tuple<int, int64_t, std::vector<int64_t>, std::vector<int64_t>>;
// Channel planes: place, stride, and whether they hold bfloat16.
using PyPlanes = std::tuple<PyRef, int64_t, bool>;
// kind, first and second parameter
using PyActivation = std::tuple<std::string, float, float>;

template <class T>
std::vector<T> to_vector(const Array<T>& a) {
    return {a.data(), a.data() + a.size()};
}

// Addresses or strides of one call; the usual few without an allocation.
template <class T>
class Numbers {
  public:
    explicit Numbers(const py::sequence& list) : size_(list.size()) {
        if (size_ > kFew) many_.resize(size_);
        T* to = size_ > kFew ? many_.data() : few_;
        for (size_t i = 0; i < size_; i++) to[i] = py::cast<T>(py::object(list[i]));
    }
    size_t size() const { return size_; }
    const T* data() const { return size_ > kFew ? many_.data() : few_; }

  private:
    static constexpr size_t kFew = 32;
    size_t size_;
    T few_[kFew];
    std::vector<T> many_;
};

float* const* buffers(const Numbers<uintptr_t>& addresses) { return reinterpret_cast<float* const*>(addresses.data()); }

float* address(uintptr_t p) { return reinterpret_cast<float*>(p); }

template <class E>
E named(const std::string& name, const std::vector<std::string>& names, const char* what) {
    for (size_t i = 0; i < names.size(); i++)
        if (names[i] == name) return static_cast<E>(i);
    throw std::invalid_argument(std::string("unknown ") + what + " '" + name + "'");
}

const std::vector<std::string> kActivations = {"none",        "clamp",   "leaky_relu", "gelu",       "gelu_tanh", "silu", "hardswish",
                                               "hardsigmoid", "sigmoid", "tanh",       "elu",        "softplus",  "exp",  "sqrt",
                                               "rsqrt",       "neg",     "abs",        "reciprocal", "square",    "log",  "erf"};
const std::vector<std::string> kBinaries = {"add", "sub", "mul", "div", "maximum", "minimum", "pow"};
const std::vector<std::string> kReductions = {"mean", "sum", "amax", "amin"};

Epilogue epilogue(const PyActivation& a) {
    Epilogue e;
    e.kind = named<Activation>(std::get<0>(a), kActivations, "activation");
    e.p0 = std::get<1>(a), e.p1 = std::get<2>(a);
    return e;
}

Ref ref(const PyRef& r) { return {r.first, r.second}; }

using FloatVector = std::shared_ptr<const std::vector<float>>;
FloatVector optional_floats(const std::optional<Array<float>>& a) {
    return a ? std::make_shared<const std::vector<float>>(to_vector(*a)) : nullptr;
}

// A weight in one kernel's layout, shared by the plans of every batch size.
struct Weight {
    // The vector layout by blocks of columns: each block's rows, one after the other, with columns counted from the block's first.
    void cut_into_blocks() {
        const int64_t width = VectorNode::kBlockColumns, blocks = (cols + width - 1) / width;
        auto cut_ptr = std::make_shared<std::vector<int64_t>>(static_cast<size_t>(blocks * rows + 1), 0);
        auto cut_col = std::make_shared<std::vector<uint16_t>>(col->size());
        auto cut_values = std::make_shared<std::vector<float>>(col->size());
        for (int64_t r = 0; r < rows; r++)
            for (int64_t i = (*row_ptr)[r]; i < (*row_ptr)[r + 1]; i++) (*cut_ptr)[(*col)[i] / width * rows + r + 1]++;
        for (size_t i = 1; i < cut_ptr->size(); i++) (*cut_ptr)[i] += (*cut_ptr)[i - 1];
        std::vector<int64_t> next(cut_ptr->begin(), cut_ptr->end() - 1);
        for (int64_t r = 0; r < rows; r++)
            for (int64_t i = (*row_ptr)[r]; i < (*row_ptr)[r + 1]; i++) {
                int64_t to = next[(*col)[i] / width * rows + r]++;
                (*cut_col)[to] = static_cast<uint16_t>((*col)[i] % width), (*cut_values)[to] = (*values)[i];
            }
        row_ptr = std::move(cut_ptr), col16 = std::move(cut_col), values = std::move(cut_values), col = nullptr;
    }
    std::shared_ptr<const PanelMatrix> panels;
    std::shared_ptr<const WinogradWeight> winograd;
    std::shared_ptr<const RowTileMatrix> row_tiles;
    std::shared_ptr<const PairMatrix> pairs;
    std::shared_ptr<const std::vector<uint16_t>> halves;  // all values, in bfloat16
    std::shared_ptr<const VectorLayer> product;           // of any precision, for vectors
    std::shared_ptr<std::vector<int64_t>> row_ptr;        // vector layout
    std::shared_ptr<std::vector<int32_t>> col;
    std::shared_ptr<std::vector<uint16_t>> col16;  // instead of col, once cut into blocks
    FloatVector values;
    int64_t rows = 0, cols = 0;
    int64_t nbytes() const {
        if (panels) return panels->nbytes();
        if (winograd) return winograd->nbytes();
        if (row_tiles) return row_tiles->nbytes();
        if (pairs) return pairs->nbytes();
        if (halves) return static_cast<int64_t>(halves->size() * sizeof(uint16_t));
        if (product) return product->nbytes();
        return static_cast<int64_t>((row_ptr ? row_ptr->size() * 8 + (col ? col->size() * 4 : col16->size() * 2) : 0) + values->size() * 4);
    }
};

// Throws std::invalid_argument where the three arrays are not a sparse matrix.
CsrView checked_csr(const Array<int64_t>& row_ptr, const Array<int32_t>& col, const Array<float>& values, int64_t cols) {
    if (row_ptr.size() < 1 || col.size() != values.size())
        throw std::invalid_argument("row_ptr is empty, or columns and values differ in number");
    CsrView csr{row_ptr.size() - 1, cols, row_ptr.data(), col.data()};
    for (int64_t r = 0; r < csr.rows; r++)
        if (row_ptr.data()[r + 1] < row_ptr.data()[r] || row_ptr.data()[r + 1] > col.size())
            throw std::invalid_argument("row_ptr out of range at row " + std::to_string(r));
    if (csr.nnz() != col.size()) throw std::invalid_argument("row_ptr does not end at the number of values");
    check_csr(csr);
    return csr;
}

struct PlanBuilder {
    std::shared_ptr<Plan> plan;
    int64_t arena_floats;
    std::vector<int64_t> external_floats;

    PlanBuilder(int64_t arena, std::vector<int64_t> externals)
        : plan(std::make_shared<Plan>(arena, static_cast<int>(externals.size()))),
          arena_floats(arena),
          external_floats(std::move(externals)) {}

    int64_t floats(int buffer) const {
        if (buffer < 0 || buffer > static_cast<int>(external_floats.size()))
            throw std::invalid_argument("buffer " + std::to_string(buffer) + " does not exist");
        return buffer == 0 ? arena_floats : external_floats[buffer - 1];
    }
    // Every place that a node may touch lies inside its buffer.
    void check(int buffer, int64_t first, int64_t last) const {
        if (first < 0 || last >= floats(buffer))
            throw std::invalid_argument("a node would touch floats " + std::to_string(first) + " to " + std::to_string(last) +
                                        " of buffer " + std::to_string(buffer) + ", which has " + std::to_string(floats(buffer)));
    }
    View view(const PyView& v) const {
        View r{{std::get<0>(v), std::get<1>(v)}, std::get<2>(v), std::get<3>(v)};
        if (r.sizes.size() != r.strides.size()) throw std::invalid_argument("sizes and strides differ in length");
        int64_t last = r.ref.offset;
        for (size_t i = 0; i < r.sizes.size(); i++) {
            if (r.sizes[i] < 0 || r.strides[i] < 0) throw std::invalid_argument("negative size or stride");
            if (r.sizes[i] == 0) return r;
            last += (r.sizes[i] - 1) * r.strides[i];
        }
        check(r.ref.buffer, r.ref.offset, last);
        return r;
    }
    void check_planes(const PyRef& r, int64_t rows, int64_t stride, int64_t pixels) const {
        if (rows > 0 && pixels > 0) check(r.first, r.second, r.second + (rows - 1) * stride + pixels - 1);
    }
    // Channel planes that a kernel may touch by whole vectors, or in bfloat16 by whole lines.
    Planes planes(const PyPlanes& p, int64_t rows, int64_t pixels) const {
        const auto& [place, stride, half] = p;
        const int64_t unit = half ? kLinePixels : 16, whole = (pixels + unit - 1) / unit * unit;
        if (stride < 0 || (half && rows > 1 && stride % kLinePixels))
            throw std::invalid_argument("planes in bfloat16 are whole lines apart");
        if (rows > 0 && pixels > 0) check(place.first, place.second, place.second + ((rows - 1) * stride + whole - 1) / (half ? 2 : 1));
        return {{place.first, place.second}, stride, half};
    }
    template <class N>
    void add(const std::string& name, std::unique_ptr<N> node) {
        node->name = name;
        plan->add(std::move(node));
    }
};

ConvGeometry geometry(const py::dict& d) {
    ConvGeometry g;
    auto get = [&](const char* key) { return d[key].cast<int64_t>(); };
    auto pair = [&](const char* key) { return d[key].cast<std::pair<int64_t, int64_t>>(); };
    if (d.contains("n")) g.batch = get("n");
    if (d.contains("h")) g.height = get("h");
    if (d.contains("w")) g.width = get("w");
    g.channels = get("c"), g.kernel_h = get("r"), g.kernel_w = get("s");
    std::tie(g.stride_h, g.stride_w) = pair("stride");
    std::tie(g.dilation_h, g.dilation_w) = pair("dilation");
    auto padding = d["padding"].cast<std::array<int64_t, 4>>();
    g.pad_top = padding[0], g.pad_left = padding[1], g.pad_bottom = padding[2], g.pad_right = padding[3];
    return g;
}

// A weight for single vectors, from a pattern with values in its order or from all rows × cols values.
std::shared_ptr<VectorLayer> vector_layer(const std::optional<Array<int64_t>>& row_ptr, const std::optional<Array<int32_t>>& col,
                                          const py::array& values, const std::optional<Array<float>>& scales, int64_t rows, int64_t cols,
                                          bool bytes) {
    if (!(values.flags() & py::array::c_style)) throw std::invalid_argument("values must be contiguous");
    Precision precision;
    if (py::isinstance<py::array_t<float>>(values)) {
        precision = Precision::float32;
    } else if (py::isinstance<py::array_t<uint16_t>>(values)) {
        precision = Precision::bfloat16;
    } else if (py::isinstance<py::array_t<int8_t>>(values)) {
        precision = Precision::int8;
    } else {
        throw std::invalid_argument("values must be float32, uint16 or int8");
    }
    if (rows < 0 || cols < 0) throw std::invalid_argument("negative matrix size");
    if (row_ptr.has_value() != col.has_value()) throw std::invalid_argument("a pattern is row_ptr and columns");
    auto floats = optional_floats(scales);
    if (!row_ptr) {
        if (values.size() != rows * cols)
            throw std::invalid_argument("a dense weight of " + std::to_string(rows) + "x" + std::to_string(cols) + " has as many values");
        return std::make_shared<VectorLayer>(nullptr, nullptr, std::make_shared<RowMatrix>(rows, cols, values.data(), precision), floats);
    }
    if (row_ptr->size() != rows + 1 || col->size() != values.size() || row_ptr->data()[rows] != values.size())
        throw std::invalid_argument("row_ptr, columns and values do not fit");
    for (int64_t r = 0; r < rows; r++)
        if (row_ptr->data()[r + 1] < row_ptr->data()[r]) throw std::invalid_argument("row_ptr decreases");
    CsrView csr{rows, cols, row_ptr->data(), col->data()};
    check_csr(csr);
    if (bytes) return std::make_shared<VectorLayer>(nullptr, std::make_shared<ByteLookup>(csr, values.data(), precision), nullptr, floats);
    return std::make_shared<VectorLayer>(std::make_shared<LookupMatrix>(csr, values.data(), precision, false), nullptr, nullptr, floats);
}

KDBatch kd_batch(uintptr_t logits, int64_t pitch, int64_t rows, int64_t classes, uintptr_t targets, uintptr_t teacher,
                 int64_t teacher_pitch, uintptr_t class_weights, double temperature, bool soft_targets, bool kl, bool hard,
                 double label_smoothing, int64_t ignore_index, uintptr_t gradient, int64_t gradient_pitch) {
    KDBatch b;
    b.rows = rows, b.classes = classes, b.logits = address(logits), b.pitch = pitch;
    b.teacher = address(teacher), b.teacher_pitch = teacher_pitch;
    b.labels = reinterpret_cast<const int64_t*>(targets), b.class_weights = address(class_weights);
    b.temperature = temperature, b.label_smoothing = label_smoothing, b.hard = hard, b.soft_targets = soft_targets, b.kl = kl;
    b.ignore_index = ignore_index, b.gradient = address(gradient), b.gradient_pitch = gradient_pitch;
    b.check();
    return b;
}

}  // namespace

// Raised together with INTERFACE in sparse_engine/ops/native.py when a name, an argument or a meaning below changes.
constexpr int kInterface = 12;

PYBIND11_MODULE(_C, m) {
    m.doc() = "The C++ core of sparse_engine.";
    m.attr("interface") = kInterface;

    m.def("cpu_info", [] {
        const CpuInfo& c = cpu_info();
        py::dict d;
        std::vector<std::string> available = {"portable"}, features;
        if (c.best_isa >= Isa::avx2) available.push_back("avx2");
        if (c.best_isa >= Isa::avx512) available.push_back("avx512");
        auto feature = [&](const char* name, bool has) {
            if (has) features.push_back(name);
        };
        feature("avx", c.avx), feature("avx2", c.avx2), feature("fma", c.fma), feature("f16c", c.f16c), feature("avx512f", c.avx512f),
            feature("avx512bw", c.avx512bw);
        feature("avx512dq", c.avx512dq), feature("avx512vl", c.avx512vl), feature("avx512_vnni", c.avx512_vnni),
            feature("avx512_bf16", c.avx512_bf16);
        feature("avx512_vbmi", c.avx512_vbmi);
        d["isa"] = to_string(active_isa());
        d["available"] = available;
        d["vendor"] = c.vendor, d["model"] = c.model, d["cores"] = c.available_cpus;
        d["l1d"] = c.l1d_bytes, d["l2"] = c.l2_bytes, d["l3"] = c.l3_bytes, d["features"] = features;
        d["lanes"] = kernels().lanes;
        return d;
    });
    m.def("expect_job", &expect_job);
    m.def("set_num_threads", &set_num_threads, py::arg("n"),
          "Threads for calls that start from now on; 0 = one per core that this process may use.");
    m.def("leave_host_team", &leave_host_team, "From now on no job runs on the OpenMP threads of the host program.");
    m.def("jobs_on_host_team", &jobs_on_host_team,
          "Jobs so far that ran on the OpenMP threads of the host program, PyTorch's, because those were awake.");
    m.def("get_num_threads", &num_threads);
    m.def(
        "kd_rows",
        [](uintptr_t logits, int64_t pitch, int64_t rows, int64_t classes, uintptr_t targets, uintptr_t teacher, int64_t teacher_pitch,
           uintptr_t class_weights, uintptr_t hard_scale, uintptr_t soft_scale, double temperature, bool soft_targets, bool kl, bool hard,
           double label_smoothing, int64_t ignore_index, uintptr_t hard_loss, uintptr_t soft_loss, uintptr_t gradient,
           int64_t gradient_pitch) {
            KDBatch b = kd_batch(logits, pitch, rows, classes, targets, teacher, teacher_pitch, class_weights, temperature, soft_targets,
                                 kl, hard, label_smoothing, ignore_index, gradient, gradient_pitch);
            py::gil_scoped_release release;
            kd_rows(b, address(hard_scale), address(soft_scale), address(hard_loss), address(soft_loss));
        },
        "Cross entropy and distillation loss of each row, with their gradient on request; the order of arguments is that of "
        "ops/kd_loss.py.");
    m.def(
        "kd_loss",
        [](uintptr_t logits, int64_t pitch, int64_t rows, int64_t classes, uintptr_t targets, uintptr_t teacher, int64_t teacher_pitch,
           int64_t teacher_from, uintptr_t table, int64_t table_rows, uintptr_t samples, uintptr_t class_weights, uintptr_t sample_weights,
           double temperature, bool soft_targets, bool kl, double hard_weight, double soft_weight, double label_smoothing,
           int64_t ignore_index, const std::string& reduction, uintptr_t loss, uintptr_t hard, uintptr_t soft, uintptr_t gradient,
           int64_t gradient_pitch) {
            KDBatch b = kd_batch(logits, pitch, rows, classes, targets, teacher, teacher_pitch, class_weights, temperature, soft_targets,
                                 kl, hard_weight != 0, label_smoothing, ignore_index, gradient, gradient_pitch);
            b.teacher_from = teacher_from, b.table = address(table), b.table_rows = table_rows;
            b.samples = reinterpret_cast<const int64_t*>(samples);
            KDReduction r;
            r.hard_weight = hard_weight, r.soft_weight = soft_weight, r.sample_weights = address(sample_weights);
            r.kind = named<LossReduction>(reduction, {"none", "mean", "sum"}, "reduction");
            py::gil_scoped_release release;
            return kd_loss(b, r, address(loss), address(hard), address(soft));
        },
        "The weighted sum of both losses and each of them, reduced over the rows, and the gradient of the sum. False where a sample of "
        "the table occurs twice. See runtime/losses.h.");
    py::class_<RecycledMemory>(m, "RecycledMemory", py::buffer_protocol(), "A writable buffer of bytes; see core/recycled.h.")
        .def(py::init<size_t>(), py::arg("bytes"))
        .def_buffer(
            [](RecycledMemory& r) { return py::buffer_info(reinterpret_cast<uint8_t*>(r.data()), static_cast<py::ssize_t>(r.bytes())); });
    m.def("fma_peak", &fma_peak, py::arg("seconds") = 0.05, py::arg("threads") = 0, Release(),
          "Operations per second of fused multiply-adds on registers, all threads together.");
    m.def("padded_pixels", &padded_pixels, "Floats from one channel plane of so many pixels to the next.");

    // -------------------------------------------------------------------------------------------------------- layers

    py::class_<LinearLayer, std::shared_ptr<LinearLayer>>(m, "Linear")
        .def(py::init([](const Array<int64_t>& row_ptr, const Array<int32_t>& col, int64_t rows, int64_t cols) {
                 return std::make_shared<LinearLayer>(to_vector(row_ptr), to_vector(col), rows, cols);
             }),
             py::arg("row_ptr"), py::arg("cols"), py::arg("rows"), py::arg("cols_count"))
        .def(
            "set_values", [](LinearLayer& l, uintptr_t p, int64_t n) { l.set_values(address(p), n); }, Release())
        .def(
            "forward",
            [](LinearLayer& l, uintptr_t x, int64_t ldx, int64_t n, uintptr_t y, int64_t ldy, uintptr_t bias) {
                l.forward(address(x), ldx, n, address(y), ldy, address(bias));
            },
            py::arg("x"), py::arg("ldx"), py::arg("n"), py::arg("y"), py::arg("ldy"), py::arg("bias") = 0, Release())
        .def(
            "input_grad",
            [](LinearLayer& l, uintptr_t dy, int64_t lddy, int64_t n, uintptr_t dx, int64_t lddx) {
                l.input_grad(address(dy), lddy, n, address(dx), lddx);
            },
            Release())
        .def(
            "weight_grad",
            [](LinearLayer& l, uintptr_t dy, int64_t lddy, uintptr_t x, int64_t ldx, int64_t n, uintptr_t dv) {
                l.weight_grad(address(dy), lddy, address(x), ldx, n, address(dv));
            },
            Release())
        .def(
            "gradients",
            [](LinearLayer& l, uintptr_t dy, int64_t lddy, uintptr_t x, int64_t ldx, int64_t n, uintptr_t dx, int64_t lddx, uintptr_t dv,
               uintptr_t db) { l.gradients(address(dy), lddy, address(x), ldx, n, address(dx), lddx, address(dv), address(db)); },
            "Those of the input, the values and the bias, each where its address is not 0.", Release())
        .def_property_readonly("nbytes", &LinearLayer::nbytes)
        .def_property_readonly("nnz", &LinearLayer::nnz);

    py::class_<ConvLayer, std::shared_ptr<ConvLayer>>(m, "Conv2d")
        .def(py::init([](const Array<int64_t>& row_ptr, const Array<int32_t>& col, const py::dict& g) {
                 return std::make_shared<ConvLayer>(to_vector(row_ptr), to_vector(col), g["m"].cast<int64_t>(), g["groups"].cast<int64_t>(),
                                                    geometry(g));
             }),
             py::arg("row_ptr"), py::arg("cols"), py::arg("geometry"))
        .def(
            "set_values", [](ConvLayer& l, uintptr_t p, int64_t n) { l.set_values(address(p), n); }, Release())
        // channels_last: of the first images, of the second ones. All three answer whether they could take them as they are.
        .def(
            "forward",
            [](ConvLayer& l, uintptr_t x, int64_t n, int64_t h, int64_t w, uintptr_t y, uintptr_t bias, bool x_last, bool y_last) {
                return l.forward({address(x), x_last}, n, h, w, {address(y), y_last}, address(bias));
            },
            py::arg("x"), py::arg("n"), py::arg("h"), py::arg("w"), py::arg("y"), py::arg("bias") = 0, py::arg("x_last") = false,
            py::arg("y_last") = false, Release())
        .def(
            "input_grad",
            [](ConvLayer& l, uintptr_t dy, int64_t n, int64_t h, int64_t w, uintptr_t dx, bool dy_last, bool dx_last) {
                return l.input_grad({address(dy), dy_last}, n, h, w, {address(dx), dx_last});
            },
            py::arg("dy"), py::arg("n"), py::arg("h"), py::arg("w"), py::arg("dx"), py::arg("dy_last") = false, py::arg("dx_last") = false,
            Release())
        .def(
            "weight_grad",
            [](ConvLayer& l, uintptr_t dy, uintptr_t x, int64_t n, int64_t h, int64_t w, uintptr_t dv, bool dy_last, bool x_last) {
                return l.weight_grad({address(dy), dy_last}, {address(x), x_last}, n, h, w, address(dv));
            },
            py::arg("dy"), py::arg("x"), py::arg("n"), py::arg("h"), py::arg("w"), py::arg("dvalues"), py::arg("dy_last") = false,
            py::arg("x_last") = false, Release())
        .def_property_readonly_static("batch_lanes", [](const py::object&) { return kernels().lanes; })
        .def_property_readonly("nbytes", &ConvLayer::nbytes)
        .def_property_readonly("nnz", &ConvLayer::nnz);

    py::class_<VectorLayer, std::shared_ptr<VectorLayer>>(m, "VectorLinear")
        .def(py::init([](const std::optional<Array<int64_t>>& row_ptr, const std::optional<Array<int32_t>>& col, const py::array& values,
                         const std::optional<Array<float>>& scales, int64_t rows, int64_t cols,
                         bool bytes) { return vector_layer(row_ptr, col, values, scales, rows, cols, bytes); }),
             py::arg("row_ptr"), py::arg("cols"), py::arg("values"), py::arg("scales"), py::arg("rows"), py::arg("cols_count"),
             py::arg("bytes") = false,
             "values: float32, uint16 (the bits of bfloat16) or int8; without a pattern all rows x cols of them. bytes: columns as "
             "bytes, for the latter two.")
        .def(
            "forward",
            [](VectorLayer& l, uintptr_t x, int64_t ldx, int64_t n, uintptr_t y, int64_t ldy, uintptr_t bias) {
                l.forward(address(x), ldx, n, address(y), ldy, address(bias));
            },
            py::arg("x"), py::arg("ldx"), py::arg("n"), py::arg("y"), py::arg("ldy"), py::arg("bias") = 0, Release())
        .def_property_readonly("nbytes", &VectorLayer::nbytes)
        .def_property_readonly("stored", &VectorLayer::stored);

    // -------------------------------------------------------------------------------------------------------- plans

    py::class_<Weight, std::shared_ptr<Weight>>(m, "Weight")
        .def_static(
            "sparse",
            [](const Array<int64_t>& row_ptr, const Array<int32_t>& col, const Array<float>& values, int64_t cols, int panel, int part,
               int row_block) {
                auto w = std::make_shared<Weight>();
                const CsrView csr = checked_csr(row_ptr, col, values, cols);
                w->rows = csr.rows, w->cols = cols;
                w->panels = std::make_shared<PanelMatrix>(csr, values.data(), PanelOptions{panel, part, row_block, false, false});
                return w;
            },
            py::arg("row_ptr"), py::arg("cols"), py::arg("values"), py::arg("cols_count"), py::arg("panel") = 1, py::arg("part") = 256,
            py::arg("row_block") = 0)
        .def_static(
            "dense",
            [](const Array<float>& values, int panel, int part, int row_block) {
                if (values.ndim() != 2) throw std::invalid_argument("a dense weight has two dimensions");
                auto w = std::make_shared<Weight>();
                w->rows = values.shape(0), w->cols = values.shape(1);
                w->panels =
                    std::make_shared<PanelMatrix>(w->rows, w->cols, values.data(), PanelOptions{panel, part, row_block, true, false});
                return w;
            },
            py::arg("values"), py::arg("panel") = 8, py::arg("part") = 256, py::arg("row_block") = 0)
        .def_static(
            "row_tiles",
            [](const Array<int64_t>& row_ptr, const Array<int32_t>& col, const Array<float>& values, const py::dict& g, int part,
               int height) {
                const ConvGeometry geo = geometry(g);
                if (!RowTileNode::applies(geo)) throw std::invalid_argument("row tiles do not apply to this convolution");
                const CsrView csr = checked_csr(row_ptr, col, values, geo.channels * geo.taps());
                auto w = std::make_shared<Weight>();
                w->rows = csr.rows, w->cols = csr.cols;
                w->row_tiles =
                    std::make_shared<RowTileMatrix>(csr, values.data(), geo.kernel_h, geo.kernel_w, part, height, kernels().lanes);
                return w;
            },
            py::arg("row_ptr"), py::arg("cols"), py::arg("values"), py::arg("geometry"), py::arg("part"), py::arg("height"))
        .def_static(
            "pairs",
            [](const Array<int64_t>& row_ptr, const Array<int32_t>& col, const Array<float>& values, int64_t cols, int part,
               int row_block) {
                auto w = std::make_shared<Weight>();
                const CsrView csr = checked_csr(row_ptr, col, values, cols);
                w->rows = csr.rows, w->cols = cols;
                w->pairs = std::make_shared<PairMatrix>(csr, values.data(), part, row_block);
                return w;
            },
            py::arg("row_ptr"), py::arg("cols"), py::arg("values"), py::arg("cols_count"), py::arg("part") = 256, py::arg("row_block") = 0,
            "In bfloat16, for Plan.pairs.")
        .def_static(
            "depthwise_pairs",
            [](const Array<float>& values) {
                if (values.ndim() != 2) throw std::invalid_argument("the weight of a depthwise convolution is channels x taps");
                auto w = std::make_shared<Weight>();
                w->rows = values.shape(0), w->cols = values.shape(1);
                auto rounded = std::make_shared<std::vector<uint16_t>>(values.size());
                for (size_t i = 0; i < rounded->size(); i++) (*rounded)[i] = to_bfloat16(values.data()[i]);
                w->halves = rounded;
                return w;
            },
            py::arg("values"))
        .def_static(
            "winograd",
            [](const Array<float>& values, const py::dict& g) {
                ConvGeometry geo = geometry(g);
                if (values.ndim() != 2 || values.shape(1) != geo.channels * geo.taps())
                    throw std::invalid_argument("the weight does not fit the geometry");
                auto w = std::make_shared<Weight>();
                w->rows = values.shape(0), w->cols = values.shape(1);
                w->winograd = std::make_shared<WinogradWeight>(w->rows, geo, values.data());
                return w;
            },
            py::arg("values"), py::arg("geometry"))
        .def_static(
            "vector",
            [](const std::optional<Array<int64_t>>& row_ptr, const std::optional<Array<int32_t>>& col, const Array<float>& values,
               int64_t rows, int64_t cols) {
                auto w = std::make_shared<Weight>();
                w->rows = rows, w->cols = cols;
                w->values = std::make_shared<const std::vector<float>>(to_vector(values));
                if (row_ptr) {
                    w->row_ptr = std::make_shared<std::vector<int64_t>>(to_vector(*row_ptr));
                    w->col = std::make_shared<std::vector<int32_t>>(to_vector(*col));
                    if (static_cast<int64_t>(w->row_ptr->size()) != rows + 1 || w->row_ptr->back() != values.size() ||
                        w->col->size() != w->values->size())
                        throw std::invalid_argument("row_ptr, columns and values do not fit");
                    for (int64_t r = 0; r < rows; r++)
                        if ((*w->row_ptr)[r + 1] < (*w->row_ptr)[r]) throw std::invalid_argument("row_ptr decreases");
                    check_csr({rows, cols, w->row_ptr->data(), w->col->data()});
                    w->cut_into_blocks();
                } else if (values.size() != rows * cols) {
                    throw std::invalid_argument("a dense weight of " + std::to_string(rows) + "x" + std::to_string(cols) +
                                                " has as many values");
                }
                return w;
            },
            py::arg("row_ptr"), py::arg("cols"), py::arg("values"), py::arg("rows"), py::arg("cols_count"))
        .def_static(
            "product",
            [](const std::optional<Array<int64_t>>& row_ptr, const std::optional<Array<int32_t>>& col, const py::array& values,
               const std::optional<Array<float>>& scales, int64_t rows, int64_t cols, bool bytes) {
                auto w = std::make_shared<Weight>();
                w->rows = rows, w->cols = cols;
                w->product = vector_layer(row_ptr, col, values, scales, rows, cols, bytes);
                return w;
            },
            py::arg("row_ptr"), py::arg("cols"), py::arg("values"), py::arg("scales"), py::arg("rows"), py::arg("cols_count"),
            py::arg("bytes"), "For vectors, in the precision of the values: see VectorLinear.")
        .def_property_readonly("nbytes", &Weight::nbytes)
        .def_property_readonly("stored",
                               [](const Weight& w) {
                                   if (w.panels) return w.panels->stored();
                                   if (w.row_tiles) return w.row_tiles->panels.stored();
                                   if (w.pairs) return w.pairs->panels.stored();
                                   if (w.halves) return static_cast<int64_t>(w.halves->size());
                                   if (w.product) return w.product->stored();
                                   return static_cast<int64_t>(w.winograd ? w.winograd->packed.size() : w.values->size());
                               })
        .def_readonly("rows", &Weight::rows)
        .def_readonly("cols", &Weight::cols);

    m.def(
        "phase_floats",
        [](const py::dict& g, bool half) {
            ConvGeometry geo = geometry(g);
            geo.check();
            PhaseLayout p = phase_layout(geo);
            if (!p.needed || !p.possible) return int64_t(0);
            const int64_t stride = half ? padded_half_pixels(geo.batch * p.grid_h * p.grid_w) / 2 : p.plane_stride;
            return geo.channels * int64_t(p.phase_y.size() * p.phase_x.size()) * stride;
        },
        py::arg("geometry"), py::arg("half") = false,
        "Floats of workspace that a convolution of this geometry (with n, h, w) needs in the arena, with phases in bfloat16 on request.");
    m.def("padded_half_pixels", &padded_half_pixels, "Halves from one channel plane in bfloat16 of so many pixels to the next.");
    m.def(
        "pair_products", [] { return pair_kernels().products; }, "Whether this processor multiplies pairs of bfloat16 in one instruction.");
    m.def(
        "shifts_only",
        [](const py::dict& g) {
            ConvGeometry geo = geometry(g);
            geo.check();
            PhaseLayout p = phase_layout(geo);
            return !p.needed || p.possible;
        },
        "Whether every tap of the convolution is a shift of its input's planes (after splitting strides into phases).");

    m.def(
        "row_tiles_apply", [](const py::dict& g) { return RowTileNode::applies(geometry(g)); },
        "Whether a convolution of this geometry can run on tiles of image rows.");
    m.def(
        "winograd_applies", [](const py::dict& g) { return WinogradWeight::applies(geometry(g)); },
        "Whether Winograd's method along the rows applies to a convolution of this geometry.");

    py::class_<PlanBuilder, std::shared_ptr<PlanBuilder>>(m, "Plan")
        .def(py::init<int64_t, std::vector<int64_t>>(), py::arg("arena_floats"), py::arg("external_floats"))
        .def("conv",
             [](PlanBuilder& b, const std::string& name, const py::dict& g, const Weight& weight, const std::optional<Array<float>>& bias, const PyView& x_view, const PyRef& workspace,
                const PyRef& out, int64_t out_stride, const std::optional<PyRef>& residual, int64_t residual_stride, const PyActivation& activation, int vectors, bool depthwise,
                int64_t multiplier) {
                 ConvGeometry geo = geometry(g);
                 geo.check();
                 View x = b.view(x_view);
                 if (x.sizes != std::vector<int64_t>{geo.batch, geo.channels, geo.height, geo.width}) throw std::invalid_argument(name + ": the input's view does not fit the geometry");
                 PhaseLayout phases = phase_layout(geo);
                 bool use_phases = phases.needed && phases.possible;
                 int64_t pixels = geo.batch * geo.out_height() * geo.out_width(), lanes = kernels().lanes, whole = (pixels + lanes - 1) / lanes * lanes;
                 int64_t out_rows = weight.rows;
                 b.check_planes(out, out_rows, out_stride, whole);
                 if (residual) b.check_planes(*residual, out_rows, residual_stride, whole);
                 if (bias && bias->size() != out_rows) throw std::invalid_argument(name + ": the bias does not fit the rows");
                 auto place = [&](std::unique_ptr<ImageConvNode> node) {
                     if (geo.width > 1 && x.strides[3] != 1) throw std::invalid_argument(name + ": the input's rows are not contiguous");
                     node->geometry = geo, node->bias = optional_floats(bias), node->epilogue = epilogue(activation);
                     node->x = x.ref, node->stride_n = x.strides[0], node->stride_c = x.strides[1], node->stride_h = x.strides[2];
                     node->out = ref(out), node->out_stride = out_stride;
                     if (residual) node->has_residual = true, node->residual = ref(*residual), node->residual_stride = residual_stride;
                     if (auto* winograd = dynamic_cast<WinogradNode*>(node.get())) winograd->prepare();
                     b.add(name, std::move(node));
                 };
                 if (weight.winograd) {
                     const WinogradWeight& w = *weight.winograd;
                     if (depthwise || !WinogradWeight::applies(geo) || w.channels != geo.channels || w.kernel_h != geo.kernel_h || w.kernel_w != geo.kernel_w || w.stride_w != geo.stride_w)
                         throw std::invalid_argument(name + ": the weight does not fit the geometry");
                     auto node = std::make_unique<WinogradNode>();
                     node->weight = weight.winograd;
                     place(std::move(node));
                     return;
                 }
                 if (weight.row_tiles) {
                     const RowTileMatrix& w = *weight.row_tiles;
                     if (depthwise || !RowTileNode::applies(geo) || w.channels != geo.channels || w.kernel_h != geo.kernel_h || w.kernel_w != geo.kernel_w)
                         throw std::invalid_argument(name + ": the weight does not fit the geometry");
                     auto node = std::make_unique<RowTileNode>();
                     node->weight = weight.row_tiles;
                     place(std::move(node));
                     return;
                 }
                 Ref source = x.ref;
                 int64_t source_stride = x.strides[1];
                 if (use_phases) {
                     int64_t planes = int64_t(phases.phase_y.size() * phases.phase_x.size());
                     b.check_planes(workspace, geo.channels * planes, phases.plane_stride, phases.plane_stride);
                     auto node = std::make_unique<PhaseNode>();
                     node->geometry = geo, node->phases = phases, node->x = x.ref;
                     node->stride_n = x.strides[0], node->stride_c = x.strides[1], node->stride_h = x.strides[2], node->stride_w = x.strides[3];
                     node->out = source = ref(workspace);
                     source_stride = planes * phases.plane_stride;
                     b.add(name + ".phases", std::move(node));
                 } else if ((geo.width > 1 && x.strides[3] != 1) || (geo.height > 1 && x.strides[2] != geo.width) || (geo.batch > 1 && x.strides[0] != geo.width * geo.height)) {
                     throw std::invalid_argument(name + ": the input is not in channel planes");
                 }
                 if (depthwise) {
                     if (!weight.values || weight.row_ptr || weight.rows != geo.channels * multiplier || weight.cols != geo.taps() || (phases.needed && !phases.possible))
                         throw std::invalid_argument(name + ": not a depthwise convolution");
                     auto node = std::make_unique<DepthwiseNode>();
                     node->weight = weight.values, node->bias = optional_floats(bias), node->taps = std::make_shared<TapTable>(forward_taps(geo, phases));
                     node->channels = weight.rows, node->pixels = pixels, node->multiplier = multiplier;
                     node->x = source, node->x_stride = source_stride, node->out = ref(out), node->out_stride = out_stride;
                     if (residual) node->has_residual = true, node->residual = ref(*residual), node->residual_stride = residual_stride;
                     node->epilogue = epilogue(activation);
                     b.add(name, std::move(node));
                     return;
                 }
                 if (!weight.panels || weight.cols != geo.channels * geo.taps()) throw std::invalid_argument(name + ": the weight does not fit the geometry");
                 auto node = std::make_unique<SpmmNode>();
                 node->weight = weight.panels, node->bias = optional_floats(bias), node->pixels = pixels, node->vectors = std::max(1, std::min(vectors, kMaxVectors));
                 // One tap whose (single) phase is just the output's grid: a strided 1x1 convolution.
                 bool one_phase = use_phases && geo.taps() == 1 && !geo.pad_top && !geo.pad_left && !geo.pad_bottom && !geo.pad_right;
                 bool padded = source_stride >= whole && source.offset + (geo.channels - 1) * source_stride + whole <= b.floats(source.buffer);
                 bool direct = one_phase || (geo.pointwise() && padded);
                 node->source = direct ? Source::planes : Source::taps;
                 if (direct) b.check_planes({source.buffer, source.offset}, geo.channels, source_stride, whole);
                 if (!direct) node->taps = std::make_shared<TapTable>(forward_taps(geo, phases));
                 node->x = source, node->x_stride = source_stride, node->out = ref(out), node->out_stride = out_stride;
                 if (residual) node->has_residual = true, node->residual = ref(*residual), node->residual_stride = residual_stride;
                 node->epilogue = epilogue(activation);
                 b.add(name, std::move(node));
             },
             py::arg("name"), py::arg("geometry"), py::arg("weight"), py::arg("bias"), py::arg("x"), py::arg("workspace"), py::arg("out"), py::arg("out_stride"), py::arg("residual"),
             py::arg("residual_stride"), py::arg("activation"), py::arg("vectors"), py::arg("depthwise") = false, py::arg("multiplier") = 1)
        .def("linear",
             [](PlanBuilder& b, const std::string& name, const Weight& weight, const std::optional<Array<float>>& bias, const PyView& x_view, const PyView& out_view,
                const std::optional<PyRef>& residual, int64_t residual_stride, const PyActivation& activation, int vectors) {
                 const View x = b.view(x_view), out = b.view(out_view);
                 if (!weight.panels || x.sizes.size() != 2 || out.sizes.size() != 2 || x.sizes[1] != weight.cols || out.sizes[1] != weight.rows || x.sizes[0] != out.sizes[0])
                     throw std::invalid_argument(name + ": the views do not fit the weight");
                 if (bias && bias->size() != weight.rows) throw std::invalid_argument(name + ": the bias does not fit the rows");
                 const int64_t pixels = x.sizes[0], lanes = kernels().lanes, whole = (pixels + lanes - 1) / lanes * lanes;
                 auto node = std::make_unique<SpmmNode>();
                 node->weight = weight.panels, node->bias = optional_floats(bias), node->pixels = pixels, node->vectors = std::clamp(vectors, 1, kMaxVectors);
                 // Planes are read and written by whole vectors, rows to their last element.
                 auto place = [&](const View& v, bool* rows, int64_t* stride) {
                     *rows = v.strides[1] == 1;
                     *stride = v.strides[*rows ? 0 : 1];
                     if (*rows) return;
                     if (pixels > 1 && v.strides[0] != 1) throw std::invalid_argument(name + ": a place is neither in rows nor in channel planes");
                     b.check_planes({v.ref.buffer, v.ref.offset}, v.sizes[1], *stride, whole);
                 };
                 bool rows;
                 place(x, &rows, &node->x_stride);
                 node->source = rows ? Source::rows : Source::planes, node->x = x.ref;
                 place(out, &rows, &node->out_stride);
                 node->destination = rows ? Destination::rows : Destination::planes, node->out = out.ref;
                 if (residual) {
                     b.check_planes(*residual, weight.rows, residual_stride, whole);
                     node->has_residual = true, node->residual = ref(*residual), node->residual_stride = residual_stride;
                 }
                 node->epilogue = epilogue(activation);
                 b.add(name, std::move(node));
             },
             py::arg("name"), py::arg("weight"), py::arg("bias"), py::arg("x"), py::arg("out"), py::arg("residual"), py::arg("residual_stride"), py::arg("activation"), py::arg("vectors"),
             "A linear layer by a panel weight. x: [pixels, columns], out: [pixels, rows], each in rows or in channel planes.")
        .def("pairs",
             [](PlanBuilder& b, const std::string& name, const py::dict& g, const Weight& weight, const std::optional<Array<float>>& bias, const PyView& x, bool x_half, const PyRef& workspace,
                const PyPlanes& out, const std::optional<PyPlanes>& residual, const PyActivation& activation, int lines) {
                 ConvGeometry geo = geometry(g);
                 geo.check();
                 const auto& [buffer, offset, sizes, strides] = x;
                 if (sizes != std::vector<int64_t>{geo.batch, geo.channels, geo.height, geo.width} || strides.size() != 4) throw std::invalid_argument(name + ": the input's view does not fit the geometry");
                 const bool depthwise = weight.halves != nullptr;
                 if (depthwise ? weight.rows % geo.channels || weight.cols != geo.taps() : !weight.pairs || weight.cols != geo.channels * geo.taps())
                     throw std::invalid_argument(name + ": the weight does not fit the geometry");
                 if (bias && bias->size() != weight.rows) throw std::invalid_argument(name + ": the bias does not fit the rows");
                 const int64_t x_pixels = geo.batch * geo.height * geo.width;
                 const bool planes = (geo.width == 1 || strides[3] == 1) && (geo.height == 1 || strides[2] == geo.width) && (geo.batch == 1 || strides[0] == geo.width * geo.height);
                 PhaseLayout phases = phase_layout(geo);
                 if (phases.needed && !phases.possible) throw std::invalid_argument(name + ": taps that are no shifts");
                 if ((x_half || !phases.needed) && !planes) throw std::invalid_argument(name + ": the input is not in channel planes");
                 std::unique_ptr<PairBase> node;
                 if (depthwise) {
                     auto made = std::make_unique<PairDepthwiseNode>();
                     made->weight = weight.halves, made->channels = weight.rows, made->multiplier = weight.rows / geo.channels;
                     node = std::move(made);
                 } else {
                     auto made = std::make_unique<PairNode>();
                     made->weight = weight.pairs, made->lines = std::clamp(lines, 1, kMaxLines);
                     node = std::move(made);
                 }
                 node->bias = optional_floats(bias), node->epilogue = epilogue(activation);
                 node->pixels = geo.batch * geo.out_height() * geo.out_width();
                 if (x_half) {
                     node->x = b.planes({{buffer, offset}, strides[1], true}, geo.channels, x_pixels);
                 } else {
                     node->x = {b.view(x).ref, strides[1], false};
                 }
                 node->x_pixels = x_pixels;
                 node->out = b.planes(out, weight.rows, node->pixels);
                 if (residual) node->has_residual = true, node->residual = b.planes(*residual, weight.rows, node->pixels);
                 if (phases.needed) {
                     const int64_t count = int64_t(phases.phase_y.size() * phases.phase_x.size());
                     phases.plane_stride = padded_half_pixels(geo.batch * phases.grid_h * phases.grid_w);
                     auto split = std::make_unique<HalfPhaseNode>();
                     split->geometry = geo, split->phases = phases, split->x = node->x.ref, split->x_half = x_half;
                     split->stride_n = strides[0], split->stride_c = strides[1], split->stride_h = strides[2], split->stride_w = strides[3];
                     if (x_half) split->stride_n = geo.height * geo.width, split->stride_h = geo.width, split->stride_w = 1;
                     split->out = ref(workspace);
                     node->x = b.planes({workspace, phases.plane_stride, true}, geo.channels * count, phases.plane_stride);
                     node->x.stride = count * phases.plane_stride;
                     b.add(name + ".phases", std::move(split));
                 }
                 const bool one_phase = phases.needed && geo.taps() == 1 && !geo.pad_top && !geo.pad_left && !geo.pad_bottom && !geo.pad_right;
                 if (depthwise || (!one_phase && !geo.pointwise())) node->taps = std::make_shared<TapTable>(forward_taps(geo, phases));
                 b.add(name, std::move(node));
             },
             py::arg("name"), py::arg("geometry"), py::arg("weight"), py::arg("bias"), py::arg("x"), py::arg("x_half"), py::arg("workspace"), py::arg("out"), py::arg("residual"), py::arg("activation"),
             py::arg("lines"), "A convolution by a weight in bfloat16. out, residual: (place, stride, whether in bfloat16); strides, also those of x where x_half, are in elements.")
        .def("vector",
             [](PlanBuilder& b, const std::string& name, const Weight& weight, const std::optional<Array<float>>& bias, const PyRef& x, const PyRef& out, const std::optional<PyRef>& residual,
                const PyActivation& activation) {
                 if (!weight.values && !weight.product) throw std::invalid_argument(name + ": not a weight for vectors");
                 b.check_planes(x, 1, 0, weight.cols), b.check_planes(out, 1, 0, weight.rows);
                 if (residual) b.check_planes(*residual, 1, 0, weight.rows);
                 if (bias && bias->size() != weight.rows) throw std::invalid_argument(name + ": the bias does not fit the rows");
                 if (weight.product) {
                     auto product = weight.product->node();
                     product->bias = optional_floats(bias), product->x = ref(x), product->out = ref(out), product->epilogue = epilogue(activation);
                     if (residual) product->has_residual = true, product->residual = ref(*residual);
                     b.add(name, std::move(product));
                     return;
                 }
                 auto node = std::make_unique<VectorNode>();
                 node->rows = weight.rows, node->cols = weight.cols, node->values = weight.values, node->row_ptr = weight.row_ptr, node->col16 = weight.col16;
                 node->bias = optional_floats(bias), node->x = ref(x), node->out = ref(out), node->epilogue = epilogue(activation);
                 if (residual) node->has_residual = true, node->residual = ref(*residual);
                 b.add(name, std::move(node));
             })
        .def("copy", [](PlanBuilder& b, const std::string& name, const PyView& from, const PyView& to, bool past_cache) {
            View f = b.view(from), t = b.view(to);
            if (f.sizes != t.sizes) throw std::invalid_argument(name + ": sizes differ");
            auto node = std::make_unique<CopyNode>(f, t);
            node->past_cache = past_cache;
            b.add(name, std::move(node));
        }, py::arg("name"), py::arg("source"), py::arg("target"), py::arg("past_cache") = false)
        .def("fill", [](PlanBuilder& b, const std::string& name, const PyView& to, float value) { b.add(name, std::make_unique<FillNode>(b.view(to), value)); })
        .def("unary", [](PlanBuilder& b, const std::string& name, const PyView& x, const PyView& y, const PyActivation& a) {
            View from = b.view(x), to = b.view(y);
            if (from.sizes != to.sizes) throw std::invalid_argument(name + ": sizes differ");
            b.add(name, std::make_unique<UnaryNode>(from, to, epilogue(a)));
        })
        .def("binary", [](PlanBuilder& b, const std::string& name, const std::string& kind, const PyView& x, const PyView& y, const PyView& out, const PyActivation& a) {
            View u = b.view(x), v = b.view(y), o = b.view(out);
            if (u.sizes != o.sizes || v.sizes != o.sizes) throw std::invalid_argument(name + ": sizes differ");
            b.add(name, std::make_unique<BinaryNode>(u, v, o, named<Binary>(kind, kBinaries, "binary kind"), epilogue(a)));
        })
        .def("affine", [](PlanBuilder& b, const std::string& name, const PyView& x, const PyView& y, int axis, const Array<float>& scale, const Array<float>& shift, const PyActivation& a) {
            View from = b.view(x), to = b.view(y);
            if (from.sizes != to.sizes || axis < 0 || axis >= static_cast<int>(to.sizes.size()) || scale.size() != to.sizes[axis] || shift.size() != to.sizes[axis])
                throw std::invalid_argument(name + ": sizes differ");
            b.add(name, std::make_unique<AffineNode>(from, to, axis, to_vector(scale), to_vector(shift), epilogue(a)));
        })
        .def("pool", [](PlanBuilder& b, const std::string& name, const PyView& x, const PyView& y, const py::dict& o) {
            View from = b.view(x), to = b.view(y);
            if (from.sizes.size() != 4 || to.sizes.size() != 4 || from.sizes[0] != to.sizes[0] || from.sizes[1] != to.sizes[1] || (to.sizes[3] > 1 && to.strides[3] != 1) || (from.sizes[3] > 1 && from.strides[3] != 1))
                throw std::invalid_argument(name + ": pooling needs two NCHW views with contiguous rows");
            PoolOptions p;
            auto pair = [&](const char* key) { return o[key].cast<std::pair<int64_t, int64_t>>(); };
            p.max = o["max"].cast<bool>();
            std::tie(p.kernel_h, p.kernel_w) = pair("kernel");
            std::tie(p.stride_h, p.stride_w) = pair("stride");
            std::tie(p.dilation_h, p.dilation_w) = pair("dilation");
            auto padding = o["padding"].cast<std::array<int64_t, 4>>();
            p.pad_top = padding[0], p.pad_left = padding[1], p.pad_bottom = padding[2], p.pad_right = padding[3];
            p.count_include_pad = o["count_include_pad"].cast<bool>(), p.divisor = o["divisor"].cast<int64_t>();
            if (p.stride_h < 1 || p.stride_w < 1 || p.kernel_h < 1 || p.kernel_w < 1 || p.pad_top < 0 || p.pad_left < 0 || p.dilation_h < 1 || p.dilation_w < 1 || p.divisor < 0) throw std::invalid_argument(name + ": options out of range");
            b.add(name, std::make_unique<PoolNode>(from, to, p));
        })
        .def("adaptive_average_pool", [](PlanBuilder& b, const std::string& name, const PyView& x, const PyView& y) {
            View from = b.view(x), to = b.view(y);
            if (from.sizes.size() != 4 || to.sizes.size() != 4 || from.sizes[0] != to.sizes[0] || from.sizes[1] != to.sizes[1]) throw std::invalid_argument(name + ": pooling needs two NCHW views");
            b.add(name, std::make_unique<AdaptiveAveragePoolNode>(from, to));
        })
        .def("reduce", [](PlanBuilder& b, const std::string& name, const PyView& x, const PyView& y, const std::vector<int>& dims, const std::string& kind) {
            View from = b.view(x), to = b.view(y);
            if (from.sizes.size() != to.sizes.size()) throw std::invalid_argument(name + ": ranks differ");
            b.add(name, std::make_unique<ReduceNode>(from, to, dims, named<Reduction>(kind, kReductions, "reduction")));
        })
        .def("softmax", [](PlanBuilder& b, const std::string& name, const PyView& x, const PyView& y, int dim) {
            View from = b.view(x), to = b.view(y);
            if (from.sizes != to.sizes || dim < 0 || dim >= static_cast<int>(to.sizes.size())) throw std::invalid_argument(name + ": sizes differ");
            b.add(name, std::make_unique<SoftmaxNode>(from, to, dim));
        })
        .def("layer_norm", [](PlanBuilder& b, const std::string& name, const PyView& x, const PyView& y, int dims, const std::optional<Array<float>>& weight, const std::optional<Array<float>>& bias, float eps) {
            View from = b.view(x), to = b.view(y);
            int64_t length = 1;
            if (from.sizes != to.sizes || dims < 1 || dims > static_cast<int>(to.sizes.size())) throw std::invalid_argument(name + ": sizes differ");
            for (size_t i = to.sizes.size() - dims; i < to.sizes.size(); i++) length *= to.sizes[i];
            if ((weight && weight->size() != length) || (bias && bias->size() != length)) throw std::invalid_argument(name + ": weight or bias does not fit");
            b.add(name, std::make_unique<LayerNormNode>(from, to, dims, weight ? to_vector(*weight) : std::vector<float>(), bias ? to_vector(*bias) : std::vector<float>(), eps));
        })
        .def("group_norm", [](PlanBuilder& b, const std::string& name, const PyView& x, const PyView& y, int64_t groups, const std::optional<Array<float>>& weight, const std::optional<Array<float>>& bias, float eps) {
            View from = b.view(x), to = b.view(y);
            if (from.sizes != to.sizes || to.sizes.size() < 2 || groups < 1 || to.sizes[1] % groups || (weight && weight->size() != to.sizes[1]) || (bias && bias->size() != to.sizes[1]))
                throw std::invalid_argument(name + ": sizes differ");
            b.add(name, std::make_unique<GroupNormNode>(from, to, groups, weight ? to_vector(*weight) : std::vector<float>(), bias ? to_vector(*bias) : std::vector<float>(), eps));
        })
        .def("matmul", [](PlanBuilder& b, const std::string& name, const PyView& x, const PyView& y, const PyView& out) {
            View u = b.view(x), v = b.view(y), o = b.view(out);
            size_t r = o.sizes.size();
            if (r < 2 || u.sizes.size() != r || v.sizes.size() != r || u.sizes[r - 2] != o.sizes[r - 2] || v.sizes[r - 1] != o.sizes[r - 1] || u.sizes[r - 1] != v.sizes[r - 2])
                throw std::invalid_argument(name + ": shapes do not fit");
            b.add(name, std::make_unique<MatmulNode>(u, v, o));
        })
        .def("attention", [](PlanBuilder& b, const std::string& name, const PyView& q, const PyView& k, const PyView& v, const PyView& out, float scale, bool causal, const std::optional<PyView>& mask) {
            View vq = b.view(q), vk = b.view(k), vv = b.view(v), vo = b.view(out), vm = mask ? b.view(*mask) : View{};
            size_t r = vo.sizes.size();
            if (r < 2 || vq.sizes.size() != r || vk.sizes.size() != r || vv.sizes.size() != r || (mask && vm.sizes.size() != r) || vq.sizes[r - 1] != vk.sizes[r - 1] || vk.sizes[r - 2] != vv.sizes[r - 2] ||
                vo.sizes[r - 1] != vv.sizes[r - 1] || vo.sizes[r - 2] != vq.sizes[r - 2] || (mask && (vm.sizes[r - 2] != vq.sizes[r - 2] || vm.sizes[r - 1] != vk.sizes[r - 2])))
                throw std::invalid_argument(name + ": shapes do not fit");
            b.add(name, std::make_unique<AttentionNode>(vq, vk, vv, vo, scale, causal, mask.has_value(), vm));
        })
        .def("callback", [](PlanBuilder& b, const std::string& name, std::function<void(std::vector<uintptr_t>)> call, const std::vector<PyView>& places) {
            std::vector<Ref> refs;
            for (const auto& p : places) refs.push_back(b.view(p).ref);
            // The Python function must be released with the GIL held, whoever drops the plan.
            auto held = std::shared_ptr<std::function<void(std::vector<uintptr_t>)>>(new auto(std::move(call)), [](auto* f) {
                py::gil_scoped_acquire gil;
                delete f;
            });
            auto run = [held](const std::vector<float*>& pointers) {
                py::gil_scoped_acquire gil;
                std::vector<uintptr_t> addresses;
                for (float* p : pointers) addresses.push_back(reinterpret_cast<uintptr_t>(p));
                (*held)(addresses);
            };
            b.add(name, std::make_unique<CallbackNode>(run, refs));
        })
        .def("run", [](const PlanBuilder& b, const py::sequence& addresses, int threads) {
            const Numbers<uintptr_t> pointers(addresses);
            if (pointers.size() != b.external_floats.size()) throw std::invalid_argument("expected " + std::to_string(b.external_floats.size()) + " addresses, got " + std::to_string(pointers.size()));
            py::gil_scoped_release release;
            b.plan->run(buffers(pointers), threads);
        }, py::arg("pointers"), py::arg("threads") = 0)
        .def(
            "run_many",
            [](const PlanBuilder& b, const py::sequence& addresses, const py::sequence& steps, int64_t count, int threads) {
                const Numbers<uintptr_t> pointers(addresses);
                const Numbers<int64_t> strides(steps);
                if (pointers.size() != b.external_floats.size() || strides.size() != pointers.size())
                    throw std::invalid_argument("expected " + std::to_string(b.external_floats.size()) + " addresses and strides");
                py::gil_scoped_release release;
                b.plan->run_many(buffers(pointers), strides.data(), count, threads);
            },
            py::arg("pointers"), py::arg("strides"), py::arg("count"), py::arg("threads") = 0)
        .def("profile", [](const PlanBuilder& b, const std::vector<uintptr_t>& pointers, int threads) {
            if (pointers.size() != b.external_floats.size()) throw std::invalid_argument("wrong number of addresses");
            py::gil_scoped_release release;
            return b.plan->profile(reinterpret_cast<float* const*>(pointers.data()), threads);
        }, py::arg("pointers"), py::arg("threads") = 0)
        .def("time_node", [](const PlanBuilder& b, size_t i, const std::vector<uintptr_t>& pointers, int threads, int times) {
            if (pointers.size() != b.external_floats.size() || i >= b.plan->size()) throw std::invalid_argument("wrong number of addresses, or no such node");
            py::gil_scoped_release release;
            return b.plan->time_node(i, reinterpret_cast<float* const*>(pointers.data()), threads, times);
        })
        .def_property_readonly("names", [](const PlanBuilder& b) {
            std::vector<std::string> names;
            for (size_t i = 0; i < b.plan->size(); i++) names.push_back(b.plan->node(i).name);
            return names;
        })
        .def_property_readonly("arena_bytes", [](const PlanBuilder& b) { return b.plan->arena_bytes(); })
        .def("__len__", [](const PlanBuilder& b) { return b.plan->size(); });

    m.def(
        "trace",
        [](const py::function& call) {
            Trace trace;
            call();
            const double wall = trace.microseconds_since_begin();
            py::list spans;
            for (const Trace::Span& s : trace.spans())
                spans.append(py::make_tuple(s.name, s.thread, s.band, s.pass, s.start_us, s.duration_us, s.busy_us, s.items));
            return py::make_tuple(wall, spans);
        },
        py::arg("call"),
        "Microseconds of a call without arguments, and (name, thread, band, pass, start, duration, busy, items) of what each thread did "
        "for "
        "each node of the plans that it ran.");

    // Two plans' places must agree: every part's view of an arena is checked against that arena's size.
    struct Parts {
        std::unique_ptr<PartedPlan> plan;
        size_t shared;
    };
    py::class_<Parts, std::shared_ptr<Parts>>(m, "PartedPlan")
        .def(py::init([](const std::vector<std::shared_ptr<PlanBuilder>>& parts, std::vector<std::vector<size_t>> ends) {
                 std::vector<std::shared_ptr<const Plan>> plans;
                 for (const auto& part : parts) plans.push_back(part->plan);
                 auto made = std::make_shared<Parts>();
                 made->plan = std::make_unique<PartedPlan>(std::move(plans), std::move(ends));
                 made->shared = parts[0]->external_floats.size() - parts.size();
                 for (const auto& part : parts)
                     for (size_t i = 0; i < part->external_floats.size(); i++)
                         if (i < made->shared ? part->external_floats[i] != parts[0]->external_floats[i]
                                              : part->external_floats[i] > parts[i - made->shared]->arena_floats)
                             throw std::invalid_argument("the parts of a parted plan disagree about the size of buffer " +
                                                         std::to_string(i + 1));
                 return made;
             }),
             py::arg("parts"), py::arg("ends"))
        .def(
            "run",
            [](const Parts& p, const py::sequence& addresses) {
                const Numbers<uintptr_t> pointers(addresses);
                if (pointers.size() != p.shared)
                    throw std::invalid_argument("expected " + std::to_string(p.shared) + " addresses, got " +
                                                std::to_string(pointers.size()));
                py::gil_scoped_release release;
                p.plan->run(buffers(pointers));
            },
            py::arg("pointers"))
        .def(
            // Another plan right after it, in one call: between two, Python's own code and data come from memory again.
            "run_before",
            [](const Parts& p, const py::sequence& addresses, const PlanBuilder& next, const py::sequence& next_addresses, int threads) {
                const Numbers<uintptr_t> pointers(addresses), next_pointers(next_addresses);
                if (pointers.size() != p.shared || next_pointers.size() != next.external_floats.size())
                    throw std::invalid_argument("expected " + std::to_string(p.shared) + " and " +
                                                std::to_string(next.external_floats.size()) + " addresses, got " +
                                                std::to_string(pointers.size()) + " and " + std::to_string(next_pointers.size()));
                py::gil_scoped_release release;
                p.plan->run(buffers(pointers));
                next.plan->run(buffers(next_pointers), threads);
            },
            py::arg("pointers"), py::arg("next"), py::arg("next_pointers"), py::arg("threads") = 0)
        .def(
            "profile",
            [](const Parts& p, const std::vector<uintptr_t>& pointers) {
                if (pointers.size() != p.shared) throw std::invalid_argument("wrong number of addresses");
                py::gil_scoped_release release;
                return p.plan->profile(reinterpret_cast<float* const*>(pointers.data()));
            },
            py::arg("pointers"))
        .def_property_readonly("names",
                               [](const Parts& p) {
                                   std::vector<std::vector<std::string>> names(p.plan->parts());
                                   for (size_t i = 0; i < names.size(); i++)
                                       for (size_t n = 0; n < p.plan->part(i).size(); n++) names[i].push_back(p.plan->part(i).node(n).name);
                                   return names;
                               })
        .def_property_readonly("arena_bytes", [](const Parts& p) {
            int64_t bytes = 0;
            for (size_t i = 0; i < p.plan->parts(); i++) bytes += p.plan->part(i).arena_bytes();
            return bytes;
        });
}
