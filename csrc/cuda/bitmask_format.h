// The unstructured weight as the tensor cores want it: bitmask and packed values, one record per tile of 16 outputs × 64 inputs.
//
//   record = 32 × uint32 mask, one word per lane  |  the kept values, lane after lane, padded to 16 bytes
//
// A lane's 32 bits are its 8 numbers in each of the tile's four 16 × 16 left operands (device.h, multiply_add): bit 8·q + 2·r + e is
// number e of register r in operand q. Expanding is a population count, a sum over the warp, and 32 conditional loads; no index is stored.
// Bytes per weight in 16-bit types: 1/8 + 2·density + padding; dense 2.
#pragma once

#include "cuda/device.h"

namespace se::cuda {

constexpr int kTileRows = 16;
constexpr int kTileInputs = 64;
constexpr int kMaskBytes = 128;
constexpr int kLargestRecord = kMaskBytes + kTileRows * kTileInputs * 2;

struct Place {
    int row, input;
};

// Where bit `bit` of lane `lane` lies in the tile.
SE_BOTH Place place_of(int lane, int bit) {
    const int q = bit / 8, r = bit / 2 % 4, e = bit % 2;
    return {lane / 4 + 8 * (r % 2), 16 * q + 2 * (lane % 4) + e + 8 * (r / 2)};
}

SE_BOTH int tiles_down(int rows) { return (rows + kTileRows - 1) / kTileRows; }
SE_BOTH int tiles_across(int inputs) { return (inputs + kTileInputs - 1) / kTileInputs; }

// Packs a dense row-major weight of 16-bit numbers. start[tile] is a record's place in units of 16 bytes, tile = row tile · tiles across +
// input tile, and start has one more entry for the end. Without `records` only the sizes are found. Zeros of either sign are left out.
// Returns the number of units.
inline int64_t pack_bitmask(const uint16_t* weight, int rows, int inputs, uint32_t* start, uint8_t* records) {
    int64_t unit = 0;
    const int down = tiles_down(rows), across = tiles_across(inputs);
    for (int i = 0; i < down; ++i) {
        for (int j = 0; j < across; ++j) {
            start[static_cast<int64_t>(i) * across + j] = static_cast<uint32_t>(unit);
            uint8_t* record = records ? records + unit * 16 : nullptr;
            int count = 0;
            for (int lane = 0; lane < 32; ++lane) {
                uint32_t mask = 0;
                for (int bit = 0; bit < 32; ++bit) {
                    const Place place = place_of(lane, bit);
                    const int row = i * kTileRows + place.row, input = j * kTileInputs + place.input;
                    if (row >= rows || input >= inputs) continue;
                    const uint16_t value = weight[static_cast<int64_t>(row) * inputs + input];
                    if (!(value & 0x7fffu)) continue;
                    mask |= 1u << bit;
                    if (record) memcpy(record + kMaskBytes + 2 * count, &value, 2);
                    ++count;
                }
                if (record) memcpy(record + 4 * lane, &mask, 4);
            }
            const int units = (kMaskBytes + 2 * count + 15) / 16;
            if (record) memset(record + kMaskBytes + 2 * count, 0, units * 16 - kMaskBytes - 2 * count);
            unit += units;
        }
    }
    start[static_cast<int64_t>(down) * across] = static_cast<uint32_t>(unit);
    return unit;
}

// The dense weight of packed records; the inverse of pack_bitmask but for the sign of zeros.
inline void unpack_bitmask(const uint32_t* start, const uint8_t* records, int rows, int inputs, uint16_t* weight) {
    memset(weight, 0, static_cast<size_t>(rows) * inputs * 2);
    const int across = tiles_across(inputs);
    for (int i = 0; i < tiles_down(rows); ++i) {
        for (int j = 0; j < across; ++j) {
            const uint8_t* record = records + static_cast<int64_t>(start[static_cast<int64_t>(i) * across + j]) * 16;
            int count = 0;
            for (int lane = 0; lane < 32; ++lane) {
                uint32_t mask;
                memcpy(&mask, record + 4 * lane, 4);
                for (int bit = 0; bit < 32; ++bit) {
                    if (!(mask >> bit & 1u)) continue;
                    const Place place = place_of(lane, bit);
                    const int64_t row = i * kTileRows + place.row, input = j * kTileInputs + place.input;
                    memcpy(weight + row * inputs + input, record + kMaskBytes + 2 * count++, 2);
                }
            }
        }
    }
}

// The left operands of one record in shared memory: operand q is a[q]. Every lane of the warp calls it.
SE_DEVICE void expand_record(uint32_t a[4][4], const char* record) {
    const uint32_t mask = reinterpret_cast<const uint32_t*>(record)[thread_index() % 32];
    const uint16_t* values = reinterpret_cast<const uint16_t*>(record + kMaskBytes) + exclusive_sum(population(mask));
    SE_UNROLL
    for (int q = 0; q < 4; ++q) {
        SE_UNROLL
        for (int r = 0; r < 4; ++r) {
            uint32_t pair = 0;
            SE_UNROLL
            for (int e = 0; e < 2; ++e) {
                if (mask >> (8 * q + 2 * r + e) & 1u) pair |= static_cast<uint32_t>(*values++) << (16 * e);
            }
            a[q][r] = pair;
        }
    }
}

}  // namespace se::cuda
