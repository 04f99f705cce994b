// Rows of tokens cut into pieces: a piece starts at a document's start and then every `chunk` tokens, so it lies in one
// document and nothing in it has to be masked.
#pragma once

#include <cstdint>
#include <vector>

#include "simd/piece.h"

namespace lm {

struct Pieces {
    std::vector<Piece> all;      // in order of row and begin
    std::vector<int64_t> first;  // [batch + 1]: row b has pieces [first[b], first[b + 1])
    int64_t slots = 0;           // at most so many states enter pieces of a row; never above length / chunk + 1

    // starts: [batch, length] or null. initial: a state enters the rows.
    Pieces(int64_t batch, int64_t length, int64_t chunk, const bool* starts, bool initial) {
        for (int64_t row = 0; row < batch; ++row, starts += starts ? length : 0) {
            first.push_back(static_cast<int64_t>(all.size()));
            int64_t used = 0;
            for (int64_t begin = 0; begin < length;) {
                int64_t end = begin + 1;
                while (end < length && end - begin < chunk && !(starts && starts[end])) ++end;
                const bool zero = (starts && starts[begin]) || (begin == 0 && !initial);
                if (begin > 0) all.back().leaves = !zero;
                all.push_back({row, begin, end - begin, zero ? Piece::kNone : used++, true});
                begin = end;
            }
            slots = used > slots ? used : slots;
        }
        first.push_back(static_cast<int64_t>(all.size()));
    }
};

}  // namespace lm
