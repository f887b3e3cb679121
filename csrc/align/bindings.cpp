// Alignment for Python. Everything that comes from there is checked here before the core reads it.
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>

#include "align/match.hpp"
#include "align/remap.hpp"
#include "bindings.hpp"

namespace fusechat {
namespace {

using namespace align;

using Int16 = Array<std::int16_t>;
using Int32 = Array<std::int32_t>;
using Int64 = Array<std::int64_t>;
using UInt8 = Array<std::uint8_t>;
using UInt16 = Array<std::uint16_t>;
using UInt64 = Array<std::uint64_t>;
using Float = Array<float>;

// offsets, row_offsets, loss_mask, turn, byte_end, control
using TokenArrays = std::tuple<Int64, Int64, Array<bool>, Int32, Int32, UInt8>;
using MatchArrays = std::tuple<UInt8, Int64, Int32, Int32>;
using ByteArrays = std::tuple<UInt8, Int64>;

template <class T>
std::span<const T> view(const Array<T> &array) {
    return {array.data(), static_cast<std::size_t>(array.size())};
}

template <class T>
void want_length(const Array<T> &array, std::int64_t length, const char *name) {
    if (array.ndim() != 1 || array.shape(0) != length) {
        throw std::invalid_argument(std::string(name) + " must have shape [" + std::to_string(length) + "]");
    }
}

template <class T>
void want_shape(const Array<T> &array, std::int64_t rows, std::int64_t columns, const char *name) {
    if (array.ndim() != 2 || array.shape(0) != rows || array.shape(1) != columns) {
        throw std::invalid_argument(std::string(name) + " must have shape [" + std::to_string(rows) + ", " +
                                    std::to_string(columns) + "]");
    }
}

// Offsets must start at 0, never fall, and end at `total`.
void want_offsets(const Int64 &offsets, std::int64_t total, const char *name) {
    bool good = offsets.ndim() == 1 && offsets.shape(0) >= 1 && offsets.data()[0] == 0 &&
                offsets.data()[offsets.size() - 1] == total;
    for (py::ssize_t i = 1; good && i < offsets.size(); ++i) good = offsets.data()[i - 1] <= offsets.data()[i];
    if (!good) throw std::invalid_argument(std::string(name) + " must rise from 0 to " + std::to_string(total));
}

Tokens tokens_of(const TokenArrays &arrays) {
    const auto &[offsets, row_offsets, loss_mask, turn, byte_end, control] = arrays;
    const std::int64_t total = loss_mask.size();
    want_length(loss_mask, total, "loss_mask");
    want_length(turn, total, "turn");
    want_length(byte_end, total, "byte_end");
    want_length(control, total, "control");
    want_offsets(offsets, total, "offsets");
    if (row_offsets.ndim() != 1 || row_offsets.size() != offsets.size()) {
        throw std::invalid_argument("row_offsets must be as long as offsets");
    }
    want_offsets(row_offsets, row_offsets.data()[row_offsets.size() - 1], "row_offsets");
    return {view(offsets), view(row_offsets), reinterpret_cast<const std::uint8_t *>(loss_mask.data()), turn.data(),
            byte_end.data(), control.data()};
}

Bytes bytes_of(const ByteArrays &arrays, const char *name) {
    const auto &[data, offsets] = arrays;
    want_length(data, data.size(), name);
    want_offsets(offsets, data.size(), name);
    return {view(data), view(offsets)};
}

MatchArrays match(const TokenArrays &pivot_arrays, const TokenArrays &source_arrays, const Int64 &partner,
                  int threads) {
    const Tokens pivot = tokens_of(pivot_arrays), source = tokens_of(source_arrays);
    const auto n = static_cast<std::int64_t>(pivot.offsets.size()) - 1;
    const auto n_source = static_cast<std::int64_t>(source.offsets.size()) - 1;
    want_length(partner, n, "partner");
    for (const std::int64_t p : view(partner)) {
        if (p < -1 || p >= n_source) throw std::invalid_argument("partner names a dialogue the source lacks");
    }
    const std::int64_t rows = pivot.row_offsets.back();
    UInt8 kind(rows);
    Int64 source_row(rows);
    Int32 chain(rows), rest_bytes(rows);
    const Match out{kind.mutable_data(), source_row.mutable_data(), chain.mutable_data(), rest_bytes.mutable_data()};
    {
        const py::gil_scoped_release unlocked;
        match_rows(pivot, source, view(partner), out, threads);
    }
    return {kind, source_row, chain, rest_bytes};
}

// kind, source_row, chain, rest_bytes; then gold, ends_turn and map_index, all [R]
using MatchedArrays = std::tuple<UInt8, Int64, Int32, Int32, Int32, UInt8, Int16>;

template <class S, class P>
py::tuple remap(const MatchedArrays &matched_arrays, const Array<S> &ids, const UInt16 &logprobs,
                const Float &gold_logprob, const Int32 &gold, const ByteArrays &source_bytes,
                const UInt8 &source_ends_turn, const ByteArrays &pivot_bytes, const Int32 &map_target,
                const UInt8 &map_quality, const Float &probability, std::tuple<int, int, int> choices,
                const Array<P> & /* a value of the ids' dtype */, int threads) {
    const auto &[kind, source_row, chain, rest_bytes, pivot_gold, ends_turn, map_index] = matched_arrays;
    const std::int64_t rows = kind.size();
    want_length(kind, rows, "kind");
    want_length(source_row, rows, "source_row");
    want_length(chain, rows, "chain");
    want_length(rest_bytes, rows, "rest_bytes");
    want_length(pivot_gold, rows, "gold");
    want_length(ends_turn, rows, "ends_turn");
    want_length(map_index, rows, "map_index");
    if (ids.ndim() != 2) throw std::invalid_argument("ids must have shape [Rs, K]");
    const std::int64_t n = ids.shape(0), k = ids.shape(1);
    want_shape(logprobs, n, k, "logprobs");
    want_length(gold_logprob, n, "gold_logprob");
    want_length(gold, n, "source gold");
    const Bytes source_tokens = bytes_of(source_bytes, "source bytes"), pivot_tokens = bytes_of(pivot_bytes, "pivot bytes");
    const auto source_vocab = static_cast<std::int64_t>(source_tokens.offsets.size()) - 1;
    want_length(source_ends_turn, source_vocab, "source ends_turn");
    if (map_target.ndim() != 2) throw std::invalid_argument("map targets must have shape [M, Vs]");
    want_shape(map_target, map_target.shape(0), source_vocab, "map targets");
    want_shape(map_quality, map_target.shape(0), source_vocab, "map qualities");
    want_length(probability, 32768, "probability");
    const auto [finer, unaligned, collisions] = choices;
    if (finer < 0 || finer > 2 || unaligned < 0 || unaligned > 1 || collisions < 0 || collisions > 1) {
        throw std::invalid_argument("unknown choice of granularity, unaligned rows or collisions");
    }
    const Matched matched{view(kind), source_row.data(), chain.data(), rest_bytes.data(),
                          pivot_gold.data(), ends_turn.data(), map_index.data()};
    const SourceRows<S> source{n, k, ids.data(), logprobs.data(), gold_logprob.data(), gold.data(), source_tokens,
                               view(source_ends_turn)};
    const Maps maps{map_target.shape(0), source_vocab, map_target.data(), map_quality.data()};
    const Options options{static_cast<Finer>(finer), static_cast<Unaligned>(unaligned),
                          static_cast<Collisions>(collisions)};
    Array<P> out_ids({rows, k});
    UInt16 out_logprobs({rows, k});
    Float out_gold(rows);
    UInt64 mass({std::int64_t{4}, std::int64_t{3}}), lost(source_vocab);
    std::fill_n(mass.mutable_data(), mass.size(), 0);
    std::fill_n(lost.mutable_data(), lost.size(), 0);
    const Remapped<P> out{out_ids.mutable_data(), out_logprobs.mutable_data(), out_gold.mutable_data(),
                          mass.mutable_data(), lost.mutable_data()};
    {
        const py::gil_scoped_release unlocked;
        remap_rows(matched, source, pivot_tokens, maps, options, view(probability), out, threads);
    }
    return py::make_tuple(out_ids, out_logprobs, out_gold, mass, lost);
}

template <class S, class P>
void bind_remap(py::module_ &m) {
    m.def("remap_rows", &remap<S, P>, py::arg("matched").noconvert(), py::arg("ids").noconvert(),
          py::arg("logprobs").noconvert(), py::arg("gold_logprob").noconvert(), py::arg("gold").noconvert(),
          py::arg("source_bytes").noconvert(), py::arg("source_ends_turn").noconvert(),
          py::arg("pivot_bytes").noconvert(), py::arg("map_target").noconvert(), py::arg("map_quality").noconvert(),
          py::arg("probability").noconvert(), py::arg("choices"), py::arg("id_like").noconvert(), py::arg("threads"));
}

}  // namespace

void bind_align(py::module_ &m) {
    m.def("match_rows", &match, py::arg("pivot").noconvert(), py::arg("source").noconvert(),
          py::arg("partner").noconvert(), py::arg("threads"));
    bind_remap<std::uint16_t, std::uint16_t>(m);
    bind_remap<std::uint16_t, std::int32_t>(m);
    bind_remap<std::int32_t, std::uint16_t>(m);
    bind_remap<std::int32_t, std::int32_t>(m);
}

}  // namespace fusechat
