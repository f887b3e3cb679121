#include "bindings.hpp"

#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "sparse_soft_ce.hpp"
#include "topk.hpp"

namespace fusechat {
namespace {

using loss::Divergence, loss::Format, loss::Missing;

template <class Enum>
Enum choose(const std::string &name, const std::string &value, const std::vector<std::pair<std::string, Enum>> &choices) {
    for (const auto &[text, choice] : choices) {
        if (text == value) return choice;
    }
    throw py::value_error(name + " '" + value + "' is unknown");
}

void require(bool holds, const std::string &what) {
    if (!holds) throw py::value_error(what);
}

template <class T>
const T *column(const Array<T> &array, std::vector<py::ssize_t> shape, const char *name) {
    require(array.ndim() == static_cast<py::ssize_t>(shape.size()), std::string(name) + " has the wrong number of dimensions");
    for (std::size_t i = 0; i < shape.size(); ++i) {
        require(array.shape(i) == shape[i], std::string(name) + " has " + std::to_string(array.shape(i)) + " along axis " +
                                                std::to_string(i) + ", expected " + std::to_string(shape[i]));
    }
    return array.data();
}

// Rows of logits may be apart, their elements not.
py::ssize_t row_stride(const py::array &array, py::ssize_t itemsize, const char *name) {
    require(array.ndim() == 2, std::string(name) + " must have two dimensions");
    require(array.itemsize() == itemsize, std::string(name) + " has elements of the wrong size");
    require(array.size() == 0 || array.shape(1) == 1 || array.strides(1) == itemsize, std::string(name) + " must be contiguous along rows");
    require(array.shape(0) <= 1 || array.strides(0) % itemsize == 0, std::string(name) + " has rows at odd addresses");
    return array.strides(0) / itemsize;
}

loss::Matrix matrix_of(const py::array &logits, const std::string &format) {
    loss::Matrix matrix{};
    matrix.format = choose<Format>("format", format,
                                   {{"float32", Format::float32}, {"bfloat16", Format::bfloat16}, {"float16", Format::float16}});
    matrix.logits_stride = row_stride(logits, matrix.format == Format::float32 ? 4 : 2, "logits");
    matrix.n_rows = logits.shape(0);
    matrix.vocabulary = logits.shape(1);
    require(matrix.vocabulary >= 1 && matrix.vocabulary <= INT32_MAX, "logits have no columns, or too many");
    matrix.logits = logits.data();
    return matrix;
}

py::tuple topk_logprob(const py::array &logits, const std::string &format, const std::optional<Array<std::int64_t>> &labels,
                       py::ssize_t k, double softcap, int threads) {
    const loss::Matrix matrix = matrix_of(logits, format);
    const py::ssize_t n = matrix.n_rows;
    require(k >= 1 && k <= matrix.vocabulary, "k is " + std::to_string(k) + ", outside the vocabulary's size");
    const std::int64_t *label = labels ? column(*labels, {n}, "labels") : nullptr;
    Array<std::int32_t> ids({n, k});
    Array<float> logprobs({n, k}), lse(n), label_logprob(n);
    const loss::TopK results{ids.mutable_data(), logprobs.mutable_data(), lse.mutable_data(), label_logprob.mutable_data()};
    {
        const py::gil_scoped_release released;
        loss::topk_logprob(matrix, label, k, softcap, results, threads);
    }
    return py::make_tuple(ids, logprobs, lse, label_logprob);
}

py::tuple sparse_soft_ce(py::array logits, std::optional<py::array> gradient, const std::string &format,
                         const Array<std::int64_t> &labels, const Array<std::int64_t> &ids, const Array<float> &logprobs,
                         const Array<float> &hard_weight, const Array<float> &row_scale, const Array<bool> &partition,
                         const std::optional<std::tuple<Array<std::int32_t>, Array<std::int32_t>, Array<std::int32_t>>> &ranges,
                         const std::string &divergence, const std::string &missing, double temperature,
                         double student_temperature, double beta, double label_smoothing, double z_loss, double softcap,
                         int threads) {
    loss::Matrix matrix = matrix_of(logits, format);
    if (gradient) {
        const py::ssize_t itemsize = matrix.format == Format::float32 ? 4 : 2;
        matrix.gradient_stride = row_stride(*gradient, itemsize, "gradient");
        require(gradient->shape(0) == matrix.n_rows && gradient->shape(1) == matrix.vocabulary,
                "gradient must have the logits' shape");
        matrix.gradient = gradient->mutable_data();
    }

    const py::ssize_t n = matrix.n_rows;
    loss::Rows rows{};
    require(ids.ndim() == 2, "ids must have two dimensions");
    rows.n_entries = ids.shape(1);
    rows.labels = column(labels, {n}, "labels");
    rows.ids = column(ids, {n, rows.n_entries}, "ids");
    rows.logprobs = column(logprobs, {n, rows.n_entries}, "logprobs");
    rows.hard_weight = column(hard_weight, {n}, "hard_weight");
    rows.row_scale = column(row_scale, {n}, "row_scale");
    rows.partition = column(partition, {n}, "partition");
    if (ranges) {
        rows.order = column(std::get<0>(*ranges), {matrix.vocabulary}, "order");
        rows.low = column(std::get<1>(*ranges), {n, rows.n_entries}, "low");
        rows.high = column(std::get<2>(*ranges), {n, rows.n_entries}, "high");
    }

    const loss::Options options{
        .divergence = choose<Divergence>("divergence", divergence,
                                         {{"ce", Divergence::ce},
                                          {"kl", Divergence::kl},
                                          {"reverse_kl", Divergence::reverse_kl},
                                          {"jsd", Divergence::jsd},
                                          {"tvd", Divergence::tvd},
                                          {"skew_kl", Divergence::skew_kl},
                                          {"alpha", Divergence::alpha}}),
        .missing = choose<Missing>("missing", missing,
                                   {{"renormalise", Missing::renormalise},
                                    {"tail", Missing::tail},
                                    {"zero", Missing::zero},
                                    {"uniform", Missing::uniform}}),
        .temperature = temperature,
        .student_temperature = student_temperature,
        .beta = beta,
        .label_smoothing = label_smoothing,
        .z_loss = z_loss,
        .softcap = softcap,
    };

    Array<float> row_loss(n), hard(n), soft(n), lse(n);
    Array<bool> correct(n);
    const loss::Results results{row_loss.mutable_data(), hard.mutable_data(), soft.mutable_data(), lse.mutable_data(),
                                correct.mutable_data()};
    {
        const py::gil_scoped_release released;
        loss::sparse_soft_ce(matrix, rows, options, results, threads);
    }
    return py::make_tuple(row_loss, hard, soft, lse, correct);
}

}  // namespace

void bind_loss(py::module_ &m) {
    m.def("topk_logprob", &topk_logprob, "Choose the k most probable tokens of every row; see fusechat.topk.topk_logprob.",
          py::kw_only(), py::arg("logits").noconvert(), py::arg("format"), py::arg("labels").noconvert(), py::arg("k"),
          py::arg("softcap"), py::arg("threads"));
    m.def("sparse_soft_ce", &sparse_soft_ce,
          "Compute the fusion loss of every row and write the gradient of the logits; see fusechat.loss.sparse_soft_ce.",
          py::kw_only(), py::arg("logits").noconvert(), py::arg("gradient").noconvert(), py::arg("format"),
          py::arg("labels").noconvert(), py::arg("ids").noconvert(), py::arg("logprobs").noconvert(),
          py::arg("hard_weight").noconvert(), py::arg("row_scale").noconvert(), py::arg("partition").noconvert(),
          py::arg("ranges").noconvert(), py::arg("divergence"), py::arg("missing"), py::arg("temperature"),
          py::arg("student_temperature"), py::arg("beta"), py::arg("label_smoothing"), py::arg("z_loss"),
          py::arg("softcap"), py::arg("threads"));
}

}  // namespace fusechat
