// Alignment for Python. Everything that comes from there is checked here before the core reads it.
#include <algorithm>
#include <bit>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "align/dtw.hpp"
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
                const Float &map_weight, const UInt8 &map_quality, const Float &probability, std::tuple<int, int, int> choices,
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
    if (map_target.ndim() != 3 || map_target.shape(1) != source_vocab || map_target.shape(2) < 1) {
        throw std::invalid_argument("map targets must have shape [M, " + std::to_string(source_vocab) + ", m]");
    }
    if (map_weight.ndim() != 3 || !std::equal(map_target.shape(), map_target.shape() + 3, map_weight.shape())) {
        throw std::invalid_argument("map weights must have the shape of the map targets");
    }
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
    const Maps maps{map_target.shape(0), source_vocab, map_target.shape(2),
                    map_target.data(), map_weight.data(), map_quality.data()};
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
          py::arg("pivot_bytes").noconvert(), py::arg("map_target").noconvert(),
          py::arg("map_weight").noconvert(), py::arg("map_quality").noconvert(),
          py::arg("probability").noconvert(), py::arg("choices"), py::arg("id_like").noconvert(), py::arg("threads"));
}

Text code_points(PyObject *string) {
    const Py_ssize_t length = PyUnicode_GET_LENGTH(string);
    const int kind = PyUnicode_KIND(string);
    const void *data = PyUnicode_DATA(string);
    Text out(length);
    for (Py_ssize_t i = 0; i < length; ++i) out[i] = PyUnicode_READ(kind, data, i);
    return out;
}

// Every occurrence of `mark`, from left to right, replaced; an empty mark occurs nowhere.
Text replaced(Text text, const Text &mark, const Text &by) {
    if (mark.empty() || std::search(text.begin(), text.end(), mark.begin(), mark.end()) == text.end()) return text;
    Text out;
    for (auto at = text.begin();;) {
        const auto found = std::search(at, text.end(), mark.begin(), mark.end());
        out.insert(out.end(), at, found);
        if (found == text.end()) return out;
        out.insert(out.end(), by.begin(), by.end());
        at = found + mark.size();
    }
}

// A list of strings as numbers of its distinct strings, in order of first sight.
struct Interned {
    std::vector<std::int32_t> ids;
    std::vector<PyObject *> distinct;  // borrowed from the list

    explicit Interned(const py::list &tokens) {
        const py::dict numbers;
        // Tokens of one vocabulary are mostly the same objects over and over: those are known without their text.
        std::vector<std::pair<PyObject *, std::int32_t>> known(std::bit_ceil(2 * tokens.size()), {nullptr, 0});
        ids.reserve(tokens.size());
        for (const py::handle token : tokens) {
            std::size_t at = (reinterpret_cast<std::uintptr_t>(token.ptr()) >> 4) & (known.size() - 1);
            while (known[at].first && known[at].first != token.ptr()) at = (at + 1) & (known.size() - 1);
            if (!known[at].first) known[at] = {token.ptr(), number(numbers, token)};
            ids.push_back(known[at].second);
        }
    }

  private:
    std::int32_t number(const py::dict &numbers, py::handle token) {
        if (!PyUnicode_Check(token.ptr())) throw py::type_error("tokens must be strings");
        const py::object fresh = py::int_(distinct.size());
        PyObject *found = PyDict_SetDefault(numbers.ptr(), token.ptr(), fresh.ptr());
        if (!found) throw py::error_already_set();
        const auto id = static_cast<std::int32_t>(PyLong_AsLong(found));
        if (id == static_cast<std::int32_t>(distinct.size())) distinct.push_back(token.ptr());
        return id;
    }
};

// The strings without their mark.
std::vector<Form> stripped_forms(const Interned &tokens, const Text &mark) {
    std::vector<Form> forms;
    forms.reserve(tokens.distinct.size());
    for (PyObject *token : tokens.distinct) forms.push_back({replaced(code_points(token), mark, {}), {}});
    return forms;
}

bool any_empty(const std::vector<Form> &forms) {
    return std::any_of(forms.begin(), forms.end(), [](const Form &form) { return form.stripped.empty(); });
}

template <class Cost>
Warp warp_forms(const Interned &source, const Interned &pivot, const std::vector<Form> &source_forms,
                const std::vector<Form> &pivot_forms, std::size_t alphabet_size) {
    return warp(source.ids, pivot.ids, cost_table<Cost>(source_forms, pivot_forms, alphabet_size));
}

