// fusechat._native's merge: everything that comes from Python is checked here, before a byte is read.
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings.hpp"
#include "merge/checksum.hpp"
#include "merge/merge_tensor.hpp"

namespace fusechat {
namespace {

using namespace merge;

constexpr std::int64_t kMostItems = std::int64_t{1} << 48;

template <class T>
T chosen(const std::string &name, const std::vector<std::pair<std::string, T>> &known) {
    for (const auto &[key, value] : known) {
        if (key == name) return value;
    }
    throw std::invalid_argument("unknown choice: " + name);
}

Dtype dtype_of(const std::string &name) {
    return chosen<Dtype>(name, {{"F32", Dtype::f32}, {"F16", Dtype::f16}, {"BF16", Dtype::bf16}});
}

// (fd, byte offset, dtype, items there, low-rank update or None as (A [rank, columns], B [rows, rank], scale)).
using LowRankArrays = std::tuple<Array<float>, Array<float>, float>;
using SourceTuple = std::tuple<int, std::int64_t, std::string, std::int64_t, std::optional<LowRankArrays>>;

Source source_of(const SourceTuple &tuple, std::int64_t n) {
    Source source;
    const auto &[fd, offset, dtype, n_valid, low_rank] = tuple;
    if (offset < 0 || n_valid < 0 || n_valid > n) throw std::invalid_argument("a source lies outside its tensor");
    source.fd = fd;
    source.offset = offset;
    source.dtype = dtype_of(dtype);
    source.n_valid = n_valid;
    if (!low_rank) return source;
    const auto &[a, b, scale] = *low_rank;
    if (a.ndim() != 2 || b.ndim() != 2 || a.shape(0) != b.shape(1) || a.shape(0) < 1 || a.shape(0) > 1 << 20 ||
        a.shape(1) < 1 || b.shape(0) != n_valid / a.shape(1) || n_valid % a.shape(1) != 0) {
        throw std::invalid_argument("a low-rank update does not have the shape of its tensor");
    }
    source.low_rank = {a.data(), b.data(), a.shape(1), static_cast<int>(a.shape(0)), scale};
    return source;
}

Inputs inputs_of(const std::vector<SourceTuple> &sources, std::int64_t n) {
    if (sources.size() < 2 || sources.size() > 1025) throw std::invalid_argument("needs a base and 1 to 1,024 targets");
    if (n < 0 || n > kMostItems) throw std::invalid_argument("a tensor has an impossible size");
    Inputs inputs;
    inputs.n = n;
    inputs.base = source_of(sources[0], n);
    if (inputs.base.n_valid != n) throw std::invalid_argument("the base lacks items of its tensor");
    for (std::size_t j = 1; j < sources.size(); ++j) inputs.targets.push_back(source_of(sources[j], n));
    return inputs;
}

template <class T>
void expect_one_per_target(const std::vector<T> &values, std::size_t n_targets, const char *what) {
    if (values.size() != n_targets) throw std::invalid_argument(std::string(what) + " needs one value per target");
}

py::list nonfinite_list(const std::vector<NonFinite> &sources) {
    py::list list;
    for (const NonFinite &source : sources) list.append(py::make_tuple(source.count, source.first));
    return list;
}

py::dict report_dict(const Report &report) {
    py::list selections;
    for (const Selection &selection : report.selections) {
        py::dict facts;
        facts["k"] = selection.k;
        facts["n_nonzero"] = selection.n_nonzero;
        facts["threshold"] = selection.threshold;
        facts["tie_stop"] = selection.tie_stop;
        facts["energy"] = selection.energy;
        selections.append(facts);
    }
    py::dict result;
    result["nonfinite"] = nonfinite_list(report.nonfinite);
    result["selections"] = selections;
    result["weights"] = report.weights;
    result["energy"] = report.outcome.energy;
    result["kept_energy"] = report.outcome.kept_energy;
    result["update_energy"] = report.outcome.update_energy;
    result["n_touched"] = report.outcome.n_touched;
    result["n_conflicts"] = report.outcome.n_conflicts;
    result["n_overflow"] = report.outcome.n_overflow;
    result["checksum"] = report.checksum;
    return result;
}

py::dict merge_tensor_py(const std::vector<SourceTuple> &sources, std::int64_t n, const std::string &mask,
                         const std::string &elect, const std::string &divide, std::vector<double> weights,
                         double scale, bool mask_weights_only, bool per_parameter, bool energy_weights,
                         double uniform_below, const std::vector<std::int64_t> &quota,
                         const std::optional<std::tuple<std::int64_t, std::int64_t, bool>> &quota_share,
                         std::vector<double> keep_share, std::vector<std::uint64_t> random_key, bool allow_nonfinite,
                         const std::string &out_dtype, int out_fd, std::int64_t out_offset, int threads) {
    Task task;
    task.inputs = inputs_of(sources, n);
    const std::size_t n_targets = task.inputs.targets.size();
    task.rule.mask = chosen<Mask>(
        mask, {{"none", Mask::none}, {"shared", Mask::shared}, {"each", Mask::each}, {"random", Mask::random}});
    task.rule.elect =
        chosen<Elect>(elect, {{"none", Elect::none}, {"plain", Elect::plain}, {"weighted", Elect::weighted}});
    task.rule.divide = chosen<Divide>(
        divide, {{"none", Divide::none}, {"surviving", Divide::surviving}, {"clamped", Divide::clamped}});
    if (task.rule.divide != Divide::none && task.rule.elect == Elect::none) {
        throw std::invalid_argument("dividing by what survives needs an election");
    }
    if (task.rule.mask == Mask::shared && task.rule.elect != Elect::plain) {
        throw std::invalid_argument("a shared mask needs a plain election");
    }
    task.rule.mask_weights_only = mask_weights_only;
    task.rule.per_parameter = per_parameter;
    task.rule.scale = scale;
    task.rule.out_dtype = dtype_of(out_dtype);
    expect_one_per_target(weights, n_targets, "weights");
    task.rule.weights = std::move(weights);
    task.select = task.rule.mask == Mask::shared || task.rule.mask == Mask::each;
    if (task.rule.mask == Mask::each) {
        expect_one_per_target(quota, n_targets, "quota");
        for (const std::int64_t k : quota) {
            if (k < 0 || k > n) throw std::invalid_argument("a quota lies outside its tensor");
            task.quotas.push_back({.k = k});
        }
    } else if (task.rule.mask == Mask::shared) {
        if (!quota_share) throw std::invalid_argument("a shared mask needs quota_share");
        const auto &[numerator, denominator, in_fp32] = *quota_share;
        if (numerator < 0 || denominator < 1 || numerator > denominator) {
            throw std::invalid_argument("quota_share is no share");
        }
        task.quotas.push_back({.numerator = numerator, .denominator = denominator, .in_fp32 = in_fp32});
    } else if (task.rule.mask == Mask::random) {
        expect_one_per_target(keep_share, n_targets, "keep_share");
        expect_one_per_target(random_key, n_targets, "random_key");
        for (const double share : keep_share) {
            if (!(share > 0 && share <= 1)) throw std::invalid_argument("keep_share must lie in (0, 1]");
        }
        task.rule.keep_share = std::move(keep_share);
        task.rule.random_key = std::move(random_key);
    }
    if (energy_weights && task.rule.mask == Mask::each) throw std::invalid_argument("energy weights need a shared mask");
    task.energy_weights = {energy_weights, uniform_below};
    task.allow_nonfinite = allow_nonfinite;
    if (out_fd < 0 || out_offset < 0) throw std::invalid_argument("the output lies nowhere");
    task.out_fd = out_fd;
    task.out_offset = out_offset;
    Report report;
    {
        const py::gil_scoped_release release;
        report = merge_tensor(std::move(task), threads);
    }
    return report_dict(report);
}

py::dict measure_py(const std::vector<SourceTuple> &sources, std::int64_t n, int threads) {
    const Inputs inputs = inputs_of(sources, n);
    Moments moments;
    {
        const py::gil_scoped_release release;
        moments = measure(inputs, threads);
    }
    py::dict result;
    result["energy"] = moments.energy;
    result["dot"] = moments.dot;
    result["base_energy"] = moments.base_energy;
    result["nonfinite"] = nonfinite_list(moments.nonfinite);
    return result;
}

std::uint64_t checksum_py(int fd, std::int64_t offset, std::int64_t n, int item_bytes) {
    if (fd < 0 || offset < 0 || n < 0 || n > kMostItems || item_bytes < 1 || item_bytes > 16) {
        throw std::invalid_argument("there is no such tensor to check");
    }
    const py::gil_scoped_release release;
    return tensor_checksum(fd, offset, n, item_bytes);
}

}  // namespace

void bind_merge(py::module_ &m) {
    m.def("merge_tensor", &merge_tensor_py, py::arg("sources").noconvert(), py::arg("n"), py::kw_only(), py::arg("mask") = "none",
          py::arg("elect") = "none", py::arg("divide") = "none", py::arg("weights"), py::arg("scale") = 1.0,
          py::arg("mask_weights_only") = false, py::arg("per_parameter") = false, py::arg("energy_weights") = false,
          py::arg("uniform_below") = 0.0, py::arg("quota") = std::vector<std::int64_t>{},
          py::arg("quota_share") = py::none(), py::arg("keep_share") = std::vector<double>{},
          py::arg("random_key") = std::vector<std::uint64_t>{}, py::arg("allow_nonfinite") = false,
          py::arg("out_dtype"), py::arg("out_fd"), py::arg("out_offset"), py::arg("threads") = 1,
          "Merge one tensor from open files into an open file; returns what was done.");
    m.def("measure_tensor", &measure_py, py::arg("sources").noconvert(), py::arg("n"), py::kw_only(), py::arg("threads") = 1,
          "Per target the sums of delta² and base·delta, and that of base².");
    m.def("tensor_checksum", &checksum_py, py::arg("fd"), py::arg("offset"), py::arg("n"), py::arg("item_bytes"),
          "XXH64 of the XXH64s of a tensor's chunks of 16,384 items.");
    m.def("xxh64", [](const py::bytes &data) {
        const auto view = static_cast<std::string_view>(data);
        return xxh64(view.data(), view.size());
    }, py::arg("data"), "XXH64 with seed 0.");
}

}  // namespace fusechat
