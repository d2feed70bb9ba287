// embed_bits and its backward: products with bits by tables of partial sums (the "four Russians" method).
//
// Four channels have 16 combinations. For a block of columns, the sum of the signed weight rows of every combination is worked
// out once; then a row costs one table look-up and one addition for four channels. Backward it is the transpose: gradients are
// added up by combination, and each combination goes to its four channels at the end.
#include "cpu/groups.h"

namespace bldm::BLDM_ISA {

namespace {

constexpr int kColumns = 64;                   // of a block
constexpr int kVectors = kColumns / kLanes;
constexpr int kTables = 8;                     // tables in use at once: 32 channels, 4 bytes
constexpr int64_t kRows = 128;                 // rows of a task

typedef F Row[kVectors];
typedef Row Table[16];

template <class T>
BLDM_INLINE void load_row(const T* x, int64_t count, Row& row) {
    T buffer[kColumns] = {};
    if (count < kColumns) {
        std::memcpy(static_cast<void*>(buffer), x, size_t(count) * sizeof(T));
        x = buffer;
    }
    for (int v = 0; v < kVectors; ++v) row[v] = load(x + v * kLanes);
}

template <class T>
BLDM_INLINE void store_row(const Row& row, int64_t count, T* x) {
    T buffer[kColumns];
    T* target = count < kColumns ? buffer : x;
    for (int v = 0; v < kVectors; ++v) store(target + v * kLanes, row[v]);
    if (count < kColumns) std::memcpy(static_cast<void*>(x), buffer, size_t(count) * sizeof(T));
}

// The sums of four channels of the weight (a block of its columns) for all 16 combinations of their bits.
template <class T>
void fill(Table& table, const T* weight, int64_t channels, int64_t columns, int64_t first_channel, int64_t column,
          bool is_signed) {
    Row step[4] = {};  // what setting a bit adds
    std::memset(table[0], 0, sizeof table[0]);
    for (int j = 0; j < 4 && first_channel + j < channels; ++j) {
        load_row(weight + (first_channel + j) * columns + column, std::min<int64_t>(kColumns, columns - column), step[j]);
        if (!is_signed) continue;
        for (int v = 0; v < kVectors; ++v) table[0][v] -= step[j][v], step[j][v] *= 2.0f;
    }
    for (int combination = 1; combination < 16; ++combination)
        for (int v = 0; v < kVectors; ++v)
            table[combination][v] = table[combination & (combination - 1)][v] + step[__builtin_ctz(unsigned(combination))][v];
}

}  // namespace

void embed_bits(const uint8_t* packed, const void* weight, int64_t type, const void* bias, int64_t rows, int64_t channels,
                int64_t columns, bool is_signed, void* out, int threads) {
    const int64_t row_bytes = (channels + 7) / 8;
    with_type(type, [&](auto zero) {
        using T = decltype(zero);
        const T* w = static_cast<const T*>(weight);
        T* results = static_cast<T*>(out);
#pragma omp parallel for collapse(2) num_threads(threads) if (rows * columns * row_bytes > kSerialBytes)
        for (int64_t first = 0; first < rows; first += kRows)
            for (int64_t column = 0; column < columns; column += kColumns) {
                alignas(64) Row sums[kRows];
                alignas(64) Table tables[kTables];
                const int64_t width = std::min<int64_t>(kColumns, columns - column), count = std::min(kRows, rows - first);
                Row start = {};
                if (bias) load_row(static_cast<const T*>(bias) + column, width, start);
                for (int64_t m = 0; m < count; ++m) std::memcpy(sums[m], start, sizeof start);
                for (int64_t byte = 0; byte < row_bytes; byte += kTables / 2) {
                    const int used = int(std::min<int64_t>(kTables, 2 * (row_bytes - byte)));
                    for (int t = 0; t < used; ++t)
                        fill(tables[t], w, channels, columns, 8 * byte + 4 * t, column, is_signed);
                    for (int64_t m = 0; m < count; ++m) {
                        const uint8_t* bits = packed + (first + m) * row_bytes + byte;
                        Row total;
                        std::memcpy(total, sums[m], sizeof total);
                        for (int t = 0; t < used; ++t) {
                            const Row& part = tables[t][bits[t / 2] >> 4 * (t % 2) & 15];
                            for (int v = 0; v < kVectors; ++v) total[v] += part[v];
                        }
                        std::memcpy(sums[m], total, sizeof total);
                    }
                }
                for (int64_t m = 0; m < count; ++m) store_row(sums[m], width, results + (first + m) * columns + column);
            }
    });
}

void embed_bits_backward(const void* grad, int64_t type, const uint8_t* packed, int64_t rows, int64_t channels,
                         int64_t columns, bool is_signed, void* out, int threads) {
    const int64_t row_bytes = (channels + 7) / 8;
    with_type(type, [&](auto zero) {
        using T = decltype(zero);
        const T* g = static_cast<const T*>(grad);
        T* results = static_cast<T*>(out);
#pragma omp parallel for collapse(2) num_threads(threads) if (rows * columns * row_bytes > kSerialBytes)
        for (int64_t byte = 0; byte < row_bytes; byte += kTables / 2)
            for (int64_t column = 0; column < columns; column += kColumns) {
                alignas(64) Table tables[kTables] = {};
                const int64_t width = std::min<int64_t>(kColumns, columns - column);
                const int used = int(std::min<int64_t>(kTables, 2 * (row_bytes - byte)));
                for (int64_t m = 0; m < rows; ++m) {
                    const uint8_t* bits = packed + m * row_bytes + byte;
                    Row row;
                    load_row(g + m * columns + column, width, row);
                    for (int t = 0; t < used; ++t) {
                        Row& part = tables[t][bits[t / 2] >> 4 * (t % 2) & 15];
                        for (int v = 0; v < kVectors; ++v) part[v] += row[v];
                    }
                }
                for (int64_t c = 8 * byte; c < std::min(channels, 8 * byte + 4 * used); ++c) {
                    const Table& table = tables[c / 4 - 2 * byte];
                    Row total = {};
                    for (int combination = 0; combination < 16; ++combination)
                        for (int v = 0; v < kVectors; ++v) {
                            const bool set = combination >> c % 4 & 1;
                            if (set || is_signed) total[v] += set ? table[combination][v] : -table[combination][v];
                        }
                    store_row(total, width, results + c * columns + column);
                }
            }
    });
}

}  // namespace bldm::BLDM_ISA