std::size_t longest(const std::vector<Form> &forms) {
    std::size_t length = 0;
    for (const Form &form : forms) length = std::max({length, form.stripped.size(), form.whole.size()});
    return length;
}

py::tuple dtw(const py::list &source_tokens, const py::list &pivot_tokens, const py::str &source_mark,
              const py::str &pivot_mark) {
    if (source_tokens.empty() || pivot_tokens.empty()) throw std::invalid_argument("both sides need a token");
    const Interned source(source_tokens), pivot(pivot_tokens);
    const Text from = code_points(source_mark.ptr()), to = code_points(pivot_mark.ptr());
    std::vector<Form> source_forms = stripped_forms(source, from), pivot_forms = stripped_forms(pivot, to);
    if (any_empty(source_forms) || any_empty(pivot_forms)) {
        for (std::size_t i = 0; i < source_forms.size(); ++i) {
            source_forms[i].whole = replaced(code_points(source.distinct[i]), from, to);
        }
        for (std::size_t i = 0; i < pivot_forms.size(); ++i) pivot_forms[i].whole = code_points(pivot.distinct[i]);
    }
    Warp found;
    {
        const py::gil_scoped_release unlocked;
        Alphabet alphabet;
        for (std::vector<Form> *forms : {&source_forms, &pivot_forms}) {
            for (Form &form : *forms) {
                alphabet.number_all(form.stripped);
                alphabet.number_all(form.whole);
            }
        }
        const bool small = std::max(longest(source_forms), longest(pivot_forms)) < 256;
        found = small ? warp_forms<std::uint8_t>(source, pivot, source_forms, pivot_forms, alphabet.size())
                      : warp_forms<std::uint32_t>(source, pivot, source_forms, pivot_forms, alphabet.size());
    }
    Int32 path({static_cast<py::ssize_t>(found.path.size()), py::ssize_t{2}});
    std::int32_t *out = path.mutable_data();
    for (const auto &[s, p] : found.path) *out++ = s, *out++ = p;
    return py::make_tuple(found.cost, path);
}

std::vector<Text> numbered(const py::list &strings, Alphabet &alphabet) {
    std::vector<Text> out;
    for (const py::handle string : strings) {
        if (!PyUnicode_Check(string.ptr())) throw py::type_error("texts must be strings");
        out.push_back(code_points(string.ptr()));
        alphabet.number_all(out.back());
    }
    return out;
}

py::tuple nearest_texts(const py::list &patterns, const py::list &texts, int threads) {
    Alphabet alphabet;
    const std::vector<Text> from = numbered(patterns, alphabet), to = numbered(texts, alphabet);
    Int64 index(from.size());
    Int32 distance(from.size());
    std::int64_t *const index_out = index.mutable_data();
    std::int32_t *const distance_out = distance.mutable_data();
    {
        const py::gil_scoped_release unlocked;
        nearest(from, to, alphabet.size(), index_out, distance_out, threads);
    }
    return py::make_tuple(index, distance);
}

Int32 edit_distances(const py::list &a, const py::list &b) {
    if (a.size() != b.size()) throw std::invalid_argument("both lists must be equally long");
    Alphabet alphabet;
    const std::vector<Text> left = numbered(a, alphabet), right = numbered(b, alphabet);
    Int32 out(left.size());
    for (std::size_t i = 0; i < left.size(); ++i) {
        out.mutable_data()[i] = static_cast<std::int32_t>(edit_distance(left[i], right[i]));
    }
    return out;
}

}  // namespace

void bind_align(py::module_ &m) {
    m.def("nearest", &nearest_texts, py::arg("patterns"), py::arg("texts"), py::arg("threads"));
    m.def("edit_distances", &edit_distances, py::arg("a"), py::arg("b"));
    m.def("dtw", &dtw, py::arg("source_tokens"), py::arg("pivot_tokens"), py::arg("source_mark"),
          py::arg("pivot_mark"));
    m.def("match_rows", &match, py::arg("pivot").noconvert(), py::arg("source").noconvert(),
          py::arg("partner").noconvert(), py::arg("threads"));
    bind_remap<std::uint16_t, std::uint16_t>(m);
    bind_remap<std::uint16_t, std::int32_t>(m);
    bind_remap<std::int32_t, std::uint16_t>(m);
    bind_remap<std::int32_t, std::int32_t>(m);
}

}  // namespace fusechat
