// Packed bitmasks: bool to bits, bits to bool. Bit j of word w of a row is column 32 w + j.
// Strides are in elements.
#pragma once

#include <cstdint>

namespace gradsel {

void pack_bits(const uint8_t* mask, int64_t rows, int64_t cols, int64_t row_stride, int64_t col_stride, uint32_t* bits,
               int threads);
void unpack_bits(const uint32_t* bits, int64_t rows, int64_t cols, uint8_t* mask, int threads);

}  // namespace gradsel
